"""What is asked for of a mask's objects."""

from __future__ import annotations

from dataclasses import dataclass

from espmedsam_edge.errors import UserError


@dataclass(frozen=True)
class ObjectOptions:
    """Which objects of a mask count, and what is told of them.

    Examples:
        >>> from espmedsam_edge import ModelOptions, ObjectOptions, infer_frames
        >>> model = ModelOptions("fundus.bundle", objects=ObjectOptions(instances=True, largest=1))
        >>> [result.instances.count for frame, result in infer_frames("retina.png", model)]
        [1]

    Attributes:
        instances: whether objects that touch are taken apart, and all are counted and measured; None: where a
            modality's pictures show many. Results that are of objects (``Outputs.labels``, ``objects``, ``dicom_sr``)
            have a mask's connected parts otherwise.
        min_area: pixels; smaller objects are taken out of the mask. None: none is.
        largest: how many objects, the largest ones, stay in the mask; None: all.
        track: whether an object of a video keeps its number from frame to frame.
    """

    instances: bool | None = None
    min_area: int | None = None
    largest: int | None = None
    track: bool = False

    def __post_init__(self) -> None:
        for name in ("min_area", "largest"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                raise UserError(f"{name} {value} is less than 1.", "Give 1 or more, or leave it out.")
