// Which instruction sets this library was built for, and which of them this processor has.
#include <string.h>

#include "kernels.hpp"

extern const Kernels kernels_generic[2];
#if defined(__x86_64__)
extern const Kernels kernels_avx2[2], kernels_avx512[2];
#endif

namespace {

bool is_named(const char *wanted, const char *name) { return !wanted || strcmp(wanted, name) == 0; }

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED int64_t obfuscatune_version() { return VERSION; }

// The kernels for numbers of 4 or 8 bytes: for the instruction set of that name, or the best for null. Null where this
// processor does not have it.
EXPORTED const Kernels *obfuscatune_kernels(const char *isa, int64_t itemsize) {
    const int which = itemsize == 8;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
    if (avx512 && is_named(isa, "avx512")) return &kernels_avx512[which];
    if (avx2 && is_named(isa, "avx2")) return &kernels_avx2[which];
#endif
    return is_named(isa, "generic") ? &kernels_generic[which] : nullptr;
}
