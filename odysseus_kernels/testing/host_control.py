"""What ends the waits of a rank, and says which gave up, in ordinary memory: ``cuda.Control`` without the extension.

Kernels write into it in Triton's interpreter, at the places where they write on a GPU.
"""

from __future__ import annotations

import torch

from odysseus_kernels._ext import CONTROL_WORDS

__all__ = ["HostControl"]

_WORDS = 32


class HostControl:
    """The block and what the host does with it; ``odysseus_kernels/_C.pyi`` documents the methods (``cuda.Control``).

    Attributes:
        words: int32 [32], the block.
        address: int64 [1], where it lies, as kernels take it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.words = torch.zeros(_WORDS, dtype=torch.int32, device=device)
        self.address = torch.tensor([self.words.data_ptr()], dtype=torch.int64, device=device)

    def abort(self, code: int) -> None:
        if not self._word("abort"):
            self.words[CONTROL_WORDS["abort"]] = code

    def error(self) -> tuple[int, int, int, int, int] | None:
        if not self._word("recorded"):
            return None
        code, tag, index, expected, seen = (self._word(name) for name in ("code", "tag", "index", "expected", "seen"))
        return code, tag, index, expected, seen

    def _word(self, name: str) -> int:
        return int(self.words[CONTROL_WORDS[name]]) % 2**32
