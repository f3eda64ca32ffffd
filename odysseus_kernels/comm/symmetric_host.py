"""The symmetric transport of a CPU host: every rank reads its peers' buffers where they lie, in POSIX shared memory.

Concurrency contract.  Each rank owns one segment, which all ranks map.  A rank writes data only into its own segment
and reads data only from others'; every signal word has one writer and only grows.  So a shard is copied once, into the
owner's window, and every product then runs straight on the owners' memory: nothing is gathered.  There is no barrier
between calls: windows are leased (``comm/leases.py``) and a writer waits just for those who read its previous content.

Before the first word of a peer is waited for in a call, that peer's *descriptor* of the call is compared with our own,
so ranks that disagree learn which one differs instead of waiting for signals that never come.

Memory.  A window is backed only as far as calls have needed it (``fallocate``, so that a full /dev/shm is an answer and
not a SIGBUS).  Whether it could be backed is agreed by all ranks, through the same descriptors, before anything is sent.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import _ext
from ..errors import CapacityWarning, CommunicationError, PeerLostError, RankMismatchError, SignalTimeoutError
from .leases import Lease, LeaseTable
from .reduce import PieceSum
from .schedule import (
    PARTIAL,
    PARTIAL_CELLS,
    SHARD,
    Kind,
    Schedule,
    Step,
    Task,
    piece_bounds,
    publication,
    symmetric_schedule,
)
from .transport import (
    Call,
    CapacityExceededError,
    Scatter,
    Transport,
    describe_mismatch,
    row_pieces,
    signature_hash,
)

__all__ = ["SymmetricHostTransport", "window_bytes"]

_ALIGNMENT = 4096
# Rows of a piece below which a product loses more than the earlier start of the reduction wins.
_PIECE_ROWS = 512
_MAX_PIECES = 8
_REASON_CHARACTERS = 1000
# How long a rank that noticed a disagreement waits for the other ranks' descriptors before it reports what it knows.
_REPORT_WAIT_S = 2.0
_KINDS: dict[str, type[CommunicationError]] = {
    kind.__name__: kind for kind in (RankMismatchError, PeerLostError, SignalTimeoutError, CommunicationError)
}


def window_bytes(directory: str) -> int:
    """Address space of one window: all that the file system could ever back, which costs nothing until it is used."""
    status = os.statvfs(directory)
    return max(_ALIGNMENT, min(status.f_blocks * status.f_frsize, 1 << 37))


class Rendezvous(Protocol):
    """Exchanges a short text among the ranks: what this rank gives, and what all gave, in rank order."""

    def __call__(self, text: str) -> list[str]: ...


@dataclasses.dataclass
class _Buffer:
    """A leased window while a call runs: what it holds and how its cells are laid out."""

    lease: Lease
    dtype: torch.dtype
    shape: tuple[int, int]  # batch, width
    rows: int
    pieces: int
    cell_bytes: int = 0
    held_bytes: int = 0  # behind the cells: the sum in progress, which no other rank reads
    clean: bool = False  # all credits of the window's previous use are collected


class SymmetricHostTransport(Transport):
    """Ranks of one host over shared memory; made by ``comm/groups.py``."""

    name = "symmetric"

    def __init__(self, host: Any, rank: int, world: int) -> None:
        super().__init__(rank, world)
        module = _ext.load()
        self._host = host
        self._leases = LeaseTable(module.WINDOWS, module.CELLS)
        self._agreed = [0] * module.WINDOWS
        self._bytes: dict[tuple[int, int], Tensor] = {}
        self._sequence = 0
        self._checked: set[int] = set()
        self._refused: int | None = None
        self._prefetched: dict[tuple[int, ...], _Buffer] = {}

    @classmethod
    def connect(cls, rank: int, world: int, directory: str, nonce: int, rendezvous: Rendezvous) -> SymmetricHostTransport:
        """Makes this rank's segment and maps all others'.  Every rank calls it; it fails on all or on none.

        Raises:
            OSError: some rank could not; the message names it and says why.
        """
        host: Any = None
        answer: dict[str, str]
        try:
            host = _ext.load().SymmetricHost(rank, world, directory, window_bytes(directory), nonce)
            answer = {"path": host.path}
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]}
        answers = [json.loads(text) for text in rendezvous(json.dumps(answer))]
        failure = ""
        if not any("error" in other for other in answers):
            try:
                host.attach([other["path"] for other in answers])
            except (OSError, ValueError, RuntimeError) as error:
                failure = f"{type(error).__name__}: {error}"[:_REASON_CHARACTERS]
        else:
            failure = answers[rank].get("error", "")
        # The second exchange is also what makes it safe to use the segments: all ranks have mapped them.
        failures = rendezvous(failure)
        for other, reason in enumerate(failures):
            if reason:
                if host is not None:
                    host.close()
                raise OSError(f"rank {other}: {reason}")
        cores = len(os.sched_getaffinity(0))
        if world > cores:
            host.spin_us = 0  # a spinning rank would keep the one it waits for off its core
        return cls(host, rank, world)

    @property
    def reserved_bytes(self) -> int:
        return sum(self._agreed)

    def close(self) -> None:
        self.broken = self.broken or "the transport was closed"
        self._prefetched.clear()
        self._bytes.clear()
        self._host.close()

    # ---- one call -------------------------------------------------------------------------------------------------

    def _execute(self, call: Call) -> None:
        try:
            self._run(call)
        except CapacityExceededError:
            raise
        except BaseException as error:
            # Peers must not wait for a rank that has left the schedule, whatever made it leave.
            kind = type(error).__name__ if isinstance(error, CommunicationError) else "PeerLostError"
            message = str(error) if kind in _KINDS and isinstance(error, CommunicationError) else repr(error)
            self.broken = f"{call.name} failed: {message}"
            self._host.fail(json.dumps({"kind": kind, "message": message[:400]}))
            raise

    def _run(self, call: Call) -> None:
        schedule, buffers, pending = self._prepare(call)
        sums = None
        if call.scatter is not None:
            partial = buffers[PARTIAL]
            held = self._window(self.rank, partial.lease.window)[PARTIAL_CELLS * partial.cell_bytes :]
            held = held[: partial.held_bytes]
            sums = PieceSum(call.scatter.out, self.world, call.config.reduce_dtype, held)
        prefetch = call.gather.prefetch if call.gather is not None else None
        for step in schedule.steps:
            if prefetch is not None and step.kind not in (Kind.COPY, Kind.SIGNAL):
                self._publish_ahead(call, prefetch, pending)
                prefetch = None
            if step.kind is Kind.WAIT:
                self._wait(call, step, buffers)
            elif step.kind is Kind.COMPUTE:
                self._compute(call, step, buffers, sums)
            elif step.kind is Kind.COPY:
                assert call.gather is not None
                self._copy(call, step, buffers, call.gather.shard)
            else:
                self._set(step, buffers)
        for name, buffer in buffers.items():
            self._leases.give_back(buffer.lease, schedule.counts[name], schedule.readers[name])

    def _prepare(self, call: Call) -> tuple[Schedule, dict[str, _Buffer], Lease | None]:
        """Leases the call's buffers, posts its descriptor, and agrees on more memory where some is needed."""
        gather, scatter = call.gather, call.scatter
        gather_pieces = row_pieces(call.config.chunks_per_rank, gather.shard.shape[1], auto=1) if gather else 1
        scatter_pieces = self._scatter_pieces(call, scatter) if scatter else 1
        ahead = self._take_prefetched(gather.shard, gather_pieces) if gather else None
        schedule = symmetric_schedule(
            call.program,
            self.world,
            self.rank,
            gather_pieces=gather_pieces,
            scatter_pieces=scatter_pieces,
            published=ahead is not None,
        )
        buffers: dict[str, _Buffer] = {}
        needed: dict[int, int] = {}
        if gather:
            buffers[SHARD] = ahead or self._shard_buffer(gather.shard, gather_pieces, needed)
        if scatter:
            batch, rows, width = scatter.out.shape
            largest = -(-rows // scatter_pieces)
            size = batch * largest * width * scatter.out.element_size()
            cell_bytes = -(-size // _ALIGNMENT) * _ALIGNMENT
            lease = self._leases.lease()
            held_bytes = PieceSum.held_bytes(scatter.out, self.world, call.config.reduce_dtype, largest)
            needed[lease.window] = PARTIAL_CELLS * cell_bytes + held_bytes
            buffers[PARTIAL] = _Buffer(
                lease, scatter.out.dtype, (batch, width), rows, scatter_pieces, cell_bytes, held_bytes
            )
        pending = None
        if gather is not None and gather.prefetch is not None:
            pending = self._leases.lease()
            needed[pending.window] = gather.prefetch.numel() * gather.prefetch.element_size()
        fresh = [buffer.lease for buffer in buffers.values() if buffer is not ahead] + ([pending] if pending else [])
        try:
            self._agree(call, needed, fresh, "prefetched" if ahead else "")
        except CapacityExceededError:
            if ahead:
                self._leases.give_back(ahead.lease, (ahead.pieces,), ())
            raise
        return schedule, buffers, pending

    def _scatter_pieces(self, call: Call, scatter: Scatter) -> int:
        batch, rows, _ = scatter.out.shape
        # At least so many that two outgoing pieces and the sum in progress, which is wider, stay within one chunk.
        auto = max(2 if self.world == 2 else 4, min(_MAX_PIECES, batch * rows // _PIECE_ROWS))
        return row_pieces(call.config.chunks_per_rank, rows, auto=auto)

    def _shard_buffer(self, shard: Tensor, pieces: int, needed: dict[int, int]) -> _Buffer:
        batch, rows, width = shard.shape
        lease = self._leases.lease()
        needed[lease.window] = shard.numel() * shard.element_size()
        return _Buffer(lease, shard.dtype, (batch, width), rows, pieces)

    def _agree(self, call: Call, needed: dict[int, int], leases: list[Lease], extra: str) -> None:
        """Posts the descriptor; if a window must grow, waits for all ranks and learns whether all could.

        Growth follows from the sequence of calls, so all ranks come here with the same windows and the same sizes.
        """
        growing = {w: n for w, n in needed.items() if n > self._agreed[w]}
        shortage = ""
        if growing:
            try:
                for window, nbytes in growing.items():
                    if self._refused is not None and nbytes >= self._refused:
                        raise MemoryError(f"{nbytes} bytes (refused before)")
                    self._host.reserve(window, nbytes)
            except (OSError, MemoryError) as error:
                shortage = str(error)
        signature = call.signature + (f", {extra}" if extra else "")
        self._sequence += 1
        self._checked.clear()
        text = json.dumps({"call": signature[:250], "shortage": shortage[:100]})
        self._host.post(self._sequence, signature_hash(signature), text)
        if not growing:
            return
        shortages = {self.rank: shortage}
        for peer in range(self.world):
            if peer != self.rank:
                self._check_peer(call, peer)
                shortages[peer] = json.loads(self._host.descriptor(peer, self._sequence)[1])["shortage"]
        short = {rank: reason for rank, reason in sorted(shortages.items()) if reason}
        if not short:
            self._agreed = [max(n, growing.get(w, 0)) for w, n in enumerate(self._agreed)]
            return
        for lease in reversed(leases):
            self._leases.restore(lease)
        if self._refused is None:
            rank, reason = next(iter(short.items()))
            warnings.warn(
                f"{call.name} needs {sum(growing.values()):,} more bytes of shared memory on each of {self.world} ranks, "
                f"and rank {rank} could not get them: {reason}. It uses the collective transport instead; "
                f"enlarge /dev/shm (e.g. docker run --shm-size) for the symmetric one.",
                CapacityWarning,
                stacklevel=2,
            )
        largest = max(growing.values())
        self._refused = largest if self._refused is None else min(largest, self._refused)
        raise CapacityExceededError

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _wait(self, call: Call, step: Step, buffers: dict[str, _Buffer]) -> None:
        word = step.word
        assert word is not None
        lease = buffers[word.buffer].lease
        self._check_peer(call, step.rank)
        value = lease.bases[word.cell] + step.value
        timeout = call.config.timeout_s
        if word.is_ready:
            answer = self._host.wait_ready(word.owner, lease.window, word.cell, value, timeout)
            what = f"chunk {step.rank}, piece {step.piece} of its {word.buffer} (signal ready, cell {word.cell})"
        else:
            answer = self._host.wait_done(word.writer, lease.window, word.cell, value, timeout)
            what = f"the credit to send piece {step.piece} (signal done, cell {word.cell})"
        if answer[0] != "ok":
            raise self._error(call, answer, step.rank, what)

    def _set(self, step: Step, buffers: dict[str, _Buffer]) -> None:
        word = step.word
        assert word is not None
        lease = buffers[word.buffer].lease
        value = lease.bases[word.cell] + step.value
        if step.kind is Kind.SIGNAL:
            self._host.set_ready(lease.window, word.cell, value)
        else:
            self._host.set_done(word.owner, lease.window, word.cell, value)

    def _copy(self, call: Call, step: Step, buffers: dict[str, _Buffer], shard: Tensor) -> None:
        buffer = buffers[SHARD]
        self._collect(call, buffer)
        start, stop = piece_bounds(buffer.rows, buffer.pieces, step.piece)
        self._shard_block(self.rank, buffer, start, stop).copy_(shard[:, start:stop])

    def _compute(self, call: Call, step: Step, buffers: dict[str, _Buffer], sums: PieceSum | None) -> None:
        if step.task is Task.CONSUME:
            gather = call.gather
            assert gather is not None
            rows = gather.shard.shape[1]
            if step.rank == self.rank:
                gather.consume(self.rank, 0, rows, gather.shard)
                return
            buffer = buffers[SHARD]
            start, stop = piece_bounds(rows, buffer.pieces, step.piece)
            gather.consume(step.rank, start, stop, self._shard_block(step.rank, buffer, start, stop))
            return
        scatter = call.scatter
        assert scatter is not None and sums is not None
        buffer = buffers[PARTIAL]
        start, stop = piece_bounds(buffer.rows, buffer.pieces, step.piece)
        if step.task is Task.ADD:
            sums.add(start, stop, self._partial_block(step.rank, buffer, step.reads[0].part, stop - start))
        elif step.rank == self.rank:
            scatter.produce(self.rank, start, stop, scatter.out[:, start:stop])
        else:
            self._collect(call, buffer)
            block = self._partial_block(self.rank, buffer, step.writes[0].part, stop - start)
            scatter.produce(step.rank, start, stop, block)

    def _collect(self, call: Call, buffer: _Buffer) -> None:
        """Before a leased window is first written: waits for those who read what its previous use left there."""
        if buffer.clean:
            return
        for credit in buffer.lease.credits:
            answer = self._host.wait_done(
                credit.reader, buffer.lease.window, credit.cell, credit.count, call.config.timeout_s
            )
            if answer[0] != "ok":
                what = f"the credit of an earlier call (signal done, window {buffer.lease.window}, cell {credit.cell})"
                raise self._error(call, answer, credit.reader, what)
        buffer.clean = True

    # ---- prefetch -------------------------------------------------------------------------------------------------

    @staticmethod
    def _prefetch_key(shard: Tensor, pieces: int) -> tuple[int, ...]:
        return (shard.data_ptr(), shard._version, pieces, *shard.shape)

    def _publish_ahead(self, call: Call, shard: Tensor, lease: Lease | None) -> None:
        assert lease is not None
        batch, rows, width = shard.shape
        pieces = row_pieces(call.config.chunks_per_rank, rows, auto=1)
        buffer = _Buffer(lease, shard.dtype, (batch, width), rows, pieces)
        for step in publication(self.rank, pieces):
            if step.kind is Kind.COPY:
                self._copy(call, step, {SHARD: buffer}, shard)
            else:
                self._set(step, {SHARD: buffer})
        self._prefetched[self._prefetch_key(shard, pieces)] = buffer

    def _take_prefetched(self, shard: Tensor, pieces: int) -> _Buffer | None:
        """The window that already holds ``shard``, if it was sent ahead and has not changed since.

        Anything else that was sent ahead is discarded here: it was meant for this call.  That keeps the leases of all
        ranks alike, and a window is never held by a call that did not come.
        """
        wanted = self._prefetch_key(shard, pieces)
        found = self._prefetched.pop(wanted, None)
        for buffer in self._prefetched.values():
            self._leases.give_back(buffer.lease, (buffer.pieces,), ())
        self._prefetched.clear()
        return found

    # ---- memory ---------------------------------------------------------------------------------------------------

    def _window(self, rank: int, window: int) -> Tensor:
        found = self._bytes.get((rank, window))
        if found is None:
            found = torch.frombuffer(self._host.window(rank, window), dtype=torch.uint8)
            self._bytes[rank, window] = found
        return found

    def _shard_block(self, rank: int, buffer: _Buffer, start: int, stop: int) -> Tensor:
        """Rows of a published shard.  The whole shard is laid out as [batch, rows, width]."""
        batch, width = buffer.shape
        raw = self._window(rank, buffer.lease.window)[: batch * buffer.rows * width * buffer.dtype.itemsize]
        return raw.view(buffer.dtype).view(batch, buffer.rows, width)[:, start:stop]

    def _partial_block(self, rank: int, buffer: _Buffer, cell: int, rows: int) -> Tensor:
        batch, width = buffer.shape
        offset = cell * buffer.cell_bytes
        raw = self._window(rank, buffer.lease.window)[offset : offset + batch * rows * width * buffer.dtype.itemsize]
        return raw.view(buffer.dtype).view(batch, rows, width)

    # ---- errors ---------------------------------------------------------------------------------------------------

    def _check_peer(self, call: Call, peer: int) -> None:
        """Once for each peer and call: the peer must be in the same call as we are."""
        if peer in self._checked:
            return
        answer = self._host.wait_posted(peer, self._sequence, call.config.timeout_s)
        if answer[0] != "ok":
            raise self._error(call, answer, peer, f"its call number {self._sequence} to begin (signal posted)")
        own = self._host.descriptor(self.rank, self._sequence)[0]
        if self._host.descriptor(peer, self._sequence)[0] != own:
            raise self._mismatch(call)
        self._checked.add(peer)

    def _mismatch(self, call: Call) -> RankMismatchError:
        calls = {}
        for rank in range(self.world):
            if rank != self.rank and self._host.wait_posted(rank, self._sequence, _REPORT_WAIT_S)[0] != "ok":
                continue
            digest, text = self._host.descriptor(rank, self._sequence)
            calls[rank] = (digest, json.loads(text)["call"])
        return RankMismatchError(describe_mismatch(calls, self._sequence))

    def _error(self, call: Call, answer: tuple[str, int], peer: int, what: str) -> CommunicationError:
        status, rank = answer
        where = f"{call.name}: rank {self.rank} waited for rank {peer}: {what}"
        if status == "timeout":
            return SignalTimeoutError(f"{where}; it is alive and did not signal within {call.config.timeout_s:g} s")
        if status == "failed":
            reason = json.loads(self._host.reason(rank) or "{}")
            message = reason.get("message", "no reason given")
            if reason.get("kind") == "RankMismatchError":
                return RankMismatchError(message)
            return PeerLostError(f"{where}; rank {rank} gave up: {message}")
        return PeerLostError(f"{where}; the process of rank {rank} is gone")
