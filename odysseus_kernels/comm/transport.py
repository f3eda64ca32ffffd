"""How operators ask for communication: the interface that every transport implements, and the one place that counts.

An operator never names a collective.  It hands over a :class:`Call` with up to two parts: a :class:`Gather`, whose
``consume`` is given every rank's shard as it becomes available, and a :class:`Scatter`, whose ``produce`` writes
partial results for every rank; or with an :class:`~odysseus_kernels.comm.exchange.Exchange`, which visits every rank.
The transport decides nothing about the order: it executes the schedule (``comm/schedules/steps.py``) of its kind.

Concurrency: callbacks run on the calling thread, one at a time.  A block given to ``consume`` is a peer's memory or a
buffer of the transport: it must not be kept, written to, or read after the callback returns.  Calls on one transport
are serialised by a lock; ranks must make the same calls in the same order.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from odysseus_kernels.comm.announce import announced
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.pipeline import Pipeline
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.recorder import Traffic, record, record_ahead
from odysseus_kernels.comm.schedules.steps import Program
from odysseus_kernels.comm.switch import check_switched
from odysseus_kernels.comm.tiles import TileGather, TileScatter
from odysseus_kernels.comm.trace import timed_call
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.planner.switch import switch_traffic

__all__ = [
    "Call",
    "CapacityExceededError",
    "Gather",
    "NotServedError",
    "Scatter",
    "Transport",
]

Consume = Callable[[int, int, int, Tensor], None]
Produce = Callable[[int, int, int, Tensor], None]


class CapacityExceededError(Exception):
    """Raised on all ranks alike before anything is sent: this call's buffers do not fit; use another transport."""


class NotServedError(CapacityExceededError):
    """Likewise: this transport has no schedule for such a call."""


@dataclasses.dataclass(frozen=True)
class Gather:
    """All ranks' shards, one block after another.

    Attributes:
        shard: [batch, rows, width], contiguous; this rank's.
        consume: ``consume(source, start, stop, block)`` with ``block`` [batch, stop - start, width], contiguous or a
            slice along rows of a contiguous tensor: rows ``start`` to ``stop`` of rank ``source``'s shard.
        tiles: what ``mode="tiles"`` calls instead of ``consume``: one kernel for all chunks.
        prepare: makes sure that ``tiles`` can run, on this rank alone; KernelUnavailableError if it cannot.
    """

    shard: Tensor
    consume: Consume
    tiles: Callable[[TileGather], None] | None = None
    prepare: Callable[[], None] | None = None


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Sums over ranks, each rank receiving its own rows.

    Attributes:
        out: [batch, rows, width], rows contiguous; receives the sum of what all ranks produce for this one.
        produce: ``produce(target, start, stop, block)`` writes this rank's part of rows ``start`` to ``stop`` of rank
            ``target``'s output into ``block`` [batch, stop - start, width], whatever it holds.
        tiles: what ``mode="tiles"`` calls instead of ``produce``: one kernel for all targets.
        prepare: as in :class:`Gather`.
    """

    out: Tensor
    produce: Produce
    tiles: Callable[[TileScatter], None] | None = None
    prepare: Callable[[], None] | None = None


@dataclasses.dataclass(frozen=True)
class Call:
    """One operator call on one rank.

    Attributes:
        operator, phase: for errors and the recorder; phase is ``"forward"`` or ``"backward"``.
        config: the caller's settings; ``mode`` has been decided, it is not ``"auto"`` here.
        gather, scatter: what is communicated; if both, the shards travel while the scattered product runs.
        shapes: what the user passed, in the user's words, for the message when ranks disagree.
        keeps_ahead: what was sent ahead stays for the call after this one; any other call takes it or drops it.
        collective: name to record instead of ``all_gather`` and ``reduce_scatter`` (``all_reduce`` is both).
        exchange: visits every rank; instead of ``gather`` and ``scatter``.
        pipeline: gathers, computes and scatters piece by piece; likewise instead of them.
        continued: a further part of a collective that an earlier call has begun: bytes are counted, not a call.
        copies: an unfused twin, whose callbacks only copy; a trace calls them so.
        prefetch: shards that the next call is expected to gather, sent ahead while this call computes, whatever it
            communicates itself.  Their bytes are counted in the call that gathers them.
        switched: a switch adds what is scattered, and copies what is gathered (``comm/switch.py``).
    """

    operator: str
    phase: Literal["forward", "backward"]
    config: OverlapConfig
    gather: Gather | None = None
    scatter: Scatter | None = None
    shapes: str = ""
    collective: str | None = None
    keeps_ahead: bool = False
    exchange: Exchange | None = None
    pipeline: Pipeline | None = None
    continued: bool = False
    copies: bool = False
    prefetch: Prefetch | None = None
    switched: bool = False

    @property
    def program(self) -> Program:
        if self.pipeline is not None:
            return "pipeline:given" if self.pipeline.out is None else "pipeline"
        if self.exchange is not None:
            if self.exchange.gives and self.exchange.makes:
                return "exchange"
            return "exchange:given" if self.exchange.gives else "exchange:made"
        if self.gather is not None and self.scatter is not None:
            return "gather+scatter"
        return "gather" if self.gather is not None else "scatter"

    @cached_property
    def signature(self) -> str:
        """What must be equal on all ranks, for people to read; first read where the call is made."""
        return self._readable(f" ({said})" if (said := announced()) else "")

    @cached_property
    def kind(self) -> str:
        """The same without what was announced for this one call."""
        return self._readable("")

    def _readable(self, said: str) -> str:
        parts = [f"{self.operator} {self.phase}{said}", self.shapes]
        if self.gather is not None:
            parts.append(f"gathers {_describe(self.gather.shard)}")
        if self.scatter is not None:
            parts.append(f"scatters {_describe(self.scatter.out)}")
        if self.exchange is not None:
            parts.append(self.exchange.described_pairs)  # ahead of tensors, which may be many
            for name in ("shared", "addressed", "sums", "received"):
                parts += [f"{name} {_describe(tensor)}" for tensor in getattr(self.exchange, name)]
        if self.pipeline is not None:
            parts += [f"gathers {_describe(shard)}" for shard in self.pipeline.shards]
            if self.pipeline.out is not None:
                parts.append(f"scatters {_describe(self.pipeline.out)}")
            parts.append(f"pieces that begin at {[start for start, _ in self.pipeline.spans]}")
        if self.prefetch is not None:
            parts.append("sends ahead " + " and ".join(_describe(tensor) for tensor in self.prefetch.tensors))
        parts.append(f"{self.config.mode}, chunks_per_rank={self.config.chunks_per_rank}")
        if self.config.reduce_dtype != torch.float32:
            parts.append(f"reduce_dtype={self.config.reduce_dtype}")
        if self.switched:
            parts.append("through the switch")
        return ", ".join(part for part in parts if part)

    @property
    def name(self) -> str:
        return f"{self.operator} ({self.phase})"

    @property
    def device(self) -> torch.device:
        """Where the tensors lie that are communicated."""
        if self.pipeline is not None:
            return self.pipeline.shards[0].device
        if self.exchange is not None:
            return (*self.exchange.own_given(0), *self.exchange.own_made(0))[0].device
        if self.gather is not None:
            return self.gather.shard.device
        assert self.scatter is not None
        return self.scatter.out.device


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class Transport(abc.ABC):
    """Moves bytes among the ranks of one group.

    Attributes:
        name: ``"symmetric"``, ``"collective"`` or ``"local"``.
        rank, world: this rank's index in the group and the number of ranks.
        serves_tiles: whether ``mode="tiles"`` can be had.
        serves_exchange: whether calls may have an ``exchange``.
        serves_pipeline: whether calls may have a ``pipeline``.
        no_switch: why calls may not be ``switched``; empty if they may.
        broken: why the transport can no longer be used, after an error between ranks.
    """

    name: str
    serves_tiles: bool = False
    serves_exchange: bool = True
    serves_pipeline: bool = True
    no_switch: str = "its ranks have no NVLink switch between them"

    def __init__(self, rank: int, world: int) -> None:
        self.rank = rank
        self.world = world
        self.broken: str | None = None
        self._lock = threading.Lock()

    def execute(self, call: Call) -> None:
        """Runs ``call`` together with all other ranks; returns when this rank's results are complete.

        Raises:
            RankMismatchError: ranks made different calls; names the one that differs.
            PeerLostError: a peer's process is gone or gave up.
            SignalTimeoutError: a live peer did not signal within ``config.timeout_s``.
            CapacityExceededError, NotServedError: on every rank, before anything was sent.
            KernelUnavailableError: this rank has no kernel for ``mode="tiles"``; it sent nothing.
        """
        if call.config.mode == "tiles" and not self.serves_tiles:
            raise ValueError(
                f'{call.name}: expected mode "auto", "fused" or "unfused", got "tiles": it needs CUDA tensors and '
                f"the symmetric transport, this is the {self.name} one"
            )
        self._check_switched(call)
        if call.exchange is not None:
            call.exchange.check(call.name, self.world)
            if not self.serves_exchange:
                raise NotServedError(f"{call.name}: the {self.name} transport of this device serves no exchange")
        if call.pipeline is not None:
            call.pipeline.check(call.name)
            if not self.serves_pipeline:
                raise NotServedError(f"{call.name}: the {self.name} transport of this device serves no pipeline")
        with self._lock, timed_call(call.operator, call.phase, self.name, self.rank):
            self._execute(call)
        self._count(call)

    def all_gather(self, call: Call, out: Tensor) -> None:
        """The unfused twin of a gather: ``out[source]`` [batch, rows, width] becomes rank ``source``'s shard.

        ``call.gather.consume`` is not used.
        """
        assert call.gather is not None

        def copy(source: int, start: int, stop: int, block: Tensor) -> None:
            out[source, :, start:stop].copy_(block)

        gather = dataclasses.replace(call.gather, consume=copy)
        self.execute(dataclasses.replace(call, gather=gather, scatter=None, copies=True))

    def reduce_scatter(self, call: Call, full: Tensor) -> None:
        """The unfused twin of a scatter of ``full`` [world, batch, rows, width] into ``call.scatter.out``.

        ``call.scatter.produce`` is not used.
        """
        assert call.scatter is not None

        def copy(target: int, start: int, stop: int, block: Tensor) -> None:
            block.copy_(full[target, :, start:stop])

        scatter = dataclasses.replace(call.scatter, produce=copy)
        self.execute(self._scatter_part(call, scatter))

    @staticmethod
    def _scatter_part(call: Call, scatter: Scatter) -> Call:
        """``call`` without its gather, which comes after it: that uses and sends what is sent ahead."""
        if call.gather is None:
            return dataclasses.replace(call, scatter=scatter, copies=True)
        return dataclasses.replace(call, gather=None, scatter=scatter, prefetch=None, keeps_ahead=True, copies=True)

    def all_to_all(self, call: Call, full: Tensor, out: Tensor) -> None:
        """The unfused twin of an exchange: part r of ``full`` goes to rank r, ``out[r]`` becomes what rank r sent.

        ``full`` [world, ...] is contiguous, ``out`` of the same shape and dtype, and not the same memory.
        """
        self.execute(self._sends_parts(call, full, out))

    def _sends_parts(self, call: Call, full: Tensor, out: Tensor) -> Call:
        """``call`` as the exchange that :meth:`all_to_all` stands for."""

        def copy(source: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            out[source].copy_(given[0])

        exchange = Exchange(copy, addressed=(full,))
        exchange.check(call.name, self.world)
        return dataclasses.replace(call, gather=None, scatter=None, exchange=exchange, prefetch=None, copies=True)

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        """Buffers that grow meanwhile are given back at the end; entered and left by all ranks in step."""
        yield

    def close(self) -> None:
        """Gives back what the transport holds; it cannot be used afterwards."""
        self.broken = self.broken or "the transport was closed"

    @property
    def reserved_bytes(self) -> int:
        """Bytes of buffers that this rank holds for the transport between calls."""
        return 0

    def _check_switched(self, call: Call) -> None:
        if not call.switched:
            return
        summed = None if call.scatter is None else call.scatter.out
        stored = None if call.gather is None else call.gather.shard
        setting = "gather" if summed is None and call.collective is None else "reduce"  # an all-reduce is both
        check_switched(call.name, setting, call.config.mode, self.no_switch, summed, stored)

    @abc.abstractmethod
    def _execute(self, call: Call) -> None: ...

    def _note_ahead(self, call: Call, *, served: bool, dropped: bool) -> None:
        """How a gather began, and whether what was sent ahead for another call was dropped."""
        gathers = call.gather is not None or (call.exchange is not None and bool(call.exchange.shared))
        if served or gathers:
            record_ahead(call.operator, call.phase, "served" if served else "open")
        if dropped:
            record_ahead(call.operator, call.phase, "dropped")

    def _count(self, call: Call) -> None:
        peers, calls = self.world - 1, int(not call.continued)
        if call.exchange is not None and peers:
            self._count_exchange(call, call.exchange)
        if call.pipeline is not None and peers:
            travel = (("all_gather", call.pipeline.shards), ("reduce_scatter", (call.pipeline.out,)))
            for collective, tensors in travel:
                nbytes = sum(tensor.nbytes for tensor in tensors if tensor is not None)
                if nbytes:
                    traffic = Traffic(call.operator, call.phase, call.collective or collective, self.name)
                    record(traffic, peers * nbytes, calls)
        kinds: tuple[tuple[Gather | Scatter | None, Literal["all_gather", "reduce_scatter"]], ...]
        kinds = ((call.gather, "all_gather"), (call.scatter, "reduce_scatter"))
        for part, collective in kinds:
            if part is None or peers == 0:
                continue
            chunk = part.shard if isinstance(part, Gather) else part.out
            traffic = Traffic(call.operator, call.phase, call.collective or collective, self.name)
            nbytes = chunk.numel() * chunk.element_size()
            sent = switch_traffic(collective, nbytes, self.world).sent if call.switched else peers * nbytes
            record(traffic, sent, calls)
            # Both parts under one name are one collective.
            calls = 0 if call.collective else calls

    def _count_exchange(self, call: Call, exchange: Exchange) -> None:
        """Each peer is sent all of what is shared and summed, and its part of what is addressed and received.

        Under ``pairs`` or ``parts`` what is shared goes to those that take it, and sums to those for which this rank
        makes something.
        """
        rank, world = self.rank, self.world
        kinds = (
            ("all_gather", exchange.shared, exchange.served),
            ("reduce_scatter", exchange.sums, exchange.visited),
        )
        for collective, tensors, peers in kinds:
            if tensors:
                sent = sum(peers(rank, world, index) * tensor.nbytes for index, tensor in enumerate(tensors))
                record(Traffic(call.operator, call.phase, call.collective or collective, self.name), sent)
        parts = (*exchange.addressed, *exchange.received)
        if parts:
            sent = (world - 1) * sum(tensor.numel() * tensor.element_size() for tensor in parts) // world
            record(Traffic(call.operator, call.phase, call.collective or "all_to_all", self.name), sent)


def row_pieces(chunks_per_rank: int | Literal["auto"], rows: int, *, auto: int) -> int:
    """Pieces into which ``rows`` rows are cut: as configured, or ``auto``, never more than there are rows."""
    return max(1, min(auto if chunks_per_rank == "auto" else chunks_per_rank, rows))
