// The table of CPU kernels. Every instruction set fills one; dispatch.cpp chooses which is used.
#pragma once

#include <cstdint>

namespace fastvae {

// Storage types, numbered as in fastvae/ops/backend.py. Arithmetic is float, or double for kFloat64.
enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Gaussian sampling + KL. mean, log_var, their gradients: (rows, latent) of `dtype`, the rows of the first two `stride`
// apart, those of the gradients grad_stride; z and grad_z: (samples, rows, latent) of `dtype`; kl and grad_kl: (rows)
// or, without sum_latent, (rows, latent) of the compute type. The prior is of the compute type with prior_rows rows:
// 0 (standard normal), 1 (shared) or `rows`. Null grad_z or grad_kl mean zero.
struct Gaussian {
  DType dtype;
  const void *mean, *log_var;
  int64_t stride;
  const void *prior_mean, *prior_log_var;
  int64_t prior_rows;
  const int64_t *seed;
  int64_t samples, rows, latent;
  bool sum_latent;
};
struct GaussianOutputs {
  void *z, *kl;
};
struct GaussianGradients {
  const void *grad_z, *grad_kl;
  void *grad_mean, *grad_log_var;
  int64_t grad_stride;
  void *grad_prior;  // (2, partials, latent), zeroed: partials is the number of threads for a shared prior, else rows
  int64_t partials;
};

// Negative log-likelihoods summed over the features of a row. The prediction (logits or means) is (samples, targets,
// features), the target (targets, features); nll and its gradient are (samples, targets) of the compute type.
enum Density : int { kBernoulli = 0, kGaussianNumber = 1, kGaussianRow = 2, kGaussianFull = 3 };  // by their log_var
constexpr int64_t kLikelihoodBlock = 1024;
struct Likelihood {
  Density density;
  DType dtype, target_dtype;  // target_dtype: the same or the compute type
  const void *prediction, *target;
  const void *log_var;  // one number or (features) of the compute type, or as the prediction
  int64_t samples, targets, features;
  void *memory;  // scratch of max(features, kLikelihoodBlock) numbers of the compute type, for a shared log_var
};
struct LikelihoodGradients {
  const void *grad_nll;
  void *grad_prediction, *grad_target, *grad_log_var;  // each as what it belongs to, or null
  // Scratch for the gradient of a shared log_var, null without: a double for each row of the prediction for a number,
  // (partials, features) of the compute type for a row; its bits depend on `partials`, not on the threads.
  void *partial;
  int64_t partials;
};

// The same with a full covariance; its gradients and KL have no null inputs but grad_z and grad_kl, which mean zero.
struct FullGaussian {
  DType dtype;
  const void *mean, *log_diagonal, *lower;  // (rows, latent) twice, (rows, latent (latent - 1) / 2); latent <= 1024
  const int64_t *seed;
  int64_t samples, rows, latent;
};
struct FullGaussianGradients {
  const void *grad_z, *grad_kl;
  void *grad_mean, *grad_log_diagonal, *grad_lower;
};

// Gaussian samples with log N(z; 0, I) - log q(z), and the importance-weighted bound. z and grad_z: (samples, rows,
// latent) of `dtype`; log_ratio and its gradient: (samples, rows) of the compute type. A null gradient means zero.
struct LogRatio {
  DType dtype;
  const void *mean, *log_var;  // (rows, latent)
  const int64_t *seed;
  int64_t samples, rows, latent;
};
struct LogRatioOutputs {
  void *z, *log_ratio;
};
struct LogRatioGradients {
  const void *grad_z, *grad_log_ratio;
  void *grad_mean, *grad_log_var;
};
struct ImportanceBound {
  DType dtype;
  const void *log_likelihood, *log_ratio;  // (samples, rows)
  int64_t samples, rows;
};

// Gumbel-softmax sampling + KL. logits and their gradient: (rows, classes) of `dtype`; sample and grad_sample:
// (samples, rows, classes) of `dtype`; kl and grad_kl: (rows) of the compute type. log_prior is normalized, of the
// compute type, with prior_rows rows: 0 (uniform), 1 (shared) or `rows`. Null grad_sample or grad_kl mean zero.
struct Categorical {
  DType dtype;
  const void *logits, *log_prior;
  int64_t prior_rows;
  const int64_t *seed;
  double slope;  // 1 / temperature
  bool hard;
  int64_t samples, rows, classes;
  void *memory;  // `workspaces` times what categorical_workspace says, one for each thread
  int64_t workspaces;
};
struct CategoricalOutputs {
  void *sample, *kl;
};
struct CategoricalGradients {
  const void *grad_sample, *grad_kl;
  const void *sample;  // the soft one, or null to make it again
  void *grad_logits;
  void *grad_prior;  // (workspaces, classes) for a shared prior, zeroed, else (rows, classes); zero without grad_kl
};

// out[r][c] = x[r * stride + c], which is element `first` + r * stride + c of the noise, corrupted; out may be x if it
// is dense.
enum Noise : int { kGaussianNoise = 0, kMasking = 1, kSaltAndPepper = 2 };
struct Corruption {
  DType dtype;
  Noise noise;
  double level, low, high;
  const int64_t *seed;
  const void *x;
  int64_t rows, columns, stride, first;
  void *out;  // (rows, columns)
};

// Log-density of points under a uniform mixture of diagonal Gaussians, all of float or double.
struct Mixture {
  bool is_double;
  const void *z, *mean, *log_var;  // (rows, latent), (components, latent), (components, latent)
  int64_t rows, components, latent;
  void *log_density;                        // (rows): written forward, read backward
  const void *grad;                         // (rows), of log_density
  void *grad_z, *grad_mean, *grad_log_var;  // as z, mean, log_var
  int64_t threads;                          // at most
  void *memory;                             // scratch of mixture_workspace bytes, on a cache line
};

// Linear layer and cross-entropy. A row's loss is the sum over its `words` targets, those equal to ignore_index left
// out; a row without any gives zeros. losses, lse, scale and the gradients are of the compute type.
struct CrossEntropy {
  DType dtype;  // of hidden (rows, hidden_size), weight (vocabulary, hidden_size) and bias (vocabulary) or null
  const void *hidden, *weight, *bias;
  const int64_t *target;  // (rows, words)
  int64_t rows, hidden_size, vocabulary, words, ignore_index;
  double label_smoothing;
  const void *scale;   // (rows), what each row's loss counts in the gradients, or null for ones
  void *losses, *lse;  // (rows); with `known_lse`, lse is read and the losses are left alone
  bool known_lse;
  void *grad_hidden, *grad_weight, *grad_bias;  // or null
  int64_t block_rows;                           // the most rows to be in work at once
  int64_t workspaces;                           // the most threads
  void *memory;                                 // scratch of cross_entropy_workspace bytes
};

// Packed sequences: rank r is the r-th longest sequence, order[r]. Step t holds the first active[t] ranks, in rows
// start[t] on; `total` is the number of rows, the sum of the lengths. Each sequence may be run with several samples of
// what differs between them (latent, states): sample s of sequence b is number s * batch + b, and its tensors are
// (samples * batch, ...); rows of samples are `samples` times as many, those of one token side by side.
struct PackedPlan {
  int64_t batch, samples, time, hidden;
  const int64_t *lengths;         // (batch), by sequence
  const int64_t *order;           // (batch)
  const int64_t *active, *start;  // (time)
};
struct LSTMForward {
  bool is_double, keep;  // keep: gates and cells, for backward
  PackedPlan plan;
  const void *inputs;        // (total, 4 hidden): the input's share of the gates
  const void *static_gates;  // (samples * batch, 4 hidden), by sequence
  const void *h0, *c0;       // (samples * batch, hidden), by sequence
  const void *weight_hh;     // (4 hidden, hidden)
  void *gates;      // (samples * total, 4 hidden), activated i, f, g, o, may be `inputs`; or null: keep nothing
  void *cells;      // (samples * total, hidden); scratch (samples * batch, hidden) without gates
  void *hidden;     // (samples * batch, time, hidden), zero in the padding
  void *h_n, *c_n;  // (samples * batch, hidden), by sequence
  void *states, *sorted_h0;  // scratch, (samples * total, hidden) and (samples * batch, hidden)
  void *packed_weight;       // scratch, (hidden, 4, hidden rounded up to a multiple of 16)
};
struct LSTMBackward {
  bool is_double;
  PackedPlan plan;
  const void *grad_states;          // (samples * total, hidden)
  const void *grad_h_n, *grad_c_n;  // (samples * batch, hidden), by sequence
  const void *gates, *cells, *c0, *weight_hh;
  void *grad_gates;         // (samples * total, 4 hidden), before the activations
  void *grad_static_gates;  // (samples * batch, 4 hidden), by sequence
  void *grad_h0, *grad_c0;  // (samples * batch, hidden), by sequence
  void *packed_weight;      // scratch, (4 hidden, hidden rounded up to a multiple of 32)
};

// Rows of gates are m, r, z, n; "by sequence" counts samples * batch sequences.
struct GRUForward {
  bool is_double;
  PackedPlan plan;
  const void *inputs;  // (total, 3 hidden), the input's share of r, z, n; rows input_stride apart
  int64_t input_stride;
  const void *static_gates;  // (samples * batch, 4 hidden), by sequence
  const void *h0;            // (samples * batch, hidden), by sequence
  const void *weight_hh;     // (3 hidden, hidden)
  void *gates;               // (total * samples, 4 hidden), or null; `inputs` may be its last three of one sample
  void *hidden;              // (samples * batch, time, hidden), zero in the padding
  void *h_n;                 // (samples * batch, hidden), by sequence
  void *states;              // scratch, (2, samples * batch, hidden)
  void *packed_weight;       // scratch, (hidden, 3, hidden rounded up to a multiple of 16)
};
struct GRUBackward {
  bool is_double;
  PackedPlan plan;
  const void *grad_hidden, *grad_h_n;  // as hidden and h_n, or null for zeros
  const void *gates, *hidden, *h0, *weight_hh;
  void *grad_gates;         // (total * samples, 4 hidden), before the activations
  void *grad_static_gates;  // (samples * batch, 4 hidden), by sequence
  void *grad_h0;            // (samples * batch, hidden), by sequence
  void *before;             // (total * samples, hidden), the state before each row
  void *packed_weight;      // scratch, (3 hidden, hidden rounded up to a multiple of 32)
};

// "By sequence" counts samples * batch sequences. norm_gates: gain of the input's share, gain of the recurrence's, bias
// (3, 4 hidden); norm_cell: gain and bias (2, hidden). Without `keep`, normalized, inverses and cells are scratch with
// a row for each sequence.
struct LayerNormLSTMForward {
  bool is_double, keep;
  PackedPlan plan;
  double epsilon;
  const void *inputs;         // (total, 4 hidden), the tokens' share before it is normalized
  const void *static_inputs;  // (samples * batch, 4 hidden), by sequence: added to it
  const void *h0, *c0;        // (samples * batch, hidden), by sequence
  const void *weight_hh, *norm_gates, *norm_cell;
  void *normalized;     // (samples * total, 2, 4 hidden): the recurrence's share, the input's
  void *inverses;       // (samples * total, 2): of their standard deviations
  void *cells;          // (samples * total, hidden)
  void *hidden;         // (samples * batch, time, hidden), zero in the padding
  void *h_n, *c_n;      // (samples * batch, hidden), by sequence
  void *states;         // scratch, (2, samples * batch, hidden)
  void *packed_weight;  // scratch, (hidden, 4 hidden rounded up to a multiple of 32)
};
struct LayerNormLSTMBackward {
  bool is_double;
  PackedPlan plan;
  double epsilon;
  const void *grad_hidden, *grad_h_n, *grad_c_n;  // as hidden, h_n, c_n
  const void *normalized, *inverses, *cells, *hidden, *h0, *c0;
  const void *weight_hh, *norm_gates, *norm_cell;
  void *grad_products, *grad_inputs;  // (samples * total, 4 hidden), before they are normalized
  void *grad_static_inputs;           // (samples * batch, 4 hidden), by sequence
  void *grad_h0, *grad_c0;            // (samples * batch, hidden), by sequence
  void *before;                       // (samples * total, hidden), the state before each row
  void *grad_norms;                   // (partials, 3 * 4 hidden + 2 * hidden), zeroed: norm_gates, norm_cell
  int64_t partials;                   // at most so many threads
  void *states;                       // scratch, (samples * batch, hidden)
  void *packed_weight;                // scratch, (4 hidden, hidden rounded up to a multiple of 32)
};

// Makes the plan of a batch and its words after word dropout. Returns `total`, or kBadLength - sequence or
// kBadToken - element for what is out of range.
constexpr int64_t kBadLength = -1, kBadToken = INT64_MIN / 2;
struct WordPacking {
  const int64_t *tokens, *lengths;  // (batch, time), (batch)
  int64_t batch, time, vocabulary;
  const int64_t *seed;
  float word_dropout;
  int64_t unk_index;
  int64_t *order, *active, *start;
  int64_t *words, *rows;  // (batch * time), the first `total` used: word, and element of tokens it comes from
};

// The lasso for each of a block of samples, by coordinate descent on a working set. products = x A' and codes are
// (samples, atoms), gram = A A'.
struct SparseEncode {
  bool is_double;
  const void *gram, *products, *squared;  // squared: |x|^2, (samples)
  const void *l1, *weights, *init;  // (samples); (atoms, then ones up to a multiple of 16) or null; (samples, atoms)
  double l2, tol;                   // tol: of the duality gap, relative to |x|^2
  bool positive;
  int64_t samples, atoms, max_iter;
  int64_t capacity;  // of the working set
  void *codes, *gap;
  int64_t *iterations;
  int8_t *status;
  void *memory;  // `workspaces` times what sparse_workspace says, one for each thread
  int64_t workspaces;
};
// For each sample the solution v of (G_SS + l2 I) v_S = grad_S on the support S of its codes, zero elsewhere.
struct SparseSupport {
  bool is_double;
  const void *gram, *codes, *grad;
  double l2;
  int64_t samples, atoms, capacity;  // capacity: the largest support
  void *solution, *memory;
  int64_t workspaces;
};
// ISTA, or FISTA with momentum. Gram form: matrix = A A' (atoms, atoms), target = x A'; else A (atoms, features) and x.
struct Ista {
  bool is_double, use_gram, momentum;
  const void *matrix, *target, *l1, *init;
  double step;
  int64_t samples, atoms, features, max_iter;
  void *codes;
  void *packed, *memory;  // scratch: IstaSizes::packed numbers, and `workspaces` times IstaSizes::memory
  int64_t workspaces;
};
struct IstaSizes {
  int64_t packed, memory;
};

// Updates a block of atoms, one after the other, in place.
struct DictionarySweep {
  bool is_double, sphere, positive;
  void *atoms, *gradient;  // (atom_count, features); the gradient is B - A D of these rows, and is spent
  const void *gram;        // (atom_count, atom_count) with rows gram_stride apart
  const bool *used;        // (atom_count)
  int64_t atom_count, features, gram_stride;
};

// Sentences from an LSTM decoder, some steps a call. Weights and states are of the compute type, in the layouts of
// torch.nn.LSTM; a row is a sentence or one of its `beams` beginnings. `tokens`, `lengths` and `scores` come filled
// with padding and zeros.
enum Strategy : int { kGreedy = 0, kSample = 1, kBeam = 2 };
struct Generation {
  bool is_double;
  int64_t batch, embed, hidden, layers, vocabulary;
  int64_t input_stride;                     // of weight_input
  const void *embedding, *weight_input;     // (vocabulary, embed), (4 hidden, embed)
  const void *weight_hh, *weight_ih;        // (layers, 4 hidden, hidden), (layers - 1, 4 hidden, hidden)
  const void *bias, *static_gates;          // (layers - 1, 4 hidden), (batch, 4 hidden)
  const void *h0, *c0;                      // (layers, batch, hidden)
  const void *output_weight, *output_bias;  // (vocabulary, hidden), (vocabulary)
  const int64_t *prefix;                    // (batch, prefix_length), -1 where the choice is free
  int64_t prefix_length;
  const int64_t *seeds;  // (batch)
  int64_t bos, eos, padding, max_length;
  Strategy strategy;
  bool log_probs;  // wanted; always with kBeam
  double temperature, top_p, length_penalty;
  int64_t top_k, beams, n_best, no_repeat_ngram;
  int64_t *tokens, *lengths;  // (batch, n_best, max_length), (batch, n_best)
  void *scores;               // as tokens, of the compute type
  int64_t threads;            // at most
  void *memory;               // generation_bytes of it, kept between calls

  // Kept between calls. The states of layer l lie on `side`, its cells on `cell_side`, of two.
  int64_t step, active, side, cell_side, fresh, table_used, used_threads;
  bool started, moved, only_forced;

  bool stores_logits() const { return strategy != kGreedy || no_repeat_ngram > 0 || (prefix_length > 0 && log_probs); }
  bool sums_mass() const { return strategy == kSample && top_k == 0; }
};
// out = x weight' + bias.
struct RowsProduct {
  bool is_double;
  int64_t rows, inner, columns;
  const void *x, *weight, *bias;  // (rows, inner), (columns, inner), (columns)
  void *out, *memory;             // (rows, columns); `threads` times (inner, 64)
  int64_t threads;
};

// A mixture prior of `components` for each of `variables` latent variables. mean and log_var: (batch, variables,
// latent) of float, or double; logits: (batch, variables, components); component_mean, component_log_var: (variables,
// components, latent). With `categorical`, mean and component_log_var hold logits of `latent` classes, and log_var and
// component_mean are null. Gradients are as what they belong to.
struct MixturePrior {
  bool is_double, categorical;
  const void *mean, *log_var, *logits, *component_mean, *component_log_var;
  int64_t batch, variables, components, latent;
  void *memory;     // scratch: mixture_prior_workspace numbers for each of
  int64_t threads;  // at most
};
inline int64_t mixture_prior_workspace(int64_t components, int64_t latent) {
  return 3 * (32 * (components + latent) + components * latent) + 16;
}
struct MixturePriorTerms {
  void *kl, *dispersion;                    // (batch)
  void *aggregate_kl, *mutual_information;  // (variables)
  void *aggregate;                          // (variables, components): the mean of q(c|x)
  void *parts;                              // scratch, (2, variables, batch)
};
struct MixturePriorGradients {
  const void *grad_kl, *grad_dispersion, *grad_aggregate_kl, *grad_mutual_information, *aggregate;
  void *grad_mean, *grad_log_var, *grad_logits, *grad_component_mean, *grad_component_log_var;
};

struct Kernels {
  const char *isa;
  void (*gaussian_forward)(const Gaussian &, const GaussianOutputs &);
  void (*gaussian_backward)(const Gaussian &, const GaussianGradients &);
  void (*full_gaussian_forward)(const FullGaussian &, const GaussianOutputs &);
  void (*full_gaussian_backward)(const FullGaussian &, const FullGaussianGradients &);
  void (*log_ratio_forward)(const LogRatio &, const LogRatioOutputs &);
  void (*log_ratio_backward)(const LogRatio &, const LogRatioGradients &);
  void (*importance_bound_forward)(const ImportanceBound &, void *bound);  // (rows) of the compute type
  void (*importance_bound_backward)(const ImportanceBound &, const void *grad_bound, void *grad);  // like one input
  bool (*likelihood_forward)(const Likelihood &, void *nll);  // whether all targets are possible
  void (*likelihood_backward)(const Likelihood &, const LikelihoodGradients &);
  void (*categorical_forward)(const Categorical &, const CategoricalOutputs &);
  void (*categorical_backward)(const Categorical &, const CategoricalGradients &);
  int64_t (*categorical_workspace)(DType dtype, int64_t classes);  // bytes
  void (*corrupt)(const Corruption &);
  void (*mixture_forward)(const Mixture &);
  void (*mixture_backward)(const Mixture &);
  int64_t (*mixture_workspace)(const Mixture &, bool backward);  // bytes
  void (*mixture_prior_forward)(const MixturePrior &, const MixturePriorTerms &);
  void (*mixture_prior_backward)(const MixturePrior &, const MixturePriorGradients &);
  int64_t (*cross_entropy)(const CrossEntropy &);  // rows that have a target, or -1 - element of one out of range
  int64_t (*cross_entropy_workspace)(const CrossEntropy &);  // bytes
  int64_t (*pack_words)(const WordPacking &);
  void (*lstm_forward)(const LSTMForward &);
  void (*lstm_backward)(const LSTMBackward &);
  void (*gru_forward)(const GRUForward &);
  void (*gru_backward)(const GRUBackward &);
  void (*layer_norm_lstm_forward)(const LayerNormLSTMForward &);
  void (*layer_norm_lstm_backward)(const LayerNormLSTMBackward &);
  void (*sparse_encode)(const SparseEncode &);
  void (*sparse_solve_support)(const SparseSupport &);
  int64_t (*sparse_workspace)(bool is_double, int64_t atoms, int64_t capacity);  // bytes
  void (*ista)(const Ista &);
  IstaSizes (*ista_sizes)(const Ista &);
  void (*dictionary_sweep)(const DictionarySweep &);
  int64_t (*generation_bytes)(const Generation &);
  void (*generation_advance)(Generation &, int64_t steps);
  void (*multiply_rows)(const RowsProduct &);
};

const Kernels &kernels();             // the chosen table
const char *const *supported_isas();  // null-terminated, best last

}  // namespace fastvae
