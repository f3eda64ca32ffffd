"""Ranks for all tests: persistent processes, one pool for each world size."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from odysseus_kernels.testing.spawn import RankPools, preload

# No example is timed: machines differ, and others work on them.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# Seconds in each rank otherwise, and again whenever ranks start anew after a failure.
preload(
    "odysseus_kernels.integrations.huggingface",
    "transformers.trainer",
    "peft",
    *(
        f"transformers.models.{family}.modeling_{family}"
        for family in ("llama", "mistral", "qwen2", "qwen3", "starcoder2", "mixtral", "qwen3_moe")
    ),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the default leaves out because shorter tests, or every pair of values, show the same."""
    parser.addoption("--complete", action="store_true", help="also the tests marked complete: all combinations")


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPools]:
    """``ranks(world_size).run(function, *arguments)`` runs a module's function on that many ranks."""
    with RankPools(threads=1, timeout=120) as pools:
        yield pools


def _uses_ranks(item: pytest.Item) -> bool:
    """A parameter of that name, a number of ranks, takes the fixture's place."""
    given = item.callspec.params if hasattr(item, "callspec") else {}
    return "ranks" in getattr(item, "fixturenames", ()) and "ranks" not in given


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped where there is none, those marked ``complete`` left out unless asked for."""
    wrong = [i.nodeid for i in items if i.get_closest_marker("without_ranks") and _uses_ranks(i)]
    if wrong:
        raise pytest.UsageError(f"marked without_ranks, and they start ranks: {wrong}")
    if not config.getoption("complete"):
        left_out = [item for item in items if item.get_closest_marker("complete")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("complete")]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU that torch can use"))
