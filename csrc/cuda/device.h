// What kernels are written against, on a GPU: sm_80 and newer. emulate/device.h has the same names for a CPU.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define KERNEL(THREADS) __global__ void __launch_bounds__(THREADS, 1)
#define ARGUMENT(TYPE) const __grid_constant__ TYPE

namespace dev {

using half = __half;
using bfloat = __nv_bfloat16;

DEVICE int thread() {
    return threadIdx.x;
}
DEVICE int block() {
    return blockIdx.x;
}
DEVICE void sync_block() {
    __syncthreads();
}
DEVICE float shuffle_xor(float x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Of shared memory.
using Address = uint32_t;
DEVICE Address address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8x8 matrices of 16-bit numbers; lane i names row i % 8 of matrix i / 8.
DEVICE void ldmatrix(uint32_t (&r)[4], Address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}
DEVICE void ldmatrix_trans(uint32_t (&r)[4], Address row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(row)
                 : "memory");
}

// mma: d += a b, 16x16 by 16x8 into float32. pack: two numbers, rounded to nearest even.
template <typename T>
struct Math;

template <>
struct Math<half> {
    DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    DEVICE static uint32_t pack(float low, float high) {
        const __half2 two = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&two);
    }
    DEVICE static float widen(half x) { return __half2float(x); }
};

template <>
struct Math<bfloat> {
    DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    DEVICE static uint32_t pack(float low, float high) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&two);
    }
    DEVICE static float widen(bfloat x) { return __bfloat162float(x); }
};

// 16 bytes from global to shared memory; zeros, and nothing read, where not valid. This thread sees them after a wait.
DEVICE void copy_async(void* to, const void* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void copy_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most N of the committed groups are under way.
template <int N>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Adds 1. Orders what this thread saw written before, and what it reads later after, whoever else adds.
DEVICE int count(int* p) {
    int old;
    asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;" : "=r"(old) : "l"(p) : "memory");
    return old;
}

// Arrays in dynamic shared memory, one after the other.
class Arena {
 public:
    DEVICE Arena() : next_(base()) {}
    template <typename T>
    DEVICE T* take(int count) {
        T* p = reinterpret_cast<T*>(next_);
        next_ += (count * int(sizeof(T)) + 15) / 16 * 16;
        return p;
    }

 private:
    DEVICE static char* base() {
        extern __shared__ __align__(256) char shared[];
        return shared;
    }
    char* next_;
};

}  // namespace dev
