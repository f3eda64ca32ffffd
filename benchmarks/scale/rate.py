"""Rate of fp32 products that one thread reaches on a host while the other host's thread is as busy.

Run on both hosts at once (``hosts.ask_hosts``): two threads share memory and often a clock, as the ranks will.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time

import torch

__all__ = ["product_rate"]

_SIZE = 1024
_SECONDS = 2.0


def product_rate(seconds: float = _SECONDS, size: int = _SIZE) -> float:
    """FLOP/s of ``size`` cubed products in fp32, the median over ``seconds``, with the threads that torch has."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    samples: list[float] = []
    out = torch.empty(size, size)
    torch.mm(a, b, out=out)
    end = time.perf_counter() + seconds
    while not samples or time.perf_counter() < end:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        samples.append(time.perf_counter() - begin)
    return 2 * size**3 / statistics.median(samples)


def main() -> None:
    """Writes the rate to a file descriptor, as a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report-fd", type=int, required=True)
    torch.set_num_threads(1)
    os.write(parser.parse_args().report_fd, f"{product_rate()!r}\n".encode())


if __name__ == "__main__":
    main()
