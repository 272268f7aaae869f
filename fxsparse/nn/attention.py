"""Multi-head attention whose heads have a number and sizes of their own."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SizedMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` in which queries and keys, and values, have any width per head.

    torch derives the size of a head from the width of the model; here it is read off the projections, so that heads and
    positions within them can be removed. Parameters have the same names: the rows of `in_proj_weight` (or of
    `q_proj_weight`, `k_proj_weight`, `v_proj_weight`) are heads * size, the columns of `out_proj.weight` heads * size
    of the values. Arguments and results are torch's. Made by `SizedMultiheadAttention.of`.

    Attributes:
        num_heads: how many heads there are.
        scale: factor of the scores, from the size that heads had at first.
    """

    scale: float

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> SizedMultiheadAttention:
        """Turn torch's layer into this one in place: parameters, masks and hooks stay."""
        if not isinstance(module, cls):
            module.__dict__["scale"] = 1.0 / math.sqrt(module.head_dim)
            module.__dict__["packed"] = module.in_proj_weight is not None
            module.__dict__["_qkv_same_embed_dim"] = (
                False  # torch's fused layers derive sizes: they leave it alone then
            )
            module.__class__ = cls
        assert isinstance(module, cls)
        return module

    def describe(self) -> None:
        """Let the attributes say what shape the parameters have."""
        out = self.out_proj.weight
        self.embed_dim = out.shape[0]
        held = (
            [self.in_proj_weight] * 3 if self.packed else [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        )
        self.kdim, self.vdim = held[1].shape[1], held[2].shape[1]
        queries = held[0].shape[0] if not self.packed else (held[0].shape[0] - out.shape[1]) // 2
        self.head_dim = queries // self.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `torch.nn.MultiheadAttention`: shapes, masks and what is returned."""
        if is_causal and attn_mask is None:
            raise RuntimeError("`attn_mask` (=None) must be given beside `is_causal` (=True)")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        hinted = is_causal and key_padding_mask is None and not need_weights
        q, k, v = self._heads(query, key, value)
        mask = None if hinted else self._mask(query.shape[0], k.shape[-2], attn_mask, key_padding_mask, query.dtype)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * self.scale) @ k.transpose(-2, -1)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), p)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, p, hinted, scale=self.scale)
        result = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values as (batch, heads, length, size)."""
        if self.packed:
            values = self.out_proj.weight.shape[1]
            queries = (self.in_proj_weight.shape[0] - values) // 2
            sizes = [queries, queries, values]
            weights = torch.split(self.in_proj_weight, sizes)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            sizes = [weight.shape[0] for weight in weights]
        biases = (None, None, None) if self.in_proj_bias is None else torch.split(self.in_proj_bias, sizes)
        made = [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]
        for place, extra in ((1, self.bias_k), (2, self.bias_v)):
            if extra is not None:
                made[place] = torch.cat([made[place], extra.expand(query.shape[0], 1, extra.shape[-1])], 1)
        heads = [x.view(x.shape[0], x.shape[1], self.num_heads, -1).transpose(1, 2) for x in made]
        if self.add_zero_attn:
            heads[1:] = [F.pad(x, (0, 0, 0, 1)) for x in heads[1:]]
        return heads

    def _mask(
        self, batch: int, length: int, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one that is added to the scores; `length` counts the added keys, which nothing masks."""
        if attn_mask is not None and attn_mask.dim() == 3:  # (batch * heads or 1, queries, keys)
            attn_mask = attn_mask.view(batch if attn_mask.shape[0] > 1 else 1, -1, *attn_mask.shape[1:])
        if padding is not None:
            padding = padding[:, None, None, :]
        total: Tensor | None = None
        for mask in (attn_mask, padding):
            if mask is not None:
                if mask.dtype is torch.bool:
                    mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
                mask = F.pad(mask, (0, length - mask.shape[-1]))
                total = mask if total is None else total + mask
        return total
