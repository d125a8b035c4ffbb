"""The Markdown that a post-mortem is written in, as HTML: headings, paragraphs, tables, lists, bold, code.

Not more: everything else is shown as it was written, and all of it is escaped. A picture is left out, as the
page carries it already, and of a link the words stay.
"""

from __future__ import annotations

import re
from itertools import groupby, zip_longest

from x1_pretrain.report.markup import esc, tag

PICTURE = re.compile(r"!\[[^\]]*\]\([^)]*\)")
LINK = re.compile(r"\[([^\]]+)\]\([^)\s]+\)")
HEADING = re.compile(r"(#{1,6}) +(.*)")
ITEM = re.compile(r" {0,3}(?:[-*+]|(\d+)\.) +(.*)")
RULE = re.compile(r"\|?( *:?-+:? *\|)* *:?-+:? *\|?")
SPANS = re.compile(r"(?<!`)(`+)(?!`)(?P<code>.+?)(?<!`)\1(?!`)|\*\*(?P<bold>(?:(?!\*\*)[^`]|`[^`]*`)+)\*\*")
VERDICT = "**Verdict.**"


def html(text: str) -> str:
    """Safe HTML of a whole document; its highest heading is an `h3`, as it stands within a section."""
    return "".join(_block(block) for block in _blocks(text))


def verdict(text: str) -> list[str]:
    """What each verdict in it says, as one line without the marks."""
    found = [block for block in _blocks(text) if block[0].startswith(VERDICT)]
    return [" ".join(map(str.strip, lines)).removeprefix(VERDICT).strip() for lines in found]


def _blocks(text: str) -> list[list[str]]:
    """Runs of lines between empty ones; a heading is a block by itself."""
    lines = [PICTURE.sub("", line).rstrip() for line in text.splitlines()]
    kinds = groupby(enumerate(lines), key=lambda it: it[0] + 1 if HEADING.fullmatch(it[1]) else not it[1])
    return [found for _, group in kinds if (found := [line for _, line in group])[0]]


def _block(lines: list[str]) -> str:
    if heading := HEADING.fullmatch(lines[0]):
        return tag(f"h{min(6, 2 + len(heading[1]))}", spans(heading[2]))
    if len(lines) > 1 and "|" in lines[0] and RULE.fullmatch(lines[1].strip()):
        return _table(lines)
    first = next((n for n, line in enumerate(lines) if ITEM.fullmatch(line)), len(lines))
    before = tag("p", spans(" ".join(lines[:first])), cls="line") if first else ""
    return before + (_list(lines[first:]) if first < len(lines) else "")


def _list(lines: list[str]) -> str:
    """A line that begins no item goes on with the one before."""
    items: list[str] = []
    for line in lines:
        if found := ITEM.fullmatch(line):
            items.append(found[2])
        else:
            items[-1] += f" {line.strip()}"
    first = ITEM.fullmatch(lines[0])
    kind = "ol" if first and first[1] else "ul"
    return tag(kind, "".join(tag("li", spans(item)) for item in items), cls="line")


def _table(lines: list[str]) -> str:
    heads = _cells(lines[0])
    numbers = [cell.endswith("-:") for cell in _cells(lines[1])]
    head = "".join(tag("th", spans(one), cls=_class(n, numbers)) for n, one in enumerate(heads))
    rows = (tag("tr", _row(_cells(line), heads, numbers)) for line in lines[2:])
    table = f'<table class="cards"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table">{table}</div>'


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|").removesuffix("|")
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _row(cells: list[str], heads: list[str], numbers: list[bool]) -> str:
    """The first cell names the row; the others carry their heads, for a screen too narrow for columns."""
    made = [tag("th", spans(cells[0]), cls=_class(0, numbers))]
    for column, (cell, head) in enumerate(zip_longest(cells[1:], heads[1:], fillvalue=""), 1):
        cls = f' class="{found}"' if (found := _class(column, numbers)) else ""
        made.append(f'<td{cls} data-head="{esc(head)}">{spans(cell)}</td>')
    return "".join(made)


def _class(column: int, numbers: list[bool]) -> str:
    return "number" if column < len(numbers) and numbers[column] else ""


def spans(text: str) -> str:
    """Bold and code; escaped piece by piece, so that no mark reaches over another's end."""
    made, place = [], 0
    for found in SPANS.finditer(text):
        made.append(_plain(text[place : found.start()]))
        code, bold = found["code"], found["bold"]
        made.append(tag("code", esc(code)) if code is not None else tag("b", spans(bold)))
        place = found.end()
    return "".join([*made, _plain(text[place:])])


def _plain(text: str) -> str:
    return esc(LINK.sub(r"\1", text))
