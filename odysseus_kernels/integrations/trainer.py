"""transformers' Trainer, and trainers that derive from it, for parallelized models.

Datasets, collators, losses and metrics are those of the stock trainer and see whole batches; each batch is cut where
the model is called.  Only what the stock trainer cannot know is replaced here: which ranks share their batches, how
the tokens of a step are counted, which strategy a step has, and how state that is distributed is saved.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import trainer_pt_utils

from odysseus_kernels.errors import FallbackWarning
from odysseus_kernels.floors import require
from odysseus_kernels.integrations.accelerator import SequenceAccelerator
from odysseus_kernels.integrations.checkpoint import load_checkpoint, save_checkpoint
from odysseus_kernels.integrations.choosing import AUTO
from odysseus_kernels.integrations.pretrained import load_pretrained, save_pretrained
from odysseus_kernels.integrations.switching import set_strategy, why_fixed
from odysseus_kernels.integrations.whole import WholeBatches
from odysseus_kernels.nn.items import num_items_in_batch
from odysseus_kernels.nn.loss import IGNORE_INDEX
from odysseus_kernels.nn.step import Stepped, sequence_group_of, stepped

__all__ = ["SequenceTrainer", "Trainer", "sequence_trainer"]

# Beside the stock files of a trainer's checkpoint.
_STATE = "sequence_state"
_SCHEDULER = "scheduler.pt"
_STOCK_OPTIMIZER = "optimizer.pt"
_ARGUMENTS = "training_args.bin"
# Deals batches out to processes by itself; newer versions of transformers have it.
_DEALER: Any = getattr(trainer_pt_utils, "BatchRebalanceSampler", ())
# Settings that a parallelized model would follow wrongly, with what each would do.
_REFUSED = (
    ("fsdp", "it would wrap the model again; use fully_shard(layer, mesh=mesh['dp']) before"),
    ("deepspeed", "it would wrap the model again"),
    ("parallelism_config", "the model's mesh says which ranks share sequences"),
    ("neftune_noise_alpha", "its noise would follow the length of this rank's part"),
    ("use_liger_kernel", "it replaces forwards that a parallelized model does not call"),
    ("auto_find_batch_size", "one rank that runs out of memory would go on alone with smaller batches"),
    ("torch_compile", "compile the layers: for layer in model.model.layers: layer.compile()"),
    ("fp16", "each rank would keep a loss scale by the gradients of its own shards; use bf16"),
    ("fp16_full_eval", "it converts the distributed parameters for good; load the model in fp16"),
    ("bf16_full_eval", "it converts the distributed parameters for good; use bf16, or load the model in bf16"),
)


class SequenceTrainer:
    """What :class:`Trainer` adds; goes before a trainer class of transformers or TRL (:func:`sequence_trainer`)."""

    model: Any
    args: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def __init__(self, *arguments: Any, **named: Any) -> None:
        model = named.get("model", arguments[0] if arguments else None)
        if not isinstance(model, torch.nn.Module) or not any(isinstance(part, Stepped) for part in model.modules()):
            raise ValueError(
                f"model: expected what parallelize returned, got {type(model).__name__}: "
                f"model = odysseus_kernels.parallelize(model, mesh) goes before the trainer"
            )
        super().__init__(*arguments, **named)
        # Norms of gradients are taken by the accelerator, whatever meshes they are on.
        self._mixed_mesh_grads = False

    # Which ranks share their batches

    def create_accelerator_and_postprocess(self) -> None:
        """As the stock trainer's, by an accelerator that knows the model's mesh."""
        for name, why in _REFUSED:
            if getattr(self.args, name, None):
                raise ValueError(f"{name}: expected it not to be set for a parallelized model: {why}")
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        SequenceAccelerator.of(self.accelerator, sequence_group_of(self.model).whole)
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )

    def get_tp_size(self) -> int:
        """Ranks that get the same batches."""
        return self.accelerator.num_processes // self.accelerator.replicas  # type: ignore[no-any-return]

    def _get_dataloader(self, *arguments: Any, **named: Any) -> Any:
        """The stock trainer's.  What its workers draw at random is the same on all ranks of a replica."""
        loader = super()._get_dataloader(*arguments, **named)  # type: ignore[misc]
        inner = getattr(loader, "base_dataloader", loader)  # within accelerate's, which hands attributes on
        seed = inner.worker_init_fn
        if isinstance(seed, functools.partial) and "rank" in seed.keywords:
            inner.worker_init_fn = functools.partial(seed, rank=self.accelerator.replica)
        return loader

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        """The stock trainer's.  One that deals batches out by itself deals them out to replicas."""
        sampler = super()._get_train_sampler(*arguments, **named)  # type: ignore[misc]
        if not isinstance(sampler, _DEALER):
            return sampler
        replicas = self.accelerator.replicas
        return type(sampler)(
            sampler.lengths,
            effective_batch_size=sampler.effective_batch_size // sampler.dp_size * replicas,
            dp_size=replicas,
            grad_accum=sampler.grad_accum,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            rank=self.accelerator.replica,
            drop_last=sampler.drop_last,
        )

    # The strategy

    def get_batch_samples(self, *arguments: Any, **named: Any) -> Any:
        """The stock trainer's: a step's batches.  A model of ``strategy="auto"`` gets the strategy for them."""
        samples, items = super().get_batch_samples(*arguments, **named)  # type: ignore[misc]
        model: Any = stepped(self.model)
        if samples and model.parallelized.choice is not None and not why_fixed(model):
            shapes = [one["input_ids"].shape for one in samples]
            longest, rows = max(shape[1] for shape in shapes), max(shape[0] for shape in shapes)
            set_strategy(model, AUTO, optimizer=_bare(self.optimizer), sequence_length=longest, batch_size=rows)
        return samples, items

    # The loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, *arguments: Any, **named: Any
    ) -> Any:
        """The next class's, of a model that takes whole batches; one of the user's own also finds logits there."""
        own = not super().compute_loss.__module__.startswith(("transformers.", "trl."))  # type: ignore[misc]
        whole = WholeBatches(model, logits=own or (return_outputs and not self._loss_only))
        with self._counted_here():
            return super().compute_loss(whole, inputs, return_outputs, *arguments, **named)  # type: ignore[misc]

    _loss_only = False
    _evaluated: float | None = None  # tokens that count in the batch that is evaluated now

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *arguments: Any, **named: Any
    ) -> Any:
        """The stock trainer's; logits are made whole where they are wanted, and the loss is that of all replicas."""
        self._loss_only = prediction_loss_only
        try:
            if any(inputs.get(name) is None for name in self.label_names):  # type: ignore[attr-defined]
                return super().prediction_step(WholeBatches(model), inputs, prediction_loss_only, *arguments, **named)  # type: ignore[misc]
            counted, inputs = self._without_repeated_rows(inputs)
            self._evaluated = counted
            loss, *rest = super().prediction_step(model, inputs, prediction_loss_only, *arguments, **named)  # type: ignore[misc]
            return (self._mean_of_replicas(loss, counted), *rest)
        finally:
            self._loss_only, self._evaluated = False, None

    def _without_repeated_rows(self, inputs: dict[str, Any]) -> tuple[float | None, dict[str, Any]]:
        """Tokens that count, and the batch without labels in rows of the first one with which it was filled up.

        None where labels are not those of tokens.
        """
        labels = inputs.get("labels")
        if not isinstance(labels, torch.Tensor) or labels.ndim != 2:
            return None, inputs
        loader, replicas = self.accelerator.gradient_state, self.accelerator.replicas
        if replicas > 1 and loader.end_of_dataloader and loader.remainder > 0:
            # The rows that remain are dealt out in order, to the first replica first.
            own = max(0, loader.remainder - self.accelerator.replica * len(labels))
            repeated = torch.arange(len(labels), device=labels.device) >= own
            labels = labels.masked_fill(repeated[:, None], IGNORE_INDEX)
            inputs = {**inputs, "labels": labels}
        return float((labels[:, 1:] != IGNORE_INDEX).sum()), inputs

    def _mean_of_replicas(self, loss: Any, counted: float | None) -> Any:
        """The mean over all replicas' tokens of a loss that is the mean over this one's."""
        if self.accelerator.replicas == 1 or loss is None or counted is None:
            return loss
        own = torch.stack((loss.double() * counted, torch.tensor(counted, device=loss.device).double()))
        if not counted:
            own.zero_()  # the mean over nothing is no number
        total, tokens = self.accelerator.gather(own[None]).sum(0)
        return (total / tokens).to(loss.dtype)

    # What evaluation tells of its speed

    _unsaid_rows: int | None = None  # of an evaluation whose figures are still those of batches for every process

    def evaluation_loop(self, *arguments: Any, **named: Any) -> Any:
        """The stock trainer's."""
        output = super().evaluation_loop(*arguments, **named)  # type: ignore[misc]
        self._unsaid_rows = output.num_samples
        return output

    def log(self, logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        """The stock trainer's; steps per second of an evaluation count the batches that replicas had."""
        self._count_batches_of_replicas(logs)
        super().log(logs, *arguments, **named)  # type: ignore[misc]

    def predict(self, *arguments: Any, **named: Any) -> Any:
        """The stock trainer's; steps per second as in :meth:`log`."""
        output = super().predict(*arguments, **named)  # type: ignore[misc]
        self._count_batches_of_replicas(output.metrics)
        return output

    def _count_batches_of_replicas(self, metrics: dict[str, float]) -> None:
        rows, self._unsaid_rows = self._unsaid_rows, None
        if not rows or self.get_tp_size() == 1:
            return
        size = self.args.eval_batch_size
        said, had = (math.ceil(rows / (size * n)) for n in (self.args.world_size, self.accelerator.replicas))
        for name in [name for name in metrics if name.endswith("_steps_per_second")]:
            metrics[name] = round(metrics[name] * had / said, 3)

    @contextlib.contextmanager
    def _counted_here(self) -> Iterator[None]:
        """Without the stock trainer's factor for tokens that it counted over all processes."""
        wanted = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = wanted

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> torch.Tensor | None:
        """What a rank's losses are divided by, for gradients that are averaged over replicas afterwards."""
        if self._evaluated is not None:
            return torch.tensor(max(1.0, self._evaluated), dtype=torch.float64, device=device)
        if not batch_samples or any(not isinstance(one.get("labels"), torch.Tensor) for one in batch_samples):
            return None
        group = sequence_group_of(self.model)
        if self.args.average_tokens_across_devices:
            items = num_items_in_batch(batch_samples, group.whole, config=group.config)
        else:
            items = float(sum((one["labels"][:, 1:] != IGNORE_INDEX).sum().item() for one in batch_samples))
        return torch.tensor(items, dtype=torch.float64, device=device)

    def floating_point_ops(self, inputs: dict[str, Any]) -> float:
        """This rank's part of the stock estimate: the stock trainer adds those of all processes."""
        return super().floating_point_ops(inputs) / self.get_tp_size()  # type: ignore[misc,no-any-return]

    # State

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes what ``from_pretrained`` reads.  Every rank calls it."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        save_pretrained(self.model, folder)
        if self.args.should_save:
            tokenizer = getattr(self, "processing_class", None) or getattr(self.data_collator, "tokenizer", None)  # type: ignore[attr-defined]
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            torch.save(self.args, folder / _ARGUMENTS)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_checkpoint(Path(output_dir) / _STATE, self.model, _bare(self.optimizer))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if not (Path(checkpoint) / _STATE).is_dir():
            if (Path(checkpoint) / _STOCK_OPTIMIZER).exists():
                raise ValueError(
                    f"resume_from_checkpoint: expected a checkpoint of this trainer, got one of the stock trainer in "
                    f"{checkpoint}, whose optimizer state is that of another process: load its weights with "
                    f"odysseus_kernels.load_pretrained(model, folder), and begin a run from them"
                )
            warnings.warn(
                f"resume_from_checkpoint: {checkpoint} has no optimizer state (save_only_model); the optimizer and the "
                f"learning rate begin anew",
                FallbackWarning,
                stacklevel=2,
            )
            return
        load_checkpoint(Path(checkpoint) / _STATE, self.model, _bare(self.optimizer))
        scheduler = torch.load(Path(checkpoint) / _SCHEDULER, map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = Path(resume_from_checkpoint) / _STATE
        if state.is_dir():
            load_checkpoint(state, self.model)  # in the model's own dtype, where the other files may be converted
        else:
            load_pretrained(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's wrapper."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


class Trainer(SequenceTrainer, transformers.Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` for a parallelized model; its arguments are those of the stock class.

    Ranks of "seq" and "ring" get the same samples, ranks of "dp" different ones; ``per_device_train_batch_size`` is
    that of a rank of "dp". Losses, label smoothing, ``compute_loss_func``, metrics and norms are the single process's.
    ``compute_loss_func``, label smoothing and ``compute_metrics`` take whole logits, [B, L, V] on every rank; a class
    with a ``compute_loss`` of its own goes through :func:`sequence_trainer`, and has them, too.
    ``preprocess_logits_for_metrics`` keeps them from piling up. Without these logits never exist whole. Checkpoints are
    resumed on any number of ranks and under any strategy.

    Raises:
        ValueError: for a model that is not parallelized, or settings that do not go with one; says what does.

    Example:
        >>> from odysseus_kernels.integrations.trainer import Trainer
        >>> model = ody.parallelize(model, mesh)
        >>> rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
        >>> settings = transformers.TrainingArguments(folder, max_steps=2, use_cpu=True, report_to="none")
        >>> trainer = Trainer(model=model, args=settings, train_dataset=rows)
        >>> trainer.train().global_step
        2
    """


@functools.cache
def sequence_trainer(trainer: type[Any]) -> type[Any]:
    """A trainer class, such as TRL's ``SFTTrainer``, for parallelized models.

    Args:
        trainer: derives from ``transformers.Trainer``; what it does in ``compute_loss`` with a model's outputs sees
            those of whole batches.

    Raises:
        TypeError: for another class, or one of TRL's that generates with its model or copies it.

    Example:
        >>> from odysseus_kernels.integrations.trainer import Trainer, sequence_trainer
        >>> issubclass(sequence_trainer(transformers.Trainer), transformers.Trainer)
        True
    """
    if not isinstance(trainer, type) or not issubclass(trainer, transformers.Trainer):
        raise TypeError(f"trainer: expected a class that derives from transformers.Trainer, got {trainer!r}")
    if trainer.__module__.startswith("trl."):
        require("trl")
        if trainer.__name__ != "SFTTrainer":
            raise TypeError(
                f"trainer: expected TRL's SFTTrainer or a trainer of your own, got {trainer.__name__}, which "
                f"generates, or copies its model: examples/grpo.py and examples/dpo.py show these losses with a "
                f"parallelized model"
            )
    if issubclass(trainer, SequenceTrainer):
        return trainer
    return type(trainer.__name__, (SequenceTrainer, trainer), {"__doc__": trainer.__doc__})
