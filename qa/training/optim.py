"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with decay groups, and a learning rate that is a function of the step.

    lr(t) = peak * min((t + 1) / warmup, (total - t) / (total - warmup))    t = 0, 1, ... total - 1: updates made so far

BERT's own schedule (Devlin et al. 2019, appendix A.2): a linear rise, then a linear fall. The last update still has the
rate peak / (total - warmup), not 0. With 10 updates, 4 of warm-up, and a peak of 8: 2, 4, 6, 8, 8, 6.7, 5.3, 4, 2.7, 1.3.
Used by both train scripts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qa.options import TrainOptions
from qa.training.sharding import cut_like


def make_adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters. Matrices and embeddings decay; biases and norm weights (1-D) do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
              {"params": [parameter for parameter in trainable if parameter.ndim <= 1], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999), eps=1e-8, fused=True)  # fused: one pass over memory


def learning_rate(update: int, total_updates: int, warmup_share: float, peak: float) -> float:
    """lr(t) for t = `update`. The warm-up takes `warmup_share`, from 0 to 1, of all updates."""
    warmup_updates = round(warmup_share * total_updates)
    if update < warmup_updates:
        return peak * (update + 1) / warmup_updates
    return peak * (total_updates - update) / max(1, total_updates - warmup_updates)


def advice(options: TrainOptions, typed: set[str], model: nn.Module) -> list[str]:
    """A warning if the default learning rate does not suit a model of this size and the user gave no --lr."""
    usual = {"bert": (60e6, "below", "1e-4"), "lora": (700e6, "above", "2e-4")}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    size, side, rate = usual[options.kind]
    if "lr" in typed or options.demo or (num_parameters < size) != (side == "below"):
        return []
    return [f"warning: --lr {options.lr:g} is the default; for a model of {num_parameters / 1e6:,.0f} million parameters "
            f"about {rate} is usual"]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state for the checkpoint, under the parameters' names: `<parameter>.exp_avg`, `.exp_avg_sq`, `.step`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {f"{names[parameter]}.{key}": value for parameter, state in optimizer.state.items()
            for key, value in state.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back, each on its parameter's device."""
    for name, parameter in model.named_parameters():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors]
        if keys:
            optimizer.state[parameter] = {key: cut_like(parameter, tensors[f"{name}.{key}"]) for key in keys}
