// This instruction set's kernel table.
#include "kernels.h"

#define FASTVAE_STRING_(x) #x
#define FASTVAE_STRING(x) FASTVAE_STRING_(x)

namespace fastvae::FASTVAE_ISA {

void gaussian_forward(const Gaussian &, const GaussianOutputs &);
void gaussian_backward(const Gaussian &, const GaussianGradients &);
void cross_entropy_block(const CrossEntropyBlock &);
int64_t pack_words(const WordPacking &);
void lstm_forward(const LSTMForward &);
void lstm_backward(const LSTMBackward &);

extern const Kernels table;
const Kernels table = {
    FASTVAE_STRING(FASTVAE_ISA),
    gaussian_forward,
    gaussian_backward,
    cross_entropy_block,
    pack_words,
    lstm_forward,
    lstm_backward,
};

}  // namespace fastvae::FASTVAE_ISA
