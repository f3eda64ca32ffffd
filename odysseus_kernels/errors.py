"""What a user of this package can catch.

Bad input is always a ``ValueError`` (raised before anything is sent).  What goes wrong between ranks derives from
:class:`CommunicationError`, whose message names the operator, the peer and the signal or chunk that was waited for.
"""

from __future__ import annotations

__all__ = [
    "CapacityWarning",
    "CommunicationError",
    "ExtensionNotBuiltError",
    "FallbackWarning",
    "PeerLostError",
    "RankMismatchError",
    "SignalTimeoutError",
]


class CommunicationError(RuntimeError):
    """Ranks could not complete an operator together."""


class SignalTimeoutError(CommunicationError, TimeoutError):
    """A peer that is alive did not signal within ``timeout_s``."""


class PeerLostError(CommunicationError):
    """A peer's process is gone, or it gave up on the group and said why."""


class RankMismatchError(CommunicationError, ValueError):
    """Ranks called with different operators, shapes, dtypes or settings; the message names the one that differs."""


class ExtensionNotBuiltError(ImportError):
    """The compiled host extension is needed and cannot be imported; the message says how to build it."""


class FallbackWarning(UserWarning):
    """What is preferred cannot be had: something slower or less strict replaces it; issued once, with the reason."""


class CapacityWarning(FallbackWarning):
    """Shared memory is too small for an operator's buffers, which then uses the collective transport."""
