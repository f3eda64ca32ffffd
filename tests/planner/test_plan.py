"""Plans: bytes and memory from the proved formulas, order, properties of the predicted seconds, and what errors say."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import odysseus_kernels as ody
from odysseus_kernels.planner.cost_model import MODEL_MARGIN
from odysseus_kernels.planner.formulas import STRATEGIES, LayerShape, head_traffic, replicated_traffic, traffic
from odysseus_kernels.planner.memory import head_saved, saved
from odysseus_kernels.planner.planning import plan as planning
from odysseus_kernels.planner.planning.machines import MACHINES, Machine, machine_for
from odysseus_kernels.planner.planning.models import ModelSizes, bundled_models, model_sizes
from odysseus_kernels.planner.planning.pipelining import Form
from odysseus_kernels.planner.planning.plan import Plan, SplitPlan, plan
from odysseus_kernels.planner.planning.split_seconds import split_seconds
from odysseus_kernels.planner.planning.splits import Split, divisors, possible_splits, why_not
from odysseus_kernels.planner.ring import busiest_peers

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OVERLAP = RESULTS / "cpu-2cores" / "overlap-20261128-112325.json"
SCALE = RESULTS / "cpu-2cores" / "scale-20261129-021024.json"
LAYER = RESULTS / "cpu-2cores" / "layer-20261128-114201.json"
EMULATED = next((RESULTS / "1x-nvidia-h100-80gb-hbm3").glob("emulated-*.json"))
DENSE = tuple(name for name in bundled_models() if name != "mixtral-8x7b")
# Sums of many terms round in the last place.
ROUNDING = 1 + 1e-9

SIZES = st.fixed_dictionaries(
    {
        "model_config": st.sampled_from(DENSE),
        "world_size": st.sampled_from((1, 2, 3, 4, 8, 12, 16, 64)),
        "seq_len": st.integers(1, 1 << 18),
        "hardware": st.sampled_from((*MACHINES, "cpu", "h100-nvlink@8")),
        "batch": st.sampled_from((1, 2, 6)),
        "checkpointing": st.booleans(),
        "dtype": st.sampled_from(("bfloat16", "float32")),
    }
)
few = settings(max_examples=25, deadline=None)


def splits_of(found: Plan) -> dict[Split, SplitPlan]:
    return {one.split: one for one in found.splits}


@few
@given(SIZES)
def test_bytes_and_saved_memory_are_the_formulas(arguments) -> None:
    found = plan(**arguments)
    model, size = found.model, 2 if found.dtype == "bfloat16" else 4
    shape = model.layer
    for one in found.splits:
        split = one.split
        tokens = found.batch // split.dp * split.padded(found.seq_len, one.pieces)
        sizes = {"ring": split.ring, "element_size": size}
        ring = split.everyone if split.strategy == "tsp" else split.ring
        peers = busiest_peers(ring, one.padded, model.window, size)
        layer = traffic(
            shape, split.strategy, split.seq, tokens=tokens, checkpointing=found.checkpointing,
            pipelined=max(one.pieces, one.head_groups) > 1, ring_peers=peers, **sizes,
        )  # fmt: skip
        ends = [replicated_traffic(shape.hidden, split.strategy, split.seq, **sizes)] * (2 if shape.norm_bias else 1)
        ends.append(replicated_traffic(model.vocabulary * shape.hidden, split.strategy, split.seq, **sizes))
        ends.append(
            head_traffic(
                model.vocabulary, shape.hidden, split.strategy, split.seq, tokens=tokens, tied=model.tied, **sizes
            )
        )
        expected: Counter[str] = Counter()
        for part in [layer] * model.layers + ends:
            for (_, _, collective), count in part.items():
                expected[collective] += count
        ours = Counter(one.traffic.by_collective())
        for part, times in ((one.traffic.data_parallel, model.layers), (one.traffic.data_parallel_ends, 1)):
            for (_, _, collective), count in part.items():
                ours[collective] -= times * count
        assert +ours == +expected, split
        if not shape.qk_norm:
            kept = saved(
                shape, split.strategy, split.seq, tokens=tokens, checkpointing=found.checkpointing, **sizes
            )  # fmt: skip
            head = head_saved(shape.hidden, split.strategy, split.seq, tokens=tokens, **sizes)
            assert one.memory.saved == model.layers * sum(kept.values()) + head, split


@few
@given(SIZES)
def test_order_and_consistency(arguments) -> None:
    found = plan(**arguments)
    fitting = [one for one in found.splits if one.fits]
    assert found.splits[: len(fitting)] == tuple(fitting)
    assert (found.best is None) == (not fitting)
    if found.best is not None:
        assert found.best.seconds.step == min(one.seconds.step for one in fitting)
    device = found.machine.device.memory_bytes
    for one in found.splits:
        assert one.split.everyone * one.split.dp == found.world_size
        assert found.batch % one.split.dp == 0
        assert one.fits == (one.memory.total <= device) == (one.binds != "memory")
        seconds = one.seconds
        assert seconds.compute > 0
        # Chunks lose a little, so that fusing never shows less than nothing exposed.
        assert -1e-9 < seconds.exposed <= seconds.exposed_fused <= seconds.exposed_unfused * ROUNDING
        assert one.tokens_per_s == pytest.approx(found.batch * found.seq_len / seconds.step)
        if one.split.everyone * one.split.dp == 1:
            assert one.traffic.total == 0 and seconds.exposed == pytest.approx(0, abs=1e-9)
    assert found.why.endswith(".") and json.loads(json.dumps(found.as_dict()))["why"] == found.why


@few
@given(SIZES, st.floats(1, 100), st.sampled_from(("link", "network")))
def test_more_bandwidth_never_makes_a_split_slower(arguments, times: float, which: str) -> None:
    before = plan(**arguments)
    known = before.machine
    if which == "link":
        device = dataclasses.replace(known.device, link_bytes_per_s=known.device.link_bytes_per_s * times)
        faster = dataclasses.replace(known, device=device)
    else:
        faster = dataclasses.replace(known, network_bytes_per_s=known.network_bytes_per_s * times)
    after = on_machine(faster, arguments)
    earlier = splits_of(before)
    for split, one in splits_of(after).items():
        for name in ("exposed_unfused", "exposed_fused", "exposed_pipelined"):
            old = earlier[split].seconds
            assert old.compute + getattr(one.seconds, name) <= (old.compute + getattr(old, name)) * ROUNDING, split


def on_machine(machine: Machine, arguments: dict) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "machine_for", lambda name: machine)
        return plan(**arguments)


@few
@given(SIZES, st.integers(1, 1 << 18))
def test_memory_and_time_grow_with_the_sequence(arguments, more: int) -> None:
    assume(arguments["hardware"] != "cpu")
    short = splits_of(plan(**arguments))
    long = splits_of(plan(**{**arguments, "seq_len": arguments["seq_len"] + more}))
    assert short.keys() == long.keys()
    for split, one in short.items():
        assert one.memory.saved <= long[split].memory.saved and one.memory.total <= long[split].memory.total, split
        assert one.seconds.compute <= long[split].seconds.compute, split


@few
@given(SIZES)
def test_checkpointing_and_offload_trade_memory_for_time(arguments) -> None:
    plain, recomputed, offloaded = (
        splits_of(plan(**{**arguments, "checkpointing": checkpointing, "offload": offload}))
        for checkpointing, offload in ((False, False), (True, False), (True, True))
    )
    for split, one in recomputed.items():
        assert one.memory.saved <= plain[split].memory.saved and one.seconds.compute > plain[split].seconds.compute
        other = offloaded[split]
        assert other.memory.saved + other.memory.offloaded == one.memory.saved
        assert other.seconds.step >= one.seconds.step and other.memory.offloaded > 0


@given(st.integers(1, 2000), st.integers(1, 64), st.sampled_from(DENSE))
@settings(max_examples=50, deadline=None)
def test_splits_are_all_divisors_that_the_heads_allow(world_size: int, batch: int, name: str) -> None:
    model = model_sizes(name)
    listed = dict(possible_splits(model, world_size, batch))
    for dp in divisors(world_size):
        for seq in divisors(world_size // dp):
            for strategy in STRATEGIES:
                split = Split(strategy, seq, world_size // dp // seq, dp)
                if batch % dp or (strategy == "tsp" and split.ring > 1):
                    assert split not in listed
                elif split not in listed:
                    assert why_not(model, split).startswith("heads: "), split
                else:
                    assert listed[split] == why_not(model, split)


def test_large_machines_take_few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds differ between machines; how many splits are evaluated does not."""
    evaluated = []
    evaluate = planning.evaluate_split
    monkeypatch.setattr(planning, "evaluate_split", lambda *args: evaluated.append(args[1]) or evaluate(*args))
    found = plan("llama-3.1-70b", 16384, 1 << 24, "h200-nvlink", checkpointing=True)
    assert len(evaluated) == len(found.splits) < 20
    evaluated.clear()
    plan("llama-3.1-70b", 16384, 1 << 24, "h200-nvlink", batch=16384, checkpointing=True)
    assert len(evaluated) < 500


def test_groups_within_a_host_go_at_its_link() -> None:
    machine = machine_for("h200-nvlink")
    assert machine.link(8, 64)[0] == machine.link(2, 64)[0] == 450e9
    assert machine.link(16, 64)[0] == machine.link(3, 12)[0] == 50e9  # blocks of three span hosts of eight
    assert machine.link(6, 6)[0] == 450e9
    assert machine_for("h200-nvlink+800g").link(16, 64)[0] == 100e9
    assert machine_for("a100-pcie+400g").link(16, 64)[0] == 32e9  # never faster than the device's own
    slow = splits_of(plan("llama-3.1-8b", 64, 1 << 18, "h200-nvlink+100g", checkpointing=True))
    fast = splits_of(plan("llama-3.1-8b", 64, 1 << 18, "h200-nvlink+800g", checkpointing=True))
    for split, one in slow.items():
        assert one.seconds.exposed > fast[split].seconds.exposed


def test_sizes_of_bundled_models() -> None:
    """Weights as their cards have them, in units of 10^9; biases and norms are left out."""
    cards = {
        "llama-2-7b": 6.74, "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6, "mistral-7b": 7.25, "qwen2.5-7b": 7.62,
        "qwen3-8b": 8.19, "mixtral-8x7b": 46.7, "starcoder2-7b": 7.17,
    }  # fmt: skip
    assert cards.keys() == bundled_models().keys()
    for name, expected in cards.items():
        assert model_sizes(name).parameters / 1e9 == pytest.approx(expected, rel=2e-3), name
        assert str(bundled_models()[name]["source"]).startswith("https://huggingface.co/")


def test_a_configuration_from_a_file_a_dictionary_or_transformers(tmp_path: Path) -> None:
    raw = dict(bundled_models()["qwen3-8b"])
    (tmp_path / "config.json").write_text(json.dumps(raw))
    bundled = model_sizes("qwen3-8b")
    for given_as in (tmp_path, tmp_path / "config.json", str(tmp_path / "config.json"), raw):
        assert dataclasses.replace(model_sizes(given_as), name=bundled.name) == bundled
    assert bundled.layer.qk_norm and not bundled.layer.qkv_bias and bundled.window is None
    starcoder2 = model_sizes("starcoder2-7b")
    assert starcoder2.tied and starcoder2.window == 4096 and starcoder2.layer.norm_bias and not starcoder2.layer.gated
    without_tie = {key: value for key, value in bundled_models()["starcoder2-7b"].items() if key[:3] != "tie"}
    assert model_sizes(without_tie).tied  # the family's default

    class Configuration:
        def to_dict(self) -> dict:
            return raw

    assert model_sizes(Configuration()).layer == bundled.layer


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"model_config": "gpt-5"}, r"model: expected one of llama-2-7b, .* path of a config\.json, got 'gpt-5'"),
        ({"model_config": 7}, "model: expected a name, the path of a config.json, .* got int"),
        ({"model_config": {"model_type": "gpt2"}}, "gpt2: expected a model_type among llama, .*got 'gpt2'"),
        ({"model_config": {"model_type": "llama"}}, "expected num_attention_heads, a whole number above 0, got None"),
        ({"hardware": "tpu"}, r"hardware: expected one of a100-nvlink, .* got 'tpu'"),
        ({"hardware": "h200-nvlink+7g"}, r"\+100g, \+200g, \+400g, \+800g .* got 'h200-nvlink\+7g'"),
        ({"hardware": "h900@8"}, "link: expected one of a100-nvlink"),
        ({"strategies": ("zero", "tp")}, "strategies: expected some of tp, tp_sp, .* got zero"),
        ({"world_size": 0}, "world_size: expected a whole number above 0, got 0"),
        ({"seq_len": -1}, "seq_len: expected a whole number above 0, got -1"),
        ({"batch": 1.5}, "batch: expected a whole number above 0, got 1.5"),
        ({"dtype": "int8"}, "dtype: expected one of bfloat16, float16, float32, float64, got 'int8'"),
        ({"offload": True}, "offload: expected checkpointing=True"),
        ({"pipeline": 0}, "pipeline: expected \"auto\", None or a whole number above 0, got 0"),
        ({"pipeline": "all"}, "pipeline: expected \"auto\", None or a whole number above 0, got 'all'"),
        ({"measured": "absent.json"}, "measured: expected a results file of benchmarks/overlap.py"),
        (
            {"world_size": 3, "strategies": ("ulysses", "tsp")},
            "no split of 3 ranks for a batch of 1 is possible: ulysses, tsp: sizes: 3 ranks do not divide the",
        ),
        (
            {"model_config": "mixtral-8x7b", "world_size": 64},
            "experts: 64 ranks do not divide 8 experts",
        ),
    ),
)  # fmt: skip
def test_errors_say_what_is_expected(changes, message: str) -> None:
    arguments = {"model_config": "llama-3.1-8b", "world_size": 8, "seq_len": 8192, **changes}
    with pytest.raises(ValueError, match=message):
        plan(**arguments)


def test_heads_that_ranks_do_not_divide_are_named() -> None:
    model = ModelSizes("odd", dataclasses.replace(model_sizes("llama-3.1-8b").layer, heads=12, kv_heads=4), 2, 1000)
    assert (
        why_not(model, Split("tp_sp", 6)) == "heads: 6 ranks of seq neither divide 4 key/value heads nor are a multiple"
    )
    assert why_not(model, Split("tp_sp", 8)) == "heads: 8 ranks of seq do not divide 12 query heads"
    assert why_not(model, Split("tsp", 8)) == ""  # heads stay together


def test_padding_and_estimates_are_told() -> None:
    notes = plan("qwen3-8b", 8, 1001, strategies=("tsp",)).notes
    assert "seq_len: 1,001 is padded to 1,008 under tsp seq 8" in notes
    assert any("norms of queries and keys keep is estimated" in note for note in notes)
    assert any("experts keep is estimated" in note for note in plan("mixtral-8x7b", 8, 4096).notes)
    assert any("two levels" in note for note in plan("llama-3.1-8b", 16, 4096).notes)


def test_nothing_fits() -> None:
    found = plan("llama-3.1-70b", 2, 1 << 20, "l40s-pcie")
    assert found.best is None and {one.binds for one in found.splits} == {"memory"}
    assert found.why.startswith("Nothing fits: ")
    assert "weights, gradients and Adam alone take" in found.why
    assert plan("llama-3.1-8b", 8, 1 << 20, "h100-nvlink").why.endswith("checkpointing keeps less.")
    assert plan("llama-3.1-8b", 8, 1 << 23, "h100-nvlink", checkpointing=True).why.endswith("offload keeps less.")


def test_measured_rates_replace_those_of_the_table() -> None:
    arguments = {"model_config": "llama-3.1-8b", "world_size": 2, "seq_len": 4096}
    table = plan(**arguments, hardware="cpu", dtype="float32")
    found = plan(**arguments, hardware="cpu", dtype="float32", measured=OVERLAP)
    rows = json.loads(OVERLAP.read_text())["rows"]
    rates = sorted(row["flops_per_rank"] / row["medians_s"]["gemm"] for row in rows)
    reached = found.machine.device.flops_of("float32") * 0.8
    assert rates[0] <= reached <= rates[-1]
    assert found.machine.device.link_bytes_per_s != table.machine.device.link_bytes_per_s
    assert found.splits[0].seconds.compute != table.splits[0].seconds.compute
    measured = [note for note in found.notes if "measured, overlap-20261128-112325.json" in note]
    assert [note.split(":")[0] for note in measured] == ["compute", "link within a host"]
    # Another type than the measured one keeps the table's compute.
    other = plan(**arguments, hardware="cpu", measured=OVERLAP)
    assert other.machine.device.flops == table.machine.device.flops
    assert any("was measured in float32, not in bfloat16" in note for note in other.notes)


def test_measured_results_of_every_kind() -> None:
    scale = plan("llama-2-7b", 2, 4096, "h100-nvlink@8", dtype="float32", measured=SCALE)
    document = json.loads(SCALE.read_text())
    # Whole layers reach less than products of one thread, and of the link's rate.
    assert 0.8 < scale.machine.device.flops_of("float32") * 0.8 / document["thread_flops"] < 1
    rate = document["parts"][0]["bits_per_s"] / 8
    assert scale.machine.device.link_bytes_per_s == scale.machine.network_bytes_per_s
    assert 0.8 < scale.machine.device.link_bytes_per_s * 0.8 / rate < 1
    layer = plan("llama-2-7b", 2, 4096, "cpu", dtype="float32", measured=LAYER)
    assert any("whole layers without communication, 1 shape" in note for note in layer.notes)
    assert any("link: that of the table: none was measured" in note for note in layer.notes)
    gpu = plan("llama-2-7b", 8, 65536, "h100-nvlink", measured=EMULATED)
    assert 0.5 * 989e12 < gpu.machine.device.flops_of("bfloat16") * 0.8 < 989e12
    assert any("the measured one is emulated" in note for note in gpu.notes)
    for hardware in ("h200-nvlink", "cpu"):
        with pytest.raises(ValueError, match="measured: expected figures of .* got those of H100 SXM"):
            plan("llama-2-7b", 8, 65536, hardware, measured=EMULATED)


def test_predictions_beside_a_recorded_run_of_the_scale_model() -> None:
    """One layer on two hosts behind a slow link, as it was measured, and as it is predicted from that file's rates.

    Order between strategies and modes is what a plan is for: where measured steps differ by more than the model's
    margin, predicted ones come in the same order.
    """
    (row,) = (row for part in json.loads(SCALE.read_text())["parts"] for row in part["rows"])
    width = row["hidden"] // row["heads"]
    shape = LayerShape(row["hidden"], row["intermediate"], row["heads"], row["kv_heads"], width)
    found = plan(ModelSizes("layer", shape, 1, row["vocabulary"]), 2, row["tokens"], "h100-nvlink@8", dtype="float32",
                 measured=SCALE, strategies=("odysseus", "tp_sp"))  # fmt: skip
    steps: dict[tuple[str, str], tuple[float, float]] = {}
    for one in (one for one in found.splits if one.split.ring == 1):
        strategy = one.split.strategy
        seconds = split_seconds(
            found.model, one.split, dataclasses.replace(one.traffic, ends={}), found.machine, tokens=row["tokens"],
            length=row["tokens"], dtype="float32", layer_bytes=0, checkpointing=False,
            form=Form(one.pieces, one.head_groups),
        )  # fmt: skip
        for mode in ("unfused", "fused", "pipelined"):
            measured = statistics.median(row["samples_s"][f"{strategy} {mode} collective"])
            steps[strategy, mode] = (seconds.compute + getattr(seconds, f"exposed_{mode}"), measured)
    for name, (predicted, measured) in steps.items():
        assert 0.9 < predicted / measured < 1.1, (name, predicted, measured)
    for one, other in itertools.permutations(steps.values(), 2):
        if one[1] < (1 - MODEL_MARGIN) * other[1]:
            assert one[0] < other[0], (one, other)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        ("{", "measured: expected JSON in"),
        ("[]", "of a kind among overlap, .* got 'list'"),
        ('{"kind": "profile"}', "got 'profile'"),
        ('{"kind": "overlap", "rows": []}', "is no complete results file: KeyError"),
    ),
)
def test_files_that_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        plan("llama-2-7b", 2, 4096, "cpu", measured=tmp_path / "results.json")


def test_it_is_public() -> None:
    assert ody.plan is plan
