"""The keys and values of passages that were read before, for further questions about them.

    first question about 40 documents     every passage is read: its keys and values are kept
    second question                       they are copied into the rows of the cache; only the question is read

Used by: reading.py, when a reader is asked (qa/asking.py); training and evaluation read each passage once anyway.

Letters: P tokens of a piece of a passage, layers = 2 per layer of the model: its keys, its values.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from qa.llama.cache import KVCache
from qa.llama.encode import Piece


class PassageMemory:
    """Up to `max_bytes` of passages. If a new one needs room, those that are not asked about now are dropped, oldest first."""

    def __init__(self, max_bytes: int):
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.kept: dict[bytes, Tensor] = {}  # [layers, P, kv heads, head size] of each piece, after its instruction
        self.needed: set[bytes] = set()

    def begin(self, instruction_ids: list[int], pieces: list[Piece]) -> None:
        """The pieces that are asked about now."""
        self.instruction_ids = instruction_ids
        self.needed = {self._key(piece) for piece in pieces}

    def __contains__(self, piece: Piece) -> bool:
        return self._key(piece) in self.kept

    def recall(self, piece: Piece, cache: KVCache, row: int, begin: int) -> None:
        """Write the piece into a row of the cache, from the column `begin` on."""
        layers = self.kept[self._key(piece)]
        end = begin + layers.shape[1]
        cache.reserve(end)
        if not cache.keys:
            cache.keys, cache.values = ([layers.new_zeros(*cache.segments.shape, *layers.shape[2:])
                                         for _ in range(len(layers) // 2)] for _ in range(2))
        for stored, layer in zip([*cache.keys, *cache.values], layers, strict=True):
            stored[row, begin:end] = layer
        cache.segments[row, begin:end] = 0
        cache.length = max(cache.length, end)

    def keep(self, piece: Piece, cache: KVCache, row: int, columns: Tensor) -> None:
        """Copy the piece, which was read into these columns, if there is room or room can be made."""
        key = self._key(piece)
        num_bytes = sum(layer[row, columns].numel() * layer.element_size() for layer in (cache.keys[0], cache.values[0]))
        num_bytes *= len(cache.keys)
        for other in [other for other in self.kept if other not in self.needed]:
            if self.num_bytes + num_bytes <= self.max_bytes:
                break
            self.num_bytes -= self.kept.pop(other).nbytes
        if self.num_bytes + num_bytes <= self.max_bytes:
            self.kept[key] = torch.stack([layer[row, columns] for layer in [*cache.keys, *cache.values]])
            self.num_bytes += num_bytes

    def _key(self, piece: Piece) -> bytes:
        return np.array([*self.instruction_ids, -1, *piece.ids], dtype=np.int32).tobytes()
