"""The warp-specialized kernel's source on emulated hardware: numbers, the ring of stages, and what it waits for."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("triton.experimental.gluon")

from gluon_emulation import Device, Pointer, rebuilt
from kernel_cases import GatherCase, visits

from odysseus_kernels.kernels import launch, tiles
from odysseus_kernels.kernels.configs import Schedule, TileConfig

pytestmark = [pytest.mark.without_ranks, pytest.mark.timeout(120)]

# The module: the package of that name holds the function too.
module = importlib.import_module("odysseus_kernels.kernels.gather_matmul")
specialized = importlib.import_module("odysseus_kernels.kernels.warp_specialized")

_SCHEDULES: tuple[Schedule, ...] = ("cooperative", "pingpong")


def _config(schedule: Schedule, stages: int = 3) -> TileConfig:
    return TileConfig(32, 16, 16, warps=4, stages=stages, group=2, descriptors=True, schedule=schedule)


class Waits:
    """Stands in for ``await_word``: what was waited for, in order; chunks arrive when they are."""

    def __init__(self, case: GatherCase) -> None:
        self.case, self.tags = case, list[int]()
        self.order = visits(case.world, case.rank, case.order)

    def __call__(self, word: Pointer, wanted: int, *rest: Any) -> bool:
        _, _, _, tag, *how = rest
        assert how == [True, False, True]  # through descriptors, not interpreted, one warp by itself
        slot, piece = divmod(tag - self.case.tag, self.case.pieces)
        assert wanted == self.case.epoch * 256 + piece + 1 and isinstance(word.at, int)
        assert word.at == self.case.words.storage_offset() + slot and self.case.gathered is not None
        self.tags.append(tag)
        end = self.case.rows * (piece + 1) // self.case.pieces
        self.case.gathered[slot, :end] = self.case.chunks[self.order[slot], :end]
        return True


def run(
    case: GatherCase,
    config: TileConfig,
    programs: int,
    seed: int = 0,
    change: Callable[[dict[str, Any]], None] = lambda names: None,
) -> Waits:
    """Launches ``case`` as the operators do, up to the kernel, which is emulated; ``change`` breaks what it is of."""
    waits = Waits(case)
    device = Device(programs, seed, waits)
    names = device.names()
    change(names)
    helpers = rebuilt({name: getattr(tiles, name) for name in ("visited_tile", "visited_chunk")}, names)
    own = (
        "gather_matmul_specialized_kernel",
        "load_stages",
        "multiply_stages",
        "described_weight",
        "tiles_across",
    )
    kernels = rebuilt({name: getattr(specialized, name) for name in own}, names | helpers)

    def emulate(kernel: Any, arguments: dict[str, Any], chosen: TileConfig, count: int, like: Any) -> None:
        assert kernel is specialized.gather_matmul_specialized_kernel and chosen == config

        def address(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(address, value))
            return Pointer.to(value) if isinstance(value, torch.Tensor) else value

        sizes = {"BLOCK_M": chosen.block_m, "BLOCK_N": chosen.block_n, "BLOCK_K": chosen.block_k}
        how = {"GROUP": chosen.group, "STAGES": chosen.stages, "PARTS": chosen.parts}
        given = {name: address(value) for name, value in arguments.items()}
        device.run(kernels["gather_matmul_specialized_kernel"], given | sizes | how)

    with (
        mock.patch.object(launch, "interpreted", return_value=True),  # operands lie on the CPU
        mock.patch.object(module, "choose", return_value=config),
        mock.patch.object(module, "launch", emulate),
    ):
        case.multiply(config)
    return waits


@pytest.mark.parametrize("schedule", _SCHEDULES)
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"rows": 70, "depth": 90, "widths": (40, 24, 16), "pieces": 4, "world": 4, "rank": 2},
        {"rows": 40, "depth": 16, "widths": (56,), "deep": True, "order": "sequence", "bias": False},
        {"rows": 33, "depth": 48, "dtype": torch.float16, "out_dtype": torch.float32, "padding": 8},
        {"world": 1, "rank": 0, "rows": 100, "depth": 130, "widths": (8, 20)},
    ],
    ids=("small", "three", "deep", "exact-out", "one-rank"),
)
def test_numbers(schedule: Schedule, layout: dict[str, Any]) -> None:
    # One program meets every tile; of seven, some have a single one, so that a group has none.
    for programs, stages in ((1, 2), (3, 5), (7, 3)):
        case = GatherCase(**layout)
        run(case, _config(schedule, stages), programs, seed=stages)
        case.check()


@pytest.mark.parametrize("schedule", _SCHEDULES)
def test_each_chunk_and_piece_is_waited_for_once_and_the_local_one_never(schedule: Schedule) -> None:
    case = GatherCase(world=3, rows=64, pieces=2, widths=(32,))
    case.tag = 100
    # One program meets all tiles: two pieces of each of two chunks, in the order of visiting.
    assert run(case, _config(schedule), programs=1).tags == [100, 101, 102, 103]
    case.check()


def _released_early(names: dict[str, Any]) -> None:
    """A stage is given back while a product in flight still reads it."""
    wait = names["warpgroup_mma_wait"]
    names["warpgroup_mma_wait"] = lambda most, deps: wait(most + most, deps)


def _loaded_early(names: dict[str, Any]) -> None:
    """The loading warp does not wait until a stage is empty."""
    mbarrier = names["mbarrier"]
    wait = mbarrier.wait
    mbarrier.wait = lambda barrier, parity: wait(barrier, parity) if barrier.count == 1 else None


def _read_out_of_turn(names: dict[str, Any]) -> None:
    """Groups that take turns do not wait for each other."""
    gl, mbarrier = names["gl"], names["mbarrier"]
    allocate, wait = gl.allocate_shared_memory, mbarrier.wait
    turns: list[Any] = []

    def allocated(kind: Any, shape: list[int], layout: Any) -> Any:
        made = allocate(kind, shape, layout)
        turns.extend(made.slots if shape == [2, 1] else [])
        return made

    gl.allocate_shared_memory = allocated
    mbarrier.wait = lambda barrier, parity: None if barrier in turns else wait(barrier, parity)


@pytest.mark.parametrize(
    ("schedule", "change"),
    [
        ("cooperative", _released_early),
        ("pingpong", _released_early),
        ("cooperative", _loaded_early),
        ("pingpong", _read_out_of_turn),
    ],
)
def test_broken_rings_are_caught(schedule: Schedule, change: Callable[[dict[str, Any]], None]) -> None:
    case = GatherCase(rows=64, depth=96, widths=(32,))
    with pytest.raises(AssertionError):  # noqa: PT012
        run(case, _config(schedule), programs=1, change=change)
        case.check()


def test_results_are_stored_from_where_they_were_computed() -> None:
    """The layout of stores holds every element once, and in the warp that has it in wgmma's layout."""
    for rows, columns in ((64, 256), (128, 128), (64, 128)):
        for bits in (16, 32):
            layout = specialized.stored_layout.fn(rows, columns, bits)
            found = {(0, 0): 0}  # place -> warp
            for bases, step in ((layout.reg_bases, 0), (layout.lane_bases, 0), (layout.warp_bases, 1)):
                for index, (row, column) in enumerate(bases):
                    found |= {(r ^ row, c ^ column): warp + (step << index) for (r, c), warp in found.items()}
            assert (
                len(found)
                == rows * columns
                == 2 ** sum(map(len, (layout.reg_bases, layout.lane_bases, layout.warp_bases)))
            )
            assert all(warp == row % 64 // 16 for (row, _), warp in found.items())
            # The first registers of a thread are 16 bytes that lie one after another.
            assert layout.reg_bases[: (128 // bits).bit_length() - 1] == [
                [0, 1 << i] for i in range((128 // bits).bit_length() - 1)
            ]
