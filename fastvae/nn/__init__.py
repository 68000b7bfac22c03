"""Drop-in `torch.nn` layers over the fused ops of `fastvae.functional`."""

from fastvae.nn.export import DecoderStart, DecoderStep, ExportedDecoder, export_decoder, export_onnx
from fastvae.nn.gaussian import GaussianHead, GaussianPosterior
from fastvae.nn.gru import GRUDecoder, GRUDecoderModules, GRUEncoder
from fastvae.nn.lstm import DecoderModules, LSTMDecoder, LSTMEncoder
from fastvae.nn.sparse import LISTA, SparseAutoEncoder, SparseAutoEncoderOutput, SparseCoding

__all__ = [
    "LISTA",
    "DecoderModules",
    "DecoderStart",
    "DecoderStep",
    "ExportedDecoder",
    "GRUDecoder",
    "GRUDecoderModules",
    "GRUEncoder",
    "GaussianHead",
    "GaussianPosterior",
    "LSTMDecoder",
    "LSTMEncoder",
    "SparseAutoEncoder",
    "SparseAutoEncoderOutput",
    "SparseCoding",
    "export_decoder",
    "export_onnx",
]
