// Which instruction set runs: decided once, when first asked.
#include <cstdlib>
#include <cstring>

#include "../args.h"

namespace prefix_attn {

static const Kernels* choose(const char** reason) {
    const char* wanted = std::getenv("PREFIX_ATTN_ISA");
    const bool any = !wanted || !*wanted;
#if defined(__x86_64__)
    const bool avx2_here =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512_here = avx2_here && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool bf16_here = avx512_here && __builtin_cpu_supports("avx512bf16");
    if (bf16_here && (any || !std::strcmp(wanted, "avx512bf16"))) return &avx512bf16::kernels;
    if (avx512_here && (any || !std::strcmp(wanted, "avx512"))) return &avx512::kernels;
    if (avx2_here && (any || !std::strcmp(wanted, "avx2"))) return &avx2::kernels;
#endif
    if (any || !std::strcmp(wanted, "generic")) return &generic::kernels;
    *reason =
        "PREFIX_ATTN_ISA names an instruction set that this processor lacks, or none of avx512bf16, avx512, avx2, "
        "generic";
    return nullptr;
}

const Kernels* pick(const char** reason) {
    static const char* why = "";
    static const Kernels* const kernels = choose(&why);
    *reason = why;
    return kernels;
}

}  // namespace prefix_attn
