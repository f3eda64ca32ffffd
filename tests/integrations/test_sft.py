"""TRL's SFTTrainer with a parallelized model logs what it logs in one process."""

from __future__ import annotations

import pytest
import trl
from sft_cases import SFT, in_one_process, on_ranks

from odysseus_kernels.integrations.trainer import sequence_trainer

RUNS = {
    "completions": SFT(),
    "all tokens": SFT(strategy="tp", settings=(("completion_only_loss", False),)),
    "packed": SFT(strategy="ulysses", settings=(("packing", True), ("gradient_accumulation_steps", 2))),
    "smoothed": SFT(strategy="tp_sp", settings=(("label_smoothing_factor", 0.1),)),
    "dft": SFT(mesh=(1, 2, 2), settings=(("loss_type", "dft"),)),
}


@pytest.mark.parametrize("name", RUNS)
def test_logs_what_one_process_logs(ranks, tmp_path, name: str):
    run = RUNS[name]
    _, ring, seq = run.mesh
    results = ranks(ring * seq).run(on_ranks, run, str(tmp_path / "ranks"))
    true = in_one_process(run, str(tmp_path / "one"))
    assert sum("loss" in entry for entry in true) == 3
    for result in results:
        for entry, expected in zip(result, true, strict=True):
            assert entry == pytest.approx(expected, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("other", [trl.DPOTrainer, trl.GRPOTrainer, trl.RewardTrainer])
def test_trainers_that_would_not_go(other):
    with pytest.raises(TypeError, match=f"expected TRL's SFTTrainer .* got {other.__name__}.*examples/dpo.py"):
        sequence_trainer(other)


def test_other_classes():
    with pytest.raises(TypeError, match="derives from transformers.Trainer"):
        sequence_trainer(dict)
