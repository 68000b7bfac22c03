"""Which backend serves which op: the C++ core on CPU, Triton on CUDA, the reference everywhere else."""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

LIBRARY = torch.library.Library("fastvae", "DEF")

_REINSTALL = "reinstall with a C++17 compiler at hand: pip install --force-reinstall --no-deps fastvae"


class Backend(NamedTuple):
    """One row of ``fastvae info``: what serves `op` on `device`, and why."""

    op: str
    device: str
    backend: str
    reason: str


def _load_core() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastvae._C"), ""
    except ImportError as error:
        if importlib.util.find_spec("fastvae._C") is None:
            return None, f"the C++ core was not built; {_REINSTALL}"
        return None, f"the C++ core failed to load ({error}); {_REINSTALL}"


CORE, CORE_MISSING = _load_core()
TRITON_MISSING = "" if importlib.util.find_spec("triton") else "Triton is not installed; pip install 'fastvae[gpu]'"
_OPS: dict[str, tuple[bool, bool]] = {}  # name: whether a C++ and a Triton kernel exist

if CORE is None:
    warnings.warn(f"fastvae: CPU ops run on the slower reference path: {CORE_MISSING}", stacklevel=2)


def cpu_isa() -> str | None:
    """Instruction set the C++ core runs with ("baseline", "avx2", "avx512"), or None without a core."""
    return None if CORE is None else CORE.isa()


def describe() -> list[Backend]:
    """List, for each op and device, the backend that serves it and the reason."""
    rows = []
    for op, (on_cpu, on_cuda) in _OPS.items():
        if not on_cpu:
            cpu = ("reference", "made of PyTorch's own products; there is no kernel to gain by")
        elif CORE:
            cpu = ("C++", f"instruction set {cpu_isa()}")
        else:
            cpu = ("reference", CORE_MISSING)
        if not on_cuda:
            cuda = ("reference", "no Triton kernel")
        elif TRITON_MISSING:
            cuda = ("reference", TRITON_MISSING)
        else:
            cuda = ("Triton", "triton is installed")
        rows += [Backend(op, "cpu", *cpu), Backend(op, "cuda", *cuda)]
    return rows


def kernel(module: str, function: str) -> Callable[..., Any]:
    """Return a call into `fastvae.kernels.<module>`, which is imported, with Triton, at its first use."""

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"fastvae.kernels.{module}"), function)

    def call(*args: Any) -> Any:
        return load()(*args)

    return call


def register(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None,
    waits: bool = False,
) -> Callable[..., Any]:
    """Define ``fastvae::<schema>`` with one implementation per backend and return the callable op.

    Args:
        schema: a ``torch.library`` schema, such as ``"double(Tensor x) -> Tensor"``.
        reference: eager PyTorch implementation, used on every device without a kernel.
        fake: shape function for tracing.
        cpu: implementation over the C++ core; None where only the reference exists.
        cuda: implementation over Triton; None where only the reference exists.
        waits: the host looks at values of CUDA tensors, so that no CUDA graph can hold the op.
    """
    name = schema.partition("(")[0]
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None) if waits else None
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *([] if unsafe is None else [unsafe])))
    LIBRARY.impl(name, _owning(reference), "CompositeExplicitAutograd")
    if cpu is not None and CORE is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if cuda is not None and not TRITON_MISSING:
        LIBRARY.impl(name, _owning(_on_its_device(cuda)), "CUDA")  # may hand float64 to the reference
    torch.library.register_fake(f"fastvae::{name}", fake, lib=LIBRARY)
    _OPS[name] = cpu is not None, cuda is not None
    op = getattr(torch.ops.fastvae, name).default
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, _outside_autocast(op, device.lower()), f"Autocast{device}")
    return op


def _on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    # Triton launches on the current device, whatever that of the tensors is.
    def call(*args: Any) -> Any:
        with torch.cuda.device_of(next(t for t in args if isinstance(t, torch.Tensor))):
            return implementation(*args)

    return call


def _owning(implementation: Callable[..., Any]) -> Callable[..., Any]:
    # Plain torch code keeps its inputs' strides and, as in a sum's gradient, hands tensors through. An op may not.
    def call(*args: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        taken = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        outputs, result = [], implementation(*args)
        single = isinstance(result, torch.Tensor)
        for output in (result,) if single else result:
            own = output.contiguous()
            if own.untyped_storage().data_ptr() in taken:
                own = own.clone()
            taken.add(own.untyped_storage().data_ptr())
            outputs.append(own)
        return outputs[0] if single else tuple(outputs)

    return call


def _outside_autocast(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    # An op computes in the types that it states: autocast must not lower the products inside.
    def call(*args: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return op(*args)

    return call


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a Function's `backward` raise if it is differentiated; free where nothing records.

    PyTorch's `once_differentiable` raises only where the upstream gradient needs a gradient itself, and on the way to a
    leaf of its own, which `torch.autograd.grad` with inputs leaves out: a sum's second derivative was zero in silence.
    """

    def call(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            result = backward(ctx, *grads)
        outputs = result if isinstance(result, tuple) else (result,)
        inputs = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        given = [output for output in outputs if output is not None]
        if torch.compiler.is_compiling() or not inputs or not given:
            return result
        refusing = iter(_NoSecondDerivative.apply(len(given), *given, *inputs))
        return tuple(None if output is None else next(refusing) for output in outputs)

    return call


class _NoSecondDerivative(torch.autograd.Function):
    """Hands `count` gradients through, tied to what they were computed from."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("fastvae: this function has first derivatives only, and a second one was asked for")


@contextlib.contextmanager
def recording() -> Iterator[None]:
    """Let autograd record within an op, where gradients are off and a mode such as FlopCounterMode excludes it."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._SetExcludeDispatchKeyGuard(key, False), torch.enable_grad():
        yield


def in_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of `tensor`."""
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def in_autocast_dtype(weight: torch.Tensor, *others: torch.Tensor | None) -> list[Any]:
    """Return the operands in the dtype autocast asks for, unchanged outside autocast.

    On CPU that is the weight's own: the kernels compute in float32 whatever the storage, so rounding the weight
    would lose digits and gain nothing.
    """
    operands = [weight, *others]
    if not in_autocast(weight):
        return operands
    device = weight.device.type
    dtype = weight.dtype if device == "cpu" else torch.get_autocast_dtype(device)
    return [t if t is None else t.to(dtype) for t in operands]


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype to compute in for `tensor`: float64 for float64, float32 for all others."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dtype_code(tensor: torch.Tensor) -> int:
    """Return the C++ core's number for `tensor`'s dtype (``DType`` in csrc/kernels.h)."""
    return _DTYPE_CODES[tensor.dtype]


def pointer(tensor: torch.Tensor | None) -> int:
    """Return the address of `tensor`'s first element for the C++ core, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``like.new_empty(shape, dtype=dtype)``; PyTorch reads a shape in a third of the time as numbers."""
    dtype = dtype or like.dtype
    return like.new_empty(*shape, dtype=dtype) if shape else like.new_empty((), dtype=dtype)


def large(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor`, just allocated on the CPU and not yet written, on huge pages if it fills some.

    The kernel of the operating system clears fresh memory page by page when it is first touched: with pages of 4 KiB
    this takes longer than most of our kernels do.
    """
    if CORE is not None and tensor.nbytes >= _LARGE_BYTES:
        CORE.use_huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


_LARGE_BYTES = 4 << 20  # at least one whole page of 2 MiB wherever the tensor begins

_DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# Read once: the core fixes its instruction set at import, and a typo must not pass unnoticed.
if CORE is not None and os.environ.get("FASTVAE_CPU_ISA") not in (None, "", *CORE.isas()):
    raise ImportError(
        f"FASTVAE_CPU_ISA: expected one of {', '.join(CORE.isas())} (what this machine and build support), "
        f"got {os.environ['FASTVAE_CPU_ISA']!r}"
    )
