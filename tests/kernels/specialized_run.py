"""The launching functions as on an H200, up to the machine code, without a GPU: ``specialized_run.py [--complete]``.

A launch specializes a kernel on its arguments (integers of value 1 become constants, multiples of 16 are marked) before
it compiles it.  Here a driver that only names its target stands in for the GPU's, and nothing is started.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import kernel_cases
import torch
import triton
from kernel_cases import GatherCase, ScatterCase
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from odysseus_kernels.kernels import gather_matmul, launch, matmul_scatter, warp_specialized, weight_gradient
from odysseus_kernels.kernels.configs import Target, TileConfig, shipped

LAYOUTS: list[dict[str, Any]] = [
    {"world": 8, "rank": 3, "rows": 1024, "depth": 4096, "widths": (512, 128, 128)},
    {"rows": 1, "depth": 64},
    {"depth": 1},
    {"widths": (1,)},
    {"world": 1, "rank": 0, "rows": 1, "depth": 1, "widths": (1, 1, 1), "deep": True},
    {"world": 2, "rank": 1, "rows": 1, "widths": (1, 8), "bias": False},
]


class _Driver:
    """Names a target; has no memory and starts nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiled:
    """A kernel that is compiled instead of started."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.names: set[str] = set()

    def __getitem__(self, grid: tuple[int]) -> Any:
        def start(**arguments: Any) -> None:
            assert 1 <= grid[0] <= 264
            if "STAGES" in arguments:
                self.names.add("specialized")
            else:
                # On the CPU the launching functions have taken the interpreter for granted.
                arguments = arguments | {"INTERPRETED": False}
                self.names.add("descriptors" if arguments["DESCRIPTORS"] else "pointers")
            assert self._kernel.warmup(grid=grid, **arguments).asm["cubin"]

        return start


def _specialized() -> None:
    """The warp-specialized product, which a launch on a CPU would not choose, where its operands can be described."""
    choose = gather_matmul.choose
    kernel = _Compiled(warp_specialized.gather_matmul_specialized_kernel)
    for config in shipped("gather_matmul", 90, torch.bfloat16):
        if config.specialized:

            def chosen(*arguments: Any, config: TileConfig = config) -> TileConfig:
                return config if arguments[-1] else choose(*arguments)

            with (
                mock.patch.object(gather_matmul, "choose", chosen),
                mock.patch.object(warp_specialized, "gather_matmul_specialized_kernel", kernel),
            ):
                # Odd sizes by default for one of the two, which are one source with other constants.
                for layout in LAYOUTS if config.schedule == "cooperative" or "--complete" in sys.argv else LAYOUTS[:1]:
                    GatherCase(**layout).multiply(None)
    assert kernel.names == {"specialized"}


def main() -> None:
    assert not triton.knobs.runtime.interpret, "expected TRITON_INTERPRET to be unset"
    driver.set_active(_Driver())
    modules = (gather_matmul, matmul_scatter, weight_gradient)
    kernels = {module: f"{module.__name__.rpartition('.')[2]}_kernel" for module in modules}
    stand_ins = {module: _Compiled(getattr(module, name)) for module, name in kernels.items()}
    with (
        mock.patch.object(launch, "interpreted", return_value=True),
        mock.patch.object(launch, "target_of", return_value=Target(90, 132, 227 * 1024)),
        mock.patch.object(kernel_cases, "check_product"),
    ):
        for module, name in kernels.items():
            setattr(module, name, stand_ins[module])
        for layout in LAYOUTS:
            gather = GatherCase(**layout)
            gather.multiply(None)
            gather.gradient(None, swapped=False, accumulate=False, out_dtype=torch.bfloat16)
            gather.gradient(None, swapped=True, accumulate=True, out_dtype=torch.float32)
            adapted = {name: value for name, value in layout.items() if name not in ("depth", "widths")}
            adapted["depths"] = (layout.get("depth", 24),) * 2
            adapted["width"] = layout.get("widths", (40,))[0]
            ScatterCase(**adapted).multiply(None)
        _specialized()
    for stand_in in stand_ins.values():
        assert stand_in.names == {"descriptors", "pointers"}


if __name__ == "__main__":
    main()
