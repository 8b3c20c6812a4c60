#include "../args.h"
#include "standard.h"

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define PA_NAME avx512bf16
#define PA_TEXT "avx512bf16"
#define PA_LANES 16
#define PA_ROWS 6
#define PA_PAIRS 1
#define PA_DPBF16
#include "kernels.h"
#endif
