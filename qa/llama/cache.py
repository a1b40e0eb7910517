"""The KV cache of packed rows, and the forward pass that reads it and adds to it.

A row is a passage, its questions, and what was written after each of them so far (packing.py). A new token sees the passage
and the earlier tokens of its own question; its segment says which these are. So one mask serves reading, greedy decoding
(greedy.py) and scoring a given answer. Exact decoding (extract.py) tries many answers to one question at the same time. Its
tokens form a tree, and `seen` lists for each token the columns of its ancestors: " tower" sees " The", but not " 1889".

Letters: B rows, T new tokens in all, L of the row that has most, C columns of the cache, A ancestors of the deepest token and
itself, H hidden size. Used by: reading.py, greedy.py, extract.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from qa.llama.attention import Layout, for_query_heads, visible

GROWTH = 64  # columns by which a full cache grows at least


class KVCache:
    """Keys and values of B rows, and each column's segment. What LlamaModel takes as `past_key_values`.

    Room is allocated ahead: `torch.cat` in every pass would copy the whole cache each time. A forward pass writes after the
    first `length` columns. What it writes stays only if `length` grows too; else the next pass writes over it.
    """

    def __init__(self, num_rows: int, capacity: int, device: torch.device):
        self.length = 0
        self.segments = torch.full((num_rows, capacity), -1, device=device)  # [B, C]; -1: nothing there
        self.keys: list[Tensor] = []  # per layer [B, C, kv heads, head size]
        self.values: list[Tensor] = []
        self.rows = self.columns = torch.empty(0)  # [T] where the present pass writes its tokens
        self.end = 0  # one past the last column that it uses

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_) -> tuple[Tensor, Tensor]:
        """Every attention layer calls this with [1, kv, T, d]: store them, return all [B, kv, C, d] up to them."""
        found = []
        for stored, new in ((self.keys, keys), (self.values, values)):
            if layer_idx == len(stored):  # the first pass tells the shapes and the type
                stored.append(values.new_zeros(*self.segments.shape, new.shape[1], new.shape[3]))
            stored[layer_idx][self.rows, self.columns] = new[0].transpose(0, 1).to(values.dtype)
            found.append(stored[layer_idx][:, : self.end].transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def reserve(self, num_columns: int) -> None:
        """Make room for `num_columns` columns in all."""
        missing = num_columns - self.segments.shape[1]
        if missing <= 0:
            return
        more = max(missing, GROWTH)
        self.segments = pad(self.segments, (0, more), value=-1)
        for stored in (self.keys, self.values):
            for layer in range(len(stored)):  # one at a time: never two caches in memory
                stored[layer] = pad(stored[layer], (0, 0, 0, 0, 0, more))

    def hide(self, rows: Tensor, columns: Tensor) -> None:
        """No later token sees these places."""
        self.segments[rows, columns] = -1

    def select(self, rows: Tensor) -> KVCache:
        """A new cache of these rows; a row may come several times."""
        other = KVCache(0, 0, self.segments.device)
        other.length, other.segments = self.length, self.segments[rows]
        other.keys = [keys[rows] for keys in self.keys]
        other.values = [values[rows] for values in self.values]
        return other


def forward_tokens(model, cache: KVCache, rows: Tensor, ids: Tensor, positions: Tensor, segments: Tensor,
                   keep: bool = True, seen: Tensor | None = None) -> Tensor:
    """Run the model on T new tokens, some for each row of the cache: hidden states [T, H].

    Args:
        rows: [T], ascending. A row's first token is written to the column `cache.length`, its next one to the next column.
        ids, positions, segments: [T]. A token sees the passage, and the earlier tokens of its own segment.
        keep: whether the tokens stay in the cache. Their columns are `cache.columns` [T].
        seen: [T, A] for a tree: the columns of each token's ancestors and of itself. Only tokens that list a column see it.
    """
    layout = Layout.from_rows(rows, len(cache.segments), is_cached=True)
    end, slots = cache.length + layout.width, layout.places % layout.width
    cache.reserve(end)
    cache.rows, cache.columns, cache.end = rows, cache.length + slots, end
    spread_segments = layout.spread(segments, fill=-1)  # [B, L]
    cache.segments[:, cache.length : end] = spread_segments if seen is None else -1
    mask = visible(spread_segments, cache.segments[:, :end])  # [B, 1, L, C]
    if seen is not None:
        mask[rows[:, None], 0, slots[:, None], seen] = True
    hidden = model.model(
        input_ids=ids[None], position_ids=positions[None], attention_mask=for_query_heads(mask, model),
        past_key_values=cache, use_cache=True,
        layout=layout,  # unknown to transformers: it hands it on to our attention function (attention.py)
    ).last_hidden_state[0]  # [T, H]
    if keep:
        cache.length = end
    return hidden
