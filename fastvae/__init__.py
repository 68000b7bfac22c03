"""Fused kernels, drop-in layers and complete models for auto-encoding in PyTorch."""

from importlib.metadata import version as _version

from fastvae import functional

__all__ = ["functional"]
__version__ = _version("fastvae")
