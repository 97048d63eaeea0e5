"""Parity with independent code: the authors' tensors, the mobile_sam package, segment-anything; and merging."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from networks import scramble
from safetensors.torch import load_file
from torch import Tensor

from espmedsam_edge.cli import main
from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import PAPER_MODALITIES, published_query
from espmedsam_edge.model.checkpoint import load_checkpoint, read_checkpoint
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.decoder import PositionalEncoding
from espmedsam_edge.model.encoder import LightweightImageEncoder, rename_tinyvit


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State and tensors of the authors' network, reduced in size, with random weights."""
    shared = Path(__file__).parents[3] / "shared" / "fixtures"
    folder = Path(os.environ.get("ESPMEDSAM_FIXTURES") or shared) / "reference-small"
    if not folder.is_dir():
        pytest.skip("the published code's tensors (fixtures/reference-small, or ESPMEDSAM_FIXTURES) are not here")
    return load_file(folder / "state_dict.safetensors"), load_file(folder / "tensors.safetensors")


@pytest.fixture(scope="module")
def published_file(
    reference: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    file = tmp_path_factory.mktemp("published") / "published.pth"
    torch.save({f"module.{key}": value for key, value in reference[0].items()}, file)
    return file


def _relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("modality", PAPER_MODALITIES)
def test_published_checkpoint_gives_the_published_tensors(
    reference: tuple[dict[str, Tensor], dict[str, Tensor]], published_file: Path, tmp_path: Path, modality: str
) -> None:
    tensors = reference[1]
    out = tmp_path / "w.safetensors"
    main_ok(["import", "reference", str(published_file), "--modality", modality, "--out", str(out)])
    model, info = load_checkpoint(out)
    with torch.no_grad():
        output = model(tensors["input"].float(), modality)
    row = published_query(modality)
    assert info.origin == "imported"
    assert info.modalities == [modality]
    assert _relative(output.image_embedding, tensors["image_embedding"]) <= 1e-4
    assert _relative(output.patch_logits, tensors["patch_logits"]) <= 1e-4
    assert _relative(output.low_res_logits[:, 0], tensors["low_res_logits"][:, row]) <= 1e-4


def test_files_that_share_their_network_merge(
    reference: tuple[dict[str, Tensor], dict[str, Tensor]], published_file: Path, tmp_path: Path
) -> None:
    state = dict(reference[0])
    generator = torch.Generator().manual_seed(0)
    for key, value in state.items():
        if "med" in key:
            state[key] = value + torch.randn(value.shape, generator=generator).to(value.dtype) * 0.1
    torch.save(state, tmp_path / "other.pth")
    out = tmp_path / "two.safetensors"
    files = [str(published_file), str(tmp_path / "other.pth")]
    main_ok(["import", "reference", *files, "--modality", "fundus", "--modality", "xray", "--out", str(out)])
    merged, _ = load_checkpoint(out)
    assert merged.modalities == ["fundus", "xray"]
    image = reference[1]["input"].float()
    for file, modality in zip(files, merged.modalities, strict=True):
        single_out = tmp_path / f"{modality}.safetensors"
        main_ok(["import", "reference", file, "--modality", modality, "--out", str(single_out)])
        with torch.no_grad():
            alone = load_checkpoint(single_out)[0](image, modality).low_res_logits
            assert torch.equal(merged(image, modality).low_res_logits, alone)


def test_files_that_differ_outside_the_bags_are_refused_with_the_keys(
    reference: tuple[dict[str, Tensor], dict[str, Tensor]],
    published_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state = dict(reference[0])
    state["SemiTViT.neck.2.weight"] = state["SemiTViT.neck.2.weight"] + 1
    torch.save(state, tmp_path / "other.pth")
    out = tmp_path / "two.safetensors"
    files = [str(published_file), str(tmp_path / "other.pth")]
    line = main_fails(
        ["import", "reference", *files, "--modality", "fundus", "--modality", "xray", "--out", str(out)], capsys
    )
    assert "encoder.neck.2.weight" in line
    assert not out.exists()


@pytest.fixture(scope="module")
def mobile_sam() -> torch.nn.Module:
    """The mobile_sam package's model with random weights and statistics."""
    package = pytest.importorskip("mobile_sam", reason="needs the package mobilesam-mirror (extra dev)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: torch.nn.Module = package.sam_model_registry["vit_t"](checkpoint=None)
    scramble(model)
    return model.eval()


def test_mobilesam_encoder_gives_the_same_embedding(mobile_sam: torch.nn.Module) -> None:
    theirs = mobile_sam.image_encoder
    assert isinstance(theirs, torch.nn.Module)
    ours = LightweightImageEncoder(model_config("espmedsam-s")).eval()
    ours.load_state_dict(rename_tinyvit(theirs.state_dict()))
    image = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))  # the only size theirs takes
    with torch.no_grad():
        assert _relative(ours(image), theirs(image)) <= 1e-5  # float32 rounding


def test_mobilesam_import_keeps_every_tensor(mobile_sam: torch.nn.Module, tmp_path: Path) -> None:
    torch.save(mobile_sam.state_dict(), tmp_path / "mobile_sam.pt")
    out = tmp_path / "w.safetensors"
    main_ok(["import", "mobilesam", str(tmp_path / "mobile_sam.pt"), "--out", str(out)])
    state, info = read_checkpoint(out)
    theirs = mobile_sam.state_dict()
    assert info.parts == ["encoder", "decoder", "template"]
    assert torch.equal(state["encoder.neck.2.weight"], theirs["image_encoder.neck.2.weight"])
    for key in ("transformer.layers.1.mlp.lin1.weight", "transformer.norm_final_attn.bias"):
        assert torch.equal(state[f"decoder.{key}"], theirs[f"mask_decoder.{key}"])
    assert torch.equal(state["decoder.upscaling.3.weight"], theirs["mask_decoder.output_upscaling.3.weight"])
    assert torch.equal(state["template.query"], theirs["mask_decoder.mask_tokens.weight"][:1])
    with pytest.raises(UserError, match="Train from it first"):
        load_checkpoint(out)


def test_sam_import_takes_the_decoder_alone(mobile_sam: torch.nn.Module, tmp_path: Path) -> None:
    state = {key: value for key, value in mobile_sam.state_dict().items() if not key.startswith("image_encoder.")}
    state["image_encoder.pos_embed"] = torch.zeros(1, 64, 64, 768)  # a ViT's encoder is left for the teacher
    torch.save(state, tmp_path / "sam_vit_b.pth")
    out = tmp_path / "w.safetensors"
    main_ok(["import", "sam", str(tmp_path / "sam_vit_b.pth"), "--out", str(out)])
    assert read_checkpoint(out)[1].parts == ["decoder", "template"]


def test_positional_encoding_is_sams(mobile_sam: torch.nn.Module) -> None:
    theirs = mobile_sam.prompt_encoder.pe_layer  # type: ignore[union-attr]
    ours = PositionalEncoding(128)
    ours.load_state_dict(theirs.state_dict())  # type: ignore[union-attr]
    torch.testing.assert_close(ours((5, 7)), theirs((5, 7)), rtol=0, atol=1e-5)  # type: ignore[operator]


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch pwned",))


def test_a_pickle_with_code_is_refused_and_never_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": _Code()}, "evil.pth")
    line = main_fails(["import", "reference", "evil.pth", "--modality", "fundus", "--out", "w.safetensors"], capsys)
    assert "was not loaded" in line
    assert not Path("pwned").exists()


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "text", "other", "list"])
def test_unreadable_files_get_one_line(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "w.pth"
    if kind == "other":
        torch.save({"conv.weight": torch.zeros(3)}, file)
    elif kind == "list":
        torch.save([torch.zeros(3)], file)
    elif kind == "truncated":
        torch.save({"SemiTViT.x": torch.zeros(1000)}, file)
        file.write_bytes(file.read_bytes()[:2000])
    elif kind != "missing":
        file.write_bytes(b"" if kind == "empty" else b"hello, not a checkpoint")
    out = tmp_path / "o.safetensors"
    main_fails(["import", "reference", str(file), "--modality", "fundus", "--out", str(out)], capsys)
    assert not out.exists()


def test_incomplete_published_checkpoint_says_what_is_missing(
    reference: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {key: value for key, value in reference[0].items() if not key.startswith("mask_decoder.")}
    torch.save(state, tmp_path / "w.pth")
    out = str(tmp_path / "o.safetensors")
    line = main_fails(["import", "reference", str(tmp_path / "w.pth"), "--modality", "fundus", "--out", out], capsys)
    assert "incomplete" in line


@pytest.mark.parametrize("size", ["1000", "0", "-64", "16384"])
def test_an_image_size_that_no_network_takes_is_refused(
    size: str, published_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.safetensors"
    arguments = [str(published_file), "--modality", "fundus", "--image-size", size, "--out", str(out)]
    line = main_fails(["import", "reference", *arguments], capsys)
    assert f"an image size of {size} cannot be used. Choose a multiple of 64 from 64 to 8192." in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("key", "rows", "says"),
    [
        ("SemiTViT.neck.0.weight", 12, "embed_dim: Input should be a multiple of 8"),
        ("SemiTViT.neck.0.weight", 8, "8 heads do not divide 4 channels"),
        ("SemiTViT.layers.1.downsample.conv3.c.weight", 0, "dims.2: Input should be greater than or equal to 1"),
        ("SemiTViT.layers.1.downsample.conv3.c.weight", 1, "heads do not divide 1 channels"),
        ("patch_decoder.0.weight", 0, "patch_width: Input should be greater than or equal to 1"),
    ],
)
def test_shapes_that_fit_no_network_are_one_line(
    key: str,
    rows: int,
    says: str,
    reference: tuple[dict[str, Tensor], dict[str, Tensor]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save({**reference[0], key: reference[0][key][:rows]}, tmp_path / "w.pth")
    out = tmp_path / "o.safetensors"
    arguments = [str(tmp_path / "w.pth"), "--modality", "fundus", "--out", str(out)]
    line = main_fails(["import", "reference", *arguments], capsys)
    assert "the checkpoint's shapes fit no network of this family" in line
    assert says in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["a.pth", "b.pth", "--modality", "fundus"], "2 files but 1 modalities"),
        (["a.pth", "--modality", "fundsu"], "Did you mean 'fundus'"),
        (["a.pth", "a.pth", "--modality", "xray", "--modality", "xray"], "named twice"),
    ],
)
def test_wrong_use_is_explained(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in main_fails(["import", "reference", *arguments, "--out", "o.safetensors"], capsys)


def main_ok(arguments: list[str]) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0


def main_fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end with one line on stderr and code 2; returns the line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2
    assert error.startswith("error: ")
    assert "\n" not in error
    return error
