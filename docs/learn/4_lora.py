"""LoRA on a 4 x 4 matrix: the base stays, 8 numbers learn.

    python docs/learn/4_lora.py

    y = W x + (alpha / r) B A x         W [4, 4] frozen,  A [1, 4] and B [4, 1] trained        (Hu et al. 2021, section 4.1)

The target differs from W by a matrix of rank 1, so r = 1 can learn it exactly. Here alpha / r = 1. B begins at zero: before the
first step the layer is the base layer, to the bit. The code is qa/llama/lora.py; this page uses that very layer.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from qa.llama.lora import LoRALinear  # noqa: E402


def show(name: str, matrix: torch.Tensor) -> None:
    rows = "\n".join("   " + " ".join(f"{value:6.2f}" for value in row) for row in (matrix.detach() + 0.0).tolist())
    print(f"{name}\n{rows}\n")


def main() -> None:
    torch.manual_seed(0)
    base = nn.Linear(4, 4, bias=False)
    base.weight.data = torch.eye(4)
    base.weight.requires_grad_(False)
    target = torch.eye(4) + torch.outer(torch.tensor([1.0, 0.0, -1.0, 0.5]), torch.tensor([0.0, 2.0, 0.0, 1.0]))
    layer = LoRALinear(base, rank=1, scale=1.0, dropout=0.0)
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    print(f"{base.weight.numel()} numbers are frozen, {sum(parameter.numel() for parameter in trained)} are trained\n")

    x = torch.randn(64, 4)  # [64 inputs, 4]
    assert torch.equal(layer(x), base(x))
    print("before training: layer(x) equals base(x) to the bit, since B = 0\n")

    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.0)
    for step in range(201):
        loss = (layer(x) - x @ target.T).square().mean()
        if step % 50 == 0:
            print(f"step {step:3}: loss {loss.item():.6f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    show("\nB A, what was learned", layer.lora_B.weight @ layer.lora_A.weight)
    show("target - W, what was to be learned", target - base.weight)
    with torch.no_grad():
        before = layer.eval()(x)
        layer.merge()  # W <- W + B A: one matrix again, as fast as the base
        print(f"merged: the outputs differ by at most {(layer(x) - before).abs().max().item():.0e}")
        layer.unmerge()
    print(f"unmerged: W is the identity again: {torch.equal(base.weight, torch.eye(4))}")


if __name__ == "__main__":
    main()
