"""The fastest shipped configuration for a problem, found on the device at hand by running each of them once or twice.

A kernel that waits is timed with every signal given, so that no peer takes part: ranks may well find different
configurations, since tiles are a rank's own affair.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from odysseus_kernels.config import specialized_tiles
from odysseus_kernels.errors import KernelUnavailableError
from odysseus_kernels.kernels.configs import Kernel, Problem, TileConfig, candidates
from odysseus_kernels.kernels.launch import target_of
from odysseus_kernels.kernels.prepare import translated

__all__ = ["SATISFIED", "Signals", "fastest", "run_seconds", "tuned"]

SATISFIED = 1 << 30
"""What a word holds that no wait in epoch 0 finds too small."""

_ROUNDS = 5
# Products below this take microseconds on any configuration, and compiling one takes seconds.
_WORTH_FLOPS = 1e10
_found: dict[Hashable, TileConfig] = {}


class Signals:
    """Words of one device that say that everything has been done; and a place for those that a kernel sets."""

    def __init__(self, world: int, device: torch.device) -> None:
        self.words = torch.full((world,), SATISFIED, dtype=torch.int32, device=device)
        self.set = torch.zeros(world, dtype=torch.int32, device=device)
        self.counters = torch.zeros(world, dtype=torch.int32, device=device)
        self.epoch = torch.zeros(1, dtype=torch.int32, device=device)
        self.aborted = torch.zeros(1, dtype=torch.int32, device=device)
        # A block that no host looks at: nothing waits.
        self._block = torch.zeros(32, dtype=torch.int32, device=device)
        self.control = torch.tensor([self._block.data_ptr()], dtype=torch.int64).to(device)

    def waited_addresses(self) -> Tensor:
        """int64 [world]: addresses of satisfied words."""
        return self._addresses(self.words)

    def set_addresses(self) -> Tensor:
        """int64 [world]: addresses of words that nobody reads."""
        return self._addresses(self.set)

    @staticmethod
    def _addresses(words: Tensor) -> Tensor:
        found = [words.data_ptr() + 4 * index for index in range(words.numel())]
        return torch.tensor(found, dtype=torch.int64).to(words.device)


def run_seconds(run: Callable[[], None]) -> float:
    """Median of a few runs, by events of the current stream."""
    samples = []
    for _ in range(_ROUNDS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(samples)


def _key(kernel: Kernel, problem: Problem, like: Tensor, layout: Hashable) -> Hashable:
    return kernel, like.device, like.dtype, problem, layout


def tuned(kernel: Kernel, problem: Problem, like: Tensor, *, layout: Hashable = ()) -> TileConfig | None:
    """What :func:`fastest` found earlier, or None."""
    return _found.get(_key(kernel, problem, like, layout))


def fastest(
    kernel: Kernel,
    problem: Problem,
    like: Tensor,
    trial: Callable[[], Callable[[TileConfig], None]],
    *,
    layout: Hashable = (),
    seconds: Callable[[Callable[[], None]], float] = run_seconds,
) -> TileConfig | None:
    """The configuration for ``problem``; None where nothing can be timed or little gained: the kernel then takes the
    likely best.

    Args:
        kernel: which kernel.
        problem: its sizes.
        like: an operand: its device and dtype.
        trial: makes what runs the kernel in a configuration, with every signal given; it is called once for a problem,
            and what the runs write is overwritten later.
        layout: what else tells problems apart, such as which operands are transposed.
        seconds: times a run.

    Raises:
        KernelUnavailableError: not one configuration can be compiled and launched.
    """
    found = tuned(kernel, problem, like, layout=layout)
    if found is not None:
        return found
    flops = 2.0 * problem.chunks * problem.rows * sum(problem.widths) * problem.depth
    if flops < _WORTH_FLOPS or like.device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    run, taken = trial(), dict[TileConfig, float]()
    refused: KernelUnavailableError | None = None
    for config in candidates(kernel, target_of(like.device), like.dtype, problem):
        if config.specialized and not specialized_tiles():
            continue  # they have not run on a device yet: whoever wants them says so
        try:
            with translated(kernel):
                run(config)  # compiles
        except KernelUnavailableError as error:
            refused = error
            continue
        taken[config] = seconds(lambda config=config: run(config))  # type: ignore[misc]
    if refused is not None and not taken:
        raise refused
    return _found.setdefault(_key(kernel, problem, like, layout), min(taken, key=taken.__getitem__))
