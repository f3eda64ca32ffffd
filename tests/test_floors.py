"""Libraries that are too old for a model's numbers to be right are refused by name."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from odysseus_kernels.floors import OLDEST, require, too_old
from odysseus_kernels.integrations import peft_refusals

ROOT = Path(__file__).resolve().parents[1]


def test_they_are_those_of_the_package() -> None:
    found = dict(re.findall(r'"([a-z]+)>=([0-9.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert {name: found[name] for name in OLDEST} == OLDEST


@pytest.mark.parametrize(
    ("version", "refused"),
    [("5.16.1", True), ("5.2", True), ("4.57.6", True), ("5.17", False), ("5.17.0", False), ("5.23.0.dev0", False)],
)
def test_versions_are_compared_by_number(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert too_old("transformers", version) == refused
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    if not refused:
        require("transformers")
        return
    with pytest.raises(ImportError, match=f"transformers: expected 5.17 or later, got {version}, .* pip install -U"):
        require("transformers")


def test_what_is_not_installed_is_not_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    require("peft")


def test_adapters_of_a_peft_that_is_too_old_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever they are made: every adapter is looked at before it is multiplied."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.18.1")
    peft_refusals._require_peft.cache_clear()
    with pytest.raises(ImportError, match="peft: expected 0.19 or later, got 0.18.1"):
        peft_refusals.check_adapter("layers.0.q_proj", None, None)  # type: ignore[arg-type]


def test_a_model_is_refused_before_anything_else() -> None:
    code = (
        "import importlib.metadata as m; real = m.version\n"
        "m.version = lambda name: '5.2.0' if name == 'transformers' else real(name)\n"
        "import odysseus_kernels\n"
        "try: odysseus_kernels.parallelize\n"
        "except ImportError as error: print(error)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert said.startswith("transformers: expected 5.17 or later, got 5.2.0")
