"""The whole network: shapes, batches, decoupling of the modalities, gradients of the prompt."""

from __future__ import annotations

import itertools

import pytest
import torch
from networks import scramble, scrambled_model

from espmedsam_edge.errors import UserError
from espmedsam_edge.modalities import PAPER_MODALITIES, register
from espmedsam_edge.model.config import ModelConfig, model_config
from espmedsam_edge.model.esp_medsam import EspMedSam
from espmedsam_edge.model.prompt import patch_target


@pytest.mark.parametrize("size", [64, 128, 192, 320])
@pytest.mark.parametrize("published", [False, True])
def test_any_multiple_of_64_gives_logits_at_a_quarter(size: int, published: bool) -> None:
    model = scrambled_model(published=published)
    with torch.no_grad():
        output = model(torch.randn(2, 3, size, size), "xray")
    assert output.low_res_logits.shape == (2, 1, size // 4, size // 4)
    assert output.patch_logits.shape == (2, 1, size // 32, size // 32)
    assert output.image_embedding.shape == (2, 64, size // 16, size // 16)


def test_a_batch_gives_what_its_images_give_alone() -> None:
    model = scrambled_model().double()
    images = torch.randn(3, 3, 128, 128, dtype=torch.double)
    with torch.no_grad():
        together = model(images, "fundus").low_res_logits
        alone = torch.cat([model(image[None], "fundus").low_res_logits for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)  # float64 rounding in another order


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_patch_size_doubles_with_each_layer(layers: int) -> None:
    model = scrambled_model(model_config("espmedsam-tiny").model_copy(update={"patch_layers": layers}))
    with torch.no_grad():
        output = model(torch.randn(1, 3, 128, 128), "fundus")
    assert output.patch_logits.shape[-1] == 128 // (16 * 2**layers)


def test_several_tokens_a_bag_change_the_embedding() -> None:
    model = scrambled_model(model_config("espmedsam-tiny").model_copy(update={"bag_tokens": 3}))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(image, "fundus").image_embedding
        model.bag("fundus")[0].value[:, 2] += 1  # the third token's value
        after = model(image, "fundus").image_embedding
    assert not torch.equal(before, after)


def test_no_modality_can_change_another() -> None:
    """Paper's variant: every parameter of a modality disturbed, the other five outputs bit-equal."""
    model = scrambled_model(modalities=PAPER_MODALITIES)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = {name: model(image, name) for name in PAPER_MODALITIES}
        for disturbed in PAPER_MODALITIES:
            saved = {key: value.clone() for key, value in model.state_dict().items()}
            scramble(model.bag(disturbed), seed=1, spread=1.0)
            model.decoder.queries[disturbed].data += 1
            scramble(model.decoder.hypernetwork(disturbed), seed=2, spread=1.0)
            for name in PAPER_MODALITIES:
                same = all(map(torch.equal, before[name], model(image, name)))
                assert same == (name != disturbed), (disturbed, name)
            model.load_state_dict(saved)


def test_published_variant_couples_its_queries() -> None:
    """What the paper's variant removes: there, another modality's query does change the output."""
    model = scrambled_model(published=True)
    image = torch.randn(1, 3, 64, 64)
    assert model.decoder.joint_queries is not None
    with torch.no_grad():
        before = model(image, "fundus").low_res_logits
        model.decoder.joint_queries[1] += 1  # xray's
        assert not torch.equal(before, model(image, "fundus").low_res_logits)


def test_a_seventh_modality_leaves_six_bit_equal() -> None:
    register("histopathology", "cell nuclei in stained tissue")
    model = scrambled_model(modalities=PAPER_MODALITIES)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = {name: model(image, name) for name in PAPER_MODALITIES}
        model.add_modality("histopathology")
        scramble(model.bag("histopathology"))
        for name in PAPER_MODALITIES:
            assert all(map(torch.equal, before[name], model(image, name))), name
        assert model(image, "histopathology").low_res_logits.shape == (1, 1, 16, 16)


def test_a_modality_like_another_starts_as_its_copy() -> None:
    model = scrambled_model()
    model.add_modality("colonoscopy", like="xray")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, model(image, "xray"), model(image, "colonoscopy")))
    shared = [
        (a, b)
        for a, b in itertools.product(model.bag("xray").parameters(), model.bag("colonoscopy").parameters())
        if a is b
    ]
    assert not shared


def test_a_new_bag_hardly_changes_the_plain_encoder() -> None:
    torch.manual_seed(0)
    model = EspMedSam(model_config("espmedsam-tiny"), ["fundus"]).eval()
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        plain, driven = model.encoder(image), model.encoder(image, model.bag("fundus"))
    # a token of value zero takes at most about 1/50 of an attention weight
    assert (plain - driven).abs().max() < 0.05 * plain.abs().max()


@pytest.mark.parametrize(("published", "reaches"), [(False, True), (True, False)])
def test_mask_loss_reaches_the_patch_generator_only_straight_through(published: bool, reaches: bool) -> None:
    model = scrambled_model(published=published)
    model(torch.randn(1, 3, 64, 64), "fundus").low_res_logits.square().mean().backward()
    weight = model.prompt.patch_generator[0].weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.grad is not None and bool(weight.grad.abs().max() > 0)) == reaches


def test_straight_through_keeps_the_binary_forward_value() -> None:
    model = scrambled_model()
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    torch.testing.assert_close(model.prompt.binarise(logits), (logits >= 0).float(), rtol=0, atol=1e-6)


def test_patch_target_is_the_max_pooled_mask() -> None:
    mask = torch.zeros(1, 1, 64, 64)
    mask[0, 0, 33, 5] = 1
    assert patch_target(mask, 32).flatten().tolist() == [0, 0, 1, 0]


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = scrambled_model().train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eval()  # running statistics would move twice
    image = torch.randn(1, 3, 64, 64)
    gradients = []
    for on in (False, True):
        model.encoder.activation_checkpointing = on
        model.zero_grad()
        model(image, "fundus").low_res_logits.mean().backward()
        gradients.append([p.grad.clone() for p in model.encoder.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize("shape", [(1, 3, 100, 100), (1, 3, 128, 64)])
def test_unfit_input_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="multiple of 32"):
        scrambled_model()(torch.zeros(shape), "fundus")


def test_unknown_modality_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'fundus'"):
        scrambled_model()(torch.zeros(1, 3, 64, 64), "fundsu")


def test_published_variant_refuses_a_modality_without_a_query() -> None:
    model = scrambled_model(published=True)
    with pytest.raises(UserError, match="no query"):
        model.add_modality("histopathology")


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="Did you mean 'espmedsam-tiny'"):
        model_config("espmedsam-tny")


def test_config_rejects_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="colour"):
        ModelConfig.model_validate({"preset": "x", "colour": 1})
