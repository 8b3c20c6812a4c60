// The loop over tiles of keys: what a block of decode.cuh does for its queries and a run of keys.
//
// 4 warps, MW along queries times NW along the keys of a tile (16 queries: 1 x 4; 64: 4 x 1). While tile n is
// multiplied, tile n + 1 is on its way to the other of two stages (cp.async). Rows of 16-byte chunks are swizzled, so
// that the eight rows that ldmatrix reads lie in eight different bank groups. What a length or a mask hides is never
// read: the copy writes zeros, since a probability of 0 times a NaN is NaN.
#pragma once
#include <device.h>

#include <cmath>

#include "plan.h"

namespace prefix_attn {

using dev::Math;

DEVICE int smaller(int a, int b) {
    return a < b ? a : b;
}
DEVICE int larger(int a, int b) {
    return a > b ? a : b;
}

DEVICE int64_t integer(const Integers& x, int i) {
    return x.wide ? static_cast<const int64_t*>(x.data)[i] : static_cast<const int*>(x.data)[i];
}

DEVICE int clamped(const Integers& lengths, int i, int most) {
    if (!lengths.data) return most;
    const int64_t n = integer(lengths, i);
    return n < 0 ? 0 : n < most ? int(n) : most;
}

// The bank entry of row b; -1: none.
DEVICE int entry_of(const Decode& p, int b) {
    if (!p.ids.data) return p.N > 1 ? b : 0;
    const int64_t id = integer(p.ids, b);
    return id >= 0 && id < p.N ? int(id) : -1;
}

template <typename T>
DEVICE const T* head_of(const Array& x, int64_t batch, int64_t head) {
    return static_cast<const T*>(x.data) + batch * x.batch + head * x.head;
}

// Where chunk c of row r lies, so that the same chunk of eight rows is in eight bank groups. Arrays begin at multiples
// of a row, so the chunk that is 2 i further lies at the address ^ 32 i: one register serves all products of a tile.
template <int D>
DEVICE int swizzled(int r, int c) {
    return r * D + (c ^ (r & 7)) * 8;
}

// What a block keeps in shared memory.
template <typename T, int D>
struct Shared {
    T *q, *k, *v;   // [TILE][D], two stages of [KEYS][D]
    float* row;     // [4 warps][TILE / 4 or TILE rows][2]: m and l of the warps along keys
    uint8_t* seen;  // two stages of [KEYS]
    int* last;      // [TILE]

    DEVICE explicit Shared(dev::Arena arena) {
        q = arena.template take<T>(TILE * D);
        k = arena.template take<T>(2 * KEYS * D);
        v = arena.template take<T>(2 * KEYS * D);
        row = arena.template take<float>(4 * TILE * 2);
        seen = arena.template take<uint8_t>(2 * KEYS);
        last = arena.template take<int>(TILE);
    }
};

// A run of the tiles of [prefix ; sequence]: tiles first to last, of which the first ``prefix_tiles`` are the prefix's.
template <typename T>
struct Run {
    const T *prefix_key, *prefix_value, *key, *value;
    const uint8_t* mask;
    int prefix, length;                    // keys of either
    int prefix_tiles, skipped;             // tiles of the sequence before the window
    int first, last;

    DEVICE bool in_prefix(int tile) const { return tile < prefix_tiles; }
    DEVICE int key_of(int tile) const { return (in_prefix(tile) ? tile : tile - prefix_tiles + skipped) * KEYS; }
    DEVICE void take(int tiles, int run, int runs) {
        const int share = (tiles + runs - 1) / runs;
        first = smaller(run * share, tiles);
        last = smaller(first + share, tiles);
    }
};

// A tile of keys and values into its stage, zeros where nothing is visible to any query.
template <typename T, int D>
DEVICE void fetch(const Decode& p, const Run<T>& run, const Shared<T, D>& s, int tile) {
    const int stage = (tile - run.first) % 2 * KEYS, n0 = run.key_of(tile);
    const bool prefix = run.in_prefix(tile);
    const T *key = prefix ? run.prefix_key : run.key, *value = prefix ? run.prefix_value : run.value;
    const int64_t key_row = prefix ? p.prefix_key.row : p.key.row;
    const int64_t value_row = prefix ? p.prefix_value.row : p.value.row;
    const int limit = prefix ? run.prefix : run.length;
    const uint8_t* mask = prefix ? nullptr : run.mask;
    const auto visible = [&](int n) { return n < limit && (!mask || mask[n]); };
    if (dev::thread() < KEYS) s.seen[stage + dev::thread()] = visible(n0 + dev::thread());
#pragma unroll 2  // more addresses at a time would spill
    for (int j = 0; j < KEYS * D / 8 / THREADS; j++) {
        const int i = dev::thread() + j * THREADS, r = i / (D / 8), c = i % (D / 8), n = n0 + r;
        const bool valid = c * 8 < p.D && visible(n);
        dev::copy_async(s.k + stage * D + swizzled<D>(r, c), key + (valid ? n * key_row + c * 8 : 0), valid);
        dev::copy_async(s.v + stage * D + swizzled<D>(r, c), value + (valid ? n * value_row + c * 8 : 0), valid);
    }
    dev::copy_commit();
}

// What a thread holds of a running softmax: rows lane / 4 and that + 8 of its warp's 16, columns 2 (lane % 4) and + 1
// of each 8. ``position``: of the rows' queries among the sequence's keys.
template <int D>
struct State {
    float acc[D / 8][4], m[2], l[2];
    int position[2];

    DEVICE void clear() {
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) acc[i][j] = 0;
        m[0] = m[1] = -INFINITY;
        l[0] = l[1] = 0;
    }
};

// s = q k^T for the 16 queries of a warp and N keys from ``k`` on.
template <typename T, int D, int N>
DEVICE void multiply_keys(const T* q, int row, const T* k, int key, float (&s)[N / 8][4]) {
    const int lane = dev::thread() % 32;
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[n][j] = 0;
    const dev::Address at_q = dev::address(q + swizzled<D>(row + lane % 16, lane / 16));
    const dev::Address at_k = dev::address(k + swizzled<D>(key + lane % 8 + lane / 16 * 8, lane / 8 % 2));
#pragma unroll
    for (int i = 0; i < D / 16; i++) {
        uint32_t a[4];
        dev::ldmatrix(a, at_q ^ 32 * i);
#pragma unroll
        for (int n = 0; n < N / 8; n += 2) {
            uint32_t b[4];
            dev::ldmatrix(b, (at_k ^ 32 * i) + n * 16 * D);
            Math<T>::mma(s[n], a, b[0], b[1]);
            Math<T>::mma(s[n + 1], a, b[2], b[3]);
        }
    }
}

// tanh t = 1 - 2 / (e^2t + 1) for x = 2 t log2(e). Near 0 that would cancel, and a large cap multiplies what is left.
DEVICE float tanh_of(float x) {
    const float t = x * (0.5f / LOG2E), y = t * t;
    const float small = t * (1 + y * (-0.33333333f + y * (0.13333333f - y * 0.053968254f)));
    return y < 0.01f ? small : 1 - 2 * dev::reciprocal(dev::exp2(x) + 1);
}

// Products to logits in units of log 2; -inf where a query does not see a key. n0: the first key's number.
template <int N>
DEVICE void score(const Decode& p, const uint8_t* seen, int n0, bool prefix, const int (&position)[2],
                  float (&s)[N / 8][4]) {
    int low[2], high[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        high[i] = prefix || !p.causal ? INT32_MAX : position[i];
        low[i] = prefix || !p.window ? -1 : position[i] - p.window;
    }
#pragma unroll
    for (int n = 0; n < N / 8; n++) {
        const int column = n * 8 + dev::thread() % 4 * 2;
        const uint16_t both = *reinterpret_cast<const uint16_t*>(seen + column);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int o = n0 + column + j % 2;
            float x = s[n][j] * p.scale;
            if (p.softcap != 0) x = p.softcap * tanh_of(x);
            const bool visible = both >> 8 * (j % 2) & 1 && low[j / 2] < o && o <= high[j / 2];
            s[n][j] = visible ? x : -INFINITY;
        }
    }
}

// The online softmax: logits become exp2(s - m), what was summed before is scaled to the new maximum.
template <int D, int N>
DEVICE void soften(State<D>& state, float (&s)[N / 8][4]) {
    float top[2] = {state.m[0], state.m[1]}, pivot[2], old[2];
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) top[j / 2] = fmaxf(top[j / 2], s[n][j]);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        top[i] = fmaxf(top[i], dev::shuffle_xor(top[i], 1));
        top[i] = fmaxf(top[i], dev::shuffle_xor(top[i], 2));
        pivot[i] = top[i] == -INFINITY ? 0.f : top[i];  // -inf - -inf would be NaN
        old[i] = dev::exp2(state.m[i] - pivot[i]);
        state.m[i] = top[i];
        state.l[i] *= old[i];
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) state.acc[i][j] *= old[j / 2];
#pragma unroll
    for (int n = 0; n < N / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[n][j] = dev::exp2(s[n][j] - pivot[j / 2]);
            state.l[j / 2] += s[n][j];
        }
}

// acc += s v. A product's result lies in registers as the next one's first operand must.
template <typename T, int D, int N>
DEVICE void multiply_values(const float (&s)[N / 8][4], const T* v, int key, float (&acc)[D / 8][4]) {
    const int lane = dev::thread() % 32;
    const dev::Address at_v = dev::address(v + swizzled<D>(key + lane % 16, lane / 16));
#pragma unroll
    for (int k = 0; k < N / 16; k++) {
        const uint32_t a[4] = {
            Math<T>::pack(s[2 * k][0], s[2 * k][1]), Math<T>::pack(s[2 * k][2], s[2 * k][3]),
            Math<T>::pack(s[2 * k + 1][0], s[2 * k + 1][1]), Math<T>::pack(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
        for (int i = 0; i < D / 8; i += 2) {
            uint32_t b[4];
            dev::ldmatrix_trans(b, (at_v ^ 16 * i) + k * 32 * D);
            Math<T>::mma(acc[i], a, b[0], b[1]);
            Math<T>::mma(acc[i + 1], a, b[2], b[3]);
        }
    }
}

// A run of keys for the block's queries, into ``state``.
template <typename T, int D, int MW, int NW>
DEVICE void attend(const Decode& p, const Run<T>& run, const Shared<T, D>& s, State<D>& state) {
    constexpr int N = KEYS / NW;  // keys of a warp
    const int warp = dev::thread() / 32, row = warp % MW * 16, key = warp / MW * N;
    state.clear();
    if (run.first < run.last) fetch(p, run, s, run.first);
    for (int tile = run.first; tile < run.last; tile++) {
        if (tile + 1 < run.last) {
            fetch(p, run, s, tile + 1);
            dev::copy_wait<1>();
        } else {
            dev::copy_wait<0>();
        }
        dev::sync_block();  // everybody's copies are there
        const int stage = (tile - run.first) % 2 * KEYS;
        float x[N / 8][4];
        multiply_keys<T, D, N>(s.q, row, s.k + stage * D, key, x);
        score<N>(p, s.seen + stage + key, run.key_of(tile) + key, run.in_prefix(tile), state.position, x);
        soften<D, N>(state, x);
        multiply_values<T, D, N>(x, s.v + stage * D, key, state.acc);
        dev::sync_block();  // nobody reads the stage that is filled next
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        state.l[i] += dev::shuffle_xor(state.l[i], 1);
        state.l[i] += dev::shuffle_xor(state.l[i], 2);
    }
}

}  // namespace prefix_attn
