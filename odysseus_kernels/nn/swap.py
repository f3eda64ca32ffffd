"""Gives a module another forward in place: same object, same parameters, same hooks, same place in its parent.

The module's class becomes a subclass of its own class, as FSDP2 does, so ``isinstance`` checks of the model's code
keep holding and whatever the subclass does not define is the stock module's.
"""

from __future__ import annotations

import functools
from typing import cast

from torch import nn

__all__ = ["restore_class", "swap_class"]


def swap_class(module: nn.Module, mixin: type, *, keep_name: bool = False) -> None:
    """Makes ``module`` an instance of a class that derives from ``mixin`` and from the class it has.

    Args:
        module: changed in place.
        mixin: comes first in the order of method resolution.
        keep_name: let the new class answer to the stock class's name, for code that looks classes up by name.

    Raises:
        ValueError: if something else has replaced the module's forward, which would hide the new one.
    """
    cls = cast(type, type(module))
    if "forward" in module.__dict__:
        raise ValueError(
            f"{cls.__name__}: expected the class's own forward, but this instance has one of its own (from a hook "
            f"library or a kernel replacement); call parallelize before whatever replaces it"
        )
    module.__class__ = _subclass(mixin, cls, keep_name)


def restore_class(module: nn.Module) -> None:
    """Undoes :func:`swap_class`.

    Raises:
        ValueError: if the module's class is not one that it has made.
    """
    stock = vars(type(module)).get("_swapped_from")
    if stock is None:
        raise ValueError(
            f"{type(module).__name__}: expected the class that parallelize has given to the module, but something has "
            f"replaced it since"
        )
    module.__class__ = stock


@functools.cache
def _subclass(mixin: type, cls: type, keep_name: bool) -> type:
    name = cls.__name__ if keep_name else f"{mixin.__name__}{cls.__name__}"
    namespace = {"__module__": cls.__module__, "__qualname__": name, "__doc__": mixin.__doc__, "_swapped_from": cls}
    return type(cls)(name, (mixin, cls), namespace)
