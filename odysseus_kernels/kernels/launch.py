"""What the launching functions share on the host: checks of arguments, the device, the choice of a configuration.

The kernels run on the caller's current stream and device.  Under Triton's interpreter (TRITON_INTERPRET=1) they run on
the CPU, one program after another, which is how they are tested without a GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
import triton
from torch import Tensor

from odysseus_kernels.kernels.configs import DTYPES, Kernel, Problem, Target, TileConfig, candidates

__all__ = [
    "MAX_OPERANDS",
    "MAX_PIECES",
    "TICK_NS",
    "Matrix",
    "Order",
    "check_bias",
    "check_chunks",
    "check_matrix",
    "check_signals",
    "check_words",
    "choose",
    "expect",
    "interpreted",
    "launch",
    "matrix",
    "ring",
    "same_count",
    "target_of",
    "ticks",
    "weight_matrices",
]

Order = Literal["ring", "sequence"]

# Weights of one kernel: a query, a key and a value projection.
MAX_OPERANDS = 3
# Values of words count within an epoch of 256.
MAX_PIECES = 255
TICK_NS = 1 << 20
"""Unit in which kernels measure how long they wait, about a millisecond: 31 bits of it are 26 days."""
_INTERPRETER_PROGRAMS = 3
_ALIGNMENT = 16


def expect(condition: bool, name: str, expected: object, given: object) -> None:
    """ValueError that names what was expected and what was given, unless ``condition``."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {given}")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@functools.lru_cache(maxsize=16)
def target_of(device: torch.device) -> Target:
    """What ``device`` offers; a made-up small target for the CPU, which only the interpreter uses."""
    if device.type == "cpu":
        return Target(90, _INTERPRETER_PROGRAMS, 227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    # Consumer Blackwell (12.x) has neither wgmma nor tcgen05, and multiplies as Ampere does.
    architecture = {9: 90, 10: 100}.get(properties.major, 80)
    shared: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Target(architecture, properties.multi_processor_count, shared)


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix as kernels take it: ``stride`` between the lines of ``data``, whose elements are contiguous.

    Attributes:
        data: where the first element lies.
        stride: elements from one line to the next.
        columns_first: the lines are the matrix's columns.
    """

    data: Tensor
    stride: int
    columns_first: bool

    def describable(self) -> bool:
        """Whether a tensor descriptor can stand for it."""
        line = self.data.shape[0] if self.columns_first else self.data.shape[1]
        step = self.stride * self.data.element_size()
        return self.data.data_ptr() % _ALIGNMENT == 0 and step % _ALIGNMENT == 0 and self.stride >= line


def _lines(data: Tensor) -> tuple[bool, bool]:
    """Whether rows, and whether columns, are contiguous: of a single row or column both can be said."""
    rows, columns = data.shape
    return columns == 1 or data.stride(1) == 1, rows == 1 or data.stride(0) == 1


def matrix(name: str, data: Tensor, *, columns_first: bool = False) -> Matrix:
    """``data`` [rows, columns] with contiguous rows, or, if ``columns_first`` allows it, contiguous columns."""
    rows, columns = _lines(data)
    if rows:
        return Matrix(data, data.stride(0), False)
    if columns and columns_first:
        return Matrix(data, data.stride(1), True)
    wanted = "contiguous rows or contiguous columns" if columns_first else "contiguous rows"
    raise ValueError(f"{name}: expected {wanted}, got strides {tuple(data.stride())} of shape {tuple(data.shape)}")


def weight_matrices(name: str, weights: Sequence[Tensor]) -> tuple[list[Matrix], bool]:
    """The weights as kernels take them, and whether their columns are contiguous; ValueError where they differ."""
    lines = [_lines(weight) for weight in weights]
    if all(rows for rows, _ in lines):
        return [Matrix(weight, weight.stride(0), False) for weight in weights], False
    if all(columns for _, columns in lines):
        return [Matrix(weight, weight.stride(1), True) for weight in weights], True
    strides = ", ".join(str(tuple(weight.stride())) for weight in weights)
    raise ValueError(f"{name}: expected contiguous rows in all or contiguous columns in all, got strides {strides}")


def check_bias(name: str, bias: Tensor | None, width: int, like: Tensor) -> None:
    """ValueError unless ``bias`` is None or contiguous [width] of a served dtype beside ``like``."""
    if bias is not None:
        given = f"{bias.dtype} {list(bias.shape)} of strides {tuple(bias.stride())} on {bias.device}"
        fits = tuple(bias.shape) == (width,) and bias.is_contiguous() and bias.device == like.device
        expect(fits and bias.dtype in DTYPES, name, f"a contiguous tensor [{width}] on {like.device}", given)


def check_matrix(name: str, data: Tensor, shape: tuple[int | None, int | None], like: Tensor, *, dtype: bool) -> None:
    """ValueError unless ``data`` has ``shape`` (None: any from 1) and is on the device of ``like``.

    With ``dtype`` it has to have the dtype of ``like`` too, else any that is served.
    """
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    fits = data.dim() == 2 and all(s is None or s == given for s, given in zip(shape, data.shape, strict=True))
    expect(fits and data.numel() > 0, name, f"shape [{wanted}], not empty", tuple(data.shape))
    expect(data.device == like.device, name, f"a tensor on {like.device}", data.device)
    if dtype:
        expect(data.dtype == like.dtype, name, like.dtype, data.dtype)
    else:
        expect(data.dtype in DTYPES, name, " or ".join(map(str, DTYPES)), data.dtype)


def same_count(**sequences: Sequence[object]) -> None:
    """ValueError unless all sequences have one length from 1 to MAX_OPERANDS."""
    counts = {name: len(sequence) for name, sequence in sequences.items()}
    first = next(iter(counts.values()))
    expect(1 <= first <= MAX_OPERANDS, next(iter(counts)), f"1 to {MAX_OPERANDS} tensors", first)
    for name, count in counts.items():
        expect(count == first, name, f"{first} entries", count)


def check_words(name: str, tensor: Tensor | None, dtype: torch.dtype, count: int, like: Tensor) -> None:
    """ValueError unless ``tensor`` is contiguous and has ``count`` or more elements of ``dtype`` beside ``like``."""
    given = None if tensor is None else f"{tensor.dtype} of {tensor.numel()} elements on {tensor.device}"
    fits = tensor is not None and tensor.dtype == dtype and tensor.numel() >= count and tensor.is_contiguous()
    expect(
        fits and tensor is not None and tensor.device == like.device,
        name,
        f"a contiguous tensor of {dtype} with {count} or more elements on {like.device}",
        given,
    )


def ticks(timeout_s: float) -> int:
    """A limit of waits as kernels take it: at least one tick, and 26 days for whatever is longer."""
    expect(timeout_s > 0, "timeout_s", "seconds above 0", timeout_s)
    return int(min(timeout_s * 1e9 / TICK_NS + 1, 2.0**31 - 1))


def check_signals(
    rank: int, world: int, epoch: Tensor | None, aborted: Tensor | None, control: Tensor | None, like: Tensor
) -> None:
    """ValueError unless rank, world and, where there are peers, the words beside the signals make sense."""
    expect(world >= 1 and 0 <= rank < world, "rank", f"0 <= rank < world = {world}", rank)
    if world > 1:
        check_words("epoch", epoch, torch.int32, 1, like)
        check_words("aborted", aborted, torch.int32, 1, like)
        check_words("control", control, torch.int64, 1, like)
    expect(like.dtype in DTYPES, "dtype", " or ".join(map(str, DTYPES)), like.dtype)
    expect(like.device.type == "cuda" or interpreted(), "device", "a CUDA device (or TRITON_INTERPRET=1)", like.device)


def check_chunks(local: Tensor, gathered: Tensor | None, world: int, pieces: int, words: Tensor | None) -> Tensor:
    """Checks a gathered operand, and returns its remote chunks (the local one where there is but one rank)."""
    expect(1 <= pieces <= MAX_PIECES, "pieces", f"1 to {MAX_PIECES}", pieces)
    expect(local.shape[0] * max(world, pieces) < 2**31, "rows", f"32-bit numbers of all {world} chunks", local.shape[0])
    if world == 1:
        return local[None]
    shape = (world - 1, *local.shape)
    given = None if gathered is None else list(gathered.shape)
    expect(given == list(shape), "gathered", f"shape {list(shape)}", given)
    assert gathered is not None
    check_words("words", words, torch.int32, world - 1, local)
    expect(gathered.device == local.device, "gathered", f"a tensor on {local.device}", gathered.device)
    expect(gathered.dtype == local.dtype, "gathered", local.dtype, gathered.dtype)
    within = gathered.stride(0) % max(1, gathered.stride(1)) == 0 and gathered.stride(0) >= gathered.stride(1) > 0
    expect(within, "gathered", "chunks a whole number of rows apart", f"strides {tuple(gathered.stride())}")
    return gathered


def ring(order: str) -> bool:
    """Whether ``order`` is the ring; ValueError for an unknown order."""
    expect(order in get_args(Order), "order", " or ".join(map(repr, get_args(Order))), repr(order))
    return order == "ring"


def choose(kernel: Kernel, config: TileConfig | None, problem: Problem, like: Tensor, describable: bool) -> TileConfig:
    """``config``, or the likely best; without descriptors where operands or device do not admit them.

    A specialized one needs them, Hopper and 16-bit operands, and cannot be interpreted: elsewhere the likely best one
    of the others stands in for it.
    """
    target = target_of(like.device)
    if config is not None and config.specialized:
        served = describable and target.architecture == 90 and like.dtype.itemsize == 2 and not interpreted()
        config = config if served else None
    if config is None:
        config = candidates(kernel, target, like.dtype, problem)[0]
    if config.descriptors and not (describable and target.architecture >= 90):
        config = dataclasses.replace(config, descriptors=False)
    return config


def launch(kernel: Any, arguments: dict[str, Any], config: TileConfig, tiles: int, like: Tensor) -> None:
    """Starts ``kernel`` on the current stream with as many programs as ``tiles`` and ``config`` ask for."""
    device = like.device
    grid = (config.programs(tiles, target_of(device).sms),)
    if config.specialized:
        how = {"STAGES": config.stages, "PARTS": config.parts}
    else:
        how = {"DESCRIPTORS": config.descriptors, "INTERPRETED": interpreted()}

    def start() -> None:
        triton.set_allocator(_scratch_on(device))
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            kernel[grid](
                **arguments,
                BLOCK_M=config.block_m,
                BLOCK_N=config.block_n,
                BLOCK_K=config.block_k,
                GROUP=config.group,
                **how,
                num_warps=config.warps,
                num_stages=config.stages,
                maxnreg=config.max_registers,
            )

    # Descriptors lie in scratch memory that Triton asks for.  Its allocator is a context variable: set for this launch
    # alone, it changes nothing for others in this process.
    contextvars.copy_context().run(start)


@functools.lru_cache(maxsize=16)
def _scratch_on(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate
