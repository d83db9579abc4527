// Vectors of the instruction set that this is compiled for, threads, and scratch memory.
//
// Everything lies in an unnamed namespace, and no function template of the standard library is used: each instruction
// set has its own copy, so the linker cannot hand code for a newer processor to an older one.
#pragma once

#include <stdlib.h>
#include <string.h>

#include "kernels.hpp"

#if defined(__AVX512F__)  // 32 registers of 64 bytes
#define VECTOR_BYTES 64
#define TILE_ROWS 8
#elif defined(__AVX2__)  // 16 of 32 bytes
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#elif defined(__aarch64__)  // 32 of 16 bytes
#define VECTOR_BYTES 16
#define TILE_ROWS 8
#else  // 16 of 16 bytes
#define VECTOR_BYTES 16
#define TILE_ROWS 6
#endif

#define UNROLL _Pragma("GCC unroll 16")
#define INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype(a < b){__VA_ARGS__})
#endif

// GNU's OpenMP and, under the same name, LLVM's and Intel's. It is not linked against: torch has loaded it, and its
// threads are awake when a kernel is called between two of torch's operations.
extern "C" void GOMP_parallel(void (*function)(void *), void *data, unsigned threads, unsigned flags);

namespace {

constexpr int VECTORS = 2;  // side by side in a row of a tile
constexpr int64_t CACHE_LINE = 64;

template <class T> struct Simd {
    typedef T V __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int width = VECTOR_BYTES / sizeof(T);
    static constexpr int lanes = VECTORS * width;  // numbers in a row of a tile
    static constexpr int64_t row_bytes = VECTORS * VECTOR_BYTES;
};
template <class T> using V = typename Simd<T>::V;

INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE constexpr int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

template <class T> INLINE V<T> load(const void *address) {
    V<T> vector;
    memcpy(&vector, address, sizeof vector);
    return vector;
}
template <class T> INLINE void store(void *address, V<T> vector) { memcpy(address, &vector, sizeof vector); }

// A vector of T from as many numbers of M, which are widened where M is the shorter.
template <class T, class M> INLINE V<T> load_as(const void *address) {
    if constexpr (sizeof(M) == sizeof(T)) return load<T>(address);
    else {
        typedef M Narrow __attribute__((vector_size(VECTOR_BYTES * sizeof(M) / sizeof(T))));
        Narrow narrow;
        memcpy(&narrow, address, sizeof narrow);
        return __builtin_convertvector(narrow, V<T>);
    }
}

template <class T> INLINE V<T> square_root(V<T> x) {
    T numbers[Simd<T>::width];
    store<T>(numbers, x);
    for (T &number : numbers) number = sizeof(T) == 4 ? (T)__builtin_sqrtf((float)number) : (T)__builtin_sqrt(number);
    return load<T>(numbers);
}

// coefficients[0] + coefficients[1] x + …
template <class T, int N> INLINE V<T> polynomial(const T (&coefficients)[N], V<T> x) {
    V<T> total = V<T>{} + coefficients[N - 1];
    UNROLL for (int i = N - 2; i >= 0; --i) total = total * x + coefficients[i];
    return total;
}

template <int... I> struct Lanes {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> { typedef Lanes<I...> type; };
template <class T> using AllLanes = typename Count<Simd<T>::width>::type;

// The blocks of D lanes of two vectors: the even ones of a, then b's in between; or the odd ones.
template <int D, bool ODD, class T, int... I> INLINE V<T> exchange(V<T> a, V<T> b, Lanes<I...>) {
    return SHUFFLE(a, b, (((I & D) ? (int)sizeof...(I) + I - D : I) + (ODD ? D : 0))...);
}

// Neighbours of two vectors in turn, of the lower or upper half of each 16 bytes: what processors do in one instruction.
template <bool UPPER, class T, int... I> INLINE V<T> zip(V<T> a, V<T> b, Lanes<I...>) {
    return SHUFFLE(a, b, (I % 4 / 2 + I / 4 * 4 + (UPPER ? 2 : 0) + (I % 2 ? (int)sizeof...(I) : 0))...);
}

// `width` vectors as columns, blocks of D at a time.
template <int D, class T> INLINE void transpose_blocks(V<T> (&rows)[Simd<T>::width]) {
    constexpr int W = Simd<T>::width;
    if constexpr (D < W) {
        UNROLL for (int i = 0; i < W; ++i) {
            if (i & D) continue;
            V<T> a = rows[i], b = rows[i + D];
            rows[i] = exchange<D, false, T>(a, b, AllLanes<T>());
            rows[i + D] = exchange<D, true, T>(a, b, AllLanes<T>());
        }
        transpose_blocks<2 * D, T>(rows);
    }
}

template <class T> INLINE void transpose(V<T> (&rows)[Simd<T>::width]) {
    if constexpr (sizeof(T) == 8) return transpose_blocks<1, T>(rows);
    else {
        UNROLL for (int i = 0; i < Simd<T>::width; i += 4) {
            V<T> low[2], high[2];
            UNROLL for (int j = 0; j < 2; ++j) {
                low[j] = zip<false, T>(rows[i + 2 * j], rows[i + 2 * j + 1], AllLanes<T>());
                high[j] = zip<true, T>(rows[i + 2 * j], rows[i + 2 * j + 1], AllLanes<T>());
            }
            rows[i] = exchange<2, false, T>(low[0], low[1], AllLanes<T>());
            rows[i + 1] = exchange<2, true, T>(low[0], low[1], AllLanes<T>());
            rows[i + 2] = exchange<2, false, T>(high[0], high[1], AllLanes<T>());
            rows[i + 3] = exchange<2, true, T>(high[0], high[1], AllLanes<T>());
        }
        transpose_blocks<4, T>(rows);
    }
}

// Gains 0 for every number of `row` that is finite, NaN for the others.
template <class T> INLINE void look_at(V<T> row, V<T> &seen) { seen += row * (T)0; }

template <class T> INLINE bool is_clean(V<T> seen) {
    bool clean = true;
    for (int i = 0; i < Simd<T>::width; ++i) clean &= seen[i] == 0;
    return clean;
}

// Pieces of a whole that threads take one after another: one that comes late delays little.
class Pieces {
  public:
    Pieces(int64_t total, int64_t together) : total(total), together(together) {}
    bool take(int64_t &start, int64_t &stop) {
        start = __atomic_fetch_add(&next, together, __ATOMIC_RELAXED);
        stop = least(start + together, total);
        return start < total;
    }

  private:
    int64_t next = 0, total, together;
};

// Calls `work()` on so many threads at once, this one among them.
template <class Work> void on_threads(int64_t threads, Work &work) {
    void (*call)(void *) = [](void *data) { (*static_cast<Work *>(data))(); };
    if (threads <= 1)
        call(&work);
    else
        GOMP_parallel(call, &work, (unsigned)threads, 0);
}

// Rows are cut into as few blocks as tiles allow, of heights that differ by one at most.
struct Blocks {
    explicit Blocks(int64_t size, int64_t height)
        : count(most(parts(size, height), 1)), low(size / count), taller(size % count) {}
    INLINE int64_t height(int64_t block) const { return low + (block < taller); }
    int64_t count, low, taller;
};

// `f` with the height, up to H, as a type: so that a block's sums stay in registers.
template <int H> struct Height { static constexpr int value = H; };
template <int H, class F> INLINE void with_height(int64_t height, F f) {
    if constexpr (H > 1)
        if (height < H) return with_height<H - 1>(height, f);
    f(Height<H>());
}

// Fewer elements are not worth waking a thread for; torch's operations use the same bound.
INLINE int64_t threads_for(int64_t threads, int64_t pieces, int64_t elements) {
    return most(least(least(threads, pieces), elements / (1 << 15)), 1);
}

INLINE void forget_finite(int64_t &finite) { __atomic_store_n(&finite, 0, __ATOMIC_RELAXED); }

// Memory that is the calling thread's until it asks again; aligned to a line of the cache.
inline char *scratch(int64_t size) {
    struct Memory {
        void *start = nullptr;
        int64_t size = 0;
        ~Memory() { free(start); }
    };
    static thread_local Memory memory;
    if (memory.size < size) {
        free(memory.start);
        memory.size = parts(size, CACHE_LINE) * CACHE_LINE;
        memory.start = aligned_alloc(CACHE_LINE, (size_t)memory.size);
        if (!memory.start) abort();
    }
    return static_cast<char *>(memory.start);
}

// Hands out scratch memory, one piece behind the other.
class Layout {
  public:
    template <class T> T *take(int64_t count) {
        uintptr_t here = next;
        next += (uintptr_t)(parts(count * (int64_t)sizeof(T), CACHE_LINE) * CACHE_LINE);
        return reinterpret_cast<T *>(here);
    }
    uintptr_t next = 0;
};

// What `lay(layout)` returns, a struct of addresses: called once to see how much memory it takes, then with it.
template <class Lay> auto laid_out(Lay lay) {
    Layout none, real;
    lay(none);
    real.next = reinterpret_cast<uintptr_t>(scratch((int64_t)none.next));
    return lay(real);
}

}  // namespace
