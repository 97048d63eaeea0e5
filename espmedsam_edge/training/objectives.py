"""What each stage minimises, as a module: a batch in, a loss and its terms out; so that DDP wraps one forward pass."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.teacher import EspMedSamTeacher, TeacherEncoder
from espmedsam_edge.training.losses import MaskLoss, feature_distance, segmentation_loss
from espmedsam_edge.training.trainable import Network

log = logging.getLogger(__name__)

_COMPILED_FORMS = 64  # modalities times sizes, with batch normalisation frozen and not
Terms = dict[str, Tensor]
"""Scalars by name; "loss" is what is minimised, the others are shown."""


class SegmentationObjective(nn.Module):
    """Eq. 8 and eq. 5 on masks, for the student and the teacher.

    Args:
        network: whose ``network`` attribute is trained.
        mask_loss: eq. 8.
        patch_weight: of eq. 5; 0 leaves the SPPG unsupervised.
    """

    def __init__(self, network: Network, mask_loss: MaskLoss, patch_weight: float) -> None:
        super().__init__()
        self.network = network
        self.mask_loss = mask_loss
        self.patch_weight = patch_weight

    def forward(self, images: Tensor, masks: Tensor | None, modality: str) -> Terms:
        """Images (B, 3, S, S) normalised, masks (B, 1, S, S) of 0 and 1."""
        assert masks is not None, modality
        loss = segmentation_loss(self.network(images, modality), masks, self.mask_loss, self.patch_weight)
        return {"loss": loss.total, "pixel": loss.pixel, "dice": loss.dice, "patch": loss.patch}


class EncoderDistillation(nn.Module):
    """Eq. 1, first term: the plain LIE learns SAM's features of natural images."""

    def __init__(self, network: EspMedSam, teacher: TeacherEncoder) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, images: Tensor, masks: Tensor | None, modality: str) -> Terms:
        """Images (B, 3, S, S) normalised; masks and modality are not looked at."""
        with torch.no_grad():
            target = self.teacher(images, medical=False)
        return {"loss": feature_distance(self.network.encoder(images), target)}


class ControllerDistillation(nn.Module):
    """Eq. 1, second term: a modality's bag on the frozen LIE learns the medical teacher's features of that modality."""

    def __init__(self, network: EspMedSam, teacher: EspMedSamTeacher) -> None:
        super().__init__()
        self.network = network
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, images: Tensor, masks: Tensor | None, modality: str) -> Terms:
        """Images (B, 3, S, S) normalised of one modality; masks are not looked at."""
        with torch.no_grad():
            target = self.teacher.encoder(images)
        return {"loss": feature_distance(self.network.encoder(images, self.network.bag(modality)), target)}


Objective = SegmentationObjective | EncoderDistillation | ControllerDistillation


def compile_objective(objective: nn.Module) -> None:
    """Have torch compile what the objective computes, anew for every modality and size; its names stay."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_FORMS)
    objective.compile(dynamic=False)


def leave_uncompiled(objective: nn.Module, error: Exception) -> bool:
    """Whether an error was torch's compiler's; then the objective computes as it is written from now on, and says so.

    Args:
        objective: of ``compile_objective``, or one that never was compiled: then the error is another.
        error: of its forward or backward pass, each of which is compiled when it first runs.
    """
    if objective._compiled_call_impl is None:
        return False
    from torch._dynamo.exc import TorchDynamoException

    if not isinstance(error, TorchDynamoException):
        return False
    objective._compiled_call_impl = None
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    log.warning("run.compile: torch cannot compile the training step here (%s); it goes on uncompiled.", reason)
    return True
