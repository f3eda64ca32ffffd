"""The oldest versions of libraries with which models give the stock numbers; pyproject.toml asks for the same."""

from __future__ import annotations

import importlib.metadata
import re

__all__ = ["OLDEST", "require", "too_old"]

OLDEST = {"transformers": "5.17", "accelerate": "1.10.1", "peft": "0.19", "trl": "1.16"}
"""By the distribution's name.  Earlier ones build masks, count tokens or call models otherwise, and tests fail."""


def too_old(name: str, version: str) -> bool:
    """Whether ``version`` of the library ``name`` is older than the oldest that is served."""
    return _numbers(version) < _numbers(OLDEST[name])


def require(name: str) -> None:
    """Raises ImportError for a library that is installed and too old; what is not installed says so when imported."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return
    if too_old(name, version):
        raise ImportError(
            f"{name}: expected {OLDEST[name]} or later, got {version}, with which a parallelized model's numbers would "
            f"not be the stock model's: pip install -U '{name}>={OLDEST[name]}'"
        )


def _numbers(version: str) -> list[int]:
    """Its release, without zeros at the end: 5.17, 5.17.0 and 5.17.0rc1 are one."""
    found = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(one) for one in found[0].split(".")] if found else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers
