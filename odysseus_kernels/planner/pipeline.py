"""In how many pieces a pipelined attention block gathers a sequence, how large they are, and how long that takes.

And in how many groups of heads Ulysses' block takes a rank's, and how long that takes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

__all__ = ["fit_head_groups", "grouped_seconds", "pick_head_groups", "pick_pieces", "piece_shares", "pipelined_seconds"]

# Measured on one core with heads of 64 (benchmarks/layers/pieces.py): attention of 8,192 tokens in 8 pieces takes 1.01
# times as long as in one, forward, and 1.02 times backward; in 16 equal ones of 512 it took 1.18 and 1.17 times.
_LEAST_TOKENS = 1024
_PIECES = (8, 4, 2)
_FROM_START, _FROM_END = (1, 4, 6), (1, 3, 5, 6)  # relative sizes from either end of the sequence on
_IN_FLIGHT = 2  # gathered pieces: of comm/schedules/collective.py
_HEAD_STAGES = 4  # of a group of heads: of ops/_ulysses_heads.py


def pick_pieces(length: int) -> int:
    """Pieces for a sequence of ``length`` tokens; 1 where cutting would cost more than it can hide."""
    return next((count for count in _PIECES if length >= count * _LEAST_TOKENS), 1)


def pick_head_groups(length: int, heads: int) -> int:
    """Groups of a rank's ``heads`` key/value heads for ``length`` tokens, as Ulysses' attention is pipelined; 1: none.

    What is hidden behind nothing, the first group's projections and the last one's output, is that part of all; each
    group costs another exchange.
    """
    if length < _PIECES[0] * _LEAST_TOKENS:
        return 1
    return next(count for count in (4, 3, 2, 1) if heads % count == 0)


def fit_head_groups(wanted: int, heads: int) -> int:
    """The largest number of groups, of at most ``wanted``, that divides a rank's ``heads`` key/value heads."""
    return next(count for count in range(min(wanted, max(1, heads)), 0, -1) if heads % count == 0)


def piece_shares(pieces: int) -> tuple[int, ...]:
    """Relative sizes of the pieces: 1, 4, 6, ..., 6, 5, 3, 1.

    The first gather and the last scatter of a pass are hidden behind nothing, nor is a link busy while the last piece
    that has arrived is computed: both ends are small.  Causal attention grows along the sequence: towards its end
    pieces are smaller, so that they cost more nearly the same, and no link idles long behind one.  There is but one
    small piece at each end: kernels are slower where queries are few (in fp32 on a CPU backward takes 1.2 times as
    long with less than 768 of them).
    """
    ends = len(_FROM_START) - 1, len(_FROM_END) - 1
    return tuple(
        min(_FROM_START[min(index, ends[0])], _FROM_END[min(pieces - 1 - index, ends[1])]) for index in range(pieces)
    )


def pipelined_seconds(
    pieces: int,
    ranks: int,
    *,
    gathered: float,
    scattered: float,
    before: float,
    attention: float,
    after: float,
    late: float | None = None,
    concluding: float = 0.0,
    pairs: Callable[[float, float], float] = lambda start, stop: stop**2 - start**2,
    backward: bool = False,
) -> float:
    """Seconds of a block whose pieces are gathered, computed and scattered, one link carrying out what it is given.

    What ``comm/schedules/collective.py`` does, step by step: two pieces are under way ahead of the one that is
    computed, and the results of the last one leave meanwhile, in the order of their issue.

    Args:
        pieces: how many; backward begins with the last.
        ranks: of the group; a rank's own rows need not arrive, and its own results need not leave.
        gathered, scattered: seconds for which the link carries all that is gathered before a piece is computed, and
            all that is scattered.
        before, after: seconds of products before and after attention, which have as many rows as a piece.
        attention: seconds of attention.
        late: seconds for which the link carries all that need not have arrived before a piece's results have left;
            None: there is nothing of the kind.
        concluding: seconds of products with it.
        pairs: part of all pairs of query and key whose queries lie from one part of the sequence to another; causal
            attention without a window by default.
        backward: the last piece is the first.

    Example:
        >>> pipelined_seconds(1, 2, gathered=1, scattered=1, before=1, attention=1, after=1)
        4.0
        >>> pipelined_seconds(8, 2, gathered=1, scattered=1, before=1, attention=1, after=1) < 3.5
        True
    """
    shares = piece_shares(pieces)
    ends = [sum(shares[:index]) / sum(shares) for index in range(pieces + 1)]
    parts = [(stop - start, pairs(start, stop)) for start, stop in itertools.pairwise(ends)]
    if backward:
        parts.reverse()
    others = 1 - 1 / ranks
    now = free = left = 0.0  # when the host goes on, the link is free, and the last results have left
    arrivals: tuple[list[float], list[float]] = ([], [])
    queues = list(zip(arrivals, (gathered, late), strict=True))

    def gather(arrived: list[float], seconds: float | None) -> None:
        nonlocal free
        if seconds is not None and len(arrived) < len(parts):
            free = max(now, free) + parts[len(arrived)][0] * seconds
            arrived.append(free)

    for _ in range(_IN_FLIGHT):
        for queue in queues:
            gather(*queue)
    for index, (part, attended) in enumerate(parts):
        now = max(now + part * before / ranks, arrivals[0][index]) + part * before * others
        gather(*queues[0])
        now += attended * attention + part * after * others
        last, free = left, max(now, free) + part * scattered
        left = free
        now += part * after / ranks
        if late is not None:
            now = max(now, arrivals[1][index]) + part * concluding
            gather(*queues[1])
        now = max(now, last)
    return max(now, left)


def grouped_seconds(
    groups: int,
    ranks: int,
    *,
    given: tuple[float, float],
    made: tuple[float, float],
    before: float,
    attention: float,
    after: float,
    summed: float | None = None,
    ahead: bool = False,
) -> float:
    """Seconds of Ulysses' block in groups of heads, one link carrying out what it is given, in the order of its issue.

    What ``ops/_ulysses_heads.py`` does at its ``groups + 3`` stages, and ``comm/schedules/collective.py`` within each,
    step by step: of a group the products before attention, attention, what it made on its way, and the products after
    it follow one another in four stages, each beside the other steps of the groups around it.  A stage visits one rank
    after another, with a part of its products and of its attention for each; what was made in a visit leaves during the
    next ones, and what the next stage's first visit is given arrives meanwhile.  So the first group's products before
    attention and the last one's after it, and what either sends, have no attention beside them.

    Args:
        groups: how many, all of one size.
        ranks: of the group; what a rank gives itself does not travel.
        given: seconds for which the link carries the weights of the products before and after attention.
        made: seconds for which it carries what the products before attention, and attention, make for other ranks.
        before, attention, after: seconds of products before attention, of attention, and of products after it.
        summed: seconds for which the link carries what the products after attention make for others; None: nothing.
        ahead: the call before has sent what the first visit is given.

    Example:
        >>> times = {"given": (1, 1), "made": (1, 1), "before": 1, "attention": 4, "after": 1}
        >>> grouped_seconds(1, 2, **times)
        9.0
        >>> grouped_seconds(4, 2, **times) < 7
        True
    """
    stages, hops = groups + _HEAD_STAGES - 1, ranks - 1
    now = free = 0.0  # when the host goes on, and when the link is free

    def share(stage: int, *steps: float | None) -> float | None:
        """Of each hop, or visit: what the steps of the groups at ``stage`` take; None without any."""
        found = [one for step, one in enumerate(steps) if one is not None and 0 <= stage - step < groups]
        return sum(found) / groups if found else None

    def gives(stage: int) -> float | None:
        return share(stage, given[0], None, None, given[1])

    def send(seconds: float) -> float:
        nonlocal free
        free = max(now, free) + seconds / hops
        return free

    def send_ahead(stage: int) -> float | None:
        """When what the first visit of ``stage`` is given has arrived."""
        following = gives(stage)
        return None if following is None else send(following)

    arrives = send_ahead(0)
    if ahead:
        arrives = now  # it takes its time of the link, but nobody waits for it
    for stage in range(stages):
        gets, makes = gives(stage), share(stage, made[0], None, made[1], summed)
        visit = (share(stage, before, attention, None, after) or 0.0) / ranks
        following = None
        if gets is None and makes is None:
            now += visit * ranks
            continue
        if gets is not None and arrives is None:
            arrives = send(gets)
        if gets is not None and hops == 1:
            following = send_ahead(stage + 1)
        if makes is None:
            now += visit  # this rank's own, which comes last where something is made
        left: list[float] = []
        for hop in range(hops):
            if gets is not None:
                assert arrives is not None
                now = max(now, arrives)
                if hop + 1 < hops:
                    arrives = send(gets)
                    if hop + 2 == hops:
                        following = send_ahead(stage + 1)
            now += visit
            if makes is not None:
                left.append(send(makes))
                if gets is None and hop + 1 == hops:
                    following = send_ahead(stage + 1)
                if hop:
                    now = max(now, left[hop - 1])
        if makes is not None:
            now = max(now + visit, left[-1])
        arrives = following
    return now
