"""Which mode ``mode="auto"`` means: measured where that is possible, kept between runs, predicted elsewhere.

The rule: unfused, unless another mode is faster by more than a margin.  So what is chosen was never measured slower
than unfused.

All ranks of a group choose alike, or they would wait for each other in different protocols.  The first
:meth:`Choices.decide` for a key is therefore a collective of up to three exchanges of short texts: what the ranks have
in their caches, and which modes a rank has no kernel for; how long a first timed run took, and which modes cannot be
had; the medians.  (A fourth, where caches disagree, is about kernels that a rank had not tried.)  All that follows is
computed from the exchanged texts alone.  Every later one is a dictionary lookup.

A kernel is compiled, loaded and launched for the first time before anything of its mode is sent.  Where that fails on
any rank, all ranks leave the mode out.

Concurrency: candidates run on the calling thread, and a lock keeps other threads' first decisions for the same group
apart.  Ranks must come to new keys in the same order, as they do to calls on a transport.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import threading
import time
import types
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, Protocol

import torch

from odysseus_kernels.comm.choice.cache import CachedChoice, ChoiceCache
from odysseus_kernels.comm.choice.decision import ChoiceKey, Decision, explain
from odysseus_kernels.comm.mismatch import describe_mismatch, short_text, signature_hash
from odysseus_kernels.comm.transport import CapacityExceededError
from odysseus_kernels.errors import CommunicationError, FallbackWarning, KernelUnavailableError, RankMismatchError
from odysseus_kernels.planner.cost_model import MEASURED_MARGIN, MODEL_MARGIN, pick_mode

__all__ = [
    "ChoiceCache",
    "ChoiceKey",
    "Choices",
    "CudaTimer",
    "Decision",
    "HostTimer",
    "Timer",
    "explain",
    "refusal_of_any",
    "refusals",
]

Candidate = Callable[[], None]
Preparations = Mapping[str, Candidate]

# Rounds of timing, an even number: half of them take the candidates in each order.
_FEWEST_ROUNDS = 4
_MOST_ROUNDS = 20
# What ranks exchange is cut to this, so that several texts fit one message.
_TEXT_CHARACTERS = 400
_REASON_CHARACTERS = 200
_COMPILER_CHARACTERS = 800  # of which the last ones say what is wrong


class Timer(Protocol):
    """Measures one run."""

    def measure(self, run: Candidate) -> float:
        """Seconds that ``run`` takes; returns when it is complete."""
        ...


class HostTimer:
    """For candidates that are complete when they return, as on CPUs."""

    def measure(self, run: Candidate) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start


class CudaTimer:
    """For candidates that enqueue work on ``device``: between two events on its current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def measure(self, run: Candidate) -> float:
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # From an idle device, so that what earlier calls left there is not counted.
            torch.cuda.synchronize()
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3


class Choices:
    """The modes chosen for one process group on one rank.

    Args:
        cache: choices of earlier runs, or None to keep none.
        exchange: a collective: takes this rank's text (at most 4096 bytes of ASCII) and returns all ranks', in the
            order of ranks.
        timer: measures a run of a candidate.
        budget_s: about how long all timed runs for one key may take; it sets their number, 4 to 20 for each mode.
    """

    def __init__(
        self,
        cache: ChoiceCache | None,
        exchange: Callable[[str], list[str]],
        timer: Timer | None = None,
        *,
        budget_s: float = 1.0,
    ) -> None:
        if not budget_s >= 0:
            raise ValueError(f"budget_s: expected at least 0 seconds, got {budget_s!r}")
        self._cache = cache
        self._exchange = exchange
        self._timer = timer or HostTimer()
        self._budget_s = budget_s
        self._made: dict[ChoiceKey, Decision] = {}
        self._noted: dict[tuple[ChoiceKey, str, str], Decision] = {}
        self._warned: set[tuple[str, str]] = set()
        self._lock = threading.RLock()

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All that holds now, in the order in which keys were first met; noted ones last."""
        with self._lock:
            return (*self._made.values(), *self._noted.values())

    def find(self, key: ChoiceKey, *, measure: bool) -> Decision | None:
        """The decision that :meth:`decide` would return without having to decide, or None.

        For callers who want to make candidates only where they are needed.
        """
        found = self._made.get(key)
        return None if found is None or (measure and found.how == "model") else found

    def note(self, key: ChoiceKey, mode: str, how: Literal["asked", "default"] = "asked") -> Decision:
        """Remembers for the table that the caller runs ``mode``: asked by its user, or by a default of its own."""
        found = self._noted.get((key, mode, how))
        if found is None:
            with self._lock:
                found = self._noted.setdefault((key, mode, how), Decision(key, mode, how))
        return found

    def decide(
        self,
        key: ChoiceKey,
        candidates: Mapping[str, Candidate],
        prior: Mapping[str, float],
        *,
        measure: bool,
        prepare: Preparations = types.MappingProxyType({}),
        refused: Mapping[str, str] = types.MappingProxyType({}),
    ) -> Decision:
        """The mode for ``key``: the earlier decision, a cached one on which all ranks agree, or a new one.

        A prediction gives way to a measurement as soon as one can be made.

        Args:
            key: for what.
            candidates: runs of the whole phase with all ranks, by mode, equal and in equal order on all ranks.  Each
                is run many times, so it must leave nothing behind that another run would see.  One that raises
                ValueError, CapacityExceededError or KernelUnavailableError, on all ranks and before anything is sent,
                is dropped.
            prior: predicted seconds by mode, equal on all ranks; used with ``measure=False``.
            prepare: by mode, what makes a rank ready for it without communicating; it runs before candidates.  A mode
                (with all its variants, ``"tiles/2"`` of ``"tiles"``) for which that raises KernelUnavailableError or
                ValueError on any rank is dropped on all, with a warning.  Used with ``measure=True``.
            refused: modes that are known to be dropped for that reason, and why; equal on all ranks.
            measure: whether candidates and the exchange can be run now; equal on all ranks.  They cannot while a CUDA
                graph is captured or where tensors are fake.

        Raises:
            ValueError: no candidates; or no prediction where one is needed; or what the last candidate raised, if
                none can be had.
            CapacityExceededError, KernelUnavailableError: likewise.
            RankMismatchError: ranks differ in what they decide, or in which candidates can be had.
            CommunicationError: whatever goes wrong between ranks; nothing is decided then.
        """
        found = self.find(key, measure=measure)
        if found is not None:
            return found
        if not candidates:
            raise ValueError(f"candidates for {key.shared}: expected at least one, got none")
        with self._lock:
            found = self.find(key, measure=measure)
            if found is None:
                found = self._made[key] = self._decide(key, candidates, prior, measure, prepare, refused)
            return found

    def _decide(
        self,
        key: ChoiceKey,
        candidates: Mapping[str, Candidate],
        prior: Mapping[str, float],
        measure: bool,
        prepare: Preparations,
        refused: Mapping[str, str],
    ) -> Decision:
        cached = None
        if measure and len(candidates) > 1:
            cached, refused = self._agreed_in_caches(key, list(candidates), prepare)
        if cached is None and refused:
            self._warn(key, refused)
            candidates = {mode: run for mode, run in candidates.items() if _base(mode) not in refused}
            if not candidates:
                raise KernelUnavailableError(next(iter(refused.values())))
        if len(candidates) == 1:
            return Decision(key, next(iter(candidates)), "only", dropped=refused)
        if not measure:
            predicted = {mode: prior[mode] for mode in candidates if mode in prior}
            if not predicted:
                raise ValueError(
                    f"prior for {key.shared}: expected seconds for some of {list(candidates)}, got {list(prior)}"
                )
            return Decision(key, pick_mode(predicted, MODEL_MARGIN), "model", predicted, refused)
        if cached is not None:
            return Decision(key, cached.mode, "cached", cached.seconds)
        usable, dropped, rounds = self._warm_up(key, candidates)
        dropped = {**refused, **dropped}
        if len(usable) == 1:
            return Decision(key, next(iter(usable)), "only", dropped=dropped)
        seconds = self._measured(key, usable, rounds)
        decision = Decision(key, pick_mode(seconds, MEASURED_MARGIN), "measured", seconds, dropped)
        if self._cache is not None:
            self._cache.put(key.text, CachedChoice(decision.mode, seconds))
        return decision

    def _agreed_in_caches(
        self, key: ChoiceKey, modes: list[str], prepare: Preparations
    ) -> tuple[CachedChoice | None, dict[str, str]]:
        """What this rank's cache has, if every rank's has the same mode and its kernel; else what has to be dropped.

        A rank with a cached mode that needs no kernel compiles none, unless it turns out that others have no such mode.
        """
        cached = self._cache.get(key.text) if self._cache is not None else None
        if cached is not None and cached.mode not in modes:
            cached = None
        own = None if cached is not None and _base(cached.mode) not in prepare else refusals(prepare)
        if cached is not None and own is not None and _base(cached.mode) in own:
            cached = None
        told = {"modes": modes, "cached": cached.mode if cached is not None else None, "refused": own}
        everyone = self._tell(key, "compares caches", told)
        _check_alike(key, [f"modes {', '.join(map(str, one['modes']))}" for one in everyone])
        agreed = {one["cached"] for one in everyone}
        if len(agreed) == 1 and None not in agreed:
            return cached, {}
        if any(one["refused"] is None for one in everyone):
            told = {"refused": refusals(prepare) if own is None else own}
            everyone = self._tell(key, "prepared", told)
        return None, refusal_of_any([one["refused"] for one in everyone])

    def _warn(self, key: ChoiceKey, refused: Mapping[str, str]) -> None:
        """Once for each mode and reason."""
        for mode, reason in refused.items():
            if (mode, reason) not in self._warned:
                self._warned.add((mode, reason))
                warnings.warn(
                    f'mode "{mode}" cannot be had, all ranks use another one ({key.shared}): {reason}',
                    FallbackWarning,
                    stacklevel=2,
                )

    def _warm_up(
        self, key: ChoiceKey, candidates: Mapping[str, Candidate]
    ) -> tuple[dict[str, Candidate], dict[str, str], int]:
        """Runs each candidate twice; returns those that can be had, why others cannot, and how many rounds to time."""
        refusals: dict[str, Exception] = {}
        seconds: dict[str, float] = {}
        for mode, candidate in candidates.items():
            try:
                candidate()
                seconds[mode] = self._timer.measure(candidate)
            except CommunicationError:  # some of them are ValueErrors, too
                raise
            except (ValueError, CapacityExceededError, KernelUnavailableError) as error:
                # Without its frames, which hold tensors and, through this dictionary, themselves.
                refusals[mode] = error.with_traceback(None)
        reasons = {mode: short_text(error, _REASON_CHARACTERS) for mode, error in refusals.items()}
        everyone = self._tell(key, "warmed up", {"reasons": reasons, "seconds": seconds})
        if len({tuple(sorted(one["reasons"])) for one in everyone}) > 1:  # the texts may differ, as ranks' sizes do
            _check_alike(key, [f"refused modes {one['reasons']}" for one in everyone])
        usable = {mode: candidate for mode, candidate in candidates.items() if mode not in refusals}
        if not usable:
            raise next(reversed(refusals.values()))
        slowest = sum(_slowest(key, everyone).values())
        pairs = int(min(self._budget_s / slowest if slowest > 0 else math.inf, _MOST_ROUNDS)) // 2
        return usable, reasons, max(2 * pairs, _FEWEST_ROUNDS)

    def _measured(self, key: ChoiceKey, candidates: Mapping[str, Candidate], rounds: int) -> dict[str, float]:
        """Seconds by mode: the median of ``rounds`` on the slowest rank, in both orders by turns."""
        samples: dict[str, list[float]] = {mode: [] for mode in candidates}
        for number in range(rounds):
            for mode in candidates if number % 2 == 0 else reversed(list(candidates)):
                samples[mode].append(self._timer.measure(candidates[mode]))
        medians = {mode: statistics.median(taken) for mode, taken in samples.items()}
        return _slowest(key, self._tell(key, "measured", {"seconds": medians}))

    def _tell(self, key: ChoiceKey, step: str, content: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All ranks' contents of the same step for the same key.

        Raises:
            RankMismatchError: a rank is elsewhere, or sent something else.
        """
        digest = hashlib.blake2b(key.shared.encode(), digest_size=8).hexdigest()
        text = f"{step}: {key.shared}".encode("ascii", "replace").decode()[:_TEXT_CHARACTERS]
        own = {"key": digest, "text": text, "step": step, **content}
        everyone: list[dict[str, Any]] = []
        for rank, text in enumerate(self._exchange(json.dumps(own))):
            try:
                told = json.loads(text)
            except ValueError:
                told = None
            if not isinstance(told, dict) or not {"key", "text", "step"} <= told.keys():
                raise RankMismatchError(
                    f"choice of a mode for {key.shared}: rank {rank} sent {text[:_TEXT_CHARACTERS]!r}, which "
                    f"is no part of a choice"
                )
            everyone.append(told)
        if len({(one["key"], one["step"]) for one in everyone}) > 1:
            _check_alike(key, [f"{one['text']} ({one['key']})" for one in everyone])
        return everyone


def refusals(prepare: Preparations) -> dict[str, str]:
    """Modes for which this rank has no kernel, and why; prepares those that it has."""
    found = {}
    for mode, run in prepare.items():
        try:
            run()
        except (KernelUnavailableError, ValueError) as error:  # perhaps not on all ranks alike
            found[mode] = short_text(error, _COMPILER_CHARACTERS)
    return found


def refusal_of_any(everyone: Collection[Mapping[str, str]]) -> dict[str, str]:
    """Modes for which some rank has no kernel; the reason names the first such rank."""
    found: dict[str, str] = {}
    for rank, refused in enumerate(everyone):
        for mode, reason in refused.items():
            found.setdefault(mode, f"rank {rank}: {reason}")
    return found


def _base(mode: str) -> str:
    """``"tiles"`` of ``"tiles/2"``."""
    return mode.partition("/")[0]


def _check_alike(key: ChoiceKey, texts: list[str]) -> None:
    """Raises RankMismatchError, naming ranks, unless all ``texts`` are equal."""
    if len(set(texts)) > 1:
        calls = {rank: (signature_hash(text), text) for rank, text in enumerate(texts)}
        raise RankMismatchError(f"choice of a mode for {key.shared}: {describe_mismatch(calls, 1)}")


def _slowest(key: ChoiceKey, everyone: list[dict[str, Any]]) -> dict[str, float]:
    """The longest seconds of any rank, by mode."""
    slowest: dict[str, float] = {}
    for rank, one in enumerate(everyone):
        for mode, value in one["seconds"].items():
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise RankMismatchError(
                    f"choice of a mode for {key.shared}: rank {rank} measured {value!r} s for {mode}"
                )
            slowest[mode] = max(slowest.get(mode, 0.0), float(value))
    return slowest
