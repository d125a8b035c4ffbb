"""A `Page` as one HTML file that needs nothing else: style, script, pictures and data are inside.

A policy in its head forbids it to load anything, and to run any script but its own.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from x1_pretrain.report import charts, markdown
from x1_pretrain.report.blocks import (
    Block,
    Chart,
    Facts,
    Folded,
    Happened,
    Line,
    Link,
    Markdown,
    Page,
    Picture,
    Said,
    Section,
    Stack,
    Strip,
    Table,
    Verbatim,
    Views,
)
from x1_pretrain.report.markup import esc, place, sentence, tag

STYLE = Path(__file__).with_name("style.css")
SCRIPT = Path(__file__).with_name("script.js")
WIDE = 5  # columns, from which on a narrow screen shows a card a row
LONG_TEXT = 240  # letters of a sample, from which on the rest is folded


def html(page: Page) -> str:
    script = SCRIPT.read_text(encoding="utf-8")
    contents = "".join(f'<li><a href="#{s.id}">{esc(s.title)}</a></li>' for s in page.sections)
    body = (
        '<a class="skip" href="#main">Skip to the report</a>'
        f"{_head(page)}"
        f'<nav aria-label="Sections"><ol>{contents}</ol></nav>'
        f'<main id="main" tabindex="-1">{"".join(map(_section, page.sections))}</main>'
        "<footer>Every number here was read from the run's own files. What they do not hold is not measured."
        "</footer>"
    )
    refresh = f' data-refresh="{page.refresh_s:g}"' if page.refresh_s else ""
    without = _without_script(page.refresh_s)
    return (
        f'<!doctype html>\n<html lang="en"{refresh}>\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{esc(page.title)}: report</title>\n{without}"
        f"<style>{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n{body}\n"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def _policy(script: str) -> str:
    """Nothing is fetched; of scripts only the one whose content is this."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )


def _without_script(refresh_s: float | None) -> str:
    if not refresh_s:
        return ""
    return f'<noscript><meta http-equiv="refresh" content="{refresh_s:g}"></noscript>\n'


def _head(page: Page) -> str:
    bar = ""
    if page.share_done is not None:
        done = f"{page.share_done:.0%}"
        bar = (
            f'<div class="progress" role="progressbar" aria-label="steps done" aria-valuemin="0" '
            f'aria-valuemax="100" aria-valuenow="{page.share_done * 100:.0f}">'
            f'<div style="width:{place(page.share_done)}" title="{done}"></div></div>'
        )
    return (
        f'<header><p class="kicker">{esc(page.kicker)}</p><h1>{esc(page.title)}</h1>'
        f'<p class="state {page.tone}">{esc(page.state)}</p>{bar}{_blocks(page.lead)}</header>'
    )


def _section(section: Section) -> str:
    name = f"{section.id}-heading"
    return (
        f'<section id="{section.id}" aria-labelledby="{name}"><h2 id="{name}">{esc(section.title)}</h2>'
        f"{_blocks(section.blocks)}</section>"
    )


def _blocks(blocks: Sequence[Block]) -> str:
    return "".join(map(_block, blocks))


def _block(block: Block) -> str:
    match block:
        case Line():
            return tag("p", sentence(block.text), cls=f"line {block.tone}".strip())
        case Facts():
            return _facts(block)
        case Table():
            return _table(block)
        case Chart():
            return charts.chart(block)
        case Views():
            return _views(block)
        case Stack():
            return charts.stack(block)
        case Strip():
            return charts.strip(block)
        case Said():
            return _said(block)
        case Happened():
            return _happened(block)
        case Picture():
            data = base64.b64encode(block.png).decode()
            image = f'<img alt="{esc(block.text)}" src="data:image/png;base64,{data}">'
            said = f'tabindex="0" role="region" aria-label="{esc(block.text)}"'
            return f'<figure><div class="scroll picture" {said}>{image}</div></figure>'
        case Link():
            return f'<p class="line"><a href="{esc(block.target)}">{esc(block.text)}</a></p>'
        case Folded():
            return _folded(block.title, _blocks(block.blocks))
        case Verbatim():
            return f'<pre tabindex="0">{esc(block.text)}</pre>'
        case Markdown():
            return tag("div", markdown.html(block.text), cls="prose")


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{body}</details>"


def _facts(facts: Facts) -> str:
    items = (
        f"<div><dt>{esc(name)}</dt><dd><b>{esc(value)}</b>"
        f"{f'<span>{esc(aside)}</span>' if aside else ''}</dd></div>"
        for name, value, aside in facts.items
    )
    return f'<dl class="facts">{"".join(items)}</dl>'


def _table(table: Table) -> str:
    head = "".join(_cell("th", text, n, table, ' scope="col"') for n, text in enumerate(table.head))
    rows = (
        "<tr>"
        + "".join(
            _cell("th", text, n, table, ' scope="row"') if n == 0 else _cell("td", text, n, table)
            for n, text in enumerate(row)
        )
        + "</tr>"
        for row in table.rows
    )
    cards = ' class="cards"' if table.text_columns - {0} or len(table.head) > WIDE else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(table.caption)}"><table{cards}>'
        f"<caption>{esc(table.caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div>"
    )


def _cell(name: str, text: str, column: int, table: Table, more: str = "") -> str:
    number = "" if column in table.text_columns else ' class="number"'
    named = (name == "td" or (number and 'scope="row"' in more)) and column < len(table.head)
    titled = f' data-head="{esc(table.head[column])}"' if named else ""
    return f"<{name}{more}{number}{titled}>{esc(text)}</{name}>"


def _views(views: Views) -> str:
    """Choices that need no script: each shows the figure behind it."""
    choices, figures = [], []
    for number, (name, chart) in enumerate(views.views):
        key, checked = f"{views.id}-{number}", "" if number else " checked"
        choices.append(
            f'<input type="radio" name="{views.id}" id="{key}" class="v{number}"{checked}>'
            f'<label for="{key}">{esc(name)}</label>'
        )
        figures.append(f'<div class="view w{number}">{charts.chart(chart)}</div>')
    label = f'role="radiogroup" aria-label="view of {esc(views.views[0][1].title)}"'
    return f'<div class="views" {label}>{"".join(choices)}{"".join(figures)}</div>'


def _said(said: Said) -> str:
    more = ""
    if said.more:
        more = _folded(f"{len(said.more)} checkpoints in between", _texts(said.prompt, said.more))
    prompt = f"<h3>“{esc(said.prompt.strip() or said.prompt)}”</h3>"
    return f'<div class="said">{prompt}{_texts(said.prompt, said.texts)}{more}</div>'


def _texts(prompt: str, texts: Sequence[tuple[str, str]]) -> str:
    items = (f"<li><span>{esc(at)}</span>{_text(prompt, text)}</li>" for at, text in texts)
    return f"<ol>{''.join(items)}</ol>"


def _text(prompt: str, text: str) -> str:
    """The prompt in grey, what came after it, the far end folded."""
    begin = f"<i>{esc(prompt)}</i>"
    if len(text) <= LONG_TEXT:
        return f"<blockquote>{begin}{esc(text)}</blockquote>"
    cut = text.rfind(" ", LONG_TEXT // 2, LONG_TEXT)
    cut = LONG_TEXT if cut < 0 else cut
    rest = f"<details><summary>the rest</summary><blockquote>{esc(text[cut:])}</blockquote></details>"
    return f"<blockquote>{begin}{esc(text[:cut])} …</blockquote>{rest}"


def _happened(block: Happened) -> str:
    if not block.more:
        return _timeline(block.rows)
    half = len(block.rows) // 2
    middle = _folded(f"{len(block.more)} more in between", _timeline(block.more))
    return _timeline(block.rows[:half]) + middle + _timeline(block.rows[half:])


def _timeline(rows: Sequence[tuple[str, str, str, str]]) -> str:
    items = (
        f'<li><span class="when">{esc(when)}</span><span class="step">step {esc(step)}</span>'
        f"<b>{esc(kind)}</b> <span>{sentence(said)}</span></li>"
        for when, step, kind, said in rows
    )
    return f'<ol class="timeline">{"".join(items)}</ol>'
