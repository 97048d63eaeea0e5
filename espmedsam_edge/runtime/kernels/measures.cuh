// Area, box and centroid sums of a set of pixels, added up within a warp, a block and a frame.
#pragma once

#include "portable.cuh"

// Mirrored by parameters.Measures. The box of no pixels is left = top = 2^31 - 1, right = bottom = -1.
struct Measures {
    u64 area;
    u64 sum_x, sum_y;  // of the pixels' columns and rows
    i32 left, top, right, bottom;
};

__device__ inline Measures nothing() { return {0, 0, 0, 0x7fffffff, 0x7fffffff, -1, -1}; }

// Sixteen pixels of a row from column x, one a bit.
__device__ inline Measures measure(u32 bits, i32 x, i32 y) {
    if (bits == 0) return nothing();
    const u64 area = __popc(bits);
    const u64 within = __popc(bits & 0xaaaa) + 2 * __popc(bits & 0xcccc) + 4 * __popc(bits & 0xf0f0) +
                       8 * __popc(bits & 0xff00);  // the sum of the set bits' positions
    return {area, area * x + within, area * y, x + __ffs(bits) - 1, y, x + 31 - __clz(bits), y};
}

__device__ inline void add(Measures& sum, const Measures& more) {
    sum.area += more.area;
    sum.sum_x += more.sum_x;
    sum.sum_y += more.sum_y;
    sum.left = min(sum.left, more.left);
    sum.top = min(sum.top, more.top);
    sum.right = max(sum.right, more.right);
    sum.bottom = max(sum.bottom, more.bottom);
}

// The sum over a block of WARPS full warps, valid in thread 0; ``scratch`` is shared memory of one element a warp. All
// threads must call it.
template <i32 WARPS>
__device__ inline Measures block_sum(Measures own, Measures* scratch) {
#pragma unroll
    for (i32 distance = 16; distance > 0; distance /= 2) {
        Measures other;
        other.area = __shfl_down_sync(ANY_LANES, own.area, distance);
        other.sum_x = __shfl_down_sync(ANY_LANES, own.sum_x, distance);
        other.sum_y = __shfl_down_sync(ANY_LANES, own.sum_y, distance);
        other.left = __shfl_down_sync(ANY_LANES, own.left, distance);
        other.top = __shfl_down_sync(ANY_LANES, own.top, distance);
        other.right = __shfl_down_sync(ANY_LANES, own.right, distance);
        other.bottom = __shfl_down_sync(ANY_LANES, own.bottom, distance);
        add(own, other);  // lanes past the end get their own value again: wrong there, never read
    }
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (i32 warp = 1; warp < WARPS; warp++) add(own, scratch[warp]);
    }
    return own;
}
