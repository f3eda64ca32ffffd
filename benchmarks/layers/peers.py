"""What a user would pick instead, on the same layer, batch and ranks; checked against the single process as ours are.

======================== ==========================================================================================
torch TP                 DTensor ``parallelize_module``, column- and row-parallel, every token on every rank
torch SP-TP              the same with sequence-parallel norms, as torchtitan sets it up
FSDP2 + Ulysses          ``fully_shard`` of each layer, and the all-to-all of yunchang around attention
ring-flash-attn          needs CUDA
======================== ==========================================================================================

They have no ring, and run the stock model's own code.  Where yunchang is not installed, a plain all-to-all that does
what its does takes its place, and says so.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.layers.cases import FSDP_ULYSSES, TORCH_TP, TORCH_TP_SP
from benchmarks.layers.runnable import Runnable, stepper
from benchmarks.layers.workload import LayerWorkload

__all__ = ["absent_peers", "describe_ulysses", "make_peer", "present_peers"]

_ATTENTION = "ulysses_peer"
AllToAll = Callable[[Tensor, int, int], Tensor]


def present_peers(level: str) -> list[str]:
    """Peers that can run here at ``level``."""
    return [TORCH_TP, TORCH_TP_SP, FSDP_ULYSSES] if level == "layer" else []


def absent_peers(level: str) -> dict[str, str]:
    """Peers that cannot, and why."""
    absent = {}
    if level != "layer":
        absent = dict.fromkeys((TORCH_TP, TORCH_TP_SP, FSDP_ULYSSES), "compared at --level layer")
    if not torch.cuda.is_available():
        absent["ring-flash-attn"] = "needs CUDA: its attention is flash-attn's, which has no CPU kernel"
    else:
        absent["ring-flash-attn"] = "compared on CPU ranks only, where it cannot run"
    return absent


def make_peer(name: str, work: LayerWorkload) -> Runnable:
    """The peer on this rank.

    Raises:
        ValueError: it cannot do this shape; says why.
    """
    case, world = work.case, work.world
    if case.level != "layer":
        raise ValueError(f"{name}: compared at the level of a layer only")
    if case.heads % world or case.kv_heads % world:
        raise ValueError(
            f"{name}: expected heads that {world} ranks divide, got {case.heads} query and {case.kv_heads} key/value "
            f"heads"
        )
    model = copy.deepcopy(work.stock).model
    mesh = work.mesh(1, "peers")
    if name == FSDP_ULYSSES:
        return _fsdp_ulysses(model, mesh, work)
    return _tensor_parallel(model, mesh, work, sequence_parallel=name == TORCH_TP_SP)


class _Run:
    """Layers and last norm with the rotation of the tokens that attention sees, as the stock model calls them."""

    def __init__(self, model: Any, work: LayerWorkload, positions: Tensor, rotated: Tensor) -> None:
        self.leaf = work.x[:, positions].contiguous().requires_grad_()
        self.grad = work.grad[:, positions].contiguous()
        self.model, self.work, self.positions, self.rotated = model, work, positions, rotated
        self.parameters = {f"model.{name}": p for name, p in model.named_parameters() if "embed_tokens" not in name}

    def forward(self) -> Tensor:
        model, hidden = self.model, self.leaf
        rotation = model.rotary_emb(hidden, position_ids=self.rotated[None])
        for layer in model.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotation)
        return model.norm(hidden)  # type: ignore[no-any-return]

    def runnable(self, *, forward: Callable[[], Tensor] | None = None) -> Runnable:
        run = forward or self.forward
        return Runnable(
            stepper(self.parameters, run, self.leaf, self.grad), self.parameters, self.positions, self.leaf, run
        )


def _tensor_parallel(model: nn.Module, mesh: DeviceMesh, work: LayerWorkload, *, sequence_parallel: bool) -> Runnable:
    tokens = work.case.tokens
    outside = Shard(1) if sequence_parallel else Replicate()
    for layer in model.layers:
        plan: dict[str, Any] = {
            # One conversion for q, k and v, and one for gate and up: their input gradients are added, then reduced.
            "self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": outside},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
            ),
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(output_layouts=outside),
            "mlp": PrepareModuleInput(input_layouts=(outside,), desired_input_layouts=(Replicate(),)),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=outside),
        }
        if sequence_parallel:
            plan |= {"input_layernorm": SequenceParallel(), "post_attention_layernorm": SequenceParallel()}
        parallelize_module(layer, mesh, plan)
    positions = torch.arange(tokens)
    if sequence_parallel:
        parallelize_module(model, mesh, {"norm": SequenceParallel(use_local_output=True)})
        positions = positions.chunk(work.world)[work.rank]
    return _Run(model, work, positions, torch.arange(tokens)).runnable()


def _fsdp_ulysses(model: Any, mesh: DeviceMesh, work: LayerWorkload) -> Runnable:
    from torch.distributed.fsdp import fully_shard

    exchange, _ = _all_to_all(mesh.get_group())

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> tuple[Tensor, None]:
        # yunchang's layout is [B, tokens, heads, head_dim].
        query, key, value = (exchange(t.transpose(1, 2), 2, 1).transpose(1, 2) for t in (query, key, value))
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **others)
        return exchange(out, 1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend)
    model.config = copy.deepcopy(model.config)
    model.config._attn_implementation = _ATTENTION
    positions = torch.arange(work.case.tokens).chunk(work.world)[work.rank]
    unit = _Unit(model, positions)
    for layer in model.layers:
        layer.self_attn.config = model.config
    for module in (*model.layers, unit):
        sharded = fully_shard(module, mesh=mesh)
        # Gradients as the single process has them: sums. Gloo has no reduction that also scales.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    run = _Run(model, work, positions, positions)
    return run.runnable(forward=lambda: unit(run.leaf))


class _Unit(nn.Module):
    """The root that FSDP2 shards what is outside of layers with."""

    def __init__(self, model: Any, positions: Tensor) -> None:
        super().__init__()
        self.layers, self.norm, self.rotary = model.layers, model.norm, model.rotary_emb
        self.positions = positions

    def forward(self, hidden: Tensor) -> Tensor:
        rotation = self.rotary(hidden, position_ids=self.positions[None])
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotation)
        return self.norm(hidden)  # type: ignore[no-any-return]


def describe_ulysses() -> str:
    """Where the peer's all-to-all comes from."""
    return "yunchang" if _yunchang() else "Ulysses all-to-all as yunchang does it (yunchang is not installed)"


def _yunchang() -> Any:
    try:
        return importlib.import_module("yunchang.comm.all_to_all").SeqAllToAll4D
    except ImportError:
        return None


def _all_to_all(group: dist.ProcessGroup) -> tuple[AllToAll, str]:
    found = _yunchang()
    function = found or PlainAllToAll
    return (lambda x, scatter, gather: function.apply(group, x, scatter, gather)), describe_ulysses()


class PlainAllToAll(torch.autograd.Function):
    """[B, tokens, heads, D]: cuts dimension ``scatter``, joins dimension ``gather`` (1 and 2) over the group.

    One blocking all_to_all_single with a copy before and behind it, and the reverse in backward.
    """

    @staticmethod
    def forward(ctx: Any, group: dist.ProcessGroup, x: Tensor, scatter: int, gather: int) -> Tensor:
        ctx.group, ctx.scatter, ctx.gather = group, scatter, gather
        parts = torch.stack([part.contiguous() for part in x.chunk(group.size(), scatter)])
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return torch.cat(list(received.unbind()), gather)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None, None]:
        return None, PlainAllToAll.apply(ctx.group, grads[0], ctx.gather, ctx.scatter), None, None
