"""Text that is on every machine: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from pathlib import Path

import torch

__all__ = ["VOCABULARY", "Text", "load_text"]

VOCABULARY = 256
_SEPARATOR = b"\0"
_HELD_OUT_OF = 16  # one file in so many is for validation


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes for training and for validation, uint8 [n], from different ones of so many files."""

    training: torch.Tensor
    validation: torch.Tensor
    files: int

    def batch(self, seed: int, step: int, batch_size: int, length: int) -> torch.Tensor:
        """Random windows of the training text, int64 [batch_size, length], the same for the same seed and step."""
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(self.training.numel() - length + 1, (batch_size, 1), generator=generator)
        return self.training[starts + torch.arange(length)].long()

    def validation_batches(self, batch_size: int, length: int, batches: int) -> list[torch.Tensor]:
        """The first windows of the validation text, one after another, int64 [batch_size, length] each."""
        rows = min(self.validation.numel() // length, batch_size * batches)
        if rows == 0:
            raise ValueError(f"expected at least {length} bytes of validation text, got {self.validation.numel()}")
        windows = self.validation[: rows * length].view(rows, length).long()
        return list(windows.split(batch_size))


def load_text(limit: int = 8_000_000, folder: Path | None = None) -> Text:
    """Reads up to ``limit`` bytes of ``*.py`` files, by default the standard library's, sorted by name."""
    root = folder or Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    # What is installed beside the standard library differs from machine to machine.
    names = [name for name in names if not name.startswith(("site-packages/", "dist-packages/"))]
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    left, files = limit, 0
    for name in names:
        if left <= 0:
            break
        content = (root / name).read_bytes()[:left]
        left, files = left - len(content), files + 1
        # By the name, not by the order: a file that another Python version adds moves no other file.
        held_out = hashlib.sha256(name.encode()).digest()[0] % _HELD_OUT_OF == 0
        parts[held_out].append(content + _SEPARATOR)
    if not parts[True] or not parts[False]:
        raise ValueError(f"expected Python files for training and validation under {root}, found {files}")

    def join(pieces: list[bytes]) -> torch.Tensor:
        return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8)

    return Text(training=join(parts[False]), validation=join(parts[True]), files=files)
