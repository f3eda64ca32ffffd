"""One rank as a program of its own, whose peer is stopped: how calls fail, and how the process ends.

Prints ``ready``, then after a line on its standard input the outcome of three calls, and ends with exit code 3.
"""

from __future__ import annotations

import datetime
import json
import sys
import time

import torch
import torch.distributed as dist

import odysseus_kernels as ody

TIMEOUT_S = 1.5


def main(rank: int, world: int, meeting: str, transport: str) -> None:
    """Runs the calls."""
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timeout)

    def call(timeout_s: float = TIMEOUT_S) -> None:
        config = ody.OverlapConfig(transport=transport, timeout_s=timeout_s)
        ody.all_gather_linear(torch.ones(4, 8), torch.ones(6, 8), group=None, config=config)

    call(60.0)  # ranks have started at different times
    print("ready", flush=True)
    sys.stdin.readline()
    outcomes = []
    for _ in range(3):
        start = time.perf_counter()
        try:
            call()
            outcomes.append(("", "", 0.0))
        except ody.CommunicationError as error:
            outcomes.append((type(error).__name__, str(error), time.perf_counter() - start))
    print(json.dumps(outcomes), flush=True)
    sys.exit(3)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
