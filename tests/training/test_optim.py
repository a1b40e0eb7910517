"""The schedule against transformers' linear schedule, decay groups against its Trainer, AdamW's state to the bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

from qa.bert.model import load_bert
from qa.training.optim import learning_rate, load_optimizer_tensors, make_adamw, optimizer_tensors, set_learning_rate


def test_schedule_by_hand():
    rates = [learning_rate(update, 10, 0.4, 8.0) for update in range(10)]
    assert rates == pytest.approx([2, 4, 6, 8, 8, 8 * 5 / 6, 8 * 4 / 6, 8 * 3 / 6, 8 * 2 / 6, 8 / 6])


@pytest.mark.parametrize("total, share", [(1, 0), (1, 1), (7, 0.1), (100, 0), (100, 0.06), (1449, 0.1), (50, 1)])
def test_schedule_equals_transformers_shifted_by_one_update_in_the_warmup(total, share):
    """transformers' very first update has the rate 0, which wastes it: ours is one update ahead as long as it rises."""
    warmup = round(share * total)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-5)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup, total)
    reference = []
    for _ in range(total + 1):
        reference.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    rates = [learning_rate(update, total, share, 3e-5) for update in range(total)]
    expected = [reference[update + 1] if update < warmup - 1 else 3e-5 if update == warmup - 1 else reference[update]
                for update in range(total)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert all(0 < rate <= 3e-5 for rate in rates) and max(rates) == pytest.approx(3e-5)


def test_set_learning_rate_reaches_every_group():
    optimizer = make_adamw(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), 1e-3, 0.01)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_decay_groups_are_the_trainers(kind, tiny_bert_folder):
    pytest.importorskip("accelerate")  # the Trainer needs it, we do not
    from transformers import Trainer

    if kind == "bert":
        model, _ = load_bert(tiny_bert_folder, 128)
    else:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                             num_attention_heads=2, attention_bias=True, mlp_bias=True))
    decaying = set(Trainer.get_decay_parameter_names(None, model))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_adamw(model, 1e-3, 0.01).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert {names[parameter] for parameter in groups[0]["params"]} == decaying
    assert {names[parameter] for parameter in groups[1]["params"]} == set(names.values()) - decaying


def test_frozen_parameters_are_in_no_group_and_shared_ones_in_one():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    model[0].requires_grad_(False)
    model.append(model[1])
    parameters = [parameter for group in make_adamw(model, 1e-3, 0.1).param_groups for parameter in group["params"]]
    expected = [*model[1].parameters(), *model[2].parameters()]
    assert sorted(map(id, parameters)) == sorted(map(id, expected))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step + 100)
        model(torch.randn(8, 6)).square().sum().backward()
        set_learning_rate(optimizer, 0.01 * (step + 1))
        optimizer.step()
        optimizer.zero_grad()


def test_adamw_state_goes_through_a_file_to_the_bit():
    """Three steps, both states through safetensors, three more steps: the same weights as six in a row."""
    model = make_model()
    model[3].requires_grad_(False)  # as a base under LoRA
    optimizer = make_adamw(model, 0.01, 0.1)
    train(model, optimizer, range(3))
    tensors = optimizer_tensors(model, optimizer)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert tensors.keys() == {f"{name}.{key}" for name in trainable for key in ("step", "exp_avg", "exp_avg_sq")}
    files = save(tensors), save({name: tensor.clone() for name, tensor in model.state_dict().items()})

    resumed = make_model()
    resumed[3].requires_grad_(False)
    resumed.load_state_dict(load(files[1]))
    resumed_optimizer = make_adamw(resumed, 0.01, 0.1)
    load_optimizer_tensors(resumed, resumed_optimizer, load(files[0]))
    assert optimizer_tensors(resumed, resumed_optimizer).keys() == tensors.keys()
    assert all(torch.equal(optimizer_tensors(resumed, resumed_optimizer)[name], tensors[name]) for name in tensors)

    train(model, optimizer, range(3, 6))
    train(resumed, resumed_optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    forgetful = make_adamw(resumed, 0.01, 0.1)  # and the state matters
    train(resumed, forgetful, range(6, 7))
    train(model, optimizer, range(6, 7))
    assert not torch.equal(resumed[0].weight, model[0].weight)


def test_nothing_is_saved_before_the_first_update():
    model = make_model()
    optimizer = make_adamw(model, 0.01, 0.1)
    assert optimizer_tensors(model, optimizer) == {}
    load_optimizer_tensors(model, optimizer, {})
    train(model, optimizer, range(1))
