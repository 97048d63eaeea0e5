"""Model sizes and the named differences between the paper and the authors' published code.

Presets are functions in a registry: ``model_config("espmedsam-s", published=True)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from espmedsam_edge.errors import UserError, nearest

# The upper ends are far above every network of this kind; a file that says more is damaged or hostile.
Width = Annotated[int, Field(ge=1, le=8192)]
Depth = Annotated[int, Field(ge=1, le=16)]
Heads = Annotated[int, Field(ge=1, le=256)]
Window = Annotated[int, Field(ge=1, le=24)]
Ratio = Annotated[float, Field(gt=0, le=16)]
Tokens = Annotated[int, Field(ge=1, le=1024)]
ImageSize = Annotated[int, Field(ge=64, le=8192, multiple_of=64)]

PUBLISHED_QUERY_ROWS = 7


class EncoderConfig(BaseModel, extra="forbid", frozen=True):
    """The lightweight image encoder: TinyViT's four stages at strides 4, 8, 16, 16, then a neck."""

    dims: tuple[Width, Width, Width, Width] = (64, 128, 160, 320)
    depths: tuple[Depth, Depth, Depth, Depth] = (2, 2, 6, 2)
    heads: tuple[Heads, Heads, Heads, Heads] = (2, 4, 5, 10)
    windows: tuple[Window, Window, Window, Window] = (7, 7, 14, 7)
    mlp_ratio: Ratio = 4.0
    drop_path_rate: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _heads_fit(self) -> EncoderConfig:
        for dim, heads in zip(self.dims[1:], self.heads[1:], strict=True):  # the first stage has no attention
            if dim % heads:
                raise ValueError(f"{heads} heads do not divide {dim} channels")
        return self


class ModelConfig(BaseModel, extra="forbid", frozen=True):
    """Everything that fixes the network's shape and function, and the input it was trained for.

    The paper and the authors' code differ in three places; each is an option:

    Attributes:
        image_size: side of the square input in pixels.
        image_sizes: modality -> side, for those trained at another one than ``image_size``.
        embed_dim: channels D of the image embedding E, (B, D, S/16, S/16).
        bag_tokens: T, extra keys and values a head in every attention (paper eq. 2).
        bag_mlp_ratio: hidden width of a bag's MLP over the block's channels (paper eq. 3).
        shared_kv_token: published code: one token serves as key and as value. Paper: W_k and W_v.
        patch_layers: L of the SPPG; a patch is 16·2^L pixels.
        joint_queries: published code: seven query tokens attend to each other. Paper: a query sees only itself.
        shared_hypernetwork: published code: one MLP serves every modality. Paper eq. 7: one MLP a modality.
        prompt_gradient: how the patch prompt, binary in the forward pass, is differentiated: "straight-through" (as
            the sigmoid) or "none" (published code).
    """

    preset: str
    image_size: ImageSize = 1024
    image_sizes: dict[str, ImageSize] = {}
    encoder: EncoderConfig = EncoderConfig()
    embed_dim: Annotated[int, Field(ge=8, le=8192, multiple_of=8)] = 256
    bag_tokens: Tokens = 1
    bag_mlp_ratio: Ratio = 4.0
    shared_kv_token: bool = False
    patch_layers: Annotated[int, Field(ge=0, le=2)] = 1
    patch_width: Width = 64
    decoder_depth: Depth = 2
    decoder_heads: Heads = 8
    decoder_mlp: Annotated[int, Field(ge=1, le=65536)] = 2048
    joint_queries: bool = False
    shared_hypernetwork: bool = False
    prompt_gradient: Literal["straight-through", "none"] = "straight-through"

    @model_validator(mode="after")
    def _heads_fit(self) -> ModelConfig:
        if self.embed_dim // 2 % self.decoder_heads:  # attention to and from the image has half the channels
            raise ValueError(f"{self.decoder_heads} heads do not divide {self.embed_dim // 2} channels")
        return self

    def size_of(self, modality: str) -> int:
        """The side of a modality's square input in pixels."""
        return self.image_sizes.get(modality, self.image_size)

    def as_published(self) -> ModelConfig:
        """The same sizes with every option as in the authors' published code."""
        return self.model_copy(
            update={
                # Bandit takes a token of the network for a password.
                "shared_kv_token": True,  # nosec B105
                "joint_queries": True,
                "shared_hypernetwork": True,
                "prompt_gradient": "none",
            }
        )


def espmedsam_s() -> ModelConfig:
    """The paper's ESP-MedSAM-S at 1024 x 1024 (Tables III and VI)."""
    return ModelConfig(preset="espmedsam-s")


def espmedsam_tiny() -> ModelConfig:
    """A sixtieth of the size at 256 x 256, the same parts: for tests, smoke runs and the demo."""
    return ModelConfig(
        preset="espmedsam-tiny",
        image_size=256,
        encoder=EncoderConfig(dims=(16, 32, 48, 64), depths=(1, 1, 2, 1), heads=(1, 2, 3, 4), mlp_ratio=2.0),
        embed_dim=64,
        bag_mlp_ratio=1.0,
        patch_width=32,
        decoder_heads=4,
        decoder_mlp=128,
    )


def check_image_size(size: int) -> None:
    """Refuse a side of the square input, in pixels, that no network takes.

    Raises:
        UserError: it is not a multiple of 64 from 64 to 8192.
    """
    if size % 64 or not 64 <= size <= 8192:
        raise UserError(f"an image size of {size} cannot be used.", "Choose a multiple of 64 from 64 to 8192.")


_PRESETS: dict[str, Callable[[], ModelConfig]] = {"espmedsam-s": espmedsam_s, "espmedsam-tiny": espmedsam_tiny}


def model_config(preset: str, *, published: bool = False) -> ModelConfig:
    """The configuration of a preset, as the paper has it or (``published``) as the authors' code has it.

    Raises:
        UserError: unknown preset; names the nearest.
    """
    if preset not in _PRESETS:
        raise UserError(f"unknown preset '{preset}'.", nearest(preset, _PRESETS))
    config = _PRESETS[preset]()
    return config.as_published() if published else config
