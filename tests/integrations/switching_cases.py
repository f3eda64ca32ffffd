"""Models that change their strategy between steps, beside those that have it from the start."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from family_cases import DATA_PARALLEL, Case, data_mesh, make_mesh, parallel_model, whole
from torch.distributed.tensor import DTensor

import odysseus_kernels as ody

Optimizers = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "MasterWeights": lambda model: ody.MasterWeights(torch.optim.AdamW, model.parameters(), lr=1e-2),
}


def step(model: Any, case: Case, optimizer: torch.optim.Optimizer) -> float:
    """The loss of a step."""
    loss = model(**ody.shard_sequence(case.whole_batch(), model)).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def state_of(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and what the optimizer keeps, this rank's parts and whole."""
    found = {}
    for name, parameter in model.named_parameters():
        for key, tensor in {"parameter": parameter, **optimizer.state[parameter]}.items():
            if isinstance(tensor, DTensor):
                found[f"{name} {key} here"] = tensor.to_local().detach().clone()
            found[f"{name} {key}"] = whole(tensor).detach().clone()
    return found


def moves_to_the_bit(
    rank: int, world_size: int, case: Case, ring: int, optimizer: str, order: list[str]
) -> dict[str, int]:
    """A model that goes through ``order`` beside one that is made for each, with the same weights and state.

    Returns the bytes that this rank got at each change.
    """
    mesh, moved = make_mesh(world_size, ring), {}
    model = parallel_model(case, order[0], mesh)
    optimizing = Optimizers[optimizer](model)
    kept = {name: id(parameter) for name, parameter in model.named_parameters()}
    step(model, case, optimizing)
    for before, after in itertools.pairwise(order):
        start = {name: tensor for name, tensor in state_of(model, optimizing).items() if not name.endswith("here")}
        with ody.CommRecorder() as record:
            received = moved[f"{before} to {after}"] = ody.set_strategy(model, after, optimizer=optimizing)
        assert record.bytes() == received + world_size - 1, "and a byte by which ranks agree"
        assert {name: id(parameter) for name, parameter in model.named_parameters()} == kept, "the same objects"
        fresh = parallel_model(case, after, mesh)
        other = Optimizers[optimizer](fresh)
        step(fresh, case, other)  # makes state, and parameters are then set
        with torch.no_grad():
            for name, parameter in fresh.named_parameters():
                for key, tensor in {"parameter": parameter, **other.state[parameter]}.items():
                    value = start[f"{name} {key}"]
                    if isinstance(tensor, DTensor):
                        value = torch.distributed.tensor.distribute_tensor(
                            value, tensor.device_mesh, tensor.placements, src_data_rank=None
                        )
                    tensor.copy_(value)
        _same(state_of(model, optimizing), state_of(fresh, other), after)
        for number in range(2):
            assert step(model, case, optimizing) == step(fresh, case, other), f"{before} to {after}, step {number}"
        _same(state_of(model, optimizing), state_of(fresh, other), after)
        for ours, new in zip(model.modules(), fresh.modules(), strict=True):
            assert type(ours) is type(new)
    return moved


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    assert found.keys() == expected.keys(), where
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{where}: {different}"


def checkpointed_and_copied(rank: int, world_size: int) -> None:
    """A copy has its own strategy; recomputed layers and frozen parameters go along."""
    case = Case(kv_heads=4)
    mesh = make_mesh(world_size, 1)
    model = parallel_model(case, "tp_sp", mesh)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.model.embed_tokens.weight.requires_grad_(False)
    twin = copy.deepcopy(model)
    twin.set_strategy("ulysses")
    assert not twin.model.embed_tokens.weight.requires_grad and twin.lm_head.weight.requires_grad
    assert type(twin.model.layers[0].mlp) is not type(model.model.layers[0].mlp)
    losses = []
    for one, cut_for in ((model, "tp_sp"), (twin, "ulysses")):
        loss = one(**ody.shard_sequence(case.whole_batch(), mesh, cut_for)).loss
        loss.backward()
        losses.append(loss.item())
        assert one.model.embed_tokens.weight.grad is None
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def refusals(rank: int, world_size: int) -> None:
    """Nothing is changed where something is refused."""
    case = Case(kv_heads=4)
    mesh = make_mesh(world_size, 1)
    model = parallel_model(case, "odysseus", mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = ody.shard_sequence(case.whole_batch(), mesh)
    loss = model(**batch).loss
    expected = loss.item()

    def refused(match: str, strategy: str = "tsp", **arguments: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ody.set_strategy(model, strategy, **arguments)

    refused(r"strategy: expected one of \['odysseus', .*\], got 'ring'", "ring")
    with pytest.raises(ValueError, match="expected one that parallelize returned, got LlamaForCausalLM"):
        ody.set_strategy(case.model(), "tp")
    with ody.step(model):
        refused("expected a call between steps")
    loss.backward()
    refused("embed_tokens.weight: expected no gradient, got one that is cut for strategy 'odysseus'")
    optimizer.zero_grad()
    stranger = torch.nn.Parameter(torch.zeros(3))
    refused(r"expected parameters of the model, got another one of shape \[3\]", optimizer=torch.optim.SGD([stranger]))
    weight = model.lm_head.weight
    for value, got in ((torch.zeros(4, 2), r"\[4, 2\] as row"), ([torch.zeros(1)], "list as row")):
        optimizer.state[weight]["row"] = value
        refused(rf"expected state as DTensors .* \[120, 96\] or numbers, got {got} of lm_head", optimizer=optimizer)
    del optimizer.state[weight]["row"]
    model.config.residual_dropout = 0.1
    refused("residual_dropout: expected 0 with strategy 'tp'", "tp")
    model.config.residual_dropout = 0
    hook = model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    refused("layers.0.mlp.up_proj: expected a layer without hooks")
    hook.remove()
    with pytest.raises(ody.RankMismatchError, match="set_strategy"):
        ody.set_strategy(model, "tsp" if rank else "ulysses")
    assert model(**batch).loss.item() == expected, "as before"
    # Outputs of a strategy that the model no longer has.
    loss, logits = model(**batch).loss, model(input_ids=batch["input_ids"], sequence_cut=batch["sequence_cut"]).logits
    ody.set_strategy(model, "tp")
    for value in (loss, loss * 2, logits.sum()):
        with pytest.raises(ValueError, match="expected outputs of the strategy that the model has now"):
            value.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    # A batch that was cut for it.
    with pytest.raises(ValueError, match="this batch was cut"):
        model(**batch)
    assert model(**ody.shard_sequence(case.whole_batch(), model)).loss.item() == pytest.approx(expected, rel=1e-6)


def refusal(model: Any, strategy: str, **arguments: Any) -> str:
    """The text of the error."""
    try:
        ody.set_strategy(model, strategy, **arguments)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def an_optimizer_that_was_left_out(rank: int, world_size: int) -> tuple[list[float], list[float], int]:
    """Losses with and without it, and the bytes that it is brought along with later."""
    case, mesh = Case(kv_heads=4), make_mesh(world_size, 1)
    model, other = (parallel_model(case, "ulysses", mesh) for _ in range(2))
    optimizer, given = (Optimizers["AdamW"](one) for one in (model, other))
    losses, expected = [step(model, case, optimizer)], [step(other, case, given)]
    ody.set_strategy(model, "tsp")
    ody.set_strategy(other, "tsp", optimizer=given)
    losses += [step(model, case, optimizer)]
    received = ody.set_strategy(model, "tsp", optimizer=optimizer)
    expected += [step(other, case, given)]
    for one, optimizing, found in ((model, optimizer, losses), (other, given, expected)):
        found += [step(one, case, optimizing) for _ in range(2)]
    _same(state_of(model, optimizer), state_of(other, given), "brought along")
    return losses, expected, received


def beside_data_parallelism(rank: int, world_size: int) -> list[str]:
    """The refusal of each wrapper."""
    mesh = data_mesh((2, 1, 2))
    models = [wrap(parallel_model(Case(kv_heads=4), "odysseus", mesh), mesh) for wrap in DATA_PARALLEL.values()]
    return [refusal(model, "ulysses") for model in models]


def sizes_that_do_not_divide(rank: int, world_size: int) -> str:
    """Six heads on four ranks: one ring can have them, head parallelism cannot."""
    case = Case(kv_heads=2, changes=(("num_attention_heads", 6), ("head_dim", 16)))
    model = parallel_model(case, "tsp", make_mesh(world_size, 1))
    before = model(**ody.shard_sequence(case.whole_batch(), model)).loss.item()
    text = refusal(model, "ulysses")
    assert model(**ody.shard_sequence(case.whole_batch(), model)).loss.item() == before
    return text


def compiled_and_saved(rank: int, world_size: int, folder: str) -> None:
    """Compiled layers are compiled again; a checkpoint from before a change is loaded after it."""
    case, mesh = Case(kv_heads=4), make_mesh(world_size, 1)
    model, fresh = (parallel_model(case, strategy, mesh) for strategy in ("odysseus", "tp_sp"))
    optimizer, other = (Optimizers["AdamW"](one) for one in (model, fresh))
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    step(model, case, optimizer)
    ody.save_checkpoint(folder, model, optimizer)
    ody.load_checkpoint(folder, fresh, other)
    ody.set_strategy(model, "tp_sp", optimizer=optimizer)
    losses = [
        [step(one, case, optimizing) for _ in range(2)] for one, optimizing in ((model, optimizer), (fresh, other))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    ody.load_checkpoint(folder, model, optimizer)
    assert step(model, case, optimizer) == pytest.approx(losses[1][0], rel=1e-6)
