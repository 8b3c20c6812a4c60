// Rows of the batch, what they see, and keys and values as the products read them. Included inside the namespace of an
// instruction set.

constexpr int64_t NT = 64;        // keys of a tile
constexpr int64_t BLOCK = 48;     // queries of a block: a multiple of every PA_ROWS
constexpr int64_t FEW = 4;        // up to so many queries per row count as decoding
constexpr int64_t CHUNK = 64;     // rows of the batch that a decoding unit folds
constexpr int64_t ALONE = std::max(VL / 4, 1);  // up to so many queries of a prefix do not pay for a vector of them
constexpr int64_t ZIPPED = 4;  // up to so many queries do not pay for values that are zipped in memory
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
        size = 0;
        memory.reset();
        memory.reset(new float[floats + 16]);
        size = floats + 16;
    }
    return (float*)(((uintptr_t)memory.get() + 63) / 64 * 64);
}

// Keys and values of one head, as the products read them. float32 that lies so in memory is not copied. Of pairs, two
// rows are one in k and v: number d of both is pair d.
template <typename T>
struct Keys {
    const T *kt, *k, *vt, *v;  // kt, vt: [tile][elements of D or DV][NT]; k, v: rows ldk and ldv apart
    int64_t ldk, ldv;
};

template <typename T>
bool in_place(const Array& x, int64_t size, bool masked) {
    return PER<T> == 1 && x.type == Type::f32 && size % VL == 0 && !masked;
}

// Whether products can be of pairs of bfloat16: a float32 prefix is rounded to them.
bool paired(const Arguments& c) {
    return c.query.type == Type::bf16 && c.key.type == Type::bf16 && c.value.type == Type::bf16;
}

template <typename T>
int64_t keys_floats(const Arguments& c, int64_t n, bool backward) {
    const int64_t t = tiles(n) * NT, k = elements<T>(c.D), v = elements<T>(c.DV);
    return t * k + t / PER<T> * up(c.DV) + (backward ? t / PER<T> * up(c.D) + t * v : 0);
}

// Keys [0, n), whose rows begin at ``key0`` and ``value0``, and which were packed at ``at``. ``masked``: some of them are
// hidden by the key mask, and packed as zeros.
template <typename T>
Keys<T> keys_at(const Arguments& c, const Array& key, int64_t key0, const Array& value, int64_t value0, int64_t n,
                const float* at, bool backward, bool masked) {
    const int64_t t = tiles(n) * NT, Dp = up(c.D), Vp = up(c.DV);
    Keys<T> x{(const T*)at, nullptr, nullptr, (const T*)at + t * elements<T>(c.D), Dp, Vp};
    if (backward) {
        x.k = x.v + t / PER<T> * Vp;
        x.vt = x.k + t / PER<T> * Dp;
    }
    if (in_place<T>(key, c.D, masked)) {
        x.k = (const T*)key.data + key0;
        x.ldk = key.row;
    }
    if (in_place<T>(value, c.DV, masked)) {
        x.v = (const T*)value.data + value0;
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

// Rows of a tile, ``ld`` apart.
template <typename T>
struct Matrix {
    const T* data;
    int64_t ld;
};

// ``n`` rows of ``size`` numbers from ``at`` on, of each of which ``width`` elements are read: where they lie if they
// can be, else copied to ``to``.
template <typename T>
Matrix<T> matrix(const Array& x, int64_t at, int64_t n, int64_t size, int64_t width, T* to) {
    const Type type = PER<T> == 1 ? Type::f32 : Type::bf16;
    if (x.type == type && size == width * PER<T> && x.row % PER<T> == 0)
        return {(const T*)((const char*)x.data + at * size_of(x)), x.row / PER<T>};
    for (int64_t i = 0; i < n; i++)
        load_row(x, at + i * x.row, size, width, to + i * width);
    return {to, width};
}

// The same, but rows that ``mask`` hides are 0: a probability of 0 times a NaN in them would be NaN. Null hides none.
template <typename T>
Matrix<T> visible(const Array& x, int64_t at, int64_t n, int64_t size, int64_t width, const uint8_t* mask, T* to) {
    if (!mask || std::all_of(mask, mask + n, [](uint8_t m) { return m; })) return matrix(x, at, n, size, width, to);
    for (int64_t i = 0; i < n; i++)
        if (mask[i])
            load_row(x, at + i * x.row, size, width, to + i * width);
        else
            std::fill(to + i * width, to + (i + 1) * width, T{});
    return {to, width};
}

// Asks for ``n`` rows of ``size`` values, the first at ``at``.
void fetch(const Array& x, int64_t at, int64_t n, int64_t size) {
    for (int64_t i = 0; i < n; i++) {
        const char* row = (const char*)x.data + (at + i * x.row) * size_of(x);
        for (int64_t byte = 0; byte < size * size_of(x); byte += 64)
            __builtin_prefetch(row + byte);
    }
}

// Rows 2 i and 2 i + 1 of ``x`` become row i of ``to``, number d of both its pair d; a row that is missing is 0.
inline void zip_rows(const Matrix<Pair>& x, int64_t n, int64_t width, Pair* __restrict to) {
    static const uint16_t nothing[256] = {};
    for (int64_t i = 0; i < n; i += 2, to += width) {
        const uint16_t* lo = (const uint16_t*)(x.data + i * x.ld);
        const uint16_t* hi = i + 1 < n ? lo + 2 * x.ld : nothing;
        for (int64_t d = 0; d < width; d++)
            to[d] = {lo[d], hi[d]};
    }
}

// ``n`` rows of floats, NT apart, for a product that sums over rows: pairs are zipped to ``to``.
template <typename T>
const T* over_rows(const float* s, int64_t n, int64_t width, float* to) {
    if constexpr (PER<T> == 1) return s;
    for (int64_t i = 0; i < n; i += 2)
        for (int64_t j = 0; j < width; j += VL) {
            const float* lo = s + i * NT + j;
            store(to + i / 2 * NT + j, narrow<true>(load(lo), i + 1 < n ? load(lo + NT) : vec{}));
        }
    return (const T*)to;
}

// The same for a sum over columns: pairs take their place.
template <typename T>
const T* over_columns(float* s, int64_t n, int64_t width) {
    if constexpr (PER<T> == 2)
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < width; j += 2 * VL) {  // behind an odd vector lies another, which nobody reads
                const float* two = s + i * NT + j;
                store(s + i * NT + j / 2, narrow<false>(load(two), load(two + VL)));
            }
    return (const T*)s;
}

// A tile's keys or values, transposed to ``across`` and by rows to ``down``; null: not wanted.
inline void pack_tile(const Array& x, int64_t at, int64_t count, int64_t size, const uint8_t* mask, float* across,
                      float* down) {
    alignas(64) float rows_of_tile[NT * 256];
    const Matrix<float> rows = visible(x, at, count, size, up(size), mask, down ? down : rows_of_tile);
    if (down && rows.data != down)
        for (int64_t i = 0; i < count; i++)
            std::copy_n(rows.data + i * rows.ld, up(size), down + i * up(size));
    if (across) transpose_tile(rows.data, rows.ld, count, size, across, NT);
}
inline void pack_tile(const Array& x, int64_t at, int64_t count, int64_t size, const uint8_t* mask, Pair* across,
                      Pair* down) {
    alignas(64) Pair rows_of_tile[NT * 128];
    const int64_t n = elements<Pair>(size), width = up(n);
    for (int64_t i = 0; i < count; i++)
        if (!mask || mask[i])
            load_row(x, at + i * x.row, size, width, rows_of_tile + i * width);
        else
            std::fill(rows_of_tile + i * width, rows_of_tile + (i + 1) * width, Pair{});
    if (across) transpose_tile((const float*)rows_of_tile, width, count, n, (float*)across, NT);
    if (down) zip_rows({rows_of_tile, width}, count, up(size), down);
}

// Packs keys [from, until) of what ``keys_at`` then finds; the others are not read. What is behind the last key of a
// tile is 0 up to a whole vector, and the second row of a pair.
template <typename T>
void pack_keys(const Arguments& c, const Array& key, int64_t key0, const Array& value, int64_t value0, int64_t n,
               bool backward, const uint8_t* mask, float* to, int64_t from, int64_t until) {
    const Keys<T> x = keys_at<T>(c, key, key0, value, value0, n, to, backward, mask);
    const auto tile = [&](const T* at, int64_t n0, int64_t size) {
        return at ? const_cast<T*>(at) + n0 * size : nullptr;
    };
    for (int64_t n0 = from; n0 < until; n0 += NT) {
        const int64_t count = std::min(NT, until - n0);
        const uint8_t* hidden = mask ? mask + n0 : nullptr;
        pack_tile(key, key0 + n0 * key.row, count, c.D, hidden, tile(x.kt, n0, elements<T>(c.D)),
                  backward ? tile(x.k, n0 / PER<T>, x.ldk) : nullptr);
        pack_tile(value, value0 + n0 * value.row, count, c.DV, hidden, tile(x.vt, n0, elements<T>(c.DV)),
                  tile(x.v, n0 / PER<T>, x.ldv));
    }
}

// A row of the batch: where it lies and what it sees.
struct Row {
    int64_t b, q0, k0;             // index in the tensors' first dimension; its first query and key there
    int64_t S, T;                  // queries, keys
    int64_t length;                // visible keys
    int64_t entry, prefix, start;  // bank entry and its length; first position that sees the prefix
};

// Valid keys of a bank entry.
int64_t prefix_length(const Arguments& c, int64_t entry) {
    return c.prefix_lengths ? std::clamp<int64_t>(c.prefix_lengths[entry], 0, c.P) : c.P;
}

Row row_of(const Arguments& c, int64_t b) {
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
        if (r.entry >= 0 && r.entry < c.N) r.prefix = prefix_length(c, r.entry);
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
int64_t place_of(const Arguments& c, const Row& r, int64_t h, int64_t i) {
    return (r.b * c.HQ + h) * c.NQ + r.q0 + i;
}

struct Range {
    int64_t lo, hi;
};

// Keys of the sequence that the query at ``position`` sees, but for key_mask.
Range seen(const Arguments& c, const Row& r, int64_t position) {
    Range x{0, r.length};
    if (c.causal) x.hi = std::clamp<int64_t>(position + 1, 0, r.length);
    if (c.window && c.window <= position) x.lo = position - c.window + 1;
    return x;
}
