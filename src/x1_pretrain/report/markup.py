"""The smallest pieces of HTML, everything in them escaped."""

from __future__ import annotations

import html
import re


def esc(text: object) -> str:
    """For text and for attributes. Control characters, which no browser shows, become U+FFFD."""
    return html.escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]", "�", str(text)))


def place(share: float) -> str:
    """0.25 -> 25%"""
    return f"{share * 100:.2f}".rstrip("0").rstrip(".") + "%"


def tag(name: str, body: str, cls: str = "", id: str = "") -> str:
    """`body` is HTML already."""
    attributes = "".join(f' {key}="{esc(v)}"' for key, v in (("class", cls), ("id", id)) if v)
    return f"<{name}{attributes}>{body}</{name}>"


def sentence(text: str) -> str:
    """Escaped; what stands between backticks is code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", esc(text))
