"""Several processes as one: devices, seeds, and sums over ranks.

`torchrun --nproc_per_node=4` starts 4 processes: the ranks 0 to 3, each with one device and a copy of the whole model.
Without torchrun there is one rank, and nothing here communicates. The loss of every micro-batch is divided by the number of
windows (BERT) or answer tokens (LLaMA) in the whole global batch. So the sum of all ranks' gradients is the gradient of the
global batch's mean loss. They are summed once a step; a rank that had no micro-batch adds zeros. Used by both train scripts,
both readers, qa/reader.py and evaluate.py.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qa.cpu.malloc import keep_freed_memory
from qa.errors import UserError

CPU_TOKENS, GPU_TOKENS, LEAST_TOKENS = 4096, 32768, 512  # of a micro-batch
BUCKET_BYTES = 64 * 2**20  # a flat buffer of this size is as fast as a larger one, and costs less memory


@dataclass(frozen=True)
class Runtime:
    rank: int
    num_ranks: int
    device: torch.device
    began: float = field(default_factory=time.time, compare=False)  # the time of the start

    def __str__(self) -> str:
        return f"{self.num_ranks} × {self.device}"

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start(deterministic: bool = False) -> Runtime:
    """Join the process group that torchrun describes in the environment, if there is one; choose the device."""
    rank, num_ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    num_tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if num_tasks > 1 and "WORLD_SIZE" not in os.environ:
        raise UserError(f"srun started {num_tasks} tasks that know nothing of one another; expected one task for each machine: "
                        "srun --ntasks-per-node=1 torchrun ... (or, if each is to work alone, WORLD_SIZE=1 in the environment)")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for each shape, so for most micro-batches
    else:
        # oneDNN compiles a kernel for every shape of a matrix product and keeps 1,024 of them. Our lengths change from batch
        # to batch, so that would be gigabytes. oneDNN reads this variable at its first product.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
        keep_freed_memory()
        # The cores that this job may use: on a cluster fewer than the machine has. torchrun gives every process one thread.
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
        if num_ranks > 1 or torch.get_num_threads() > num_cores:
            torch.set_num_threads(max(1, num_cores // num_local))
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    if num_ranks > 1:
        # An hour: rank 0 may write, or search, while the others wait for it.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=num_ranks,
                                timeout=timedelta(hours=1), device_id=device if device.type == "cuda" else None)
    return Runtime(rank, num_ranks, device)


def choose_micro_tokens(micro_tokens: int | None, device: torch.device, model: nn.Module | None = None,
                        half_precision: bool = True, checkpointing: bool = False) -> int:
    """`--micro-tokens` if it was given, else what suits a CPU's caches, or what fits a GPU's memory.

    model: to be trained; else it only reads. A function of the card and the model, not of what is free: a run that is resumed
    must have the same micro-batches. docs/reproduce.md counts the bytes.
    """
    if micro_tokens or device.type != "cuda":
        return micro_tokens or CPU_TOKENS
    if model is None:
        return GPU_TOKENS
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    here = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]  # --shard: a part
    fixed = sum(p.numel() * (18 if p.requires_grad else p.element_size()) for p in here)
    of_a_token = (2 * hidden * layers + 45 * hidden) if checkpointing else 45 * hidden * layers
    room = 0.8 * torch.cuda.get_device_properties(device).total_memory - fixed
    fitting = int(room / of_a_token) // (1 if half_precision else 2)
    return min(GPU_TOKENS, 2 ** (max(fitting, LEAST_TOKENS).bit_length() - 1))


def finish(runtime: Runtime) -> None:
    if runtime.num_ranks > 1 and dist.is_initialized():
        dist.destroy_process_group()


def reseed(seed: int, step: int, rank: int) -> None:
    """Seed torch's generators by a function of (seed, step, rank), so that no generator state needs saving.

    The three are mixed as in splitmix64, because neighbouring seeds of a Mersenne twister give similar random numbers.
    """
    mixed = 0
    for number in (seed, step, rank):
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    torch.manual_seed(mixed)  # CPU and every GPU


def sum_over_ranks(tensor: Tensor, runtime: Runtime) -> Tensor:
    """The elementwise sum of all ranks' tensors, in place, on every rank."""
    if runtime.num_ranks > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: list[Tensor], runtime: Runtime) -> None:
    """Sum the gradients over all ranks, in place. A missing gradient becomes zero.

    What happens is `for parameter in parameters: dist.all_reduce(parameter.grad)`. Fewer, larger sums are faster, so
    neighbouring gradients are copied into a flat buffer, summed there, and copied back. Those of a sharded model are summed by
    the backward pass already (sharding.py).
    """
    parameters = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if runtime.num_ranks == 1:
        return
    for bucket in _buckets([parameter.grad for parameter in parameters]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, summed in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def gather_objects(value: object, runtime: Runtime) -> list:
    """A list of every rank's value, in the order of the ranks, on every rank."""
    values = [value] * runtime.num_ranks
    if runtime.num_ranks > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(runtime: Runtime) -> None:
    if runtime.num_ranks > 1:
        dist.barrier()


@contextlib.contextmanager
def first_of_each_node(runtime: Runtime) -> Iterator[None]:
    """One rank of each node does what is inside before the others: it asks the hub, and they find the files in its cache."""
    is_first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not is_first:
        barrier(runtime)
    try:
        yield
    finally:
        if is_first:
            barrier(runtime)


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    """Groups of neighbouring gradients with at most BUCKET_BYTES in all; a larger gradient is a group of its own."""
    buckets: list[list[Tensor]] = []
    size = BUCKET_BYTES
    for gradient in gradients:
        num_bytes = gradient.numel() * gradient.element_size()
        if size + num_bytes > BUCKET_BYTES:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += num_bytes
    return buckets
