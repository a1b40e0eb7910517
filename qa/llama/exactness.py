"""Does a decoder compute what we rely on? Asked of the model itself when it is loaded, with a passage of 12 tokens.

Packed rows (packing.py), the shared cache (cache.py) and the search (extract.py) rely on two things. transformers uses our
mask and our positions as they are; and nothing but attention looks at several tokens at once. So

    1. questions that share a row get the logits that transformers' own code gives to each alone
    2. other tokens in one question change the logits of another one by exactly 0

A sliding window (Mistral: the last 4,096 tokens are seen) is no part of our mask. A model that has one is exact for prompts
that fit into it; longer ones are refused. Used by: model.py.

Letters: N tokens of the two questions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qa.errors import UserError
from qa.llama.attention import use_packed_attention
from qa.llama.cache import KVCache, forward_tokens
from qa.llama.encode import Piece, Prompt
from qa.llama.loss import hidden_states
from qa.llama.packing import MicroBatch, Row, collate

LENGTHS = (12, 5, 9)  # tokens of passage, first and second question
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the logits' norm; half precision: 0.1


def sliding_window(config) -> int | None:
    """How many tokens a token sees, itself included, where that is limited."""
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]  # without the list: all layers are alike
    return getattr(config, "sliding_window", None) if "sliding_attention" in kinds else None


@torch.no_grad()
def check_exactness(model, source) -> None:
    """Raise a UserError, with the reason, if 1. or 2. do not hold. The model is the same afterwards."""
    if (window := sliding_window(model.config)) and window < sum(LENGTHS):
        raise UserError(f"{source}: its sliding window has {window} tokens, too few for a passage; use a model without one")
    vocab_size = model.config.vocab_size
    ids = torch.arange(sum(LENGTHS), device=model.device) * max(1, vocab_size // sum(LENGTHS)) % vocab_size
    passage, first, second = ids.split(LENGTHS)
    alone = [model(torch.cat([passage, question])[None], use_cache=False).logits[0, len(passage):].double()
             for question in (first, second)]
    expected = torch.cat(alone)  # [N, V]
    attention = model.config._attn_implementation
    use_packed_attention(model)
    for kind, read in (("packed rows", _read_packed), ("a shared cache", _read_cached)):
        found, changed = (model.lm_head(read(model, _one_row(passage, question, second))).double()
                          for question in (first, (first + 1) % vocab_size))
        is_close = (found - expected).norm() <= TOLERANCE.get(model.dtype, 0.1) * expected.norm()
        if not is_close and expected.isfinite().all():
            raise _inexact(source, kind, "a question gets other logits than alone")
        if (found - changed)[len(first):].abs().max() > 0:
            raise _inexact(source, kind, "a question sees the tokens of another one")
    model.config._attn_implementation = attention


def _one_row(passage: Tensor, first: Tensor, second: Tensor) -> MicroBatch:
    piece = Piece(passage.tolist(), "", 0)
    return collate([Row(piece, [Prompt(0, "", piece, ids.tolist(), []) for ids in (first, second)])], []).to(passage.device)


def _read_packed(model, row: MicroBatch) -> Tensor:
    """As training does: [N, H]."""
    return hidden_states(model, row)[row.segments > 0]


def _read_cached(model, row: MicroBatch) -> Tensor:
    """As decoding does, first the passage and then the questions: [N, H]."""
    cache = KVCache(1, 0, model.device)
    for part in (row.segments == 0, row.segments > 0):
        hidden = forward_tokens(model, cache, row.layout.rows[part], row.input_ids[part], row.positions[part],
                                row.segments[part])
    return hidden


def _inexact(source, kind: str, reason: str) -> UserError:
    return UserError(f"{source}: with {kind} {reason}, so passages cannot be shared; use a model of another family")
