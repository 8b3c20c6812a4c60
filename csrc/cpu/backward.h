// Backward: every tile once more, with the final lse. Included inside the namespace of an instruction set, after
// forward.h.

// What a block of queries gives to one tile of keys and takes from it.
struct Block {
    const float *q, *dout, *lse, *delta;  // [M][up(D)] scaled, [M][up(DV)], [M], [M]
    float *dq, *share;                    // [M][up(D)] or null, [M] or null
    float *s, *ds;                        // [M][NT]
    int64_t M;
};

void differentiate(const Call& c, const Block& x, const Keys& keys, int64_t n0, int64_t n, const Range* limits,
                   const uint8_t* mask, float* dk, int64_t ldk, float* dv, int64_t ldv) {
    const int64_t Dp = up(c.D), Vp = up(c.DV), width = up(n);
    const bool soft = x.dq || x.share || dk;  // the gradient of the logits is asked for
    product<false>(x.q, Dp, 1, keys.kt + n0 * c.D, NT, x.s, NT, x.M, width, c.D);
    if (soft) product<false>(x.dout, Vp, 1, keys.vt + n0 * c.DV, NT, x.ds, NT, x.M, width, c.DV);
    for (int64_t r = 0; r < x.M; r++) {
        float *s = x.s + r * NT, *ds = x.ds + r * NT;
        if (c.softcap) cap(c, s, width);
        alignas(64) float capped[NT];
        if (c.softcap) std::memcpy(capped, s, sizeof(capped));
        hide(s, width, limits ? limits[r].lo - n0 : 0, std::min(n, limits ? limits[r].hi - n0 : n), mask);
        vec share{};
        for (int64_t j = 0; j < width; j += VL) {
            const vec p = exponential(load(s + j) - x.lse[r]);
            store(s + j, p);
            if (soft) {
                share += p * load(ds + j);
                vec g = p * (load(ds + j) - x.delta[r]);
                if (c.softcap) {
                    const vec t = load(capped + j) * (1.f / c.softcap);
                    g *= 1.f - t * t;
                }
                store(ds + j, g);
            }
        }
        if (x.share) x.share[r] += sum(share);
    }
    if (dv) product<true>(x.s, 1, NT, x.dout, Vp, dv, ldv, n, Vp, x.M);
    if (dk) product<true>(x.ds, 1, NT, x.q, Dp, dk, ldk, n, Dp, x.M);
    if (x.dq) product<true>(x.ds, NT, 1, keys.k + n0 * keys.ldk, keys.ldk, x.dq, Dp, x.M, Dp, n);
}

int64_t backward_units(const Backward& f) {
    return f.call.HKV * f.slots;
}

// One run of the batch for one key head.
void backward(const Backward& f, const float* packed, int64_t unit) {
    const Call& c = f.call;
    const int64_t kv = unit % c.HKV, slot = unit / c.HKV, b0 = slot * c.B / f.slots, b1 = (slot + 1) * c.B / f.slots;
    const int64_t G = c.HQ / c.HKV, Dp = up(c.D), Vp = up(c.DV), D16 = (c.D + 15) / 16 * 16,
                  V16 = (c.DV + 15) / 16 * 16;
    const bool want_q = f.grad_query.data, want_kv = f.grad_key.data || f.grad_value.data;
    const bool want_prefix = f.grad_prefix_key || f.grad_prefix_value, want_sequence = want_q || want_kv || f.share;
    const float factor = query_factor(c);
    const int64_t own = keys_floats(c, c.T, true), grads = tiles(c.T) * NT * (Dp + Vp);
    float* at = scratch((want_sequence ? own + grads : 0) + BLOCK * (2 * Dp + Vp + 2 * NT + 2));
    float *q = at, *dq = q + BLOCK * Dp, *dout = dq + BLOCK * Dp, *s = dout + BLOCK * Vp, *ds = s + BLOCK * NT;
    float *lse = ds + BLOCK * NT, *delta = lse + BLOCK, *memory = delta + BLOCK;
    float *dk = memory + own, *dv = dk + tiles(c.T) * NT * Dp;
    alignas(64) float buffer[256];
    for (int64_t b = b0; b < b1; b++) {
        const Row row = row_of(c, b);
        Keys sequence{}, prefix{};
        if (want_sequence) {
            sequence = sequence_at(c, row, kv, memory, true);
            if (want_kv) std::fill(dk, dk + grads, 0.f);
        }
        float *dpk = nullptr, *dpv = nullptr;
        if (row.prefix) {
            prefix = prefix_at(c, packed, row.entry, kv, true);
            const int64_t place = ((slot * c.N + row.entry) * c.HKV + kv) * c.P;
            if (want_prefix) {
                dpk = f.grad_prefix_key + place * D16;
                dpv = f.grad_prefix_value + place * V16;
            }
        }
        for (int64_t block = 0, blocks = (row.S + BLOCK - 1) / BLOCK; block < G * blocks; block++) {
            const int64_t h = kv * G + block / blocks, i0 = block % blocks * BLOCK, M = std::min(BLOCK, row.S - i0);
            Range limits[BLOCK], any{row.length, 0};
            int64_t blind = 0;
            for (int64_t r = 0; r < M; r++) {
                const int64_t i = i0 + r, position = row.length - row.S + i, place = place_of(c, row, h, i);
                limits[r] = seen(c, row, position);
                any = {std::min(any.lo, limits[r].lo), std::max(any.hi, limits[r].hi)};
                blind += position < row.start;
                load_row(c.query, query_at(c.query, row, h, i), c.D, Dp, factor, q + r * Dp);
                load_row(f.grad_out, query_at(f.grad_out, row, h, i), c.DV, Vp, 1.f, dout + r * Vp);
                load_row(f.out, query_at(f.out, row, h, i), c.DV, Vp, 1.f, buffer);
                vec dot{};
                for (int64_t d = 0; d < Vp; d += VL)
                    dot += load(buffer + d) * load(dout + r * Vp + d);
                delta[r] = sum(dot) - (f.grad_lse ? f.grad_lse[place] : 0.f);
                // A query that sees nothing has lse = -inf; +inf makes each of its probabilities an exact 0.
                lse[r] = f.lse[place];
                if (lse[r] == -INF) {
                    lse[r] = INF;
                    delta[r] = 0;  // gradients there may be NaN
                }
            }
            if (want_q) std::fill(dq, dq + M * Dp, 0.f);
            float* share = f.share ? f.share + place_of(c, row, h, i0) : nullptr;
            const Block x{q, dout, lse, delta, want_q ? dq : nullptr, share, s, ds, M};
            if (row.prefix && blind < M && (want_q || want_prefix || f.share)) {
                const Block later{q + blind * Dp,
                                  dout + blind * Vp,
                                  lse + blind,
                                  delta + blind,
                                  want_q ? dq + blind * Dp : nullptr,
                                  share ? share + blind : nullptr,
                                  s,
                                  ds,
                                  M - blind};
                for (int64_t n0 = 0; n0 < row.prefix; n0 += NT)
                    differentiate(c, later, prefix, n0, std::min(NT, row.prefix - n0), nullptr, nullptr,
                                  dpk ? dpk + n0 * D16 : nullptr, D16, dpv ? dpv + n0 * V16 : nullptr, V16);
            }
            if (want_sequence)
                for (int64_t n0 = any.lo / NT * NT; n0 < any.hi; n0 += NT)
                    differentiate(c, x, sequence, n0, std::min(NT, any.hi - n0), limits,
                                  c.key_mask ? c.key_mask + row.b * c.T + n0 : nullptr,
                                  want_kv ? dk + n0 * Dp : nullptr, Dp, want_kv ? dv + n0 * Vp : nullptr, Vp);
            if (want_q)
                for (int64_t r = 0; r < M; r++)
                    store_row(f.grad_query, query_at(f.grad_query, row, h, i0 + r), c.D, c.scale, dq + r * Dp);
        }
        if (want_kv)
            for (int64_t j = 0; j < row.T; j++) {  // keys from length on get an exact 0
                store_row(f.grad_key, key_at(f.grad_key, row, kv, j), c.D, c.softcap ? c.softcap : 1.f, dk + j * Dp);
                store_row(f.grad_value, key_at(f.grad_value, row, kv, j), c.DV, 1.f, dv + j * Vp);
            }
    }
}
