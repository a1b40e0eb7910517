"""--shard: a model that fits no device is cut over the ranks, by PyTorch's `fully_shard` (Zhao et al. 2023, arXiv:2304.11277).

    weight [6, H]       rank 0 holds rows 0-1      rank 1 holds rows 2-3      rank 2 holds rows 4-5
    a pass              a block's weights are gathered from all ranks, used, and dropped again, block by block
    its backward pass   they are gathered once more; the gradient is summed over the ranks, and each keeps its rows of the sum

LLaMA: only the frozen base is cut; LoRA is small, and whole on every rank. BERT: parameters, gradients and AdamW's state.
A gather needs all ranks. So all must make the same passes: in training, `deal` and `deal_rows` give the ranks equally many
micro-batches, some of them with nothing in them; reading, the ranks help one another (`in_step`).

Used by: the train scripts, both readers, llama/base_shards.py; `gather` and `whole` by checkpoint.py and state.py.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from qa.cpu.malloc import return_freed_memory
from qa.training.distributed import Runtime, gather_objects


def shard(model: nn.Module, runtime: Runtime) -> None:
    """Cut the parameters, in place: each becomes a DTensor, of which this rank has some rows. For two ranks or more.

    A block is gathered at a time. What is in no block (embeddings, heads) is gathered for a whole pass.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of views: nobody changes BERT's scores in place
    if runtime.device.type == "cpu":
        return_freed_memory()
    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), [])
    mesh = init_device_mesh(runtime.device.type, (runtime.num_ranks,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # a sum over the ranks, not a mean
        module.set_force_sum_reduction_for_comms(True)
        if runtime.device.type == "cpu":
            module.set_modules_to_backward_prefetch([module])  # none but itself: with nothing to overlap, it only takes memory
        if not any(parameter.is_meta for parameter in module.parameters()):
            module.unshard()  # FSDP makes its buffers at the first pass; made in inference mode, they could not be trained with
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The tensor with the rows of all ranks, which all call this; one that is not cut, as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: dict[str, Tensor], runtime: Runtime) -> dict[str, Tensor]:
    """The whole tensors, gathered one after another: rank 0 has all, on the CPU; the others have none."""
    return {name: tensor.cpu() for name, tensor in zip(tensors, map(whole, tensors.values()), strict=True) if runtime.is_main}


def cut_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that all ranks have whole, on the parameter's device and cut as the parameter is; nothing is sent.

    A number (AdamW's step) is never cut.
    """
    if not isinstance(parameter, DTensor) or tensor.ndim == 0:
        return tensor.to(parameter.device)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


@contextlib.contextmanager
def in_step(model: nn.Module, runtime: Runtime) -> Iterator[None]:
    """In here each rank may call the model as often as it wants. Before each call the ranks agree on the part that is next.

    Each tells the others the number of the part that it wants, or -1 once it wants none any more. The highest number is next;
    a rank that wants another one, or none, only helps to gather its weights. Parts: what is called by itself (BERT; LLaMA
    without its head, and the head). A model that is not sharded has none.
    """
    parts = [module for module in (model, *model.children()) if isinstance(module, FSDPModule)]

    def help_until(own: int) -> None:
        while (next_one := max(gather_objects(own, runtime))) != own:
            for module in parts[next_one].modules():
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()

    hooks = [part.register_forward_pre_hook(lambda *_, own=own: help_until(own), prepend=True)  # before FSDP's own
             for own, part in enumerate(parts)]
    try:
        yield
        if parts:
            help_until(-1)
    finally:
        for hook in hooks:
            hook.remove()
