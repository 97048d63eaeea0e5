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

__device__ inline i32 clipped(i32 value, i32 low, i32 high) { return value < low ? low : value > high ? high : value; }
