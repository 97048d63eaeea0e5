"""Sizes and operations against the paper's and the published code's figures."""

from __future__ import annotations

import pytest
import torch

from espmedsam_edge.modalities import PAPER_MODALITIES
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.costs import multiply_accumulates, parameters
from espmedsam_edge.model.esp_medsam import EspMedSam


def _parameters(preset: str, modalities: int, *, published: bool) -> int:
    with torch.device("meta"):
        return parameters(EspMedSam(model_config(preset, published=published), PAPER_MODALITIES[:modalities]))


@pytest.mark.parametrize(("modalities", "millions"), [(6, 28.18), (1, 12.47)])
def test_published_variant_has_the_published_number_of_parameters(modalities: int, millions: float) -> None:
    # Published code: 12.79 M for one modality less its unused 0.32 M head; five more bags of 3.14 M.
    count = _parameters("espmedsam-s", modalities, published=True)
    assert count / 1e6 == pytest.approx(millions, rel=0.002)


def test_papers_variant_adds_one_hypernetwork_a_modality() -> None:
    published = _parameters("espmedsam-s", 6, published=True)
    paper = _parameters("espmedsam-s", 6, published=False)
    # Five more MLPs of 0.14 M (256·256 twice and 256·32 with biases), a value token beside each key token of six bags,
    # six queries instead of seven.
    mlps = 5 * (2 * (256 * 256 + 256) + 256 * 32 + 32)
    values = 6 * (2 * 128 + 6 * 160 + 2 * 320)
    assert paper - published == mlps + values - 256


def test_operations_at_1024_match_table_iii() -> None:
    count = multiply_accumulates(model_config("espmedsam-s", published=True), 1024)
    assert count / 1e9 == pytest.approx(55.86, rel=0.02)


def test_tiny_preset_stays_under_a_million() -> None:
    assert _parameters("espmedsam-tiny", 6, published=False) < 1_000_000


def test_a_convolution_is_counted_by_hand() -> None:
    # The neck's 3x3 convolution alone: (S/16)² · D · D · 9 per unit of growth between two sizes of the same model.
    small, large = (multiply_accumulates(model_config("espmedsam-tiny"), size) for size in (448, 896))
    # 448/8, 448/16 are whole windows (7 and 14) at both sizes, so everything but the decoder's tokens and the constant
    # prompt scales by four; tokens are a few thousand operations.
    assert large / small == pytest.approx(4, rel=0.02)
