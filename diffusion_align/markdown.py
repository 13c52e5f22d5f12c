"""Texts of whatever content in Markdown: shown as they are, and not obeyed."""

from __future__ import annotations

import re


def literal(text: str) -> str:
    """``text`` as code: markup in it is shown and not obeyed."""
    text = " ".join(text.split())
    ticks = fence(text, least=1)
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def fence(text: str, *, least: int) -> str:
    """More backticks than ``text`` has in a row, so that nothing in it ends the code."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def plain(text: str) -> str:
    """``text`` in prose, without what Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", " ".join(text.split()))


def cell(text: str) -> str:
    """``text`` inside a table, where a bar or a new line would end the cell."""
    return " ".join(text.replace("|", "\\|").split())
