"""``strategy="auto"``: what is predicted to be the fastest, the same on all ranks, and the losses of one process."""

from __future__ import annotations

from typing import Any

import pytest
from auto_cases import (
    CASE,
    adapted,
    batches,
    between_equal_cuts,
    chosen,
    heads_that_do_not_divide,
    of_replicas,
    predicted,
    refusals,
    trained,
    trained_stock,
)

# Rounding of fp32, as in the tests of families.
LOSS = 2e-6
# Machines that take other strategies for this model where a sequence is long enough.
FAST, SLOW = "b200-nvlink", "l40s-pcie"


def _best(seconds: dict[str, float]) -> str:
    return min(seconds, key=lambda name: seconds[name])


@pytest.mark.parametrize(("world", "ring", "length"), [(2, 1, 1536), (4, 2, 4096)])
def test_ranks_of_several_opinions_agree(ranks: Any, world: int, ring: int, length: int) -> None:
    """The slowest rank's predictions count, for all."""
    machines = [FAST, *[SLOW] * (world - 1)]
    sizes = {"seq": world // ring, "ring": ring}
    alone = [predicted(CASE, sizes, length, machine, batch=2) for machine in machines]
    assert _best(alone[0]) != _best(alone[1]), "this case must have several opinions"
    slowest = {name: max(one[name] for one in alone) for name in alone[0]}
    loss = CASE.model()(**CASE.whole_batch()).loss.item()
    for rank, (strategy, text, found) in enumerate(ranks(world).run(chosen, machines, length, ring)):
        assert strategy == _best(slowest)
        assert found == pytest.approx(loss, rel=LOSS)
        assert f"strategy {strategy!r} was chosen for 2 x {length:,} tokens on" in text
        assert f"of {machines[rank]}; seconds of a step, as the slowest rank predicts them" in text
        for name, seconds in slowest.items():
            assert f"{seconds:.3g}" in next(line for line in text.splitlines() if line.startswith(f"  {name} "))
        assert f"because {strategy} is predicted to be" in text
        assert (f"this rank alone would have chosen {_best(alone[rank])!r}" in text) == (_best(alone[rank]) != strategy)


def test_replicas_of_several_lengths_agree(ranks: Any) -> None:
    lengths = [64, 4096]
    alone = [predicted(CASE, {"seq": 2, "dp": 2}, length, SLOW) for length in lengths]
    assert _best(alone[0]) != _best(alone[1])
    slowest = {name: max(one[name] for one in alone) for name in alone[0]}
    for rank, (strategy, text) in enumerate(ranks(4).run(of_replicas, lengths, SLOW)):
        assert strategy == _best(slowest)
        assert f"for 1 x {lengths[rank // 2]:,} tokens on dp 2 x seq 2 of {SLOW}" in text


def test_a_strategy_for_each_length(ranks: Any) -> None:
    """Weights and optimizer go along, and losses are those of one process before and after."""
    lengths = [32, 32, 768, 768, 32]
    true = trained_stock(batches(lengths))
    for found in ranks(2).run(trained, lengths, SLOW, 1):
        short, long = found["strategies"][0], found["strategies"][2]
        assert found["strategies"] == [short, short, long, long, short]
        assert short != long
        assert [moved > 0 for moved in found["moved"]] == [False, False, True, False, True]
        assert found["losses"] == pytest.approx(true["losses"], rel=1e-5)
        for name, weight in true["weights"].items():
            assert (found["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_where_nothing_moves(ranks: Any) -> None:
    """Between Odysseus and Ulysses; the present one stays where another is hardly faster."""
    wanted = [
        {"sequence_length": 512, "batch_size": 8, "hardware": SLOW},
        {"sequence_length": 2048, "batch_size": 8, "hardware": "h200-nvlink"},
        {"sequence_length": 1536, "batch_size": 8, "hardware": "h200-nvlink"},
    ]
    last = predicted(CASE, {"seq": 4}, 1536, "h200-nvlink", batch=8)
    assert last["ulysses"] < last["odysseus"] < 1.1 * last["ulysses"]
    true = trained_stock([CASE.whole_batch()] * 3)["losses"]
    for found in ranks(4).run(between_equal_cuts, wanted):
        assert [name for name, _, _ in found] == ["ulysses", "odysseus", "odysseus"]
        assert [moved for _, moved, _ in found] == [0, 0, 0]
        assert [loss for _, _, loss in found] == pytest.approx(true, rel=1e-5)


def test_never_one_that_heads_do_not_allow(ranks: Any) -> None:
    for strategy, text, _ in ranks(4).run(heads_that_do_not_divide):
        assert strategy == "tsp"
        for name in ("tp", "tp_sp", "ulysses", "odysseus"):
            line = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
            assert "not possible: " in line
            assert "expected attention heads that 4 ranks divide, got 6" in line
        assert "because tsp is the only one that is possible" in text


def test_refusals(ranks: Any) -> None:
    ranks(2).run(refusals)


def test_adapters(ranks: Any) -> None:
    """Dropout of adapters rules "tp" out, which would be the fastest here; adapted models keep their strategy."""
    pytest.importorskip("peft", reason="PEFT is optional: pip install odysseus_kernels[peft]")
    seconds = predicted(CASE, {"seq": 2}, 64, FAST)
    assert _best(seconds) == "tp"
    for strategy, text, said in ranks(2).run(adapted, FAST, 64):
        assert strategy == _best({name: one for name, one in seconds.items() if name != "tp"})
        assert "lora_dropout: expected 0 where ranks compute the same tokens" in text
        assert "models with adapters keep their strategy" in said
