"""What a check found, and how checks that load torch or DALI are run: in a process of their own, with a deadline."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warning", "failure"]
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. found: what is there. means, remedy: empty where all is well."""

    check: str
    state: State
    found: str
    means: str = ""
    remedy: str = ""


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, means: str, remedy: str) -> Finding:
    return Finding(check, "warning", found, means, remedy)


def failure(check: str, found: str, means: str, remedy: str) -> Finding:
    return Finding(check, "failure", found, means, remedy)


class TrialError(Exception):
    """A trial that failed; its text is the last thing it said."""


def trial(code: str, timeout_s: float, *arguments: str, python: str = sys.executable) -> dict[str, Any]:
    """Runs Python code in a process of its own and returns the JSON object it printed last.

    A crash, a hang or a library that cannot be loaded there leaves this process alone. Raises TrialError.
    """
    command = [python, "-c", code, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=_ROOT)
    except subprocess.TimeoutExpired as error:
        raise TrialError(f"no end after {timeout_s:g} s") from error
    except OSError as error:
        raise TrialError(str(error)) from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        signal = f" (signal {-done.returncode})" if done.returncode < 0 else ""
        raise TrialError((lines[-1].strip()[:300] if lines else f"exit status {done.returncode}") + signal)
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise TrialError(f"unexpected answer {done.stdout[-200:]!r}") from error
