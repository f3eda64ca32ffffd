"""The collective transport: asynchronous collectives of a process group, a piece in flight while another multiplies.

Concurrency contract.  Data is moved beside the products (between CPU ranks by the threads of
``comm/collective/links.py``, or Gloo's; between GPUs by NCCL on a stream of its own: ``comm/collective/lanes.py``);
callbacks run on the calling thread and, on a GPU, on its current stream.  At most two
pieces are in flight, each with its own buffers, and a buffer is written again only after the collective that used it
has finished and its blocks were consumed; collectives are issued in the order of the schedule, the same on all ranks.
Reduce-scatter travels as all-to-all: the same bytes, and the sum is ours, in fp32 and in a fixed order.  Exchanges
travel around the ring (``comm/collective/exchange.py``).

Before the data of a call moves, ranks exchange a hash of what they call (8 bytes each): collectives of different sizes
would hang or mix data, where an error that names the rank is wanted.  What needs none of that data is computed until
the answer is here (``comm/collective/agreement.py``).  A rank that leaves a step takes part in the next
such exchange, whatever its peers call then, and says so there; the group stays in step.  On a GPU they do so beside
the calls (``comm/collective/handshakes.py``).  These exchanges are the process group's collectives in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.bundles import as_bytes
from odysseus_kernels.comm.collective.agreement import Agreement
from odysseus_kernels.comm.collective.ahead import Ahead
from odysseus_kernels.comm.collective.connecting import connect_links
from odysseus_kernels.comm.collective.exchange import ExchangeRun
from odysseus_kernels.comm.collective.handshakes import Handshakes
from odysseus_kernels.comm.collective.lanes import Lane, make_lane
from odysseus_kernels.comm.collective.links import Links
from odysseus_kernels.comm.collective.pipeline import PipelineRun
from odysseus_kernels.comm.collective.run import CollectiveRun
from odysseus_kernels.comm.meeting.backend import WaitTimeoutError, all_gather_single, reduce_scatter_single
from odysseus_kernels.comm.meeting.membership import lost_members_soon
from odysseus_kernels.comm.meeting.texts import Meeting
from odysseus_kernels.comm.mismatch import departure, describe_mismatch, short_text, signature_hash
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.trace import timed_call, timed_wait
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError, PeerLostError, RankMismatchError, SignalTimeoutError

__all__ = ["CollectiveTransport"]

_TEXT_BYTES = 384
_STEP = "step "
# Instead of the hash of a call: this rank makes no more calls in this step.
_LEFT = -1


@dataclasses.dataclass(frozen=True)
class _Departure:
    """The exchanges in which a rank says that it left: under way until its peers come to them or leave as well."""

    handles: list[Any]
    buffers: list[Tensor]
    group: dist.ProcessGroup  # not to be destroyed before these have ended


class CollectiveTransport(Transport):
    """Any process group with asynchronous all-gather and all-to-all; made by ``comm/group_transports.py``.

    Attributes:
        stands_in: the current call is one that the symmetric transport does not serve.  The next one may be served
            there, so that nothing is sent ahead for it here.
    """

    name = "collective"
    stands_in = False

    @classmethod
    def connect(cls, meeting: Meeting, config: OverlapConfig, device: torch.device) -> CollectiveTransport:
        """With links between CPU ranks that Gloo serves; all ranks of the group call it together.

        Raises:
            CommunicationError: the ranks could not meet.
        """
        group = meeting.group
        gloo = getattr(dist, "ProcessGroupGloo", None)
        if device.type != "cpu" or gloo is None or not isinstance(group._get_backend(device), gloo):
            return cls(meeting)

        def exchange(text: str) -> list[str]:
            return meeting.exchange(text, config)

        return cls(meeting, connect_links(group.rank(), meeting.names, exchange, config.timeout_s, meeting.name))

    def __init__(self, meeting: Meeting, links: Links | None = None) -> None:
        super().__init__(meeting.group.rank(), meeting.group.size())
        self._meeting = meeting
        self._links = links
        self._names = meeting.names
        self._sequence = 0
        self._ahead: Ahead | None = None
        self._lane: Lane | None = None
        self._handshakes: Handshakes | None = None  # on a GPU
        self._step = 0
        self._departure: _Departure | None = None
        self._heard = False  # that a peer left this step

    @property
    def _group(self) -> dist.ProcessGroup:
        return self._meeting.group

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

    def begin_step(self, number: int) -> None:
        """Step ``number`` of all ranks begins; see ``comm/shared_step.py``."""
        self._step, self._heard = number, False

    def leave(self, said: str, device: torch.device, timeout_s: float) -> bool:
        """Between two calls, this rank leaves the step, which then ends on all ranks of the group.

        Returns:
            Whether the group stays in step; else it cannot be used any more.
        """
        if self.broken or device.type != "cpu":
            return False
        if self._heard:
            return True
        try:
            with self._lock:
                lane = self._begin_lane(device, timeout_s)
                self._end_departure(lane, said, timeout_s)
                self._sequence += 1
                left = [torch.tensor([_LEFT]), _text(said)]
                everyone = [one.new_empty(self.world * one.numel()) for one in left]
                group = self._group
                handles = [
                    lane.issue(functools.partial(all_gather_single, into, one, group, async_op=True))
                    for into, one in zip(everyone, left, strict=True)
                ]
                self._departure = _Departure(handles, [*left, *everyone], group)
        except (RuntimeError, WaitTimeoutError):
            return False
        return True

    def close(self) -> None:
        super().close()
        if self._lane is not None:
            self._lane.abandon()
            self._lane.close()
        if self._links is not None:
            self._links.close()
        self._departure = None

    def _begin(self, call: Call) -> Lane:
        """Where the call's collectives travel."""
        lane = self._begin_lane(call.device, call.config.timeout_s)
        self._end_departure(lane, self._where(call), call.config.timeout_s)
        return lane

    def _begin_lane(self, device: torch.device, timeout_s: float) -> Lane:
        if self._lane is None:
            self._lane = make_lane(
                lambda: self._group, device, timeout_s, self._links, between_hosts=self._meeting.between_hosts
            )
            if device.type != "cpu":
                self._handshakes = Handshakes(self._group)
        self._lane.check()
        return self._lane

    def _end_departure(self, lane: Lane, where: str, timeout_s: float) -> None:
        """Before the next call: all peers have left the step that this rank left."""
        if self._departure is not None:
            for handle in self._departure.handles:
                lane.finish(handle, where, timeout_s, lambda: self._meeting.look(where))
            self._departure = None

    def _execute(self, call: Call) -> None:
        with self._errors(call):
            lane = self._begin(call)
            run: CollectiveRun | ExchangeRun | PipelineRun
            if call.exchange is not None:
                run = ExchangeRun(call, call.exchange, lane, self.rank, self.world)
            elif call.pipeline is not None:
                run = PipelineRun(call, call.pipeline, lane, self.rank, self.world)
            else:
                run = CollectiveRun(call, lane, self.rank, self.world)
            ahead = self._take_ahead(call)
            served = run.adopt(ahead)
            if not served:
                self._finish_ahead(call, ahead)
            if not call.keeps_ahead:
                self._note_ahead(call, served=served, dropped=ahead is not None and not served)
            # Unfused, a whole is gathered by one collective, which has no first piece.
            sends = not (self._capturing or self.stands_in or call.keeps_ahead or call.config.mode == "unfused")
            # Beside what only copies, as an unfused reduce-scatter does, there is no product to leave the GPU to.
            with lane.alone() if call.copies else contextlib.nullcontext():
                try:
                    agreement = Agreement(self._ask(call, ", prefetched" if served else ""))
                    sent = run.steps(lambda work: self._wait(call, work), agreement, call.prefetch if sends else None)
                except RankMismatchError:
                    # No call takes it over, and the group can be used on.
                    self._finish_ahead(call, ahead)
                    raise
            if sent is not None:
                self._ahead = sent

    def _prepare(self, call: Call) -> Lane:
        """For a call that uses nothing that was sent ahead."""
        lane = self._begin(call)
        ahead = self._take_ahead(call)
        self._finish_ahead(call, ahead)
        dropped = ahead is not None
        if not call.keeps_ahead:
            self._note_ahead(call, served=False, dropped=dropped)
        self._ask(call)()
        return lane

    @property
    def _capturing(self) -> bool:
        """A graph neither waits for what lies outside of it nor leaves anything under way."""
        return self._handshakes is not None and torch.cuda.is_current_stream_capturing()

    def _take_ahead(self, call: Call) -> Ahead | None:
        """What was sent ahead for this call, under way or not."""
        if self._ahead is None or call.keeps_ahead or self._capturing:
            return None
        ahead, self._ahead = self._ahead, None
        return ahead

    def _finish_ahead(self, call: Call, ahead: Ahead | None) -> None:
        """Waits for what nobody will use: until it has arrived, its buffers belong to it."""
        for transfer in () if ahead is None else ahead.transfers:
            self._wait(call, transfer.work)

    def all_gather(self, call: Call, out: Tensor) -> None:
        gather = call.gather
        assert gather is not None
        self._check_switched(call)
        call = dataclasses.replace(call, scatter=None)  # only this part is exchanged and counted here
        with self._lock, self._errors(call), timed_call(call.operator, call.phase, self.name, self.rank):
            lane = self._prepare(call)
            shard = gather.shard.contiguous()
            with lane.alone():
                work = lane.all_gather(out.view(-1), shard.view(-1))
            self._wait_for(call, "all-gather", work)
        self._count(call)

    def reduce_scatter(self, call: Call, full: Tensor) -> None:
        scatter = call.scatter
        assert scatter is not None
        self._check_switched(call)
        wide = accumulator_dtype(full.dtype, call.config.reduce_dtype) != full.dtype
        if wide or not scatter.out.is_contiguous() or full.device.type == "cpu":
            # A backend adds in the tensors' own type; all-to-all sends the same bytes and we add in a wider one. And
            # Gloo's reduce-scatter is an all-reduce (torch 2.13) whose wait can neither look up nor end early.
            super().reduce_scatter(call, full)
            return
        call = self._scatter_part(call, scatter)
        with self._lock, self._errors(call), timed_call(call.operator, call.phase, self.name, self.rank):
            lane = self._prepare(call)
            out = scatter.out.view(-1)
            with lane.alone():
                work = lane.issue(lambda: reduce_scatter_single(out, full.view(-1), group=lane.group, async_op=True))
            self._wait_for(call, "reduce-scatter", work)
        self._count(call)

    def all_to_all(self, call: Call, full: Tensor, out: Tensor) -> None:
        if not out.is_contiguous():
            super().all_to_all(call, full, out)
            return
        call = self._sends_parts(call, full, out)
        with self._lock, self._errors(call), timed_call(call.operator, call.phase, self.name, self.rank):
            lane = self._prepare(call)
            with lane.alone():
                work = lane.all_to_all(as_bytes(out), as_bytes(full))
            self._wait_for(call, "all-to-all", work)
        self._count(call)

    # ---- ranks that differ, peers that are gone ----------------------------------------------------------------------

    def _ask(self, call: Call, extra: str = "") -> Callable[[], None]:
        """Starts to compare ``call`` among the ranks; what it returns waits for that, and raises if they differ."""
        self._sequence += 1
        signature = (f"{_STEP}{self._step}: " if self._step else "") + call.signature + extra
        if self._handshakes is not None:
            if self._capturing:
                return lambda: None  # what a capture repeats was compared when it ran before
            if not self._handshakes.beside:
                signature = call.kind + extra  # what is announced is new each time: a collective more for every step
            timeout_s = call.config.timeout_s
            self._handshakes.compare(self._group, signature, self._sequence, timeout_s, lambda: self._look(call))
            return lambda: None
        own = signature_hash(signature)
        everyone = self._exchange(call, torch.tensor([own], dtype=torch.int64))
        return lambda: self._compare(call, signature, everyone().flatten().tolist())

    def _compare(self, call: Call, signature: str, hashes: list[int]) -> None:
        if len(set(hashes)) == 1:
            return
        # Everybody has seen the same hashes, so everybody comes here.
        texts = self._exchange(call, _text(signature))()
        signatures = [bytes(row.tolist()).decode(errors="replace").strip() for row in texts]
        if _LEFT in hashes:
            self._heard = True
            said = signatures[hashes.index(_LEFT)]
            raise PeerLostError(f"{self._where(call)}; {said}", said=said)
        calls = dict(zip(self._names, zip(hashes, signatures, strict=True), strict=True))
        differ = describe_mismatch(calls, self._sequence)
        if len({text.partition(":")[0] for text in signatures if text.startswith(_STEP)}) > 1:
            # They would stay one batch apart.
            raise RankMismatchError(f"{differ}; destroy the process group and make it again", lasting=True)
        raise RankMismatchError(differ)

    def _exchange(self, call: Call, own: Tensor) -> Callable[[], Tensor]:
        """Starts to gather something small of every rank; what it returns waits for it, [world, numbers]."""
        assert self._lane is not None
        everyone = own.new_empty((self.world, own.numel()))
        work = self._lane.issue(lambda: all_gather_single(everyone.view(-1), own, self._group, async_op=True))

        def arrived() -> Tensor:
            self._wait_for(call, "every rank's call", work)
            return everyone

        return arrived

    def _wait_for(self, call: Call, what: str, handle: Any) -> None:
        """Where no step of a schedule says that this rank waits, a trace shall."""
        with timed_wait(what, call.operator, call.phase, self.name, self.rank):
            self._wait(call, handle)

    def _wait(self, call: Call, handle: Any) -> None:
        assert self._lane is not None
        self._lane.finish(handle, self._where(call), call.config.timeout_s, lambda: self._look(call))

    def _look(self, call: Call) -> None:
        self._meeting.look(self._where(call))

    def _where(self, call: Call) -> str:
        return f"{call.name}: rank {self._names[self.rank]}, collective number {self._sequence} of its group"

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
            if error.lasting:
                self._meeting.give_up(str(error))
            raise
        except BaseException as error:
            if self._heard and isinstance(error, PeerLostError):
                raise
            self.broken = departure(self._names[self.rank], "gave up", error)
            self._meeting.give_up(self.broken)  # first: peers whose connections end ask why
            if self._lane is not None:
                self._lane.abandon()
            if isinstance(error, CommunicationError) or not isinstance(error, (RuntimeError, WaitTimeoutError)):
                raise
            if isinstance(error, WaitTimeoutError):
                raise SignalTimeoutError(
                    f"{self._where(call)}: {error}, and all known processes are alive: a peer is stuck, has not come, "
                    f"or makes other calls",
                    lasting=True,
                ) from error
            reason = str(error).splitlines()[0][:200]
            if isinstance(error, dist.DistError) or "gloo" in reason.lower() or "connection" in reason.lower():
                gone = lost_members_soon(self._meeting.members or [])
                if gone:
                    raise self._meeting.lost(self._where(call), gone, reason) from error
                raise PeerLostError(f"{self._where(call)}: a peer left the group ({reason})", lasting=True) from error
            raise


def _text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES)), dtype=torch.uint8)
