"""Preludes, the code that forked commands run first, replace names by assignment, which would also make new ones."""

import ast
import contextlib
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
OURS = re.compile(r"^(import|from) diffusion_align\b", re.MULTILINE)


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
        if isinstance(node, ast.Constant) and OURS.search(str(node.value)):
            with contextlib.suppress(SyntaxError):
                ast.parse(node.value)
                yield node.value


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.stem)
def test_what_a_prelude_replaces_is_there(path):
    for text in preludes(path):
        for owner, name in replaced(text):
            assert hasattr(owner, name), f"{path.name} replaces {owner}.{name}, which is not there"


def test_a_name_that_is_gone_is_found():
    [(owner, name)] = replaced(" import diffusion_align.report as report\nreport.gone = None\n".lstrip())
    assert not hasattr(owner, name)
