// Decoding: few queries for each of many rows of the batch, bound by reading keys and values. One launch.
//
// Softmax over [prefix ; sequence] is cut into parts, each with its own maximum m and sum l of exp2(s - m):
//
//     out = sum_parts w_part out_part,   w_part = exp2(lse_part - lse),   lse = log2 sum_parts exp2(lse_part)
//
// in units of log 2. A block makes one part for the queries of a tile, and leaves (out_part, lse_part) in a slot.
//
//     block                    queries                           keys
//     fold (tile, h, run)      of many rows, up to 64            a run of the prefix, of each entry that they read
//     split (unit, h, run)     of one row, up to 64              a run of its own keys, and of the prefix if not folded
//
// So a fold block reads a prefix tile once for 64 queries, and a split block a key once for all G heads of the group.
// Each block counts itself in, for each of its units. Who finds all other parts there adds up the slots, in their
// order: which block that is changes from run to run, the sum does not.
//
// A fold block walks the entries of its rows one by one, each into registers of its own: an entry that holds NaN must
// not reach rows that do not read it. attend.cuh has the loop over keys.
//
// Bytes read from keys and values: 2 D itemsize HKV (P tiles + sum of lengths * chunks); see Plan for the sizes.
#pragma once
#include "attend.cuh"

namespace prefix_attn {

// A block's queries: those of ``units`` units from ``unit`` on, of key head h; in a fold block of rows with ``entry``.
struct Queries {
    int unit, units, h, entry;
    static constexpr int ANY = -2;
};

struct Query {
    int unit, b, x;  // x = g * S + s; negative: row r of the tile holds none
};

DEVICE Query query_of(const Decode& p, const Queries& of, int r) {
    const int at = r / p.plan.rows, unit = of.unit + at, b = unit / p.plan.chunks;
    const int x = unit % p.plan.chunks * p.plan.rows + r % p.plan.rows;
    if (at >= of.units || x >= p.S * p.G) return {of.unit, 0, -1};
    if (of.entry != Queries::ANY && entry_of(p, b) != of.entry) return {unit, b, -1};
    return {unit, b, x};
}

DEVICE int64_t slot_row(const Decode& p, int unit, int h, int r) {
    return (int64_t(unit) * p.HKV + h) * p.plan.rows + r % p.plan.rows;
}

// The block's queries, into shared memory.
template <typename T, int D>
DEVICE void fetch_queries(const Decode& p, const Queries& of, const Shared<T, D>& s, int rows) {
    for (int i = dev::thread(); i < rows * (D / 8); i += THREADS) {
        const int r = i / (D / 8), c = i % (D / 8);
        const Query at = query_of(p, {of.unit, of.units, of.h, Queries::ANY}, r);
        const bool valid = at.x >= 0 && c * 8 < p.D;
        const int64_t g = valid ? at.x / p.S : 0, i_s = valid ? at.x % p.S : 0;
        const T* from = head_of<T>(p.query, at.b, int64_t(of.h) * p.G + g) + i_s * p.query.row;
        dev::copy_async(s.q + swizzled<D>(r, c), from + (valid ? c * 8 : 0), valid);
    }
    dev::copy_commit();
}

// The sum over the NW warps along keys, in their order, into the registers of the last of them.
template <typename T, int D, int MW, int NW>
DEVICE void add_warps(const Shared<T, D>& s, State<D>& state) {
    const int lane = dev::thread() % 32, warp = dev::thread() / 32, wn = warp / MW;
    const int row = warp % MW * 16 + lane / 4;
    constexpr int ROWS = MW * 16, STRIDE = D + 4;
    float* sums = reinterpret_cast<float*>(s.k);  // which nobody reads any more
    if (lane % 4 == 0)
        for (int i = 0; i < 2; i++) {
            s.row[(wn * ROWS + row + i * 8) * 2] = state.m[i];
            s.row[(wn * ROWS + row + i * 8) * 2 + 1] = state.l[i];
        }
    dev::sync_block();
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float* pair = s.row + (row + i * 8) * 2;
        float top = -INFINITY, sum = 0;
        for (int w = 0; w < NW; w++) top = fmaxf(top, pair[w * ROWS * 2]);
        const float pivot = top == -INFINITY ? 0.f : top;
        for (int w = 0; w < NW; w++) sum += pair[w * ROWS * 2 + 1] * dev::exp2(pair[w * ROWS * 2] - pivot);
        factor[i] = dev::exp2(state.m[i] - pivot);
        state.m[i] = top;
        state.l[i] = sum;
    }
#pragma unroll 1
    for (int w = 0; w < NW; w++) {
        if (wn == w)
#pragma unroll
            for (int i = 0; i < D / 8; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    float* to = sums + (row + j / 2 * 8) * STRIDE + i * 8 + lane % 4 * 2 + j % 2;
                    state.acc[i][j] = state.acc[i][j] * factor[j / 2] + (w ? *to : 0.f);
                    if (w < NW - 1) *to = state.acc[i][j];
                }
        dev::sync_block();
    }
}

// The part of the block's queries, into slot ``slot``.
template <typename T, int D, int MW, int NW>
DEVICE void leave(const Decode& p, const Queries& of, const Shared<T, D>& s, int slot, State<D>& state) {
    if constexpr (NW > 1) add_warps<T, D, MW, NW>(s, state);
    const int lane = dev::thread() % 32, warp = dev::thread() / 32;
    if (warp / MW != NW - 1) return;
    const int64_t from = slot * p.plan.slot_rows(p.HKV);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int r = warp % MW * 16 + lane / 4 + i * 8;
        const Query at = query_of(p, of, r);
        if (at.x < 0) continue;
        const int64_t row = from + slot_row(p, at.unit, of.h, r);
        const float inverse = state.l[i] == 0 ? 0.f : dev::reciprocal(state.l[i]);
        float* to = p.slots_out + row * p.D;
#pragma unroll
        for (int n = 0; n < D / 8; n++) {
            if (n * 8 >= p.D) break;
            to[n * 8 + lane % 4 * 2] = state.acc[n][i * 2] * inverse;
            to[n * 8 + lane % 4 * 2 + 1] = state.acc[n][i * 2 + 1] * inverse;
        }
        if (lane % 4 == 0) p.slots_lse[row] = state.l[i] == 0 ? -INFINITY : state.m[i] + dev::log2(state.l[i]);
    }
}

// All parts of a unit, in their order, and the sink.
template <typename T>
DEVICE void add_up(const Decode& p, int unit, int h) {
    const int64_t part = p.plan.slot_rows(p.HKV);
    const int parts = p.plan.parts(), vectors = p.D / 4;
    for (int i = dev::thread(); i < p.plan.rows * vectors; i += THREADS) {
        const int r = i / vectors, d = i % vectors * 4;
        const Query at = query_of(p, {unit, 1, h, Queries::ANY}, r);
        if (at.x < 0) continue;
        const int64_t row = slot_row(p, unit, h, r), head = int64_t(h) * p.G + at.x / p.S;
        float top = -INFINITY, sum = 0, x[4] = {0, 0, 0, 0};
        if (p.sinks)
            top = LOG2E * (p.sinks_float ? static_cast<const float*>(p.sinks)[head]
                                         : Math<T>::widen(static_cast<const T*>(p.sinks)[head]));
        const float sink = top;
        for (int k = 0; k < parts; k++) top = fmaxf(top, p.slots_lse[k * part + row]);
        const float pivot = top == -INFINITY ? 0.f : top;
        sum = dev::exp2(sink - pivot);
        for (int k = 0; k < parts; k++) {
            const float lse = p.slots_lse[k * part + row];
            if (lse == -INFINITY) continue;  // its slot may be empty
            const float weight = dev::exp2(lse - pivot);
            sum += weight;
#pragma unroll
            for (int j = 0; j < 4; j++) x[j] += weight * p.slots_out[(k * part + row) * p.D + d + j];
        }
        const float inverse = sum == 0 ? 0.f : dev::reciprocal(sum);
        T* to = const_cast<T*>(head_of<T>(p.out, at.b, head)) + at.x % p.S * p.out.row + d;
        reinterpret_cast<uint32_t*>(to)[0] = Math<T>::pack(x[0] * inverse, x[1] * inverse);
        reinterpret_cast<uint32_t*>(to)[1] = Math<T>::pack(x[2] * inverse, x[3] * inverse);
        if (d == 0)
            p.lse[(int64_t(at.b) * p.HKV * p.G + head) * p.S + at.x % p.S] =
                sum == 0 ? -INFINITY : (top + dev::log2(sum)) / LOG2E;
    }
}

// Counts this block in for each of its units, and adds up those of which it is the last part.
template <typename T>
DEVICE void arrive(const Decode& p, const Queries& of, int* last) {
    dev::copy_wait<0>();  // of an empty run: the queries
    dev::sync_block();    // every thread's slots come before the one that announces them
    if (dev::thread() < of.units)
        last[dev::thread()] =
            dev::count(p.arrived + int64_t(of.unit + dev::thread()) * p.HKV + of.h) == p.plan.parts() - 1;
    dev::sync_block();
    for (int i = 0; i < of.units; i++)
        if (last[i]) add_up<T>(p, of.unit + i, of.h);
}

// One run of the prefix for the queries of many rows.
template <typename T, int D>
DEVICE Queries fold(const Decode& p, const Shared<T, D>& s, int block) {
    const int run = block % p.plan.folded, h = block / p.plan.folded % p.HKV, tile = block / p.plan.folded / p.HKV;
    const int unit = tile * p.plan.tile_units;
    Queries of{unit, smaller(p.plan.tile_units, p.plan.units - unit), h, -1};
    fetch_queries(p, of, s, TILE);
    // Rows that read no entry leave an empty part.
    if (dev::thread() < TILE) {
        const Query at = query_of(p, of, dev::thread());
        if (at.x >= 0) p.slots_lse[run * p.plan.slot_rows(p.HKV) + slot_row(p, at.unit, h, dev::thread())] = -INFINITY;
    }
    const int b0 = unit / p.plan.chunks, b1 = (unit + of.units - 1) / p.plan.chunks;
    State<D> state;
    state.position[0] = state.position[1] = 0;
    while (true) {
        int entry = p.N;  // the next one that a row of the tile has
        for (int b = b0; b <= b1; b++) {
            const int other = entry_of(p, b);
            if (other > of.entry && other < entry) entry = other;
        }
        if (entry == p.N) break;
        of.entry = entry;
        Run<T> keys{};
        keys.prefix_key = head_of<T>(p.prefix_key, entry, h);
        keys.prefix_value = head_of<T>(p.prefix_value, entry, h);
        keys.prefix = clamped(p.prefix_lengths, entry, p.P);
        keys.prefix_tiles = (keys.prefix + KEYS - 1) / KEYS;
        keys.take(keys.prefix_tiles, run, p.plan.folded);
        attend<T, D, 4, 1>(p, keys, s, state);
        leave<T, D, 4, 1>(p, of, s, run, state);
    }
    return of;
}

// One run of a unit's own keys, and of the prefix where it is not folded.
template <typename T, int D, int MW, int NW>
DEVICE Queries split(const Decode& p, const Shared<T, D>& s, int block) {
    const int run = block % p.plan.splits, h = block / p.plan.splits % p.HKV, unit = block / p.plan.splits / p.HKV;
    const Queries of{unit, 1, h, Queries::ANY};
    fetch_queries(p, of, s, MW * 16);
    const int b = unit / p.plan.chunks, entry = p.P && !p.plan.folded ? entry_of(p, b) : -1;
    Run<T> keys{};
    if (entry >= 0) {
        keys.prefix_key = head_of<T>(p.prefix_key, entry, h);
        keys.prefix_value = head_of<T>(p.prefix_value, entry, h);
        keys.prefix = clamped(p.prefix_lengths, entry, p.P);
        keys.prefix_tiles = (keys.prefix + KEYS - 1) / KEYS;
    }
    keys.key = head_of<T>(p.key, b, h);
    keys.value = head_of<T>(p.value, b, h);
    keys.mask = p.key_mask ? p.key_mask + int64_t(b) * p.T : nullptr;
    keys.length = clamped(p.key_lengths, b, p.T);
    if (p.window) keys.skipped = larger(keys.length - p.S - p.window + 1, 0) / KEYS;
    keys.take(keys.prefix_tiles + larger((keys.length + KEYS - 1) / KEYS - keys.skipped, 0), run, p.plan.splits);
    State<D> state;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const Query at = query_of(p, of, dev::thread() / 32 % MW * 16 + dev::thread() % 32 / 4 + i * 8);
        state.position[i] = keys.length - p.S + (at.x < 0 ? 0 : at.x % p.S);
    }
    attend<T, D, MW, NW>(p, keys, s, state);
    leave<T, D, MW, NW>(p, of, s, p.plan.folded + run, state);
    return of;
}

// T half or bfloat; D 64 or 128, at least the head size; ROWS 16 or 64, at least the queries of a unit.
template <typename T, int D, int ROWS>
KERNEL(THREADS) decode(ARGUMENT(Decode) p) {
    const Shared<T, D> s{dev::Arena()};
    const int folds = p.plan.tiles * p.HKV * p.plan.folded, block = dev::block();
    constexpr int MW = ROWS / 16, NW = 4 / MW;
    arrive<T>(p, block < folds ? fold(p, s, block) : split<T, D, MW, NW>(p, s, block - folds), s.last);
}

}  // namespace prefix_attn
