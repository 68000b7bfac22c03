// This instruction set's kernel table.
#include "kernels.h"

#define FASTVAE_STRING_(x) #x
#define FASTVAE_STRING(x) FASTVAE_STRING_(x)

namespace fastvae::FASTVAE_ISA {

void gaussian_forward(const Gaussian &, const GaussianOutputs &);
void gaussian_backward(const Gaussian &, const GaussianGradients &);
bool likelihood_forward(const Likelihood &, void *nll);
void likelihood_backward(const Likelihood &, const LikelihoodGradients &);
void mixture_forward(const Mixture &);
void mixture_backward(const Mixture &);
int64_t mixture_workspace(const Mixture &, bool backward);
void full_gaussian_forward(const FullGaussian &, const GaussianOutputs &);
void full_gaussian_backward(const FullGaussian &, const FullGaussianGradients &);
void log_ratio_forward(const LogRatio &, const LogRatioOutputs &);
void log_ratio_backward(const LogRatio &, const LogRatioGradients &);
void importance_bound_forward(const ImportanceBound &, void *bound);
void importance_bound_backward(const ImportanceBound &, const void *grad_bound, void *grad);
void categorical_forward(const Categorical &, const CategoricalOutputs &);
void categorical_backward(const Categorical &, const CategoricalGradients &);
int64_t categorical_workspace(DType dtype, int64_t classes);
void corrupt(const Corruption &);
void mixture_prior_forward(const MixturePrior &, const MixturePriorTerms &);
void mixture_prior_backward(const MixturePrior &, const MixturePriorGradients &);
int64_t cross_entropy(const CrossEntropy &);
int64_t cross_entropy_workspace(const CrossEntropy &);
int64_t pack_words(const WordPacking &);
void lstm_forward(const LSTMForward &);
void lstm_backward(const LSTMBackward &);
void gru_forward(const GRUForward &);
void gru_backward(const GRUBackward &);
void layer_norm_lstm_forward(const LayerNormLSTMForward &);
void layer_norm_lstm_backward(const LayerNormLSTMBackward &);
void sparse_encode(const SparseEncode &);
void sparse_solve_support(const SparseSupport &);
int64_t sparse_workspace(bool is_double, int64_t atoms, int64_t capacity);
void ista(const Ista &);
IstaSizes ista_sizes(const Ista &);
void dictionary_sweep(const DictionarySweep &);
int64_t generation_bytes(const Generation &);
void generation_advance(Generation &, int64_t steps);
void multiply_rows(const RowsProduct &);

extern const Kernels table;
const Kernels table = {
    FASTVAE_STRING(FASTVAE_ISA),
    gaussian_forward,
    gaussian_backward,
    full_gaussian_forward,
    full_gaussian_backward,
    log_ratio_forward,
    log_ratio_backward,
    importance_bound_forward,
    importance_bound_backward,
    likelihood_forward,
    likelihood_backward,
    categorical_forward,
    categorical_backward,
    categorical_workspace,
    corrupt,
    mixture_forward,
    mixture_backward,
    mixture_workspace,
    mixture_prior_forward,
    mixture_prior_backward,
    cross_entropy,
    cross_entropy_workspace,
    pack_words,
    lstm_forward,
    lstm_backward,
    gru_forward,
    gru_backward,
    layer_norm_lstm_forward,
    layer_norm_lstm_backward,
    sparse_encode,
    sparse_solve_support,
    sparse_workspace,
    ista,
    ista_sizes,
    dictionary_sweep,
    generation_bytes,
    generation_advance,
    multiply_rows,
};

}  // namespace fastvae::FASTVAE_ISA
