"""The networks of the paper's Table III: where each comes from, under which licence, and how each is called.

Weights are random: time does not depend on them. Code of others is imported where it is used; what isn't installed is
told by ``pip``'s line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from espmedsam_edge import Segmenter, UserError
from espmedsam_edge.bundle import Normalization
from espmedsam_edge.imaging.geometry import mask_from_logits, preprocess
from espmedsam_edge.model.checkpoint import load_checkpoint
from espmedsam_edge.model.costs import parameters, products
from espmedsam_edge.shipped.bundles import make_bundle, shipped_checkpoint

OURS = "ESP-MedSAM-S"
OURS_RUNTIMES = {
    "encoder onnxruntime": ("onnxruntime-cpu", f"{OURS}, ONNX Runtime"),
    "encoder openvino": ("openvino", f"{OURS}, OpenVINO"),
    "encoder openvino bf16": ("openvino:bf16", f"{OURS}, OpenVINO bf16"),
    "encoder onnxruntime cuda": ("onnxruntime-cuda", f"{OURS}, ONNX Runtime CUDA"),
    "encoder tensorrt": ("tensorrt", f"{OURS}, TensorRT"),
}
"""The figure of the peers' encoders in a runtime, and ours there: its backend and its name."""
ON = {"cpu": tuple(OURS_RUNTIMES)[:3], "cuda": tuple(OURS_RUNTIMES)[3:]}
"""Which of them are on a device."""

MODALITY, SIDE = "fundus", 1024
POINTS_PER_BATCH = 64
UNMADE = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, OSError)
"""What a package of others, or a conversion of its network, may fail with; the other networks are measured anyway."""

APACHE = "Apache-2.0"


class Missing(ImportError):
    """A package isn't installed."""


@dataclass(frozen=True)
class Row:
    """A row of Table III.

    Attributes:
        published: parameters in millions, FLOPs in 10^9, frames a second (RTX A6000, automatic mode), as printed.
        package: of the registry; "" where there is none.
        licence: of the package, and of the code in it where that says otherwise.
        side: of the encoder's input in pixels.
        build: makes the whole network; None: no code to measure.
        generator: module of the package's ``SamAutomaticMaskGenerator``.
        single: what asks the package's predictor for one mask of a box.
        note: how our figures and the published ones go together.
    """

    name: str
    published: tuple[float, float | None, float | None]
    package: str
    licence: str
    build: Callable[[], nn.Module] | None = None
    generator: str = "segment_anything"
    single: tuple[str, Any] = ("multimask_output", False)
    side: int = SIDE
    note: str = ""


def _mobile_sam() -> nn.Module:
    from mobile_sam import sam_model_registry

    return sam_model_registry["vit_t"]()


def _x_sam(name: str) -> nn.Module:
    from x_segment_anything import sam_model_registry

    return sam_model_registry[name]()


def _efficientvit_sam() -> nn.Module:
    from efficientsam.sam_model_zoo import create_efficientvit_sam_model

    return create_efficientvit_sam_model("efficientvit-sam-l0", pretrained=False)


def _sam() -> nn.Module:
    from segment_anything import sam_model_registry

    return sam_model_registry["vit_b"]()


def _efficient_sam() -> nn.Module:
    """EfficientSAM-S of SAM's own classes: a ViT of width 384, depth 12, 6 heads, all attention global, no relative
    positions; SAM's prompt encoder and decoder."""
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = ImageEncoderViT(
        img_size=SIDE, patch_size=16, embed_dim=384, depth=12, num_heads=6, mlp_ratio=4, out_chans=256, qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6), use_rel_pos=False, window_size=0,
    )  # fmt: skip
    prompt = PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(SIDE, SIDE), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    decoder = MaskDecoder(
        num_multimask_outputs=3, transformer=transformer, transformer_dim=256, iou_head_depth=3, iou_head_hidden_dim=256
    )
    return Sam(encoder, prompt, decoder)


ROWS = (
    Row(
        "MobileSAM", (9.79, 39.71, 1.05), "mobilesam-mirror", APACHE, _mobile_sam, "mobile_sam",
        note="10.13 M here hold TinyViT's classifier, 0.32 M, which nothing uses; 38.8 GMAC of the encoder and 1.8 of "
        "a prompt are the paper's 39.71 within 3 %.",
    ),
    Row(
        "RepViT-SAM", (9.57, 23.64, 1.12), "x-segment-anything", "MIT",
        partial(_x_sam, "repvit"), "x_segment_anything", ("num_multimask_outputs", 1),
        note="The package's encoder is the RepViT-M2.3 that RepViT-SAM was published with: 27.2 M, 113 GMAC. The "
        "paper's 9.57 M and 23.64 are about those of EdgeSAM, whose encoder is a RepViT-M1. Here as the package builds "
        "it: its parallel branches are not merged, which its authors do on a device.",
    ),
    Row(
        "EfficientViT-SAM-L0", (34.80, 89.10, 0.91), "efficientsam", APACHE, _efficientvit_sam,
        "efficientsam.models.efficientvit.sam", side=512,
        note="Parameters agree. Its authors give 35 GMAC at 512 x 512, the size that it takes, and so it is counted "
        "here; we know no way of counting that gives 89.10.",
    ),
    Row(
        "EfficientSAM-S", (25.38, 32.51, 0.98), "segment-anything", APACHE, _efficient_sam,
        note="No package has it: built of SAM's classes at its published sizes. 27.9 M with a table of positions of "
        "64 x 64 (1.57 M; its authors stretch one of 14 x 14, 0.08 M). Twelve layers of global attention over 4096 "
        "tokens are 155 GMAC alone, so 32.51 cannot be of 1024 x 1024; elsewhere the paper names EfficientSAM-Ti.",
    ),
    Row(
        "EdgeSAM", (9.60, 22.10, 1.25), "x-segment-anything", "MIT, of code under NTU S-Lab 1.0 (non-commercial)",
        partial(_x_sam, "edge_sam"), "x_segment_anything", ("num_multimask_outputs", 1),
        note="Agrees: 20.0 GMAC of the encoder and 1.8 of a prompt.",
    ),
    Row(
        "SAM-Lightening", (19.26, 52.46, 1.02), "", "none stated",
        note="No package; its paper names an anonymised link for reviewers, and no licence: the published figures "
        "alone.",
    ),
    Row(
        "SAM ViT-B", (90.58, None, None), "segment-anything", APACHE, _sam,
        note="Not in Table III; beside it as what the light ones are measured against. 93.7 M here with its tables of "
        "positions (3.15 M), 90.6 without, as in Table VI.",
    ),
)  # fmt: skip
PUBLISHED_OURS = Row(
    OURS, (28.46, 55.86, 12.87), "", APACHE,
    note="28.89 M: five more MLPs and the value tokens of the paper's equations; positional tables are not counted "
    "([how](architecture.md#how-the-counts-relate-to-the-papers)).",
)  # fmt: skip


def versions() -> dict[str, str]:
    """The installed packages of others."""
    found = {}
    for package in sorted({row.package for row in ROWS if row.package}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


class _Embedding(nn.Module):
    """An encoder that returns its embedding alone; RepViT's returns a pair."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        out = self.encoder(image)
        return out[0] if isinstance(out, tuple) else out


class Peer:
    """A network of others, with random weights of a seed.

    Raises:
        Missing: its package isn't installed.
    """

    def __init__(self, row: Row, seed: int, device: str) -> None:
        assert row.build is not None
        torch.manual_seed(seed)
        try:
            self.sam = row.build().eval().requires_grad_(False).to(device)
        except ImportError as error:
            raise Missing(f"not installed: pip install {row.package} ({error})") from error
        self.row, self.name, self.side = row, row.name, row.side
        self.encoder = _Embedding(self.sam.image_encoder)
        self._predictor = self._automatic(1).predictor

    def _automatic(self, points: int) -> Any:
        module = __import__(self.row.generator, fromlist=["SamAutomaticMaskGenerator"])
        kind = getattr(module, "EfficientViTSamAutomaticMaskGenerator", None) or module.SamAutomaticMaskGenerator
        return kind(self.sam, points_per_side=points, points_per_batch=POINTS_PER_BATCH)

    def one_box(self, picture: np.ndarray) -> np.ndarray:
        """The mask, (H, W) bool, of an RGB picture (H, W, 3) uint8 and a box around its middle."""
        height, width = picture.shape[:2]
        box = np.array([width / 4, height / 4, 3 * width / 4, 3 * height / 4])
        self._predictor.set_image(picture)
        masks, _, _ = self._predictor.predict(box=box, **dict([self.row.single]))
        return masks[0]

    def everything(self, picture: np.ndarray, points: int) -> int:
        """Automatic mode, ``points`` x ``points`` in batches of 64: how many masks were kept."""
        return len(self._automatic(points).generate(picture))

    def counts(self, device: str) -> dict[str, int]:
        """Parameters, and multiply-accumulates of the encoder and of one prompt (a point, three masks)."""
        image = torch.zeros(1, 3, self.side, self.side, device=device)
        embedding: list[Tensor] = []
        encoder = products(lambda: embedding.append(self.encoder(image)))
        self._predictor.features = embedding[0]  # as set_image leaves it
        self._predictor.is_image_set = True
        self._predictor.original_size = self._predictor.input_size = (SIDE, SIDE)
        point = torch.full((1, 1, 2), SIDE / 2, device=device), torch.ones(1, 1, dtype=torch.int, device=device)
        prompt = products(lambda: self._predictor.predict_torch(*point, return_logits=True))
        self._predictor.reset_image()
        return {
            "parameters": parameters(self.sam),
            "encoder_parameters": parameters(self.encoder),
            "encoder_mac": encoder,
            "prompt_mac": prompt,
        }


class Ours:
    """The shipped weights: the unfused network in PyTorch, and its fused graph in the runtimes of a processor.

    Attributes:
        segmenters: by the figure in ``OURS_RUNTIMES``.
        left_out: by figure, why there is no segmenter.
    """

    name, side = OURS, SIDE

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        with tempfile.TemporaryDirectory(prefix="espmedsam-") as folder:
            checkpoint = Path(folder) / "shipped.safetensors"
            shipped_checkpoint(checkpoint)
            self.network, self.info = load_checkpoint(checkpoint)
            bundle = make_bundle([MODALITY], Path(folder) / "ours.bundle")
            self.segmenters: dict[str, Segmenter] = {}
            self.left_out: dict[str, UserError] = {}
            for figure in ON[device]:
                backend, _ = OURS_RUNTIMES[figure]
                try:
                    self.segmenters[figure] = Segmenter.load(bundle, precision="fp32", backend=backend, threads=threads)
                except UserError as error:  # such as OpenVINO not installed
                    self.left_out[figure] = error
        self.network = self.network.requires_grad_(False).to(device)
        self.encoder = _Lie(self.network)

    def one_pass(self, frame: np.ndarray) -> np.ndarray:
        """The mask, (H, W) uint8, of a frame (H, W, 3) uint8 BGR, in PyTorch."""
        image = torch.from_numpy(preprocess(frame, SIDE, Normalization())).to(self.device)
        with torch.inference_mode():
            logits = self.network(image, MODALITY).low_res_logits[0, 0]
        return mask_from_logits(logits.float().cpu().numpy(), frame.shape[:2])

    def counts(self, device: str) -> dict[str, int]:
        """Parameters of six modalities, and multiply-accumulates of the encoder with one bag, and of all."""
        image = torch.zeros(1, 3, SIDE, SIDE, device=device)
        whole = products(lambda: self.network(image, MODALITY))
        encoder = products(lambda: self.encoder(image))
        bag = parameters(self.network.bag(MODALITY))
        return {
            "parameters": parameters(self.network),
            "encoder_parameters": parameters(self.network.encoder) + bag,
            "encoder_mac": encoder,
            "prompt_mac": whole - encoder,
        }


class _Lie(nn.Module):
    """The encoder with one modality's bag."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        out: Tensor = self.network.encoder(image, self.network.bag(MODALITY))
        return out
