"""Complete models, one file each."""

from fastvae.models.autoencoder import (
    AutoEncoderOutput,
    DenoisingAutoEncoder,
    LinearAutoEncoder,
    SparseAutoEncoder,
    SparseAutoEncoderOutput,
)
from fastvae.models.dialogue import DialogueModel, DialogueOutput
from fastvae.models.mixture_vae import MixturePosterior, MixtureVAE, MixtureVAEOutput
from fastvae.models.pretrained import Pretrained
from fastvae.models.sentence_vae import SentenceVAE, SentenceVAEOutput
from fastvae.models.vae import IWAE, VAE, VAEOutput

__all__ = [
    "IWAE",
    "VAE",
    "AutoEncoderOutput",
    "DenoisingAutoEncoder",
    "DialogueModel",
    "DialogueOutput",
    "LinearAutoEncoder",
    "MixturePosterior",
    "MixtureVAE",
    "MixtureVAEOutput",
    "Pretrained",
    "SentenceVAE",
    "SentenceVAEOutput",
    "SparseAutoEncoder",
    "SparseAutoEncoderOutput",
    "VAEOutput",
]
