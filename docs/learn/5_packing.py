"""Packing: one row for a passage and its two questions gives the loss and the gradient of two rows.

    python docs/learn/5_packing.py

A tiny LLaMA with random weights reads made-up token ids. First each question has a row of its own, with the passage in front.
Then both share one row, and a mask hides the one question from the other. The code is qa/llama/packing.py.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qa.llama.attention import visible  # noqa: E402
from qa.llama.encode import Piece, Prompt  # noqa: E402
from qa.llama.loss import AnswerLoss  # noqa: E402
from qa.llama.packing import Row, collate  # noqa: E402

PIECE = Piece(ids=[5, 6, 7, 8], text="a passage of four tokens", start_char=0)
PROMPTS = [Prompt(0, "first", PIECE, question_ids=[20, 21], answer_ids=[30, 2]),  # 2 is the end: predicted, never read
           Prompt(1, "second", PIECE, question_ids=[22], answer_ids=[31, 2])]


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2)
    loss_of = AnswerLoss(LlamaForCausalLM(config).double())
    packed = collate([Row(PIECE, PROMPTS)], [])
    separate = collate([Row(PIECE, [prompt]) for prompt in PROMPTS], [])

    print("the packed row: token ids, positions (they restart for the second question), segments (0 is the passage)")
    for name, values in (("ids", packed.input_ids), ("position", packed.positions), ("segment", packed.segments)):
        print(f"{name:>9} " + " ".join(f"{value:2}" for value in values.tolist()))
    print("\nwho sees whom (row: the token that looks)")
    segments = packed.segments[None]  # [B = 1, L]
    for line, token in zip(visible(segments, segments)[0, 0].tolist(), packed.input_ids.tolist(), strict=True):
        print(f"{token:>9} " + " ".join(" x" if seen else " ." for seen in line))

    results = []
    for name, micro_batch in (("two rows", separate), ("one row", packed)):
        loss_of.zero_grad()
        loss = loss_of(micro_batch)
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in loss_of.parameters()])
        results.append((loss.detach(), gradient))
        print(f"\n{name}: {len(micro_batch.input_ids)} tokens, loss {loss.item():.10f}, "
              f"norm of the gradient {gradient.norm():.10f}")
    (loss_1, gradient_1), (loss_2, gradient_2) = results
    print(f"\nlargest difference: loss {abs(loss_1 - loss_2):.0e}, gradient {(gradient_1 - gradient_2).abs().max():.0e}"
          "\n(all in fp64, but transformers' RMSNorm rounds to fp32: that is the difference)")


if __name__ == "__main__":
    main()
