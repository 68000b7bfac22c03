"""Layers over sparse coding: solved codes, unrolled ones, and the sparse auto-encoders of interpretability."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.ops.backend import compute_dtype, first_order
from fastvae.ops.checks import check_choice
from fastvae.ops.sparse import lipschitz, soft_threshold, sparse_encode
from fastvae.ops.top_k import top_k_decode, top_k_encode

_THRESHOLD_MOMENTUM = 0.01  # the running threshold forgets at this rate, once it has seen that many batches


class SparseCoding(nn.Module):
    """Codes of a learnable dictionary: each sample's lasso is solved, and the solution differentiated.

        codes = argmin over h of 1/2 |x - h A|^2 + l1 |h|_1 + l2/2 |h|^2

    The parameter `dictionary` (n_atoms, n_features) holds the atoms A as rows, drawn on the unit sphere. Training
    changes their norms: call `renormalize_` after each step of the optimiser, or the codes shrink as the atoms grow.

    Args:
        n_features: size of a sample.
        n_atoms: size of the dictionary.
        l1: weight of the codes' 1-norm.
        l2: weight of half their squared 2-norm.
        positive: ask for codes >= 0.
        tol: duality gap, relative to |x|^2, at which a sample is solved; None for that of `sparse_encode`.
        max_iter: most iterations a sample; None for that of `sparse_encode`.

    Source: Olshausen & Field 1996, "Emergence of simple-cell receptive field properties by learning a sparse code".
    """

    def __init__(
        self,
        n_features: int,
        n_atoms: int,
        l1: float,
        *,
        l2: float = 0.0,
        positive: bool = False,
        tol: float | None = None,
        max_iter: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(n_features=n_features, n_atoms=n_atoms)
        _check_positive(l1=l1)
        _check_weights(l2=l2)
        self.n_features = n_features
        self.n_atoms = n_atoms
        self.l1 = l1
        self.l2 = l2
        self.positive = positive
        self.tol = tol
        self.max_iter = max_iter
        self.dictionary = nn.Parameter(_unit_rows(n_atoms, n_features, device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Solve for the codes (..., n_atoms) of x (..., n_features), with gradients to x and the dictionary."""
        settings: dict[str, Any] = {} if self.max_iter is None else {"max_iter": self.max_iter}
        rows = _rows(x, self.n_features)
        if rows.dtype in (torch.bfloat16, torch.float16):  # as autocast hands over
            rows = rows.to(self.dictionary.dtype)
        codes = sparse_encode(
            rows, self.dictionary, self.l1, l2=self.l2, positive=self.positive, tol=self.tol, **settings
        )
        return codes.reshape(*x.shape[:-1], self.n_atoms)

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Return the samples (..., n_features) that codes (..., n_atoms) stand for."""
        return codes @ self.dictionary

    def renormalize_(self, constraint: Literal["sphere", "ball"] = "sphere") -> SparseCoding:
        """Bring the atoms, in place, to norm 1 ("sphere"; zero atoms stay) or to at most 1 ("ball")."""
        check_choice("constraint", constraint, ("sphere", "ball"))
        _renormalize_(self.dictionary, constraint)
        return self

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.n_features}, {self.n_atoms}, l1={self.l1}, l2={self.l2}, positive={self.positive}"


class LISTA(nn.Module):
    """Iterative soft thresholding of a fixed number of steps whose matrices and thresholds are learned.

        codes = soft_threshold(x @ encoder.T + codes @ lateral.T, threshold)    n_layers times, from codes = 0

    Untrained it is ISTA: encoder = A / L, lateral = I - A A^T / L and threshold = l1 / L, with L the largest eigenvalue
    of A A^T. Parameters: `encoder` (layers, n_atoms, n_features), `lateral` (layers, n_atoms, n_atoms) and `threshold`
    (layers, n_atoms), where layers is 1 if tied. The buffer `dictionary` is what they started from.

    Args:
        n_features: size of a sample.
        n_atoms: size of the codes.
        n_layers: number of soft thresholdings.
        l1: weight of the codes' 1-norm in the problem that the untrained layers solve.
        dictionary: atoms A to start from, (n_atoms, n_features); drawn on the unit sphere if None.
        tied: share one set of parameters between the layers, as in the paper, or give each its own.

    Source: Gregor & LeCun 2010, "Learning fast approximations of sparse coding".
    """

    dictionary: Tensor

    def __init__(
        self,
        n_features: int,
        n_atoms: int,
        n_layers: int,
        *,
        l1: float,
        dictionary: Tensor | None = None,
        tied: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(n_features=n_features, n_atoms=n_atoms, n_layers=n_layers)
        _check_positive(l1=l1)
        if dictionary is None:
            dictionary = _unit_rows(n_atoms, n_features, device, dtype)
        elif tuple(dictionary.shape) != (n_atoms, n_features):
            raise ValueError(
                f"dictionary: expected shape (n_atoms, n_features) = {(n_atoms, n_features)}, "
                f"got {tuple(dictionary.shape)}"
            )
        self.n_features = n_features
        self.n_atoms = n_atoms
        self.n_layers = n_layers
        self.l1 = l1
        self.tied = tied
        self.register_buffer("dictionary", dictionary.detach().to(device=device, dtype=dtype, copy=True))
        layers = 1 if tied else n_layers
        like: dict[str, Any] = {"device": self.dictionary.device, "dtype": self.dictionary.dtype}
        self.encoder = nn.Parameter(torch.empty(layers, n_atoms, n_features, **like))
        self.lateral = nn.Parameter(torch.empty(layers, n_atoms, n_atoms, **like))
        self.threshold = nn.Parameter(torch.empty(layers, n_atoms, **like))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make every layer a step of ISTA for `dictionary` again."""
        atoms = self.dictionary.to(compute_dtype(self.dictionary))
        step = 1 / lipschitz(atoms)
        self.encoder.copy_(step * atoms)
        self.lateral.copy_(torch.eye(self.n_atoms, device=atoms.device, dtype=atoms.dtype) - step * atoms @ atoms.T)
        self.threshold.copy_(torch.full_like(self.threshold, self.l1, dtype=atoms.dtype) * step)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes (..., n_atoms) of x (..., n_features)."""
        x = _rows(x, self.n_features).reshape(x.shape)
        codes = drive = None
        for layer in range(self.n_layers):
            i = 0 if self.tied else layer
            if drive is None or not self.tied:
                drive = F.linear(x, self.encoder[i])
            proposal = drive if codes is None else drive + F.linear(codes, self.lateral[i])
            codes = soft_threshold(proposal, self.threshold[i])
        assert codes is not None
        return codes

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Return the samples (..., n_features) that codes (..., n_atoms) of `dictionary` stand for."""
        return codes @ self.dictionary

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        return f"{self.n_features}, {self.n_atoms}, {self.n_layers}, l1={self.l1}, tied={self.tied}"


class SparseAutoEncoderOutput(NamedTuple):
    """What `SparseAutoEncoder` returns.

    Attributes:
        reconstruction: (..., n_features).
        codes: (..., n_latents), at least 0; None for "top_k".
        values: the k largest latents, (..., k), for "top_k"; else None.
        indices: which latents these are, int64 (..., k), for "top_k"; else None.
        reconstruction_loss: |x - reconstruction|^2, summed over features, mean over samples, as all losses.
        sparsity_loss: l1 |codes|_1 for "relu", l0 |codes|_0 for "jump_relu", else 0.
        auxiliary_loss: `auxiliary_weight` times how badly dead latents explain what is left of x; 0 outside training.
        loss: the sum of the three. All are scalars, float32 (float64 for float64 input).
    """

    reconstruction: Tensor
    codes: Tensor | None
    values: Tensor | None
    indices: Tensor | None
    reconstruction_loss: Tensor
    sparsity_loss: Tensor
    auxiliary_loss: Tensor
    loss: Tensor


class SparseAutoEncoder(nn.Module):
    """One hidden layer of many latents of which few are active: decomposes activations into sparse directions.

        latent = (x - pre_bias) @ encoder.T + bias,    reconstruction = activation(latent) @ decoder + pre_bias

    The activations:

    - "relu" with the penalty l1 |codes|_1.
    - "top_k" keeps each sample's k largest latents. The (samples, n_latents) matrix is never whole in memory.
    - "batch_top_k" keeps the k * samples largest of the batch when training. Otherwise a latent is kept above
      `inference_threshold`, the running mean of the smallest positive one kept.
    - "jump_relu" keeps what exceeds the latent's own threshold, exp(`log_threshold`), with the penalty l0 |codes|_0.
      The threshold's gradients are those of a rectangle kernel of width `bandwidth`.

    The parameters are `encoder` and `decoder`, both (n_latents, n_features), `bias` and `pre_bias`. The decoder's rows
    start on the unit sphere and the encoder as a copy of them. In training call `remove_parallel_gradient_` before the
    optimiser's step, and `renormalize_` after it.

    The buffer `samples_since_fired` counts, in training mode, the samples since each latent was last active. For the
    top-k activations the `k_aux` largest of the dead latents reconstruct what the living leave of x, and the squared
    error of that, times `auxiliary_weight`, is added to the loss.

    Args:
        n_features: size of a sample.
        n_latents: number of latents.
        activation: "relu", "top_k", "batch_top_k" or "jump_relu".
        k: for the top-k activations, how many latents a sample keeps, on average over the batch for "batch_top_k".
        l1: for "relu", weight of the codes' 1-norm.
        l0: for "jump_relu", weight of the number of active latents.
        threshold: for "jump_relu", where the thresholds start.
        bandwidth: for "jump_relu", width of the kernel.
        tied: use the decoder as encoder.
        k_aux: dead latents in the auxiliary loss; None for half of n_features.
        auxiliary_weight: weight of the auxiliary loss; 0 for none.
        dead_after: number of samples after which a latent that has not fired counts as dead.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (top_k, dead latents); Bussmann et al. 2024,
    "BatchTopK sparse autoencoders"; Rajamanoharan et al. 2024, "Jumping ahead: improving reconstruction fidelity with
    JumpReLU sparse autoencoders"; Bricken et al. 2023, "Towards monosemanticity" (relu, decoder norms).
    """

    encoder: nn.Parameter | None
    samples_since_fired: Tensor
    inference_threshold: Tensor
    threshold_batches: Tensor

    def __init__(
        self,
        n_features: int,
        n_latents: int,
        *,
        activation: Literal["relu", "top_k", "batch_top_k", "jump_relu"] = "relu",
        k: int | None = None,
        l1: float | None = None,
        l0: float | None = None,
        threshold: float = 1e-3,
        bandwidth: float = 1e-3,
        tied: bool = False,
        k_aux: int | None = None,
        auxiliary_weight: float = 1 / 32,
        dead_after: int = 10_000_000,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("activation", activation, tuple(_SETTING))
        for name, value in {"k": k, "l1": l1, "l0": l0}.items():
            if (value is not None) != (name == _SETTING[activation]):
                expected = "a number" if value is None else "None"
                raise ValueError(f"{name}: expected {expected} for activation {activation!r}, got {value}")
        k_aux = min(n_latents, max(1, n_features // 2)) if k_aux is None else k_aux
        _check_sizes(n_features=n_features, n_latents=n_latents, k_aux=k_aux, dead_after=dead_after)
        _check_weights(l1=l1 or 0.0, l0=l0 or 0.0, auxiliary_weight=auxiliary_weight)
        for name, value in {"k": k, "k_aux": k_aux}.items():
            if value is not None and not 1 <= value <= n_latents:
                raise ValueError(f"{name}: expected 1 <= {name} <= n_latents = {n_latents}, got {value}")
        _check_positive(threshold=threshold, bandwidth=bandwidth)
        self.n_features = n_features
        self.n_latents = n_latents
        self.activation = activation
        self.k, self.l1, self.l0 = k, l1, l0
        self.bandwidth = bandwidth
        self.k_aux = k_aux
        self.auxiliary_weight = auxiliary_weight
        self.dead_after = dead_after

        self.decoder = nn.Parameter(_unit_rows(n_latents, n_features, device, dtype))
        self.register_parameter("encoder", None if tied else nn.Parameter(self.decoder.detach().clone()))
        self.bias = nn.Parameter(torch.zeros(n_latents, device=device, dtype=dtype))
        self.pre_bias = nn.Parameter(torch.zeros(n_features, device=device, dtype=dtype))
        if activation == "jump_relu":
            self.log_threshold = nn.Parameter(torch.full_like(self.bias, math.log(threshold)))
        if activation == "batch_top_k":
            self.register_buffer("inference_threshold", torch.zeros((), device=device, dtype=compute_dtype(self.bias)))
            self.register_buffer("threshold_batches", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("samples_since_fired", torch.zeros(n_latents, dtype=torch.int64, device=device))

    @property
    def dead_latents(self) -> Tensor:
        """Which latents have not fired for `dead_after` samples or more, bool (n_latents,)."""
        return self.samples_since_fired >= self.dead_after

    def forward(self, x: Tensor) -> SparseAutoEncoderOutput:
        """Reconstruct x (..., n_features); in training mode also take note of which latents fired.

        Raises:
            ValueError: if the last dimension of x is not n_features.
        """
        rows = _rows(x, self.n_features)
        centred = rows - self.pre_bias
        codes = values = indices = None
        if self.activation == "top_k":
            values, indices = self._top_k(centred)
            reconstruction = top_k_decode(values, indices, self.decoder, self.pre_bias)
            sparsity = _loss_zero(rows)
        else:
            codes, sparsity = self._dense_codes(centred)
            reconstruction = self.decode(codes)
        auxiliary = _loss_zero(rows)
        if self.training:
            self._take_note(codes, values, indices)
            if self.activation in ("top_k", "batch_top_k") and self.auxiliary_weight:
                auxiliary = self.auxiliary_weight * self._unexplained_by_dead(centred, rows - reconstruction)
        error = _squared_error(rows, reconstruction)
        leading = x.shape[:-1]
        codes, values, indices = (
            None if t is None else t.reshape(*leading, t.shape[-1]) for t in (codes, values, indices)
        )
        total = error + sparsity + auxiliary
        return SparseAutoEncoderOutput(
            reconstruction.reshape(x.shape), codes, values, indices, error, sparsity, auxiliary, total
        )

    def encode(self, x: Tensor) -> Tensor:
        """Return all codes (..., n_latents) of x (..., n_features), for every activation; nothing is taken note of."""
        centred = _rows(x, self.n_features) - self.pre_bias
        if self.activation == "top_k":
            values, indices = self._top_k(centred)
            codes = values.new_zeros(*values.shape[:-1], self.n_latents).scatter(-1, indices, values)
        else:
            codes, _ = self._dense_codes(centred, take_note=False)
        return codes.reshape(*x.shape[:-1], self.n_latents)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the reconstruction (..., n_features) of codes (..., n_latents)."""
        return codes @ self.decoder + self.pre_bias

    @torch.no_grad()
    def renormalize_(self) -> SparseAutoEncoder:
        """Bring the decoder's rows back to norm 1, in place; zero rows stay."""
        _renormalize_(self.decoder, "sphere")
        return self

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> SparseAutoEncoder:
        """Take out of the decoder's gradient what `renormalize_` would undo: each row's component along the row."""
        if self.decoder.grad is not None:
            dtype = compute_dtype(self.decoder)
            grad, rows = self.decoder.grad.to(dtype), self.decoder.to(dtype)
            unit = F.normalize(rows, dim=1, eps=torch.finfo(dtype).tiny)
            self.decoder.grad -= (grad * unit).sum(1, keepdim=True) * unit
        return self

    def extra_repr(self) -> str:
        """List the settings for `print`."""
        setting = _SETTING[self.activation]
        return (
            f"{self.n_features}, {self.n_latents}, activation={self.activation!r}, "
            f"{setting}={getattr(self, setting)}, tied={self.encoder is None}"
        )

    @property
    def _encoder(self) -> Tensor:
        return self.decoder if self.encoder is None else self.encoder

    def _top_k(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        assert self.k is not None
        return top_k_encode(centred, self._encoder, self.bias, k=self.k)

    def _dense_codes(self, centred: Tensor, take_note: bool = True) -> tuple[Tensor, Tensor]:
        """Codes (samples, n_latents) and the weighted sparsity penalty."""
        latent = F.linear(centred, self._encoder, self.bias)
        if self.activation == "jump_relu":
            assert self.l0 is not None
            latent = latent.to(self.log_threshold.dtype)
            codes, active = _JumpReLU.apply(latent, self.log_threshold.exp(), self.bandwidth)
            return codes, self.l0 * _mean(active)
        codes = F.relu(latent)
        if self.activation == "relu":
            assert self.l1 is not None
            return codes, self.l1 * _mean(codes.sum(1, dtype=compute_dtype(codes)))
        if not self.training:
            return codes * (codes > self.inference_threshold), _loss_zero(codes)
        assert self.k is not None
        kept, where = codes.detach().flatten().topk(self.k * codes.shape[0], sorted=False)
        if take_note:
            self._update_threshold(kept)
        mask = torch.zeros_like(codes, dtype=torch.bool).flatten().scatter(0, where, True)
        return codes * mask.view_as(codes), _loss_zero(codes)

    @torch.no_grad()
    def _update_threshold(self, kept: Tensor) -> None:
        """The mean over batches of the smallest positive value kept, later on an exponential one; without a sync."""
        end = kept.new_full((1,), math.inf)
        smallest = torch.cat([torch.where(kept > 0, kept, math.inf), end]).amin().to(self.inference_threshold.dtype)
        found = smallest < math.inf
        self.threshold_batches += found
        rate = self.threshold_batches.clamp_min(1).reciprocal().clamp_min(_THRESHOLD_MOMENTUM)
        moved = self.inference_threshold + rate * (smallest - self.inference_threshold)
        self.inference_threshold.copy_(torch.where(found, moved, self.inference_threshold))

    @torch.no_grad()
    def _take_note(self, codes: Tensor | None, values: Tensor | None, indices: Tensor | None) -> None:
        """Count the samples since each latent fired, those after the last firing within the batch included."""
        if codes is not None:
            samples = codes.shape[0]
            if not samples:
                return
            active = codes > 0
            since, fired = active.flip(0).to(torch.uint8).argmax(0), active.any(0)
        else:
            assert values is not None
            assert indices is not None
            samples = values.shape[0]
            row = torch.arange(samples, device=values.device)[:, None]
            last = torch.full_like(self.samples_since_fired, -1)
            last.scatter_reduce_(0, indices.flatten(), torch.where(values > 0, row, -1).flatten(), "amax")
            since, fired = samples - 1 - last, last >= 0
        self.samples_since_fired.copy_(torch.where(fired, since, self.samples_since_fired + samples))

    def _unexplained_by_dead(self, centred: Tensor, residual: Tensor) -> Tensor:
        """|residual - its reconstruction by the k_aux largest dead latents|^2; 0 if none is dead."""
        dead = self.dead_latents
        if dead.device.type == "cpu" and not torch.compiler.is_compiling() and not dead.any():
            return _loss_zero(residual)  # saves the product; elsewhere asking would synchronise
        # A bias of -inf keeps the living out: where too few are dead, they come with the value 0.
        bias = torch.where(dead, self.bias, -math.inf)
        values, indices = top_k_encode(centred, self._encoder, bias, k=self.k_aux)
        explained = top_k_decode(values, indices, self.decoder)
        return torch.where(dead.any(), _squared_error(residual.detach(), explained), 0)


_SETTING = {"relu": "l1", "top_k": "k", "batch_top_k": "k", "jump_relu": "l0"}


class _JumpReLU(torch.autograd.Function):
    """z H(z - threshold), and how many are active in each row; the threshold's gradients by a rectangle kernel K.

    d codes / d threshold = -threshold / bandwidth K((z - threshold) / bandwidth)
    d active / d threshold = -1 / bandwidth K((z - threshold) / bandwidth),    d active / d z = 0
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        active = z > threshold
        return z * active, active.sum(1).to(compute_dtype(z))

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_codes: Tensor, grad_active: Tensor) -> tuple[Tensor, Tensor, None]:
        z, threshold = ctx.saved_tensors
        inside = (z - threshold).abs() < 0.5 * ctx.bandwidth
        pull = torch.where(inside, threshold * grad_codes + grad_active[:, None].to(z.dtype), 0)
        return grad_codes * (z > threshold), pull.sum(0) / -ctx.bandwidth, None


def _loss_zero(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=compute_dtype(tensor), device=tensor.device)


def _mean(per_sample: Tensor) -> Tensor:
    return per_sample.sum() / max(per_sample.shape[0], 1)  # 0 for an empty batch


def _squared_error(target: Tensor, estimate: Tensor) -> Tensor:
    dtype = compute_dtype(target)
    return _mean((target.to(dtype) - estimate.to(dtype)).square().sum(1))


def _unit_rows(rows: int, columns: int, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    return F.normalize(torch.randn(rows, columns, device=device, dtype=dtype), dim=1)


@torch.no_grad()
def _renormalize_(rows: Tensor, constraint: str) -> None:
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=compute_dtype(rows))
    rows /= norms.clamp_min(1) if constraint == "ball" else torch.where(norms > 0, norms, 1)


def _rows(x: Tensor, n_features: int) -> Tensor:
    if x.dim() == 0 or x.shape[-1] != n_features:
        raise ValueError(f"x: expected shape (..., {n_features}), got {tuple(x.shape)}")
    return x.reshape(math.prod(x.shape[:-1]), n_features)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {number}")


def _check_weights(**weights: float) -> None:
    for name, weight in weights.items():
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 0, got {weight}")
