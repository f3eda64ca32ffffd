"""Shards that were sent ahead of the call that gathers them, and which call that is."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.transport import Call

__all__ = ["Pass", "SentAhead", "gathered_shards", "in_backward_pass"]

_steps = 0


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


# Of all optimizers: a foreach step changes the local tensors of DTensors without counting, in neither's version.
register_optimizer_step_post_hook(_count_step)


@dataclasses.dataclass
class Pass:
    """A forward pass, or one backward pass with all that is computed again within it.

    No optimizer's step that matters lies between two calls of one pass: a forward pass ends with any step, and one
    that is taken within backward changes weights whose gradients are complete, which are not gathered again.
    (Versions of tensors alone would not tell: see above.)

    Attributes:
        task: number of the autograd engine's run that the call is made in, or -1 outside of any.
        phase: the call's.
        steps: how many steps optimizers had taken.
        over: whether that run has ended.
    """

    task: int
    phase: str
    steps: int
    over: bool = False

    @staticmethod
    def of(call: Call) -> Pass:
        return Pass(torch._C._current_graph_task_id(), call.phase, _steps)

    def watch(self) -> Pass:
        """Learns when the run of the engine ends; from within it."""
        if self.task >= 0:
            torch.autograd.Variable._execution_engine.queue_callback(self._end)
        return self

    def _end(self) -> None:
        self.over = True

    def contains(self, later: Pass) -> bool:
        """Whether ``later``, now, is in the same pass."""
        if self.task < 0 or later.task < 0:
            # Outside of the engine, calls of both phases do not follow one another in one pass.
            return (self.task, self.phase, self.steps) == (later.task, later.phase, later.steps)
        # Reentrant checkpointing runs the engine within the engine.  An earlier run goes on when the inner one has
        # ended; a later run is within this one if this one has not ended.
        return later.task <= self.task or not self.over


@dataclasses.dataclass(frozen=True)
class SentAhead:
    """Shards that were sent, their versions at that time, and the pass they were sent in.

    They serve the very next call, in the same pass, or nothing.  They are held meanwhile, so that their memory cannot
    become another tensor's: an equal address then means the same storage.
    """

    prefetch: Prefetch
    versions: tuple[int, ...]
    pieces: int
    within: Pass

    @staticmethod
    def of(call: Call, prefetch: Prefetch, pieces: int = 1) -> SentAhead:
        versions = tuple(tensor._version for tensor in prefetch.tensors)
        return SentAhead(prefetch, versions, pieces, Pass.of(call).watch())

    def serves(self, call: Call, pieces: int = 1) -> bool:
        """Whether ``call`` gathers these shards, unchanged, cut into ``pieces``."""
        wanted = gathered_shards(call)
        if wanted is None or wanted.kind != self.prefetch.kind or not self.within.contains(Pass.of(call)):
            return False
        sent = self.prefetch.tensors
        return (
            pieces == self.pieces
            and len(sent) == len(wanted.tensors)
            and all(
                _same(mine, version, theirs)
                for mine, version, theirs in zip(sent, self.versions, wanted.tensors, strict=True)
            )
        )


def in_backward_pass() -> bool:
    """Whether the autograd engine runs: forward calls are then made by a checkpoint, which computes them again."""
    return torch._C._current_graph_task_id() >= 0


def gathered_shards(call: Call) -> Prefetch | None:
    """What of ``call`` could have been sent ahead."""
    if call.gather is not None:
        return Prefetch("gather", (call.gather.shard,))
    # Where not all visit all, what is sent ahead would go to ranks that do not want it.
    if call.exchange is not None and call.exchange.shared and call.exchange.everyone:
        return Prefetch("shared", call.exchange.shared)
    return None


def _same(mine: Tensor, version: int, theirs: Tensor) -> bool:
    return (
        mine.data_ptr() == theirs.data_ptr()
        and mine.shape == theirs.shape
        and mine.dtype == theirs.dtype
        and not theirs.is_inference()
        and mine._version == version == theirs._version
    )
