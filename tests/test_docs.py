"""The pages on the mathematics and the tutorials: their code and commands run, and what they point to is there."""

import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diffusion_align.estimators as estimators
from diffusion_align.methods import SHIPPED, method_of
from diffusion_align.rewards import REWARDS
from tests.helpers.printed import UNCOUNTED, blocks, shorter, shorter_code

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs/mathematics"
PAGES = sorted(FOLDER.glob("*.md"))
TUTORIALS = [
    ROOT / f"docs/{name}.md" for name in ("diffusion_dpo", "flow", "forward", "reward_gradients", "text", "rewards")
]


def test_there_is_a_page_for_each_subject() -> None:
    names = {"README", "kl", "gaussian_steps", "flow_matching", "forward_process", "diffusion_dpo", "text_policies"}
    names.add("dynamic_beta")
    assert {page.stem for page in PAGES} == names


@pytest.mark.parametrize("page", PAGES + TUTORIALS, ids=lambda page: page.stem)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert not re.search(r"^[A-Z]+$|TODO|XXX", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run_in_order(page: Path) -> None:
    found = [block for _, block in blocks(page.read_text(), "python")]
    assert found or page.stem == "README"
    exec(compile("\n".join(found), page.name, "exec"), {"__name__": page.stem})


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_runs_from_the_first_line_to_the_last(page: Path, tmp_path: Path, forked: Any) -> None:
    """Commands and Python in their order, in one folder, as a reader would type them; only shorter."""
    found = blocks(page.read_text(), "bash|python")
    assert {language for language, _ in found} == {"bash", "python"}
    with contextlib.ExitStack() as servers:
        _run_blocks(found, tmp_path, forked, servers)


def _run_blocks(found: list[tuple[str, str]], tmp_path: Path, forked: Any, servers: contextlib.ExitStack) -> None:
    port = "8901"  # where the server of a page really listens
    for language, block in found:
        commands = [shlex.split(line) for line in block.splitlines() if line] if language == "bash" else [[]]
        for words in commands:
            if language == "python":
                done = forked("--help", prelude=shorter_code(block), cwd=tmp_path, timeout=300)
            else:
                assert words[0] == "diffusion-align"
                if words[1] == "serve-reward":
                    port = served(words, tmp_path, servers)
                    continue
                words = [word.replace("8901", port) for word in words]
                doctor = UNCOUNTED if words[1] == "doctor" else ""
                done = forked(*shorter(words[1:], tmp_path), cwd=tmp_path, timeout=300, prelude=doctor)
            assert done.status == 0, f"{words or block}\n{done.error[-2000:]}"


def served(words: list[str], folder: Path, servers: contextlib.ExitStack) -> str:
    """Run a ``serve-reward`` command until ``servers`` is closed; the free port that it took."""
    command = [sys.executable, "-m", "diffusion_align", *words[1:]]
    command[command.index("--port") + 1] = "0"
    server = servers.enter_context(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True))
    servers.callback(server.terminate)
    assert server.stdout is not None
    line = server.stdout.readline()
    assert line.startswith("serving "), line
    return line.strip().rpartition(":")[2]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_run(page: Path, tmp_path: Path, forked: Any) -> None:
    for command in [line for _, block in blocks(page.read_text(), "bash") for line in block.splitlines() if line]:
        words = shlex.split(command)
        assert words[0] == "diffusion-align"
        done = forked(*words[1:], cwd=tmp_path, timeout=300)
        assert done.status == 0, f"{command}\n{done.error[-2000:]}"


@pytest.mark.parametrize("page", PAGES + TUTORIALS, ids=lambda page: page.stem)
def test_links_files_and_functions_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).is_file(), target
    for path in re.findall(r"`(?:diffusion_align/)?((?:tests|diffusion|estimators|training)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file() or (ROOT / "diffusion_align" / path).is_file(), path
    settings = {name for method in SHIPPED for name in method_of(method).config_class.model_fields}
    kinds = "loss|kl|reward|value|advantages|penalty|probs|factor"
    for name in re.findall(rf"`(?:estimators\.)?([a-z_]+_(?:{kinds}))`", text):
        assert hasattr(estimators, name) or name in settings or name in REWARDS, name


def test_every_public_estimator_is_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    public = [name for name, value in vars(estimators).items() if callable(value) and not name.startswith("_")]
    assert len(public) > 30
    missing = [name for name in public if not re.search(rf"`{name}\b", text)]
    assert missing == []
