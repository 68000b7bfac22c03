"""Drop-in `torch.nn` layers over the fused ops of `fastvae.functional`."""

from fastvae.nn.gaussian import GaussianHead, GaussianPosterior
from fastvae.nn.lstm import DecoderModules, LSTMDecoder, LSTMEncoder

__all__ = ["DecoderModules", "GaussianHead", "GaussianPosterior", "LSTMDecoder", "LSTMEncoder"]
