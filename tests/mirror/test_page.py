"""The page of the mirror is true: the lines that it explains are lines of the code, its JSON is JSON, its
commands and flags exist.
"""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from x1_pretrain.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "mirror.md").read_text(encoding="utf-8")


def said() -> list[str]:
    """What the tables of the page quote of what the code says, between backticks in a first column."""
    tables = PAGE.split("## One writer")[1].split("## What is in")[0], PAGE.split("error line means")[-1]
    first = re.findall(r"^\| (`.+?`)[^|]* \|", "\n".join(tables), re.M)
    return [quoted for cell in first for quoted in re.findall(r"`([^`]+)`", cell) if " " in quoted]


@cache
def strings() -> str:
    """Every text in the code, one a line, with `<>` where a value goes."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "<>" for v in node.values]
                found.append("".join(parts))
    return "\n".join(found)


@pytest.mark.parametrize("line", said())
def test_the_code_says_what_the_page_explains(line: str) -> None:
    for part in re.split(r"\.\.\.|<>", line):
        assert part.strip(" ;,?()") in strings(), part


def test_there_is_much_to_explain() -> None:
    assert len(said()) > 20


def test_the_policy_is_json() -> None:
    (policy,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    actions = [one["Action"] for one in json.loads(policy)["Statement"]]
    assert "s3:ListBucket" in actions
    rule = re.search(r"--lifecycle-configuration \\\n\s+'(.*?)'", PAGE, re.S)
    assert rule is not None
    assert json.loads(rule.group(1))["Rules"][0]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] > 0


def test_the_map_of_the_room_names_each_file_and_no_other() -> None:
    room = ROOT / "src" / "x1_pretrain" / "mirror"
    files = {file.stem for file in room.glob("*.py")} - {"__init__"}
    told = (room / "__init__.py").read_text(encoding="utf-8").split("\n\n")[2]
    words = set(re.findall(r"\w+", told))
    assert files - words == set()
    assert {word for word in words if "_" in word} - files == set()


def test_its_verbs_exist() -> None:
    assert set(re.findall(r"(?:^ {4}|`)x1 ([a-z]+)", PAGE, re.M)) <= {*VERBS, "demo"}
