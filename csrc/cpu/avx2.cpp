#include "../args.h"
#include "standard.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define PA_NAME avx2
#define PA_TEXT "avx2"
#define PA_LANES 8
#define PA_ROWS 3
#include "kernels.h"
#endif
