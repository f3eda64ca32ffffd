"""What a user installs: the source distribution builds and installs alone, is complete, and has types."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import odysseus_kernels as ody

pytestmark = pytest.mark.without_ranks

ROOT = Path(__file__).resolve().parent.parent
USER = ROOT / "tests" / "typed_user.py"
NAME = "odysseus_kernels"
_LIMIT_S = 560
# What a build leaves, or what is made beside the sources.
_LEFT_OUT = (".so", ".pyc", ".json")  # built; data of the package is named one by one, traces lie beside pictures
_MADE = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", ".*_cache")

PROBE = """
import importlib.metadata, importlib.resources, json
import odysseus_kernels as ody
from odysseus_kernels import _ext
print(json.dumps({
    "file": ody.__file__,
    "versions": [ody.__version__, importlib.metadata.version("odysseus_kernels")],
    "extension": _ext.load().__file__,
    "best": ody.plan("llama-3.1-8b", 8, 131072).best.split.name,
    "names": [name for name in ody.__all__ if not hasattr(ody, name)],
}))
"""


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _run(command: Sequence[str | Path], where: Path, **environment: str) -> str:
    """Output of a command for which this checkout is not on the path."""
    inherited: Mapping[str, str] = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=where,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=_LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution of a copy of this checkout: a build writes beside its sources."""
    copy = tmp_path_factory.mktemp("checkout")
    for folder in (NAME, "csrc", "docs"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=_MADE)
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, copy)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    _run([sys.executable, "-c", build], copy)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment into which the source distribution was installed, and nothing else was.

    What the package depends on is that of this environment: its folder is on the path, but its .pth files, by which it
    may know this checkout, are not read there.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.EnvBuilder(with_pip=False, symlinks=True).create(folder)
    python = folder / "bin" / "python"
    (packages,) = (folder / "lib").glob("python3.*/site-packages")
    (packages / "dependencies.pth").write_text("".join(f"{place}\n" for place in site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "install", "--no-index"]
    # Never uninstalls: the environment around this one may have the package, too.
    alone = ["--ignore-installed", "--no-deps", "--no-build-isolation"]
    _run([*pip, *alone, source], folder, ODYSSEUS_BUILD_CUDA="0")
    return python


def test_version_has_one_place() -> None:
    """Setuptools reads it from the package without importing it, and what was installed says the same."""
    assert "version" not in _project() and "version" in _project()["dynamic"]
    said = _run([sys.executable, "setup.py", "--version"], ROOT).split()[-1]
    assert said == ody.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", said)
    assert importlib.metadata.version(NAME) == said, "pip install -e . again: what is installed is another version"
    assert f"## {said}" in (ROOT / "CHANGELOG.md").read_text()


def test_pythons_that_are_promised() -> None:
    """The classifiers begin with the oldest Python that is allowed and leave none out; the tools look for it."""
    promised = [
        int(match[1])
        for line in _project()["classifiers"]
        if (match := re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line))
    ]
    assert _project()["requires-python"] == f">=3.{promised[0]}"
    assert promised == list(range(promised[0], promised[-1] + 1))
    oldest = f"3.{promised[0]}"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["python_version"] == oldest
    assert tools["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"


def test_source_distribution_is_complete(source: Path) -> None:
    """Everything that the package is made of; nothing that was built; the documents that the read-me is read with."""
    with tarfile.open(source) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in (NAME, "csrc", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in _LEFT_OUT
    }
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md"}
    assert wanted <= members
    assert {f"{NAME}/py.typed", f"{NAME}/_C.pyi", f"{NAME}/planner/planning/models.json"} <= members
    assert not [name for name in members if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_source_distribution_installs_and_works(installed: Path, tmp_path: Path) -> None:
    found = json.loads(_run([installed, "-c", PROBE], tmp_path))
    packages = Path(_run([installed, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], tmp_path).strip())
    assert Path(found["file"]).parent == packages / NAME
    assert Path(found["extension"]).parent == packages / NAME
    assert found["versions"] == [ody.__version__] * 2
    assert found["names"] == []
    assert found["best"]
    shown = _run([installed, "-m", NAME, "plan", "--model", "llama-3.1-8b", "--gpus", "8", "--seq", "131072"], tmp_path)
    assert found["best"].split()[0] in shown


@pytest.mark.slow
def test_wheel_has_what_the_checkout_has(installed: Path, tmp_path: Path) -> None:
    """What was installed is a wheel of the source distribution: every file of the package, and the extension."""
    script = f"import importlib.metadata, json; print(json.dumps([str(f) for f in importlib.metadata.files('{NAME}')]))"
    files = {name for name in json.loads(_run([installed, "-c", script], tmp_path)) if not name.endswith(".pyc")}
    package = {name for name in files if name.startswith(f"{NAME}/")}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / NAME).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".so", ".pyc")
    }
    extension = package - wanted
    assert wanted <= package
    assert len(extension) == 1 and extension.pop().endswith(".so")
    assert all(name.startswith((f"{NAME}-", f"{NAME}/")) for name in files)  # no tests, no benchmarks


def test_user_uses_every_public_name() -> None:
    tree = ast.parse(USER.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "ody"
    }
    assert set(ody.__all__) - used == set()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_public_names_have_types_from_outside(installed: Path, tmp_path: Path) -> None:
    """``mypy --strict`` of a user's program against the installed package, and that it sees a user's mistake."""
    (tmp_path / "mypy.ini").write_text("[mypy]\n[mypy-transformers.*,triton.*]\nfollow_imports = skip\n")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("import odysseus_kernels as ody\n\nody.OverlapConfig(mode='fastest')\n")
    # Reading torch takes a minute, and the cache spares it the next time.
    strict = ["-m", "mypy", "--strict", "--python-executable", installed, "--cache-dir", ROOT / ".mypy_cache" / "user"]
    options = [*strict, "--config-file", "mypy.ini"]
    # One run for both programs, since most of it is reading torch: nothing is said of the right one.
    with pytest.raises(AssertionError) as said:
        _run([sys.executable, *options, USER, wrong], tmp_path)
    errors = re.findall(r"^\s*(\S+?):\d+: error: (.*)$", str(said.value), re.MULTILINE)
    assert [Path(place).name for place, _ in errors] == ["wrong.py"], str(said.value)
    assert "'fastest'" in errors[0][1] and "arg-type" in errors[0][1]
