"""Dictionary learning: block coordinate descent over the atoms from sufficient statistics, and atoms that died.

For codes H of samples X and a dictionary D with atoms as rows, the statistics are the code Gram matrix A = H^T H and
the cross products B = H^T X, summed over however many samples. One sweep minimises, atom by atom,

    1/2 |X - H D|^2 = 1/2 tr(D^T A D) - tr(D^T B) + constant      subject to |D_k| = 1 ("sphere") or <= 1 ("ball"):

    D_k <- projection of D_k + (B_k - A_k D) / A_kk,   each atom with those before it already renewed.

Taken literally this is a matrix-vector product for each atom. Here one matrix product gives the gradients of a block of
atoms, which an update then corrects within the block only: the same numbers, at the speed of a matrix product.

Source: Mairal, Bach, Ponce, Sapiro 2009, "Online dictionary learning for sparse coding", algorithm 2.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.ops.backend import CORE, pointer, register
from fastvae.ops.checks import check_choice, check_device, check_float, check_like, check_shape

CONSTRAINTS = ("sphere", "ball")
DEAD = 1e-6  # of the mean diagonal of the code Gram matrix: what codes use less than this is not used
DUPLICATE = 0.999999  # |cos| of two atoms above this: they are one
_BLOCK = 32


class Replacement(NamedTuple):
    """What :func:`replace_atoms` made of its arguments.

    Attributes:
        dictionary: (atoms, features).
        code_gram: (atoms, atoms), zero in the rows and columns of the replaced atoms.
        cross: (atoms, features), zero in their rows.
        replaced: their indices, int64, (replaced,).
    """

    dictionary: Tensor
    code_gram: Tensor
    cross: Tensor
    replaced: Tensor


# ------------------------------------------------------------------------------------------------ definition
def reference(dictionary: Tensor, code_gram: Tensor, cross: Tensor, sphere: bool, positive: bool) -> Tensor:
    """One sweep over the atoms; the result is new, in `dictionary`'s dtype."""
    return _by_blocks(_sweep_block, dictionary, code_gram, cross, sphere, positive)


def _by_blocks(sweep: Callable[..., None], dictionary: Tensor, code_gram: Tensor, cross: Tensor, sphere: bool,
               positive: bool) -> Tensor:  # fmt: skip
    compute = torch.promote_types(torch.promote_types(dictionary.dtype, code_gram.dtype), torch.float32)
    atoms = dictionary.to(compute, memory_format=torch.contiguous_format, copy=True)
    code_gram, cross = code_gram.to(compute).contiguous(), cross.to(compute)
    used = _used(code_gram)
    for start in range(0, atoms.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        gradient = torch.addmm(cross[block], code_gram[block], atoms, alpha=-1)
        sweep(atoms[block], gradient, code_gram[block, block], used[block], sphere, positive)
    return atoms.to(dictionary.dtype)


def _sweep_block(
    atoms: Tensor, gradient: Tensor, gram: Tensor, used: Tensor, sphere: bool, positive: bool
) -> None:  # fmt: skip
    # In place on `atoms` (b, features); `gradient` (b, features) is B - A D of these rows on entry, spent on return.
    step = torch.where(used, 1 / gram.diagonal(), 0)
    for k in range(atoms.shape[0]):
        new = torch.addcmul(atoms[k], gradient[k], step[k])
        if positive:
            new = new.clamp_min(0)
        norm = torch.linalg.vector_norm(new)
        new = new / (norm if sphere else norm.clamp_min(1))
        change = torch.where(used[k] & (norm > 0 if sphere else used[k]), new - atoms[k], 0)
        atoms[k] += change
        gradient[k + 1 :].addr_(gram[k + 1 :, k], change, alpha=-1)


def _cpu_sweep_block(
    atoms: Tensor, gradient: Tensor, gram: Tensor, used: Tensor, sphere: bool, positive: bool
) -> None:  # fmt: skip
    assert CORE is not None
    CORE.dictionary_sweep(
        atoms.dtype == torch.float64, sphere, positive, pointer(atoms), pointer(gradient), pointer(gram),
        pointer(used), *atoms.shape, gram.stride(0),
    )  # fmt: skip


def _used(code_gram: Tensor) -> Tensor:
    usage = code_gram.diagonal()
    return usage > DEAD * usage.mean()


def unused(dictionary: Tensor, code_gram: Tensor) -> Tensor:
    """Indices, int64, of the atoms that codes do not use, and of those that repeat an atom used more."""
    usage, order = code_gram.diagonal().sort(descending=True, stable=True)
    atoms = dictionary[order]
    atoms = atoms / torch.linalg.vector_norm(atoms, dim=1, keepdim=True).clamp_min(torch.finfo(atoms.dtype).tiny)
    repeats = ((atoms @ atoms.T).abs().tril_(-1) > DUPLICATE).any(1)
    return order[repeats | ~(usage > DEAD * usage.mean())].sort().values


# --------------------------------------------------------------------------------------------------- schema
_update = register(
    "dictionary_update(Tensor dictionary, Tensor code_gram, Tensor cross, bool sphere, bool positive) -> Tensor",
    reference=reference,
    fake=lambda dictionary, code_gram, cross, sphere, positive: dictionary.new_empty(dictionary.shape),
    cpu=functools.partial(_by_blocks, _cpu_sweep_block),
    cuda=None,
)


# --------------------------------------------------------------------------------------------------- public
def dictionary_update(
    dictionary: Tensor, code_gram: Tensor, cross: Tensor, *, constraint: str = "sphere", positive: bool = False
) -> Tensor:
    """Improve a dictionary for given codes by one sweep of block coordinate descent over its atoms.

    Atoms that the codes do not use (diagonal of `code_gram` under 1e-6 of its mean) stay as they are. The result has
    no gradient: nothing is recorded for it.

    Args:
        dictionary: (atoms, features), float32, float64, bfloat16 or float16.
        code_gram: sum over samples of h^T h, (atoms, atoms), of `dictionary`'s dtype or of a wider one.
        cross: sum over the same samples of h^T x, (atoms, features), like `code_gram`.
        constraint: "sphere" gives every atom the norm 1, "ball" a norm of at most 1.
        positive: keep the entries of the atoms from being negative.

    Returns:
        The new dictionary, (atoms, features), in `dictionary`'s dtype; computed in float32 or wider.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.

    Source: Mairal, Bach, Ponce, Sapiro 2009, algorithm 2.
    """
    check_choice("constraint", constraint, CONSTRAINTS)
    _check_statistics(dictionary, code_gram, cross)
    return _update(dictionary.detach(), code_gram.detach(), cross.detach(), constraint == "sphere", positive)


def replace_atoms(
    dictionary: Tensor, code_gram: Tensor, cross: Tensor, x: Tensor, codes: Tensor
) -> Replacement:  # fmt: skip
    """Put the samples that are reconstructed worst, normalised, in the place of atoms that died or repeat another.

    An atom is dead if its diagonal entry of `code_gram` is under 1e-6 of the mean one; of two atoms with |cos| above
    0.999999 the one used less is replaced. Samples reconstructed exactly replace nothing.

    Args:
        dictionary: (atoms, features).
        code_gram: sum over samples of h^T h, (atoms, atoms).
        cross: sum over the same samples of h^T x, (atoms, features).
        x: samples to choose from, (samples, features), in `dictionary`'s dtype.
        codes: their codes, (samples, atoms).

    Returns:
        :class:`Replacement`: new tensors, or the same where nothing had to be replaced.

    Raises:
        TypeError, ValueError: naming the argument whose type, shape or device is wrong.
    """
    _check_statistics(dictionary, code_gram, cross)
    check_like("x", x, "dictionary", dictionary)
    check_like("codes", codes, "dictionary", dictionary)
    (atoms, features), samples = dictionary.shape, x.shape[0]
    check_shape("x", x, (samples, features), "(samples, features)")
    check_shape("codes", codes, (samples, atoms), "(samples, atoms)")
    with torch.no_grad():
        replaced = unused(dictionary, code_gram)
        worst = worst_reconstructed(dictionary, x, codes, len(replaced))
        replaced = replaced[: len(worst)]
        if len(replaced) == 0:
            return Replacement(dictionary, code_gram, cross, replaced)
        dictionary, code_gram, cross = dictionary.clone(), code_gram.clone(), cross.clone()
        dictionary[replaced] = torch.nn.functional.normalize(x[worst], eps=0)
        code_gram[replaced], code_gram[:, replaced], cross[replaced] = 0, 0, 0
    return Replacement(dictionary, code_gram, cross, replaced)


def worst_reconstructed(dictionary: Tensor, x: Tensor, codes: Tensor, count: int) -> Tensor:
    """Indices, int64, of up to `count` samples with the largest error, worst first, but of none without an error."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    error = torch.linalg.vector_norm(x - codes @ dictionary, dim=1)
    error, worst = error.topk(min(count, len(error)))
    norm = torch.linalg.vector_norm(x[worst], dim=1)
    # Rounding is no error, and a sample of zeros has no direction.
    return worst[(error > 10 * torch.finfo(x.dtype).eps * norm) & (norm > 0)]


def _check_statistics(dictionary: Tensor, code_gram: Tensor, cross: Tensor) -> None:
    check_float("dictionary", dictionary)
    if dictionary.dim() != 2:
        raise ValueError(f"dictionary: expected shape (atoms, features), got {tuple(dictionary.shape)}")
    atoms, features = dictionary.shape
    check_float("code_gram", code_gram)
    check_device("code_gram", code_gram, "dictionary", dictionary)
    check_shape("code_gram", code_gram, (atoms, atoms), "(atoms, atoms)")
    check_like("cross", cross, "code_gram", code_gram)
    check_shape("cross", cross, (atoms, features), "(atoms, features)")
