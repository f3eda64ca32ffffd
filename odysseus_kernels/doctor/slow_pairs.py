"""Which ranks, hosts or pairs of ranks exchange bytes much more slowly than their like."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

from odysseus_kernels.doctor.report import PairRate, Problem, rank_numbers

__all__ = ["slow_pairs"]

# Of the median of their like.  Medians of a machine that is busy with something else differ by less.
_SLOW = 0.5
# Of two pairs neither is the usual one.
_FEWEST = 3
_WITHIN = (
    "look for what they share with no other: cores (taskset, Slurm: --cpu-bind), a NUMA node (`numactl --hardware`), a "
    "link between GPUs (`nvidia-smi topo -m`)"
)
_BETWEEN = "compare the speeds of their hosts' interfaces (above), and look at cable and switch between them"


def slow_pairs(pairs: Sequence[PairRate], hosts: Mapping[int, Hashable]) -> Iterator[Problem]:
    """A warning for each rank, host or pair that is slow among pairs by the same transport, within or between hosts.

    A rank or host that all pairs of it are slow with is one problem, not one for each other rank.

    Args:
        pairs: those that were measured.
        hosts: what names each rank's host.
    """
    alike: dict[tuple[str, bool], list[PairRate]] = {}
    for pair in pairs:
        alike.setdefault((pair.transport, hosts.get(pair.first) == hosts.get(pair.second)), []).append(pair)
    for (transport, same_host), like in alike.items():
        usual = statistics.median(pair.bytes_per_s for pair in like)
        slow = [pair for pair in like if pair.bytes_per_s < _SLOW * usual]
        if len(like) < _FEWEST:
            continue
        unit: Mapping[int, Hashable] = {rank: rank for pair in like for rank in _ranks(pair)} if same_host else hosts
        for group, common in _explained(slow, unit):
            rates = [pair.bytes_per_s / 1e9 for pair in group]
            where = "within a host" if same_host else "between hosts"
            figures = " to ".join(dict.fromkeys(f"{rate:.3g}" for rate in (min(rates), max(rates)))) + " GB/s"
            what = "one pair is" if len(group) == 1 else f"{len(group)} pairs are"
            yield Problem(
                "warning",
                f"{what} much slower than others {where}: {figures} by transport {transport}"
                f"{'' if len(group) == 1 else f', all with {rank_numbers(common)}'}, where their median is "
                f"{usual / 1e9:.3g} GB/s",
                _WITHIN if same_host else _BETWEEN,
                tuple(sorted({rank for pair in group for rank in _ranks(pair)})) if len(group) == 1 else common,
            )


def _explained(
    slow: Sequence[PairRate], unit: Mapping[int, Hashable]
) -> Iterator[tuple[list[PairRate], tuple[int, ...]]]:
    """Slow pairs, those of one unit (a rank, or a host) together, most first; and which of their ranks are of it."""
    left = list(slow)
    while left:
        counts = Counter(of for pair in left for of in {unit.get(pair.first), unit.get(pair.second)})
        worst, _ = max(counts.items(), key=lambda found: found[1])
        group = [pair for pair in left if worst in (unit.get(pair.first), unit.get(pair.second))]
        yield group, tuple(sorted({rank for pair in group for rank in _ranks(pair) if unit.get(rank) == worst}))
        left = [pair for pair in left if pair not in group]


def _ranks(pair: PairRate) -> tuple[int, int]:
    return pair.first, pair.second
