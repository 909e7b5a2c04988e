"""A small LLaMA-style language model over bytes: RMSNorm, RoPE, SwiGLU, grouped-query attention, an untied head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    dim: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2  # three query heads share one key and value head
    hidden: int = 512
    vocab: int = 256  # bytes
    context: int = 128


class Attention(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.head_dim = c.dim // c.heads
        self.wq = nn.Linear(c.dim, c.heads * self.head_dim, bias=False)
        self.wk = nn.Linear(c.dim, c.kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(c.dim, c.kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(c.heads * self.head_dim, c.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        # Each [batch, heads, time, head_dim]; -1, because under tensor parallelism a rank has its share of the heads.
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        y = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=True)
        out: Tensor = self.wo(y.transpose(1, 2).flatten(-2))
        return out


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """`x` [..., time, head_dim] turned by the angles of `rope` [2, time, head_dim / 2]."""
    (a, b), (cos, sin) = x.chunk(2, dim=-1), rope
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)


class FeedForward(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate = nn.Linear(c.dim, c.hidden, bias=False)
        self.up = nn.Linear(c.dim, c.hidden, bias=False)
        self.down = nn.Linear(c.hidden, c.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Block(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(c.dim), Attention(c)
        self.mlp_norm, self.mlp = nn.RMSNorm(c.dim), FeedForward(c)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rope)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Transformer(nn.Module):
    """Pipeline stage `stage` of `stages`; the whole model by default.

    A layer keeps its number in the whole model, so a parameter has one name at every layout. Every stage draws the
    initial values of the whole model and keeps its own, so a seed gives one model at every layout.
    """

    def __init__(self, c: Config, *, stage: int = 0, stages: int = 1) -> None:
        super().__init__()
        first, last = stage == 0, stage == stages - 1
        embed, norm, head = nn.Embedding(c.vocab, c.dim), nn.RMSNorm(c.dim), nn.Linear(c.dim, c.vocab, bias=False)
        layers = {str(i): Block(c) for i in range(c.layers)}
        self.embed: nn.Module = embed if first else nn.Identity()
        self.layers = nn.ModuleDict({i: layer for i, layer in layers.items() if int(i) * stages // c.layers == stage})
        self.norm: nn.Module = norm if last else nn.Identity()
        self.head: nn.Module = head if last else nn.Identity()
        half = c.dim // c.heads // 2
        angles = torch.arange(c.context)[:, None] * 10_000.0 ** (-torch.arange(half) / half)
        self.register_buffer("rope", torch.stack((angles.cos(), angles.sin())), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [batch, time] to logits [batch, time, vocab]; between stages it is [batch, time, dim]."""
        x = self.embed(x)
        for layer in self.layers.values():
            x = layer(x, self.rope)
        out: Tensor = self.head(self.norm(x))
        return out


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
