"""What a rank says about its failure, outside a group's collectives, where peers that wait in one of them find it.

The symmetric transport of a host has its own place for that (``comm/host/peers.py``).  Everything else uses the store
by which the ranks of a process group found each other.  It is asked only during long waits, and by threads that nobody
waits for: a store that a stopped process serves would stop its clients.
"""

from __future__ import annotations

import contextlib
import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_process_group_store

__all__ = ["Board"]

_POST_LIMIT_S = 1.0
_ASK_EVERY_S = 0.1


class Board:
    """One text for all ranks of a process group, posted once."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._store: dist.Store | None = _get_process_group_store(group)
        self._key = "odysseus_kernels/failure"
        self._found = ""
        self._asking, self._asked = threading.Event(), -_ASK_EVERY_S

    def tell_apart(self, nonce: int) -> None:
        """From now on this group is not confused with an earlier one of the same name in the same store."""
        self._key = f"odysseus_kernels/failure/{nonce}"

    def post(self, text: str) -> None:
        """Says ``text`` to all ranks; what was posted by another rank at the same time may stand instead."""
        store, key = self._store, self._key
        if self._found or store is None:
            return
        self._found = text

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the store ended with the process that serves it
                store.set(key, text)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(_POST_LIMIT_S)

    def read(self) -> str:
        """What was posted, as far as is known; empty if nothing.  Asks for more meanwhile."""
        store, key = self._store, self._key

        def ask(store: dist.Store) -> None:
            with contextlib.suppress(RuntimeError):
                if store.check([key]):
                    self._found = self._found or store.get(key).decode(errors="replace")
            self._asking.clear()

        due = time.monotonic() >= self._asked + _ASK_EVERY_S
        if due and not self._found and store is not None and not self._asking.is_set():
            self._asking.set()
            self._asked = time.monotonic()
            threading.Thread(target=ask, args=(store,), daemon=True).start()
        return self._found

    def close(self) -> None:
        """Lets go of the store."""
        self._store = None
