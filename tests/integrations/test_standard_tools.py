"""Activation checkpointing and torch.compile work on parallelized models as on stock ones."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import pickle
from typing import Any

import pytest
import torch
from llama_cases import Case, sequence_mesh
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import set_checkpoint_early_stop

import odysseus_kernels as ody
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn import parameters
from odysseus_kernels.nn.sequence import shard_sequence

CASE = Case(kv_heads=1, bias=True)  # one key/value head: replicated parameters within the layers, too
OPERATORS = ("all_gather_linear", "linear_reduce_scatter", "zero3_linear")


def _model(mesh: Any, strategy: str = "odysseus", case: Case = CASE, **settings: Any) -> Any:
    # Every call alike: no choice is measured or computed.
    config = OverlapConfig(mode="fused", timeout_s=60, **settings)
    return ody.parallelize(case.model(), mesh, strategy, config)


def _step(
    model: Any, mesh: Any, strategy: str = "odysseus"
) -> tuple[float, dict[str, torch.Tensor], dict[str, dict[str, int]]]:
    """Loss, this rank's gradients, and bytes by phase and operator."""
    with ody.CommRecorder() as record:
        loss = model(**shard_sequence(CASE.whole_batch(), mesh, strategy)).loss
        loss.backward()
    sent = {
        phase: {name: record.bytes(operator=name, phase=phase) for name in {str(r["operator"]) for r in record.rows()}}
        for phase in ("forward", "backward")
    }
    return loss.item(), {name: p.grad.to_local() for name, p in model.named_parameters()}, sent


def checkpointing(rank: int, world_size: int) -> None:
    mesh = sequence_mesh(world_size)
    loss, gradients, sent = _step(_model(mesh), mesh)
    for context in ("selective", "whole"):
        model = _model(mesh)
        options: dict[str, Any] = {"use_reentrant": False}
        if context == "selective":
            options["context_fn"] = ody.selective_checkpoint
        model.gradient_checkpointing_enable(options)
        # Otherwise a recomputation ends where backward needs no more, before a layer's last product.
        with set_checkpoint_early_stop(False) if context == "whole" else contextlib.nullcontext():
            its_loss, its_gradients, its_sent = _step(model, mesh)
        assert its_loss == loss
        for name, gradient in gradients.items():
            assert torch.equal(its_gradients[name], gradient), f"{context}: {name}"
        assert its_sent["backward"] == sent["backward"]
        if context == "selective":
            assert its_sent["forward"] == sent["forward"], "nothing is sent again"
            continue
        for name in OPERATORS:
            assert its_sent["forward"][name] == 2 * sent["forward"][name] > 0, name


@pytest.mark.parametrize("world_size", [2, 3])
def test_selective_checkpointing_sends_nothing_again(ranks, world_size):
    ranks(world_size).run(checkpointing)


def anomalies(rank: int, world_size: int) -> None:
    """Anomaly detection passes what is right and finds what is not, in a gradient that is a DTensor, too."""
    mesh = sequence_mesh(world_size)
    model = _model(mesh)
    loss, gradients, _ = _step(_model(mesh), mesh)
    with torch.autograd.set_detect_anomaly(True):
        its_loss, its_gradients, _ = _step(model, mesh)
        assert its_loss == loss
        assert all(torch.equal(its_gradients[name], gradient) for name, gradient in gradients.items())
        weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(RuntimeError, match="returned nan values"):
            (weight * torch.nan).sum().backward()


def test_anomaly_detection(ranks):
    ranks(2).run(anomalies)


def saved_as_it_is(rank: int, world_size: int) -> None:
    mesh = sequence_mesh(world_size)
    model = _model(mesh)
    with pytest.raises(pickle.PicklingError, match=r"odysseus_kernels\.save_pretrained\(model, folder\)"):
        torch.save(model, io.BytesIO())
    assert _step(copy.deepcopy(model), mesh)[0] == _step(model, mesh)[0]


def test_torch_save_says_what_saves_a_model(ranks):
    ranks(2).run(saved_as_it_is)


def second_derivative(rank: int, world_size: int) -> None:
    """A penalty on gradients is refused, wherever in the model it begins."""
    mesh = sequence_mesh(world_size)
    for strategy, attention in (("tp", "sdpa"), ("odysseus", "sdpa"), ("tsp", "eager")):
        case = dataclasses.replace(CASE, attention=attention)
        model = ody.parallelize(case.model(), mesh, strategy, OverlapConfig(timeout_s=60))
        for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
            loss = model(**shard_sequence(CASE.whole_batch(), mesh, strategy)).loss
            (gradient,) = torch.autograd.grad(loss, model.get_parameter(name), create_graph=True)
            with pytest.raises(RuntimeError, match="no second derivative"):
                gradient.to_local().square().sum().backward()


def test_second_derivatives_are_refused(ranks):
    if parameters._DROPS_GRAPHS:
        pytest.skip("with this torch the first derivative is refused already")
    ranks(2).run(second_derivative)


def kept_graph(rank: int, world_size: int) -> None:
    """Where torch's DTensors lose how a gradient was made, a penalty on it would be dropped from a loss's."""
    mesh, kept = sequence_mesh(world_size), parameters._DROPS_GRAPHS
    parameters._DROPS_GRAPHS = True
    try:
        for strategy in ("tp", "odysseus"):
            model = ody.parallelize(CASE.model(), mesh, strategy, OverlapConfig(timeout_s=60))
            loss = model(**shard_sequence(CASE.whole_batch(), mesh, strategy)).loss
            weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
            with pytest.raises(RuntimeError, match="a parallelized parameter has no second derivative"):
                torch.autograd.grad(loss, weight, create_graph=True)
            model(**shard_sequence(CASE.whole_batch(), mesh, strategy)).loss.backward()
            assert weight.grad is not None
    finally:
        parameters._DROPS_GRAPHS = kept


def test_graphs_that_torch_would_lose_are_refused(ranks):
    ranks(2).run(kept_graph)


COMPILED = {
    "odysseus": OPERATORS,
    "tsp": ("ring_attention", "zero3_linear"),
    "tsp eager": ("gathered_key_value", "zero3_linear"),
    "ulysses groups": ("pipelined_ulysses", "zero3_linear"),
}


def compiled(rank: int, world_size: int, how: str) -> None:
    torch._dynamo.reset()  # ranks stay: what other tests compiled counts towards the limit of versions of a function
    mesh = sequence_mesh(world_size)
    strategy, _, more = how.partition(" ")
    case = dataclasses.replace(CASE, attention="eager" if more == "eager" else "sdpa")
    settings: dict[str, Any] = {}
    if more == "groups":
        case, settings = dataclasses.replace(case, kv_heads=4), {"pipeline": 2}
    loss, gradients, sent = _step(_model(mesh, strategy, case, **settings), mesh, strategy)
    model = _model(mesh, strategy, case, **settings)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)  # an error where a graph would break
    its_loss, its_gradients, its_sent = _step(model, mesh, strategy)
    assert its_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        # The same operations, some of them decomposed into others: single precision's rounding, a few times over.
        torch.testing.assert_close(its_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert its_sent == sent
    assert graphs
    for graph in graphs:
        called = {str(node.target).removesuffix(".default") for node in graph.graph.nodes}
        assert {f"odysseus.{name}" for name in COMPILED[how]} <= called


@pytest.mark.slow
@pytest.mark.parametrize("how", COMPILED)
def test_layers_compile_without_graph_breaks(ranks, how):
    ranks(2).run(compiled, how)
