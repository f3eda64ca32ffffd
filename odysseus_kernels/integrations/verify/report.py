"""What :func:`odysseus_kernels.verify` found: one finding for each check, as a table, as JSON and as an exit status."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

__all__ = ["Finding", "Report"]

Outcome = Literal["passed", "FAILED", "skipped"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: what was compared.
        outcome: ``"passed"``, ``"FAILED"`` or ``"skipped"``.
        measured: the figure, or what was found.
        allowed: what the figure may be.
        where: the first module, parameter or token that differs; empty if none does.
        hint: what would explain the difference, or why the check was skipped.
    """

    check: str
    outcome: Outcome
    measured: str = ""
    allowed: str = ""
    where: str = ""
    hint: str = ""

    @staticmethod
    def of(check: str, right: bool, measured: str, allowed: str, where: str = "", hint: str = "") -> Finding:
        """A finding that passed or failed; what explains a difference belongs to one that failed."""
        return Finding(
            check, "passed" if right else "FAILED", measured, allowed, *(("", "") if right else (where, hint))
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """All findings of one verification, the same on every rank.

    Attributes:
        title: model, strategy and mesh.
        findings: in the order in which they were made.
        gradients: for each parameter's name, relative error of its gradient and its scale, the factor by which the
            single process's gradient comes closest to it.
    """

    title: str
    findings: tuple[Finding, ...]
    gradients: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(finding.outcome != "FAILED" for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(finding for finding in self.findings if finding.outcome == "FAILED")

    def raise_on_failure(self) -> None:
        """AssertionError with the table unless all checks passed; for tests."""
        if not self.passed:
            raise AssertionError(self.table())

    def table(self) -> str:
        """The findings as text, with a verdict."""
        header = ("check", "outcome", "measured", "allowed")
        rows = [header, *((f.check, f.outcome, f.measured, f.allowed) for f in self.findings)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [self.title]
        for number, row in enumerate(rows):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
            if number:
                finding = self.findings[number - 1]
                lines += [f"    {text}" for text in (finding.where, finding.hint) if text]
        failed = len(self.failures)
        lines.append("every check passed" if self.passed else f"{failed} of {len(self.findings)} checks FAILED")
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, for scripts."""
        return json.dumps({**dataclasses.asdict(self), "passed": self.passed}, indent=1)

    @staticmethod
    def from_json(text: str) -> Report:
        """The report that :meth:`to_json` wrote."""
        document: dict[str, Any] = json.loads(text)
        findings = tuple(Finding(**finding) for finding in document["findings"])
        return Report(document["title"], findings, document["gradients"])
