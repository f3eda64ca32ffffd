"""One row's work on a GPU whose peers are emulated: the tensors, everything that is timed, and what must come out.

The rank under test runs the operators as they are, on a transport whose peers are silent
(``odysseus_kernels/testing/virtual_devices.py``): their shards lie ready behind the emulated link, and so does what
they would send for this rank to add.  The latter is the same row over and over, because only the transport knows which
rows a part of its window holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.device.cases import EmulatedCase
from odysseus_kernels import ops
from odysseus_kernels.comm.device.cuda import CudaDevice
from odysseus_kernels.comm.device.lowering import WINDOWS
from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.groups import use_transport
from odysseus_kernels.comm.schedules.device import RECEIVE
from odysseus_kernels.comm.schedules.steps import SHARD
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.testing.compare import relative_error, rounding_tolerance
from odysseus_kernels.testing.virtual_devices import SilentPeers, link_of

__all__ = ["MODES", "PIECES", "EmulatedWorkload", "Emulation", "emulate", "fake_group"]

MODES = {"serial": "unfused", "fused": "fused", "tiles": "tiles"}
"""Variants that run the operator, and the mode each runs it in; beside them are ``"gemm"`` and ``"link"``."""

PIECES = (1, 2, 4, 8)
"""Pieces of a chunk that are tried beside the transport's own choice, as ``mode="auto"`` tries them."""

_SAMPLES = 256
_SEARCHED_BYTES = 64 << 20
_RECEIVED_SCALE = 0.25
_TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True)
class Emulation:
    """A rank with silent peers behind an emulated link; operators called with ``group`` use ``transport``."""

    transport: SymmetricDeviceTransport
    memory: SilentPeers
    group: dist.ProcessGroup
    link: str


@contextlib.contextmanager
def fake_group(world: int) -> Iterator[dist.ProcessGroup]:
    """A process group of which only rank 0 exists, as the default group.  Nobody may run a collective in it."""
    # Part of torch under this name since 2.0; the public init_process_group knows its backend, but not its store.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        group = dist.group.WORLD
        assert group is not None
        yield group
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def emulate(
    device: torch.device, group: dist.ProcessGroup, link: str, cases: Sequence[EmulatedCase]
) -> Iterator[Emulation]:
    """The emulation of ``link`` on a GPU, with memory for ``cases`` at once, so that none of them has to wait for it.

    Raises:
        ValueError: ``link`` names no link.
        RuntimeError: the device, the driver or the memory says no.
    """
    kind, bytes_per_s = link_of(link)
    world = group.size()
    memory = SilentPeers(device, world, kind=kind)
    shard = max(case.chunk_bytes for case in cases)
    # One set of whole chunks, or two of pieces; chunks of few rows are not cut.
    receive = max(case.chunk_bytes * (world - 1) * (1 if case.rows >= 2048 else 2) for case in cases)
    memory.grow({(kind, window): size for kind, size in ((SHARD, shard), (RECEIVE, receive)) for window in range(4)})
    cuda = CudaDevice(device, 0, world, memory, link=bytes_per_s)
    transport = SymmetricDeviceTransport(cuda, 0, world)
    try:
        with use_transport(group, transport):
            yield Emulation(transport, memory, group, link)
    finally:
        transport.close()


class EmulatedWorkload:
    """Tensors and calls of ``case``; their results are right once :meth:`fill` was called.

    Calls may be made before, which lets the transport make its windows as large as it wants them.

    Attributes:
        impossible: variants that this row cannot have, and why.
    """

    def __init__(
        self, case: EmulatedCase, emulation: Emulation, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.case, self.impossible = case, dict[str, str]()
        self._emulation, self._dtype = emulation, dtype
        memory = emulation.memory
        self._device, self._rank, self._world = memory.device, memory.rank, memory.world
        self._generator = torch.Generator(self._device).manual_seed(seed)
        tokens, inner, outer = case.tokens, case.inner, case.outer
        # As a trained layer has them: products of the size of their operands.
        self._weight = self._normal(outer, inner, scale=inner**-0.5)
        self._received = self._normal(1, case.width, scale=_RECEIVED_SCALE)[0]
        gathering = case.operator == "all_gather_linear"
        self._x = self._normal(tokens, inner)
        self._grad = self._normal(tokens, outer) if case.phase == "backward" else None
        own = slice(self._rank * case.rows, (self._rank + 1) * case.rows)
        self._own = own
        self._x_shard = self._x[own].clone() if gathering else self._x
        self._grad_shard = None if self._grad is None else self._grad if gathering else self._grad[own].clone()

    def _normal(self, rows: int, columns: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(rows, columns, generator=self._generator, device=self._device, dtype=self._dtype)
        return drawn.mul_(scale)

    @property
    def tolerance(self) -> float:
        """Relative error above which a result counts as wrong: what rounding explains, see testing/compare.py."""
        # An input gradient's part is rounded before it is sent, and the sum once more.
        return rounding_tolerance(self._dtype, terms=max(self.case.tokens, self.case.inner, self.case.outer))

    # ---- what is timed -----------------------------------------------------------------------------------------------

    def calls(self) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
        """Everything that can be timed, by name: see :data:`MODES`; ``"fused/4"`` has four pieces in a chunk."""
        calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {"gemm": self._products, "link": self._communicate}
        for name, mode in MODES.items():
            if mode == "tiles" and self.case.scatters and link_of(self._emulation.link)[0] == "device":
                self.impossible[name] = "its kernel's own stores to peers cannot be paced"
                continue
            cuts = mode == "fused" or (mode == "tiles" and self.case.gathers)  # tiles are sent as they are
            try:
                for pieces in ("auto", *(PIECES if cuts else ())):
                    call = self._operator(mode, pieces)
                    call()
                    calls[name if pieces == "auto" else f"{name}/{pieces}"] = call
            except Exception as error:  # Triton's errors, such as too little shared memory, have no other base
                if mode != "tiles":
                    raise
                self.impossible[name] = str(error) or type(error).__name__
        return calls

    def run_tiles(self) -> None:
        """The operator once as one kernel of tiles, which compiles what it needs."""
        self._operator("tiles", "auto")()

    def _operator(self, mode: str, pieces: int | str) -> Callable[[], tuple[Tensor, ...]]:
        config = OverlapConfig(
            mode=mode,  # type: ignore[arg-type]
            transport="symmetric",
            chunks_per_rank=pieces,  # type: ignore[arg-type]
            timeout_s=_TIMEOUT_S,
        )
        operator, group = getattr(ops, self.case.operator), self._emulation.group

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (operator(self._x_shard, self._weight, group=group, config=config),)

        if self.case.phase == "forward":
            return forward
        x, weight = self._x_shard.detach().requires_grad_(), self._weight.detach().requires_grad_()
        y = operator(x, weight, group=group, config=config)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(y, (x, weight), self._grad_shard, retain_graph=True)

        return backward

    @torch.no_grad()
    def _products(self) -> tuple[Tensor, ...]:
        """The operator's products on whole operands, each by one call of the library."""
        if self._grad is None:
            return (torch.mm(self._x, self._weight.t()),)
        return torch.mm(self._grad, self._weight), torch.mm(self._grad.t(), self._x)

    @torch.no_grad()
    def _communicate(self) -> tuple[Tensor, ...]:
        """The operator's copies, waits, signals and sums, and no products."""
        case = self.case
        gather = scatter = None
        out = torch.empty(1, case.rows, case.width, dtype=self._dtype, device=self._device)
        if case.gathers:
            shard = self._whole()[self._own].view(1, case.rows, case.width)
            gather = Gather(shard, lambda source, start, stop, block: None)
        if case.scatters:
            scatter = Scatter(out, lambda target, start, stop, block: None)
        config = OverlapConfig(mode="fused", timeout_s=_TIMEOUT_S)
        self._emulation.transport.execute(Call("link", case.phase, config, gather, scatter))
        return (out,)

    def _whole(self) -> Tensor:
        """What the ranks gather, [L, width]."""
        if self.case.operator == "all_gather_linear":
            return self._x
        assert self._grad is not None
        return self._grad

    # ---- what must come out ------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Puts peers' shards, and what peers send, where the rank under test will read them."""
        memory, case = self._emulation.memory, self.case
        for place in _places(memory):
            if place[0] == RECEIVE:
                _as_rows(memory.memory(self._rank, place), self._dtype, case.width).copy_(
                    self._received.expand(memory.backed(place) // (case.width * self._dtype.itemsize), -1)
                )
            elif case.gathers and memory.backed(place) >= case.rows * case.width * self._dtype.itemsize:
                for peer in self._peers():
                    rows = _as_rows(memory.memory(peer, place), self._dtype, case.width)[: case.rows]
                    rows.copy_(self._whole()[peer * case.rows : (peer + 1) * case.rows])

    def spoil(self) -> None:
        """Makes peers' receive windows NaN, so that only what a call sends is found there."""
        if not self.case.scatters:
            return
        nan = torch.full((_SEARCHED_BYTES,), 0xFF, dtype=torch.uint8, device=self._device)
        for window in self._sent_to():
            for part in window.split(_SEARCHED_BYTES):  # faster than the host's own writing, where it lies there
                part.copy_(nan[: part.numel()])

    def _sent_to(self) -> list[Tensor]:
        """Where peers receive what this rank sends."""
        memory = self._emulation.memory
        windows = [memory.memory(self._peers()[0], place) for place in _places(memory) if place[0] == RECEIVE]
        return list({window.data_ptr(): window for window in windows}.values())

    def errors(self, results: Sequence[Tensor]) -> dict[str, float]:
        """Relative Frobenius error of each result, on rows drawn at random; infinite for a wrong shape or type."""
        errors = {}
        for result, (name, shape, rows, truth) in zip(results, self._truths(), strict=True):
            right = tuple(result.shape) == shape and result.dtype == self._dtype
            errors[name] = relative_error(result[rows], truth) if right else float("inf")
        return errors

    def sent_error(self) -> float:
        """How far the last row that each peer should have received is from anything that arrived; the worst peer's."""
        case = self.case
        left = self._x if self._grad is None else self._grad
        last = [(peer + 1) * case.rows - 1 for peer in self._peers()]
        wanted = _product(left[last], self._weight.t() if self._grad is None else self._weight)
        found = torch.full((len(last),), float("inf"), device=self._device)
        for window in self._sent_to():
            rows = _as_rows(window, self._dtype, case.width)
            for part in rows.split(max(1, _SEARCHED_BYTES // (case.width * self._dtype.itemsize))):
                here = part.to(self._device).float()
                squares = here.square().sum(1, keepdim=True) - 2 * here @ wanted.t()
                nearest = here[squares.nan_to_num(float("inf"), float("inf")).argmin(0)]
                distances = (nearest - wanted).norm(dim=1) / wanted.norm(dim=1)
                found = torch.minimum(found, distances.nan_to_num(float("inf"), float("inf")))
        return found.max().item()

    def _peers(self) -> list[int]:
        return [rank for rank in range(self._world) if rank != self._rank]

    def _truths(self) -> list[tuple[str, tuple[int, ...], Tensor, Tensor]]:
        """(name, shape of the result, rows that are checked, what they must be) for each result."""
        case, x, weight, grad = self.case, self._x, self._weight, self._grad
        gathering = case.operator == "all_gather_linear"
        received = (self._world - 1) * self._received.float()
        if grad is None:
            if gathering:
                rows = self._sample(case.tokens)
                return [("output", (case.tokens, case.outer), rows, _product(x[rows], weight.t()))]
            rows = self._sample(case.rows)
            truth = _product(x[self._own][rows], weight.t()) + received
            return [("output", (case.rows, case.outer), rows, truth)]
        columns = self._sample(case.outer)
        weight_truth = _product(grad[:, columns].t(), x)
        weight_gradient = ("weight gradient", (case.outer, case.inner), columns, weight_truth)
        if gathering:
            rows = self._sample(case.rows)
            truth = _product(grad[self._own][rows], weight) + received
            return [("input gradient", (case.rows, case.inner), rows, truth), weight_gradient]
        rows = self._sample(case.tokens)
        return [("input gradient", (case.tokens, case.inner), rows, _product(grad[rows], weight)), weight_gradient]

    def _sample(self, count: int) -> Tensor:
        drawn = torch.randperm(count, generator=self._generator, device=self._device)
        return drawn[:_SAMPLES].sort().values


def _places(memory: SilentPeers) -> list[tuple[str, int]]:
    places = [(kind, window) for kind in (SHARD, RECEIVE) for window in range(WINDOWS)]
    return [place for place in places if memory.backed(place)]


def _as_rows(memory: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    """A window as rows; parts of windows begin at whole rows, because a row is a multiple of their alignment."""
    row_bytes = width * dtype.itemsize
    assert row_bytes % 256 == 0, row_bytes
    return memory[: memory.numel() // row_bytes * row_bytes].view(dtype).view(-1, width)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """In fp32, which is the truth for operands and results of 16 bits."""
    return a.float() @ b.float()
