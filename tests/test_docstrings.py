"""Every public name has an example in its docstring, which runs on two ranks as it stands there.

An example is given these names:

======== ===============================================================================================
name     what
======== ===============================================================================================
torch    the module
dist     ``torch.distributed``
ody      ``odysseus_kernels``
rank     0 or 1
group    the default process group of both ranks, with Gloo
mesh     a one-dimensional ``DeviceMesh`` of both ranks, its dimension named ``"seq"``
model    a small ``LlamaForCausalLM``, made anew for each public name, the same on both ranks
batch    ``input_ids`` and ``labels`` for it, [2, 16], the same on both ranks
folder   path of an empty folder, the same on both ranks
======== ===============================================================================================

Both ranks have to print what stands there; ``...`` in it stands for any text, and spaces count as one.
"""

from __future__ import annotations

from pathlib import Path

import docstring_cases as cases
import pytest
from transformers.modeling_layers import GradientCheckpointingLayer

import odysseus_kernels as ody
from odysseus_kernels.testing.spawn import RankPools, RanksFailedError


def test_every_public_name_has_an_example(ranks: RankPools) -> None:
    assert ranks(2).run(cases.without_example) == [[], []]


@pytest.mark.parametrize("name", ody.__all__)
def test_examples_run(ranks: RankPools, name: str, tmp_path: Path) -> None:
    if name == "offload_activations" and "__call__" in vars(GradientCheckpointingLayer):
        pytest.skip("with this transformers it is an error, which tests/nn/test_offload.py looks at")
    counts = ranks(2).run(cases.run, name, str(tmp_path))
    assert counts[0] == counts[1] > 0


def test_a_wrong_example_fails(ranks: RankPools, tmp_path: Path) -> None:
    wrong = cases.examples_of("wrong", ">>> ody.OverlapConfig().mode\n'fused'\n")
    with pytest.raises(AssertionError, match=r"in wrong(?s:.*)Expected:\s+'fused'\s+Got:\s+'auto'"):
        cases.check(wrong, {"ody": ody})
    with pytest.raises(RanksFailedError, match=r"failed on 1 of 2 ranks(?s:.*)Expected:\s+0\s+Got:\s+1"):
        ranks(2).run(cases.run, "wrong on rank 1", str(tmp_path), ">>> rank\n0\n")
