"""Every extra that a sentence names exists, and every package that is imported is a dependency or in an extra."""

import ast
import re
import sys
import tomllib
from pathlib import Path

from diffusion_align.doctor import describe as doctor
from diffusion_align.rewards import describe_rewards, describe_text_rewards

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PLACES = ("diffusion_align", "pipelines", "rewards", "configs", "docs", "scripts", "tests", ".ci")
ENDINGS = {".py", ".md", ".yaml", ".sh", ".ipynb", ".toml", ".j2", ".html"}
# Which package brings a module where the name does not say it.
PACKAGE = {"PIL": "pillow", "yaml": "pyyaml", "open-clip": "open-clip-torch", "vadersentiment": "vadersentiment"}
PACKAGE |= {
    "starlette": "fastapi",
    "pyarrow": "datasets",
    "h11": "uvicorn",
    "pydantic_core": "pydantic",
}  # which cannot be without them


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
    for place in ("diffusion_align", "pipelines", "rewards"):
        for file in (ROOT / place).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                modules += [node.module] if isinstance(node, ast.ImportFrom) else []
                for module in (module.partition(".")[0] for module in modules):
                    ours = module == "diffusion_align" or module in sys.stdlib_module_names
                    package = PACKAGE.get(module) or PACKAGE.get(name(module), name(module))
                    if not ours and package not in packages:
                        missing[module] = f"{file}:{node.lineno}"
    assert missing == {}
