# ---
# jupyter:
#   jupytext:
#     text_representation: {extension: .py, format_name: percent}
#   kernelspec: {display_name: Python 3, language: python, name: python3}
# ---

# %% [markdown]
# # Add a modality from corrected masks
#
# The network segments pictures of a new kind as well as it can, a person corrects the masks, and a new modality is trained
# from them: a bag of parameters, a query and an MLP. Nothing else of the checkpoint changes by a bit. Needs
# `pip install '.[export,train,demo,bench]' ./packages/weights`; a few minutes on a processor. `make notebooks` runs it in
# `build/notebooks`.

# %%
import json
from pathlib import Path

import cv2
import matplotlib.pyplot as plt
import numpy as np
import skimage
from skimage.color import rgb2hed
from skimage.filters import threshold_otsu
from skimage.morphology import opening, remove_small_objects

from espmedsam_edge import Outputs, Segmenter, infer
from espmedsam_edge.export.exporter import export_bundle
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.metrics import dice
from espmedsam_edge.shipped.bundles import shipped_bundle, shipped_checkpoint
from espmedsam_edge.training.data.check import check
from espmedsam_edge.training.recipe import load_recipe, with_new_modality
from espmedsam_edge.training.stages import run_stage

# %% [markdown]
# Pictures of a kind that the weights do not know: immunostained tissue, brown and blue, cut into nine.

# %%
tissue = cv2.imread(str(Path(skimage.__file__).parent / "data" / "ihc.png"))
folder = Path("immunostain")
for part in ("images", "masks"):
    (folder / part).mkdir(parents=True, exist_ok=True)
side = 170
names = []
for row in range(3):
    for column in range(3):
        names.append(f"field-{row}{column}")
        field = tissue[row * side : (row + 1) * side, column * side : (column + 1) * side]
        cv2.imwrite(str(folder / "images" / f"{names[-1]}.png"), field)

# %% [markdown]
# What the nearest modality, microscopy, makes of them: a start for whoever corrects.

# %%
report = infer(str(folder / "images"), shipped_bundle("microscopy"), Outputs(masks="found"))
assert report.frames == 9

# %% [markdown]
# Now a person corrects `found/*.png` in any program that paints, 255 on the target and 0 elsewhere, and saves to
# `immunostain/masks`. So that this notebook runs by itself, a threshold on the blue stain takes the hand's place.


# %%
def corrected(picture: np.ndarray) -> np.ndarray:
    blue = rgb2hed(picture[..., ::-1])[..., 0]
    nuclei = opening(blue > threshold_otsu(blue), np.ones((3, 3)))
    return remove_small_objects(nuclei, max_size=20).astype(np.uint8) * 255


for name in names:
    cv2.imwrite(str(folder / "masks" / f"{name}.png"), corrected(cv2.imread(str(folder / "images" / f"{name}.png"))))

# %% [markdown]
# A dataset folder is images, masks and lists. `check` (on the shell: `espmedsam-edge data check immunostain`) finds
# what is wrong with one.

# %%
lists = {"origin": "derived", "modality": "immunostain", "train": names[:6], "valid": names[6:8], "test": names[8:]}
(folder / "split.json").write_text(json.dumps(lists))
found = check(DatasetFolder.open(folder))
print(found.images, "images", found.lists, [finding.kind for finding in found.findings])

# %% [markdown]
# Training. Two epochs of six pictures, so that it is over soon; leave the changes out for the recipe's hundred. On the shell:
# `espmedsam-edge train add-modality immunostain immunostain --init weights.safetensors --target "cell nuclei" --like microscopy`.

# %%
shipped_checkpoint(Path("weights.safetensors"))
recipe = with_new_modality(
    load_recipe("add-modality", ["run.epochs=2", "run.batch_size=2", "schedule.warmup_epochs=0", "data.workers=0"]),
    "immunostain",
    [folder],
    Path("weights.safetensors"),
    target="cell nuclei",
    like="microscopy",
)
weights, progress = run_stage("add-modality", recipe, Path("run"), overwrite=True)
print(f"best epoch {progress.best_epoch}, Dice {progress.best:.3f} on the validation pictures")

# %% [markdown]
# The new modality as a bundle, on the picture that training never saw.

# %%
export_bundle(weights, Path("immunostain.bundle"), modalities=["immunostain"])
picture = cv2.imread(str(folder / "images" / f"{names[8]}.png"))
truth = cv2.imread(str(folder / "masks" / f"{names[8]}.png"), cv2.IMREAD_GRAYSCALE)
before = cv2.imread(f"found/{names[8]}.png", cv2.IMREAD_GRAYSCALE)
with Segmenter.load("immunostain.bundle") as segmenter:
    after = segmenter.segment(picture).mask
print(f"Dice before {dice(before, truth):.3f}, after {dice(after, truth):.3f}")
assert dice(after, truth) > dice(before, truth)

# %%
_, panels = plt.subplots(1, 4, figsize=(12, 3))
titles = ("picture", "as microscopy", "as the new modality", "corrected mask")
for panel, shown, title in zip(panels, (picture[..., ::-1], before, after, truth), titles, strict=True):
    panel.imshow(shown, cmap="gray")
    panel.set_title(title)
    panel.axis("off")
plt.show()
