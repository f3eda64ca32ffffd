"""What the package promises as a whole: a cheap silent import, and code that stays in its layer."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import odysseus_kernels
from odysseus_kernels import _ext
from odysseus_kernels.errors import ExtensionNotBuiltError

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "odysseus_kernels"
# fmt: off
COLLECTIVES = {
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_gather_object", "all_reduce",
    "all_reduce_coalesced", "all_to_all", "all_to_all_single", "batch_isend_irecv", "broadcast",
    "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv", "recv_object_list", "reduce",
    "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "send_object_list",
}
# fmt: on

PROBE = """
import json, sys, threading
import torch
before = set(sys.modules)
threads = threading.active_count()
import odysseus_kernels
print(json.dumps({"modules": sorted(set(sys.modules) - before), "threads": threading.active_count() - threads,
                  "file": odysseus_kernels.__file__}))
"""


def test_import_is_cheap_and_silent() -> None:
    run = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.stderr == ""
    (line,) = run.stdout.splitlines()  # nothing but the probe's own line is printed
    imported = json.loads(line)
    assert imported["file"] == odysseus_kernels.__file__
    assert imported["threads"] == 0
    # Seconds differ between machines and moments; what is loaded beside torch does not.
    loaded = set(imported["modules"])
    ours = {name for name in loaded if name.partition(".")[0] == "odysseus_kernels"}
    assert {name.partition(".")[0] for name in loaded - ours} <= sys.stdlib_module_names
    assert "odysseus_kernels._C" not in ours
    rooms = {".".join(name.split(".")[:2]) for name in ours}
    assert not rooms & {f"odysseus_kernels.{room}" for room in ("integrations", "strategies", "nn", "testing")}


def test_extension_is_built_and_typed() -> None:
    assert _ext.available()
    assert _ext.why_unavailable() == ""
    module = _ext.load()
    stub = ast.parse((PACKAGE / "_C.pyi").read_text())
    promised = set(_stub_names(stub)) - {"Address", "WaitStatus"} - (set() if _ext.has_cuda() else {"cuda"})
    assert promised == {name for name in vars(module) if not name.startswith("_")}
    for node in stub.body:
        if isinstance(node, ast.ClassDef) and node.name in {"SymmetricHost", "Window"}:
            methods = set(_stub_names(node)) - {"__buffer__"}
            missing = {name for name in methods if not hasattr(getattr(module, node.name), name)}
            assert not missing, f"{node.name} lacks {missing}"
            extra = {name for name in vars(getattr(module, node.name)) if not name.startswith("_")} - methods
            assert not extra, f"_C.pyi does not mention {extra} of {node.name}"


def _stub_names(node: ast.Module | ast.ClassDef) -> Iterator[str]:
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
            yield child.name
        elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
            yield child.target.id
        elif isinstance(child, ast.Assign) and isinstance(child.targets[0], ast.Name):
            yield child.targets[0].id


def test_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: made_up")

    monkeypatch.setattr(importlib, "import_module", fail)
    _ext._import.cache_clear()
    try:
        assert not _ext.available()
        with pytest.raises(ExtensionNotBuiltError, match=r"pip install -e \.(.|\n)*undefined symbol: made_up"):
            _ext.load()
    finally:
        _ext._import.cache_clear()


def _sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text())


def test_changed_headers_are_compiled_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An object that is older than a header was made for other declarations: the module would not load."""
    helpers = pytest.importorskip("pybind11.setup_helpers")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.setattr(helpers.ParallelCompile, "install", lambda self: self)
    built = runpy.run_path(str(ROOT / "setup.py"))
    source, made = "csrc/bindings.cpp", tmp_path / "bindings.o"
    made.touch()
    headers = [(ROOT / path).stat().st_mtime for path in built["headers"]()]
    assert len(headers) > 10
    for moment, expected in ((max(headers) - 1, True), (max(headers), True)):
        os.utime(made, (moment, moment))
        assert built["needs_recompile"](str(made), source) == expected
    moment = max(*headers, (ROOT / source).stat().st_mtime) + 1
    os.utime(made, (moment, moment))
    assert not built["needs_recompile"](str(made), source)


def test_changed_cuda_sources_are_linked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """setuptools compares with sources and dependencies; CUDA files are no sources of its own by then."""
    pytest.importorskip("pybind11.setup_helpers")
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    monkeypatch.delenv("ODYSSEUS_BUILD_CUDA", raising=False)
    built = runpy.run_path(str(ROOT / "setup.py"))
    assert built["cuda_sources"]() and set(built["cuda_sources"]()) <= set(built["make_extension"]().depends)


def test_raw_collectives_stay_in_comm_and_the_reference() -> None:
    offenders = []
    for name, tree in _sources():
        if name.startswith(("comm/", "testing/")) or name == "ops/reference.py":
            continue
        aliases = {
            alias.asname or "torch.distributed"
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name == "torch.distributed"
        } | {"torch.distributed", "dist"}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "torch.distributed":
                offenders += [f"{name}:{node.lineno} {a.name}" for a in node.names if a.name in COLLECTIVES]
            if isinstance(node, ast.Attribute) and node.attr in COLLECTIVES and ast.unparse(node.value) in aliases:
                offenders.append(f"{name}:{node.lineno} {ast.unparse(node)}")
    assert not offenders, "use odysseus_kernels.comm.functional, which records bytes and fails with names"


def test_environment_is_read_in_config_only() -> None:
    offenders = [
        f"{name}:{node.lineno}"
        for name, tree in _sources()
        if name != "config.py" and not name.startswith("testing/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in {"os.environ", "os.getenv", "os.putenv"}
    ]
    assert not offenders


def test_nothing_is_unpickled() -> None:
    unsafe = {"pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "dill.loads"}
    offenders = []
    for name, tree in _sources():
        if name == "testing/rank_process.py":
            continue  # a test's ranks take their jobs from the process that started them, which is no peer
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and (
                ast.unparse(node) in unsafe
                or (node.attr.endswith(("_object", "_object_list")) and node.attr in COLLECTIVES)
            ):
                offenders.append(f"{name}:{node.lineno} {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if given.get("weights_only") != "True":
                    offenders.append(f"{name}:{node.lineno} torch.load without weights_only=True")
    assert not offenders


DOCUMENTS = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))


def _named_files(document: str) -> set[str]:
    text = (ROOT / document).read_text()
    return set(re.findall(r"`((?:[\w.-]+/)+(?:[\w.-]+\.\w+)?|[\w-]+\.(?:py|sh|md))`", text))


def test_documents_name_files() -> None:
    assert sum(len(_named_files(document)) for document in DOCUMENTS) > 100


@pytest.mark.parametrize("document", DOCUMENTS)
def test_documents_name_files_that_exist(document: str) -> None:
    named = _named_files(document)
    places = (
        ROOT,
        PACKAGE,
        PACKAGE / "comm",
        PACKAGE / "integrations",
        PACKAGE / "planner",
        ROOT / "scripts",
        ROOT / "tests/comm/schedules",
    )
    lost = {name for name in named if not any((place / name).exists() for place in places)}
    assert not lost
