"""Whether one kernel whose tiles wait and signal can serve a call, and kernels prepared before ranks rely on them."""

from __future__ import annotations

import importlib.util

from odysseus_kernels.comm.transport import Call, Transport

__all__ = ["Preparation", "check_tiles", "prepare_tiles"]


def check_tiles(call: Call, world: int) -> None:
    """ValueError if ``mode="tiles"`` cannot serve ``call``; the same on all ranks."""
    parts = [part for part in (call.gather, call.scatter) if part is not None]
    chunk = call.gather.shard if call.gather is not None else call.scatter.out if call.scatter is not None else None
    if len(parts) != 1 or parts[0].tiles is None or chunk is None or chunk.shape[0] != 1:
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                f'{call.name}: expected the package triton for mode "tiles", which cannot be imported: install it, or '
                f"use another mode"
            )
        raise ValueError(
            f'{call.name}: expected mode "fused" or "unfused", got "tiles": its kernel serves one gather or one '
            f"scatter of a sequence without a batch"
        )
    nbytes = (world - 1) * chunk.numel() * chunk.element_size()
    if nbytes > call.config.tile_bytes:
        raise ValueError(
            f'{call.name}: expected mode "tiles" to need at most tile_bytes={call.config.tile_bytes:,} bytes for its '
            f"chunks, got {nbytes:,}; raise tile_bytes or use another mode"
        )


def prepare_tiles(call: Call) -> None:
    """Makes sure that the call's kernel can run, on this rank alone; KernelUnavailableError if it cannot."""
    for part in (call.gather, call.scatter):
        if part is not None and part.prepare is not None:
            part.prepare()


class Preparation(Transport):
    """Stands in for the transport of a device before a choice: calls prepare their kernels, and nothing moves."""

    name = "symmetric"
    serves_tiles = True

    def _execute(self, call: Call) -> None:
        try:
            check_tiles(call, self.world)
        except ValueError:  # on all ranks alike, as they will find when they run it
            return
        prepare_tiles(call)

    def _count(self, call: Call) -> None:
        """Nothing was sent."""
