// Forward and backward for one instruction set. Included by generic.cpp, avx2.cpp, avx512.cpp and
// avx512bf16.cpp, which include standard headers, set the target and define PA_NAME, PA_LANES and PA_ROWS, in this
// order: what the standard library compiles for AVX-512 would otherwise be shared with, and crash, processors without
// it.
//
// Forward keeps a running maximum m, sum l and accumulator per query (online softmax) while it walks tiles of 64 keys:
// the prefix's, which were packed once for all rows of the batch, then the sequence's up to the last key that a block
// of queries sees. Backward walks the same tiles with the final lse: p = exp(logit - lse). Logits are never in units of
// log 2: converting a large lse back and forth would cost the digits that its difference to a logit is made of. Few
// queries per row have a forward of their own, decode.h.
#ifndef PA_PAIRS  // whether bfloat16 is multiplied as it is; a test turns it on everywhere
#define PA_PAIRS 0
#endif

namespace prefix_attn {
namespace PA_NAME {
namespace {

#include "tile.h"
#include "keys.h"
#include "forward.h"
#include "decode.h"
#include "backward.h"

bool few(const Arguments& c) {
    return c.S <= FEW && !c.cu_q;
}

// ``f`` of a float or a Pair: of what the products of this call are made.
template <typename F>
auto with_elements(const Arguments& c, const F& f) {
    if constexpr (PA_PAIRS)
        if (paired(c)) return f(Pair{});
    return f(float{});
}

int64_t packed_floats(const Arguments& c, bool backward) {
    if (few(c) && !backward) return 0;
    return with_elements(c, [&](auto x) { return c.N * c.HKV * keys_floats<decltype(x)>(c, c.P, backward); });
}

void pack(const Arguments& c, bool backward, float* packed, int64_t unit) {
    const int64_t n = unit / c.HKV, kv = unit % c.HKV;
    // A bank may hold many more entries than a batch reads.
    if (c.first && c.first[n] == c.first[n + 1]) return;
    const Array &k = c.prefix_key, &v = c.prefix_value;
    with_elements(c, [&](auto x) {
        pack_keys<decltype(x)>(c, k, n * k.batch + kv * k.head, v, n * v.batch + kv * v.head, c.P, backward,
                               nullptr, packed + unit * keys_floats<decltype(x)>(c, c.P, backward), 0, prefix_length(c, n));
    });
}

int64_t forward_units(const Arguments& c) {
    return few(c) ? (c.B + chunk_of(c) - 1) / chunk_of(c) * c.HKV : c.B * c.HKV * parts(c);
}

void forward(const Forward& f, const float* packed, int64_t unit) {
    with_elements(f.args, [&](auto x) {
        few(f.args) ? forward_few<decltype(x)>(f, unit) : forward_many<decltype(x)>(f, packed, unit);
    });
}

void backward(const Backward& f, const float* packed, int64_t unit) {
    with_elements(f.args, [&](auto x) { backward_run<decltype(x)>(f, packed, unit); });
}

}  // namespace

const Kernels kernels{PA_TEXT, packed_floats, pack, forward_units, forward, backward_units, backward};

}  // namespace PA_NAME
}  // namespace prefix_attn
