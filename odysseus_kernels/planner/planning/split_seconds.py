"""Seconds of a training step under a split: compute, and what of the communication it does not hide.

One decoder layer is a chain of operators, each with its products and, by ``planner/formulas.py``, its bytes; a step is
its layers forward and backward (with checkpointing forward twice), the head, and the gradients of replicated
parameters, which nothing hides.  With F operations and b bytes of one operator in one phase,

=============  =======================================================================================================
compute        sum of F / reached product rate, attention's at the machine's ``attention_share`` of the peak; what
               passes the memory: all that is kept for backward, written once and read once (with checkpointing
               written twice); and the machine's ``layer_overhead_s``, a third of it in forward
transfer       b / rate of the slowest link within its group · ``LINK_SHARE``: the device's own within a host, the
               network's where a group spans hosts (seq lies innermost, then ring, then dp)
unfused        ``cost_model.predict(...)["unfused"]``: product + transfer + latencies
fused          ``cost_model.predict(...)["fused"]``, about max(product, transfer) + min(product, transfer) / chunks,
               or unfused where that is less
pipelined      the attention block piece by piece, or Ulysses' group of heads by group of heads
               (``planner/pipeline.py``); the first ZeRO-3 gather of a layer was sent ahead and has no first chunk
               (not with ring ranks, and not of Ulysses' groups in backward, as in the package)
fully_shard    in each phase max(0, transfer − the layer), and the first layer's transfer
offload        in each phase max(0, a layer's input / host link − the layer)
=============  =======================================================================================================

"Exposed" is a step's seconds minus its compute.  Backward has two products for each one of forward, attention's takes
2.5 times as long (five products for two).  Causal attention counts half of all pairs, a window its width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from odysseus_kernels.planner.cost_model import CHUNK_LOSS, LINK_SHARE, MEMORY_SHARE, PRODUCT_SHARE, Work, predict
from odysseus_kernels.planner.formulas import Traffic
from odysseus_kernels.planner.hardware import Hardware
from odysseus_kernels.planner.pipeline import grouped_seconds, pipelined_seconds
from odysseus_kernels.planner.planning.machines import Machine
from odysseus_kernels.planner.planning.models import ModelSizes
from odysseus_kernels.planner.planning.pipelining import Form
from odysseus_kernels.planner.planning.split_bytes import FULLY_SHARD, StepTraffic
from odysseus_kernels.planner.planning.splits import ZERO3_ATTENTION, Split

__all__ = ["SplitSeconds", "split_seconds"]

_ATTENTION_BACKWARD = 2.5
_PIECES = 2  # of a rank's shard in the fused modes, the usual choice where counts are timed
_PHASES = ("forward", "backward")
_OVERHEAD_SHARES = (1 / 3, 2 / 3)  # as of products
_SEQ_OPERATORS = (
    "all_gather_linear",
    "linear_reduce_scatter",
    "column_parallel_linear",
    "linear_all_reduce",
    "vocab_parallel_linear_cross_entropy",
)


@dataclasses.dataclass(frozen=True)
class SplitSeconds:
    """Seconds of one step.

    Attributes:
        compute: without any communication.
        exposed_unfused, exposed_fused: communication that is not hidden, in these modes.
        exposed_pipelined: with pipelined attention and gathers sent ahead; that of the fused mode where the strategy
            has neither.
    """

    compute: float
    exposed_unfused: float
    exposed_fused: float
    exposed_pipelined: float

    @property
    def exposed(self) -> float:
        """The least that can be reached."""
        return min(self.exposed_unfused, self.exposed_fused, self.exposed_pipelined)

    @property
    def step(self) -> float:
        """Seconds of the whole step."""
        return self.compute + self.exposed


@dataclasses.dataclass(frozen=True)
class _Use:
    """One call of an operator in a layer: its name in the formulas and its operations in forward."""

    operator: str
    flops: float


class _Times:
    """Times of operators on one split of one machine."""

    def __init__(self, machine: Machine, split: Split, dtype: str) -> None:
        self.machine, self.split, self.dtype = machine, split, dtype
        self.world = split.everyone * split.dp

    def extent(self, operator: str, collective: str) -> tuple[int, int]:
        """(ranks of the group, consecutive ranks among which it lies)."""
        split = self.split
        if operator == FULLY_SHARD:
            return split.dp, self.world
        if operator == "ring_attention" and split.strategy != "tsp":
            return split.ring, split.everyone
        if operator in _SEQ_OPERATORS or collective == "all_to_all":
            return split.seq, split.seq
        return split.everyone, split.everyone

    def transfer(self, sent: Sequence[tuple[str, str, float]]) -> float:
        """Seconds for which the links are busy with (operator, collective, bytes), one after another."""
        total = 0.0
        for operator, collective, count in sent:
            rate, _ = self.machine.link(self.extent(operator, collective)[1], self.world)
            total += count / (rate * LINK_SHARE)
        return total

    def operator(self, flops: float, sent: Sequence[tuple[str, str, float]]) -> tuple[float, float, float, float]:
        """(product, unfused, fused, fused with its first chunk sent ahead) of one operator in one phase."""
        device = self.machine.device
        peak = device.flops_of(self.dtype)
        product = flops / (peak * PRODUCT_SHARE)
        sent = [one for one in sent if one[2] > 0]
        if not sent:
            return product, product, product, product
        groups = [self.extent(operator, collective) for operator, collective, _ in sent]
        ranks = max(size for size, _ in groups)
        latency = max(self.machine.link(extent, self.world)[1] for _, extent in groups)
        # Bytes over several links as the device's own would carry them in the same time.
        as_own = device.link_bytes_per_s * LINK_SHARE / (ranks - 1)
        scattered = self.transfer([one for one in sent if one[1] == "reduce_scatter"])
        both = self.transfer([one for one in sent if one[1] == "all_reduce"])  # one half of it after the other
        gathered = self.transfer(sent) - scattered - both
        work = Work(
            flops,
            ranks,
            self.dtype,
            gathered_bytes=max(0.0, gathered + both / 2) * as_own,
            scattered_bytes=(scattered + both / 2) * as_own,
            pieces=_PIECES,
            unfused_local_bytes=sum(count for _, _, count in sent),  # what arrives is written before it is used
        )
        hardware = dataclasses.replace(device, link_latency_s=latency)
        found = predict(work, hardware, ("unfused", "fused"))
        fused = min(found.values())
        first = min(product, self.transfer(sent)) / (ranks * _PIECES) if hardware.overlaps else 0.0
        return product, found["unfused"], fused, min(fused, max(product, found["fused"] - first))


def split_seconds(
    model: ModelSizes,
    split: Split,
    sent: StepTraffic,
    machine: Machine,
    *,
    tokens: int,
    length: int,
    dtype: str,
    layer_bytes: int,
    checkpointing: bool,
    form: Form,
    offloaded_layer: int = 0,
) -> SplitSeconds:
    """Seconds of one step by the formulas of this module.

    Args:
        model, split, sent, machine: what runs where, and what it sends.
        tokens: of batch and sequence that the ranks of seq and ring share.
        length: of one sequence, padding included.
        dtype: of products, ``"bfloat16"`` and so on.
        layer_bytes: that one layer keeps for backward without checkpointing.
        checkpointing: whether layers are computed twice.
        form: how attention is taken.
        offloaded_layer: bytes of a layer that go to the host's memory and come back.
    """
    times = _Times(machine, split, dtype)
    device = machine.device
    memory_pass = layer_bytes / (device.memory_bytes_per_s * MEMORY_SHARE)
    computes, unfused, fused, pipelined = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for phase in (0, 1):
        found = _layer_phase(model, split, sent.layer, times, phase, tokens, length, checkpointing, form)
        for sums, seconds in zip((computes, unfused, fused, pipelined), found, strict=True):
            sums[phase] = seconds + memory_pass + machine.layer_overhead_s * _OVERHEAD_SHARES[phase]
    runs = (2 if checkpointing else 1, 1)
    compute = sum(n * seconds for n, seconds in zip(runs, computes, strict=True)) * model.layers
    head_flops = 2.0 * tokens / split.everyone * model.layer.hidden * model.vocabulary
    ends = [0.0, 0.0, 0.0]
    for phase, factor in ((0, 1), (1, 2)):
        parts = [(op, c, float(n)) for (p, op, c), n in sent.ends.items() if p == _PHASES[phase]]
        hidden = [part for part in parts if part[0] != "replicated_parameter"]
        product, serial, overlapped, _ = times.operator(factor * head_flops, hidden)
        compute += product
        alone = times.transfer([part for part in parts if part[0] == "replicated_parameter"])
        for place, seconds in enumerate((serial, overlapped, overlapped)):
            ends[place] += seconds + alone - product
    exposed = []
    for place, variant in enumerate((unfused, fused, pipelined)):
        layers = sum(n * (variant[phase] - computes[phase]) for n, phase in zip(runs, (0, 1), strict=True))
        copies = 0.0
        for phase in (0, 1):
            busy = variant[phase] if device.overlaps else 0.0
            sharing = times.transfer(
                [(op, c, float(n)) for (p, op, c), n in sent.data_parallel.items() if p == _PHASES[phase]]
            )
            copying = offloaded_layer / (machine.host_bytes_per_s * LINK_SHARE)
            copies += max(0.0, sharing - busy) + max(0.0, copying - busy)
            copies += sharing / model.layers  # the first one, before there is a layer to hide it
        alone = times.transfer([(op, c, float(n)) for (_, op, c), n in sent.data_parallel_ends.items()])
        exposed.append(model.layers * (layers + copies) + ends[place] + alone)
    return SplitSeconds(compute, exposed[0], exposed[1], min(exposed[1], exposed[2]))


def _uses(model: ModelSizes, split: Split, own: float) -> tuple[list[_Use], list[_Use]]:
    """Projections of the attention block and of the feed-forward network, with their operations in forward."""
    shape, strategy = model.layer, split.strategy
    d, network = shape.hidden, shape.intermediate * max(1, model.used_experts)
    over = 1 if strategy in ZERO3_ATTENTION else split.seq
    projected = 2 * own * d * (shape.query + 2 * shape.used_key_value(over))
    output, inner, down = 2 * own * d * shape.query, 2 * own * d * network * shape.inner, 2 * own * d * network
    names = {
        "tp": ("column_parallel_linear", "linear_all_reduce"),
        "ulysses": ("linear_all_to_all", "all_to_all_linear"),
        "tsp": ("zero3_linear", "zero3_linear"),
    }.get(strategy, ("all_gather_linear", "linear_reduce_scatter"))
    attention = [_Use(names[0], projected), _Use(names[1], output)]
    if strategy in ("tp", "tp_sp") and not model.experts:
        return attention, [_Use(names[0], inner), _Use(names[1], down)]
    return attention, [_Use("zero3_linear", inner), _Use("zero3_linear", down)]


def _layer_phase(
    model: ModelSizes,
    split: Split,
    sent: Traffic,
    times: _Times,
    phase: int,
    tokens: int,
    length: int,
    checkpointing: bool,
    form: Form,
) -> tuple[float, float, float, float]:
    """(compute, unfused, fused, pipelined) of one layer in one phase, once."""
    # With checkpointing the formulas count forward twice; this is one of them.
    share = 0.5 if checkpointing and phase == 0 else 1.0
    bytes_of: dict[str, list[tuple[str, str, float]]] = {}
    for (name, operator, collective), count in sent.items():
        if name == _PHASES[phase]:
            bytes_of.setdefault(operator, []).append((operator, collective, share * count))
    own = tokens / split.everyone
    attention, network = _uses(model, split, own)
    weight_flops: dict[str, float] = {}
    uses_of: dict[str, int] = {}
    for use in (*attention, *network):
        weight_flops[use.operator] = weight_flops.get(use.operator, 0.0) + use.flops
        uses_of[use.operator] = uses_of.get(use.operator, 0) + 1
    factor = 2 if phase else 1
    rows: list[tuple[float, float, float, float]] = []
    for use in (*attention, *network):
        weights = use.operator == "zero3_linear"
        part = use.flops / weight_flops[use.operator] if weights else 1 / uses_of[use.operator]
        of_use = [(op, c, part * n) for op, c, n in bytes_of.get(use.operator, [])]
        rows.append(times.operator(factor * use.flops, of_use))
    rounds = times.operator(
        _attention_flops(model, split, times.machine, tokens, length, phase), bytes_of.get("ring_attention", [])
    )
    alone = times.transfer(bytes_of.get("replicated_parameter", []))
    compute = sum(row[0] for row in rows) + rounds[0]
    unfused = sum(row[1] for row in rows) + rounds[1] + alone
    fused = sum(row[2] for row in rows) + rounds[2] + alone
    chunked = [row[2] for row in rows]
    if split.ring == 1:
        first = next((n for n, use in enumerate((*attention, *network)) if _gathers_weights(use.operator)), None)
        if first is not None:
            chunked[first] = rows[first][3]
    piped = sum(chunked) + rounds[2] + alone
    if form != Form() and times.machine.device.overlaps:
        block = [(op, c, n / uses_of[op]) for use in attention for op, c, n in bytes_of[use.operator]]
        seconds = (rows[0][0], rows[1][0], rounds[2])
        if form.pieces > 1:
            whole = _pipelined_block(model, times, block, seconds, length=length, pieces=form.pieces, phase=phase)
        else:
            whole = _grouped_block(times, block, seconds, groups=form.head_groups, phase=phase)
        piped += min(0.0, whole - chunked[0] - chunked[1] - rounds[2])
    return compute, unfused, fused, min(fused, piped)


def _pipelined_block(
    model: ModelSizes,
    times: _Times,
    sent: Sequence[tuple[str, str, float]],
    seconds: tuple[float, float, float],
    *,
    length: int,
    pieces: int,
    phase: int,
) -> float:
    """Seconds of a pipelined attention block; ``seconds``: of its projections, its output product, and attention."""
    projections, output = (one * (1 + CHUNK_LOSS) for one in seconds[:2])
    everything = _pairs(model, length, length)
    gathers = [one for one in sent if one[1] == "all_gather"]
    # Backward gathers x again, for the gradients of the projections' weights alone.
    late = [one for one in gathers if phase and one[0] == "all_gather_linear"]
    taken = pipelined_seconds(
        pieces,
        times.split.seq,
        gathered=times.transfer([one for one in gathers if one not in late]),
        scattered=times.transfer([one for one in sent if one[1] == "reduce_scatter"]),
        # In backward the output's two products come first.
        before=output if phase else projections,
        attention=seconds[2],
        after=projections / 2 if phase else output,
        late=times.transfer(late) if late else None,
        concluding=projections / 2,
        pairs=lambda start, stop: (
            (_pairs(model, length, stop * length) - _pairs(model, length, start * length)) / everything
        ),
        backward=phase == 1,
    )
    return taken + _hand_shakes(times.machine.device, pieces)


def _grouped_block(
    times: _Times,
    sent: Sequence[tuple[str, str, float]],
    seconds: tuple[float, float, float],
    *,
    groups: int,
    phase: int,
) -> float:
    """Seconds of Ulysses' block in groups of heads; ``seconds`` as those of :func:`_pipelined_block`."""
    projections, output = (one * (1 + CHUNK_LOSS) for one in seconds[:2])
    # Backward goes from the output's products to the projections', which then make sums of weights for others, too.
    ends = ("all_to_all_linear", "linear_all_to_all") if phase else ("linear_all_to_all", "all_to_all_linear")

    def carried(operator: str, *collectives: str) -> float:
        return times.transfer([one for one in sent if one[0] == operator and one[1] in collectives])

    taken = grouped_seconds(
        groups,
        times.split.seq,
        given=(carried(ends[0], "all_gather"), carried(ends[1], "all_gather")),
        made=(carried(ends[0], "all_to_all", "reduce_scatter"), carried(ends[1], "all_to_all")),
        before=output if phase else projections,
        attention=seconds[2],
        after=projections if phase else output,
        summed=carried(ends[1], "reduce_scatter") if phase else None,
        ahead=phase == 0,
    )
    return taken + _hand_shakes(times.machine.device, groups + 3)


def _gathers_weights(operator: str) -> bool:
    return operator in ("zero3_linear", "linear_all_to_all", "all_to_all_linear")


def _hand_shakes(device: Hardware, pieces: int) -> float:
    return pieces * (device.launch_overhead_s + 2 * device.link_latency_s)


def _attention_flops(model: ModelSizes, split: Split, machine: Machine, tokens: int, length: int, phase: int) -> float:
    """Operations of one rank's attention, as many as would take its time as products."""
    sequences = math.ceil(tokens / length)
    used = 4.0 * _pairs(model, length, length) * sequences * model.layer.query / split.everyone
    return used * (_ATTENTION_BACKWARD if phase else 1.0) * PRODUCT_SHARE / machine.attention_share


def _pairs(model: ModelSizes, length: int, queries: float) -> float:
    """Pairs of query and key that the first ``queries`` of ``length`` tokens see."""
    seen = min(queries, length if model.window is None else model.window)
    return queries * seen - seen * (seen - 1) / 2
