"""Look up the installed packages' known vulnerabilities with pip-audit; offline it says so in one line, and passes.

    python tools/audit.py

Exit code 1 if a package has one. Exceptions are listed in ``ACCEPTED`` with their reasons.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

ACCEPTED: dict[str, str] = {}
"""Identifier of an advisory -> why it does not matter here, or what is waited for."""

_SECONDS = 180


def report() -> list[dict[str, Any]] | None:
    """What pip-audit says of each package; None where it cannot say anything."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--skip-editable"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
        return None
    return packages


def verdict(packages: list[dict[str, Any]] | None) -> tuple[str, int]:
    """What to print, and the exit code."""
    looked_up = [package for package in packages or () if "skip_reason" not in package]
    if packages is None or not looked_up:
        return "pip-audit: the advisory service cannot be reached from here; nothing was looked up.", 0
    found = [
        f"{package['name']} {package['version']}: {advisory['id']}, mended in {' '.join(advisory['fix_versions'])}"
        for package in looked_up
        for advisory in package.get("vulns", ())
        if advisory["id"] not in ACCEPTED
    ]
    left_out = len(packages) - len(looked_up)
    more = f"; {left_out} are not known to the service" if left_out else ""
    return "\n".join([*found, f"pip-audit: {len(found)} advisories for {len(looked_up)} packages{more}."]), bool(found)


if __name__ == "__main__":
    text, code = verdict(report())
    print(text)
    sys.exit(code)
