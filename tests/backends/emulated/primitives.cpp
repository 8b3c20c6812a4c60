// Every primitive of device.h on numbers of a fixed stream, by one warp. The output, a line for each, is what a GPU and
// the emulated one are compared by: g++ compiles this file against emulate/, nvcc -x cu against cuda/.
#include <device.h>
#include <launch.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int WORDS = 16, LINES = 16;

struct Warp {
    const uint32_t* in;  // [32 lanes][WORDS] random bits, halves of which are finite
    uint32_t* out;       // [LINES][32][4]
    int* counter;        // 0
};

DEVICE float number(uint32_t bits) {  // in -8 to 8
    return (int(bits & 0xffff) - 32768) / 4096.f;
}

DEVICE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

template <typename T>
DEVICE void multiply(const uint32_t* in, uint32_t* out) {
    uint32_t a[4], b[2];
    float d[4];
    for (int i = 0; i < 4; i++) a[i] = dev::Math<T>::pack(number(in[i]), number(in[i] >> 16));
    for (int i = 0; i < 2; i++) b[i] = dev::Math<T>::pack(number(in[4 + i]), number(in[4 + i] >> 16));
    for (int i = 0; i < 4; i++) d[i] = number(in[6 + i]);
    dev::Math<T>::mma(d, a, b[0], b[1]);
    for (int i = 0; i < 4; i++) out[i] = bits_of(d[i]);
}

KERNEL(32) primitives(ARGUMENT(Warp) p) {
    const int lane = dev::thread();
    const uint32_t* in = p.in + lane * WORDS;
    const auto line = [&](int i) { return p.out + (i * 32 + lane) * 4; };
    dev::Arena arena;
    uint32_t* shared = arena.template take<uint32_t>(32 * 4);
    const int masks[4] = {1, 2, 8, 16};
    for (int i = 0; i < 4; i++) {
        const float x = number(in[i]);
        line(0)[i] = bits_of(dev::shuffle_xor(x, masks[i]));
        line(1)[i] = bits_of(dev::exp2(4 * x));
        line(2)[i] = bits_of(dev::log2(x * x + 1e-3f));
        line(3)[i] = bits_of(dev::reciprocal(x + 9));
        line(4)[i] = dev::Math<dev::half>::pack(x, number(in[i] >> 16) * 1e3f);
        line(5)[i] = dev::Math<dev::bfloat>::pack(x, number(in[i] >> 16) * 1e3f);
    }
    multiply<dev::half>(in, line(6));
    multiply<dev::bfloat>(in, line(7));
    dev::copy_async(shared + lane * 4, in, true);
    dev::copy_commit();
    dev::copy_wait<0>();
    dev::sync_block();
    uint32_t r[4];
    dev::ldmatrix(r, dev::address(shared + lane * 4));
    for (int i = 0; i < 4; i++) line(8)[i] = r[i];
    dev::ldmatrix_trans(r, dev::address(shared + lane * 4));
    for (int i = 0; i < 4; i++) line(9)[i] = r[i];
    dev::sync_block();
    dev::copy_async(shared + lane * 4, in + 4, lane % 2 == 0);
    dev::copy_commit();
    dev::copy_wait<0>();
    dev::sync_block();
    for (int i = 0; i < 4; i++) line(10)[i] = shared[(lane ^ 1) * 4 + i];
    dev::count(p.counter);
    dev::sync_block();
    for (int i = 0; i < 4; i++) line(11)[i] = i == 0 ? *static_cast<volatile int*>(p.counter) : dev::block();
}

const char* const NAMES[] = {"shuffle_xor", "exp2", "log2", "reciprocal", "pack half", "pack bfloat", "mma half",
                             "mma bfloat", "ldmatrix", "ldmatrix_trans", "copy_async", "count"};
constexpr int COUNT = sizeof(NAMES) / sizeof(NAMES[0]);

template <typename T>
T* room(size_t n) {
    void* p = nullptr;
#if defined(__CUDACC__)
    if (cudaMalloc(&p, n * sizeof(T)) != cudaSuccess) exit(1);
    cudaMemset(p, 0, n * sizeof(T));
#else
    p = calloc(n, sizeof(T));
#endif
    return static_cast<T*>(p);
}

void copy(void* to, const void* from, size_t bytes) {
#if defined(__CUDACC__)
    if (cudaMemcpy(to, from, bytes, cudaMemcpyDefault) != cudaSuccess) exit(1);
#else
    memcpy(to, from, bytes);
#endif
}

}  // namespace

int main() {
    uint32_t in[32 * WORDS], out[LINES * 32 * 4], x = 1;
    for (uint32_t& one : in) one = x = x * 1664525u + 1013904223u;
    Warp p{room<uint32_t>(32 * WORDS), room<uint32_t>(LINES * 32 * 4), room<int>(1)};
    copy(const_cast<uint32_t*>(p.in), in, sizeof in);
    if (const char* wrong = dev::launch<primitives>(1, 32, 32 * 16, nullptr, p)) {
        printf("%s\n", wrong);
        return 1;
    }
    copy(out, p.out, sizeof out);
    for (int i = 0; i < COUNT; i++) {
        printf("%s:", NAMES[i]);
        for (int j = 0; j < 32 * 4; j++) printf(" %08x", out[i * 32 * 4 + j]);
        printf("\n");
    }
    return 0;
}
