// Normal deviates from random words, by Box and Muller (1958): what shield rows are made of.
//
//     k = 2²⁴ - ⌊w₁ / 2⁸⌋,  n = ⌊w₂ / 2⁸⌋           24 bits of two words
//     radius = √(-2 log(k 2⁻²⁴)),  angle = 2π n 2⁻²⁴
//     z₁ = radius cos(angle),  z₂ = radius sin(angle)
//
// Logarithm, sine and cosine are polynomials, interpolated at Chebyshev's points and as precise as float is.
#pragma once

#include "simd.hpp"

namespace {

typedef V<float> Floats;
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

constexpr float LOG[] = {0.333333312f, -0.24999997f, 0.200007157f, -0.166678023f, 0.142490576f, -0.124256873f,
                         0.116854199f, -0.11479734f, 0.0697161168f};  // (log(1 + x) - x + x²/2) / x³, √½ to √2
constexpr float SINE[] = {1.57079632f, -0.645963478f, 0.0796802176f, -0.00460214921f};  // sin(πx/2) / x in x², up to ½
constexpr float COSINE[] = {1.0f, -1.23370054f, 0.253669204f, -0.0208600695f, 0.000903628059f};  // cos(πx/2) in x²

INLINE Floats either(Ints mask, Floats yes, Floats no) { return (Floats)((mask & (Ints)yes) | (~mask & (Ints)no)); }
INLINE Floats as_floats(Ints whole) { return __builtin_convertvector(whole, Floats); }

// √(-2 log(k 2⁻²⁴)): k = m 2ᵉ with m between √½ and √2, so that nothing cancels where k is near 2²⁴.
INLINE Floats radius_of(Words word) {
    constexpr int SQRT_HALF_BITS = 0x3F3504F3, FRACTION_BITS = 23, FRACTION = (1 << FRACTION_BITS) - 1;
    const Ints bits = (Ints)as_floats((1 << 24) - (Ints)(word >> 8)) - SQRT_HALF_BITS;
    const Floats exponent = as_floats((bits >> FRACTION_BITS) - 24);
    const Floats x = (Floats)((bits & FRACTION) + SQRT_HALF_BITS) - 1.0f, square = x * x;
    const Floats tail = (square * x) * polynomial<float>(LOG, x) + square * -0.5f;
    const Floats doubled = (exponent * 0.693147181f + (x + tail)) * -2.0f;
    return square_root<float>(either(doubled > 0.0f, doubled, Floats{}));
}

// x, or -x in the second half of a turn: bit 1 of `quarters` becomes the sign.
INLINE Floats with_sign(Floats x, Ints quarters) { return (Floats)((Words)x ^ ((Words)(quarters & 2) << 30)); }

void make_deviates(Deviates *job) {
    constexpr int64_t TOGETHER = 1 << 12, PER_THREAD = 1 << 14;  // fewer pairs are not worth waking a thread for
    Pieces pieces(job->pairs, TOGETHER);
    float *memory = static_cast<float *>(job->words);
    auto work = [&] {
        for (int64_t start, stop; pieces.take(start, stop);)
            for (int64_t pair = start; pair < stop; pair += Simd<float>::width) {
                float *first = memory + pair, *second = first + job->pairs;
                const Floats radius = radius_of((Words)load<float>(first));
                // n is q quarter turns and a rest of half a quarter at most, either way
                const Ints n = (Ints)((Words)load<float>(second) >> 8), quarters = (n + (1 << 21)) >> 22;
                const Floats rest = as_floats(n - (quarters << 22)) * 0x1p-22f, square = rest * rest;
                const Floats s = rest * polynomial<float>(SINE, square), c = polynomial<float>(COSINE, square);
                const Ints odd = (quarters & 1) != 0;
                store<float>(first, radius * with_sign(either(odd, s, c), quarters + 1));
                store<float>(second, radius * with_sign(either(odd, c, s), quarters));
            }
    };
    on_threads(most(least(job->threads, job->pairs / PER_THREAD), 1), work);
}

}  // namespace
