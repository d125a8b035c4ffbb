"""The post-mortem's Markdown as HTML: what it writes is shown, what it does not write is only text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.reading import Reading
from x1_pretrain.report import markdown

PAGE = """# Spike post-mortem: a

## Step 201: recovered

**Verdict.** It was made on purpose:
rare tokens in `steps.jsonl` **and** more.

![Loss](spike.png)

| norm | metric | before |
| --- | --- | ---: |
| all | `a*b` | 0.4 |

- one
  goes on
- two
Last words.
"""


def test_each_kind_becomes_its_own_element() -> None:
    made = markdown.html(PAGE)
    page = Reading(made)
    assert made.startswith("<h3>Spike post-mortem: a</h3><h4>Step 201: recovered</h4>")
    assert (
        "<b>Verdict.</b> It was made on purpose: rare tokens in <code>steps.jsonl</code> <b>and</b>" in made
    )
    assert "img" not in page.tags
    assert "spike.png" not in made
    assert '<th class="number">before</th>' in made
    row = '<td data-head="metric"><code>a*b</code></td><td class="number" data-head="before">0.4</td>'
    assert f"<tr><th>all</th>{row}</tr>" in made
    assert page.tags.count("li") == 2
    assert "<li>one goes on</li>" in made


def test_the_verdict_is_found_without_its_marks() -> None:
    said = "It was made on purpose: rare tokens in `steps.jsonl` **and** more."
    assert markdown.verdict(PAGE) == [said]
    assert markdown.verdict("no such thing") == []


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("`a ** b` and `c ** d`", "<code>a ** b</code> and <code>c ** d</code>"),
        ("``x ` y``", "<code>x ` y</code>"),
        ("**a `b` c**", "<b>a <code>b</code> c</b>"),
        ("**open", "**open"),
        ("`<img src=x>` **<i>**", "<code>&lt;img src=x&gt;</code> <b>&lt;i&gt;</b>"),
        ("[name](javascript:alert(1))", "name)"),
        ("<b>&\"'", "&lt;b&gt;&amp;&quot;&#x27;"),
    ],
)
def test_marks_within_a_line(text: str, wanted: str) -> None:
    assert markdown.spans(text) == wanted


@given(st.text(alphabet="ab<>&\"'`*|#-[]()!\\ \n1.", max_size=80))
def test_nothing_that_is_written_becomes_another_element(text: str) -> None:
    page = Reading(markdown.html(text))
    known = {"h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "b", "code", "div", "table"}
    assert set(page.tags) <= known | {"thead", "tbody", "tr", "th", "td"}
    assert {name for _, name, _ in page.attributes} <= {
        "class",
        "tabindex",
        "role",
        "aria-label",
        "data-head",
    }
