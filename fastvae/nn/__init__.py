"""Drop-in `torch.nn` layers over the fused ops of `fastvae.functional`."""

from fastvae.nn.export import DecoderStart, DecoderStep, ExportedDecoder, export_decoder, export_onnx
from fastvae.nn.gaussian import (
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

__all__ = [
    "LISTA",
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
]
