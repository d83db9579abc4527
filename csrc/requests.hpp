// One request of few rows, from the rows that are asked for to those that are answered, on the calling thread:
//
//     send      normal numbers  ->  A, shield rows N        x  ->  D x  ->  D x R  ->  A [D x R; N]
//     image     random words    ->  c, orthonormal          U c = A ([D x R; N] V) c
//     excess    how far a product Y is from that: |(Y R)c - U c| over what rounding explains
//     receive   Y  ->  (Aᵀ Y)[:n]  ->  rotated back  ->  D⁻¹, plus the bias
//
// enclave/mixing.py and enclave/verification.py say what these are, and compute the same for many rows.
#pragma once

#include "few.hpp"
#include "masks.hpp"
#include "sketches.hpp"
#include "tiles.hpp"

namespace {

// The orthogonal factor of a (m, m), row-major, by Householder's reflections, with the signs of R's diagonal moved into
// it: Haar's distribution where a is normal (Mezzadri 2007). q takes the result; a is overwritten.
inline void orthogonal_factor(double *a, double *q, int64_t m) {
    double scales[MOST_FEW], signs[MOST_FEW];
    for (int64_t j = 0; j < m; ++j) {  // the reflection 1 - scale v vᵀ; v lies below the diagonal of column j
        double square = 0;
        for (int64_t i = j; i < m; ++i) square += a[i * m + j] * a[i * m + j];
        const double first = a[j * m + j], norm = __builtin_sqrt(square), diagonal = first > 0 ? -norm : norm;
        signs[j] = first > 0 ? -1 : 1;
        a[j * m + j] -= diagonal;
        const double product = norm * (norm + (first > 0 ? first : -first));  // |v|² / 2
        scales[j] = product > 0x1p-900 ? 1 / product : 0;  // nothing is left of dependent columns: nothing is reflected
        for (int64_t k = j + 1; k < m; ++k) {
            double sum = 0;
            for (int64_t i = j; i < m; ++i) sum += a[i * m + j] * a[i * m + k];
            sum *= scales[j];
            for (int64_t i = j; i < m; ++i) a[i * m + k] -= sum * a[i * m + j];
        }
    }
    for (int64_t i = 0; i < m * m; ++i) q[i] = i % (m + 1) == 0;
    for (int64_t j = m - 1; j >= 0; --j)
        for (int64_t k = j; k < m; ++k) {
            double sum = 0;
            for (int64_t i = j; i < m; ++i) sum += a[i * m + j] * q[i * m + k];
            sum *= scales[j];
            for (int64_t i = j; i < m; ++i) q[i * m + k] -= sum * a[i * m + j];
        }
    for (int64_t i = 0; i < m * m; ++i) q[i] *= signs[i % m];
}

// The root mean square of a row: 0 for one of zeros, NaN for one that is not finite.
template <class T> double size_of_row(const T *x, int64_t width) {
    constexpr int W = Simd<double>::width;
    constexpr double LARGEST = 0x1p900;  // beyond, and below its inverse, squares overflow or vanish
    V<double> sums = {}, seen = {};
    double sum = 0, unseen = 0, peak = 0;
    int64_t j = 0;
    for (; j + W <= width; j += W) {
        const V<double> numbers = load_as<double, T>(x + j);
        look_at<double>(numbers, seen);
        sums += numbers * numbers;
    }
    for (; j < width; ++j) {
        unseen += (double)x[j] * 0;
        sum += (double)x[j] * (double)x[j];
    }
    for (int lane = 0; lane < W; ++lane) sum += sums[lane];
    if (!is_clean<double>(seen) || unseen != 0) return __builtin_nan("");
    if (sum > 1 / LARGEST && sum < LARGEST) return __builtin_sqrt(sum / (double)width);
    for (j = 0; j < width; ++j) peak = __builtin_fmax(peak, __builtin_fabs((double)x[j]));
    if (peak == 0) return 0;
    sum = 0;
    for (j = 0; j < width; ++j) {
        const double number = (double)x[j] / peak;
        sum += number * number;
    }
    return __builtin_sqrt(sum / (double)width) * peak;
}

// 2ᵉ for a number in (2ᵉ⁻¹, 2ᵉ], within what T and its inverse hold as normal numbers; 1 for 0.
template <class T> double power_of(double size) {
    constexpr int LARGEST = sizeof(T) == 4 ? 126 : 1022;
    int exponent = 0;
    const double mantissa = __builtin_frexp(size, &exponent);
    exponent -= mantissa == 0.5;
    return __builtin_ldexp(1.0, exponent > LARGEST ? LARGEST : exponent < -LARGEST ? -LARGEST : exponent);
}

template <class T> void send_few(FewRequest *job) {
    const int64_t m = job->m, n = job->n, p = job->p;
    T *A = static_cast<T *>(job->mixing), *turned = A + m * m, *stack = turned + m * m;
    const T *normal = static_cast<const T *>(job->normal), *x = static_cast<const T *>(job->x);
    double squares = 0;
    job->finite = 1;
    for (int64_t i = 0; i < n; ++i) {
        const double size = size_of_row(x + i * job->x_stride, p), up = power_of<T>(size);
        if (!(size <= 0x1.fffffffffffffp1023)) {
            job->finite = 0;
            return;
        }
        const T down = (T)(1 / up);
        job->up[i] = size == 0 ? 0 : up;
        squares += size / up * (size / up);
        for (int64_t j = 0; j < p; ++j) stack[i * p + j] = x[i * job->x_stride + j] * down;
    }
    job->mean_square = squares / (double)n;
    if (job->turn) {
        Rotation turn = *job->turn;
        turn.x = turn.y = stack;
        turn.rows = n;
        turn.x_stride = p;
        turn.threads = 1;
        rotate<T>(&turn);
    }
    double a[MOST_FEW * MOST_FEW], q[MOST_FEW * MOST_FEW];
    for (int64_t i = 0; i < m * m; ++i) a[i] = (double)normal[i];
    orthogonal_factor(a, q, m);
    for (int64_t i = 0; i < m * m; ++i) {
        A[i] = (T)q[i];
        turned[i % m * m + i / m] = (T)q[i];
    }
    const T size = (T)job->shield_size;
    for (int64_t i = 0; i < (m - n) * p; ++i) stack[n * p + i] = normal[m * m + i] * size;
    multiply_few<T>(A, false, stack, static_cast<T *>(job->out), m, m, p);
}

// Orthonormal columns c (8, k) from normal numbers, by Gram and Schmidt.
inline void orthonormal(double *c, int64_t k) {
    for (int64_t j = 0; j < k; ++j) {
        for (int64_t before = 0; before < j; ++before) {
            double sum = 0;
            for (int i = 0; i < SKETCHES; ++i) sum += c[i * k + before] * c[i * k + j];
            for (int i = 0; i < SKETCHES; ++i) c[i * k + j] -= sum * c[i * k + before];
        }
        double square = 0;
        for (int i = 0; i < SKETCHES; ++i) square += c[i * k + j] * c[i * k + j];
        for (int i = 0; i < SKETCHES; ++i) c[i * k + j] /= __builtin_sqrt(square);
    }
}

// k columns of eight numbers each, which nothing but `words` decides.
inline void make_directions(Directions *job) {
    constexpr int64_t W = Simd<double>::width;
    const int64_t pairs = SKETCHES * job->k / 2;
    double *first = job->c, *second = first + pairs;
    for (int64_t i = 0; i < pairs; i += W) {
        LongWords words[2];
        memcpy(&words[0], job->words + 8 * i, sizeof words[0]);
        memcpy(&words[1], job->words + 8 * (pairs + i), sizeof words[1]);
        Doubles one, other;
        normal_pair(words[0], words[1], 1, one, other);
        store<double>(first + i, one);
        store<double>(second + i, other);
    }
    orthonormal(job->c, job->k);
}

// The largest deviation of any row over what rounding explains there; infinite where either is not finite.
template <class T> void excess(Excess *job) {
    const int64_t rows = job->rows, k = job->k;
    struct Area {
        double *images, *squares;
    };
    const Area area = laid_out([&](Layout &layout) {
        return Area{layout.take<double>(rows * SKETCHES), layout.take<double>(rows)};
    });
    Projection product = {job->y, job->r, area.images, area.squares, rows, job->width, job->y_stride, job->threads,
                          nullptr};
    project<T>(&product);
    double mean = 0, largest = 0;
    job->finite = 1;
    for (int64_t i = 0; i < rows; ++i) {
        if (!__builtin_isfinite(area.squares[i])) job->finite = 0;
        if (area.squares[i] > job->largest_square) area.squares[i] = job->largest_square;
        mean += area.squares[i] / (double)rows;
    }
    for (int64_t i = 0; i < rows; ++i) {
        const double tau = job->unit * (__builtin_sqrt(area.squares[i]) + (job->expected + __builtin_sqrt(mean))) +
                           job->of_masks;
        for (int64_t j = 0; j < k; ++j) {
            double deviation = 0;
            for (int v = 0; v < SKETCHES; ++v)
                deviation += (area.images[i * SKETCHES + v] - job->images[i * SKETCHES + v]) * job->c[v * k + j];
            const double ratio = __builtin_fabs(deviation) / tau;
            if (!__builtin_isfinite(tau) || !__builtin_isfinite(ratio)) {
                job->excess = __builtin_inf();
                return;
            }
            if (ratio > largest) largest = ratio;
        }
    }
    job->excess = largest;
}

template <class T> void receive_few(FewRequest *job) {
    const int64_t m = job->m, n = job->n, q = job->q;
    T *answer = static_cast<T *>(job->answer);
    const T *turned = static_cast<const T *>(job->mixing) + m * m, *bias = static_cast<const T *>(job->bias);
    multiply_few<T>(turned, false, static_cast<const T *>(job->y), answer, n, m, q);
    V<T> seen = {};  // y may be written to meanwhile: what was read is looked at
    for (int64_t j = 0; j < n * q; j += Simd<T>::width) look_at<T>(load<T>(answer + least(j, n * q - Simd<T>::width)), seen);
    job->finite = is_clean<T>(seen);
    if (job->back) {
        Rotation back = *job->back;
        back.x = back.y = answer;
        back.rows = n;
        back.x_stride = q;
        back.threads = 1;
        rotate<T>(&back);
    }
    job->squares = 0;
    for (int64_t i = 0; i < n; ++i) {
        T *row = answer + i * q;
        const T up = (T)job->up[i];
        V<double> sums = {};
        int64_t j = 0;
        for (; j + Simd<double>::width <= q; j += Simd<double>::width) {
            const V<double> numbers = load_as<double, T>(row + j);
            sums += numbers * numbers;
        }
        for (; j < q; ++j) job->squares += (double)row[j] * (double)row[j];
        for (int lane = 0; lane < Simd<double>::width; ++lane) job->squares += sums[lane];
        for (j = 0; j < q; ++j) row[j] *= up;
        for (j = 0; bias && j < q; ++j) row[j] += bias[j];
    }
}

}  // namespace
