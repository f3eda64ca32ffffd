"""The checks, in the order in which they are made.  Every rank calls each; findings are the leader's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.integrations.checkpoint import model_tensors
from odysseus_kernels.integrations.verify import more_checks as more
from odysseus_kernels.integrations.verify.asif import explain_gradient, explain_loss, explain_part, scale_hint
from odysseus_kernels.integrations.verify.models import Pass, forward, without_dropout
from odysseus_kernels.integrations.verify.observe import bare, closeness, share, whole
from odysseus_kernels.integrations.verify.report import Finding
from odysseus_kernels.integrations.verify.trial import Trial, listed

__all__ = ["all_checks"]

_IGNORED = -100
_UPDATE = 0.02  # of the weights' norm: a step that shows in the loss and stays where the loss is smooth

Check = Callable[[Trial], list[Finding]]


def all_checks(folder: Path) -> Iterator[tuple[str, Check]]:
    """(name, check) of all checks; ``folder`` for the checkpoint."""
    yield "batch", batch_check
    yield "weights", weights_check
    yield "layers", layers_check
    yield "leakage", more.leakage_check
    yield "step", loss_check
    yield "gradients", gradients_check
    yield "bytes", more.bytes_check
    yield "recomputation", more.recomputation_check
    yield "dropout", more.dropout_check
    yield "second step", second_step_check
    yield "checkpoint", lambda trial: more.checkpoint_check(trial, folder)


def batch_check(trial: Trial) -> list[Finding]:
    """The ranks' parts, put together, are the whole batch."""
    whole, length = trial.whole, trial.length
    ids = whole["input_ids"]
    wanted = {"input_ids": ids, "attention_mask": whole.get("attention_mask")}
    counted = torch.arange(length, device=ids.device)[None]
    wanted["position_ids"] = whole.get("position_ids", counted).expand(ids.shape)
    if "labels" in whole:
        wanted["shift_labels"] = F.pad(whole["labels"][:, 1:], (0, 1), value=_IGNORED)
    findings = []
    for name, truth in wanted.items():
        if truth is None:
            continue
        own = trial.part.get(name)
        has = [bool(text) for text in share("x" if own is not None else "", trial.group)]
        if not any(has) and name == "position_ids":
            continue  # the model counts by itself
        if not all(has):
            lacking = ", ".join(f"rank {rank}" for rank, there in enumerate(has) if not there)
            findings.append(
                Finding(f"batch: {name}", "FAILED", "missing", "the whole batch's", lacking, f"the cut lost {name}")
            )
            continue
        assert own is not None
        rows = own if own.shape[0] == ids.shape[0] else own.expand(ids.shape[0], -1)
        found = trial.assemble(rows)
        different = (found != truth.to(found.device)).nonzero()
        where = ""
        if len(different):
            row, token = different[0].tolist()
            where = f"row {row}, token {token}: {int(found[row, token])}, the whole batch has {int(truth[row, token])}"
        hint = _batch_hint(name, found, truth, trial) if len(different) else ""
        findings.append(Finding.of(f"batch: {name}", not len(different), f"{len(different)} differ", "0", where, hint))
    return findings


def _batch_hint(name: str, found: torch.Tensor, truth: torch.Tensor, trial: Trial) -> str:
    if name == "shift_labels":
        labels = trial.whole["labels"]
        if torch.equal(found[:, :-2], labels[:, 2:].to(found.device)):
            return "labels were shifted twice: shard_sequence shifts them"
        if torch.equal(found, labels.to(found.device)):
            return "labels were not shifted: position i predicts token i + 1"
    if name == "position_ids":
        own = -(-trial.length // trial.group.every_size)
        counted = torch.arange(trial.length, device=found.device)
        if torch.equal(found, (counted % own).expand_as(found)):
            return "each rank counts from 0: positions must be those of the whole sequence"
    return "every rank must pass the same whole batch to shard_sequence, with the model's mesh and strategy"


def weights_check(trial: Trial) -> list[Finding]:
    """Parallelizing kept every weight to the bit."""
    truth = dict(model_tensors(trial.reference)) if trial.reference is not None else {}
    different: list[str] = []
    for name, tensor in sorted(model_tensors(trial.subject).items()):
        full = whole(tensor.detach())
        if trial.reference is not None and (name not in truth or not torch.equal(full, truth[name].detach())):
            different.append(name)
    count = f"{len(different)} of {len(truth)} differ"
    return [Finding.of("weights", not different, count, "0", listed(different), "parallelizing changed them")]


def layers_check(trial: Trial) -> list[Finding]:
    """Every part's output, and the logits."""
    with without_dropout(trial.subject, *([trial.reference] if trial.reference is not None else [])):
        found = trial.put_together(forward(trial.subject, trial.part, trial.names))
        if trial.reference is None:
            return []
        truth = forward(trial.reference, trial.whole, trial.names)
        trial.found, trial.truth = found, truth
        return compare_passes(trial, found, truth, "")


def compare_passes(
    trial: Trial, found: Pass, truth: Pass, when: str, hint: Callable[[str], str] | None = None
) -> list[Finding]:
    """Findings for the parts, the first that differs named, and for the logits; on the leader."""
    assert trial.reference is not None
    counts, worst, first = trial.counts, 0.0, ""
    for name in sorted(found.parts.keys() & truth.parts.keys(), key=list(truth.parts).index):
        error = closeness(found.parts[name][counts], truth.parts[name][counts])[0]
        worst = max(worst, error)
        if error > trial.bound and not first:
            first = name
    said = ""
    if first:
        said = hint(first) if hint is not None else ""
        said = said or explain_part(
            trial.reference, trial.whole, first, found.parts[first], trial.bound, counts, trial.group.every_size
        )
    missing = [name for name in truth.parts if name not in found.parts]
    error = closeness(found.logits[counts], truth.logits[counts])[0]
    where = f"the first that differs: {first}" if first else ""
    if missing and not first:
        where, said = f"not called: {listed(missing)}", "the parallelized model does not run these modules"
    return [
        Finding.of(f"layers{when}", not first and not missing, f"{worst:.1e}", f"{trial.bound:.0e}", where, said),
        Finding.of(
            f"logits{when}",
            error <= trial.bound,
            f"{error:.1e}",
            f"{trial.bound:.0e}",
            "",
            "see layers" if first else "",
        ),
    ]


def loss_check(trial: Trial) -> list[Finding]:
    """The loss of the step, the same on every rank."""
    if "labels" not in trial.whole:
        return [Finding("loss", "skipped", hint="the batch has no labels")]
    with without_dropout(trial.subject, *([trial.reference] if trial.reference is not None else [])):
        with CommRecorder() as trial.record:
            trial.loss_found = trial.step(trial.subject, trial.part)
            trial.loss_found.backward()
        losses = [float(text) for text in share(repr(trial.loss_found.item()), trial.group)]
        if trial.reference is None:
            return []
        trial.loss_truth = trial.step(trial.reference, trial.whole)
        trial.loss_truth.backward()
    assert trial.truth is not None
    bound, truth = trial.loss_bound, trial.loss_truth.item()
    odd = [rank for rank, loss in enumerate(losses) if loss != losses[0]]
    if odd:
        where = f"rank {odd[0]} has {losses[odd[0]]:.8g}, rank 0 has {losses[0]:.8g}"
        return [Finding("loss", "FAILED", "ranks differ", "the same on all", where)]
    error = abs(losses[0] - truth) / max(abs(truth), 1e-12)
    error = error if error == error else float("inf")
    hint = ""
    if error > bound:
        hint = explain_loss(trial.reference, trial.whole, trial.truth.logits, losses[0], truth, bound, trial.ranks)
    where = f"{losses[0]:.8g}, the single process has {truth:.8g}"
    return [Finding.of("loss", error <= bound, f"{error:.1e}", f"{bound:.0e}", where, hint)]


def gradients_check(trial: Trial) -> list[Finding]:
    """Every gradient, by name."""
    if trial.loss_found is None:
        return [Finding("gradients", "skipped", hint="the batch has no labels")]
    truth = {bare(name): p for name, p in trial.reference.named_parameters()} if trial.reference is not None else {}
    first: tuple[str, torch.Tensor] | None = None
    for name, parameter in sorted(trial.subject.named_parameters(), key=lambda item: bare(item[0])):
        gradient = None if parameter.grad is None else whole(parameter.grad)
        right = truth[bare(name)].grad if bare(name) in truth else None
        if trial.reference is not None and (gradient is not None or right is not None):
            one = gradient if gradient is not None else torch.zeros_like(right)  # type: ignore[arg-type]
            error, scale = closeness(one, right if right is not None else torch.zeros_like(one))
            trial.gradients[bare(name)] = {"error": error, "scale": scale}
            if first is None and not error <= trial.bound:
                first = bare(name), one.detach().cpu()
    if trial.reference is None:
        return []
    wrong = {name: found for name, found in trial.gradients.items() if not found["error"] <= trial.bound}
    worst = max((found["error"] for found in trial.gradients.values()), default=0.0)
    count = f"{worst:.1e}" + (f", {len(wrong)} of {len(trial.gradients)} differ" if wrong else "")
    hint = ""
    scales = [found["scale"] for found in wrong.values()]
    if (
        wrong
        and all(abs(abs(f["scale"] - 1) - f["error"]) < 1e-3 for f in wrong.values())
        and max(scales) - min(scales) < 1e-3
    ):
        hint = scale_hint(scales[0], trial.ranks, "each of these gradients" if len(wrong) > 1 else "this gradient")
    elif first is not None:
        hint = explain_gradient(trial.reference, trial.whole, trial.step, *first, trial.bound, trial.group.every_size)
    return [Finding.of("gradients", not wrong, count, f"{trial.bound:.0e}", listed(list(wrong)), hint)]


def second_step_check(trial: Trial) -> list[Finding]:
    """An optimizer's step on both, then everything once more: nothing from before the step may be used."""
    if trial.loss_found is None:
        return [Finding("after a step", "skipped", hint="the batch has no labels")]
    before: dict[str, torch.Tensor] = {}
    rate = 0.0
    if trial.reference is not None:
        before = {name: p.detach().clone() for name, p in trial.reference.named_parameters()}
        weights = torch.stack([p.detach().float().norm() for p in trial.reference.parameters()]).norm()
        grads = [p.grad.float().norm() for p in trial.reference.parameters() if p.grad is not None]
        rate = float(_UPDATE * weights / torch.stack(grads).norm()) if grads else 0.0
    rate = float(share(repr(rate), trial.group)[0])
    models = [trial.subject, *([trial.reference] if trial.reference is not None else [])]
    for model in models:
        torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=rate).step()
        model.zero_grad()
    with without_dropout(*models):
        found = trial.put_together(forward(trial.subject, trial.part, trial.names))
        with torch.no_grad():
            loss = trial.step(trial.subject, trial.part).item()
        if trial.reference is None:
            return []
        truth = forward(trial.reference, trial.whole, trial.names)
        with torch.no_grad():
            right = trial.step(trial.reference, trial.whole).item()

        def stale(name: str) -> str:
            return _stale(trial, name, found.parts[name], before)

        findings = compare_passes(trial, found, truth, " after a step", stale)
    bound = 10 * trial.loss_bound  # errors of the gradients have gone into the weights
    error = abs(loss - right) / max(abs(right), 1e-12)
    where = f"{loss:.8g}, the single process has {right:.8g}"
    return [*findings, Finding.of("loss after a step", error <= bound, f"{error:.1e}", f"{bound:.0e}", where)]


def _stale(trial: Trial, name: str, seen: torch.Tensor, before: dict[str, torch.Tensor]) -> str:
    """Whether the part, with its weights from before the step, gives what was seen."""
    assert trial.reference is not None
    own = {n: p for n, p in trial.reference.named_parameters() if bare(n).startswith(f"{name}.")}
    now = {n: p.detach().clone() for n, p in own.items()}
    try:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(before[n])
        part = forward(trial.reference, trial.whole, [name]).parts[name]
    finally:
        with torch.no_grad():
            for n, p in own.items():
                p.copy_(now[n])
    same = closeness(seen[trial.counts], part[trial.counts])[0] <= trial.bound
    return f"as if {name} still had its weights from before the step" if same else ""
