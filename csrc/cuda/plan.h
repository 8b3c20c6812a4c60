// What the decode kernel is given, and how a call is cut into blocks. Host C++, shared by the op, the kernel and tests.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../args.h"

namespace prefix_attn {

constexpr int THREADS = 128, KEYS = 64, TILE = 64;  // of a block; keys and queries of a tile
constexpr float LOG2E = 1.4426950408889634f;

// What the choice between the ways to cut a call depends on. The numbers are predictions: see docs/kernels.md.
struct Machine {
    int processors = 132;
    int64_t fold_bytes = 4 << 20;  // reads of the prefix from the L2 cache that folding saves: about 1 us of them
    int split_keys = 128;          // a run of fewer costs more in the sum of the runs than it saves
};

// A unit is one row of the batch, or an equal part of one whose G * S queries of a key head are more than a tile.
struct Plan {
    int chunks = 1, rows = 1;  // units of a row of the batch, queries of a unit
    int units = 0;             // B * chunks
    int tile_units = 1;        // units whose queries are folded into one tile
    int tiles = 0, folded = 0; // folded tiles of a key head, runs of the prefix for each of them; 0: not folded
    int splits = 1;            // runs of a unit's own keys (and of the prefix, where it is not folded)

    constexpr int parts() const { return folded + splits; }
    constexpr int64_t blocks(int HKV) const {
        return int64_t(HKV) * (int64_t(tiles) * folded + int64_t(units) * splits);
    }
    constexpr int64_t slot_rows(int HKV) const { return int64_t(HKV) * units * rows; }
};

struct Integers {  // int32 or int64
    const void* data = nullptr;
    bool wide = false;
};

struct Decode {
    Array query;                        // (B, HQ, S, D)
    Array key, value;                   // (B, HKV, T, D)
    Array prefix_key, prefix_value;     // (N, HKV, P, D)
    Array out;                          // (B, HQ, S, D), written
    float* lse = nullptr;               // (B, HQ, S) natural logarithm, written
    float* slots_out = nullptr;         // (parts, units, HKV, rows, D) what the parts of a softmax leave
    float* slots_lse = nullptr;         // (parts, units, HKV, rows) in units of log 2
    int* arrived = nullptr;             // (units, HKV) parts that are there; zeros at first
    Integers ids;                       // (B) bank entries; null: entry b where N > 1, else 0
    Integers prefix_lengths;            // (N)
    Integers key_lengths;               // (B)
    const uint8_t* key_mask = nullptr;  // (B, T), 1 = visible
    const void* sinks = nullptr;        // (HQ)
    bool sinks_float = true;            // else in query's type
    bool causal = true;
    int B = 0, HKV = 0, G = 0, S = 0, T = 0, P = 0, N = 1, D = 0;
    int window = 0;                 // 0: none
    float scale = 1, softcap = 0;   // in units of log 2: logit = scale * q.k, or softcap * tanh(scale * q.k)
    Plan plan;
};

inline int64_t ceil_div(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

// Whether the queries of many units are folded into tiles that read the prefix once. With ids a tile walks every entry
// that its rows have, so that it pays only where rows share them.
inline bool folds(const Decode& c, const Plan& plan, const Machine& machine) {
    if (!c.P || (c.N != 1 && (!c.ids.data || c.N * 4 > plan.tile_units))) return false;
    const int64_t shared = std::max<int64_t>(c.B - c.N, 0);  // each entry must be read once in any case
    return shared * c.HKV * c.P * c.D * 4 >= machine.fold_bytes;
}

// Two blocks fit a processor: runs are cut until there are as many. Depends on sizes alone, never on values, so that a
// graph that was captured stays right.
inline Plan make_plan(const Decode& c, const Machine& machine) {
    Plan plan;
    const int64_t group = int64_t(c.S) * c.G, wanted = 2 * machine.processors;
    plan.chunks = (int)ceil_div(group, TILE);
    plan.rows = (int)ceil_div(group, plan.chunks);
    plan.units = c.B * plan.chunks;
    plan.tile_units = TILE / plan.rows;
    int64_t keys = c.window ? std::min<int64_t>(c.T, int64_t(c.window) + c.S - 1) : c.T;
    if (folds(c, plan, machine)) {
        plan.tiles = (int)ceil_div(plan.units, plan.tile_units);
        const int64_t most = ceil_div(c.P, KEYS);
        plan.folded = (int)std::clamp<int64_t>(wanted / (int64_t(plan.tiles) * c.HKV), 1, most);
    } else {
        keys += c.P;
    }
    const int64_t most = std::max<int64_t>(keys / machine.split_keys, 1);
    plan.splits = (int)std::clamp<int64_t>(wanted / (int64_t(plan.units) * c.HKV), 1, most);
    return plan;
}

// The type and head size are the kernel's; a head that is smaller than the kernel's is padded in shared memory.
constexpr int shared_bytes(int head) {
    return (TILE + 4 * KEYS) * head * 2 + 4 * TILE * 2 * 4 + 2 * KEYS + TILE * 4;
}

}  // namespace prefix_attn
