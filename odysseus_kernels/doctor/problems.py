"""What follows from the ranks' reports: each problem with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from odysseus_kernels.comm.schedules.streams import STREAMS
from odysseus_kernels.doctor.report import Facts, Problem, RankReport
from odysseus_kernels.doctor.slow_pairs import slow_pairs
from odysseus_kernels.floors import OLDEST, too_old

__all__ = ["OLDEST_PYTHON", "OLDEST_TORCH", "find_problems"]

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 10)
"""What pyproject.toml asks for."""

# A shard of 8,192 tokens and 8,192 features in fp32, held once by each rank.
_ROOM_OF_A_RANK = 256 << 20


def find_problems(reports: Sequence[RankReport]) -> tuple[Problem, ...]:
    """Errors first; what several ranks have in common is one problem that names them."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for report in reports:
        for problem in _of_rank(report, reports):
            ranks = found.setdefault((problem.severity, problem.what, problem.remedy), [])
            if report.rank not in ranks:
                ranks.append(report.rank)
    problems = [
        Problem(severity, what, remedy, () if len(ranks) == len(reports) else tuple(ranks))  # type: ignore[arg-type]
        for (severity, what, remedy), ranks in found.items()
    ]
    problems += _of_all(reports)
    problems += slow_pairs([pair for report in reports for pair in report.pairs], _hosts(reports))
    return tuple(sorted(problems, key=lambda problem: problem.severity))


def _of_rank(report: RankReport, reports: Sequence[RankReport]) -> Iterator[Problem]:
    if report.failure:
        yield Problem(
            "error",
            f"{report.stage or 'the examination'} failed: {report.failure}",
            _meeting_remedy(report) if report.stage == "meeting the other ranks" else "what the error says",
        )
    if report.facts:
        yield from _of_software(report.facts)
        yield from _of_devices(report.facts)
        yield from _of_memory(report, reports)
        yield from _of_network(report.facts)
    yield from _of_transports(report, reports)
    yield from _of_checks(report)
    for text in report.said:
        yield Problem("warning", text, "what the warning says; docs/fallbacks.md explains each of them")


def _of_software(facts: Facts) -> Iterator[Problem]:
    versions, extension = facts["versions"], facts["extension"]
    for name, oldest in (("python", OLDEST_PYTHON), ("torch", OLDEST_TORCH)):
        if _numbers(versions[name]) < oldest:
            wanted = ".".join(map(str, oldest))
            yield Problem(
                "error", f"expected {name} {wanted} or later, got {versions[name]}", f"install {name} {wanted}"
            )
    for name in OLDEST:
        if versions.get(name) and too_old(name, versions[name]):
            yield Problem(
                "error",
                f"expected {name} {OLDEST[name]} or later, got {versions[name]}: models cannot be parallelized with it",
                f"pip install -U '{name}>={OLDEST[name]}'",
            )
    if not extension["usable"]:
        yield Problem(
            "error",
            f"no compiled extension, so no symmetric transport: {extension['why_not']}",
            "build it, and run doctor again",
        )


def _of_devices(facts: Facts) -> Iterator[Problem]:
    extension, devices = facts["extension"], facts["devices"]
    gpus = devices["gpus"]
    if devices["driver"] and not gpus:
        built = facts["versions"]["cuda of torch"]
        yield Problem(
            "warning",
            f"an NVIDIA driver is loaded, but torch sees no GPU (torch is built "
            f"{f'for CUDA {built}' if built else 'without CUDA'}): ranks use the CPU",
            "install a torch that is built for CUDA; check CUDA_VISIBLE_DEVICES and `nvidia-smi`",
        )
    if gpus and extension["usable"]:
        if not extension["cuda_part"]:
            yield Problem("error", extension["why_no_cuda_part"], "build it again where nvcc of CUDA 13 is found")
        elif extension["why_no_device"]:
            yield Problem(
                "error", extension["why_no_device"], "a GPU of compute capability 8.0 or later, and its driver"
            )
        elif extension["why_no_batch_copies"]:
            yield Problem(
                "warning",
                f"copies within a GPU take multiprocessors from products: {extension['why_no_batch_copies']}",
                "a driver for CUDA 12.8 or later",
            )
    if devices.get("pairs_without_peer_access"):
        pairs = ", ".join(f"{a} to {b}" for a, b in devices["pairs_without_peer_access"])
        yield Problem(
            "warning",
            f"no peer-to-peer access between GPUs {pairs}: their ranks use NCCL",
            "GPUs with NVLink or below one PCIe switch; check that the IOMMU and access control services let them",
        )
    queues = facts["limits"]["cuda_device_max_connections"]
    if gpus and queues and queues.isdigit() and 0 < int(queues) < len(STREAMS):
        yield Problem(
            "warning",
            f"CUDA_DEVICE_MAX_CONNECTIONS={queues} gives fewer hardware queues than the {len(STREAMS)} streams of the "
            f"symmetric transport: a product may stand behind a wait for a peer",
            "unset it, or set 8 and more, before the process first uses CUDA",
        )


def _of_memory(report: RankReport, reports: Sequence[RankReport]) -> Iterator[Problem]:
    memory, cache = report.facts["shared memory"], report.facts["caches"]
    where = memory["directory"]
    if memory["why_not_writable"]:
        yield Problem(
            "error",
            f"no segment of shared memory can be made: {memory['why_not_writable']}",
            "mount a tmpfs there (docker: --shm-size), or point ODYSSEUS_SHM_DIR to one",
        )
    elif memory.get("free_bytes") is not None:
        host = report.facts["host"]
        ranks = sum(1 for one in reports if one.facts and one.facts["host"]["machine"] == host["machine"])
        needed = ranks * _ROOM_OF_A_RANK
        # What is free differs by what others do meanwhile; a size that is too small does not.
        if memory["free_bytes"] < needed:
            yield Problem(
                "warning",
                f"{where} has less than {needed >> 20} MiB free for {ranks} ranks, {_ROOM_OF_A_RANK >> 20} MiB each: "
                f"calls with larger shards go to the collective transport",
                "enlarge it (docker: --shm-size, Kubernetes: an emptyDir with medium Memory, else "
                "`mount -o remount,size=...`), remove what fills it, or point ODYSSEUS_SHM_DIR to a larger tmpfs",
            )
    if memory["file_system"] not in ("tmpfs", "ramfs", "hugetlbfs", None):
        yield Problem(
            "warning",
            f"{where} lies on {memory['file_system']}: what ranks send would be written to a disk",
            "point ODYSSEUS_SHM_DIR to a tmpfs",
        )
    if cache["why_not_writable"]:
        yield Problem(
            "warning",
            f'the cache of mode="auto" cannot be written ({cache["why_not_writable"]}): every process measures anew',
            "point ODYSSEUS_CACHE_DIR to a folder that can be written",
        )


def _of_network(facts: Facts) -> Iterator[Problem]:
    network = facts["network"]
    if network["why_not"]:
        known = ", ".join(one["name"] for one in network["interfaces"] if one["ipv4"])
        yield Problem(
            "error",
            f"this rank cannot listen for others: {network['why_not']}",
            f"set GLOO_SOCKET_IFNAME to an interface with an IPv4 address ({known}), or unset it",
        )


def _of_transports(report: RankReport, reports: Sequence[RankReport]) -> Iterator[Problem]:
    known = [one.facts for one in reports if one.facts]
    # Between hosts there is no symmetric transport, and that is as it should be.
    hosts = {(facts["host"]["machine"], facts["host"]["container"]) for facts in known}
    said_before = (
        len(hosts) > 1
        or any(not facts["extension"]["usable"] or facts["shared memory"]["why_not_writable"] for facts in known)
        or any(facts["devices"]["gpus"] and not facts["extension"].get("cuda_part") for facts in known)
        or any(facts["devices"].get("pairs_without_peer_access") for facts in known)
    )
    for state in report.transports:
        if not state.available and not (state.transport == "symmetric" and said_before):
            yield Problem(
                "error",
                f"transport {state.transport} cannot be used: {state.why_not}",
                "what the reason says; docs/fallbacks.md has all of them",
            )


def _of_checks(report: RankReport) -> Iterator[Problem]:
    for check in report.checks:
        what = f"{check.operator}, {check.mode}, transport {check.transport}"
        if check.failure:
            yield Problem(
                "error",
                f"{what}: {check.failure}",
                "what the error says; operators behind it on that transport were not tried",
            )
        elif not check.passed:
            yield Problem(
                "error",
                f"{what}: {check.where} is wrong by {check.error:.1e}, rounding explains {check.allowed:.1e}",
                "do not train on this machine before it is found: try the other transport, build the extension again "
                "(`pip install -e .`), and test memory and processor",
            )


def _of_all(reports: Sequence[RankReport]) -> list[Problem]:
    found = []
    known = [report for report in reports if report.facts]
    for name in ("python", "torch", "cuda of torch", "odysseus_kernels", "triton", "transformers"):
        values = {report.rank: report.facts["versions"][name] for report in known}
        if len(set(values.values())) > 1:
            # Patch releases of Python and packages that do not communicate differ without harm.
            harmful = name in ("torch", "odysseus_kernels")
            texts = ", ".join(f"rank {rank}: {value}" for rank, value in _firsts(values.items()))
            found.append(
                Problem(
                    "error" if harmful else "warning", f"ranks have different versions of {name}: {texts}",
                    "install the same environment on all hosts",
                )
            )  # fmt: skip
    usable = {report.rank: report.facts["extension"]["usable"] for report in known}
    if len(set(usable.values())) > 1:
        found.append(
            Problem("error", "only some ranks have the compiled extension: none can use it", "build it on all hosts")
        )
    for machine in dict.fromkeys(report.facts["host"]["machine"] for report in known):
        there = [report for report in known if report.facts["host"]["machine"] == machine]
        cores = max(report.facts["host"]["cores_of_process"] for report in there)
        if len(there) > cores:
            found.append(
                Problem(
                    "warning",
                    f"{len(there)} ranks share {cores} cores of {there[0].facts['host']['name']}: a rank that waits "
                    f"takes time from one that computes",
                    "fewer ranks, or more cores (docker: --cpus, Slurm: --cpus-per-task)",
                    tuple(report.rank for report in there) if len(there) < len(reports) else (),
                )
            )
    return found


def _hosts(reports: Sequence[RankReport]) -> dict[int, tuple[str, str]]:
    return {one.rank: (one.facts["host"]["machine"], one.facts["host"]["container"]) for one in reports if one.facts}


def _firsts(items: Iterable[tuple[int, object]]) -> Iterator[tuple[int, object]]:
    seen = set()
    for rank, value in items:
        if value not in seen:
            seen.add(value)
            yield rank, value


def _meeting_remedy(report: RankReport) -> str:
    interfaces = report.facts.get("network", {}).get("interfaces", [])
    known = ", ".join(one["name"] for one in interfaces if one["ipv4"]) or "none has an IPv4 address"
    return (
        f"all ranks must reach one another by TCP: set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to an interface "
        f"that they share ({known}), let its ports through, and check that all ranks were started"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
