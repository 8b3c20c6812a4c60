// What the native kernels are given: pointers, sizes and strides. No torch here.
//
// B batch, HQ query heads, HKV key heads, G = HQ / HKV, S queries, T keys, P prefix length, N bank entries (1 for a
// shared prefix), D head size of query and key, DV of value. Packed sequences (cu_q not null) lie one after the other
// in tensors with a batch of 1 and NQ queries, NK keys; S and T are then the largest of a sequence. Strides are in
// elements; the last dimension is contiguous.
#pragma once
#include <cstdint>

namespace prefix_attn {

enum class Type : int32_t { f32, bf16, f16 };

struct Array {
    const void* data = nullptr;
    int64_t batch = 0, head = 0, row = 0;  // batch: of a prefix the bank entry
    Type type = Type::f32;
};

struct Arguments {
    Array query;                                     // (B, HQ, S, D)
    Array key, value;                                // (B, HKV, T, D), (B, HKV, T, DV)
    Array prefix_key, prefix_value;                  // (N, HKV, P, D), (N, HKV, P, DV)
    const float* sinks = nullptr;                    // (HQ)
    const int64_t* ids = nullptr;                    // (B) bank entries; null: entry b where N > 1, else 0
    const int64_t* order = nullptr;                  // (B) rows by their entry, see cpu/bank.h; null without ids
    const int64_t* first = nullptr;                  // (N + 2) where in ``order`` each entry's rows begin
    const int64_t* prefix_lengths = nullptr;         // (N)
    const int64_t* prefix_start = nullptr;           // (B)
    const int64_t* key_lengths = nullptr;            // (B)
    const int64_t *cu_q = nullptr, *cu_k = nullptr;  // (B + 1) or null
    const uint8_t* key_mask = nullptr;               // (B, T), 1 = visible
    int64_t B = 0, HQ = 0, HKV = 0, S = 0, T = 0, NQ = 0, NK = 0, P = 0, N = 1, D = 0, DV = 0;
    int64_t window = 0;            // 0: none
    float scale = 1, softcap = 0;  // softcap 0: none
    bool causal = true;
};

struct Forward {
    Arguments args;
    Array out;             // (B, HQ, S, DV), written
    float* lse = nullptr;  // (B, HQ, S) natural logarithm, written
};

struct Backward {
    Arguments args;
    Array out, grad_out;                     // (B, HQ, S, DV)
    const float* lse = nullptr;              // (B, HQ, S)
    const float* grad_lse = nullptr;         // (B, HQ, S) or null
    Array grad_query, grad_key, grad_value;  // shaped as their tensors, written where data is not null
    // Sums over ``slots`` runs of the batch, which the caller adds up in order: (slots, N, HKV, P, D and DV rounded up
    // to 16), zeroed; null where not wanted.
    float *grad_prefix_key = nullptr, *grad_prefix_value = nullptr;
    int64_t slots = 1;
    float* share =
        nullptr;  // (B, HQ, S) sum over keys of p dp, zeroed, for the gradient of the sinks; null: not wanted
};

// One instruction set's kernels. Units are independent of each other, so any thread may take any.
struct Kernels {
    const char* name;
    // The prefix in the layout of the kernels, made once per call: (bank entry, key head) units.
    int64_t (*packed_floats)(const Arguments&, bool backward);
    void (*pack)(const Arguments&, bool backward, float* packed, int64_t unit);
    int64_t (*forward_units)(const Arguments&);
    void (*forward)(const Forward&, const float* packed, int64_t unit);
    int64_t (*backward_units)(const Backward&);
    void (*backward)(const Backward&, const float* packed, int64_t unit);
};

namespace avx512bf16 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace generic {
extern const Kernels kernels;
}

// The best instruction set of this processor, or the one that PREFIX_ATTN_ISA names; null with a reason if it lacks it.
const Kernels* pick(const char** reason);

}  // namespace prefix_attn
