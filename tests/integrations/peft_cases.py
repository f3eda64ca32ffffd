"""Tiny models with PEFT's adapters, stock in this process or parallelized on ranks, on the same batch."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from family_cases import Case, make_mesh, parallel_model, whole
from peft import (
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora.layer import LoraLayer

import odysseus_kernels as ody
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.config import OverlapConfig

RANK = 4
CASE = Case(kv_heads=4, length=12)
# Eight halves of four ranks divide it: nothing is padded.
LONG = Case(kv_heads=4)
TIMEOUT_S = 20.0


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with adapters.

    Attributes:
        case: the stock model and its batch.
        settings: of LoraConfig, beyond rank and targets.
        second: whether there is a second adapter, active beside the first.
    """

    case: Case = CASE
    settings: tuple[tuple[str, Any], ...] = ()
    second: bool = False

    def config(self, **changes: Any) -> LoraConfig:
        given = {"r": RANK, "lora_alpha": 8, "target_modules": "all-linear", **dict(self.settings), **changes}
        return LoraConfig(task_type="CAUSAL_LM", **given)

    def put_on(self, model: Any, seed: int = 3) -> Any:
        """A PEFT model around ``model``, with values that differ from zero and depend on ``seed``."""
        adapted = get_peft_model(model, self.config())
        if self.second:
            adapted.add_adapter("second", self.config(r=2, use_rslora=True, target_modules=["v_proj", "down_proj"]))
            adapted.base_model.set_adapter(["default", "second"])
        fill(adapted, seed)
        return adapted.train()

    def stock(self) -> Any:
        return self.put_on(self.case.model())

    def before(self, strategy: str, mesh: Any, **settings: Any) -> Any:
        return ody.parallelize(self.stock(), mesh, strategy, OverlapConfig(timeout_s=TIMEOUT_S, **settings))

    def after(self, strategy: str, mesh: Any, seed: int = 3, **settings: Any) -> Any:
        """The adapters come afterwards."""
        model = parallel_model(self.case, strategy, mesh, **{"timeout_s": TIMEOUT_S, **settings})
        return self.put_on(model, seed)


def fill(model: Any, seed: int) -> None:
    """Random adapters: PEFT starts with B = 0, whose A has no gradient."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def step(model: Any, batch: dict[str, torch.Tensor], case: Case = CASE) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and whole gradients."""
    with case.autocast():
        loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@functools.lru_cache(maxsize=32)
def stock_step(adapted: Adapted) -> tuple[float, dict[str, torch.Tensor]]:
    """The same of one process."""
    return step(adapted.stock(), adapted.case.whole_batch(), adapted.case)


CASES = {
    "llama": Adapted(Case(kv_heads=4)),
    "one head of keys": Adapted(Case(kv_heads=1, padding_mask=True)),
    "biases, plain network": Adapted(Case(family="starcoder2", length=12), (("lora_bias", True),)),
    "two adapters": Adapted(second=True),
    "some projections": Adapted(CASE, (("target_modules", ("q_proj", "o_proj", "up_proj")), ("use_rslora", True))),
}

# Adapters that come after parallelize are then the same ones.
WHEN = {"llama": ("before", "after"), "two adapters": ("after",)}


def steps(
    rank: int, world: int, strategy: str, ring: int, names: list[str], settings: dict[str, Any]
) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Each case with adapters put on before and after parallelize; afterwards each rank draws other values."""
    mesh, found = make_mesh(world, ring), {}
    for name in names:
        adapted = CASES[name]
        for when in WHEN.get(name, ("before",)):
            make: Any = adapted.before if when == "before" else functools.partial(adapted.after, seed=3 + rank)
            model = make(strategy, mesh, **settings)
            found[f"{name}, {when}"] = step(model, ody.shard_sequence(adapted.case.whole_batch(), model), adapted.case)
            for parameter_name, parameter in model.named_parameters():
                assert parameter.requires_grad == ("lora_" in parameter_name), parameter_name
    return found


def recomputed(rank: int, world: int, strategy: str) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Steps in which layers are computed again in backward: whole ones, and what lies between operators."""
    found = []
    for extra in ({}, {"context_fn": ody.selective_checkpoint}):
        model = Adapted().before(strategy, make_mesh(world, 1))
        model.gradient_checkpointing_enable({"use_reentrant": False, **extra})
        found.append(step(model, ody.shard_sequence(CASE.whole_batch(), model)))
    return found


def traffic_of_a_layer(rank: int, world: int, strategy: str, ring: int) -> tuple[Counter[Any], dict[str, int]]:
    """Bytes of one more decoder layer in a step, by phase, operator and collective; what was sent ahead."""
    counts: list[Counter[Any]] = []
    for layers in (1, 2):
        case = dataclasses.replace(LONG, changes=(("num_hidden_layers", layers),))
        model = Adapted(case).before(strategy, make_mesh(world, ring))
        batch = ody.shard_sequence(case.whole_batch(), model)
        with CommRecorder() as record:
            model(**batch).loss.backward()
        rows = record.rows()
        counts.append(Counter({(r["phase"], r["operator"], r["collective"]): r["bytes"] for r in rows}))
    counts[1].subtract(counts[0])
    return Counter({key: count for key, count in counts[1].items() if count}), record.ahead()


def changes(rank: int, world: int, strategy: str) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """What is done to adapters between steps, as :func:`stock_changes` does it."""
    mesh = make_mesh(world, 1)
    model = Adapted(second=True).before(strategy, mesh)
    return _changes(model, ody.shard_sequence(CASE.whole_batch(), model))


@functools.cache
def stock_changes() -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    return _changes(Adapted(second=True).stock(), CASE.whole_batch())


def _changes(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    found = {}

    def now(name: str) -> None:
        model.zero_grad()
        found[name] = step(model, batch) if any(p.requires_grad for p in model.parameters()) else (_loss(model), {})

    def _loss(model: Any) -> float:
        with torch.no_grad():
            return model(**batch, use_cache=False).loss.item()

    model.set_adapter("second")
    now("one of two")
    with model.disable_adapter():
        found["disabled"] = (_loss(model), {})
    model.set_adapter("default")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.5)
    now("another scale")
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "both", combination_type="cat")
    model.set_adapter("both")
    now("a weighted sum")
    model.set_adapter("default")
    model.merge_adapter()
    found["merged"] = (_loss(model), {})
    model.unmerge_adapter()
    now("unmerged")
    plain = model.merge_and_unload()
    with torch.no_grad():
        found["unloaded"] = (plain(**batch, use_cache=False).loss.item(), {})
    return found


def train(model: Any, batch: dict[str, torch.Tensor], optimizer: Any, count: int) -> list[float]:
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        ody.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        losses.append(loss.item())
    return losses


def adapters_alone(model: Any) -> list[torch.Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def saved_and_resumed(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Trains, saves, loads into another strategy by both ways, and goes on."""
    mesh, path = make_mesh(world, 1), Path(folder)
    model = Adapted().after("odysseus", mesh, seed=3 + rank)
    # Made before the first forward, which gives the adapters the first rank's values.
    optimizer = torch.optim.AdamW(adapters_alone(model), lr=1e-2)
    batch = ody.shard_sequence(CASE.whole_batch(), model)
    losses = train(model, batch, optimizer, 2)
    ody.save_checkpoint(path / "checkpoint", model, optimizer)
    ody.save_pretrained(model, path / "adapter")
    state = {name: whole(t).clone() for name, t in get_peft_model_state_dict(model).items()}
    losses_on = train(model, batch, optimizer, 2)

    again = Adapted().before("odysseus", mesh)
    resumed = torch.optim.AdamW(adapters_alone(again), lr=1e-2)
    ody.load_checkpoint(path / "checkpoint", again, resumed)
    losses_resumed = train(again, batch, resumed, 2)
    last = [torch.equal(a, b) for a, b in zip(adapters_alone(model), adapters_alone(again), strict=True)]

    other = Adapted().before("tp_sp", mesh)
    ody.load_pretrained(other, path / "adapter")
    loaded = {name: torch.equal(whole(t), state[name]) for name, t in get_peft_model_state_dict(other).items()}
    stock_loader = PeftModel.from_pretrained(parallel_model(CASE, "ulysses", mesh), path / "adapter", is_trainable=True)
    loss_loaded = step(stock_loader, ody.shard_sequence(CASE.whole_batch(), stock_loader))[0]
    said = ""
    try:
        ody.load_pretrained(other, path)
    except ValueError as error:
        said = str(error)
    return {
        "losses": losses,
        "on": losses_on,
        "resumed": losses_resumed,
        "bit-equal": all(last),
        "loaded": loaded,
        "loss_loaded": loss_loaded,
        "state": state,
        "said": said,
    }


# PEFT itself stops at the norm of a distributed weight, before this package is asked.
OTHERWISE = {
    "DoRA, after": "got mixed torch.Tensor and DTensor",
    "IA3, after": "layers.0.self_attn.k_proj: expected a stock Linear, got peft.tuners.ia3.layer.Linear",
}


def _dropped(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)


def _hook_on_a(model: Any) -> None:
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_A["default"].register_forward_hook(lambda _, __, output: output * 2)


def _hook_on_the_wrapper(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, output: output * 2)


def _hook_on_the_base(model: Any) -> None:
    model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: None)


def _merged_and_disabled(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def _own_a(model: Any) -> None:
    layer = model.get_base_model().model.layers[1].mlp.up_proj
    layer.lora_A["default"] = torch.nn.Sequential(layer.lora_A["default"])


# What is done to a parallelized model with adapters, and what its next step says.
MISUSED = {
    "a hook on A": (_hook_on_a, "layers.1.mlp.up_proj.lora_A.default: expected a layer without hooks"),
    "a hook on the wrapper": (_hook_on_the_wrapper, "layers.0.self_attn.q_proj: expected a layer without hooks"),
    "a hook on the base": (_hook_on_the_base, "layers.0.self_attn.q_proj.base_layer: expected a layer without hooks"),
    "merged and disabled": (_merged_and_disabled, "expected adapters that are disabled or merged, got both"),
    "another A": (_own_a, "layers.1.mlp.up_proj.lora_A.default: expected a stock Linear, got"),
}


def _config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


# What cannot be served, before or after parallelize.
UNSERVED: dict[str, tuple[Any, str]] = {
    "DoRA": (lambda: _config(use_dora=True), "q_proj: expected plain LoRA, got the variant Dora"),
    "a head": (lambda: _config(target_modules=["lm_head", "q_proj"]), "lm_head: expected LoRA adapters of attention"),
    "an embedding": (lambda: _config(target_modules=["embed_tokens"]), "embed_tokens: expected LoRA adapters of"),
    "modules to save": (lambda: _config(modules_to_save=["norm"]), "norm: expected a stock module, got one that"),
    "a head to save": (lambda: _config(modules_to_save=["lm_head"]), "lm_head: expected a stock module, got one that"),
    "IA3": (
        lambda: IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
        "expected LoRA adapters, got IA3 as adapter 'default'",
    ),
}


def refused(rank: int, world: int) -> dict[str, str]:
    """What is said of each, by parallelize or by the first forward."""
    mesh, said = make_mesh(world, 1), {}
    batch = ody.shard_sequence(CASE.whole_batch(), mesh)
    config = OverlapConfig(timeout_s=TIMEOUT_S)

    def attempt(name: str, make: Any) -> None:
        try:
            step(make(), batch)
        except (ValueError, RuntimeError) as error:
            said[name] = str(error)

    def before(make_config: Any) -> Any:
        return ody.parallelize(get_peft_model(CASE.model(), make_config()), mesh, config=config)

    def after(make_config: Any) -> Any:
        return get_peft_model(parallel_model(CASE, "odysseus", mesh, timeout_s=TIMEOUT_S), make_config())

    def changed(change: Any) -> Any:
        model = Adapted().before("odysseus", mesh)
        change(model)
        return model

    for name, (make_config, _) in {**UNSERVED, "prompts": (_prompts, "")}.items():
        attempt(f"{name}, before", functools.partial(before, make_config))
        attempt(f"{name}, after", functools.partial(after, make_config))
    for name, (change, _) in MISUSED.items():
        attempt(name, functools.partial(changed, change))
    dropped = Adapted().before("tp", mesh)
    _dropped(dropped)
    try:
        step(dropped, ody.shard_sequence(CASE.whole_batch(), dropped))
    except ValueError as error:
        said["dropout"] = str(error)
    dropped.eval()
    said["dropout at evaluation"] = str(step(dropped, ody.shard_sequence(CASE.whole_batch(), dropped))[0])
    try:
        ody.save_pretrained(Adapted().before("tp", mesh).get_base_model(), "/nonexistent")
    except ValueError as error:
        said["saving"] = str(error)
    return said


def _prompts() -> PromptTuningConfig:
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


def drops(rank: int, world: int, strategy: str) -> tuple[list[float], float]:
    """Losses with adapters' dropout in training, and without."""
    torch.manual_seed(rank)
    model = Adapted().before(strategy, make_mesh(world, 1))
    _dropped(model)
    batch = ody.shard_sequence(CASE.whole_batch(), model)
    losses = [step(model.train(), batch)[0] for _ in range(2)]
    return losses, step(model.eval(), batch)[0]


def address_taken_again(rank: int, world: int) -> tuple[bool, float]:
    """A parameter in the place of another: whether it has that one's address, on the last rank alone; its value later.

    A value is the rank's number at first, and should become the first rank's.
    """
    model = Adapted().before("odysseus", make_mesh(world, 1))
    layer = next(module.lora_A["default"] for module in model.modules() if hasattr(module, "lora_A"))
    batch = ody.shard_sequence(CASE.whole_batch(), model)
    model(**batch)
    kept = layer.weight if rank == 0 else None  # while it lives, nothing has its address
    shape, address = layer.weight.shape, id(layer.weight)
    del layer.weight
    gc.collect()
    tried = []
    for _ in range(10_000):
        tried.append(torch.nn.Parameter(torch.full(shape, float(rank))))
        if id(tried[-1]) == address:
            break
    layer.weight = tried[-1]
    model(**batch)
    assert rank or kept is not layer.weight
    return id(layer.weight) == address, layer.weight.max().item()
