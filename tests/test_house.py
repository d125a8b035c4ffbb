"""The rule of the house that imports can break: no file needs one that needs it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
IMPORT = re.compile(r"^ *(?:from (x1_pretrain[\w.]*) import (\([^)]*\)|.*)|import (x1_pretrain[\w.]*))", re.M)


def needs(file: Path) -> Iterator[Path]:
    """The files of the package that a file imports: at once, in a function or for its types alone."""
    for module, names, alone in IMPORT.findall(file.read_text(encoding="utf-8")):
        for name in (module, alone, *(f"{module}.{one}" for one in re.findall(r"\w+", names))):
            if (found := SOURCE / f"{name.replace('.', '/')}.py").exists():
                yield found


def test_no_file_needs_one_that_needs_it() -> None:
    graph = {file: set(needs(file)) for file in SOURCE.rglob("*.py")}
    assert sum(map(len, graph.values())) > 1000  # else imports are not found
    TopologicalSorter(graph).prepare()  # CycleError names the circle
