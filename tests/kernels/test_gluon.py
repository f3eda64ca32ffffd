"""The warp-specialized kernel's source on emulated hardware: numbers, the ring of stages, and what it waits for."""

from __future__ import annotations

import importlib
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


def run(case: GatherCase, config: TileConfig, programs: int, seed: int = 0) -> Waits:
    """Launches ``case`` as the operators do, up to the kernel, which is emulated."""
    waits = Waits(case)
    device = Device(programs, seed, waits)
    names = device.names()
    helpers = rebuilt({name: getattr(tiles, name) for name in ("visited_tile", "visited_chunk")}, names)
    own = ("gather_matmul_specialized_kernel", "load_stages", "multiply_stages", "described_weight")
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
    for programs, stages in ((1, 2), (3, 5)):
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
