"""An adversary that pulls codes towards a normal distribution: the regularizer of adversarial auto-encoders."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.ops.random import normal, seed_of


def reverse_gradient(x: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Return `x` itself, whose gradient is turned round: multiplied by minus `scale`.

    Source: Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation (2015).
    """
    return x.detach() + scale * (x.detach() - x)


class LatentAdversary(nn.Module):
    """Tells codes from numbers drawn from N(0, I), and makes whoever wrote the codes hide the difference.

    One loss and one optimizer serve both: the gradient of the adversary's loss is turned round on its way to the codes.

    Args:
        latent_dim: size of a code.
        hidden_size: of its two hidden layers.

    Source: Makhzani et al., Adversarial Autoencoders (2016).
    """

    def __init__(self, latent_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.judge = nn.Sequential(
            nn.Linear(latent_dim, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 1),
        )

    def forward(
        self,
        z: Tensor,
        weight: float | Tensor = 1.0,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Give the adversary's cross-entropy, batch mean of both kinds, summed: 2 log 2 where it cannot tell them.

        Args:
            z: codes, `(batch, latent_dim)`.
            weight: of the turned gradient that z gets; the adversary's own is not weighted.
            generator: source of the drawn codes; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes them, in place of `generator`.
        """
        seed = seed_of(seed, generator, "z", z)
        drawn = normal(seed, torch.arange(z.numel(), device=z.device)).view_as(z).to(z.dtype)
        loss: Tensor = (
            F.softplus(-self.judge(drawn)).mean() + F.softplus(self.judge(reverse_gradient(z, weight))).mean()
        )
        return loss
