"""What ranks run in the tests of what pipelined attention blocks refuse, and of ranks that differ."""

from __future__ import annotations

import math
from typing import Any

import torch
from pipelined_cases import HEAD, Problem, call, inputs
from torch import Tensor

import odysseus_kernels as ody
from odysseus_kernels.comm.recorder import CommRecorder

# What one rank may pass otherwise without any tensor that travels having another shape.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "documents": {"documents": None},
    "dropout": {"dropout": 0.5, "dropout_seed": 1},
    "head_dim": {"head_dim": HEAD // 2, "scale": HEAD**-0.5},
    "norms": {"head_norms": None},
    "eps": {"norm_eps": 1e-3},
    "rotation": {"rotation": None},
}
_TABLE, _NORM = torch.zeros(1, 16, HEAD), torch.ones(HEAD)
# Changed tensors and arguments that neither block takes, for two ranks with 8 tokens each.
MORE_REFUSALS: tuple[tuple[dict[str, Tensor], dict[str, Any]], ...] = (
    ({}, {"rotation": (_TABLE,)}),
    ({}, {"rotation": torch.stack((_TABLE, _TABLE))}),
    ({}, {"rotation": (_TABLE.to(torch.complex64),) * 2}),
    ({}, {"rotation": (_TABLE.to("meta"),) * 2}),
    ({}, {"head_norms": (_NORM,)}),
    ({}, {"head_norms": (_NORM, _NORM.int())}),
    ({}, {"norm_eps": torch.tensor(1e-6)}),
    ({}, {"norm_eps": math.inf}),
    ({}, {"head_dim": 0}),
    ({}, {"head_dim": None}),
    ({}, {"scale": torch.tensor(0.5)}),
    ({}, {"scale": math.inf}),
    ({}, {"dropout": None}),
    ({}, {"dropout": 0.5, "dropout_seed": 3.0}),
    ({}, {"dropout": 0.5, "dropout_seed": True}),
    ({}, {"prefetch": 3}),
)
MORE_MESSAGES = (
    "expected rotation to be cos and sin, or None, got 1",
    "expected rotation to be cos and sin, or None, got a Tensor",
    "expected cos of a floating dtype on cpu, as x is, got torch.complex64 on cpu",
    "expected cos of a floating dtype on cpu, as x is, got torch.float32 on meta",
    "expected head_norms to be the weights of queries' and keys' norms, or None, got 1",
    "expected key norm of a floating dtype on cpu, as x is, got torch.int32 on cpu",
    "expected norm_eps to be a number, got tensor(1.0000e-06)",
    "expected norm_eps of at least 0, and finite, got inf",
    "expected head_dim to be a whole number of at least 1, got 0",
    "expected head_dim to be a whole number of at least 1, got None",
    "expected scale to be a number, got tensor(0.5000)",
    "expected scale above 0, and finite, got inf",
    "expected dropout to be a number, got None",
    "expected dropout_seed to be a whole number, got 3.0",
    "expected dropout_seed to be a whole number, got True",
    "expected prefetch to be a tensor, several of them, or None, got int",
)


def refusals(rank: int, world: int) -> list[str]:
    """Messages of bad input; nothing is sent."""
    problem = Problem(rows=8)
    mine = inputs(problem, rank, world, torch.float32)
    config = ody.OverlapConfig(timeout_s=60)
    wide, odd = torch.zeros(1, 3, HEAD), torch.zeros(HEAD + 1)
    found = []
    for changes, more in (
        ({}, {"pieces": 9}),
        ({}, {"pieces": [4, 5]}),
        ({}, {"pieces": "many"}),
        ({}, {"head_dim": 5}),
        ({}, {"rotation": (wide, wide)}),
        ({}, {"head_norms": (odd, odd)}),
        ({}, {"window": 0}),
        ({}, {"dropout": 0.5}),
        ({}, {"kernel": "eager"}),
        *MORE_REFUSALS,
        ({}, {"documents": torch.zeros(2, 3, dtype=torch.int64)}),
        ({}, {"config": ody.OverlapConfig(mode="tiles", timeout_s=60)}),
        ({"wo": mine["wo"][:, 1:]}, {}),
        ({"wv": mine["wv"][:4]}, {}),
        ({"x": mine["x"][0]}, {}),
        ({"wo": mine["wo"].double()}, {}),
    ):
        with CommRecorder() as record:
            try:
                call(problem, {**mine, **changes}, rank, world, **{"config": config, **more})
            except ValueError as error:
                found.append(str(error))
            else:
                found.append("no error")
        assert not record.rows()
    return found


def odd_rank(rank: int, world: int, what: str) -> str:
    """The error of a call in which rank 1 differs."""
    plain = what == "head_dim"
    problem = Problem(rows=8, documents=True, norms=not plain, rotation=not plain)
    other = {**DIFFERENCES, "pieces": {"pieces": 2}}
    mine = inputs(problem, rank, world, torch.float32)
    try:
        call(problem, mine, rank, world, ody.OverlapConfig(timeout_s=60), **(other[what] if rank == 1 else {}))
    except ody.RankMismatchError as error:
        return str(error)
    return "no error"
