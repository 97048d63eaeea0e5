"""Images and masks as training batches: read, stretched to a square, kept in memory, augmented, normalised.

Reading and stretching happen once an image while the cache has room (the network's square in 8 bits and a packed mask:
0.8 MB at 512 pixels); augmentation happens anew at every draw. Nothing here keeps random state: a draw's seed fixes
its result, so any number of threads may call ``TrainingSet.batch`` at once.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from espmedsam_edge.bundle import Normalization
from espmedsam_edge.errors import UserError
from espmedsam_edge.imaging.dataset import DatasetFolder
from espmedsam_edge.imaging.decode import file_header
from espmedsam_edge.imaging.geometry import Frame, stretch
from espmedsam_edge.imaging.masks import Mask, resize_mask
from espmedsam_edge.phantoms import phantom
from espmedsam_edge.training.data.augmentation import NO_AUGMENTATION, Augmentation, Box
from espmedsam_edge.training.data.image_augmentation import Pixels, augment, paste
from espmedsam_edge.training.data.sampler import BatchPlan, Draw

DEFAULT_CACHE_BYTES = 4 << 30


class Pair(NamedTuple):
    """One image as read: (H, W, 3) uint8 BGR, its mask (H, W) uint8 0/255 or None, and what had to be assumed."""

    image: Frame
    mask: Mask | None
    note: str = ""


class TrainingSource(Protocol):
    """Numbered images of one modality."""

    def __len__(self) -> int:
        """How many."""

    def name(self, index: int) -> str:
        """What to call one in messages: its file."""

    def load(self, index: int) -> Pair:
        """Read one.

        Raises:
            UserError: it cannot be read; the message names the file.
        """


class FolderSource:
    """The images of one split of a dataset folder; without ``masks/`` they are unlabelled.

    Args:
        folder: the dataset folder.
        split: "train", "valid", "test" or "all".
        limit: at most so many, the first by order of the list; 0: all.

    Raises:
        UserError: as ``DatasetFolder.ids``.
    """

    def __init__(self, folder: DatasetFolder, split: str, limit: int = 0) -> None:
        ids = folder.ids(split)
        self.folder = folder
        self.ids = ids[:limit] if limit else ids
        self.labelled = bool(folder.mask_files)

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        """The image's path."""
        return str(self.folder.image_files[self.ids[index]])

    def load(self, index: int) -> Pair:
        """Read the image and, in a labelled folder, its mask."""
        if not self.labelled:
            return Pair(self.folder.load_image(self.ids[index]), None)
        sample = self.folder.load(self.ids[index])
        return Pair(sample.image, sample.mask, sample.note)

    def longest(self) -> int:
        """The long side of its largest picture in pixels, by the files' headers; 0: none could be read."""
        sides = [0]
        for index in range(len(self)):
            with suppress(UserError):
                header = file_header(self.name(index))
                sides.append(max(header.width, header.height))
        return max(sides)


class NegativeSource(FolderSource):
    """Pictures that show nothing of a modality's target: their masks are empty, whatever the folder has."""

    def load(self, index: int) -> Pair:
        """Read the picture."""
        image = self.folder.load_image(self.ids[index])
        return Pair(image, np.zeros(image.shape[:2], np.uint8))


class PhantomSource:
    """Synthetic images of one modality: seeds ``first_seed`` and on, ``size`` pixels square."""

    def __init__(self, modality: str, count: int, first_seed: int = 0, size: int = 256) -> None:
        self.modality = modality
        self.count = count
        self.first_seed = first_seed
        self.size = size

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        """``phantom fundus 3``."""
        return f"phantom {self.modality} {self.first_seed + index}"

    def load(self, index: int) -> Pair:
        """Draw it."""
        image, mask = phantom(self.modality, self.first_seed + index, (self.size, self.size))
        return Pair(image, mask)


@dataclass(frozen=True)
class Batch:
    """Images of one modality.

    Attributes:
        modality: its name.
        images: (B, 3, S, S) float32, normalised RGB.
        masks: (B, 1, S, S) float32, 0 or 1; None for unlabelled images.
        names: the B files, for messages.
    """

    modality: str
    images: Tensor
    masks: Tensor | None
    names: tuple[str, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on a device."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return replace(self, images=self.images.to(device, non_blocking=True), masks=masks)

    def shrunk(self, size: int) -> Batch:
        """The same batch at ``size`` pixels, no larger than it was; a mask's pixel is target where half of it is."""
        if size >= self.images.shape[-1]:
            return self
        images = F.interpolate(self.images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        if self.masks is None:
            return replace(self, images=images)
        masks = (F.interpolate(self.masks, (size, size), mode="area") >= 0.5).to(self.masks.dtype)
        return replace(self, images=images, masks=masks)

    def cut(self, size: int) -> Batch:
        """A window of ``size`` x ``size`` pixels, no larger than the images, at a place that torch draws for all."""
        room = max(0, self.images.shape[-1] - size)
        top, left = (int(at) for at in torch.randint(0, room + 1, (2,)))
        place = (..., slice(top, top + size), slice(left, left + size))
        return replace(self, images=self.images[place], masks=None if self.masks is None else self.masks[place])


class TrainingSet:
    """The images of several modalities, each from one or more sources, as batches.

    Args:
        sources: modality -> where its images come from; their images are numbered through.
        image_size: S, the network's side in pixels.
        image_sizes: modality -> S, for those of another size.
        windows: modality -> side of the random windows that stand for its images.
        normalization: the network's.
        augmentations: modality -> what may happen to its images; a modality left out is not augmented.
        cache_bytes: images are kept in memory until this many bytes are in use; 0 keeps none.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[TrainingSource]],
        image_size: int,
        normalization: Normalization | None = None,
        augmentations: Mapping[str, Augmentation] | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        image_sizes: Mapping[str, int] | None = None,
        windows: Mapping[str, int] | None = None,
    ) -> None:
        self.image_size = image_size
        self._sizes = dict(image_sizes or {})
        self._windows = dict(windows or {})
        self.normalization = normalization or Normalization()
        self.notes: list[str] = []
        self._sources = {name: list(group) for name, group in sources.items()}
        self._augmentations = dict(augmentations or {})
        self._cache: dict[tuple[str, int], tuple[NDArray[np.uint8], NDArray[np.uint8] | None]] = {}
        self._cache_left = cache_bytes
        self._lock = threading.Lock()
        scale = np.array(self.normalization.std) * 255
        self._mean = torch.tensor(np.array(self.normalization.mean) * 255, dtype=torch.float32).reshape(3, 1, 1)
        self._inverse_std = torch.tensor(1 / scale, dtype=torch.float32).reshape(3, 1, 1)

    @property
    def sizes(self) -> dict[str, int]:
        """Images a modality."""
        return {name: sum(len(source) for source in group) for name, group in self._sources.items()}

    def longest(self, modality: str) -> int:
        """The long side of a modality's largest picture, in pixels; 0: not known, as of phantoms."""
        sources = self._sources.get(modality, ())
        return max((source.longest() for source in sources if isinstance(source, FolderSource)), default=0)

    def name(self, modality: str, index: int) -> str:
        """What to call an image in messages."""
        source, place = self._locate(modality, index)
        return source.name(place)

    def names(self, plan: BatchPlan) -> tuple[str, ...]:
        """What to call a plan's images."""
        return tuple(self.name(plan.modality, draw.index) for draw in plan.draws)

    def size_of(self, modality: str) -> int:
        """S, the side of a modality's images as they are kept."""
        return self._sizes.get(modality, self.image_size)

    def side_of(self, modality: str) -> int:
        """Side of its images in a batch: S, or its windows'."""
        return min(self.size_of(modality), self._windows.get(modality, self.size_of(modality)))

    def settings_of(self, modality: str) -> Augmentation:
        """What may happen to a modality's images."""
        return self._augmentations.get(modality, NO_AUGMENTATION)

    def normalise(self, pixels: Tensor) -> Tensor:
        """(..., 3, S, S) float32 in 0..255, in place, to what the network expects."""
        return pixels.sub_(self._mean.to(pixels.device)).mul_(self._inverse_std.to(pixels.device))

    def require_all_or_no_masks(self, modality: str, masks: Mapping[int, object | None]) -> None:
        """Refuse images by index of which only some have a mask.

        Raises:
            UserError: names one without.
        """
        bare = [index for index, mask in masks.items() if mask is None]
        if bare and len(bare) < len(masks):
            name = self.name(modality, bare[0])
            raise UserError(f"{name} has no mask but other {modality} images have.", "Add masks/ or drop the set.")

    def batch(self, plan: BatchPlan) -> Batch:
        """The batch that a plan describes.

        Raises:
            UserError: an image cannot be read, or only some of the batch's images have masks; names the file.
        """
        rows = [self._row(plan.modality, draw) for draw in plan.draws]
        self.require_all_or_no_masks(
            plan.modality, {draw.index: row[1] for draw, row in zip(plan.draws, rows, strict=True)}
        )
        side = len(rows[0][0])
        pixels = np.empty((len(rows), side, 3 * side), np.float32)
        mean, inverse_std = (np.tile(values.numpy().ravel(), side) for values in (self._mean, self._inverse_std))
        for place, (image, _, _) in zip(pixels, rows, strict=True):
            # By rows of pixels: NumPy is slow where the last axis is three long.
            np.subtract(image.reshape(side, -1), mean, out=place)
            place *= inverse_std
        # They stay in this order, channels last, which convolutions want as well.
        images = torch.from_numpy(pixels).view(len(rows), side, side, 3).permute(0, 3, 1, 2)
        found = [mask for _, mask, _ in rows if mask is not None]
        masks = torch.from_numpy(np.stack(found))[:, None] if found else None
        paste(images, masks, [pasted for _, _, pasted in rows])
        return Batch(plan.modality, images, masks, self.names(plan))

    def in_order(self, modality: str, batch_size: int) -> list[BatchPlan]:
        """Every image of a modality once, in order, for validation."""
        count = self.sizes[modality]
        return [
            BatchPlan(modality, tuple(Draw(index, 0) for index in range(start, min(start + batch_size, count))))
            for start in range(0, count, batch_size)
        ]

    def _row(self, modality: str, draw: Draw) -> tuple[Pixels, Pixels | None, Box | None]:
        image, mask = self._square(modality, draw.index)
        opaque = np.zeros(image.shape[:2], np.uint8) if mask is None else mask
        rng = np.random.default_rng(draw.seed)
        pixels, target, change = augment(image, opaque, self.settings_of(modality), rng, self.side_of(modality))
        return pixels, None if mask is None else target, change.pasted

    def _square(self, modality: str, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """(S, S, 3) uint8 RGB and (S, S) uint8 0/255, from the cache or the source."""
        size = self.size_of(modality)
        kept = self._cache.get((modality, index))
        if kept is not None:
            image, packed = kept
            if packed is None:
                return image, None
            mask = np.unpackbits(packed, count=size * size).reshape(size, size) * np.uint8(255)
            return image, mask
        image, mask = self.read(modality, index)
        packed = None if mask is None else np.packbits(mask > 0)
        needed = image.nbytes + (0 if packed is None else packed.nbytes)
        with self._lock:
            # When full, what is in stays: of a set that is read in turn, evicting would lose each image before its use.
            if (modality, index) not in self._cache and needed <= self._cache_left:
                self._cache[modality, index] = (image, packed)
                self._cache_left -= needed
        return image, mask

    def read(self, modality: str, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """(S, S, 3) uint8 RGB and (S, S) uint8 0/255 or None, from the source.

        Raises:
            UserError: it cannot be read; names the file.
        """
        size = self.size_of(modality)
        source, place = self._locate(modality, index)
        pair = source.load(place)
        image = np.ascontiguousarray(stretch(pair.image, size)[..., ::-1])
        mask = None if pair.mask is None else resize_mask(pair.mask, (size, size))
        with self._lock:
            if pair.note and len(self.notes) < 1000 and pair.note not in self.notes:
                self.notes.append(pair.note)
        return image, mask

    def _locate(self, modality: str, index: int) -> tuple[TrainingSource, int]:
        for source in self._sources[modality]:
            if index < len(source):
                return source, index
            index -= len(source)
        raise IndexError(f"{modality} has no image {index} more")
