"""Collectives that a failed call leaves under way.

Gloo cannot be aborted (torch 2.13): an operation whose peer does not come ends with the time limit of its process
group, and the group's destructor waits for that, at the end of the interpreter, too.  Threads that end an operation
while the interpreter is finalized abort the process where they let go of tensors that Python objects belong to.
So whatever a failed call leaves behind stays for the life of the process: no destructor waits, and no thread finds
itself the last owner of a tensor.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_for_ever"]


def keep_for_ever(*objects: object) -> None:
    """Holds references that the end of the interpreter does not drop either."""
    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
