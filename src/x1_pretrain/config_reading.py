"""The config as a YAML file: read, overridden, refused in words that name the field, and written again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from x1_pretrain.config import CorpusConfig, RunConfig
from x1_pretrain.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `3e-4` is a number, `off` is a word, a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - a copy of the parent's, without yes, no, on, off as booleans
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _mapping_without_twins(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{key}' is given twice", key_node.start_mark
            )
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_twins)


def parse_yaml(text: str, origin: str) -> Any:
    """The value in `text`; an error names `origin` and the line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise UserError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """`training.total_steps=100` -> ("training.total_steps", 100)."""
    path, sign, value = text.partition("=")
    if not sign or not path.strip():
        raise UserError(
            f"--set {text}: expected section.field=value, for example --set training.total_steps=100"
        )
    return path.strip(), parse_yaml(value, f"--set {path.strip()}")


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, leaf = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise UserError(f"--set {path}: '{key}' is a value, not a section")
    tree[leaf] = value


def load_config(file: Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read `file`, apply `overrides` (dotted path -> value), and check every field."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--config {file}: can't be read ({reason})") from None
    tree = parse_yaml(text, str(file))
    if not isinstance(tree, dict):
        raise UserError(
            f"{file}: expected sections (name, model, training, ...), found {type(tree).__name__}"
        )
    if isinstance(tree.get("mirror"), str):  # the short form
        tree["mirror"] = {"uri": tree["mirror"]}
    for path, value in (overrides or {}).items():
        _put(tree, path, value)
    return parse_config(tree, str(file))


def parse_config(tree: Mapping[str, Any], origin: str) -> RunConfig:
    """Check a tree of plain values; every problem is named in one line."""
    try:
        return RunConfig.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{origin}: {_problems(error.errors())}") from None
    except TypeError as error:  # YAML can hold what JSON can't: dates, sets
        raise UserError(f"{origin}: {error}; use plain numbers, strings, lists and sections") from None


def _problems(details: Iterable[Any]) -> str:
    """Each wrong field once, with the value found and what was expected."""
    by_path: dict[str, list[str]] = {}
    for detail in details:
        path, problem = _problem(detail)
        by_path.setdefault(path, []).append(problem)
    return "; ".join(
        f"{path}: {_joined(found)}" if path else _joined(found) for path, found in by_path.items()
    )


def _joined(problems: list[str]) -> str:
    """A field of several kinds fails as each of them: `expected a or b, found x`."""
    if len(problems) == 1:
        return problems[0]
    wanted = [p.removeprefix("expected ").rpartition(", found ")[0] for p in problems]
    return f"expected {' or '.join(wanted)}, found {problems[0].rpartition(', found ')[2]}"


def _problem(detail: Any) -> tuple[str, str]:
    """The field's path and what is wrong with it."""
    parts = [str(part) for part in detail["loc"]]
    if parts and re.search(r"\[|^constrained|^(int|str)$", parts[-1]):
        parts.pop()  # pydantic's name for one kind of several
    return ".".join(parts), _reason(detail)


def _reason(detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        known = _fields_at(detail["loc"][:-1])
        near = get_close_matches(str(detail["loc"][-1]), known, n=1, cutoff=0.5)
        return "unknown key" + (f", did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")
    if detail["type"] == "missing":
        return "missing"
    message = re.sub(r"^Value error, |^Input should be ", "", detail["msg"])
    if detail["type"] == "value_error":
        return message
    return f"expected {message}, found {detail['input']!r}"


def _fields_at(location: Iterable[Any]) -> list[str]:
    section: type[BaseModel] = RunConfig
    for part in location:
        field = section.model_fields.get(str(part))
        kind = field.annotation if field else None
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            return list(CorpusConfig.model_fields) if "corpora" in location else []
        section = kind
    return list(section.model_fields)


def to_yaml(config: RunConfig) -> str:
    """The resolved config, as it is written into the run folder."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
