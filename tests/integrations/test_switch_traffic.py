"""What formulas say of a model whose sums a switch makes: nothing, instead of bytes that are not sent."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import odysseus_kernels as ody
from odysseus_kernels.integrations.verify.traffic import expected_traffic

pytestmark = pytest.mark.without_ranks


@pytest.mark.parametrize("setting", ("reduce", "gather"))
def test_there_is_no_formula(setting: str) -> None:
    model = type("LlamaForCausalLM", (), {"config": None})()
    group = SimpleNamespace(config=ody.OverlapConfig(**{setting: "nvls"}))  # type: ignore[arg-type]
    trial: Any = SimpleNamespace(subject=model, group=group)
    assert expected_traffic(trial) == (None, "no formula for what a switch adds and copies")
