import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Normal, kl_divergence

from fastvae.models import ControlledTextVAE

V = 15
ATTRIBUTES = {"sentiment": ["negative", "positive"], "tense": ["past", "present", "future"]}
LENGTHS = torch.tensor([7, 3, 5, 4, 6, 2])
KNOWN = torch.tensor([[0, 2], [1, 0], [1, 1], [0, 0], [0, 1], [1, 2]])
PARTS = {"decoder", "encoder", "head", "discriminators"}


def sentences(lengths=LENGTHS):
    tokens = torch.randint(4, V, (len(lengths), int(lengths.max())))
    tokens[:, 0] = 2
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[length - 1] = 3
        row[length:] = 0
    return tokens


def make(**settings):
    torch.manual_seed(0)
    small = {"embed_dim": 6, "hidden_size": 8, "latent_dim": 3, "filters": 4, "word_dropout": 0.0}
    return ControlledTextVAE(V, ATTRIBUTES, **(small | settings))


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def learning(model):
    """The parts some parameter of which has a gradient that is not zero."""
    return {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_terms_of_the_wake_phase():
    model, tokens = make(), sentences()
    output = model(tokens, LENGTHS, KNOWN, kl_weight=0.3, generator=generator())
    mean, log_var = model.encode(tokens, LENGTHS)
    kl = kl_divergence(Normal(mean, (0.5 * log_var).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(output.kl, kl, rtol=1e-5, atol=1e-6)
    z = model.head(model.encoder(tokens, LENGTHS), generator=generator()).z
    code = torch.cat([F.one_hot(KNOWN[:, 0], 2), F.one_hot(KNOWN[:, 1], 3)], 1)
    torch.testing.assert_close(output.nll, model.decoder(tokens, torch.cat([z, code], 1), LENGTHS))
    torch.testing.assert_close(output.loss, output.nll.mean() + 0.3 * output.kl.mean())
    assert output.tokens.tolist() == (LENGTHS - 1).tolist()


def test_unknown_attributes_are_those_the_discriminators_draw():
    model, tokens = make().eval(), sentences()
    sure = {"sentiment": 1, "tense": 2}
    with torch.no_grad():
        for discriminator, value in zip(model.discriminators, sure.values(), strict=True):
            discriminator.output.bias[value] = 50
    found = torch.tensor([list(sure.values())]).expand(6, 2)
    known = model(tokens, LENGTHS, found, generator=generator())
    half = torch.where(torch.tensor([[True, False]]), found, -1)

    def nll(attributes, seed):
        # the attributes are drawn first, from the same generator as z
        return model(tokens, LENGTHS, attributes, generator=generator(seed)).nll

    assert not torch.equal(known.nll, nll(KNOWN, 1))
    assert torch.equal(nll(None, 3), nll(half, 3))
    assert model.find_attributes(tokens[:, 1:], LENGTHS - 1).tolist() == found.tolist()


def test_terms_of_the_sleep_phase():
    model = make().double().eval()
    z, seed = torch.randn(6, 3, dtype=torch.float64), torch.tensor([4])
    output = model.sleep(z, KNOWN, temperature=0.6, max_length=5, seed=seed)
    soft = model.decoder.generate_soft(torch.cat([z, model.codes(KNOWN)], 1), 5, 0.6, seed=seed)
    for row in range(6):  # one by one, without padding
        words = soft.words[row : row + 1, : soft.lengths[row]]
        each = [discriminator(words).log_softmax(-1)[0] for discriminator in model.discriminators]
        nll = -sum(log_probs[value] for log_probs, value in zip(each, KNOWN[row], strict=True))
        torch.testing.assert_close(output.attribute_nll[row], nll)
        inputs = torch.cat([F.one_hot(torch.tensor([[2]]), V).double(), words], 1) @ model.encoder.embedding.weight
        mean, log_var = model.head.parameters_of(
            model.encoder.forward_embedded(inputs, soft.lengths[row : row + 1] + 1)
        )
        density = Normal(mean[0], (0.5 * log_var[0]).exp()).log_prob(z[row]).sum()
        torch.testing.assert_close(output.latent_nll[row], -density)


def test_terms_of_the_discriminators():
    model, tokens = make().eval(), sentences()
    attributes = KNOWN.clone()
    attributes[2, 1] = attributes[3, 0] = -1
    output = model.discriminate(tokens[:, 1:], LENGTHS - 1, attributes)
    for row in range(6):
        words = tokens[row : row + 1, 1 : LENGTHS[row]]
        each = [torch.distributions.Categorical(logits=d(words)[0]) for d in model.discriminators]
        nll = -sum(q.logits[value] for q, value in zip(each, attributes[row], strict=True) if value >= 0)
        torch.testing.assert_close(output.nll[row], nll)
        torch.testing.assert_close(output.entropy[row], sum(q.entropy() for q in each))
        right = [int(q.probs.argmax()) == int(value) for q, value in zip(each, attributes[row], strict=True)]
        assert output.correct[row].tolist() == right


@pytest.mark.parametrize("settings", [{}, {"share_embedding": True}, {"num_layers": 2, "tie_weights": True}])
def test_each_loss_teaches_its_own_part(settings):
    model, tokens = make(**({"embed_dim": 8} | settings)), sentences()

    def taught(loss):
        model.zero_grad()
        loss.backward()
        return learning(model)

    shared = {"encoder"} if "share_embedding" in settings else set()  # the decoder's embedding, by its other name
    assert taught(model(tokens, LENGTHS, KNOWN).loss) == PARTS - {"discriminators"}
    assert taught(model(tokens, LENGTHS).loss) == PARTS - {"discriminators"}
    sleep = model.sleep(model.draw_latent(6), KNOWN, temperature=1.0, max_length=6)
    assert taught(sleep.attribute_nll.sum()) - shared == {"decoder"}
    sleep = model.sleep(model.draw_latent(6), KNOWN, temperature=1.0, max_length=6)
    assert taught(sleep.latent_nll.sum()) - shared == {"decoder"}
    read = model.discriminate(tokens[:, 1:], LENGTHS - 1, KNOWN)
    assert taught((read.nll + 0.1 * read.entropy).sum()) == {"discriminators"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_shared_embedding_learns_in_the_sleep_phase_as_the_decoder_s_alone():
    model = make(share_embedding=True)
    z, seed = model.draw_latent(6), torch.tensor([3])
    gradients = []
    for encoder_embedding in (model.encoder.embedding, torch.nn.Embedding.from_pretrained(
        model.encoder.embedding.weight.detach().clone()
    )):  # fmt: skip
        model.encoder.embedding = encoder_embedding
        model.zero_grad()
        model.sleep(z, KNOWN, temperature=1.0, max_length=6, seed=seed).latent_nll.sum().backward()
        gradients.append(model.decoder.embedding.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_transfer_keeps_z_and_changes_c():
    model, tokens = make().eval(), sentences()
    seen = {}
    generate = model.decoder.generate
    model.decoder.generate = lambda latent, *a, **k: seen.update(latent=latent) or generate(latent, *a, **k)
    mean, _ = model.encode(tokens, LENGTHS)
    model.transfer(tokens, LENGTHS, {"sentiment": "positive"}, attributes=KNOWN, max_length=5)
    torch.testing.assert_close(seen["latent"][:, :3], mean)
    chosen = seen["latent"][:, 3:].tolist()
    assert chosen == [[0, 1, *F.one_hot(tense, 3).tolist()] for tense in KNOWN[:, 1]]
    found = model.find_attributes(tokens[:, 1:], LENGTHS - 1)
    model.reconstruct(tokens, LENGTHS, max_length=5)
    assert torch.equal(seen["latent"][:, 3:], model.codes(found))


def test_samples_of_chosen_attributes():
    model = make().eval()
    with torch.no_grad():  # a decoder that writes word 5 for positive sentences and word 6 for others, and ends at once
        for parameter in model.decoder.parameters():
            parameter.zero_()
        model.decoder.output.bias[6] = 99
        gate = slice(8 * 2, 8 * 3)  # the cell's new content
        model.decoder.weight_ih[gate, 6 + 3 + 1] = 9
        model.decoder.output.weight[5] = 999
    tokens, _ = model.sample(40, {"sentiment": "positive"}, max_length=1, generator=generator())
    assert (tokens == 5).all()
    tokens, _ = model.sample(40, {"tense": "past"}, max_length=1, generator=generator())
    assert 5 < (tokens == 5).sum() < 35
    assert torch.equal(tokens, model.sample(40, {"tense": "past"}, max_length=1, generator=generator())[0])


def test_it_is_built_from_its_config():
    model = make(num_layers=2, share_embedding=True, widths=(2, 3))
    twin = ControlledTextVAE(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    z = model.draw_latent(6)
    assert torch.equal(twin.decode(z, KNOWN, max_length=9)[0], model.eval().decode(z, KNOWN, max_length=9)[0])


def test_wrong_attributes_are_named():
    model, tokens = make(), sentences()
    with pytest.raises(ValueError, match="attributes: expected at least one"):
        ControlledTextVAE(V, {"sentiment": ["good"]})
    with pytest.raises(ValueError, match=r"attributes: expected int64 of shape \(batch, attributes\) = \(6, 2\)"):
        model(tokens, LENGTHS, KNOWN[:, :1])
    with pytest.raises(ValueError, match=r"attributes: expected values of tense in \[-1, 3\), got 1 to 3"):
        model(tokens, LENGTHS, KNOWN + torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="attributes: expected values of sentiment in"):
        model.decode(model.draw_latent(6), KNOWN - 1)
    with pytest.raises(ValueError, match="attribute: expected one of sentiment, tense, got 'mood'"):
        model.sample(2, {"mood": "good"})
    with pytest.raises(ValueError, match="tense: expected one of past, present, future, got 'now'"):
        model.transfer(tokens, LENGTHS, {"tense": "now"})


def test_attributes_may_have_any_name():
    names = ["type", "train", "v1.0", "values"]
    attributes = {name: ["a", "b"] for name in names}
    model = ControlledTextVAE(9, attributes, embed_dim=4, hidden_size=5, latent_dim=3, max_length=3)
    found = model.find_attributes(torch.full((2, 4), 7))
    assert found.shape == (2, len(names))
