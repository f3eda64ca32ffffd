"""Runs of transformers' trainers: stock in one process, or with a parallelized model on ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from llama_cases import Case
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.accelerator import SequenceAccelerator
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.integrations.trainer import Trainer, sequence_trainer
from odysseus_kernels.nn.items import num_items_in_batch
from odysseus_kernels.nn.sequence import shard_sequence

VOCABULARY = 120
CASE = Case(kv_heads=4)


@dataclasses.dataclass(frozen=True)
class Run:
    """How a trainer is set up.

    Attributes:
        mesh: sizes of "dp", "ring" and "seq".
        settings: of TrainingArguments, beside those that all runs have.
        own_loss: with a ``compute_loss_func``.
        metrics: with ``compute_metrics`` over what ``preprocess_logits_for_metrics`` leaves.
        packed: rows of two documents each.
        stop_at: step at which training is given up, as if the machine had gone.
        resume: from the last checkpoint in the folder.
        patience: of early stopping, or None.
        adapters: LoRA around a frozen model.
        samples: rows to train on.
        held_out: rows to evaluate.
        long: tokens of every third row to train on, if not 0.
        chosen_for: with ``strategy="auto"``, tokens and machine that it is chosen for.
    """

    mesh: tuple[int, int, int] = (1, 1, 2)
    strategy: str = "odysseus"
    case: Case = CASE
    settings: tuple[tuple[str, Any], ...] = ()
    own_loss: bool = False
    metrics: bool = False
    packed: bool = False
    stop_at: int | None = None
    resume: bool = False
    patience: int | None = None
    adapters: bool = False
    samples: int = 22
    held_out: int = 7
    long: int = 0
    chosen_for: tuple[int, str] | None = None


def rows(count: int, seed: int, packed: bool = False, long: int = 0) -> list[dict[str, list[int]]]:
    """Samples of unequal lengths, some of whose tokens are not predicted."""
    generator = random.Random(seed)
    found = []
    for index in range(count):
        length, start, step = generator.randint(9, 23), generator.randrange(VOCABULARY), generator.choice((3, 7))
        length = 20 if packed else long if long and index % 3 == 0 else length
        ids = [(start + step * position) % VOCABULARY for position in range(length)]
        labels = [-100] * (index % 5) + ids[index % 5 :]
        row = {"input_ids": ids, "labels": labels}
        if packed:
            row["position_ids"] = [*range(7), *range(13)]
            row["labels"][7] = -100
        found.append(row)
    return found


def collate(samples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows padded to the longest, as language modelling collators do it."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": 0, "labels": -100, "position_ids": 0}
    batch = {
        name: torch.tensor([sample[name] + [fill[name]] * (longest - len(sample[name])) for sample in samples])
        for name in samples[0]
    }
    if "position_ids" not in batch:
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def own_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """Focal loss: what a user writes who has read that of the stock model."""
    logits, targets = outputs["logits"][:, :-1].float(), labels[:, 1:]
    logprobs = -torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    total = (-(1 - logprobs.exp()) * logprobs)[targets != -100].sum()
    return total / ((targets != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def best_tokens(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def metrics_of(prediction: Any) -> dict[str, float]:
    """Accuracy, and what shows rows that are missing, twice there or in another order."""
    guesses, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    counted = labels != -100
    order = np.arange(1, len(labels) + 1)[:, None]
    return {
        "accuracy": float((guesses == labels)[counted].mean()),
        "rows": len(labels),
        "order": float((order * np.where(counted, labels, 0)).sum()),
    }


class _GiveUp(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._step:
            control.should_training_stop = True


def trained(run: Run, folder: str, cls: type[Any] = transformers.Trainer, model: Any = None) -> dict[str, Any]:
    """What a trainer logged, and the weights it ended with."""
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        **dict(run.settings),
    }
    callbacks: list[Any] = [_GiveUp(run.stop_at)] if run.stop_at else []
    if run.patience is not None:
        callbacks.append(transformers.EarlyStoppingCallback(run.patience))
    trainer = cls(
        model=whole_model(run) if model is None else model,
        args=transformers.TrainingArguments(folder, **settings),
        data_collator=collate,
        train_dataset=rows(run.samples, 0, run.packed, run.long),
        eval_dataset=rows(run.held_out, 1, run.packed),
        compute_loss_func=own_loss if run.own_loss else None,
        compute_metrics=metrics_of if run.metrics else None,
        preprocess_logits_for_metrics=best_tokens if run.metrics else None,
        callbacks=callbacks,
    )
    # Printed by every run, read by none.
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=run.resume or None)
    history = [{name: value for name, value in entry.items() if _told(name)} for entry in trainer.state.log_history]
    return {
        "history": [entry for entry in history if set(entry) - {"step", "epoch"}],
        "flos": trainer.state.total_flos,
        "tokens": trainer.state.num_input_tokens_seen,
        "batch": trainer.get_total_train_batch_size(trainer.args),
        "evaluation_batches": [
            round(entry["eval_steps_per_second"] * entry["eval_runtime"])
            for entry in trainer.state.log_history
            if "eval_steps_per_second" in entry
        ],
        "best": trainer.state.best_global_step,
        "trainer": trainer,
    }


def _told(name: str) -> bool:
    return not any(part in name for part in ("runtime", "per_second", "preparation", "flos"))


def on_ranks(rank: int, world_size: int, run: Run, folder: str) -> dict[str, Any]:
    """The same with the model parallelized; weights whole on every rank."""
    with as_torchrun(rank, world_size):
        model = parallel_model(run)
        if run.resume:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()  # what is not loaded must show
        had = [model.parallelized.strategy.name] if run.chosen_for is not None else []
        if had:
            model.register_forward_pre_hook(lambda *_: had.append(model.parallelized.strategy.name))
        found = trained(run, folder, Trainer, model)
        weights = {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for name, p in model.named_parameters()
        }
        del found["trainer"]
        return {**found, "weights": weights if rank == 0 else None, "strategies": had}


def in_one_process(run: Run, folder: str, batch_factor: int = 1) -> dict[str, Any]:
    """The stock trainer, with the batches of all replicas."""
    settings = dict(run.settings)
    for name, size in (("per_device_train_batch_size", 2), ("per_device_eval_batch_size", 3)):
        settings[name] = batch_factor * settings.get(name, size)
    with as_torchrun(None, 1):
        found = trained(dataclasses.replace(run, settings=tuple(settings.items())), folder)
    trainer = found.pop("trainer")
    return {**found, "weights": {name: p.detach() for name, p in trainer.model.named_parameters()}}


class FocalTrainer(transformers.Trainer):
    """A user's trainer, which takes loss and logits out of what the model returns for a batch with its labels."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        loss = outputs.loss + own_loss(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss


def own_compute_loss(rank: int | None, world_size: int, folder: str) -> dict[str, Any]:
    """What it logs; rank None: in one process."""
    run = Run(settings=(("eval_strategy", "steps"), ("eval_steps", 2)))
    with as_torchrun(rank, world_size):
        if rank is None:
            found = trained(run, folder, FocalTrainer)
        else:
            found = trained(run, folder, sequence_trainer(FocalTrainer), parallel_model(run))
    return {"history": found["history"]}


def whole_model(run: Run) -> Any:
    """Before anything is parallelized; adapters begin with values that count."""
    model = run.case.model()
    if not run.adapters:
        return model
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def parallel_model(run: Run) -> Any:
    mesh = trainer_mesh(run.mesh)
    wanted: dict[str, Any] = {}
    if run.chosen_for is not None:
        wanted = dict(zip(("sequence_length", "hardware"), run.chosen_for, strict=True))
    model = parallelize(whole_model(run), mesh, run.strategy, OverlapConfig(timeout_s=60), **wanted)
    if run.mesh[0] > 1:
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    return model


@functools.cache
def trainer_mesh(sizes: tuple[int, int, int]) -> Any:
    """Dimensions of size 1 are left out, but for "seq"."""
    named = [(name, size) for name, size in zip(("dp", "ring", "seq"), sizes, strict=True) if size > 1 or name == "seq"]
    return init_device_mesh("cpu", tuple(size for _, size in named), mesh_dim_names=tuple(name for name, _ in named))


@contextlib.contextmanager
def as_torchrun(rank: int | None, world_size: int) -> Iterator[None]:
    """What torchrun tells its processes, and accelerate as if it had not been used before."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    before = {name: os.environ.get(name) for name in names}
    _forget()
    if rank is not None:
        values = (rank, world_size, rank, world_size)
        os.environ.update({name: str(value) for name, value in zip(names, values, strict=True)})
    try:
        yield
    finally:
        _forget()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _forget() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)


def refusals(rank: int, world_size: int, folder: str) -> dict[str, str]:
    """What is said about settings that do not go with a parallelized model."""
    said = {}
    wrong: dict[str, dict[str, Any]] = {
        "neftune_noise_alpha": {"neftune_noise_alpha": 5.0},
        "auto_find_batch_size": {"auto_find_batch_size": True},
        "torch_compile": {"torch_compile": True},
        "bf16_full_eval": {"bf16_full_eval": True},
        "use_liger_kernel": {"use_liger_kernel": True},
        "dispatch_batches": {"accelerator_config": {"dispatch_batches": True}},
    }
    model = parallel_model(Run(mesh=(1, 1, world_size)))
    with as_torchrun(rank, world_size):
        for name, settings in wrong.items():
            with pytest.raises(ValueError, match=name) as caught:
                trained(Run(settings=tuple(settings.items())), folder, Trainer, model)
            said[name] = str(caught.value)
            _forget()
        with pytest.raises(ValueError, match="parallelize") as caught:
            trained(Run(), folder, Trainer, Run().case.model())
        said["stock model"] = str(caught.value)
        _forget()
        accelerator = SequenceAccelerator(trainer_mesh((1, 1, world_size)), cpu=True)
        for name, call in (
            ("save_state", lambda: accelerator.save_state(folder)),
            ("load_state", lambda: accelerator.load_state(folder)),
            ("save_model", lambda: accelerator.save_model(model, folder)),
            ("get_state_dict", lambda: accelerator.get_state_dict(model)),
        ):
            with pytest.raises(RuntimeError, match=f"{name}: expected odysseus_kernels."):
                call()
        with pytest.raises(ValueError, match="expected one that parallelize returned"):
            accelerator.prepare_model(Run().case.model())
        for arguments in ({"mixed_precision": "fp16"}, {"fsdp_plugin": FullyShardedDataParallelPlugin()}):
            _forget()
            with pytest.raises(ValueError, match="MasterWeights|fully_shard"):
                SequenceAccelerator(trainer_mesh((1, 1, world_size)), cpu=True, **arguments)
        _forget()
        with pytest.raises((TypeError, ValueError)) as other:
            trained(Run(), folder, transformers.Trainer, model)
        said["stock trainer"] = str(other.value)
    return said


def accelerated(rank: int | None, world_size: int, replicas: int) -> list[tuple[float, float, float]]:
    """The loop of the documentation: losses, norms and learning rates; rank None: stock, in one process."""
    case, dataset = CASE, rows(16, 3)
    with as_torchrun(rank, world_size):
        if rank is None:
            model, accelerator = case.model(), Accelerator(cpu=True)
        else:
            model = parallel_model(Run(mesh=(replicas, 1, world_size // replicas), strategy="tp_sp"))
            accelerator = SequenceAccelerator(trainer_mesh((replicas, 1, world_size // replicas)), cpu=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        steps = 1 if rank is not None else replicas  # of the scheduler: one for each replica
        loader = torch.utils.data.DataLoader(dataset, 4 if rank is None else 4 // replicas, collate_fn=collate)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        history = []
        for batch in loader:
            items = None if rank is None else num_items_in_batch(batch, accelerator.mesh)
            inputs = batch if rank is None else {**shard_sequence(batch, model), "num_items_in_batch": items}
            loss = model(**inputs).loss
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            for _ in range(steps):
                scheduler.step()
            optimizer.zero_grad()
            history.append((accelerator.gather(loss.detach()).mean().item(), norm.item(), scheduler.get_last_lr()[0]))
        return history
