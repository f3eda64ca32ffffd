"""What ``tests/run_gpu.sh`` found, from the files of its results; prints it and writes ``summary.md``.

It decides the exit status, and needs no torch: it is run after whatever happened.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.common.rows import read_rows

_COUNTS = ("tests", "failures", "errors", "skipped")


def _statuses(out: Path, parts: list[str]) -> dict[str, list[str]]:
    """Outcome, seconds, time and commit of each part."""
    found = {}
    for part in parts:
        path = out / f"{part}.status"
        found[part] = path.read_text().strip().split("\t") if path.exists() else ["never run", "", "", ""]
    return found


def _outcomes(out: Path) -> list[list[str]]:
    """(part, step, outcome, seconds) of each step."""
    return [line.split("\t") for line in (out / "outcomes").read_text().splitlines()]


def _counts(out: Path, steps: list[str]) -> dict[str, int]:
    """Numbers of tests, of all steps that ran any to their end."""
    total = dict.fromkeys(_COUNTS, 0)
    for step in steps:
        path = out / f"{step}.xml"
        suite = ElementTree.parse(path).getroot().find("testsuite") if path.exists() else None
        if suite is not None:
            for name in _COUNTS:
                total[name] += int(suite.get(name, "0"))
    return total


def _rows(path: Path, what: str) -> list[str]:
    """What became of the rows of a benchmark, each of which was a process."""
    if not path.exists():
        return []
    outcomes, missing = read_rows(path)
    failed = [outcome for outcome in outcomes if outcome.failed]
    lines = ["", f"{what}: {len(outcomes) - len(failed)} rows measured, in {path.name}"]
    lines += [f"- failed: {outcome.name}: {outcome.failed}" for outcome in failed]
    return lines + [f"- not measured: {name}" for name in missing]


def _targets(out: Path) -> list[str]:
    """The verdicts of the benchmark over emulated links, if it came to its end."""
    results = sorted(out.glob("emulated-*.json"))
    if not results:
        return []
    document: dict[str, Any] = json.loads(results[-1].read_text())
    lines = ["", f"Benchmark, links EMULATED, {document['date']}, commit {document['commit']}: {results[-1].name}"]
    for target in document["targets"]:
        measured = "no figure" if target["measured"] is None else f"{target['measured']:.3f}"
        outcome = "reached" if target["reached"] else f"missed in {target['rows_missed']} of {target['rows']} rows"
        lines.append(f"- {target['what']}: {measured} ({target['relation']} {target['limit']}), {outcome}")
    return lines


def main() -> int:
    """Returns 0 if every part that was asked for passed, else the exit status of the first that did not."""
    out, only = Path(os.environ["OUT"]), os.environ["ONLY"]
    codes = {part.split(":")[0]: int(part.split(":")[2]) for part in os.environ["PARTS"].split()}
    statuses, outcomes = _statuses(out, list(codes)), _outcomes(out)
    first = 0
    for part, code in codes.items():
        steps = [step for of, step, _, _ in outcomes if of == part]
        counts = _counts(out, steps)
        tested = any((out / f"{step}.xml").exists() for step in steps)
        if tested and statuses[part][0] == "passed" and counts["tests"] <= sum(counts[name] for name in _COUNTS[1:]):
            statuses[part][0] = "failed: no test passed"  # tests that were all skipped have shown nothing
        asked = not only or part == only
        if asked and not first and not statuses[part][0].startswith(("passed", "not run")):
            first = code
    lines = ["| part | outcome | seconds | when | commit | exit status |", "| --- | --- | ---: | --- | --- | ---: |"]
    lines += [f"| {part} | " + " | ".join(fields) + f" | {codes[part]} |" for part, fields in statuses.items()]
    counts = _counts(out, [step for _, step, _, _ in outcomes])
    lines += ["", "Tests: " + ", ".join(f"{count} {name}" for name, count in counts.items())]
    lines += [f"- {part}, {step}: {outcome}" for part, step, outcome, _ in outcomes if outcome != "passed"]
    lines += _rows(out / "rows-kernels.jsonl", "Kernels against the library") + _rows(out / "rows-links.jsonl", "Links")
    lines += _targets(out)
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text)
    print(f"{text}\nwrote {out / 'summary.md'}")
    return first


if __name__ == "__main__":
    sys.exit(main())
