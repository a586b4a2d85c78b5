// SIGReg's sums and their gradient on a CPU, one sine and one cosine for each sample and slice.
//
// `sigreg_cpu` compiles this for the machine that it runs on, once for each layout of the knots:
//     BLOCKS, REACH    the centres q = H, 3H, 5H, ... and H, whose products with j = 0..H are the basis
//
// Everything is in vectors of LANES samples, with the vector types that GCC and Clang share.

#include <cstdint>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
constexpr int FUNCTIONS = BLOCKS * (4 * REACH + 2);

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef double Doubles __attribute__((vector_size(8 * LANES)));
typedef int64_t Longs __attribute__((vector_size(8 * LANES)));

// `count` samples, and zeros in the lanes beyond them; a constant count is one instruction
static inline Floats load(const float* from, int count = LANES) {
    Floats values = {};
    __builtin_memcpy(&values, from, sizeof(float) * count);
    return values;
}

static inline void store(float* to, Floats values, int count = LANES) {
    __builtin_memcpy(to, &values, sizeof(float) * count);
}

// sin and cos of step * p. The angle is reduced to [-pi/4, pi/4] once, in double precision, so that k does not multiply
// the rounding of the angle; the polynomials are Cephes's. An angle beyond 2^51 gives some number in [-1, 1], and NaN NaN.
static inline void sincos(Floats p, double step, Floats& sine, Floats& cosine) {
    constexpr double ROUND = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves no fraction
    const Doubles theta = __builtin_convertvector(p, Doubles) * step;
    const Doubles quadrant = (theta * 0.63661977236758134308 + ROUND) - ROUND;
    const Doubles reduced = theta - quadrant * 1.57079632679489661923;
    Floats r = __builtin_convertvector(reduced, Floats);
    // of an angle whose quotient is not exact. as floats, because GCC compares such doubles one by one
    const Floats limit = Floats{} + 0.8f;
    r = ((r > limit) | (r < -limit)) ? limit : r;
    // the quotient modulo 4, while it fits into an int
    const Ints turns = __builtin_convertvector(quadrant, Ints);
    const Floats square = r * r;
    const Floats s = r + r * square * (-1.6666654611e-1f + square * (8.3321608736e-3f + square * -1.9515295891e-4f));
    Floats c = 4.166664568298827e-2f + square * (-1.388731625493765e-3f + square * 2.443315711809948e-5f);
    c = 1.0f - 0.5f * square + square * square * c;
    const Ints odd = (turns & 1) != 0;
    // the sign bit
    sine = (Floats)((Ints)(odd ? c : s) ^ ((turns & 2) << 30));
    cosine = (Floats)((Ints)(odd ? s : c) ^ (((turns + 1) & 2) << 30));
}

// cos and sin of j*theta for j = 0..REACH, each from two of about half its order: rounding grows with j, not j^2
struct Harmonics {
    Floats c[REACH + 1], s[REACH + 1];

    inline Harmonics(Floats sine, Floats cosine) {
        c[0] = Floats{} + 1.0f, s[0] = Floats{};
        c[1] = cosine, s[1] = sine;
#pragma GCC unroll 8
        for (int order = 2; order <= REACH; order++) {
            const int b = order / 2, a = order - b;
            c[order] = c[a - b] - 2.0f * s[b] * s[a];
            s[order] = s[a - b] + 2.0f * s[b] * c[a];
        }
    }

    // those of the next centre, 2H further
    inline void advance(Floats& cos_q, Floats& sin_q) const {
        const Floats cos_2h = 1.0f - 2.0f * s[REACH] * s[REACH], sin_2h = 2.0f * s[REACH] * c[REACH];
        const Floats cosine = cos_q * cos_2h - sin_q * sin_2h;
        sin_q = sin_q * cos_2h + cos_q * sin_2h;
        cos_q = cosine;
    }
};

// adds the basis minus its expectation, times the weights
template <bool WEIGHTED>
static inline void add(Floats sine, Floats cosine, Floats weight, const float* expected, Floats* sums) {
    const Harmonics h(sine, cosine);
    Floats cos_q = h.c[REACH], sin_q = h.s[REACH];
    auto put = [&](int at, Floats product) { sums[at] += WEIGHTED ? weight * product : product; };
#pragma GCC unroll 64
    for (int block = 0; block < BLOCKS; block++) {
        const int first = block * (4 * REACH + 2);
        if (block) h.advance(cos_q, sin_q);
        // products of one sine with one cosine have the expectation 0
        put(first, cos_q - expected[first]);
        put(first + 1, sin_q);
#pragma GCC unroll 8
        for (int j = 1; j <= REACH; j++) {
            const int at = first + 4 * j - 2;
            put(at, cos_q * h.c[j] - expected[at]);
            put(at + 1, sin_q * h.s[j] - expected[at + 1]);
            put(at + 2, sin_q * h.c[j]);
            put(at + 3, cos_q * h.s[j]);
        }
    }
}

template <bool WEIGHTED>
static void sums_of_a_row(const float* p, const float* weights, double step, const float* expected, int64_t length,
                          float* sine, float* cosine, double* sums) {
    Floats totals[FUNCTIONS] = {};
    const int64_t whole = length - length % LANES;
    Floats s, c;
    for (int64_t at = 0; at < whole; at += LANES) {
        sincos(load(p + at), step, s, c);
        store(sine + at, s), store(cosine + at, c);
        add<WEIGHTED>(s, c, WEIGHTED ? load(weights + at) : Floats{}, expected, totals);
    }
    if (const int rest = length - whole) {
        sincos(load(p + whole, rest), step, s, c);
        store(sine + whole, s, rest), store(cosine + whole, c, rest);
        Floats weight = {};
        for (int lane = 0; lane < rest; lane++) weight[lane] = WEIGHTED ? weights[whole + lane] : 1.0f;
        add<true>(s, c, weight, expected, totals);
    }
    for (int function = 0; function < FUNCTIONS; function++) {
        // halves, quarters, ...: lane after lane, each addition would wait for the one before
        double lanes[LANES];
        const Doubles total = __builtin_convertvector(totals[function], Doubles);
        __builtin_memcpy(lanes, &total, sizeof(lanes));
        for (int width = LANES / 2; width; width /= 2)
            for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
        sums[function] = lanes[0];
    }
}

// the linear combination of the basis with these factors
static inline Floats combine(Floats sine, Floats cosine, const float* factors) {
    const Harmonics h(sine, cosine);
    Floats cos_q = h.c[REACH], sin_q = h.s[REACH], total = {};
#pragma GCC unroll 64
    for (int block = 0; block < BLOCKS; block++) {
        const float* of = factors + block * (4 * REACH + 2);
        if (block) h.advance(cos_q, sin_q);
        Floats with_cos = Floats{} + of[0], with_sin = Floats{} + of[1];
#pragma GCC unroll 8
        for (int j = 1; j <= REACH; j++) {
            with_cos += of[4 * j - 2] * h.c[j] + of[4 * j + 1] * h.s[j];
            with_sin += of[4 * j - 1] * h.s[j] + of[4 * j] * h.c[j];
        }
        total += cos_q * with_cos + sin_q * with_sin;
    }
    return total;
}

extern "C" {

int sigreg_has_threads() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// Row r has the weights of chunk r % chunks; without weights they are null.

// p (rows, length) -> sine and cosine (rows, length), and the sums over a row of the basis minus `expected` (rows, F)
void sigreg_sums(const float* p, const float* weights, const float* expected, double step, int64_t rows,
                 int64_t chunks, int64_t length, int threads, float* sine, float* cosine, double* sums) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const int64_t at = row * length;
        if (weights)
            sums_of_a_row<true>(p + at, weights + row % chunks * length, step, expected, length, sine + at,
                                cosine + at, sums + row * FUNCTIONS);
        else
            sums_of_a_row<false>(p + at, nullptr, step, expected, length, sine + at, cosine + at,
                                 sums + row * FUNCTIONS);
    }
}

// sine and cosine (rows, length), factors (rows, F) -> the combination of the basis, times the weights (rows, length)
void sigreg_gradient(const float* sine, const float* cosine, const float* factors, const float* weights, int64_t rows,
                     int64_t chunks, int64_t length, int threads, float* gradient) {
    const int rest = length % LANES;
    const int64_t whole = length - rest;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const float* of = factors + row * FUNCTIONS;
        const float* weight = weights ? weights + row % chunks * length : nullptr;
        const int64_t first = row * length;
        for (int64_t at = 0; at < whole; at += LANES) {
            const Floats total = combine(load(sine + first + at), load(cosine + first + at), of);
            store(gradient + first + at, weight ? total * load(weight + at) : total);
        }
        if (rest) {
            const int64_t from = first + whole;
            const Floats total = combine(load(sine + from, rest), load(cosine + from, rest), of);
            store(gradient + from, weight ? total * load(weight + whole, rest) : total, rest);
        }
    }
}
}
