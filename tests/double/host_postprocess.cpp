// postprocess.cu by the host compiler.
#include "postprocess.cu"

#include "host_kernels.h"

HOST_KERNEL(postprocess, Postprocess);

static const bool laid_out = [] {
    HOST_FIELD(Measures, area);
    HOST_FIELD(Measures, sum_x);
    HOST_FIELD(Measures, sum_y);
    HOST_FIELD(Measures, left);
    HOST_FIELD(Measures, top);
    HOST_FIELD(Measures, right);
    HOST_FIELD(Measures, bottom);
    HOST_FIELD(Totals, sums);
    HOST_FIELD(Totals, greatest);
    HOST_FIELD(Totals, finished);
    HOST_FIELD(Canvas, frame);
    HOST_FIELD(Canvas, logits);
    HOST_FIELD(Canvas, mask);
    HOST_FIELD(Canvas, overlay);
    HOST_FIELD(Canvas, measures);
    HOST_FIELD(Canvas, totals);
    HOST_FIELD(Canvas, mask_pitch);
    HOST_FIELD(Canvas, overlay_pitch);
    HOST_FIELD(Canvas, outline);
    HOST_FIELD(Postprocess, count);
    HOST_FIELD(Postprocess, logits_height);
    HOST_FIELD(Postprocess, logits_width);
    HOST_FIELD(Postprocess, level);
    HOST_FIELD(Postprocess, opacity);
    HOST_FIELD(Postprocess, color);
    HOST_FIELD(Postprocess, canvases);
    return true;
}();
