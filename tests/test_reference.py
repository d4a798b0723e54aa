"""The generated configuration reference says what the options say."""

import importlib.util
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from geokr.config import Options, field_keys
from geokr.options import PretrainOptions
from preprocess.options import PackOptions

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # it puts the project's folder where a script's own stands
        patch.setattr("sys.path", [str(ROOT / "docs"), str(ROOT)])
        spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_up_to_date(reference, capsys):
    assert reference.main(["--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("schema", [PackOptions, PretrainOptions])
def test_every_key_stands_in_the_page_once_with_its_meaning(schema):
    lines = (ROOT / "docs" / "configuration.md").read_text().splitlines()
    for key, field in field_keys(schema).items():
        found = [line for line in lines if line.startswith(f"| `{key}` |")]
        assert len(found) == 1, key
        assert field.description, key
        assert " ".join(field.description.split()).replace("|", "\\|") in found[0]


def test_a_page_out_of_date_is_noticed(reference, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reference, "PAGE", tmp_path / "configuration.md")
    assert reference.main(["--check"]) == 1
    reference.main([])
    assert reference.main(["--check"]) == 0
    page = tmp_path / "configuration.md"
    page.write_text(page.read_text().replace("`tile.size`", "`tile.side`"))
    assert reference.main(["--check"]) == 1
    assert "+| `tile.size`" in capsys.readouterr().out


class _Example(Options):
    whole: int = Field(1, ge=0, le=9)
    """Whole."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share."""
    below: float | None = Field(None, ge=0, lt=1)
    """Below."""
    at_most: int = Field(3, le=4)
    """At most."""
    choice: Literal["a", "b"] = "a"
    """One | the other."""
    pairs: tuple[tuple[float, float], ...] = ()
    """Pairs."""
    mixed: tuple[int | str, ...] | None = None
    """Mixed."""
    mute: int = 0


def test_types_and_ranges_in_words(reference):
    rows = {name: reference.row(name, field) for name, field in _Example.model_fields.items() if name != "mute"}
    assert rows == {
        "whole": "| `whole` | whole number; 0 to 9 | `1` | Whole. |",
        "share": "| `share` | number; above 0, at most 1 | `0.5` | Share. |",
        "below": "| `below` | number or null; from 0, below 1 | `null` | Below. |",
        "at_most": "| `at_most` | whole number; at most 4 | `3` | At most. |",
        "choice": "| `choice` | `a`, `b` | `a` | One \\| the other. |",
        "pairs": "| `pairs` | list of [number, number] | `[]` | Pairs. |",
        "mixed": "| `mixed` | list of (whole number or text) or null | `null` | Mixed. |",
    }


def test_an_option_without_a_docstring_is_an_error(reference):
    with pytest.raises(ValueError, match="mute has no docstring"):
        reference.row("mute", _Example.model_fields["mute"])
