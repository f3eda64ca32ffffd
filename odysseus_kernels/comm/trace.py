"""When a rank computed, waited, copied and signalled: the steps of its schedules, as trace events.

Transports hand their steps through :func:`timed` and their calls through :func:`timed_call`; where nothing is traced,
both give back what they were given after one look.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from odysseus_kernels.comm.schedules.steps import Kind, Step

__all__ = ["timed", "timed_call", "trace"]

_CATEGORIES = {
    Kind.COPY: "copy",
    Kind.COMPUTE: "compute",
    Kind.WAIT: "wait",
    Kind.FINISH: "wait",
    Kind.SIGNAL: "signal",
    Kind.RELEASE: "signal",
    Kind.ISSUE: "send",
}

_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_active: trace | None = None

# Begin and end by time.perf_counter_ns, thread, operator, phase, transport, rank in its group, and the step, if it is
# not the call itself.  Texts are made when the file is written.
_Event = tuple[int, int, int, str, str, str, int, Step | None]


class trace:  # noqa: N801 - used as a function is, like torch.no_grad
    """Writes what this rank's operators did meanwhile, step by step, as Chrome trace events that Perfetto shows.

    Every rank writes a file of its own, ``path`` with ``-rank0`` and so on before the suffix; the process number of its
    events is its rank, and times are wall-clock times, so that https://ui.perfetto.dev shows ranks below one another
    when their ``traceEvents`` are put into one file (``jq -s '{traceEvents: map(.traceEvents) | add}'``).  A call is an
    event with its steps within it; ``args`` has operator, phase, transport, and peer and chunk (ranks of the call's
    group) and piece.  Categories: ``call``, ``compute``, ``wait`` (for a peer's signal or data), ``copy`` (into shared
    memory), ``send`` (given to a backend), ``signal``.  Results do not change.

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
        self._events: list[_Event] = []

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

    def _follow(self, steps: Iterable[Step], operator: str, phase: str, transport: str, rank: int) -> Iterator[Step]:
        clock, add, thread = time.perf_counter_ns, self._events.append, threading.get_native_id()
        for step in steps:
            begin = clock()
            yield step  # one that raises has no end, and is left out
            add((begin, clock(), thread, operator, phase, transport, rank, step))

    @contextlib.contextmanager
    def _call(self, operator: str, phase: str, transport: str, rank: int) -> Iterator[None]:
        begin = time.perf_counter_ns()
        try:
            yield
        finally:
            thread = threading.get_native_id()
            self._events.append((begin, time.perf_counter_ns(), thread, operator, phase, transport, rank, None))

    def _document(self) -> dict[str, Any]:
        name = {"name": f"rank {self.rank} on {socket.gethostname()}"}
        events: list[dict[str, Any]] = [{"name": "process_name", "ph": "M", "pid": self.rank, "args": name}]
        for begin, end, thread, operator, phase, transport, rank, step in sorted(self._events, key=_outer_first):
            args: dict[str, Any] = {"operator": operator, "phase": phase, "transport": transport}
            if step is not None:
                args |= _details(step, rank)
            events.append(
                {
                    "name": f"{operator} {phase}" if step is None else _title(step, args),
                    "cat": "call" if step is None else _CATEGORIES.get(step.kind, step.kind.value),
                    "ph": "X",
                    "ts": (begin + self._wall_offset_ns) / 1000,
                    "dur": (end - begin) / 1000,
                    "pid": self.rank,
                    "tid": thread,
                    "args": args,
                }
            )
        return {"traceEvents": events, "displayTimeUnit": "ms"}


def timed(steps: Sequence[Step], operator: str, phase: str, transport: str, rank: int) -> Iterable[Step]:
    """``steps``; each lasts, in a trace that is active, until the next one is asked for."""
    return steps if _active is None else _active._follow(steps, operator, phase, transport, rank)


def timed_call(operator: str, phase: str, transport: str, rank: int) -> contextlib.AbstractContextManager[None]:
    """Lasts as long as a call, in a trace that is active."""
    return _NOTHING if _active is None else _active._call(operator, phase, transport, rank)


def _outer_first(event: _Event) -> tuple[int, int]:
    return event[0], -event[1]


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
