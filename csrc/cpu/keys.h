// Rows of the batch, what they see, and keys and values as the products read them. Included inside the namespace of an
// instruction set.

constexpr int64_t NT = 64;        // keys of a tile
constexpr int64_t BLOCK = 48;     // queries of a block: a multiple of every PA_ROWS
constexpr int64_t FEW = 4;        // up to so many queries per row count as decoding
constexpr int64_t CHUNK = 64;     // rows of the batch that a decoding unit folds
constexpr int64_t ROWS = 2 * MR;  // rows of a block that share the end of what they see
constexpr float SLACK = 8;
constexpr float INF = std::numeric_limits<float>::infinity();

int64_t tiles(int64_t keys) {
    return (keys + NT - 1) / NT;
}

// Scratch of a thread. It only grows: memory that was never touched costs more than what is computed on it.
float* scratch(int64_t floats) {
    thread_local std::unique_ptr<float[]> memory;
    thread_local int64_t size = 0;
    if (size < floats + 16) {
        memory.reset();
        memory.reset(new float[floats + 16]);
        size = floats + 16;
    }
    return (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
}

// Keys and values of one head, in float32. What lies in memory as the kernels read it is not copied.
struct Keys {
    const float *kt, *k, *vt, *v;  // kt, vt: [tile][D or DV][NT], transposed; k, v: rows ldk and ldv apart
    int64_t ldk, ldv;
};

bool in_place(const Array& x, int64_t size) {
    return x.type == Type::f32 && size % VL == 0;
}

int64_t keys_floats(const Call& c, int64_t n, bool backward) {
    const int64_t t = tiles(n) * NT, Dp = up(c.D), Vp = up(c.DV);
    return t * (c.D + Vp) + (backward ? t * (Dp + c.DV) : 0);
}

// Keys [0, n), whose rows begin at ``key0`` and ``value0``, and which were packed at ``at``.
Keys keys_at(const Call& c, const Array& key, int64_t key0, const Array& value, int64_t value0, int64_t n,
             const float* at, bool backward) {
    const int64_t t = tiles(n) * NT, Dp = up(c.D), Vp = up(c.DV);
    Keys x{at, nullptr, nullptr, at + t * c.D, Dp, Vp};
    if (backward) {
        x.k = x.v + t * Vp;
        x.vt = x.k + t * Dp;
    }
    if (in_place(key, c.D)) {
        x.k = (const float*)key.data + key0;
        x.ldk = key.row;
    }
    if (in_place(value, c.DV)) {
        x.v = (const float*)value.data + value0;
        x.ldv = value.row;
    }
    return x;
}

// ``count`` rows, ``ld`` apart with up(size) readable floats each, as [size][up(count)], ``ldt`` apart; zeros behind.
void transpose_tile(const float* from, int64_t ld, int64_t count, int64_t size, float* to, int64_t ldt) {
    for (int64_t i = 0; i < count; i += VL)
        for (int64_t d = 0; d < size; d += VL) {
            vec x[VL];
            for (int r = 0; r < VL; r++)
                x[r] = i + r < count ? load(from + (i + r) * ld + d) : vec{};
            transpose(x);
            for (int r = 0; r < VL; r++)
                if (d + r < size) store(to + (d + r) * ldt + i, x[r]);
        }
}

// Rows of a tile in float32, ``ld`` apart.
struct Matrix {
    const float* data;
    int64_t ld;
};

// ``n`` rows of ``size`` values from ``at`` on, of each of which ``width`` floats are read: where they lie if they can
// be, else copied to ``to``.
Matrix matrix(const Array& x, int64_t at, int64_t n, int64_t size, int64_t width, float* to) {
    if (x.type == Type::f32 && size == width) return {(const float*)x.data + at, x.row};
    for (int64_t i = 0; i < n; i++)
        load_row(x, at + i * x.row, size, width, 1.f, to + i * width);
    return {to, width};
}

// Packs what ``keys_at`` then finds. Floats behind the last key of a tile are 0 up to a whole vector.
void pack_keys(const Call& c, const Array& key, int64_t key0, const Array& value, int64_t value0, int64_t n,
               bool backward, float* to, int64_t from = 0) {
    const Keys x = keys_at(c, key, key0, value, value0, n, to, backward);
    const int64_t Dp = up(c.D), Vp = up(c.DV);
    alignas(64) float rows_of_tile[NT * 256];
    for (int64_t n0 = from; n0 < n; n0 += NT) {
        const int64_t count = std::min(NT, n - n0);
        const float *k = x.k + n0 * x.ldk, *v = x.v + n0 * x.ldv;
        if (!in_place(key, c.D)) {
            float* rows = backward ? const_cast<float*>(k) : rows_of_tile;
            for (int64_t i = 0; i < count; i++)
                load_row(key, key0 + (n0 + i) * key.row, c.D, Dp, 1.f, rows + i * Dp);
            k = rows;
        }
        if (!in_place(value, c.DV))
            for (int64_t i = 0; i < count; i++)
                load_row(value, value0 + (n0 + i) * value.row, c.DV, Vp, 1.f, const_cast<float*>(v) + i * Vp);
        transpose_tile(k, x.ldk, count, c.D, const_cast<float*>(x.kt) + n0 * c.D, NT);
        if (backward) transpose_tile(v, x.ldv, count, c.DV, const_cast<float*>(x.vt) + n0 * c.DV, NT);
    }
}

// A row of the batch: where it lies and what it sees.
struct Row {
    int64_t b, q0, k0;             // index in the tensors' first dimension; its first query and key there
    int64_t S, T;                  // queries, keys
    int64_t length;                // visible keys
    int64_t entry, prefix, start;  // bank entry and its length; first position that sees the prefix
};

Row row_of(const Call& c, int64_t b) {
    Row r{b, 0, 0, c.S, c.T, c.T, 0, 0, std::numeric_limits<int64_t>::min()};
    if (c.cu_q) {
        const auto at = [](const int64_t* cu, int64_t i, int64_t total) {
            return std::clamp<int64_t>(cu[i], 0, total);
        };
        r.b = 0;
        r.q0 = at(c.cu_q, b, c.NQ);
        r.k0 = at(c.cu_k, b, c.NK);
        r.S = std::max<int64_t>(at(c.cu_q, b + 1, c.NQ) - r.q0, 0);
        r.T = r.length = std::max<int64_t>(at(c.cu_k, b + 1, c.NK) - r.k0, 0);
    }
    if (c.key_lengths) r.length = std::clamp<int64_t>(c.key_lengths[b], 0, c.T);
    if (c.P) {
        r.entry = c.ids ? c.ids[b] : c.N > 1 ? b : 0;
        if (r.entry >= 0 && r.entry < c.N) {
            r.prefix = c.P;
            if (c.prefix_lengths) r.prefix = std::clamp<int64_t>(c.prefix_lengths[r.entry], 0, c.P);
        }
    }
    if (c.prefix_start) r.start = c.prefix_start[b];
    return r;
}

// Where a query or key of the row begins in a tensor, and in the (B, HQ, S) arrays of floats.
int64_t query_at(const Array& x, const Row& r, int64_t h, int64_t i) {
    return r.b * x.batch + h * x.head + (r.q0 + i) * x.row;
}
int64_t key_at(const Array& x, const Row& r, int64_t kv, int64_t j) {
    return r.b * x.batch + kv * x.head + (r.k0 + j) * x.row;
}
int64_t place_of(const Call& c, const Row& r, int64_t h, int64_t i) {
    return (r.b * c.HQ + h) * c.NQ + r.q0 + i;
}

struct Range {
    int64_t lo, hi;
};

// Keys of the sequence that the query at ``position`` sees, but for key_mask.
Range seen(const Call& c, const Row& r, int64_t position) {
    Range x{0, r.length};
    if (c.causal) x.hi = std::clamp<int64_t>(position + 1, 0, r.length);
    if (c.window && c.window <= position) x.lo = position - c.window + 1;
    return x;
}
