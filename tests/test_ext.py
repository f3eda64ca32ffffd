"""The compiled module between processes: signals, descriptors, liveness, memory.  Sums are in test_ext_reduce.py."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ext_peers import Peer, PeerError

from odysseus_kernels import _ext

C = _ext.load()
NONCE = 0x1234_5678_9ABC_DEF0
WINDOW = 1 << 20
MakePeers = Callable[..., list[Peer]]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def make_peers(directory: Path) -> Iterator[MakePeers]:
    started: list[Peer] = []

    def make(world: int, *, attach: bool = True, folder: Path = directory) -> list[Peer]:
        peers = [Peer(C.__file__, rank, world, str(folder), WINDOW, NONCE) for rank in range(world)]
        started.extend(peers)
        if attach:
            for peer in peers:
                peer.call("attach", [other.path for other in peers])
        return peers

    yield make
    for peer in started:
        peer.stop()


def process_state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_signals_reach_the_other_process(make_peers: MakePeers) -> None:
    first, second = make_peers(2)
    assert first.call("wait_ready", 1, 3, 7, 5, 0.0) == ("timeout", 1)
    first.start("wait_ready", 1, 3, 7, 5, 30.0)
    second.call("reserve", 3, 5)
    second.call("write", 1, 3, b"there")
    second.call("set_ready", 3, 7, 5)
    assert first.finish() == ("ok", 1)
    assert first.call("read", 1, 3, 5) == b"there"
    assert first.call("ready", 1, 3, 7) == 5
    assert first.call("wait_ready", 1, 3, 7, 4, 0.0) == ("ok", 1), "a later value satisfies an earlier wait"

    second.start("wait_done", 0, 3, 7, 1, 30.0)
    first.call("set_done", 1, 3, 7, 1)
    assert second.finish() == ("ok", 0)
    assert first.call("done", 1, 0, 3, 7) == 1
    assert first.call("done", 1, 1, 3, 7) == 0, "each reader has a word of its own"


def test_timeout_takes_as_long_as_asked(make_peers: MakePeers) -> None:
    first, _ = make_peers(2)
    start = time.monotonic()
    assert first.call("wait_ready", 1, 0, 0, 1, 0.3) == ("timeout", 1)
    assert 0.29 < time.monotonic() - start < 2


def test_credits_order_a_stream(make_peers: MakePeers) -> None:
    first, second = make_peers(2)
    calls, cells, size = 3000, 3, 4096
    first.call("reserve", 0, cells * size)
    first.start("produce", 1, calls, cells, size)
    assert second.call("consume", 0, calls, cells, size) == calls
    assert first.finish() is None


@pytest.mark.parametrize("collected", [True, False], ids=["collected", "zombie"])
def test_killed_peer_is_noticed(make_peers: MakePeers, collected: bool) -> None:
    waiting, bystander, victim = make_peers(3)
    waiting.start("wait_ready", 2, 0, 0, 1, 30.0)
    bystander.start("wait_ready", 0, 0, 0, 1, 30.0)  # waits for a live rank, which will never signal either
    time.sleep(0.1)
    start = time.monotonic()
    victim.kill()
    if collected:
        victim.process.join()
    assert waiting.finish() == ("lost", 2)
    assert bystander.finish() == ("lost", 2)
    assert time.monotonic() - start < 2
    while not collected and process_state(victim.pid) != "Z":  # the lock goes a moment before the process is a zombie
        assert time.monotonic() - start < 5
    assert waiting.call("alive", 2) is False
    assert waiting.call("alive", 1) is True


def test_what_a_dead_peer_published_is_there(make_peers: MakePeers) -> None:
    survivor, victim = make_peers(2)
    victim.call("reserve", 0, 8)
    victim.call("write", 1, 0, b"heritage")
    victim.call("set_ready", 0, 0, 3)
    victim.stop()
    assert survivor.call("wait_ready", 1, 0, 0, 3, 5.0) == ("ok", 1)
    assert survivor.call("read", 1, 0, 8) == b"heritage"
    assert survivor.call("wait_ready", 1, 0, 0, 4, 5.0) == ("lost", 1)


def test_failed_peer_says_why(make_peers: MakePeers) -> None:
    first, second, third = make_peers(3)
    first.start("wait_done", 1, 0, 0, 1, 30.0)
    third.start("wait_ready", 0, 0, 0, 1, 30.0)
    second.call("fail", "out of memory: ä " + "ü" * 400)
    second.call("fail", "a later reason")
    assert first.finish() == ("failed", 1)
    assert third.finish() == ("failed", 1)
    reason = first.call("reason", 1)
    # 17 bytes come before the umlauts, of which only whole ones are kept.
    assert reason == "out of memory: ä " + "ü" * ((C.REASON_BYTES - 18) // 2)
    assert first.call("reason", 2) == ""
    second.stop()
    assert first.call("wait_ready", 1, 0, 0, 1, 5.0) == ("failed", 1), "its reason outlives it"
    assert first.call("reason", 1) == reason


def test_closed_peer_matters_only_to_who_waits_for_it(make_peers: MakePeers) -> None:
    first, second, third = make_peers(3)
    third.call("close")
    third.stop()
    first.start("wait_ready", 1, 0, 0, 1, 30.0)
    time.sleep(0.2)
    second.call("set_ready", 0, 0, 1)
    assert first.finish() == ("ok", 1)
    assert first.call("wait_ready", 2, 0, 0, 1, 30.0) == ("lost", 2)
    assert first.call("alive", 2) is False


def test_descriptor_ring(make_peers: MakePeers) -> None:
    first, second = make_peers(2)
    assert first.call("posted", 1) == 0
    first.start("wait_posted", 1, 1, 30.0)
    second.call("post", 1, 2**64 - 1, "all_gather_linear f32[8192, 1024]")
    assert first.finish() == ("ok", 1)
    assert first.call("descriptor", 1, 1) == (2**64 - 1, "all_gather_linear f32[8192, 1024]")
    for seq in range(2, C.DESCRIPTORS + 2):
        second.call("post", seq, seq, "x" * 1000)
    assert first.call("descriptor", 1, C.DESCRIPTORS + 1) == (C.DESCRIPTORS + 1, "x" * C.TEXT_BYTES)
    assert first.call("descriptor", 1, 2)[0] == 2
    for seq in (0, 1, C.DESCRIPTORS + 2):
        with pytest.raises(PeerError, match=f"descriptor {seq} of rank 1") as error:
            first.call("descriptor", 1, seq)
        assert error.value.kind == "LookupError"
    with pytest.raises(PeerError, match="expected seq > latest, got 65 and 65"):
        second.call("post", C.DESCRIPTORS + 1, 0, "")


def test_signal_handlers_run_during_a_wait(make_peers: MakePeers) -> None:
    first, _ = make_peers(2)
    first.start("wait_ready", 1, 0, 0, 1, math.inf)
    time.sleep(0.1)
    start = time.monotonic()
    os.kill(first.pid, signal.SIGINT)
    with pytest.raises(PeerError) as error:
        first.finish()
    assert error.value.kind == "KeyboardInterrupt"
    assert time.monotonic() - start < 1


def test_forked_child_tears_nothing_down(make_peers: MakePeers) -> None:
    first, second = make_peers(2)
    message = second.call("fork_and_use")
    assert "belongs to process" in message
    assert first.call("alive", 1) is True
    assert first.call("wait_ready", 1, 0, 0, 1, 0.1) == ("timeout", 1)
    second.call("set_ready", 0, 0, 1)
    assert first.call("wait_ready", 1, 0, 0, 1, 5.0) == ("ok", 1)


def test_forked_child_does_not_keep_its_parent_alive(make_peers: MakePeers) -> None:
    first, second = make_peers(2)
    child = second.call("fork_and_stay")
    try:
        second.kill()
        start = time.monotonic()
        assert first.call("wait_ready", 1, 0, 0, 1, 30.0) == ("lost", 1)
        assert time.monotonic() - start < 2
    finally:
        os.kill(child, signal.SIGKILL)


def test_no_file_exists_at_any_instant(make_peers: MakePeers, directory: Path) -> None:
    for delay in (0.0, 0.05, 0.1):
        context_peers = make_peers(2, attach=False)
        assert not list(directory.iterdir())
        context_peers[0].start("attach", [peer.path for peer in context_peers])
        time.sleep(delay)
        for peer in context_peers:
            peer.stop()
        assert not list(directory.iterdir())


def test_attach_verifies_each_segment(make_peers: MakePeers, directory: Path) -> None:
    (first, second) = make_peers(2, attach=False)
    host = C.SymmetricHost(0, 2, str(directory), WINDOW, NONCE + 1)
    with pytest.raises(RuntimeError, match=f"expected nonce {NONCE + 1}, found {NONCE}"):
        host.attach([host.path, second.path])
    with pytest.raises(RuntimeError, match="expected rank 1, found 0"):
        C.SymmetricHost(0, 2, str(directory), WINDOW, NONCE).attach(["", first.path])
    with pytest.raises(RuntimeError, match="expected size in bytes"):
        C.SymmetricHost(0, 2, str(directory), 2 * WINDOW, NONCE).attach(["", second.path])
    with pytest.raises(RuntimeError, match="cannot open /proc/0/fd/9"):
        host.attach(["", "/proc/0/fd/9"])
    with pytest.raises(RuntimeError, match="expected a process for each rank"):
        host.attach(["", C.SymmetricHost(1, 2, str(directory), WINDOW, NONCE + 1).path])
    with pytest.raises(ValueError, match="got 3 and 2"):
        host.attach(["", "", ""])
    with pytest.raises(RuntimeError, match="call attach\\(\\) first"):
        host.wait_ready(1, 0, 0, 1, 0.0)


def test_bad_arguments_name_both_operands(directory: Path) -> None:
    for rank, world, text in ((2, 2, "got 2 and 2"), (-1, 2, "got -1 and 0"), (0, 0, "got 0 and 1")):
        with pytest.raises(ValueError, match=text):
            C.SymmetricHost(rank, world, str(directory), WINDOW, NONCE)
    with pytest.raises(FileNotFoundError, match="missing"):
        C.SymmetricHost(0, 1, str(directory / "missing"), WINDOW, NONCE)
    host = C.SymmetricHost(0, 1, str(directory), WINDOW, NONCE)
    for call, text in (
        (lambda: host.set_ready(C.WINDOWS, 0, 1), "expected window < kWindows, got 16 and 16"),
        (lambda: host.set_ready(0, -1, 1), "expected cell >= 0, got -1 and 0"),
        (lambda: host.ready(1, 0, 0), "expected rank < shape_.world, got 1 and 1"),
        (lambda: host.wait_ready(0, 0, 0, 1, math.nan), "got nan and 0"),
        (lambda: host.wait_ready(0, 0, 0, 1, -1.0), "got -1 and 0"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    host.set_ready(0, 0, 2)
    with pytest.raises(ValueError, match="expected value >= current, got 1 and 2: a signal only grows"):
        host.set_ready(0, 0, 1)


def test_window_outlives_its_host(directory: Path) -> None:
    host = C.SymmetricHost(0, 1, str(directory), 5000, NONCE)
    assert host.window_bytes == 8192, "whole pages"
    host.reserve(2, 5000)
    assert host.reserved(2) == 8192
    assert host.reserved(1) == 0
    tensor = torch.frombuffer(host.window(0, 2), dtype=torch.uint8)
    again = torch.frombuffer(host.window(0, 2), dtype=torch.float32)
    assert tensor.shape == (8192,)
    assert tensor.data_ptr() == host.window(0, 2).address == again.data_ptr()
    assert not tensor.any()
    host.close()
    host.close()
    assert host.closed
    del host
    tensor.fill_(0)
    again[0] = 1.0
    assert tensor[:4].tolist() == [0, 0, 0x80, 0x3F]


def test_closed_host_refuses_everything(directory: Path) -> None:
    host = C.SymmetricHost(0, 1, str(directory), WINDOW, NONCE)
    host.close()
    for call in (
        lambda: host.path,
        lambda: host.attach([""]),
        lambda: host.reserve(0, 1),
        lambda: host.window(0, 0),
        lambda: host.set_ready(0, 0, 1),
        lambda: host.wait_done(0, 0, 0, 1, 0.0),
        lambda: host.post(1, 0, ""),
        lambda: host.fail("late"),
        lambda: host.alive(0),
    ):
        with pytest.raises(RuntimeError, match="the SymmetricHost of rank 0 is closed"):
            call()


def test_more_than_a_window_is_no_space(directory: Path) -> None:
    host = C.SymmetricHost(0, 1, str(directory), WINDOW, NONCE)
    with pytest.raises(C.NoSpace, match=f"needs {WINDOW + 1} bytes, but was made for {WINDOW}") as error:
        host.reserve(0, WINDOW + 1)
    assert (error.value.needed, error.value.free) == (WINDOW + 1, WINDOW)
    assert isinstance(error.value, OSError)


@pytest.fixture
def small_tmpfs(directory: Path) -> Iterator[Path]:
    folder = directory / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("may not mount a file system here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_file_system_is_no_space_and_memory_returns(make_peers: MakePeers, small_tmpfs: Path) -> None:
    def free() -> int:
        status = os.statvfs(small_tmpfs)
        return status.f_bavail * status.f_frsize

    whole = free()
    (peer,) = make_peers(1, folder=small_tmpfs)
    peer.call("reserve", 0, WINDOW)
    left = free()
    with pytest.raises(PeerError, match=f"needs {WINDOW} more bytes of shared memory, {left} are free") as error:
        peer.call("reserve", 1, WINDOW)
    assert error.value.kind == "NoSpace"
    assert peer.call("reserved", 1) == 0
    assert free() == left, "what a failed reservation took is given back"
    peer.stop()
    assert free() == whole, "kill -9 leaves nothing behind"
