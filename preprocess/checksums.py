"""SHA-256 of inputs, where their source gives them: a flipped bit in an uncompressed TIFF decodes in silence.

Lists are what ``sha256sum`` writes: a hash and a path a line, paths relative to the list's folder. A file is known
by where it really lies, whatever links lead there.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from preprocess.inputs import PlanError

LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def read_lists(lists: Sequence[str], inputs: Sequence[str]) -> dict[str, str]:
    """Path to hash of those inputs that stand in the lists.

    Raises PlanError for a list that cannot be read, for two hashes of one file, and where no input is listed.
    """
    found: dict[str, str] = {}
    for name in lists:
        try:
            lines = Path(name).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"--checksums {name}: cannot be read ({error})") from error
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            if not (match := LINE.fullmatch(line)):
                raise PlanError(
                    f"--checksums {name}: line {number}: expected a SHA-256 and a path, as sha256sum writes"
                )
            path = os.path.realpath(os.path.join(os.path.dirname(name), match[2]))
            if found.setdefault(path, match[1].lower()) != match[1].lower():
                raise PlanError(f"--checksums {name}: line {number}: {path} has another hash above")
    listed = {path: found[real] for path in inputs if (real := os.path.realpath(path)) in found}
    if not listed:
        raise PlanError(
            f"--checksums {', '.join(lists)}: no scene and no land-cover sheet stands in it; paths are taken from the "
            "folder of the list"
        )
    return listed


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mismatch(path: str, found: str, expected: Mapping[str, str]) -> str:
    """What is wrong with a file whose hash is ``found``, or an empty string."""
    if found == expected[path]:
        return ""
    return f"{path}: its SHA-256 is {found}, its source gave {expected[path]}: damaged or changed; fetch it again"
