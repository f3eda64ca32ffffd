"""Runs every kernel of the compiled module on small sizes and checks the results; for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/gpu/native_check.py
    compute-sanitizer --tool racecheck python tests/gpu/native_check.py

It uses the driver through ctypes and not torch, under which a sanitizer takes minutes.  No wait comes before its
signal: a sanitizer may run kernels one after another.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import sys

import numpy as np
from numpy.typing import NDArray

from odysseus_kernels import _ext

C = _ext.load()
GUARD = 64  # bytes around every array, which must not change
PAIRS = [(name, name) for name in ("float32", "float64", "bfloat16", "float16")] + [
    ("bfloat16", "float32"),
    ("float16", "float32"),
    ("float32", "bfloat16"),
    ("float32", "float16"),
]


class Driver:
    """The little of libcuda that is needed: memory and streams of device 0."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self.call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, name: str, *arguments: object) -> None:
        result = getattr(self._cuda, name)(*arguments)
        if result != 0:
            raise RuntimeError(f"{name} returned CUresult {result}")

    def stream(self) -> int:
        handle = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(handle), 1)  # not ordered with the legacy default stream
        assert handle.value is not None
        return handle.value

    def synchronize(self) -> None:
        self.call("cuCtxSynchronize")


class Array:
    """An array on the device, or in pinned host memory, between guards."""

    def __init__(self, driver: Driver, values: NDArray[np.generic], *, pinned: bool = False, shift: int = 0) -> None:
        self._driver, self._dtype, self._shape = driver, values.dtype, values.shape
        self._content = np.full(values.nbytes + 2 * GUARD + shift, 0xA5, np.uint8)
        self._start = GUARD + shift
        self._content[self._start : self._start + values.nbytes] = values.reshape(-1).view(np.uint8)
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(self._content.nbytes)
        if pinned:
            driver.call("cuMemHostAlloc", ctypes.byref(pointer), size, 3)  # for all contexts, and mapped
        else:
            driver.call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        assert pointer.value is not None
        self._base = pointer.value
        driver.call("cuMemcpy", ctypes.c_uint64(self._base), ctypes.c_uint64(self._content.ctypes.data), size)
        driver.synchronize()

    def at(self, nbytes: int = 0) -> tuple[int, int]:
        """As a recording names it, with a base of 0."""
        return (0, self.address + nbytes)

    @property
    def address(self) -> int:
        return self._base + self._start

    def values(self) -> NDArray[np.generic]:
        """What it holds now; the guards must be whole."""
        self._driver.synchronize()
        now = np.empty_like(self._content)
        size = ctypes.c_size_t(now.nbytes)
        self._driver.call("cuMemcpy", ctypes.c_uint64(now.ctypes.data), ctypes.c_uint64(self._base), size)
        end = self._start + int(np.prod(self._shape)) * self._dtype.itemsize
        for part in (slice(0, self._start), slice(end, None)):
            assert (now[part] == self._content[part]).all(), "something was written beside an array"
        return now[self._start : end].view(self._dtype).reshape(self._shape)


class Rank:
    """A control and a program of device 0, words and an epoch."""

    def __init__(self, driver: Driver, link: float = 0.0) -> None:
        self.driver = driver
        self.aborted = Array(driver, np.zeros(1, np.uint32))
        self.epoch = Array(driver, np.zeros(1, np.uint32))
        self.words = Array(driver, np.zeros(40, np.uint32))
        self.control = C.cuda.Control(0, self.aborted.address)
        self.program = C.cuda.Program(self.control, 0, link)
        self.streams = [driver.stream(), driver.stream()]

    def run(self, timeout_s: float = 1.0, first: int = 0) -> None:
        self.program.run(first, len(self.program), self.streams, [0], timeout_s)
        self.driver.synchronize()

    def close(self) -> None:
        self.driver.synchronize()
        self.program.close()
        self.control.close()


def stored(values: NDArray[np.float64], name: str) -> NDArray[np.generic]:
    """Small whole numbers, which every type holds exactly, as memory holds them."""
    if name == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(name)


def check_words(driver: Driver) -> None:
    rank = Rank(driver)
    every = [rank.words.at(4 * i) for i in range(40)]
    values = [i % 7 - 3 for i in range(40)]
    program = rank.program
    program.signal(0, rank.epoch.at(), every, values)
    program.record(0, 0)
    program.depend(1, 0)
    program.wait(1, rank.epoch.at(), every, values, 1)
    program.record(1, 1)
    program.depend(0, 1)
    program.advance(0, rank.epoch.at())
    for use in range(3):
        rank.run()
        assert rank.epoch.values()[0] == use + 1
        expected = np.array([(use * 256 + value) % 2**32 for value in values], np.uint32)
        assert (rank.words.values() == expected).all()
    assert rank.control.error() is None
    rank.close()


def check_giving_up(driver: Driver) -> None:
    for code in (1, 9):
        rank = Rank(driver)
        program = rank.program
        program.wait(0, rank.epoch.at(), [rank.words.at(4 * i) for i in range(36)], [0] * 35 + [2], 77)
        program.signal(0, rank.epoch.at(), [rank.words.at()], [5])
        program.wait(1, rank.epoch.at(), [rank.words.at(4)], [200], 78)
        if code != 1:
            rank.control.abort(code)
        rank.program.run(0, 2, rank.streams, [0], 0.05 if code == 1 else math.inf)
        driver.synchronize()
        assert rank.control.error() == (code, 77, 35, 2, 0), rank.control.error()
        rank.program.run(2, 3, rank.streams, [0], math.inf)
        assert not rank.words.values().any(), "a rank that gave up does not signal"
        assert rank.aborted.values()[0] == 1
        assert rank.control.error() == (code, 77, 35, 2, 0), "the first error stays"
        rank.close()


def check_copies(driver: Driver, link: float) -> None:
    rank = Rank(driver, link)
    source = np.arange(300 * 96, dtype=np.uint8).reshape(300, 96)
    arrays = []
    for pinned, (rows, width) in itertools.product((False, True), ((1, 7), (1, 20000), (5, 50), (300, 33))):
        src = Array(driver, source, pinned=pinned)
        dst = Array(driver, np.zeros((300, 80), np.uint8))
        rank.program.copy(0, dst.at(), src.at(), width, rows, 80 if rows > 1 else 0, 96 if rows > 1 else 0, link > 0)
        arrays.append((src, dst, rows, width))
    rank.run()
    for _, dst, rows, width in arrays:
        if rows == 1:
            assert (dst.values().reshape(-1)[:width] == source.reshape(-1)[:width]).all()
            assert not dst.values().reshape(-1)[width:].any()
        else:
            assert (dst.values()[:rows, :width] == source[:rows, :width]).all()
            assert not dst.values()[:rows, width:].any()
    rank.close()


def check_reductions(driver: Driver) -> None:
    rank = Rank(driver)
    generator = np.random.default_rng(0)
    results = []
    for (source_name, out_name), many, waits in itertools.product(PAIRS, (1, 2, 5, 16), (False, True)):
        for rows, count, shift in ((1, 5, 0), (1, 5003, 0), (1, 700, 8), (3, 264, 0)):
            numbers = generator.integers(-8, 9, (many, rows, count)).astype(np.float64)
            sources = [Array(driver, stored(one, source_name), shift=shift) for one in numbers]
            out = Array(driver, stored(np.zeros((rows, count)), out_name), shift=shift)
            ready = {}
            if waits:
                words = [rank.words.at(4 * i) for i in range(many)]
                rank.program.signal(0, rank.epoch.at(), words, [3] * many)
                ready = {"epoch": rank.epoch.at(), "words": words, "values": [3] * many, "tag": 5}
            addresses = [source.at() for source in sources]
            rank.program.reduce(0, out.at(), out_name, addresses, source_name, count, rows, **ready)
            results.append((out, stored(numbers.sum(0), out_name), sources))
            if rows == 1:
                alone = Array(driver, stored(np.zeros((rows, count)), out_name))
                plain = [source.address for source in sources]
                C.cuda.reduce(rank.streams[1], alone.address, out_name, plain, source_name, count, 3)
                results.append((alone, stored(numbers.sum(0), out_name), sources))
    rank.run()
    for out, expected, _ in results:
        assert (out.values() == expected).all()
    assert rank.control.error() is None
    rank.close()


def main() -> int:
    """Returns the exit status: 0 where everything was right, 77 where there is no device."""
    reason = C.cuda.why_unavailable() if hasattr(C, "cuda") else "the extension was built without CUDA"
    if reason:
        print(reason)
        return 77
    driver = Driver()
    check_words(driver)
    check_giving_up(driver)
    check_copies(driver, 0.0)
    check_copies(driver, 1e9)
    check_reductions(driver)
    print("native kernels: words, giving up, copies, emulated link and reductions are right")
    print(f"batch copies: {C.cuda.why_no_batch_copies() or 'used'}; multicast loads: not part of this check")
    return 0


if __name__ == "__main__":
    sys.exit(main())
