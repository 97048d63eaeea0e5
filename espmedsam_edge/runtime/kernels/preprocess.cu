// Frames to the network's input: bilinear resize to a square, normalisation, planes R, G, B.
//
// A thread makes one output pixel in each of ROWS rows, so that a warp's store fills a 128-byte line. Neighbouring threads
// read neighbouring source pixels, a word at a time through L1, where the rows that consecutive output rows share stay;
// DRAM sees each source line once and each output line once.
#include "frames.cuh"
#include "taps.cuh"

constexpr i32 MAX_FRAMES = 8;
constexpr i32 THREADS_X = 64;
constexpr i32 THREADS_Y = 4;
constexpr i32 ROWS = 2;
constexpr i32 TILE_ROWS = THREADS_Y * ROWS;

// Mirrored by parameters.Preprocess.
struct Preprocess {
    float* out;      // (count, 3, size, size)
    i32 count;       // frames, one a blockIdx.z
    i32 size;        // S
    float scale[3];  // R, G, B: value = level · scale + shift
    float shift[3];
    Frame frames[MAX_FRAMES];
};

// cv2.resize weighs 8-bit pixels with 11 fractional bits and drops 4 and 16 bits on the way: doing the same gives the
// CPU backend's very pixels. Weights outside are whole, so a frame of the network's own size passes unchanged.
constexpr float ONE = 2048.0f;

struct Weights {
    i32 first, second;
};

__device__ inline Weights fixed(float weight) {
    return {__float2int_rn((1.0f - weight) * ONE), __float2int_rn(weight * ONE)};
}

__device__ inline float fixed_mix(i32 a, i32 b, i32 c, i32 d, Weights across, Weights down) {
    const i32 upper = (a * across.first + b * across.second) >> 4;
    const i32 lower = (c * across.first + d * across.second) >> 4;
    return float((((upper * down.first) >> 16) + ((lower * down.second) >> 16) + 2) >> 2);
}

extern "C" __global__ void __launch_bounds__(THREADS_X* THREADS_Y)
    preprocess(const __grid_constant__ Preprocess parameters) {
    const Frame& frame = parameters.frames[blockIdx.z];
    const i32 size = parameters.size;
    __shared__ Tap row_taps[TILE_ROWS];
    const i32 thread = threadIdx.y * THREADS_X + threadIdx.x;
    if (thread < TILE_ROWS) row_taps[thread] = tap_at(blockIdx.y * TILE_ROWS + thread, frame.height, size);
    __syncthreads();

    const i32 x = blockIdx.x * THREADS_X + threadIdx.x;
    if (x >= size) return;
    const Tap across = tap_inside(x, frame.width, size);
    const Weights to_right = fixed(across.weight);

    with_reader(frame, [&](auto reader) {
        constexpr i32 CHANNELS = decltype(reader)::CHANNELS;
#pragma unroll
        for (i32 row = 0; row < ROWS; row++) {
            const i32 in_tile = threadIdx.y * ROWS + row;
            const i32 y = blockIdx.y * TILE_ROWS + in_tile;
            if (y >= size) break;
            const Tap down = row_taps[in_tile];
            const Weights to_bottom = fixed(down.weight);
            Color a, b, c, d;
            reader.pair(frame, across.index, clipped(down.index, 0, frame.height - 1), a, b);
            reader.pair(frame, across.index, clipped(down.index + 1, 0, frame.height - 1), c, d);
            float levels[3];
            levels[0] = fixed_mix(a.red, b.red, c.red, d.red, to_right, to_bottom);
            if (CHANNELS == 3) {
                levels[1] = fixed_mix(a.green, b.green, c.green, d.green, to_right, to_bottom);
                levels[2] = fixed_mix(a.blue, b.blue, c.blue, d.blue, to_right, to_bottom);
            }
#pragma unroll
            for (i32 channel = 0; channel < 3; channel++) {
                float* plane = parameters.out + (u64(blockIdx.z) * 3 + channel) * size * size;
                plane[y * size + x] =
                    levels[CHANNELS == 3 ? channel : 0] * parameters.scale[channel] + parameters.shift[channel];
            }
        }
    });
}
