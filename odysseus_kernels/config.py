"""Settings of the operators, as frozen data.  This is the only module that reads environment variables.

======================== ============================================================================
variable                 meaning
======================== ============================================================================
ODYSSEUS_SHM_DIR         directory of the symmetric host transport's segments (default ``/dev/shm``)
ODYSSEUS_CACHE_DIR       directory of what was measured for ``mode="auto"`` (default ``~/.cache/odysseus_kernels``,
                         or below XDG_CACHE_HOME)
ODYSSEUS_HOST            name of this rank's host in place of its hostname: ranks with different names are on different
                         hosts, even on one machine, and the symmetric transport is refused between them
GLOO_SOCKET_IFNAME       network interface of Gloo, and of connections between CPU ranks beside it (default: that of the
                         host name's address)
======================== ============================================================================
"""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Literal, cast, get_args

import torch

__all__ = [
    "MOST_PIECES",
    "Gathered",
    "Mode",
    "OverlapConfig",
    "Switched",
    "TransportName",
    "Tune",
    "cache_directory",
    "hardware_queues",
    "host_name",
    "launched_rank",
    "shared_memory_directory",
    "socket_interface",
]

Mode = Literal["auto", "fused", "tiles", "unfused"]
TransportName = Literal["auto", "symmetric", "collective"]
Gathered = Literal["regather", "save"]
Switched = Literal["ranks", "nvls"]
Tune = Literal["auto", "measure", "model"]

MOST_PIECES = 64
"""Pieces into which a pipelined attention block may cut a sequence."""

_REDUCE_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


def shared_memory_directory() -> str:
    """Directory in which the symmetric host transport makes its (nameless) segments."""
    return os.environ.get("ODYSSEUS_SHM_DIR", "/dev/shm")


def cache_directory() -> Path:
    """Directory in which measured choices are kept."""
    found = os.environ.get("ODYSSEUS_CACHE_DIR")
    if found:
        return Path(found)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odysseus_kernels"


def specialized_tiles() -> bool:
    """Whether ODYSSEUS_SPECIALIZED_TILES is 1: warp-specialized tile kernels may be timed and chosen."""
    return os.environ.get("ODYSSEUS_SPECIALIZED_TILES", "").strip() == "1"


def host_name() -> str:
    """What ODYSSEUS_HOST calls the host of this rank; empty if it is not set, which means the machine's hostname."""
    return os.environ.get("ODYSSEUS_HOST", "").strip()


@dataclasses.dataclass(frozen=True)
class OverlapConfig:
    """How an operator communicates.

    Attributes:
        mode: ``"fused"`` multiplies chunk by chunk as data arrives, with the library's products; ``"tiles"`` runs one
            kernel whose tiles wait and signal (CUDA, symmetric transport; KernelUnavailableError where it cannot be
            compiled); ``"unfused"`` runs the collective and then the product; ``"auto"`` takes what does not lose and
            what all ranks have (see ``tune``; :func:`explain` says what it took).
        transport: ``"symmetric"`` maps every peer's buffers (one host), ``"collective"`` uses the process group's
            NCCL or Gloo; ``"auto"`` takes symmetric where it can and warns once where it cannot.
        chunks_per_rank: pieces into which one rank's shard is cut; ``"auto"`` chooses from the shape.
        gathered: ``"regather"`` keeps only the local shard for backward (1/N activations), ``"save"`` keeps the
            gathered input of :func:`all_gather_linear` and saves one all-gather in backward.
        reduce_dtype: type in which partial results of several ranks are added (fp64 inputs always add in fp64).
        reduce: who adds partial results in :func:`linear_reduce_scatter` and :func:`linear_all_reduce`: ``"ranks"``,
            each its own rows, always in the same order; or ``"nvls"``, the NVLink switch, which also brings the sums of
            an all-reduce to all ranks.  That needs GPUs behind one switch, and rows of fp32, bf16 or fp16 that are
            multiples of 16 bytes; else it is a ValueError on all ranks.  The switch adds in an order of its own, so
            bits need not repeat: N parts p, added in fp32 and rounded once to their type, are within
            ``g * sum(abs(p)) + u * (abs(sum(p)) + g * sum(abs(p)))`` of the exact sum, with g = (N - 1) * 2**-23 to
            first order, u = 2**-7 for bf16, 2**-10 for fp16 and 0 for fp32 (``comm/switch.py``).  Not yet run on a
            device.
        gather: who brings the shards of :func:`all_gather_linear`, and of gradients in :func:`linear_reduce_scatter`'s
            backward: ``"ranks"``, each fetches the others'; or ``"nvls"``, each stores its own to all ranks at once
            through the switch, where that can be had (as for ``reduce``), else it is a ValueError on all ranks.  Not
            yet run on a device.
        timeout_s: seconds after which a wait for a live peer becomes an error that names it.
        tune: how ``mode="auto"`` chooses: ``"measure"`` times all modes at the first call of each shape and remembers
            the fastest for this machine, ``"model"`` computes; ``"auto"`` measures on CUDA and computes on the CPU.
        tile_bytes: most bytes that ``mode="tiles"`` may hold for chunks that arrive.
        pipeline: pieces of the sequence in which a model's attention block is gathered, computed and scattered
            (:func:`pipelined_attention`; strategies ``"odysseus"`` and ``"tp_sp"``); ``"auto"``: as many as
            :func:`shard_sequence` cut the batch into, which asks the cost model; None: its operators are fused one by
            one.  Under ``"ulysses"`` the most groups of a rank's key/value heads instead (:func:`pipelined_ulysses`),
            of which ``"auto"`` takes some for long plain causal sequences between CPU hosts.
        tile_rows: tokens of each rank that a model's feed-forward networks compute at one time, so that what lies
            between their products is [tile_rows, intermediate size], in backward, too, which computes it again; None:
            all tokens.  ZeRO-3 networks then hold their whole weights while they run (``nn/tiled_mlp.py``); mixtures
            of experts are not tiled.

    Example:
        >>> config = ody.OverlapConfig(mode="fused", gathered="save", timeout_s=60)
        >>> ody.all_gather_linear(torch.ones(2, 4), torch.ones(3, 4), group=group, config=config).shape
        torch.Size([4, 3])
        >>> ody.OverlapConfig(mode="fast")
        Traceback (most recent call last):
        ValueError: mode: expected one of ('auto', 'fused', 'tiles', 'unfused'), got 'fast'
    """

    mode: Mode = "auto"
    transport: TransportName = "auto"
    chunks_per_rank: int | Literal["auto"] = "auto"
    gathered: Gathered = "regather"
    reduce_dtype: torch.dtype = torch.float32
    timeout_s: float = 600.0
    tune: Tune = "auto"
    tile_bytes: int = 1 << 30
    pipeline: int | Literal["auto"] | None = "auto"
    tile_rows: int | None = None
    reduce: Switched = "ranks"
    gather: Switched = "ranks"

    def __post_init__(self) -> None:
        named: dict[str, object] = {"mode": Mode, "transport": TransportName, "gathered": Gathered, "tune": Tune}
        named |= {"reduce": Switched, "gather": Switched}
        for name, choices in named.items():
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name}: expected one of {get_args(choices)}, got {getattr(self, name)!r}")
        chunks = self.chunks_per_rank
        if chunks != "auto" and (isinstance(chunks, bool) or not isinstance(chunks, int) or not 1 <= chunks <= 64):
            raise ValueError(f'chunks_per_rank: expected "auto" or a whole number from 1 to 64, got {chunks!r}')
        if self.reduce_dtype not in _REDUCE_DTYPES.values():
            raise ValueError(f"reduce_dtype: expected torch.float32 or torch.float64, got {self.reduce_dtype}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s: expected seconds above 0, got {self.timeout_s!r}")
        if isinstance(self.tile_bytes, bool) or not isinstance(self.tile_bytes, int) or self.tile_bytes < 0:
            raise ValueError(f"tile_bytes: expected a whole number of bytes, got {self.tile_bytes!r}")
        pieces = self.pipeline
        if pieces not in ("auto", None) and (
            isinstance(pieces, bool) or not isinstance(pieces, int) or not 1 <= pieces <= MOST_PIECES
        ):
            raise ValueError(
                f'pipeline: expected "auto", None or a whole number from 1 to {MOST_PIECES}, got {pieces!r}'
            )
        rows = self.tile_rows
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(f"tile_rows: expected a whole number of tokens, 1 or more, or None, got {rows!r}")

    def key(self) -> str:
        """This configuration as a string: what a custom operator takes, since it cannot take a dataclass."""
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return "|".join(str(field) for field in fields)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def from_key(key: str) -> OverlapConfig:
        """The configuration that :meth:`key` turned into ``key``."""
        mode, transport, chunks, gathered, reduce_dtype, timeout_s, tune, *more = key.split("|")
        tile_bytes, pipeline, rows, reduce, gather = more
        return OverlapConfig(
            mode=cast(Mode, mode),
            transport=cast(TransportName, transport),
            chunks_per_rank="auto" if chunks == "auto" else int(chunks),
            gathered=cast(Gathered, gathered),
            reduce_dtype=_REDUCE_DTYPES[reduce_dtype],
            timeout_s=float(timeout_s),
            tune=cast(Tune, tune),
            tile_bytes=int(tile_bytes),
            pipeline="auto" if pipeline == "auto" else None if pipeline == "None" else int(pipeline),
            tile_rows=None if rows == "None" else int(rows),
            reduce=cast(Switched, reduce),
            gather=cast(Switched, gather),
        )


def socket_interface() -> str:
    """The network interface by which Gloo is told to connect, its first if there are several; empty if it is not."""
    return os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0].strip()


def hardware_queues() -> str:
    """What CUDA_DEVICE_MAX_CONNECTIONS says; empty if it is not set, which means 8."""
    return os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS", "").strip()


def launched_rank() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as torchrun sets them; None where no launcher has."""
    if "RANK" not in os.environ:
        return None
    rank = int(os.environ["RANK"])
    return rank, int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", rank))
