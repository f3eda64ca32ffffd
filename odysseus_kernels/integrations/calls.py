"""What would be left out of a module that is not called, its weights being read by a fused operator."""

from __future__ import annotations

from torch import nn

__all__ = ["changed_call"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def changed_call(module: nn.Module) -> str:
    """What would be left out if ``module`` were not called: its hooks, or a forward of its own; empty if nothing."""
    hooks = [hooks for hooks in _HOOKS if getattr(module, hooks)]
    if hooks:
        return f"hooks ({', '.join(hooks)})"
    return "a forward of its own" if "forward" in vars(module) else ""
