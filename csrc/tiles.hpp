// (Q_a ⊗ Q_b) on tiles: columns of x (mixing) or, transposed on the way in and out, rows of x (rotation). A row of a
// tile is `lanes` numbers, and a core's cache holds the tile.
//
//     tile      (H, k) times (k, lanes), sums in registers: the inner loop of everything
//     times     Q (s, s) times s rows of a tile
//     rotate    a tile of rows of x: transposed in, one or two grids, transposed out
//     mix       tiles of columns of x: straight from x's rows to the result's
#pragma once

#include "few.hpp"
#include "simd.hpp"

namespace {

// Rows at equal distances, or wherever a table says; each can be brought into the cache before it is needed.
struct Strided {
    char *base;
    int64_t step;
    INLINE char *at(int64_t k) const { return base + k * step; }
    INLINE Strided from(int64_t k) const { return {at(k), step}; }
    INLINE void fetch(int64_t k, int64_t line) const { __builtin_prefetch(at(k) + line); }
};
struct Tabled {
    const int64_t *table;
    int64_t every, shift;
    INLINE char *at(int64_t k) const { return reinterpret_cast<char *>(table[k * every] + shift); }
    INLINE Tabled from(int64_t k, int64_t steps = 1) const { return {table + k * every, every * steps, shift}; }
    INLINE Tabled shifted(int64_t bytes) const { return {table, every, shift + bytes}; }
    INLINE void fetch(int64_t k, int64_t line) const { __builtin_prefetch(at(k) + line); }
};
struct Nothing {
    INLINE void fetch(int64_t, int64_t) const {}
};

// Rows 0 … H of `target` = q (k, H), transposed, times x (k, lanes). Meanwhile a line of each of the k rows of `next` is
// brought into the cache: spread over the sums that costs nothing.
template <class T, int H, class To, class Next>
inline void tile(const T *q, int64_t k, const char *x, To target, Next next, int64_t line) {
    V<T> sums[H][VECTORS] = {};
    for (int64_t i = 0; i < k; ++i, q += H, x += Simd<T>::row_bytes) {
        next.fetch(i, line);
        V<T> row[VECTORS];
        UNROLL for (int v = 0; v < VECTORS; ++v) row[v] = load<T>(x + VECTOR_BYTES * v);
        UNROLL for (int m = 0; m < H; ++m)
            UNROLL for (int v = 0; v < VECTORS; ++v) sums[m][v] += row[v] * q[m];
    }
    UNROLL for (int m = 0; m < H; ++m)
        UNROLL for (int v = 0; v < VECTORS; ++v) store<T>(target.at(m) + VECTOR_BYTES * v, sums[m][v]);
}

// A left factor (size, size) as `tile` reads it: block by block, each transposed. `turned`: the factor's transpose.
template <class T> void pack(const void *factor, int64_t size, bool turned, T *out) {
    const T *q = static_cast<const T *>(factor);
    const int64_t row = turned ? 1 : size, column = turned ? size : 1;
    const Blocks blocks(size, TILE_ROWS);
    for (int64_t block = 0; block < blocks.count; ++block) {
        const int64_t height = blocks.height(block);
        for (int64_t k = 0; k < size; ++k)
            for (int64_t m = 0; m < height; ++m) *out++ = q[m * row + k * column];
        q += height * row;
    }
}

// Rows `to` = q (size, size), packed, times rows `from`, which are first copied side by side to `staged`: they are read
// from there several times, and may be the same rows. `seen`, where it is given, looks at them.
template <class T, class From, class To, class Next>
void times(int64_t size, const T *q, From from, To to, char *staged, V<T> *seen, Next next) {
    constexpr int64_t row_bytes = Simd<T>::row_bytes;
    V<T> found[VECTORS] = {};
    for (int64_t k = 0; k < size; ++k)
        UNROLL for (int v = 0; v < VECTORS; ++v) {
            V<T> vector = load<T>(from.at(k) + VECTOR_BYTES * v);
            if (seen) look_at<T>(vector, found[v]);
            store<T>(staged + k * row_bytes + VECTOR_BYTES * v, vector);
        }
    if (seen)
        UNROLL for (int v = 0; v < VECTORS; ++v) *seen += found[v];
    const Blocks blocks(size, TILE_ROWS);
    for (int64_t block = 0, row = 0; block < blocks.count; ++block) {
        const int64_t height = blocks.height(block), line = block * CACHE_LINE < row_bytes ? block * CACHE_LINE : 0;
        with_height<TILE_ROWS>(height, [&](auto h) {
            tile<T, decltype(h)::value>(q, size, staged, to.from(row), next, line);
        });
        row += height;
        q += height * size;
    }
}

// The factors of a grid, to be packed by each thread for itself: that takes less than waiting for another that does.
template <class T> struct Factors {
    Factors(Layout &layout, int64_t a, int64_t b)
        : a(a), b(b), q_a(layout.take<T>(a * a)), q_b(layout.take<T>(b * b)),
          staged(layout.take<char>(most(a, b) * Simd<T>::row_bytes)) {}
    void fill(const void *from_a, const void *from_b, bool turned) {
        pack<T>(from_a, a, turned, q_a);
        pack<T>(from_b, b, turned, q_b);
    }
    int64_t a, b;
    T *q_a, *q_b;
    char *staged;
};

// One tile of rows of x on one grid, in its place.
template <class T> void on_grid(const Factors<T> &grid, Strided rows) {
    for (int64_t i = 0; i < grid.a; ++i) {
        Strided group = rows.from(i * grid.b);
        times<T>(grid.b, grid.q_b, group, group, grid.staged, nullptr, Nothing());
    }
    for (int64_t j = 0; grid.a > 1 && j < grid.b; ++j) {
        Strided group = {rows.at(j), rows.step * grid.b};
        times<T>(grid.a, grid.q_a, group, group, grid.staged, nullptr, Nothing());
    }
}

// Where a block of columns begins, a vector wide: the last one overlaps the one before.
template <class T> INLINE int64_t block_of_columns(int64_t block, int64_t width) {
    return least(block, width - Simd<T>::width);
}

// Row places[j] of the tile = column j of the rows.
template <class T>
void transpose_in(const T *const *rows, int64_t width, const int64_t *places, char *tile, V<T> &seen) {
    constexpr int W = Simd<T>::width;
    for (int64_t block = 0; block < width; block += W) {
        const int64_t column = block_of_columns<T>(block, width);
        for (int v = 0; v < VECTORS; ++v) {
            V<T> square[W];
            UNROLL for (int i = 0; i < W; ++i) square[i] = load<T>(rows[v * W + i] + column);
            UNROLL for (int i = 0; i < W; ++i) look_at<T>(square[i], seen);
            transpose<T>(square);
            UNROLL for (int j = 0; j < W; ++j)
                store<T>(tile + places[column + j] * Simd<T>::row_bytes + v * VECTOR_BYTES, square[j]);
        }
    }
}

// Column j of the rows = row places[j] of the tile, plus number j of `bias`, if any.
template <class T>
void transpose_out(const char *tile, const int64_t *places, const T *bias, T *const *rows, int64_t width) {
    constexpr int W = Simd<T>::width;
    for (int64_t block = 0; block < width; block += W) {
        const int64_t column = block_of_columns<T>(block, width);
        const V<T> added = bias ? load<T>(bias + column) : V<T>{};
        for (int v = 0; v < VECTORS; ++v) {
            V<T> square[W];
            UNROLL for (int j = 0; j < W; ++j)
                square[j] = load<T>(tile + places[column + j] * Simd<T>::row_bytes + v * VECTOR_BYTES);
            transpose<T>(square);
            UNROLL for (int i = 0; i < W; ++i) store<T>(rows[v * W + i] + column, square[i] + added);
        }
    }
}

template <class T> void rotate_tiles(Rotation &job, Pieces &pieces) {
    constexpr int64_t row_bytes = Simd<T>::row_bytes, lanes = Simd<T>::lanes;
    const bool two = job.between != nullptr;
    const Grid &g = job.grids[0], &h = two ? job.grids[1] : Grid{};
    struct Area {
        Factors<T> first, second;
        char *tile, *other;
        T *zeros, *unused;
    };
    Area area = laid_out([&](Layout &layout) {
        Factors<T> first(layout, g.a, g.b), second(layout, h.a, h.b);
        char *tile = layout.take<char>(job.width * row_bytes);
        char *other = layout.take<char>(two ? job.width * row_bytes : 0);
        return Area{first, second, tile, other, layout.take<T>(job.width), layout.take<T>(job.width)};
    });
    area.first.fill(g.q_a, g.q_b, true);
    area.second.fill(h.q_a, h.q_b, true);
    memset(area.zeros, 0, (size_t)job.width * sizeof(T));
    V<T> seen = {};
    for (int64_t tile, stop; pieces.take(tile, stop);) {
        const T *from[lanes];
        T *to[lanes];
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t row = tile * lanes + lane;
            const bool beyond = row >= job.rows;
            from[lane] = beyond ? area.zeros : static_cast<const T *>(job.x) + row * job.x_stride;
            to[lane] = beyond ? area.unused : static_cast<T *>(job.y) + row * job.width;
        }
        transpose_in<T>(from, job.width, job.first_inverse, area.tile, seen);
        on_grid<T>(area.first, {area.tile + g.start * row_bytes, row_bytes});
        if (two) {
            for (int64_t k = 0; k < job.width; ++k)
                memcpy(area.other + k * row_bytes, area.tile + job.between[k] * row_bytes, row_bytes);
            on_grid<T>(area.second, {area.other + h.start * row_bytes, row_bytes});
        }
        transpose_out<T>(two ? area.other : area.tile, job.last, static_cast<const T *>(job.bias), to, job.width);
    }
    if (!is_clean<T>(seen)) forget_finite(job.finite);
}

// Few rows would leave most of a tile empty; those of a grid that is narrower than a vector must go that way all the
// same.
template <class T> void rotate(Rotation *job) {
    constexpr int64_t lanes = Simd<T>::lanes;
    const int64_t narrowest = job->between ? least(job->grids[0].b, job->grids[1].b) : job->grids[0].b;
    job->finite = 1;
    if (job->rows < lanes / 2 && narrowest >= Simd<T>::width) return rotate_few<T>(*job);
    const int64_t tiles = parts(job->rows, lanes);
    Pieces pieces(tiles, 1);
    auto work = [&] { rotate_tiles<T>(*job, pieces); };
    on_threads(threads_for(job->threads, tiles, job->rows * job->width), work);
}

template <class T> void mix_tiles(Mixing &job, Pieces &pieces, int64_t together) {
    constexpr int64_t row_bytes = Simd<T>::row_bytes;
    const int64_t a = job.a, b = job.b, step = together * row_bytes;
    const int64_t last = job.columns * (int64_t)sizeof(T) - row_bytes;  // the last tile overlaps the one before
    struct Area {
        Factors<T> factors;
        char *between;
    };
    Area area = laid_out([&](Layout &layout) {
        Factors<T> factors(layout, a, b);
        return Area{factors, layout.take<char>(a > 1 ? a * b * step : 0)};
    });
    const Factors<T> &grid = area.factors;
    area.factors.fill(job.q_a, job.q_b, job.transposed != 0);
    const Tabled sources{job.sources, 1, 0}, targets{job.targets, 1, 0};
    V<T> seen = {};
    for (int64_t first, stop; pieces.take(first, stop);) {
        // Tiles inmost, so that few rows are read and written at a time, and long pieces of each.
        for (int64_t i = 0; i < a; ++i)
            for (int64_t tile = first; tile < stop; ++tile) {
                const int64_t shift = least(tile * row_bytes, last);
                const Tabled from = sources.from(i * b).shifted(shift), next = from.shifted(row_bytes);
                if (a == 1) {
                    times<T>(b, grid.q_b, from, targets.shifted(shift), grid.staged, &seen, next);
                } else {
                    const Strided to{area.between + (tile - first) * row_bytes + i * b * step, step};
                    times<T>(b, grid.q_b, from, to, grid.staged, &seen, next);
                }
            }
        for (int64_t j = 0; a > 1 && j < b; ++j)
            for (int64_t tile = first; tile < stop; ++tile) {
                const Strided from{area.between + (tile - first) * row_bytes + j * step, b * step};
                const Tabled to = targets.from(j, b).shifted(least(tile * row_bytes, last));
                times<T>(a, grid.q_a, from, to, grid.staged, nullptr, to.shifted(row_bytes));
            }
    }
    if (!is_clean<T>(seen)) forget_finite(job.finite);
}

template <class T> void mix(Mixing *job) {
    constexpr int64_t TOGETHER_BYTES = 1 << 20, TOGETHER = 8;
    const int64_t cells = job->a * job->b, tiles = parts(job->columns, Simd<T>::lanes);
    const int64_t fitting = least(TOGETHER_BYTES / (cells * Simd<T>::row_bytes), tiles / (2 * job->threads));
    const int64_t together = most(least(fitting, TOGETHER), 1);
    job->finite = 1;
    Pieces pieces(tiles, together);
    auto work = [&] { mix_tiles<T>(*job, pieces, together); };
    on_threads(threads_for(job->threads, tiles, cells * job->columns), work);
}

}  // namespace
