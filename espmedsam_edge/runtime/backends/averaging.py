"""A backend's network asked about every view of a picture, and its answers averaged (test-time augmentation)."""

from __future__ import annotations

import logging
from dataclasses import replace

from espmedsam_edge.imaging.geometry import Tensor
from espmedsam_edge.imaging.views import VIEWS, average
from espmedsam_edge.modalities import views_of
from espmedsam_edge.runtime.backends.backend import Backend, Choice

log = logging.getLogger(__name__)


class AveragingBackend:
    """The network of another backend, averaged over the views that its modality allows.

    A graph's batch holds views in place of pictures: a batch of 8 all eight of one picture; with a batch of 1 each view
    is a run of its own. Pictures are prepared and finished on the CPU, whatever the other backend could do.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.views = VIEWS[views_of(backend.graph.modality)]
        self.name = backend.name
        self.device = f"{backend.device}, mean of {len(self.views)} views"
        self.graph = backend.graph.model_copy(update={"batch": max(1, backend.graph.batch // len(self.views))})

    def run(self, image: Tensor) -> Tensor:
        """See ``Backend.run``."""
        return average(self._backend.run, image, self.views, self._backend.graph.batch)

    def close(self) -> None:
        """See ``Backend.close``."""
        self._backend.close()


def averaged(choice: Choice) -> Choice:
    """A loaded backend with its answers averaged; as it is, where its modality allows no view but the picture."""
    modality = choice.backend.graph.modality
    if len(VIEWS[views_of(modality)]) == 1:
        log.info("No copies, mirrored or turned, make the masks of %s better: --tta changes nothing.", modality)
        return choice
    return replace(choice, backend=AveragingBackend(choice.backend))
