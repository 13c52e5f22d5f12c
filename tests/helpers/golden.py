"""Whole sentences in one plain text file per test file, ``tests/golden/<name>.txt``, rewritten by ``--update-golden``.

A case stands on a line of its own, its sentences below it, indented by four spaces; cases are sorted. Where all tests
of a file ran and passed, an entry that none of them asked for fails the run (and ``--update-golden`` drops it).
Places, libraries' own words and lists of what ships are replaced by <names>.
"""

import difflib
import functools
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "golden"
INDENT = "    "
# What others say, which differs with their versions and with the machine.
FOREIGN = {
    # But for what ``errors.first_line`` says in their place.
    "could not be loaded: <a library's words>": re.compile(
        r"could not be loaded: (?!the shapes of its weights|it is not in the cache).*"
    ),
    "cannot be used: <torch's words>": re.compile(r"cannot be used: (Found no NVIDIA|Torch not compiled|CUDA).*"),
}
_incomplete = pytest.StashKey[set]()  # paths of test files of which a test with a golden case was deselected


def read(path):
    """Case -> text."""
    cases, lines = {}, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        if line and not line.startswith(INDENT):
            lines = cases[line] = []
        else:
            lines.append(line.removeprefix(INDENT))
    return {case: "\n".join(lines).rstrip("\n") for case, lines in cases.items()}


def write(path, cases):
    blocks = [
        "\n".join([case, *((INDENT + line).rstrip() for line in cases[case].split("\n"))]) for case in sorted(cases)
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{block}\n\n" for block in blocks)[:-1], encoding="utf-8")


def printable(case, most=110):
    """A case in one line: what cannot be printed is escaped, and what is too long cut."""
    case = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in case.strip())
    return case if len(case) <= most else f"{case[:most]}... ({len(case)})"


@functools.cache
def registries():
    """What grows with the project: a name -> the list of names as sentences print it."""
    from diffusion_align.assets import shipped_prompts
    from diffusion_align.pipelines.configuration import shipped_configs
    from diffusion_align.rewards import describe_rewards, describe_text_rewards

    found = {"recipes": shipped_configs(), "prompt lists": shipped_prompts()}
    found |= {"image rewards": [row["name"] for row in describe_rewards()]}
    found |= {"text rewards": [row["name"] for row in describe_text_rewards()]}
    return {name: ", ".join(sorted(names)) for name, names in found.items()}


class Golden:
    """What the tests of one file say; ``golden(case, sentences, name=value)`` writes <name> for the text ``value``."""

    def __init__(self, path, scratch, places, *, update):
        self.path, self.scratch, self.places, self.update = path, scratch, places, update
        self.kept, self.seen = read(path), {}

    def __call__(self, case, sentences, **replaced):
        text = sentences if isinstance(sentences, str) else "\n".join(sentences)
        text = self.scratch.sub("<tmp>", text)
        for name, value in (self.places | registries() | replaced).items():
            text = text.replace(str(value), f"<{name}>")
        for name, pattern in FOREIGN.items():
            text = pattern.sub(name, text)
        text = "\n".join(line.rstrip() for line in text.rstrip("\n").split("\n"))
        case = printable(case)
        assert self.seen.setdefault(case, text) == text, f"two texts for the case {case!r}: give it two names"
        if self.update:
            return
        __tracebackhide__ = True
        how = f"run this file with --update-golden and review the change of {self.path.name}"
        if case not in self.kept:
            pytest.fail(f"{self.path.name} has no case {case!r}: {how}\n{text}")
        if text != self.kept[case]:
            change = difflib.ndiff(self.kept[case].split("\n"), text.split("\n"))
            pytest.fail("\n".join([f"{case}: {how}", *change]))

    def finish(self, *, whole):
        """``whole``: every test of the file ran and passed."""
        stale = {case: text for case, text in self.kept.items() if case not in self.seen}
        if self.update:
            write(self.path, self.seen | ({} if whole else stale))
        elif whole and stale:
            pytest.fail(f"{self.path.name} has cases that no test asks for: {sorted(stale)}")


def pytest_addoption(parser):
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden from what the tests say")


def pytest_deselected(items):
    for item in items:
        if "golden" in getattr(item, "fixturenames", ()):
            item.config.stash.setdefault(_incomplete, set()).add(item.path)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Of pytest-xdist: whether one process runs all of a file."""
    node.workerinput["whole_files"] = node.config.getoption("dist") in ("loadfile", "loadscope")


@pytest.fixture(scope="module")
def golden(request, tmp_path_factory):
    """``golden(case, sentences)``: they are those of the golden file of this test file."""
    config, session = request.config, request.session
    path = FOLDER / f"{request.path.stem.removeprefix('test_')}.txt"
    scratch = re.compile(rf"{re.escape(str(tmp_path_factory.getbasetemp()))}/[^/\s':]+")
    places = {"python": sys.prefix, "repository": config.rootpath}
    golden = Golden(path, scratch, places, update=config.getoption("--update-golden"))
    failed = session.testsfailed
    yield golden
    some = request.path in config.stash.get(_incomplete, set()) or any("::" in argument for argument in config.args)
    spread = not getattr(config, "workerinput", {}).get("whole_files", True)
    stopped = session.shouldstop or session.shouldfail
    golden.finish(whole=not (some or spread or stopped or session.testsfailed > failed))
