// The worker's product for few rows: x (m, p) times w (p, q), which is read once. A BLAS copies w into another order
// first, which pays with many rows (docs/adr/0011). A w of float is widened where x is double: it is read from memory in
// half the time, and no copy of it is made.
//
//     for each piece of columns, by whichever thread is free: its sums (m, columns) fit in the second cache
//         for each chunk of rows of w                  read from memory once, from left to right
//             x's numbers for it turned, so that those of one row of w lie side by side
//             for each strip of columns, a few vectors wide
//                 its numbers side by side, widened    where several blocks of rows are to read them
//                 for each block of rows of x
//                     sums in registers  +=  x's numbers, one after another, times vectors of w
//                     these are added to the sums of the chunks before
//
// The last strip of the matrix overlaps the one before; its columns are computed twice, to the same bits.
#pragma once

#include "simd.hpp"

namespace {

constexpr int STRIP_SUMS = VECTOR_BYTES == 64 ? 24 : 12;  // vectors of them in registers
constexpr int WIDE_STRIP = 4, STRIP = VECTOR_BYTES == 64 ? 4 : 2;  // vectors in a row of a strip
constexpr int64_t AHEAD = 192;            // bytes of w from the strip that is multiplied by to the one that is fetched
constexpr int64_t PIECE_BYTES = 1 << 12;  // of a row of sums, at most

// Numbers T of x and of sums, M of w; vectors in a row of a strip; rows of w that are read side by side.
template <class T_, class M_, int VECTORS_, int64_t CHUNK> struct FewStrip {
    typedef T_ T;
    typedef M_ M;
    static constexpr int vectors = VECTORS_, rows = STRIP_SUMS / VECTORS_;  // of x, in a block
    static constexpr int64_t chunk = CHUNK;
    static constexpr int64_t bytes = VECTORS_ * VECTOR_BYTES, w_bytes = bytes * sizeof(M) / sizeof(T);
};

template <int64_t BYTES> INLINE void fetch(const char *place) {
    UNROLL for (int64_t line = 0; line < BYTES; line += CACHE_LINE) __builtin_prefetch(place + line, 0, 2);
}

// A strip of sums (H, …) gains x (rows, H), of `x_step` numbers a row, transposed, times rows of w, numbers of M; meanwhile
// the strip at `coming` is fetched.
template <class S, class M, bool FETCH, int H>
inline void multiply_strip(const typename S::T *x, int64_t x_step, const char *w, int64_t step, int64_t rows, char *sums,
                           const char *coming) {
    typedef typename S::T T;
    V<T> totals[H][S::vectors] = {};
    for (int64_t k = 0; k < rows; ++k, w += step, coming += step) {
        if constexpr (FETCH) fetch<S::w_bytes>(coming);
        V<T> vectors[S::vectors];
        UNROLL for (int v = 0; v < S::vectors; ++v)
            vectors[v] = load_as<T, M>(w + (int64_t)(VECTOR_BYTES * sizeof(M) / sizeof(T)) * v);
        UNROLL for (int m = 0; m < H; ++m)
            UNROLL for (int v = 0; v < S::vectors; ++v) totals[m][v] += vectors[v] * x[k * x_step + m];
    }
    UNROLL for (int m = 0; m < H; ++m)
        UNROLL for (int v = 0; v < S::vectors; ++v) {
            char *place = sums + m * S::bytes + VECTOR_BYTES * v;
            store<T>(place, load<T>(place) + totals[m][v]);
        }
}

template <class S> void pieces_of_few_rows(const FewRows &job, Pieces &pieces, int64_t piece) {
    typedef typename S::T T;
    typedef typename S::M M;
    constexpr int64_t FETCHED = most(AHEAD / S::w_bytes, 1);
    constexpr int64_t UNPACKED = sizeof(M) < sizeof(T) ? 1 : 2;  // blocks that do not pay for a copy of the strip
    const int64_t m = job.m, step = job.q * (int64_t)sizeof(M), last = job.q - S::bytes / (int64_t)sizeof(T);
    const Blocks blocks(m, S::rows);
    char *packed = scratch((S::chunk + m * piece) * S::bytes + S::chunk * m * (int64_t)sizeof(T));
    char *sums = packed + S::chunk * S::bytes;
    T *turned = reinterpret_cast<T *>(sums + m * piece * S::bytes);
    auto column_of = [&](int64_t number) { return least(number * (S::bytes / (int64_t)sizeof(T)), last); };
    for (int64_t first, stop; pieces.take(first, stop);) {
        memset(sums, 0, (size_t)(m * (stop - first) * S::bytes));  // strip by strip, (m, …) each
        for (int64_t k = 0; k < job.p; k += S::chunk) {
            const int64_t rows = least(job.p - k, S::chunk);
            for (int64_t row = 0; row < m; ++row)
                for (int64_t i = 0; i < rows; ++i)
                    turned[i * m + row] = static_cast<const T *>(job.x)[row * job.p + k + i];
            const char *w = static_cast<const char *>(job.w) + k * step;
            for (int64_t number = first; number < stop; ++number) {
                const char *column = w + column_of(number) * (int64_t)sizeof(M), *coming;
                if (number + FETCHED < stop)
                    coming = w + column_of(number + FETCHED) * (int64_t)sizeof(M);
                else  // of the chunk that follows
                    coming = w + S::chunk * step +
                             column_of(least(number + FETCHED - stop + first, stop - 1)) * (int64_t)sizeof(M);
                char *total = sums + (number - first) * m * S::bytes;
                auto blocks_by = [&](auto multiply) {
                    for (int64_t block = 0, row = 0; block < blocks.count; row += blocks.height(block++))
                        with_height<S::rows>(blocks.height(block), [&](auto h) { multiply(h, block, row); });
                };
                if (blocks.count <= UNPACKED) {
                    blocks_by([&](auto h, int64_t block, int64_t row) {
                        multiply_strip<S, M, true, decltype(h)::value>(turned + row, m, column, step, rows,
                                                                       total + row * S::bytes, block ? column : coming);
                    });
                    continue;
                }
                for (int64_t row = 0; row < rows; ++row, column += step, coming += step) {
                    fetch<S::w_bytes>(coming);
                    UNROLL for (int v = 0; v < S::vectors; ++v)
                        store<T>(packed + row * S::bytes + VECTOR_BYTES * v,
                                 load_as<T, M>(column + (int64_t)(VECTOR_BYTES * sizeof(M) / sizeof(T)) * v));
                }
                blocks_by([&](auto h, int64_t, int64_t row) {
                    multiply_strip<S, T, false, decltype(h)::value>(turned + row, m, packed, S::bytes, rows,
                                                                    total + row * S::bytes, packed);
                });
            }
        }
        for (int64_t number = first; number < stop; ++number)
            for (int64_t row = 0; row < m; ++row)
                memcpy(static_cast<T *>(job.out) + row * job.out_stride + column_of(number),
                       sums + ((number - first) * m + row) * S::bytes, S::bytes);
    }
}

template <class S> void multiply_in_strips(const FewRows &job) {
    const int64_t strips = parts(job.q * (int64_t)sizeof(typename S::T), S::bytes), each = parts(strips, job.threads);
    const int64_t piece = parts(each, parts(each * S::bytes, PIECE_BYTES));  // as many for one thread as for others
    Pieces pieces(strips, piece);
    auto work = [&] { pieces_of_few_rows<S>(job, pieces, piece); };
    on_threads(least(job.threads, strips), work);
}

template <class T> void multiply_few_rows(FewRows *job) {
    if (sizeof(T) == 8 && job->w_itemsize == 4) {
        if (job->m <= STRIP_SUMS / WIDE_STRIP)  // whole lines of w
            multiply_in_strips<FewStrip<T, float, WIDE_STRIP, 16>>(*job);
        else
            multiply_in_strips<FewStrip<T, float, STRIP, 32>>(*job);
    } else
        multiply_in_strips<FewStrip<T, T, STRIP, 16>>(*job);
}

}  // namespace
