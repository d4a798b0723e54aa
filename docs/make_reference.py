"""Writes docs/configuration.md: every key of packing and pretraining with type, default, range and meaning.

    python docs/make_reference.py            writes the page
    python docs/make_reference.py --check    exit status 1 if the page is not what the options say

The text comes from the options' own docstrings (preprocess/options.py, geokr/options.py), so the page cannot drift
from the code; a test runs the check.
"""

import argparse
import difflib
import inspect
import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

if __package__ in (None, ""):  # run as a file: the folder on the path must be the project's, not this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from geokr.options import PretrainOptions
from preprocess.options import PackOptions

PAGE = Path(__file__).resolve().parent / "configuration.md"

HEAD = """# Configuration

<!-- Written by docs/make_reference.py from the options' docstrings. Do not edit: change those, then `make docs`. -->

Every key of both commands. A key is given in a YAML file (`--config FILE`) under its section,

```yaml
tile:
  size: 256
```

or on the command line as `tile.size=256`, which wins over the file. Values are YAML: `null`, `true`,
`'tile.bands=[red,green,blue]'`. A key that does not exist, stands twice or has a value of the wrong type is an error
that names it. What is not given has its default; a run saves its whole configuration beside its results.

- [Packing](#packing): `python preprocess/pack_records.py`, recipes `configs/pack_*.yaml`
- [Pretraining](#pretraining): `python -m geokr.pretrain`, recipes `configs/*.yaml`
"""
PARTS = (
    (
        "Packing",
        "Keys of `preprocess/pack_records.py`. All but `workers`, `scene.remote` and where `mask.pattern` looks decide "
        "the dataset's bytes.",
        PackOptions,
    ),
    ("Pretraining", "Keys of `geokr.pretrain`, alone or under `launch/pretrain_8gpu.sh`.", PretrainOptions),
)
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}


def kind(annotation: Any) -> str:
    """A type in words a YAML writer understands. Raises TypeError for one it has no words for."""
    if annotation in WORDS:
        return WORDS[annotation]
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in parts)
    if origin is tuple and len(parts) == 2 and parts[1] is Ellipsis:
        return f"list of ({kind(parts[0])})" if " or " in kind(parts[0]) else f"list of {kind(parts[0])}"
    if origin is tuple:
        return "[" + ", ".join(kind(part) for part in parts) + "]"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "{" + ", ".join(annotation.model_fields) + "}"
    if origin is dict:
        return f"mapping of {kind(parts[0])} to {kind(parts[1])}"
    raise TypeError(f"no words for the type {annotation}: add them to docs/make_reference.py")


def limits(field: FieldInfo) -> str:
    """The allowed range, such as ``0 to 1`` or ``above 0, at most 1``; empty where there is none."""
    low = high = ""
    strict = False
    for bound in field.metadata:
        match bound:
            case annotated_types.Ge(ge=value):
                low = number(value)
            case annotated_types.Gt(gt=value):
                low, strict = f"above {number(value)}", True
            case annotated_types.Le(le=value):
                high = number(value)
            case annotated_types.Lt(lt=value):
                high, strict = f"below {number(value)}", True
            case _:
                raise TypeError(f"no words for the constraint {bound}: add them to docs/make_reference.py")
    if low and high and not strict:
        return f"{low} to {high}"
    if low and not high:
        return low if strict else f"{low} or more"
    low = low if not low or low.startswith("above") else f"from {low}"
    high = high if not high or high.startswith("below") else f"at most {high}"
    return ", ".join(part for part in (low, high) if part)


def number(value: Any) -> str:
    """A bound as people write it."""
    if isinstance(value, int) and value >= 2**31 and value.bit_count() == 1:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def default(field: FieldInfo) -> str:
    """The default as YAML."""
    value = field.get_default(call_default_factory=True)
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def prose(text: str | None) -> str:
    """Docstring text on one line, safe inside a table."""
    return " ".join((text or "").split()).replace("|", "\\|")


def row(key: str, field: FieldInfo) -> str:
    """A key's line of the table. Raises ValueError if the option has no docstring."""
    if not field.description:
        raise ValueError(f"{key} has no docstring: say what it means under it")
    allowed = "; ".join(part for part in (kind(field.annotation), limits(field)) if part)
    return f"| `{key}` | {allowed.replace('|', chr(92) + '|')} | {default(field)} | {prose(field.description)} |"


def sections(schema: type[BaseModel]) -> Iterator[tuple[str, str, list[tuple[str, FieldInfo]]]]:
    """(name, text, keys) of every section, and of the keys that stand outside of any, last, with an empty name."""
    loose = []
    for name, field in schema.model_fields.items():
        section = field.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            loose.append((name, field))
            continue
        own = section.__dict__.get("__doc__")
        keys = [(f"{name}.{key}", inner) for key, inner in section.model_fields.items()]
        yield name, prose(inspect.cleandoc(own)) if own else "", keys
    if loose:
        yield "", "", loose


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for title, text, schema in PARTS:
        lines += [f"## {title}", "", text, ""]
        for name, about, keys in sections(schema):
            lines += [f"### {title}: {name}" if name else f"### {title}: keys without a section", ""]
            lines += [about, ""] if about else []
            lines += ["| key | allowed | default | meaning |", "|---|---|---|---|"]
            lines += [row(key, field) for key, field in keys]
            lines += [""]
    return "\n".join(lines).rstrip("\n") + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make_reference.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page is out of date")
    checking = parser.parse_args(arguments).check
    new, old = page(), PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if checking and new != old:
        print("".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(PAGE), "the options")))
        print("docs/configuration.md is out of date: run `make docs` and commit it", file=sys.stderr)
        return 1
    if not checking:
        PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
