"""Imports point left: estimators <- training, data <- models <- diffusion, llm <- methods <- pipelines <- doctor."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark import ANSWERS

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffusion_align"
PARTS = ("estimators", "training", "data", "models", "diffusion", "llm", "report", "doctor", "cli")
FOLDERS = {name: PACKAGE / name for name in PARTS}
FOLDERS |= {"methods": PACKAGE / "methods.py", "assets": PACKAGE / "assets.py"}
FOLDERS |= {"rewards": ROOT / "rewards", "pipelines": ROOT / "pipelines"}
BELOW_PIPELINES = set(FOLDERS) - {"pipelines", "doctor", "cli"}
# What each part may import of the project; a part always may import itself and the bare package (its version).
ALLOWED = {
    "estimators": set(),
    "report": {"estimators"},
    "assets": set(),
    "training": {"estimators", "assets", "report", "rewards"},
    "data": {"training", "assets", "rewards"},
    "models": {"training", "data", "assets", "report"},
    "rewards": {"assets", "models", "training"},
    "diffusion": {"estimators", "training", "data", "models", "assets", "report", "rewards"},
    "llm": {"estimators", "training", "data", "models", "assets", "report", "rewards"},
    "methods": {"training", "diffusion", "llm"},
    "pipelines": BELOW_PIPELINES,
    "doctor": BELOW_PIPELINES - {"report"} | {"pipelines"},
    "cli": {"training", "data", "models", "assets", "report", "rewards", "methods", "pipelines", "doctor"},
}
# The protocol, and how a configuration holds one, are all that a policy needs to know about rewards.
REWARDS_SEEN_FROM_BELOW = {f"diffusion_align.rewards.{name}" for name in ("base", "settings", "text.base")}


def files(part):
    place = FOLDERS[part]
    return [place] if place.is_file() else sorted(place.rglob("*.py")) if place.is_dir() else []


def imported(path):
    """(module, line) of every import in a file, those inside functions and TYPE_CHECKING blocks too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            if node.module == "diffusion_align":
                yield from ((f"diffusion_align.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield node.module, node.lineno


def part_of(module):
    names = module.split(".")
    if names[0] in ("rewards", "pipelines"):
        return names[0]
    return names[1] if names[0] == "diffusion_align" and len(names) > 1 and names[1] in FOLDERS else None


def violations(part, allowed):
    for path in files(part):
        for module, line in imported(path):
            other = part_of(module)
            if other is not None and other != part and other not in allowed:
                yield f"{path.relative_to(ROOT)}:{line} imports {module}"


@pytest.mark.parametrize("part", [p for p in FOLDERS if files(p)])
def test_imports_point_left(part):
    assert files(part)
    assert not list(violations(part, ALLOWED[part]))


def test_the_check_finds_an_import_to_the_right():
    assert list(violations("training", ALLOWED["training"])) == []
    assert any(
        "diffusion_align.training" in text for text in violations("diffusion", ALLOWED["diffusion"] - {"training"})
    )


def test_rewards_know_of_training_how_settings_are_written_only():
    seen = {module for path in files("rewards") for module, _ in imported(path) if part_of(module) == "training"}
    assert seen == {"diffusion_align.training.section"}


def test_estimators_import_torch_and_nothing_else():
    allowed = {"torch", "diffusion_align", *sys.stdlib_module_names}
    for path in files("estimators"):
        for module, line in imported(path):
            assert module.split(".")[0] in allowed, f"{path.name}:{line} imports {module}"


@pytest.mark.parametrize("part", ["training", "data", "diffusion", "llm"])
def test_policies_know_the_reward_protocol_only(part):
    seen = {module for path in files(part) for module, _ in imported(path) if part_of(module) == "rewards"}
    assert seen <= REWARDS_SEEN_FROM_BELOW


@pytest.mark.parametrize("part", ["rewards", "pipelines"])
def test_the_project_never_uses_bare_names(part):
    paths = [path for name in FOLDERS for path in files(name)]
    assert not [f"{p}:{line}" for p in paths for module, line in imported(p) if module.split(".")[0] == part]


def python(code, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("part", ["rewards", "pipelines"])
def test_bare_names_refuse_to_be_imported(part):
    result = python(f"import {part}")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        f"ImportError: import diffusion_align.{part}, not {part}: the bare name is left to your own folders"
    )


@pytest.mark.parametrize("part", ["rewards", "pipelines"])
def test_a_users_own_folder_of_that_name_is_not_in_the_way(part, tmp_path):
    (tmp_path / part).mkdir()
    (tmp_path / part / "__init__.py").write_text("mine = True\n")
    result = python(
        f"import diffusion_align.{part} as ours, {part}; assert {part}.mine and not hasattr(ours, 'mine')", tmp_path
    )
    assert result.returncode == 0, result.stderr


HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib"}


def test_importing_the_package_stays_light():
    heavy = HEAVY | {"numpy", "pydantic"}
    result = python(f"import sys, diffusion_align; print(sorted(set(sys.modules) & {heavy}))")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_settings_of_methods_and_rewards_import_nothing_heavy(tmp_path):
    settings = {"model": "emoji-sd", "output_dir": str(tmp_path / "run"), "prompts": ["a fox"]}
    code = f"""
import sys
import diffusion_align
from diffusion_align import DDPOConfig, llm
from diffusion_align.methods import SHIPPED, outline_of
from diffusion_align.rewards import IMAGES, TEXT, describe_rewards
shipped = {{outline_of(name).config_class for name in SHIPPED}}
assert shipped == {{getattr(diffusion_align, n) for n in diffusion_align.__all__ if n.endswith("Config")}}
assert [row["name"] for kind in (IMAGES, TEXT) for row in describe_rewards(kind)] == [*IMAGES.table, *TEXT.table]
DDPOConfig(reward="jpeg_compressibility", **{settings})
print(sorted(set(sys.modules) & {HEAVY}))
"""
    result = python(code)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_answers_that_need_no_model_import_nothing_heavy():
    code = f"""
import json, sys
from diffusion_align.cli import main
for line in {ANSWERS}:
    sys.argv[1:] = line
    try:
        main()
    except SystemExit as end:
        print(json.dumps([line, end.code or 0, sorted(set(sys.modules) & {HEAVY})]), file=sys.stderr)
"""
    result = python(code)
    found = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("[[")]
    assert [line for line, _, _ in found] == ANSWERS, result.stderr
    wrong = ANSWERS[ANSWERS.index(["list", "settings", "nosuch"]) :]
    assert [status for _, status, _ in found] == [2 if line in wrong else 0 for line in ANSWERS], result.stderr
    assert not [(line, modules) for line, _, modules in found if modules]


def test_estimators_need_no_diffusers():
    result = python("import sys; from diffusion_align import estimators; print('diffusers' in sys.modules)")
    assert result.stdout.strip() == "False", result.stdout + result.stderr


def test_the_public_names_are_there():
    result = python(
        "from diffusion_align import DDPOConfig, DDPOTrainer, DiffusionDPOConfig, DiffusionDPOTrainer; "
        "from diffusion_align import ImageAlignmentPipeline, TextAlignmentPipeline, estimators, pipelines, rewards; "
        "print('fine')"
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_an_unknown_name_is_an_attribute_error():
    result = python("import diffusion_align; diffusion_align.nothing")
    assert "AttributeError: module 'diffusion_align' has no attribute 'nothing'" in result.stderr
