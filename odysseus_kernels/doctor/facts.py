"""What a rank finds of its process and its host, without talking to any other; nothing here raises."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

import odysseus_kernels
from odysseus_kernels import _ext
from odysseus_kernels.comm.collective.connecting import interface_address, listen
from odysseus_kernels.comm.meeting.membership import this_member
from odysseus_kernels.config import cache_directory, hardware_queues, shared_memory_directory, socket_interface
from odysseus_kernels.doctor.report import Facts
from odysseus_kernels.planner.hardware import GENERIC_GPU, hardware_for

__all__ = ["gather_facts", "parse_topology", "why_not_writable"]

_PACKAGES = ("numpy", "triton", "transformers", "accelerate", "peft", "trl", "flash-attn")
_SMI_LIMIT_S = 5.0


def gather_facts() -> Facts:
    """Facts by section.  Those of ``"host"``, ``"network"``, ``"shared memory"`` and ``"devices"`` are the host's."""
    return {
        "versions": _versions(),
        "extension": _extension(),
        "host": _host(),
        "devices": _devices(),
        "network": _network(),
        "shared memory": _shared_memory(),
        "limits": _limits(),
        "caches": _caches(),
    }


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "odysseus_kernels": odysseus_kernels.__version__,
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _extension() -> dict[str, Any]:
    found: dict[str, Any] = {"usable": _ext.available(), "why_not": _ext.why_unavailable()}
    if not _ext.available():
        return found
    module = _ext.load()
    found |= {"file": module.__file__, "instruction_set": module.simd(), "cuda_part": _ext.has_cuda()}
    found["why_no_cuda_part"] = _ext.why_no_cuda()
    if _ext.has_cuda():
        found["why_no_device"] = module.cuda.why_unavailable()
        found["why_no_batch_copies"] = module.cuda.why_no_batch_copies()
    return found


def _host() -> dict[str, Any]:
    member = this_member()
    return {
        "name": member.host,
        "machine": member.machine,
        "container": member.namespace,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _after("/proc/cpuinfo", "model name") or platform.machine(),
        "cores_of_process": len(os.sched_getaffinity(0)),
        "cores": os.cpu_count(),
        "memory_bytes": _kilobytes("MemTotal"),
        "memory_available_bytes": _kilobytes("MemAvailable"),
    }


def _devices() -> dict[str, Any]:
    driver = _read("/proc/driver/nvidia/version").splitlines()
    found: dict[str, Any] = {"driver": driver[0].partition(":")[2].strip() if driver else None, "gpus": []}
    if not torch.cuda.is_available():
        return found
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        found["gpus"].append(
            {
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "rates_known": hardware_for(properties.name) is not GENERIC_GPU,
            }
        )
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    found["pairs_without_peer_access"] = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    found["links"] = _topology() if count > 1 else {}
    return found


def _topology() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    try:
        done = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=_SMI_LIMIT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_topology(done.stdout)


def parse_topology(text: str) -> dict[str, str]:
    """Links by pair, ``{"0-1": "NV18"}``, of what ``nvidia-smi topo -m`` prints: NV# is NVLink, others cross PCIe."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).split() for line in text.splitlines()]
    rows = [line for line in lines if line and re.fullmatch(r"GPU\d+", line[0])]
    rows = [row for row in rows if len(row) > len(rows) and not re.fullmatch(r"GPU\d+", row[1])]
    count = len(rows)
    return {f"{a}-{b}": rows[a][1 + b] for a in range(count) for b in range(a + 1, count)}


def _network() -> dict[str, Any]:
    interfaces = []
    for _, name in socket.if_nameindex():
        folder = Path("/sys/class/net", name)
        address = None
        with contextlib.suppress(OSError):
            address = interface_address(name)
        speed = _read(str(folder / "speed"))
        interfaces.append(
            {
                "name": name,
                "ipv4": address,
                "state": _read(str(folder / "operstate")) or None,
                "megabits_per_s": int(speed) if speed.isdigit() else None,  # -1: unknown
            }
        )
    found: dict[str, Any] = {"interfaces": interfaces, "gloo_socket_ifname": socket_interface() or None}
    try:
        with listen(1) as listener:
            found["listens_on"], found["why_not"] = str(listener.getsockname()[0]), ""
    except OSError as error:
        found["listens_on"], found["why_not"] = None, str(error)
    return found


def _shared_memory() -> dict[str, Any]:
    directory = shared_memory_directory()
    found: dict[str, Any] = {"directory": directory, "file_system": _file_system(directory)}
    found["why_not_writable"] = why_not_writable(Path(directory), make=False)
    found["writable"] = not found["why_not_writable"]
    with contextlib.suppress(OSError):
        status = os.statvfs(directory)
        found["size_bytes"] = status.f_blocks * status.f_frsize
        found["free_bytes"] = status.f_bavail * status.f_frsize
    limit = _read("/sys/fs/cgroup/memory.max")
    found["cgroup_limit_bytes"] = int(limit) if limit.isdigit() else None
    return found


def _limits() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, number in (
        ("open_files", resource.RLIMIT_NOFILE),
        ("file_size_bytes", resource.RLIMIT_FSIZE),
        ("locked_memory_bytes", resource.RLIMIT_MEMLOCK),
        ("address_space_bytes", resource.RLIMIT_AS),
    ):
        soft = resource.getrlimit(number)[0]
        found[name] = None if soft == resource.RLIM_INFINITY else soft
    return found | {"cuda_device_max_connections": hardware_queues() or None}


def _caches() -> dict[str, Any]:
    why_not = why_not_writable(cache_directory(), make=True)
    return {"directory": str(cache_directory()), "writable": not why_not, "why_not_writable": why_not}


def why_not_writable(directory: Path, *, make: bool) -> str:
    """Why a file cannot be made in ``directory``, or empty; with ``make``, in one that would be made first.

    It is tried, since permissions alone do not say (root, read-only file systems); nothing is left behind.
    """
    missing = []
    try:
        if make:
            for folder in (directory, *directory.parents):
                if folder.exists():
                    break
                missing.append(folder)
            directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=".odysseus-doctor-", dir=directory):
            pass
    except OSError as error:
        return f"{error.strerror or errno.errorcode.get(error.errno or 0, 'error')}: {directory}"
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):  # another rank's file, or another's folder
                folder.rmdir()
    return ""


def _file_system(directory: str) -> str | None:
    """Type of the file system that ``directory`` lies on: the longest mount point that contains it."""
    best, found = "", None
    with contextlib.suppress(OSError):
        real = os.path.realpath(directory)
        for line in _read("/proc/mounts").splitlines():
            point, kind = line.split()[1:3]
            if len(point) >= len(best) and os.path.commonpath([point, real]) == point:
                best, found = point, kind
    return found


def _kilobytes(name: str) -> int | None:
    text = _after("/proc/meminfo", name).split()
    return int(text[0]) * 1024 if text else None


def _after(path: str, name: str) -> str:
    lines = (line for line in _read(path).splitlines() if line.startswith(name))
    return next(lines, "").partition(":")[2].strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
