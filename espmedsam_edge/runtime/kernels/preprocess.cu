// Frames to the network's input: bilinear resize to a square, normalisation, planes R, G, B.
//
// A thread makes one pixel in each of ROWS output rows, so that a warp's store fills a 128-byte line. What it has mixed
// of a source row, left and right, it keeps for the next output row, which mostly needs the same: a frame of 1080 rows
// is read little more than once. Where taps lie is worked out once a block, and read from shared memory.
#include "frames.cuh"
#include "taps.cuh"

constexpr i32 MAX_FRAMES = 8;
constexpr i32 THREADS_X = 64;
constexpr i32 THREADS_Y = 4;
constexpr i32 ROWS = 4;
constexpr i32 TILE_ROWS = THREADS_Y * ROWS;  // parameters.PREPROCESS_TILE
static_assert(THREADS_X + TILE_ROWS <= THREADS_X * THREADS_Y, "a thread for each tap");

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

// One row of the source between two pixels, a number a channel.
struct Mixed {
    i32 levels[3];
};

template <typename FrameReader>
__device__ inline Mixed mixed(const Frame& frame, const typename FrameReader::Column& column, i32 y, Weights across) {
    Color a, b;
    FrameReader::pair(frame, column, y, a, b);
    Mixed made;
    made.levels[0] = (a.red * across.first + b.red * across.second) >> 4;
    if (FrameReader::CHANNELS == 3) {
        made.levels[1] = (a.green * across.first + b.green * across.second) >> 4;
        made.levels[2] = (a.blue * across.first + b.blue * across.second) >> 4;
    }
    return made;
}

__device__ inline float fixed_mix(i32 upper, i32 lower, Weights down) {
    return float((((upper * down.first) >> 16) + ((lower * down.second) >> 16) + 2) >> 2);
}

struct alignas(16) RowTap {
    i32 top, bottom;  // rows of the source
    Weights weights;
};

struct ColumnTap {
    i32 left;
    Weights weights;
};

extern "C" __global__ void __launch_bounds__(THREADS_X* THREADS_Y)
    preprocess(const __grid_constant__ Preprocess parameters) {
    const Frame& frame = parameters.frames[blockIdx.z];
    const i32 size = parameters.size;
    const i32 first_x = blockIdx.x * THREADS_X, first_y = blockIdx.y * TILE_ROWS;
    __shared__ RowTap rows[TILE_ROWS];
    __shared__ ColumnTap columns[THREADS_X];
    const i32 thread = threadIdx.y * THREADS_X + threadIdx.x;
    if (thread < THREADS_X) {
        const Tap tap = tap_inside(first_x + thread, frame.width, size);
        columns[thread] = {tap.index, fixed(tap.weight)};
    } else if (thread < THREADS_X + TILE_ROWS) {
        const i32 row = thread - THREADS_X;
        const Tap tap = tap_at(first_y + row, frame.height, size);
        rows[row] = {clipped(tap.index, 0, frame.height - 1), clipped(tap.index + 1, 0, frame.height - 1),
                     fixed(tap.weight)};
    }
    __syncthreads();

    const i32 x = first_x + threadIdx.x, begin = threadIdx.y * ROWS;
    if (x >= size) return;
    const ColumnTap across = columns[threadIdx.x];
    const u64 plane = u64(size) * size;
    float* target = parameters.out + 3 * plane * blockIdx.z + u64(first_y + begin) * size + x;

    with_reader(frame, [&](auto reader) {
        using FrameReader = decltype(reader);
        const typename FrameReader::Column column = FrameReader::column(frame, across.left);
        i32 upper_row = -1, lower_row = -1;  // what they were mixed of; the same for a whole warp
        Mixed upper, lower;
#pragma unroll 1
        for (i32 row = 0; row < ROWS; row++) {
            if (first_y + begin + row >= size) break;
            const RowTap down = rows[begin + row];
            if (down.top != upper_row)
                upper = down.top == lower_row ? lower : mixed<FrameReader>(frame, column, down.top, across.weights);
            if (down.bottom != lower_row) lower = mixed<FrameReader>(frame, column, down.bottom, across.weights);
            upper_row = down.top;
            lower_row = down.bottom;
            float levels[3];
#pragma unroll
            for (i32 channel = 0; channel < FrameReader::CHANNELS; channel++)
                levels[channel] = fixed_mix(upper.levels[channel], lower.levels[channel], down.weights);
#pragma unroll
            for (i32 channel = 0; channel < 3; channel++)
                target[channel * plane] = levels[FrameReader::CHANNELS == 3 ? channel : 0] * parameters.scale[channel] +
                                          parameters.shift[channel];
            target += size;
        }
    });
}
