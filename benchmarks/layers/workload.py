"""One case on one rank: the stock model, its truth, and every variant as something that can be stepped and checked.

All ranks build the same stock model and the same batch from one seed.  The truth is the stock model in this process on
the whole sequence, in fp64 where that is affordable and in fp32 beyond; of results in 16 bits, the stock model's own
error in their type says how much may be lost.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.layers.alone import ComputeAlone
from benchmarks.layers.cases import GATHERING, LayerCase, Variant
from benchmarks.layers.runnable import Runnable, stepper
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.integrations.huggingface import parallelize
from odysseus_kernels.nn.sequence import shard_sequence
from odysseus_kernels.testing.compare import relative_error

__all__ = ["LayerWorkload", "Limits", "Truth"]

_TRUTH_FLOPS = 3e11
"""Operations of the whole problem up to which the truth is computed in fp64."""


@dataclasses.dataclass(frozen=True)
class Truth:
    """Of the whole sequence, in one process.

    Attributes:
        output: hidden states [1, L, d] behind the last norm, or the loss.
        input_gradient: [1, L, d], or None at the level of a model.
        gradients: of the parameters, by name.
        dtype: in which it was computed.
    """

    output: Tensor
    input_gradient: Tensor | None
    gradients: dict[str, Tensor]
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Limits:
    """Relative Frobenius errors above which a result is wrong.

    fp32: the contract's 1e-5 for outputs and 1e-4 for gradients (measured: below 1e-6).  fp64: the same number of
    roundings at 2⁻⁵³ instead of 2⁻²⁴.  16 bits: 1.5 times the stock model's own error, plus 2e-3.
    """

    output: float
    gradient: float


class LayerWorkload:
    """Tensors, truth and variants of ``case``.

    Args:
        case: the row.
        dtype: of parameters and activations.
        seed: of weights and batch.
    """

    def __init__(self, case: LayerCase, *, dtype: torch.dtype, seed: int) -> None:
        self.case, self.dtype = case, dtype
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._seed = seed
        torch.manual_seed(seed)
        self.stock = LlamaForCausalLM(self.config)
        with torch.no_grad():
            for parameter in self.stock.parameters():
                if parameter.ndim == 1:  # norms start at one, where mistakes in their use would not show
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        self.stock.to(dtype)
        generator = torch.Generator().manual_seed(seed)
        size = (1, case.tokens, case.hidden)
        self.x = torch.randn(size, generator=generator).to(dtype)
        self.grad = torch.randn(size, generator=generator).to(dtype)
        self.batch = {"input_ids": torch.randint(case.vocabulary, (1, case.tokens), generator=generator)}
        self.batch["labels"] = self.batch["input_ids"].clone()
        self._meshes: dict[tuple[Any, ...], DeviceMesh] = {}

    @functools.cached_property
    def config(self) -> LlamaConfig:
        """Of the stock model."""
        case = self.case
        return LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            num_hidden_layers=case.layers,
            num_attention_heads=case.heads,
            num_key_value_heads=case.kv_heads,
            max_position_embeddings=case.tokens,
            initializer_range=case.hidden**-0.5,
            attn_implementation="sdpa",
        )

    # -- truth --------------------------------------------------------------------------------------------------------

    @functools.cached_property
    def truth(self) -> Truth:
        """Takes long the first time."""
        affordable = self.case.flops(1) <= _TRUTH_FLOPS
        return self._single(torch.float64 if affordable or self.dtype == torch.float64 else torch.float32)

    @functools.cached_property
    def limits(self) -> Limits:
        """What counts as wrong."""
        if self.dtype == torch.float64:
            return Limits(1e-13, 1e-12)
        if self.dtype == torch.float32:
            return Limits(1e-5, 1e-4)
        own, truth = self._single(self.dtype), self.truth
        gradients = [relative_error(g, truth.gradients[name]) for name, g in own.gradients.items()]
        if own.input_gradient is not None and truth.input_gradient is not None:
            gradients.append(relative_error(own.input_gradient, truth.input_gradient))
        return Limits(1.5 * relative_error(own.output, truth.output) + 2e-3, 1.5 * max(gradients) + 2e-3)

    def _single(self, dtype: torch.dtype) -> Truth:
        model = copy.deepcopy(self.stock).to(dtype)
        leaf = None
        if self.case.level == "model":
            output = model(**self.batch, use_cache=False).loss
            output.backward()
        else:
            leaf = self.x.to(dtype).requires_grad_()
            output = model.model(inputs_embeds=leaf, use_cache=False).last_hidden_state
            output.backward(self.grad.to(dtype))
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Truth(output.detach(), None if leaf is None else leaf.grad, gradients, dtype)

    # -- variants -----------------------------------------------------------------------------------------------------

    def make(self, variant: Variant) -> Runnable:
        """The variant on this rank; every rank makes the same ones in the same order.

        Raises:
            ValueError: the strategy refuses the shape, or a peer cannot run here; says why.
        """
        if variant.kind == "alone":
            return self._alone(variant)
        if variant.kind == "peer":
            raise ValueError(f"{variant.name}: expected ours or the compute alone; peers.py makes peers")
        return self._ours(variant)

    def _alone(self, variant: Variant) -> Runnable:
        seq = self.world // variant.ring
        torch.manual_seed(self._seed + 1)
        twin = ComputeAlone(self.case, variant.strategy, seq, variant.ring, self.config, self.dtype)

        def step() -> Tensor:
            twin.step()
            return twin.input

        return Runnable(step, {}, torch.empty(0, dtype=torch.int64))

    def mesh(self, ring: int, *key: str) -> DeviceMesh:
        """A mesh of all ranks, of its own for each ``key``: buffers of transports belong to groups."""
        if (ring, *key) not in self._meshes:
            if ring == 1:
                mesh = init_device_mesh("cpu", (self.world,), mesh_dim_names=("seq",))
            else:
                mesh = init_device_mesh("cpu", (ring, self.world // ring), mesh_dim_names=("ring", "seq"))
            self._meshes[ring, *key] = mesh
        return self._meshes[ring, *key]

    def _ours(self, variant: Variant) -> Runnable:
        # A key of its own for each variant: fused and unfused differ in the buffers that they need.
        mesh = self.mesh(variant.ring, variant.name)
        pieces = variant.pipeline if isinstance(variant.pipeline, int) and variant.strategy in GATHERING else 1
        if self.case.tokens % (self.world * pieces):
            raise ValueError(
                f"{variant.name}: expected tokens that {self.world} ranks x {pieces} pieces divide, got "
                f"{self.case.tokens}"
            )
        settings = OverlapConfig(
            mode=variant.mode,  # type: ignore[arg-type]
            transport=variant.transport,  # type: ignore[arg-type]
            gathered=variant.gathered,  # type: ignore[arg-type]
            pipeline=variant.pipeline,
        )
        model = copy.deepcopy(self.stock)
        model = parallelize(model, mesh, strategy=variant.strategy, config=settings)
        # Asked without pieces, a model that cannot do what its configuration says refuses here.
        by_model = variant.pipeline == "auto" or variant.strategy not in GATHERING
        cut = functools.partial(shard_sequence, mesh=model, pieces=None if by_model else pieces)
        positions = cut({"input_ids": torch.arange(self.case.tokens)[None]})["input_ids"][0]
        batch = cut(self.batch)
        runnable = self.runnable(model, positions, batch)
        runnable.mesh, runnable.model, runnable.batch = mesh, model, batch
        return runnable

    def runnable(self, model: Any, positions: Tensor, batch: dict[str, Tensor]) -> Runnable:
        """A model that takes this rank's tokens, as ours do."""
        parameters = dict(model.named_parameters())
        if self.case.level == "model":
            batch = {name: tensor for name, tensor in batch.items() if name != "position_ids"}

            def loss() -> Tensor:
                return model(**batch).loss  # type: ignore[no-any-return]

            return Runnable(stepper(parameters, loss, None, None), parameters, positions, forward=loss)
        leaf = self.x[:, positions].contiguous().requires_grad_()
        grad = self.grad[:, positions].contiguous()
        cut = batch["sequence_cut"]

        def forward() -> Tensor:
            return model.model(inputs_embeds=leaf, sequence_cut=cut).last_hidden_state  # type: ignore[no-any-return]

        step = stepper(parameters, forward, leaf, grad)
        return Runnable(step, parameters, positions, leaf, forward)

    # -- checks -------------------------------------------------------------------------------------------------------

    def errors(self, runnable: Runnable, output: Tensor) -> dict[str, float]:
        """Relative errors on this rank after a step; gradients of distributed parameters are gathered for it."""
        truth, at = self.truth, runnable.positions
        expected = truth.output if self.case.level == "model" else truth.output[:, at]
        found = {"output": _error(output.detach(), expected)}
        if runnable.leaf is not None and truth.input_gradient is not None:
            grad = runnable.leaf.grad
            found["input gradient"] = math.inf if grad is None else _error(grad, truth.input_gradient[:, at])
        worst = 0.0
        for name, expected in truth.gradients.items():
            parameter = runnable.parameters.get(name)
            grad = None if parameter is None else parameter.grad
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            error = math.inf if whole is None else _error(whole, expected)
            worst = error if error != error or error > worst else worst
        found["weight gradients"] = worst
        return found

    def is_wrong(self, errors: dict[str, float]) -> bool:
        """Whether any error is beyond its limit, or not a number."""
        limits = self.limits
        return not all(e <= (limits.output if what == "output" else limits.gradient) for what, e in errors.items())


def _error(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return math.inf
    return relative_error(actual, expected)
