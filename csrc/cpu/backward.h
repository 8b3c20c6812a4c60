// Backward: every tile once more, with the final lse. Included inside the namespace of an instruction set, after
// forward.h.

// What a block of queries gives to one tile of keys and takes from it.
template <typename T>
struct Block {
    Matrix<T> q, dout;            // [M][elements of D], [M][elements of DV]
    const T *q_down, *dout_down;  // the same for sums over queries: [elements of M][up(D)], [elements of M][up(DV)]
    const float *lse, *delta;     // [M], [M]
    float *dq, *share;            // [M][up(D)] or null, [M] or null
    float *s, *ds, *pairs;        // [M][NT], [M][NT], [M / 2][NT]
    int64_t M;
};

// A row's products with the keys become probabilities in s and, where ``ds`` is not null, gradients of the products;
// ``share``, if not null, takes what p dp adds to.
void slopes(const Arguments& c, float* s, float* ds, int64_t width, const Range& seen, const uint8_t* mask, float lse,
            float delta, float* share) {
    alignas(64) float capped[NT];
    if (c.softcap) {
        cap(c, s, width);
        std::memcpy(capped, s, sizeof(capped));
    }
    hide(s, width, seen.lo, seen.hi, mask);
    const float factor = query_factor(c);
    vec total{};
    for (int64_t j = 0; j < width; j += VL) {
        const vec p = exponential(load(s + j) - lse);
        store(s + j, p);
        if (!ds) continue;
        const vec dp = p == 0.f ? vec{} : load(ds + j);  // a hidden value may be huge, and 0 * inf is NaN
        total += p * dp;
        vec g = p * factor * (dp - delta);
        if (c.softcap) {
            const vec t = load(capped + j) * (1.f / c.softcap);
            g = p == 0.f ? vec{} : g * (1.f - t * t);
        }
        store(ds + j, g);
    }
    if (share) *share += sum(total);
}

template <typename T>
void differentiate(const Arguments& c, const Block<T>& x, const Keys<T>& keys, int64_t n0, int64_t n, const Range* limits,
                   const uint8_t* mask, float* dk, int64_t ldk, float* dv, int64_t ldv) {
    const int64_t D = elements<T>(c.D), DV = elements<T>(c.DV), Dp = up(c.D), Vp = up(c.DV), M = x.M;
    float* ds = x.dq || x.share || dk ? x.ds : nullptr;  // null: nobody asks for the gradient of the logits
    // Queries are taken ROWS at a time where they see less and less: the first ``seen`` keys.
    const int64_t step = limits ? ROWS : M, group = limits ? ROWS : n;
    const auto seen = [&](int64_t i) {
        return limits ? std::clamp<int64_t>(limits[std::min(i + step, M) - 1].hi - n0, 0, n) : n;
    };
    for (int64_t i = 0; i < M; i += step) {
        const int64_t rows = std::min(step, M - i), count = seen(i), width = up(count);
        product<false>(x.q.data + i * x.q.ld, x.q.ld, 1, keys.kt + n0 * D, NT, x.s + i * NT, NT, rows, width, D,
                       query_factor(c));
        if (ds)
            product<false>(x.dout.data + i * x.dout.ld, x.dout.ld, 1, keys.vt + n0 * DV, NT, ds + i * NT, NT, rows,
                           width, DV);
        for (int64_t r = i; r < i + rows; r++) {
            const Range all{0, count}, own = limits ? Range{limits[r].lo - n0, limits[r].hi - n0} : all;
            float *s = x.s + r * NT, *slope = ds ? ds + r * NT : nullptr;
            slopes(c, s, slope, width, {own.lo, std::min(count, own.hi)}, mask, x.lse[r], x.delta[r],
                   x.share ? x.share + r : nullptr);
            std::fill(s + width, s + up(n), 0.f);
            if (ds) std::fill(slope + width, slope + up(n), 0.f);
        }
    }
    const auto add = [&](const T* left, const T* right, int64_t size, float* to, int64_t ldt) {
        for (int64_t j = 0, i = 0; j < n; j += group) {
            while (i + step < M && seen(i) <= j)  // the first queries do not see these keys
                i += step;
            const int64_t k = i / PER<T>;
            product<true>(left + k * NT + j, 1, NT, right + k * size, size, to + j * ldt, ldt, std::min(group, n - j),
                          size, elements<T>(M - i));
        }
    };
    if (dv) add(over_rows<T>(x.s, M, up(n), x.pairs), x.dout_down, Vp, dv, ldv);
    if (dk) add(over_rows<T>(ds, M, up(n), x.pairs), x.q_down, Dp, dk, ldk);
    if (!x.dq) return;
    const T* left = over_columns<T>(ds, M, up(n));
    for (int64_t i = 0; i < M; i += step)
        product<true>(left + i * NT, NT, 1, keys.k + n0 / PER<T> * keys.ldk, keys.ldk, x.dq + i * Dp, Dp,
                      std::min(step, M - i), Dp, elements<T>(seen(i)));
}

int64_t backward_units(const Backward& f) {
    return f.args.HKV * f.slots;
}

// Rows of a block as ``Block`` has them for sums over queries.
inline const float* down(const Matrix<float>& x, int64_t, int64_t, float*) {
    return x.data;
}
inline const Pair* down(const Matrix<Pair>& x, int64_t M, int64_t width, float* to) {
    zip_rows(x, M, width, (Pair*)to);
    return (const Pair*)to;
}

// One run of the batch for one key head.
template <typename T>
void backward_run(const Backward& f, const float* packed, int64_t unit) {
    const Arguments& c = f.args;
    const int64_t kv = unit % c.HKV, slot = unit / c.HKV, b0 = slot * c.B / f.slots, b1 = (slot + 1) * c.B / f.slots;
    const int64_t G = c.HQ / c.HKV, Dp = up(c.D), Vp = up(c.DV), D16 = (c.D + 15) / 16 * 16,
                  V16 = (c.DV + 15) / 16 * 16;
    const int64_t D = up(elements<T>(c.D)), V = up(elements<T>(c.DV));
    const float divisor = c.softcap ? c.softcap : 1.f;  // of the queries, and so of the sums over them
    const bool want_q = f.grad_query.data, want_kv = f.grad_key.data || f.grad_value.data;
    const bool want_prefix = f.grad_prefix_key || f.grad_prefix_value, want_sequence = want_q || want_kv || f.share;
    const int64_t own = keys_floats<T>(c, c.T, true), grads = tiles(c.T) * NT * (Dp + Vp);
    float* at = scratch((want_sequence ? own + grads : 0) + BLOCK * (D + V + 2 * Dp + Vp + 3 * NT + 2));
    float *q = at, *dout = q + BLOCK * D, *q_down = dout + BLOCK * V, *dout_down = q_down + BLOCK * Dp;
    float *dq = dout_down + BLOCK * Vp, *s = dq + BLOCK * Dp, *ds = s + BLOCK * NT, *pairs = ds + BLOCK * NT;
    float *lse = pairs + BLOCK * NT, *delta = lse + BLOCK, *memory = delta + BLOCK;
    float *dk = memory + own, *dv = dk + tiles(c.T) * NT * Dp;
    alignas(64) T buffer[256];
    for (int64_t b = b0; b < b1; b++) {
        const Row row = row_of(c, b);
        Keys<T> sequence{}, prefix{};
        if (want_sequence) {
            sequence = sequence_at<T>(c, row, kv, memory, true);
            if (want_kv) std::fill(dk, dk + grads, 0.f);
        }
        float *dpk = nullptr, *dpv = nullptr;
        if (row.prefix) {
            prefix = prefix_at<T>(c, packed, row.entry, kv, true);
            const int64_t place = ((slot * c.N + row.entry) * c.HKV + kv) * c.P;
            if (want_prefix) {
                dpk = f.grad_prefix_key + place * D16;
                dpv = f.grad_prefix_value + place * V16;
            }
        }
        for (int64_t block = 0, blocks = (row.S + BLOCK - 1) / BLOCK; block < G * blocks; block++) {
            const int64_t h = kv * G + block / blocks, i0 = block % blocks * BLOCK, M = std::min(BLOCK, row.S - i0);
            const View view = view_of(c, row, i0, M);
            for (int64_t r = 0; r < M; r++) {
                const int64_t i = i0 + r, place = place_of(c, row, h, i);
                const int64_t later = std::min(i + 4, row.S - 1);  // rows of models lie far apart
                fetch(c.query, query_at(c.query, row, h, later), 1, c.D);
                fetch(f.grad_out, query_at(f.grad_out, row, h, later), 1, c.DV);
                fetch(f.out, query_at(f.out, row, h, later), 1, c.DV);
                load_row(c.query, query_at(c.query, row, h, i), c.D, D, (T*)q + r * D);
                load_row(f.grad_out, query_at(f.grad_out, row, h, i), c.DV, V, (T*)dout + r * V);
                load_row(f.out, query_at(f.out, row, h, i), c.DV, V, buffer);
                vec dot{};
                for (int64_t d = 0; d < V; d += VL)
                    dot = step(dot, operand(buffer + d), operand((const T*)dout + r * V + d));
                delta[r] = sum(dot) - (f.grad_lse ? f.grad_lse[place] : 0.f);
                // A query that sees nothing has lse = -inf; +inf makes each of its probabilities an exact 0.
                lse[r] = f.lse[place];
                if (lse[r] == -INF) {
                    lse[r] = INF;
                    delta[r] = 0;  // gradients there may be NaN
                }
            }
            if (want_q) std::fill(dq, dq + M * Dp, 0.f);
            const Matrix<T> queries{(const T*)q, D}, upstream{(const T*)dout, V};
            const Block<T> x{queries,
                             upstream,
                             down(queries, M, Dp, q_down),
                             down(upstream, M, Vp, dout_down),
                             lse,
                             delta,
                             want_q ? dq : nullptr,
                             f.share ? f.share + place_of(c, row, h, i0) : nullptr,
                             s,
                             ds,
                             pairs,
                             M};
            if (row.prefix && view.blind < M && (want_q || want_prefix || f.share))
                for (int64_t n0 = 0; n0 < row.prefix; n0 += NT)
                    differentiate(c, x, prefix, n0, std::min(NT, row.prefix - n0), view.blind ? view.prefix : nullptr,
                                  nullptr, dpk ? dpk + n0 * D16 : nullptr, D16, dpv ? dpv + n0 * V16 : nullptr, V16);
            if (want_sequence)
                for (int64_t n0 = view.any.lo / NT * NT; n0 < view.any.hi; n0 += NT)
                    differentiate(c, x, sequence, n0, std::min(NT, view.any.hi - n0), view.own,
                                  c.key_mask ? c.key_mask + row.b * c.T + n0 : nullptr,
                                  want_kv ? dk + n0 * Dp : nullptr, Dp, want_kv ? dv + n0 * Vp : nullptr, Vp);
            if (want_q)
                for (int64_t r = 0; r < M; r++)
                    store_row(f.grad_query, query_at(f.grad_query, row, h, i0 + r), c.D, divisor, dq + r * Dp);
        }
        if (want_kv)
            for (int64_t j = 0; j < row.T; j++) {  // keys from length on get an exact 0
                store_row(f.grad_key, key_at(f.grad_key, row, kv, j), c.D, divisor, dk + j * Dp);
                store_row(f.grad_value, key_at(f.grad_value, row, kv, j), c.DV, 1.f, dv + j * Vp);
            }
    }
}
