"""How an attention block communicates: which pieces are gathered, visited and scattered when.

Without a ring all of it is one pipeline each way.  With one, every ring rank has T of the L tokens:

forward   a pipeline gathers and projects piece by piece and attends to the keys that are here; then the other ring
          ranks' keys and values come by; then the output's partial sums are scattered as they are produced
backward  the output's gradients are gathered as they are multiplied; then keys and values come by once more, and their
          gradients travel back; then a pipeline, last piece first, adds what the keys here contribute, gathers x and
          scatters its gradients
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.attention.parts import exchange_of, seen_of
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.exchange import Exchange
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.pipeline import Pipeline
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.transport import Call, Gather, Scatter, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._attention_pieces import BackwardPieces, ForwardPieces, Pieces, Settings
from odysseus_kernels.ops._rotation import HeadNorm

__all__ = ["Block"]

_NAME = "pipelined_attention"
_RING_NAME = "ring_attention"
Run = Callable[[Transport, OverlapConfig], None]
Direction = Literal["forward", "backward"]


class Block:
    """One call on one rank: x [B, s, d] of T = N * s tokens, weights and settings."""

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        output_weight: Tensor,
        rotation: Sequence[Tensor],
        head_norms: Sequence[Tensor],
        documents: Tensor | None,
        group: dist.ProcessGroup,
        ring: dist.ProcessGroup | None,
        config: OverlapConfig,
        settings: Settings,
    ) -> None:
        self._x, self._weights, self._output_weight = x.contiguous(), weights, output_weight
        self._rotation, self._documents = tuple(rotation), documents
        self._norms = [HeadNorm(weight, settings.eps) for weight in head_norms]
        self._group, self._ring, self._config, self._settings = group, ring, config, settings
        self._world, self._rank = group.size(), group.rank()
        self._pieces = Pieces(
            settings, self._world, 1 if ring is None else ring.size(), 0 if ring is None else ring.rank()
        )
        self._visits = settings.visits(documents)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        biases: Sequence[Tensor | None],
        output_bias: Tensor | None,
        prefetch: Prefetch | None,
        *,
        keep: bool,
    ) -> list[Tensor]:
        """y and what backward needs (:attr:`ForwardPieces.results`); sends ``prefetch`` ahead meanwhile."""
        work = ForwardPieces(self._x, self._weights, self._output_weight, bool(self._norms), self._pieces, keep=keep)
        work.prepare(
            self._weights, biases, self._output_weight, output_bias, self._rotation, self._norms, self._documents,
            self._pieces, self._rank,
        )  # fmt: skip
        ring, spans = self._ring is not None, self._settings.spans

        def produce(piece: int, target: int, block: Tensor) -> None:
            work.produce(target, *spans[piece], block)

        def run(transport: Transport, settled: OverlapConfig) -> None:
            pipeline = Pipeline(
                (self._x,), spans, work.consume, work.compute, None if ring else work.y, None if ring else produce
            )
            self._execute(transport, settled, "forward", pipeline, None if ring else prefetch)

        products = self._x.numel() * self._world * sum(weight.shape[0] for weight in self._weights)
        output = work.out.numel() * self._output_weight.shape[0]
        flops = 2 * (products + self._attended(work.q, 2) + (0 if ring else output))
        self._dispatch("forward", "", flops, self._x.nbytes, 0 if ring else work.y.nbytes, run)
        if ring:
            self._visit_others(work)
            work.out.copy_(work.attended)
            scatter = Scatter(work.y, work.produce)
            self._dispatch(
                "forward", ", output", 2 * output, 0, work.y.nbytes, self._plain_run("forward", None, scatter, prefetch)
            )
        return work.results

    def _visit_others(self, work: ForwardPieces) -> None:
        assert self._ring is not None
        me, ranks, heads = self._pieces.ring_rank, self._pieces.ring, self._pieces.heads
        q, out = heads(work.q), heads(work.attended)

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            if rank == me:  # this rank's own keys have been attended to
                return
            for part, (keys, values) in seen_of(parts, me, rank, given):
                self._visits.forward(me, rank, ranks, q, keys, values, out, work.lse, part.rows)

        shared = (heads(work.k).contiguous(), heads(work.v).contiguous())
        parts = self._visits.parts(ranks, q.shape[2])
        self._exchange("forward", exchange_of(parts, visit, shared), work.q, 2)

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward(
        self,
        grad: Tensor,
        saved: Sequence[Tensor],
        input_needed: bool,
        weights_needed: Sequence[bool],
        biases_needed: Sequence[bool],
        output_needed: Sequence[bool],
        prefetch: Prefetch | None,
        *,
        norms_needed: bool,
    ) -> list[Tensor]:
        """[dx, dweights..., dbiases..., doutput_weight, doutput_bias, dnorms...]; empty where not needed."""
        x, ring = self._x, self._ring is not None
        regather = any(weights_needed) and saved[-1].numel() == 0
        work = BackwardPieces(
            x, self._weights, self._output_weight, self._rotation, self._norms, self._documents, saved, self._pieces,
            self._rank, regather=regather,
        )  # fmt: skip
        dx = x.new_empty(x.shape if input_needed else (0,))
        spans = self._settings.spans[::-1]

        def piece_of(index: int) -> int:
            return len(spans) - 1 - index

        def consume(index: int, source: int, blocks: tuple[Tensor, ...]) -> None:
            if not ring:
                work.consume_gradient(source, *spans[index], blocks[0])

        pipeline = Pipeline(
            (() if ring else (grad,)) + ((x,) if regather else ()),
            spans,
            consume,
            lambda index: work.compute(piece_of(index)),
            out=dx if input_needed else None,
            produce=(lambda index, target, block: work.produce(piece_of(index), target, block))
            if input_needed
            else None,
            # Gradients of the projections' weights are all that x is gathered for.
            late=int(regather),
            conclude=(lambda index, source, blocks: work.conclude(piece_of(index), source, blocks[0]))
            if regather
            else None,
        )

        def run(transport: Transport, settled: OverlapConfig) -> None:
            if not ring:
                work.restart(weights_needed, biases_needed, output_needed)
            self._execute(transport, settled, "backward", pipeline, prefetch)

        output = 2 * work.out.numel() * self._output_weight.shape[0]
        if ring:
            work.restart(weights_needed, biases_needed, output_needed)
            gather = Gather(grad, work.consume_gradient)
            self._dispatch("backward", ", output", 2 * output, grad.nbytes, 0, self._plain_run("backward", gather))
            self._visit_others_back(work)
        features = sum(weight.shape[0] for weight in self._weights)
        products = x.numel() * self._world * features * (input_needed + any(weights_needed))
        flops = 2 * (products + self._attended(work.q, 5) + (0 if ring else output))
        shards = sum(shard.nbytes for shard in pipeline.shards)
        self._dispatch("backward", "", flops, shards, dx.nbytes, run)
        results = work.gradients(grad, norms_needed=norms_needed)
        return [dx, *(x.new_empty(0) if result is None else result for result in results)]

    def _visit_others_back(self, work: BackwardPieces) -> None:
        assert self._ring is not None and work.dq is not None
        me, ranks, heads = self._pieces.ring_rank, self._pieces.ring, self._pieces.heads
        grad, q, out, dq = heads(work.incoming), heads(work.q), heads(work.out), work.dq

        def visit(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
            if rank == me:  # what its own keys contribute is added piece by piece, later
                for total in made:
                    total.zero_()
                return
            for part, (keys, values, dk, dv) in seen_of(parts, me, rank, given, made):
                self._visits.backward(me, rank, ranks, grad, q, keys, values, out, work.lse, dq, dk, dv, part.rows)

        shared = (heads(work.k).contiguous(), heads(work.v).contiguous())
        parts = self._visits.parts(ranks, q.shape[2])
        self._exchange("backward", exchange_of(parts, visit, shared, (work.dk, work.dv)), work.q, 5)

    # ---- both --------------------------------------------------------------------------------------------------------

    def _exchange(self, phase: Direction, exchange: Exchange, q: Tensor, products: int) -> None:
        """Keys and values of the ring come by.  It has no unfused form: nothing here holds those of all ranks."""
        assert self._ring is not None

        def run(transport: Transport, settled: OverlapConfig) -> None:
            fused = dataclasses.replace(settled, mode="fused")
            call = Call(_RING_NAME, phase, fused, shapes=self._shapes(), collective="send_recv", exchange=exchange)
            transport.execute(call)

        nbytes = sum(tensor.nbytes for tensor in exchange.shared)
        about = Phase(
            operator=_RING_NAME,
            phase=phase,
            shapes=f"q {list(q.shape)}, beside {_NAME}",
            own="",
            dtype=q.dtype,
            flops=2 * self._attended(q, products) * (self._pieces.ring - 1),
            gathered_bytes=nbytes,
            scattered_bytes=sum(tensor.nbytes for tensor in exchange.sums),
        )
        config = dataclasses.replace(self._config, mode="fused")
        dispatch(self._ring, config, q.device, run, about)

    def _dispatch(self, phase: Direction, part: str, flops: int, gathered: int, scattered: int, run: Run) -> None:
        settings = self._settings
        pieces = f"{len(settings.spans)} pieces{part}"
        about = Phase(
            operator=_NAME,
            phase=phase,
            shapes=f"x {list(self._x.shape)}, {pieces}, window={settings.window}, gathers {gathered} bytes",
            own=str([weight.shape[0] for weight in self._weights]),
            dtype=self._x.dtype,
            flops=flops,
            gathered_bytes=gathered,
            scattered_bytes=scattered,
        )
        dispatch(self._group, self._config, self._x.device, run, about)

    def _plain_run(
        self,
        phase: Direction,
        gather: Gather | None = None,
        scatter: Scatter | None = None,
        prefetch: Prefetch | None = None,
    ) -> Run:
        def run(transport: Transport, settled: OverlapConfig) -> None:
            call = Call(_NAME, phase, settled, gather, scatter, self._shapes(), prefetch=prefetch)
            if settled.mode != "unfused":
                transport.execute(call)
            else:
                _unfused(transport, call)

        return run

    def _execute(
        self,
        transport: Transport,
        settled: OverlapConfig,
        phase: Direction,
        pipeline: Pipeline,
        prefetch: Prefetch | None,
    ) -> None:
        """The pipeline; or without anything to gather, or ``"unfused"``: everything gathered, computed, scattered."""
        call = Call(_NAME, phase, settled, pipeline=pipeline, shapes=self._shapes(), prefetch=prefetch)
        if settled.mode != "unfused" and pipeline.shards:
            transport.execute(call)
            return
        everyone = []
        for shard in pipeline.shards:
            whole = shard.new_empty((self._world, *shard.shape))
            gather = Gather(shard, _unused)
            transport.all_gather(dataclasses.replace(call, pipeline=None, gather=gather, prefetch=None), whole)
            everyone.append(whole)
        out = pipeline.out
        results = None if out is None else out.new_empty((self._world, *out.shape))
        for index, (start, stop) in enumerate(pipeline.spans):
            for source in range(self._world):
                early = everyone[: pipeline.early]
                pipeline.consume(index, source, tuple(whole[source][:, start:stop] for whole in early))
            pipeline.compute(index)
            if pipeline.conclude is not None:
                for source in range(self._world):
                    late = everyone[pipeline.early :]
                    pipeline.conclude(index, source, tuple(whole[source][:, start:stop] for whole in late))
            if results is not None and pipeline.produce is not None:
                for target in range(self._world):
                    pipeline.produce(index, target, results[target][:, start:stop])
        if out is not None and results is not None:
            transport.reduce_scatter(dataclasses.replace(call, pipeline=None, scatter=Scatter(out, _unused)), results)

    def _attended(self, q: Tensor, products: int) -> int:
        """Multiply-adds of ``products`` products of causal attention among this ring rank's tokens."""
        return products * q.numel() * q.shape[1] // 2

    def _shapes(self) -> str:
        """What must be equal on all ranks beside what is gathered and scattered."""
        parts = [f"x {list(self._x.shape)}, gathered={self._config.gathered!r}"]
        parts.append(self._settings.described(normed=bool(self._norms), rotated=bool(self._rotation)))
        if self._visits.host_documents is not None:
            ids = self._visits.host_documents.contiguous().numpy().tobytes()
            parts.append(f"documents {hashlib.blake2b(ids, digest_size=6).hexdigest()}")
        return ", ".join(parts)


def _unfused(transport: Transport, call: Call) -> None:
    """A gather or a scatter whole, by one collective."""
    if call.gather is not None:
        shard, consume = call.gather.shard, call.gather.consume
        everyone = shard.new_empty((transport.world, *shard.shape))
        transport.all_gather(call, everyone)
        for source in range(transport.world):
            consume(source, 0, shard.shape[1], everyone[source])
    if call.scatter is not None:
        out = call.scatter.out
        results = out.new_empty((transport.world, *out.shape))
        for target in range(transport.world):
            call.scatter.produce(target, 0, out.shape[1], results[target])
        transport.reduce_scatter(call, results)


def _unused(*_: object) -> None:
    raise AssertionError("the transport's own copy replaces this callback")
