"""Each line of docs/training_scripts.md names a test that exists and executes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES = [
    line
    for line in (ROOT / "docs" / "training_scripts.md").read_text().splitlines()
    if line.startswith("|") and not line.startswith(("|---", "| what |"))
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("|")[1].strip()[:50])
def test_names_a_test(line: str):
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", line.split("|")[-2])
    assert named, "expected the test that executes this line in its last column"
    for path, function in named:
        assert re.search(rf"^def {function}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {function}"
