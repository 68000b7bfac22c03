"""The sentence VAE in any pairing, and its options against posterior collapse: each does what it claims."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from fastvae.models import SentenceVAE
from fastvae.nn import LatentAdversary, reverse_gradient

V, LENGTHS = 15, torch.tensor([7, 3, 5, 4, 6, 2])
KINDS = ("lstm", "gru", "transformer")


def sentences(lengths=LENGTHS):
    tokens = torch.randint(4, V, (len(lengths), int(lengths.max())), generator=torch.Generator().manual_seed(3))
    tokens[:, 0] = 2
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[length - 1] = 3
        row[length:] = 0
    return tokens


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    return SentenceVAE(V, **({"embed_dim": 8, "hidden_size": 8, "latent_dim": 3, "num_heads": 2} | settings))


def seed(value):
    return torch.tensor([value])


@pytest.mark.parametrize(("encoder", "decoder"), [*itertools.product(KINDS, KINDS)])
def test_every_pairing(encoder, decoder):
    settings = {"num_layers": 2, "encoder_layers": 1, "share_embedding": True, "tie_weights": True, "word_dropout": 0.2}
    model, tokens = make_model(encoder=encoder, decoder=decoder, **settings), sentences()
    output = model(tokens, LENGTHS, seed=seed(1))
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert (model.encoder.num_layers, model.decoder.num_layers) == (1, 2)
    again = SentenceVAE(**model.config)
    again.load_state_dict(model.state_dict())
    for copy in (model.eval(), again.eval()):
        torch.testing.assert_close(copy(tokens, seed=seed(1)).nll, model(tokens, LENGTHS, seed=seed(1)).nll)
    samples = model.importance_weighted_nll(tokens, num_samples=5, chunk=2)
    assert samples.isfinite().all()
    assert model.reconstruct(tokens, max_length=5)[0].shape[0] == 6
    assert len(model.sample(4, strategy="beam", max_length=5)[1]) == 4


def test_a_config_from_before_these_options_builds_the_same_model():
    """Neither its tensors nor its losses change with what was added."""
    before = {"vocab_size": V, "embed_dim": 6, "hidden_size": 8, "latent_dim": 3, "num_layers": 1, "dropout": 0.0}
    torch.manual_seed(0)
    model = SentenceVAE(**before)
    assert sorted({name.partition(".")[0] for name in model.state_dict()}) == ["decoder", "encoder", "head"]
    assert type(model.head).__name__ == "GaussianHead"
    assert (type(model.encoder).__name__, type(model.decoder).__name__) == ("LSTMEncoder", "LSTMDecoder")


@pytest.mark.parametrize("scale", [0.3, 0.9])
def test_batch_normalized_means_keep_the_kl_above_its_bound(scale):
    model, tokens = make_model(batch_norm=scale), sentences(torch.full((64,), 6))
    with torch.no_grad():
        model.head.linear.weight[:3].mul_(1e-3)  # an encoder that all but ignores its input
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        output = model(tokens, kl_weight=3.0)
        optimizer.zero_grad()
        output.kl.mean().backward()  # nothing but the force that collapses
        optimizer.step()
    bound = 3 * scale**2 / 2
    assert output.kl.mean().item() >= bound - 1e-4
    assert output.kl.mean().item() < 1.5 * bound + 0.1, "the force must have brought it near the bound"
    mean = model.encode(tokens)[0]
    torch.testing.assert_close(mean.std(0, correction=0), torch.full((3,), scale), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.mean(0), model.head.shift, rtol=0, atol=1e-4)
    alone = [model.eval().encode(row[None])[0][0] for row in tokens[:3]]
    torch.testing.assert_close(torch.stack(alone), model.encode(tokens)[0][:3])


def test_bag_of_words_is_the_loss_computed_by_hand():
    model, tokens = make_model(bag_of_words=0.7), sentences()
    z = model.head(model.encoder(tokens, LENGTHS), seed=seed(1)).z
    log_probs = model.words(z).log_softmax(-1)
    bags = [-sum(row[word] for word in words[1 : length - 1].tolist())
            for row, words, length in zip(log_probs, tokens, LENGTHS.tolist(), strict=True)]  # fmt: skip
    assert bags[-1] == 0, "the last sentence has no word"
    plain = make_model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("words")})
    difference = model(tokens, LENGTHS, seed=seed(1)).loss - plain(tokens, LENGTHS, seed=seed(1)).loss
    torch.testing.assert_close(difference, 0.7 * torch.stack([torch.as_tensor(bag) for bag in bags]).mean())
    assert torch.equal(model(tokens, LENGTHS, seed=seed(1)).neg_elbo, plain(tokens, LENGTHS, seed=seed(1)).neg_elbo)


@pytest.mark.parametrize("free_bits", [0.5, 4.0])
def test_free_bits_per_batch_bound_the_whole_kl(free_bits):
    model, tokens = make_model(), sentences()
    with torch.no_grad():
        model.head.linear.bias[:3] = torch.tensor([0.0, 1.0, 2.0])
    output = model(tokens, kl_weight=0.5, free_bits=free_bits, free_bits_per="batch", seed=seed(1))
    mean, log_var = model.encode(tokens)
    kl = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(1).mean().item()
    assert 0.5 < kl < 4.0
    assert output.loss.item() == pytest.approx(output.nll.mean().item() + 0.5 * max(free_bits, kl), rel=1e-5)
    (gradient,) = torch.autograd.grad(output.loss - output.nll.mean(), model.head.linear.weight)
    assert (gradient.abs().sum() > 0) == (free_bits < kl)
    with pytest.raises(ValueError, match="free_bits_per: expected one of"):
        model(tokens, free_bits_per="word")


@pytest.mark.parametrize("noise", ["drop", "blank", "substitute", "shuffle"])
def test_noise_is_for_the_encoder_alone_and_in_training_only(noise):
    model, tokens = make_model(encoder_noise=noise, encoder_noise_level=3 if noise == "shuffle" else 0.9), sentences()
    read = {}
    for name in ("encoder", "decoder"):
        getattr(model, name).register_forward_pre_hook(lambda _, given, name=name: read.update({name: given}))
    model(tokens, LENGTHS, seed=seed(1))
    assert torch.equal(read["decoder"][0], tokens)
    assert torch.equal(read["decoder"][2], LENGTHS)
    noisy, lengths = read["encoder"]
    assert not torch.equal(noisy, tokens)
    assert torch.equal(lengths, LENGTHS) == (noise != "drop")
    assert (noisy[:, 0] == 2).all()
    assert (noisy.gather(1, lengths[:, None] - 1) == 3).all()
    clean = make_model().eval()
    clean.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(tokens, seed=seed(1)).loss, clean(tokens, seed=seed(1)).loss)


def test_a_plain_auto_encoder_has_neither_noise_nor_kl():
    model, tokens = make_model(regularizer="none"), sentences()
    first, second = model(tokens, seed=seed(1)), model(tokens, seed=seed(2))
    assert torch.equal(first.nll, second.nll)
    assert not first.kl.any()
    torch.testing.assert_close(first.nll, model.decoder(tokens, model.encode(tokens)[0], LENGTHS))
    torch.testing.assert_close(first.loss, first.nll.mean())
    assert (model.encode(tokens)[1] == -20).all()
    with pytest.raises(ValueError, match="free_bits: expected 0"):
        model(tokens, free_bits=0.1)
    with pytest.raises(ValueError, match="no posterior density"):
        model.importance_weighted_nll(tokens)


def test_a_turned_gradient():
    x = torch.tensor([1.5, -2.0], requires_grad=True)
    y = reverse_gradient(x, 0.3)
    assert torch.equal(y, x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x)[0], -0.3 * 2 * x)


def test_the_adversary_learns_and_the_codes_hide():
    """Its own gradient is that of the cross-entropy; the codes' is the same turned round."""
    torch.manual_seed(0)
    adversary, z = LatentAdversary(2, 16), torch.randn(50, 2, requires_grad=True)
    loss = adversary(z, 0.25, seed=seed(3))
    plain = F.binary_cross_entropy_with_logits(adversary.judge(z), torch.zeros(50, 1))
    (turned,), (straight,) = torch.autograd.grad(loss, z), torch.autograd.grad(plain, z)
    torch.testing.assert_close(turned, -0.25 * straight)
    assert adversary(z, seed=seed(3)).item() == pytest.approx(2 * math.log(2), abs=0.2)

    codes = nn.Parameter(3 + 0.1 * torch.randn(256, 2))
    optimizer = torch.optim.Adam([{"params": adversary.parameters()}, {"params": [codes], "lr": 2e-2}], lr=2e-3)
    for step in range(400):
        optimizer.zero_grad()
        adversary(codes, seed=seed(step)).backward()
        optimizer.step()
    assert codes.mean(0).abs().max() < 1.0


def test_an_adversarial_auto_encoder_is_one_loss():
    model, tokens = make_model(regularizer="adversarial"), sentences()
    output = model(tokens, kl_weight=0.5, seed=seed(1))
    assert not output.kl.any()
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert (output.loss - output.nll.mean()).item() == pytest.approx(2 * math.log(2), abs=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "cnn"}, "encoder: expected one of lstm, gru, transformer, got 'cnn'"),
        ({"decoder": "mlp"}, "decoder: expected one of"),
        ({"regularizer": "mmd"}, "regularizer: expected one of kl, none, adversarial"),
        ({"bag_of_words": -1.0}, "bag_of_words"),
        ({"batch_norm": -0.5}, "scale: expected above 0"),
        ({"encoder_noise": "swap"}, "noise: expected one of"),
        ({"encoder_noise": "drop", "encoder_noise_level": 1.5}, "level: expected a probability"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_model(**settings)
