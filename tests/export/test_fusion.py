"""Every exact fusion against the module it replaces: float64 to 1e-10, float32 to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import centre_prompt, scramble, scrambled_model
from segment_anything.modeling.transformer import Attention as TokenAttention
from timm.models.tiny_vit import ConvNorm, NormMlp
from torch import Tensor, nn

from espmedsam_edge.export.fused_decoder import FusedDecoder, FusedPrompt, ImageToToken, TokenToImage
from espmedsam_edge.export.fused_encoder import FusedBlock, FusedEncoder, FusedMlp, FusedWindowAttention
from espmedsam_edge.export.fused_layers import FoldedConvolution, FusedConvolutions, fold_layer_norm
from espmedsam_edge.export.fusion import FusedSegmenter
from espmedsam_edge.model.config import model_config
from espmedsam_edge.model.controller import BlockBag
from espmedsam_edge.model.encoder import ControlledBlock, merge, partition
from espmedsam_edge.model.esp_medsam import EspMedSam

# float64 keeps 1e-16 a step; float32 1e-7, over at most some sixty layers of sums of a few hundred terms
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
DTYPES = list(TOLERANCE)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Relative to the largest value, as tight as the precision allows."""
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[expected.dtype], float(error)


def prepared(module: nn.Module, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    scramble(module, seed, 0.2)
    return module.eval().to(dtype)


def noise(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 12), (2, 12)])
def test_batch_norm_folds_into_its_convolution(dtype: torch.dtype, stride: int, groups: int) -> None:
    layer = ConvNorm(12, 24, 3, stride, 1, groups=groups)
    prepared(layer, dtype)
    image = noise(2, 12, 9, 9, dtype=dtype)
    with torch.no_grad():
        assert_same(FoldedConvolution(layer)(image), layer(image))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm_folds_into_the_linear_after_it(dtype: torch.dtype) -> None:
    norm, linear = nn.LayerNorm(12), nn.Linear(12, 7)
    prepared(norm, dtype)
    prepared(linear, dtype)
    x = noise(5, 12, dtype=dtype)
    weight, bias = fold_layer_norm(norm, linear)
    with torch.no_grad():
        assert_same(nn.functional.layer_norm(x, (12,), eps=norm.eps) @ weight.T + bias, linear(norm(x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bag", [False, True])
def test_both_mlps_become_one(dtype: torch.dtype, with_bag: bool) -> None:
    mlp, bag = NormMlp(12, 48), NormMlp(12, 20)
    prepared(mlp, dtype)
    prepared(bag, dtype, seed=2)
    x = noise(3, 5, 12, dtype=dtype)
    with torch.no_grad():
        expected = mlp(x) + bag(x) if with_bag else mlp(x)
        assert_same(FusedMlp(mlp, bag if with_bag else None)(x), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [14, 16, 8])  # whole windows, padded, smaller than two windows
@pytest.mark.parametrize(("tokens", "shared"), [(None, False), (1, False), (1, True), (3, False)])
def test_window_attention_with_tokens(dtype: torch.dtype, size: int, tokens: int | None, shared: bool) -> None:
    block = ControlledBlock(24, 3, 7, 2.0, 0.0)
    bag = None if tokens is None else BlockBag(24, 3, tokens, 1.0, shared)
    prepared(block, dtype)
    if bag is not None:
        prepared(bag, dtype, seed=2)
    x = noise(2, size, size, 24, dtype=dtype)
    with torch.no_grad():
        windows, padded = partition(x, 7)
        expected = merge(block.attn(windows, bag), 7, padded)[:, :size, :size]
        assert_same(FusedWindowAttention(block, bag, 2, size)(x), expected)
        assert_same(FusedBlock(block, bag, 2, size)(x), block(x, bag))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7])
def test_tokens_attend_to_pixels_without_projecting_them(dtype: torch.dtype, count: int) -> None:
    attention = TokenAttention(32, 4, downsample_rate=2)
    prepared(attention, dtype)
    tokens, pixels = noise(2, count, 32, dtype=dtype), noise(2, 30, 32, dtype=dtype, seed=2)
    position = noise(30, 32, dtype=dtype, seed=3)
    with torch.no_grad():
        expected = attention(q=tokens, k=pixels + position, v=pixels)
        assert_same(TokenToImage(attention)(tokens, pixels, position), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7])
def test_pixels_attend_to_tokens(dtype: torch.dtype, count: int) -> None:
    attention = TokenAttention(32, 4, downsample_rate=2)
    prepared(attention, dtype)
    tokens, encoding = noise(2, count, 32, dtype=dtype), noise(2, count, 32, dtype=dtype, seed=4)
    pixels, position = noise(2, 30, 32, dtype=dtype, seed=2), noise(30, 32, dtype=dtype, seed=3)
    with torch.no_grad():
        expected = attention(q=pixels + position, k=tokens + encoding, v=tokens)
        update = ImageToToken(attention)(tokens, tokens + encoding, pixels, position)
        assert_same(update.expand_as(expected), expected)


def parts(dtype: torch.dtype, published: bool) -> EspMedSam:
    return scrambled_model(published=published).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_convolutions_of_the_stem_and_merging(dtype: torch.dtype) -> None:
    encoder = parts(dtype, False).encoder
    image = noise(1, 3, 64, 64, dtype=dtype)
    with torch.no_grad():
        x = encoder.patch_embed(image)
        assert_same(FusedConvolutions(encoder.patch_embed)(image), x)
        assert_same(FusedConvolutions(encoder.stem.blocks[0])(x.clone()), encoder.stem.blocks[0](x.clone()))
        merging = encoder.stages[0].downsample
        assert_same(FusedConvolutions(merging)(x), merging(x))  # type: ignore[arg-type, operator]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bag", [False, True])
def test_encoder(dtype: torch.dtype, with_bag: bool) -> None:
    model = parts(dtype, False)
    bag = model.bag("xray") if with_bag else None
    image = noise(2, 3, 128, 128, dtype=dtype)
    with torch.no_grad():
        expected = model.encoder(image, bag).permute(0, 2, 3, 1)
        assert_same(FusedEncoder(model.encoder, bag, 2, 128)(image), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_prompt_is_one_of_two_vectors_a_patch(dtype: torch.dtype, layers: int) -> None:
    config = model_config("espmedsam-tiny").model_copy(update={"patch_layers": layers})
    prompt = scrambled_model(config).to(dtype).prompt
    embedding = noise(2, 64, 8, 8, dtype=dtype)
    with torch.no_grad():
        middle = prompt(embedding)[0].flatten().sort().values
        score = prompt.patch_generator[-1]
        score.bias -= middle[len(middle) // 2 - 1 : len(middle) // 2 + 1].mean()  # type: ignore[operator, union-attr]
        logits, dense = prompt(embedding)
        assert 0.2 < (logits >= 0).double().mean() < 0.8
        expected = (embedding + dense).flatten(2).transpose(1, 2)
        assert_same(FusedPrompt(prompt)(embedding.permute(0, 2, 3, 1)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("published", [False, True])
def test_decoder(dtype: torch.dtype, published: bool) -> None:
    decoder = parts(dtype, published).decoder
    embedding = noise(2, 64, 8, 8, dtype=dtype)
    with torch.no_grad():
        fused = FusedDecoder(decoder, "xray", 2, 8)(embedding.flatten(2).transpose(1, 2))
        assert_same(fused, decoder(embedding, "xray"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize(("size", "batch"), [(128, 1), (192, 2)])
def test_the_whole_network(dtype: torch.dtype, published: bool, size: int, batch: int) -> None:
    model = parts(dtype, published)
    image = noise(batch, 3, size, size, dtype=dtype)
    centre_prompt(model, image, "xray")
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(image, "xray")
        assert 0 < (expected.patch_logits >= 0).double().mean() < 1  # both prompts occur
        assert_same(FusedSegmenter(model, "xray", size, batch)(image), expected.low_res_logits)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model was changed"


@pytest.mark.parametrize("published", [False, True])
def test_the_papers_network_at_full_width(published: bool) -> None:
    model = scrambled_model("espmedsam-s", ["fundus"], published=published).double()
    image = noise(1, 3, 128, 128, dtype=torch.float64)
    with torch.no_grad():
        assert_same(FusedSegmenter(model, "fundus", 128)(image), model(image, "fundus").low_res_logits)
