"""A whole training step of a decoder as a CUDA graph."""

import pytest
import torch

from fastvae.nn import GRUDecoder, LSTMDecoder

pytestmark = pytest.mark.gpu
SPECIAL = {"pad_index": 0, "unk_index": 1, "bos_index": 2, "eos_index": 3}


def batch(seed):
    torch.manual_seed(seed)
    tokens = torch.randint(4, 50, (5, 9))
    for row, length in enumerate(torch.randint(3, 10, (5,)).tolist()):
        tokens[row, length:] = 0
    return tokens.cuda(), torch.randn(5, 3).cuda(), torch.tensor([seed]).cuda()


def make(kind, hidden_size, dtype):
    torch.manual_seed(0)
    settings = {"layer_norm": True} if kind == "layer_norm" else {}
    layer = GRUDecoder if kind == "GRU" else LSTMDecoder
    decoder = layer(50, 7, hidden_size, latent_dim=3, num_layers=2, word_dropout=0.3, **settings, **SPECIAL)
    return decoder.to("cuda", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "hidden_size"), [("LSTM", 16), ("LSTM", 128), ("LSTM", 257), ("GRU", 33), ("layer_norm", 33)]
)
def test_a_training_step_is_captured(kind, hidden_size, dtype):
    ours, eager = make(kind, hidden_size, dtype), make(kind, hidden_size, dtype)
    optimizers = [torch.optim.SGD(d.parameters(), lr=0.1) for d in (ours, eager)]
    inputs = batch(0)

    def step(decoder, optimizer, tokens, z, seed):
        optimizer.zero_grad(set_to_none=False)
        loss = decoder(tokens, z.to(dtype), seed=seed).mean()
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled and allocated once
        for _ in range(2):
            step(ours, optimizers[0], *inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(ours, optimizers[0], *inputs)
    for _ in range(2):
        step(eager, optimizers[1], *batch(0))
    for seed in (1, 2, 3):
        for static, new in zip(inputs, batch(seed), strict=True):
            static.copy_(new)
        graph.replay()
        expected = step(eager, optimizers[1], *batch(seed))
        torch.testing.assert_close(captured, expected)
    for mine, theirs in zip(ours.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
