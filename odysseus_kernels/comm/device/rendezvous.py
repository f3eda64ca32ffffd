"""Ranks of one group map one another's symmetric memory, whatever other groups of their processes do meanwhile.

In a rendezvous of torch's symmetric memory ranks exchange messages through a store, each under a number that must be
the same on a rank and its peers.  Torch counts these numbers for the whole process.  Ranks of overlapping groups, which
took part in different numbers of rendezvous, would wait for messages that are sent under other numbers.  Here a group
has a store of its own, in which messages are numbered as that group comes to them.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

__all__ = ["CountingStore", "Rendezvous"]

# All ranks have met in an exchange just before.
_TIMEOUT = datetime.timedelta(seconds=120)
_NUMBERED = re.compile(r"(.*)/(\d+)/(\d+)")  # what for, number, rank


class CountingStore(dist.Store):
    """``store`` with keys ``.../<number>/<rank>`` numbered anew: 0, 1, ... in the order in which numbers first come.

    Torch calls it from C++.  A rank's numbers only have to differ from message to message; those of different ranks
    need not be equal, if the ranks come to the messages in the same order.
    """

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store
        self._numbers: dict[str, dict[str, int]] = {}

    def set(self, key: str, value: Any) -> None:
        self._store.set(self._renumbered(key), value)

    def get(self, key: str) -> bytes:
        return self._store.get(self._renumbered(key))

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta = _TIMEOUT) -> None:
        self._store.wait([self._renumbered(key) for key in keys], timeout)

    def _renumbered(self, key: str) -> str:
        found = _NUMBERED.fullmatch(key)
        if found is None:
            return key
        what, number, rank = found.groups()
        numbers = self._numbers.setdefault(what, {})
        return f"{what}/{numbers.setdefault(number, len(numbers))}/{rank}"


class Rendezvous:
    """Rendezvous of one group's ranks; every rank makes it, and makes the same calls in the same order.

    Args:
        group: the ranks.
        nonce: equal on all ranks, different for each time that ranks of the group meet anew.
    """

    def __init__(self, group: dist.ProcessGroup, nonce: int) -> None:
        import torch.distributed.distributed_c10d as c10d
        from torch._C._distributed_c10d import _register_process_group

        # Newer versions of torch have a type of their own for names, which older ones lack.
        self._name = cast(Any, f"odysseus_kernels/{group.group_name}/{nonce:x}")
        self._store = CountingStore(dist.PrefixStore(self._name, c10d._get_process_group_store(group)))
        # Torch finds the store by the name of a group, so there is one beside the user's, without a backend.
        self._group = dist.ProcessGroup(self._store, group.rank(), group.size())
        self._group._set_group_name(self._name)
        _register_process_group(self._name, self._group)

    def meet(self, memory: Tensor) -> Any:
        """The handle of all ranks' ``memory``, which is of equal size on all of them."""
        from torch._C._distributed_c10d import _SymmetricMemory

        try:
            return _SymmetricMemory.rendezvous(memory, self._name)
        except RuntimeError as error:
            if "no group info" not in str(error):
                raise
        # A version of torch that does not take the store from the group wants to be told, which it says before it sends
        # anything.  (Where it need not be told it must not: others would check more, by counters of the process again.)
        _SymmetricMemory.set_group_info(self._name, self._group.rank(), self._group.size(), self._store)
        return _SymmetricMemory.rendezvous(memory, self._name)

    def close(self) -> None:
        """Forgets the group; handles stay as they are."""
        from torch._C._distributed_c10d import _unregister_process_group

        _unregister_process_group(self._name)
