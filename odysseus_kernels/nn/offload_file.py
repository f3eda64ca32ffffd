"""Tensors of CPU ranks in a temporary file, which one background thread writes and reads.

The file has no name in the file system (it is unlinked as soon as it is made), so nothing outlives the process.  It is
written and read by ``pwrite`` and ``preadv`` rather than mapped: the pages of a mapping count as resident memory as
long as they are touched, and a full disk would be a SIGBUS instead of an error.  Room is reserved before a tensor is
handed to the thread, so a full disk is an error where the tensor is put away, and not later.

Concurrency: the caller's thread makes and drops all tensors; the background thread is given addresses, and the store
holds the tensors behind them until it is done.  Its jobs run in order, so a place in the file that is given back may be
used again at once.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import errno
import os
import tempfile
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from odysseus_kernels.errors import FallbackWarning

__all__ = ["FileStore", "is_memory"]

_LARGEST_TRANSFER = 1 << 30  # bytes; Linux moves at most 2 GiB - 4 KiB in one call
_MOUNTS = Path("/proc/self/mounts")
_IN_MEMORY = ("tmpfs", "ramfs")
_Done = concurrent.futures.Future[None]
_Job = tuple[_Done, Tensor]


class FileStore:
    """Room in a nameless file for tensors that are not needed for a while.

    At most one tensor waits to be written: :meth:`put` first waits for the one before.  So beside what the caller holds
    one tensor is in memory while forward puts them away, and one while backward fetches them.

    Args:
        folder: where the file is made; it needs room for all tensors that are put away at one time.
        timeout_s: seconds after which waiting for the disk becomes an error.

    Attributes:
        written, read: bytes so far.
    """

    def __init__(self, folder: Path, timeout_s: float) -> None:
        self.written = self.read = 0
        self._folder, self._timeout_s = folder, timeout_s
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # closed by close()
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "odysseus-offload")
        self._lock = threading.RLock()
        self._end = 0
        self._free: list[tuple[int, int]] = []
        self._returned: deque[tuple[int, int]] = deque()  # appended to by garbage collection, at any moment
        self._writing: FileSlot | None = None
        self._busy: list[_Job] = []  # changed in place: the finalizer has it, too
        weakref.finalize(self, _end, self._worker, self._file, self._busy)
        if is_memory(folder, _mounts()):
            warnings.warn(
                f"offload_activations: {folder} lies in memory (tmpfs), so what is put away there leaves the process "
                f"and not the machine: name a folder on a disk",
                FallbackWarning,
                stacklevel=3,
            )

    def put(self, tensor: Tensor) -> FileSlot:
        """Begins to write ``tensor`` (dense, on the CPU).

        Raises:
            OSError: no room, or the disk failed at an earlier tensor.
            TimeoutError: the tensor before was not written within ``timeout_s``.
        """
        with self._lock:
            self.settle()
            tensor = tensor.contiguous()
            offset = self._reserve(tensor.nbytes)
            slot = FileSlot(self, tensor, offset)
            slot.job = self._start(_write, tensor, offset)
            self.written += tensor.nbytes
            self._writing = slot
            return slot

    def settle(self) -> None:
        """Waits until what is being written is on its way to the disk, and lets go of it."""
        with self._lock:
            slot, self._writing = self._writing, None
            if slot is not None:
                self.wait(slot.job, "write", slot.nbytes)
                slot.written()
            self._busy[:] = [(job, tensor) for job, tensor in self._busy if not job.done()]

    def fetch(self, offset: int, like: tuple[torch.Size, torch.dtype]) -> _Job:
        """Begins to read a tensor."""
        with self._lock:
            tensor = torch.empty(like[0], dtype=like[1])
            self.read += tensor.nbytes
            return self._start(_read, tensor, offset), tensor

    def wait(self, job: _Done, what: str, nbytes: int) -> None:
        """Waits for a job; its error is raised here, in words."""
        try:
            job.result(self._timeout_s)
        except concurrent.futures.TimeoutError:
            raise TimeoutError(
                f"offload_activations: expected to {what} {nbytes} bytes in {self._folder} within {self._timeout_s:g} "
                f"s, and the disk has not answered: name a folder on a faster disk, or a larger timeout_s"
            ) from None
        except OSError as error:
            raise self._failure(error, what, nbytes) from error
        finally:
            if job.done():
                self._busy[:] = [(one, tensor) for one, tensor in self._busy if one is not job]

    def give_back(self, offset: int, nbytes: int) -> None:
        """What lies there is not needed any more.  Takes no lock: garbage collection calls it."""
        self._returned.append((offset, nbytes))

    def _start(self, work: Callable[[int, int, int, int], None], tensor: Tensor, offset: int) -> _Done:
        job = self._worker.submit(work, self._file.fileno(), tensor.data_ptr(), tensor.nbytes, offset)
        self._busy.append((job, tensor))
        return job

    def _reserve(self, nbytes: int) -> int:
        while self._returned:
            self._free.append(self._returned.popleft())
        for index, (offset, size) in enumerate(self._free):
            if size == nbytes:
                del self._free[index]
                return offset
        if self._free and sum(size for _, size in self._free) == self._end:
            # Nothing is away and sizes have changed: begin again.
            self._free, self._end = [], 0
            os.ftruncate(self._file.fileno(), 0)
        offset = self._end
        try:
            os.posix_fallocate(self._file.fileno(), offset, nbytes)
        except OSError as error:
            raise self._failure(error, "reserve", nbytes) from error
        self._end += nbytes
        return offset

    def _failure(self, error: OSError, what: str, nbytes: int) -> OSError:
        text = (
            f"offload_activations: could not {what} {nbytes} bytes in {self._folder}: {os.strerror(error.errno or 0)}"
        )
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            found = os.statvfs(self._folder)
            text += (
                f"; {self._end} bytes are put away there and {found.f_bavail * found.f_frsize} are free: name a folder "
                f"with more room (folder=...), or let more layers keep their inputs (keep=...)"
            )
        return OSError(error.errno, text)


class FileSlot:
    """A tensor that was put away.

    Attributes:
        nbytes: of the tensor.
        job: that which writes it.
    """

    job: _Done

    def __init__(self, store: FileStore, tensor: Tensor, offset: int) -> None:
        self.nbytes = tensor.nbytes
        self._store, self._offset = store, offset
        self._like = tensor.shape, tensor.dtype
        self._tensor: Tensor | None = tensor  # until it is written
        self._version = tensor._version
        self._changed = False
        self._fetched: _Job | None = None

    def written(self) -> None:
        """Called once the tensor need not be held any more."""
        self._changed = self._tensor is not None and self._tensor._version != self._version
        self._tensor = None

    def begin(self) -> None:
        """Begins to read it, if it is not here."""
        if self._tensor is None and self._fetched is None:
            self._fetched = self._store.fetch(self._offset, self._like)

    def take(self) -> Tensor:
        """The tensor, which is not held here any longer; it can be taken again, and is then read again.

        Raises:
            RuntimeError: it was modified in place while it was being written.
            OSError, TimeoutError: the disk failed, or did not answer.
        """
        if self._tensor is not None and self._tensor._version != self._version:
            self._changed = True
        if self._changed:
            raise RuntimeError(
                f"offload_activations: a layer's input {list(self._like[0])} was modified in place while it was being "
                f"written: let the layer behind it work on a copy"
            )
        if self._tensor is not None:
            return self._tensor
        self.begin()
        assert self._fetched is not None
        (job, tensor), self._fetched = self._fetched, None
        self._store.wait(job, "read", self.nbytes)
        return tensor

    def __del__(self) -> None:
        self._store.give_back(self._offset, self.nbytes)


def _end(worker: concurrent.futures.ThreadPoolExecutor, file: IO[bytes], busy: list[_Job]) -> None:
    """Closes the file behind the jobs that are left, which read and write tensors that ``busy`` holds."""
    try:
        worker.submit(_close, file, busy)
    except RuntimeError:  # the interpreter ends: jobs are done
        file.close()
    worker.shutdown(wait=False)


def _close(file: IO[bytes], _: list[_Job]) -> None:
    file.close()


def _write(file: int, address: int, nbytes: int, offset: int) -> None:
    memory = memoryview((ctypes.c_char * nbytes).from_address(address))
    done = 0
    while done < nbytes:
        done += os.pwrite(file, memory[done : done + _LARGEST_TRANSFER], offset + done)


def _read(file: int, address: int, nbytes: int, offset: int) -> None:
    memory = memoryview((ctypes.c_char * nbytes).from_address(address))
    done = 0
    while done < nbytes:
        count = os.preadv(file, [memory[done : done + _LARGEST_TRANSFER]], offset + done)
        if count == 0:
            raise OSError(errno.EIO, "the file ended before the tensor")
        done += count


def _mounts() -> list[tuple[str, str]]:
    """(where, kind) of all mounted file systems; none where the system does not say."""
    if not _MOUNTS.exists():
        return []
    lines = (line.split() for line in _MOUNTS.read_text().splitlines())
    return [(fields[1].encode().decode("unicode_escape"), fields[2]) for fields in lines if len(fields) > 2]


def is_memory(folder: Path, mounts: Iterable[tuple[str, str]]) -> bool:
    """Whether ``folder`` lies on a file system that is in memory, by the mounts (where, kind) of a machine."""
    path = folder.resolve()
    found = [(len(Path(where).parts), kind) for where, kind in mounts if path.is_relative_to(where)]
    # Of several mounts at one place the last one is seen.
    return bool(found) and max(enumerate(found), key=lambda one: (one[1][0], one[0]))[1][1] in _IN_MEMORY
