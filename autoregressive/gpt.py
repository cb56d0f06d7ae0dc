"""LlamaGen's class-conditional GPT: state-dict keys, numerics and initialisation of the published models.

A sequence is the class, then the codes of a square grid in row order; position p predicts code p. Rotary embeddings are
two-dimensional. The class token's row of the rotary table is zero, which the published weights rely on: its query and
key vanish, so every position gives it logit 0 and reads its value only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoregressive.gpt_config import GPTConfig


def rope_table(grid: int, head_dim: int, base: float = 10000.0) -> Tensor:
    """Rotary table (1 + grid^2, head_dim / 2, 2) float32: cosines and sines. Row 0, the class token's, is zero.

    The first half of a head's pairs turns with the row of the code, the second with its column, by angles
    row * base^(-4 m / head_dim), m = 0 .. head_dim / 4 - 1.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (torch.arange(0, half, 2)[: half // 2].float() / half)
    angles = torch.outer(torch.arange(grid, dtype=torch.float32), frequencies)  # (grid, head_dim / 4)
    rows = angles[:, None].expand(-1, grid, -1)
    columns = angles[None].expand(grid, -1, -1)
    both = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    table = torch.stack([both.cos(), both.sin()], dim=-1)
    return torch.cat([torch.zeros(1, half, 2), table])


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, T, heads, D) by the rows (T, D / 2, 2) of a table; float32 inside, x's dtype out."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, T, heads, D / 2, 2)
    if not torch.compiler.is_compiling():  # one kernel instead of six; a compiler fuses the real form, but not this
        turned = torch.view_as_complex(pairs) * torch.view_as_complex(table)[:, None]
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    real, imaginary = pairs[..., 0], pairs[..., 1]
    turned = torch.stack([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class KVCache:
    """Keys and values of one generation, (batch, heads, positions, head_dim) per layer. Belongs to the call that made
    it: nothing stays in the model.
    """

    def __init__(self, config: GPTConfig, batch: int, dtype: torch.dtype, device: torch.device):
        shape = (batch, config.n_head, config.block_size, config.head_dim)  # the last code is never fed back
        self.layers = [tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
                       for _ in range(config.n_layer)]
        self._first: dict[int, list[tuple[Tensor, ...]]] = {}

    def first(self, batch: int) -> list[tuple[Tensor, ...]]:
        """Views of the first `batch` sequences, the same ones at every call."""
        if batch not in self._first:
            self._first[batch] = [tuple(part[:batch] for part in layer) for layer in self.layers]
        return self._first[batch]


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class FeedForward(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.wqkv = nn.Linear(config.dim, 3 * config.dim, bias=False)  # rows: queries, keys, values
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, cache: Sequence[Tensor] | None, position: Tensor | None,
                mask: Tensor | None, length: int) -> Tensor:
        # Unbound where they are: with `three` in front the backward would copy their gradients once more.
        q, k, v = rearrange(self.wqkv(x), "b t (three h d) -> b t three h d", three=3, h=self.n_head).unbind(2)
        q, k, v = (rearrange(t, "b t h d -> b h t d") for t in (apply_rope(q, rope), apply_rope(k, rope), v))
        if cache is not None:
            assert position is not None, "a cache is written at a position"
            keys, values = cache
            keys.index_copy_(2, position, k)
            values.index_copy_(2, position, v)
            k, v = keys[:, :, :length], values[:, :, :length]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=cache is None)
        return self.wo(rearrange(y, "b h t d -> b t (h d)"))


class DropPath(nn.Module):
    """Leaves out a branch for whole samples (stochastic depth, Huang et al. 2016), the others scaled by 1 / (1 - p)."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p):
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, drop_path: float):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        paths = config.drop_path_rate > 0
        self.resid_dropout = nn.Dropout(0.0 if paths else config.resid_dropout_p)
        self.ffn_dropout = nn.Dropout(0.0 if paths else config.ffn_dropout_p)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, rope: Tensor, cache: Sequence[Tensor] | None = None, position: Tensor | None = None,
                mask: Tensor | None = None, length: int = 0) -> Tensor:
        attended = self.attention(self.attention_norm(x), rope, cache, position, mask, length)
        x = x + self.drop_path(self.resid_dropout(attended))
        return x + self.drop_path(self.ffn_dropout(self.feed_forward(self.ffn_norm(x))))


class ClassEmbedding(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.none = config.num_classes
        self.dropout_prob = config.class_dropout_prob
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.dim)  # the last row: no class

    def forward(self, labels: Tensor) -> Tensor:
        if self.training and self.dropout_prob:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout_prob
            labels = torch.where(dropped, self.none, labels)
        return self.embedding_table(labels)[:, None]


class GPT(nn.Module):
    """The model. Its state dict has LlamaGen's keys and nothing else."""

    rope: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.cls_embedding = ClassEmbedding(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.token_dropout = nn.Dropout(config.token_dropout_p)
        rates = [config.drop_path_rate * i / max(config.n_layer - 1, 1) for i in range(config.n_layer)]
        self.layers = nn.ModuleList(Block(config, rate) for rate in rates)
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        table = rope_table(math.isqrt(config.block_size), config.head_dim, config.rope_base)
        self.register_buffer("rope", table, persistent=False)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
        nn.init.zeros_(self.output.weight)

    def cast(self, dtype: torch.dtype) -> GPT:
        """Convert the parameters for inference; the rotary table stays float32, as in LlamaGen."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(dtype)
        return self

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """codes (B, T) int64 with T < block_size, labels (B,) int64 -> logits (B, T + 1, vocab_size) float32.

        logits[:, p] are of code p, given the class and codes[:, :p]. For a training step T = block_size - 1. Labels go
        up to num_classes, which stands for no class. ValueError: more codes than fit.
        """
        if codes.shape[1] >= self.config.block_size:
            raise ValueError(f"{codes.shape[1]} codes are given; at most block_size - 1 = "
                             f"{self.config.block_size - 1} can come before a prediction")
        x = self.token_dropout(torch.cat([self.cls_embedding(labels), self.tok_embeddings(codes)], dim=1))
        rope = self.rope[: x.shape[1]]
        for layer in self.layers:
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, rope, use_reentrant=False)
            else:
                x = layer(x, rope)
        return self.output(self.norm(x)).float()

    def decode(
        self, x: Tensor, position: Tensor, cache: Sequence[Sequence[Tensor]], length: int, masked: bool = False
    ) -> Tensor:
        """One position of cached generation: embedding x (B, 1, dim) -> logits (B, vocab_size) float32.

        position: (1,) int64, where in the sequence. cache: per layer keys and values, written there. length: how many
        cached positions are attended to, position + 1, or with `masked` more: later ones are hidden then.
        """
        mask = (torch.arange(length, device=x.device) <= position)[None] if masked else None
        rope = self.rope[position]
        for layer, part in zip(self.layers, cache, strict=True):
            x = layer(x, rope, part, position, mask, length)
        return self.output(self.norm(x))[:, 0].float()


class NextCodeLoss(nn.Module):
    """A GPT and its loss in one module, so that a compiler fuses the softmax with what makes the logits.

    codes of whole images (B, block_size) int64, labels (B,) int64 -> cross-entropy (B,) in nats per code, and the share
    of codes predicted right (B,), float32.
    """

    def __init__(self, gpt: nn.Module):
        super().__init__()
        self.gpt = gpt

    def forward(self, codes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gpt(codes[:, :-1], labels).flatten(0, 1)  # (B T, vocab_size)
        losses = F.cross_entropy(logits, codes.flatten(), reduction="none").view_as(codes).mean(1)
        return losses, (logits.detach().argmax(-1).view_as(codes) == codes).float().mean(1)
