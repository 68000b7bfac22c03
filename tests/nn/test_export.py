"""The decoder's step outside Python writes what `LSTMDecoder.generate` writes."""

import functools
import sys

import pytest
import torch

from fastvae.nn import DecoderStart, DecoderStep, LSTMDecoder, export_decoder, export_onnx

PAD, UNK, BOS, EOS = 0, 1, 2, 3
SPECIAL = {"pad_index": PAD, "unk_index": UNK, "bos_index": BOS, "eos_index": EOS}
SHAPES = [  # num_layers, latent_dim, dtype, special tokens
    pytest.param((1, 3, torch.float32, SPECIAL), id="one layer"),
    pytest.param((2, 3, torch.float64, SPECIAL | {"pad_index": EOS}), id="two layers, padded with </s>"),
    pytest.param((2, 0, torch.float32, SPECIAL | {"pad_index": None}), id="no latent, no padding"),
]


def make_decoder(num_layers=1, latent_dim=3, dtype=torch.float32, special=SPECIAL):
    """A random decoder whose distributions differ much from step to step and latent to latent."""
    torch.manual_seed(0)
    decoder = LSTMDecoder(30, 5, 6, latent_dim, num_layers=num_layers, dropout=0.5, **special).to(dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(4)
        decoder.embedding.weight.mul_(10)
        decoder.output.bias[[BOS, EOS]] += torch.tensor([3.0, 1.5], dtype=dtype)  # <s> would be likely
    return decoder


def greedy(start, step, z, max_length):
    """The tokens (batch, max_length) a server would choose, padded behind </s>, and their log-probabilities."""
    static_gates, h, c = start(z)
    last, ended, tokens, log_probs = torch.full((z.size(0),), BOS), torch.zeros(z.size(0), dtype=torch.bool), [], []
    for _ in range(max_length):
        scores, h, c = step(last, static_gates, h, c)
        best, last = scores.max(-1)
        tokens.append(last.masked_fill(ended, PAD))
        log_probs.append(best.masked_fill(ended, 0.0))
        ended = ended | (last == EOS)
    return torch.stack(tokens, 1), torch.stack(log_probs, 1)


def latents(decoder, batch):
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, decoder.latent_dim, dtype=decoder.weight_hh.dtype, generator=random)


def assert_writes_as_generate(start, step, decoder, batch):
    z = torch.randn(
        batch, decoder.latent_dim, dtype=decoder.weight_hh.dtype, generator=torch.Generator().manual_seed(1)
    )
    expected, lengths, log_probs = decoder.generate(z, 8, return_log_probs=True)
    tokens, scores = greedy(start, step, z, 8)
    valid = torch.arange(expected.size(1)) < lengths[:, None]
    torch.testing.assert_close(tokens[:, : expected.size(1)], expected.masked_fill(~valid, PAD))
    torch.testing.assert_close(scores[:, : expected.size(1)], log_probs, rtol=1e-4, atol=1e-4)
    return lengths


@pytest.fixture(params=SHAPES)
def decoder(request):
    return make_decoder(*request.param)


def test_modules_and_programs_write_as_generate(decoder):
    lengths = assert_writes_as_generate(DecoderStart(decoder), DecoderStep(decoder), decoder, 33)
    assert decoder.latent_dim == 0 or len(set(lengths.tolist())) > 1, "sentences of several lengths"
    start, step = export_decoder(decoder)
    assert decoder.training, "exporting leaves the mode"
    for batch in (1, 2, 33):
        assert_writes_as_generate(start.module(), step.module(), decoder, batch)


@pytest.mark.parametrize("decoder", SHAPES[1:], indirect=True)
def test_onnxruntime_writes_as_generate(decoder, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    paths = export_onnx(decoder, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["start.onnx", "step.onnx"]
    assert sorted(paths[0].parent.iterdir()) == list(paths), "weights inside, nothing left over"
    sessions = [runtime.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in paths]
    for session in sessions:
        metadata = session.get_modelmeta().custom_metadata_map
        assert {name: int(value) for name, value in metadata.items()} == {
            "bos_index": BOS, "eos_index": EOS, "vocab_size": 30, "latent_dim": decoder.latent_dim,
            "num_layers": decoder.num_layers, "hidden_size": 6,
        }  # fmt: skip

    def call(session, *arguments):
        names = [argument.name for argument in session.get_inputs()]
        inputs = {name: argument.numpy() for name, argument in zip(names, arguments, strict=True)}
        return tuple(torch.from_numpy(output) for output in session.run(None, inputs))

    for batch in (1, 2, 33):
        assert_writes_as_generate(*(functools.partial(call, session) for session in sessions), decoder, batch)
    names = [[argument.name for argument in [*session.get_inputs(), *session.get_outputs()]] for session in sessions]
    states = ["static_gates", "h", "c"]
    assert names == [["z", *states], ["tokens", *states, "log_probs", "next_h", "next_c"]]


def test_step_scores_given_words(decoder):
    """Also those that it would not choose, over as many steps as there are words."""
    tokens = torch.randint(4, 30, (7, 9), generator=torch.Generator().manual_seed(2))
    tokens[:, 0] = BOS
    z = latents(decoder, 7)
    expected = decoder.eval().logits(tokens, z).log_softmax(-1)
    never = {BOS, decoder.pad_index} - {None, EOS}
    expected[..., list(never)] = -torch.inf
    step = DecoderStep(decoder)
    static_gates, h, c = DecoderStart(decoder)(z)
    assert h.shape == c.shape == (decoder.num_layers, 7, 6)
    for t in range(8):
        log_probs, h, c = step(tokens[:, t], static_gates, h, c)
        torch.testing.assert_close(log_probs, expected[:, t], rtol=1e-4, atol=1e-4)


def test_decoder_without_biases_or_initial_state():
    embedding, output = torch.nn.Embedding(30, 5), torch.nn.Linear(6, 30, bias=False)
    lstm = torch.nn.LSTM(8, 6, batch_first=True, bias=False)
    decoder = LSTMDecoder.from_modules(embedding, lstm, output, **SPECIAL)
    start, step = export_decoder(decoder)
    assert_writes_as_generate(start.module(), step.module(), decoder, 7)


def test_half_precision_scores_are_float32():
    decoder = make_decoder(dtype=torch.bfloat16)
    start, step = export_decoder(decoder)
    static_gates, h, c = start.module()(torch.zeros(2, 3, dtype=torch.bfloat16))
    log_probs, h, c = step.module()(torch.tensor([BOS, 7]), static_gates, h, c)
    assert log_probs.dtype == torch.float32
    assert h.dtype == c.dtype == torch.bfloat16


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_package_is_named(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {package}, .* pip install 'fastvae\[export\]'"):
        export_onnx(make_decoder(), tmp_path / "folder")
    assert not list(tmp_path.iterdir())


def test_failed_write_leaves_the_old_file(monkeypatch, tmp_path):
    pytest.importorskip("onnxscript")
    old = tmp_path / "start.onnx"
    old.write_bytes(b"old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(make_decoder(), tmp_path)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]
