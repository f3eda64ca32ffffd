"""What a device enqueues: the interface of ``cuda.Program``, of its simulation and of its rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["Address", "Operations"]

Address = tuple[int, int]  # index of a base, bytes from there


class Operations(Protocol):
    """What a plan is recorded into; ``odysseus_kernels/_C.pyi`` documents it (``cuda.Program``)."""

    def copy(
        self,
        stream: int,
        dst: Address,
        src: Address,
        row_bytes: int,
        rows: int = 1,
        dst_pitch: int = 0,
        src_pitch: int = 0,
        over_link: bool = False,
    ) -> None: ...
    def wait(self, stream: int, epoch: Address, words: list[Address], values: list[int], tag: int) -> None: ...
    def signal(self, stream: int, epoch: Address, words: list[Address], values: list[int]) -> None: ...
    def advance(self, stream: int, epoch: Address) -> None: ...
    def reduce(
        self,
        stream: int,
        out: Address,
        out_dtype: str,
        sources: list[Address],
        source_dtype: str,
        count: int,
        rows: int = 1,
        out_pitch: int = 0,
        source_pitches: list[int] | None = None,
        *,
        beside: int = 0,
    ) -> None: ...
    def reduce_multicast(
        self,
        stream: int,
        out: Address,
        multicast: Address,
        dtype: str,
        count: int,
        rows: int = 1,
        out_pitch: int = 0,
        beside: int = 0,
    ) -> None: ...
    def store_multicast(
        self,
        stream: int,
        multicast: Address,
        src: Address,
        row_bytes: int,
        rows: int = 1,
        src_pitch: int = 0,
        beside: int = 0,
    ) -> None: ...
    def record(self, stream: int, event: int) -> None: ...
    def depend(self, stream: int, event: int) -> None: ...
    def play(
        self,
        stops: list[int],
        callbacks: Sequence[Callable[[], object] | None],
        streams: list[int],
        bases: list[int],
        timeout_s: float,
    ) -> None: ...
    def __len__(self) -> int: ...
    def close(self) -> None: ...
