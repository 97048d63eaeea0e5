"""A training set kept on the training device as bytes; its batches are made there, with no work an image for Python.

The images are read and stretched once. A batch is one lookup and a few passes over its pixels on the device, from the
same settings and seeds as ``TrainingSet.batch``, and is the same but for float32's rounding.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from espmedsam_edge.training.data.augmentation import Box, box_around, draw
from espmedsam_edge.training.data.batch_augmentation import augment_batch
from espmedsam_edge.training.data.dataset import Batch, TrainingSet
from espmedsam_edge.training.data.image_augmentation import noise_bank, paste
from espmedsam_edge.training.data.sampler import BatchPlan
from espmedsam_edge.training.sections import DataSection


def stock_bytes(images: TrainingSet) -> int:
    """What a training set takes on the device: four bytes a pixel, the mask the fourth."""
    return sum(4 * count * images.size_of(name) ** 2 for name, count in images.sizes.items())


def fits(images: TrainingSet, device: torch.device, settings: DataSection) -> bool:
    """Whether a recipe's images are to be kept on a GPU, and there is room for them.

    Not on a processor: a training set's cache holds the same bytes, and images one by one are made faster there.
    """
    if settings.feeding == "images" or device.type == "cpu":
        return False
    free: int = torch.cuda.mem_get_info(device)[0]
    return stock_bytes(images) <= min(settings.device_gb * 2**30, free / 2)  # the network needs the other half


class DeviceStock:
    """All images of a training set on a device.

    Raises:
        UserError: an image cannot be read, or only some of a modality's images have masks; names the file.
    """

    def __init__(self, images: TrainingSet, device: torch.device, workers: int = 1) -> None:
        self.images = images
        self._bank = noise_bank().to(device)
        self._pixels: dict[str, Tensor] = {}  # modality -> (N, 4, S, S) uint8, or (N, 3, S, S) without masks
        self._targets: dict[str, list[Box | None]] = {}
        with ThreadPoolExecutor(max(1, workers), thread_name_prefix="stock") as pool:
            for name, count in images.sizes.items():
                rows = list(pool.map(lambda index, of=name: images.read(of, index), range(count)))
                images.require_all_or_no_masks(name, {index: mask for index, (_, mask) in enumerate(rows)})
                self._targets[name] = [None if mask is None else box_around(mask) for _, mask in rows]
                self._pixels[name] = _planes(rows).to(device)

    def batch(self, plan: BatchPlan) -> Batch:
        """The batch that a plan describes, on the device."""
        name, pixels = plan.modality, self._pixels[plan.modality]
        settings, side = self.images.settings_of(name), self.images.side_of(name)
        changes = [
            draw(settings, pixels.shape[-1], side, np.random.default_rng(one.seed), self._targets[name][one.index])
            for one in plan.draws
        ]
        changed, masks = augment_batch(pixels, [one.index for one in plan.draws], changes, self._bank)
        changed = self.images.normalise(changed)
        paste(changed, masks, [change.pasted for change in changes])
        return Batch(name, changed, masks, self.images.names(plan))


def _planes(rows: list[tuple[NDArray[np.uint8], NDArray[np.uint8] | None]]) -> Tensor:
    """(N, 4 or 3, S, S) uint8."""
    side, masked = len(rows[0][0]), rows[0][1] is not None
    planes = torch.empty(len(rows), 4 if masked else 3, side, side, dtype=torch.uint8)
    for row, (image, mask) in zip(planes, rows, strict=True):
        row[:3] = torch.from_numpy(image).permute(2, 0, 1)
        if mask is not None:
            row[3] = torch.from_numpy(mask)
    return planes
