"""What ranks of any benchmark do together: a bar of their progress, and the worst figure of all of them."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

__all__ = ["bytes_on_interface", "gather_texts", "largest_over_ranks", "with_progress", "worse"]

_INTERFACES = Path("/proc/self/net/dev")  # of this process's network namespace
_TRANSMITTED = 8  # column of the bytes sent


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Row = TypeVar("Row", bound=_Named)


def with_progress(rows: Sequence[Row], *, visible: bool) -> Iterator[Row]:
    """The rows, with a bar on a terminal (where rich is installed) and a line for each row elsewhere."""
    if visible and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(rows))
            for case in rows:
                progress.update(task, description=case.name)
                yield case
                progress.advance(task)
        return
    for index, case in enumerate(rows, 1):
        begin = time.monotonic()
        yield case
        if visible:
            print(f"[{index}/{len(rows)}] {case.name} ({time.monotonic() - begin:.1f} s)", file=sys.stderr, flush=True)


def bytes_on_interface(interface: str, call: Callable[[], Any]) -> int:
    """Bytes that a network interface sends in ``call``, headers and a barrier's messages included, on the rank of most.

    Raises:
        ValueError: there is no such interface here.
    """

    def sent() -> int:
        for line in _INTERFACES.read_text().splitlines():
            name, _, counters = line.partition(":")
            if name.strip() == interface:
                return int(counters.split()[_TRANSMITTED])
        raise ValueError(f"interface: expected one of {_INTERFACES}, got {interface!r}")

    dist.barrier()
    before = sent()
    call()
    dist.barrier()  # what this rank sent has arrived, or the others would not be here
    found: int = largest_over_ranks({"sent": sent() - before})["sent"]
    return found


def worse(a: float, b: float) -> float:
    """The larger, where NaN is larger than anything."""
    return a if a != a or a > b else b


def largest_over_ranks(values: dict[str, Any]) -> dict[str, Any]:
    """The largest over the ranks of each value; NaN is kept."""
    kind = torch.int64 if all(isinstance(value, int) for value in values.values()) else torch.float64
    mine = torch.tensor(list(values.values()), dtype=kind)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    return dict(zip(values, torch.stack(everyone).amax(0).tolist(), strict=True))


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in the order of the ranks."""
    own = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([own.numel()]))
    longest = max(int(size) for size in sizes)
    everyone = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(everyone, torch.cat([own, own.new_zeros(longest - own.numel())]))
    return [bytes(one[: int(size)].tolist()).decode() for one, size in zip(everyone, sizes, strict=True)]
