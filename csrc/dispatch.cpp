// Chooses the kernel table once, at import: the best instruction set of this machine, or FASTVAE_CPU_ISA.
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fastvae {

namespace baseline {
extern const Kernels table;
}
#ifdef FASTVAE_HAS_avx2
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

struct Supported {
  const Kernels *tables[3];
  const char *names[4];
  int count = 0;

  void add(const Kernels &table) {
    tables[count] = &table;
    names[count++] = table.isa;
    names[count] = nullptr;
  }

  Supported() {
    add(baseline::table);
#ifdef FASTVAE_HAS_avx2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
        __builtin_cpu_supports("bmi2")) {
      add(avx2::table);
    }
    if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512cd")) {
      add(avx512::table);
    }
#endif
  }
};

const Supported &supported() {
  static const Supported instance;
  return instance;
}

const Kernels &choose() {
  const Supported &all = supported();
  if (const char *wanted = std::getenv("FASTVAE_CPU_ISA")) {
    for (int i = 0; i < all.count; ++i) {
      if (std::strcmp(wanted, all.names[i]) == 0) return *all.tables[i];
    }
    // An unknown name is refused in fastvae/ops/backend.py, where an error can be told.
  }
  return *all.tables[all.count - 1];
}

}  // namespace

const Kernels &kernels() {
  static const Kernels &chosen = choose();
  return chosen;
}

const char *const *supported_isas() { return supported().names; }

}  // namespace fastvae
