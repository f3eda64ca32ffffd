"""What goes wrong when a kernel is compiled, loaded or launched, as one error; and kernels that were tried before."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.compiler.errors import CompilationError, UnsupportedLanguageConstruct
from triton.runtime.errors import OutOfResources, PTXASError

from odysseus_kernels.comm.tiles import TileGather, WaitLimit
from odysseus_kernels.errors import KernelUnavailableError
from odysseus_kernels.kernels import gather_matmul, matmul_scatter, prepare, weight_gradient
from odysseus_kernels.ops import _tiles
from odysseus_kernels.ops._products import WeightGradient

WORLD, RANK, ROWS, DEPTH, WIDTH = 3, 1, 8, 16, 4


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    with mock.patch.object(prepare, "_prepared", {}):
        yield


@pytest.mark.parametrize(
    "error",
    (
        CompilationError("a\n" * 90, ast.Pass(), "arguments do not fit"),
        UnsupportedLanguageConstruct(None, ast.Pass(), "arguments do not fit"),
        PTXASError("ptxas: arguments do not fit"),
        OutOfResources(300_000, 232_448, "shared memory"),
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        subprocess.CalledProcessError(1, ["gcc"]),
        FileNotFoundError("ptxas"),
        ImportError("libcuda.so.1"),
        # What passes and other versions of Triton raise, which no list of types would have foreseen.
        AssertionError("arguments do not fit"),
        AttributeError("module 'triton.experimental.gluon.language' has no attribute 'warp_specialize'"),
        TypeError("make_tensor_descriptor() takes 4 positional arguments but 5 were given"),
        KeyError("arguments do not fit"),
        IndexError("arguments do not fit"),
        NotImplementedError("arguments do not fit"),
        ArithmeticError("arguments do not fit"),
        Exception("arguments do not fit"),
    ),
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_is_one_error_and_is_not_tried_again(error: Exception) -> None:
    run = mock.Mock(side_effect=error)
    for _ in range(2):
        with pytest.raises(KernelUnavailableError) as found:
            prepare.prepare("gather_matmul", "shapes", run)
        text = str(found.value)
        assert text.startswith(f"the Triton kernel gather_matmul cannot be had on this rank: {type(error).__name__}: ")
        assert text.endswith(" ".join(str(error).split())[-20:]) and len(text) < 800
    run.assert_called_once_with()
    prepare.prepare("gather_matmul", "other shapes", mock.Mock())


def test_a_user_who_stops_is_not_the_kernels_fault() -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare("gather_matmul", "shapes", mock.Mock(side_effect=KeyboardInterrupt))
    prepare.prepare("gather_matmul", "shapes", mock.Mock())


def test_a_lack_of_memory_is_not_for_ever() -> None:
    run = mock.Mock(side_effect=[torch.OutOfMemoryError("CUDA out of memory"), None])
    with pytest.raises(KernelUnavailableError, match="OutOfMemoryError: CUDA out of memory"):
        prepare.prepare("matmul_scatter", "shapes", run)
    for _ in range(2):
        prepare.prepare("matmul_scatter", "shapes", run)
    assert run.call_count == 2


def test_errors_of_the_caller_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="expected shape"):
        prepare.prepare("weight_gradient", "shapes", mock.Mock(side_effect=ValueError("expected shape")))


# ---- what operators prepare ------------------------------------------------------------------------------------------


def satisfied(words: torch.Tensor, epoch: torch.Tensor, aborted: torch.Tensor) -> None:
    """No wait of a kernel that is prepared lasts: there is no peer that would end it."""
    assert (words - int(epoch) * 256 >= 255).all() and not aborted.any()


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_projections_are_launched_once_for_each_kind_of_operands(dtype: torch.dtype) -> None:
    local, weight = torch.ones(ROWS, DEPTH, dtype=dtype), torch.ones(WIDTH, DEPTH, dtype=dtype)
    out = torch.ones(WORLD * ROWS, WIDTH, dtype=dtype)
    launched: list[Any] = []

    def kernel(outs: Any, chunk: Any, gathered: Any, *rest: Any, **signals: Any) -> None:
        assert outs[0] is out and chunk is local and gathered.shape == (WORLD - 1, ROWS, DEPTH)
        satisfied(signals["words"], signals["epoch"], signals["aborted"])
        launched.append(rest)

    with mock.patch.object(gather_matmul, "gather_matmul", kernel):
        for one in (weight, weight, torch.ones(DEPTH, WIDTH, dtype=dtype).t(), torch.ones(WIDTH + 1, DEPTH)[1:]):
            _tiles.prepare_project(local, RANK, WORLD, [out], [one], [None])
        assert len(launched) == (3 if dtype == torch.bfloat16 else 2)  # the last one: another dtype, or all the same
        words, zero = torch.full((WORLD - 1,), 255), torch.zeros(1, dtype=torch.int32)
        limit = WaitLimit(zero, zero.long(), 5.0, 7)
        found = TileGather(RANK, WORLD, local, torch.empty(WORLD - 1, ROWS, DEPTH), 1, words, zero, limit)
        _tiles.project(found, [out], [weight], [None])
    assert len(launched) == (4 if dtype == torch.bfloat16 else 3)


def test_scatters_and_gradients_are_launched_once() -> None:
    x, weight = torch.ones(WORLD * ROWS, DEPTH), torch.ones(WIDTH, DEPTH)
    own, launched = torch.ones(ROWS, WIDTH), []

    def scatter(into: Any, *rest: Any, credits: Any, **signals: Any) -> None:
        assert into is own and isinstance(rest[3], torch.Tensor)
        assert rest[3].unique().numel() == 1 and not signals["counters"].any()
        launched.append("scatter")

    def gradient(into: Any, grads: Any, chunk: Any, gathered: Any, **signals: Any) -> None:
        assert into.shape == (DEPTH, WIDTH) and gathered.shape == (WORLD - 1, *chunk.shape)
        satisfied(signals["words"], signals["epoch"], signals["aborted"])
        launched.append("gradient")

    total, none = WeightGradient(weight), WeightGradient(weight, weight_needed=False)
    with (
        mock.patch.object(matmul_scatter, "matmul_scatter", scatter),
        mock.patch.object(weight_gradient, "weight_gradient", gradient),
    ):
        for _ in range(2):
            _tiles.prepare_scatter(own, RANK, WORLD, [x], [weight], None)
            _tiles.prepare_weight_gradient(own, RANK, WORLD, total, x, gathered_is_grad=True)
            _tiles.prepare_weight_gradient(own, RANK, WORLD, none, x, gathered_is_grad=True)
    assert launched == ["scatter", "gradient"]


def test_a_triton_that_cannot_be_imported_is_an_error_of_the_preparation() -> None:
    """It is installed, but what it is built with is not there."""
    own, x, weight = torch.ones(2, 2), torch.ones(4, 3), torch.ones(2, 3)
    with (
        mock.patch.dict(sys.modules, {"odysseus_kernels.kernels.tuning": None}),
        pytest.raises(KernelUnavailableError, match="matmul_scatter cannot be had .* ModuleNotFoundError: import of"),
    ):
        _tiles.prepare_scatter(own, 0, 2, [x], [weight], None)


def test_a_kernel_that_fails_is_an_error_of_the_preparation() -> None:
    refused = mock.Mock(side_effect=PTXASError("no"))
    with (
        mock.patch.object(matmul_scatter, "matmul_scatter", refused),
        pytest.raises(KernelUnavailableError, match="matmul_scatter cannot be had .* PTXASError"),
    ):
        _tiles.prepare_scatter(torch.ones(2, 2), 0, 2, [torch.ones(4, 3)], [torch.ones(2, 3)], None)
