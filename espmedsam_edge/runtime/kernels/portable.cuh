// The few words a kernel needs that differ between NVRTC and a host compiler.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

#ifdef __CUDACC__

#define ANY_LANES 0xffffffffu

#else

#include "host_cuda.h"

#endif

// The sum, or the greatest, of a warp's numbers, at least in its first lane. All lanes must call it.
__device__ inline u32 warp_sum(u32 own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    for (i32 distance = 16; distance > 0; distance /= 2) own += __shfl_down_sync(ANY_LANES, own, distance);
    return own;
#else
    return __reduce_add_sync(ANY_LANES, own);
#endif
}

__device__ inline u32 warp_max(u32 own) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    for (i32 distance = 16; distance > 0; distance /= 2) own = max(own, __shfl_down_sync(ANY_LANES, own, distance));
    return own;
#else
    return __reduce_max_sync(ANY_LANES, own);
#endif
}

__device__ inline i32 clipped(i32 value, i32 low, i32 high) { return value < low ? low : value > high ? high : value; }
