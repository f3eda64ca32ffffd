"""The command line: ``python -m odysseus_kernels verify script.py:build``.

``build()`` of the user's script returns ``(model, batch)``, or a dictionary of arguments of
:func:`odysseus_kernels.verify` with at least these two: a stock model and a whole batch, the same on every rank.

    python -m odysseus_kernels verify script.py:build --ranks 2 --strategy ulysses
    torchrun --nproc-per-node 8 -m odysseus_kernels verify script.py:build --ring 2     # ranks that are there already

Exit status: 0 if every check passed, 1 if one failed, 2 if nothing could be compared, 130 after Ctrl-C.

``python -m odysseus_kernels plan`` predicts which strategy and mesh to train a model with, and starts no ranks: see
``planner/planning/command.py``.

``python -m odysseus_kernels doctor`` says what a machine has, and whether every operator is right on it: see
``doctor/command.py``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odysseus_kernels.config import launched_rank
from odysseus_kernels.doctor.command import add_doctor, run_doctor
from odysseus_kernels.local_ranks import INTERRUPTED, started_ranks
from odysseus_kernels.planner.planning.command import add_plan, run_plan

__all__ = ["main"]

PASSED, FAILED, NOT_COMPARED = 0, 1, 2
# After one rank has ended badly, how long the others have to find out by themselves.
_GRACE_S = 10.0
_LOOK_S = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(_parser().parse_args(given), given)
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(options: argparse.Namespace, given: list[str]) -> int:
    if options.command == "plan":
        return run_plan(options)
    if options.command == "doctor":
        return run_doctor(options, given)
    try:
        _check_place(options.build)
    except (ValueError, SyntaxError) as error:
        print(error, file=sys.stderr)
        return NOT_COMPARED
    if options.meet is None and launched_rank() is None:
        return _start_ranks(options, given)
    return _verify(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m odysseus_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="a parallelized model beside the same model in one process")
    verify.add_argument("build", metavar="script.py:build", help="function that returns the model and the batch")
    verify.add_argument("--ranks", type=int, default=2, help="processes to start (default 2); not under torchrun")
    verify.add_argument("--ring", type=int, default=1, help="ring ranks among them (default 1)")
    verify.add_argument("--strategy", default="odysseus", help="tp, tp_sp, ulysses, tsp or odysseus (default)")
    verify.add_argument("--layers", default="2", help='decoder layers to keep, or "all" (default 2)')
    verify.add_argument("--own-dtype", action="store_true", help="keep the model's dtype instead of float32")
    verify.add_argument("--layer-by-layer", action="store_true", help="one process holds one layer's activations only")
    verify.add_argument("--folder", help="where a checkpoint is tried; seen by all ranks")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    verify.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a rank (default 120)")
    verify.add_argument("--meet", help=argparse.SUPPRESS)  # file over which ranks that were started here meet
    verify.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    add_plan(commands)
    add_doctor(commands)
    return parser


def _start_ranks(options: argparse.Namespace, given: list[str]) -> int:
    """Starts the ranks as processes of this command, and waits for them."""
    if options.ranks < 1:
        print(f"--ranks: expected at least 1, got {options.ranks}", file=sys.stderr)
        return NOT_COMPARED
    with tempfile.TemporaryDirectory(prefix="odysseus-verify-") as folder:
        command = [sys.executable, "-m", "odysseus_kernels", *given, "--meet", str(Path(folder, "meet"))]
        with started_ranks(command, options.ranks) as ranks:
            return _wait(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """The worst status; ranks that stay behind one that failed are not waited for long."""
    deadline = None
    while any(process.poll() is None for process in ranks):
        failed = any(process.returncode not in (None, PASSED, FAILED) for process in ranks)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(_LOOK_S)
    codes = [process.returncode for process in ranks]
    return NOT_COMPARED if any(code not in (PASSED, FAILED) for code in codes) else max(codes)


def _verify(options: argparse.Namespace) -> int:
    """One rank's part."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from odysseus_kernels import CommunicationError, OverlapConfig, verify

    launched = launched_rank()
    if options.meet or launched is None:
        rank, world, local = options.rank, options.ranks, options.rank
    else:
        rank, world, local = launched
    try:
        layers = None if options.layers == "all" else int(options.layers)
        if options.ring < 1 or world % options.ring:
            raise ValueError(f"--ring: expected a divisor of {world} ranks, got {options.ring}")
        on_gpu = torch.cuda.is_available() and local < torch.cuda.device_count()
        if on_gpu:
            torch.cuda.set_device(local)
        else:
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if options.meet:
            dist.init_process_group(backend, init_method=f"file://{options.meet}", rank=rank, world_size=world)
        else:
            dist.init_process_group(backend)
        dimensions = {"ring": options.ring, "seq": world // options.ring}
        if options.ring == 1:
            del dimensions["ring"]
        device = "cuda" if on_gpu else "cpu"
        mesh = init_device_mesh(device, tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
        built = _built(options.build)
        if on_gpu:
            built["model"] = built["model"].cuda()
            built["batch"] = {name: value.cuda() for name, value in built["batch"].items()}
        settings = {
            "strategy": options.strategy,
            "config": OverlapConfig(timeout_s=options.timeout),
            "layers": layers,
            "dtype": None if options.own_dtype else torch.float32,
            "layer_by_layer": options.layer_by_layer,
            "folder": options.folder,
        }
        report = verify(mesh=mesh, **{**settings, **built})
    except (ValueError, TypeError, ImportError, CommunicationError) as error:
        # Every rank is given the same: once is enough.
        if rank == 0 or isinstance(error, CommunicationError):
            print(f"rank {rank}: {type(error).__name__}: {error}", file=sys.stderr)
        return NOT_COMPARED
    if rank == 0:
        print(report.table(), flush=True)
        if options.json is not None:
            options.json.write_text(report.to_json() + "\n")
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()
    return PASSED if report.passed else FAILED


def _check_place(place: str) -> None:
    """ValueError unless ``place`` names something at the top level of a script; read, not run."""
    file, _, name = place.rpartition(":")
    if not file or not Path(file).is_file():
        raise ValueError(f"expected script.py:function of a file that exists, got {place!r}")
    names = set()
    for statement in ast.walk(ast.parse(Path(file).read_text(), file)):
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.Name) and isinstance(statement.ctx, ast.Store):
            names.add(statement.id)
    if name not in names:
        raise ValueError(f"{place}: expected a function {name} in {file}, found none")


def _built(place: str) -> dict[str, Any]:
    """What the user's function returns, as arguments of ``verify``."""
    file, _, name = place.rpartition(":")
    path = Path(file)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.resolve().parent))
    spec.loader.exec_module(module)
    made = getattr(module, name)()
    if isinstance(made, Mapping):
        arguments = dict(made)
    elif isinstance(made, tuple) and len(made) == 2:
        arguments = {"model": made[0], "batch": made[1]}
    else:
        raise ValueError(f"{place}: expected it to return (model, batch) or a dictionary, got {type(made).__name__}")
    if not {"model", "batch"} <= arguments.keys() or "mesh" in arguments:
        raise ValueError(f"{place}: expected model and batch and no mesh in what it returns, got {sorted(arguments)}")
    return arguments
