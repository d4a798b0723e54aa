"""Fills the tables of docs/scaling.md from benchmarks/scaling.py: ``python docs/make_scaling.py [--check]``.

A table stands between ``<!-- table: key=value ... -->`` and ``<!-- end -->``. With --check nothing is written; exit
status 1 if the page is not what the model says.
"""

import re
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import scaling

PAGE = Path(__file__).resolve().parent / "scaling.md"
GPUS = (1, 8, 16, 64, 256, 1024)
_TABLE = re.compile(r"(<!-- table:(.*?)-->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with every table as the model gives it."""

    def fill(match: re.Match[str]) -> str:
        assumptions = scaling.assume(match[2].split())
        return match[1] + scaling.table([scaling.step(count, assumptions) for count in GPUS]) + "\n" + match[3]

    return _TABLE.sub(fill, text)


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        if filled(text) == text:
            return 0
        print(f"{PAGE.name} is not what the model says: python docs/make_scaling.py", file=sys.stderr)
        return 1
    PAGE.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
