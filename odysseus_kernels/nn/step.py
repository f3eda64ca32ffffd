"""Where a model's step begins and ends, so that an error on one rank becomes one on all: ``comm/shared_step.py``."""

from __future__ import annotations

import contextlib
import pickle
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd import Variable

from odysseus_kernels.nn.group import SequenceGroup

__all__ = ["Stepped", "sequence_group_of", "step", "stepped"]


@contextlib.contextmanager
def step(model: nn.Module) -> Iterator[None]:
    """Everything within the block is one step of a parallelized model: an error on one rank becomes one on all.

    A forward pass is such a step by itself, with its backward pass. This is for code between and after these that may
    fail on one rank: a loss or metric of your own, a logger, an optimizer's step.

    Whatever is raised within is raised again, after all ranks of the mesh have been told: those that wait in an
    operator leave it within two seconds with a :class:`~odysseus_kernels.errors.PeerLostError` that names this rank
    and its error. If all ranks catch their errors they may go on with another step, unless one of the errors says
    that the process group has to be made again (its attribute ``lasting``).

    Args:
        model: what :func:`odysseus_kernels.parallelize` returned, or a wrapper around it. Every rank of its mesh
            begins the step.

    Raises:
        ValueError: if the model is not parallelized.
        CommunicationError: if ranks cannot begin a step together after an earlier error.

    Example:
        >>> model = ody.parallelize(model, mesh)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> with ody.step(model):
        ...     loss = model(**ody.shard_sequence(batch, mesh)).loss
        ...     loss.backward()
        ...     optimizer.step()
    """
    with sequence_group_of(model).steps.step():
        yield


def sequence_group_of(model: nn.Module) -> SequenceGroup:
    """How ``model``, or what it wraps, is parallelized; ValueError if it is not."""
    return stepped(model).sequence_group


def stepped(model: nn.Module) -> Stepped:
    """``model``, or the one that it wraps, that ``parallelize`` returned; ValueError if there is none."""
    for module in model.modules():
        if isinstance(module, Stepped):
            return module
    raise ValueError(f"model: expected one that parallelize returned, got {type(model).__name__}")


class Stepped(nn.Module):
    """A model whose call (hooks included), together with the backward pass of what it returns, is a step."""

    sequence_group: SequenceGroup

    def pieces_for(self, length: int) -> int:
        """Pieces in which its attention gathers sequences of ``length`` tokens; 1: in one."""
        return 1

    def explain_strategy(self) -> str:
        """Why it has its strategy; empty where that was asked for by name."""
        return ""

    def explain_pieces(self) -> str:
        """The same in words, and why."""
        return "attention is not pipelined"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # What copy.deepcopy asks for, too, by a higher protocol than that of torch.save.
        if protocol == torch.serialization.DEFAULT_PROTOCOL:
            raise pickle.PicklingError(
                "torch.save: expected tensors, got a parallelized model, which has this rank's shards, its process "
                "groups and a class of its own: call odysseus_kernels.save_pretrained(model, folder) for a stock "
                "model's files, or save_checkpoint(folder, model, optimizer), on every rank"
            )
        return super().__reduce_ex__(protocol)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stock model's call."""
        with self.sequence_group.steps.step() as outermost:
            self.sequence_group.steps.watch(self)
            outputs = super().__call__(*args, **kwargs)
            if outermost and torch.is_grad_enabled():
                _watch_backward(outputs, self)
            return outputs


def _watch_backward(outputs: Any, model: Stepped) -> None:
    """Makes sure that all ranks are told of an error in the backward pass of any output."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else ()
    watched: list[Any] = [value for value in values if isinstance(value, torch.Tensor) and value.grad_fn is not None]
    backward = _Backward(model)
    for value in watched:
        value.register_hook(backward.begin)
        if value.ndim == 0:
            value.__class__ = Loss
            value._step = backward


class _Backward:
    """One or more backward passes through the outputs of a call."""

    def __init__(self, model: Stepped) -> None:
        self._model, self._group = weakref.ref(model), model.sequence_group
        self._steps = self._group.steps
        self._guarded = False
        self._running = False

    def begin(self, _: torch.Tensor) -> None:
        """Hook of the outputs: the gradient of the model begins."""
        if not self._running:
            self._check_strategy()
            self._running = True
            # The engine drops the callbacks of a pass that fails without calling them.
            Variable._execution_engine.queue_callback(_End(self).reached)

    def end(self, *, reached: bool) -> None:
        """The pass is over."""
        self._running = False
        if not reached and not self._guarded:
            self._steps.leave(None)

    def run(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """``loss.backward()`` itself: all ranks are told the text of its error."""
        self._check_strategy()
        self._guarded = True
        try:
            torch.Tensor.backward(loss, *args, **kwargs)
        except BaseException as error:
            self._steps.leave(error)
            raise
        finally:
            self._guarded = False

    def _check_strategy(self) -> None:
        model = self._model()
        if model is not None and model.sequence_group is not self._group:
            raise ValueError(
                "backward: expected outputs of the strategy that the model has now, got some from before set_strategy, "
                "whose gradients would be cut in another way: call set_strategy between steps"
            )


class Loss(torch.Tensor):
    """A scalar whose ``backward`` is part of a step; what is computed from it is a plain tensor."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _step: _Backward

    def backward(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """As for any tensor."""
        self._step.run(self, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __repr__(self, **settings: Any) -> str:  # type: ignore[override]
        return self.as_subclass(torch.Tensor).__repr__(**settings)


class _End:
    """The end of a pass: reached, or dropped by the engine."""

    def __init__(self, backward: _Backward) -> None:
        self._backward: _Backward | None = backward

    def reached(self) -> None:
        """The engine's final callback."""
        self._end(reached=True)

    def __del__(self) -> None:
        self._end(reached=False)

    def _end(self, *, reached: bool) -> None:
        backward, self._backward = self._backward, None
        if backward is not None:
            backward.end(reached=reached)
