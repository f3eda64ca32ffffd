"""What accelerate, and a trainer's data, make of ranks that share sequences: one replica each."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import DataLoaderConfiguration
from trainer_cases import Run, as_torchrun, collate, parallel_model, rows, trainer_mesh

from odysseus_kernels.integrations.accelerator import SequenceAccelerator
from odysseus_kernels.integrations.trainer import Trainer


def over_replicas(rank: int, world_size: int, replicas: int) -> dict[str, Any]:
    """What accelerate gathers of seven rows, and reduces, whatever the number of ranks of each replica."""
    with as_torchrun(rank, world_size):
        accelerator = SequenceAccelerator(trainer_mesh((replicas, 1, world_size // replicas)), cpu=True)
        texts = [f"row {index}" for index in range(7)]
        loader = accelerator.prepare(torch.utils.data.DataLoader(texts, 4 // replicas, collate_fn=list))
        rows, sizes = [], []
        for batch in loader:
            rows += accelerator.gather_for_metrics(batch)
            unequal = [torch.full((int(text[-1]),), 1) for text in batch]
            sizes += [len(one) for one in accelerator.gather_for_metrics(unequal, use_gather_object=True)]
        if replicas > 1:
            with pytest.raises(ValueError, match="input_data: expected tensors, numbers and text"):
                accelerator.gather_for_metrics([random.Random(0)])
        own = {"tokens": torch.tensor([5 + accelerator.replica]), "loss": torch.tensor(float(accelerator.replica))}
        reduced = {name: accelerator.reduce(own, name) for name in ("sum", "max")}
        reduced["mean"] = {"loss": accelerator.reduce(own["loss"], "mean")}
        with pytest.raises(ValueError, match="reduction: expected one of sum, mean, max, none, got 'median'"):
            accelerator.reduce(own, "median")
        triggered = [accelerator.check_trigger()]
        if rank == world_size - 1:  # one rank of a replica alone
            accelerator.set_trigger()
        triggered += [accelerator.check_trigger(), accelerator.check_trigger()]
        return {
            "rows": rows,
            "sizes": sizes,
            "triggered": triggered,
            "reduced": {how: {name: one.item() for name, one in found.items()} for how, found in reduced.items()},
        }


def positions_of_others(rank: int, world_size: int) -> str:
    """What is said about a loader whose position accelerate would set back by the number of processes."""
    configuration = DataLoaderConfiguration()
    configuration.use_stateful_dataloader = True  # its constructor asks for torchdata
    with as_torchrun(rank, world_size), pytest.raises(ValueError, match="SequenceDataLoader") as caught:
        SequenceAccelerator(trainer_mesh((1, 1, world_size)), cpu=True, dataloader_config=configuration)
    return str(caught.value)


def drawn_by_workers(rank: int | None, world_size: int, sizes: tuple[int, int, int], folder: str) -> tuple[float, ...]:
    """The first numbers that a worker of the training data draws; rank None: stock, in one process."""
    run = Run(mesh=sizes)
    with as_torchrun(rank, world_size):
        trainer = (transformers.Trainer if rank is None else Trainer)(
            model=run.case.model() if rank is None else parallel_model(run),
            args=transformers.TrainingArguments(folder, use_cpu=True, report_to="none", dataloader_num_workers=2),
            data_collator=collate,
            train_dataset=rows(8, 0),
        )
        loader = trainer.get_train_dataloader()
        torch.manual_seed(5)  # as torch seeds a worker; workers cannot be started in a daemon
        loader.worker_init_fn(1)
        return random.random(), torch.rand(()).item()
