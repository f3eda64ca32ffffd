"""Processes that each hold one SymmetricHost and do what the test tells them, for tests/test_ext.py.

They load the compiled module by its file, so that starting one takes a tenth of a second and not a torch import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

REPLY_LIMIT_S = 60.0


def load_extension(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("odysseus_kernels._C", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["odysseus_kernels._C"] = module
    spec.loader.exec_module(module)
    return module


class Actions:
    """What a peer can do besides the host's own methods."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.children: list[int] = []

    def write(self, rank: int, window: int, text: bytes) -> None:
        memoryview(self.host.window(rank, window))[: len(text)] = text

    def read(self, rank: int, window: int, count: int) -> bytes:
        return bytes(memoryview(self.host.window(rank, window))[:count])

    def produce(self, reader: int, calls: int, cells: int, size: int) -> None:
        """Fills the own window's cells in turn; overwrites one only with its reader's credit."""
        data = memoryview(self.host.window(self.host.rank, 0))
        for call in range(calls):
            cell, turn = call % cells, call // cells
            assert self.host.wait_done(reader, 0, cell, turn, 20)[0] == "ok"
            data[cell * size : (cell + 1) * size] = bytes([call % 251]) * size
            self.host.set_ready(0, cell, turn + 1)

    def consume(self, owner: int, calls: int, cells: int, size: int) -> int:
        """Counts cells that hold exactly what their turn must hold."""
        data = memoryview(self.host.window(owner, 0))
        right = 0
        for call in range(calls):
            cell, turn = call % cells, call // cells
            assert self.host.wait_ready(owner, 0, cell, turn + 1, 20)[0] == "ok"
            right += data[cell * size : (cell + 1) * size] == bytes([call % 251]) * size
            self.host.set_done(owner, 0, cell, turn + 1)
        return right

    def fork_and_use(self) -> str:
        """What a forked child hears when it signals; the child then ends with its copy of the host."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            message = "no error"
            try:
                self.host.set_ready(0, 0, 1)
            except RuntimeError as error:
                message = str(error)
            os.write(writing, message.encode())
            self.host.close()
            self.host = None
            os._exit(0)
        os.waitpid(child, 0)
        with os.fdopen(reading, "rb") as pipe:
            os.close(writing)
            return pipe.read().decode()

    def fork_and_stay(self) -> int:
        """Leaves a child behind that holds copies of all descriptors and mappings."""
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        return child


def serve(extension: str, connection: Connection, arguments: tuple[Any, ...]) -> None:
    host = load_extension(extension).SymmetricHost(*arguments)
    # Not inherited: a shell starts background jobs with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    actions = Actions(host)
    connection.send(host.path)
    while True:
        try:
            name, values = connection.recv()
        except EOFError:
            return
        try:
            target = getattr(actions, name, None) or getattr(host, name)
            result = target(*values) if callable(target) else target
            connection.send(("result", result, ""))
        except BaseException as error:  # noqa: BLE001 - the test asserts on it
            connection.send(("error", type(error).__name__, str(error)))


class PeerError(Exception):
    """An exception in a peer: the name of its type and its text."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class Peer:
    def __init__(self, extension: str, rank: int, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(extension, theirs, (rank, *arguments)), daemon=True)
        self.process.start()
        theirs.close()
        assert self.connection.poll(REPLY_LIMIT_S), f"rank {rank} did not start"
        self.path: str = self.connection.recv()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def start(self, name: str, *values: Any) -> None:
        self.connection.send((name, values))

    def finish(self) -> Any:
        assert self.connection.poll(REPLY_LIMIT_S), f"process {self.pid} did not answer"
        outcome, value, text = self.connection.recv()
        if outcome == "error":
            raise PeerError(value, text)
        return value

    def call(self, name: str, *values: Any) -> Any:
        self.start(name, *values)
        return self.finish()

    def kill(self) -> None:
        """Kills it without collecting it: what stays is a zombie."""
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.process.join(10)
        self.connection.close()
