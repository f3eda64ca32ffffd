"""Signatures of the compiled host extension (csrc/).  Import it through :mod:`odysseus_kernels._ext` only."""

from typing import Final, Literal

WINDOWS: Final[int]
"""Windows (leasable buffers) in each rank's segment: 16."""
CELLS: Final[int]
"""Signal cells (one ``ready`` word, one ``done`` word for each reader) of a window: 8."""
DESCRIPTORS: Final[int]
"""Slots in the ring of posted call descriptors: 64."""
TEXT_BYTES: Final[int]
"""UTF-8 bytes that a posted descriptor's text may have: 383; longer text is cut."""
REASON_BYTES: Final[int]
"""UTF-8 bytes that the reason given to :meth:`SymmetricHost.fail` may have: 511; longer text is cut."""

WaitStatus = Literal["ok", "timeout", "lost", "failed"]

class NoSpace(OSError):
    """The segment's file system cannot back the bytes asked for; ``needed`` and ``free`` are in bytes."""

    needed: int
    free: int

class Window:
    """Writable buffer over one window of one rank; it keeps the mapping alive after the host is closed or gone.

    ``torch.frombuffer(window, dtype=torch.uint8)`` shares its memory.  Only bytes that the window's owner has reserved
    may be touched: beyond them the kernel may answer with SIGBUS.
    """

    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class SymmetricHost:
    """One rank's end of a group of shared-memory segments on one host.

    The segment is a nameless file in ``directory`` (a tmpfs): nothing can outlive the processes that map it.  Every
    signal word has one writer and only grows; a wait is satisfied by any value >= the expected one.  Methods raise
    ValueError for ranks, windows, cells or values out of range, and RuntimeError once closed, before :meth:`attach`
    where a peer is needed, and in a forked child (which neither signals nor tears anything down).

    Close it (``atexit`` at the latest) on every rank that ends normally: a process that vanishes without :meth:`close`
    is "lost" to every peer that still waits for anybody, one that closed only to those that still wait for it.
    """

    spin_us: int
    """Microseconds that a wait spins before it sleeps in the kernel; default 50."""

    def __init__(self, rank: int, world: int, directory: str, window_bytes: int, nonce: int) -> None:
        """``window_bytes`` is rounded up to whole pages and costs address space only; ``nonce`` (0 .. 2**64 - 1) must
        be the same on all ranks of a group and differ between groups.  OSError, NoSpace or ValueError.
        """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    @property
    def window_bytes(self) -> int: ...
    @property
    def nonce(self) -> int: ...
    @property
    def closed(self) -> bool: ...
    @property
    def path(self) -> str:
        """``/proc/<pid>/fd/<fd>``: where peers open this rank's segment.  A rank never opens its own."""

    def attach(self, paths: list[str]) -> None:
        """Maps all peers' segments, in rank order (the own entry is ignored).  RuntimeError names what a segment holds
        and what was expected, and leaves nothing attached.
        """

    def reserve(self, window: int, nbytes: int) -> None:
        """Backs bytes [0, nbytes) of the own window with memory, or raises NoSpace; never shrinks."""

    def reserved(self, window: int) -> int:
        """Bytes of the own window that are backed, a multiple of the page size."""

    def window(self, rank: int, window: int) -> Window: ...
    def set_ready(self, window: int, cell: int, value: int) -> None:
        """Publishes in the own segment that a cell's data is there; ``value`` may not fall."""

    def set_done(self, owner: int, window: int, cell: int, value: int) -> None:
        """Tells ``owner`` that this rank has finished reading its cell; ``value`` may not fall."""

    def wait_ready(self, owner: int, window: int, cell: int, value: int, timeout_s: float) -> tuple[WaitStatus, int]:
        """Waits until ``owner`` has published ``value`` or more.

        Returns ("ok", owner), ("timeout", owner), ("lost", rank whose process is gone or that closed) or
        ("failed", rank that gave up; see :meth:`reason`).  Any peer can be the lost or failed one.  Data published
        before a peer died counts as there.  The GIL is released; Python signal handlers run and may raise.
        ``timeout_s`` 0 looks once, ``math.inf`` waits for as long as the peers live.
        """

    def wait_done(self, reader: int, window: int, cell: int, value: int, timeout_s: float) -> tuple[WaitStatus, int]:
        """Waits until ``reader`` is done with the own window's cell; see :meth:`wait_ready`."""

    def wait_posted(self, peer: int, seq: int, timeout_s: float) -> tuple[WaitStatus, int]:
        """Waits until ``peer`` has posted descriptor ``seq`` or a later one; see :meth:`wait_ready`."""

    def ready(self, owner: int, window: int, cell: int) -> int: ...
    def done(self, owner: int, reader: int, window: int, cell: int) -> int: ...
    def post(self, seq: int, hash: int, text: str) -> None:
        """Publishes a call descriptor in the own segment; ``seq`` >= 1 must grow, ``hash`` is 0 .. 2**64 - 1."""

    def posted(self, peer: int) -> int:
        """Sequence number of the peer's latest descriptor, 0 before the first."""

    def descriptor(self, peer: int, seq: int) -> tuple[int, str]:
        """(hash, text) of a posted descriptor.  LookupError where it is not posted yet or already overwritten."""

    def fail(self, text: str) -> None:
        """Gives up on the group: peers' waits return ("failed", this rank).  The first reason stays."""

    def reason(self, rank: int) -> str:
        """What the rank gave to :meth:`fail`, "" where it did not fail."""

    def alive(self, rank: int) -> bool:
        """Whether the rank's process exists and has not closed its end."""

    def close(self) -> None:
        """Leaves the group.  Idempotent.  Windows stay mapped until their last buffer is gone."""

def reduce(out: int, out_dtype: str, sources: list[int], source_dtypes: list[str], count: int) -> None:
    """out[i] = cast(sources[0][i] + sources[1][i] + ...), on raw addresses of ``count`` elements each.

    Adds in that order in fp32, or in fp64 where any dtype is "float64"; the others are "float32", "bfloat16",
    "float16".  Rounds to nearest even.  ``out`` may be one or more of the sources of its own dtype, but may not
    otherwise overlap them (ValueError).  Releases the GIL.
    """

def copy(dst: int, src: int, nbytes: int) -> None:
    """memcpy between raw addresses without the GIL; the ranges may not overlap (ValueError)."""

def simd() -> str:
    """Instruction set that :func:`reduce` uses on this machine: "avx512", "avx2" or "baseline"."""

def use_simd(name: str) -> None:
    """Chooses the instruction set of :func:`reduce` for this process, for tests and measurements.

    ValueError where the machine lacks it; "baseline" is always there.
    """
