// One-time masks: normal deviates in double on a grid, from random words; rows plus their masks; products less theirs.
//
//     k = 2⁶⁴ - w₁,  n = w₂                         all 64 bits of two words
//     radius = √(-2 log(k 2⁻⁶⁴)),  angle = 2π n 2⁻⁶⁴
//     z₁ = radius cos(angle),  z₂ = radius sin(angle)
//     r = grid ⌊scale z⌋
//
// This is what deviates.hpp does, with nothing lost to cancellation: each z is exact to 2⁻⁴⁹ of itself. The logarithm
// is taken of w₁ 2⁻⁶⁴ subtracted from 1 where it is small, and of k 2⁻⁶⁴ elsewhere, so that the radius is as precise near
// 0 as in the tail, which ends at 9.4. The polynomials are interpolated at Chebyshev's points and err by 2⁻⁵⁷ at most.
//
// Rounded down, not to the nearest: of a z between 2 and 4 only one bit lies below a grid of 2⁻⁵⁰, so half of all numbers
// would be ties, and the lowest bit of r even three times out of four.
#pragma once

#include "simd.hpp"

namespace {

typedef V<double> Doubles;
typedef int64_t Longs __attribute__((vector_size(VECTOR_BYTES)));
typedef uint64_t LongWords __attribute__((vector_size(VECTOR_BYTES)));

constexpr double LOG_64[] = {0.666666666666667, 0.39999999999899505, 0.28571428625975487, 0.2222221113479508,
                             0.18182889125261723, 0.15331721600556042,
                             0.14616449685043406};  // (log((1 + s) / (1 - s)) / s - 2) / s² in s², up to (√2 - 1)⁴
constexpr double SINE_64[] = {1.5707963267948966, -0.6459640975062443, 0.07969262624604301, -0.004681754132340976,
                              0.0001604411507421909, -3.59864335298231e-06, 5.633933781537854e-08};
constexpr double COSINE_64[] = {1.0, -1.2337005501361697, 0.2536695079010467, -0.02086348076331121,
                                0.0009192602741831558, -2.520203677046026e-05, 4.710609726757823e-07,
                                -6.321256869628588e-09};

INLINE Doubles either(Longs mask, Doubles yes, Doubles no) { return (Doubles)((mask & (Longs)yes) | (~mask & (Longs)no)); }

// word - `offset`, rounded once; offset: a multiple of 2³². Both halves of a word are written into the bits of a double.
INLINE Doubles as_doubles(LongWords word, double offset = 0) {
    constexpr uint64_t LOW = 0x4330000000000000, HIGH = 0x4530000000000000;  // 2⁵² and 2⁸⁴
    const Doubles low = (Doubles)((word & 0xFFFFFFFF) | LOW), high = (Doubles)((word >> 32) | HIGH);
    return (high - (0x1p84 + 0x1p52 + offset)) + low;
}

// √(-2 log(1 - word 2⁻⁶⁴)).
INLINE Doubles radius_of(LongWords word) {
    constexpr uint64_t SQRT_HALF_BITS = 0x3FE6A09E667F3BCD, FRACTION = (1ull << 52) - 1, LOW = 0x4330000000000000;
    const Doubles below = as_doubles(word);
    const LongWords bits = (LongWords)as_doubles(-word) - SQRT_HALF_BITS;  // of k = m 2ᵉ, m between √½ and √2
    const Longs near = below < 0x1.2bec333018866p62;  // (1 - √½) 2⁶⁴: k 2⁻⁶⁴ is above √½
    const Doubles exponent = either(near, Doubles{}, (Doubles)((bits >> 52) | LOW) - (0x1p52 + 64));
    const Doubles x = either(near, below * -0x1p-64, (Doubles)((bits & FRACTION) + SQRT_HALF_BITS) - 1.0);
    const Doubles s = x / (x + 2.0), square = s * s;
    const Doubles log = s * 2.0 + (s * square) * polynomial<double>(LOG_64, square);
    return square_root<double>((exponent * 0x1.62e42fefa39efp-1 + log) * -2.0);
}

// The nearest whole number, ties to even; what has no fraction stays.
INLINE Doubles whole(Doubles x) {
    constexpr uint64_t SIGN = 1ull << 63;
    const Doubles size = (Doubles)((LongWords)x & ~SIGN);
    const Doubles rounded = either(size < 0x1p52, (size + 0x1p52) - 0x1p52, size);
    return (Doubles)((LongWords)rounded | ((LongWords)x & SIGN));
}

INLINE Doubles rounded_down(Doubles x) {
    const Doubles nearest = whole(x);
    return either(nearest > x, nearest - 1.0, nearest);
}

INLINE Doubles with_sign(Doubles x, LongWords quarters) { return (Doubles)((LongWords)x ^ ((quarters & 2) << 62)); }

// Two normal numbers of the standard deviation `scale`, of two words.
INLINE void normal_pair(LongWords first, LongWords second, double scale, Doubles &one, Doubles &other) {
    const Doubles radius = radius_of(first) * scale;
    // n is q quarter turns and a rest of half a quarter at most, either way
    constexpr uint64_t HALF = 1ull << 61, REST = (1ull << 62) - 1;
    const LongWords n = second + HALF, quarters = n >> 62;
    const Doubles rest = as_doubles(n & REST, 0x1p61) * 0x1p-62, square = rest * rest;
    const Doubles s = rest * polynomial<double>(SINE_64, square), c = polynomial<double>(COSINE_64, square);
    const Longs odd = (quarters & 1) != 0;
    one = radius * with_sign(either(odd, s, c), quarters + 1);
    other = radius * with_sign(either(odd, c, s), quarters);
}

void make_grid_normals(GridNormals *job) {
    constexpr int64_t TOGETHER = 1 << 11, PER_THREAD = 1 << 12;  // fewer pairs are not worth waking a thread for
    Pieces pieces(job->pairs, TOGETHER);
    double *memory = static_cast<double *>(job->words);
    const double scale = job->scale, grid = job->grid;
    auto work = [&] {
        for (int64_t start, stop; pieces.take(start, stop);)
            for (int64_t pair = start; pair < stop; pair += Simd<double>::width) {
                double *first = memory + pair, *second = first + job->pairs;
                Doubles one, other;
                normal_pair((LongWords)load<double>(first), (LongWords)load<double>(second), scale, one, other);
                store<double>(first, rounded_down(one) * grid);
                store<double>(second, rounded_down(other) * grid);
            }
    };
    on_threads(most(least(job->threads, job->pairs / PER_THREAD), 1), work);
}

// A row at a time: x is rounded to the grid, its mask is added, and the sum is written where it is sent from.
template <class T> void mask_rows(MaskRows *job) {
    constexpr int W = Simd<double>::width;
    const double grid = job->grid, per_unit = 1 / grid;
    Pieces pieces(job->rows, most((1 << 13) / job->width, 1));
    job->finite = 1;
    auto work = [&] {
        V<double> seen = {};
        auto masked = [&](const T *x, const double *r) {
            const Doubles numbers = load_as<double, T>(x);
            look_at<double>(numbers, seen);
            return whole(numbers * per_unit) * grid + load<double>(r);
        };
        for (int64_t start, stop; pieces.take(start, stop);)
            for (int64_t row = start; row < stop; ++row) {
                const T *x = static_cast<const T *>(job->x) + row * job->x_stride;
                const double *r = job->r + row * job->r_stride;
                double *out = job->out + row * job->out_stride;
                int64_t j = 0;
                for (; j + W <= job->width; j += W) store<double>(out + j, masked(x + j, r + j));
                if (j == job->width) continue;
                const size_t left = (size_t)(job->width - j);  // `out` may be `r`: no number is masked twice
                T x_left[W] = {};
                double r_left[W] = {};
                memcpy(x_left, x + j, left * sizeof(T));
                memcpy(r_left, r + j, left * sizeof(double));
                store<double>(r_left, masked(x_left, r_left));
                memcpy(out + j, r_left, left * sizeof(double));
            }
        if (!is_clean<double>(seen)) forget_finite(job->finite);
    };
    on_threads(threads_for(job->threads, job->rows, job->rows * job->width), work);
}

// The product of the mask is taken away, and nothing of it is left. y is read once: a worker may be writing to it.
template <class T> void unmask_rows(UnmaskRows *job) {
    constexpr int W = Simd<double>::width;
    typedef T Narrow __attribute__((vector_size(W * sizeof(T))));
    const int64_t elements = job->rows * job->width, whole = elements / W * W;
    Pieces pieces(elements, 1 << 13);
    T *out = static_cast<T *>(job->out);
    auto work = [&] {
        for (int64_t start, stop; pieces.take(start, stop);) {
            for (int64_t i = start; i < least(stop, whole); i += W) {
                const Narrow numbers = __builtin_convertvector(load<double>(job->y + i) - load<double>(job->product + i), Narrow);
                memcpy(out + i, &numbers, sizeof numbers);
            }
            for (int64_t i = most(start, whole); i < stop; ++i) out[i] = (T)(job->y[i] - job->product[i]);
            memset(job->product + start, 0, (size_t)(stop - start) * sizeof(double));
        }
    };
    on_threads(threads_for(job->threads, parts(elements, 1 << 13), elements), work);
}

}  // namespace
