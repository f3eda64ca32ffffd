"""Checks beyond one step's numbers: who sees whom, what is sent, what is computed again, dropout, checkpoints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor, Shard

from odysseus_kernels.attention.local import RING_KERNELS
from odysseus_kernels.integrations.checkpoint import load_checkpoint, model_tensors, save_checkpoint
from odysseus_kernels.integrations.verify.models import (
    dropout_of,
    forward,
    gradients_aside,
    recomputes,
    without_dropout,
)
from odysseus_kernels.integrations.verify.observe import bare, closeness, share, whole
from odysseus_kernels.integrations.verify.report import Finding
from odysseus_kernels.integrations.verify.traffic import expected_traffic, is_beside
from odysseus_kernels.integrations.verify.trial import Trial, listed

__all__ = ["bytes_check", "checkpoint_check", "dropout_check", "leakage_check", "recomputation_check"]

_SEED = 1234
_RUNS = 8
# With so many runs of each, chance gives more than this once in about 10,000 verifications.
_MOST_ERRORS, _MOST_SPREAD = 6.0, 6.0


# ---- who sees whom ---------------------------------------------------------------------------------------------------


def leakage_check(trial: Trial) -> list[Finding]:
    """No token changes the outputs of an earlier one, or of another document."""
    ids, length = trial.whole["input_ids"], trial.length
    documents = _documents(trial)
    routed = any(hasattr(trial.subject.config, name) for name in ("num_experts", "num_local_experts"))
    base = _logits(trial, ids)
    middle = length // 2
    findings = [_leak(trial, "leakage: to earlier tokens", base, middle, slice(0, middle), routed)]
    if documents is None:
        why = "the batch has no packed documents (position_ids that restart, without attention_mask)"
        return [*findings, Finding("leakage: to other documents", "skipped", hint=why)]
    first = int((documents[0] != documents[0, 0]).nonzero()[0])
    for name, token, others in (
        ("leakage: to later documents", 0, slice(first, length)),
        ("leakage: to earlier documents", first, slice(0, first)),
    ):
        findings.append(_leak(trial, name, base, token, others, routed, row=0))
    return findings


def _documents(trial: Trial) -> torch.Tensor | None:
    """[B, L] number of each token's document, if the first row has several."""
    positions = trial.whole.get("position_ids")
    if positions is None or "attention_mask" in trial.whole:
        return None
    positions = positions.expand(trial.whole["input_ids"].shape)
    documents = (torch.diff(positions, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    return documents if bool((documents[0] != documents[0, 0]).any()) else None


def _logits(trial: Trial, ids: torch.Tensor) -> torch.Tensor:
    part = dict(trial.cut({**trial.whole, "input_ids": ids}))
    with without_dropout(trial.subject):
        return trial.assemble(forward(trial.subject, part, []).logits)


def _leak(
    trial: Trial, name: str, base: torch.Tensor, token: int, others: slice, routed: bool, row: int | None = None
) -> Finding:
    ids = trial.whole["input_ids"].clone()
    ids[:, token] = (ids[:, token] + 1) % base.shape[-1]
    changed = _logits(trial, ids)
    rows = slice(None) if row is None else slice(row, row + 1)
    counts = trial.counts[rows]
    before, after = base[rows][:, others][counts[:, others]], changed[rows][:, others][counts[:, others]]
    # Other tokens may go to other experts, whose products then have other sizes: only those round differently.
    bound = trial.bound if routed else 0.0
    error = 0.0 if torch.equal(before, after) else closeness(after, before)[0]
    moved = (changed[rows] != base[rows]).any(-1)
    where = ""
    if error > bound:
        seen = (moved & counts)[:, others].nonzero()
        where = f"changing token {token} changes token {int(seen[0, 1]) + (others.start or 0)}" if len(seen) else ""
    own = bool(moved[:, token][counts[:, token]].all())
    hint = "" if own else f"changing token {token} does not change its own logits: the batch is not what is computed"
    return Finding.of(name, error <= bound and own, f"{error:.1e}", f"{bound:.0e}" if bound else "0", where, hint)


# ---- what is sent ----------------------------------------------------------------------------------------------------


def bytes_check(trial: Trial) -> list[Finding]:
    """What the step sent is what the formulas say, to the byte, on every rank."""
    formula, why_not = expected_traffic(trial)
    if trial.record is None or formula is None:
        return [Finding("bytes", "skipped", hint=why_not or "the batch has no labels")]
    counted: dict[tuple[str, str, str], int] = {}
    for row in trial.record.rows():
        key = (str(row["phase"]), str(row["operator"]), str(row["collective"]))
        if not is_beside(key[1]):
            counted[key] = counted.get(key, 0) + int(row["bytes"])
    different = [
        f"{' '.join(key)}: {counted.get(key, 0):,} bytes, the formula says {formula.get(key, 0):,}"
        for key in sorted(counted.keys() | formula.keys())
        if counted.get(key, 0) != formula.get(key, 0)
    ]
    everyone = share(listed(different, "; "), trial.group)
    odd = [f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text]
    total, expected = sum(counted.values()), sum(formula.values())
    return [Finding.of("bytes", not odd, f"{total:,}", f"{expected:,}", odd[0] if odd else "")]


# ---- what is computed again ------------------------------------------------------------------------------------------


def recomputation_check(trial: Trial) -> list[Finding]:
    """Layers that are computed again in backward give the gradients that keeping them gives, dropout included."""
    with recomputes(trial.subject, True) as count:
        if not count or trial.loss_found is None:
            why = "no layer is computed again (gradient_checkpointing_enable)" if not count else "no labels"
            return [Finding("recomputation", "skipped", hint=why)]
    gradients = []
    for again in (True, False):
        with recomputes(trial.subject, again), gradients_aside(trial.subject), _seeded(trial, _SEED):
            trial.step(trial.subject, trial.part).backward()
            named = [(bare(name), p.grad) for name, p in trial.subject.named_parameters() if p.grad is not None]
            gradients.append({name: (g.to_local() if isinstance(g, DTensor) else g) for name, g in named})
    errors = {name: closeness(gradients[0][name], kept)[0] for name, kept in gradients[1].items() if kept.numel()}
    wrong = [name for name, error in errors.items() if not error <= trial.bound]
    worst = max((float(text) for text in share(repr(max(errors.values(), default=0.0)), trial.group)), default=0.0)
    texts = share("\n".join(wrong), trial.group)
    first = next((text.split("\n") for text in texts if text), [])
    hint = "a layer was computed again with other numbers than before: its dropout or its inputs differ"
    where = listed(first)
    return [Finding.of("recomputation", not first, f"{worst:.1e}", f"{trial.bound:.0e}", where, hint)]


@contextmanager
def _seeded(trial: Trial, seed: int) -> Iterator[None]:
    """Generators as a user seeds them: alike across a ring, which drops by position; else differently on each rank."""
    group, config = trial.group, getattr(trial.subject, "config", None)
    kernel = getattr(config, "_attn_implementation", None)
    alike = (group.zigzag_size > 1 and kernel in RING_KERNELS) or group.tokens == "replicated"
    devices = list(range(torch.cuda.device_count())) if group.mesh.device_type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed if alike else seed + 7919 * group.every_rank)
        yield


# ---- dropout ---------------------------------------------------------------------------------------------------------


def dropout_check(trial: Trial) -> list[Finding]:
    """The same things are dropped with the same probabilities, and the loss is spread as the single process's is."""
    own = dropout_of(trial.subject)
    wanted = dropout_of(trial.reference) if trial.reference is not None else {}
    if share("x" if wanted else "", trial.group)[0] == "" or trial.loss_found is None:
        return [Finding("dropout", "skipped", hint="the model drops nothing")]
    found, truth, repeats = [], [], []
    for number in range(_RUNS):
        with torch.no_grad(), _seeded(trial, _SEED + number):
            found.append(trial.step(trial.subject, trial.part).item())
        if number == 0:
            with torch.no_grad(), _seeded(trial, _SEED):
                repeats = [trial.step(trial.subject, trial.part).item()]
        if trial.reference is not None:
            with torch.no_grad(), _seeded(trial, _SEED + number):
                truth.append(trial.step(trial.reference, trial.whole).item())
    if trial.reference is None:
        return []
    lost = sorted(name for name, value in wanted.items() if own.get(name) != value)
    spread, right = statistics.stdev(found), statistics.stdev(truth)
    error = abs(statistics.mean(found) - statistics.mean(truth))
    allowed = _MOST_ERRORS * math.sqrt((spread**2 + right**2) / _RUNS)
    alike = right / _MOST_SPREAD <= spread <= right * _MOST_SPREAD
    measured = f"loss {statistics.mean(found):.5f} ± {spread:.1e}"
    text = f"{statistics.mean(truth):.5f} ± {right:.1e}"
    hint = f"its probability is not the model's: {listed(lost)}" if lost else "it drops more or less than it should"
    good = not lost and alike and error <= allowed and repeats[0] == found[0]
    if repeats[0] != found[0]:
        hint = "the same seed gives another loss"
    return [Finding.of(f"dropout ({_RUNS} seeds)", good, measured, text, listed(lost), hint)]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoint_check(trial: Trial, folder: Path) -> list[Finding]:
    """What is saved comes back to the bit, in the single process and on the ranks."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / "checkpoint", trial.subject)
    tensors = dict(sorted(model_tensors(trial.subject).items()))
    local = {name: _local(tensor).detach().clone() for name, tensor in tensors.items()}
    different: dict[str, str] = {}
    if trial.reference is not None:
        load_checkpoint(folder / "checkpoint", trial.reference)
    single = dict(model_tensors(trial.reference)) if trial.reference is not None else {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if trial.reference is not None and not torch.equal(full, single[name].detach()):
            different[name] = _order_of_shards(full, single[name].detach(), tensor)
    with torch.no_grad():
        for tensor in tensors.values():
            _local(tensor).zero_()
    load_checkpoint(folder / "checkpoint", trial.subject)
    back = [name for name, tensor in tensors.items() if not torch.equal(_local(tensor).detach(), local[name])]
    lost = [f"rank {rank}: {text}" for rank, text in enumerate(share(listed(back), trial.group)) if text]
    hint = next((text for text in different.values() if text), "")
    count, total = f"{len(different)} of {len(tensors)} differ", "0"
    return [
        Finding.of("checkpoint in one process", not different, count, total, listed(list(different)), hint),
        Finding.of("checkpoint on the ranks", not lost, f"{len(lost)} ranks differ", total, lost[0] if lost else ""),
    ]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _order_of_shards(full: torch.Tensor, loaded: torch.Tensor, tensor: torch.Tensor) -> str:
    """Says so if ``loaded`` has the parts of ``full`` in another order."""
    if not isinstance(tensor, DTensor) or full.shape != loaded.shape:
        return ""
    for placement in tensor.placements:
        if isinstance(placement, Shard):
            rows = full.shape[placement.dim] // _local(tensor).shape[placement.dim]
            parts = full.chunk(rows, placement.dim)
            places = [
                next((i for i, part in enumerate(parts) if torch.equal(part, one)), -1)
                for one in loaded.chunk(rows, placement.dim)
            ]
            if -1 not in places:
                return f"the ranks' parts came back in the order {places}"
    return ""
