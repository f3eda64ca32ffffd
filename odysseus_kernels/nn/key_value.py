"""Keys and values of all ranks at once, for attention functions that cannot take them one rank's after another's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.attention import layout
from odysseus_kernels.comm.arguments import refuse_second_derivative, under_autocast
from odysseus_kernels.comm.functional import all_gather, reduce_scatter
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.nn.cut import RING_LAYOUT
from odysseus_kernels.nn.group import SequenceGroup
from odysseus_kernels.ops._validate import group_by_name

__all__ = ["gathered_key_value"]

_NAME = "gathered_key_value"


def gathered_key_value(key: Tensor, value: Tensor, group: SequenceGroup) -> tuple[Tensor, Tensor]:
    """Keys and values of the whole sequence, in its order, for the queries of each rank; differentiable.

    W ranks, B sequences of L tokens, s = L/W of them here, in zigzag order.

    forward:    keys [B, H, L, D] and values [B, H, L, Dv] = AG(key [B, H, s, D]) and AG(value [B, H, s, Dv]), in one
                all-gather
    gradients:  dkey [B, H, s, D] and dvalue [B, H, s, Dv] = RS of what each rank's queries make for all keys, in one
                reduce-scatter, in the accumulator's type (fp32, or fp64) as under Ring attention

    Whoever uses the result keeps it for backward: it is not gathered again.

    Args:
        key, value: of this rank's tokens.
        group: the ranks; the sequence is cut over ``group.zigzag``.

    Raises:
        ValueError: key and value of different types, but for autocast.
        CommunicationError: ranks differ, or a peer is lost or silent.
    """
    assert group.zigzag is not None, "the sequence is cut in zigzag order"
    key, value = under_autocast(key.device, key, value)
    if key.dtype != value.dtype:
        raise ValueError(f"{_NAME}: expected value of key's dtype {key.dtype}, got {value.dtype}; use torch.autocast")
    keys, values = torch.ops.odysseus.gathered_key_value(key, value, group.zigzag.group_name, group.config.key())
    return keys, values


@torch.library.custom_op("odysseus::gathered_key_value", mutates_args=())
def _forward(key: Tensor, value: Tensor, group_name: str, config_key: str) -> tuple[Tensor, Tensor]:
    """As one operator, so that a compiled layer has it in its graph."""
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    joined = torch.cat((key, value), dim=-1)
    whole = all_gather(joined, group, operator=_NAME, dim=2, config=config)
    order = layout.inverse(group.size(), whole.shape[2], RING_LAYOUT, whole.device)
    keys, values = whole[:, :, order].split((key.shape[-1], value.shape[-1]), dim=-1)
    return keys.contiguous(), values.contiguous()


@_forward.register_fake
def _(key: Tensor, value: Tensor, group_name: str, config_key: str) -> tuple[Tensor, Tensor]:
    world = group_by_name(group_name).size()
    keys, values = (x.new_empty((*x.shape[:2], world * x.shape[2], x.shape[3])) for x in (key, value))
    return keys, values


@torch.library.custom_op("odysseus::gathered_key_value_backward", mutates_args=())
def _backward(dkeys: Tensor, dvalues: Tensor, group_name: str, config_key: str) -> tuple[Tensor, Tensor]:
    group, config = group_by_name(group_name), OverlapConfig.from_key(config_key)
    world, length = group.size(), dkeys.shape[2]
    order = torch.cat([layout.positions(rank, world, length, RING_LAYOUT, dkeys.device) for rank in range(world)])
    joined = torch.cat((dkeys, dvalues), dim=-1).to(accumulator_dtype(dkeys.dtype))[:, :, order]
    own = reduce_scatter(joined, group, operator=_NAME, dim=2, phase="backward", config=config)
    dkey, dvalue = own.to(dkeys.dtype).split((dkeys.shape[-1], dvalues.shape[-1]), dim=-1)
    return dkey.contiguous(), dvalue.contiguous()


@_backward.register_fake
def _(dkeys: Tensor, dvalues: Tensor, group_name: str, config_key: str) -> tuple[Tensor, Tensor]:
    world = group_by_name(group_name).size()
    dkey, dvalue = (x.new_empty((*x.shape[:2], x.shape[2] // world, x.shape[3])) for x in (dkeys, dvalues))
    return dkey, dvalue


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *_, ctx.group_name, ctx.config_key = inputs


def _autograd_backward(ctx: Any, dkeys: Tensor, dvalues: Tensor) -> tuple[Tensor | None, ...]:
    dkey, dvalue = torch.ops.odysseus.gathered_key_value_backward(dkeys, dvalues, ctx.group_name, ctx.config_key)
    return dkey, dvalue, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
refuse_second_derivative(_backward, "a gathered key or value")
