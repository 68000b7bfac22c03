"""Points on the straight line between two sentences in latent space."""

from collections.abc import Callable

import torch
from torch import Tensor


@torch.no_grad()
def latent_line(posterior_mean: Callable[[Tensor], Tensor], a: Tensor, b: Tensor, steps: int) -> Tensor:
    """Give latents evenly spaced from one sentence's to another's.

    Args:
        posterior_mean: gives the latent of tokens `(1, time)`, `(1, latent)`.
        a, b: the sentences, `(time,)` or `(1, time)` int64, `<s> ... </s>`.
        steps: number of latents, both ends included, at least 2.

    Returns:
        `(steps, latent)`.

    Raises:
        ValueError: `steps` is below 2, or an end is not one sentence.
    """
    if steps < 2:
        raise ValueError(f"steps: expected at least 2 (both ends), got {steps}")
    ends = []
    for name, sentence in (("a", a), ("b", b)):
        if sentence.dim() not in (1, 2) or (sentence.dim() == 2 and sentence.size(0) != 1):
            raise ValueError(f"{name}: expected one sentence, (time,), got shape {tuple(sentence.shape)}")
        ends.append(posterior_mean(sentence.reshape(1, -1)))
    fraction = torch.linspace(0, 1, steps, device=ends[0].device, dtype=ends[0].dtype).unsqueeze(1)
    return torch.lerp(ends[0], ends[1], fraction)
