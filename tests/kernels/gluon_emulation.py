"""Runs a warp-specialized Gluon kernel's own source as Python, a thread for each kind of warps.

Gluon has no interpreter.  Here the names that such a kernel takes from Gluon stand for plain objects: shared memory is
tensors, a barrier counts arrivals and bytes by phases as mbarrier does, and the copy engine is a thread of its own that
takes its time.  What is asynchronous on the device is so here, and punished: a stage holds NaN from the moment a copy
into it is issued until it ends, and a product reads its operands as late as it may, when it is waited for.  A wait that
does not end raises.
"""

from __future__ import annotations

import queue
import random
import threading
import time
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_PATIENCE_S = 20.0


class Type:
    """A dtype with the names that Gluon gives to its properties."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.torch, self.primitive_bitwidth = dtype, dtype.itemsize * 8
        self.element_ty = self


class Pointer:
    """The address of an element, or of a block of elements, in ``storage``."""

    def __init__(self, storage: Tensor, at: int | Tensor) -> None:
        self.storage, self.at, self.dtype = storage, at, Type(storage.dtype)

    @classmethod
    def to(cls, tensor: Tensor) -> Pointer:
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        return cls(flat, int(tensor.storage_offset()))

    def __add__(self, distance: int | Tensor) -> Pointer:
        return Pointer(self.storage, self.at + distance)

    def __sub__(self, distance: int) -> Pointer:
        return Pointer(self.storage, self.at - distance)


class Block(torch.Tensor):
    """A tensor whose ``to`` takes the types of :class:`Type`."""

    def to(self, kind: Any, *rest: Any) -> Tensor:  # type: ignore[override]
        return super().to(kind.torch if isinstance(kind, Type) else kind, *rest)


class Barrier:
    """mbarrier: a phase ends when ``count`` have arrived and all bytes that were announced are there."""

    def __init__(self, failures: list[BaseException]) -> None:
        self.count = self.missing = self.bytes = self.phase = 0
        self.changed = threading.Condition()
        self._failures = failures  # of any thread of the device: then nothing is worth waiting for

    def update(self, arrivals: int = 0, announced: int = 0) -> None:
        with self.changed:
            assert self.count > 0, "a barrier is used before it is initialised"
            self.missing -= arrivals
            self.bytes += announced
            assert self.missing >= 0, "more arrivals than a phase takes"
            if self.missing == 0 and self.bytes == 0:
                self.phase, self.missing = self.phase + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        with self.changed:
            while self.phase % 2 == parity:
                self.changed.wait(0.05)
                assert not self._failures, "another thread failed"
                assert time.monotonic() < deadline, f"a phase of parity {parity} does not end"


class Shared:
    """Shared memory [slots, ...]: NaN until something is loaded."""

    def __init__(self, kind: Type, shape: list[int], failures: list[BaseException]) -> None:
        self.dtype = kind
        self.slots: list[Any] = [Barrier(failures) for _ in range(shape[0])]
        if kind.torch != torch.int64:
            self.slots = [torch.full(shape[1:], torch.nan, dtype=kind.torch) for _ in range(shape[0])]

    def index(self, slot: int) -> Any:
        return self.slots[slot]


class Descriptor:
    """A matrix [rows, columns] of lines ``stride`` apart, read in blocks; zero outside of it."""

    def __init__(self, data: Pointer, shape: list[int], strides: list[int], block: list[int]) -> None:
        assert isinstance(data.at, int)
        self.matrix = data.storage.as_strided(shape, strides, data.at)
        self.block = block

    def read(self, row: int, column: int) -> Tensor:
        block = torch.zeros(self.block, dtype=self.matrix.dtype)
        inside = self.matrix[row : row + self.block[0], column : column + self.block[1]]
        block[: inside.shape[0], : inside.shape[1]] = inside
        return block


class Accumulator:
    """Sums of products, of which the last ones have not read their operands yet."""

    def __init__(self, done: Tensor, pending: tuple[tuple[Tensor, Tensor], ...]) -> None:
        self.done, self.pending = done, pending


def _mma(x: Tensor, w: Tensor, acc: Tensor | Accumulator, *, is_async: bool) -> Accumulator:
    before = acc if isinstance(acc, Accumulator) else Accumulator(acc, ())
    assert is_async
    return Accumulator(before.done, (*before.pending, (x, w)))


def _mma_wait(most: int, deps: list[Tensor | Accumulator]) -> Tensor | Accumulator:
    (acc,) = deps
    if not isinstance(acc, Accumulator):
        return acc
    ready = len(acc.pending) - most
    done = acc.done
    for x, w in acc.pending[: max(0, ready)]:
        done = done + x.float() @ w.float()
    return Accumulator(done, acc.pending[max(0, ready) :]) if most else done.as_subclass(Block)


class Device:
    """One program at a time: its kinds of warps as threads, and a copy engine."""

    def __init__(self, programs: int, seed: int, await_word: Callable[..., bool]) -> None:
        self.programs, self._random, self._await = programs, random.Random(seed), await_word
        self._program = 0
        self._copies: queue.Queue[tuple[Descriptor, list[int], Barrier, Tensor] | None] = queue.Queue()
        self.failures: list[BaseException] = []

    def _copy(self, source: Descriptor, at: list[int], barrier: Barrier, target: Tensor) -> None:
        target.fill_(torch.nan)
        self._copies.put((source, at, barrier, target))

    def _copy_all(self) -> None:
        waiting: list[Any] = []
        open_ = True
        while open_ or waiting:
            while open_ and (not waiting or not self._copies.empty()):
                job = self._copies.get()
                open_ = job is not None
                if job is not None:
                    waiting.append(job)
            if waiting:  # in any order
                source, at, barrier, target = waiting.pop(self._random.randrange(len(waiting)))
                time.sleep(self._random.choice((0.0, 0.0, 0.0005)))
                block = source.read(*at)
                target.copy_(block)
                try:
                    barrier.update(announced=-block.numel() * block.element_size())
                except AssertionError as error:
                    self.failures.append(error)

    def _specialize(
        self, kinds: Iterable[tuple[Callable[..., None], tuple[Any, ...]]], warps: Any, registers: Any
    ) -> None:
        kinds = list(kinds)
        assert len(warps) == len(registers) == len(kinds) - 1

        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except Exception as error:  # noqa: BLE001 - raised by the thread that runs the device
                self.failures.append(error)

        threads = [threading.Thread(target=run, args=kind, daemon=True) for kind in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(2 * _PATIENCE_S)
            assert not thread.is_alive(), "a kind of warps does not end"

    def _load(self, at: Pointer, mask: Tensor | None = None, other: float = 0.0) -> Any:
        if mask is None:
            return int(at.storage[at.at])
        assert isinstance(at.at, Tensor)
        found = torch.full(at.at.shape, other, dtype=at.storage.dtype)
        found[mask] = at.storage[at.at[mask]]
        return found.as_subclass(Block)

    @staticmethod
    def _store(at: Pointer, value: Tensor, mask: Tensor) -> None:
        assert isinstance(at.at, Tensor)
        at.storage[at.at[mask]] = value[mask].as_subclass(Tensor)

    def names(self) -> dict[str, Any]:
        """What the kernel's globals become."""
        gl = types.SimpleNamespace(
            cdiv=lambda a, b: -(-a // b),
            minimum=min,
            maximum=max,
            where=lambda condition, a, b: a if condition else b,
            program_id=lambda axis: self._program,
            num_programs=lambda axis: self.programs,
            static_range=range,
            float32=Type(torch.float32),
            int64=Type(torch.int64),  # of offsets; in shared memory, of barriers
            zeros=lambda shape, kind, layout: torch.zeros(shape, dtype=kind.torch),
            arange=lambda first, end, layout: torch.arange(first, end).as_subclass(Block),
            load=self._load,
            store=self._store,
            convert_layout=lambda value, layout: value,
            allocate_shared_memory=lambda kind, shape, layout: Shared(kind, shape, self.failures),
            warp_specialize=self._specialize,
            SliceLayout=lambda axis, layout: None,
            NVMMADistributedLayout=lambda **arguments: None,
            NVMMASharedLayout=types.SimpleNamespace(get_default_for=lambda shape, kind: None),
        )

        def initialise(barrier: Barrier, count: int) -> None:
            barrier.count = barrier.missing = count

        return {
            "gl": gl,
            "tl": gl,
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: None,
                init=initialise,
                wait=lambda barrier, parity: barrier.wait(parity),
                expect=lambda barrier, size: barrier.update(arrivals=1, announced=size),
                arrive=lambda barrier, count, pred=True: barrier.update(arrivals=count) if pred else None,
            ),
            "tma": types.SimpleNamespace(
                make_tensor_descriptor=lambda data, shape, strides, block, layout: Descriptor(
                    data, shape, strides, block
                ),
                async_copy_global_to_shared=self._copy,
            ),
            "fence_async_shared": lambda: None,
            "warpgroup_mma": _mma,
            "warpgroup_mma_wait": _mma_wait,
            "stored_layout": lambda rows, columns, bits: None,
            "await_word": self._await,
        }

    def run(self, kernel: Callable[..., None], arguments: dict[str, Any]) -> None:
        """All programs, one after another; raises what went wrong in any thread."""
        for program in range(self.programs):
            self._program = program
            engine = threading.Thread(target=self._copy_all, daemon=True)
            engine.start()
            try:
                kernel(**arguments)
            finally:
                self._copies.put(None)
                engine.join(_PATIENCE_S)
            if self.failures:
                raise self.failures[0]


def rebuilt(functions: dict[str, Any], names: dict[str, Any]) -> dict[str, Callable[..., Any]]:
    """The Python functions under jitted ones, which see ``names`` and each other instead of their modules' globals."""
    found: dict[str, Callable[..., Any]] = {}
    for name, jitted in functions.items():
        source = jitted.fn
        seen = {**source.__globals__, **functions, **names}
        found[name] = types.FunctionType(source.__code__, seen, name, source.__defaults__)
    for function in found.values():
        function.__globals__.update(found)  # type: ignore[attr-defined]
    return found
