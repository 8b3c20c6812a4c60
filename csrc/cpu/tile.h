// Vectors and products of small matrices. Included inside the namespace of an instruction set, after PA_LANES (floats
// in a vector) and PA_ROWS (rows of a register tile) are defined and a target pragma is active.

constexpr int VL = PA_LANES, MR = PA_ROWS;
typedef float vec __attribute__((vector_size(4 * PA_LANES)));
typedef float vecu __attribute__((vector_size(4 * PA_LANES), aligned(4), may_alias));
typedef int32_t veci __attribute__((vector_size(4 * PA_LANES)));
typedef uint16_t vech __attribute__((vector_size(4 * PA_LANES)));
typedef int32_t vecui __attribute__((vector_size(4 * PA_LANES), aligned(2), may_alias));
typedef uint16_t vechu __attribute__((vector_size(4 * PA_LANES), aligned(2), may_alias));

static inline vec load(const float* p) {
    return *(const vecu*)p;
}
static inline void store(float* p, vec x) {
    *(vecu*)p = x;
}
static inline void store(void* p, vech x) {
    *(vechu*)p = x;
}
static inline vec all(float x) {
    return x - vec{};  // + would have to turn -0 into 0, by an instruction more
}
static inline vec max(vec a, vec b) {
    return a > b ? a : b;
}

// Lanes whose index has bit W from b, the others from a; A, B: from the lane that differs in that bit.
template <int W, bool A, bool B>
static inline vec pick(vec a, vec b) {
    veci from;
    for (int i = 0; i < VL; i++)
        from[i] = i & W ? VL + (B ? i ^ W : i) : A ? i ^ W : i;
    return __builtin_shuffle(a, b, from);
}

// The largest lane, in every lane.
template <int W = VL / 2>
static inline vec largest(vec x) {
    x = max(x, pick<W, true, true>(x, x));
    if constexpr (W > 1) return largest<W / 2>(x);
    return x;
}

// Lane i becomes the sum of x[i]'s lanes; x is used up.
template <int W = VL / 2>
static inline vec sums(vec* x) {
    for (int i = 0; i < W; i++)
        x[i] = pick<W, false, false>(x[i], x[i + W]) + pick<W, true, true>(x[i], x[i + W]);
    if constexpr (W > 1) return sums<W / 2>(x);
    return x[0];
}

// The sum of all lanes.
template <int W = VL / 2>
static inline float sum(vec x) {
    x += pick<W, true, true>(x, x);
    if constexpr (W > 1) return sum<W / 2>(x);
    return x[0];
}

// x[i]'s lane j and x[j]'s lane i change places.
template <int W = VL / 2>
static inline void transpose(vec* x) {
    for (int i = 0; i < VL; i++)
        if (!(i & W)) {
            const vec a = x[i], b = x[i + W];
            x[i] = pick<W, false, true>(a, b);
            x[i + W] = pick<W, true, false>(a, b);
        }
    if constexpr (W > 1) transpose<W / 2>(x);
}

static inline int64_t up(int64_t n) {
    return (n + VL - 1) / VL * VL;
}

// e ** x; 0 below -87, so that -inf gives an exact 0. Relative error about 1e-7 (1 + |x|).
static inline vec exponential(vec x) {
    x *= 1.4426950408889634f;  // 2 ** x from here on
    const veci small = x < all(-126.f);
    x = max(all(-126.f), x);  // this way round NaN stays NaN
    x = all(126.f) < x ? all(126.f) : x;
    const vec shifted = x + 12582912.f;  // 1.5 * 2 ** 23: rounds to the nearest integer
    const vec whole = shifted - 12582912.f, f = x - whole;
    vec p = all(1.535336188319500e-4f);
    p = p * f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.0f;
    const veci exponent = (__builtin_convertvector(whole, veci) + 127) << 23;
    return small ? vec{} : p * (vec)exponent;
}

// Two bfloat16 numbers whose products go into one sum.
struct Pair {
    uint16_t lo, hi;
};

// What a product steps over: so many numbers at once, and the elements that n numbers take.
template <typename T>
constexpr int64_t PER = 1;
template <>
constexpr int64_t PER<Pair> = 2;
template <typename T>
constexpr int64_t elements(int64_t n) {
    return (n + PER<T> - 1) / PER<T>;
}

// bfloat16 to the nearest, ties to even, of the lanes of a, then b; ZIP: of both in turn, as VL pairs.
template <bool ZIP>
static inline vech narrow(vec a, vec b) {
    vech from;
#ifdef PA_DPBF16
    const vech x = (vech)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    for (int i = 0; i < 2 * VL; i++)
        from[i] = ZIP ? i / 2 + i % 2 * VL : i;
    return __builtin_shuffle(x, from);
#else
    const auto rounded = [](vec x) {  // in the upper half of each lane; NaN stays NaN
        const veci bits = (veci)x;
        return (vech)(x == x ? bits + 0x7FFF + ((bits >> 16) & 1) : bits | 0x400000);
    };
    for (int i = 0; i < 2 * VL; i++)
        from[i] = ZIP ? (i | 1) + i % 2 * (2 * VL) : 2 * i + 1;
    return __builtin_shuffle(rounded(a), rounded(b), from);
#endif
}

// An element of the left matrix in every lane, a vector of the right one, and their product on top of a sum.
static inline vec spread(const float* a) {
    return all(*a);
}
static inline veci spread(const Pair* a) {
    int32_t both;
    std::memcpy(&both, a, 4);
    return both - veci{};
}
static inline vec operand(const float* b) {
    return load(b);
}
static inline veci operand(const Pair* b) {
    return *(const vecui*)b;
}
static inline vec step(vec sum, vec a, vec b) {
    return sum + a * b;
}
static inline vec step(vec sum, veci a, veci b) {
#ifdef PA_DPBF16
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return sum + (vec)(a << 16) * (vec)(b << 16) + (vec)(a & -65536) * (vec)(b & -65536);
#endif
}

// c[R][NV vectors] = factor a[R][K] b[K][NV], or with ADD a b more. a's element (r, k) is a[r * ar + k * ak].
template <int R, int NV, bool ADD, typename T>
static inline void tile(const T* a, int64_t ar, int64_t ak, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t K,
                        float factor) {
    vec x[R][NV];
    for (int r = 0; r < R; r++)
        for (int j = 0; j < NV; j++)
            x[r][j] = ADD ? load(c + r * ldc + j * VL) : vec{};
    for (int64_t k = 0; k < K; k++) {
        decltype(operand(b)) y[NV];
        for (int j = 0; j < NV; j++)
            y[j] = operand(b + k * ldb + j * VL);
        for (int r = 0; r < R; r++) {
            const auto s = spread(a + r * ar + k * ak);
            for (int j = 0; j < NV; j++)
                x[r][j] = step(x[r][j], s, y[j]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int j = 0; j < NV; j++)
            store(c + r * ldc + j * VL, ADD ? x[r][j] : x[r][j] * factor);
}

template <int NV, bool ADD, typename T>
static inline void rows(const T* a, int64_t ar, int64_t ak, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t M,
                        int64_t K, float factor) {
    int64_t r = 0;
    for (; r + MR <= M; r += MR)
        tile<MR, NV, ADD>(a + r * ar, ar, ak, b, ldb, c + r * ldc, ldc, K, factor);
    for (; r + 2 <= M; r += 2)
        tile<2, NV, ADD>(a + r * ar, ar, ak, b, ldb, c + r * ldc, ldc, K, factor);
    for (; r < M; r++)
        tile<1, NV, ADD>(a + r * ar, ar, ak, b, ldb, c + r * ldc, ldc, K, factor);
}

// c[M][N] = factor a[M][K] b[K][N], or with ADD a b more; N a multiple of VL. T: float, or Pair for twice as many k.
template <bool ADD, typename T>
static void product(const T* a, int64_t ar, int64_t ak, const T* b, int64_t ldb, float* c, int64_t ldc, int64_t M,
                    int64_t N, int64_t K, float factor = 1.f) {
    int64_t n = 0;
    for (; n + 4 * VL <= N; n += 4 * VL)
        rows<4, ADD>(a, ar, ak, b + n, ldb, c + n, ldc, M, K, factor);
    if (n + 3 * VL <= N) {
        rows<3, ADD>(a, ar, ak, b + n, ldb, c + n, ldc, M, K, factor);
        n += 3 * VL;
    }
    if (n + 2 * VL <= N) {
        rows<2, ADD>(a, ar, ak, b + n, ldb, c + n, ldc, M, K, factor);
        n += 2 * VL;
    }
    if (n < N) rows<1, ADD>(a, ar, ak, b + n, ldb, c + n, ldc, M, K, factor);
}

// Numbers of a and b in turn: of the lower or upper half of every eight, which is one instruction.
template <bool UPPER>
static inline veci zip(vech a, vech b) {
    vech from;
    for (int i = 0; i < 2 * VL; i++)
        from[i] = i / 8 * 8 + i % 8 / 2 + UPPER * 4 + i % 2 * (2 * VL);
    return (veci)__builtin_shuffle(a, b, from);
}

// 2 VL sums between the order of numbers and that of the lower and the upper ``zip``.
template <bool BACK>
static inline void reorder(vec& a, vec& b) {
    const auto place = [](int d) { return BACK ? d / 8 * 4 + d % 4 + d / 4 % 2 * VL : d % VL / 4 * 8 + d % 4 + d / VL * 4; };
    veci first, second;
    for (int i = 0; i < VL; i++) {
        first[i] = place(i);
        second[i] = place(VL + i);
    }
    const vec lower = __builtin_shuffle(a, b, first);
    b = __builtin_shuffle(a, b, second);
    a = lower;
}

// NV vectors of ``product_of_rows``, of which c has ``own``.
template <int R, int NV>
static inline void tile_of_rows(const Pair* a, int64_t lda, const Pair* b, int64_t ldb, float* c, int64_t ldc,
                                int64_t own, int64_t n) {
    vec x[R][NV] = {};
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < own; i++)
            x[r][i] = load(c + r * ldc + i * VL);
        for (int i = 0; i < NV; i += 2)
            reorder<false>(x[r][i], x[r][i + 1]);
    }
    for (int64_t k = 0; k < n; k += 2)
        for (int i = 0; i < NV; i += 2) {
            const Pair* row = b + k * ldb + i / 2 * VL;
            const vech low = *(const vechu*)row, high = k + 1 < n ? *(const vechu*)(row + ldb) : vech{};
            const veci lower = zip<false>(low, high), upper = zip<true>(low, high);
            for (int r = 0; r < R; r++) {
                const veci s = spread(a + r * lda + k / 2);
                x[r][i] = step(x[r][i], s, lower);
                x[r][i + 1] = step(x[r][i + 1], s, upper);
            }
        }
    for (int r = 0; r < R; r++) {
        for (int i = 0; i < NV; i += 2)
            reorder<true>(x[r][i], x[r][i + 1]);
        for (int i = 0; i < own; i++)
            store(c + r * ldc + i * VL, x[r][i]);
    }
}

// c[R][N] += a[R][n] b[n][N] for rows of b that are not zipped: each two become pairs as they are read. Whole vectors of
// b are read, two of c.
template <int R>
static void product_of_rows(const Pair* a, int64_t lda, const Pair* b, int64_t ldb, float* c, int64_t ldc, int64_t N,
                            int64_t n) {
    for (int64_t j = 0; j < N; j += 4 * VL) {
        const int64_t own = std::min<int64_t>(4, (N - j) / VL);
        own > 2 ? tile_of_rows<R, 4>(a, lda, b + j / 2, ldb, c + j, ldc, own, n)
                : tile_of_rows<R, 2>(a, lda, b + j / 2, ldb, c + j, ldc, own, n);
    }
}

// Storage types -> float32

#if defined(__aarch64__)
typedef __fp16 Half;
#else
typedef _Float16 Half;
#endif

static inline int64_t size_of(const Array& x) {
    return x.type == Type::f32 ? 4 : 2;
}

static inline float to_float(uint16_t bits, Type type) {
    if (type == Type::bf16) {
        const uint32_t wide = (uint32_t)bits << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
    Half half;
    std::memcpy(&half, &bits, 2);
    return (float)half;
}

// ``n`` floats as bfloat16.
static inline void narrow_row(const float* from, int64_t n, float factor, uint16_t* to) {
    int64_t i = 0;
    for (; i + 2 * VL <= n; i += 2 * VL)
        store(to + i, narrow<false>(load(from + i) * factor, load(from + i + VL) * factor));
    if (i == n) return;
    float rest[2 * VL] = {};
    for (int64_t j = i; j < n; j++)
        rest[j - i] = from[j] * factor;
    const vech x = narrow<false>(load(rest), load(rest + VL));
    std::memcpy(to + i, &x, (n - i) * sizeof(uint16_t));
}

// A row of ``n`` numbers as ``width`` elements, zeros behind them.
static inline void load_row(const Array& x, int64_t at, int64_t n, int64_t width, float* to) {
    if (x.type == Type::f32) {
        std::memcpy(to, (const float*)x.data + at, n * sizeof(float));
    } else {
        const uint16_t* from = (const uint16_t*)x.data + at;
        if (x.type == Type::bf16)
            for (int64_t i = 0; i < n; i++)
                to[i] = to_float(from[i], Type::bf16);
        else
            for (int64_t i = 0; i < n; i++)
                to[i] = to_float(from[i], Type::f16);
    }
    for (int64_t i = n; i < width; i++)
        to[i] = 0;
}
static inline void load_row(const Array& x, int64_t at, int64_t n, int64_t width, Pair* pairs) {
    uint16_t* to = (uint16_t*)pairs;
    if (x.type == Type::bf16)
        std::memcpy(to, (const uint16_t*)x.data + at, n * sizeof(uint16_t));
    else
        narrow_row((const float*)x.data + at, n, 1.f, to);
    for (int64_t i = n; i < 2 * width; i++)
        to[i] = 0;
}

static inline void store_row(const Array& x, int64_t at, int64_t n, float factor, const float* from) {
    if (x.type == Type::bf16) return narrow_row(from, n, factor, (uint16_t*)x.data + at);
    if (x.type == Type::f32) {
        float* to = (float*)x.data + at;
        for (int64_t i = 0; i < n; i++)
            to[i] = from[i] * factor;
        return;
    }
    uint16_t* to = (uint16_t*)x.data + at;
    for (int64_t i = 0; i < n; i++) {
        const Half half = (Half)(from[i] * factor);
        std::memcpy(to + i, &half, 2);
    }
}
