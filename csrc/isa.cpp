// All kernels for one instruction set, ISA, whose flags the compiler is given: see hatch_build.py.
#include "deviates.hpp"
#include "few_rows.hpp"
#include "requests.hpp"
#include "tiles.hpp"

#define NAME_(isa) kernels_##isa
#define NAME(isa) NAME_(isa)
#define TEXT_(isa) #isa
#define TEXT(isa) TEXT_(isa)

namespace {

template <class T> constexpr Kernels table() {
    // A strip of few rows may be wider than a row of a tile.
    constexpr int64_t bytes = (sizeof(T) == 8 ? WIDE_STRIP : STRIP) * VECTOR_BYTES;
    return {TEXT(ISA), sizeof(T), Simd<T>::width, Simd<T>::lanes, bytes / (int64_t)sizeof(T),
            rotate<T>, mix<T>, multiply<T>, multiply_few_rows<T>, sketch<T>, project<T>,
            make_deviates, make_grid_normals, mask_rows<T>, unmask_rows<T>,
            send_few<T>, receive_few<T>, make_directions, excess<T>};
}

}  // namespace

extern const Kernels NAME(ISA)[2];
const Kernels NAME(ISA)[2] = {table<float>(), table<double>()};
