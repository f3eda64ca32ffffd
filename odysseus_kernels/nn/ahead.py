"""Which weights a layer sends ahead: what the module behind it in the model gathers, or in backward the one before.

Modules are linked once, when a model is parallelized (:func:`link_modules`), in the order of its forward; each asks its
neighbours at every call.  Nothing here decides what is computed: a transport uses what was sent ahead if the next call
gathers just that, in the same pass and unchanged, and drops it otherwise (``comm/sent_ahead.py``).  So a layer that is
left out, or called twice, or whose order is changed costs what was sent for nothing, and never a number.

What comes next where.  Only weights can be sent ahead: activations, which Odysseus' attention gathers, are made just
before.

========================= =========================================== ================================================
after                     in forward                                  in backward
========================= =========================================== ================================================
attention's first product attention's last product, under Ulysses     the layer before: its feed-forward network
attention's last product  the layer's feed-forward network            attention's first product, under Ulysses
feed-forward network      the next layer's attention, under Ulysses;  the same layer's attention, under Ulysses
                          at the end the language head
language head                                                         the last layer's feed-forward network
========================= =========================================== ================================================

Ulysses' attention in groups of heads is one operator, which sends ahead what its own exchanges share; of the first one
that is the first group's rows in forward, and in backward a copy that is made in the call: nothing is sent ahead of it.

A layer that a checkpoint computes again runs forward within backward.  Its feed-forward network is then followed by its
own backward, and its backward by the forward of the layer before.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from odysseus_kernels.comm.sent_ahead import in_backward_pass
from odysseus_kernels.nn.group import SequenceGroup

__all__ = [
    "GathersWeights",
    "Neighbours",
    "Shards",
    "ahead_in_backward",
    "ahead_in_forward",
    "ahead_in_recomputation",
    "is_linked",
    "link_modules",
    "shard_of",
]

Shards = Tensor | tuple[Tensor, ...] | None


class GathersWeights:
    """A module that says what it gathers: a weight shard, or a tuple of all that its exchange shares.

    Attributes:
        neighbours: set by :func:`link_modules`; without it nothing is sent ahead.
        gathers_in_backward: whether the backward of the latest forward gathers weights.
        checkpointed: whether hooks on saved tensors were set in the latest forward, as checkpoints set them.
        sent: parameters that the module before has sent ahead, and their versions then.
    """

    neighbours: Neighbours | None = None
    gathers_in_backward: bool = False
    checkpointed: bool = False
    sent: tuple[tuple[Tensor, int], ...] = ()

    def first_gathered(self) -> Shards:
        """What forward gathers first; None if that is no weight, or not whole."""
        return None

    def first_gathered_in_backward(self) -> Shards:
        """What backward gathers first; None if that is no weight, or not whole."""
        return None

    def note_backward(self, product: Tensor) -> None:
        """Remembers what is known of the backward of the product whose input is ``product``, its first in backward."""
        if not torch.compiler.is_compiling():
            self.gathers_in_backward = product.requires_grad and torch.is_grad_enabled()
            self.checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None

    def note_changes(self) -> None:
        """At the beginning of forward: what was sent ahead of it is not used if a parameter has changed meanwhile.

        A hook may do that.  A change of a DTensor is counted for itself, not for the local tensor that was sent.
        """
        for parameter, version in self.sent:
            if parameter._version != version and isinstance(parameter, DTensor):
                torch.autograd.graph.increment_version(parameter._local_tensor)
        self.sent = ()


class Neighbours:
    """The modules that gather before and after another one; a copy or an unpickled module has none.

    References are weak: a module must neither hold the whole model nor be copied with it.

    Attributes:
        following, preceding: in the order of forward.
        layer_before: what the layer before begins with.
    """

    def __init__(self, following: Any = None, preceding: Any = None, layer_before: Any = None) -> None:
        self._found = [None if one is None else weakref.ref(one) for one in (following, preceding, layer_before)]

    @property
    def following(self) -> Any:
        return self._get(0)

    @property
    def preceding(self) -> Any:
        return self._get(1)

    @property
    def layer_before(self) -> Any:
        return self._get(2)

    def _get(self, index: int) -> Any:
        found = self._found[index]
        return None if found is None else found()

    def __deepcopy__(self, memo: dict[int, Any]) -> Neighbours:
        return Neighbours()

    def __reduce__(self) -> tuple[type[Neighbours], tuple[()]]:
        return Neighbours, ()


def link_modules(modules: Sequence[Any], firsts: Sequence[Any], group: SequenceGroup) -> None:
    """Tells ``modules``, in the order of forward, of their neighbours; ``firsts`` are those that layers begin with.

    Where the ranks of a ring share weights beyond ``seq``, activations and weights travel in different groups, and a
    call sends ahead in its own only: then nothing is linked.
    """
    if group.every_size != group.size or group.every_size == 1:
        return
    begins = {id(first) for first in firsts}
    linked = [one if isinstance(one, GathersWeights) and getattr(one, "sends_ahead", True) else None for one in modules]
    layer_before = current = None
    for index, module in enumerate(linked):
        if id(modules[index]) in begins:
            layer_before, current = current, module
        if module is not None:
            preceding = linked[index - 1] if index else None
            following = linked[index + 1] if index + 1 < len(linked) else None
            module.neighbours = Neighbours(following, preceding, layer_before)


def ahead_in_forward(module: GathersWeights, *, last: bool = False) -> Shards:
    """What ``module`` sends ahead in this forward; ``last`` for the module that ends a layer.

    Computed again, the end of a layer is followed by its own backward.
    """
    neighbours = _neighbours(module)
    if neighbours is None:
        return None
    if last and in_backward_pass():
        return module.first_gathered_in_backward()
    following = neighbours.following
    if following is None:
        return None
    shards = _alike(module, following.first_gathered())
    if shards is not None:
        following.sent = tuple((one, one._version) for one in following.parameters() if not one.is_inference())
    return shards


def ahead_in_backward(module: GathersWeights, x: Tensor, *, same_layer: bool = True) -> Shards:
    """What ``module``, whose input is ``x``, sends ahead at the end of its backward.

    A module that is not in the same layer as the one before it, and is itself not computed again (the language head),
    cannot know whether a checkpoint computes that one again: behind one nothing is sent.
    """
    neighbours = _neighbours(module)
    before = None if neighbours is None else neighbours.preceding
    if before is None or not x.requires_grad or not (same_layer or not before.checkpointed):
        return None
    return _alike(module, before.first_gathered_in_backward())


def ahead_in_recomputation(module: GathersWeights, x: Tensor) -> Shards:
    """The same where the layer that ``module`` begins was computed again: the layer before will be, too."""
    neighbours = _neighbours(module)
    if neighbours is None or neighbours.layer_before is None or not x.requires_grad:
        return None
    return _alike(module, neighbours.layer_before.first_gathered())


def is_linked(module: GathersWeights) -> bool:
    """Whether ``module`` may send ahead what it gathers itself at its next call."""
    return _neighbours(module) is not None


def _alike(module: Any, shards: Shards) -> Shards:
    """``shards`` if they are of ``module``'s own type, else None: a call sends ahead what is like what it sends."""
    own = next((parameter.dtype for parameter in module.parameters()), None)
    parts = () if shards is None else (shards,) if isinstance(shards, Tensor) else shards
    return shards if all(part.dtype == own for part in parts) else None


def _neighbours(module: GathersWeights) -> Neighbours | None:
    return None if torch.compiler.is_compiling() else module.neighbours


def shard_of(layer: Any, name: str = "weight") -> Tensor | None:
    """This rank's shard as ``layer`` will gather it; None where it is not there now, or cut in another way.

    A wrapper that shards parameters further has only a part of them here between the calls of its own layer.
    """
    parameter = getattr(layer, name)
    if parameter is None:
        return None
    if isinstance(parameter, DTensor):
        if tuple(parameter.placements) != vars(layer).get("sequence_placements", {}).get(name):
            return None
        # Not to_local(), which is an operation: a selective checkpoint wants the same ones whenever a layer is run.
        parameter = parameter._local_tensor
    end = (parameter.storage_offset() + parameter.numel()) * parameter.element_size()
    return parameter if parameter.untyped_storage().nbytes() >= end else None
