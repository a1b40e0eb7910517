"""Seeds, and sums over ranks: alone in this process, and with two real ones over gloo."""

from __future__ import annotations

import itertools
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qa.errors import UserError
from qa.training import distributed
from qa.training.distributed import (
    Runtime,
    choose_micro_tokens,
    gather_objects,
    reseed,
    sum_gradients,
    sum_over_ranks,
)

ROOT = Path(__file__).resolve().parents[2]
ALONE = Runtime(0, 1, torch.device("cpu"))


@pytest.fixture
def launcher(monkeypatch):
    """launcher(name=value): the environment of a process, of what torchrun and SLURM may set in it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    num_threads = torch.get_num_threads()
    yield lambda **values: [monkeypatch.setenv(name, value) for name, value in values.items()]
    torch.set_num_threads(num_threads)


def test_slurm_tasks_that_torchrun_did_not_start_are_refused(launcher):
    launcher(SLURM_STEP_NUM_TASKS="1")
    assert distributed.start().num_ranks == 1  # srun torchrun, or srun python
    launcher(SLURM_STEP_NUM_TASKS="4")
    with pytest.raises(UserError, match="^srun started 4 tasks .* torchrun"):
        distributed.start()
    launcher(WORLD_SIZE="1")
    assert distributed.start().num_ranks == 1


@pytest.mark.parametrize("allotted, before, ranks, after", [(2, 8, 1, 2), (8, 3, 1, 3), (8, 1, 3, 2), (1, 1, 3, 1)])
def test_threads_are_no_more_than_the_cores_that_the_job_may_use(allotted, before, ranks, after, launcher, monkeypatch):
    """One process lowers its threads, if need be; several share the cores."""
    launcher(RANK="0", WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(allotted)))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *_, **__: None)
    torch.set_num_threads(before)
    distributed.start()
    assert torch.get_num_threads() == after


def draw(seed: int, step: int, rank: int, count: int = 4) -> torch.Tensor:
    reseed(seed, step, rank)
    return torch.rand(count, dtype=torch.float64)


def test_streams_of_neighbouring_seeds_steps_and_ranks_are_distinct():
    """Also where the numbers are the same in another order, or have the same sum."""
    first = {}
    for place in itertools.product([0, 1, 2, 3, 42, 2**31, 2**40], range(12), range(5)):
        stream = tuple(draw(*place).tolist())
        assert stream not in first, (place, first[stream])
        first[stream] = place
    assert len({torch.manual_seed(0).initial_seed(), *first.values()}) == len(first) + 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbouring_streams_are_not_correlated(axis):
    num_draws = 4096
    streams = []
    for number in range(12):
        place = [5, 5, 5]
        place[axis] = number
        streams.append(draw(*place, num_draws) - 0.5)
    for one, other in itertools.combinations(streams, 2):
        assert abs((one * other).mean() * 12) < 4.5 / math.sqrt(num_draws)
    seen = torch.stack([stream[0] for stream in streams])  # nor are first draws alike
    assert seen.std() > 0.15


def test_reseeding_repeats_the_stream_whatever_was_drawn_before():
    expected = draw(3, 7, 1)
    torch.rand(1000)
    assert torch.equal(draw(3, 7, 1), expected)
    torch.manual_seed(0)
    assert torch.equal(draw(3, 7, 1), expected)


@pytest.mark.parametrize("bound", [1, 100, 1000, 10**9])
def test_buckets_hold_every_gradient_once_in_order_within_the_bound(bound, monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", bound)
    gradients = [torch.zeros(shape) for shape in [(10,), (3, 5), (1,), (), (400,), (2, 2), (24,), (25,), (26,)]]
    buckets = distributed._buckets(gradients)
    assert [id(gradient) for bucket in buckets for gradient in bucket] == [id(gradient) for gradient in gradients]
    sizes = [sum(gradient.numel() * 4 for gradient in bucket) for bucket in buckets]
    assert all(size <= bound or len(bucket) == 1 for size, bucket in zip(sizes, buckets, strict=True))
    for bucket, following in zip(buckets, buckets[1:], strict=False):  # none could take the next one in
        assert sum(gradient.numel() * 4 for gradient in bucket) + following[0].numel() * 4 > bound


def test_one_rank_communicates_nothing_and_a_missing_gradient_becomes_zero():
    parameters = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    parameters[0].grad = torch.tensor([1.0, 2.0, 3.0])
    sum_gradients(parameters, ALONE)
    assert parameters[0].grad.tolist() == [1, 2, 3] and torch.equal(parameters[1].grad, torch.zeros(2, 2))
    tensor = torch.ones(2)
    assert sum_over_ranks(tensor, ALONE) is tensor and gather_objects("x", ALONE) == ["x"] and ALONE.is_main


def test_start_without_torchrun_is_one_rank(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.start() == ALONE
    distributed.finish(ALONE)


def test_a_gpu_multiplies_fp32_in_fp32_and_plans_no_attention_per_shape(monkeypatch):
    """Not in TF32, whose 10 bits of mantissa are not fp32's 23. Both settings belong to the process; no GPU is needed."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert distributed.start() == Runtime(0, 1, torch.device("cuda", 0))
        assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
        torch.set_float32_matmul_precision("highest")


def test_micro_tokens_default_depends_on_the_device_and_a_given_number_stays():
    assert choose_micro_tokens(0, torch.device("cpu")) == 4096
    assert choose_micro_tokens(0, torch.device("cuda")) == 32768
    assert choose_micro_tokens(7, torch.device("cpu")) == choose_micro_tokens(7, torch.device("cuda")) == 7


@pytest.mark.parametrize("gigabytes, hidden, layers, parameters, more, expected", [
    (80, 768, 12, 109e6, {}, 32768),  # 415 kB a token: 145,000 would fit
    (16, 768, 12, 109e6, {}, 16384),  # (12.8 - 2.0) GB / 415 kB = 26,000
    (16, 768, 12, 109e6, {"half_precision": False}, 8192),
    (24, 1024, 24, 335e6, {}, 8192),  # (19.2 - 6.0) GB / 1.1 MB = 11,900
    (16, 1024, 24, 335e6, {"checkpointing": True}, 32768),
    (4, 1024, 24, 335e6, {}, 512)])  # not even the weights fit
def test_micro_tokens_for_training_fit_the_card(gigabytes, hidden, layers, parameters, more, expected, monkeypatch):
    """On the meta device, which has no memory."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gigabytes * 1e9))
    model = torch.nn.Linear(int(parameters), 1, bias=False, device="meta")
    model.config = SimpleNamespace(hidden_size=hidden, num_hidden_layers=layers)
    assert choose_micro_tokens(None, torch.device("cuda"), model, **more) == expected
    model.weight.requires_grad_(False)  # LLaMA: 4 bytes of each frozen weight
    assert choose_micro_tokens(None, torch.device("cuda"), model, **more) >= expected


PROGRAM = """
import os
import torch
from qa.training import distributed, precision

distributed.BUCKET_BYTES = 120  # several buckets, and a gradient larger than one
runtime = distributed.start()
rank = int(os.environ["RANK"])
assert (runtime.rank, runtime.num_ranks, runtime.is_main) == (rank, 2, rank == 0)

def gradients(rank):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(shape, generator=generator) for shape in [(3, 4), (5,), (), (40,), (2, 2), (7,)]]

parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients(0)]
for number, (parameter, gradient) in enumerate(zip(parameters, gradients(rank))):
    if (rank, number) not in ((0, 1), (1, 1), (1, 3)):  # number 1 on no rank, number 3 on one only
        parameter.grad = gradient.t().contiguous().t() if gradient.ndim == 2 else gradient
distributed.sum_gradients(parameters, runtime)
for number, (parameter, one, other) in enumerate(zip(parameters, gradients(0), gradients(1))):
    expected = torch.zeros_like(one) if number == 1 else one if number == 3 else one + other
    assert torch.equal(parameter.grad, expected), number

total = torch.tensor([float(rank), 10.0])
assert distributed.sum_over_ranks(total, runtime) is total and total.tolist() == [1.0, 20.0]
assert distributed.gather_objects({"rank": rank}, runtime) == [{"rank": 0}, {"rank": 1}]
for fast_rank, expected in ((0, "bf16"), (1, "fp32")):  # bf16 is fast on one rank only: rank 0 chooses for both
    seconds = (0.02, 0.01) if rank == fast_rank else (0.01, 0.02)
    precision.time_products = lambda *shape: seconds
    chosen = precision.choose_precision("auto", runtime, 384, 1536)
    assert chosen.name == expected and chosen.reason.startswith(expected + ": a product [64, 384]"), chosen
distributed.barrier(runtime)
distributed.finish(runtime)
print("rank", rank, "agrees")
"""


def test_two_processes_sum_to_the_sum_and_take_the_first_ones_precision():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    processes = []
    for rank in (0, 1):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                                    "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                                    "CUDA_VISIBLE_DEVICES": ""}
        processes.append(subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0 and f"rank {rank} agrees" in output, output
