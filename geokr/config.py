"""Configuration: a YAML file and dotted ``key=value`` overrides become one typed, immutable object.

The schemas themselves are :mod:`geokr.options` (pretraining) and :mod:`preprocess.options` (packing);
this module is what they share: strict YAML, overrides, and errors that name file and key.
"""

import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file, key and remedy."""


class Options(BaseModel):
    """Base of every section: no unknown keys, no change after validation, no silent coercion of text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


OptionsT = TypeVar("OptionsT", bound=Options)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader (no ``!!python`` tags) that refuses duplicate keys and reads ``1e-3`` as a number."""


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, Hashable):
            raise ConfigError(f"line {key_node.start_mark.line + 1}: {key!r} cannot be a key; expected a word")
        if key in seen:
            line = key_node.start_mark.line + 1
            raise ConfigError(f"duplicate key {key!r} in line {line}: keep one of the two")
        seen.add(key)
    return loader.construct_mapping(node)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
# YAML 1.1, which PyYAML follows, reads on, off, yes and no as truth values; YAML 1.2 reads words, as train.compile
# wants them. Where a key is a truth value, pydantic takes those words too. Dates stay words as well: no key is one,
# and the 30th of February would be an error that names no key.
_BOOL, _DATE = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:timestamp"
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _DATE)]
    for first, resolvers in _StrictLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
# YAML 1.1, which PyYAML follows, wants a dot in a float, so it reads 1e-3 as text; YAML 1.2 does not.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads a YAML mapping. Raises ConfigError for a missing file, bad syntax, duplicate keys or no mapping."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    return parse_yaml(text, where=str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """The mapping in ``text``; ``where`` names its origin in errors."""
    loaded = _value(text, where)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{where}: expected a mapping of keys to values, got {type(loaded).__name__}")
    return loaded


def _value(text: str, where: str) -> Any:
    """What a YAML text holds."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: not valid YAML: too deeply nested") from error


_OVERRIDE = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*)=(.*)$", re.DOTALL)


def split_overrides(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into (other arguments, ``key=value`` overrides).

    A bare ``key=value`` is an override wherever it stands, even between the values of another option.
    A path such as ``date=2020/scene.tif`` is not: what stands before ``=`` there is no dotted key, unless
    the path says so; write ``./date=2020/scene.tif``.
    """
    others, overrides = [], []
    for argument in arguments:
        (overrides if _OVERRIDE.match(argument) else others).append(argument)
    return others, overrides


def _check_whole(key: str, text: str) -> None:
    """Raises ConfigError for a value of which YAML takes the end for a comment: a path may hold `` #``."""
    node = yaml.compose(text, Loader=_StrictLoader)
    rest = text[node.end_mark.index if node else 0 :].strip()
    if rest.startswith("#"):
        raise ConfigError(
            f"override {key}: {rest!r} would be a comment and be left out; with quotes: {key}='\"{text}\"'"
        )


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["optim.lr=1e-3"]`` to ``{"optim.lr": 0.001}``; values are YAML."""
    parsed: dict[str, Any] = {}
    for override in overrides:
        match = _OVERRIDE.match(override)
        if not match:
            raise ConfigError(f"override {override!r}: expected key=value, such as optim.lr=1e-3")
        key, text = match.groups()
        if key in parsed:
            raise ConfigError(f"override {key}: given twice; keep one")
        try:
            parsed[key] = _value(text, f"override {override!r}")
            _check_whole(key, text)
        except ConfigError as error:
            if text[:1] not in set("{*&!%@`"):
                raise
            raise ConfigError(f"{error}\ntext that begins with {text[0]} needs quotes: {key}='\"{text}\"'") from error
    return parsed


def field_keys(schema: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted leaf key of a schema and its field, in the order they are declared."""
    keys: dict[str, FieldInfo] = {}
    for name, field in schema.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            keys.update(field_keys(annotation, f"{prefix}{name}."))
        else:
            keys[prefix + name] = field
    return keys


def suggestion(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` or an empty string."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:  # a key given without its section
        close = [key for key in known if key.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:1]
    return f" (did you mean {close[0]!r}?)" if close else ""


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets ``a.b.c`` in nested mappings, making the ones on the way."""
    *sections, leaf = dotted.split(".")
    for section in sections:
        node = tree.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{dotted}: {section!r} holds a value, not a section")
        tree = node
    tree[leaf] = value


def _known_sections(keys: Iterable[str]) -> set[str]:
    return {key[:i] for key in keys for i, char in enumerate(key) if char == "."}


def _flat(tree: Mapping[str, Any], sections: set[str], prefix: str = "") -> Iterable[str]:
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        if isinstance(value, Mapping) and dotted in sections:
            yield from _flat(value, sections, dotted + ".")
        else:
            yield dotted


def check_keys(schema: type[Options], tree: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError for the first key the schema does not have, with the nearest one it has."""
    keys = field_keys(schema)
    sections = _known_sections(keys)
    for dotted in _flat(tree, sections):
        if dotted not in keys and dotted not in sections:
            raise ConfigError(f"{where}: unknown key {dotted!r}{suggestion(dotted, list(keys) + sorted(sections))}")


def build(schema: type[OptionsT], tree: Mapping[str, Any], where: str) -> OptionsT:
    """Validates a nested mapping against a schema; ConfigError names origin, key, expectation and value."""
    check_keys(schema, tree, where)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"]) or "(the whole configuration)"
            message = item["msg"].removeprefix("Value error, ")
            got = "" if item["type"] in {"value_error", "missing"} else f"; got {item['input']!r}"
            lines.append(f"{where}: {key}: {message}{got}")
        raise ConfigError("\n".join(lines)) from error


def load(schema: type[OptionsT], path: str | Path | None, overrides: Iterable[str] = ()) -> OptionsT:
    """File (or the defaults where it is None), then overrides, then validation.

    A schema may define ``exclusive: dict[str, str]``: setting one key by override clears the other, so that
    ``train.epochs=3`` over a file with ``train.max_steps`` means what it says.
    """
    tree = read_yaml(path) if path is not None else {}
    where = str(path) if path is not None else "defaults"
    check_keys(schema, tree, where)
    parsed = parse_overrides(overrides)
    exclusive: dict[str, str] = getattr(schema, "exclusive", {})
    for key in parsed:
        if key in exclusive and exclusive[key] not in parsed:
            set_key(tree, exclusive[key], None)
    for key, value in parsed.items():
        if key not in field_keys(schema):
            known = list(field_keys(schema))
            raise ConfigError(f"override {key}={value!r}: unknown key{suggestion(key, known)}")
        set_key(tree, key, value)
    return build(schema, tree, f"{where} + overrides" if parsed else where)


def to_yaml(options: BaseModel) -> str:
    """The resolved configuration, every key written out, as YAML that :func:`load` reads back."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every leaf in which two nested mappings differ."""
    lines: list[str] = []
    for key in list(old) + [key for key in new if key not in old]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines
