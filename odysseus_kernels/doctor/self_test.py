"""Every public operator on this rank's share of small tensors, beside fp64 on the whole ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.comm.recorder import CommRecorder
from odysseus_kernels.config import Mode, OverlapConfig, TransportName
from odysseus_kernels.doctor.operators import OPERATORS, Operator, cut
from odysseus_kernels.doctor.report import Check, TransportState
from odysseus_kernels.errors import CommunicationError, ExtensionNotBuiltError

__all__ = ["ALLOWED", "MODES", "TRANSPORTS", "check_operator", "connect", "run_checks"]

MODES: tuple[Mode, ...] = ("fused", "unfused")
TRANSPORTS: tuple[TransportName, ...] = ("symmetric", "collective")

# A sum of t products in fp32 has an error that grows like a random walk, about u·sqrt(t) of its size with u = 2⁻²⁴.
# No result here adds more than 1,024 products, those of all products behind one another counted together; four times
# what such a walk gives is what rounding explains.
ALLOWED = 4 * torch.finfo(torch.float32).eps / 2 * math.sqrt(1024)

_MOST_CHARACTERS = 500


def connect(group: dist.ProcessGroup, name: TransportName, device: torch.device, timeout_s: float) -> TransportState:
    """Whether the ranks of ``group`` can use a transport.  Every rank calls it.

    Raises:
        CommunicationError: ranks could not meet.
    """
    try:
        group_transports(group).choose(OverlapConfig(transport=name, timeout_s=timeout_s), device)
    except (ValueError, ExtensionNotBuiltError) as error:
        if isinstance(error, CommunicationError):  # ranks that differ are a ValueError, too
            raise
        return TransportState(name, False, str(error).partition("is not available: ")[2] or str(error))
    return TransportState(name, True)


def run_checks(
    group: dist.ProcessGroup,
    transport: TransportName,
    device: torch.device,
    timeout_s: float,
    begin: Callable[[str], None],
) -> Iterator[Check]:
    """One check for each operator and mode; every rank takes all of them.  ``begin`` is told what comes next.

    A check that raised is the last one: ranks may be out of step.
    """
    for name, operator in OPERATORS.items():
        for mode in MODES:
            begin(f"{name}, {mode}, transport {transport}")
            config = OverlapConfig(mode=mode, transport=transport, timeout_s=timeout_s)
            try:
                yield check_operator(name, operator, group, config, device)
            except Exception as error:  # noqa: BLE001  # whatever an operator raises here is what is to be reported
                # Peers may be within the call that this rank left: they get an error, and the group is done with.
                yield Check(name, mode, transport, allowed=ALLOWED, failure=_short(error))
                return


def check_operator(
    name: str, operator: Operator, group: dist.ProcessGroup, config: OverlapConfig, device: torch.device
) -> Check:
    """Output and all gradients of one operator on this rank."""
    rank, ranks = group.rank(), group.size()
    whole = operator.inputs(ranks)
    floats = list(operator.cuts)
    truth_in = {key: tensor.double().requires_grad_() if key in floats else tensor for key, tensor in whole.items()}
    truth = _outputs(operator.whole(truth_in, ranks))
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(one.shape, generator=generator).double() for one in truth]
    truth_gradients = torch.autograd.grad(truth, [truth_in[key] for key in floats], directions)

    part = {key: cut(t, operator.cuts.get(key, 0), rank, ranks).contiguous().to(device) for key, t in whole.items()}
    for key in floats:
        part[key] = part[key].detach().clone().requires_grad_()
    with CommRecorder() as record:
        found = _outputs(operator.call(part, group=group, config=config))
        own = [
            cut(one, operator.out_cut, rank, ranks).reshape(mine.shape).float().to(device)
            for one, mine in zip(directions, found, strict=True)
        ]
        gradients = torch.autograd.grad(found, [part[key] for key in floats], own)

    errors = {
        f"output {number}": relative_error(mine, cut(one, operator.out_cut, rank, ranks))
        for number, (mine, one) in enumerate(zip(found, truth, strict=True))
    }
    for key, mine, one in zip(floats, gradients, truth_gradients, strict=True):
        errors[f"gradient of {key}"] = relative_error(mine, cut(one, operator.cuts[key], rank, ranks))
    where = max(errors, key=lambda key: errors[key] if math.isfinite(errors[key]) else math.inf)
    carried = tuple(sorted({str(row["transport"]) for row in record.rows()}))
    if not math.isfinite(errors[where]):
        failure = f"{where} is not finite"
        return Check(name, config.mode, config.transport, carried, allowed=ALLOWED, where=where, failure=failure)
    return Check(name, config.mode, config.transport, carried, errors[where], ALLOWED, where)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of ``truth``; NaN where there is one."""
    truth = truth.detach()
    difference = found.detach().to("cpu", torch.float64).reshape(truth.shape) - truth
    return (torch.linalg.vector_norm(difference) / torch.linalg.vector_norm(truth)).item()


def _outputs(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MOST_CHARACTERS]
