"""Runs of TRL's SFTTrainer on text: stock in one process, or with a parallelized model on ranks."""

from __future__ import annotations

import dataclasses
import random
import warnings
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from trainer_cases import CASE, VOCABULARY, Run, as_torchrun, parallel_model
from transformers import PreTrainedTokenizerFast, PrinterCallback

from odysseus_kernels.integrations.trainer import sequence_trainer

_PAD, _END = VOCABULARY - 2, VOCABULARY - 1


@dataclasses.dataclass(frozen=True)
class SFT:
    """A run: sizes of "dp", "ring" and "seq", the strategy, and settings of SFTConfig."""

    mesh: tuple[int, int, int] = (1, 1, 2)
    strategy: str = "odysseus"
    settings: tuple[tuple[str, Any], ...] = ()


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are numbers."""
    words = {str(number): number for number in range(_PAD)} | {"<pad>": _PAD, "<end>": _END}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def text(count: int) -> Dataset:
    """Prompts and completions."""
    generator = random.Random(5)
    rows = []
    for _ in range(count):
        start, length = generator.randrange(_PAD), generator.randint(9, 21)
        words = [str((start + 7 * position) % _PAD) for position in range(length)]
        rows.append({"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])})
    return Dataset.from_list(rows)


def tuned(run: SFT, folder: str, cls: type[Any] = trl.SFTTrainer, model: Any = None) -> list[dict[str, float]]:
    """What the trainer logged."""
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "max_length": 24,
        **dict(run.settings),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL plans to change
        trainer = cls(
            model=CASE.model() if model is None else model,
            args=trl.SFTConfig(folder, **settings),
            train_dataset=text(12),
            eval_dataset=text(5),
            processing_class=tokenizer(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    kept = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "eval_loss", "eval_entropy")
    return [{name: entry[name] for name in kept if name in entry} for entry in trainer.state.log_history]


def on_ranks(rank: int, world_size: int, run: SFT, folder: str) -> list[dict[str, float]]:
    """The same with the model parallelized."""
    with as_torchrun(rank, world_size):
        model = parallel_model(Run(mesh=run.mesh, strategy=run.strategy))
        return tuned(run, folder, sequence_trainer(trl.SFTTrainer), model)


def in_one_process(run: SFT, folder: str) -> list[dict[str, float]]:
    with as_torchrun(None, 1), torch.random.fork_rng():
        return tuned(run, folder)
