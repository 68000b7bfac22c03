import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastvae.nn
from fastvae.models import DenoisingAutoEncoder, LinearAutoEncoder, SparseAutoEncoder
from fastvae.models import autoencoder as autoencoder_module
from fastvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder

NOISES = {"gaussian": 0.4, "masking": 0.3, "salt_and_pepper": 0.5}
SHAPE = (3, 5)


def seed(value=1):
    return torch.tensor([value])


def data(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def denoising(encoder=None, decoder=None, *, noise="masking", level=0.5, **settings):
    encoder, decoder = encoder or MLPEncoder(SHAPE, (6,)), decoder or MLPDecoder(6, SHAPE)
    return DenoisingAutoEncoder(encoder, decoder, noise=noise, level=level, **settings)


def test_sparse_auto_encoder_is_the_layer():
    assert SparseAutoEncoder is fastvae.nn.SparseAutoEncoder


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_linear_reconstruction_and_loss(tied, bias):
    torch.manual_seed(0)
    model = LinearAutoEncoder(7, 3, tied=tied, bias=bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = data(5, 7)
    output = model(x)
    centre = model.bias if bias else 0
    codes = (x - centre) @ (model.decoder if tied else model.encoder).T
    reconstruction = codes @ model.decoder + centre
    torch.testing.assert_close(output.codes, codes)
    torch.testing.assert_close(output.reconstruction, reconstruction)
    torch.testing.assert_close(output.error, 0.5 * (x - reconstruction).square().sum(1))
    torch.testing.assert_close(output.loss, output.error.mean())
    torch.testing.assert_close(model.reconstruct(x), output.reconstruction.detach())
    assert len(list(model.parameters())) == 1 + (not tied) + bias
    output.loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_linear_config_state_and_copies():
    model = LinearAutoEncoder(7, 3, tied=False)
    again = LinearAutoEncoder(**model.config)
    again.load_state_dict(model.state_dict())
    x = data(5, 7)
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).loss, model(x).loss)


def encoders():
    return {
        "linear": (nn.Linear(15, 4), (15,)),
        "sequential": (nn.Sequential(nn.Flatten(), nn.Linear(15, 6, bias=False), nn.Tanh(), nn.Linear(6, 4)), SHAPE),
        "mlp": (MLPEncoder(SHAPE, (6, 4)), SHAPE),
        "convolution": (nn.Sequential(ConvEncoder((1, *SHAPE), (6,)), nn.Linear(36, 4)), (1, *SHAPE)),
        "dropout first": (nn.Sequential(nn.Flatten(), nn.Dropout(0.0), nn.Linear(15, 4)), SHAPE),
    }


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kind", encoders())
def test_denoising_is_the_composition_with_the_corrupted_copy(kind, noise, monkeypatch):
    torch.manual_seed(0)
    encoder, shape = encoders()[kind]
    model = DenoisingAutoEncoder(encoder, MLPDecoder(4, shape, ()), noise=noise, level=NOISES[noise], low=-1, high=2)
    fused = []
    original = autoencoder_module.corrupted_linear
    monkeypatch.setattr(autoencoder_module, "corrupted_linear", lambda *a, **k: fused.append(1) or original(*a, **k))
    x = data(6, *shape)
    output = model(x, seed=seed())
    assert bool(fused) == (kind in ("linear", "sequential", "mlp"))
    corrupted = model.corrupt(x, seed=seed())
    assert not torch.equal(corrupted, x)
    codes = encoder(corrupted)
    torch.testing.assert_close(output.codes, codes)
    torch.testing.assert_close(output.reconstruction, model.decoder(codes))
    torch.testing.assert_close(output.error, 0.5 * (x - model.decoder(codes)).square().flatten(1).sum(1))
    grads = torch.autograd.grad(output.loss, list(model.parameters()))
    error = 0.5 * (x - model.decoder(encoder(model.corrupt(x, seed=seed())))).square().flatten(1).sum(1)
    expected = torch.autograd.grad(error.mean(), list(model.parameters()))
    for grad, wish in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wish, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["encoder", "layer"])
def test_hooks_of_the_encoder_are_called(where):
    encoder = nn.Sequential(nn.Linear(15, 4), nn.ReLU())
    model = DenoisingAutoEncoder(encoder, nn.Linear(4, 15), noise="masking", level=0.3)
    seen = []
    (encoder if where == "encoder" else encoder[0]).register_forward_hook(lambda *_: seen.append(1))
    model(data(6, 15))
    assert seen


def test_bernoulli_likelihood():
    torch.manual_seed(0)
    model = DenoisingAutoEncoder(
        ConvEncoder((1, 7, 5), (3,)), nn.Sequential(nn.Linear(36, 2), ConvDecoder(2, (1, 7, 5), (3,))),
        noise="salt_and_pepper", level=0.2, likelihood="bernoulli",
    )  # fmt: skip
    x = data(6, 1, 7, 5)
    output = model(x, seed=seed())
    logits = model.decoder(model.encoder(model.corrupt(x, seed=seed())))
    expected = F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(output.error, expected)
    torch.testing.assert_close(output.reconstruction, logits.sigmoid())
    torch.testing.assert_close(model.reconstruct(x), model.decoder(model.encoder(x)).sigmoid().detach())


def test_corruption_follows_seed_and_generator_in_either_mode():
    model = denoising()
    x = data(6, *SHAPE)
    draws = [model(x, generator=torch.Generator().manual_seed(value)).error for value in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(model.train()(x, seed=seed()).error, model.eval()(x, seed=seed()).error)
    before = torch.random.get_rng_state()
    DenoisingAutoEncoder(nn.Identity(), nn.Identity(), noise="masking", level=0.5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_denoising_config_state_and_copies():
    model = denoising()
    again = denoising(**model.config)
    again.load_state_dict(model.state_dict())
    x = data(5, *SHAPE)
    for other in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, seed=seed()).loss, model(x, seed=seed()).loss)


def test_compiles_whole():
    torch.compiler.reset()
    model = denoising()
    x = data(5, *SHAPE)
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(x, seed=seed())
    torch.testing.assert_close(output.error, model(x, seed=seed()).error)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast_are_near_float32(dtype):
    torch.manual_seed(0)
    x = data(5, *SHAPE)
    for model, rows, options in ((denoising(), x, {"seed": seed()}), (LinearAutoEncoder(15, 4), x.flatten(1), {})):
        expected = model(rows, **options).error
        with torch.autocast("cpu", dtype):
            mixed = model(rows, **options)
        mixed.loss.backward()
        half = copy.deepcopy(model).to(dtype)(rows.to(dtype), **options)
        for output in (mixed, half):
            assert output.error.dtype == output.loss.dtype == torch.float32
            torch.testing.assert_close(output.error, expected, rtol=0.03, atol=0.05)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: LinearAutoEncoder(0, 3), ValueError, "in_features: expected"),
        (lambda m: LinearAutoEncoder(7, 0), ValueError, "latent_dim: expected"),
        (lambda m: LinearAutoEncoder(7, 3)(data(5, 6)), ValueError, r"x: expected shape \(batch, 7\)"),
        (lambda m: LinearAutoEncoder(7, 3)(data(0, 7)), ValueError, "x: expected shape"),
        (lambda m: LinearAutoEncoder(7, 3)(data(5, 7).long()), TypeError, "x: expected float32"),
        (lambda m: m(data(5, 15)), ValueError, r"x: expected shape \(batch, 3, 5\)"),
        (lambda m: m(data(0, *SHAPE)), ValueError, "x: expected shape"),
        (lambda m: m(data(5, *SHAPE).int()), TypeError, "x: expected float32"),
        (lambda m: m(data(5, *SHAPE), seed=torch.tensor(1)), ValueError, "seed"),
        (lambda m: denoising(m.encoder, nn.Linear(6, 15))(data(5, *SHAPE)), ValueError, "decoder: expected"),
        (lambda m: denoising(level=-0.1), ValueError, "level: expected"),
        (lambda m: denoising(level=math.nan), ValueError, "level: expected"),
        (lambda m: denoising(noise="masking", level=1.1), ValueError, "level: expected"),
        (lambda m: denoising(noise="rain"), ValueError, "noise: expected"),
        (lambda m: denoising(likelihood="categorical"), ValueError, "likelihood: expected"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(denoising())
