"""accelerate's Accelerator around parallelized models: what it shards, gathers and counts goes by "dp" alone."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterable
from typing import Any, NoReturn, Self

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.scheduler import AcceleratedScheduler
from accelerate.utils import recursively_apply
from accelerate.utils import reduce as reduce_over_processes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.serialization import default_restore_location

from odysseus_kernels.comm.functional import all_gather
from odysseus_kernels.floors import require
from odysseus_kernels.nn.clipping import clip_grad_norm_
from odysseus_kernels.nn.group import DATA_DIMENSION, SequenceGroup
from odysseus_kernels.nn.step import Stepped

__all__ = ["SequenceAccelerator"]

_REDUCTIONS = ("sum", "mean", "max", "none")
_OTHERS = ("fsdp_plugin", "deepspeed_plugin", "megatron_lm_plugin", "parallelism_config")


class SequenceAccelerator(Accelerator):
    """An ``Accelerator`` for ranks of which those of "seq" and "ring" share their sequences.

    Such ranks are one replica: they get the same batches, and what is gathered or reduced is one of each. Models are
    not wrapped: ``parallelize`` has distributed them, and for several replicas FSDP2's ``fully_shard`` or
    ``replicate`` has. Everything else is accelerate's: ``num_processes`` counts all ranks, and so do the functions of
    ``accelerate.utils``. What a loss is multiplied by, because gradients are averaged afterwards, is ``replicas``.

    Args:
        mesh: with the dimension "seq", optionally "ring" and "dp".
        **arguments: of ``Accelerator``.

    Attributes:
        mesh: as given.
        replicas: size of "dp", what ``num_processes`` is to a loop of data parallelism alone.
        replica: position of this rank in it.

    Raises:
        ValueError: for what would wrap the model again, or keep a loss scale for each rank.

    Example:
        >>> from odysseus_kernels.integrations.accelerator import SequenceAccelerator
        >>> model = ody.parallelize(model, mesh)
        >>> accelerator = SequenceAccelerator(mesh, cpu=True)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> loader = torch.utils.data.DataLoader([dict(input_ids=row, labels=row) for row in batch["input_ids"]])
        >>> model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        >>> for whole in loader:
        ...     loss = model(**ody.shard_sequence(whole, model)).loss
        ...     accelerator.backward(loss)
        ...     norm = accelerator.clip_grad_norm_(model.parameters(), 1.0)
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    mesh: DeviceMesh
    replicas: int
    replica: int
    flag_tensor: torch.Tensor | None
    _replica_group: Any

    def __init__(self, mesh: DeviceMesh, **arguments: Any) -> None:
        require("accelerate")
        _refuse((name, arguments.get(name)) for name in _OTHERS)  # which accelerate may pass over on this machine
        super().__init__(**arguments)
        self._know(mesh)

    @classmethod
    def of(cls, accelerator: Accelerator, mesh: DeviceMesh) -> Self:
        """``accelerator`` itself, made one of these."""
        accelerator.__class__ = cls
        accelerator._know(mesh)
        return accelerator

    def _know(self, mesh: DeviceMesh) -> None:
        _refuse((name, getattr(self.state, name, None) or getattr(self, name, None)) for name in _OTHERS)
        if self.state.mixed_precision not in ("no", "bf16"):
            raise ValueError(
                f'mixed_precision: expected "no" or "bf16", got {self.state.mixed_precision!r}: each rank would keep '
                f"a loss scale by the gradients of its own shards. odysseus_kernels.MasterWeights with "
                f"torch.amp.GradScaler, in a loop of your own, finds overflows on all ranks"
            )
        if self.dispatch_batches:
            raise ValueError(
                "dispatch_batches: expected False or nothing, got True: the first process would send other batches to "
                "ranks that share a sequence; let every rank read"
            )
        if self.use_stateful_dataloader:
            raise ValueError(
                "use_stateful_dataloader: expected False, got True: accelerate would set its position back by a batch "
                "for each process but one, as if all had batches of their own; odysseus_kernels.SequenceDataLoader "
                "resumes at the exact sample"
            )
        SequenceGroup.of(mesh)
        self.mesh = mesh
        several = DATA_DIMENSION in (mesh.mesh_dim_names or ())
        self._replica_group = mesh.get_group(DATA_DIMENSION) if several else None
        self.replicas = self._replica_group.size() if several else 1
        self.replica = self._replica_group.rank() if several else 0

    def prepare_data_loader(
        self, data_loader: Any, device_placement: bool | None = None, slice_fn_for_dispatch: Any = None
    ) -> Any:
        """As accelerate's; replicas have different batches, ranks of one replica the same."""
        if getattr(data_loader, "_is_accelerate_prepared", False):
            return super().prepare_data_loader(data_loader, device_placement, slice_fn_for_dispatch)
        prepared = prepare_data_loader(
            data_loader,
            self.device,
            num_processes=self.replicas,
            process_index=self.replica,
            split_batches=self.split_batches,
            put_on_device=self.device_placement if device_placement is None else device_placement,
            rng_types=None if self.rng_types is None else self.rng_types.copy(),
            dispatch_batches=False,
            even_batches=self.even_batches,
            use_seedable_sampler=self.use_seedable_sampler,
            non_blocking=self.non_blocking,
            use_stateful_dataloader=self.use_stateful_dataloader,
        )
        self._dataloaders.append(prepared)
        return prepared

    def prepare_model(
        self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> nn.Module:
        """Mixed precision and compilation only: a parallelized model is distributed already.

        Raises:
            ValueError: for a model that is not parallelized.
        """
        if not any(isinstance(module, Stepped) for module in model.modules()):
            raise ValueError(
                f"model: expected one that parallelize returned, got {type(model).__name__}: it would have other "
                f"gradients on each rank"
            )
        return super().prepare_model(model, device_placement=False, evaluation_mode=True)  # type: ignore[no-any-return]

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """As accelerate's: it steps once for each replica, whose batches a step has."""
        prepared = super().prepare_scheduler(scheduler)
        if isinstance(prepared, AcceleratedScheduler):
            prepared.__class__ = _ReplicaScheduler
            prepared.replicas = 1 if prepared.split_batches else self.replicas
            prepared.split_batches = True
        return prepared

    def gather(self, tensor: Any) -> Any:
        """What each replica has, along the first dimension: [D * n, ...]; scalars become [D].

        The parts of a sequence are not put together: :func:`odysseus_kernels.gather_sequence` does that.
        """
        if self._replica_group is None or self.replicas == 1:
            return recursively_apply(lambda one: one[None] if one.ndim == 0 else one, tensor, error_on_other_type=True)
        group = self._replica_group

        def gathered(one: torch.Tensor) -> torch.Tensor:
            rows = one[None] if one.ndim == 0 else one
            if rows.dtype == torch.bool:
                return all_gather(rows.to(torch.uint8), group, operator="gather").bool()
            return all_gather(rows.contiguous(), group, operator="gather")

        return recursively_apply(gathered, tensor, error_on_other_type=True)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """As accelerate's, of each replica once, without rows that fill up the last batch.

        Args:
            input_data: tensors; or a list of rows, each of tensors, numbers and text in lists, tuples and dictionaries.
            use_gather_object: whether tensors are such rows, too, because their sizes differ.

        Raises:
            ValueError: for rows of other objects, from several replicas: what ranks send is not unpickled.
        """
        if not use_gather_object and _only_tensors(input_data):
            return super().gather_for_metrics(input_data)
        rows, loader = self._gather_objects(input_data), self.gradient_state
        if loader.end_of_dataloader and loader.remainder > 0:
            with contextlib.suppress(TypeError, KeyError):  # what has no rows stays as it is, as in accelerate
                return rows[: loader.remainder]
        return rows

    def _gather_objects(self, own: Any) -> Any:
        """The rows of all replicas, in their order; of one replica what was given, as accelerate's of one process."""
        if self._replica_group is None or self.replicas == 1:
            return own
        buffer = io.BytesIO()
        torch.save(own, buffer)
        packed = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8).to(self.device)
        own_size = torch.tensor([len(packed)], device=self.device)
        sizes = all_gather(own_size, self._replica_group, operator="gather_for_metrics").tolist()
        padded = packed.new_zeros(1, max(sizes))
        padded[0, : len(packed)] = packed
        everyone = all_gather(padded, self._replica_group, operator="gather_for_metrics").cpu()
        files = [io.BytesIO(one[:size].numpy().tobytes()) for one, size in zip(everyone, sizes, strict=True)]
        try:
            found = [torch.load(file, map_location=self._brought_here, weights_only=True) for file in files]
        except pickle.UnpicklingError as error:
            raise ValueError(
                "input_data: expected tensors, numbers and text, or lists, tuples and dictionaries of such, got "
                "something else, which would have to be unpickled: make it one of these (of an array, its tolist())"
            ) from error
        return [row for rows in found for row in rows]

    def _brought_here(self, storage: Any, location: str) -> Any:
        """What was on a GPU of its rank is put on this rank's."""
        return storage if location.startswith("cpu") else default_restore_location(storage, str(self.device))

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum, mean or largest over replicas, each of which counts once, however many ranks it has.

        Args:
            tensor: of the same shape on every rank; or lists, tuples and dictionaries of such.
            reduction: "sum", "mean", "max", or "none" for a copy.
            scale: has an effect on XLA alone, as in accelerate.

        Raises:
            ValueError: for another ``reduction``.
        """
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        group = self._replica_group

        def reduced(one: torch.Tensor) -> torch.Tensor:
            if group is None or self.replicas == 1 or reduction == "none":
                return one.clone()
            every = all_gather(one.detach()[None].contiguous(), group, operator="reduce")
            if reduction == "max":
                return every.amax(0)
            total = every.sum(0, dtype=one.dtype)
            return total / self.replicas if reduction == "mean" else total

        return recursively_apply(reduced, tensor, error_on_other_type=True)

    def check_trigger(self) -> bool:
        """As accelerate's: whether any process, of whatever replica, has called ``set_trigger``."""
        if self.flag_tensor is None:
            self.flag_tensor = torch.tensor(0, device=self.device)
        raised = bool(reduce_over_processes(self.flag_tensor, "sum").item() >= 1)
        if raised:
            self.flag_tensor = torch.zeros_like(self.flag_tensor)
        return raised

    def clip_grad_norm_(
        self, parameters: torch.Tensor | Iterable[torch.Tensor], max_norm: float, norm_type: float = 2
    ) -> torch.Tensor:
        """As :func:`odysseus_kernels.clip_grad_norm_`: every element of every rank's shards counts once."""
        return clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """As torch's; each rank clips its shards."""
        torch.nn.utils.clip_grad_value_(list(parameters), clip_value, foreach=False)

    def save_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: it would write the first rank's shards as if they were all."""
        raise RuntimeError(
            "save_state: expected odysseus_kernels.save_checkpoint(folder, model, optimizer), called on every rank: "
            "save_state would write the shards of the first rank only"
        )

    def load_state(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses, as :meth:`save_state` does."""
        raise RuntimeError("load_state: expected odysseus_kernels.load_checkpoint(folder, model, optimizer)")

    def save_model(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: it would write the first rank's shards as if they were all."""
        raise RuntimeError("save_model: expected odysseus_kernels.save_pretrained(model, folder), called on every rank")

    def get_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: whole state dicts do not fit where models are cut."""
        raise RuntimeError(
            "get_state_dict: expected odysseus_kernels.save_pretrained(model, folder) or save_checkpoint, called on "
            "every rank: a state dict here would be this rank's shards"
        )


def _only_tensors(data: Any) -> bool:
    """Whether nested lists, tuples and dictionaries hold nothing but tensors."""
    try:
        recursively_apply(lambda one: one, data, error_on_other_type=True)
    except TypeError:
        return False
    return True


def _refuse(given: Iterable[tuple[str, Any]]) -> None:
    for name, value in given:
        if value:
            raise ValueError(
                f"{name}: expected no other parallelism of accelerate around a parallelized model, got one: give the "
                f'mesh a dimension "dp", and use torch.distributed.fsdp.fully_shard(layer, mesh=mesh["dp"])'
            )


class _ReplicaScheduler(AcceleratedScheduler):
    """Steps once for each replica; accelerate's steps once for each process."""

    replicas: int

    def step(self, *args: Any, **kwargs: Any) -> None:
        """After an optimizer's step."""
        for _ in range(self.replicas if self.gradient_state.sync_gradients else 1):
            super().step(*args, **kwargs)
