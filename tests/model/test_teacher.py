"""The teacher against segment-anything's own encoder; what of it is trained; its files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from segment_anything import sam_model_registry
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import get_rel_pos

from espmedsam_edge.errors import UserError
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.teacher import (
    EspMedSamTeacher,
    TeacherEncoder,
    _attention,
    load_sam_encoder,
    teacher_config,
)
from espmedsam_edge.model.teacher_checkpoint import load_teacher, save_teacher


@pytest.fixture
def teacher() -> EspMedSamTeacher:
    torch.manual_seed(3)
    teacher = EspMedSamTeacher(teacher_config("vit_tiny"), model_config("espmedsam-tiny"), ["fundus", "xray"])
    for addition in teacher.encoder.additions:  # trained additions are not neutral
        for parameter in addition.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return teacher.eval()


def neutralise(encoder: TeacherEncoder) -> None:
    """Tokens that no query looks at and MLPs that add nothing."""
    with torch.no_grad():
        for addition in encoder.additions:
            addition.bias.fill_(float("-inf"))
            addition.mlp.fc2.weight.zero_()
            addition.mlp.fc2.bias.zero_()


def sam_file(path: Path, encoder: TeacherEncoder) -> Path:
    torch.save({f"image_encoder.{key}": value for key, value in encoder.vit.state_dict().items()}, path)
    return path


@torch.no_grad()
def test_zeroed_additions_give_sams_own_features(teacher: EspMedSamTeacher) -> None:
    images = torch.randn(2, 3, 256, 256)
    expected = teacher.encoder.vit(images)  # segment-anything's own forward
    trained = teacher.encoder(images)
    assert not torch.allclose(trained, expected, atol=1e-2)
    # another order of float32 sums in the attention
    torch.testing.assert_close(teacher.encoder(images, medical=False), expected, atol=2e-5, rtol=1e-4)
    neutralise(teacher.encoder)
    torch.testing.assert_close(teacher.encoder(images), expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_tokens_join_keys_and_values_without_a_position() -> None:
    """One window of one head, computed by hand: softmax over pixels and token, the token's logit is q·k + bias."""
    torch.manual_seed(0)
    config = teacher_config("vit_tiny").model_copy(update={"depth": 1, "heads": 1, "global_blocks": (0,)})
    encoder = TeacherEncoder(config)
    block, addition = encoder.vit.blocks[0], encoder.additions[0]
    torch.nn.init.normal_(addition.value)
    addition.bias.fill_(0.7)
    x = torch.randn(1, 2, 2, config.dim)
    attention = block.attn
    q, k, v = attention.qkv(x).reshape(4, 3, config.dim).unbind(1)
    scores = q @ k.T * config.dim**-0.5
    centre = (attention.rel_pos_h.shape[0] - 1) // 2
    rows, columns = get_rel_pos(2, 2, attention.rel_pos_h), get_rel_pos(2, 2, attention.rel_pos_w)
    assert centre == 15  # 2·16 - 1 stored positions
    for i in range(4):
        for j in range(4):
            scores[i, j] += q[i] @ rows[i // 2, j // 2] + q[i] @ columns[i % 2, j % 2]
    token = (q @ addition.keys[0].T) * config.dim**-0.5 + 0.7
    weights = torch.cat([scores, token], dim=1).softmax(1)
    expected = attention.proj(weights @ torch.cat([v, addition.values[0]]))
    torch.testing.assert_close(_attention(x, attention, addition).reshape(4, -1), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_other_image_sizes_work(teacher: EspMedSamTeacher) -> None:
    output = teacher(torch.randn(1, 3, 192, 192), "fundus")
    assert output.image_embedding.shape == (1, 64, 12, 12)
    assert output.low_res_logits.shape == (1, 1, 48, 48)
    assert output.patch_logits.shape == (1, 1, 6, 6)


def test_activation_checkpointing_changes_no_gradient(teacher: EspMedSamTeacher) -> None:
    images = torch.randn(1, 3, 128, 128)
    gradients = []
    for on in (False, True):
        teacher.zero_grad()
        teacher.encoder.activation_checkpointing = on
        teacher(images, "xray").low_res_logits.square().mean().backward()
        gradient = teacher.encoder.additions[0].key.grad
        assert gradient is not None
        gradients.append(gradient.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_sizes_are_sams_own() -> None:
    """segment-anything's registry, built on the meta device; ViT-B's additions stay small."""
    for preset in ("vit_b", "vit_l", "vit_h"):
        with torch.device("meta"):
            sam = sam_model_registry[preset]()
            encoder = TeacherEncoder(teacher_config(preset))
        assert isinstance(sam.image_encoder, ImageEncoderViT)
        ours = {key: value.shape for key, value in encoder.vit.state_dict().items()}
        assert ours == {key: value.shape for key, value in sam.image_encoder.state_dict().items()}
        assert [block.window_size for block in encoder.vit.blocks] == [
            block.window_size for block in sam.image_encoder.blocks
        ]
        added = sum(p.numel() for p in encoder.additions.parameters())
        assert added < 0.05 * sum(p.numel() for p in encoder.vit.parameters())


def test_file_without_the_encoder_needs_the_same_sam(teacher: EspMedSamTeacher, tmp_path: Path) -> None:
    sam = sam_file(tmp_path / "sam.pth", teacher.encoder)
    save_teacher(tmp_path / "t.safetensors", teacher, store_vit=False)
    assert (tmp_path / "t.safetensors").stat().st_size < sam.stat().st_size * 2
    loaded, info = load_teacher(tmp_path / "t.safetensors", sam)
    assert list(info.targets) == ["fundus", "xray"]
    images = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        assert torch.equal(loaded(images, "xray").low_res_logits, teacher(images, "xray").low_res_logits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(UserError, match=r"teacher\.sam"):
        load_teacher(tmp_path / "t.safetensors")
    other = sam_file(tmp_path / "other.pth", TeacherEncoder(teacher_config("vit_tiny")))
    with pytest.raises(UserError, match="is not the SAM checkpoint"):
        load_teacher(tmp_path / "t.safetensors", other)


def test_file_with_the_encoder_stands_alone(teacher: EspMedSamTeacher, tmp_path: Path) -> None:
    save_teacher(tmp_path / "t.safetensors", teacher, store_vit=True)
    loaded, _ = load_teacher(tmp_path / "t.safetensors")
    for key, value in teacher.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_wrong_files_are_one_line(teacher: EspMedSamTeacher, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="another image encoder"):
        load_sam_encoder(teacher.encoder, {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768)}, "sam_vit_b.pth")
    with pytest.raises(UserError, match="no SAM image encoder"):
        load_sam_encoder(teacher.encoder, {"image_encoder.patch_embed.seq.0.c.weight": torch.zeros(1)}, "m.pt")
    with pytest.raises(UserError, match="no teacher"):
        load_teacher(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"xxxx")
    with pytest.raises(UserError, match="not a readable"):
        load_teacher(tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match="channels"):
        EspMedSamTeacher(teacher_config("vit_tiny"), model_config("espmedsam-s"))
    with pytest.raises(UserError, match="no modality 'fundos'"):
        teacher(torch.zeros(1, 3, 64, 64), "fundos")
