"""The public functions, gathered from :mod:`fastvae.ops`."""

from fastvae.ops.cross_entropy import linear_cross_entropy
from fastvae.ops.gaussian import gaussian_kl, gaussian_sample_kl
from fastvae.ops.lstm import lstm_decode

__all__ = ["gaussian_kl", "gaussian_sample_kl", "linear_cross_entropy", "lstm_decode"]
