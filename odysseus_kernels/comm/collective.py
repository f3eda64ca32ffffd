"""The collective transport: asynchronous collectives of a process group, a piece in flight while another multiplies.

Concurrency contract.  The backend moves data (Gloo's threads, or NCCL on a stream of its own: ``comm/lanes.py``);
callbacks run on the calling thread and, on a GPU, on its current stream.  At most two pieces are in flight, each with
its own buffers, and a buffer is written again only after the collective that used it has finished and its blocks were
consumed; collectives are issued in the order of the schedule, the same on all ranks.  Reduce-scatter travels as
all-to-all: the same bytes, and the sum is ours, in fp32 and in a fixed order.

Before the data of a call moves, ranks exchange a hash of what they call (8 bytes each): collectives of different sizes
would hang or mix data, where an error that names the rank is wanted.  On a GPU they do so beside the calls
(``comm/handshakes.py``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import CommunicationError, PeerLostError, RankMismatchError, SignalTimeoutError
from .backend import WaitTimeoutError, all_gather_single, reduce_scatter_single
from .bundles import as_bytes
from .collective_exchange import ExchangeRun
from .handshakes import Handshakes
from .lanes import Lane, make_lane
from .membership import Member, lost_members, lost_members_soon
from .reduce import PieceSum, accumulator_dtype
from .schedule import IN_FLIGHT, Kind, Step, Task, collective_schedule, piece_bounds
from .transport import Call, Scatter, SentAhead, Transport, describe_mismatch, row_pieces, short_text, signature_hash

__all__ = ["CollectiveTransport"]

_TEXT_BYTES = 384
# Pieces of a shard: enough that the first product starts early, few and large enough that issuing them and multiplying
# narrow blocks does not cost more than it hides (on two cores, 4 MB pieces did best from 4 MB to 32 MB).
_PIECES = 4
_PIECE_BYTES = 4 << 20


class CollectiveTransport(Transport):
    """Any process group with asynchronous all-gather and all-to-all; made by ``comm/groups.py``."""

    name = "collective"

    def __init__(self, group: dist.ProcessGroup, members: list[Member]) -> None:
        super().__init__(group.rank(), group.size())
        self._reference = weakref.ref(group)  # a destroyed group must be free to go
        self._members = members
        self._sequence = 0
        self._ahead: _Ahead | None = None
        self._lane: Lane | None = None
        self._handshakes: Handshakes | None = None  # on a GPU

    @property
    def _group(self) -> dist.ProcessGroup:
        group = self._reference()
        assert group is not None, "a transport outlived its process group"
        return group

    def synchronize(self) -> None:
        """Waits until a GPU has done what was enqueued; raises what went wrong, as the next call would."""
        if self._lane is None or self._handshakes is None:
            return
        try:
            self._handshakes.finish(lambda: None)
            torch.cuda.synchronize()
            self._lane.check()
        except BaseException as error:
            self.broken = self.broken or short_text(error)
            raise

    def close(self) -> None:
        super().close()
        if self._lane is not None:
            self._lane.close()

    def _begin(self, call: Call) -> Lane:
        """Where the call's collectives travel."""
        if self._lane is None:
            device = call.device
            self._lane = make_lane(lambda: self._group, device, call.config.timeout_s)
            if device.type != "cpu":
                self._handshakes = Handshakes(self._group)
        self._lane.check()
        return self._lane

    def _execute(self, call: Call) -> None:
        with self._errors(call):
            if call.exchange is not None:
                lane = self._prepare(call)
                exchange = ExchangeRun(call, call.exchange, lane, self.rank, self.world)
                exchange.steps(lambda work: self._wait(call, work))
                return
            run = _Run(self, call, self._begin(call))
            self._handshake(call, ", prefetched" if run.adopt(self._take_ahead(call)) else "")
            ahead = run.steps(sends_ahead=not self._capturing)
            if not (call.keeps_ahead or self._capturing):
                self._ahead = ahead

    def _prepare(self, call: Call) -> Lane:
        """For a call that uses nothing that was sent ahead."""
        lane = self._begin(call)
        self._take_ahead(call)
        self._handshake(call)
        return lane

    @property
    def _capturing(self) -> bool:
        """A graph neither waits for what lies outside of it nor leaves anything under way."""
        return self._handshakes is not None and torch.cuda.is_current_stream_capturing()

    def _take_ahead(self, call: Call) -> _Ahead | None:
        """What was sent ahead for this call; it has arrived then, even if this call will not use it."""
        if self._ahead is None or call.keeps_ahead or self._capturing:
            return None
        ahead, self._ahead = self._ahead, None
        self._wait(call, ahead.work)
        return ahead

    def all_gather(self, call: Call, out: Tensor) -> None:
        gather = call.gather
        assert gather is not None
        call = dataclasses.replace(call, scatter=None)  # only this part is exchanged and counted here
        with self._lock, self._errors(call):
            lane = self._prepare(call)
            shard = gather.shard.contiguous()
            self._wait(
                call,
                lane.issue(lambda: all_gather_single(out.view(-1), shard.view(-1), lane.group, async_op=True)),
            )
        self._count(call)

    def reduce_scatter(self, call: Call, full: Tensor) -> None:
        scatter = call.scatter
        assert scatter is not None
        if accumulator_dtype(full.dtype, call.config.reduce_dtype) != full.dtype or not scatter.out.is_contiguous():
            # A backend adds in the tensors' own type; all-to-all sends the same bytes and we add in a wider one.
            super().reduce_scatter(call, full)
            return
        call = dataclasses.replace(call, gather=None)
        with self._lock, self._errors(call):
            lane = self._prepare(call)
            out = scatter.out.view(-1)
            self._wait(
                call,
                lane.issue(lambda: reduce_scatter_single(out, full.view(-1), group=lane.group, async_op=True)),
            )
        self._count(call)

    def all_to_all(self, call: Call, full: Tensor, out: Tensor) -> None:
        if not out.is_contiguous():
            super().all_to_all(call, full, out)
            return
        call = self._sends_parts(call, full, out)
        with self._lock, self._errors(call):
            lane = self._prepare(call)
            work = lane.issue(
                lambda: dist.all_to_all_single(as_bytes(out), as_bytes(full), group=lane.group, async_op=True)
            )
            self._wait(call, work)
        self._count(call)

    # ---- ranks that differ, peers that are gone ----------------------------------------------------------------------

    def _handshake(self, call: Call, extra: str = "") -> None:
        self._sequence += 1
        signature = call.signature + extra
        if self._handshakes is not None:
            if self._capturing:
                return  # what a capture repeats was compared when it ran before
            timeout_s = call.config.timeout_s
            self._handshakes.compare(self._group, signature, self._sequence, timeout_s, lambda: self._look(call))
            return
        own = signature_hash(signature)
        hashes = self._exchange(call, torch.tensor([own], dtype=torch.int64)).flatten().tolist()
        if len(set(hashes)) == 1:
            return
        # Everybody has seen the same hashes, so everybody comes here.
        text = signature.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)
        texts = self._exchange(call, torch.frombuffer(bytearray(text), dtype=torch.uint8))
        signatures = [bytes(row.tolist()).decode(errors="replace").strip() for row in texts]
        calls = dict(enumerate(zip(hashes, signatures, strict=True)))
        raise RankMismatchError(describe_mismatch(calls, self._sequence))

    def _exchange(self, call: Call, own: Tensor) -> Tensor:
        assert self._lane is not None
        everyone = own.new_empty((self.world, own.numel()))
        self._wait(
            call,
            self._lane.issue(lambda: all_gather_single(everyone.view(-1), own, self._group, async_op=True)),
        )
        return everyone

    def _wait(self, call: Call, handle: Any) -> None:
        assert self._lane is not None
        self._lane.finish(handle, self._where(call), call.config.timeout_s, lambda: self._look(call))

    def _look(self, call: Call) -> None:
        gone = lost_members(self._members)
        if gone:
            raise self._lost(call, gone, "")

    def _where(self, call: Call) -> str:
        return f"{call.name}: rank {self.rank}, collective number {self._sequence} of its group"

    def _lost(self, call: Call, gone: list[int], reason: str) -> PeerLostError:
        ranks = ", ".join(f"rank {rank}" for rank in gone)
        return PeerLostError(f"{self._where(call)}: the process of {ranks} is gone" + (reason and f" ({reason})"))

    @contextlib.contextmanager
    def _errors(self, call: Call) -> Iterator[None]:
        """Turns the backend's errors into ours: which operator, which peer, which wait.

        After a mismatch, which all ranks find before any data moves, the group is still in step.  After anything else
        collectives of different calls may meet in it, so it is not used again (``broken``).
        """
        try:
            yield
        except RankMismatchError as error:
            if self._handshakes is not None:  # found beside the calls, at different ones on different ranks
                self.broken = short_text(error)
            raise
        except BaseException as error:
            self.broken = short_text(error)
            if isinstance(error, CommunicationError) or not isinstance(error, (RuntimeError, WaitTimeoutError)):
                raise
            if isinstance(error, WaitTimeoutError):
                raise SignalTimeoutError(
                    f"{self._where(call)}: {error}, and all known processes are alive: a peer is stuck, has not come, "
                    f"or makes other calls"
                ) from error
            reason = str(error).splitlines()[0][:200]
            if isinstance(error, dist.DistError) or "gloo" in reason.lower() or "connection" in reason.lower():
                gone = lost_members_soon(self._members)
                if gone:
                    raise self._lost(call, gone, reason) from error
                raise PeerLostError(f"{self._where(call)}: a peer left the group ({reason})") from error
            raise


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """The first piece of a shard that the next call is expected to gather, under way or arrived."""

    sent: SentAhead
    work: Any
    piece: Tensor  # what the backend reads
    gathered: Tensor


class _Run:
    """The buffers and handles of one call."""

    def __init__(self, transport: CollectiveTransport, call: Call, lane: Lane) -> None:
        self._transport = transport
        self._call = call
        self._lane = lane
        self._world, self._rank = transport.world, transport.rank
        chunks = call.config.chunks_per_rank
        self._pieces = {
            Task.ALL_GATHER: _pieces(chunks, call.gather.shard) if call.gather else 1,
            Task.ALL_TO_ALL: _pieces(chunks, call.scatter.out) if call.scatter else 1,
        }
        self._work: dict[tuple[Task, int], Any] = {}
        self._buffers: dict[tuple[str, int], Tensor] = {}
        # Kept until the collective has finished: the backend reads them.
        self._sent: dict[tuple[Task, int], Tensor] = {}
        self._sums: PieceSum | None = None
        if call.scatter is not None:
            out, dtype = call.scatter.out, call.config.reduce_dtype
            rows = -(-out.shape[1] // self._pieces[Task.ALL_TO_ALL])
            nbytes = PieceSum.held_bytes(out, self._world, dtype, rows)
            held = torch.empty(nbytes, dtype=torch.uint8, device=out.device)
            self._sums = PieceSum(out, self._world, dtype, held)

    def adopt(self, ahead: _Ahead | None) -> bool:
        """Takes over the first piece if it was sent ahead; says whether it was."""
        if ahead is None or not ahead.sent.serves(self._call, self._pieces[Task.ALL_GATHER]):
            return False
        self._buffers["gathered", 0] = ahead.gathered
        self._work[Task.ALL_GATHER, 0] = ahead.work
        return True

    def steps(self, *, sends_ahead: bool) -> _Ahead | None:
        """Runs the schedule; returns what was sent ahead meanwhile for the next call."""
        ahead = None
        prefetch = self._call.gather.prefetch if self._call.gather and sends_ahead else None
        schedule = collective_schedule(
            self._call.program,
            self._world,
            self._rank,
            gather_pieces=self._pieces[Task.ALL_GATHER],
            scatter_pieces=self._pieces[Task.ALL_TO_ALL],
        )
        for step in schedule.steps:
            assert step.task is not None
            if step.kind is Kind.ISSUE:
                # A first piece that was sent ahead is under way already.
                if (step.task, step.piece) not in self._work:
                    self._issue(step.task, step.piece)
                if prefetch is not None and (step.task, step.piece + 1) == (Task.ALL_GATHER, self._gather_pieces):
                    ahead = self._send_ahead(prefetch)
            elif step.kind is Kind.FINISH:
                self._transport._wait(self._call, self._work.pop((step.task, step.piece)))
                self._sent.pop((step.task, step.piece), None)
            else:
                self._compute(step)
        return ahead

    @property
    def _gather_pieces(self) -> int:
        return self._pieces[Task.ALL_GATHER]

    def _send_ahead(self, shard: Tensor) -> _Ahead:
        pieces = _pieces(self._call.config.chunks_per_rank, shard)
        start, stop = piece_bounds(shard.shape[1], pieces, 0)
        piece = shard[:, start:stop].contiguous()
        most = -(-shard.shape[1] // pieces)
        gathered = shard.new_empty(self._world * shard.shape[0] * most * shard.shape[2])
        target = gathered[: self._world * piece.numel()]
        group = self._lane.group
        work = self._lane.issue(lambda: all_gather_single(target, piece.view(-1), group, async_op=True))
        return _Ahead(SentAhead.of(self._call, shard, pieces), work, piece, gathered)

    def _block(self, name: str, piece: int, like: Tensor, rows: int, slots: int, most: int) -> Tensor:
        """Buffer ``name`` of ``piece``: [slots, batch, rows, width], made once for each of the pieces in flight."""
        batch, _, width = like.shape
        key = (name, piece % IN_FLIGHT)
        if key not in self._buffers:
            self._buffers[key] = like.new_empty(slots * batch * most * width)
        return self._buffers[key][: slots * batch * rows * width].view(slots, batch, rows, width)

    def _bounds(self, task: Task, rows: int, piece: int) -> tuple[int, int, int]:
        start, stop = piece_bounds(rows, self._pieces[task], piece)
        return start, stop, -(-rows // self._pieces[task])

    def _gathered(self, piece: int) -> tuple[int, int, Tensor]:
        assert self._call.gather is not None
        shard = self._call.gather.shard
        start, stop, most = self._bounds(Task.ALL_GATHER, shard.shape[1], piece)
        return start, stop, self._block("gathered", piece, shard, stop - start, self._world, most)

    def _exchanged(self, name: str, piece: int) -> tuple[int, int, Tensor]:
        assert self._call.scatter is not None
        out = self._call.scatter.out
        start, stop, most = self._bounds(Task.ALL_TO_ALL, out.shape[1], piece)
        return start, stop, self._block(name, piece, out, stop - start, self._world - 1, most)

    def _slot(self, peer: int) -> int:
        """Place of ``peer`` among the others: no rank sends itself anything."""
        return peer - (peer > self._rank)

    def _issue(self, task: Task, piece: int) -> None:
        group = self._lane.group
        if task is Task.ALL_GATHER:
            assert self._call.gather is not None
            start, stop, gathered = self._gathered(piece)
            own = self._call.gather.shard[:, start:stop].contiguous()
            self._sent[task, piece] = own
            self._work[task, piece] = self._lane.issue(
                lambda: all_gather_single(gathered.view(-1), own.view(-1), group, async_op=True)
            )
            return
        _, _, sent = self._exchanged("sent", piece)
        _, _, received = self._exchanged("received", piece)
        splits = [0 if peer == self._rank else sent[0].numel() for peer in range(self._world)]
        self._work[task, piece] = self._lane.issue(
            lambda: dist.all_to_all_single(received.view(-1), sent.view(-1), splits, splits, group, async_op=True)
        )

    def _compute(self, step: Step) -> None:
        if step.task is Task.CONSUME:
            gather = self._call.gather
            assert gather is not None
            if step.rank == self._rank:
                gather.consume(self._rank, 0, gather.shard.shape[1], gather.shard)
                return
            start, stop, gathered = self._gathered(step.piece)
            gather.consume(step.rank, start, stop, gathered[step.rank])
            return
        scatter: Scatter | None = self._call.scatter
        assert scatter is not None and self._sums is not None
        if step.task is Task.ADD:
            start, stop, received = self._exchanged("received", step.piece)
            self._sums.add(start, stop, received[self._slot(step.rank)])
            return
        start, stop, sent = self._exchanged("sent", step.piece)
        own = step.rank == self._rank
        block = scatter.out[:, start:stop] if own else sent[self._slot(step.rank)]
        scatter.produce(step.rank, start, stop, block)


def _pieces(chunks_per_rank: int | Literal["auto"], chunk: Tensor) -> int:
    size = chunk.numel() * chunk.element_size()
    return row_pieces(chunks_per_rank, chunk.shape[1], auto=max(1, min(_PIECES, size // _PIECE_BYTES)))
