"""What ``doctor`` hands out: facts, results and problems of all ranks, as data and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Literal

__all__ = ["Check", "Facts", "PairRate", "Problem", "RankReport", "Rate", "Report", "TransportState", "rank_numbers"]

Severity = Literal["error", "warning"]
Facts = dict[str, dict[str, Any]]
"""By section and name; a name says its unit where it has one (``free_bytes``)."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """Something that does not work (``"error"``), or works other than it could (``"warning"``).

    Attributes:
        severity: errors make the exit status 1.
        what: what was found.
        remedy: what to do about it.
        ranks: where; empty if it concerns all.
    """

    severity: Severity
    what: str
    remedy: str
    ranks: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Check:
    """One operator, forward and backward, beside fp64 on unsharded data.

    Attributes:
        operator, mode, transport: what was asked for.
        carried: transports that carried it; another one than asked for where that one does not serve such calls.
        error: largest relative Frobenius error of the outputs and gradients; None where there is no result.
        allowed: what rounding explains.
        where: the output or gradient with that error.
        failure: why there is no result; empty if there is.
    """

    operator: str
    mode: str
    transport: str
    carried: tuple[str, ...] = ()
    error: float | None = None
    allowed: float = 0.0
    where: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether there is a result, and it is right (a NaN is not)."""
        return self.error is not None and self.error <= self.allowed


@dataclasses.dataclass(frozen=True)
class Rate:
    """What a rank received by a transport: bytes per second of a large all-gather, seconds of a tiny one (medians)."""

    transport: str
    carried: str
    shard_bytes: int
    bytes_per_s: float
    latency_s: float


@dataclasses.dataclass(frozen=True)
class PairRate:
    """What each of two ranks receives from the other by a transport, both at once: bytes per second (median)."""

    transport: str
    first: int
    second: int
    bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class TransportState:
    """Whether ranks could connect a transport, and why not."""

    transport: str
    available: bool
    why_not: str = ""


@dataclasses.dataclass
class RankReport:
    """What one rank found.

    Attributes:
        rank: its number.
        facts: of its process and host.
        transports, checks, rates: what it measured, as far as it came.
        pairs: those with ranks above it.
        said: texts of warnings that were issued meanwhile.
        stage: what it was doing last.
        failure: what ended it early; empty if nothing did.
    """

    rank: int
    facts: Facts = dataclasses.field(default_factory=dict)
    transports: list[TransportState] = dataclasses.field(default_factory=list)
    checks: list[Check] = dataclasses.field(default_factory=list)
    rates: list[Rate] = dataclasses.field(default_factory=list)
    pairs: list[PairRate] = dataclasses.field(default_factory=list)
    said: list[str] = dataclasses.field(default_factory=list)
    stage: str = ""
    failure: str = ""

    def to_json(self) -> str:
        """Everything, as one rank tells it to the first."""
        return json.dumps(dataclasses.asdict(self))

    @staticmethod
    def from_json(text: str) -> RankReport:
        """The report that :meth:`to_json` wrote."""
        document = json.loads(text)
        document["transports"] = [TransportState(**one) for one in document["transports"]]
        document["checks"] = [Check(**{**one, "carried": tuple(one["carried"])}) for one in document["checks"]]
        document["rates"] = [Rate(**one) for one in document["rates"]]
        document["pairs"] = [PairRate(**one) for one in document["pairs"]]
        return RankReport(**document)


@dataclasses.dataclass(frozen=True)
class Report:
    """All ranks' reports and what follows from them."""

    ranks: tuple[RankReport, ...]
    problems: tuple[Problem, ...]

    @property
    def healthy(self) -> bool:
        """Whether no problem is an error."""
        return all(problem.severity != "error" for problem in self.problems)

    def pair_matrix(self, transport: str) -> list[list[float | None]]:
        """Bytes per second between every two ranks, [N, N]; None on the diagonal and where nothing was measured."""
        matrix: list[list[float | None]] = [[None] * len(self.ranks) for _ in self.ranks]
        for pair in (pair for rank in self.ranks for pair in rank.pairs if pair.transport == transport):
            matrix[pair.first][pair.second] = matrix[pair.second][pair.first] = pair.bytes_per_s
        return matrix

    def to_json(self) -> str:
        """Everything, for scripts."""
        names = dict.fromkeys(pair.transport for rank in self.ranks for pair in rank.pairs)
        matrices = {name: self.pair_matrix(name) for name in names}
        document = {"healthy": self.healthy, "bytes_per_s_between_ranks": matrices, **dataclasses.asdict(self)}
        for one, rank in zip(document["ranks"], self.ranks, strict=True):
            for check, source in zip(one["checks"], rank.checks, strict=True):
                check["passed"] = source.passed
        return json.dumps(document, indent=1)


def rank_numbers(ranks: Sequence[int]) -> str:
    """``"rank 0"``, ``"ranks 0-2, 5"``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = (str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}"
