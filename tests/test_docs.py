"""The pages are true: their Python runs and prints what they show, their tables are complete, and their
links lead somewhere.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tests.corpora import write_config
from x1_pretrain import config as cfg
from x1_pretrain import train
from x1_pretrain.command import run

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(
    [*DOCS.glob("*.md"), *(p for p in (ROOT / "README.md", ROOT / "CONTRIBUTING.md") if p.exists())]
)
EXAMPLE = re.compile(r"<!-- runs -->\n```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.S)
EXAMPLES = [
    pytest.param(page, *match.groups(), id=f"{page.stem}-{number}")
    for page in PAGES
    for number, match in enumerate(EXAMPLE.finditer(page.read_text(encoding="utf-8")), 1)
]


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------
# Examples


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder with the corpus, the config and the finished run that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(corpus, folder / "data" / "tiny")
    config = write_config(folder / "tiny.yaml", data={"dir": "data/tiny"})
    with contextlib.chdir(folder):
        assert run(train.app, ["--config", config.name]) == 0
    return folder


@pytest.mark.parametrize(("where", "code", "shown"), EXAMPLES)
def test_an_example_prints_what_the_page_shows(
    where: Path, code: str, shown: str | None, workplace: Path
) -> None:
    said = io.StringIO()
    with contextlib.chdir(workplace), contextlib.redirect_stdout(said):
        exec(compile(code, str(where), "exec"), {"__name__": "example"})
    assert said.getvalue() == (shown or "")


def test_every_mark_has_an_example() -> None:
    marks = sum(p.read_text(encoding="utf-8").count("<!-- runs -->\n") for p in PAGES)
    assert len(EXAMPLES) == marks >= 3


def test_the_blocks_in_the_page_are_those_that_were_read(workplace: Path) -> None:
    first = (workplace / "runs/tiny/blocks.jsonl").read_text().splitlines()[0]
    assert first[:88] in page("data-order.md")


# ------------------------------------------------------------------------------------------------------------
# config.md


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field's path and its default as the page writes it."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = next((a for a in get_args(kind) if isinstance(a, type) and issubclass(a, BaseModel)), None)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
            continue
        yield f"{prefix}{name}", written(field.default)
        if inner is not None:  # a section by name
            yield from fields(inner, f"{prefix}{name}.<name>.")


def written(default: Any) -> str:
    if default is PydanticUndefined:
        return "required"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def test_every_field_of_the_config_is_on_its_page_with_its_default() -> None:
    rows = re.findall(r"^\| `([a-z_.<>0-9]+)` \| (.+?) \| .{4,} \|$", page("config.md"), re.M)
    assert dict(rows) == dict(fields(cfg.RunConfig))


def test_every_field_that_may_change_is_on_the_page_of_checkpoints() -> None:
    for path in cfg.HARMLESS:
        assert f"`{path}`" in page("checkpoints.md"), path


def test_the_flags_of_train_are_on_the_page_of_the_config() -> None:
    source = (ROOT / "src/x1_pretrain/train.py").read_text(encoding="utf-8")
    main = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == "main")
    for argument in main.args.args:
        flag = "--" + argument.arg.strip("_").replace("_", "-")
        alias = {"--resume-from-latest": "--fresh"}.get(flag, flag)
        assert alias in page("config.md"), flag


# ------------------------------------------------------------------------------------------------------------
# the-loop.md

WRITERS = {  # the functions that make the rows of metrics.jsonl
    "train.py": {"log", "pace"},
    "evals/perplexity.py": {"evaluate"},
    "runtime/memory.py": {"reading"},
    "runtime/telemetry.py": {"row"},
    "runtime/host.py": {"row"},
    "learning/vitals.py": {"probe", "moment_norms"},
    "learning/noise.py": {"row"},
    "money/trainer_guard.py": {"row"},
    "runtime/run.py": {"counts", "row"},
    "runtime/mirror.py": {"row"},
}


def text_of(node: ast.expr) -> str | None:
    """A string, with `<>` where an f-string has a value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "<>" for v in node.values)
    return None


def keys_written(source: str, functions: set[str]) -> set[str]:
    """Keys of dict displays and of `x[key] = ...` in the named functions."""
    found: set[str | None] = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name not in functions:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Dict):
                found |= {text_of(key) for key in node.keys if key is not None}
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                found.add(text_of(node.slice))
    return {key for key in found if key}


def metric_names() -> set[str]:
    """The first column of the tables, with `<>` for `<corpus>` and `<domain>`."""
    return {
        re.sub(r"<\w+>", "<>", name) for name in re.findall(r"^\| `([^`]+)` \|", page("the-loop.md"), re.M)
    }


def test_every_metric_that_the_code_writes_is_on_the_page() -> None:
    for file, functions in WRITERS.items():
        source = (ROOT / "src/x1_pretrain" / file).read_text(encoding="utf-8")
        written_keys = keys_written(source, functions) - {"ranks", "blocks"}  # of blocks.jsonl
        assert written_keys, file
        assert written_keys <= metric_names(), file


def test_every_metric_of_a_real_run_is_on_the_page(workplace: Path) -> None:
    names = {re.sub("<>", r"[^/]+", re.escape(name)) for name in metric_names()}
    for line in (workplace / "runs/tiny/metrics.jsonl").read_text().splitlines():
        for key in json.loads(line):
            assert any(re.fullmatch(name, key) for name in names), key


def test_the_collector_of_keys_sees_each_way_of_writing_one() -> None:
    logging = 'def log(r):\n x = {"a/b": 1}\n x["c"] = 2\n x[f"m/{r}"] = 3\n x |= {"d": 4}\n'
    source = logging + 'def other():\n return {"e": 1}'
    assert keys_written(source, {"log"}) == {"a/b", "c", "m/<>", "d"}


def test_only_the_loop_appends_to_the_metrics() -> None:
    appending = [
        p.relative_to(ROOT / "src/x1_pretrain").as_posix()
        for p in (ROOT / "src").rglob("*.py")
        if ".metrics.append(" in p.read_text(encoding="utf-8")
    ]
    assert appending == ["train.py"]  # another writer belongs into WRITERS


def test_every_event_is_on_the_page() -> None:
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        found |= set(re.findall(r"run\.(?:event|note)\(\s*\"(\w+)\"", file.read_text(encoding="utf-8")))
    assert {"start", "checkpoint", "finish"} <= found
    for name in found:
        assert f"`{name}`" in page("the-loop.md"), name


# ------------------------------------------------------------------------------------------------------------
# All pages


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def anchors(file: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.M)}


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_relative_links_lead_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{file.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{file.name}: {link}"


@pytest.mark.parametrize("file", PAGES, ids=lambda p: p.name)
def test_no_page_names_a_path_of_a_developers_machine(file: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt)/\S*", file.read_text(encoding="utf-8"))
    assert not found
