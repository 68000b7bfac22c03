"""Sparse coding, LISTA against ISTA, sparse auto-encoders: losses, gradients, dead latents, planted directions."""

import math

import pytest
import torch
import torch.nn.functional as F

from bench.interleave import peak_bytes
from fastvae.nn import LISTA, SparseAutoEncoder, SparseCoding
from fastvae.ops.sparse import ista, sparse_encode

SETTINGS = {
    "relu": {"l1": 0.2},
    "top_k": {"k": 3},
    "batch_top_k": {"k": 3},
    "jump_relu": {"l0": 0.06, "threshold": 0.2, "bandwidth": 0.2},
}
every_activation = pytest.mark.parametrize("activation", SETTINGS)


def auto_encoder(activation, n_features=7, n_latents=33, **settings):
    torch.manual_seed(0)
    sae = SparseAutoEncoder(n_features, n_latents, activation=activation, **(SETTINGS[activation] | settings))
    with torch.no_grad():
        for parameter in (sae.bias, sae.pre_bias):
            parameter.normal_(std=0.1)
        if not settings.get("tied"):
            sae.encoder += 0.1 * torch.randn_like(sae.encoder)
    return sae


def norms(rows):
    return torch.linalg.vector_norm(rows, dim=1)


# ------------------------------------------------------------------------------------------------- SparseCoding
@pytest.mark.parametrize("positive", [False, True])
def test_sparse_coding_solves_and_reconstructs(positive):
    torch.manual_seed(0)
    layer = SparseCoding(7, 33, 0.1, l2=0.05, positive=positive, tol=1e-10, max_iter=5000, dtype=torch.float64)
    x = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    codes = layer(x)
    assert codes.shape == (2, 5, 33)
    expected = sparse_encode(x.reshape(10, 7), layer.dictionary, 0.1, l2=0.05, positive=positive, tol=1e-10)
    torch.testing.assert_close(codes.reshape(10, 33), expected, rtol=0, atol=1e-6)
    reconstruction = layer.reconstruct(codes)
    torch.testing.assert_close(reconstruction, codes @ layer.dictionary)
    grads = torch.autograd.grad((reconstruction - x).square().sum(), [layer.dictionary, x])
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_renormalize(dtype):
    layer = SparseCoding(33, 7, 0.1, dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(norms(layer.dictionary), torch.ones(7, dtype=dtype), rtol=rounding, atol=0)
    with torch.no_grad():
        layer.dictionary *= torch.tensor([0.0, 0.5, 1, 2, 3, 4, 5], dtype=dtype)[:, None]
    before = layer.dictionary.detach().clone()
    assert layer.renormalize_("ball") is layer
    torch.testing.assert_close(norms(layer.dictionary)[3:], torch.ones(4, dtype=dtype), rtol=rounding, atol=0)
    assert torch.equal(layer.dictionary[:2], before[:2]), "inside the ball nothing moves"
    layer.renormalize_()
    expected = torch.tensor([0.0, 1, 1, 1, 1, 1, 1], dtype=dtype)
    torch.testing.assert_close(norms(layer.dictionary), expected, rtol=rounding, atol=0)
    cosines = F.cosine_similarity(layer.dictionary.float(), before.float())[1:]
    torch.testing.assert_close(cosines, torch.ones(6), rtol=rounding, atol=0)


def test_autocast_does_not_lower_the_precision_of_codes():
    torch.manual_seed(0)
    layer, x = SparseCoding(7, 33, 0.1), torch.randn(5, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        codes = layer(x)
    assert torch.equal(codes, layer(x.float()))


def test_sparse_coding_learns_planted_atoms():
    """Gradients through the codes, Adam and `renormalize_`: all atoms found."""
    torch.manual_seed(0)
    atoms, batch = planted(10, 14, 2)
    layer = SparseCoding(10, 21, 0.1, positive=True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-2)
    start = recovered(atoms, layer.dictionary)
    for _ in range(250):
        x = batch(128)
        codes = layer(x)
        loss = 0.5 * (x - layer.reconstruct(codes)).square().sum() + 0.1 * codes.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        layer.renormalize_()
    assert recovered(atoms, layer.dictionary) >= 0.95 > 0.2 > start


# --------------------------------------------------------------------------------------------------------- LISTA
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 33, 7), (33, 7, 33)], ids=str)
def test_untrained_lista_is_ista(shape, dtype, tolerance, tied):
    samples, features, atoms = shape
    torch.manual_seed(0)
    dictionary = F.normalize(torch.randn(atoms, features, dtype=dtype), dim=1)
    x = torch.randn(samples, features, dtype=dtype)
    for layers in (1, 2, 3, 10):
        lista = LISTA(features, atoms, layers, l1=0.1, dictionary=dictionary, tied=tied)
        expected = ista(x, dictionary, 0.1, max_iter=layers)
        torch.testing.assert_close(lista(x), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("tied", "layers"), [(True, 1), (False, 5)])
def test_lista_parameters(tied, layers):
    lista = LISTA(7, 9, 5, l1=0.1, tied=tied)
    assert {name: tuple(p.shape) for name, p in lista.named_parameters()} == {
        "encoder": (layers, 9, 7), "lateral": (layers, 9, 9), "threshold": (layers, 9),
    }  # fmt: skip
    x = torch.randn(2, 4, 7)
    codes = lista(x)
    assert codes.shape == (2, 4, 9)
    codes.square().sum().backward()
    used = lista.lateral.grad if tied else lista.lateral.grad[1:]  # the first layer starts from zero codes
    assert all(layer.abs().sum() > 0 for g in (lista.encoder.grad, used, lista.threshold.grad) for layer in g)
    torch.testing.assert_close(lista.reconstruct(codes), codes @ lista.dictionary)
    copy = LISTA(7, 9, 5, l1=0.1, tied=tied)
    copy.load_state_dict(lista.state_dict())
    assert torch.equal(copy(x), codes)


def test_lista_gradcheck():
    torch.manual_seed(0)
    lista = LISTA(4, 6, 3, l1=0.1, tied=False, dtype=torch.float64)
    names, parameters = zip(*lista.named_parameters(), strict=True)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return torch.func.functional_call(lista, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters))


def test_trained_lista_beats_ista():
    """With as many layers, it comes nearer to the solution on samples it has not seen."""
    torch.manual_seed(0)
    atoms, batch = planted(10, 20, 2)
    lista = LISTA(10, 20, 4, l1=0.1, dictionary=atoms)
    optimizer = torch.optim.Adam(lista.parameters(), lr=3e-3)
    held_out = batch(512)
    solution = sparse_encode(held_out, atoms, 0.1)
    before = (lista(held_out) - solution).square().sum()
    for _ in range(150):
        x = batch(128)
        loss = (lista(x) - sparse_encode(x, atoms, 0.1)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (lista(held_out) - solution).square().sum() < 0.5 * before


# ------------------------------------------------------------------------------------------- SparseAutoEncoder
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("training", [True, False])
@every_activation
def test_forward_is_the_definition(activation, training, tied):
    """In float64, step by step from the parameters."""
    sae = auto_encoder(activation, tied=tied).double().train(training)
    x = torch.randn(9, 7, dtype=torch.float64)
    if activation == "batch_top_k":
        sae.inference_threshold.fill_(0.3)
    out = sae(x)
    encoder = sae.decoder if tied else sae.encoder
    latents = (x - sae.pre_bias) @ encoder.T + sae.bias
    sparsity = 0.0
    if activation == "relu":
        codes = latents.relu()
        sparsity = 0.2 * codes.sum(1).mean()
    elif activation == "top_k":
        codes = torch.where(latents >= latents.topk(3).values[:, -1:], latents, 0).relu()
    elif activation == "jump_relu":
        codes = torch.where(latents > 0.2, latents, 0)
        sparsity = 0.06 * (latents > 0.2).sum(1).double().mean()
    else:
        kept = latents >= latents.flatten().topk(27).values[-1] if training else latents > 0.3
        codes = torch.where(kept, latents, 0).relu()
    reconstruction = codes @ sae.decoder + sae.pre_bias
    torch.testing.assert_close(out.reconstruction, reconstruction)
    error = (x - reconstruction).square().sum(1).mean()
    torch.testing.assert_close(out.reconstruction_loss, error)
    torch.testing.assert_close(out.sparsity_loss, torch.zeros_like(error) + sparsity)
    assert out.auxiliary_loss == 0
    assert out.loss == out.reconstruction_loss + out.sparsity_loss
    if activation == "top_k":
        assert out.codes is None
        torch.testing.assert_close(torch.zeros_like(codes).scatter(1, out.indices, out.values), codes)
    else:
        assert out.values is out.indices is None
        torch.testing.assert_close(out.codes, codes)
    torch.testing.assert_close(sae.encode(x), codes)
    torch.testing.assert_close(sae.decode(codes), reconstruction)


@every_activation
def test_gradients_reach_every_parameter(activation):
    sae = auto_encoder(activation)
    x = torch.randn(64, 7, requires_grad=True)
    sae(x).loss.backward()
    for name, parameter in sae.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert x.grad.abs().sum() > 0


def test_jump_relu_gradient_is_the_formula():
    """Pseudo-derivatives of Rajamanoharan et al. 2024, evaluated one element after another."""
    sae = auto_encoder("jump_relu", l0=0.7, bandwidth=0.5).double()
    with torch.no_grad():
        sae.log_threshold += 0.3 * torch.randn_like(sae.log_threshold)
    x = torch.randn(9, 7, dtype=torch.float64)
    sae(x).loss.backward()

    latents = ((x - sae.pre_bias) @ sae.encoder.T + sae.bias).detach().requires_grad_()
    thresholds = sae.log_threshold.detach().exp()
    codes = torch.where(latents > thresholds, latents, 0)
    error = (x - codes @ sae.decoder.detach() - sae.pre_bias.detach()).square().sum(1).mean()
    grad_codes = torch.autograd.grad(error, codes)[0]
    expected = torch.zeros(33, dtype=torch.float64)
    for n in range(9):
        for j in range(33):
            theta = thresholds[j]
            kernel = 1.0 if -0.5 < (latents[n, j] - theta) / 0.5 < 0.5 else 0.0
            jump, step = -theta / 0.5 * kernel, -1 / 0.5 * kernel
            expected[j] += (jump * grad_codes[n, j] + 0.7 / 9 * step) * theta  # d theta / d log theta
    assert (expected != 0).sum() > 10
    torch.testing.assert_close(sae.log_threshold.grad, expected)
    grad_latents = torch.where(latents > thresholds, grad_codes, 0)
    torch.testing.assert_close(sae.bias.grad, grad_latents.sum(0), msg="the penalty pulls at the thresholds only")


@pytest.mark.parametrize("count", [0, 1, 4, 7])  # none, fewer and more than k_aux
@pytest.mark.parametrize("activation", ["top_k", "batch_top_k"])
def test_auxiliary_loss_is_the_formula(activation, count):
    """Gao et al. 2024: the k_aux largest dead latents on what is left of x, which is a constant."""
    sae = auto_encoder(activation, k_aux=5, auxiliary_weight=0.25, dead_after=100).double()
    x = torch.randn(9, 7, dtype=torch.float64)
    silent = (sae.encode(x) == 0).all(0).nonzero().flatten()
    dead = silent[:count].tolist()
    assert len(dead) == count
    sae.samples_since_fired += 1000  # of those that fire it starts anew before the loss is taken
    sae.samples_since_fired[silent[count:]] = 0
    out = sae(x)
    assert sae.dead_latents.nonzero().flatten().tolist() == dead
    living = ~sae.dead_latents
    latents = ((x - sae.pre_bias) @ sae.encoder.T + sae.bias).masked_fill(living, -math.inf).relu()
    codes = torch.where(latents >= latents.topk(5).values[:, -1:], latents, 0)
    residual = (x - out.reconstruction).detach()
    expected = 0.25 * (residual - codes @ sae.decoder).square().sum(1).mean() if dead else x.new_zeros(())
    torch.testing.assert_close(out.auxiliary_loss, expected)
    torch.testing.assert_close(out.loss, out.reconstruction_loss + out.auxiliary_loss)
    if dead:
        parameters = [sae.encoder, sae.decoder, sae.bias]
        grads, other = (torch.autograd.grad(loss, parameters) for loss in (out.auxiliary_loss, expected))
        torch.testing.assert_close(grads, other)
        assert all((grad[living] == 0).all() for grad in grads)


@every_activation
def test_dead_latents_are_counted_to_the_sample(activation):
    """However the stream is cut into batches: the samples since the last one in which the latent was active."""
    sae = auto_encoder(activation, n_latents=12, auxiliary_weight=0.0, dead_after=20)
    if activation == "batch_top_k":
        sae.k = 12  # so that the batch does not matter
    x = 0.3 * torch.randn(41, 7)
    with torch.no_grad():
        sae.bias[[2, 5]] = -100.0
        sae.bias[7] = 100.0
    active = sae.encode(x) > 0
    sae.samples_since_fired[5] = 7
    for batch in x.split([1, 7, 0, 33]):
        sae(batch.reshape(-1, 1, 7))
    expected = []
    for j in range(12):
        fired = active[:, j].nonzero().flatten().tolist()
        expected.append(40 - fired[-1] if fired else 41 + (7 if j == 5 else 0))
    assert sae.samples_since_fired.tolist() == expected
    assert expected[2] == 41
    assert expected[5] == 48
    assert expected[7] == 0
    assert sae.dead_latents.tolist() == [count >= 20 for count in expected]
    sae.eval()
    sae(x)
    sae.encode(x)
    assert sae.samples_since_fired.tolist() == expected, "only training counts"


def test_running_threshold_is_the_mean_smallest_positive_value():
    sae = auto_encoder("batch_top_k", k=5, auxiliary_weight=0.0)
    smallest = []
    for scale in (1.0, 0.5, 2.0):
        codes = sae(scale * torch.randn(9, 7)).codes
        assert (codes > 0).sum() <= 45
        smallest.append(codes[codes > 0].min().item())
    torch.testing.assert_close(sae.inference_threshold, torch.tensor(sum(smallest) / 3))
    for x in (torch.full((3, 7), -0.0), torch.zeros(0, 7)):  # nothing is active
        with torch.no_grad():
            sae.bias.fill_(-100.0)
        sae(x)
    torch.testing.assert_close(sae.inference_threshold, torch.tensor(sum(smallest) / 3))
    assert sae.threshold_batches == 3
    with torch.no_grad():
        sae.bias.fill_(0.0)
    sae.threshold_batches += 997
    before, codes = sae.inference_threshold.clone(), sae(torch.randn(9, 7)).codes
    torch.testing.assert_close(sae.inference_threshold, 0.99 * before + 0.01 * codes[codes > 0].min())


@every_activation
def test_empty_batch_and_leading_dimensions(activation):
    sae = auto_encoder(activation)
    out = sae(torch.zeros(0, 7))
    assert out.reconstruction.shape == (0, 7)
    assert out.loss == 0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in sae.parameters())
    sae.eval()
    x = torch.randn(2, 3, 7)
    out, flat = sae(x), sae(x.reshape(6, 7))
    assert torch.equal(out.reconstruction.reshape(6, 7), flat.reconstruction)
    assert out.loss == flat.loss
    assert sae.encode(x).shape == (2, 3, 33)
    shapes = {None if t is None else t.shape[:-1] for t in (out.codes, out.values, out.indices)}
    assert shapes == {None, (2, 3)}


@pytest.mark.parametrize("tied", [False, True])
def test_rows_keep_norm_one(tied):
    sae = auto_encoder("top_k", tied=tied)
    torch.testing.assert_close(norms(sae.decoder), torch.ones(33))
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    sae(torch.randn(20, 7)).loss.backward()
    before = sae.decoder.grad.clone()
    assert sae.remove_parallel_gradient_() is sae
    along = (sae.decoder.grad * sae.decoder).sum(1)
    torch.testing.assert_close(along, torch.zeros(33), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        sae.decoder.grad, before - (before * sae.decoder).sum(1, keepdim=True) * sae.decoder, rtol=1e-4, atol=1e-5
    )
    optimizer.step()
    assert (norms(sae.decoder) > 1).any()
    assert sae.renormalize_() is sae
    torch.testing.assert_close(norms(sae.decoder), torch.ones(33))


@every_activation
def test_state_survives_saving(activation):
    sae = auto_encoder(activation)
    for _ in range(3):
        sae(torch.randn(9, 7))
    copy = SparseAutoEncoder(7, 33, activation=activation, **SETTINGS[activation])
    copy.load_state_dict(sae.state_dict())
    x = torch.randn(5, 7)
    assert torch.equal(copy.eval()(x).reconstruction, sae.eval()(x).reconstruction)
    assert torch.equal(copy.samples_since_fired, sae.samples_since_fired)
    assert sae.samples_since_fired.any()
    assert activation in repr(sae)


@every_activation
def test_compiled_whole_equals_eager(activation):
    plain, compiled = (auto_encoder(activation, dead_after=2) for _ in range(2))
    torch.compiler.reset()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for batch in torch.randn(3, 5, 7):
        outputs = call(batch), plain(batch)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(*outputs, strict=True))
        for out in outputs:
            out.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(compiled.buffers(), plain.buffers(), strict=True))
    for mine, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    torch.compiler.reset()


@every_activation
def test_half_precision_and_autocast(activation):
    x = torch.randn(16, 7)
    plain = auto_encoder(activation).eval()(x)
    half = auto_encoder(activation).bfloat16().eval()(x.bfloat16())
    assert half.reconstruction.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        mixed = auto_encoder(activation).eval()(x)
    for out in (half, mixed):
        assert out.loss.dtype == torch.float32
        torch.testing.assert_close(out.loss, plain.loss, rtol=0.03, atol=0)


def test_top_k_never_stores_all_latents():
    """Nor do the auxiliary loss and the backward."""
    whole = 4096 * 3000 * 4
    x = torch.randn(4096, 8)

    def step(activation):
        sae = auto_encoder(activation, 8, 3000, dead_after=1, k_aux=4)
        sae.samples_since_fired.fill_(10**6)
        return lambda: sae(x).loss.backward()

    assert peak_bytes(step("batch_top_k")) > whole, "the measure sees latents where they are whole"
    assert peak_bytes(step("top_k")) < 0.4 * whole


# ---------------------------------------------------------------------------------------- planted directions
def planted(n_features, n_atoms, n_active):
    """Atoms on the sphere, and batches of sums of a few of them with weights in [0.5, 1.5]."""
    atoms = F.normalize(torch.randn(n_atoms, n_features), dim=1)

    def batch(samples):
        active = torch.rand(samples, n_atoms).argsort(1) < n_active
        return (active * (0.5 + torch.rand(samples, n_atoms))) @ atoms

    return atoms, batch


def recovered(atoms, rows):
    """Share of the atoms that some row has found, to a cosine of 0.95."""
    return (F.normalize(atoms) @ F.normalize(rows.detach()).T).amax(1).gt(0.95).float().mean().item()


@every_activation
def test_training_recovers_planted_directions(activation):
    """More directions than features, which no linear method could tell apart, and twice as many latents."""
    torch.manual_seed(0)
    atoms, batch = planted(24, 36, 3)
    sae = SparseAutoEncoder(24, 72, activation=activation, dead_after=5000, **SETTINGS[activation])
    assert recovered(atoms, sae.decoder) < 0.1
    steps = 700
    optimizer = torch.optim.Adam(sae.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        sae(batch(128)).loss.backward()
        sae.remove_parallel_gradient_()
        optimizer.step()
        sae.renormalize_()
        schedule.step()
    assert recovered(atoms, sae.decoder) >= 0.85
    sae.eval()
    x = batch(1000)
    assert sae(x).reconstruction_loss < 0.08 * x.square().sum(1).mean()
    active = (sae.encode(x) > 0).sum(1).float().mean()
    assert active < (10 if activation == "relu" else 3.5)


def test_auxiliary_loss_revives_dead_latents():
    """Of latents that start dead nearly all stay so without it, and many come to life with it."""

    def left_dead(weight):
        torch.manual_seed(0)
        _, batch = planted(24, 36, 3)
        sae = SparseAutoEncoder(24, 36, activation="top_k", k=3, dead_after=1000, auxiliary_weight=weight)
        with torch.no_grad():
            sae.bias[:18] = -1.2
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            sae(batch(128)).loss.backward()
            optimizer.step()
            sae.renormalize_()
        return sae.dead_latents[:18].sum().item()

    assert left_dead(0.0) >= 16
    assert left_dead(1 / 32) <= 12


def test_wrong_arguments_are_named():
    cases = [
        (lambda: SparseCoding(7, 0, 0.1), "n_atoms: expected at least 1, got 0"),
        (lambda: SparseCoding(7, 9, -1.0), "l1: expected a finite number above 0, got -1.0"),
        (lambda: SparseCoding(7, 9, 0.1, l2=math.inf), "l2: expected a finite number of at least 0, got inf"),
        (lambda: SparseCoding(7, 9, 0.1)(torch.zeros(3, 8)), r"x: expected shape \(..., 7\), got \(3, 8\)"),
        (lambda: SparseCoding(7, 9, 0.1).renormalize_("cube"), "constraint: expected one of 'sphere', 'ball'"),
        (lambda: LISTA(7, 9, 0, l1=0.1), "n_layers: expected at least 1, got 0"),
        (lambda: LISTA(7, 9, 3, l1=0.0), "l1: expected a finite number above 0, got 0.0"),
        (lambda: LISTA(7, 9, 3, l1=0.1, dictionary=torch.zeros(7, 9)), r"dictionary: .*\(9, 7\), got \(7, 9\)"),
        (lambda: LISTA(7, 9, 3, l1=0.1)(torch.zeros(())), r"x: expected shape \(..., 7\), got \(\)"),
        (lambda: SparseAutoEncoder(7, 9, activation="gelu"), "activation: expected one of 'relu', 'top_k'"),
        (lambda: SparseAutoEncoder(7, 9), "l1: expected a number for activation 'relu', got None"),
        (lambda: SparseAutoEncoder(7, 9, activation="top_k"), "k: expected a number for activation 'top_k', got None"),
        (lambda: SparseAutoEncoder(7, 9, l1=0.1, k=3), "k: expected None for activation 'relu', got 3"),
        (lambda: SparseAutoEncoder(7, 9, activation="top_k", k=10), "k: expected 1 <= k <= n_latents = 9, got 10"),
        (lambda: SparseAutoEncoder(7, 9, activation="top_k", k=1, k_aux=10), "k_aux: .* n_latents = 9, got 10"),
        (lambda: SparseAutoEncoder(7, 9, activation="jump_relu", l0=-1), "l0: expected a finite number of at least 0"),
        (lambda: SparseAutoEncoder(7, 9, activation="jump_relu", l0=1, bandwidth=0), "bandwidth: .* above 0, got 0"),
        (lambda: SparseAutoEncoder(7, 9, l1=0.1, dead_after=0), "dead_after: expected at least 1, got 0"),
        (lambda: SparseAutoEncoder(7, 9, l1=0.1)(torch.zeros(3, 6)), r"x: expected shape \(..., 7\), got \(3, 6\)"),
        (lambda: SparseAutoEncoder(7, 9, l1=0.1).encode(torch.zeros(3, 6)), r"x: expected shape \(..., 7\)"),
    ]  # fmt: skip
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    for layer in (SparseCoding(7, 9, 0.1), SparseAutoEncoder(7, 9, l1=0.1)):  # no digits are lost in silence
        with pytest.raises((TypeError, RuntimeError), match=r"[Ff]loat"):
            layer(torch.zeros(3, 7, dtype=torch.float64))
