"""Words that the project does not use, found in code, docs, recipes, tests and help; what is allowed, with its reason.

    python scripts/words.py

Prints every other place, one per line, and exits 1 if there is one. ``RETIRED`` says what to write instead.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".md", ".yaml", ".ipynb", ".j2", ".sh", ".toml"}
HELP = "help"
"""The name of what the command line prints, in place of a path."""

_PROSE = ("*.md", "*.ipynb", "*.yaml", HELP)
_SHIPPED = ("README.md", "docs/*", "configs/*", "diffusion_align/*", "pipelines/*", "rewards/*", "examples/*", HELP)
_UNIT = (
    "batch|character|completion|epoch|file|group|image|line|nat|pair|pass|process|prompt|reward|row|run|sample|second|"
    "sequence|step|style|token|update|word"
)
_AMOUNT = (
    r"nats?|tokens?|threads?|objects?|verses?|numbers?|samples|images|completions|steps?|passes|updates|pairs|rows|texts?|"
    r"scores?|rewards|bytes|seconds?|minutes?|[kMG]B|GFLOPs?|USD|once|twice|times|(?<![\w.])[.\d]*\d"
)
_AFTER_PER = r"(?![ '-](?:\w+ing|time|later|before|ago|and|break|that|whose|is|was|with|shown|once|s|predicting)\b)"


class Word(NamedTuple):
    """What is not written, what is written instead, and the files it is looked for in: all if not given."""

    pattern: str
    instead: str
    files: tuple[str, ...] = ("*",)


RETIRED = (
    Word(r"(?i)pictur", "image"),
    Word(r"(?i)decision", "step (denoising), token (text), action (both)"),
    Word(r"(?<![\"'`\w])[Gg]olds?(?![\"'`\w])", "held-out reward; its metric is `gold`", _SHIPPED),
    Word(r"(?i)\bdata sets?\b", "dataset"),
    Word(r"(?<![\w./-])hub(?![\w.])", "the Hub", _PROSE),
    Word(r"(?i)\bmend(?:s|ed|ing)?\b", "fix, remove"),
    Word(r"(?i)\b(?:go|goes|going|went|gone) on with\b", "resume, continue"),
    Word(r"(?i)what is trained of\b", "adapter, LoRA weights"),
    Word(r"(?i)\b(?:writes?|written|writing|left) aside\b|\b_?aside\b(?= =|\))", "write atomically; temporary"),
    Word(r"\b(?:said|asked)\b", "reported, returned, printed; called", _SHIPPED),
    Word(r"(?i)\bthe field's\b|\bas the field\b", "the name of the source"),
    Word(r"(?i)\bhas to be given\b|\bhave to be given\b", "is required, must be given"),
    Word(rf"\b(?:{_AMOUNT}) (?:an?|one) (?:{_UNIT})\b{_AFTER_PER}", "per"),
    Word(
        r"\b(?:put_on|take_off|put_back|keep_average|averaged_weights|what_is_trained|best_seconds)\b", "see the names"
    ),
    Word(
        r"\b(?:completion_of|ends_of|Layouts|widened?|several_rewards_\w+|part_of_steps|_everyones)\b", "see the names"
    ),
)


class Allowed(NamedTuple):
    """Lines of ``files`` that match may keep a retired word, for a reason."""

    files: str
    pattern: str
    reason: str


ALLOWED = (
    Allowed("*/words.py", "", "this list"),
    Allowed("*/test_words.py", "", "its test"),
    Allowed("*", r"text_in_pictures", "the name of a shipped list of prompts, which configurations name"),
    Allowed("*", r"decisions_per_pair", "the former name of a setting"),
    Allowed(
        "*",
        r"evaluation.*\bpictures\b|\bpictures\b.*\bevery\b|^ +pictures: int|\.pictures\b|\"pictures\": \"samples\"",
        "the former name of a setting",
    ),
    Allowed("tests/*", r"[\"']pictures[\"']: \d", "the same setting"),
    Allowed("tests/training/test_aliases.py", "", "former names of settings, which it tests"),
    Allowed("tests/test_former_names.py", "", "former names in Python, which it tests"),
    Allowed("diffusion_align/estimators/*", r"several_rewards_advantages|\"decision\"", "former names, still accepted"),
    Allowed("diffusion_align/llm/settings.py", r"decision=\"token\"", "a former value, still read"),
    Allowed("pipelines/compare.py", r"def picture\(", "a former name, still there"),
    Allowed("tests/pipelines/test_image_pipeline.py", r"\.picture\b", "a former name, which it tests"),
    Allowed("*", r"(?:king|he|Leah) said\b", "verses of the Bible, as prompts"),
    Allowed("rewards/image/vlm_judge.py", r"\basked\b|says\|said", "a vision-language model is asked for a number"),
    Allowed("*", r"[Rr]ate this picture|Text in the picture", "the judge's prompt: other words give other scores"),
    Allowed("*", r"[\"']a picture of a|framed picture", "captions that the embedded models were trained on"),
)


def places() -> Iterator[tuple[str, int, str]]:
    """(file, line number, line) of all that is read: tracked files, and what the command line prints."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, encoding="utf-8", check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path.suffix in SUFFIXES and path.is_file() and not path.is_symlink():
            text = path.read_text(encoding="utf-8")
            for number, line in enumerate(_sources(text) if path.suffix == ".ipynb" else text.splitlines(), 1):
                yield name, number, line
    for number, line in enumerate(printed().splitlines(), 1):
        yield HELP, number, line


def _sources(notebook: str) -> list[str]:
    """The lines that were written, without what the cells showed."""
    return [line for cell in json.loads(notebook)["cells"] for line in "".join(cell["source"]).splitlines()]


def printed() -> str:
    """``--help`` of every command, all lists, and the settings of every method."""
    from typer.main import get_command

    from diffusion_align.cli.commands import app
    from diffusion_align.methods import SHIPPED

    commands = [["--help"], ["list"], *(["list", "settings", method] for method in SHIPPED)]
    commands += [[name, "--help"] for name in get_command(app).commands]  # type: ignore[attr-defined]
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        for words in commands:
            app(words, standalone_mode=False)
    return shown.getvalue()


def left(found: Iterator[tuple[str, int, str]]) -> Iterator[str]:
    """Every retired word that is not allowed where it stands."""
    for name, number, line in found:
        for word in RETIRED:
            hit = re.search(word.pattern, line)
            if hit is None or not any(fnmatch.fnmatch(name, files) for files in word.files):
                continue
            if not any(fnmatch.fnmatch(name, one.files) and re.search(one.pattern, line) for one in ALLOWED):
                yield f"{name}:{number}: {hit[0]!r}, write {word.instead}: {line.strip()[:160]}"


if __name__ == "__main__":
    problems = list(left(places()))
    print("\n".join(problems) or "none of the retired words is left")
    sys.exit(bool(problems))
