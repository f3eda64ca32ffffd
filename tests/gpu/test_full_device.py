"""A device whose every multiprocessor spins: waits, signals and copies beside it still finish, or nobody would end it.

What spins is the product whose tiles wait for a chunk, one program with all the shared memory that it takes on each
multiprocessor: beside it a wait or a signal has only what it leaves.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from native_rank import C, Rank, at

pytest.importorskip("triton")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from kernel_cases import GatherCase

from odysseus_kernels.kernels.configs import TileConfig, shipped
from odysseus_kernels.kernels.launch import target_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not hasattr(C, "cuda"), reason="the extension was built without CUDA"),
    pytest.mark.timeout(60),
]

_ALLOWED_S = 5.0
_ELEMENTS = 2 << 20  # of 4 bytes, in each copy


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    made.streams = [torch.cuda.Stream(priority=-1) for _ in range(3)]  # as the transport's own
    yield made
    made.close()


class FullDevice:
    """A kernel that, once started, holds every multiprocessor until :meth:`release`."""

    def __init__(self) -> None:
        target = target_of(torch.device("cuda", 0))
        self._config: TileConfig = shipped("gather_matmul", target.architecture, torch.bfloat16)[0]
        # Each of two chunks has a tile for every program that the device has room for.
        rows = target.sms * self._config.per_sm * self._config.block_m
        self.case = GatherCase(world=2, rank=0, rows=rows, depth=256, widths=(self._config.block_n,), device="cuda")
        self.case.timeout_s = 4 * _ALLOWED_S
        self.case.deliver()
        self.case.multiply(self._config)  # compiles and loads, which may wait for the device
        self.case.words.fill_(self.case.wanted(-1))
        self._ready = torch.full((1,), self.case.wanted(1), dtype=torch.int32).pin_memory()
        self._stream, self._other = torch.cuda.Stream(), torch.cuda.Stream(priority=-1)
        torch.cuda.synchronize()

    @contextlib.contextmanager
    def spinning(self) -> Iterator[None]:
        """Starts it, and releases it at the end."""
        with torch.cuda.stream(self._stream):
            self.case.multiply(self._config)
        time.sleep(0.05)  # its local tiles are done
        try:
            yield
        finally:
            with torch.cuda.stream(self._other):
                self.case.words.copy_(self._ready, non_blocking=True)  # over the bus: no multiprocessor is needed
            torch.cuda.synchronize()

    def let_finish(self, rank: Rank) -> None:
        """Waits until all native streams are empty; they must be while this still spins."""
        deadline = time.monotonic() + _ALLOWED_S
        while not all(stream.query() for stream in rank.streams) and time.monotonic() < deadline:
            time.sleep(0.001)
        left = [index for index, stream in enumerate(rank.streams) if not stream.query()]
        assert not self._stream.query(), "the kernel was to hold the device all the while"
        assert not left, f"streams {left} made no progress within {_ALLOWED_S:g} s beside a full device"


def test_waits_and_signals_finish_beside_a_full_device(rank: Rank) -> None:
    full, program = FullDevice(), rank.program()
    words = [at(rank.words, index) for index in range(40)]
    program.wait(0, at(rank.epoch), words, [3] * 40, 1)  # before its signal: it has to be resident beside the kernel
    program.signal(1, at(rank.epoch), words, [3] * 40)
    program.record(0, 0)
    program.depend(2, 0)
    program.advance(2, at(rank.epoch))
    with full.spinning():
        rank.run(program)
        full.let_finish(rank)
    assert rank.control.error() is None and rank.epoch.item() == 1
    assert full.case.control.error() is None
    full.case.check()


@pytest.mark.parametrize("where", ("within the device", "over the bus"))
def test_copies_finish_beside_a_full_device(rank: Rank, where: str) -> None:
    full, program = FullDevice(), rank.program()
    numbers = torch.arange(_ELEMENTS, dtype=torch.int32)
    source = numbers.cuda() if where == "within the device" else numbers.pin_memory()
    target = torch.zeros(_ELEMENTS, dtype=torch.int32, device="cuda")
    program.copy(0, at(target), at(source), source.nbytes, over_link=True)
    program.signal(0, at(rank.epoch), [at(rank.words)], [1])
    program.wait(1, at(rank.epoch), [at(rank.words)], [1], 1)
    rank.run(program)  # whatever is loaded at the first use
    torch.cuda.synchronize()
    target.zero_()
    rank.epoch.fill_(1)
    torch.cuda.synchronize()
    with full.spinning():
        rank.run(program)
        full.let_finish(rank)
    assert torch.equal(target.cpu(), numbers)
    assert rank.control.error() is None


def test_small_kernels_leave_products_their_shared_memory() -> None:
    """One that came first to an idle multiprocessor must not have left it a larger cache than a product can bear."""
    kernels = C.cuda.small_kernels(0)
    assert len(kernels) == 5
    for registers, carve_out in kernels:
        assert registers <= 32
        assert carve_out == 100
