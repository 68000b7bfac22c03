// fastvae._C: the kernels for Python. Tensors come as addresses, already checked, contiguous and of one dtype; see
// fastvae/ops for the only callers.
#include <pybind11/pybind11.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "kernels.h"

namespace py = pybind11;
using namespace fastvae;

namespace {

using Address = uintptr_t;

void *at(Address address) { return reinterpret_cast<void *>(address); }
int64_t *integers(Address address) { return reinterpret_cast<int64_t *>(address); }

Gaussian gaussian(int dtype, Address mean, Address log_var, int64_t stride, Address prior_mean, Address prior_log_var,
                  int64_t prior_rows, Address seed, int64_t samples, int64_t rows, int64_t latent, bool sum_latent) {
  return {static_cast<DType>(dtype),
          at(mean),
          at(log_var),
          stride,
          at(prior_mean),
          at(prior_log_var),
          prior_rows,
          integers(seed),
          samples,
          rows,
          latent,
          sum_latent};
}

Categorical categorical(int dtype, Address logits, Address log_prior, int64_t prior_rows, Address seed, double slope,
                        bool hard, int64_t samples, int64_t rows, int64_t classes, Address memory, int64_t workspaces) {
  return {static_cast<DType>(dtype),
          at(logits),
          at(log_prior),
          prior_rows,
          integers(seed),
          slope,
          hard,
          samples,
          rows,
          classes,
          at(memory),
          workspaces};
}

PackedPlan plan(int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths, Address order,
                Address active, Address start) {
  return {batch, samples, time, hidden, integers(lengths), integers(order), integers(active), integers(start)};
}

// Asks for 2 MiB pages where [address, address + bytes) covers them whole. A hint: failure changes nothing.
void use_huge_pages(Address address, size_t bytes) {
#ifdef __linux__
  constexpr Address kPage = 2 << 20;
  const Address first = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  if (first < end) madvise(at(first), end - first, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fastvae";
  const auto release = py::call_guard<py::gil_scoped_release>();
  kernels();  // chosen now, while FASTVAE_CPU_ISA is what fastvae/ops/backend.py checks

  m.def("isa", [] { return kernels().isa; });
  m.def("isas", [] {
    py::list names;
    for (const char *const *name = supported_isas(); *name; ++name) names.append(*name);
    return names;
  });

  m.def("use_huge_pages", &use_huge_pages);

  m.def(
      "gaussian_forward",
      [](int dtype, Address mean, Address log_var, int64_t stride, Address prior_mean, Address prior_log_var,
         int64_t prior_rows, Address seed, Address z, Address kl, int64_t samples, int64_t rows, int64_t latent,
         bool sum_latent) {
        kernels().gaussian_forward(gaussian(dtype, mean, log_var, stride, prior_mean, prior_log_var, prior_rows, seed,
                                            samples, rows, latent, sum_latent),
                                   {at(z), at(kl)});
      },
      release);
  m.def(
      "gaussian_backward",
      [](int dtype, Address grad_z, Address grad_kl, Address mean, Address log_var, int64_t stride, Address prior_mean,
         Address prior_log_var, int64_t prior_rows, Address seed, Address grad_mean, Address grad_log_var,
         int64_t grad_stride, Address grad_prior, int64_t partials, int64_t samples, int64_t rows, int64_t latent,
         bool sum_latent) {
        kernels().gaussian_backward(
            gaussian(dtype, mean, log_var, stride, prior_mean, prior_log_var, prior_rows, seed, samples, rows, latent,
                     sum_latent),
            {at(grad_z), at(grad_kl), at(grad_mean), at(grad_log_var), grad_stride, at(grad_prior), partials});
      },
      release);

  m.def("mixture_workspace",
        [](bool backward, bool is_double, int64_t rows, int64_t components, int64_t latent, int64_t threads) {
          Mixture p{};
          p.is_double = is_double, p.rows = rows, p.components = components, p.latent = latent, p.threads = threads;
          return kernels().mixture_workspace(p, backward);
        });
  m.def(
      "mixture_forward",
      [](bool is_double, Address z, Address mean, Address log_var, int64_t rows, int64_t components, int64_t latent,
         Address log_density, int64_t threads, Address memory) {
        kernels().mixture_forward({is_double, at(z), at(mean), at(log_var), rows, components, latent, at(log_density),
                                   nullptr, nullptr, nullptr, nullptr, threads, at(memory)});
      },
      release);
  m.def(
      "mixture_backward",
      [](bool is_double, Address z, Address mean, Address log_var, int64_t rows, int64_t components, int64_t latent,
         Address log_density, Address grad, Address grad_z, Address grad_mean, Address grad_log_var, int64_t threads,
         Address memory) {
        kernels().mixture_backward({is_double, at(z), at(mean), at(log_var), rows, components, latent, at(log_density),
                                    at(grad), at(grad_z), at(grad_mean), at(grad_log_var), threads, at(memory)});
      },
      release);

  m.attr("LIKELIHOOD_BLOCK") = kLikelihoodBlock;
  m.def(
      "likelihood_forward",
      [](int density, int dtype, int target_dtype, Address prediction, Address target, Address log_var, int64_t samples,
         int64_t targets, int64_t features, Address memory, Address nll) {
        return kernels().likelihood_forward(
            {static_cast<Density>(density), static_cast<DType>(dtype), static_cast<DType>(target_dtype), at(prediction),
             at(target), at(log_var), samples, targets, features, at(memory)},
            at(nll));
      },
      release);
  m.def(
      "likelihood_backward",
      [](int density, int dtype, int target_dtype, Address prediction, Address target, Address log_var, int64_t samples,
         int64_t targets, int64_t features, Address memory, Address grad_nll, Address grad_prediction,
         Address grad_target, Address grad_log_var, Address partial, int64_t partials) {
        kernels().likelihood_backward(
            {static_cast<Density>(density), static_cast<DType>(dtype), static_cast<DType>(target_dtype), at(prediction),
             at(target), at(log_var), samples, targets, features, at(memory)},
            {at(grad_nll), at(grad_prediction), at(grad_target), at(grad_log_var), at(partial), partials});
      },
      release);

  m.def(
      "full_gaussian_forward",
      [](int dtype, Address mean, Address log_diagonal, Address lower, Address seed, Address z, Address kl,
         int64_t samples, int64_t rows, int64_t latent) {
        kernels().full_gaussian_forward(
            {static_cast<DType>(dtype), at(mean), at(log_diagonal), at(lower), integers(seed), samples, rows, latent},
            {at(z), at(kl)});
      },
      release);
  m.def(
      "full_gaussian_backward",
      [](int dtype, Address grad_z, Address grad_kl, Address mean, Address log_diagonal, Address lower, Address seed,
         Address grad_mean, Address grad_log_diagonal, Address grad_lower, int64_t samples, int64_t rows,
         int64_t latent) {
        kernels().full_gaussian_backward(
            {static_cast<DType>(dtype), at(mean), at(log_diagonal), at(lower), integers(seed), samples, rows, latent},
            {at(grad_z), at(grad_kl), at(grad_mean), at(grad_log_diagonal), at(grad_lower)});
      },
      release);

  m.def(
      "log_ratio_forward",
      [](int dtype, Address mean, Address log_var, Address seed, Address z, Address log_ratio, int64_t samples,
         int64_t rows, int64_t latent) {
        kernels().log_ratio_forward(
            {static_cast<DType>(dtype), at(mean), at(log_var), integers(seed), samples, rows, latent},
            {at(z), at(log_ratio)});
      },
      release);
  m.def(
      "log_ratio_backward",
      [](int dtype, Address grad_z, Address grad_log_ratio, Address mean, Address log_var, Address seed,
         Address grad_mean, Address grad_log_var, int64_t samples, int64_t rows, int64_t latent) {
        kernels().log_ratio_backward(
            {static_cast<DType>(dtype), at(mean), at(log_var), integers(seed), samples, rows, latent},
            {at(grad_z), at(grad_log_ratio), at(grad_mean), at(grad_log_var)});
      },
      release);
  m.def(
      "importance_bound_forward",
      [](int dtype, Address log_likelihood, Address log_ratio, Address bound, int64_t samples, int64_t rows) {
        kernels().importance_bound_forward(
            {static_cast<DType>(dtype), at(log_likelihood), at(log_ratio), samples, rows}, at(bound));
      },
      release);
  m.def(
      "importance_bound_backward",
      [](int dtype, Address grad_bound, Address log_likelihood, Address log_ratio, Address grad, int64_t samples,
         int64_t rows) {
        kernels().importance_bound_backward(
            {static_cast<DType>(dtype), at(log_likelihood), at(log_ratio), samples, rows}, at(grad_bound), at(grad));
      },
      release);

  m.def("categorical_workspace",
        [](int dtype, int64_t classes) { return kernels().categorical_workspace(static_cast<DType>(dtype), classes); });
  m.def(
      "categorical_forward",
      [](int dtype, Address logits, Address log_prior, int64_t prior_rows, Address seed, double slope, bool hard,
         int64_t samples, int64_t rows, int64_t classes, Address memory, int64_t workspaces, Address sample,
         Address kl) {
        kernels().categorical_forward(categorical(dtype, logits, log_prior, prior_rows, seed, slope, hard, samples,
                                                  rows, classes, memory, workspaces),
                                      {at(sample), at(kl)});
      },
      release);
  m.def(
      "categorical_backward",
      [](int dtype, Address logits, Address log_prior, int64_t prior_rows, Address seed, double slope, int64_t samples,
         int64_t rows, int64_t classes, Address memory, int64_t workspaces, Address grad_sample, Address grad_kl,
         Address sample, Address grad_logits, Address grad_prior) {
        kernels().categorical_backward(categorical(dtype, logits, log_prior, prior_rows, seed, slope, false, samples,
                                                   rows, classes, memory, workspaces),
                                       {at(grad_sample), at(grad_kl), at(sample), at(grad_logits), at(grad_prior)});
      },
      release);
  m.def(
      "corrupt",
      [](int dtype, int noise, double level, double low, double high, Address seed, Address x, int64_t rows,
         int64_t columns, int64_t stride, int64_t first, Address out) {
        kernels().corrupt({static_cast<DType>(dtype), static_cast<Noise>(noise), level, low, high, integers(seed),
                           at(x), rows, columns, stride, first, at(out)});
      },
      release);

  m.def("mixture_prior_workspace", mixture_prior_workspace);
  m.def(
      "mixture_prior_forward",
      [](bool is_double, bool categorical, Address mean, Address log_var, Address logits, Address component_mean,
         Address component_log_var, int64_t batch, int64_t variables, int64_t components, int64_t latent,
         Address memory, int64_t threads, Address kl, Address dispersion, Address aggregate_kl,
         Address mutual_information, Address aggregate, Address parts) {
        kernels().mixture_prior_forward(
            {is_double, categorical, at(mean), at(log_var), at(logits), at(component_mean), at(component_log_var),
             batch, variables, components, latent, at(memory), threads},
            {at(kl), at(dispersion), at(aggregate_kl), at(mutual_information), at(aggregate), at(parts)});
      },
      release);
  m.def(
      "mixture_prior_backward",
      [](bool is_double, bool categorical, Address mean, Address log_var, Address logits, Address component_mean,
         Address component_log_var, int64_t batch, int64_t variables, int64_t components, int64_t latent,
         Address memory, int64_t threads, Address grad_kl, Address grad_dispersion, Address grad_aggregate_kl,
         Address grad_mutual_information, Address aggregate, Address grad_mean, Address grad_log_var,
         Address grad_logits, Address grad_component_mean, Address grad_component_log_var) {
        kernels().mixture_prior_backward(
            {is_double, categorical, at(mean), at(log_var), at(logits), at(component_mean), at(component_log_var),
             batch, variables, components, latent, at(memory), threads},
            {at(grad_kl), at(grad_dispersion), at(grad_aggregate_kl), at(grad_mutual_information), at(aggregate),
             at(grad_mean), at(grad_log_var), at(grad_logits), at(grad_component_mean), at(grad_component_log_var)});
      },
      release);

  // The scratch comes from the caller, who asks with `workspace` how much it takes.
  m.def(
      "cross_entropy",
      [](bool workspace, int dtype, Address hidden, Address weight, Address bias, Address target, int64_t rows,
         int64_t hidden_size, int64_t vocabulary, int64_t words, int64_t ignore_index, double label_smoothing,
         Address scale, Address losses, Address lse, bool known_lse, Address grad_hidden, Address grad_weight,
         Address grad_bias, int64_t block_rows, int64_t workspaces, Address memory) {
        const CrossEntropy p = {static_cast<DType>(dtype),
                                at(hidden),
                                at(weight),
                                at(bias),
                                integers(target),
                                rows,
                                hidden_size,
                                vocabulary,
                                words,
                                ignore_index,
                                label_smoothing,
                                at(scale),
                                at(losses),
                                at(lse),
                                known_lse,
                                at(grad_hidden),
                                at(grad_weight),
                                at(grad_bias),
                                block_rows,
                                workspaces,
                                at(memory)};
        return workspace ? kernels().cross_entropy_workspace(p) : kernels().cross_entropy(p);
      },
      release);

  m.def(
      "pack_words",
      [](Address tokens, Address lengths, int64_t batch, int64_t time, int64_t vocabulary, Address seed,
         float word_dropout, int64_t unk_index, Address order, Address active, Address start, Address words,
         Address rows) {
        return kernels().pack_words({integers(tokens), integers(lengths), batch, time, vocabulary, integers(seed),
                                     word_dropout, unk_index, integers(order), integers(active), integers(start),
                                     integers(words), integers(rows)});
      },
      release);
  m.attr("BAD_TOKEN") = kBadToken;
  m.attr("BAD_LENGTH") = kBadLength;
  m.def(
      "lstm_forward",
      [](bool is_double, bool keep, int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths,
         Address order, Address active, Address start, Address inputs, Address static_gates, Address h0, Address c0,
         Address weight_hh, Address gates, Address cells, Address hidden_states, Address h_n, Address c_n,
         Address states, Address sorted_h0, Address packed_weight) {
        kernels().lstm_forward({is_double, keep, plan(batch, samples, time, hidden, lengths, order, active, start),
                                at(inputs), at(static_gates), at(h0), at(c0), at(weight_hh), at(gates), at(cells),
                                at(hidden_states), at(h_n), at(c_n), at(states), at(sorted_h0), at(packed_weight)});
      },
      release);
  m.def(
      "lstm_backward",
      [](bool is_double, int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths, Address order,
         Address active, Address start, Address grad_states, Address grad_h_n, Address grad_c_n, Address gates,
         Address cells, Address c0, Address weight_hh, Address grad_gates, Address grad_static_gates, Address grad_h0,
         Address grad_c0, Address packed_weight) {
        kernels().lstm_backward({is_double, plan(batch, samples, time, hidden, lengths, order, active, start),
                                 at(grad_states), at(grad_h_n), at(grad_c_n), at(gates), at(cells), at(c0),
                                 at(weight_hh), at(grad_gates), at(grad_static_gates), at(grad_h0), at(grad_c0),
                                 at(packed_weight)});
      },
      release);

  m.def(
      "gru_forward",
      [](bool is_double, int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths, Address order,
         Address active, Address start, Address inputs, int64_t input_stride, Address static_gates, Address h0,
         Address weight_hh, Address gates, Address hidden_states, Address h_n, Address states, Address packed_weight) {
        kernels().gru_forward({is_double, plan(batch, samples, time, hidden, lengths, order, active, start), at(inputs),
                               input_stride, at(static_gates), at(h0), at(weight_hh), at(gates), at(hidden_states),
                               at(h_n), at(states), at(packed_weight)});
      },
      release);
  m.def(
      "gru_backward",
      [](bool is_double, int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths, Address order,
         Address active, Address start, Address grad_hidden, Address grad_h_n, Address gates, Address hidden_states,
         Address h0, Address weight_hh, Address grad_gates, Address grad_static_gates, Address grad_h0, Address before,
         Address packed_weight) {
        kernels().gru_backward({is_double, plan(batch, samples, time, hidden, lengths, order, active, start),
                                at(grad_hidden), at(grad_h_n), at(gates), at(hidden_states), at(h0), at(weight_hh),
                                at(grad_gates), at(grad_static_gates), at(grad_h0), at(before), at(packed_weight)});
      },
      release);

  m.def(
      "layer_norm_lstm_forward",
      [](bool is_double, bool keep, int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths,
         Address order, Address active, Address start, double epsilon, Address inputs, Address static_inputs,
         Address h0, Address c0, Address weight_hh, Address norm_gates, Address norm_cell, Address normalized,
         Address inverses, Address cells, Address hidden_states, Address h_n, Address c_n, Address states,
         Address packed_weight) {
        kernels().layer_norm_lstm_forward(
            {is_double, keep, plan(batch, samples, time, hidden, lengths, order, active, start), epsilon, at(inputs),
             at(static_inputs), at(h0), at(c0), at(weight_hh), at(norm_gates), at(norm_cell), at(normalized),
             at(inverses), at(cells), at(hidden_states), at(h_n), at(c_n), at(states), at(packed_weight)});
      },
      release);
  m.def(
      "layer_norm_lstm_backward",
      [](bool is_double, int64_t batch, int64_t samples, int64_t time, int64_t hidden, Address lengths, Address order,
         Address active, Address start, double epsilon, Address grad_hidden, Address grad_h_n, Address grad_c_n,
         Address normalized, Address inverses, Address cells, Address hidden_states, Address h0, Address c0,
         Address weight_hh, Address norm_gates, Address norm_cell, Address grad_products, Address grad_inputs,
         Address grad_static_inputs, Address grad_h0, Address grad_c0, Address before, Address grad_norms,
         int64_t partials, Address states, Address packed_weight) {
        kernels().layer_norm_lstm_backward(
            {is_double,        plan(batch, samples, time, hidden, lengths, order, active, start),
             epsilon,          at(grad_hidden),
             at(grad_h_n),     at(grad_c_n),
             at(normalized),   at(inverses),
             at(cells),        at(hidden_states),
             at(h0),           at(c0),
             at(weight_hh),    at(norm_gates),
             at(norm_cell),    at(grad_products),
             at(grad_inputs),  at(grad_static_inputs),
             at(grad_h0),      at(grad_c0),
             at(before),       at(grad_norms),
             partials,         at(states),
             at(packed_weight)});
      },
      release);

  m.def(
      "sparse_encode",
      [](bool is_double, Address gram, Address products, Address squared, Address l1, Address weights, Address init,
         double l2, double tol, bool positive, int64_t samples, int64_t atoms, int64_t max_iter, int64_t capacity,
         Address codes, Address gap, Address iterations, Address status, Address memory, int64_t workspaces) {
        kernels().sparse_encode({is_double,
                                 at(gram),
                                 at(products),
                                 at(squared),
                                 at(l1),
                                 at(weights),
                                 at(init),
                                 l2,
                                 tol,
                                 positive,
                                 samples,
                                 atoms,
                                 max_iter,
                                 capacity,
                                 at(codes),
                                 at(gap),
                                 integers(iterations),
                                 static_cast<int8_t *>(at(status)),
                                 at(memory),
                                 workspaces});
      },
      release);
  m.def("sparse_workspace", [](bool is_double, int64_t atoms, int64_t capacity) {
    return kernels().sparse_workspace(is_double, atoms, capacity);
  });
  m.def(
      "sparse_solve_support",
      [](bool is_double, Address gram, Address codes, Address grad, double l2, int64_t samples, int64_t atoms,
         int64_t capacity, Address solution, Address memory, int64_t workspaces) {
        kernels().sparse_solve_support({is_double, at(gram), at(codes), at(grad), l2, samples, atoms, capacity,
                                        at(solution), at(memory), workspaces});
      },
      release);
  m.def("ista_sizes", [](bool is_double, bool use_gram, int64_t atoms, int64_t features) {
    Ista p{};
    p.is_double = is_double, p.use_gram = use_gram, p.atoms = atoms, p.features = features;
    const IstaSizes sizes = kernels().ista_sizes(p);
    return py::make_tuple(sizes.packed, sizes.memory);
  });
  m.def(
      "ista",
      [](bool is_double, bool use_gram, bool momentum, Address matrix, Address target, Address l1, Address init,
         double step, int64_t samples, int64_t atoms, int64_t features, int64_t max_iter, Address codes, Address packed,
         Address memory, int64_t workspaces) {
        kernels().ista({is_double, use_gram, momentum, at(matrix), at(target), at(l1), at(init), step, samples, atoms,
                        features, max_iter, at(codes), at(packed), at(memory), workspaces});
      },
      release);
  m.def(
      "dictionary_sweep",
      [](bool is_double, bool sphere, bool positive, Address atoms, Address gradient, Address gram, Address used,
         int64_t atom_count, int64_t features, int64_t gram_stride) {
        kernels().dictionary_sweep({is_double, sphere, positive, at(atoms), at(gradient), at(gram),
                                    static_cast<const bool *>(at(used)), atom_count, features, gram_stride});
      },
      release);

  py::class_<Generation>(m, "Generation")
      .def(py::init([](bool is_double, int64_t batch, int64_t embed, int64_t hidden, int64_t layers, int64_t vocabulary,
                       int64_t input_stride, Address embedding, Address weight_input, Address weight_hh,
                       Address weight_ih, Address bias, Address static_gates, Address h0, Address c0,
                       Address output_weight, Address output_bias, Address prefix, int64_t prefix_length, Address seeds,
                       int64_t bos, int64_t eos, int64_t padding, int64_t max_length, int strategy, bool log_probs,
                       double temperature, int64_t top_k, double top_p, int64_t beams, double length_penalty,
                       int64_t n_best, int64_t no_repeat_ngram, Address tokens, Address lengths, Address scores,
                       int64_t threads) {
        Generation g{};
        g.is_double = is_double;
        g.batch = batch, g.embed = embed, g.hidden = hidden, g.layers = layers, g.vocabulary = vocabulary;
        g.input_stride = input_stride;
        g.embedding = at(embedding), g.weight_input = at(weight_input);
        g.weight_hh = at(weight_hh), g.weight_ih = at(weight_ih), g.bias = at(bias);
        g.static_gates = at(static_gates), g.h0 = at(h0), g.c0 = at(c0);
        g.output_weight = at(output_weight), g.output_bias = at(output_bias);
        g.prefix = integers(prefix), g.prefix_length = prefix_length, g.seeds = integers(seeds);
        g.bos = bos, g.eos = eos, g.padding = padding, g.max_length = max_length;
        g.strategy = static_cast<Strategy>(strategy), g.log_probs = log_probs || strategy == kBeam;
        g.temperature = temperature, g.top_k = top_k, g.top_p = top_p, g.beams = beams;
        g.length_penalty = length_penalty, g.n_best = n_best, g.no_repeat_ngram = no_repeat_ngram;
        g.tokens = integers(tokens), g.lengths = integers(lengths), g.scores = at(scores), g.threads = threads;
        return g;
      }))
      .def("bytes", [](const Generation &g) { return kernels().generation_bytes(g) + 64; })
      .def_property(
          "memory", [](const Generation &g) { return reinterpret_cast<Address>(g.memory); },
          [](Generation &g, Address memory) { g.memory = at(memory); })
      .def(
          "advance",  // up to `steps` more; returns the number of sentences that go on
          [](Generation &g, int64_t steps) {
            kernels().generation_advance(g, steps);
            return g.step < g.max_length ? g.active : 0;
          },
          release);
  m.def(
      "multiply_rows",
      [](bool is_double, int64_t rows, int64_t inner, int64_t columns, Address x, Address weight, Address bias,
         Address out, Address memory, int64_t threads) {
        kernels().multiply_rows(
            {is_double, rows, inner, columns, at(x), at(weight), at(bias), at(out), at(memory), threads});
      },
      release);
}
