"""What tests of the CUDA part share: a rank's control, words, streams and programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from odysseus_kernels import _ext

C = _ext.load()
Address = tuple[int, int]
ALLOWED = 10.0  # seconds that a wait may take which is meant to end


def at(tensor: Tensor, index: int = 0) -> Address:
    """An element's address, with a base of 0."""
    return (0, tensor.data_ptr() + index * tensor.element_size())


class Rank:
    """A control, words and an epoch, streams, and programs that use them."""

    def __init__(self) -> None:
        self.aborted = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.epoch = torch.zeros(1, dtype=torch.int32, device="cuda")
        self.words = torch.zeros(64, dtype=torch.int32, device="cuda")
        self.streams = [torch.cuda.Stream() for _ in range(3)]
        torch.cuda._sleep(1)  # loads the kernel, which must not happen while a wait spins
        torch.cuda.synchronize()
        self.control = C.cuda.Control(0, self.aborted.data_ptr())
        self._programs: list[Any] = []

    def program(self, link: float = 0.0) -> Any:
        self._programs.append(C.cuda.Program(self.control, 0, link))
        return self._programs[-1]

    def run(self, program: Any, timeout_s: float = ALLOWED) -> None:
        program.run(0, len(program), [stream.cuda_stream for stream in self.streams], [0], timeout_s)

    def close(self) -> None:
        self.control.abort(2)  # so that a failed test does not hang here
        torch.cuda.synchronize()
        for program in self._programs:
            program.close()
        self.control.close()


def milliseconds(work: Callable[[], None], stream: torch.cuda.Stream) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record(stream)
    work()
    end.record(stream)
    torch.cuda.synchronize()
    return start.elapsed_time(end)
