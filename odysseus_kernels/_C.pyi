"""Signatures of the compiled extension (csrc/).  Import it through :mod:`odysseus_kernels._ext` only."""

from collections.abc import Callable, Sequence
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

WaitStatus = Literal["ok", "timeout", "lost", "failed", "ahead"]

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

        Returns ("ok", owner), ("timeout", owner), ("lost", rank whose process is gone or that closed), ("failed", rank
        that gave up; see :meth:`reason`) or ("ahead", rank that has begun a later step than this one without posting
        the latest descriptor that this rank posted).  Any peer can be the lost, failed or early one.  Data published
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

    def set_step(self, number: int) -> None:
        """Says that this rank begins step ``number``, which must not shrink; all calls of earlier steps are made."""

    def step(self, rank: int) -> int:
        """What the rank gave to :meth:`set_step`, 0 at first."""

    def fail(self, text: str) -> None:
        """Gives up on the group: peers' waits return ("failed", this rank).  The first reason stays."""

    def leave(self, text: str) -> None:
        """As :meth:`fail`, between two calls: peers complete the calls whose descriptors this rank has posted."""

    def reason(self, rank: int) -> str:
        """What the rank gave to :meth:`fail` or :meth:`leave`, "" where it did neither."""

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

Address = tuple[int, int]
"""In a recording: index into the ``bases`` given to :meth:`cuda.Program.run`, and bytes behind that base."""

class cuda:  # noqa: N801 - a submodule; absent where the extension was built without CUDA
    """Streams, signals, copies and reductions of a CUDA device; a module of functions.

    Importing it needs no driver.  Every failed CUDA call is a RuntimeError that names the call, CUDA's error and what
    was being done; bad arguments are a ValueError that names both values, raised before anything is enqueued.

    **Words.**  A word is a uint32, in local or a peer's memory.  Its values (-255 .. 255) count within one use of the
    memory that it guards; an epoch, a uint32 in local device memory, counts the uses.  A signal stores
    ``epoch * 256 + value`` with system-scope release, behind everything earlier in its stream; a wait is over when
    ``int32(word - (epoch * 256 + value)) >= 0``.  Nothing of a call but ``value`` is a constant of the host, so that a
    captured graph can be replayed.

    **Giving up.**  A wait that runs out of time, or that finds the host's :meth:`Control.abort` while its words are
    not there, records the first error and sets the device word ``aborted``.  From then on everything drains: waits
    return at once, copies and reductions still run on whatever is there, and signals are left out, so that no peer is
    told of data that may be wrong.  Other kernels can watch ``aborted``; those that wait do so by
    :attr:`Control.block`.
    """

    @staticmethod
    def why_unavailable() -> str:
        """Empty where a driver and a device of compute capability 8.0 or later are there, else one line; no raise."""

    @staticmethod
    def why_no_batch_copies() -> str:
        """Empty while copies are asked to run on copy engines, else one line that says why the driver's batch copies
        are not used in this process: it has none, or it refused one.
        """

    @staticmethod
    def small_kernels(device: int) -> list[tuple[int, int]]:
        """Of each kernel that orders streams and ranks (waits, signals, epochs, the emulated link): registers of a
        thread, and the shared memory that it leaves to others in per cent of a multiprocessor's (100: all of it).
        """

    @staticmethod
    def multimem_supported(device: int) -> bool:
        """Whether the device multicasts over NVLink switches; False also where there is no driver."""

    @staticmethod
    def reduce(
        stream: int,
        out: int,
        out_dtype: str,
        sources: list[int],
        source_dtype: str,
        count: int,
        max_blocks: int = 0,
    ) -> None:
        """out[i] = cast(sources[0][i] + sources[1][i] + ...) on raw addresses, as :meth:`Recording.reduce` does it, on
        the whole device unless ``max_blocks`` is smaller.  ``stream`` belongs to the device of ``out``.
        """

    @staticmethod
    def multimem_reduce(stream: int, out: int, multicast: int, dtype: str, count: int, max_blocks: int = 0) -> None:
        """out[i] = the sum of all ranks' memory behind a multicast address, added by the switch in an order of its own
        ("float32"; "bfloat16" and "float16" accumulate in fp32).  Addresses and size are multiples of 16 bytes.
        """

    class Control:
        """What ends the waits of a rank and says why, in one pinned host block that the device maps."""

        def __init__(self, device: int, aborted: int) -> None:
            """``aborted`` is the device address of a uint32 that is zero now and stays the caller's."""

        def abort(self, code: int) -> None:
            """Ends waits that are running or still come, within microseconds; the first ``code`` (2 .. 2**31 - 1)
            stays.  Waits whose words are there do not look.  No CUDA call; nothing happens once closed.
            """

        @property
        def block(self) -> int:
            """Where the device sees the block, for kernels of others that wait: they read its first word and record
            what they gave up on as waits of this module do (``_ext.CONTROL_WORDS``).  RuntimeError once closed.
            """

        def error(self) -> tuple[int, int, int, int, int] | None:
            """(code, tag, index, expected, seen) of the first wait that gave up: code 1 ran out of time, others were
            given to :meth:`abort`; ``index`` says which of its words was missing, ``expected`` and ``seen`` are whole
            words.  No CUDA call; the answer outlives :meth:`close`.
            """

        def close(self) -> None:
            """Gives the block back; no wait may be running any more.  Idempotent."""

    class Recording:
        """Operations on numbered streams (0 .. 63), recorded once; needs no device.

        Operations check their arguments as far as possible without bases.
        """

        def __init__(self) -> None: ...
        def copy(
            self,
            stream: int,
            dst: Address,
            src: Address,
            row_bytes: int,
            rows: int = 1,
            dst_pitch: int = 0,
            src_pitch: int = 0,
            over_link: bool = False,
        ) -> None:
            """Copies rows between any two addresses of devices or pinned host memory; pitches are in bytes, 0 for dense
            rows.  ``over_link``: between ranks, beside products where the driver lets one ask for that and the stream
            is neither being captured nor the legacy default stream, and at the pace of the program's emulated link, if
            it has one.
            """

        def wait(self, stream: int, epoch: Address, words: list[Address], values: list[int], tag: int) -> None:
            """Waits until every word has reached its value; ``tag`` (32 bits) comes back in :meth:`Control.error`."""

        def signal(self, stream: int, epoch: Address, words: list[Address], values: list[int]) -> None:
            """Stores values in words, unless the rank has given up."""

        def advance(self, stream: int, epoch: Address) -> None:
            """epoch += 1."""

        def reduce(
            self,
            stream: int,
            out: Address,
            out_dtype: str,
            sources: list[Address],
            source_dtype: str,
            count: int,
            rows: int = 1,
            out_pitch: int = 0,
            source_pitches: list[int] | None = None,
            epoch: Address | None = None,
            words: list[Address] | None = None,
            values: list[int] | None = None,
            tag: int = 0,
            beside: int = 0,
        ) -> None:
            """out[row, i] = cast(sources[0][row, i] + sources[1][row, i] + ...), 1 .. 16 sources.

            Adds in that order in fp32 (fp64 for "float64") and rounds once, to nearest even.  dtypes are equal, or one
            is "float32" and the other "bfloat16" or "float16".  ``out`` may be one of the sources.  Pitches are in
            bytes, 0 for dense rows.  Holds at most ``beside`` multiprocessors, for a sum that runs beside products, or
            with 0 the whole device; a sixteenth of it where it waits itself: with ``epoch``, ``words`` (one for each
            source) and ``values``, as :meth:`wait` does.
            """

        def reduce_multicast(
            self,
            stream: int,
            out: Address,
            multicast: Address,
            dtype: str,
            count: int,
            rows: int = 1,
            out_pitch: int = 0,
            beside: int = 0,
        ) -> None:
            """out[row, i] = the sum of all ranks' memory behind a multicast address, as :meth:`cuda.multimem_reduce`
            adds it.  Rows there are dense; ``out_pitch`` is in bytes, 0 for dense rows.  Rows, pitch and addresses are
            multiples of 16 bytes.  ``beside`` as in :meth:`reduce`.
            """

        def store_multicast(
            self,
            stream: int,
            multicast: Address,
            src: Address,
            row_bytes: int,
            rows: int = 1,
            src_pitch: int = 0,
            beside: int = 0,
        ) -> None:
            """All ranks' memory behind a multicast address = src[row]; otherwise as :meth:`reduce_multicast`."""

        def record(self, stream: int, event: int) -> None:
            """Event (0 .. 4095): everything that the stream has so far."""

        def depend(self, stream: int, event: int) -> None:
            """The stream waits for what the event last recorded, by an earlier operation."""

        def check_run(self, first: int, last: int, streams: list[int], bases: list[int], timeout_s: float) -> None:
            """Raises the ValueError that :meth:`Program.run` would raise."""

        def __len__(self) -> int: ...

    class Program(Recording):
        """A recording that can be enqueued on streams of a device, any number of times."""

        def __init__(self, control: cuda.Control, device: int, link: float = 0.0) -> None:
            """``link``: bytes/s of an emulated link, which ``over_link`` copies share as they would share a real one:
            each books the time that its bytes take, and its stream goes on when that is over; 0 for none.

            Loads all kernels of this module; the runtime might otherwise wait for a spinning wait to end first.
            """

        def run(self, first: int, last: int, streams: list[int], bases: list[int], timeout_s: float) -> None:
            """Enqueues operations [first, last) on ``streams`` (cudaStream_t handles), without the GIL.

            ``timeout_s`` is each wait's own, ``math.inf`` for none.  Streams may be under capture.
            """

        def play(
            self,
            stops: list[int],
            callbacks: Sequence[Callable[[], object] | None],
            streams: list[int],
            bases: list[int],
            timeout_s: float,
        ) -> None:
            """Enqueues all operations as :meth:`run` does, and calls ``callbacks[i]`` once ``stops[i]`` are enqueued.

            One call for a whole schedule: all arguments are checked before the first operation is enqueued, and Python
            runs in callbacks alone (None: in none).  What a callback raises ends the call and is passed on.
            ValueError: stops that fall, are more than there are operations, or as many as there are no callbacks for.
            """

        def close(self) -> None:
            """Gives events and memory back; nothing of the program may be running any more.  Idempotent."""

    class host_side:  # noqa: N801 - a submodule
        """What kernels compute and how work is cut up, on the host; for tests."""

        class Rehearsal(cuda.Recording):
            """A recording whose runs enqueue nothing, but count and list what a :class:`Program` would enqueue."""

            def __init__(self, lists: bool = True) -> None:
                """``lists``: whether launches are kept; they are counted in any case."""

            def run(self, first: int, last: int, streams: list[int], bases: list[int], timeout_s: float) -> None: ...
            def play(
                self,
                stops: list[int],
                callbacks: Sequence[Callable[[], object] | None],
                streams: list[int],
                bases: list[int],
                timeout_s: float,
            ) -> None: ...
            @property
            def launched(self) -> int:
                """Launches of all runs so far: copies, kernels, recorded and awaited events."""

            def take_launches(self) -> list[tuple[str, int, list[int], list[int]]]:
                """(kind, stream, addresses, values) of each launch since the last time.

                Addresses of words begin with the epoch's.  Values: of a copy row_bytes, rows, both pitches, over_link;
                of waits and signals the words' values, then a wait's tag; of a reduction count and rows; of what goes
                by multicast, whose local address is the first one, row_bytes, rows, local pitch, beside; of an event
                its number.
                """

            def close(self) -> None: ...

        @staticmethod
        def word_of(epoch: int, value: int) -> int: ...
        @staticmethod
        def reached(seen: int, expected: int) -> bool: ...
        @staticmethod
        def nanoseconds(seconds: float) -> int:
            """A timeout as kernels take it; 2**64 - 1 is none."""

        @staticmethod
        def control_words() -> dict[str, int]:
            """Place of each word of 32 bits in the block of a :class:`cuda.Control`."""

        @staticmethod
        def link_pieces(
            row_bytes: int, rows: int, dst_pitch: int, src_pitch: int, piece: int = 8 << 20
        ) -> list[tuple[int, int, int, int]]:
            """(offset in dst, offset in src, row_bytes, rows) of the pieces of a copy over an emulated link."""

        @staticmethod
        def reduce_layout(
            out: int,
            out_dtype: str,
            sources: list[int],
            source_dtype: str,
            count: int,
            rows: int,
            out_pitch: int,
            source_pitches: list[int],
        ) -> tuple[int, int, int, int]:
            """(rows, head, vectors, tail): elements before, 16-byte loads, elements behind, of each row."""

        @staticmethod
        def reduce_grid(
            work: int, share: Literal["device", "beside", "waiting"], multiprocessors: int, cap: int = 0
        ) -> tuple[int, int]:
            """(blocks, threads) for so many loads of each source."""

        @staticmethod
        def reduce_on_host(
            out: int,
            out_dtype: str,
            sources: list[int],
            source_dtype: str,
            count: int,
            rows: int,
            out_pitch: int,
            source_pitches: list[int],
            workers: int,
        ) -> None:
            """The device's reduction with so many threads, one after another, on host addresses."""
