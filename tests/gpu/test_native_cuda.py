"""The CUDA part of the compiled module on a GPU: events, signals, giving up, captured graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import pytest
import torch
from native_rank import C, Rank, at

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(not hasattr(C, "cuda"), reason="the extension was built without CUDA"),
    pytest.mark.timeout(120),
]


@pytest.fixture
def rank() -> Iterator[Rank]:
    made = Rank()
    yield made
    made.close()


def test_the_module_can_be_used_here_and_leaves_the_device_alone(rank: Rank) -> None:
    assert C.cuda.why_unavailable() == ""
    before = torch.cuda.current_device()
    rank.run(rank.program())
    assert torch.cuda.current_device() == before


def test_events_order_streams(rank: Rank) -> None:
    source = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    middle, target = torch.zeros_like(source), torch.zeros_like(source)
    torch.cuda.synchronize()
    program = rank.program()
    program.copy(0, at(middle), at(source), source.nbytes)
    program.record(0, 3)
    program.depend(1, 3)
    program.copy(1, at(target), at(middle), source.nbytes)
    with torch.cuda.stream(rank.streams[0]):
        torch.cuda._sleep(50_000_000)
    rank.run(program)
    torch.cuda.synchronize()
    assert torch.equal(target, source)


def test_a_wait_sees_what_its_signal_released(rank: Rank) -> None:
    source = torch.arange(1 << 20, dtype=torch.int32, device="cuda")
    middle, target = torch.zeros_like(source), torch.zeros_like(source)
    torch.cuda.synchronize()
    waiting, signalling = rank.program(), rank.program()
    words = [at(rank.words, index) for index in range(40)]
    waiting.wait(0, at(rank.epoch), words, [3] * 40, 1)
    waiting.copy(0, at(target), at(middle), source.nbytes)
    signalling.copy(1, at(middle), at(source), source.nbytes)
    signalling.signal(1, at(rank.epoch), words, [3] * 40)
    rank.run(waiting)
    with torch.cuda.stream(rank.streams[1]):
        torch.cuda._sleep(20_000_000)
    assert not rank.streams[0].query()
    rank.run(signalling)
    torch.cuda.synchronize()
    assert rank.control.error() is None
    assert torch.equal(target, source)
    assert rank.words.tolist() == [3] * 40 + [0] * 24


@pytest.mark.parametrize("epoch", [2**24 - 1, 2**23 - 1, 2**32 - 1])
def test_words_wrap_around(rank: Rank, epoch: int) -> None:
    rank.epoch.fill_(epoch - 2**32 if epoch >= 2**31 else epoch)
    torch.cuda.synchronize()
    program = rank.program()
    program.signal(0, at(rank.epoch), [at(rank.words)], [255])
    program.advance(0, at(rank.epoch))
    program.wait(0, at(rank.epoch), [at(rank.words)], [-1], 1)
    rank.run(program)
    torch.cuda.synchronize()
    assert rank.control.error() is None
    last = (epoch * 256 + 255) % 2**32
    assert rank.words[0].item() % 2**32 == last
    assert rank.epoch.item() % 2**32 == (epoch + 1) % 2**32


def assert_drains(rank: Rank) -> None:
    """After an abort waits return at once, signals are left out, copies run, and the first error stays."""
    error = rank.control.error()
    source, target = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    torch.cuda.synchronize()
    program = rank.program()
    program.wait(0, at(rank.epoch), [at(rank.words, 5)], [9], 99)
    program.signal(0, at(rank.epoch), [at(rank.words, 6)], [9])
    program.copy(0, at(target), at(source), source.nbytes)
    start = time.monotonic()
    rank.run(program, math.inf)
    rank.streams[0].synchronize()
    assert time.monotonic() - start < 1
    assert rank.words.tolist() == [0] * 64
    assert torch.equal(target, source)
    assert rank.control.error() == error


def test_a_wait_that_runs_out_of_time_says_which(rank: Rank) -> None:
    program = rank.program()
    program.signal(0, at(rank.epoch), [at(rank.words)], [0])
    program.wait(0, at(rank.epoch), [at(rank.words, 0), at(rank.words, 7)], [0, 2], 41)
    program.signal(0, at(rank.epoch), [at(rank.words, 9)], [4])
    start = time.monotonic()
    rank.run(program, 0.2)
    assert rank.control.error() is None
    rank.streams[0].synchronize()
    assert 0.19 < time.monotonic() - start < 1
    assert rank.control.error() == (1, 41, 1, 2, 0)
    assert rank.aborted.item() == 1
    assert_drains(rank)
    rank.close()
    assert rank.control.error() == (1, 41, 1, 2, 0), "the answer outlives the block"


def test_the_host_ends_a_wait(rank: Rank) -> None:
    program = rank.program()
    program.wait(0, at(rank.epoch), [at(rank.words)], [1], 17)
    rank.run(program, math.inf)
    time.sleep(0.2)
    assert not rank.streams[0].query()
    rank.control.abort(7)
    rank.control.abort(8)
    start = time.monotonic()
    rank.streams[0].synchronize()
    assert time.monotonic() - start < 0.1
    assert rank.control.error() == (7, 17, 0, 1, 0)
    assert_drains(rank)
    with pytest.raises(ValueError, match="got 1 and 2: smaller codes are taken"):
        rank.control.abort(1)


def test_a_replayed_graph_waits_anew_in_each_epoch(rank: Rank) -> None:
    source, target = torch.zeros(1 << 16, device="cuda"), torch.zeros(1 << 16, device="cuda")
    torch.cuda.synchronize()
    captured, signalling = rank.program(), rank.program()
    captured.record(0, 0)
    captured.depend(2, 0)
    captured.wait(2, at(rank.epoch), [at(rank.words)], [1], 5)
    captured.copy(2, at(target), at(source), source.nbytes)
    captured.reduce(2, at(target), "float32", [at(source), at(target)], "float32", source.numel())
    captured.record(2, 1)
    captured.depend(0, 1)
    captured.advance(0, at(rank.epoch))
    signalling.signal(1, at(rank.epoch), [at(rank.words)], [1])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=rank.streams[0]):
        rank.run(captured)
    for use in range(3):
        source.fill_(use + 1)
        torch.cuda.synchronize()
        with torch.cuda.stream(rank.streams[0]):
            graph.replay()
        time.sleep(0.05)
        assert not rank.streams[0].query(), "the signal of the epoch before is not enough"
        rank.run(signalling)
        torch.cuda.synchronize()
        assert rank.control.error() is None
        assert (target == 2 * (use + 1)).all()
        assert rank.words[0].item() == use * 256 + 1
        assert rank.epoch.item() == use + 1


def test_closed_and_foreign_objects_are_refused(rank: Rank) -> None:
    program, other = rank.program(), rank.program()
    program.close()
    program.close()
    with pytest.raises(RuntimeError, match="the Program is closed"):
        rank.run(program)
    with pytest.raises(ValueError, match="belong to one device"):
        C.cuda.Program(rank.control, 1)
    with pytest.raises(ValueError, match="no such device"):
        C.cuda.Control(torch.cuda.device_count(), rank.aborted.data_ptr())
    for link in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="bytes per second"):
            C.cuda.Program(rank.control, 0, link)
    rank.control.close()
    with pytest.raises(RuntimeError, match="the Control of this Program is closed"):
        rank.run(other)
