"""What it costs to compute causal attention piece by piece: ``python -m benchmarks.layers.pieces``.

A pipelined block (``ody.pipelined_attention``) computes the queries of one piece of the sequence after another, each
over all keys up to its end.  Here the same is done in one process, without anything that travels, beside the kernel's
one call for the whole sequence.  Both take turns within each round; printed are medians of the ratios within rounds and
the quartiles' distance.  A wrong result has no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.common.measure import interquartile_spread, median, paired_ratio, take_turns
from odysseus_kernels.attention.layout import piece_rows
from odysseus_kernels.attention.local import attend, attend_backward
from odysseus_kernels.attention.prefix import PrefixAttention
from odysseus_kernels.attention.visits import Visits
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.testing.compare import relative_error, rounding_tolerance

__all__ = ["PiecesCase", "main", "measure_pieces"]

Run = Callable[[], tuple[Tensor, ...]]


@dataclasses.dataclass(frozen=True)
class PiecesCase:
    """Attention of one rank's heads.

    Attributes:
        tokens: L, of the whole sequence.
        heads, kv_heads, head_dim: of one rank.
        pieces: how many.
        dtype: of queries, keys and values.
    """

    tokens: int
    heads: int
    kv_heads: int
    head_dim: int
    pieces: int
    dtype: torch.dtype = torch.float32


def measure_pieces(case: PiecesCase, rounds: int) -> dict[str, list[float]]:
    """Seconds of ``"forward whole"``, ``"forward pieces"``, ``"backward whole"`` and ``"backward pieces"``.

    Raises:
        ValueError: fewer tokens than pieces.
        ArithmeticError: pieces do not give what the whole gives.
    """
    calls = _calls(case)
    for phase in ("forward", "backward"):
        whole, pieces = calls[f"{phase} whole"](), calls[f"{phase} pieces"]()
        for expected, found in zip(whole, pieces, strict=True):
            limit = rounding_tolerance(case.dtype, terms=case.tokens, roundings=2)
            if not (error := relative_error(found, expected.double())) <= limit:
                raise ArithmeticError(f"{phase}: expected the whole's numbers within {limit:.1e}, got {error:.1e}")
    return take_turns(calls, rounds=rounds, barrier=lambda: None, synchronize=lambda: None)


def _calls(case: PiecesCase) -> dict[str, Run]:
    generator = torch.Generator().manual_seed(0)
    scale, wide = case.head_dim**-0.5, accumulator_dtype(case.dtype)

    def draw(heads: int) -> Tensor:
        """As projections lay them out: the heads of a token beside one another."""
        flat = torch.randn(1, case.tokens, heads, case.head_dim, generator=generator)
        return flat.to(case.dtype).transpose(1, 2)

    q, k, v, grad = draw(case.heads), draw(case.kv_heads), draw(case.kv_heads), draw(case.heads)
    settings = Visits(None, True, "zigzag", None, scale, 0.0, 0, 0, "sdpa")
    attention = PrefixAttention(settings, torch.arange(case.tokens))
    ends = [0, *itertools.accumulate(piece_rows(case.tokens, case.pieces))]
    spans = list(itertools.pairwise(ends))
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=wide)

    def forward() -> tuple[Tensor, ...]:
        return attend(q, k, v, scale=scale, causal=True)

    def forward_pieces() -> tuple[Tensor, ...]:
        for start, stop in spans:
            attention.forward(start, stop, q, k, v, out, lse)
        return out, lse

    def backward() -> tuple[Tensor, ...]:
        return attend_backward(grad, q, k, v, out, lse, scale=scale, causal=True)

    def backward_pieces() -> tuple[Tensor, ...]:
        dk, dv = (torch.zeros(x.shape, dtype=wide) for x in (k, v))
        dq = torch.empty(q.shape, dtype=wide)
        for start, stop in reversed(spans):
            dq[:, :, start:stop] = attention.backward(start, stop, grad[:, :, start:stop], q, k, v, out, lse, dk, dv)
        return dq, dk, dv

    return {
        "forward whole": forward,
        "forward pieces": forward_pieces,
        "backward whole": backward,
        "backward pieces": backward_pieces,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of the whole sequence")
    parser.add_argument("--heads", type=int, default=8, help="of this rank")
    parser.add_argument("--kv-heads", type=int, help="of this rank (default: as many as heads)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--pieces", type=int, nargs="+", default=[8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    console = Console(highlight=False)
    for pieces in given.pieces:
        case = PiecesCase(
            given.tokens,
            given.heads,
            given.kv_heads or given.heads,
            given.head_dim,
            pieces,
            getattr(torch, given.dtype),
        )
        try:
            samples = measure_pieces(case, given.rounds)
        except (ValueError, ArithmeticError) as error:
            console.print(f"{pieces} pieces: {error}", style="red")
            return 1
        for phase in ("forward", "backward"):
            whole, cut = samples[f"{phase} whole"], samples[f"{phase} pieces"]
            console.print(
                f"causal attention, {given.tokens} tokens, {given.heads} heads of {given.head_dim}, {given.dtype}, "
                f"{phase}: {median(whole):.3f} s whole, {median(cut):.3f} s in {pieces} pieces, "
                f"[bold]x {paired_ratio(cut, whole):.3f}[/bold] (quartiles {interquartile_spread(cut):.0%} apart, "
                f"{given.rounds} rounds, {given.threads} threads)",
                soft_wrap=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
