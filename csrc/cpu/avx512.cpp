#include "../args.h"
#include "standard.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#define PA_NAME avx512
#define PA_TEXT "avx512"
#define PA_LANES 16
#define PA_ROWS 6
#include "kernels.h"
#endif
