// Frames to the network's input: bilinear resize to a square, normalisation, planes R, G, B.
//
// A thread makes one column of neighbouring output pixels (FP32: one, FP16: two, so that a warp's store fills 128-byte
// lines in both) in ROWS rows. Neighbouring threads read neighbouring source pixels, a word at a time through L1, where
// the rows that consecutive output rows share stay; DRAM sees each source line once and each output line once.
#include "frames.cuh"
#include "taps.cuh"

constexpr i32 MAX_FRAMES = 8;
constexpr i32 THREADS_X = 64;
constexpr i32 THREADS_Y = 4;
constexpr i32 ROWS = 2;
constexpr i32 TILE_ROWS = THREADS_Y * ROWS;

// Mirrored by parameters.Preprocess.
struct Preprocess {
    void* out;       // (count, 3, size, size)
    i32 count;       // frames, one a blockIdx.z
    i32 size;        // S
    i32 rounded;     // 1: to 8 bits before normalisation, in cv2.resize's own fixed point; 0: exact
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

__device__ inline float exact_mix(i32 a, i32 b, i32 c, i32 d, float across, float down) {
    const float upper = float(a) * (1.0f - across) + float(b) * across;
    const float lower = float(c) * (1.0f - across) + float(d) * across;
    return upper * (1.0f - down) + lower * down;
}

__device__ inline void store(float* plane, i32 index, const float* values, i32) { plane[index] = values[0]; }

// Two at once; one where the second is outside or, in a plane of odd size, off its alignment.
__device__ inline void store(u16* plane, i32 index, const float* values, i32 inside) {
    const u32 first = half_bits(values[0]);
    const u32 second = half_bits(values[1]);
    if (inside == 2 && reinterpret_cast<u64>(plane + index) % 4 == 0) {
        *reinterpret_cast<u32*>(plane + index) = first | second << 16;
    } else {
        plane[index] = u16(first);
        if (inside == 2) plane[index + 1] = u16(second);
    }
}

template <typename Out, i32 PIXELS>
__device__ inline void preprocess(const Preprocess& parameters) {
    const Frame& frame = parameters.frames[blockIdx.z];
    const i32 size = parameters.size;
    __shared__ Tap row_taps[TILE_ROWS];
    const i32 thread = threadIdx.y * THREADS_X + threadIdx.x;
    if (thread < TILE_ROWS) row_taps[thread] = tap_at(blockIdx.y * TILE_ROWS + thread, frame.height, size);
    __syncthreads();

    const i32 x = (blockIdx.x * THREADS_X + threadIdx.x) * PIXELS;
    if (x >= size) return;
    const i32 inside = size - x < PIXELS ? size - x : PIXELS;
    Tap across[PIXELS];
#pragma unroll
    for (i32 i = 0; i < PIXELS; i++) across[i] = tap_inside(x + i < size ? x + i : x, frame.width, size);

    with_reader(frame, [&](auto reader) {
        constexpr i32 CHANNELS = decltype(reader)::CHANNELS;
#pragma unroll
        for (i32 row = 0; row < ROWS; row++) {
            const i32 in_tile = threadIdx.y * ROWS + row;
            const i32 y = blockIdx.y * TILE_ROWS + in_tile;
            if (y >= size) break;
            const Tap down = row_taps[in_tile];
            const i32 upper = clipped(down.index, 0, frame.height - 1);
            const i32 lower = clipped(down.index + 1, 0, frame.height - 1);
            float values[3][PIXELS];
#pragma unroll
            for (i32 i = 0; i < PIXELS; i++) {
                Color a, b, c, d;
                reader.pair(frame, across[i].index, upper, a, b);
                reader.pair(frame, across[i].index, lower, c, d);
                if (parameters.rounded) {
                    const Weights to_right = fixed(across[i].weight), to_bottom = fixed(down.weight);
                    values[0][i] = fixed_mix(a.red, b.red, c.red, d.red, to_right, to_bottom);
                    if (CHANNELS == 3) {
                        values[1][i] = fixed_mix(a.green, b.green, c.green, d.green, to_right, to_bottom);
                        values[2][i] = fixed_mix(a.blue, b.blue, c.blue, d.blue, to_right, to_bottom);
                    }
                } else {
                    const float to_right = across[i].weight, to_bottom = down.weight;
                    values[0][i] = exact_mix(a.red, b.red, c.red, d.red, to_right, to_bottom);
                    if (CHANNELS == 3) {
                        values[1][i] = exact_mix(a.green, b.green, c.green, d.green, to_right, to_bottom);
                        values[2][i] = exact_mix(a.blue, b.blue, c.blue, d.blue, to_right, to_bottom);
                    }
                }
            }
#pragma unroll
            for (i32 channel = 0; channel < 3; channel++) {
                const float* levels = values[CHANNELS == 3 ? channel : 0];
                float normalised[PIXELS];
#pragma unroll
                for (i32 i = 0; i < PIXELS; i++)
                    normalised[i] = levels[i] * parameters.scale[channel] + parameters.shift[channel];
                Out* plane = static_cast<Out*>(parameters.out) + (u64(blockIdx.z) * 3 + channel) * size * size;
                store(plane, y * size + x, normalised, inside);
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS_X* THREADS_Y)
    preprocess_fp32(const __grid_constant__ Preprocess parameters) {
    preprocess<float, 1>(parameters);
}

extern "C" __global__ void __launch_bounds__(THREADS_X* THREADS_Y)
    preprocess_fp16(const __grid_constant__ Preprocess parameters) {
    preprocess<u16, 2>(parameters);
}
