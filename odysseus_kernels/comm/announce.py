"""Texts that ranks compare with the next call of a group, without a message of their own.

Every call is compared by its signature before it is relied on.  What must be equal on all ranks but is known only above
the operators (which batch this is, what a loss is divided by) is announced, and becomes part of the signature of the
call that the group makes next: ranks that differ get a RankMismatchError that shows both texts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

__all__ = ["announce", "announced", "announcing", "speaking_of", "subject", "withdraw"]

_MOST = 400  # characters that are kept while no call takes them
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

# By the name of the group.  Backward passes may run on other threads than forward ones.
_pending: dict[str, str] = {}


class _Current(threading.local):
    text = ""
    subject = ""


_current = _Current()


def announce(group_name: str, text: str) -> None:
    """Adds ``text`` to what the group's next call on this rank is compared by."""
    before = _pending.get(group_name, "")
    _pending[group_name] = f"{before}; {text}"[-_MOST:] if before else text


def withdraw(group_name: str) -> None:
    """Forgets what no call has taken."""
    _pending.pop(group_name, None)


def announcing(group_name: str) -> contextlib.AbstractContextManager[None]:
    """The calls made within are the next one of the group, however often it is tried."""
    text = _pending.pop(group_name, "")
    return _calls_with(text) if text else _NOTHING


@contextlib.contextmanager
def _calls_with(text: str) -> Iterator[None]:
    _current.text = text
    try:
        yield
    finally:
        _current.text = ""


def announced() -> str:
    """What the call that is being made is compared by beside its own signature."""
    return _current.text


@contextlib.contextmanager
def speaking_of(what: str) -> Iterator[None]:
    """What is computed within is of ``what``: its backward pass, which comes later, may announce that."""
    before, _current.subject = _current.subject, what
    try:
        yield
    finally:
        _current.subject = before


def subject() -> str:
    """What this thread computes now, or nothing."""
    return _current.subject
