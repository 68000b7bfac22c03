"""The VAE of the PyTorch examples (784-400-20, batches of 128): a training step, and training from images in memory.

The peers are written as that example is; ours is `fastvae.models.VAE`. PyTorch's own fused Adam serves anyone, so the
peers are timed with it too.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from bench.interleave import OURS, PRODUCTS, Case, WrongResultError
from fastvae.models import VAE
from fastvae.nn import MLPDecoder, MLPEncoder

BATCH, PIXELS, HIDDEN, LATENT = 128, 784, 400, 20
IMAGES = 6000  # a tenth of MNIST's training images

# Multiplications and additions of the products of a step: backward two for each, but for the images' gradient.
_WEIGHTS = 2 * PIXELS * HIDDEN + 3 * HIDDEN * LATENT
_FLOPS = 2.0 * BATCH * (3 * _WEIGHTS - PIXELS * HIDDEN)
_BYTES = 4.0 * (7 * _WEIGHTS + BATCH * PIXELS)  # Adam reads four numbers of each weight and writes three


class ExampleVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(PIXELS, HIDDEN)
        self.fc21 = nn.Linear(HIDDEN, LATENT)
        self.fc22 = nn.Linear(HIDDEN, LATENT)
        self.fc3 = nn.Linear(LATENT, HIDDEN)
        self.fc4 = nn.Linear(HIDDEN, PIXELS)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h1 = F.relu(self.fc1(x))
        return self.fc21(h1), self.fc22(h1)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = torch.exp(0.5 * logvar)
        eps = torch.randn_like(std)
        return mu + eps * std

    def decode(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc4(F.relu(self.fc3(z))))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu, logvar = self.encode(x.view(-1, PIXELS))
        return self.decode(self.reparameterize(mu, logvar)), mu, logvar


def loss_function(recon_x: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    bce = F.binary_cross_entropy(recon_x, x.view(-1, PIXELS), reduction="sum")
    return bce - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())


def in_our_layout(tensors: dict[str, Tensor]) -> list[Tensor]:
    """The example's parameters, or their gradients, as `fastvae.models.VAE` has them: mean beside log-variance."""
    halves = [torch.cat([tensors[f"fc21.{name}"], tensors[f"fc22.{name}"]]) for name in ("weight", "bias")]
    ends = [[tensors[f"{layer}.{name}"] for name in ("weight", "bias")] for layer in ("fc1", "fc3", "fc4")]
    return [*ends[0], *halves, *ends[1], *ends[2]]


class Trainer:
    """The example's model and training loop, with images from a DataLoader over a TensorDataset."""

    def __init__(self, images: Tensor, *, compiled: bool = False, fused_adam: bool = False) -> None:
        self.images = images
        self.model = self.make_model()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=fused_adam or None)
        self.loss_of = torch.compile(self.loss, fullgraph=True, dynamic=False) if compiled else self.loss

    def make_model(self) -> nn.Module:
        torch.manual_seed(0)
        return ExampleVAE()

    def loss(self, x: Tensor) -> Tensor:
        recon_x, mu, logvar = self.model(x)
        return loss_function(recon_x, x, mu, logvar)

    def step(self, x: Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.loss_of(x)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def one_step(self) -> float:
        return self.step(self.images[:BATCH])

    def epoch(self) -> float:
        loader = DataLoader(TensorDataset(self.images, torch.zeros(len(self.images))), batch_size=BATCH, shuffle=True)
        return sum(self.step(images) for images, _ in loader)

    def gradients(self) -> Tensor:
        """The gradient of a batch's sum in our layout, in a row, with q(z|x) so narrow that z is its mean."""
        with torch.no_grad():
            self.narrow()
        self.optimizer.zero_grad()
        self.loss_of(self.images[:BATCH]).backward()
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return torch.cat([grad.flatten() for grad in self.in_order(grads)])

    def narrow(self) -> None:
        self.model.fc22.bias -= 30

    def in_order(self, grads: dict[str, Tensor]) -> list[Tensor]:
        return in_our_layout(grads)


class OurTrainer(Trainer):
    """`fastvae.models.VAE`, whose loss is the mean over a batch, with batches taken out of the images at once."""

    def make_model(self) -> nn.Module:
        encoder, decoder = MLPEncoder((1, 28, 28), (HIDDEN,)), MLPDecoder(LATENT, (1, 28, 28), (HIDDEN,))
        model = VAE(encoder, decoder, LATENT, likelihood="bernoulli")
        with torch.no_grad():
            initial = in_our_layout(dict(super().make_model().named_parameters()))
            for parameter, value in zip(model.parameters(), initial, strict=True):
                parameter.copy_(value)
        return model

    def loss(self, x: Tensor) -> Tensor:
        return self.model(x).loss

    def narrow(self) -> None:
        self.model.head.linear.bias[LATENT:] -= 30

    def epoch(self) -> float:
        return sum(self.step(self.images[rows]) for rows in torch.randperm(len(self.images)).split(BATCH))

    def in_order(self, grads: dict[str, Tensor]) -> list[Tensor]:
        return [BATCH * grad for grad in grads.values()]


def products() -> Callable[[], None]:
    """The matrix products of a step, forward and backward, and nothing else."""
    rows = [torch.randn(BATCH, n) for n in (PIXELS, HIDDEN, 2 * LATENT, LATENT, HIDDEN, PIXELS)]
    layers = [(rows[0], rows[1]), (rows[1], rows[2]), (rows[3], rows[4]), (rows[4], rows[5])]
    weights = [torch.randn(y.shape[1], x.shape[1]) for x, y in layers]

    def call() -> None:
        for (x, y), weight in zip(layers, weights, strict=True):
            torch.mm(x, weight.T)
            torch.mm(y.T, x)
            if x is not rows[0]:  # the images have no gradient
                torch.mm(y, weight)

    return call


def cases() -> Iterator[Case]:
    images = torch.rand(IMAGES, 1, 28, 28, generator=torch.Generator().manual_seed(0)).round()
    makers: dict[str, Callable[[], Trainer]] = {
        OURS: lambda: OurTrainer(images, fused_adam=True),
        "eager": lambda: Trainer(images),
        "eager, fused Adam": lambda: Trainer(images, fused_adam=True),
        "torch.compile": lambda: Trainer(images, compiled=True),
        "torch.compile, fused Adam": lambda: Trainer(images, compiled=True, fused_adam=True),
    }
    exact = Trainer(images.double())
    exact.model.double()
    expected = exact.gradients()

    def check(name: str) -> None:
        if name == PRODUCTS:
            with FlopCounterMode(display=False) as counted:
                calls[PRODUCTS]()
            if counted.get_total_flops() != _FLOPS:
                raise WrongResultError(f"{name}: {counted.get_total_flops():,} FLOPs, not {_FLOPS:,.0f}")
            return
        error = (makers[name]().gradients().double() - expected).norm().item() / expected.norm().item()
        if not error < 1e-3:
            raise WrongResultError(f"{name}: the gradient is off by {error:.3g} of its length")

    for what, steps in (("step", 1), ("epoch", -(-IMAGES // BATCH))):
        name = f"{PIXELS}-{HIDDEN}-{LATENT}, " + ("batch 128" if what == "step" else f"{IMAGES:,} images")
        trainers = {name: make() for name, make in makers.items()}
        calls: dict[str, Callable[[], object]]
        calls = {name: t.one_step if what == "step" else t.epoch for name, t in trainers.items()}
        if what == "step":
            calls[PRODUCTS] = products()
        yield Case("vae", name, "forward+backward+Adam", calls, check, flops=steps * _FLOPS, bytes=steps * _BYTES)
