"""What runs inside a process that :mod:`odysseus_kernels.testing.spawn` has started.

Functions come from the parent process by name, with pickled arguments: the parent is trusted, it started this process.
Results go back as ``torch.save`` files of plain values and lines of JSON, because the parent does not unpickle.
"""

from __future__ import annotations

import dataclasses
import datetime
import faulthandler
import importlib
import importlib.util
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["START_JOB", "Reference", "Setup", "result_path", "serve", "stack_path"]

START_JOB = 0  # number of the "job" that a rank's start is


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a rank is told when it starts."""

    rank: int
    world_size: int
    threads: int
    timeout: float
    backend: str
    folder: str
    environment: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Reference:
    """A function by name, and where a rank finds its module."""

    module: str
    name: str
    file: str
    path: list[str]

    @staticmethod
    def of(fn: Callable[..., Any]) -> Reference:
        """The reference to ``fn``, which must be a function at the top level of a module (ValueError)."""
        name = getattr(fn, "__qualname__", repr(fn))
        if not inspect.isfunction(fn) or "<" in name:
            raise ValueError(f"expected a function at the top level of a module, which ranks can import, got {name}")
        return Reference(fn.__module__, name, inspect.getfile(fn), list(sys.path))

    def resolve(self) -> Callable[..., Any]:
        """Imports the module, from its file if no path leads to it, and returns the function."""
        sys.path.extend(entry for entry in self.path if entry not in sys.path)
        module = sys.modules.get(self.module)
        if module is None:
            try:
                module = importlib.import_module(self.module)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{self.module}.".startswith(f"{error.name}."):
                    raise  # the module exists; what it imports does not
                spec = importlib.util.spec_from_file_location(self.module, self.file)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[self.module] = module
                spec.loader.exec_module(module)
        target: Any = module
        for part in self.name.split("."):
            target = getattr(target, part)
        return target


def serve(setup: Setup, channel: multiprocessing.connection.Connection) -> None:
    """Body of a rank: joins the group, then runs functions until the channel ends."""
    os.environ.clear()  # a fork server's environment is as old as the server
    os.environ.update(setup.environment)
    stacks = stack_path(setup.folder, setup.rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the ranks
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = START_JOB

    def attempt(action: Callable[[], Any]) -> None:
        report: dict[str, Any] = {"error": None}
        try:
            result = plain(action())
            torch.save(result, result_path(setup.folder, job, setup.rank))
        except BaseException as error:  # noqa: BLE001 - reported to the parent, which raises it there
            kind = type(error)
            name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            report = {"error": name, "message": str(error), "traceback": traceback.format_exc()}
        channel.send_bytes(json.dumps(report).encode())

    attempt(lambda: _join_group(setup))
    while True:
        try:
            message = channel.recv_bytes()
        except (EOFError, ConnectionResetError):
            break
        job += 1
        torch.manual_seed(0)

        def call(message: bytes = message) -> Any:
            reference, args = pickle.loads(message)  # from the parent process, which started this one
            return reference.resolve()(setup.rank, setup.world_size, *args)

        attempt(call)
    if dist.is_initialized():
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """A rank in the middle of a function would outlive a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _join_group(setup: Setup) -> None:
    torch.set_num_threads(setup.threads)
    dist.init_process_group(
        setup.backend,
        init_method=f"file://{setup.folder}/rendezvous",
        rank=setup.rank,
        world_size=setup.world_size,
        timeout=datetime.timedelta(seconds=setup.timeout),
    )


def plain(value: Any) -> Any:
    """``value`` with its tensors copied to the CPU, so that a file holds no storage that only a view was taken of."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"a rank can return plain tensors, got a {type(value).__name__}: return its local tensor")
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [plain(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a rank can return tensors, numbers, text, None, dicts, lists and tuples, got {type(value)}")


def result_path(folder: str, job: int, rank: int) -> Path:
    """File of what a rank returned."""
    return Path(folder) / f"job{job}-rank{rank}.pt"


def stack_path(folder: str, rank: int) -> Path:
    """File of the Python stacks that a rank writes on SIGUSR1."""
    return Path(folder) / f"stacks-rank{rank}.txt"
