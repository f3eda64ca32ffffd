"""What ranks run in the tests of what layers send ahead of one another."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from family_cases import Case as FamilyCase
from llama_cases import Case, sequence_mesh

from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.comm.sent_ahead import SentAhead
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.checkpointing import selective_checkpoint
from odysseus_kernels.nn.sequence import shard_sequence

Counts = dict[str, tuple[int, int, int]]
OPERATORS = (
    "zero3_linear",
    "linear_all_to_all",
    "all_to_all_linear",
    "zero3_linear_cross_entropy",
    "zero3_experts",
    "pipelined_ulysses",
)


@contextlib.contextmanager
def nothing_serves() -> Iterator[None]:
    """Every gather begins in the open: what is sent ahead is dropped."""
    serves = SentAhead.serves
    SentAhead.serves = lambda self, call, pieces=1: False  # type: ignore[method-assign]
    try:
        yield
    finally:
        SentAhead.serves = serves  # type: ignore[method-assign]


def unlinked(model: Any) -> Any:
    """``model``, of which no layer knows another."""
    for module in model.modules():
        vars(module).pop("neighbours", None)
    return model


def counts(record: CommRecorder) -> Counts:
    """(served, open, dropped) of each operator that gathers weights, where there are any."""
    found = {}
    for operator in OPERATORS:
        for phase in ("forward", "backward"):
            ahead = record.ahead(operator=operator, phase=phase)
            if any(ahead.values()):
                found[f"{operator} {phase}"] = (ahead["served"], ahead["open"], ahead["dropped"])
    return found


def _model(case: Case | FamilyCase, strategy: str, transport: str, groups: int | None = None) -> Any:
    config = OverlapConfig(transport=transport, timeout_s=30, pipeline="auto" if groups is None else groups)
    model = parallelize(case.model(), sequence_mesh(torch.distributed.get_world_size()), strategy, config)
    if getattr(case, "reentrant", False):
        model.enable_input_require_grads()
    return model


def _batch(case: Case | FamilyCase, strategy: str, pieces: int = 1) -> Any:
    mesh = sequence_mesh(torch.distributed.get_world_size())
    return shard_sequence(case.whole_batch(), mesh, strategy, pieces=pieces)


def _trained(model: Any, step: Callable[[Any, int], None], steps: int) -> list[torch.Tensor]:
    """All parameters after some steps of ``step(model, number)`` and an optimizer."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, foreach=True)
    for number in range(steps):
        step(model, number)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.to_local().detach() for parameter in model.parameters()]


def _same(
    case: Any,
    strategy: str,
    transport: str,
    step: Callable[[Any, int], None],
    steps: int = 2,
    groups: int | None = None,
) -> tuple[Counts, int]:
    """Trains with and without what is sent ahead, compares to the bit; returns counts, and all that was dropped."""
    with CommRecorder() as record:
        ahead = _trained(_model(case, strategy, transport, groups), step, steps)
    with CommRecorder() as alone:
        plain = _trained(unlinked(_model(case, strategy, transport, groups)), step, steps)
    with nothing_serves():
        opened = _trained(_model(case, strategy, transport, groups), step, steps)
    for one, other, third in zip(ahead, plain, opened, strict=True):
        assert torch.equal(one, other) and torch.equal(one, third)
    assert record.rows() == alone.rows(), "what is sent ahead is sent once"
    return counts(record), record.ahead()["dropped"]


def training(
    rank: int,
    world: int,
    case: Case,
    strategy: str,
    transport: str,
    batches: int = 2,
    pieces: int = 1,
    groups: int | None = None,
) -> tuple[Counts, int]:
    """Steps of an optimizer, ``batches`` accumulated for each; one step for a single batch."""
    batch = _batch(case, strategy, pieces)

    def step(model: Any, number: int) -> None:
        for _ in range(batches):
            model(**batch).loss.backward()

    return _same(case, strategy, transport, step, steps=batches, groups=groups)


def selective(rank: int, world: int, strategy: str, transport: str) -> tuple[Counts, int]:
    """A checkpoint that keeps what operators return runs the modules again, and no operator."""
    case = Case(layers=3)
    batch = _batch(case, strategy)

    def step(model: Any, number: int) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": selective_checkpoint})
        model(**batch).loss.backward()

    return _same(case, strategy, transport, step, steps=1)


def experts(rank: int, world: int, family: str, strategy: str, transport: str) -> tuple[Counts, int]:
    case = FamilyCase(family=family)
    batch = _batch(case, strategy)
    return _same(case, strategy, transport, lambda model, number: model(**batch).loss.backward())


def evaluation(rank: int, world: int, strategy: str, transport: str) -> Counts:
    """Logits without gradients, between two steps of training."""
    case = Case(layers=3)
    model, batch = _model(case, strategy, transport), _batch(case, strategy)
    model(**batch).loss.backward()
    inputs = {name: value for name, value in batch.items() if "labels" not in name}
    with torch.no_grad(), CommRecorder() as record:
        logits = model.eval()(**inputs).logits
    with torch.no_grad():
        expected = unlinked(_model(case, strategy, transport)).eval()(**inputs).logits
    assert torch.equal(logits, expected)
    return counts(record)


class _StopError(Exception):
    pass


def interrupted(rank: int, world: int, strategy: str, transport: str) -> int:
    """A forward pass ends with an exception between a layer that sent ahead and the next; weights change; then it runs.

    The weights change under the DTensors, so that no tensor's version counts it.
    """
    case = Case(layers=3)
    model, batch = _model(case, strategy, transport), _batch(case, strategy)
    layer = model.model.layers[1]
    for module in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):

        def stop(*_: Any) -> None:
            raise _StopError

        handle = module.register_forward_pre_hook(stop)
        with contextlib.suppress(_StopError):
            model(**batch)
        handle.remove()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().detach().numpy()[...] *= 1.01  # type: ignore[operator]
        with CommRecorder() as record:
            model(**batch).loss.backward()
        twin = unlinked(_model(case, strategy, transport))
        twin.load_state_dict(model.state_dict())
        twin(**batch).loss.backward()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(one.grad.to_local(), other.grad.to_local())
        model.zero_grad()
    return record.ahead()["dropped"]


def unusual_orders(rank: int, world: int, strategy: str, transport: str) -> None:
    """A layer left out, a layer twice, layers the other way round, a copy, and two models in turn: right numbers."""
    case = Case(layers=3)
    batch = _batch(case, strategy)
    orders: list[Callable[[Any], Any]] = [
        lambda layers: [layers[0], layers[2]],
        lambda layers: [layers[0], layers[1], layers[1], layers[2]],
        lambda layers: list(layers)[::-1],
    ]
    for order in orders:
        results = []
        for link in (True, False):
            model = _model(case, strategy, transport)
            model = model if link else unlinked(model)
            model.model.layers = torch.nn.ModuleList(order(model.model.layers))
            model.config.num_hidden_layers = len(model.model.layers)
            loss = model(**batch).loss
            loss.backward()
            gradients = [p.grad.to_local() for p in model.parameters() if p.grad is not None]
            results.append([loss.detach(), *gradients])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
    first, second = _model(case, strategy, transport), _model(Case(layers=3, tied=True), strategy, transport)
    losses = [copy.deepcopy(first)(**batch).loss, first(**batch).loss, second(**batch).loss, first(**batch).loss]
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[1], losses[3])
    torch.stack(losses[1:3]).sum().backward()
    plain = unlinked(_model(case, strategy, transport))
    plain(**batch).loss.backward()
    for one, other in zip(first.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad.to_local(), other.grad.to_local())


def changed_by_hooks(rank: int, world: int, strategy: str, transport: str) -> int:
    """Each module that gathers first changes its own weights just before it does; what was sent ahead is old then."""
    case = Case(layers=3)
    model, batch = _model(case, strategy, transport), _batch(case, strategy)

    def change(module: Any, *_: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)

    for layer in model.model.layers:
        for module in (layer.self_attn, layer.mlp):
            module.register_forward_pre_hook(change)
    with CommRecorder() as record:
        loss = model(**batch).loss.detach()
    twin = unlinked(_model(case, strategy, transport))
    twin.load_state_dict(model.state_dict())
    assert torch.equal(loss, twin(**batch).loss.detach())
    return record.ahead()["dropped"]
