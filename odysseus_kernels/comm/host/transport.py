"""The symmetric transport of a CPU host: every rank reads its peers' buffers where they lie, in POSIX shared memory.

Concurrency contract.  Each rank owns one segment, which all ranks map.  A rank writes data only into its own segment
and reads data only from others'; every signal word has one writer and only grows.  So a shard is copied once, into the
owner's window, and every product then runs straight on the owners' memory: nothing is gathered.  There is no barrier
between calls: windows are leased (``comm/schedules/leases.py``) and a writer waits just for those who read its previous
content.

Memory.  A window is backed only as far as calls have needed it (``fallocate``, so that a full /dev/shm is an error and
not a SIGBUS).  Whether it could be backed is agreed by all ranks, through the descriptors of the call
(``comm/host/peers.py``), before anything is sent.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from odysseus_kernels import _ext
from odysseus_kernels.comm.host.exchange import HostExchange
from odysseus_kernels.comm.host.peers import Peers
from odysseus_kernels.comm.host.pipeline import HostPipeline
from odysseus_kernels.comm.host.segments import Rendezvous, map_segments
from odysseus_kernels.comm.host.windows import BundleBuffer, PartialBuffer, ShardBuffer, Windows
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.reduce import PieceSum
from odysseus_kernels.comm.schedules.leases import LeaseTable
from odysseus_kernels.comm.schedules.steps import (
    SENT,
    SHARD,
    Kind,
    Schedule,
    Step,
    Task,
    publication,
    sends_ahead_at,
    symmetric_schedule,
)
from odysseus_kernels.comm.sent_ahead import SentAhead
from odysseus_kernels.comm.trace import timed
from odysseus_kernels.comm.transport import Call, CapacityExceededError, Scatter, Transport, row_pieces
from odysseus_kernels.errors import CapacityWarning, CommunicationError

__all__ = ["SymmetricHostTransport"]

# Rows of a piece below which a product loses more than the earlier start of the reduction wins (on two cores, products
# of 128 rows took 7 % longer than of 256; from 512 to 4096 rows pieces made no difference).
_PIECE_ROWS = 1024
_MAX_PIECES = 4

_Given = ShardBuffer | BundleBuffer
_Buffer = _Given | PartialBuffer


class _Buffers:
    """What one call has leased."""

    shard: ShardBuffer | None = None
    partial: PartialBuffer | None = None
    ahead: _Given | None = None  # for what the call sends ahead; it outlives the call
    exchange: HostExchange | None = None  # instead of the others
    pipeline: HostPipeline | None = None  # likewise

    def __getitem__(self, name: str) -> _Buffer:
        found: _Buffer | None
        if self.exchange is not None:
            of = self.exchange
            found = of.given if name == SHARD else of.sent if name == SENT else of.made
        elif self.pipeline is not None:
            found = self.pipeline.given if name == SHARD else self.pipeline.made
        else:
            found = self.shard if name == SHARD else self.partial
        assert found is not None
        return found


class SymmetricHostTransport(Transport):
    """Ranks of one host over shared memory; made by ``comm/group_transports.py``.

    Attributes:
        completed: number of its calls.
        step: number of the step that this rank is in; 0 before the first.
        lasting: whether what broke it keeps the ranks from meeting again.
    """

    name = "symmetric"

    def __init__(self, host: Any, rank: int, world: int, names: Sequence[int] | None = None) -> None:
        super().__init__(rank, world)
        module = _ext.load()
        self._host = host
        self._peers = Peers(host, rank, world, names)
        self._windows = Windows(host, module.WINDOWS)
        self._leases = LeaseTable(module.WINDOWS, module.CELLS)
        self.completed = 0
        self.lasting = False
        self.step = 0
        self._refused: int | None = None
        self._ahead: tuple[SentAhead, _Given] | None = None

    @classmethod
    def connect(
        cls,
        rank: int,
        world: int,
        directory: str,
        nonce: int,
        rendezvous: Rendezvous,
        names: Sequence[int] | None = None,
    ) -> SymmetricHostTransport:
        """Makes this rank's segment and maps all others'.  Every rank calls it; it fails on all or on none.

        ``names`` are the numbers by which errors call the ranks, if not 0, 1, 2.

        Raises:
            OSError: some rank could not; the message names it and says why.
        """
        return cls(map_segments(rank, world, directory, nonce, rendezvous), rank, world, names)

    @property
    def reserved_bytes(self) -> int:
        return sum(self._windows.backed)

    def close(self) -> None:
        self.broken = self.broken or "the transport was closed"
        self._ahead = None
        self._windows.clear()
        self._host.close()

    # ---- one call --------------------------------------------------------------------------------------------------

    def _execute(self, call: Call) -> None:
        try:
            self._run(call)
            self.completed += 1
        except CapacityExceededError:
            raise
        except BaseException as error:
            self.broken = self._peers.give_up(error)
            self.lasting = isinstance(error, CommunicationError) and error.lasting
            raise

    def begin_step(self, number: int) -> None:
        """Step ``number`` of all ranks begins; see ``comm/shared_step.py``."""
        self.step = number
        self._peers.begin_step(number)

    def leave(self, said: str, *, lasting: bool = False) -> None:
        """Between two calls, this rank leaves the others: their next call that needs it raises what it ``said``."""
        if self.broken is None:
            self.broken, self.lasting = said, lasting
            self._peers.leave(said, lasting=lasting)

    def _run(self, call: Call) -> None:
        schedule, buffers = self._prepare(call)
        sums = None
        if call.scatter is not None and buffers.partial is not None:
            held = self._windows.held(self.rank, buffers.partial)
            sums = PieceSum(call.scatter.out, self.world, call.config.reduce_dtype, held)
        sends_at = sends_ahead_at(schedule) if buffers.ahead is not None else -1
        steps = timed(schedule.steps, call.operator, call.phase, self.name, self.rank, copies=call.copies)
        for index, step in enumerate(steps):
            if index == sends_at:
                assert buffers.ahead is not None and call.prefetch is not None
                self._publish_ahead(call, call.prefetch, buffers.ahead)
            if step.kind is Kind.WAIT:
                self._wait(call, step, buffers)
            elif buffers.exchange is not None and step.kind in (Kind.COMPUTE, Kind.COPY):
                self._exchange(call, step, buffers.exchange)
            elif buffers.pipeline is not None and step.kind in (Kind.COMPUTE, Kind.COPY):
                self._pipeline(call, step, buffers)
            elif step.kind is Kind.COMPUTE:
                self._compute(call, step, buffers, sums)
            elif step.kind is Kind.COPY:
                assert call.gather is not None and buffers.shard is not None
                self._copy(call, step, buffers.shard, (call.gather.shard,))
            else:
                self._set(step, buffers[step.word.buffer] if step.word else buffers[SHARD])
        for name in schedule.counts:
            self._leases.give_back(buffers[name].lease, schedule.counts[name], schedule.readers[name])

    def _prepare(self, call: Call) -> tuple[Schedule, _Buffers]:
        """Leases the call's buffers, posts its descriptor, and agrees on more memory where some is needed."""
        gather, scatter = call.gather, call.scatter
        buffers = _Buffers()
        new: list[_Buffer] = []
        spans = len(call.pipeline.spans) if call.pipeline else 1
        gather_pieces = self._gather_pieces(call, gather.shard) if gather else spans
        scatter_pieces = self._scatter_pieces(call, scatter) if scatter else spans
        taken = self._take_ahead(call, gather_pieces)
        more = taken is not None and call.exchange is not None and bool(call.exchange.addressed)
        schedule = symmetric_schedule(
            call.program,
            self.world,
            self.rank,
            gather_pieces=gather_pieces,
            scatter_pieces=scatter_pieces,
            published=taken is not None and not more,
            sent=more,
        )
        if gather and isinstance(taken, ShardBuffer):
            buffers.shard = taken
        elif gather:
            buffers.shard = ShardBuffer.of(self._leases.lease(), gather.shard, gather_pieces)
            new.append(buffers.shard)
        if scatter:
            lease = self._leases.lease()
            buffers.partial = PartialBuffer.of(lease, scatter.out, scatter_pieces, self.world, call.config.reduce_dtype)
            new.append(buffers.partial)
        if call.exchange is not None:
            sent = taken if isinstance(taken, BundleBuffer) else None
            dtype = call.config.reduce_dtype
            buffers.exchange = HostExchange(
                call.exchange, self.rank, self.world, dtype, self._leases, self._windows, sent
            )
            new.extend(buffer for buffer in buffers.exchange.buffers if buffer is not sent)
        if call.pipeline is not None:
            buffers.pipeline = HostPipeline(
                call.pipeline, self.rank, self.world, call.config.reduce_dtype, self._leases, self._windows
            )
            new.extend(buffers.pipeline.buffers)
        if call.prefetch is not None and (call.prefetch.kind == "gather" or call.config.mode != "unfused"):
            buffers.ahead = self._ahead_buffer(call, call.prefetch)
            new.append(buffers.ahead)
        try:
            self._agree(call, new, ", prefetched" if taken else "")
        except CapacityExceededError:
            for buffer in reversed(new):
                self._leases.restore(buffer.lease)
            if taken is not None:
                self._leases.give_back(taken.lease, (taken.pieces,), ())
            raise
        return schedule, buffers

    def _gather_pieces(self, call: Call, shard: Tensor) -> int:
        # One: a copy takes far less time than the product of the local shard, which comes first.
        return row_pieces(call.config.chunks_per_rank, shard.shape[1], auto=1)

    def _scatter_pieces(self, call: Call, scatter: Scatter) -> int:
        batch, rows, _ = scatter.out.shape
        # With more than two ranks at least four: then two outgoing pieces and the sum in progress, which is wider, stay
        # within one chunk.  Between two ranks a single piece needs a single cell and no sum.
        least = 1 if self.world == 2 else 4
        auto = max(least, min(_MAX_PIECES, batch * rows // _PIECE_ROWS))
        return row_pieces(call.config.chunks_per_rank, rows, auto=auto)

    def _agree(self, call: Call, new: list[_Buffer], extra: str) -> None:
        """Posts the descriptor; if a window must grow, waits for all ranks and learns whether all could.

        Growth follows from the sequence of calls, so all ranks come here with the same windows and the same sizes.
        """
        growing = self._windows.lacking({buffer.lease.window: buffer.nbytes for buffer in new})
        shortage = ""
        try:
            for window, nbytes in growing.items():
                if self._refused is not None and nbytes >= self._refused:
                    shortage = f"{nbytes:,} bytes were refused before"
                    break
                self._windows.reserve(window, nbytes)
        except _ext.load().NoSpace as error:
            shortage = f"{error.needed:,} bytes needed, {error.free:,} bytes free"
        except OSError as error:
            shortage = str(error)
        self._peers.begin(call, extra, shortage)
        if not growing:
            return
        short = self._peers.shortages(call)
        if not short:
            self._windows.agreed(growing)
            return
        largest = max(growing.values())
        if self._refused is None:
            rank, reason = next(iter(short.items()))
            warnings.warn(
                f"{call.name} needs {sum(growing.values()):,} more bytes of shared memory on each of {self.world} "
                f"ranks, and rank {rank} could not get them: {reason}. It uses the collective transport instead; "
                f"enlarge /dev/shm (docker run --shm-size=...) for the symmetric one.",
                CapacityWarning,
                stacklevel=2,
            )
        self._refused = largest if self._refused is None else min(largest, self._refused)
        raise CapacityExceededError

    # ---- steps -----------------------------------------------------------------------------------------------------

    def _wait(self, call: Call, step: Step, buffers: _Buffers) -> None:
        word = step.word
        assert word is not None
        lease = buffers[word.buffer].lease
        value = lease.bases[word.cell] + step.value
        what = f"chunk {step.rank if word.is_ready else self.rank}, piece {step.piece} of its {word.buffer}"
        if word.is_ready:
            self._peers.wait_ready(call, word.owner, lease.window, word.cell, value, what)
        else:
            self._peers.wait_done(call, word.writer, lease.window, word.cell, value, "what it was sent before")

    def _set(self, step: Step, buffer: _Buffer) -> None:
        word = step.word
        assert word is not None
        value = buffer.lease.bases[word.cell] + step.value
        if step.kind is Kind.SIGNAL:
            self._host.set_ready(buffer.lease.window, word.cell, value)
        else:
            self._host.set_done(word.owner, buffer.lease.window, word.cell, value)

    def _copy(self, call: Call, step: Step, buffer: _Given, tensors: Sequence[Tensor]) -> None:
        self._collect(call, buffer)
        self._windows.publish(self.rank, buffer, step.piece, tensors)

    def _compute(self, call: Call, step: Step, buffers: _Buffers, sums: PieceSum | None) -> None:
        if step.task is Task.CONSUME:
            gather, shard = call.gather, buffers.shard
            assert gather is not None and shard is not None
            if step.rank == self.rank:
                gather.consume(self.rank, 0, shard.rows, gather.shard)
            else:
                start, stop = shard.bounds(step.piece)
                gather.consume(step.rank, start, stop, self._windows.shard(step.rank, shard, step.piece))
            return
        scatter, partial = call.scatter, buffers.partial
        assert scatter is not None and partial is not None and sums is not None
        start, stop = partial.bounds(step.piece)
        if step.task is Task.ADD:
            sums.add(start, stop, self._windows.partial(step.rank, partial, step.reads[0].part, step.piece))
        elif step.rank == self.rank:
            scatter.produce(self.rank, start, stop, scatter.out[:, start:stop])
        else:
            self._collect(call, partial)
            block = self._windows.partial(self.rank, partial, step.writes[0].part, step.piece)
            scatter.produce(step.rank, start, stop, block)

    def _exchange(self, call: Call, step: Step, exchange: HostExchange) -> None:
        for region in step.writes:
            buffer = exchange.given if region.buffer == SHARD else exchange.made
            assert buffer is not None
            self._collect(call, buffer)
        if step.task is Task.PUBLISH:
            exchange.publish()
        elif step.task is Task.VISIT:
            exchange.visit(step)
        else:
            exchange.take(step)

    def _pipeline(self, call: Call, step: Step, buffers: _Buffers) -> None:
        assert buffers.pipeline is not None
        for region in step.writes:
            self._collect(call, buffers[region.buffer])
        if step.kind is Kind.COPY:
            buffers.pipeline.publish(step.piece)
        else:
            buffers.pipeline.compute(step)

    def _collect(self, call: Call, buffer: _Buffer) -> None:
        """Before a leased window is first written: waits for those who read what its previous use left there."""
        if buffer.clean:
            return
        for credit in buffer.lease.credits:
            window = buffer.lease.window
            self._peers.wait_done(call, credit.reader, window, credit.cell, credit.count, "an earlier call's buffer")
        buffer.clean = True

    # ---- what is sent ahead ------------------------------------------------------------------------------------------

    def _ahead_buffer(self, call: Call, prefetch: Prefetch) -> _Given:
        lease = self._leases.lease()
        if prefetch.kind == "shared":
            return BundleBuffer.of_tensors(lease, prefetch.tensors)
        return ShardBuffer.of(lease, prefetch.shard, self._gather_pieces(call, prefetch.shard))

    def _publish_ahead(self, call: Call, prefetch: Prefetch, buffer: _Given) -> None:
        for step in publication(self.rank, buffer.pieces):
            if step.kind is Kind.COPY:
                self._copy(call, step, buffer, prefetch.tensors)
            else:
                self._set(step, buffer)
        self._ahead = (SentAhead.of(call, prefetch, buffer.pieces), buffer)

    def _take_ahead(self, call: Call, pieces: int) -> _Given | None:
        """The window that already holds what the call gathers; anything else that was sent ahead is dropped."""
        if call.keeps_ahead:
            return None
        held, self._ahead = self._ahead, None
        served = held is not None and held[0].serves(call, pieces)
        self._note_ahead(call, served=served, dropped=held is not None and not served)
        if held is None or served:
            return None if held is None else held[1]
        self._leases.give_back(held[1].lease, (held[1].pieces,), ())
        return None
