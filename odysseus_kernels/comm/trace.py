"""When a rank computed, waited, copied, sent and received: the steps of its schedules, as trace events.

Transports hand their steps through :func:`timed`, their calls through :func:`timed_call` and waits that are no steps
through :func:`timed_wait`; the threads that move data say so to :func:`note_block`.  Where nothing is traced, all of
these are done after one look.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch.distributed as dist

from odysseus_kernels.comm.schedules.steps import Kind, Step, Task

__all__ = ["Block", "note_block", "timed", "timed_call", "timed_wait", "trace"]

_CATEGORIES = {
    Kind.COPY: "copy",
    Kind.COMPUTE: "compute",
    Kind.WAIT: "wait",
    Kind.FINISH: "wait",
    Kind.SIGNAL: "signal",
    Kind.RELEASE: "signal",
    Kind.ISSUE: "issue",
}
# What the callbacks of an unfused twin only copy.
_COPIED = (Task.CONSUME, Task.PRODUCE, Task.VISIT)
# Order of a rank's threads, from above: those that call, then those that send, then those that receive.
_CALLS, _SENDS, _RECEIVES = range(3)

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_active: trace | None = None


class Block(NamedTuple):
    """What one thread moved over one connection.

    Attributes:
        direction: ``"send"`` until the kernel has taken the last byte, ``"receive"`` since the first one was there.
        peer: rank in the group.
        peer_name: the peer as people call it.
        number: of the transfer that it belongs to, counted on the connection.
        nbytes: without header.
        connection: the same text at both ends, and no other connection's; empty if it is not known.
        begin_ns: by ``time.perf_counter_ns``.
    """

    direction: Literal["send", "receive"]
    peer: int
    peer_name: str
    number: int
    nbytes: int
    connection: str
    begin_ns: int


class _Slice(NamedTuple):
    """``what``: a step, a wait that is no step, or None for the call itself.  Texts are made when the file is written.

    ``begin`` and ``end`` by ``time.perf_counter_ns``; ``rank`` in the call's group; ``copies``: callbacks only copy.
    """

    begin: int
    end: int
    thread: int
    operator: str
    phase: str
    transport: str
    rank: int
    copies: bool
    what: Step | str | None


class trace:  # noqa: N801 - used as a function is, like torch.no_grad
    """Writes what this rank's operators did meanwhile, step by step, as Chrome trace events that Perfetto shows.

    Every rank writes a file of its own, ``path`` with ``-rank0`` and so on before the suffix; the process number of its
    events is its rank, and times are wall-clock times in whole microseconds, so that https://ui.perfetto.dev shows
    ranks below one another when their ``traceEvents`` are put into one file
    (``jq -s '{traceEvents: map(.traceEvents) | add}'``).  A call is an event with its steps within it; ``args`` has
    operator, phase, transport, and peer and chunk (ranks of the call's group) and piece.  Categories: ``call``,
    ``compute``, ``wait`` (for a peer's signal, data or call), ``copy`` (into or, unfused, out of shared memory),
    ``issue`` (given to a backend), ``signal``.  Results do not change.

    Data that travels over connections of this package's own is shown on the threads that move it, as ``send`` (until
    the kernel has taken the last byte) and ``receive`` (since the first byte was there), with an arrow from one to the
    other; ``transfer`` counts them.  A block that is under way at the end is left out.

    Steps are those of CPU ranks and of the collective transport.  On a GPU events say when the host enqueued
    something, and the symmetric transport's calls have no steps; use torch.profiler there.

    Args:
        path: file to derive the ranks' names from; its folder exists.

    Raises:
        RuntimeError: another trace is active in this process.

    Example:
        >>> import json
        >>> with ody.trace(folder / "step.json") as traced:
        ...     y = ody.all_gather_linear(torch.ones(2, 4), torch.ones(3, 4), group=group)
        >>> events = json.loads(traced.path.read_text())["traceEvents"]
        >>> [event["args"]["operator"] for event in events if event.get("cat") == "call"]
        ['all_gather_linear']
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = Path(path)
        self.rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self.path = given.with_name(f"{given.stem}-rank{self.rank}{given.suffix or '.json'}")
        self._slices: list[_Slice] = []
        self._blocks: list[tuple[int, int, Block]] = []  # end, thread

    def __enter__(self) -> trace:
        global _active
        if _active is not None:
            raise RuntimeError(f"expected no other trace in this process, one is being made for {_active.path}")
        # Between two looks at one clock, the other one's time is known to within their distance.
        self._wall_offset_ns = time.time_ns() - time.perf_counter_ns()
        _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _active
        _active = None
        self.path.write_text(json.dumps(self._document()))

    def _follow(
        self, steps: Iterable[Step], operator: str, phase: str, transport: str, rank: int, copies: bool
    ) -> Iterator[Step]:
        clock, add, thread = time.perf_counter_ns, self._slices.append, threading.get_native_id()
        for step in steps:
            begin = clock()
            yield step  # one that raises has no end, and is left out
            add(_Slice(begin, clock(), thread, operator, phase, transport, rank, copies, step))

    @contextlib.contextmanager
    def _lasting(self, operator: str, phase: str, transport: str, rank: int, what: str | None) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            end, thread = time.perf_counter_ns(), threading.get_native_id()
            self._slices.append(_Slice(begin, end, thread, operator, phase, transport, rank, False, what))

    def _note(self, block: Block) -> None:
        self._blocks.append((time.perf_counter_ns(), threading.get_native_id(), block))

    def _document(self) -> dict[str, Any]:
        slices = sorted(self._slices, key=lambda one: (one.begin, -one.end))  # the outer one first
        blocks = sorted(self._blocks, key=lambda noted: noted[2].begin_ns)
        threads = dict.fromkeys((one.thread for one in slices), (_CALLS, "calls"))
        for _, thread, block in blocks:
            sent = block.direction == "send"
            lane = f"sends to {block.peer_name}" if sent else f"receives from {block.peer_name}"
            threads[thread] = (_SENDS if sent else _RECEIVES, lane)
        events = [
            self._metadata("process_name", name=f"rank {self.rank} on {socket.gethostname()}"),
            self._metadata("process_sort_index", sort_index=self.rank),
        ]
        for thread, (place, lane) in threads.items():
            events.append(self._metadata("thread_name", thread, name=lane))
            events.append(self._metadata("thread_sort_index", thread, sort_index=place))
        events += [self._event(one) for one in slices]
        for end, thread, block in blocks:
            events += self._block_events(end, thread, block)
        return {"traceEvents": events, "displayTimeUnit": "ms"}

    def _metadata(self, name: str, thread: int = 0, /, **args: Any) -> dict[str, Any]:
        return {"name": name, "ph": "M", "pid": self.rank, "tid": thread, "args": args}

    def _span(self, begin: int, end: int, thread: int) -> dict[str, Any]:
        """Where a slice lies, in whole microseconds since 1970.

        Perfetto reads a number with a point as a float and multiplies it by 1000: at times since 1970 that leaves steps
        of 256 ns, slices closer than that may overlap, and those that do it drops.  Whole numbers it reads as they are.
        All times are rounded in one direction, which keeps their order: what follows one another does not
        overlap, what is within another stays there.
        """
        first, last = ((moment + self._wall_offset_ns) // 1000 for moment in (begin, end))
        return {"ph": "X", "ts": first, "dur": last - first, "pid": self.rank, "tid": thread}

    def _event(self, one: _Slice) -> dict[str, Any]:
        args: dict[str, Any] = {"operator": one.operator, "phase": one.phase, "transport": one.transport}
        if one.what is None:
            name, category = f"{one.operator} {one.phase}", "call"
        elif isinstance(one.what, str):
            name, category = f"wait: {one.what}", "wait"
        else:
            args |= _details(one.what, one.rank)
            name, category = _title(one.what, args), _category(one.what, one.copies)
        return {"name": name, "cat": category, **self._span(one.begin, one.end, one.thread), "args": args}

    def _block_events(self, end: int, thread: int, block: Block) -> Iterator[dict[str, Any]]:
        """The slice, and this end of the arrow from where it was sent to where it arrived."""
        args = {"peer": block.peer, "transfer": block.number, "bytes": block.nbytes}
        sent = block.direction == "send"
        name = f"{block.direction} {block.nbytes / 1e6:.3g} MB {'to' if sent else 'from'} {block.peer_name}"
        span = self._span(block.begin_ns, end, thread)
        yield {"name": name, "cat": block.direction, **span, "args": args}
        if block.connection:
            # A number, the same at both ends: Perfetto shows no arrows that texts name.  48 bits stay what they are
            # in viewers for which numbers are floats.
            digest = hashlib.blake2b(f"{block.connection} {block.number}".encode(), digest_size=6).digest()
            arrow = {"name": "block", "cat": "block", "id": int.from_bytes(digest)}
            # "e": it ends at the slice that it points into, not at the one behind it.
            kind: dict[str, str] = {"ph": "s"} if sent else {"ph": "f", "bp": "e"}
            yield {**arrow, **kind, "ts": span["ts"], "pid": self.rank, "tid": thread}


def timed(
    steps: Sequence[Step], operator: str, phase: str, transport: str, rank: int, *, copies: bool = False
) -> Iterable[Step]:
    """``steps``; each lasts, in a trace that is active, until the next one is asked for.

    ``copies``: what would compute only copies, because the products come before or after.
    """
    return steps if _active is None else _active._follow(steps, operator, phase, transport, rank, copies)


def timed_call(operator: str, phase: str, transport: str, rank: int) -> contextlib.AbstractContextManager[None]:
    """Lasts as long as a call, in a trace that is active."""
    return _NOTHING if _active is None else _active._lasting(operator, phase, transport, rank, None)


def timed_wait(
    what: str, operator: str, phase: str, transport: str, rank: int
) -> contextlib.AbstractContextManager[None]:
    """Lasts as long as a wait within a call that no step stands for, in a trace that is active."""
    return _NOTHING if _active is None else _active._lasting(operator, phase, transport, rank, what)


def note_block(block: Block) -> None:
    """The calling thread has moved ``block``, which ends now; is kept by a trace that is active."""
    active = _active  # another thread may end it meanwhile
    if active is not None:
        active._note(block)


def _category(step: Step, copies: bool) -> str:
    if copies and step.kind is Kind.COMPUTE and step.task in _COPIED:
        return "copy"
    return _CATEGORIES.get(step.kind, step.kind.value)


def _details(step: Step, rank: int) -> dict[str, Any]:
    """Peer, chunk and piece of a step of ``rank``."""
    peer: int | None = step.rank if step.rank not in (-1, rank) else None
    if step.word is not None:
        others = [one for one in (step.word.owner, step.word.writer) if one != rank]
        peer = others[0] if others else None
    found: dict[str, Any] = {"piece": step.piece}
    if step.rank >= 0:
        found["chunk"] = step.rank
    elif step.word is not None:
        found["chunk"] = step.word.owner
    if peer is not None:
        found["peer"] = peer
    return found


def _title(step: Step, args: dict[str, Any]) -> str:
    what = step.kind.value if step.task is None else step.task.value.replace("_", "-")
    if step.kind in (Kind.ISSUE, Kind.FINISH):
        what = f"{step.kind.value} {what}"
    peer = f" rank {args['peer']}" if "peer" in args else ""
    chunk = f", chunk {args['chunk']}" if "chunk" in args else ""
    return f"{what}{peer}{chunk}, piece {step.piece}"
