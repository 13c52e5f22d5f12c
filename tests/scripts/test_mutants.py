"""The mutation check: what it changes, that it leaves the files alone, and how it ends."""

import ast
import subprocess
import sys
from pathlib import Path

import mutants
import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

SAMPLE = '''"""A sample: -1 + 1."""
Number = int | float

def loss(x: Number | None, mask, *, λ: float = 0.5):
    """``-x`` is no code."""
    if not λ >= 0:
        raise ValueError(f"{-λ} < 0")
    check_shapes(x=x, n=2)
    y = -torch.where(mask, x.detach(), 0.0)
    return masked_fill_zero((y + λ).clamp(min=0), mask)
'''
EXPECTED = {
    (4, "constant", "def loss(x: Number | None, mask, *, λ: float = 1.0):"),
    (6, "drop check", "if False:"),
    (6, "drop sign", "if (λ >= 0):"),
    (6, "comparison", "if not (λ > 0):"),
    (6, "comparison", "if not (λ < 0):"),
    (6, "constant", "if not λ >= 1:"),
    (8, "drop statement", "pass"),
    (8, "drop argument", "check_shapes(n=2)"),
    (8, "constant", "check_shapes(x=x, n=4)"),
    (9, "drop sign", "y = torch.where(mask, x.detach(), 0.0)"),
    (9, "drop mask", "y = -x.detach()"),
    (9, "drop detach", "y = -torch.where(mask, x, 0.0)"),
    (9, "constant", "y = -torch.where(mask, x.detach(), 1.0)"),
    (10, "drop mask", "return masked_fill_zero((y + λ).clamp(min=0), None)"),
    (10, "drop clamp", "return masked_fill_zero((y + λ), mask)"),
    (10, "swap argument", "return masked_fill_zero((y + λ).clamp(max=0), mask)"),
    (10, "swap operator", "return masked_fill_zero(((y - λ)).clamp(min=0), mask)"),
    (10, "constant", "return masked_fill_zero((y + λ).clamp(min=1), mask)"),
}


def test_every_mutant_of_a_sample_is_one_change_of_one_line():
    found = mutants.mutants_of("sample", SAMPLE)
    assert {(mutant.line, mutant.operator, mutant.after) for mutant in found} == EXPECTED
    assert len(found) == len(EXPECTED) == len({mutant.name for mutant in found})
    for mutant in found:
        ast.parse(mutant.source)
        pairs = list(zip(SAMPLE.splitlines(), mutant.source.splitlines(), strict=True))
        assert [number for number, (old, new) in enumerate(pairs, 1) if old != new] == [mutant.line]
        assert (mutant.before, mutant.after) == tuple(line.strip() for line in pairs[mutant.line - 1])


@pytest.mark.parametrize(
    ("expression", "changed"),
    [
        ("a * b", {"(a / b)"}),
        ("a & b", {"(a | b)", "a", "b"}),
        ("a and b", {"(a or b)", "a", "b"}),
        ("a < b", {"(a <= b)", "(a > b)"}),
        ("a is None", {"(a is not None)"}),
        ("b if f(a) else c", {"b if (not f(a)) else c"}),
        ("a.exp()", {"a", "a.expm1()"}),
        ("torch.expm1(a)", {"a", "torch.exp(a)"}),
        ("a.relu() if a.square() else a.masked_fill(b, c)", {
            "a if a.square() else a.masked_fill(b, c)",
            "a.relu() if a else a.masked_fill(b, c)",
            "a.relu() if (not a.square()) else a.masked_fill(b, c)",
            "a.relu() if a.square() else a",
        }),
        ("torch.where(m, a, b)", {"a", "b"}),
        ("torch.minimum(a, b)", {"torch.maximum(a, b)"}),
        ("g(1, 1.0, True)", {"g(2, 1.0, True)", "g(1, 2.0, True)", "g(1, 1.0, False)"}),
        ("f'{-a}'", set()),
        ("at_least_float32(a).detach() - at_least_float32(b)", {
            "(a.detach() - b)",
            "(at_least_float32(a).detach() + at_least_float32(b))",
            "at_least_float32(a) - at_least_float32(b)",
        }),
        ("f(at_least_float32(a)) - at_least_float32(b)", {
            "(f(at_least_float32(a)) + at_least_float32(b))",
            "f(a) - at_least_float32(b)",
            "f(at_least_float32(a)) - b",
        }),
    ],
)  # fmt: skip
def test_operators(expression, changed):
    found = mutants.mutants_of("sample", f"x = {expression}\n")
    assert {mutant.after.removeprefix("x = ") for mutant in found} == changed


def test_the_list_of_equivalent_mutants_names_mutants_that_there_are():
    folder = SCRIPTS.parent / "diffusion_align" / "estimators"
    names = {
        mutant.name for path in folder.glob("*.py") for mutant in mutants.mutants_of(path.stem, path.read_text("utf-8"))
    }
    assert set(mutants.EQUIVALENT) - names == set()


def _check(folder, test, *options):
    """Run the script on a package of two modules with one test; nothing below ``folder`` may change."""
    files = {
        "sample/__init__.py": "from sample.quarter import quarter\n",
        "sample/quarter.py": "from sample.half import half\n\ndef quarter(x):\n    return half(half(x))\n",
        "sample/half.py": "def half(x):\n    return x / 2\n",
        "tests/test_sample.py": f"from sample import quarter\n\ndef test_quarter():\n    {test}\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, str(SCRIPTS / "mutants.py"), "--root", str(folder), "--package", "sample"]
    run = subprocess.run(
        [*command, "--tests", str(folder / "tests"), *options], capture_output=True, text=True, timeout=60, cwd=folder
    )
    left = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert left == files
    return run


def test_a_surviving_mutant_is_reported_with_exit_status_1(tmp_path):
    run = _check(tmp_path, "assert quarter(0.0) == 0.0")
    assert run.returncode == 1, run.stderr
    assert "half.py:2 [swap operator] survived: return x / 2  =>  return (x * 2)" in run.stdout
    assert "half.py:2 [constant] survived: return x / 2  =>  return x / 4" in run.stdout
    assert run.stdout.splitlines()[-1].split() == ["total", "2", "0", "0", "2", "0"]


def test_killed_mutants_leave_exit_status_0(tmp_path):
    run = _check(tmp_path, "assert quarter(4.0) == 1.0")
    assert run.returncode == 0, run.stderr + run.stdout
    assert "survived:" not in run.stdout
    assert run.stdout.splitlines()[-1].split() == ["total", "2", "2", "0", "0", "0"]


def test_tests_that_fail_without_a_mutant_are_shown_with_exit_status_2(tmp_path):
    run = _check(tmp_path, "assert quarter(4.0) == 2.0", "--modules", "half")
    assert run.returncode == 2, run.stderr
    assert "1 failed" in run.stdout
    assert "must pass" in run.stdout


def test_a_sample_of_the_mutants_is_always_the_same(capsys):
    shown = []
    for _ in range(2):
        assert mutants.main(["--modules", "gaussian", "masked", "--limit", "3", "--list"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert [line.split(":")[0] for line in shown[0].splitlines()] == ["gaussian.py"] * 3 + ["masked.py"] * 3
    with pytest.raises(SystemExit, match="2"):
        mutants.main(["--modules", "gausian"])
    assert "gausian.py" in capsys.readouterr().err
