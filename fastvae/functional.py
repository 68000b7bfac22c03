"""The public functions, gathered from :mod:`fastvae.ops`."""

from fastvae.ops.categorical import categorical_kl, gumbel_softmax_sample_kl
from fastvae.ops.corruption import corrupt, corrupted_linear
from fastvae.ops.cross_entropy import bag_of_words_loss, linear_cross_entropy
from fastvae.ops.dictionary import dictionary_update
from fastvae.ops.full_gaussian import full_gaussian_sample_kl, scale_tril
from fastvae.ops.gaussian import gaussian_kl, gaussian_sample_kl
from fastvae.ops.gaussian_head import gaussian_head
from fastvae.ops.gru import gru, gru_decode
from fastvae.ops.importance import gaussian_sample_log_ratio, importance_weighted_bound
from fastvae.ops.layer_norm_lstm import layer_norm_lstm, layer_norm_lstm_decode
from fastvae.ops.likelihood import bernoulli_nll, gaussian_nll
from fastvae.ops.lstm import lstm, lstm_decode
from fastvae.ops.mixture import categorical_mixture_kl, mixture_kl
from fastvae.ops.posterior import mixture_log_density, mutual_information
from fastvae.ops.sparse import (
    duality_gap,
    fista,
    ista,
    ista_step,
    kkt_violation,
    lambda_max,
    soft_threshold,
    sparse_encode,
    sparse_value,
)
from fastvae.ops.top_k import top_k_decode, top_k_encode

__all__ = [
    "bag_of_words_loss",
    "bernoulli_nll",
    "categorical_kl",
    "categorical_mixture_kl",
    "corrupt",
    "corrupted_linear",
    "dictionary_update",
    "duality_gap",
    "fista",
    "full_gaussian_sample_kl",
    "gaussian_head",
    "gaussian_kl",
    "gaussian_nll",
    "gaussian_sample_kl",
    "gaussian_sample_log_ratio",
    "gru",
    "gru_decode",
    "gumbel_softmax_sample_kl",
    "importance_weighted_bound",
    "ista",
    "ista_step",
    "kkt_violation",
    "lambda_max",
    "layer_norm_lstm",
    "layer_norm_lstm_decode",
    "linear_cross_entropy",
    "lstm",
    "lstm_decode",
    "mixture_kl",
    "mixture_log_density",
    "mutual_information",
    "scale_tril",
    "soft_threshold",
    "sparse_encode",
    "sparse_value",
    "top_k_decode",
    "top_k_encode",
]
