"""Skip this on first reading: BERT's self-attention once more, for training on a CPU. On a GPU it calls PyTorch's.

    P = softmax(Q K^T / sqrt(d) + mask),   O = dropout(P) V          (Vaswani et al. 2017, section 3.2.1)

PyTorch's own `scaled_dot_product_attention` computes this. It is the fastest on a GPU, and on a CPU for fp32 inference. On a
CPU `_Attention` is faster for training, and for bf16 inference: it is made of plain matrix products. Its backward pass uses an
identity of FlashAttention (Dao et al. 2022, appendix B.2), which replaces a sum over [L, L] by one over [L, d]:

    dS = P * (dP - rowsum(dP * P)),   rowsum(dP * P) = rowsum(dO * O)

It holds with dropout too, because O already contains the mask. `register` tells transformers the name "qa_attention". A
function of one's own must be registered for masks as well: otherwise transformers passes it no mask, and says nothing.
Used by: bert/model.py.

Letters: B windows, h heads, L tokens, d size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from qa.cpu.dropout import keep_bits, keep_words

NAME = "qa_attention"


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, scaling: float) -> Tensor:
        B, h, L, d = query.shape
        query = (query * scaling).reshape(B * h, L, d)
        key, value = key.reshape(B * h, L, d), value.reshape(B * h, L, d)
        scores = torch.bmm(query, key.transpose(1, 2))  # [B*h, L, L]
        if bias is not None:
            scores.view(B, h, L, L).add_(bias)
        weights = torch.softmax(scores, dim=-1)
        words = keep_words(weights.shape, weights.dtype, p) if p > 0 else None
        kept = weights if words is None else keep_bits(weights, words)
        output = torch.bmm(kept, value).mul_(1 / (1 - p))  # [B*h, L, d]; the scale is cheaper here than on [L, L]
        ctx.save_for_backward(query, key, value, weights, words, output)
        ctx.p, ctx.scaling, ctx.shape = p, scaling, (B, h, L, d)
        return output.view(B, h, L, d)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        query, key, value, weights, words, output = ctx.saved_tensors
        grad_output = grad_output.reshape(output.shape)
        row_sums = (grad_output * output).sum(dim=-1, keepdim=True)  # [B*h, L, 1]
        grad_output = grad_output * (1 / (1 - ctx.p))
        kept = weights if words is None else keep_bits(weights, words)
        grad_value = torch.bmm(kept.transpose(1, 2), grad_output)
        grad_weights = torch.bmm(grad_output, value.transpose(1, 2))  # [B*h, L, L]
        if words is not None:
            keep_bits(grad_weights, words, in_place=True)
        grad_scores = grad_weights.sub_(row_sums).mul_(weights)
        grad_query = torch.bmm(grad_scores, key).mul_(ctx.scaling)
        grad_key = torch.bmm(grad_scores.transpose(1, 2), query)  # this query is scaled already
        return grad_query.view(ctx.shape), grad_key.view(ctx.shape), grad_value.view(ctx.shape), None, None, None


def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
              dropout: float = 0.0, scaling: float | None = None, **_) -> tuple[Tensor, None]:
    """One attention layer, called by transformers: query, key, value [B, h, L, d] -> [B, L, h, d], and no weights (None).

    attention_mask: boolean, True where a query may look, broadcastable to [B, h, L, L]; None: everywhere.
    dropout: drop probability of the attention weights (0 outside training).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    ours_is_faster = torch.is_grad_enabled() or query.dtype == torch.bfloat16
    if ours_is_faster and query.device.type == "cpu" and not torch.compiler.is_compiling():
        bias = None
        if attention_mask is not None:
            bias = torch.zeros(attention_mask.shape, dtype=query.dtype)
            bias.masked_fill_(~attention_mask, torch.finfo(query.dtype).min)
        output = _Attention.apply(query, key, value, bias, dropout, scaling)
    else:
        output = nn.functional.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    return output.transpose(1, 2), None


def register() -> str:
    """Make `attention` known to transformers; returns its name, for `attn_implementation`."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
