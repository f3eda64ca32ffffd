"""Operands between guards, and references in fp64, for the tests of kernels with and without a GPU."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from odysseus_kernels.kernels.gather_matmul import gather_matmul
from odysseus_kernels.kernels.matmul_scatter import matmul_scatter
from odysseus_kernels.kernels.weight_gradient import weight_gradient
from odysseus_kernels.testing.host_control import HostControl

# Largest relative error of one rounding: a whole unit in the last place, since the interpreter truncates fp32 to
# bfloat16.  fp32 results are not rounded at the end, and the term for sums covers them.
_ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2.0**-23}
_MARGIN = 64


class Guarded:
    """Makes tensors whose surroundings are NaN, and says afterwards whether somebody wrote there."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)
        self._buffers: list[tuple[Tensor, Tensor]] = []

    def empty(self, *shape: int, dtype: torch.dtype, padding: int = 0, columns_first: bool = False) -> Tensor:
        """NaN everywhere; ``padding`` elements lie between two lines."""
        *outer, rows, columns = shape
        if columns_first:
            rows, columns = columns, rows
        lines = rows
        for size in outer:
            lines *= size
        line = columns + padding
        flat = torch.full((lines * line + 2 * _MARGIN,), float("nan"), dtype=dtype, device=self.device)
        outside = torch.ones(flat.shape, dtype=torch.bool, device=self.device)
        inner = outside[_MARGIN : _MARGIN + lines * line].view(*outer, rows, line)
        inner[..., :columns] = False
        self._buffers.append((flat, outside))
        tensor = flat[_MARGIN : _MARGIN + lines * line].view(*outer, rows, line)[..., :columns]
        return tensor.mT if columns_first else tensor

    def normal(self, *shape: int, dtype: torch.dtype, padding: int = 0, columns_first: bool = False) -> Tensor:
        """Random numbers, the same on every device."""
        tensor = self.empty(*shape, dtype=dtype, padding=padding, columns_first=columns_first)
        return tensor.copy_(torch.randn(shape, generator=self._generator))

    def check(self) -> None:
        """AssertionError if anything was written outside of the tensors."""
        for flat, outside in self._buffers:
            assert flat[outside].isnan().all(), "a kernel wrote outside of its tensors"


def check_product(result: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None) -> None:
    """``result`` is ``a @ b + add`` to the rounding of its dtype and of fp32 sums."""
    a, b = a.cpu().double(), b.cpu().double()
    expected, size = a @ b, a.abs() @ b.abs()
    if add is not None:
        expected, size = expected + add.cpu().double(), size + add.cpu().double().abs()
    # Sums of fp32 products in any order: at most one rounding of the running sum for each term, far fewer in practice.
    bound = _ROUNDING[result.dtype] * expected.abs() + size * a.shape[1] * 2.0**-24 + 1e-30
    error = (result.cpu().double() - expected).abs()
    assert (error <= bound).all(), f"error {error.max():.3e} of {expected.abs().max():.3e}, NaN: {result.isnan().sum()}"


def word(epoch: int, value: int) -> int:
    """What a word holds for ``value`` in ``epoch``, as an int32."""
    return (epoch * 256 + value + 2**31) % 2**32 - 2**31


def visits(world: int, rank: int, order: str) -> list[int]:
    """The other ranks in the order of visiting."""
    if order == "ring":
        return [(rank + step) % world for step in range(1, world)]
    return [other for other in range(world) if other != rank]


@dataclasses.dataclass
class GatherCase:
    """One product of gathered chunks, of which none has arrived before :meth:`deliver`."""

    world: int = 3
    rank: int = 1
    rows: int = 20
    depth: int = 24
    widths: tuple[int, ...] = (40,)
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    bias: bool = True
    order: str = "ring"
    pieces: int = 1
    padding: int = 0
    deep: bool = False
    epoch: int = 3
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.guard = Guarded(self.device, self.seed)
        normal, empty = self.guard.normal, self.guard.empty
        kwargs = {"dtype": self.dtype, "padding": self.padding}
        self.x = self.guard.normal(self.world * self.rows, self.depth, dtype=self.dtype)
        self.chunks = self.x.view(self.world, self.rows, self.depth)
        self.local = empty(self.rows, self.depth, **kwargs).copy_(self.chunks[self.rank])
        self.gathered = empty(self.world - 1, self.rows, self.depth, **kwargs) if self.world > 1 else None
        self.weights = [normal(n, self.depth, **kwargs, columns_first=self.deep) for n in self.widths]
        self.biases = [normal(1, n, dtype=self.dtype)[0] if self.bias else None for n in self.widths]
        made = self.out_dtype or self.dtype
        self.outs = [empty(self.world * self.rows, n, dtype=made, padding=self.padding) for n in self.widths]
        integers = {"dtype": torch.int32, "device": self.device}
        # Words of an earlier epoch: nothing is there yet.
        self.words = torch.full((max(1, self.world - 1),), word(self.epoch, -1), **integers)
        self.epochs = torch.full((1,), self.epoch, **integers)
        self.aborted = torch.zeros(1, **integers)
        self.control = HostControl(self.device)
        self.timeout_s, self.tag = 60.0, 0

    def wanted(self, value: int) -> int:
        """The word for ``value`` in this epoch."""
        return word(self.epoch, value)

    def deliver(self) -> None:
        """All chunks and their words."""
        if self.gathered is not None:
            for slot, source in enumerate(visits(self.world, self.rank, self.order)):
                self.gathered[slot] = self.chunks[source]
            self.words.fill_(self.wanted(self.pieces))

    def signals(self) -> dict[str, object]:
        """What the launching functions take for waiting."""
        one = self.world == 1
        return {
            "rank": self.rank,
            "world": self.world,
            "order": self.order,
            "pieces": self.pieces,
            "words": None if one else self.words,
            "epoch": None if one else self.epochs,
            "aborted": None if one else self.aborted,
            "control": None if one else self.control.address,
            "timeout_s": self.timeout_s,
            "tag": self.tag,
        }

    def multiply(self, config: object) -> None:
        gather_matmul(self.outs, self.local, self.gathered, self.weights, self.biases, **self.signals(), config=config)

    def check(self) -> None:
        for out, weight, bias in zip(self.outs, self.weights, self.biases, strict=True):
            check_product(out, self.x, weight.mT, bias)
        self.guard.check()

    def gradient(self, config: object, *, swapped: bool, accumulate: bool, out_dtype: torch.dtype) -> None:
        """The weight gradient of the first weight, chunks on the right (or, swapped, on the left)."""
        grads = self.guard.normal(self.world * self.rows, self.widths[0], dtype=self.dtype, padding=self.padding)
        shape = (self.depth, self.widths[0]) if swapped else (self.widths[0], self.depth)
        out = self.guard.empty(*shape, dtype=out_dtype, padding=self.padding)
        before = None
        if accumulate:
            before = out.copy_(torch.arange(out.numel(), device=self.device).view(shape) % 7).clone()
        target = out.mT if swapped else out
        weight_gradient(
            target, grads, self.local, self.gathered, **self.signals(), accumulate=accumulate, config=config
        )
        expected_add = None if before is None else (before.mT if swapped else before)
        check_product(target, grads.mT, self.x, expected_add)
        self.guard.check()


@dataclasses.dataclass
class ScatterCase:
    """All targets of one rank, their slots and words in this process's memory."""

    world: int = 3
    rank: int = 1
    rows: int = 20
    depths: tuple[int, ...] = (24,)
    width: int = 40
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype | None = None
    bias: bool = True
    padding: int = 0
    deep: bool = False
    epoch: int = 3
    credit_value: int = -1
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self.guard = Guarded(self.device, self.seed)
        normal, empty = self.guard.normal, self.guard.empty
        kwargs = {"dtype": self.dtype, "padding": self.padding}
        self.xs = [normal(self.world * self.rows, depth, **kwargs) for depth in self.depths]
        self.weights = [normal(self.width, depth, **kwargs, columns_first=self.deep) for depth in self.depths]
        made = self.out_dtype or self.dtype
        self.bias_tensor = normal(1, self.width, dtype=self.dtype)[0] if self.bias else None
        self.own = empty(self.rows, self.width, dtype=made, padding=self.padding)
        self.parts = [empty(self.rows, self.width, dtype=made) for _ in range(self.world)]
        integers = {"dtype": torch.int32, "device": self.device}
        self.credits = torch.full((self.world,), word(self.epoch, self.credit_value), **integers)
        self.arrived = torch.full((self.world,), -1, **integers)
        self.counters = torch.zeros(self.world, **integers)
        self.epochs = torch.full((1,), self.epoch, **integers)
        self.aborted = torch.zeros(1, **integers)
        self.control = HostControl(self.device)
        self.timeout_s, self.tag = 60.0, 0

    def table(self, tensors: list[Tensor]) -> Tensor:
        """Their addresses."""
        return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64, device=self.device)

    def multiply(self, config: object) -> None:
        one = self.world == 1
        matmul_scatter(
            self.own,
            self.xs,
            self.weights,
            self.bias_tensor,
            None if one else self.table(self.parts),
            rank=self.rank,
            world=self.world,
            credits=None if one else self.table(list(self.credits.split(1))),
            credit_value=self.credit_value,
            arrived=None if one else self.table(list(self.arrived.split(1))),
            arrived_value=255,
            counters=None if one else self.counters,
            epoch=None if one else self.epochs,
            aborted=None if one else self.aborted,
            control=None if one else self.control.address,
            timeout_s=self.timeout_s,
            tag=self.tag,
            config=config,
        )

    def check(self) -> None:
        a = torch.cat([x.double() for x in self.xs], 1).view(self.world, self.rows, -1)
        b = torch.cat([weight.double() for weight in self.weights], 1).mT
        for target in range(self.world):
            own = target == self.rank
            check_product(self.own if own else self.parts[target], a[target], b, self.bias_tensor if own else None)
            assert self.arrived[target] == (-1 if own else word(self.epoch, 255))
        assert (self.counters == 0).all()
        assert self.parts[self.rank].isnan().all()
        self.guard.check()
