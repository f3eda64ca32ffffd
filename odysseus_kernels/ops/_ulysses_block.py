"""How a block of Ulysses' attention communicates: one exchange after another, attention within their visits."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm import functional
from odysseus_kernels.comm.choice.selection import Phase
from odysseus_kernels.comm.exchange import Visit
from odysseus_kernels.comm.groups import dispatch
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.reduce import accumulator_dtype
from odysseus_kernels.comm.transport import Call, Transport
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.ops._attention_pieces import Settings
from odysseus_kernels.ops._exchange import execute_exchange
from odysseus_kernels.ops._rotation import HeadNorm
from odysseus_kernels.ops._ulysses_groups import HeadAttention, HeadGroups
from odysseus_kernels.ops._ulysses_heads import BackwardHeads, ForwardHeads, Needed

__all__ = ["NAME", "UlyssesBlock"]

NAME = "pipelined_ulysses"
Direction = Literal["forward", "backward"]


class UlyssesBlock:
    """One call on one rank: x [B, L/N, d], this rank's shards of the weights, and settings."""

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
        head_groups: int,
    ) -> None:
        self._x, self._output_weight = x.contiguous(), output_weight
        self._weights = [weight.contiguous() for weight in weights]
        self._rotation = tuple(rotation)
        self._norms = [HeadNorm(weight, settings.eps) for weight in head_norms]
        self._group, self._config, self._settings = group, config, settings
        self._groups = HeadGroups(
            head_groups, settings.head_dim, weights[0].shape[0], weights[1].shape[0], group.size()
        )
        self._length = x.shape[1] * group.size()
        # Dropout knows a head by its number in the whole model.
        first = group.rank() * self._groups.queries // settings.head_dim
        visits = dataclasses.replace(settings, first_head=first).visits(documents)
        self._documents = visits.host_documents
        self._attention = HeadAttention(visits, torch.arange(self._length, device="cpu"))

    def forward(
        self,
        biases: Sequence[Tensor | None],
        output_bias: Tensor | None,
        prefetch: Prefetch | None,
        *,
        keep: bool,
    ) -> list[Tensor]:
        """y and what backward needs (:attr:`ForwardHeads.results`); sends ``prefetch`` ahead at the end."""
        bias = None
        if output_bias is not None:
            bias = functional.all_gather(output_bias, self._group, operator=NAME, config=self._config, keeps_ahead=True)
        work = ForwardHeads(self._x, self._groups, normed=bool(self._norms), keep=keep)
        work.prepare(
            self._x,
            self._weights,
            [None if one is None else one.contiguous() for one in biases],
            self._output_weight,
            self._rotation,
            self._norms,
            self._attention,
        )

        def run(transport: Transport, settled: OverlapConfig) -> None:
            work.restart()
            self._run(transport, settled, "forward", work, prefetch)

        self._dispatch("forward", run, products=1, attention=2, sums=False)
        return [work.output(bias), *work.results]

    def backward(
        self,
        grad: Tensor,
        saved: Sequence[Tensor],
        needed: Needed,
        prefetch: Prefetch | None,
        *,
        bias_needed: bool,
    ) -> list[Tensor]:
        """[dx, dweights..., dbiases..., doutput_weight, dnorms..., doutput_bias]; empty where not needed."""
        work = BackwardHeads(
            grad, self._x, self._weights, self._output_weight, self._rotation, self._norms, self._attention, saved,
            self._groups, needed,
        )  # fmt: skip

        def run(transport: Transport, settled: OverlapConfig) -> None:
            work.restart()
            self._run(transport, settled, "backward", work, prefetch)

        if needed.attention or needed.output:
            sums = needed.output or any(needed.weights)
            self._dispatch("backward", run, products=needed.input + sums, attention=5, sums=sums)
        else:
            work.restart()
        dbias = grad.new_empty(0)
        if bias_needed:
            total = grad.view(-1, grad.shape[-1]).sum(0, dtype=accumulator_dtype(grad.dtype))
            dbias = functional.reduce_scatter(
                total, self._group, operator=NAME, phase="backward", config=self._config, keeps_ahead=True
            ).to(grad.dtype)
        return [*work.gradients(), dbias]

    def _run(
        self,
        transport: Transport,
        settled: OverlapConfig,
        phase: Direction,
        work: ForwardHeads | BackwardHeads,
        prefetch: Prefetch | None,
    ) -> None:
        """All stages; each sends ahead what the next one shares, and the last one ``prefetch``."""
        call = Call(NAME, phase, settled, shapes=self._shapes() + work.described)
        following = work.shared(0)
        for stage in range(work.stages):
            shared, last = following, stage + 1 == work.stages
            following = () if last else work.shared(stage + 1)
            exchange, units = work.exchange(stage, shared), work.units(stage)
            if exchange.gives or exchange.makes:
                visit = _beside(exchange.visit, units, transport.world)
                ahead = prefetch if last else Prefetch.of_shared(following)
                exchange = dataclasses.replace(exchange, visit=visit)
                execute_exchange(transport, dataclasses.replace(call, exchange=exchange, prefetch=ahead))
            else:
                for unit in units:
                    unit()
            work.end(stage)

    def _dispatch(
        self,
        phase: Direction,
        run: Callable[[Transport, OverlapConfig], None],
        *,
        products: int,
        attention: int,
        sums: bool,
    ) -> None:
        weights = [*self._weights, self._output_weight]
        nbytes = sum(weight.nbytes for weight in weights)
        multiplied = self._x.shape[:2].numel() * self._group.size() * sum(weight.numel() for weight in weights)
        attended = self._x.shape[0] * self._groups.queries * self._length**2 // 2
        about = Phase(
            operator=NAME,
            phase=phase,
            # Not seeds and documents, which are others in every step: what was measured before has to be found.
            shapes=f"{self._sizes()}, weights {[list(weight.shape) for weight in weights]}, {products}, {sums}",
            own="",
            dtype=self._x.dtype,
            flops=2 * (multiplied * products + attended * attention),
            gathered_bytes=nbytes,
            scattered_bytes=nbytes if sums else 0,
        )
        dispatch(self._group, self._config, self._x.device, run, about)

    def _sizes(self) -> str:
        return f"x {list(self._x.shape)}, {self._groups.count} groups of heads, window={self._settings.window}"

    def _shapes(self) -> str:
        """What must be equal on all ranks beside what is communicated."""
        parts = [f"x {list(self._x.shape)}, {self._groups.count} groups of heads"]
        parts.append(self._settings.described(normed=bool(self._norms), rotated=bool(self._rotation)))
        if self._documents is not None:
            ids = self._documents.contiguous().numpy().tobytes()
            parts.append(f"documents {hashlib.blake2b(ids, digest_size=6).hexdigest()}")
        return ", ".join(parts)


def _beside(visit: Visit, units: Sequence[Callable[[], None]], world: int) -> Visit:
    """``visit``, and behind each of the ``world`` visits its share of ``units``: all transfers have one beside them."""
    done = 0

    def visiting(rank: int, given: tuple[Tensor, ...], made: tuple[Tensor, ...]) -> None:
        nonlocal done
        visit(rank, given, made)
        for unit in units[len(units) * done // world : len(units) * (done + 1) // world]:
            unit()
        done += 1

    return visiting
