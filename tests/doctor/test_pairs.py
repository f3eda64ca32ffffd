"""Rates of every two ranks: which are measured, how they are told, and which one is a problem."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import doctor_cases as cases
import torch
import torch.distributed as dist

from odysseus_kernels.doctor.pairs import decline, measure_pairs, pairs_in_order
from odysseus_kernels.doctor.report import PairRate, RankReport, Report
from odysseus_kernels.doctor.slow_pairs import slow_pairs
from odysseus_kernels.doctor.tables import print_report
from odysseus_kernels.testing.spawn import RankPools, run_ranks

TRANSPORTS = ("symmetric", "collective")


def test_every_pair_once_and_neighbours_first() -> None:
    order = pairs_in_order(5)
    assert sorted(order) == [(a, b) for a in range(5) for b in range(a + 1, 5)]
    assert {rank for pair in order[:4] for rank in pair} == set(range(5))
    assert pairs_in_order(1) == []


def test_every_two_of_three_ranks_are_measured(tmp_path: Path) -> None:
    # New processes, as doctor has: a pair meets by a name with the number of groups in it, which earlier tests change.
    found = run_ranks(cases.measure_pairs, 3, str(tmp_path / "store"), 60.0)
    for rank, pairs in enumerate(found):  # the first of two ranks tells
        assert [(pair["first"], pair["second"]) for pair in pairs if pair["transport"] == "symmetric"] == [
            pair for pair in pairs_in_order(3) if pair[0] == rank
        ]
        assert {pair["transport"] for pair in pairs} == (set(TRANSPORTS) if rank < 2 else set())
        assert all(pair["bytes_per_s"] > 0 for pair in pairs)


def test_no_pair_begins_after_the_limit(ranks: RankPools, tmp_path: Path) -> None:
    assert ranks(3).run(cases.measure_pairs, str(tmp_path / "store"), 0.0) == [[], [], []]


def _reports(rates: dict[tuple[int, int], float], hosts: str) -> tuple[RankReport, ...]:
    """Ranks on ``hosts``, a letter each, of which nothing but these rates in GB/s is known."""
    reports = tuple(RankReport(rank) for rank in range(len(hosts)))
    for (first, second), rate in rates.items():
        reports[first].pairs.append(PairRate("collective", first, second, rate * 1e9))
    return reports


FOUR: dict[tuple[int, int], float] = dict.fromkeys(pairs_in_order(4), 10.0)


def _problems(rates: dict[tuple[int, int], float], hosts: str) -> list[Any]:
    """What is said of ranks on ``hosts``, a letter each, by these rates in GB/s."""
    pairs = [PairRate("collective", first, second, rate * 1e9) for (first, second), rate in rates.items()]
    return list(slow_pairs(pairs, dict(enumerate(hosts))))


def test_a_slow_pair_is_named() -> None:
    assert _problems(FOUR, "aaaa") == []
    (problem,) = _problems(FOUR | {(1, 3): 4.0}, "aaaa")
    assert problem.severity == "warning" and problem.ranks == (1, 3)
    assert "one pair is much slower than others within a host: 4 GB/s by transport collective" in problem.what
    assert "their median is 10 GB/s" in problem.what and "NUMA" in problem.remedy


def test_a_slow_rank_is_one_problem() -> None:
    eight = dict.fromkeys(pairs_in_order(8), 10.0)
    (problem,) = _problems({pair: 2.0 if 5 in pair else rate for pair, rate in eight.items()}, "aaaaaaaa")
    assert problem.ranks == (5,)
    assert "7 pairs are much slower than others within a host: 2 GB/s" in problem.what
    assert "all with rank 5" in problem.what


def test_pairs_between_hosts_are_compared_with_their_like() -> None:
    between = {pair: 1.0 for pair in FOUR if (pair[0] < 2) != (pair[1] < 2)}
    assert _problems(FOUR | between, "aabb") == []
    (problem,) = _problems(FOUR | between | {(0, 3): 0.1}, "aabb")
    assert problem.ranks == (0, 3) and "between hosts" in problem.what and "interfaces" in problem.remedy


def test_a_slow_host_is_one_problem() -> None:
    """Of eight ranks on four hosts one host's cable is bad: it is named, not twelve pairs."""
    hosts = "aabbccdd"
    rates = {(a, b): 10.0 if hosts[a] == hosts[b] else 0.1 if "c" in hosts[a] + hosts[b] else 1.0
             for a, b in pairs_in_order(8)}  # fmt: skip
    (problem,) = _problems(rates, hosts)
    assert problem.ranks == (4, 5) and "12 pairs are" in problem.what and "all with ranks 4-5" in problem.what


def test_a_rank_that_leaves_keeps_nobody_waiting(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "store"), 2)
    decline(store, 1)
    begin = time.monotonic()
    assert measure_pairs(store, 0, 2, ("symmetric", "collective"), torch.device("cpu"), 30.0) == []
    assert time.monotonic() - begin < 10


def test_matrix_and_table() -> None:
    report = Report(_reports({(0, 1): 8.0, (1, 2): 2.0}, "aaa"), ())
    matrix = [[None, 8e9, None], [8e9, None, 2e9], [None, 2e9, None]]
    assert report.pair_matrix("collective") == matrix
    assert json.loads(report.to_json())["bytes_per_s_between_ranks"] == {"collective": matrix}
    assert RankReport.from_json(report.ranks[1].to_json()).pairs == [PairRate("collective", 1, 2, 2e9)]
    file = io.StringIO()
    print_report(report, file)
    rows = [" ".join(line.split()) for line in file.getvalue().splitlines()]
    assert "collective 2 GB/s ranks 1-2 5 GB/s 8 GB/s 2 of 3" in rows
