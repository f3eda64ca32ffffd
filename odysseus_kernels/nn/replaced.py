"""Parameters that a parallelized model no longer has, and what happens to whoever still trains them."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

__all__ = ["retire_parameter"]


class ReplacedParameter(nn.Parameter):
    """A full parameter after its model got a distributed one instead.

    An optimizer made before holds it, finds no gradient and would silently change nothing; clipping would see a
    norm of 0. So its gradient cannot be asked for.
    """

    @property
    def grad(self) -> NoReturn:  # type: ignore[override]
        """Refuses."""
        raise self._error()

    @grad.setter
    def grad(self, value: Any) -> NoReturn:
        raise self._error()

    def _error(self) -> ValueError:
        return ValueError(
            f"a parameter of shape {list(self.shape)} is no longer the model's: parallelize replaced it by a "
            f"distributed one, so what was made from the model's parameters before (an optimizer, a list to clip) "
            f"trains nothing; make it after parallelize, from model.parameters()"
        )


def retire_parameter(parameter: nn.Parameter) -> None:
    """Makes every use of the gradient of ``parameter`` a ValueError; its values can still be read."""
    parameter.grad = None
    parameter.__class__ = ReplacedParameter
