"""What attention blocks that are one operator check before anything is sent."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence, Sized

import torch
from torch import Tensor

from odysseus_kernels.attention.checks import check_ids, check_number, check_scores
from odysseus_kernels.attention.layout import piece_rows
from odysseus_kernels.comm.arguments import check_tensors, under_autocast
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._attention_pieces import Settings
from odysseus_kernels.ops._validate import check_bias, check_linear, check_several

__all__ = ["check_pipelined_attention", "check_pipelined_ulysses", "piece_edges", "scale_of_scores"]

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def piece_edges(name: str, x: Tensor, pieces: int | Sequence[int]) -> tuple[int, ...]:
    """Rows of x [B, s, d] at which pieces begin, and last their number.

    Raises:
        ValueError: ``pieces`` is no number of pieces, and no list of numbers of rows that are all rows.
    """
    check_tensors(name, x=x)
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"{name}: expected x [batch, tokens, width] without empty dimensions, got {list(x.shape)}")
    rows = x.shape[1]
    if isinstance(pieces, int) and not isinstance(pieces, bool):
        if not 1 <= pieces <= rows:
            raise ValueError(
                f"{name}: expected 1 to {rows} pieces of this rank's {rows} tokens, got {pieces}; shard_sequence pads "
                f"a batch so that there are enough"
            )
        return tuple(itertools.accumulate(piece_rows(rows, pieces), initial=0))
    try:
        sizes = [operator.index(size) for size in pieces]  # type: ignore[union-attr]
    except TypeError:
        raise ValueError(f"{name}: expected pieces to be a whole number or numbers of rows, got {pieces!r}") from None
    if not sizes or min(sizes) < 1 or sum(sizes) != rows:
        raise ValueError(f"{name}: expected numbers of rows that are {rows} together, each at least 1, got {sizes}")
    return tuple(itertools.accumulate(sizes, initial=0))


def scale_of_scores(name: str, head_dim: int, scale: float | None) -> float:
    """``scale``, or that of heads ``head_dim`` wide.

    Raises:
        ValueError: ``head_dim`` is no width.
    """
    if isinstance(head_dim, bool) or not isinstance(head_dim, int) or head_dim < 1:
        raise ValueError(f"{name}: expected head_dim to be a whole number of at least 1, got {head_dim!r}")
    return head_dim**-0.5 if scale is None else scale


def check_pipelined_attention(
    name: str,
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    output_weight: Tensor,
    bias: Sequence[Tensor | None] | None,
    output_bias: Tensor | None,
    world: int,
    ring: int,
    settings: Settings,
    rotation: tuple[Tensor, Tensor] | None,
    head_norms: tuple[Tensor, Tensor] | None,
    documents: Tensor | None,
    key_mask: Tensor | None,
    dropout_seed: int | None,
    config: OverlapConfig,
) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor, Tensor | None]:
    """x, weights, biases, output weight and bias as autocast has them.

    Raises:
        ValueError: naming what was expected and given.
    """
    if isinstance(weight, Tensor) or not isinstance(weight, Sized) or len(weight) != 3:
        several = isinstance(weight, Sized) and not isinstance(weight, Tensor)
        got = f"{len(weight)}" if several else f"a {type(weight).__name__}"
        raise ValueError(f"{name}: expected weight to be those of queries, keys and values, got {got}")
    x, weights, biases = check_several(name, x, weight, bias)
    check_tensors(name, output_weight=output_weight, bias=output_bias)
    output_weight, output_bias = under_autocast(x.device, output_weight, output_bias)
    queries, keys, values = (one.shape[0] for one in weights)
    width = settings.head_dim
    if queries % width or keys % width:
        raise ValueError(f"{name}: expected head_dim to divide {queries} query and {keys} key features, got {width!r}")
    if values != keys or queries % keys:
        raise ValueError(
            f"{name}: expected as many value as key features, and query heads that divide by key/value heads, got "
            f"{queries}, {keys} and {values} features of heads {width} wide"
        )
    if output_weight.ndim != 2 or output_weight.shape[1] != queries:
        raise ValueError(
            f"{name}: expected output_weight [out_features, {queries}] for {queries} query features, got "
            f"{list(output_weight.shape)}"
        )
    check_linear(name, x.new_empty((1, queries)), output_weight, "output_weight")
    check_bias(name, x, output_weight, output_bias, "output_bias")
    batch, rows, _ = x.shape
    length = rows * world
    for what, table in zip(("cos", "sin"), _pair(name, "rotation", "cos and sin", rotation), strict=False):
        _check_beside(name, what, table, x)
        if table.ndim != 3 or table.shape[0] not in (1, batch) or table.shape[1:] != (length, width):
            raise ValueError(
                f"{name}: expected {what} [1 or {batch}, {length}, {width}], of its T tokens, got {list(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name}: expected {what} without gradients: a rotation is not trained")
    if rotation is not None and width % 2:
        raise ValueError(f"{name}: expected an even head_dim to rotate halves of heads, got {width}")
    norms = _pair(name, "head_norms", "the weights of queries' and keys' norms", head_norms)
    for what, norm in zip(("query", "key"), norms, strict=False):
        _check_beside(name, f"{what} norm", norm, x)
        if norm.shape != (width,):
            raise ValueError(f"{name}: expected the {what} norm's weight [{width}], got {list(norm.shape)}")
    check_number(name, "norm_eps", settings.eps)
    if not 0 <= settings.eps < math.inf:
        raise ValueError(f"{name}: expected norm_eps of at least 0, and finite, got {settings.eps!r}")
    if ring > 1 and length % 2:
        raise ValueError(f"{name}: expected an even number of tokens on each ring rank, got {length}")
    like = x.new_empty((batch, 0))
    if documents is not None:
        check_ids(name, "documents", documents, _INTEGERS, like, [batch, length * ring])
    if key_mask is not None:
        check_ids(name, "key_mask", key_mask, (torch.bool, *_INTEGERS), like, [batch, length * ring])
    check_scores(
        name, x, settings.window, True, settings.scale, settings.dropout, dropout_seed, settings.first_head,
        settings.kernel, config,
    )  # fmt: skip
    return x, weights, biases, output_weight, output_bias


def _pair(name: str, argument: str, what: str, pair: object) -> Sequence[Tensor]:
    """The two of an optional argument, or none.

    Raises:
        ValueError: it has not two.
    """
    if pair is None:
        return ()
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        got = f"{len(pair)}" if isinstance(pair, list | tuple) else f"a {type(pair).__name__}"
        raise ValueError(f"{name}: expected {argument} to be {what}, or None, got {got}")
    return pair


def _check_beside(name: str, what: str, tensor: Tensor, x: Tensor) -> None:
    """Of any real floating type: these are not communicated."""
    check_tensors(name, **{what: tensor})
    if not tensor.is_floating_point() or tensor.device != x.device:
        raise ValueError(
            f"{name}: expected {what} of a floating dtype on {x.device}, as x is, got {tensor.dtype} on {tensor.device}"
        )


def check_pipelined_ulysses(
    name: str,
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    output_weight: Tensor,
    bias: Sequence[Tensor | None] | None,
    output_bias: Tensor | None,
    world: int,
    settings: Settings,
    head_groups: int,
    rotation: tuple[Tensor, Tensor] | None,
    head_norms: tuple[Tensor, Tensor] | None,
    documents: Tensor | None,
    key_mask: Tensor | None,
    dropout_seed: int | None,
    config: OverlapConfig,
) -> tuple[Tensor, list[Tensor], list[Tensor | None], Tensor, Tensor | None]:
    """The same of :func:`~odysseus_kernels.pipelined_ulysses`.

    Raises:
        ValueError: naming what was expected and given.
    """
    x, weights, biases, output_weight, _ = check_pipelined_attention(
        name, x, weight, output_weight, bias, None, world, 1, settings, rotation, head_norms, documents, key_mask,
        dropout_seed, config,
    )  # fmt: skip
    heads = weights[1].shape[0] // settings.head_dim
    if isinstance(head_groups, bool) or not isinstance(head_groups, int) or head_groups < 1 or heads % head_groups:
        raise ValueError(
            f"{name}: expected head_groups to divide the {heads} key/value heads of a rank, got {head_groups!r}"
        )
    if output_bias is None:
        return x, weights, biases, output_weight, None
    check_tensors(name, bias=output_bias)
    (output_bias,) = under_autocast(x.device, output_bias)
    features, rest = divmod(output_weight.shape[0], world)
    if rest or output_bias.shape != (features,):
        raise ValueError(
            f"{name}: expected output_bias [{output_weight.shape[0] / world:g}], a rank's share, got "
            f"{list(output_bias.shape)}"
        )
    check_bias(name, x, output_weight[:features], output_bias, "output_bias")
    return x, weights, biases, output_weight, output_bias
