"""A rank on one of two hosts: what the symmetric transport says, what is taken, and whether the numbers are right."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings

import torch
import torch.distributed as dist

import odysseus_kernels as ody
from odysseus_kernels.comm.groups import group_transports
from odysseus_kernels.config import OverlapConfig

parser = argparse.ArgumentParser()
parser.add_argument("--report-fd", type=int, required=True)
report = os.fdopen(parser.parse_args().report_fd, "w")
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
generator = torch.Generator().manual_seed(0)
x, weight = torch.randn(64, 32, generator=generator), torch.randn(48, 32, generator=generator)
shards = x.chunk(world)[rank], weight.chunk(world)[rank]
group = dist.group.WORLD
refusal = ""
try:
    ody.all_gather_linear(*shards, group=group, config=OverlapConfig(transport="symmetric"))
except ValueError as error:
    refusal = str(error)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", ody.FallbackWarning)
    config = OverlapConfig(mode="fused")
    y = ody.all_gather_linear(*shards, group=group, config=config)
expected = (x.double() @ shards[1].double().t()).float()
found = {
    "rank": rank,
    "refusal": refusal,
    "transport": group_transports(group).choose(config, x.device).name,
    "error": ((y - expected).norm() / expected.norm()).item(),
    "cores": len(os.sched_getaffinity(0)),
    "threads": torch.get_num_threads(),
}
report.write(json.dumps(found) + "\n")
report.close()
dist.barrier()
dist.destroy_process_group()
sys.exit(0)
