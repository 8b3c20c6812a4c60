// The decode kernels for both types, two head sizes and two tiles of queries, and their launch. nvcc compiles this file
// for GPUs; g++ for the emulated one, by emulate/decode.cpp.
#include "decode.h"

#include <launch.h>

#include "decode.cuh"

namespace prefix_attn {

namespace {

template <typename T, int D>
const char* launch(const Decode& p, dev::Stream stream) {
    const int64_t blocks = p.plan.blocks(p.HKV);
    if (p.plan.rows <= 16) return dev::launch<decode<T, D, 16>>(blocks, THREADS, shared_bytes(D), stream, p);
    return dev::launch<decode<T, D, 64>>(blocks, THREADS, shared_bytes(D), stream, p);
}

template <typename T>
const char* launch(const Decode& p, dev::Stream stream) {
    return p.D <= 64 ? launch<T, 64>(p, stream) : launch<T, 128>(p, stream);
}

}  // namespace

Machine machine(int device) {
    return dev::machine(device);
}

const char* launch_decode(const Decode& p, void* stream) {
    if (const char* wrong = dev::zero(p.arrived, sizeof(int) * p.plan.units * p.HKV, stream)) return wrong;
    return p.query.type == Type::bf16 ? launch<dev::bfloat>(p, stream) : launch<dev::half>(p, stream);
}

}  // namespace prefix_attn
