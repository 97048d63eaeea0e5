// Low-resolution logits to a frame's mask, overlay and measures, in one pass.
//
// A block makes a tile of the frame. First its warps turn logits into bits, 32 pixels a ballot, with a rim of pixels
// around the tile where an outline is drawn; logits at the frame's size exist only in registers. Then each thread takes
// sixteen pixels of a row: a 16-byte store to the mask, three 16-byte loads and stores for the overlay, and the
// measures, which are added up within the block. The last block of a frame adds up the blocks; no other atomics.
#include "frames.cuh"
#include "measures.cuh"
#include "taps.cuh"

constexpr i32 MAX_FRAMES = 8;
constexpr i32 THREADS = 256;
constexpr i32 WARPS = THREADS / 32;
constexpr i32 TILE_WIDTH = 128;  // parameters.TILE
constexpr i32 TILE_HEIGHT = 32;
constexpr i32 WORDS = TILE_WIDTH / 32;
constexpr i32 RUNS = TILE_WIDTH / 16;
constexpr i32 MAX_OUTLINE = 16;  // half a word of rim on either side
constexpr i32 MAX_ROWS = TILE_HEIGHT + 2 * MAX_OUTLINE;
static_assert(RUNS * TILE_HEIGHT == THREADS, "sixteen pixels a thread");

// Mirrored by parameters.Canvas. Every pointer but logits may be null: that output is then not made.
struct Canvas {
    Frame frame;           // its size, and its pixels for the overlay
    const float* logits;   // (logits_height, logits_width)
    u8* mask;              // 255 or 0; rows of mask_pitch bytes, a multiple of 16 that holds whole runs of sixteen
    u8* overlay;           // B, G, R; overlay_pitch is a multiple of 48 bytes that holds whole runs
    Measures* measures;    // one
    Measures* partial;     // one a tile of this frame, row by row
    u32* finished;         // 0 before the first launch and again after each
    i32 mask_pitch;        // bytes
    i32 overlay_pitch;     // bytes
    i32 outline;           // pixels, 0 to MAX_OUTLINE; 0 draws none
};

// Mirrored by parameters.Postprocess.
struct Postprocess {
    i32 count;  // frames, one a blockIdx.z
    i32 logits_height, logits_width;
    float level;     // the logit from which a pixel is foreground
    float opacity;   // of the tint, 0 to 1
    float color[3];  // of tint and outline: B, G, R, 0 to 255
    Canvas canvases[MAX_FRAMES];
};

// One column of the frame: a logit of two low-resolution rows, both kept while consecutive rows of the frame use them.
struct Column {
    i32 left, right;
    float weight;
    i32 row;
    float upper, lower;
};

__device__ inline Column column_at(i32 x, i32 width, i32 logits_width) {
    const Tap tap = tap_inside(clipped(x, 0, width - 1), logits_width, width);
    return {tap.index, clipped(tap.index + 1, 0, logits_width - 1), tap.weight, -2, 0.0f, 0.0f};
}

__device__ inline float logit_at(Column& column, const Tap& down, const float* logits, i32 height, i32 width) {
    if (down.index != column.row) {  // the same for a whole warp
        const float* upper = logits + clipped(down.index, 0, height - 1) * width;
        const float* lower = logits + clipped(down.index + 1, 0, height - 1) * width;
        column.upper = upper[column.left] * (1.0f - column.weight) + upper[column.right] * column.weight;
        column.lower = lower[column.left] * (1.0f - column.weight) + lower[column.right] * column.weight;
        column.row = down.index;
    }
    return column.upper * (1.0f - down.weight) + column.lower * down.weight;
}

// Four bits to four bytes of 255 or 0.
__device__ inline u32 spread(u32 bits) { return (((bits & 15) * 0x00204081u) & 0x01010101u) * 255u; }

__device__ inline u32 tinted(i32 level, float color, float opacity) {
    return __float2int_rn(float(level) * (1.0f - opacity) + color * opacity);
}

// The overlay's pixel where ``inside`` or ``edge`` holds.
__device__ inline u32 drawn(i32 level, bool edge, float color, float opacity) {
    return edge ? u32(__float2int_rn(color)) : tinted(level, color, opacity);
}

template <typename FrameReader>
__device__ inline void draw(const Canvas& canvas, const Postprocess& style, i32 x, i32 y, u32 inside, u32 edge) {
    u8* target = canvas.overlay + u64(y) * canvas.overlay_pitch + 3 * x;
    u32 words[12];
    if (FrameReader::sixteen(canvas.frame, x, y, words)) {
        if (inside) {
#pragma unroll
            for (i32 pixel = 0; pixel < 16; pixel++) {
                if (!(inside >> pixel & 1)) continue;
#pragma unroll
                for (i32 channel = 0; channel < 3; channel++) {
                    const i32 place = 3 * pixel + channel;
                    const u32 value =
                        drawn(byte_of(words, place), edge >> pixel & 1, style.color[channel], style.opacity);
                    words[place / 4] = (words[place / 4] & ~(255u << (8 * (place % 4)))) | value << (8 * (place % 4));
                }
            }
        }
#pragma unroll
        for (i32 i = 0; i < 3; i++)
            reinterpret_cast<uint4*>(target)[i] =
                make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
        return;
    }
    // The end of a row, or rows that no word fits: pixel by pixel.
    const i32 count = min(16, canvas.frame.width - x);
    for (i32 pixel = 0; pixel < count; pixel++) {
        const Color color = FrameReader::at(canvas.frame, x + pixel, y);
        const i32 levels[3] = {color.blue, color.green, color.red};
#pragma unroll
        for (i32 channel = 0; channel < 3; channel++)
            target[3 * pixel + channel] =
                inside >> pixel & 1
                    ? drawn(levels[channel], edge >> pixel & 1, style.color[channel], style.opacity)
                    : levels[channel];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) postprocess(const __grid_constant__ Postprocess parameters) {
    const Canvas& canvas = parameters.canvases[blockIdx.z];
    const i32 width = canvas.frame.width, height = canvas.frame.height;
    const i32 tile_x = blockIdx.x * TILE_WIDTH, tile_y = blockIdx.y * TILE_HEIGHT;
    if (tile_x >= width || tile_y >= height) return;  // the grid fits the largest frame of the batch
    const i32 rim = canvas.overlay ? canvas.outline : 0;
    const i32 rows = TILE_HEIGHT + 2 * rim;
    const i32 thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    __shared__ Tap down[MAX_ROWS];
    __shared__ u32 inside[MAX_ROWS][WORDS];  // one bit a pixel; pixels outside the frame count as inside
    __shared__ u32 beside[MAX_ROWS];         // low half: the 16 pixels left of the tile, high half: those right of it
    __shared__ u32 eroded[MAX_ROWS][WORDS];  // pixels whose row is inside as far as the outline is wide
    __shared__ Measures scratch[WARPS];
    __shared__ bool last;

    if (thread < rows) down[thread] = tap_at(tile_y - rim + thread, parameters.logits_height, height);
    __syncthreads();

    // Two warps a column of words, each half of the rows.
    {
        const i32 word = warp % WORDS;
        const i32 x = tile_x + 32 * word + lane;
        Column column = column_at(x, width, parameters.logits_width);
        const i32 begin = warp < WORDS ? 0 : rows / 2, end = warp < WORDS ? rows / 2 : rows;
        for (i32 row = begin; row < end; row++) {
            const i32 y = tile_y - rim + row;
            bool set = true;
            if (y >= 0 && y < height && x < width) {
                set = logit_at(column, down[row], canvas.logits, parameters.logits_height, parameters.logits_width) >=
                      parameters.level;
            }
            const u32 bits = __ballot_sync(ANY_LANES, set);
            if (lane == 0) inside[row][word] = bits;
        }
    }
    if (rim) {
        const i32 x = lane < 16 ? tile_x - 16 + lane : tile_x + TILE_WIDTH + lane - 16;
        Column column = column_at(x, width, parameters.logits_width);
        for (i32 row = warp; row < rows; row += WARPS) {
            const i32 y = tile_y - rim + row;
            bool set = true;
            if (y >= 0 && y < height && x >= 0 && x < width)
                set = logit_at(column, down[row], canvas.logits, parameters.logits_height, parameters.logits_width) >=
                      parameters.level;
            const u32 bits = __ballot_sync(ANY_LANES, set);
            if (lane == 0) beside[row] = bits;
        }
        __syncthreads();
        for (i32 i = thread; i < rows * WORDS; i += THREADS) {
            const i32 row = i / WORDS, word = i % WORDS;
            const u32 bits = inside[row][word];
            const u32 left = word ? inside[row][word - 1] : beside[row] << 16;
            const u32 right = word < WORDS - 1 ? inside[row][word + 1] : beside[row] >> 16;
            u32 kept = bits;
            for (i32 distance = 1; distance <= rim; distance++)
                kept &= __funnelshift_l(left, bits, distance) & __funnelshift_r(bits, right, distance);
            eroded[row][word] = kept;
        }
    }
    __syncthreads();

    const i32 row = thread / RUNS, run = thread % RUNS;
    const i32 x = tile_x + 16 * run, y = tile_y + row;
    const i32 shift = 16 * (run % 2);
    u32 bits = 0;
    if (y < height && x < width) {
        bits = inside[row + rim][run / 2] >> shift & (x + 16 > width ? (1u << (width - x)) - 1 : 0xffffu);
        if (canvas.mask)
            *reinterpret_cast<uint4*>(canvas.mask + u64(y) * canvas.mask_pitch + x) =
                make_uint4(spread(bits), spread(bits >> 4), spread(bits >> 8), spread(bits >> 12));
        if (canvas.overlay) {
            u32 edge = 0;
            if (rim && bits) {
                u32 kept = ~0u;
                for (i32 other = row; other <= row + 2 * rim; other++) kept &= eroded[other][run / 2];
                edge = bits & ~(kept >> shift);
            }
            with_reader(canvas.frame, [&](auto reader) {
                draw<decltype(reader)>(canvas, parameters, x, y, bits, edge);
            });
        }
    }
    if (!canvas.measures) return;

    const i32 tiles_across = (width + TILE_WIDTH - 1) / TILE_WIDTH;
    const u32 tiles = tiles_across * ((height + TILE_HEIGHT - 1) / TILE_HEIGHT);
    const Measures of_tile = block_sum<WARPS>(measure(bits, x, y), scratch);
    if (thread == 0) {
        canvas.partial[blockIdx.y * tiles_across + blockIdx.x] = of_tile;
        __threadfence();  // the tile's sum is in memory before its number is
        last = atomicAdd(canvas.finished, 1u) == tiles - 1;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    Measures sum = nothing();
    for (u32 tile = thread; tile < tiles; tile += THREADS) add(sum, canvas.partial[tile]);
    const Measures of_frame = block_sum<WARPS>(sum, scratch);
    if (thread == 0) {
        *canvas.measures = of_frame;
        *canvas.finished = 0;
    }
}
