"""Which mode each operator runs in, how a model's strategy was chosen, and whether its attention is pipelined."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from odysseus_kernels.comm import groups
from odysseus_kernels.nn.step import stepped

__all__ = ["explain"]


def explain(what: dist.ProcessGroup | DeviceMesh | nn.Module | None = None) -> str:
    """What runs how, and why: asked for, measured (with the times), or computed.

    Args:
        what: a process group or mesh of one dimension (None: the default group), whose operators' modes are shown; or a
            parallelized model: those of its ``"seq"`` group, how ``strategy="auto"`` chose if it did, and whether and
            why its attention is pipelined or not.

    Example:
        >>> pair = dist.new_group()
        >>> y = ody.zero3_linear(torch.ones(2, 4), torch.ones(3, 4), group=pair)
        >>> print(ody.explain(pair))
        operator      phase    shapes ...
        zero3_linear  forward  weight_shard [3, 4], ...  symmetric, 2 ranks  fused  default ...
        >>> model = ody.parallelize(model, mesh, config=ody.OverlapConfig(pipeline=None))
        >>> print(ody.explain(model).splitlines()[-1])
        attention is not pipelined: the configuration says pipeline=None
    """
    if not isinstance(what, nn.Module):
        return groups.explain(what)
    model = stepped(what)
    parts = (groups.explain(model.sequence_group.group), model.explain_strategy(), model.explain_pieces())
    return "\n".join(part for part in parts if part)
