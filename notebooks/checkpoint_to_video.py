# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # From a checkpoint to a video
#
# A checkpoint becomes a bundle, a bundle segments a clip. Needs `pip install '.[export,video,bench]' ./packages/weights`;
# runs on a processor. `make notebooks` runs it in `build/notebooks`.

# %%
from pathlib import Path

import cv2
import matplotlib.pyplot as plt

from espmedsam_edge import ModelOptions, Outputs, infer, infer_frames
from espmedsam_edge.export.exporter import export_bundle
from espmedsam_edge.phantoms import phantom_clip
from espmedsam_edge.shipped.bundles import shipped_checkpoint

# %% [markdown]
# The checkpoint: here that of the weights that come with the program. Yours is what `espmedsam-edge train` wrote, or what
# `espmedsam-edge import reference` made of a published one.

# %%
shipped_checkpoint(Path("weights.safetensors"))

# %% [markdown]
# The bundle: one modality, fused into one ONNX graph, which is run beside the checkpoint's network before it is written.
# On the shell: `espmedsam-edge export weights.safetensors --modality colonoscopy --out colonoscopy.bundle`.

# %%
bundle, (graph,) = export_bundle(Path("weights.safetensors"), Path("colonoscopy.bundle"), modalities=["colonoscopy"])
print(f"{graph.megabytes:.0f} MB, {graph.nodes} nodes; agrees on {graph.agreement.mask_agreement:.3%} of the mask")

# %% [markdown]
# A clip. Any video or camera will do; this one is drawn, so its true masks are known. It shows that everything runs, not
# how good the weights are: for that see docs/accuracy.md.

# %%
truths = []
writer = None
for image, truth in phantom_clip("colonoscopy", seed=9500, frames=16, size=(240, 320)):
    if writer is None:
        writer = cv2.VideoWriter("clip.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 25, (image.shape[1], image.shape[0]))
    writer.write(image)
    truths.append(truth)
writer.release()

# %% [markdown]
# The video with its masks drawn in, the masks as files, and a line of numbers a frame. On the shell:
# `espmedsam-edge infer colonoscopy.bundle clip.mp4 --out overlay.mp4 --masks masks --jsonl frames.jsonl`.

# %%
report = infer("clip.mp4", "colonoscopy.bundle", Outputs(out="overlay.mp4", masks="masks", jsonl="frames.jsonl"))
print(report.frames, "frames", report.results)
assert report.frames == len(truths)
assert not report.failures

# %% [markdown]
# Frame by frame, for what is not a file: each frame comes with its result as soon as it is there.

# %%
model = ModelOptions("colonoscopy.bundle", threshold=0.5)
areas = [result.area for frame, result in infer_frames("clip.mp4", model)]
plt.plot(areas, label="segmented")
plt.plot([int((truth > 0).sum()) for truth in truths], label="true")
plt.xlabel("frame")
plt.ylabel("area in pixels")
plt.legend()
plt.show()
