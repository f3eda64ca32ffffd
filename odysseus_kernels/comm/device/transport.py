"""The symmetric transport of devices with copy engines: schedules of ``comm/schedules/device.py``, executed.

Concurrency contract.  Products run on the caller's current stream.  Copies, waits, signals and sums run on the
transport's own streams of high priority, which leave the caller's stream at the start of a call and join it at the end:
what the caller enqueues next happens after the whole call, so memory that was used may be freed at once and the
allocator needs to know nothing.  ``execute`` returns when everything is enqueued, not when it has happened; the host
never waits for the device.  No SM is spent on moving data (but few on storing it through a switch); waiting takes one
small block, adding the rest of what products leave.

Memory.  A rank's windows hold its published shard and what it receives (two sets of pieces, one from each peer), or for
calls through a switch what it makes for all ranks, and what all ranks store; slots and stages are scratch memory of
the call.  Windows grow with the first call that needs more, by agreement of all ranks;
what they grew by for runs that were only timed is given back.

Errors.  A wait on the device is bounded (``config.timeout_s``).  One that gives up says so in memory that the host
reads: at the next call, in :meth:`SymmetricDeviceTransport.synchronize`, or by the supervisor
(``comm/device/supervisor.py``), which also ends waits for peers that are gone or make other calls.  Copies of a rank
that gave up still run, so results of calls that were in progress are then worth nothing on any rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

from torch import Tensor

from odysseus_kernels.comm.choice.preparation import check_tiles, prepare_tiles
from odysseus_kernels.comm.device import pieces
from odysseus_kernels.comm.device.call import (
    Device,
    Scratch,
    WarmUpNeededError,
    check_sums,
    describe_wait,
    tile_callback,
)
from odysseus_kernels.comm.device.lowering import (
    KINDS,
    WINDOWS,
    Block,
    Layout,
    Plan,
    lower,
    parts_bytes,
    pushed_bytes,
    receive_bytes,
)
from odysseus_kernels.comm.device.pieces import held_multiprocessors
from odysseus_kernels.comm.mismatch import short_text
from odysseus_kernels.comm.schedules.device import (
    AHEAD,
    MAX_PIECES,
    RECEIVE,
    device_schedule,
    drop_schedule,
    tile_schedule,
)
from odysseus_kernels.comm.schedules.leases import Lease, LeaseTable
from odysseus_kernels.comm.schedules.steps import SHARD, Schedule, Step, Task
from odysseus_kernels.comm.schedules.switch import PARTS, PUSHED, switch_schedule
from odysseus_kernels.comm.sent_ahead import SentAhead
from odysseus_kernels.comm.transport import Call, CapacityExceededError, Transport
from odysseus_kernels.errors import CommunicationError, KernelUnavailableError

__all__ = ["SymmetricDeviceTransport"]

_CHUNKS = 2  # whole chunks that slots may hold together
_PLANS = 512


class SymmetricDeviceTransport(Transport):
    """Ranks whose devices reach one another's memory; made by ``comm/group_transports.py``."""

    name = "symmetric"
    serves_tiles = True
    serves_exchange = False
    serves_pipeline = False

    def __init__(self, device: Device, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.completed = 0
        self._device = device
        self.no_switch = device.no_switch
        self._leases = {kind: LeaseTable(WINDOWS, 0) for kind in KINDS}
        self._plans: OrderedDict[Hashable, Plan] = OrderedDict()
        self._ahead: tuple[SentAhead, Lease] | None = None

    def close(self) -> None:
        self.broken = self.broken or "the transport was closed"
        self._ahead = None
        self._device.drain()
        for plan in self._plans.values():
            plan.operations.close()
        self._plans.clear()
        self._device.close()

    @property
    def reserved_bytes(self) -> int:
        return sum(self._device.backed(kind, window) for kind in self._leases for window in range(WINDOWS))

    @contextlib.contextmanager
    def trial(self) -> Iterator[None]:
        held = self._device.hold()
        try:
            yield
        finally:
            with self._lock:
                if not self.broken:
                    self._forget(self._device.restore(held))
                    if self._ahead is not None:  # perhaps to a window that no longer exists: the next call drops it
                        self._ahead = (dataclasses.replace(self._ahead[0], pieces=-1), self._ahead[1])

    def synchronize(self) -> None:
        """Waits until everything that was enqueued has happened.

        Raises:
            CommunicationError: a wait on the device gave up; names the operator, the peer and what it waited for.
        """
        self._device.synchronize()
        self._raise_failure()

    def _raise_failure(self) -> None:
        failure = self._device.failure()
        if failure is not None:
            self.broken = self.broken or str(failure)
            raise failure

    # ---- one call ----------------------------------------------------------------------------------------------------

    def _execute(self, call: Call) -> None:
        if call.config.mode == "tiles":
            check_tiles(call, self.world)
        check_sums(call)
        self._run(call, Scratch(call.gather, call.scatter))

    def all_gather(self, call: Call, out: Tensor) -> None:
        if call.switched:  # by way of windows, into which the switch stores
            super().all_gather(call, out)
            return
        gather = call.gather
        assert gather is not None

        def copy(source: int, start: int, stop: int, block: Tensor) -> None:
            if source == self.rank:  # the others' come straight into place
                out[source, :, start:stop].copy_(block)

        call = dataclasses.replace(call, gather=dataclasses.replace(gather, consume=copy), scatter=None)
        self._run_whole(call, out)

    def reduce_scatter(self, call: Call, full: Tensor) -> None:
        if call.switched:  # by way of windows, out of which the switch adds
            super().reduce_scatter(call, full)
            return
        scatter = call.scatter
        assert scatter is not None

        def copy(target: int, start: int, stop: int, block: Tensor) -> None:
            if target == self.rank:  # the others' leave from where they are
                block.copy_(full[target, :, start:stop])

        self._run_whole(self._scatter_part(call, dataclasses.replace(scatter, produce=copy)), full)

    def _run_whole(self, call: Call, whole: Tensor) -> None:
        assert whole.is_contiguous()
        check_sums(call)
        with self._lock:
            self._run(call, Scratch(call.gather, call.scatter, whole))
        self._count(call)

    def _run(self, call: Call, scratch: Scratch) -> None:
        self._raise_failure()
        if self.broken:
            raise CommunicationError(f"{call.name}: the transport cannot be used any more ({self.broken})")
        if call.config.mode == "tiles" and not self._device.capturing():  # which comes after runs without a capture
            self._prepare_tiles(call)
        try:
            plan, ended = self._prepare(call, scratch)
        except BaseException as error:
            alike = isinstance(error, (CapacityExceededError, WarmUpNeededError, ValueError))  # on all ranks
            if isinstance(error, CommunicationError) or not alike:
                # Such as too little memory for a program: peers may know already that this rank makes the call.
                self.broken = short_text(error)
                self._device.give_up(error)
            raise
        try:
            self._enqueue(call, plan, scratch)
        except BaseException as error:
            # In the middle of a call: peers must not wait for the rest, and its copies still use its memory.
            self.broken = short_text(error)
            self._device.give_up(error)
            with contextlib.suppress(RuntimeError):
                self._device.synchronize()
            if isinstance(error, ValueError) and not isinstance(error, CommunicationError):
                # A ValueError would promise that nothing was sent.
                raise CommunicationError(f"{call.name}: {self.broken}") from error
            raise
        for kind, lease in ended:
            self._leases[kind].give_back(lease, (), ())
        self.completed += 1

    def _prepare_tiles(self, call: Call) -> None:
        """Makes sure that the call's kernel can run before peers are told that this rank makes the call."""
        try:
            prepare_tiles(call)
        except (KernelUnavailableError, ValueError):
            # What it says instead costs no message of its own: ranks that all lack the kernel agree and go on, one that
            # has it learns at once that it would wait in vain.
            try:
                self._device.begin(call, ", for which it has no kernel")
            except CommunicationError as error:
                self.broken = short_text(error)
                self._device.give_up(error)
            raise

    def _enqueue(self, call: Call, plan: Plan, scratch: Scratch) -> None:
        device = self._device
        scratch.take(device, plan)
        scratch.take_windows(device)

        def compute(step: Step) -> None:
            device.call(scratch.callback(step, self.rank))

        callbacks = [
            None
            if action.step is None or scratch.skips(action.step, self.rank)
            else functools.partial(compute, action.step)
            for action in plan.actions
        ]
        # One call of the compiled module for all copies, waits, signals and events; it comes back for products alone.
        plan.operations.play(plan.stops, callbacks, device.streams(), scratch.bases(), call.config.timeout_s)

    def _prepare(self, call: Call, scratch: Scratch) -> tuple[Plan, list[tuple[str, Lease]]]:
        """Leases windows, lets ranks agree on the call, and finds or makes its plan."""
        gather, scatter, whole = call.gather, call.scatter, scratch.whole is not None
        tiles, switched = call.config.mode == "tiles", call.switched
        leases: dict[str, Lease] = {}
        sizes: dict[tuple[str, int], int] = {}
        ended: list[tuple[str, Lease]] = []
        taken, ahead = None, self._ahead
        if gather is not None:
            scratch.shard = Block.of(gather.shard, pieces.of_gather(call, gather.shard, self.world))
        pulls = scratch.shard is not None and not (tiles or whole or switched)
        taken = self._take_ahead(call, scratch.shard.pieces if scratch.shard is not None and pulls else 0)
        if scratch.shard is not None:
            name = PUSHED if switched else SHARD
            leases[name] = taken or self._leases[name].lease()
            stored = pushed_bytes(scratch.shard, self.world, pieces.sets(call, scratch.shard.pieces))
            sizes[name, leases[name].window] = stored if switched else scratch.shard.nbytes
            ended.append((name, leases[name]))
        if scatter is not None:
            name, sms = PARTS if switched else RECEIVE, self._device.multiprocessors
            out = Block.of(scatter.out, 1 if tiles else pieces.of_scatter(call, scatter, self.world, sms))
            scratch.out, leases[name] = out, self._leases[name].lease()
            received = receive_bytes(out, self.world, 1 if tiles else 2)
            sizes[name, leases[name].window] = parts_bytes(out, self.world) if switched else received
            ended.append((name, leases[name]))
        prefetch = call.prefetch
        # What an exchange shares is another transport's; nothing is sent ahead beside what a switch moves.
        able = not (tiles or whole or switched or self._device.capturing())
        if prefetch is not None and prefetch.kind == "gather" and able:
            shard = scratch.prefetch = prefetch.shard
            scratch.ahead = Block.of(shard, pieces.of_gather(call, shard, self.world))
            leases[AHEAD] = self._leases[SHARD].lease()
            sizes[SHARD, leases[AHEAD].window] = scratch.ahead.nbytes
            if not call.keeps_ahead:
                self._ahead = (SentAhead.of(call, prefetch, scratch.ahead.pieces), leases[AHEAD])
        self._device.begin(call, ", prefetched" if taken else "")
        grown = {place: size for place, size in sizes.items() if size > self._device.backed(*place)}
        if grown:
            try:
                self._device.grow(call, grown)
            except (CapacityExceededError, WarmUpNeededError, ValueError):
                self._undo(leases, taken, ahead)
                raise
            self._forget(set(grown))
        windows = {name: lease.window for name, lease in leases.items()}
        scratch.windows = windows
        kind = (tiles, tiles and self._device.capturing())
        key = (call.name, call.program, kind, whole, scratch.blocks, tuple(windows.items()), taken is not None)
        plan = self._plans.get(key)
        if plan is None:
            schedule = self._schedule(call, scratch, published=taken is not None)
            plan = self._lower(call, schedule, scratch, "visits" if tiles else "ranks" if whole else "cells")
            self._remember(key, plan)
        if tiles:
            scratch.tiles = tile_callback(self._device, call, scratch, self.rank, self.world, plan.inside_tag)
        return plan, ended

    def _undo(self, leases: dict[str, Lease], taken: Lease | None, ahead: tuple[SentAhead, Lease] | None) -> None:
        """Gives back what was leased for a call that was not made; what was sent ahead stays to be dropped."""
        for name, lease in reversed(leases.items()):
            if lease is not taken:
                self._leases[SHARD if name == AHEAD else name].restore(lease)
        self._ahead = ahead if taken is not None or ahead is self._ahead else None

    def _schedule(self, call: Call, scratch: Scratch, *, published: bool) -> Schedule:
        shard, out, ahead = scratch.blocks
        gather_pieces = shard.pieces if shard else 1
        if call.config.mode == "tiles":
            captured = self._device.capturing()
            return tile_schedule(call.program, self.world, self.rank, gather_pieces=gather_pieces, captured=captured)
        if call.switched:
            return switch_schedule(
                call.program,
                self.world,
                self.rank,
                gather_pieces=gather_pieces,
                scatter_pieces=out.pieces if out else 1,
                sets=pieces.sets(call, gather_pieces),
            )
        slots = gather_pieces * (self.world - 1 if scratch.whole is not None else _CHUNKS)
        return device_schedule(
            call.program,
            self.world,
            self.rank,
            gather_pieces=gather_pieces,
            scatter_pieces=out.pieces if out else 1,
            slots=min(slots, MAX_PIECES),
            published=published,
            ahead=ahead.pieces if ahead else 0,
        )

    def _lower(self, call: Call, schedule: Schedule, scratch: Scratch, layout: Layout) -> Plan:
        shard, out, ahead = scratch.blocks
        slots = max((s.writes[0].part + 1 for s in schedule.steps if s.task is Task.FETCH), default=0)
        return lower(
            schedule,
            self._device.operations(),
            self._device,
            world=self.world,
            rank=self.rank,
            windows=scratch.windows,
            shard=shard,
            out=out,
            ahead=ahead,
            slots=slots,
            layout=layout,
            tag=lambda steps: self._tag(call, steps),
            finished=[(kind, scratch.windows[kind]) for kind in KINDS if kind in scratch.windows],
            beside=held_multiprocessors(scratch.windows, self.world, self._device.link_bytes_per_s),
        )

    def _remember(self, key: Hashable, plan: Plan) -> None:
        self._plans[key] = plan
        # A captured graph keeps its own copy of what was enqueued; events and pacing belong to plans that still run.
        while len(self._plans) > _PLANS:
            self._plans.popitem(last=False)

    def _forget(self, grown: set[tuple[str, int]]) -> None:
        """Plans whose windows have moved."""
        for key in [key for key in self._plans if self._uses(key, grown)]:
            del self._plans[key]

    @staticmethod
    def _uses(key: Hashable, grown: set[tuple[str, int]]) -> bool:
        assert isinstance(key, tuple)
        return any((SHARD if name == AHEAD else name, window) in grown for name, window in key[5])

    def _tag(self, call: Call, steps: Sequence[Step]) -> int:
        for step in steps:
            self._device.waits.append(describe_wait(call.name, step, self.rank))
        return len(self._device.waits) - len(steps)

    # ---- a shard that was sent ahead ---------------------------------------------------------------------------------

    def _take_ahead(self, call: Call, pieces: int) -> Lease | None:
        """The window that already holds the call's shard; anything else that was sent ahead is dropped.

        ``pieces`` is 0 for a call that cannot use it.
        """
        if call.keeps_ahead or self._device.capturing():
            return None
        held, self._ahead = self._ahead, None
        served = held is not None and held[0].serves(call, pieces)
        self._note_ahead(call, served=served, dropped=held is not None and not served)
        if held is None or served:
            return None if held is None else held[1]
        lease = held[1]
        nothing = Scratch(None, None)
        nothing.windows = {SHARD: lease.window}
        key = ("drop", "", False, False, (), tuple(nothing.windows.items()))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._lower(call, drop_schedule(self.world, self.rank), nothing, "cells")
            self._remember(key, plan)
        self._enqueue(call, plan, nothing)
        self._leases[SHARD].give_back(lease, (), ())
        return None
