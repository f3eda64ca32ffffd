"""What ``mode="auto"`` means for one phase of an operator; ``measure.py`` has how ranks choose alike."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from typing import cast

import torch

from odysseus_kernels.comm.choice.cache import machine_fingerprint
from odysseus_kernels.comm.choice.measure import (
    ChoiceCache,
    ChoiceKey,
    Choices,
    CudaTimer,
    Decision,
    HostTimer,
    refusal_of_any,
    refusals,
)
from odysseus_kernels.comm.choice.preparation import Preparation
from odysseus_kernels.comm.recorder import not_recorded
from odysseus_kernels.comm.transport import Transport
from odysseus_kernels.config import Mode, OverlapConfig, cache_directory
from odysseus_kernels.planner.cost_model import Work, predict
from odysseus_kernels.planner.hardware import hardware_for

__all__ = ["LIBRARY", "Phase", "Selection"]

_PIECES = ("/1", "/2", "/4", "/8")
LIBRARY = "unfused/library"
"""Unfused over the process group's collectives, beside the modes of a transport that moves bytes by itself."""

Run = Callable[[Transport, OverlapConfig], None]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of an operator, as far as the choice of its mode depends on it.

    Attributes:
        operator, phase, shapes: as in :class:`~odysseus_kernels.comm.transport.Call`.
        own: sizes of weights, which may differ between ranks but change on all of them together.
        dtype: of the products.
        flops: of this rank's products.
        gathered_bytes, scattered_bytes: of this rank's chunk.
        tiles: whether one kernel whose tiles wait and signal exists for it.
        rows, columns: of the output of one chunk's product, where the phase is such products; else 0.
        switched: as in :class:`~odysseus_kernels.comm.transport.Call`.
    """

    operator: str
    phase: str
    shapes: str
    own: str
    dtype: torch.dtype
    flops: int
    gathered_bytes: int = 0
    scattered_bytes: int = 0
    tiles: bool = False
    rows: int = 0
    columns: int = 0
    switched: bool = False


class Selection:
    """The modes of one process group on one kind of device."""

    def __init__(self, device: torch.device, exchange: Callable[[str], list[str]]) -> None:
        self._cuda = device.type == "cuda"
        self._device = device
        self._name = torch.cuda.get_device_name(device) if self._cuda else "cpu"
        timer = CudaTimer(device) if self._cuda else HostTimer()
        self._exchange = exchange
        self._choices = Choices(_cache(self._cuda), exchange, timer)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return self._choices.decisions

    def settle(
        self,
        transport: Transport,
        config: OverlapConfig,
        phase: Phase,
        run: Run,
        library: Callable[[], Transport] | None = None,
    ) -> OverlapConfig:
        """``config`` with a mode that is not ``"auto"``.  Ranks call it together; the first time may take a second.

        Args:
            transport: of the phase.
            config: what the caller asks for.
            phase: what is chosen for.
            run: runs the phase in the mode that it is given, any number of times.
            library: the collective transport, where that is a choice, too; the same on all ranks.  What it is fastest
                with comes back as unfused with ``transport="collective"``.
        """
        key = self._key(transport, config, phase, compared=library is not None)
        if config.mode != "auto":
            self._choices.note(key, config.mode)
            return config
        capturing = self._cuda and torch.cuda.is_current_stream_capturing()
        measure = (config.tune == "measure" or (config.tune == "auto" and self._cuda)) and not capturing
        if not measure and not self._cuda and config.tune == "auto":
            # On a CPU host fusing saves whole copies of the operands, whatever it hides.
            self._choices.note(key, "fused", "default")
            return dataclasses.replace(config, mode="fused")
        found = self._choices.find(key, measure=measure)
        if found is None:
            variants = self._variants(transport, config, phase)
            candidates: dict[str, Callable[[], None]] = {
                variant: functools.partial(run, transport, _as(config, variant)) for variant in variants
            }
            if library is not None and measure:
                candidates[LIBRARY] = functools.partial(run, library(), _as(config, LIBRARY))
            prepare = {}
            if any(variant.partition("/")[0] == "tiles" for variant in variants):
                stand_in = Preparation(transport.rank, transport.world)
                prepare["tiles"] = functools.partial(run, stand_in, _as(config, "tiles"))
            with not_recorded(), transport.trial():
                refused = dict[str, str]()
                if not measure and not capturing:
                    phase, refused = self._agreed(phase, refusals(prepare))
                prior = self._prior(config, phase, transport.world, variants)
                found = self._choices.decide(key, candidates, prior, measure=measure, prepare=prepare, refused=refused)
        return _as(config, found.mode)

    def _variants(self, transport: Transport, config: OverlapConfig, phase: Phase) -> list[str]:
        """What is compared.  On a GPU the best number of pieces depends on how products fill it, so some are tried."""
        modes = ["unfused", "fused"]
        if not self._cuda or transport.name != "symmetric":
            return modes
        pieces = ["", *_PIECES] if config.chunks_per_rank == "auto" else [""]
        variants = [*modes[:1], *(f"fused{count}" for count in pieces)]
        return variants + [f"tiles{count}" for count in pieces] if phase.tiles else variants

    def _key(self, transport: Transport, config: OverlapConfig, phase: Phase, *, compared: bool = False) -> ChoiceKey:
        settings = f"{config.chunks_per_rank}, {config.gathered}, {config.reduce_dtype}, {config.tile_bytes}"
        settings += ", through the switch" if phase.switched else ""
        settings += ", beside the process group's collectives" if compared else ""
        return ChoiceKey(
            phase.operator,
            phase.phase,
            transport.name,
            transport.world,
            str(phase.dtype).removeprefix("torch."),
            phase.shapes,
            settings,
            self._name,
            phase.own,
        )

    def _agreed(self, phase: Phase, refused: dict[str, str]) -> tuple[Phase, dict[str, str]]:
        """The largest product of any rank, and the modes for which any has no kernel: all ranks predict alike."""
        own = json.dumps({"flops": phase.flops, "columns": phase.columns, "refused": refused})
        everyone = [json.loads(text) for text in self._exchange(own)]
        flops, columns = (max(int(one[name]) for one in everyone) for name in ("flops", "columns"))
        agreed = dataclasses.replace(phase, flops=flops, columns=columns)
        return agreed, refusal_of_any([one["refused"] for one in everyone])

    def _prior(self, config: OverlapConfig, phase: Phase, world: int, variants: Sequence[str]) -> dict[str, float]:
        """Predictions for ``variants``, each for the number of pieces in which it runs.

        Where some name a number, those that leave it to the transport have none: it knows no product's waves.
        """
        hardware, predicted = hardware_for(self._name), dict[str, float]()
        numbered = {variant.partition("/")[0] for variant in variants if "/" in variant}
        for variant in variants:
            if variant in numbered:
                continue
            pieces = _as(config, variant).chunks_per_rank
            work = Work(
                flops=phase.flops,
                world=world,
                pieces=1 if pieces == "auto" else pieces,
                dtype=str(phase.dtype).removeprefix("torch."),
                gathered_bytes=phase.gathered_bytes,
                scattered_bytes=phase.scattered_bytes,
                # The unfused mode writes and reads the whole operand that it gathers or scatters.
                unfused_local_bytes=2.0 * world * (phase.gathered_bytes + phase.scattered_bytes),
                fused_local_bytes=2.0 * (phase.gathered_bytes + phase.scattered_bytes),
                rows=phase.rows,
                columns=phase.columns,
                switched=phase.switched,
            )
            mode = variant.partition("/")[0]
            predicted[variant] = predict(work, hardware, (mode,))[mode]
        return predicted


def _as(config: OverlapConfig, variant: str) -> OverlapConfig:
    """``config`` in a variant: a mode, a mode and a number of pieces (``"fused/4"``), or :data:`LIBRARY`."""
    if variant == LIBRARY:
        return dataclasses.replace(config, mode="unfused", transport="collective")
    mode, _, pieces = variant.partition("/")
    settled = dataclasses.replace(config, mode=cast(Mode, mode))
    return dataclasses.replace(settled, chunks_per_rank=int(pieces)) if pieces else settled


@functools.lru_cache(maxsize=2)
def _cache(cuda: bool) -> ChoiceCache:
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else []
    fingerprint = machine_fingerprint(
        devices,
        package_version=_version("odysseus_kernels"),
        torch_version=torch.__version__,
        triton_version=_version("triton"),
    )
    return ChoiceCache(cache_directory(), fingerprint)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
