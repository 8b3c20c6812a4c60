// What kernels are written against, on a CPU. cuda/device.h has the same names for a GPU.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <source_location>

#include "emulate.h"
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#define DEVICE inline __attribute__((always_inline))
#define KERNEL(THREADS) inline void
#define ARGUMENT(TYPE) const TYPE&

namespace dev {

struct half {
    uint16_t bits;
};
struct bfloat {
    uint16_t bits;
};

DEVICE int thread() {
    return emulate::thread();
}
DEVICE int block() {
    return emulate::block();
}
inline void sync_block(std::source_location at = std::source_location::current()) {
    emulate::sync_block(at.line(), at.column());
}
inline float shuffle_xor(float x, int mask) {
    uint32_t in[2], out;
    std::memcpy(in, &x, 4);
    in[1] = mask;
    emulate::collective(emulate::Kind::shuffle, "shuffle_xor", in, 2, &out, 1);
    std::memcpy(&x, &out, 4);
    return x;
}
inline float exp2(float x) {
    return std::exp2(x);
}
inline float log2(float x) {
    return std::log2(x);
}
inline float reciprocal(float x) {
    return 1 / x;
}

using Address = uintptr_t;
inline Address address(const void* p) {
    return reinterpret_cast<Address>(p);
}

inline void load_matrices(emulate::Kind kind, uint32_t (&r)[4], Address row) {
    if (row % 16) emulate::fail("ldmatrix: the address is no multiple of 16");
    uint32_t in[5];
    const volatile uint32_t* p = reinterpret_cast<const volatile uint32_t*>(row);
    for (int i = 0; i < 4; i++)
        in[i] = p[i];  // read by the thread that names the row, so that races are seen
    in[4] = static_cast<uint32_t>(row);
    emulate::collective(kind, "ldmatrix", in, 5, r, 4);
}
inline void ldmatrix(uint32_t (&r)[4], Address row) {
    load_matrices(emulate::Kind::ldmatrix, r, row);
}
inline void ldmatrix_trans(uint32_t (&r)[4], Address row) {
    load_matrices(emulate::Kind::ldmatrix_trans, r, row);
}

inline void multiply(emulate::Kind kind, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    uint32_t in[10] = {a[0], a[1], a[2], a[3], b0, b1}, out[4];
    std::memcpy(in + 6, d, 16);
    emulate::collective(kind, "mma", in, 10, out, 4);
    std::memcpy(d, out, 16);
}

template <typename T>
struct Math;

template <>
struct Math<half> {
    static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        multiply(emulate::Kind::mma_half, d, a, b0, b1);
    }
    static uint32_t pack(float low, float high) {
        return emulate::float_to_half(low) | uint32_t(emulate::float_to_half(high)) << 16;
    }
    static float widen(half x) { return emulate::half_to_float(x.bits); }
};

template <>
struct Math<bfloat> {
    static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
        multiply(emulate::Kind::mma_bfloat, d, a, b0, b1);
    }
    static uint32_t pack(float low, float high) {
        return emulate::float_to_bfloat(low) | uint32_t(emulate::float_to_bfloat(high)) << 16;
    }
    static float widen(bfloat x) { return emulate::bfloat_to_float(x.bits); }
};

inline void copy_now(const emulate::Copy& copy) {
    volatile uint64_t* to = static_cast<volatile uint64_t*>(copy.to);
    const volatile uint64_t* from = static_cast<const volatile uint64_t*>(copy.from);
    for (int i = 0; i < 2; i++)
        to[i] = copy.valid ? from[i] : 0;
}
inline void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<uintptr_t>(to) % 16 || (valid && reinterpret_cast<uintptr_t>(from) % 16))
        emulate::fail("copy_async: an address is no multiple of 16");
    emulate::copied(valid ? 16 : 0);
    if (!emulate::late()) return copy_now({to, from, valid});
    for (int i = 0; i < 2; i++)
        static_cast<volatile uint64_t*>(to)[i] = ~0ull;  // NaN in every type until the copy has arrived
    emulate::copy_begin({to, from, valid});
}
inline void copy_commit() {
    emulate::copy_commit();
}
template <int N>
void copy_wait() {
    emulate::Copy copy;
    while (emulate::copy_due(N, &copy))
        copy_now(copy);
}

inline int count(int* p) {
    emulate::yield();
    const int old = __atomic_fetch_add(p, 1, __ATOMIC_ACQ_REL);
    emulate::yield();
    return old;
}

class Arena {
 public:
    Arena() : next_(emulate::shared()) {}

    template <typename T>
    T* take(int count) {
        T* p = reinterpret_cast<T*>(next_);
        const size_t bytes = (count * sizeof(T) + 15) / 16 * 16;
        used_ += bytes;
        emulate::used(used_);
#if defined(__SANITIZE_ADDRESS__)
        ASAN_POISON_MEMORY_REGION(next_ + count * sizeof(T), BETWEEN);
#endif
        next_ += bytes + BETWEEN;
        return p;
    }

 private:
    static constexpr size_t BETWEEN = 512;  // nobody's bytes after each array
    char* next_;
    size_t used_ = 0;
};

}  // namespace dev
