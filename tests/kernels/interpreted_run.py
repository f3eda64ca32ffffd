"""The kernels in Triton's interpreter: ``python interpreted_run.py CHECK...`` with TRITON_INTERPRET=1.

A process of its own, since the interpreter has to be chosen before Triton is imported, which takes seconds: each check
is forked from it.  Two ranks are two processes, since programs run one after another and a spinning one would keep all
others from running.  Of each check a line of JSON is printed: its name, and what failed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from forked_checks import run_forked
from kernel_cases import GatherCase, Guarded, ScatterCase, check_product, word
from torch import Tensor

from odysseus_kernels.errors import KernelUnavailableError
from odysseus_kernels.kernels import launch
from odysseus_kernels.kernels.configs import DTYPES, TileConfig
from odysseus_kernels.kernels.gather_matmul import gather_matmul
from odysseus_kernels.kernels.matmul_scatter import matmul_scatter
from odysseus_kernels.kernels.weight_gradient import weight_gradient
from odysseus_kernels.ops import _tiles
from odysseus_kernels.ops._products import WeightGradient

POINTERS = TileConfig(16, 32, 16, warps=4, stages=2, group=2)
DESCRIPTORS = dataclasses.replace(POINTERS, descriptors=True)
# Sizes that no block divides, and depths that satisfy descriptors (multiples of 16 bytes) all the same.
LAYOUTS: list[dict[str, object]] = [
    {},
    {"dtype": torch.float16, "rows": 33, "depth": 40},
    {"dtype": torch.float32, "rows": 16, "deep": True, "padding": 8},
    {"dtype": torch.bfloat16, "out_dtype": torch.float32, "rows": 7, "depth": 16, "bias": False},
    {"rows": 1, "world": 2, "rank": 0},
    {"world": 1, "rank": 0, "rows": 19},
    {"depth": 17, "padding": 3},
]


def gather() -> None:
    """Everything is there: all layouts, with pointers and descriptors."""
    for layout in LAYOUTS:
        for config in (POINTERS, DESCRIPTORS):
            _gather(config, **layout)
    for dtype in DTYPES:
        _gather(DESCRIPTORS, dtype=dtype, widths=(40, 16, 8), pieces=3, order="sequence", rows=37, rank=2, world=4)
    _gather(POINTERS, widths=(33, 5), pieces=64, rows=40, deep=True)
    # Words wrap around, and epochs before 0 are as good as others.
    for epoch in (-7, 0, 2**23 - 1, -(2**23)):
        _gather(POINTERS, epoch=epoch, pieces=2)
    # A single column is contiguous either way.
    _gather(POINTERS, widths=(8, 1), deep=True)


def _gather(config: TileConfig, **layout: object) -> None:
    case = GatherCase(**layout)  # type: ignore[arg-type]
    case.deliver()
    case.multiply(config)
    case.check()


def scatter() -> None:
    """All credits are there: all layouts, with pointers and descriptors; counters serve call after call."""
    for layout in LAYOUTS:
        adapted = {("depths" if name == "depth" else name): value for name, value in layout.items()}
        if "depths" in adapted:
            adapted["depths"] = (adapted["depths"],)
        for config in (POINTERS, DESCRIPTORS):
            _scatter(config, **adapted)
    for dtype in DTYPES:
        _scatter(DESCRIPTORS, dtype=dtype, depths=(16, 40, 8), rows=37, world=4, rank=3, width=24)
    _scatter(POINTERS, depths=(16, 5), deep=True, padding=1)
    for epoch in (-7, 0, 2**23 - 1, -(2**23)):
        _scatter(POINTERS, epoch=epoch)
    case = ScatterCase()
    for epoch in (4, 5):
        case.epochs.fill_(epoch)
        case.epoch = epoch
        case.credits.fill_(word(epoch, -1))
        case.multiply(POINTERS)
        case.check()


def _scatter(config: TileConfig, **layout: object) -> None:
    case = ScatterCase(**layout)  # type: ignore[arg-type]
    case.multiply(config)
    case.check()


def gradient() -> None:
    """Chunks on either side, sums in fp32 or in the weights' dtype, onto what was there or not."""
    for layout in LAYOUTS:
        for swapped in (False, True):
            _gradient(POINTERS, swapped, False, **layout)
            _gradient(DESCRIPTORS, swapped, True, **layout)
    for dtype in DTYPES:
        _gradient(DESCRIPTORS, False, False, dtype=dtype, rows=32, order="sequence", world=4, pieces=2)
    _gradient(POINTERS, False, False, epoch=2**23 - 1, pieces=255)
    # Chunk by chunk, as a transport with two slots does it.
    guard = Guarded("cpu", seed=1)
    grads = guard.normal(40, 24, dtype=torch.bfloat16)
    x = guard.normal(40, 48, dtype=torch.bfloat16)
    out = guard.empty(24, 48, dtype=torch.float32).zero_()
    for chunk in range(4):
        rows = slice(10 * chunk, 10 * chunk + 10)
        weight_gradient(
            out,
            grads[rows],
            x[rows],
            None,
            rank=0,
            world=1,
            words=None,
            epoch=None,
            aborted=None,
            control=None,
            accumulate=True,
            config=DESCRIPTORS,
        )
    check_product(out, grads.mT, x)
    guard.check()


def _gradient(config: TileConfig, swapped: bool, accumulate: bool, **layout: object) -> None:
    case = GatherCase(**layout)  # type: ignore[arg-type]
    case.deliver()
    out_dtype = torch.float32 if accumulate else case.dtype
    case.gradient(config, swapped=swapped, accumulate=accumulate, out_dtype=out_dtype)


def fallback() -> None:
    """A descriptor is used where it can be and nowhere else; a configuration is chosen where none is given."""
    problem = launch.Problem(3, 20, (40,), 24)
    like = torch.empty(1, dtype=torch.bfloat16)
    assert launch.choose("gather_matmul", DESCRIPTORS, problem, like, True).descriptors
    assert not launch.choose("gather_matmul", DESCRIPTORS, problem, like, False).descriptors
    aligned = torch.empty(4, 24, dtype=torch.bfloat16)
    assert launch.matrix("x", aligned).describable()
    assert not launch.matrix("x", aligned[:, 1:]).describable()
    assert not launch.matrix("x", torch.empty(4, 23, dtype=torch.bfloat16)).describable()
    assert not launch.matrix("x", aligned[:1].expand(4, 24)).describable()
    case = GatherCase(world=2, rank=0, rows=16, depth=16, widths=(16,))
    case.deliver()
    case.multiply(None)
    case.check()


def arguments() -> None:
    """What does not fit is a ValueError that names what was expected and what was given."""
    case = GatherCase()
    good = {"outs": case.outs, "local": case.local, "gathered": case.gathered, "weights": case.weights}
    good |= {"biases": case.biases, **case.signals()}
    weight, out = case.weights[0], case.outs[0]
    for name, value, message in (
        ("rank", 3, "rank: expected 0 <= rank < world = 3, got 3"),
        ("order", "random", "order: expected 'ring' or 'sequence', got 'random'"),
        ("pieces", 0, "pieces: expected 1 to 255, got 0"),
        ("gathered", None, r"gathered: expected shape \[2, 20, 24\], got None"),
        ("gathered", case.gathered[:1], r"gathered: expected shape \[2, 20, 24\], got \[1, 20, 24\]"),
        ("gathered", case.gathered.half(), "gathered: expected torch.bfloat16, got torch.float16"),
        ("words", case.words.long(), "words: expected a contiguous tensor of torch.int32 with 2 or more"),
        ("epoch", None, "epoch: expected a contiguous tensor of torch.int32 .* got None"),
        ("control", None, "control: expected a contiguous tensor of torch.int64 with 1 or more elements .* got None"),
        ("timeout_s", 0.0, "timeout_s: expected seconds above 0, got 0.0"),
        ("weights", [weight[:, :-1]], r"weights\[0\]: expected shape \[any, 24\], not empty, got \(40, 23\)"),
        ("weights", [weight.float()], r"weights\[0\]: expected torch.bfloat16, got torch.float32"),
        (
            "weights",
            [weight[:, None].expand(40, 2, 24).reshape(40, 48)[:, ::2]],
            "weights: expected contiguous rows in all or",
        ),
        ("weights", [], "outs: expected 0 entries|weights: expected 1 to 3 tensors, got 0"),
        ("outs", [out[:-1]], r"outs\[0\]: expected shape \[60, 40\]"),
        ("outs", [out.double()], r"outs\[0\]: expected torch.bfloat16 or torch.float16 or torch.float32"),
        ("biases", [weight[0]], r"biases\[0\]: expected a contiguous tensor \[40\]"),
        ("local", case.local.double(), "dtype: expected torch.bfloat16 or .* got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_matmul(**(good | {name: value}))  # type: ignore[arg-type]
    scattered = ScatterCase()
    table = scattered.table(scattered.parts)
    good = {"own": scattered.own, "xs": scattered.xs, "weights": scattered.weights, "bias": None, "slots": table}
    good |= {"rank": 1, "world": 3, "credits": table, "credit_value": -1, "arrived": table, "arrived_value": 255}
    good |= {"counters": scattered.counters, "epoch": scattered.epochs, "aborted": scattered.aborted}
    good["control"] = scattered.control.address
    for name, value, message in (
        ("slots", None, "slots: expected a contiguous tensor of torch.int64 with 3 or more elements on cpu, got None"),
        ("credit_value", -256, "credit_value: expected -255 to 255, got -256"),
        ("xs", [scattered.xs[0][1:]], r"xs\[0\]: expected shape \[60, any\], not empty, got \(59, 24\)"),
        ("counters", scattered.counters[:2], "counters: expected a contiguous tensor .* with 3 or more elements"),
    ):
        with pytest.raises(ValueError, match=message):
            matmul_scatter(**(good | {name: value}))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="out: expected torch.float32 to accumulate into, got torch.bfloat16"):
        case.gradient(POINTERS, swapped=False, accumulate=True, out_dtype=torch.bfloat16)


def aborted() -> None:
    """A wait for what never comes ends as soon as ``aborted`` is set; no credit, no store; no word is set."""
    case = GatherCase(world=2, rank=0, rows=16)
    later(lambda: case.aborted.fill_(1))
    ends(lambda: case.multiply(POINTERS))
    check_product(case.outs[0][:16], case.local, case.weights[0].mT, case.biases[0])
    case.aborted.zero_()
    later(lambda: case.aborted.fill_(1))
    ends(lambda: case.gradient(POINTERS, swapped=False, accumulate=False, out_dtype=torch.float32), fails=True)
    scattered = ScatterCase(world=3, rank=0)
    scattered.credits[2] = word(scattered.epoch, -2)
    later(lambda: scattered.aborted.fill_(7))
    ends(lambda: scattered.multiply(POINTERS))
    assert scattered.parts[2].isnan().all()
    assert scattered.arrived.tolist()[2] == -1
    assert (scattered.counters == 0).all()
    # A rank that gave up says nothing any more, even where it waits for nothing.
    scattered.arrived.fill_(-1)
    scattered.credits.fill_(word(scattered.epoch, -1))
    scattered.multiply(POINTERS)
    assert scattered.arrived.tolist() == [-1, -1, -1]
    a = scattered.xs[0].view(3, scattered.rows, -1)[0]
    check_product(scattered.own, a, scattered.weights[0].mT, scattered.bias_tensor)


def later(action: Callable[[], object], seconds: float = 0.3) -> None:
    threading.Timer(seconds, action).start()


def ends(action: Callable[[], None], *, fails: bool = False) -> None:
    """``action`` waits until the timer of :func:`later`, and not much longer."""
    began = time.perf_counter()
    if fails:
        with pytest.raises(AssertionError, match="error"):  # of a result that is worth nothing
            action()
    else:
        action()
    assert 0.25 < time.perf_counter() - began < 20


# ---- two ranks -------------------------------------------------------------------------------------------------------


class Shared:
    """Tensors over a file that both ranks map, in the order in which both ask for them."""

    def __init__(self, path: str) -> None:
        self._bytes = torch.from_file(path, shared=True, size=1 << 20, dtype=torch.uint8)
        self._used = 0

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        count = torch.Size(shape).numel() * dtype.itemsize
        first, self._used = self._used, self._used + -(-count // 256) * 256
        return self._bytes[first : first + count].view(dtype).view(shape)

    def meet(self, rank: int) -> None:
        """Both ranks are here."""
        here = self.tensor(2, dtype=torch.int32)
        here[rank] = 1
        _spin(lambda: bool(here.all()))


def _spin(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the other rank did not answer within 60 s"
        time.sleep(0.001)


def two_gather(rank: int, path: str) -> None:
    """Each rank brings its chunk to the other piece by piece, late, while the other's kernel waits for it."""
    shared = Shared(path)
    pieces, rows = 3, 50
    for order, gradient_of_it in (("ring", False), ("sequence", False), ("ring", True)):
        case = GatherCase(world=2, rank=rank, rows=rows, pieces=pieces, widths=(40, 24), order=order, epoch=2**23 - 1)
        gathered = [shared.tensor(1, rows, case.depth, dtype=case.dtype) for _ in range(2)]
        words = [shared.tensor(1, dtype=torch.int32) for _ in range(2)]
        gathered[rank].fill_(float("nan"))
        words[rank].fill_(case.wanted(-1))
        case.gathered, case.words = gathered[rank], words[rank]
        shared.meet(rank)

        def bring(case: GatherCase = case, to: Tensor = gathered[1 - rank], say: Tensor = words[1 - rank]) -> None:
            for piece in range(pieces):
                time.sleep(0.2)
                part = slice(rows * piece // pieces, rows * (piece + 1) // pieces)
                to[0, part] = case.local[part]
                say.fill_(case.wanted(piece + 1))

        thread = threading.Thread(target=bring)
        began = time.perf_counter()
        thread.start()
        if gradient_of_it:
            case.gradient(POINTERS, swapped=False, accumulate=False, out_dtype=torch.float32)
        else:
            case.multiply(DESCRIPTORS)
            case.check()
        thread.join()
        assert time.perf_counter() - began > 0.5


def two_scatter(rank: int, path: str) -> None:
    """Each rank stores into the other's slot, three calls in a row: never before the other has read the slot."""
    shared = Shared(path)
    cases = [ScatterCase(world=2, rank=r, seed=r, rows=20, depths=(24, 16)) for r in range(2)]
    mine, peer = cases[rank], 1 - rank
    slots = [shared.tensor(mine.rows, mine.width, dtype=mine.dtype) for _ in range(2)]
    arrived = [shared.tensor(2, dtype=torch.int32) for _ in range(2)]
    credits = [shared.tensor(2, dtype=torch.int32) for _ in range(2)]
    slots[rank].fill_(float("nan"))
    arrived[rank].fill_(word(0, 255))
    credits[rank].fill_(word(0, 255))
    shared.meet(rank)
    # Tables of this rank: the slot and the word in the other's memory, the credit in its own.
    mine.parts = [torch.full_like(slots[r], float("nan")) if r == rank else slots[r] for r in range(2)]
    into = arrived[peer]
    mine.arrived = torch.stack([into[rank], into[rank]])
    tables = {"slots": mine.table(mine.parts), "arrived": mine.table([into[rank], into[rank]])}
    tables["credits"] = mine.table(list(credits[rank].split(1)))
    other = cases[peer]
    for epoch in (1, 2, 3):
        mine.epochs.fill_(epoch)
        matmul_scatter(
            mine.own,
            mine.xs,
            mine.weights,
            mine.bias_tensor,
            rank=rank,
            world=2,
            credit_value=-1,
            arrived_value=255,
            counters=mine.counters,
            epoch=mine.epochs,
            aborted=mine.aborted,
            control=mine.control.address,
            config=POINTERS,
            **tables,
        )
        _spin(lambda epoch=epoch: int(arrived[rank][peer]) == word(epoch, 255))
        # One rank reads late: if the other did not wait for its credit, it would meanwhile store again.
        time.sleep(0.1 + 0.8 * rank)
        a = torch.cat(other.xs, 1).view(2, mine.rows, -1)[rank]
        check_product(slots[rank], a, torch.cat(other.weights, 1).mT)
        slots[rank].fill_(float("nan"))
        credits[peer][rank] = word(epoch, 255)
    mine.guard.check()


def prepared() -> None:
    """What makes a kernel ready needs no peer: all programs end, whatever the other chunks hold."""
    x, weight, own = torch.ones(8, 16), torch.ones(24, 16), torch.full((8, 24), torch.nan)
    outs = [torch.full((24, 24), torch.nan)]
    _tiles.prepare_project(x, 1, 3, outs, [weight], [None])
    assert (outs[0][8:16] == 16).all()  # the local chunk
    _tiles.prepare_scatter(own, 1, 3, [torch.ones(24, 16)], [weight], None)
    assert (own == 16).all()
    total = WeightGradient(torch.ones(24, 16))
    _tiles.prepare_weight_gradient(x, 1, 3, total, torch.ones(24, 24))
    refuses = mock.patch.object(launch, "target_of", side_effect=RuntimeError("no device"))
    with refuses, pytest.raises(KernelUnavailableError, match="gather_matmul cannot be had .* no device"):
        _tiles.prepare_project(x, 1, 3, [torch.empty(24, 23)], [weight[:23]], [None])


def limits() -> None:
    """Waits that never end by themselves."""
    import interpreted_limits  # which imports this module

    interpreted_limits.main()


CHECKS = {
    check.__name__: check for check in (gather, scatter, gradient, fallback, arguments, aborted, prepared, limits)
}
TWO_RANKS = {check.__name__: check for check in (two_gather, two_scatter)}


def main(names: list[str]) -> None:
    for name in names:
        if name in CHECKS:
            failed = run_forked(CHECKS[name], ())
        else:
            with tempfile.NamedTemporaryFile() as shared:
                shared.truncate(1 << 20)
                failed = run_forked(TWO_RANKS[name], *((rank, shared.name) for rank in range(2)))
        print(json.dumps([name, failed]), flush=True)


if __name__ == "__main__":
    assert launch.interpreted(), "expected TRITON_INTERPRET=1"
    main(sys.argv[1:])
