"""Sums of the transport of devices: what they read and write, and which of them run beside products."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from simulated_group import CONFIG, WIDTH, Group

from odysseus_kernels.comm.schedules.device import device_schedule, tile_schedule
from odysseus_kernels.comm.schedules.streams import sums_beside_products
from odysseus_kernels.comm.transport import Call

pytestmark = pytest.mark.without_ranks


@pytest.mark.parametrize("world", (2, 3, 8, 16))
@pytest.mark.parametrize("pieces", (1, 3))
def test_each_received_element_is_read_once_and_each_sum_written_once(world: int, pieces: int) -> None:
    """One pass over all sources: with accumulating passes the output would be read and written N - 1 times."""
    group = Group(world)
    batch, rows = 2, 6
    scatters, check = group.scatter_part(batch, rows, torch.float32)
    group.enqueue(None, scatters, dataclasses.replace(CONFIG, chunks_per_rank=pieces))
    group.checks.append(check)
    group.run(0)
    chunk = batch * rows * WIDTH * torch.float32.itemsize
    for device in group.machine.devices:
        assert sum(one.elements * torch.float32.itemsize for one in device.sums) == chunk, "written"
        assert sum(one.sources * one.elements * torch.float32.itemsize for one in device.sums) == world * chunk, "read"
        assert len(device.sums) == pieces


@pytest.mark.parametrize(("link", "held"), ((0.0, 4), (450e9, 8)))
def test_all_sums_but_the_last_leave_the_device_to_products(link: float, held: int) -> None:
    group = Group(4)
    for device in group.machine.devices:
        device.link_bytes_per_s = link
    scatters, check = group.scatter_part(1, 6)
    group.enqueue(None, scatters, dataclasses.replace(CONFIG, chunks_per_rank=3))
    group.checks.append(check)
    group.run(0)
    for device in group.machine.devices:
        assert [one.beside for one in device.sums] == [held, held, 0]


def test_sums_of_whole_tensors_have_the_device_for_themselves() -> None:
    """What is scattered was multiplied before: there is nothing to leave room for."""
    world = 4
    group = Group(world)
    scatters, _ = group.scatter_part(1, 6)
    config = dataclasses.replace(CONFIG, chunks_per_rank=3)
    for rank, transport in enumerate(group.transports):
        full = group.random(world, 1, 6, WIDTH)
        transport.reduce_scatter(Call("operator", "forward", config, None, scatters[rank]), full)
    group.run(0)
    for device in group.machine.devices:
        assert [one.beside for one in device.sums] == [0, 0, 0]


@pytest.mark.parametrize("world", (2, 5, 16))
def test_which_sums_run_beside_products(world: int) -> None:
    for rank in range(world):
        scatter = device_schedule("scatter", world, rank, scatter_pieces=4)
        assert sums_beside_products(scatter.steps) == {0, 1, 2}, "the last one comes after all products"
        both = device_schedule("gather+scatter", world, rank, gather_pieces=2, scatter_pieces=4)
        assert sums_beside_products(both.steps) == {0, 1, 2, 3}, "chunks are multiplied after them"
        single = device_schedule("scatter", world, rank)
        assert sums_beside_products(single.steps) == set()
        assert sums_beside_products(tile_schedule("scatter", world, rank).steps) == set(), "one kernel made all parts"
        assert sums_beside_products(device_schedule("gather", world, rank).steps) == set()
