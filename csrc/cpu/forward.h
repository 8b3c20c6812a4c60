// Forward: online softmax over the prefix's tiles, then the sequence's. Included inside the namespace of an instruction
// set, after keys.h.

float query_factor(const Arguments& c) {
    return c.softcap ? c.scale / c.softcap : c.scale;
}

// From products to logits.
void cap(const Arguments& c, float* s, int64_t width) {
    for (int64_t j = 0; j < width; j += VL) {
        const vec x = load(s + j), positive = x < vec{} ? -x : x;
        const vec e = exponential(positive * -2.f);
        const vec t = (1.f - e) / (1.f + e), y = x * x;
        const vec small = x * (1.f + y * (-0.33333333f + y * (0.13333333f - y * 0.053968254f)));  // 1 - e would cancel
        store(s + j, (positive < 0.1f ? small : x < vec{} ? -t : t) * c.softcap);
    }
}

// -inf where the query sees no key: outside [lo, hi) of the tile, and under the mask.
void hide(float* s, int64_t width, int64_t lo, int64_t hi, const uint8_t* mask) {
    for (int64_t j = 0; j < std::min(lo, width); j++)
        s[j] = -INF;
    for (int64_t j = std::max<int64_t>(hi, 0); j < width; j++)
        s[j] = -INF;
    if (mask)
        for (int64_t j = std::max<int64_t>(lo, 0); j < std::min(hi, width); j++)
            if (!mask[j]) s[j] = -INF;
}

// The running softmax of M queries, rows of ``acc`` up(DV) apart. A sum is kept in VL lanes until the end.
struct State {
    float *m, *l, *acc;
};

int64_t state_floats(const Arguments& c, int64_t M) {
    return M * (1 + VL + up(c.DV));
}

State state_at(const Arguments& c, float* at, int64_t M) {
    const State x{at + M * (VL + up(c.DV)), at + M * up(c.DV), at};
    std::fill(x.m, x.m + M, -INF);
    std::fill(at, x.m, 0.f);
    return x;
}

// Row r's step: s[0..width) become probabilities relative to the row's m. It follows the maximum only where it falls
// behind by more than SLACK: scaling the accumulator for each new maximum costs more than a few bits of headroom.
void soften(float* s, int64_t width, const State& x, int64_t r, int64_t Vp) {
    vec most = load(s);
    for (int64_t j = VL; j < width; j += VL)
        most = max(most, load(s + j));
    float &m = x.m[r], *l = x.l + r * VL, *acc = x.acc + r * Vp;
    const float top = largest(most)[0];
    vec total = load(l);
    if (top > m + SLACK) {
        if (m != -INF) {
            const vec alpha = exponential(all(m - top));
            total *= alpha;
            for (int64_t d = 0; d < Vp; d += VL)
                store(acc + d, load(acc + d) * alpha);
        }
        m = top;
    }
    const float pivot = m == -INF ? 0.f : m;
    for (int64_t j = 0; j < width; j += VL) {
        const vec p = exponential(load(s + j) - pivot);
        store(s + j, p);
        total += p;
    }
    store(l, total);
}

void finish(const Forward& f, const Row& row, int64_t h, int64_t i, const State& x, int64_t r) {
    const Arguments& c = f.args;
    float m = x.m[r], l = sum(load(x.l + r * VL)), factor = 1.f;
    if (c.sinks) {
        const float sink = c.sinks[h], top = std::max(m, sink), pivot = top == -INF ? 0.f : top;
        factor = std::exp(m - pivot);
        l = l * factor + std::exp(sink - pivot);
        m = top;
    }
    f.lse[place_of(c, row, h, i)] = l == 0.f ? -INF : m + std::log(l);
    store_row(f.out, query_at(f.out, row, h, i), c.DV, l == 0.f ? 0.f : factor / l, x.acc + r * up(c.DV));
}

// A bank entry's keys for one head.
template <typename T>
Keys<T> prefix_at(const Arguments& c, const float* packed, int64_t entry, int64_t head, bool backward) {
    const Array &k = c.prefix_key, &v = c.prefix_value;
    return keys_at<T>(c, k, entry * k.batch + head * k.head, v, entry * v.batch + head * v.head, c.P,
                      packed + (entry * c.HKV + head) * keys_floats<T>(c, c.P, backward), backward, false);
}

// The row's own keys for one head, packed at ``at``.
template <typename T>
Keys<T> sequence_at(const Arguments& c, const Row& row, int64_t kv, float* at, bool backward) {
    const int64_t key0 = key_at(c.key, row, kv, 0), value0 = key_at(c.value, row, kv, 0);
    const int64_t first =
        seen(c, row, row.length - row.S).lo / NT * NT;  // no query sees a key before the first's window
    const uint8_t* mask = c.key_mask ? c.key_mask + row.b * c.T : nullptr;
    pack_keys<T>(c, c.key, key0, c.value, value0, row.length, backward, mask, at, first, row.length);
    return keys_at<T>(c, c.key, key0, c.value, value0, row.length, at, backward, mask);
}

// M queries against the n keys of the tile at n0; ``limits`` null = all are visible.
template <typename T>
void attend(const Arguments& c, const Matrix<T>& q, int64_t M, const Keys<T>& keys, int64_t n0, int64_t n,
            const Range* limits, const uint8_t* mask, float* s, const State& x) {
    const int64_t D = elements<T>(c.D), Vp = up(c.DV), step = limits ? ROWS : M;
    for (int64_t i = 0; i < M; i += step) {
        const int64_t rows = std::min(step, M - i), seen = limits ? std::min(n, limits[i + rows - 1].hi - n0) : n;
        if (seen <= 0) continue;
        const int64_t width = up(seen);
        product<false>(q.data + i * q.ld, q.ld, 1, keys.kt + n0 * D, NT, s, NT, rows, width, D, query_factor(c));
        for (int64_t r = 0; r < rows; r++) {
            if (c.softcap) cap(c, s + r * NT, width);
            const Range all = {0, seen}, own = limits ? Range{limits[i + r].lo - n0, limits[i + r].hi - n0} : all;
            hide(s + r * NT, width, own.lo, std::min(seen, own.hi), mask);
            soften(s + r * NT, width, x, i + r, Vp);
        }
        product<true>(over_columns<T>(s, rows, width), NT, 1, keys.v + n0 / PER<T> * keys.ldv, keys.ldv, x.acc + i * Vp,
                      Vp, rows, Vp, elements<T>(seen));
    }
}

// Training and prefill: all queries of one row and key head ---------------------------------------------------------

int64_t parts(const Arguments& c) {  // units that share a row and key head, so that a small batch feeds every thread
    const int64_t heads = std::max<int64_t>(c.B * c.HKV, 1), blocks = c.HQ / c.HKV * ((c.S + BLOCK - 1) / BLOCK);
    return std::max<int64_t>(1, std::min(blocks, 16 / heads));
}

// What a block of queries sees: of the sequence each query and all together, of the prefix each, if some see none.
struct View {
    Range own[BLOCK], prefix[BLOCK], any;
    int64_t blind;  // queries before the prefix's start: the first ones
};

View view_of(const Arguments& c, const Row& row, int64_t i0, int64_t M) {
    View x;
    x.any = {row.length, 0};
    x.blind = 0;
    for (int64_t r = 0; r < M; r++) {
        const int64_t position = row.length - row.S + i0 + r;
        x.own[r] = seen(c, row, position);
        x.any = {std::min(x.any.lo, x.own[r].lo), std::max(x.any.hi, x.own[r].hi)};
        x.blind += position < row.start;
        x.prefix[r] = {0, position < row.start ? 0 : row.prefix};
    }
    return x;
}

template <typename T>
void forward_many(const Forward& f, const float* packed, int64_t unit) {
    const Arguments& c = f.args;
    const int64_t P = parts(c), part = unit % P, kv = unit / P % c.HKV, b = unit / P / c.HKV;
    const Row row = row_of(c, b);
    const int64_t G = c.HQ / c.HKV, D = elements<T>(c.D), blocks = (row.S + BLOCK - 1) / BLOCK;
    const int64_t own = keys_floats<T>(c, row.length, false);
    float* at = scratch(own + BLOCK * (up(D) + NT) + state_floats(c, BLOCK));
    const Keys<T> sequence = sequence_at<T>(c, row, kv, at, false);
    float *q = at + own, *s = q + BLOCK * up(D);
    for (int64_t block = part; block < G * blocks; block += P) {
        const int64_t h = kv * G + block / blocks, i0 = block % blocks * BLOCK, M = std::min(BLOCK, row.S - i0);
        const View view = view_of(c, row, i0, M);
        const Matrix<T> queries{(const T*)q, D};
        for (int64_t r = 0; r < M; r++)
            load_row(c.query, query_at(c.query, row, h, i0 + r), c.D, D, (T*)q + r * D);
        const State x = state_at(c, s + BLOCK * NT, M);
        if (row.prefix && view.blind < M) {
            const Keys<T> prefix = prefix_at<T>(c, packed, row.entry, kv, false);
            for (int64_t n0 = 0; n0 < row.prefix; n0 += NT)
                attend(c, queries, M, prefix, n0, std::min(NT, row.prefix - n0), view.blind ? view.prefix : nullptr,
                       nullptr, s, x);
        }
        for (int64_t n0 = view.any.lo / NT * NT; n0 < view.any.hi; n0 += NT)
            attend(c, queries, M, sequence, n0, std::min(NT, view.any.hi - n0), view.own,
                   c.key_mask ? c.key_mask + row.b * c.T + n0 : nullptr, s, x);
        for (int64_t r = 0; r < M; r++)
            finish(f, row, h, i0 + r, x, r);
    }
}
