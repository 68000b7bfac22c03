"""Complete models, one file each."""

from fastvae.models.autoencoder import (
    AutoEncoderOutput,
    DenoisingAutoEncoder,
    LinearAutoEncoder,
    SparseAutoEncoder,
    SparseAutoEncoderOutput,
)
from fastvae.models.controlled_vae import ControlledTextVAE, DiscriminatorOutput, SleepOutput
from fastvae.models.dialogue import DialogueModel, DialogueOutput
from fastvae.models.mixture_vae import MixturePosterior, MixtureVAE, MixtureVAEOutput
from fastvae.models.pretrained import Pretrained
from fastvae.models.sentence_vae import SentenceVAE, SentenceVAEOutput
from fastvae.models.text_classifier import TextClassifier
from fastvae.models.vae import IWAE, VAE, VAEOutput

__all__ = [
    "IWAE",
    "VAE",
    "AutoEncoderOutput",
    "ControlledTextVAE",
    "DenoisingAutoEncoder",
    "DialogueModel",
    "DialogueOutput",
    "DiscriminatorOutput",
    "LinearAutoEncoder",
    "MixturePosterior",
    "MixtureVAE",
    "MixtureVAEOutput",
    "Pretrained",
    "SentenceVAE",
    "SentenceVAEOutput",
    "SleepOutput",
    "SparseAutoEncoder",
    "SparseAutoEncoderOutput",
    "TextClassifier",
    "VAEOutput",
]
