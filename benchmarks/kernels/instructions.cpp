// One call of the C++ kernels, for benchmarks/kernels/instructions.py, which counts the instructions of ``counted``:
//     instructions ISA WHAT DTYPE B H S T P N D
// Everything is contiguous and filled with the same numbers in every run. One thread takes all units, as torch's would.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "args.h"
#include "cpu/bank.h"

using namespace prefix_attn;

struct Work {
    const Kernels& kernels;
    Forward forward;
    Backward backward;
    bool gradients;
    std::vector<float> packed;
};

// (batch, head, row, size), never freed: the process makes one call.
static Array array(Type type, int64_t batch, int64_t head, int64_t row, int64_t size) {
    static uint32_t state = 1;
    const int64_t count = batch * head * row * size;
    char* data = (char*)std::aligned_alloc(64, (count * 4 + 63) / 64 * 64);
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        const float x = (float)(state >> 8) / (1 << 23) - 1;
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint16_t half = (uint16_t)(bits >> 16);
        type == Type::f32 ? std::memcpy(data + 4 * i, &x, 4) : std::memcpy(data + 2 * i, &half, 2);
    }
    return {data, head * row * size, row * size, size, type};
}

static void pack(Work& w, bool backward) {
    const Arguments& c = w.forward.args;
    w.packed.resize(w.kernels.packed_floats(c, backward));
    for (int64_t unit = 0; unit < c.N * c.HKV && !w.packed.empty(); unit++)
        w.kernels.pack(c, backward, w.packed.data(), unit);
}

static void forward(Work& w) {
    pack(w, false);
    for (int64_t unit = 0; unit < w.kernels.forward_units(w.forward.args); unit++)
        w.kernels.forward(w.forward, w.packed.data(), unit);
}

static void backward(Work& w) {
    pack(w, true);
    for (int64_t unit = 0; unit < w.kernels.backward_units(w.backward); unit++)
        w.kernels.backward(w.backward, w.packed.data(), unit);
}

// A name that callgrind finds: neither inlined nor cloned.
extern "C" __attribute__((noipa)) void counted(Work& w) {
    w.gradients ? backward(w) : forward(w);
}

int main(int argc, char** argv) {
    if (argc != 11) return std::fprintf(stderr, "usage: instructions ISA WHAT DTYPE B H S T P N D\n"), 2;
    const std::string isa = argv[1], what = argv[2], dtype = argv[3];
    const auto number = [&](int i) { return std::atoll(argv[i]); };
    const Type type = dtype == "float32" ? Type::f32 : Type::bf16;
    Arguments c;
    c.B = number(4);
    c.HQ = c.HKV = number(5);
    c.S = c.NQ = number(6);
    c.T = c.NK = number(7);
    c.P = number(8);
    c.N = number(9);
    c.D = c.DV = number(10);
    c.scale = 0.125f;
    c.query = array(type, c.B, c.HQ, c.S, c.D);
    c.key = array(type, c.B, c.HKV, c.T, c.D);
    c.value = array(type, c.B, c.HKV, c.T, c.DV);
    c.prefix_key = array(type, c.N, c.HKV, c.P, c.D);
    c.prefix_value = array(type, c.N, c.HKV, c.P, c.DV);
    std::vector<int64_t> ids(c.B);
    for (int64_t b = 0; b < c.B; b++)
        ids[b] = b % c.N;
    c.ids = ids.data();
    const Bank bank = group_rows(c);

    std::vector<float> lse(c.B * c.HQ * c.S);
    Work w{isa == "avx2" ? avx2::kernels : generic::kernels, {}, {}, what == "backward" || what == "prefix-only", {}};
    w.forward = {c, array(type, c.B, c.HQ, c.S, c.DV), lse.data()};
    forward(w);  // also for the backward's sake, and the first of two: memory grows in the first
    w.backward.args = c;
    w.backward.out = w.forward.out;
    w.backward.grad_out = array(type, c.B, c.HQ, c.S, c.DV);
    w.backward.lse = lse.data();
    std::vector<float> grad_prefix(2 * c.N * c.HKV * c.P * c.D);
    w.backward.grad_prefix_key = grad_prefix.data();
    w.backward.grad_prefix_value = grad_prefix.data() + grad_prefix.size() / 2;
    if (what == "backward") {
        w.backward.grad_query = array(type, c.B, c.HQ, c.S, c.D);
        w.backward.grad_key = array(type, c.B, c.HKV, c.T, c.D);
        w.backward.grad_value = array(type, c.B, c.HKV, c.T, c.DV);
    }
    if (w.gradients) backward(w);
    counted(w);
}
