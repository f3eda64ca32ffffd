"""Data between CPU ranks over TCP connections of this package's own: both directions at once, at the wire's rate.

Gloo's pairs announce every receive on the connection by which they send, so an announcement waits behind the data that
leaves and the two directions of a link take turns.  Here nothing is announced: each direction of each pair of ranks has
a connection of its own, on which blocks follow one another in the order in which all ranks issue their transfers.

Concurrency contract.  For each peer one thread sends and one receives (blocking calls, without the interpreter's lock).
A block belongs to its thread from :meth:`Links.exchange` until the transfer has finished.  :meth:`Links.close` ends
what is under way: it shuts the connections down, on which the threads return.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from odysseus_kernels.comm.trace import Block, note_block
from odysseus_kernels.errors import CommunicationError

__all__ = ["Links", "LostConnectionError", "Transfer"]

# Number of the transfer, bytes of the block.
_HEADER = struct.Struct("<QQ")
_JOIN_S = 2.0


class LostConnectionError(RuntimeError):
    """A connection ended while something was under way on it."""


class Transfer:
    """Blocks to and from several peers that are under way."""

    def __init__(self, blocks: int) -> None:
        self._left = blocks
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self.error: Exception | None = None
        if not blocks:
            self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended within ``seconds``: everything was sent and received, or ``error`` says what failed."""
        return self._ended.wait(seconds)

    def end_block(self, error: Exception | None = None) -> None:
        """One more block was sent or received, or could not be."""
        with self._lock:
            self._left -= 1
            if error is not None and self.error is None:
                self.error = error
            if self._left == 0 or self.error is not None:
                self._ended.set()


class Links:
    """The connections of one rank of a group, made by ``comm/collective/connecting.py``.

    Args:
        leaving: for each peer, the connection on which this rank sends.
        arriving: for each peer, the one on which it receives.
        names: ranks' numbers in the default process group, by which errors call them.
    """

    def __init__(self, leaving: Mapping[int, socket.socket], arriving: Mapping[int, socket.socket], names: list[int]):
        self._process = os.getpid()
        self._number = 0
        self._senders = {peer: _Courier(one, peer, names[peer], sends=True) for peer, one in leaving.items()}
        self._receivers = {peer: _Courier(one, peer, names[peer], sends=False) for peer, one in arriving.items()}

    def exchange(self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]) -> Transfer:
        """Starts to send ``sent[peer]`` to each peer and to receive ``received[peer]`` from it: contiguous tensors.

        All ranks start the same transfers in the same order.  Blocks without elements are not sent.
        """
        self._number += 1
        blocks = [(self._receivers[peer], block) for peer, block in received.items() if block.numel()]
        blocks += [(self._senders[peer], block) for peer, block in sent.items() if block.numel()]
        transfer = Transfer(len(blocks))
        for courier, block in blocks:
            courier.take(self._number, block, transfer)
        return transfer

    def close(self) -> None:
        """Ends all threads and connections; transfers under way end with an error."""
        couriers = [*self._senders.values(), *self._receivers.values()]
        for courier in couriers:
            # A connection that a forked child shut down would be shut down for its parent.
            courier.close(shut_down=os.getpid() == self._process)
        self._senders, self._receivers = {}, {}


class _Courier:
    """One direction of one peer: moves block after block on its thread."""

    def __init__(self, connection: socket.socket, peer: int, name: int, *, sends: bool) -> None:
        self._connection, self._rank, self._peer, self._sends = connection, peer, f"rank {name}", sends
        self._ends = _ends(connection, sends=sends)
        self._blocks: queue.SimpleQueue[tuple[int, Tensor, Transfer] | None] = queue.SimpleQueue()
        does = "sends to" if sends else "receives from"
        self._thread = threading.Thread(target=self._run, name=f"odysseus {does} {self._peer}", daemon=True)
        self._thread.start()

    def take(self, number: int, block: Tensor, transfer: Transfer) -> None:
        self._blocks.put((number, block, transfer))

    def close(self, *, shut_down: bool) -> None:
        self._blocks.put(None)
        if shut_down:
            with contextlib.suppress(OSError):  # the peer was first
                self._connection.shutdown(socket.SHUT_RDWR)
            self._thread.join(_JOIN_S)
        self._connection.close()

    def _run(self) -> None:
        failed: Exception | None = None
        while (taken := self._blocks.get()) is not None:
            number, block, transfer = taken
            try:
                if failed is None:
                    self._move(number, _memory(block))
            except OSError as error:
                failed = LostConnectionError(f"connection with {self._peer} lost: {error.strerror or error}")
                failed.__cause__ = error
            except (LostConnectionError, CommunicationError) as error:
                failed = error
            transfer.end_block(failed)
            del taken, block, transfer  # not kept until the next one comes

    def _move(self, number: int, block: memoryview) -> None:
        move: Callable[[socket.socket, int, memoryview, str], int] = _send if self._sends else _receive
        begin = move(self._connection, number, block, self._peer)
        direction: Literal["send", "receive"] = "send" if self._sends else "receive"
        note_block(Block(direction, self._rank, self._peer, number, block.nbytes, self._ends, begin))


def _ends(connection: socket.socket, *, sends: bool) -> str:
    """The connection's two addresses, the sender's first: both ends say the same, and no other connection does."""
    try:
        ends = [connection.getsockname(), connection.getpeername()]
    except OSError:  # the peer is gone already, which the first block will say
        return ""
    return " > ".join(
        f"{end[0]}:{end[1]}" if isinstance(end, tuple) else str(end) for end in ends[:: 1 if sends else -1]
    )


def _memory(block: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, whose storage NumPy's view would for ever forbid to resize, as FSDP does."""
    size = block.numel() * block.element_size()
    return memoryview((ctypes.c_char * size).from_address(block.data_ptr())).cast("B")


def _send(connection: socket.socket, number: int, block: memoryview, peer: str) -> int:
    """Returns when it began, by ``time.perf_counter_ns``."""
    begin = time.perf_counter_ns()
    sent = connection.sendmsg([_HEADER.pack(number, block.nbytes), block]) - _HEADER.size
    while sent < 0:
        sent += connection.send(_HEADER.pack(number, block.nbytes)[sent:])
    while sent < block.nbytes:
        sent += connection.send(block[sent:])
    return begin


def _receive(connection: socket.socket, number: int, block: memoryview, peer: str) -> int:
    """Returns when the block began to arrive, by ``time.perf_counter_ns``."""
    header = bytearray(_HEADER.size)
    _fill(connection, memoryview(header), peer)
    begin = time.perf_counter_ns()
    found, nbytes = _HEADER.unpack(header)
    if (found, nbytes) != (number, block.nbytes):
        raise CommunicationError(
            f"expected {block.nbytes} bytes of transfer {number} from {peer}, got {nbytes} bytes of transfer {found}: "
            f"ranks make different calls",
            lasting=True,
        )
    _fill(connection, block, peer)
    return begin


def _fill(connection: socket.socket, block: memoryview, peer: str) -> None:
    filled = 0
    while filled < block.nbytes:
        count = connection.recv_into(block[filled:], 0, socket.MSG_WAITALL)
        if count == 0:
            raise LostConnectionError(f"connection closed by {peer}")
        filled += count
