"""A trainer of transformers with a parallelized model logs what the stock trainer logs in one process."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import accelerate
import pytest
import torch
import transformers
from replica_cases import drawn_by_workers, over_replicas, positions_of_others
from trainer_cases import Run, accelerated, in_one_process, on_ranks, own_compute_loss, refusals

from odysseus_kernels.errors import FallbackWarning
from odysseus_kernels.integrations.trainer import Trainer

EVALUATED = (("eval_strategy", "steps"), ("eval_steps", 2))

RUNS = {
    "plain": Run(settings=EVALUATED),
    "accumulated": Run(settings=(("gradient_accumulation_steps", 3), ("per_device_train_batch_size", 1))),
    "clipped": Run(strategy="ulysses", settings=(("max_grad_norm", 0.1), ("include_num_input_tokens_seen", "all"))),
    "smoothed": Run(strategy="tp", settings=(("label_smoothing_factor", 0.2), *EVALUATED)),
    "own loss": Run(own_loss=True, settings=(("gradient_accumulation_steps", 2), *EVALUATED)),
    "metrics": Run(strategy="tp_sp", metrics=True, settings=EVALUATED),
    "packed": Run(strategy="tsp", packed=True, metrics=True, settings=EVALUATED),
    "ring": Run(mesh=(1, 2, 2), settings=EVALUATED),
    "replicas": Run(
        mesh=(2, 1, 2),
        metrics=True,
        samples=24,  # which replicas divide: else the stock trainer fills the last batch with rows of the first
        held_out=12,
        settings=(("gradient_accumulation_steps", 2), *EVALUATED),
    ),
    "smoothed replicas": Run(
        mesh=(2, 1, 1), samples=24, held_out=12, settings=(("label_smoothing_factor", 0.2), *EVALUATED)
    ),
    "not averaged": Run(settings=(("average_tokens_across_devices", False),)),
    "checkpointed": Run(settings=(("gradient_checkpointing", True), ("max_steps", 2))),
    "by length": Run(settings=(("train_sampling_strategy", "group_by_length"), *EVALUATED)),
    "objects": Run(metrics=True, settings=(("eval_use_gather_object", True), *EVALUATED)),
}
REBALANCED = Run(settings=(("train_sampling_strategy", "batch_rebalance"), ("gradient_accumulation_steps", 2)))
# accelerate 1.10 refuses its batches, which have no size, in words of its own.
if hasattr(transformers.trainer_pt_utils, "BatchRebalanceSampler") and not accelerate.__version__.startswith("1.10."):
    RUNS["rebalanced"] = REBALANCED
    RUNS["rebalanced replicas"] = dataclasses.replace(REBALANCED, mesh=(2, 1, 2), samples=24)


def _equal(found: dict[str, Any], true: dict[str, Any], tolerance: float = 1e-4) -> None:
    assert len(found["history"]) == len(true["history"])
    for entry, expected in zip(found["history"], true["history"], strict=True):
        assert entry.keys() == expected.keys()
        for name, value in expected.items():
            wide = 10 if name == "grad_norm" else 1
            assert entry[name] == pytest.approx(value, rel=wide * tolerance), (name, entry, expected)


def _weights_equal(found: dict[str, Any], true: dict[str, Any], tolerance: float = 1e-3) -> None:
    for name, weight in true["weights"].items():
        error = (found["weights"][name] - weight).norm() / weight.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


@pytest.mark.parametrize("name", RUNS)
def test_logs_what_one_process_logs(ranks, tmp_path, name: str):
    run = RUNS[name]
    replicas, ring, seq = run.mesh
    results = ranks(replicas * ring * seq).run(on_ranks, run, str(tmp_path / "ranks"))
    true = in_one_process(run, str(tmp_path / "one"), replicas)
    for result in results:
        _equal(result, true)
        assert result["batch"] == true["batch"]
        if replicas == 1:  # else each pads its own rows
            assert result["flos"] == pytest.approx(true["flos"])
            assert result["tokens"] == true["tokens"]
    _weights_equal(results[0], true)


FILLED = {
    "dp": ((2, 1, 1), {"metrics": True}),
    "dp x seq": ((2, 1, 2), {"metrics": True}),
    "loss alone": ((2, 1, 2), {}),
    "own loss": ((2, 1, 1), {"own_loss": True}),
    "smoothed": ((2, 1, 1), {"settings": (("label_smoothing_factor", 0.2),)}),
}


def _filled():
    """How rows are filled up knows nothing of what is made of their logits: metrics with every number of rows, which
    see each row, and every other way once; all of them with --complete.
    """
    for (index, (name, case)), held_out in itertools.product(enumerate(FILLED.items()), (1, 3, 7)):
        default = name == "dp" or (1, 3, 7)[index % 3] == held_out
        marks = () if default else (pytest.mark.complete,)
        yield pytest.param(*case, held_out, id=f"{name}-{held_out}", marks=marks)


@pytest.mark.parametrize(("sizes", "settings", "held_out"), list(_filled()))
def test_evaluation_of_rows_that_replicas_do_not_divide(ranks, tmp_path, sizes, settings, held_out: int):
    """The single process's loss and metrics: rows with which the last batch is filled up count nowhere."""
    settings = dict(settings)
    # Weights stay, so that what is evaluated has no rounding of training in it.
    asked = (("learning_rate", 0.0), ("max_steps", 1), ("eval_strategy", "steps"), ("eval_steps", 1))
    run = Run(mesh=sizes, held_out=held_out, samples=24, settings=asked + settings.pop("settings", ()), **settings)
    results = ranks(sizes[0] * sizes[2]).run(on_ranks, run, str(tmp_path / "ranks"))
    true = in_one_process(run, str(tmp_path / "one"), 2)
    assert {tuple(one["evaluation_batches"]) for one in (true, *results)} == {(math.ceil(held_out / 6),)}
    evaluated = [[entry for entry in one["history"] if "eval_loss" in entry] for one in (true, *results)]
    for found in evaluated[1:]:
        _equal({"history": found}, {"history": evaluated[0]}, tolerance=2e-6)


def test_a_compute_loss_of_its_own_sees_whole_logits(ranks, tmp_path):
    """Labels stay in its batch, where a parallelized model makes no logits otherwise."""
    results = ranks(2).run(own_compute_loss, str(tmp_path / "ranks"))
    true = own_compute_loss(None, 1, str(tmp_path / "one"))
    for result in results:
        _equal(result, true)


def test_a_strategy_for_each_step(ranks, tmp_path):
    """The strategy is chosen for a step's longest batch, and what is logged stays that of one process."""
    run = Run(strategy="auto", chosen_for=(23, "l40s-pcie"), long=1536, settings=EVALUATED)
    results = ranks(2).run(on_ranks, run, str(tmp_path / "ranks"))
    true = in_one_process(run, str(tmp_path / "one"))
    for result in results:
        _equal(result, true)
        assert result["strategies"] == results[0]["strategies"]
        assert len(set(result["strategies"])) > 1, "lengths of this run must ask for several strategies"
    _weights_equal(results[0], true)


STATE = (("save_strategy", "steps"), ("save_steps", 3), ("max_steps", 6), ("gradient_accumulation_steps", 2))


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(2, 4), (4, 2), (2, 1)])
def test_resumes_within_an_epoch_on_another_number_of_ranks(ranks, tmp_path, saved_on: int, resumed_on: int):
    run = Run(mesh=(1, 1, saved_on), settings=STATE, stop_at=3)
    ranks(saved_on).run(on_ranks, run, str(tmp_path / "ranks"))
    again = dataclasses.replace(run, mesh=(1, 1, resumed_on), strategy="ulysses", stop_at=None, resume=True)
    resumed = ranks(resumed_on).run(on_ranks, again, str(tmp_path / "ranks"))[0]
    true = in_one_process(dataclasses.replace(run, stop_at=None), str(tmp_path / "one"))
    assert [entry["step"] for entry in resumed["history"] if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    logged = [[entry for entry in one["history"] if "loss" in entry] for one in (resumed, true)]
    _equal({"history": logged[0]}, {"history": logged[1]})
    _weights_equal(resumed, true)


def test_best_model_and_early_stopping(ranks, tmp_path):
    settings = {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 12,
        "learning_rate": 0.03,  # too high: it gets worse
        "metric_for_best_model": "eval_loss",
    }
    run = Run(settings=tuple(settings.items()), patience=2)
    result = ranks(2).run(on_ranks, run, str(tmp_path / "ranks"))[0]
    true = in_one_process(run, str(tmp_path / "one"))
    assert result["best"] == true["best"]
    assert len(true["history"]) < 2 * 12, "this run must stop early"
    _equal(result, true, tolerance=1e-3)
    _weights_equal(result, true)


def test_mixed_precision(ranks, tmp_path):
    run = Run(settings=(("bf16", True), *EVALUATED))
    result = ranks(2).run(on_ranks, run, str(tmp_path / "ranks"))[0]
    true = in_one_process(run, str(tmp_path / "one"))
    _equal(result, true, tolerance=2e-2)
    assert all(weight.dtype == torch.float32 for weight in result["weights"].values())


def test_says_what_does_not_go(ranks, tmp_path):
    said = ranks(2).run(refusals, str(tmp_path))[0]
    assert "odysseus_kernels.integrations.trainer" in said["stock trainer"]
    assert "odysseus_kernels.parallelize(model, mesh)" in said["stock model"]


@pytest.mark.parametrize("replicas", [1, 2])
def test_accelerate_loop(ranks, replicas: int):
    results = ranks(2 * replicas).run(accelerated, replicas)
    true = accelerated(None, 1, replicas)
    for result in results:
        for found, expected in zip(result, true, strict=True):
            assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("replicas", [1, 2])
def test_accelerate_counts_each_replica_once(ranks, replicas: int):
    """Objects and tensors of unequal sizes come in the dataset's order, and none twice; sums are those of replicas."""
    last = replicas - 1
    for found in ranks(2 * replicas).run(over_replicas, replicas):
        assert found["rows"] == [f"row {index}" for index in range(7)]
        assert found["sizes"] == list(range(7))
        assert found["triggered"] == [False, True, False]
        assert found["reduced"] == {
            "sum": {"tokens": 5 * replicas + last, "loss": float(last)},
            "max": {"tokens": 5 + last, "loss": float(last)},
            "mean": {"loss": last / 2},
        }


def test_positions_are_not_those_of_all_processes(ranks):
    assert "use_stateful_dataloader: expected False, got True" in ranks(2).run(positions_of_others)[0]


def test_workers_of_a_replica_draw_the_same(ranks, tmp_path):
    """Else random augmentation would give ranks of one sequence other samples."""
    first = drawn_by_workers(None, 1, (1, 1, 1), str(tmp_path))
    results = ranks(4).run(drawn_by_workers, (2, 1, 2), str(tmp_path))
    assert results[0] == results[1] == first
    assert results[2] == results[3] != first


def test_adapters_under_the_trainer(ranks, tmp_path):
    """Adapters alone are trained, saved as PEFT's directory, and resumed."""
    run = Run(adapters=True, strategy="ulysses", settings=(*EVALUATED, *STATE), stop_at=3)
    ranks(2).run(on_ranks, run, str(tmp_path / "ranks"))
    saved = {path.name for path in (tmp_path / "ranks" / "checkpoint-3").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= saved
    assert "model.safetensors" not in saved
    again = dataclasses.replace(run, strategy="odysseus", stop_at=None, resume=True)
    resumed = ranks(2).run(on_ranks, again, str(tmp_path / "ranks"))[0]
    true = in_one_process(dataclasses.replace(run, stop_at=None), str(tmp_path / "one"))
    logged = [[entry for entry in one["history"] if "loss" in entry] for one in (resumed, true)]
    _equal({"history": logged[0]}, {"history": logged[1]})
    _weights_equal(resumed, true)


def test_checkpoints_without_this_trainers_state(tmp_path):
    """Of the stock trainer, or of weights alone: nobody goes on with a fresh optimizer without a word."""
    trainer = Trainer.__new__(Trainer)
    with pytest.warns(FallbackWarning, match="has no optimizer state .* begin anew"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
    (tmp_path / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="one of the stock trainer .*load_pretrained"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
