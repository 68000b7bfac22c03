"""Drop-in `torch.nn` layers over the fused ops of `fastvae.functional`."""

from fastvae.nn.adversary import LatentAdversary, reverse_gradient
from fastvae.nn.export import DecoderStart, DecoderStep, ExportedDecoder, export_decoder, export_onnx
from fastvae.nn.gaussian import (
    BatchNormGaussianHead,
    FullGaussianHead,
    FullGaussianPosterior,
    GaussianHead,
    GaussianPosterior,
    WeightedSamples,
)
from fastvae.nn.gru import GRUDecoder, GRUDecoderModules, GRUEncoder
from fastvae.nn.lstm import DecoderModules, LSTMDecoder, LSTMEncoder
from fastvae.nn.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, OneHot
from fastvae.nn.sparse import LISTA, SparseAutoEncoder, SparseAutoEncoderOutput, SparseCoding
from fastvae.nn.transformer import TransformerDecoder, TransformerEncoder
from fastvae.nn.word_noise import noisy_words

__all__ = [
    "LISTA",
    "BatchNormGaussianHead",
    "ConvDecoder",
    "ConvEncoder",
    "DecoderModules",
    "DecoderStart",
    "DecoderStep",
    "ExportedDecoder",
    "FullGaussianHead",
    "FullGaussianPosterior",
    "GRUDecoder",
    "GRUDecoderModules",
    "GRUEncoder",
    "GaussianHead",
    "GaussianPosterior",
    "LSTMDecoder",
    "LSTMEncoder",
    "LatentAdversary",
    "MLPDecoder",
    "MLPEncoder",
    "OneHot",
    "SparseAutoEncoder",
    "SparseAutoEncoderOutput",
    "SparseCoding",
    "TransformerDecoder",
    "TransformerEncoder",
    "WeightedSamples",
    "export_decoder",
    "export_onnx",
    "noisy_words",
    "reverse_gradient",
]
