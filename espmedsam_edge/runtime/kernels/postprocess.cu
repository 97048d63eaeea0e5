// Low-resolution logits to a frame's mask, overlay and measures, in one pass.
//
// A block makes a tile of the frame. First its warps turn logits into bits, 32 pixels a ballot, with a rim of pixels
// around the tile where an outline is drawn; logits at the frame's size exist only in registers. Each thread takes
// sixteen pixels of a row: their pixels are asked for first, in 16-byte loads, and arrive while the bits are made; then
// come a 16-byte store to the mask, three for the overlay, and the measures, which blocks with any foreground add to
// the frame's.
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
    Totals* totals;        // zero before the first launch and again after each
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
// The next row's are asked for when these are, so that they are there when their turn comes.
struct Column {
    i32 left, right;
    float weight;
    i32 row;
    float upper, lower;
    float next_left, next_right;
};

constexpr i32 NO_ROW = -4;  // rows from -1 on may be asked for

__device__ inline Column column_at(i32 x, i32 width, i32 logits_width) {
    const Tap tap = tap_inside(clipped(x, 0, width - 1), logits_width, width);
    return {tap.index, clipped(tap.index + 1, 0, logits_width - 1), tap.weight, NO_ROW, 0.0f, 0.0f, 0.0f, 0.0f};
}

__device__ inline float across(float left, float right, float weight) {
    return left * (1.0f - weight) + right * weight;
}

__device__ inline float logit_at(Column& column, const Tap& down, const float* logits, i32 height, i32 width) {
    if (down.index != column.row) {  // the same for a whole warp
        const i32 last = height - 1;
        if (down.index == column.row + 1) {
            column.upper = column.lower;
            column.lower = across(column.next_left, column.next_right, column.weight);
        } else {
            const float* upper = logits + clipped(down.index, 0, last) * width;
            const float* lower = logits + clipped(down.index + 1, 0, last) * width;
            column.upper = across(upper[column.left], upper[column.right], column.weight);
            column.lower = across(lower[column.left], lower[column.right], column.weight);
        }
        const float* next = logits + clipped(down.index + 2, 0, last) * width;
        column.next_left = next[column.left];
        column.next_right = next[column.right];
        column.row = down.index;
    }
    return column.upper * (1.0f - down.weight) + column.lower * down.weight;
}

// Bits of a column of 32 pixels in the rows begin to end, whose taps are ``down``: a word a row, STRIDE words apart from
// ``place`` on. ``known``: this lane's pixel is outside the frame, and counts as inside the mask.
template <i32 STRIDE>
__device__ inline void make_bits(Column& column, bool known, const Tap* down, i32 begin, i32 end, const float* logits,
                                 const Postprocess& parameters, u32* place) {
    const bool writes = threadIdx.x % 32 == 0;
    for (i32 row = begin; row < end; row++) {
        const float logit = logit_at(column, down[row], logits, parameters.logits_height, parameters.logits_width);
        const u32 bits = __ballot_sync(ANY_LANES, logit >= parameters.level || known);
        if (writes) *place = bits;
        place += STRIDE;
    }
}

// Four bits to four bytes of 255 or 0.
__device__ inline u32 spread(u32 bits) { return (((bits & 15) * 0x00204081u) & 0x01010101u) * 255u; }

// How foreground is painted, for B, G and R.
struct Ink {
    float keep;  // of the frame's level
    float opacity;
    float color[3];
    u32 edge[3];  // the outline's level
};

__device__ inline Ink ink_of(const Postprocess& style) {
    Ink ink = {1.0f - style.opacity, style.opacity, {}, {}};
#pragma unroll
    for (i32 channel = 0; channel < 3; channel++) {
        ink.color[channel] = style.color[channel];
        ink.edge[channel] = __float2int_rn(style.color[channel]);
    }
    return ink;
}

// A level from 0 to 255 to a float and back, rounded as __float2int_rn does, by bits: conversions take four times as
// long.
__device__ inline u32 tinted(u32 level, const Ink& ink, i32 channel) {
    const float exact = __uint_as_float(0x4b000000 | level) - 8388608.0f;  // 2^23 + level, less 2^23
    const float blend = __fmaf_rn(ink.color[channel], ink.opacity, __fmul_rn(exact, ink.keep));
    return __float_as_uint(blend + 12582912.0f) & 255;  // 1.5 · 2^23
}

// All bits of a number where pixel's bit is set, else none.
__device__ inline u32 spread_over(u32 bits, i32 pixel) { return u32(i32(bits << (31 - pixel)) >> 31); }

// Paints sixteen pixels, as 48 bytes B, G, R, where ``inside`` has a bit; where ``edge`` has one, too, in full color.
__device__ inline void paint(u32* words, u32 inside, u32 edge, const Ink& ink) {
    const u32 tint = inside & ~edge;
#pragma unroll
    for (i32 i = 0; i < 12; i++) {
        u32 painted = 0, border = 0, tint_here = 0, edge_here = 0;
#pragma unroll
        for (i32 j = 0; j < 4; j++) {
            const i32 pixel = (4 * i + j) / 3, channel = (4 * i + j) % 3;
            const u32 place = 255u << (8 * j);
            painted |= tinted(byte_of(words, 4 * i + j), ink, channel) << (8 * j);
            border |= ink.edge[channel] << (8 * j);
            tint_here |= spread_over(tint, pixel) & place;
            edge_here |= spread_over(edge, pixel) & place;
        }
        words[i] = (words[i] & ~(tint_here | edge_here)) | (painted & tint_here) | (border & edge_here);
    }
}

// Sixteen pixels of a row that could not be read at once: the end of a row, or rows that no word fits.
__device__ inline void paint_one_by_one(const Canvas& canvas, i32 x, i32 y, u32 inside, u32 edge, const Ink& ink) {
    u8* target = canvas.overlay + u64(y) * canvas.overlay_pitch + 3 * x;
    const i32 count = min(16, canvas.frame.width - x);
    with_reader(canvas.frame, [&](auto reader) {
        for (i32 pixel = 0; pixel < count; pixel++) {
            const Color color = decltype(reader)::at(canvas.frame, x + pixel, y);
            const i32 levels[3] = {color.blue, color.green, color.red};
#pragma unroll
            for (i32 channel = 0; channel < 3; channel++)
                target[3 * pixel + channel] = edge >> pixel & 1     ? ink.edge[channel]
                                              : inside >> pixel & 1 ? tinted(levels[channel], ink, channel)
                                                                    : levels[channel];
        }
    });
}

extern "C" __global__ void __launch_bounds__(THREADS) postprocess(const __grid_constant__ Postprocess parameters) {
    const Canvas& canvas = parameters.canvases[blockIdx.z];
    const i32 width = canvas.frame.width, height = canvas.frame.height;
    const i32 tile_x = blockIdx.x * TILE_WIDTH, tile_y = blockIdx.y * TILE_HEIGHT;
    if (tile_x >= width || tile_y >= height) return;  // the grid fits the largest frame of the batch
    const i32 rim = canvas.overlay ? canvas.outline : 0;
    const i32 rows = TILE_HEIGHT + 2 * rim;
    const i32 thread = threadIdx.x, lane = thread % 32;
    const i32 warp = __shfl_sync(ANY_LANES, thread / 32, 0);  // the same for a whole warp, so that the compiler knows

    __shared__ Tap down[MAX_ROWS];
    __shared__ u32 inside[MAX_ROWS][WORDS];  // one bit a pixel; pixels outside the frame count as inside
    __shared__ u32 beside[MAX_ROWS];         // low half: the 16 pixels left of the tile, high half: those right of it
    __shared__ u32 eroded[MAX_ROWS][WORDS];  // pixels whose row is inside as far as the outline is wide
    __shared__ u32 scratch[WARPS][PARTS];

    const i32 row = thread / RUNS, run = thread % RUNS;
    const i32 x = tile_x + 16 * run, y = tile_y + row;
    u32 words[12];  // of this thread's sixteen pixels
    bool at_once = false;
    if (canvas.overlay && y < height && x < width)
        with_reader(canvas.frame, [&](auto reader) { at_once = decltype(reader)::sixteen(canvas.frame, x, y, words); });

    if (thread < rows) down[thread] = tap_at(tile_y - rim + thread, parameters.logits_height, height);
    __syncthreads();

    // Two warps a column of words, each half of the rows. Rows outside the frame count as inside the mask.
    const i32 first = max(0, rim - tile_y), past = min(rows, height - tile_y + rim);
    if (rim && thread < rows && (thread < first || thread >= past)) {
        for (i32 word = 0; word < WORDS; word++) inside[thread][word] = ~0u;
        beside[thread] = ~0u;
    }
    {
        const i32 word = warp % WORDS;
        const i32 own_x = tile_x + 32 * word + lane;
        Column column = column_at(own_x, width, parameters.logits_width);
        const i32 begin = warp < WORDS ? first : max(first, rows / 2), end = warp < WORDS ? min(past, rows / 2) : past;
        make_bits<WORDS>(column, own_x >= width, down, begin, end, canvas.logits, parameters, &inside[begin][word]);
    }
    if (rim) {
        const i32 own_x = lane < 16 ? tile_x - 16 + lane : tile_x + TILE_WIDTH + lane - 16;
        Column column = column_at(own_x, width, parameters.logits_width);
        const i32 begin = max(first, warp * rows / WARPS), end = min(past, (warp + 1) * rows / WARPS);
        const bool outside = own_x < 0 || own_x >= width;
        make_bits<1>(column, outside, down, begin, end, canvas.logits, parameters, &beside[begin]);
        __syncthreads();
        for (i32 i = thread; i < rows * WORDS; i += THREADS) {
            const i32 own_row = i / WORDS, word = i % WORDS;
            const u32 own = inside[own_row][word];
            const u32 left = word ? inside[own_row][word - 1] : beside[own_row] << 16;
            const u32 right = word < WORDS - 1 ? inside[own_row][word + 1] : beside[own_row] >> 16;
            u32 kept = own;
            for (i32 distance = 1; distance <= rim; distance++)
                kept &= __funnelshift_l(left, own, distance) & __funnelshift_r(own, right, distance);
            eroded[own_row][word] = kept;
        }
    }
    __syncthreads();

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
            const Ink ink = ink_of(parameters);
            if (at_once) {
                if (bits) paint(words, bits, edge, ink);
                uint4* target = reinterpret_cast<uint4*>(canvas.overlay + u64(y) * canvas.overlay_pitch + 3 * x);
#pragma unroll
                for (i32 i = 0; i < 3; i++)
                    target[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
            } else {
                paint_one_by_one(canvas, x, y, bits, edge, ink);
            }
        }
    }
    if (!canvas.measures) return;
    const u32 tiles = ((width + TILE_WIDTH - 1) / TILE_WIDTH) * ((height + TILE_HEIGHT - 1) / TILE_HEIGHT);
    add_measures<WARPS>(bits, x, y, canvas.totals, canvas.measures, tiles, scratch);
}
