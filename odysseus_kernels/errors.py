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
    "KernelUnavailableError",
    "PeerLostError",
    "RankMismatchError",
    "SignalTimeoutError",
]


class CommunicationError(RuntimeError):
    """Ranks could not complete an operator together.

    Attributes:
        said: what the rank that went wrong first says of itself, with its number; empty where no rank says anything.
        lasting: whether the process group has to be made again.  Else the next call of all ranks may succeed.
    """

    def __init__(self, *args: object, said: str = "", lasting: bool = False) -> None:
        super().__init__(*args)
        self.said = said
        self.lasting = lasting


class SignalTimeoutError(CommunicationError, TimeoutError):
    """A peer that is alive did not signal within ``timeout_s``."""


class PeerLostError(CommunicationError):
    """A peer's process is gone, or it gave up on the group and said why."""


class RankMismatchError(CommunicationError, ValueError):
    """Ranks called with different operators, shapes, dtypes or settings; the message names the one that differs."""


class ExtensionNotBuiltError(ImportError):
    """The compiled host extension is needed and cannot be imported; the message says how to build it."""


class KernelUnavailableError(RuntimeError):
    """A kernel of ``mode="tiles"`` cannot be compiled, loaded or launched on this rank; nothing was sent."""


class FallbackWarning(UserWarning):
    """What is preferred cannot be had: something slower or less strict replaces it; issued once, with the reason."""


class CapacityWarning(FallbackWarning):
    """Shared memory is too small for an operator's buffers, which then uses the collective transport."""
