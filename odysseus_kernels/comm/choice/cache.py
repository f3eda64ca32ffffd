"""Choices that outlive a process: a JSON file for each kind of machine and set of versions.

Several processes may read and write one file.  A writer merges its choices with what is on disk under a lock and
replaces the file in one step, so a reader sees an old or a new file and never part of one; the last writer of a key
wins.  Nothing that goes wrong with the file stops a run: a warning says once what it was, and the next process times
again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import platform
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["CachedChoice", "ChoiceCache", "machine_fingerprint"]

SCHEMA = 1
"""Raised when the file's form changes, or what its figures mean."""

_LOCK_LIMIT_S = 2.0
_LARGEST_BYTES = 16 << 20


def machine_fingerprint(
    devices: Sequence[str], *, package_version: str, torch_version: str, triton_version: str = ""
) -> dict[str, str]:
    """What has to be equal for a timing to be of use again: versions, devices, and the host's processor and cores.

    Args:
        devices: names of this machine's accelerators, in order; empty on a machine without.
        package_version, torch_version, triton_version: versions of the software; ``""`` for one that is absent.
    """
    return {
        "schema": str(SCHEMA),
        "package": package_version,
        "torch": torch_version,
        "triton": triton_version,
        "devices": ", ".join(devices),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


@dataclasses.dataclass(frozen=True)
class CachedChoice:
    """A choice as it is kept: the mode, and the seconds of every mode that was measured for it."""

    mode: str
    seconds: Mapping[str, float]

    @staticmethod
    def parse(fields: Any) -> CachedChoice:
        """The choice that JSON holds.

        Raises:
            ValueError: it is not one.
        """
        if not isinstance(fields, dict) or not isinstance(fields.get("seconds"), dict):
            raise ValueError(f"expected a mode and seconds, got {str(fields)[:100]}")
        mode, seconds = fields.get("mode"), fields["seconds"]
        for name, value in seconds.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"expected seconds of at least 0, got {name}: {str(value)[:100]}")
        if not isinstance(mode, str) or mode not in seconds:
            raise ValueError(f"expected a mode among {list(seconds)}, got {str(mode)[:100]}")
        return CachedChoice(mode, {name: float(value) for name, value in seconds.items()})


class ChoiceCache:
    """The file of choices that belongs to one fingerprint.

    Attributes:
        path: the file, ``choices-<digest of the fingerprint>.json`` in ``directory``.

    Args:
        directory: where the file lies; it is made on the first write.
        fingerprint: as :func:`machine_fingerprint` gives it; written into the file and compared when it is read.
    """

    def __init__(self, directory: Path, fingerprint: Mapping[str, str]) -> None:
        self._fingerprint = dict(fingerprint)
        text = json.dumps(self._fingerprint, sort_keys=True)
        stem = f"choices-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        self.path = Path(directory) / f"{stem}.json"
        self._lock_path = self.path.with_suffix(".lock")
        self._lock = threading.Lock()
        self._known: dict[str, CachedChoice] | None = None
        self._warned = False

    def get(self, key: str) -> CachedChoice | None:
        """The choice kept under ``key``; the file is read on the first call only."""
        with self._lock:
            if self._known is None:
                self._known = self._read()
            return self._known.get(key)

    def put(self, key: str, choice: CachedChoice) -> None:
        """Keeps ``choice`` under ``key``, in memory and on disk."""
        with self._lock:
            if self._known is None:
                self._known = {}
            self._known[key] = choice
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self._exclusive():
                    on_disk = self._read()
                    # The ranks of one host come one after another with the same choice.
                    if on_disk.get(key) != choice:
                        self._replace({**on_disk, key: choice})
                    self._known = {**on_disk, **self._known}
            except OSError as error:
                self._warn(f"choices of modes cannot be kept in {self.path}: {error}")

    def _read(self) -> dict[str, CachedChoice]:
        try:
            with self.path.open("rb") as file:
                data = file.read(_LARGEST_BYTES + 1)
            if len(data) > _LARGEST_BYTES:
                raise ValueError(f"expected at most {_LARGEST_BYTES} bytes, got {self.path.stat().st_size}")
            content = json.loads(data)
            found = content.get("fingerprint") if isinstance(content, dict) else None
            if found != self._fingerprint:
                raise ValueError(f"expected fingerprint {self._fingerprint}, got {str(found)[:300]}")
            choices = content.get("choices")
            if not isinstance(choices, dict):
                raise ValueError(f"expected choices by key, got {type(choices).__name__}")
            return {key: CachedChoice.parse(fields) for key, fields in choices.items()}
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn(f"choices of modes cannot be read from {self.path}: {error}")
        except (ValueError, RecursionError) as error:  # of JSON, of its text's encoding, and of what it means
            self._warn(f"{self.path} is no file of choices for this machine and will be replaced: {error}")
        return {}

    def _replace(self, choices: Mapping[str, CachedChoice]) -> None:
        kept = {key: dataclasses.asdict(choice) for key, choice in sorted(choices.items())}
        content = {"fingerprint": self._fingerprint, "choices": kept}
        descriptor, temporary = tempfile.mkstemp(prefix=f".{self.path.stem}-", dir=self.path.parent)
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One writer at a time.  The file itself is replaced, so what is locked is another one beside it."""
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            deadline = time.monotonic() + _LOCK_LIMIT_S
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise TimeoutError(f"{self._lock_path} was locked for {_LOCK_LIMIT_S:g} s") from None
                    time.sleep(0.002)
            yield
        finally:
            os.close(descriptor)  # which unlocks

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(text, UserWarning, stacklevel=4)
