"""Attention of packed rows. The rest of the model need not know of it.

In a transformer only attention looks at several tokens at once; norms, projections and MLPs treat each token alone. So
the tokens of all rows go through the model as one flat sequence without any padding, and only attention lays them out:

    flat [1, h, T, d]  --spread-->  rows [B, h, L, d]   softmax(Q K^T / sqrt(d) + mask) V   --gather-->  flat [1, T, h, d]

How transformers comes to call `packed_attention`: `use_packed_attention` puts it into transformers' list under NAME, and writes
NAME into the model's config. LlamaAttention then looks NAME up in every layer. A caller (loss.py, cache.py) passes `layout=` to
LlamaModel, which does not know it and hands it on down to here; a mask with four dimensions comes through unchanged. A call
without a `layout` (transformers' own `generate`) goes on to transformers' sdpa, the plain version.

`visible` is the mask: which tokens of a row may be seen (packing.py explains the segments). Where a key head serves g query
heads, the queries of these g heads are laid side by side as queries of one head, so that no key is copied:
[B, kv, g L, d] x [B, kv, C, d]. `for_query_heads` repeats the mask for them, once for all layers.

Letters: B rows, L tokens of the longest, T tokens of all, C keys per row, h query heads, kv key heads, g = h / kv, d size of a
head. Used by: loss.py, reading.py, cache.py; packing.py (Layout).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qa_packed"


@dataclass(frozen=True)
class Layout:
    """Where each of the T tokens of a flat sequence goes in B rows of L slots."""

    rows: Tensor  # [T] int64, ascending
    places: Tensor  # [T] int64: row * width + slot, its index once the rows are joined end to end
    num_rows: int
    width: int  # L
    is_cached: bool  # keys and values come from a KVCache, laid out already

    @staticmethod
    def from_rows(rows: Tensor, num_rows: int, is_cached: bool = False) -> Layout:
        """`rows`: [T] the row of each token, ascending. In a row the tokens take one slot after another."""
        slots = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
        width = int(slots.max()) + 1
        return Layout(rows, rows * width + slots, num_rows, width, is_cached)

    def to(self, device: torch.device | str) -> Layout:
        return replace(self, rows=self.rows.to(device), places=self.places.to(device))

    def spread(self, flat: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] -> [B, L, ...], `fill` where there is no token."""
        shape = flat.shape[1:]
        spread = flat.new_full((self.num_rows * self.width, *shape), fill)
        return spread.index_copy(0, self.places, flat).view(self.num_rows, self.width, *shape)

    def gather(self, spread: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...]"""
        return spread.flatten(0, 1).index_select(0, self.places)


def visible(query_segments: Tensor, key_segments: Tensor) -> Tensor:
    """Which keys a query may see; [B, 1, L, C] bool. The queries are of the last L tokens; earlier keys come from a cache.

    query_segments: [B, L]; key_segments: [B, C]. Keys of segment 0 are seen by all later tokens of the row. Empty places (-1)
    are seen by empty places only.
    """
    num_queries, num_keys = query_segments.shape[1], key_segments.shape[1]
    index = torch.arange(num_keys, device=key_segments.device)
    not_later = index <= index[num_keys - num_queries :, None]  # [L, C]
    query_segments, key_segments = query_segments[:, :, None], key_segments[:, None, :]
    shared_or_own = (key_segments == 0) | (key_segments == query_segments)  # [B, L, C]
    return (not_later & shared_or_own)[:, None]


def for_query_heads(mask: Tensor, model: nn.Module) -> Tensor:
    """[B, 1, L, C] -> [B, 1, g L, C], as `packed_attention` wants it. model: its config knows g."""
    return mask.repeat(1, 1, model.config.num_attention_heads // model.config.num_key_value_heads, 1)


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     layout: Layout | None = None, dropout: float = 0.0, scaling: float | None = None,
                     **kwargs) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [1, h, T, d].
        key, value: [1, kv, T, d], or [B, kv, C, d] from a cache.
        attention_mask: [B, 1, g L, C], as `for_query_heads` makes it.

    Returns [1, T, h, d], and None for the attention weights, which nobody asks for.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    B, L, kv = layout.num_rows, layout.width, key.shape[1]
    _, h, _, d = query.shape
    query = layout.spread(query[0].transpose(0, 1).reshape(-1, kv, h // kv, d))  # [B, L, kv, g, d]
    query = query.permute(0, 2, 3, 1, 4).reshape(B, kv, h // kv * L, d)
    if not layout.is_cached:
        key, value = (layout.spread(flat[0].transpose(0, 1)).transpose(1, 2) for flat in (key, value))  # [B, kv, L, d]
    output = scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)  # [B, kv, g L, d]
    output = output.view(B, kv, h // kv, L, d).permute(0, 3, 1, 2, 4).reshape(B, L, h, d)
    return layout.gather(output)[None], None


def use_packed_attention(model: nn.Module) -> None:
    """Make `packed_attention` known to transformers, and the model's choice. sdpa_mask: for calls without a layout."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.config._attn_implementation = NAME
