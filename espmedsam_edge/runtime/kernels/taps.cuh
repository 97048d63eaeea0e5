// Where the centre of a target pixel falls between two source pixels: cv2.INTER_LINEAR's half-pixel centres.
#pragma once

#include "portable.cuh"

struct Tap {
    i32 index;     // of the left (upper) source pixel; -1 or side - 1 where the centre lies outside the outermost ones
    float weight;  // of the right (lower) one, 0 to 1
};

// (target + 1/2) · source_side / target_side - 1/2, computed in whole numbers of 1 / (2 · target_side), so that a wide
// frame's right edge is as exact as its left one. Sides up to 32767 (MAX_SIDE in parameters.py) fit 32 bits.
__device__ inline Tap tap_at(i32 target, i32 source_side, i32 target_side) {
    const i32 unit = 2 * target_side;
    const i32 position = (2 * target + 1) * source_side - target_side;
    i32 index = position / unit;
    i32 rest = position - index * unit;
    if (rest < 0) {
        index -= 1;
        rest += unit;
    }
    return {index, float(rest) / float(unit)};
}

// The same with both pixels inside the source: outside the outermost centres the outermost pixel counts alone.
__device__ inline Tap tap_inside(i32 target, i32 source_side, i32 target_side) {
    Tap tap = tap_at(target, source_side, target_side);
    if (tap.index < 0) tap = {0, 0.0f};
    if (tap.index >= source_side - 1) tap = {source_side - 1, 0.0f};
    return tap;
}
