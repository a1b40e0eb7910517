"""What a rank holds of a tensor that is cut, asked of rank 1 of several without the others: torch's "fake" group sends nothing.

One worked case: of a matrix of 4 rows, rank 1 of 2 has the rows 2 and 3.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qa.llama.base_shards import _read_rows
from qa.training.distributed import Runtime
from qa.training.sharding import cut_like, shard


@pytest.fixture
def ranks():
    """ranks(rank, of): from now on this process is that rank; returns its Runtime."""
    def become(rank: int, of: int) -> Runtime:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=of)
        return Runtime(rank, of, torch.device("cpu"))

    yield become
    dist.destroy_process_group()


def test_worked_case(ranks):
    ranks(1, 2)
    layer = torch.nn.Linear(2, 4, bias=False)
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    whole = torch.arange(8.0).view(4, 2)
    assert cut_like(layer.weight, whole).to_local().tolist() == [[4, 5], [6, 7]]
    assert cut_like(layer.weight, torch.tensor(7.0)) == 7  # AdamW's step
    assert cut_like(torch.empty(4, 2), whole) is whole


@pytest.mark.parametrize("rank, rows", [(0, [0, 1, 2]), (1, [3, 4, 5]), (2, [6, 7, 8]), (3, [9]), (4, [])])
def test_a_rank_reads_the_rows_that_fully_shard_gives_it(rank, rows, ranks, tmp_path):
    """10 rows over 4 ranks; and 3 rows over 5, of which the last two have none."""
    runtime = ranks(rank, 4) if rank < 4 else ranks(4, 5)
    whole = torch.arange(20.0).view(10, 2) if rank < 4 else torch.ones(3, 2)
    save_file({"w": whole}, tmp_path / "m.safetensors")
    layer = torch.nn.Linear(2, len(whole), bias=False, device="meta")
    shard(layer, runtime)
    layer.to_empty(device="cpu")
    with torch.no_grad():
        _read_rows(layer.weight, tmp_path / "m.safetensors", "w", runtime)
    assert torch.equal(layer.weight.to_local(), whole[rows])


def test_a_weight_of_another_shape_is_no_part_of_the_model(ranks, tmp_path):
    save_file({"w": torch.ones(1, 2)}, tmp_path / "m.safetensors")  # could be broadcast
    layer, runtime = torch.nn.Linear(2, 4, bias=False, device="meta"), ranks(0, 2)
    shard(layer, runtime)
    with pytest.raises(ValueError, match=r"w has the shape \[1, 2\], expected \[4, 2\]"):
        _read_rows(layer.to_empty(device="cpu").weight, tmp_path / "m.safetensors", "w", runtime)
