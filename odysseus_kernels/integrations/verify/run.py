"""``verify``: a user's model and batch, once in a single process and once parallelized, compared part by part.

The first rank that shares the sequence (the leader) also runs the single process's model; the others wait for it.  What
ranks have is put together by collectives that all of them call, and compared on the leader, which tells everyone.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.errors import CommunicationError
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.integrations.verify import checks
from odysseus_kernels.integrations.verify.models import Batch, Step, copy_of
from odysseus_kernels.integrations.verify.observe import part_names, share
from odysseus_kernels.integrations.verify.report import Finding, Report
from odysseus_kernels.integrations.verify.trial import Trial
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.strategies import get_strategy

__all__ = ["verify"]

Prepare = Callable[[nn.Module, DeviceMesh, str], nn.Module]
Cut = Callable[[Batch, DeviceMesh, str], Batch]
_TEXT = 1500


def verify(
    model: nn.Module,
    batch: Batch,
    mesh: DeviceMesh,
    strategy: str = "odysseus",
    config: OverlapConfig | None = None,
    *,
    layers: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    prepare: Prepare | None = None,
    cut: Cut | None = None,
    step: Step | None = None,
    layer_by_layer: bool = False,
    folder: str | Path | None = None,
) -> Report:
    """Compares a parallelized model with the same model in one process, on your own batch; every rank calls it.

    One optimizer step is run both ways, without dropout, and compared: the cut batch, the weights, every layer's
    output, logits, loss, each gradient by name, the loss after the step, the bytes that were sent (with the formula's),
    and a checkpoint's way into another process. It is also checked that no token is seen by an earlier one or by
    another document, that what is computed again in backward is what was computed before, and that dropout drops as
    much as it should.  Where something differs, the first part that does is named, and what would explain it: see
    :mod:`odysseus_kernels.integrations.verify.asif`.

    Args:
        model: the stock model, the same on every rank, on the mesh's device; copied, never changed.
        batch: the whole batch, the same on every rank, as :func:`~odysseus_kernels.shard_sequence` takes it.
        mesh: the device mesh.
        strategy, config: as for :func:`~odysseus_kernels.parallelize`.
        layers: compare a model of the first so many decoder layers; None takes all.
        dtype: what both models are converted to; None keeps the model's own, and bounds are then those of its
            precision.
        prepare: ``prepare(copy, mesh, strategy)`` turns a copy of ``model`` into the parallelized model, for whatever
            else your script does to it; ``parallelize(copy, mesh, strategy, config)`` if None.
        cut: ``cut(batch, mesh, strategy)`` gives this rank's part; ``shard_sequence(batch, copy)`` if None, striped
            as the configuration says.
        step: ``step(model, batch) -> loss``; the model's own loss if None.
        layer_by_layer: let the single process compute each layer again in backward, so that it holds the activations
            of one layer only.
        folder: where the checkpoint is tried, seen by all ranks; by default the system's folder for temporary files,
            which ranks on several hosts do not share.

    Returns:
        The report, the same on every rank; ``report.passed``, ``report.table()``, ``report.to_json()``.

    Raises:
        ValueError: for arguments that do not fit, as the functions named above raise it.

    Example:
        >>> report = ody.verify(model, batch, mesh, "odysseus", layers=1, folder=folder)
        >>> report.passed
        True
        >>> print(report.table().splitlines()[-1])
        every check passed
    """
    group = get_strategy(strategy).group(SequenceGroup.of(mesh, config))
    if "input_ids" not in batch:
        raise ValueError(f"batch: expected input_ids among its keys, got {sorted(batch)}")

    leads = group.every_rank == 0
    subject = copy_of(model, layers, dtype)
    reference = copy_of(model, layers, dtype) if leads else None
    if reference is not None and layer_by_layer:
        reference.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    names = part_names(subject)
    subject = prepare(subject, mesh, strategy) if prepare is not None else parallelize(subject, mesh, strategy, config)  # type: ignore[arg-type]
    for one in (subject, reference):
        if one is not None:
            one.train()

    def own_part(whole: Batch) -> Batch:
        return dict(shard_sequence(whole, subject) if cut is None else cut(whole, mesh, strategy))

    part = own_part(batch)
    sizes = f"{group.size} ranks of seq" + (f" x {group.ring_size} of ring" if group.ring_size > 1 else "")
    title = f"{type(model).__name__}, strategy {strategy!r}, {sizes}: the ranks beside a single process"
    trial = Trial(
        group=group,
        strategy=strategy,
        subject=subject,
        reference=reference,
        whole=batch,
        part=part,
        cut=own_part,
        names=names,
        step=step or _own_loss,
    )
    findings: list[Finding] = []
    with contextlib.ExitStack() as stack:
        place = _common_folder(stack, folder, group)
        for title_of, check in checks.all_checks(place):
            if not _together(group, findings, title_of, functools.partial(check, trial)):
                break
        return _told(group, title, findings, trial.gradients)


def _own_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return model(**batch, use_cache=False).loss  # type: ignore[no-any-return]


def _together(group: SequenceGroup, findings: list[Finding], title: str, check: Callable[[], list[Finding]]) -> bool:
    """Runs a check on all ranks; false, and a finding that names the rank, where one raised."""
    error = ""
    try:
        findings += check()
    except Exception as raised:  # noqa: BLE001  # whatever the user's model raises is a finding
        error = f"{type(raised).__name__}: {raised}"[:_TEXT]
    try:
        failures = {rank: text for rank, text in enumerate(share(error, group)) if text}
    except CommunicationError as raised:
        failures = {group.every_rank: error or str(raised)[:_TEXT]}
    if not failures:
        return True
    # A rank that raised by itself says more than those that were told.
    own = {rank: text for rank, text in failures.items() if "Error: rank " not in text} or failures
    rank, text = next(iter(own.items()))
    findings.append(Finding(title, "FAILED", "an exception", "none", f"rank {rank}", text))
    return False


def _told(group: SequenceGroup, title: str, findings: list[Finding], gradients: dict[str, dict[str, float]]) -> Report:
    """The leader's report, on every rank."""
    own = Report(title, tuple(findings), gradients)
    try:
        return Report.from_json(share(own.to_json() if group.every_rank == 0 else "", group)[0])
    except CommunicationError:
        return own  # the finding says what went wrong between the ranks


def _common_folder(stack: contextlib.ExitStack, folder: str | Path | None, group: SequenceGroup) -> Path:
    """A folder of this verification alone, gone afterwards; the same name on every rank."""
    parent = Path(folder) if folder is not None else Path(tempfile.gettempdir())
    name = share(f"odysseus-verify-{uuid.uuid4().hex[:12]}", group)[0]
    if group.every_rank == 0:
        stack.enter_context(_Removed(parent / name))
    return parent / name


class _Removed(contextlib.AbstractContextManager[None]):
    """Removes a folder at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __exit__(self, *_: Any) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
