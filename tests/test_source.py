"""What holds for every source file: text is UTF-8, imports come with an extra, tests replace what is there."""

import ast
import contextlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

from diffusion_align.doctor import describe as doctor
from diffusion_align.rewards import describe_rewards, describe_text_rewards

ROOT = Path(__file__).parent.parent
OURS = [path for part in ("diffusion_align", "pipelines", "rewards") for path in (ROOT / part).rglob("*.py")]
FILES = [*OURS, *(ROOT / "scripts").rglob("*.py")]
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
            said = (words.get(key) for key in ("text", "universal_newlines"))
            if any(isinstance(word, ast.Constant) and word.value for word in said):
                yield node.lineno
        elif (name == "read_text" and not node.args) or (name == "write_text" and len(node.args) == 1 and owner):
            yield node.lineno
        elif name in OPENERS and not (name == "open" and owner in NOT_TEXT):
            of_path = name == "open" and bool(owner) and owner not in {"io", *PACKED}  # which takes the mode first
            place = OPENERS[name] - of_path
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
    found = {str(path): list(in_the_locales_encoding(path.read_text(encoding="utf-8"))) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}, "say encoding='utf-8'"


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PLACES = ("diffusion_align", "pipelines", "rewards", "configs", "docs", "scripts", "tests", ".ci")
ENDINGS = {".py", ".md", ".yaml", ".sh", ".ipynb", ".toml", ".j2", ".html"}
# Which package brings a module where the name does not say it.
PACKAGE = {"PIL": "pillow", "yaml": "pyyaml", "open-clip": "open-clip-torch", "vadersentiment": "vadersentiment"}
# Those cannot be without these.
PACKAGE |= {"starlette": "fastapi", "pyarrow": "datasets", "h11": "uvicorn", "pydantic_core": "pydantic"}


def texts():
    files = [file for place in PLACES for file in (ROOT / place).rglob("*") if file.suffix in ENDINGS]
    for file in [*files, ROOT / "README.md", ROOT / "pyproject.toml"]:
        if file.is_file() and file != Path(__file__):
            yield file, file.read_text(encoding="utf-8")


def name(text):
    return re.sub(r"[-_.]+", "-", text).lower()


def test_every_extra_that_a_sentence_names_exists():
    found = {}
    for file, text in texts():
        for extras in re.findall(r"diffusion[-_]align\[([\w, .-]+)\]", text):
            found |= {extra.strip(): file for extra in extras.split(",")}
    assert len(found) > 5
    assert {extra: str(file) for extra, file in found.items() if extra not in EXTRAS} == {}
    # those that a sentence is made of
    assert set(doctor._EXTRAS) <= set(EXTRAS)
    said = {row["name"]: row.get("extra") or "" for row in describe_rewards() + describe_text_rewards()}
    assert {reward: text for reward, text in said.items() if text and text.split(",")[0] not in EXTRAS} == {}


def test_every_module_that_is_imported_comes_with_the_project_or_an_extra():
    required = [*PROJECT["dependencies"], *(one for extra, some in EXTRAS.items() if extra != "dev" for one in some)]
    packages = {name(re.split(r"[^\w.-]", requirement, maxsplit=1)[0]) for requirement in required}
    missing = {}
    for file in OURS:
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        blocks = [node for node in nodes if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
        for node in set(nodes) - {inner for block in blocks for inner in ast.walk(block)}:
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in (module.partition(".")[0] for module in modules):
                ours = module == "diffusion_align" or module in sys.stdlib_module_names
                package = PACKAGE.get(module) or PACKAGE.get(name(module), name(module))
                if not ours and package not in packages:
                    missing[module] = f"{file}:{node.lineno}"
    assert missing == {}


IMPORTS_OURS = re.compile(r"^(import|from) diffusion_align\b", re.MULTILINE)


def replaced(source):
    """``(object, attribute)`` of every assignment in ``source`` to an attribute of what it imports."""
    nodes, found = list(ast.walk(ast.parse(source))), {}
    targets = [target for node in nodes if isinstance(node, ast.Assign) for target in node.targets]
    targets = [target for target in targets if isinstance(target, ast.Attribute)]
    for node in nodes if targets else []:
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), found)
    for target in targets:
        if ast.unparse(target.value).split(".")[0] in found:
            yield eval(ast.unparse(target.value), found), target.attr


def preludes(path):
    """Texts in a test file that are Python and import something of the project."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and IMPORTS_OURS.search(str(node.value)):
            with contextlib.suppress(SyntaxError):
                ast.parse(node.value)
                yield node.value


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_prelude_replaces_is_there(path):
    for text in preludes(path):
        for owner, name in replaced(text):
            assert hasattr(owner, name), f"{path.name} replaces {owner}.{name}, which is not there"


def test_a_name_that_is_gone_is_found():
    [(owner, name)] = replaced(" import diffusion_align.report as report\nreport.gone = None\n".lstrip())
    assert not hasattr(owner, name)
