"""The ranks that all other multi-rank tests run on."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from odysseus_kernels.testing.faults import kill_self
from odysseus_kernels.testing.spawn import RankPool, RankPools, RanksFailedError, run_ranks


def _sum_of_ranks(rank: int, world_size: int, factor: float) -> dict[str, object]:
    total = torch.full((3,), float(rank))
    dist.all_reduce(total)
    view = torch.arange(1000)[rank : rank + 1]
    return {"total": total * factor, "rank": rank, "nested": [None, (True, "text")], "view": view}


def _draw(rank: int, world_size: int) -> torch.Tensor:
    return torch.rand(4)


def _process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def _threads(rank: int, world_size: int) -> list[object]:
    return [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]]


def _raise_on(rank: int, world_size: int, failing: int) -> int:
    if rank == failing:
        raise ValueError(f"wrong on rank {rank}")
    return rank


def _wait_for_nobody(rank: int, world_size: int) -> None:
    if rank == 0:
        raise KeyError("first")
    time.sleep(60)


def _die(rank: int, world_size: int, victim: int) -> str:
    if rank == victim:
        kill_self()
    return "alive"


def _leave(rank: int, world_size: int) -> None:
    os._exit(7)


def _sleep(rank: int, world_size: int) -> None:
    time.sleep(60)


def _write_id_and_sleep(rank: int, world_size: int, folder: str) -> None:
    Path(folder, str(rank)).write_text(str(os.getpid()))
    time.sleep(60)


def _return_an_object(rank: int, world_size: int) -> object:
    return object()


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout=60) as pool:
        yield pool


def test_results_come_back_in_rank_order(pool: RankPool) -> None:
    results = pool.run(_sum_of_ranks, 2.0)
    assert [r["rank"] for r in results] == [0, 1]
    assert all(torch.equal(r["total"], torch.full((3,), 2.0)) for r in results)
    assert results[0]["nested"] == [None, (True, "text")]
    assert results[1]["view"].untyped_storage().nbytes() == 8  # the view alone, not the thousand elements behind it


def test_processes_stay_and_seeds_do_not_depend_on_history(pool: RankPool) -> None:
    assert pool.run(_process_id) == pool.run(_process_id)
    first, second = pool.run(_draw), pool.run(_draw)
    assert torch.equal(first[0], second[0]) and torch.equal(first[0], second[1])


def test_threads_are_fixed_in_the_ranks_only(pool: RankPool) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    assert pool.run(_threads) == [[1, "1"], [1, "1"]]
    assert os.environ.get("OMP_NUM_THREADS") == before


def test_error_has_the_traceback_and_the_pool_recovers(pool: RankPool) -> None:
    before = pool.run(_process_id)
    with pytest.raises(RanksFailedError, match=r"ValueError: wrong on rank 1(.|\n)*in _raise_on") as caught:
        pool.run(_raise_on, 1)
    assert [o.ok for o in caught.value.outcomes] == [True, False]
    after = pool.run(_process_id)
    assert not set(before) & set(after)


def test_outcomes_name_error_exit_code_and_stacks(pool: RankPool) -> None:
    raised, stopped = pool.outcomes(_wait_for_nobody, grace=0.5)
    assert raised.error_name == "KeyError" and "first" in raised.message
    assert stopped.exit_code == -9 and "after rank 0 had failed" in stopped.message
    assert "_wait_for_nobody" in stopped.traceback
    assert stopped.seconds < 10

    survivor, victim = pool.outcomes(_die, 1)
    assert survivor.result == "alive" and victim.exit_code == -9 and not victim.ok


def test_unreturnable_and_unimportable(pool: RankPool) -> None:
    assert "a rank can return" in pool.outcomes(_return_an_object)[0].message
    with pytest.raises(ValueError, match="top level of a module"):
        pool.run(lambda rank, world_size: None)
    with pytest.raises(ValueError, match="world_size=0"):
        RankPool(0)


def test_timeout_is_an_error() -> None:
    begin = time.monotonic()
    with pytest.raises(RanksFailedError, match="did not return within 1 s"):
        run_ranks(_sleep, 1, timeout=1)
    assert time.monotonic() - begin < 30


def test_run_ranks_expecting_failure() -> None:
    (outcome,) = run_ranks(_leave, 1, timeout=30, expect_failure=True)
    assert outcome.exit_code == 7 and not outcome.ok


def test_pools_are_made_once_per_world_size() -> None:
    with RankPools() as pools:
        assert pools(1) is pools(1)
        assert pools(1) is not pools(2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ranks_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2]); import test_spawn\n"
        "from odysseus_kernels.testing.spawn import run_ranks\n"
        "if __name__ == '__main__': run_ranks(test_spawn._write_id_and_sleep, 1, sys.argv[1])\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    note = tmp_path / "0"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(command, env=environment) as parent:
        _wait_until(lambda: note.exists() and note.read_text() != "")
        parent.kill()
    rank = int(note.read_text())
    _wait_until(lambda: not _is_alive(rank))


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"did not happen within {seconds:g} s"
        time.sleep(0.05)


def _is_alive(process_id: int) -> bool:
    status = Path(f"/proc/{process_id}/stat")
    try:  # a process that nobody has waited for yet is dead all the same
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
