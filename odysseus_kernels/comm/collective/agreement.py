"""That all ranks make the same call, which they learn while the first product runs."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Agreement"]


class Agreement:
    """Whether ranks agree: asked when a call begins, and waited for, once, before any of its own data leaves.

    On a busy link the answer comes behind what was sent ahead, tens of milliseconds later.  What was sent ahead for
    this call, and this rank's own chunks, are multiplied meanwhile; if ranks differ, that is thrown away.

    Args:
        answer: waits for the answer to what was asked, and raises if ranks differ.
    """

    def __init__(self, answer: Callable[[], None]) -> None:
        self._answer: Callable[[], None] | None = answer

    def wait(self) -> None:
        """Returns when all ranks are known to make this call.

        Raises:
            RankMismatchError: they do not; on all ranks.
        """
        if self._answer is not None:
            self._answer()
            self._answer = None
