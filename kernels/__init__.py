"""Triton kernels, one file per op family: launch functions on contiguous, validated operands.

Importing a family imports Triton; importing this package does not. With ``TRITON_INTERPRET=1`` set before
Triton is first imported, every kernel runs on the CPU.
"""
