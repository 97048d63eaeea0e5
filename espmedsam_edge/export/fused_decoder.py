"""SPPG and QDMD for one modality as plain matrix products: no pixel is projected that only a token looks at."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling.transformer import Attention as TokenAttention
from segment_anything.modeling.transformer import TwoWayAttentionBlock
from torch import Tensor, nn

from espmedsam_edge.export.fused_layers import ChannelsLastNorm, Constant
from espmedsam_edge.model.decoder import QueryDecoupledModalityDecoder
from espmedsam_edge.model.prompt import SelfPatchPromptGenerator


class FusedPrompt(Constant):
    """SPPG: embedding in, embedding + dense prompt out; the prompt is one of two constant vectors a patch."""

    def __init__(self, prompt: SelfPatchPromptGenerator) -> None:
        super().__init__()
        *merging, score = prompt.patch_generator
        self.scale = 2**prompt.layers
        self.norms = nn.ModuleList(ChannelsLastNorm(norm) for norm in merging[1::3])
        for index, conv in enumerate(merging[::3]):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            # (out, in, 2, 2) -> (2·2·in, out): a 2x2 convolution of stride 2 is a product over the four pixels
            self.keep(f"merge{index}", conv.weight.permute(2, 3, 1, 0).flatten(0, 2))
            self.keep(f"merge_bias{index}", conv.bias)
        assert isinstance(score, nn.Conv2d)
        assert score.bias is not None
        self.keep("score", score.weight[:, :, 0, 0].T)
        self.keep("score_bias", score.bias)
        with torch.no_grad():
            off, on = (
                prompt.dense_prompt(torch.full((1, 1, 1, 1), value, dtype=score.weight.dtype)).flatten()
                for value in (0.0, 1.0)
            )
        self.keep("off", off)
        self.keep("on", on)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, h, w, D) -> (B, h, w, D)."""
        batch, height, width, channels = embedding.shape
        x = embedding
        for index, norm in enumerate(self.norms):
            rows, columns = x.shape[1] // 2, x.shape[2] // 2
            x = x.reshape(batch, rows, 2, columns, 2, x.shape[3]).permute(0, 1, 3, 2, 4, 5).flatten(3)
            x = F.gelu(norm(x @ getattr(self, f"merge{index}") + getattr(self, f"merge_bias{index}")))
        logits = x @ self.score + self.score_bias
        rows, columns = height // self.scale, width // self.scale
        foreground = logits.reshape(batch, rows, 1, columns, 1, 1) >= 0  # sigmoid ≥ 0.5
        dense = torch.where(foreground, self.on, self.off)
        patches = embedding.reshape(batch, rows, self.scale, columns, self.scale, channels)
        return (patches + dense).reshape(batch, height * width, channels)


class TokenToImage(Constant):
    """Tokens attend to pixels without projecting any pixel: the key and value projections move to the token's side.

    q·(W_k x + b) = (W_kᵀ q)·x + q·b, and q·b is the same for all pixels, so the softmax drops it; the weighted mean of
    W_v x + b is W_v applied to the weighted mean of x, plus b.
    """

    def __init__(self, attention: TokenAttention) -> None:
        super().__init__()
        heads, dim = attention.num_heads, attention.embedding_dim
        self.heads, self.head_dim = heads, attention.internal_dim // heads
        scale = self.head_dim**-0.5
        self.keep("query", attention.q_proj.weight.T * scale)
        self.keep("query_bias", attention.q_proj.bias * scale)
        self.keep("key", attention.k_proj.weight.view(heads, self.head_dim, dim))
        self.keep("value", attention.v_proj.weight.view(heads, self.head_dim, dim).transpose(1, 2))
        self.keep("value_bias", attention.v_proj.bias.view(heads, 1, self.head_dim))
        self.keep("out", attention.out_proj.weight.T)
        self.keep("out_bias", attention.out_proj.bias)

    def forward(self, tokens: Tensor, pixels: Tensor, position: Tensor) -> Tensor:
        """Tokens (B, T, D) with their position added, pixels (B, h·w, D) without, theirs (h·w, D) -> (B, T, D)."""
        batch, count, _ = tokens.shape
        q = (tokens @ self.query + self.query_bias).view(batch, count, self.heads, self.head_dim).transpose(1, 2)
        probe = (q @ self.key).flatten(1, 2)  # (B, heads·T, D)
        scores = probe @ pixels.transpose(1, 2) + probe @ position.T
        mean = (torch.softmax(scores, dim=2) @ pixels).view(batch, self.heads, count, -1)
        x = (mean @ self.value + self.value_bias).transpose(1, 2).flatten(2)
        return x @ self.out + self.out_bias


class ImageToToken(Constant):
    """Pixels attend to tokens; with a single token (the paper's decoupled query) that is the token's value for all."""

    def __init__(self, attention: TokenAttention) -> None:
        super().__init__()
        heads, dim = attention.num_heads, attention.embedding_dim
        self.heads, self.head_dim = heads, attention.internal_dim // heads
        scale = self.head_dim**-0.5
        self.keep("query", attention.q_proj.weight.view(heads, self.head_dim, dim) * scale)
        self.keep("query_bias", attention.q_proj.bias.view(heads, self.head_dim, 1) * scale)
        self.keep("key", attention.k_proj.weight.T)
        self.keep("key_bias", attention.k_proj.bias)
        self.keep("value", attention.v_proj.weight.T)
        self.keep("value_bias", attention.v_proj.bias)
        self.keep("out", attention.out_proj.weight.T)
        self.keep("out_heads", attention.out_proj.weight.T.reshape(heads, self.head_dim, dim))
        self.keep("out_bias", attention.out_proj.bias)

    def forward(self, tokens: Tensor, positioned: Tensor, pixels: Tensor, position: Tensor) -> Tensor:
        """Tokens and the same with position (B, T, D), pixels (B, h·w, D), theirs -> update (B, 1 or h·w, D)."""
        batch, count, _ = tokens.shape
        v = tokens @ self.value + self.value_bias
        if count == 1:
            return v @ self.out + self.out_bias
        k = (positioned @ self.key + self.key_bias).view(batch, count, self.heads, self.head_dim).transpose(1, 2)
        probe = (k @ self.query).flatten(1, 2)  # (B, heads·T, D)
        constant = (k @ self.query_bias).flatten(1).unsqueeze(1)  # (B, 1, heads·T)
        scores = (pixels + position) @ probe.transpose(1, 2) + constant
        weights = torch.softmax(scores.view(batch, -1, self.heads, count), dim=3).flatten(2)
        v = v.view(batch, count, self.heads, self.head_dim).transpose(1, 2)
        return weights @ (v @ self.out_heads).flatten(1, 2) + self.out_bias


class FusedDecoderLayer(Constant):
    """One two-way block after its token self-attention."""

    def __init__(self, layer: TwoWayAttentionBlock) -> None:
        super().__init__()
        self.layer = layer
        self.token_to_image = TokenToImage(layer.cross_attn_token_to_image)
        self.image_to_token = ImageToToken(layer.cross_attn_image_to_token)

    def self_attention(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """The tokens' self-attention and norm; over a single token it is that token's value."""
        layer = self.layer
        attention = layer.self_attn
        if queries.shape[1] == 1:
            value = attention.out_proj(attention.v_proj(queries))
        else:
            keys = queries if layer.skip_first_layer_pe else queries + tokens
            value = attention(q=keys, k=keys, v=queries)
        return layer.norm1(value if layer.skip_first_layer_pe else queries + value)

    def forward(self, queries: Tensor, tokens: Tensor, pixels: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and pixels, updated; ``tokens`` (B, T, D) and ``position`` (h·w, D) are their position encodings."""
        layer = self.layer
        queries = layer.norm2(queries + self.token_to_image(queries + tokens, pixels, position))
        queries = layer.norm3(queries + layer.mlp(queries))
        return queries, layer.norm4(pixels + self.image_to_token(queries, queries + tokens, pixels, position))


class FusedDecoder(Constant):
    """QDMD for one modality: (B, h·w, D) -> (B, 1, 4h, 4w) logits."""

    def __init__(self, decoder: QueryDecoupledModalityDecoder, modality: str, batch: int, size: int) -> None:
        super().__init__()
        transformer = decoder.transformer
        tokens, self.own = decoder.tokens(modality)
        position = decoder.positional_encoding((size, size)).flatten(1).T  # (h·w, D)
        self.size = size
        self.keep("position", position)
        layers = [FusedDecoderLayer(layer) for layer in transformer.layers]
        self.layers = nn.ModuleList(layers)
        self.final = TokenToImage(transformer.final_attn_token_to_image)
        self.final_norm = transformer.norm_final_attn
        self.hypernetwork = decoder.hypernetwork(modality)
        self.keep("tokens", tokens.expand(batch, -1, -1))
        with torch.no_grad():  # depends on constants only
            self.keep("queries", layers[0].self_attention(self.tokens, self.tokens))
        up1, norm, _, up2, _ = decoder.upscaling
        for name, up in (("up1", up1), ("up2", up2)):
            assert isinstance(up, nn.ConvTranspose2d)
            assert up.bias is not None
            # (in, out, 2, 2) -> (in, 2·2·out): a 2x2 transposed convolution of stride 2 is a product a pixel
            self.keep(name, up.weight.permute(0, 2, 3, 1).flatten(1))
            self.keep(f"{name}_bias", up.bias.repeat(4))
        self.norm = ChannelsLastNorm(norm)

    def forward(self, pixels: Tensor) -> Tensor:
        queries = self.queries
        layers: Any = self.layers
        for index, layer in enumerate(layers):
            if index:
                queries = layer.self_attention(queries, self.tokens)
            queries, pixels = layer(queries, self.tokens, pixels, self.position)
        queries = self.final_norm(queries + self.final(queries + self.tokens, pixels, self.position))
        weights = self.hypernetwork(queries[:, self.own : self.own + 1])  # (B, 1, D/8)
        batch, count, channels = pixels.shape
        x = (pixels @ self.up1 + self.up1_bias).view(batch, count * 4, channels // 4)
        x = F.gelu(F.gelu(self.norm(x)) @ self.up2 + self.up2_bias).view(batch, count * 16, channels // 8)
        logits = x @ weights.transpose(1, 2)
        # every pixel holds its 4x4 block as (row of 2, column of 2) twice; only now are they put in place
        blocks = logits.view(batch, self.size, self.size, 2, 2, 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return blocks.reshape(batch, 1, 4 * self.size, 4 * self.size)
