// A frame in GPU memory, in any of five pixel formats, and how one pixel, two neighbours or sixteen in a row are read.
#pragma once

#include "portable.cuh"

// PixelFormat in frame_view.py
enum Format : i32 { BGR8 = 0, RGB8 = 1, GRAY8 = 2, GRAY16 = 3, NV12 = 4 };

// Mirrored by parameters.Frame.
struct Frame {
    const u8* pixels;  // first row; NV12: the luma plane
    const u8* chroma;  // NV12: the plane of U, V pairs
    i32 pitch;         // bytes from row to row
    i32 chroma_pitch;
    i32 width;
    i32 height;
    i32 format;
    float gain;  // GRAY16: level = sample · gain + bias
    float bias;
    i32 luma_offset;  // NV12: level = ((luma - offset) · luma_gain + chroma part) / 2^20
    i32 luma_gain;
    i32 red_v;
    i32 green_u;
    i32 green_v;
    i32 blue_u;
};

struct Color {
    i32 red, green, blue;  // 0 to 255
};

__device__ inline const u8* row_of(const Frame& frame, i32 y) { return frame.pixels + u64(y) * frame.pitch; }

__device__ inline const u8* chroma_row_of(const Frame& frame, i32 y) {
    return frame.chroma + u64(y / 2) * frame.chroma_pitch;
}

__device__ inline i32 byte_of(const u32* words, i32 i) { return __byte_perm(words[i / 4], 0, 0x4440 + i % 4); }

// 16 bits to 8, as the CPU reference does before anything else.
__device__ inline i32 level_of(const Frame& frame, u16 sample) {
    return __float2int_rn(fminf(fmaxf(float(sample) * frame.gain + frame.bias, 0.0f), 255.0f));
}

// OpenCV's fixed-point conversion with 20 fractional bits; no sum leaves 32 bits.
__device__ inline Color color_of(const Frame& frame, i32 luma, i32 u, i32 v) {
    const i32 bright = (luma > frame.luma_offset ? luma - frame.luma_offset : 0) * frame.luma_gain + (1 << 19);
    u -= 128;
    v -= 128;
    return {
        clipped((bright + frame.red_v * v) >> 20, 0, 255),
        clipped((bright + frame.green_u * u + frame.green_v * v) >> 20, 0, 255),
        clipped((bright + frame.blue_u * u) >> 20, 0, 255),
    };
}

// COUNT words from any address: four at a time where it is aligned, else one at a time and shifted into place. False
// where that would touch bytes outside begin..end.
template <i32 COUNT>
__device__ inline bool load_words(const u8* address, const u8* begin, const u8* end, u32* words) {
    static_assert(COUNT % 4 == 0, "whole 16-byte vectors");
    const u64 place = reinterpret_cast<u64>(address);
    if (place % 16 == 0) {
        const uint4* vectors = reinterpret_cast<const uint4*>(address);
#pragma unroll
        for (i32 i = 0; i < COUNT / 4; i++) {
            const uint4 vector = vectors[i];
            words[4 * i] = vector.x;
            words[4 * i + 1] = vector.y;
            words[4 * i + 2] = vector.z;
            words[4 * i + 3] = vector.w;
        }
        return true;
    }
    const i32 skipped = i32(place % 4);
    const i32 loads = skipped ? COUNT + 1 : COUNT;
    const u8* aligned = address - skipped;
    if (aligned < begin || aligned + 4 * loads > end) return false;
    const u32* source = reinterpret_cast<const u32*>(aligned);
    u32 low = source[0];
#pragma unroll
    for (i32 i = 0; i < COUNT; i++) {
        const u32 high = i + 1 < loads ? source[i + 1] : 0;
        words[i] = __funnelshift_r(low, high, 8 * skipped);
        low = high;
    }
    return true;
}

// Six bytes from ``offset`` of a row: four in ``low``, two in ``high``. Words where they lie inside the row.
__device__ inline void load_six(const u8* row, i32 row_bytes, i32 offset, u32& low, u32& high) {
    const u8* address = row + offset;
    const i32 skipped = i32(reinterpret_cast<u64>(address) % 4);
    const u8* aligned = address - skipped;
    const i32 bytes = skipped == 3 ? 12 : 8;
    if (aligned >= row && aligned + bytes <= row + row_bytes) {
        const u32* words = reinterpret_cast<const u32*>(aligned);
        const u32 middle = words[1];
        low = __funnelshift_r(words[0], middle, 8 * skipped);
        high = __funnelshift_r(middle, skipped == 3 ? words[2] : 0, 8 * skipped);
    } else {
        low = address[0] | address[1] << 8 | address[2] << 16 | u32(address[3]) << 24;
        high = address[4] | address[5] << 8;
    }
}

// Whether rows start at whole words, the first and all others.
__device__ inline bool rows_of_words(const Frame& frame) {
    return (reinterpret_cast<u64>(frame.pixels) | u64(frame.pitch)) % 4 == 0;
}

// One reader a format:
//   CHANNELS            1 where the three channels are equal (only red is filled), else 3
//   at(frame, x, y)     one pixel
//   Column, column(..)  where the pixels x and x + 1 lie in any row
//   pair(...)           those two pixels of a row; the second one repeats the first at the row's end
//   sixteen(...)        the pixels x .. x + 15 as 48 bytes B, G, R in 12 words; false where they cannot be read at once
template <Format FORMAT>
struct Reader;

template <bool RED_FIRST>
struct PackedReader {
    static constexpr i32 CHANNELS = 3;

    static __device__ Color ordered(i32 first, i32 second, i32 third) {
        return RED_FIRST ? Color{first, second, third} : Color{third, second, first};
    }

    static __device__ Color at(const Frame& frame, i32 x, i32 y) {
        const u8* pixel = row_of(frame, y) + 3 * x;
        return ordered(pixel[0], pixel[1], pixel[2]);
    }

    struct Column {
        i32 x;
        i32 word;  // where rows start at whole words: the first one of the two pixels; -1: they are read otherwise
        i32 shift;  // bits before the first pixel in it; with 24 they reach into the second word after it
    };

    static __device__ Column column(const Frame& frame, i32 x) {
        const i32 skipped = 3 * x % 4, word = 3 * x / 4;
        const bool within = 4 * word + (skipped == 3 ? 12 : 8) <= 3 * frame.width;
        return {x, rows_of_words(frame) && within ? word : -1, 8 * skipped};
    }

    static __device__ void pair(const Frame& frame, const Column& column, i32 y, Color& left, Color& right) {
        const u8* row = row_of(frame, y);
        u32 words[2];
        if (column.word >= 0) {
            const u32* source = reinterpret_cast<const u32*>(row) + column.word;
            const u32 middle = source[1], last = column.shift == 24 ? source[2] : 0;
            words[0] = __funnelshift_r(source[0], middle, column.shift);
            words[1] = __funnelshift_r(middle, last, column.shift);
        } else if (column.x + 1 < frame.width) {
            load_six(row, 3 * frame.width, 3 * column.x, words[0], words[1]);
        } else {
            left = right = at(frame, column.x, y);
            return;
        }
        left = ordered(byte_of(words, 0), byte_of(words, 1), byte_of(words, 2));
        right = ordered(byte_of(words, 3), byte_of(words, 4), byte_of(words, 5));
    }

    static __device__ bool sixteen(const Frame& frame, i32 x, i32 y, u32* words) {
        const u8* row = row_of(frame, y);
        if (x + 16 > frame.width || !load_words<12>(row + 3 * x, row, row + 3 * frame.width, words)) return false;
        if (RED_FIRST) {
            u32 swapped[12] = {};
#pragma unroll
            for (i32 i = 0; i < 48; i++) swapped[i / 4] |= u32(byte_of(words, i - i % 3 + 2 - i % 3)) << (8 * (i % 4));
#pragma unroll
            for (i32 i = 0; i < 12; i++) words[i] = swapped[i];
        }
        return true;
    }
};

template <>
struct Reader<BGR8> : PackedReader<false> {};

template <>
struct Reader<RGB8> : PackedReader<true> {};

__device__ inline void put_pixel(u32* words, i32 pixel, i32 blue, i32 green, i32 red) {
    words[3 * pixel / 4] |= u32(blue) << (8 * (3 * pixel % 4));
    words[(3 * pixel + 1) / 4] |= u32(green) << (8 * ((3 * pixel + 1) % 4));
    words[(3 * pixel + 2) / 4] |= u32(red) << (8 * ((3 * pixel + 2) % 4));
}

struct Neighbours {
    i32 x, next;
};

__device__ inline Neighbours neighbours(const Frame& frame, i32 x) { return {x, x + 1 < frame.width ? x + 1 : x}; }

template <>
struct Reader<GRAY8> {
    static constexpr i32 CHANNELS = 1;

    static __device__ Color at(const Frame& frame, i32 x, i32 y) {
        const i32 level = row_of(frame, y)[x];
        return {level, level, level};
    }

    using Column = Neighbours;

    static __device__ Column column(const Frame& frame, i32 x) { return neighbours(frame, x); }

    static __device__ void pair(const Frame& frame, const Column& column, i32 y, Color& left, Color& right) {
        const u8* row = row_of(frame, y);
        left.red = row[column.x];
        right.red = row[column.next];
    }

    static __device__ bool sixteen(const Frame& frame, i32 x, i32 y, u32* words) {
        const u8* row = row_of(frame, y);
        u32 levels[4];
        if (x + 16 > frame.width || !load_words<4>(row + x, row, row + frame.width, levels)) return false;
#pragma unroll
        for (i32 i = 0; i < 12; i++) words[i] = 0;
#pragma unroll
        for (i32 i = 0; i < 16; i++) put_pixel(words, i, byte_of(levels, i), byte_of(levels, i), byte_of(levels, i));
        return true;
    }
};

template <>
struct Reader<GRAY16> {
    static constexpr i32 CHANNELS = 1;

    static __device__ const u16* samples(const Frame& frame, i32 y) {
        return reinterpret_cast<const u16*>(row_of(frame, y));
    }

    static __device__ Color at(const Frame& frame, i32 x, i32 y) {
        const i32 level = level_of(frame, samples(frame, y)[x]);
        return {level, level, level};
    }

    using Column = Neighbours;

    static __device__ Column column(const Frame& frame, i32 x) { return neighbours(frame, x); }

    static __device__ void pair(const Frame& frame, const Column& column, i32 y, Color& left, Color& right) {
        const u16* row = samples(frame, y);
        left.red = level_of(frame, row[column.x]);
        right.red = level_of(frame, row[column.next]);
    }

    static __device__ bool sixteen(const Frame& frame, i32 x, i32 y, u32* words) {
        const u8* row = row_of(frame, y);
        u32 pairs[8];
        if (x + 16 > frame.width || !load_words<8>(row + 2 * x, row, row + 2 * frame.width, pairs)) return false;
#pragma unroll
        for (i32 i = 0; i < 12; i++) words[i] = 0;
#pragma unroll
        for (i32 i = 0; i < 16; i++) {
            const i32 level = level_of(frame, u16(pairs[i / 2] >> (16 * (i % 2))));
            put_pixel(words, i, level, level, level);
        }
        return true;
    }
};

template <>
struct Reader<NV12> {
    static constexpr i32 CHANNELS = 3;

    static __device__ Color at(const Frame& frame, i32 x, i32 y) {
        const u8* chroma = chroma_row_of(frame, y) + (x & ~1);
        return color_of(frame, row_of(frame, y)[x], chroma[0], chroma[1]);
    }

    using Column = Neighbours;

    static __device__ Column column(const Frame& frame, i32 x) { return neighbours(frame, x); }

    static __device__ void pair(const Frame& frame, const Column& column, i32 y, Color& left, Color& right) {
        const i32 x = column.x, next = column.next;
        const u8* luma = row_of(frame, y);
        const u8* chroma = chroma_row_of(frame, y);
        left = color_of(frame, luma[x], chroma[x & ~1], chroma[x | 1]);
        right = color_of(frame, luma[next], chroma[next & ~1], chroma[next | 1]);
    }

    static __device__ bool sixteen(const Frame& frame, i32 x, i32 y, u32* words) {
        const u8* luma_row = row_of(frame, y);
        const u8* chroma_row = chroma_row_of(frame, y);
        u32 luma[4], chroma[4];
        if (x + 16 > frame.width || !load_words<4>(luma_row + x, luma_row, luma_row + frame.width, luma) ||
            !load_words<4>(chroma_row + x, chroma_row, chroma_row + frame.width, chroma))
            return false;
#pragma unroll
        for (i32 i = 0; i < 12; i++) words[i] = 0;
#pragma unroll
        for (i32 i = 0; i < 16; i++) {
            const Color color = color_of(frame, byte_of(luma, i), byte_of(chroma, i & ~1), byte_of(chroma, i | 1));
            put_pixel(words, i, color.blue, color.green, color.red);
        }
        return true;
    }
};

// Calls ``action`` with the frame's reader; the branch is the same for a whole block.
template <typename Action>
__device__ inline void with_reader(const Frame& frame, const Action& action) {
    switch (frame.format) {
        case BGR8: action(Reader<BGR8>()); break;
        case RGB8: action(Reader<RGB8>()); break;
        case GRAY8: action(Reader<GRAY8>()); break;
        case GRAY16: action(Reader<GRAY16>()); break;
        case NV12: action(Reader<NV12>()); break;
    }
}
