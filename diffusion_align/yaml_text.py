"""YAML as people write settings: no tags, no aliases, no key twice, and no number that may be read in two ways.

A bare word such as ``no``, ``7e10`` or ``2024-11-30`` is text, a number or true and false by the requested type, which
only a setting knows. ``parse(..., unread=True)`` leaves such words ``Unread``; without it they are read as they look.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LARGEST = 10_000_000
"""Bytes of a file that is still read: YAML takes minutes for more."""
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_INTEGER = re.compile(r"[+-]?(0|[1-9]\d*)", re.ASCII)
_FLOAT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_SPECIAL = re.compile(r"([+-]?)\.(inf|Inf|INF|nan|NaN|NAN)")
# Octal, binary, hexadecimal, with underscores, sexagesimal: each a number in one YAML and text or another in the next.
ODD_NUMBER = re.compile(
    r"[+-]?(0[0-9_]+|0o[0-7_]+|0b[01_]+|0x[0-9a-fA-F_]+|\d[\d_]*_[\d_]*(\.[\d_]*)?([eE][+-]?\d+)?|"
    r"\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?)",
    re.ASCII,
)
_NULL = {"", "~", "null", "Null", "NULL"}
_TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_WORDS = {
    word: value
    for lower, value in {"yes": True, "on": True, "no": False, "off": False}.items()
    for word in (lower, lower.capitalize(), lower.upper())
}
_ROWS = ("prompts", "show_prompts")  # settings that hold data
_MOST_DIGITS, _DEEPEST = 100, 50


class YamlProblem(ValueError):
    """Why a text is not read, without its line.

    Attributes:
        line: from 1, None where it is the whole text.
        place: keys that lead to it, as far as they are known.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line
        self.place: list[str] = []

    @property
    def where(self) -> str:
        return "" if self.line is None else f" (line {self.line})"


@dataclass(frozen=True)
class Unread:
    """A bare word that may be more than text."""

    text: str
    line: int

    @property
    def is_null(self) -> bool:
        return self.text in _NULL

    @property
    def is_false(self) -> bool:
        return _TRUTH.get(self.text, _WORDS.get(self.text)) is False

    def number(self) -> int | float | None:
        """The number that it is, None if it is none or not plainly one."""
        if ODD_NUMBER.fullmatch(self.text):
            return None
        if _INTEGER.fullmatch(self.text) and len(self.text) <= _MOST_DIGITS:
            return int(self.text)
        if match := _SPECIAL.fullmatch(self.text):
            return float(match[1] + match[2].lower())
        if _FLOAT.fullmatch(self.text) and len(self.text) <= _MOST_DIGITS:
            value = float(self.text)
            return value if abs(value) != float("inf") else None
        return None

    def natural(self, *, in_row: bool = False) -> Any:
        """None, true or false, a number or text, as it looks.

        Args:
            in_row: whether it is a cell of data, where 1e5 is text.

        Raises:
            YamlProblem: it may be a number, but which one is not plain.
        """
        if self.is_null:
            return None
        if self.text in _TRUTH or self.text in _WORDS:
            return _TRUTH.get(self.text, _WORDS.get(self.text))
        number = None if in_row and EXPONENT.fullmatch(self.text) else self.number()
        if number is None and not EXPONENT.fullmatch(self.text) and (reason := odd_number(self.text)):
            raise YamlProblem(reason, self.line)
        return self.text if number is None else number

    def as_row(self) -> Any:
        """The same of a text among others: any word is one, but plain numbers are not taken for texts."""
        if self.is_null or self.text in _TRUTH:
            return self.natural()
        number = None if EXPONENT.fullmatch(self.text) else self.number()
        return self.text if number is None else number


def odd_number(text: str) -> str | None:
    """What to do about a text that is a number, but not a plain one; None for all others."""
    shown = text if len(text) <= 40 else text[:37] + "..."
    if ODD_NUMBER.fullmatch(text):
        return f"{shown} can mean more than one number: write it in plain decimal digits, or in quotes if it is text"
    if _FLOAT.fullmatch(text) and Unread(text, 0).number() is None:
        return f"{shown} is too large or too long a number: write a smaller one, or in quotes if it is text"
    return None


def parse(text: str, *, unread: bool = False) -> Any:
    """What a YAML text holds: mappings, lists, texts, numbers, true, false and None.

    Args:
        text: one document.
        unread: leave bare words that may be more than text ``Unread``.

    Raises:
        YamlProblem: it is no YAML, or holds tags, aliases, a key twice or a number that is not plain.
    """
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error)
        if reason.startswith("but "):
            reason = f"{getattr(error, 'context', '')}, {reason}"
        raise YamlProblem(reason.splitlines()[0], mark.line + 1 if mark else None) from None
    return value if unread else natural(value)


def read(path: Path, *, unread: bool = False) -> Any:
    """``parse`` of a file in UTF-8.

    Raises:
        OSError: it cannot be read.
        YamlProblem: see ``parse``.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise YamlProblem(f"it has more than {LARGEST:,} bytes: keep long lists in files of their own")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise YamlProblem("it is not text in UTF-8: save it as UTF-8", line) from None
    return parse(text, unread=unread)


def dump(value: Any, **options: Any) -> str:
    """``value`` as YAML that ``parse`` and other readers of YAML read back alike; options of ``yaml.dump``."""
    return str(yaml.dump(value, Dumper=_Dumper, **options))


def natural(value: Any, *, rows: bool = False) -> Any:
    """``value`` with every bare word in it read as it looks.

    Args:
        value: from ``parse(..., unread=True)``; what is read already is left alone.
        rows: whether it is data: a list of texts, or of mappings.

    Raises:
        YamlProblem: see ``Unread.natural``.
    """
    if isinstance(value, Unread):
        return value.natural(in_row=rows)
    if isinstance(value, dict):
        return {key: _below(key, inner, rows=rows or key in _ROWS) for key, inner in value.items()}
    if isinstance(value, list):
        return [item.as_row() if rows and isinstance(item, Unread) else natural(item, rows=rows) for item in value]
    return value


def _below(key: Any, value: Any, *, rows: bool) -> Any:
    try:
        return natural(value, rows=rows)
    except YamlProblem as problem:
        problem.place.insert(0, str(key))
        raise


class _Loader(yaml.SafeLoader):
    """Loads the safe subset without tags, anchors and merges; resolves nothing but ``Unread``."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (declared so by the base class)
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refused(
                "aliases (*name) and anchors (&name) are not read: write the value out, or quote text", event
            )
        if getattr(event, "tag", None) is not None:
            raise _refused(f"the tag {event.tag[:40]!r} is not read: leave tags (!name) out, or quote text", event)
        if self._depth == _DEEPEST:
            raise _refused(f"it is nested more than {_DEEPEST} levels deep", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Unread):
                number = key.number()
                key = None if key.is_null else key.text if number is None else number
            if isinstance(key, dict | list):
                raise _refused("a key must be a text", key_node)
            if key in mapping:
                raise _refused(f"the key {str(key)[:80]!r} is given twice: remove one", key_node)
            mapping[key] = self.construct_object(value_node, deep=deep)
        return mapping


def _refused(reason: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=reason, problem_mark=place.start_mark)


def _construct_text(loader: _Loader, node: Any) -> Any:
    text = node.value
    if node.style is not None:
        return text
    bare = text in _NULL or text in _TRUTH or text in _WORDS or _FLOAT.fullmatch(text) or _SPECIAL.fullmatch(text)
    return Unread(text, node.start_mark.line + 1) if bare or ODD_NUMBER.fullmatch(text) else text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)


class _Dumper(yaml.SafeDumper):
    """Also quotes texts that are numbers here and not in YAML 1.1, such as 1e5; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _pattern in (EXPONENT, ODD_NUMBER):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(f"(?:{_pattern.pattern})$"), list("+-.0123456789")
    )
