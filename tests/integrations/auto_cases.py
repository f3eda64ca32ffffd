"""Models whose strategy is chosen for a length: on ranks of one opinion or of several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from family_cases import Case, data_mesh, make_mesh, whole

import odysseus_kernels as ody
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.step import stepped
from odysseus_kernels.planner.planning.choice import on_mesh
from odysseus_kernels.planner.planning.plan import SplitPlan
from odysseus_kernels.strategies import STRATEGIES

CASE = Case(kv_heads=4)
TIMEOUT_S = 20.0


def parallel(case: Case, mesh: Any, **wanted: Any) -> Any:
    """A model of ``strategy="auto"``."""
    return ody.parallelize(case.model(), mesh, "auto", OverlapConfig(timeout_s=TIMEOUT_S), **wanted)


def predicted(case: Case, sizes: dict[str, int], length: int, hardware: str, batch: int = 1) -> dict[str, float]:
    """Seconds of a step by strategy, as one rank predicts them; those that are possible."""
    found = on_mesh(
        case.model().config, **sizes, seq_len=length, hardware=hardware, batch=batch, dtype="float32",
        strategies=tuple(STRATEGIES),
    )  # fmt: skip
    return {name: one.seconds.step for name, one in found.items() if isinstance(one, SplitPlan)}


def name_of(model: Any) -> str:
    """The strategy that it has."""
    return stepped(model).parallelized.strategy.name


def chosen(rank: int, world: int, machines: list[str], length: int, ring: int) -> tuple[str, str, float]:
    """Strategy, explanation and loss where each rank believes to be another machine."""
    model = parallel(CASE, make_mesh(world, ring), sequence_length=length, batch_size=2, hardware=machines[rank])
    loss = model(**ody.shard_sequence(CASE.whole_batch(), model)).loss
    return name_of(model), ody.explain(model), loss.item()


def of_replicas(rank: int, world: int, lengths: list[int], hardware: str) -> tuple[str, str]:
    """Strategy and explanation where each replica has batches of another length."""
    mesh = data_mesh((2, 1, world // 2))
    length = lengths[mesh.get_local_rank("dp")]
    model = parallel(CASE, mesh, sequence_length=length, hardware=hardware)
    return name_of(model), ody.explain(model)


ROWS = 8


def batches(lengths: list[int]) -> list[dict[str, torch.Tensor]]:
    """A batch of each length."""
    generator, found = torch.Generator().manual_seed(5), []
    for length in lengths:
        ids = torch.randint(CASE.vocabulary, (ROWS, length), generator=generator)
        labels = ids.clone()
        labels[:, : length // 3] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


def trained(rank: int, world: int, lengths: list[int], hardware: str, ring: int) -> dict[str, Any]:
    """Losses, strategies and bytes moved of a step with each length; weights at the end."""
    mesh = make_mesh(world, ring)
    model = parallel(CASE, mesh, sequence_length=lengths[0], batch_size=ROWS, hardware=hardware)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: dict[str, Any] = {"losses": [], "strategies": [], "moved": []}
    for batch in batches(lengths):
        length = batch["input_ids"].shape[1]
        found["moved"].append(model.set_strategy("auto", sequence_length=length, optimizer=optimizer))
        loss = model(**ody.shard_sequence(batch, model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(loss.item())
        found["strategies"].append(name_of(model))
    found["weights"] = {name: whole(p).detach().clone() for name, p in model.named_parameters()}
    return found


def trained_stock(given: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A step with each batch in one process."""
    model, losses = CASE.model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for batch in given:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "weights": {name: p.detach() for name, p in model.named_parameters()}}


def between_equal_cuts(rank: int, world: int, wanted: list[dict[str, Any]]) -> list[tuple[str, int, float]]:
    """From Odysseus on: the strategy, the bytes moved and the loss of a step, for each thing that is wanted."""
    model, found = ody.parallelize(CASE.model(), make_mesh(world, 1), "odysseus"), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for one in wanted:
        moved = ody.set_strategy(model, "auto", optimizer=optimizer, **one)
        loss = model(**ody.shard_sequence(CASE.whole_batch(), model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append((name_of(model), moved, loss.item()))
    return found


def heads_that_do_not_divide(rank: int, world: int) -> tuple[str, str, float]:
    """Six heads on four ranks."""
    case = Case(kv_heads=2, changes=(("num_attention_heads", 6), ("head_dim", 16)))
    model = parallel(case, make_mesh(world, 1), sequence_length=24)
    name = name_of(model)
    assert model.set_strategy("auto", sequence_length=48) == 0
    assert name_of(model) == name
    return name, ody.explain(model), model(**ody.shard_sequence(case.whole_batch(), model)).loss.item()


def refusals(rank: int, world: int) -> None:
    """What is said, and that nothing is changed."""
    mesh = make_mesh(world, 1)
    for match, strategy, wanted in (
        ('sequence_length: expected the tokens of each sequence beside strategy="auto"', "auto", {}),
        ("sequence_length: expected a whole number above 0, got 0", "auto", {"sequence_length": 0}),
        ("sequence_length: expected a whole number above 0, got True", "auto", {"sequence_length": True}),
        ("batch_size: expected a whole number above 0, got 1.5", "auto", {"sequence_length": 8, "batch_size": 1.5}),
        ("hardware: expected one of a100-nvlink", "auto", {"sequence_length": 8, "hardware": "abacus"}),
        ("hardware: expected a machine's name, got 3", "auto", {"sequence_length": 8, "hardware": 3}),
        ("sequence_length: expected None beside a strategy that is named, got 8", "tp", {"sequence_length": 8}),
        ("strategy: expected one of .*, got 'ring'", "ring", {}),
    ):
        with pytest.raises(ValueError, match=match):
            ody.parallelize(CASE.model(), mesh, strategy, **wanted)
        model = ody.parallelize(CASE.model(), mesh)
        with pytest.raises(ValueError, match=match):
            ody.set_strategy(model, strategy, **wanted)
        assert name_of(model) == "odysseus"
    with pytest.raises(ody.RankMismatchError, match="choose_strategy"):
        parallel(CASE, mesh, sequence_length=24 + 8 * rank)
    with pytest.raises(ody.RankMismatchError, match="set_strategy|choose_strategy"):
        model.set_strategy(*(("auto",) if rank else ("tsp",)), **({"sequence_length": 24} if rank else {}))
    assert name_of(model) == "odysseus"
    stranger = Case(kv_heads=4, changes=(("num_attention_heads", 12), ("intermediate_size", 143)))
    with pytest.raises(ValueError, match='one of them can have beside "auto": .*tp: .*143'):
        parallel(stranger, mesh, sequence_length=24)


def adapted(rank: int, world: int, hardware: str, length: int) -> tuple[str, str, str]:
    """Adapters with dropout, which one strategy cannot have; they keep the strategy that was chosen for them."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(CASE.model(), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    model = ody.parallelize(model, make_mesh(world, 1), "auto", sequence_length=length, hardware=hardware)
    try:
        ody.set_strategy(model, "auto", sequence_length=length)
    except ValueError as error:
        return name_of(model), ody.explain(model), str(error)
    return name_of(model), ody.explain(model), "nothing was refused"
