"""A program on ranks that have imported what it needs: starting Python with transformers takes most of a short run."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from odysseus_kernels.testing.spawn import RankPool


def output_of(script: Path, ranks: int, *arguments: str, limit_s: float) -> str:
    """What all ranks of ``torchrun script arguments`` print; on one rank, what ``python script arguments`` does."""
    with RankPool(ranks, timeout=limit_s) as pool:
        return "".join(pool.run(_run, str(script), list(arguments)))


def _run(rank: int, world_size: int, script: str, arguments: list[str]) -> str:
    if world_size > 1:
        os.environ |= _torchruns(rank, world_size)
    dist.destroy_process_group()  # the program makes its own
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(script, run_name="__main__")
    return printed.getvalue()


_store: Any = None  # lives as long as the process


def _torchruns(rank: int, world_size: int) -> dict[str, str]:
    """The variables that torchrun sets, with a store at which ranks meet."""
    global _store
    port = [0]
    if rank == 0:
        _store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        port = [_store.port]
    dist.broadcast_object_list(port, src=0)
    size = str(world_size)
    numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port[0]), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**numbers, **place}
