import copy
import math
import pickle

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastvae.models import SentenceVAE

V = 15
LENGTHS = torch.tensor([7, 3, 5, 4, 6, 2])


def sentences(lengths=LENGTHS, vocab_size=V):
    tokens = torch.randint(4, vocab_size, (len(lengths), int(lengths.max())))
    tokens[:, 0] = 2
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[length - 1] = 3
        row[length:] = 0
    return tokens


def make_model(seed=0, **settings):
    torch.manual_seed(seed)
    return SentenceVAE(V, **({"embed_dim": 6, "hidden_size": 8, "latent_dim": 3} | settings))


def seed(value):
    return torch.tensor([value])


def ignore_latent(model):
    """Cut z out of the decoder: then p(x|z) = p(x)."""
    with torch.no_grad():
        model.decoder.initial_state.weight.zero_()
        model.decoder.weight_ih[:, model.decoder.embed_dim :].zero_()


def test_terms_of_the_loss():
    model, tokens = make_model(), sentences()
    output = model(tokens, LENGTHS, kl_weight=0.3, seed=seed(1))
    mean, log_var = model.encode(tokens, LENGTHS)
    kl = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(output.kl, kl, rtol=1e-5, atol=1e-6)
    z = model.head(model.encoder(tokens, LENGTHS), seed=seed(1)).z
    torch.testing.assert_close(output.nll, model.decoder(tokens, z, LENGTHS))
    torch.testing.assert_close(output.loss, output.nll.mean() + 0.3 * output.kl.mean())
    torch.testing.assert_close(output.neg_elbo, output.nll + output.kl)
    assert output.tokens.tolist() == (LENGTHS - 1).tolist()


def test_lengths_may_be_left_out():
    model, tokens = make_model(), sentences()
    given, counted = model(tokens, LENGTHS, seed=seed(1)), model(tokens, seed=seed(1))
    assert torch.equal(given.nll, counted.nll)
    assert torch.equal(given.tokens, counted.tokens)


def test_kl_weight_may_be_a_tensor():
    model, tokens = make_model(), sentences()
    by_float = model(tokens, kl_weight=0.25, seed=seed(1)).loss
    torch.testing.assert_close(model(tokens, kl_weight=torch.tensor(0.25), seed=seed(1)).loss, by_float)


def test_free_bits_bound_the_mean_kl_of_each_dimension():
    model, tokens = make_model(), sentences()
    with torch.no_grad():
        model.encoder.embedding.weight.mul_(30)
        model.head.linear.weight.mul_(5)
        model.head.linear.bias[:3] = torch.tensor([0.0, 1.0, 2.0])
    output = model(tokens, kl_weight=0.5, free_bits=1.0, seed=seed(1))
    mean, log_var = model.encode(tokens)
    each = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0))
    apart = each.mean(0)
    assert apart.min() < 1.0 < apart.max()
    assert ((each < 1.0) != (apart < 1.0)).any(), "the case must tell a bound on the mean from one on each"
    charged = sum(max(1.0, value) for value in apart.tolist())
    assert output.loss.item() == pytest.approx(output.nll.mean().item() + 0.5 * charged, rel=1e-5)
    torch.testing.assert_close(output.kl.mean(), apart.sum())
    with pytest.raises(ValueError, match="free_bits"):
        model(tokens, free_bits=-0.1)


def test_the_seed_fixes_noise_and_word_dropout():
    model, tokens = make_model(word_dropout=0.5), sentences()
    first, same, other = (model(tokens, seed=seed(value)).nll for value in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    by_generator = [model(tokens, generator=torch.Generator().manual_seed(4)).nll for _ in range(2)]
    assert torch.equal(*by_generator)
    assert torch.isfinite(model(tokens, seed=seed(2**63 - 1)).loss)


def test_word_dropout_and_noise_use_different_random_numbers():
    model, tokens = make_model(word_dropout=0.5), sentences()
    seeds = {}
    for name in ("head", "decoder"):
        getattr(model, name).register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seeds.update({name: int(kwargs["seed"])}),
            with_kwargs=True,
        )
    model(tokens, seed=seed(9))
    assert seeds["head"] != seeds["decoder"]


@pytest.mark.parametrize(
    "settings", [{}, {"share_embedding": True}, {"tie_weights": True, "embed_dim": 8}, {"num_layers": 2}]
)
def test_every_parameter_gets_a_gradient(settings):
    model = make_model(**settings)
    model(sentences()).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_shared_embedding_is_one_parameter():
    shared, apart = make_model(share_embedding=True), make_model()
    difference = sum(p.numel() for p in apart.parameters()) - sum(p.numel() for p in shared.parameters())
    assert difference == V * 6
    copied = copy.deepcopy(shared)
    assert copied.encoder.embedding is copied.decoder.embedding


def test_config_rebuilds_the_model():
    model = make_model(word_dropout=0.2, dropout=0.1, tie_weights=True, embed_dim=8, share_embedding=True, num_layers=2)
    again = SentenceVAE(**pickle.loads(pickle.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    tokens = sentences()
    for copied in (again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.config == model.config
        expected = model.eval()(tokens, seed=seed(1)).loss
        assert torch.equal(copied.eval()(tokens, seed=seed(1)).loss, expected)


def test_model_compiles_into_one_graph():
    model, tokens = make_model(word_dropout=0.3), sentences()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weight = torch.tensor(0.5)
    expected = model(tokens, LENGTHS, kl_weight=weight, seed=seed(1))
    output = compiled(tokens, LENGTHS, kl_weight=weight, seed=seed(1))
    torch.testing.assert_close(output.nll, expected.nll)
    torch.testing.assert_close(output.loss, expected.loss)
    output.loss.backward()
    gradient = model.encoder.weight_hh.grad.clone()
    model.zero_grad()
    expected.loss.backward()
    torch.testing.assert_close(gradient, model.encoder.weight_hh.grad)


def test_model_under_autocast():
    model, tokens = make_model(), sentences()
    plain = model(tokens, seed=seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(tokens, seed=seed(1))
    assert mixed.loss.dtype == mixed.nll.dtype == mixed.kl.dtype == torch.float32
    torch.testing.assert_close(mixed.nll, plain.nll, rtol=0.02, atol=0.02)
    torch.testing.assert_close(mixed.kl, plain.kl, rtol=0.02, atol=0.02)


def test_importance_weighting_is_exact_where_the_posterior_is_the_prior():
    model, tokens = make_model(), sentences()
    ignore_latent(model)
    with torch.no_grad():
        model.head.linear.weight.zero_()
        model.head.linear.bias.zero_()
    exact = model.decoder(tokens, torch.zeros(6, 3), LENGTHS).double()
    for num_samples, chunk in [(1, 50), (7, 3), (6, 3), (3, 7)]:
        estimate = model.importance_weighted_nll(tokens, LENGTHS, num_samples=num_samples, chunk=chunk)
        torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=1e-6)


def strong_latent():
    """A model with one latent dimension that matters, and a posterior that is not the true one."""
    model = make_model(latent_dim=1)
    with torch.no_grad():
        model.decoder.initial_state.weight.mul_(2)
        model.decoder.weight_ih[:, -1].mul_(4)
        model.head.linear.bias.copy_(torch.tensor([0.5, 0.3]))
    return model


def test_importance_weighting_converges_to_the_integral_over_z():
    model, tokens = strong_latent(), sentences()
    grid = torch.linspace(-8, 8, 801)
    nll = model.decoder(tokens.repeat(801, 1), grid.repeat_interleave(6).unsqueeze(1), LENGTHS.repeat(801))
    log_joint = Normal(0.0, 1.0).log_prob(grid).double().unsqueeze(1) - nll.reshape(801, 6)
    exact = -(log_joint.logsumexp(0) + math.log(16 / 800))
    estimate = model.importance_weighted_nll(
        tokens, LENGTHS, num_samples=4000, chunk=1000, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(estimate, exact, rtol=0, atol=0.03)
    elbo_gap = model(tokens.repeat(200, 1), seed=seed(1)).neg_elbo.reshape(200, 6).mean(0) - exact
    assert (elbo_gap > 0.1).all(), "the case must be one where the bound is loose"


def test_importance_weighted_bound_tightens():
    model = strong_latent()
    tokens = sentences().repeat(100, 1)
    generator = torch.Generator().manual_seed(0)
    bounds = [
        model.importance_weighted_nll(tokens, num_samples=samples, generator=generator).mean().item()
        for samples in (1, 4, 32)
    ]
    elbo = model(tokens, seed=seed(3)).neg_elbo.mean().item()
    assert bounds[0] > bounds[1] + 0.03 > bounds[2] + 0.03
    assert bounds[0] == pytest.approx(elbo, abs=0.1)


def test_evaluation_methods_ignore_dropout_and_restore_the_mode():
    model, tokens = make_model(dropout=0.8, word_dropout=0.8), sentences()
    model.head.eval()
    trained = [module.training for module in model.modules()]
    results = []
    for _ in range(2):
        nll = model.importance_weighted_nll(tokens, generator=torch.Generator().manual_seed(1), num_samples=4)
        results.append([nll, *model.reconstruct(tokens), *model.interpolate(tokens[0], tokens[2], 3)])
        assert [module.training for module in model.modules()] == trained
        model.eval()
        trained = [False] * len(trained)
    for training, evaluating in zip(*results, strict=True):
        assert torch.equal(training, evaluating)


def test_interpolation_ends_are_reconstructions():
    model = make_model()
    with torch.no_grad():
        model.decoder.initial_state.weight.mul_(20)
        model.decoder.output.weight.mul_(10)
        model.encoder.embedding.weight.mul_(20)
        model.head.linear.weight.mul_(5)
    a, b = sentences(torch.tensor([6, 4]))
    b = b[:4]
    tokens, lengths = model.interpolate(a, b.unsqueeze(0), 5, max_length=9)
    assert len(tokens) == len(lengths) == 5
    ends = [model.reconstruct(end.unsqueeze(0), max_length=9)[0][0] for end in (a, b)]
    assert ends[0].tolist() != ends[1].tolist()
    for row, length, end in ((tokens[0], lengths[0], ends[0]), (tokens[-1], lengths[-1], ends[1])):
        assert row[:length].tolist() == end.tolist()
    middle = (model.encode(a.unsqueeze(0))[0] + model.encode(b.unsqueeze(0))[0]) / 2
    assert tokens[2][: lengths[2]].tolist() == model.decode(middle, max_length=9)[0][0].tolist()


def test_samples_follow_their_generator():
    model = make_model()
    draws = [model.sample(8, max_length=6, generator=torch.Generator().manual_seed(value)) for value in (1, 1, 2)]
    assert draws[0][0].shape[0] == len(draws[0][1]) == 8
    assert torch.equal(draws[0][0], draws[1][0])
    assert draws[0][0].shape != draws[2][0].shape or not torch.equal(draws[0][0], draws[2][0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: m.sample(0), "n: expected"),
        (lambda m, t: m.interpolate(t[0], t[1], 1), "steps"),
        (lambda m, t: m.interpolate(t, t[1], 3), "a: expected one sentence"),
        (lambda m, t: m.importance_weighted_nll(t, num_samples=0), "num_samples"),
        (lambda m, t: m.importance_weighted_nll(t, chunk=0), "chunk"),
        (lambda m, t: m(t[:0]), "tokens: expected"),
        (lambda m, t: m.decode(torch.zeros(2, 5)), "z: expected"),
        (lambda m, t: SentenceVAE(V, latent_dim=0), "latent_dim"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_model(), sentences())


def test_learns_twenty_sentences_by_heart():
    torch.manual_seed(0)
    lengths = torch.randint(4, 8, (20,))
    tokens = sentences(lengths, vocab_size=24)
    model = SentenceVAE(24, embed_dim=24, hidden_size=64, latent_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    first = model(tokens, lengths, kl_weight=0.0).nll.mean().item()
    for _ in range(250):
        output = model(tokens, lengths, kl_weight=0.0)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    model.eval()
    assert first > 10
    assert model(tokens, lengths, seed=seed(1)).nll.mean() < 0.1
    for strategy in ("greedy", "beam"):
        written, written_lengths = model.reconstruct(tokens, lengths, strategy=strategy, max_length=10)
        assert torch.equal(written_lengths, lengths - 1)
        assert torch.equal(written, tokens[:, 1:])
