"""Kernels made ready before other ranks depend on them: compiled, loaded and launched once, with no peer taking part.

Compiling takes seconds and can fail on one rank alone: no C compiler for what Triton builds at first use, an assembler
that is missing or refuses, too little shared memory.  In the middle of a call peers would be waiting meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator

import torch

from odysseus_kernels.errors import KernelUnavailableError
from odysseus_kernels.kernels.configs import Kernel

__all__ = ["prepare", "translated"]

_REASON_CHARACTERS = 600

# Why a kernel cannot be had, or "" for one that can.
_prepared: dict[Hashable, str] = {}


@contextlib.contextmanager
def translated(kernel: Kernel) -> Iterator[None]:
    """Turns what goes wrong when a kernel is compiled, loaded or launched into KernelUnavailableError.

    Whatever it is.  Triton's errors have no common base, its passes assert, another version's Gluon lacks a name or
    takes other arguments, and what the C compiler or ptxas does is told by the standard library.  An error of a kind
    that nobody thought of would leave this rank alone, while its peers wait for what it was to say of its kernels.
    A ValueError stays one: of operands that a kernel does not take.
    """
    try:
        yield
    except (KernelUnavailableError, ValueError):
        raise
    except Exception as error:
        # The last lines of a compiler's message say what, those before it quote the source.
        text = " ".join(f"{type(error).__name__}: {error}".split())
        if len(text) > _REASON_CHARACTERS:
            half = _REASON_CHARACTERS // 2
            text = f"{text[:half]} ... {text[-half:]}"
        raise KernelUnavailableError(f"the Triton kernel {kernel} cannot be had on this rank: {text}") from error


def prepare(kernel: Kernel, key: Hashable, run: Callable[[], None]) -> None:
    """Makes sure that a kernel can be launched: ``run`` launches it, the first time that ``key`` comes.

    Args:
        kernel: its name.
        key: all that the compiler specialises on.
        run: launches it with every signal given; what it writes is overwritten later.

    Raises:
        KernelUnavailableError: it cannot be compiled, loaded or launched; the same key then fails again without another
            attempt.
    """
    key = (kernel, key)
    if key not in _prepared:
        try:
            with translated(kernel):
                run()
        except KernelUnavailableError as error:
            if isinstance(error.__cause__, torch.OutOfMemoryError):  # there may be enough the next time
                raise
            _prepared[key] = str(error)
            raise
        _prepared[key] = ""
    if _prepared[key]:
        raise KernelUnavailableError(_prepared[key])
