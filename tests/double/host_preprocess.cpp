// preprocess.cu by the host compiler.
#include "preprocess.cu"

#include "host_kernels.h"

HOST_KERNEL(preprocess, Preprocess);

static const bool laid_out = [] {
    HOST_FIELD(Frame, pixels);
    HOST_FIELD(Frame, chroma);
    HOST_FIELD(Frame, pitch);
    HOST_FIELD(Frame, chroma_pitch);
    HOST_FIELD(Frame, width);
    HOST_FIELD(Frame, height);
    HOST_FIELD(Frame, format);
    HOST_FIELD(Frame, gain);
    HOST_FIELD(Frame, bias);
    HOST_FIELD(Frame, luma_offset);
    HOST_FIELD(Frame, luma_gain);
    HOST_FIELD(Frame, red_v);
    HOST_FIELD(Frame, green_u);
    HOST_FIELD(Frame, green_v);
    HOST_FIELD(Frame, blue_u);
    HOST_FIELD(Preprocess, out);
    HOST_FIELD(Preprocess, count);
    HOST_FIELD(Preprocess, size);
    HOST_FIELD(Preprocess, scale);
    HOST_FIELD(Preprocess, shift);
    HOST_FIELD(Preprocess, frames);
    return true;
}();
