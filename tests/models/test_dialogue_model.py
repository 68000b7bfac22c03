import itertools
import pickle

import pytest
import torch

from fastvae.models import DialogueModel, MixtureVAE

V, M, K, D = 15, 2, 3, 2


def make_rows(lengths, generator_seed=0):
    torch.manual_seed(generator_seed)
    rows = torch.randint(4, V, (len(lengths), max(lengths)))
    rows[:, 0] = 2
    for row, length in zip(rows, lengths, strict=True):
        row[length - 1] = 3
        row[length:] = 0
    return rows


ANSWERS = make_rows([5, 3, 6, 4])
CONTEXTS = make_rows([4, 7, 3, 5], 1)


def make_model(kind="dgm_vae", **settings):
    torch.manual_seed(0)
    vae = MixtureVAE.of_kind(kind, V, variables=M, components=K, latent_dim=D, embed_dim=6, hidden_size=8)
    with torch.no_grad():
        vae.encoder.embedding.weight.mul_(30)
        vae.code_head.weight.mul_(8)
    model = DialogueModel.over(vae, **({"embed_dim": 6, "hidden_size": 8} | settings))
    with torch.no_grad():
        model.context_encoder.embedding.weight.mul_(30)
        model.policy.weight.mul_(8)
    return model


@pytest.mark.parametrize("kind", ["dgm_vae", "di_vae", "semi_vae", "dcm_vae"])
def test_terms_of_the_loss(kind):
    model = make_model(kind).eval()
    output = model(ANSWERS, CONTEXTS)
    q = model.vae.encode(ANSWERS).logits.softmax(-1)
    assert torch.equal(output.codes, q.argmax(-1))
    state = model.context_encoder(CONTEXTS)
    log_policy = model.policy(state).view(4, M, K).log_softmax(-1)
    torch.testing.assert_close(output.policy_nll, -(q * log_policy).sum((1, 2)))
    latent = torch.cat([state, model.vae.code_mean(output.codes)], 1)
    torch.testing.assert_close(output.nll, model.decoder(ANSWERS, latent))
    torch.testing.assert_close(output.loss, (output.nll + output.policy_nll).mean())
    assert output.tokens.tolist() == [4, 2, 5, 3]


def test_the_vae_stays_as_it_is_and_all_else_learns():
    model = make_model(word_dropout=0.3).train()
    assert not model.vae.training
    model(ANSWERS, CONTEXTS).loss.backward()
    for name, parameter in model.named_parameters():
        learns = not name.startswith("vae.")
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) is learns, name


def test_codes_in_training_are_drawn_from_the_posterior():
    model = make_model().train()
    many = ANSWERS.repeat(2000, 1)
    codes = model(many, CONTEXTS.repeat(2000, 1), generator=torch.Generator().manual_seed(0)).codes
    shares = torch.nn.functional.one_hot(codes, K).float().view(2000, 4, M, K).mean(0)
    torch.testing.assert_close(shares, model.vae.encode(ANSWERS).logits.softmax(-1), rtol=0, atol=0.05)


def test_likeliest_actions_are_those_of_all():
    model = make_model()
    log_p = model.policy(model.eval().context_encoder(CONTEXTS)).view(4, M, K).log_softmax(-1)
    every = list(itertools.product(range(K), repeat=M))
    scores = torch.stack([log_p[:, 0, a] + log_p[:, 1, b] for a, b in every], 1)
    for n in (1, 4, K**M):
        codes, found = model.actions(CONTEXTS, n=n)
        best = scores.topk(n)
        torch.testing.assert_close(found, best.values)
        assert codes.tolist() == [[list(every[i]) for i in row] for row in best.indices.tolist()]
    with pytest.raises(ValueError, match="n: expected 1 to 9"):
        model.actions(CONTEXTS, n=10)


def test_an_answer_is_of_its_action():
    model = make_model()
    with torch.no_grad():
        model.decoder.initial_state.weight.mul_(20)
        model.decoder.output.weight.mul_(10)
    chosen = torch.tensor([[0, 2], [1, 1], [2, 0], [0, 0]])
    written, _ = model.respond(CONTEXTS, codes=chosen, max_length=8)
    latent = torch.cat([model.eval().context_encoder(CONTEXTS), model.vae.code_mean(chosen)], 1)
    assert torch.equal(written, model.decoder.generate(latent, 8)[0])
    assert not torch.equal(written, model.respond(CONTEXTS, codes=chosen.flip(0), max_length=8)[0])
    by_policy = model.respond(CONTEXTS, codes=model.actions(CONTEXTS)[0][:, 0], max_length=8)[0]
    assert torch.equal(model.respond(CONTEXTS, max_length=8)[0], by_policy)
    with pytest.raises(ValueError, match="codes: expected values"):
        model.respond(CONTEXTS, codes=chosen + 1)


def test_config_rebuilds_the_model(tmp_path):
    model = make_model(dropout=0.2, share_embedding=True)
    again = DialogueModel(**pickle.loads(pickle.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    for copied in (again, DialogueModel.from_pretrained(tmp_path)):
        assert torch.equal(copied.eval()(ANSWERS, CONTEXTS).loss, model.eval()(ANSWERS, CONTEXTS).loss)
    with pytest.raises(ValueError, match="vae: expected a model with codes"):
        DialogueModel.over(MixtureVAE.of_kind("vae", V, embed_dim=6, hidden_size=8))
