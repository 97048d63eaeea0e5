// The few words a kernel needs that differ between NVRTC and a host compiler.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i32 = int;

#ifdef __CUDACC__

#define ANY_LANES 0xffffffffu

// The bits of the nearest FP16 number. PTX rather than cuda_fp16.h: NVRTC then needs no header of the toolkit.
__device__ inline u16 half_bits(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#else

#include "host_cuda.h"

#endif

__device__ inline i32 clipped(i32 value, i32 low, i32 high) { return value < low ? low : value > high ? high : value; }
