"""What a pipelined attention block computes for each piece of the sequence, forward and backward.

Nothing here decides an order: a :class:`~odysseus_kernels.comm.pipeline.Pipeline` calls back.  Tensors as long as the
sequence are those of this rank's heads only; of what is as wide as the hidden state there is a piece at most.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.attention.prefix import PrefixAttention
from odysseus_kernels.attention.visits import Visits
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.pipeline import Pipeline
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._products import CommonBiasGradient, WeightGradient, multiply, project
from odysseus_kernels.ops._rotation import HeadNorm, rotate, rotate_backward

__all__ = ["Block", "Settings"]

_NAME = "pipelined_attention"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a block is told beside tensors; see :func:`~odysseus_kernels.pipelined_attention`.

    Attributes:
        edges: rows of a rank's shard at which pieces begin, and last their number.
        seed: of dropout.
    """

    head_dim: int
    edges: tuple[int, ...]
    eps: float
    window: int | None
    scale: float
    dropout: float
    seed: int
    first_head: int
    kernel: str

    def key(self) -> str:
        """As a string: what a custom operator takes."""
        return json.dumps(dataclasses.astuple(self))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(key: str) -> Settings:
        """The settings that :meth:`key` turned into ``key``."""
        head_dim, edges, *rest = json.loads(key)
        return Settings(head_dim, tuple(edges), *rest)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Rows of a shard of each piece, in the order of the sequence."""
        return tuple(zip(self.edges, self.edges[1:], strict=False))


class Block:
    """One call on one rank: x [B, s, d] of L = N * s tokens, weights and settings."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        output_weight: Tensor,
        rotation: Sequence[Tensor],
        head_norms: Sequence[Tensor],
        documents: Tensor | None,
        group: dist.ProcessGroup,
        config: OverlapConfig,
        settings: Settings,
    ) -> None:
        self._x, self._weights, self._output_weight = x.contiguous(), weights, output_weight
        self._rotation = tuple(rotation)
        self._norms = [HeadNorm(weight, settings.eps) for weight in head_norms]
        self._group, self._config, self._settings = group, config, settings
        self._world, self._rank = group.size(), group.rank()
        self._visits = Visits(
            documents, True, "contiguous", settings.window, settings.scale, settings.dropout, settings.seed,
            settings.first_head, settings.kernel,
        )  # fmt: skip
        self._attention = PrefixAttention(self._visits)

    # ---- forward -----------------------------------------------------------------------------------------------------

    @staticmethod
    def outputs(
        x: Tensor,
        weights: Sequence[Tensor],
        output_weight: Tensor,
        normed: bool,
        world: int,
        settings: Settings,
        *,
        keep: bool,
    ) -> list[Tensor]:
        """Empty tensors for what forward returns."""
        batch, rows, width = x.shape
        length = rows * world
        queries, keys, values = (weight.shape[0] for weight in weights)
        wide = accumulator_dtype(x.dtype)
        return [
            x.new_empty((batch, rows, output_weight.shape[0])),
            *(x.new_empty((batch, length, n)) for n in (queries, keys, values)),
            x.new_empty((batch, length, queries)),
            x.new_empty((batch, queries // settings.head_dim, length), dtype=wide),
            *(x.new_empty((batch, length, n) if normed else (0,)) for n in (queries, keys)),
            x.new_empty((batch, length, width) if keep else (0,)),
        ]

    def forward(self, biases: Sequence[Tensor | None], output_bias: Tensor | None, *, keep: bool) -> list[Tensor]:
        """y and what backward needs, as :meth:`outputs` makes them."""
        made = self.outputs(
            self._x, self._weights, self._output_weight, bool(self._norms), self._world, self._settings, keep=keep
        )
        y, q, k, v, out, lse, raw_q, raw_k, gathered = made
        normed = bool(self._norms)
        projected = (raw_q, raw_k, v) if normed else (q, k, v)

        def consume(piece: int, source: int, blocks: tuple[Tensor, ...]) -> None:
            rows = self._stripe(piece, source)
            for target, weight, bias in zip(projected, self._weights, biases, strict=True):
                project(target[:, rows], blocks[0], weight, bias)
            if keep:
                gathered[:, rows].copy_(blocks[0])

        def compute(piece: int) -> None:
            rows = self._tokens(piece)
            for index, (raw, done) in enumerate(((projected[0], q), (projected[1], k))):
                if not (normed or self._rotation):
                    break
                heads = self._split(raw[:, rows])
                if normed:
                    heads = self._norms[index].forward(heads)
                if self._rotation:
                    heads = rotate(heads, *(table[:, rows] for table in self._rotation))
                done[:, rows] = heads.flatten(2)
            queries, keys, values, outs = map(self._heads, (q, k, v, out))
            self._attention.forward(rows.start, rows.stop, queries, keys, values, outs, lse)

        def produce(piece: int, target: int, block: Tensor) -> None:
            bias = output_bias if target == self._rank else None
            project(block, out[:, self._stripe(piece, target)], self._output_weight, bias)

        def run(transport: Transport, settled: OverlapConfig) -> None:
            pipeline = Pipeline((self._x,), self._settings.spans, consume, compute, y, produce)
            self._run(transport, Call(_NAME, "forward", settled, pipeline=pipeline, shapes=self._shapes()))

        products = self._x.numel() * self._world * sum(weight.shape[0] for weight in self._weights)
        attended = y.shape[0] * (y.shape[1] * self._world) ** 2 * q.shape[2]  # two products, causal
        output = self._x.shape[0] * self._x.shape[1] * self._world * self._output_weight.numel()
        self._dispatch("forward", 2 * (products + attended + output), self._x.nbytes, y.nbytes, run)
        return made

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward(
        self,
        grad: Tensor,
        saved: Sequence[Tensor],
        input_needed: bool,
        weights_needed: Sequence[bool],
        biases_needed: Sequence[bool],
        output_needed: Sequence[bool],
        *,
        norms_needed: bool,
    ) -> list[Tensor]:
        """[dx, dweights..., dbiases..., doutput_weight, doutput_bias, dnorms...]; empty where not needed."""
        x, world = self._x, self._world
        q, k, v, out, lse, raw_q, raw_k, gathered = saved
        wide = accumulator_dtype(x.dtype)
        kept = gathered if gathered.numel() else None
        regather = any(weights_needed) and kept is None
        dx = x.new_empty(x.shape if input_needed else (0,))
        spans = self._settings.spans[::-1]
        most = max(stop - start for start, stop in spans) * world
        incoming = x.new_empty((x.shape[0], most, q.shape[2]))  # gradient of a piece's attention output
        projected = [x.new_empty((x.shape[0], most, weight.shape[0])) for weight in self._weights]
        dk, dv = (self._heads(torch.empty_like(t, dtype=wide)) for t in (k, v))
        sums: list[WeightGradient] = []
        output_sums: list[WeightGradient] = []
        bias = CommonBiasGradient(self._output_weight, self._rank, world)
        blocks_of: dict[int, Tensor] = {}  # rows of x of each rank, of the piece at hand

        def piece_of(index: int) -> int:
            return len(spans) - 1 - index

        def consume(index: int, source: int, blocks: tuple[Tensor, ...]) -> None:
            rows, part = self._stripe(piece_of(index), source), self._part(piece_of(index), source)
            multiply(incoming[:, part], blocks[0], self._output_weight)
            if output_needed[0]:
                output_sums[0].add(blocks[0], out[:, rows])
            if output_needed[1]:
                bias.add(source, *spans[index], blocks[0])
            if regather:
                blocks_of[source] = blocks[1]

        def compute(index: int) -> None:
            piece = piece_of(index)
            rows = self._tokens(piece)
            count = rows.stop - rows.start
            queries, keys, values, outs = map(self._heads, (q, k, v, out))
            arriving = self._heads(incoming[:, :count])
            dq = self._attention.backward(rows.start, rows.stop, arriving, queries, keys, values, outs, lse, dk, dv)
            grads = [dq, dk[:, :, rows], dv[:, :, rows]]
            for number, (found, into) in enumerate(zip(grads, projected, strict=True)):
                heads = found.transpose(1, 2)
                if number < 2 and self._rotation:
                    heads = rotate_backward(heads, *(table[:, rows] for table in self._rotation))
                if number < 2 and self._norms:
                    heads = self._norms[number].backward(heads, self._split((raw_q, raw_k)[number][:, rows]))
                into[:, :count] = heads.flatten(2)
            for total, made in zip(sums, projected, strict=True):
                if kept is not None or not regather:
                    total.add(made[:, :count], None if kept is None else kept[:, rows])
                    continue
                for source in range(world):
                    total.add(made[:, self._part(piece, source)], blocks_of[source])

        def produce(index: int, target: int, block: Tensor) -> None:
            part = self._part(piece_of(index), target)
            for number, (made, weight) in enumerate(zip(projected, self._weights, strict=True)):
                multiply(block, made[:, part], weight, add=number > 0)

        def run(transport: Transport, settled: OverlapConfig) -> None:
            nonlocal bias
            sums[:] = [
                WeightGradient(weight, weight_needed=needed, bias_needed=bias_needed)
                for weight, needed, bias_needed in zip(self._weights, weights_needed, biases_needed, strict=True)
            ]
            output_sums[:] = [WeightGradient(self._output_weight, weight_needed=output_needed[0])]
            bias = CommonBiasGradient(self._output_weight, self._rank, world)
            for norm in self._norms:
                norm.restart()
            dk.zero_()
            dv.zero_()
            pipeline = Pipeline(
                (grad, x) if regather else (grad,),
                spans,
                consume,
                compute,
                dx if input_needed else None,
                produce if input_needed else None,
                holds=regather,
            )
            self._run(transport, Call(_NAME, "backward", settled, pipeline=pipeline, shapes=self._shapes()))

        features = sum(weight.shape[0] for weight in self._weights)
        products = x.numel() * world * features * (input_needed + any(weights_needed))
        attended = 5 * x.shape[0] * (x.shape[1] * world) ** 2 * q.shape[2] // 2
        output = 2 * x.shape[0] * x.shape[1] * world * self._output_weight.numel()
        shards = grad.nbytes + (x.nbytes if regather else 0)
        self._dispatch("backward", 2 * (products + attended + output), shards, dx.nbytes, run)
        results = [
            *(total.weight() for total in sums),
            *(total.bias() for total in sums),
            output_sums[0].weight(),
            bias.total(grad) if output_needed[1] else None,
            *(norm.weight_gradient() if norms_needed else None for norm in self._norms),
        ]
        return [dx, *(x.new_empty(0) if result is None else result for result in results)]

    # ---- both --------------------------------------------------------------------------------------------------------

    def _dispatch(
        self, phase: Literal["forward", "backward"], flops: int, gathered: int, scattered: int, run: Any
    ) -> None:
        settings = self._settings
        about = Phase(
            operator=_NAME,
            phase=phase,
            shapes=f"x {list(self._x.shape)}, {len(settings.spans)} pieces, window={settings.window}, {gathered} bytes",
            own=str([weight.shape[0] for weight in self._weights]),
            dtype=self._x.dtype,
            flops=flops,
            gathered_bytes=gathered,
            scattered_bytes=scattered,
        )
        dispatch(self._group, self._config, self._x.device, run, about)

    def _run(self, transport: Transport, call: Call) -> None:
        """The call as a pipeline, or ``"unfused"``: everything gathered, all pieces, everything reduced."""
        pipeline = call.pipeline
        assert pipeline is not None
        if call.config.mode != "unfused":
            transport.execute(call)
            return
        everyone = []
        for shard in pipeline.shards:
            whole = shard.new_empty((self._world, *shard.shape))
            one = dataclasses.replace(call, pipeline=None, gather=Gather(shard, _unused))
            transport.all_gather(one, whole)
            everyone.append(whole)
        results = None if pipeline.out is None else pipeline.out.new_empty((self._world, *pipeline.out.shape))
        for index, (start, stop) in enumerate(pipeline.spans):
            for source in range(self._world):
                pipeline.consume(index, source, tuple(whole[source][:, start:stop] for whole in everyone))
            pipeline.compute(index)
            if results is not None and pipeline.produce is not None:
                for target in range(self._world):
                    pipeline.produce(index, target, results[target][:, start:stop])
        if pipeline.out is not None and results is not None:
            one = dataclasses.replace(call, pipeline=None, scatter=Scatter(pipeline.out, _unused))
            transport.reduce_scatter(one, results)

    def _shapes(self) -> str:
        """What must be equal on all ranks beside what is gathered and scattered."""
        settings = self._settings
        parts = [f"x {list(self._x.shape)}, window={settings.window}, scale={settings.scale:.6g}"]
        parts.append(f"gathered={self._config.gathered!r}")
        if settings.dropout:
            parts.append(f"dropout {settings.dropout}, seed {settings.seed}")
        if self._visits.host_documents is not None:
            ids = self._visits.host_documents.contiguous().numpy().tobytes()
            parts.append(f"documents {hashlib.blake2b(ids, digest_size=6).hexdigest()}")
        return ", ".join(parts)

    def _tokens(self, piece: int) -> slice:
        """A piece's tokens in the sequence."""
        start, stop = self._settings.spans[piece]
        return slice(start * self._world, stop * self._world)

    def _stripe(self, piece: int, rank: int) -> slice:
        """Those that ``rank`` holds."""
        start, stop = self._settings.spans[piece]
        first = start * self._world + rank * (stop - start)
        return slice(first, first + stop - start)

    def _part(self, piece: int, rank: int) -> slice:
        """The same within the piece."""
        start, stop = self._settings.spans[piece]
        return slice(rank * (stop - start), (rank + 1) * (stop - start))

    def _split(self, tensor: Tensor) -> Tensor:
        """[B, n, H * D] as [B, n, H, D]."""
        return tensor.unflatten(2, (-1, self._settings.head_dim))

    def _heads(self, tensor: Tensor) -> Tensor:
        """[B, n, H * D] as [B, H, n, D]."""
        return self._split(tensor).transpose(1, 2)


def _unused(*_: object) -> None:
    raise AssertionError("the transport's own copy replaces this callback")
