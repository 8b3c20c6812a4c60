// The decode kernel that decode_test.cpp runs: the one file that is compiled again for every sanitizer and planted bug.
#include <launch.h>

#include "decode.cuh"

#ifndef LESS_SHARED
#define LESS_SHARED 0
#endif
#ifndef MOST_ROWS
#define MOST_ROWS 64  // of a unit; 16 compiles half as long
#endif

namespace prefix_attn {

void launch_checked(const Decode& p) {
    constexpr int D = 64, bytes = shared_bytes(D) - LESS_SHARED;
    const int64_t blocks = p.plan.blocks(p.HKV);
    if (p.plan.rows <= 16)
        dev::launch<decode<dev::half, D, 16>>(blocks, THREADS, bytes, nullptr, p);
    else
        dev::launch<decode<dev::half, D, MOST_ROWS>>(blocks, THREADS, bytes, nullptr, p);
}

}  // namespace prefix_attn
