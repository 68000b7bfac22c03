"""Complete models, one file each."""

from fastvae.models.sentence_vae import SentenceVAE, SentenceVAEOutput

__all__ = ["SentenceVAE", "SentenceVAEOutput"]
