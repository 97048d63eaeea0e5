// Area, box and centroid sums of a set of pixels, added up within a warp, a block and a frame.
#pragma once

#include "portable.cuh"

// Mirrored by parameters.Measures. The box of no pixels is left = top = 2^31 - 1, right = bottom = -1.
struct Measures {
    u64 area;
    u64 sum_x, sum_y;  // of the pixels' columns and rows
    i32 left, top, right, bottom;
};

constexpr u32 FAR = 0x7fffffff;
constexpr i32 SUMS = 3, PARTS = 7;  // of Totals: sums first, then what is greatest

// Mirrored by parameters.Totals: what a frame's blocks have added so far. Zero is no pixel, so that scratch memory
// needs no other start: left and top are kept as FAR - left, right and bottom as one more than they are.
struct Totals {
    u64 sums[SUMS];  // area, sum_x, sum_y
    u32 greatest[PARTS - SUMS];
    u32 finished;  // blocks
};

// Adds sixteen pixels of a row from column x, one a bit, of each thread of a block to the frame's. The block that comes
// last of ``blocks`` writes the frame's measures, and sets the totals to zero for the next launch. ``scratch`` is
// shared memory. Whole numbers, so the order of blocks does not matter. All threads must call it; sums of a block of at
// most 4096 pixels fit 32 bits.
template <i32 WARPS>
__device__ inline void add_measures(u32 bits, i32 x, i32 y, Totals* totals, Measures* measures, u32 blocks,
                                    u32 (*scratch)[PARTS]) {
    const u32 area = __popc(bits);
    const u32 within = __popc(bits & 0xaaaa) + 2 * __popc(bits & 0xcccc) + 4 * __popc(bits & 0xf0f0) +
                       8 * __popc(bits & 0xff00);  // the sum of the set bits' positions
    const u32 parts[PARTS] = {
        warp_sum(area),
        warp_sum(area * x + within),
        warp_sum(area * y),
        warp_max(bits ? FAR - (x + __ffs(bits) - 1) : 0),
        warp_max(bits ? FAR - y : 0),
        warp_max(bits ? x + 32 - __clz(bits) : 0),
        warp_max(bits ? y + 1 : 0),
    };
    if (threadIdx.x % 32 == 0) {
#pragma unroll
        for (i32 part = 0; part < PARTS; part++) scratch[threadIdx.x / 32][part] = parts[part];
    }
    __syncthreads();
    const i32 part = threadIdx.x;
    if (part >= 32) return;
    if (part < PARTS) {
        u32 sum = 0, greatest = 0;
#pragma unroll
        for (i32 warp = 0; warp < WARPS; warp++) {
            sum += scratch[warp][part];
            greatest = max(greatest, scratch[warp][part]);
        }
        if (greatest) {  // most blocks of most frames have no pixel
            if (part < SUMS)
                atomicAdd(&totals->sums[part], u64(sum));
            else
                atomicMax(&totals->greatest[part - SUMS], greatest);
            __threadfence();  // it is in memory before the block counts as finished
        }
    }
    __syncwarp();
    if (part != 0 || atomicAdd(&totals->finished, 1u) != blocks - 1) return;
    __threadfence();
    volatile Totals* all = totals;
    const u32 left = all->greatest[0], top = all->greatest[1], right = all->greatest[2], bottom = all->greatest[3];
    *measures = {all->sums[0], all->sums[1], all->sums[2], i32(FAR - left), i32(FAR - top), i32(right) - 1,
                 i32(bottom) - 1};
    *totals = {};
}
