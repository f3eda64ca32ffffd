"""Memory of a training step of a long sequence: with checkpointing, with its inputs away as well, and in tiles.

``python -m benchmarks.layers.long`` trains one step of a Mistral-shaped model with a sliding window, so that attention
stays affordable, on ranks of this machine, one variant after another.  Printed are, for the largest rank,

- the peak of what torch allocates in the step beside gradients, which are there before, and by how much the process's
  resident memory grew in a further one, with what the allocator does not give back,
- what the formulas say of it: inputs of checkpointed layers, and what the feed-forward network holds,
- bytes to and from the folder, and seconds (of one step, the second; no figure of speed).
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common.memory import peak_of_others, process_growth, record_allocations
from odysseus_kernels.config import OverlapConfig
from odysseus_kernels.planner.formulas import LayerShape
from odysseus_kernels.planner.memory import feed_forward_peak, layer_inputs

__all__ = ["LongCase", "main", "measure"]

_MIB = 1 << 20
_COLUMNS = 130
_KEPT = 1  # last layers whose inputs stay


@dataclasses.dataclass(frozen=True)
class LongCase:
    """A model, a sequence, and what is done about memory.

    Attributes:
        tokens: L, of one sequence.
        hidden, intermediate, heads, layers: sizes.
        window: of attention.
        strategy: see :func:`odysseus_kernels.parallelize`.
        folder: where layer inputs go, or None.
        tile_rows: tokens of a tile, or None.
        traced: whether what torch allocates is recorded, which takes memory itself.
    """

    tokens: int
    hidden: int
    intermediate: int
    heads: int
    layers: int
    window: int
    strategy: str = "tsp"
    folder: str | None = None
    tile_rows: int | None = None
    traced: bool = False

    @property
    def name(self) -> str:
        """What is done, in words."""
        parts = ["offload"] * (self.folder is not None) + [f"tiles of {self.tile_rows}"] * (self.tile_rows is not None)
        return " + ".join(["checkpointing", *parts])

    def expected(self, world: int) -> dict[str, int]:
        """Bytes by the formulas: ``inputs`` of layers, and ``network``, the most that the feed-forward one holds.

        Without tiles that is what one tile of all tokens holds.
        """
        shape = LayerShape(self.hidden, self.intermediate, self.heads, self.heads, self.hidden // self.heads)
        sizes: dict[str, Any] = {"tokens": self.tokens}
        keep = None if self.folder is None else _KEPT
        inputs = layer_inputs(self.hidden, self.strategy, world, layers=self.layers, keep=keep, **sizes)
        rows = self.tokens // world if self.tile_rows is None else self.tile_rows
        network = feed_forward_peak(shape, self.strategy, world, tile_rows=rows, **sizes)
        return {"inputs": inputs, "network": max(network.values())}


def measure(rank: int, world: int, case: LongCase) -> dict[str, float]:
    """The largest over the ranks: peaks in bytes, bytes moved, seconds; and the loss."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import MistralConfig, MistralForCausalLM

    import odysseus_kernels as ody
    from benchmarks.common.ranks import largest_over_ranks

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=512,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        sliding_window=case.window,
        max_position_embeddings=case.tokens,
        initializer_range=case.hidden**-0.5,
        attn_implementation="sdpa",
    )
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("seq",))
    settings = OverlapConfig(tile_rows=case.tile_rows)
    model = ody.parallelize(MistralForCausalLM(config).train(), mesh, case.strategy, settings)
    # The first is what later versions of transformers call the second.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    offload = None
    if case.folder is not None:
        offload = ody.offload_activations(model, folder=case.folder, min_bytes=0, keep=_KEPT)
    ids = torch.randint(512, (1, case.tokens), generator=torch.Generator().manual_seed(1))
    batch = ody.shard_sequence({"input_ids": ids, "labels": ids.clone()}, model)

    def step() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=False)  # they stay, or they would hide in the peak what is away
        loss = model(**batch).loss
        loss.backward()
        return [loss.detach()]

    step()  # buffers of the transports, and gradients
    found: dict[str, float] = {"allocated": 0}
    if case.traced:
        _, events = record_allocations(step)
        found["allocated"] = peak_of_others(events, set())[0]
    begin, losses = time.perf_counter(), []
    moved = (0, 0) if offload is None else (offload.bytes_out, offload.bytes_in)
    found["resident"] = process_growth(lambda: losses.extend(step()) or [])  # type: ignore[func-returns-value]
    found["seconds"] = time.perf_counter() - begin
    if offload is not None:
        found |= {"out": offload.bytes_out - moved[0], "in": offload.bytes_in - moved[1]}
    found["loss"] = losses[0].item()
    return largest_over_ranks({name: float(value) for name, value in found.items()})


def _print(rows: list[tuple[LongCase, dict[str, float]]], world: int) -> None:
    from rich.console import Console
    from rich.table import Table

    case = rows[0][0]
    table = Table(
        title=f"L {case.tokens}, d {case.hidden}, i {case.intermediate}, {case.layers} layers, window {case.window}, "
        f"{case.strategy}, {world} ranks, fp32; MiB of the largest rank"
    )
    for column in ("", "allocated", "resident", "formula: inputs", "formula: network", "out", "in", "s", "loss"):
        table.add_column(column, justify="left" if not column else "right", overflow="fold")
    for one, found in rows:
        expected = one.expected(world)
        sizes = [found["allocated"], found["resident"], expected["inputs"], expected["network"]]
        sizes += [found.get("out", 0), found.get("in", 0)]
        cells = [f"{size / _MIB:.1f}" if size else "" for size in sizes]
        table.add_row(one.name, *cells, f"{found['seconds']:.1f}", f"{found['loss']:.6f}")
    console = Console()
    console.width = max(console.width, _COLUMNS)  # where it is no terminal, too
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    from odysseus_kernels.testing.spawn import RankPool

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, help="default: 2.75 times the hidden size")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--strategy", default="tsp", help="one whose attention has a window without a whole mask: tsp")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tile-rows", type=int, default=1024)
    parser.add_argument("--folder", help="on a disk with room for the layer inputs of all ranks")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for each variant")
    names = ("checkpointing", "offload", "tiles")
    parser.add_argument(
        "--variants", nargs="+", choices=names, default=names, help="each with what the others before do"
    )
    parser.add_argument("--no-trace", action="store_true", help="resident memory only: a step less")
    given = parser.parse_args(arguments)
    folder = str(Path(given.folder or tempfile.gettempdir()).resolve())
    base = LongCase(
        given.length,
        given.hidden,
        given.intermediate or given.hidden * 11 // 4,
        given.heads,
        given.layers,
        given.window,
        given.strategy,
        traced=not given.no_trace,
    )
    changes: dict[str, dict[str, Any]] = {"checkpointing": {}, "offload": {"folder": folder}}
    changes["tiles"] = {"folder": folder, "tile_rows": given.tile_rows}
    rows = []
    with RankPool(given.ranks, threads=1, timeout=given.timeout) as pool:
        for name in (name for name in names if name in given.variants):
            case = dataclasses.replace(base, **changes[name])
            rows.append((case, pool.run(measure, case)[0]))
    _print(rows, given.ranks)


if __name__ == "__main__":
    main()
