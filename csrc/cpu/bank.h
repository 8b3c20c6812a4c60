// Rows of the batch by the bank entry that they read, found once per call: units that look for theirs would each walk
// the whole batch.
#pragma once
#include <cstdint>
#include <vector>

#include "../args.h"

namespace prefix_attn {

struct Bank {
    std::vector<int64_t> order, first;
};

// Sets ``order`` and ``first`` of a call with ids. O(B + N), and rows of one entry stay in their order. Rows without an
// entry come last.
inline Bank group_rows(Arguments& c) {
    Bank bank;
    if (!c.ids || !c.P) return bank;
    const auto entry = [&](int64_t b) { return c.ids[b] >= 0 && c.ids[b] < c.N ? c.ids[b] : c.N; };
    bank.first.assign(c.N + 2, 0);
    for (int64_t b = 0; b < c.B; b++)
        bank.first[entry(b) + 1]++;
    for (int64_t n = 0; n <= c.N; n++)
        bank.first[n + 1] += bank.first[n];
    bank.order.resize(c.B);
    std::vector<int64_t> next = bank.first;
    for (int64_t b = 0; b < c.B; b++)
        bank.order[next[entry(b)]++] = b;
    c.order = bank.order.data();
    c.first = bank.first.data();
    return bank;
}

}  // namespace prefix_attn
