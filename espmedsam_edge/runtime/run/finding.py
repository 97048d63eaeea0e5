"""What is done with a result before it is written: its mask is cleaned up, its objects are found and followed."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from espmedsam_edge.errors import UserError
from espmedsam_edge.machine.installation import why_missing
from espmedsam_edge.modalities import many_of
from espmedsam_edge.objects.instance import Instances, Spacing
from espmedsam_edge.objects.measures import MOST, instances_of
from espmedsam_edge.objects.options import ObjectOptions
from espmedsam_edge.objects.separation import Labels, kept, separated
from espmedsam_edge.objects.tracking import Tracker
from espmedsam_edge.runtime.segmentation import Segmentation
from espmedsam_edge.runtime.sources.source import SourceFrame

log = logging.getLogger(__name__)


class ObjectFinder:
    """Cleans the masks of one source up, and lets their objects be found, which happens when a result asks for them.

    Args:
        options: what is asked for.
        needed: whether results are written that are of objects, whatever is segmented.

    Raises:
        UserError: objects that touch are to be taken apart, and scikit-image is missing.
    """

    def __init__(self, options: ObjectOptions, *, needed: bool = False) -> None:
        self._options, self._needed = options, needed or options.track
        self._missing = None if options.instances is False else why_missing("skimage", "objects")
        if options.instances and self._missing is not None:
            raise UserError(f"objects that touch cannot be taken apart: {self._missing}")
        self._tracker = Tracker() if options.track else None
        self._told: set[tuple[str, Any]] = set()

    def of_frame(self, frame: SourceFrame, result: Segmentation) -> Segmentation:
        """A frame's result as it goes to the sinks."""
        result = self.found(result, frame.spacing, frame.source)
        if self._tracker is None or result.instances is None or frame.time is None:
            return result
        followed = self._tracker.followed(result.instances)
        return replace(result, find=lambda _: followed)

    def found(self, result: Segmentation, spacing: Spacing | None = None, name: str = "a picture") -> Segmentation:
        """A result with what it takes to find its objects, and cleaned up if that was asked for.

        Args:
            result: of the whole frame.
            spacing: of its pixels, in millimetres.
            name: what messages call the picture.
        """
        options = self._options
        split = self.splits(result.modality)
        result = replace(result, find=None, finish=partial(self.found, spacing=spacing, name=name))
        labels = None
        if options.min_area is not None or options.largest is not None:
            labels = kept(separated(result.mask, split=split), options.min_area, options.largest)
            mask = np.where(labels > 0, np.uint8(255), np.uint8(0))
            result = replace(result, mask=mask, measured=None, drawn=None)
        if split or self._needed:
            result = replace(result, find=partial(self._instances, labels, split, spacing, name))
        return result

    def splits(self, modality: str) -> bool:
        """Whether objects of a modality that touch are taken apart."""
        wanted = many_of(modality) if self._options.instances is None else self._options.instances
        if wanted and self._missing is not None:
            self._tell(logging.INFO, "Objects are not told apart nor counted: %s", self._missing)
            return False
        return wanted

    def _instances(
        self, labels: Labels | None, split: bool, spacing: Spacing | None, name: str, result: Segmentation
    ) -> Instances:
        labels = separated(result.mask, split=split) if labels is None else labels
        found = instances_of(labels, result.probability(), spacing)
        if found.count > MOST:
            text = "%s: of %d objects only the number is given, over %d none is measured. --min-area leaves specks out."
            self._tell(logging.WARNING, text, name, found.count, MOST)
        return found

    def _tell(self, level: int, text: str, *values: Any) -> None:
        """Log a message, the first time that it comes up for its first value."""
        if (text, values[0]) not in self._told:
            self._told.add((text, values[0]))
            log.log(level, text, *values)
