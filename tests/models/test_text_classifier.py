import pytest
import torch
import torch.nn.functional as F

from fastvae.models import TextClassifier

V = 11


def make(dtype=torch.float64, **settings):
    torch.manual_seed(0)
    sizes = {"embed_dim": 5, "filters": 7}
    return TextClassifier(V, 3, **(sizes | settings)).to(dtype).eval()


def sentence(length):
    return torch.randint(1, V, (length,))


def logits_by_hand(model, words):
    """Each n-gram by itself: its filters are sums over its words."""
    embedded = model.embedding.weight[words]
    maxima = []
    for convolution in model.convolutions:
        width = convolution.kernel_size[0]
        around = F.pad(embedded, (0, 0, width - 1, width - 1))
        grams = [around[i : i + width] for i in range(len(words) + width - 1)]
        values = [(convolution.weight * gram.T).sum((1, 2)) + convolution.bias for gram in grams]
        maxima.append(torch.stack(values).relu().max(0).values)
    return model.output(torch.cat(maxima))


@pytest.mark.parametrize("widths", [(3, 4, 5), (1,), (2, 9)])
def test_a_sentence_is_read_as_its_n_grams_whatever_the_padding(widths):
    model = make(widths=widths)
    with torch.no_grad():
        for convolution in model.convolutions:
            convolution.bias.fill_(0.7)  # what lies in the padding would show
    sentences = [sentence(length) for length in (1, 7, 3)]
    tokens = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True)
    together = model(tokens)
    for words, row in zip(sentences, together, strict=True):
        torch.testing.assert_close(row, logits_by_hand(model, words))


def test_one_hot_distributions_are_words():
    model = make()
    tokens, lengths = torch.stack([sentence(6), sentence(6)]), torch.tensor([6, 4])
    words = F.one_hot(tokens, V).double()
    torch.testing.assert_close(model(words, lengths), model(tokens, lengths))
    words[1, 4:] = torch.rand(2, V)  # behind the end
    torch.testing.assert_close(model(words, lengths), model(tokens, lengths))
    words.requires_grad_()
    model(words, lengths).sum().backward()
    assert (words.grad[0].abs().sum(-1) > 0).all()
    assert (words.grad[1, 4:] == 0).all()


def test_gradients():
    model = make(widths=(2,))
    words = torch.rand(2, 4, V, dtype=torch.float64).softmax(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: model(x, torch.tensor([4, 2])), words)


def test_it_learns_which_word_matters():
    torch.manual_seed(0)
    model = TextClassifier(V, 2, embed_dim=8, filters=4)
    tokens = torch.randint(1, V, (256, 6))
    labels = (tokens == 5).any(1).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    model.eval()
    held_out = torch.randint(1, V, (256, 6))
    assert (model(held_out).argmax(1) == (held_out == 5).any(1)).float().mean() > 0.95


def test_it_is_built_from_its_config():
    model = make(torch.float32, widths=(2, 3))
    twin = TextClassifier(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    tokens = torch.stack([sentence(4)])
    assert torch.equal(twin(tokens), model(tokens))


@pytest.mark.parametrize(
    ("settings", "message"), [({"widths": ()}, "widths"), ({"widths": (0,)}, "widths"), ({"classes": 1}, "classes")]
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TextClassifier(**({"vocab_size": V, "classes": 2} | settings))


def test_wrong_inputs_are_named():
    model = make()
    with pytest.raises(ValueError, match="words: expected shape"):
        model(torch.rand(2, 4, V + 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="lengths: expected 1 to 4"):
        model(torch.rand(2, 4, V, dtype=torch.float64), torch.tensor([5, 1]))
