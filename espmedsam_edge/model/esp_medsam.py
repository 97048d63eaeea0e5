"""ESP-MedSAM-S: encoder, controller, prompt generator and decoder as one network of N modalities.

Paper: ESP-MedSAM, arXiv 2407.14153.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from espmedsam_edge.errors import UserError, nearest
from espmedsam_edge.modalities import check_name, published_query
from espmedsam_edge.model.config import ModelConfig
from espmedsam_edge.model.controller import ControllerBag
from espmedsam_edge.model.decoder import QueryDecoupledModalityDecoder
from espmedsam_edge.model.encoder import LightweightImageEncoder
from espmedsam_edge.model.prompt import SelfPatchPromptGenerator


class ModelOutput(NamedTuple):
    """What one forward pass gives; S is the input size, D the embedding's channels, L the SPPG's layers.

    Attributes:
        low_res_logits: (B, 1, S/4, S/4), foreground where ≥ 0.
        patch_logits: (B, 1, S/(16·2^L), S/(16·2^L)).
        image_embedding: E, (B, D, S/16, S/16), before the prompt is added.
    """

    low_res_logits: Tensor
    patch_logits: Tensor
    image_embedding: Tensor


class EspMedSam(nn.Module):
    """The student network. ``model(images, "fundus")`` decodes one modality a call.

    Args:
        config: sizes and options.
        modalities: names, each with its own bag, query and MLP.
    """

    def __init__(self, config: ModelConfig, modalities: Iterable[str] = ()) -> None:
        super().__init__()
        self.config = config
        self.encoder = LightweightImageEncoder(config)
        self.controller = nn.ModuleDict()
        self.prompt = SelfPatchPromptGenerator(config)
        self.decoder = QueryDecoupledModalityDecoder(config)
        for name in modalities:
            self.add_modality(name)

    @property
    def modalities(self) -> list[str]:
        """Names in the order they were added."""
        return list(self.controller)

    def add_modality(self, name: str, *, like: str | None = None) -> None:
        """Add a modality's bag, query and MLP; ``like`` copies those of another instead of initialising new ones.

        Raises:
            UserError: the name is taken or unfit, or the published variant has no query for it.
        """
        check_name(name)
        if name in self.controller:
            raise UserError(f"the model already has a modality '{name}'.", "Choose another name.")
        if self.config.joint_queries and published_query(name) is None:
            raise UserError(
                f"the published variant has no query for '{name}': its queries are fixed and depend on each other.",
                "Add modalities to a model of the paper's variant.",
            )
        if like is None:
            bag = ControllerBag(self.config)
            self.decoder.add_modality(name)
        else:
            bag = copy.deepcopy(self.bag(like))
            if like in self.decoder.queries:
                self.decoder.queries[name] = copy.deepcopy(self.decoder.queries[like])
            if like in self.decoder.hypernetworks:
                self.decoder.hypernetworks[name] = copy.deepcopy(self.decoder.hypernetworks[like])
        self.controller[name] = bag

    def bag(self, modality: str) -> ControllerBag:
        """The modality's controller bag.

        Raises:
            UserError: the model has no such modality.
        """
        if modality not in self.controller:
            raise UserError(f"the model has no modality '{modality}'.", nearest(modality, self.modalities))
        bag = self.controller[modality]
        assert isinstance(bag, ControllerBag)
        return bag

    def forward(self, images: Tensor, modality: str) -> ModelOutput:
        """Segment a batch of one modality.

        Args:
            images: (B, 3, S, S) normalised RGB, S a multiple of a patch of the prompt, 16·2^L (32 as a rule).
            modality: one of ``modalities``.
        """
        bag = self.bag(modality)
        height, width = images.shape[-2:]
        patch = 16 << self.config.patch_layers
        if height != width or height % patch:
            raise UserError(
                f"the input is {width}x{height} pixels.", f"It must be square, its side a multiple of {patch}."
            )
        embedding = self.encoder(images, bag)
        patch_logits, dense_prompt = self.prompt(embedding)
        return ModelOutput(self.decoder(embedding + dense_prompt, modality), patch_logits, embedding)
