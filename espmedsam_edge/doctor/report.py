"""A diagnosis as plain text: findings by area, what is missing with its command, what the machine can do."""

from __future__ import annotations

from espmedsam_edge.doctor.diagnosis import Diagnosis
from espmedsam_edge.doctor.finding import Finding

_MARKS = {"ok": "ok", "absent": "-", "problem": "!"}


def render(diagnosis: Diagnosis) -> str:
    """Text for a terminal or a file: commands stay on one line each, so that they can be copied."""
    width = max(len(finding.name) for finding in diagnosis.findings)
    lines: list[str] = []
    area = None
    for finding in diagnosis.findings:
        if finding.area != area:
            area = finding.area
            lines += ["", area] if lines else [area]
        lines.append(f"  {_MARKS[finding.status]:>2}  {finding.name:<{width}}  {finding.detail}")
    lines += _remedies("Does not work, and what to do:", [f for f in diagnosis.findings if f.status == "problem"])
    lines += _remedies("Not installed; add what you need:", [f for f in diagnosis.findings if f.status == "absent"])
    lines += ["", "This machine can:"]
    task_width = max(len(task) for task in diagnosis.abilities)
    for task, (able, how) in diagnosis.abilities.items():
        lines.append(f"  {'yes' if able else 'no':>3}  {task:<{task_width}}  {how}".rstrip())
    return "\n".join(lines)


def _remedies(title: str, findings: list[Finding]) -> list[str]:
    fixes: dict[str, list[str]] = {}
    for finding in findings:
        if finding.fix:
            fixes.setdefault(finding.fix, []).append(finding.name)
    if not fixes:
        return []
    lines = ["", title]
    for fix, names in fixes.items():
        lines += [f"  {', '.join(names)}:", f"    {fix}"]
    return lines
