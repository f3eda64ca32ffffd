"""Ranks on one simulated machine, and calls that check what comes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odysseus_kernels.comm.device.transport import SymmetricDeviceTransport
from odysseus_kernels.comm.prefetch import Prefetch
from odysseus_kernels.comm.transport import Call, Gather, Scatter
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.testing.simulated_device import SimulatedMachine

WIDTH = 3
CONFIG = OverlapConfig(mode="fused", timeout_s=5.0)


class Group:
    """Ranks on one simulated machine; calls are enqueued rank by rank and run later."""

    def __init__(self, world: int, seed: int = 0) -> None:
        self.world = world
        self.machine = SimulatedMachine(world)
        self.transports = [SymmetricDeviceTransport(device, device.rank, world) for device in self.machine.devices]
        self.generator = torch.Generator().manual_seed(seed)
        self.checks: list[Any] = []

    def random(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def run(self, seed: int) -> None:
        self.machine.run(seed)
        for check in self.checks:
            check()
        self.checks.clear()

    # ---- calls with what must come of them ---------------------------------------------------------------------------

    def gather_part(self, batch: int, rows: int) -> tuple[list[Gather], Any]:
        shards = [self.random(batch, rows, WIDTH) for _ in range(self.world)]
        return self.gather_of(shards)

    def gather_of(self, shards: list[Tensor]) -> tuple[list[Gather], Any]:
        seen = [torch.full((self.world, *shards[0].shape), torch.nan, dtype=torch.float64) for _ in shards]
        order: list[list[int]] = [[] for _ in shards]

        def consume(rank: int) -> Any:
            def run(source: int, start: int, stop: int, block: Tensor) -> None:
                assert block.shape == (shards[0].shape[0], stop - start, WIDTH)
                seen[rank][source, :, start:stop] = block
                order[rank].append(source)

            return run

        def check() -> None:
            for rank in range(self.world):
                assert torch.equal(seen[rank], torch.stack(shards))
                assert list(dict.fromkeys(order[rank])) == [(rank + hop) % self.world for hop in range(self.world)]

        gathers = [Gather(shards[r], consume(r)) for r in range(self.world)]
        return gathers, check

    def scatter_part(self, batch: int, rows: int, dtype: torch.dtype = torch.float64) -> tuple[list[Scatter], Any]:
        parts = [self.random(self.world, batch, rows, WIDTH, dtype=dtype) for _ in range(self.world)]
        outs = [torch.full((batch, rows, WIDTH), torch.nan, dtype=dtype) for _ in range(self.world)]

        def produce(rank: int) -> Any:
            def run(target: int, start: int, stop: int, block: Tensor) -> None:
                assert block.shape == (batch, stop - start, WIDTH)
                block.copy_(parts[rank][target, :, start:stop])

            return run

        def check() -> None:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for rank in range(self.world):
                # In the order of the schedule: rank - 1 first, the own part last but one.
                sources = [(rank - hop) % self.world for hop in range(1, self.world)]
                total = torch.zeros((), dtype=wide)
                for source in [*sources[:-1], rank, sources[-1]]:
                    total = total + parts[source][rank].to(wide)
                assert torch.equal(outs[rank], total.to(dtype))

        return [Scatter(outs[rank], produce(rank)) for rank in range(self.world)], check

    def enqueue(
        self,
        gathers: Any,
        scatters: Any,
        config: OverlapConfig,
        prefetch: list[Tensor] | None = None,
        **options: Any,
    ) -> None:
        for rank, transport in enumerate(self.transports):
            if prefetch is not None:
                options["prefetch"] = Prefetch.of_gather(prefetch[rank])
            gather = gathers[rank] if gathers else None
            scatter = scatters[rank] if scatters else None
            transport.execute(Call("operator", "forward", config, gather, scatter, **options))
