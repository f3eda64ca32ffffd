"""The only importer of the compiled module ``odysseus_kernels._C``.

Nothing is imported until :func:`load` or :func:`available` is called, so that a checkout without a build can still
plan, print help and run the collective transport.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from odysseus_kernels.errors import ExtensionNotBuiltError

__all__ = ["CONTROL_WORDS", "available", "has_cuda", "load", "why_no_cuda", "why_unavailable"]

CONTROL_WORDS = {
    "abort": 0,
    "claimed": 16,
    "recorded": 17,
    "code": 18,
    "tag": 19,
    "index": 20,
    "expected": 21,
    "seen": 22,
}
"""Places, in words of 32 bits, in the block that ends a rank's waits: ``ControlBlock`` of ``csrc/cuda/tasks.h``."""


@functools.lru_cache(maxsize=1)
def _import() -> tuple[ModuleType | None, ImportError | None]:
    try:
        return importlib.import_module("odysseus_kernels._C"), None
    except ImportError as error:
        return None, error


def available() -> bool:
    """Whether the compiled module can be used."""
    return _import()[0] is not None


def why_unavailable() -> str:
    """One line that says why :func:`available` is false and what to do; empty where it is true."""
    error = _import()[1]
    if error is None:
        return ""
    return (
        "the compiled host extension odysseus_kernels._C is not usable; build it with `pip install -e .` in the "
        f"project's folder (needs Linux and a C++17 compiler such as g++ 9 or later). The import said: {error}"
    )


def load() -> ModuleType:
    """The compiled module; ``odysseus_kernels/_C.pyi`` documents it.

    Raises:
        ExtensionNotBuiltError: it is not built, or not for this Python; says how to build it.
    """
    module, error = _import()
    if module is None:
        raise ExtensionNotBuiltError(why_unavailable()) from error
    return module


def has_cuda() -> bool:
    """Whether the compiled module was built with its CUDA part (which needs nvcc, not a GPU)."""
    return available() and hasattr(load(), "cuda")


def why_no_cuda() -> str:
    """One line that says why :func:`has_cuda` is false and what to do; empty where it is true."""
    if has_cuda():
        return ""
    return why_unavailable() or (
        "odysseus_kernels was built without its CUDA part; build it again with `pip install -e .` in the project's "
        "folder where nvcc is found (CUDA_HOME, PATH or the wheel nvidia-cuda-nvcc) and ODYSSEUS_BUILD_CUDA is not 0"
    )
