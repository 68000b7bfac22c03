"""How the kernels multiply matrices: one choice, for every ``tl.dot``.

float32 follows PyTorch's own switch: ``torch.set_float32_matmul_precision("highest")``, PyTorch's default, is
IEEE float32; "high" and "medium", or ``torch.backends.cuda.matmul.fp32_precision = "tf32"``, are TF32 on
tensor cores. 16-bit operands stay 16-bit: their products are exact in the float32 accumulator. Only under
Triton's interpreter are they upcast first, because it computes bfloat16 wrongly.
"""

import torch
from triton import knobs

UPCAST_OPERANDS = int(knobs.runtime.interpret)


def dot_precision() -> str:
    """Return the ``input_precision`` of ``tl.dot`` that matches PyTorch's setting for float32 products."""
    # The older torch.get_float32_matmul_precision raises once a program has used the newer setting.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
