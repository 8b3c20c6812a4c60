// Decoding: few queries for each of many samples. Included inside the namespace of an instruction set, after forward.h.
//
// Queries of all samples that share a prefix lie in the lanes of vectors, and elements of the prefix are broadcast:
// nothing of it is copied or transposed. Few queries would leave most lanes empty: then a tile's keys lie there. Both
// ways add up in the same order, so a query's bits do not depend on who else reads the prefix. Each sample's own keys
// are then read once, where they lie.

// A block of up to NT queries against a prefix, transposed.
template <typename T>
struct Lanes {
    T* q;                        // [elements of D][NT]
    float *s, *acc, *m, *l, *p;  // [NT][NT] keys by queries, [DV][NT], [NT], [VL][NT], [elements of NT][NT] s once more
};

template <typename T>
int64_t lanes_floats(const Arguments& c) {
    return (elements<T>(c.D) + NT + c.DV + 1 + VL + NT / 2) * NT;
}

template <typename T>
Lanes<T> lanes_at(const Arguments& c, float* at) {
    float *s = at + elements<T>(c.D) * NT, *acc = s + NT * NT, *m = acc + c.DV * NT, *l = m + NT;
    return {(T*)at, s, acc, m, l, l + VL * NT};
}

// ``soften`` for n keys and a vector of queries at a time. As there, key i adds to part i % VL of a query's sum.
template <typename T>
void soften_lanes(const Arguments& c, const Lanes<T>& x, int64_t n, int64_t width) {
    for (int64_t j = 0; j < width; j += VL) {
        vec top = load(x.s + j), m = load(x.m + j);
        for (int64_t i = 1; i < n; i++)
            top = max(top, load(x.s + i * NT + j));
        const veci grows = top > m + SLACK;
        bool any = false;
        for (int i = 0; i < VL; i++)
            any |= grows[i] != 0;
        if (any) {
            const vec alpha = grows ? exponential(m - top) : all(1.f);
            m = grows ? top : m;
            store(x.m + j, m);
            for (int64_t i = 0; i < VL; i++)
                store(x.l + i * NT + j, load(x.l + i * NT + j) * alpha);
            for (int64_t d = 0; d < c.DV; d++)
                store(x.acc + d * NT + j, load(x.acc + d * NT + j) * alpha);
        }
        const vec pivot = m == all(-INF) ? vec{} : m;
        for (int64_t i = 0; i < n; i++) {
            const vec p = exponential(load(x.s + i * NT + j) - pivot);
            store(x.s + i * NT + j, p);
            float* l = x.l + i % VL * NT + j;
            store(l, load(l) + p);
        }
    }
}

// Values as the products read them: pairs are of two rows. ``mask`` null: none is hidden.
inline Matrix<float> values_of(const Array& x, int64_t at, int64_t n, int64_t size, int64_t width, const uint8_t* mask,
                               float* to) {
    return visible(x, at, n, size, width, mask, to);
}
inline Matrix<Pair> values_of(const Array& x, int64_t at, int64_t n, int64_t size, int64_t width, const uint8_t* mask,
                              Pair* to) {
    Pair* zipped = to + NT * 128;
    zip_rows(visible(x, at, n, size, elements<Pair>(width), mask, to), n, width, zipped);
    return {zipped, width};
}

// acc[M][up(DV)] += p v, by M rows of n probabilities, NT apart, that are used up, and n values at ``at``.
inline void add_values(const Arguments& c, float* p, int64_t M, int64_t at, int64_t n, const Array& value,
                       const uint8_t* mask, float* rows_of_tile, float* acc) {
    const int64_t Vp = up(c.DV);
    const Matrix<float> v = values_of(value, at, n, c.DV, Vp, mask, rows_of_tile);
    product<true>(p, NT, 1, v.data, v.ld, acc, Vp, M, Vp, n);
}
inline void add_values(const Arguments& c, float* p, int64_t M, int64_t at, int64_t n, const Array& value,
                       const uint8_t* mask, Pair* rows_of_tile, float* acc) {
    const int64_t Vp = up(c.DV);
    const Pair* pairs = over_columns<Pair>(p, M, up(n));
    if (M <= ZIPPED) {  // zipped values would be written and read for few products
        const Matrix<Pair> v = visible(value, at, n, c.DV, up(elements<Pair>(c.DV)), mask, rows_of_tile);
        for (int64_t r = 0; r < M; r += 2)
            if (r + 1 < M)
                product_of_rows<2>(pairs + r * NT, NT, v.data, v.ld, acc + r * Vp, Vp, Vp, n);
            else
                product_of_rows<1>(pairs + r * NT, NT, v.data, v.ld, acc + r * Vp, Vp, Vp, n);
    } else {
        const Matrix<Pair> v = values_of(value, at, n, c.DV, Vp, mask, rows_of_tile);
        product<true>(pairs, NT, 1, v.data, v.ld, acc, Vp, M, Vp, elements<Pair>(n));
    }
}

// One head of a bank entry for the M queries at q, rows r0 and on of ``state``.
template <typename T>
void attend_in_lanes(const Arguments& c, const Row& row, int64_t kv, const T* q, int64_t M, const Lanes<T>& x,
                     const State& state, int64_t r0) {
    const Array &key = c.prefix_key, &value = c.prefix_value;
    const int64_t D = elements<T>(c.D), Vp = up(c.DV), width = up(M);
    const int64_t key0 = row.entry * key.batch + kv * key.head, value0 = row.entry * value.batch + kv * value.head;
    alignas(64) T rows_of_tile[NT * 256];
    transpose_tile((const float*)q, up(D), M, D, (float*)x.q, NT);
    std::fill(x.acc, x.m, 0.f);
    std::fill(x.m, x.l, -INF);
    std::fill(x.l, x.l + VL * NT, 0.f);
    for (int64_t n0 = 0; n0 < row.prefix; n0 += NT) {
        const int64_t n = std::min(NT, row.prefix - n0), k0 = key0 + n0 * key.row, v0 = value0 + n0 * value.row;
        fetch(value, v0, n, c.DV);
        const Matrix<T> k = matrix(key, k0, n, c.D, D, rows_of_tile);
        product<false>(k.data, k.ld, 1, x.q, NT, x.s, NT, n, width, D, query_factor(c));
        if (c.softcap)
            for (int64_t i = 0; i < n; i++)
                cap(c, x.s + i * NT, width);
        fetch(key, k0 + NT * key.row, std::min(NT, row.prefix - n0 - NT), c.D);
        soften_lanes(c, x, n, width);
        const Matrix<T> v = values_of(value, v0, n, c.DV, c.DV, nullptr, rows_of_tile);
        product<true>(v.data, 1, v.ld, over_rows<T>(x.s, n, width, x.p), NT, x.acc, NT, c.DV, width, elements<T>(n));
    }
    transpose_tile(x.acc, NT, c.DV, M, state.acc + r0 * Vp, Vp);
    for (int64_t r = 0; r < M; r++) {
        state.m[r0 + r] = x.m[r];
        for (int64_t i = 0; i < VL; i++)
            state.l[(r0 + r) * VL + i] = x.l[i * NT + r];
    }
}

// The same for up to ALONE queries, by ``s`` of [M][NT].
template <typename T>
void attend_across(const Arguments& c, const Row& row, int64_t kv, const T* q, int64_t M, float* s, const State& x,
                   int64_t r0) {
    const Array &key = c.prefix_key, &value = c.prefix_value;
    const int64_t D = elements<T>(c.D), Vp = up(c.DV);
    const int64_t key0 = row.entry * key.batch + kv * key.head, value0 = row.entry * value.batch + kv * value.head;
    alignas(64) T rows_of_tile[NT * 256], across[NT * 256];
    for (int64_t n0 = 0; n0 < row.prefix; n0 += NT) {
        const int64_t n = std::min(NT, row.prefix - n0), k0 = key0 + n0 * key.row, v0 = value0 + n0 * value.row;
        const Matrix<T> k = matrix(key, k0, n, c.D, up(D), rows_of_tile);
        transpose_tile((const float*)k.data, k.ld, n, D, (float*)across, NT);
        product<false>(q, up(D), 1, across, NT, s, NT, M, up(n), D, query_factor(c));
        for (int64_t r = 0; r < M; r++) {
            if (c.softcap) cap(c, s + r * NT, up(n));
            hide(s + r * NT, up(n), 0, n, nullptr);
            soften(s + r * NT, up(n), x, r0 + r, Vp);
        }
        add_values(c, s, M, v0, n, value, nullptr, rows_of_tile, x.acc + r0 * Vp);
    }
}

// Keys and values that are read next; strides of their rows and elements in bytes.
struct Later {
    const char *key, *value;
    int64_t key_row, value_row, element;
};

// The products of a query and ``n`` keys, ``ld`` apart; 0 in the other lanes. With AHEAD each step asks for a little of
// ``later``: all of it at once would wait for the few lines that a core may ask for at a time.
template <bool AHEAD, typename T>
vec dots(const T* q, const T* k, int64_t ld, int64_t n, int64_t D, const Later& later) {
    vec x[VL];
    for (int64_t i = 0; i < VL; i++) {
        x[i] = vec{};
        if (i < n)
            for (int64_t d = 0; d < D; d += VL) {
                if (AHEAD) __builtin_prefetch(later.key + i * later.key_row + d * later.element);
                if (AHEAD) __builtin_prefetch(later.value + i * later.value_row + d * later.element);
                x[i] = step(x[i], operand(q + d), operand(k + i * ld + d));
            }
    }
    return sums(x);
}

// Keys of the sequence, for all R = G * S queries of a row. ``next``: the row after it. ``ahead``: asks for keys before
// they are read, which pays where rows are many.
template <typename T>
void attend_in_place(const Arguments& c, const Row& row, const Row& next, bool ahead, int64_t kv, const T* q, float* s,
                     const State& x, int64_t r0) {
    const int64_t R = c.HQ / c.HKV * c.S, D = up(elements<T>(c.D)), Vp = up(c.DV);
    Range any{row.length, 0};
    std::vector<Range> limits(R);
    for (int64_t r = 0; r < R; r++) {
        limits[r] = seen(c, row, row.length - c.S + r % c.S);
        any = {std::min(any.lo, limits[r].lo), std::max(any.hi, limits[r].hi)};
    }
    alignas(64) T rows_of_tile[NT * 256];
    for (int64_t n0 = any.lo / NT * NT; n0 < any.hi; n0 += NT) {
        const int64_t n = std::min(NT, any.hi - n0), at = key_at(c.value, row, kv, n0);
        const Matrix<T> k = matrix(c.key, key_at(c.key, row, kv, n0), n, c.D, D, rows_of_tile);
        // Rows end where a page ends, and no hardware looks beyond: the values, and the keys that are read after these.
        const bool last = n0 + NT >= any.hi;
        const int64_t key_row = c.key.row * size_of(c.key), value_row = c.value.row * size_of(c.value);
        const char* keys =
            (const char*)c.key.data + key_at(c.key, last ? next : row, kv, last ? 0 : n0 + NT) * size_of(c.key);
        const char* values = (const char*)c.value.data + at * size_of(c.value);
        for (int64_t r = 0; r < R; r++)
            for (int64_t j = 0; j < n; j += VL) {
                const int64_t some = std::min<int64_t>(VL, n - j);
                const Later later{keys + j * key_row, values + j * value_row, key_row, value_row,
                                  PER<T> * size_of(c.key)};
                const T *q_r = q + r * D, *k_j = k.data + j * k.ld;
                const vec dot = r == 0 && ahead ? dots<true>(q_r, k_j, k.ld, some, D, later)
                                                : dots<false>(q_r, k_j, k.ld, some, D, later);
                store(s + r * NT + j, dot * query_factor(c));
            }
        const uint8_t* mask = c.key_mask ? c.key_mask + row.b * c.T + n0 : nullptr;
        for (int64_t r = 0; r < R; r++) {
            float* p = s + r * NT;
            if (c.softcap) cap(c, p, up(n));
            hide(p, up(n), limits[r].lo - n0, std::min(n, limits[r].hi - n0), mask);
            soften(p, up(n), x, r0 + r, Vp);
        }
        add_values(c, s, R, at, n, c.value, mask, rows_of_tile, x.acc + r0 * Vp);
    }
}

// Samples of a unit: few enough for eight threads, as the prefix is read once by each unit, and lanes are full.
int64_t chunk_of(const Arguments& c) {
    const int64_t R = c.HQ / c.HKV * c.S;
    return std::clamp((c.B * c.HKV + 7) / 8, std::min((VL + R - 1) / R, CHUNK), CHUNK);
}

template <typename T>
void forward_few(const Forward& f, int64_t unit) {
    const Arguments& c = f.args;
    const int64_t chunk = chunk_of(c), chunks = (c.B + chunk - 1) / chunk, kv = unit / chunks,
                  b0 = unit % chunks * chunk;
    const int64_t samples = std::min(c.B - b0, chunk), G = c.HQ / c.HKV, R = G * c.S, D = up(elements<T>(c.D));
    const int64_t logits = std::max(R, ALONE) * NT;
    float* at = scratch(samples * R * D + lanes_floats<T>(c) + logits + state_floats(c, samples * R));
    float *lanes = at + samples * R * D, *s = lanes + lanes_floats<T>(c);
    T* q = (T*)at;
    const State x = state_at(c, s + logits, samples * R);
    // Samples with the same prefix side by side: each of its tiles is read once for all of them.
    Row rows[CHUNK];
    for (int64_t i = 0; i < samples; i++)
        rows[i] = row_of(c, c.order ? c.order[b0 + i] : b0 + i);
    const auto sees_prefix = [&](int64_t r) {  // row r: sample r / R, head r % R / S, query r % S
        return rows[r / R].length - c.S + r % c.S >= rows[r / R].start;
    };
    for (int64_t r = 0; r < samples * R; r++)
        load_row(c.query, query_at(c.query, rows[r / R], kv * G + r % R / c.S, r % c.S), c.D, D, q + r * D);
    for (int64_t r = 0, M; r < samples * R; r += std::max<int64_t>(M, 1)) {
        const Row& row = rows[r / R];
        for (M = 0; M < NT && r + M < samples * R && rows[(r + M) / R].entry == row.entry && sees_prefix(r + M);)
            M++;
        if (!M || !row.prefix) continue;
        if (M > ALONE)
            attend_in_lanes(c, row, kv, q + r * D, M, lanes_at<T>(c, lanes), x, r);
        else
            attend_across(c, row, kv, q + r * D, M, s, x, r);
    }
    for (int64_t i = 0; i < samples; i++) {
        attend_in_place(c, rows[i], rows[std::min(i + 1, samples - 1)], samples > FEW, kv, q + i * R * D, s, x, i * R);
        for (int64_t r = 0; r < R; r++)
            finish(f, rows[i], kv * G + r / c.S, r % c.S, x, i * R + r);
    }
}
