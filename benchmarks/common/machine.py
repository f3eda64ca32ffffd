"""What a result has to say about where it was measured, without naming the host."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

__all__ = ["commit", "describe_machine", "machine_tag", "versions"]

_ROOT = Path(__file__).resolve().parents[2]


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores that this process may use, memory in GiB, system, and the GPU where one is measured."""
    description = {
        "processor": _processor(),
        "cores": _cores(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    if device != "cpu":
        description["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return description


def machine_tag(device: str) -> str:
    """A folder's name for machines of a kind, such as ``cpu-2cores`` or ``4x-nvidia-h200``."""
    if device == "cpu":
        return f"cpu-{_cores()}cores"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    return f"{torch.cuda.device_count()}x-{name}"


def versions() -> dict[str, str]:
    """Versions of Python, torch and this package."""
    try:
        package = metadata.version("odysseus_kernels")
    except metadata.PackageNotFoundError:
        package = "not installed"
    return {"python": platform.python_version(), "torch": torch.__version__, "odysseus_kernels": package}


def commit() -> str:
    """The checkout's git commit, with ``+changes`` if files differ from it; ``unknown`` outside a checkout."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found.group(1).strip()
    return platform.processor() or "unknown"
