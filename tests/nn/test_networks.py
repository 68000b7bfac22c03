import copy
import pickle

import pytest
import torch
from torch import nn

from fastvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, OneHot

IMAGES = [(1, 28, 28), (3, 33, 7), (2, 1, 1), (1, 1, 9), (4, 6, 257)]


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("channels", [(5,), (3, 5), (3, 5, 7, 2)])
def test_convolutions_take_and_give_images_of_any_size(shape, channels):
    encoder, decoder = ConvEncoder(shape, channels), ConvDecoder(4, shape, channels[::-1])
    features = encoder(torch.rand(2, *shape))
    assert features.shape == (2, encoder.out_features)
    assert decoder(torch.randn(2, 4)).shape == (2, *shape)


@pytest.mark.parametrize("shape", [(7,), (8, 8), *IMAGES])
@pytest.mark.parametrize("hidden", [(), (5,), (6, 3)])
def test_linear_layers_take_and_give_data_of_any_shape(shape, hidden):
    encoder, decoder = MLPEncoder(shape, hidden), MLPDecoder(4, shape, hidden)
    assert encoder(torch.rand(2, *shape)).shape == (2, encoder.out_features)
    assert decoder(torch.randn(2, 4)).shape == (2, *shape)
    linear = [layer for network in (encoder, decoder) for layer in network if isinstance(layer, nn.Linear)]
    assert len(linear) == 2 * len(hidden) + 1


def test_every_layer_matters():
    torch.manual_seed(0)
    x = torch.rand(9, 2, 9, 5)
    for network, data in (
        (ConvEncoder((2, 9, 5), (16, 16)), x),
        (MLPEncoder((2, 9, 5), (16, 16)), x),
        (ConvDecoder(4, (2, 9, 5), (16, 16)), torch.randn(9, 4)),
        (MLPDecoder(4, (2, 9, 5), (16, 16)), torch.randn(9, 4)),
    ):
        network(data).square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    "network",
    [
        MLPEncoder((8, 8), (6, 5)),
        MLPDecoder(3, (8, 8), (6,)),
        ConvEncoder((1, 9, 7), (3,)),
        ConvDecoder(3, (1, 9, 7), (4, 3)),
    ],
    ids=lambda network: type(network).__name__,
)
def test_config_builds_the_same_network(network):
    again = type(network)(**network.config)
    again.load_state_dict(network.state_dict())
    data = torch.rand(2, *network.config["data_shape"]) if "Encoder" in type(network).__name__ else torch.rand(2, 3)
    for other in (again, copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other(data), network(data))


def test_one_hot_puts_the_classes_after_the_batch():
    x = torch.randint(4, (3, 5, 2))
    coded = OneHot(4)(x)
    assert coded.shape == (3, 4, 5, 2)
    assert torch.equal(coded.argmax(1), x)
    assert torch.equal(coded.sum(1), torch.ones(3, 5, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MLPEncoder((8, 8))(torch.rand(2, 64)), r"x: expected shape \(batch, 8, 8\), got \(2, 64\)"),
        (lambda: ConvEncoder((1, 8, 8))(torch.rand(2, 8, 8)), r"x: expected shape \(batch, 1, 8, 8\), got \(2, 8, 8\)"),
        (lambda: MLPDecoder(3, (8,))(torch.rand(2, 4)), r"z: expected shape \(batch, 3\), got \(2, 4\)"),
        (lambda: ConvDecoder(3, (1, 8, 8))(torch.rand(3)), r"z: expected shape \(batch, 3\), got \(3,\)"),
        (lambda: ConvEncoder((8, 8)), "data_shape: expected"),
        (lambda: ConvDecoder(3, (1, 8, 8), ()), "channels: expected"),
        (lambda: MLPEncoder((0,)), "data_shape: expected"),
        (lambda: MLPDecoder(0, (8,)), "latent_dim: expected"),
        (lambda: MLPDecoder(2, (8,), (0,)), "hidden: expected"),
        (lambda: OneHot(0), "classes: expected"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
