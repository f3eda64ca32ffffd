"""Copies within one GPU, by its multiprocessors and by its copy engines: ``python -m benchmarks.device.copies``.

Each size is copied alone and beside products of the library that fill the device, in both ways that
``csrc/cuda/copy.cpp`` has: plainly, which runs as a kernel, and as a batch that prefers to overlap, for which the
driver may take an engine.  Prints one JSON document: rates in GB/s of copied bytes, and by how much the products slow.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from odysseus_kernels import _ext

__all__ = ["measure"]

_SIZES = (2 << 20, 8 << 20, 64 << 20)
_COPIES = 16
_ROUNDS = 7
_WAYS = {"kernel": False, "engine": True}
_LIMIT_S = 10.0


def measure(device: torch.device) -> list[dict[str, Any]]:
    """A row for each size and way."""
    native = _ext.load().cuda
    aborted = torch.zeros(1, dtype=torch.int32, device=device)
    left, right, out = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(3))
    main, side = torch.cuda.Stream(device), torch.cuda.Stream(device, -1)
    torch.cuda.synchronize(device)
    control = native.Control(device.index, aborted.data_ptr())
    rows = []
    for nbytes in _SIZES:
        source, target = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
        for way, batches in _WAYS.items():
            program = native.Program(control, device.index)
            for _ in range(_COPIES):
                program.copy(0, (0, target.data_ptr()), (0, source.data_ptr()), nbytes, over_link=batches)

            def copy(program: Any = program) -> None:
                program.run(0, len(program), [side.cuda_stream], [0], _LIMIT_S)

            def multiply() -> None:
                with torch.cuda.stream(main):
                    torch.mm(left, right, out=out)

            times = _times({"copies": (copy,), "products": (multiply,), "both": (multiply, copy)}, (main, side))
            alone, products = times["copies"]["copies"], times["products"]["products"]
            rows.append(
                {
                    "way": way,
                    "bytes": nbytes,
                    "alone_gb_per_s": _COPIES * nbytes / alone / 1e9,
                    "beside_products_gb_per_s": _COPIES * nbytes / times["both"]["copies"] / 1e9,
                    "products_slower_by": times["both"]["products"] / products - 1,
                }
            )
            torch.cuda.synchronize(device)
            program.close()
    control.close()
    return rows


def _times(
    runs: dict[str, tuple[Callable[[], None], ...]], streams: tuple[torch.cuda.Stream, torch.cuda.Stream]
) -> dict[str, dict[str, float]]:
    """Median seconds on each of the two streams (products, copies), for each of the runs."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for turn in range(_ROUNDS + 1):
        for name, calls in runs.items():
            torch.cuda.synchronize()
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in streams]
            for stream, (start, _) in zip(streams, events, strict=True):
                start.record(stream)
            for call in calls:
                call()
            for stream, (_, end) in zip(streams, events, strict=True):
                end.record(stream)
            torch.cuda.synchronize()
            if turn:  # the first one loads
                main, side = (start.elapsed_time(end) * 1e-3 for start, end in events)
                samples[name].append((main, side))
    return {
        name: {"products": statistics.median(main for main, _ in each), "copies": statistics.median(s for _, s in each)}
        for name, each in samples.items()
    }


def main() -> int:
    """Prints the document, and writes it where it is told to; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="a JSON file")
    arguments = parser.parse_args()
    reason = "no GPU: torch.cuda.is_available() is false" if not torch.cuda.is_available() else _ext.why_no_cuda()
    if reason:
        print(reason, file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    begin = time.monotonic()
    rows = measure(device)
    why = _ext.load().cuda.why_no_batch_copies()
    document = {"device": torch.cuda.get_device_name(device), "batch_copies": why or "used", "rows": rows}
    text = json.dumps({**document, "seconds": round(time.monotonic() - begin, 1)}, indent=1)
    if arguments.output is not None:
        arguments.output.write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
