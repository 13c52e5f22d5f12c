"""Text files are UTF-8 whatever the locale: every call that opens one as text says so."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    path for part in ("diffusion_align", "pipelines", "rewards", "scripts") for path in (ROOT / part).rglob("*.py")
]
# Where a call's mode stands, if it is given by position.
OPENERS = {"open": 1, "fdopen": 1, "NamedTemporaryFile": 0, "TemporaryFile": 0, "SpooledTemporaryFile": 1}
NOT_TEXT = {"os", "Image", "tarfile", "zipfile", "webbrowser"}
PACKED = {"gzip", "bz2", "lzma"}


def in_the_locales_encoding(text):
    """Lines of the calls that open a text file, or a program's output, without saying how it is encoded."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or any(word.arg in ("encoding", None) for word in node.keywords):
            continue
        function = node.func
        owner = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
        name = function.attr if owner else getattr(function, "id", "")
        words = {word.arg: word.value for word in node.keywords}
        if owner == "subprocess":
            if any(
                isinstance(words.get(key), ast.Constant) and words[key].value for key in ("text", "universal_newlines")
            ):
                yield node.lineno
        elif (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) == 1 and owner):
            yield node.lineno
        elif name in OPENERS and not (name == "open" and owner in NOT_TEXT):
            place = OPENERS[name] - (
                name == "open" and bool(owner) and owner not in {"io", *PACKED}
            )  # Path.open takes the mode first
            mode = words.get("mode", node.args[place] if len(node.args) > place else None)
            default = "w+b" if "Temporary" in name else "rb" if owner in PACKED else "r"
            mode = mode.value if isinstance(mode, ast.Constant) else default
            if "t" in mode if owner in PACKED else "b" not in mode:
                yield node.lineno


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("path.read_text()", True),
        ("path.read_text('utf-8')", False),
        ("path.write_text(x)", True),
        ("path.write_text(x, encoding='utf-8')", False),
        ("write_text(path, x)", False),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("open(path, mode='w')", True),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("path.open(encoding='utf-8')", False),
        ("Image.open(path)", False),
        ("gzip.open(path)", False),
        ("gzip.open(path, 'rt')", True),
        ("os.fdopen(1, 'w')", True),
        ("tempfile.NamedTemporaryFile()", False),
        ("tempfile.NamedTemporaryFile('w')", True),
        ("subprocess.run(x, text=True)", True),
        ("subprocess.run(x, text=True, encoding='utf-8')", False),
        ("subprocess.run(x)", False),
    ],
)
def test_the_scan_finds_what_depends_on_the_locale(text, found):
    assert bool(list(in_the_locales_encoding(text))) is found


def test_every_text_file_is_utf8():
    assert len(FILES) > 100
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        for line in in_the_locales_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found, "say encoding='utf-8'"
