"""Mutation check of the estimators: does a test fail for every small fault that can be planted in them?

    python scripts/mutants.py                               # every module
    python scripts/mutants.py --modules kl policy           # these; --limit 20 for a sample, --list only names them

A mutant is one change of one expression: a sign, a comparison, a mask, a ``detach``; ``changes`` has them all. No file
is edited: what the tests import is imported once, then each mutant gets a forked process in which the import of the one
module yields the changed source. First run the test files that name something of that module, and only if the mutant
survives them the others. Hypothesis is derandomized and without its database, so a run can be repeated.

Exit status: 0 if every mutant was killed, 1 if not, 2 if the tests fail without any mutant, or were edited
during the run.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib.machinery
import importlib.util
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Mutants that behave like the original, as --list names them, and why. --equivalent runs these alone.
EQUIVALENT = {
    "masked.check_shapes: any -> all": "several shapes of which only one has ndim dimensions differ: refused anyway",
    "advantages.group_advantages: scale == 'none' or centred.numel() == 0 -> (scale == 'none')": (
        "an empty batch comes out empty of what follows too"
    ),
    "advantages.group_advantages: 0 -> 1 #3": "so does an empty batch, and a batch of one is 0 by what follows",
    "advantages.group_advantages: torch.zeros_like -> torch.ones_like": "any one id makes the batch one group",
    "advantages.gae: torch.zeros_like -> torch.ones_like": "every column is written",
    "preference.rso_accept: torch.zeros_like -> torch.ones_like": "of no entry at all",
    "dynamic_beta.BetaNetwork.forward: -1 -> 1": "the last of two dimensions is the second",
    "masked.masked_whiten: 1 -> 2": "one entry alone is 0 before it is divided by the count",
    "masked.masked_whiten: torch.where(mask, x, math.inf).amin(dim, keepdim=True).detach() -> "
    "torch.where(mask, x, math.inf).amin(dim, keepdim=True)": "no offset changes the result: its gradients cancel",
    "masked.masked_whiten: 1.0 -> 2.0": "the quotient is replaced by 0 wherever this is the divisor",
    "policy.clip_fractions: logp.detach() -> logp": "a comparison has no gradient; this saves the graph",
    "advantages._standardised: history.min -> history.max": "any entry will do as the origin",
    "advantages.PromptStatistics.update: torch.zeros_like -> torch.ones_like": "every row is written",
    "matching._group_mean: True -> False": "a CPU sorts integers stably anyway; on a GPU a sum's order could differ",
}

_OPPOSITES = (
    (ast.Add, ast.Sub),
    (ast.Mult, ast.Div),
    (ast.BitAnd, ast.BitOr),
    (ast.And, ast.Or),
    (ast.Eq, ast.NotEq),
    (ast.Is, ast.IsNot),
    (ast.In, ast.NotIn),
)
OPERATORS: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.Gt),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt),
    **{a: (b,) for pair in _OPPOSITES for a, b in (pair, pair[::-1])},
}
_TWINS = (
    ("exp", "expm1"),
    ("min", "max"),
    ("amin", "amax"),
    ("minimum", "maximum"),
    ("any", "all"),
    ("sum", "mean"),
    ("ones_like", "zeros_like"),
)
FUNCTIONS = {a: b for twins in _TWINS for a, b in (twins, twins[::-1])}
DROPPED = re.compile(
    "detach|clamp|masked_fill|relu|square|exp|expm1|log|sqrt|abs|flip|cumsum|at_least_float32|(log)?sigmoid|softplus"
    "|log_softmax"
)
CONVERTED = re.compile(r"at_least_float32\((\w+)\)((?:\.detach\(\))?(?:\.clamp\(min=0\))?)")


@dataclass(frozen=True)
class Mutant:
    """One change of a module, whose whole ``source`` then is this."""

    module: str
    line: int
    operator: str
    name: str  # "module.function: old -> new", with #2 and so on if the function has that twice
    before: str  # the lines that change, as one
    after: str
    source: str


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """(operator, the part that is replaced, by what) for every change of this node itself, not of its children."""
    match node:
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield "drop sign", node, operand
        case ast.BinOp(op=op) | ast.AugAssign(op=op):
            for other in OPERATORS.get(type(op), ()):
                yield "swap operator", node, _with(node, op=other())
            if isinstance(node, ast.BinOp) and isinstance(op, ast.BitAnd):
                yield from (("drop operand", node, side) for side in (node.left, node.right))
            if _both_converted(node):
                plain = CONVERTED.sub(r"\1\2", ast.unparse(node))
                yield "drop at_least_float32", node, ast.parse(plain, mode="eval").body
        case ast.BoolOp(op=op, values=values):
            yield "swap operator", node, _with(node, op=OPERATORS[type(op)][0]())
            for value in values:
                rest = [other for other in values if other is not value]
                yield "drop operand", node, _with(node, values=rest) if len(rest) > 1 else rest[0]
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                for other in OPERATORS[type(op)]:
                    yield "comparison", node, _with(node, ops=[*ops[:i], other(), *ops[i + 1 :]])
        case ast.Constant(value=bool() as value):
            yield "constant", node, ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            yield "constant", node, ast.Constant(2 * value or type(value)(1))
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            if not isinstance(test, (ast.Compare, ast.UnaryOp)):  # those are turned round as what they are
                yield "negate condition", test, ast.UnaryOp(ast.Not(), test)
            if isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
                yield "drop check", test, ast.Constant(False)
        case ast.Expr(value=ast.Call()):  # check_shapes(...), for one
            yield "drop statement", node, ast.Pass()
        case ast.Call():
            yield from _changes_of_call(node)


def _changes_of_call(call: ast.Call) -> Iterator[tuple[str, ast.AST, ast.AST]]:
    """A call without its function, mask or an argument that only hands on a name, or of the function's twin."""
    called, is_attribute = call.func, isinstance(call.func, ast.Attribute)
    name = ast.unparse(called).split(".")[-1]
    is_method = is_attribute and ast.unparse(called.value) not in ("torch", "math", "nn")
    if DROPPED.fullmatch(name) and (is_method or call.args):
        yield f"drop {name}", call, called.value if is_method else call.args[0]
    if name in FUNCTIONS:
        yield "swap function", called, _with(called, **{"attr" if is_attribute else "id": FUNCTIONS[name]})
    if name == "where":
        yield from (("drop mask", call, arg) for arg in call.args[1:] if not isinstance(arg, ast.Constant))
    if name == "masked_fill_zero":
        yield "drop mask", call, _with(call, args=[call.args[0], ast.Constant(None)])
    for keyword in call.keywords:
        rest = [other for other in call.keywords if other is not keyword]
        if isinstance(keyword.value, ast.Name) and keyword.value.id == keyword.arg:  # mask=mask, for one
            yield "drop argument", call, _with(call, keywords=rest)
        if keyword.arg in ("min", "max"):
            yield "swap argument", call, _with(call, keywords=[ast.keyword(FUNCTIONS[keyword.arg], keyword.value)])


def _both_converted(node: ast.AST) -> bool:
    """A difference of two ``at_least_float32(...)``: either one converts the result, so only both are dropped."""
    return isinstance(node, ast.BinOp) and all(CONVERTED.fullmatch(ast.unparse(x)) for x in (node.left, node.right))


def _with(node: Any, **fields: Any) -> Any:
    return type(node)(**{name: getattr(node, name) for name in node._fields} | fields)


def mutants_of(module: str, source: str) -> list[Mutant]:
    """Every mutant of a module, all else left as it stands. Annotations, messages and type aliases are not code."""
    raw = source.encode()  # ast counts bytes
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: list[Mutant] = []
    names: Counter[str] = Counter()
    together: set[ast.AST] = set()

    def visit(node: ast.AST, where: str) -> None:
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        if isinstance(node, ast.Assign) and where == module and re.match(r"Literal\[|\w+ \| ", ast.unparse(node.value)):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            where = f"{where}.{node.name}"
        if _both_converted(node):
            together.update(child for child in ast.walk(node) if child is not node)
        for operator, old, new in changes(node):
            if operator == "drop at_least_float32" and old in together:
                continue
            text = ast.unparse(new)
            if isinstance(new, (ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp)):
                text = f"({text})"
            first, last = starts[old.lineno - 1], starts[old.end_lineno]
            start, end = first + old.col_offset, starts[old.end_lineno - 1] + old.end_col_offset
            changed = raw[:start] + text.encode() + raw[end:]
            before, after = raw[first:last], changed[first : len(changed) - len(raw) + last]
            name = f"{where}: {ast.unparse(old)} -> {text}"
            names[name] += 1
            name += f" #{names[name]}" if names[name] > 1 else ""
            shown = [" ".join(lines.decode().split()) for lines in (before, after)]
            found.append(Mutant(module, old.lineno, operator, name, *shown, changed.decode()))
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and field not in ("annotation", "returns"):
                    visit(child, where)

    visit(ast.parse(source), module)
    return found


class _Mutated(importlib.machinery.SourceFileLoader):
    """Finder and loader of one module, from ``source`` in place of what its file holds."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self.source = source

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> Any:
        return compile(self.source, self.path, "exec", dont_inherit=True)


class Runner:
    """Runs test files in forked processes, each with its own mutant; what they write goes to ``scratch``."""

    def __init__(self, root: Path, package: str, tests: list[Path], scratch: Path) -> None:
        self.root, self.package, self.tests, self.scratch = root, package, tests, scratch
        self.folder = root.joinpath(*package.split("."))
        self.texts = self._texts()
        os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(scratch / "hypothesis")
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(root))

    def prepare(self) -> float:
        """Import what the tests import but the project itself; the seconds they took, or 0 if they fail."""
        importlib.import_module("pytest")
        for test in self.tests:
            for name in re.findall(r"^(?:import|from) (\w+)", self.texts[test], re.MULTILINE):
                if name != self.package.split(".")[0]:
                    self._import(name)
        begin = time.monotonic()
        ((_, verdict),) = self.run([None], limit=1800)
        if verdict != "survived":
            return 0.0
        for name in json.loads(
            (self.scratch / "modules.json").read_text(encoding="utf-8")
        ):  # such as what torch.compile needs
            self._import(name)
        gc.freeze()  # else pytest's garbage collections go through all of it, and copy its pages
        return time.monotonic() - begin

    def _texts(self) -> dict[Path, str]:
        return {path: path.read_text(encoding="utf-8") for path in (*self.tests, *sorted(self.folder.glob("*.py")))}

    def edited(self) -> list[Path]:
        """The tests and modules that are no longer what they were at the start: what was killed may be due to that."""
        return [path for path, text in self._texts().items() if self.texts.get(path) != text]

    @staticmethod
    def _import(name: str) -> None:
        with suppress(Exception):
            importlib.import_module(name)

    def run(
        self, mutants: Iterable[Mutant | None], *, limit: float, jobs: int = 1
    ) -> Iterator[tuple[Mutant | None, str]]:
        """(mutant, "survived", "killed" or "killed by timeout") as they finish; None is the code as it is."""
        waiting = deque((mutant, self._stages(mutant)) for mutant in mutants)
        running: dict[int, tuple[Any, list[list[Path]], float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    mutant, stages = waiting.popleft()
                    running[self._fork(mutant, stages[0])] = mutant, stages[1:], time.monotonic() + limit
                time.sleep(0.005)
                for pid, (mutant, stages, deadline) in list(running.items()):
                    late = time.monotonic() > deadline
                    if late:
                        os.killpg(pid, signal.SIGKILL)
                    done, status = os.waitpid(pid, 0 if late else os.WNOHANG)
                    if not done:
                        continue
                    del running[pid]
                    passed = not late and os.waitstatus_to_exitcode(status) in (0, 5)  # 5: all are deselected
                    if passed and stages:
                        waiting.appendleft((mutant, stages))
                    else:
                        yield mutant, "survived" if passed else "killed by timeout" if late else "killed"
        finally:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)

    def _stages(self, mutant: Mutant | None) -> list[list[Path]]:
        """The test files that name the module or something public in it, then the others."""
        if mutant is None:
            return [self.tests]
        tree = ast.parse(mutant.source)
        public = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        word = re.compile(rf"\b({'|'.join([mutant.module, *public])})\b")
        near = [test for test in self.tests if word.search(self.texts[test])]
        near.sort(key=lambda test: mutant.module not in test.name)
        return [stage for stage in (near, [test for test in self.tests if test not in near]) if stage]

    def _fork(self, mutant: Mutant | None, tests: list[Path]) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setsid()
            folder = self.scratch / (str(os.getpid()) if mutant else "without")
            folder.mkdir()
            os.chdir(folder)
            output = os.open("output", os.O_WRONLY | os.O_CREAT)
            os.dup2(output, 1)
            os.dup2(output, 2)
            status = self._test(mutant, tests)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _test(self, mutant: Mutant | None, tests: list[Path]) -> int:
        import pytest
        from hypothesis import Phase, settings

        # Without the phase that looks for a smaller example, which can take minutes.
        phases = (Phase.explicit, Phase.generate)
        settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
        settings.load_profile("mutants")
        if mutant:
            sys.pycache_prefix, sys.dont_write_bytecode = str(self.scratch / "pycache"), False
            name, path = f"{self.package}.{mutant.module}", self.folder / f"{mutant.module}.py"
            sys.meta_path.insert(0, _Mutated(name, path, mutant.source))
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={self.root}", "--basetemp=temporary"]
        status = int(pytest.main([*options, *map(str, tests)]))
        if not mutant:
            files = {name: getattr(module, "__file__", None) or "" for name, module in list(sys.modules.items())}
            foreign = [n for n, f in files.items() if "site-packages" in f or not Path(f).is_relative_to(self.root)]
            (self.scratch / "modules.json").write_text(json.dumps(foreign), encoding="utf-8")
        return status


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="+", metavar="NAME", help="file names without .py; all when not given")
    parser.add_argument("--tests", nargs="+", type=Path, metavar="PATH", help="test files, or folders of them")
    parser.add_argument("--limit", type=int, metavar="N", help="a sample of N mutants a module, always the same")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--equivalent", action="store_true", help="run those listed as equivalent: all should survive")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once")
    parser.add_argument("--package", default="diffusion_align.estimators", help="what is mutated")
    parser.add_argument("--root", type=Path, default=Path(__file__).parent.parent, help="the folder the package is in")
    options = parser.parse_args(arguments)
    root = options.root.resolve()
    paths = [path.resolve() for path in options.tests or [root / "tests" / "estimators"]]
    tests = [test for path in paths for test in (sorted(path.rglob("test_*.py")) if path.is_dir() else [path])]
    folder = root.joinpath(*options.package.split("."))
    needed = [*paths, *(folder / f"{module}.py" for module in options.modules or [])]
    if missing := [str(path) for path in needed if not path.exists()]:
        parser.error(f"there is no {', '.join(missing)}")
    modules = options.modules or sorted(path.stem for path in folder.glob("*.py"))
    mutants: list[Mutant] = []
    counts = {module: Counter[str]() for module in modules}
    stale: set[str] = set()
    for module in modules:
        found = mutants_of(module, (folder / f"{module}.py").read_text(encoding="utf-8"))
        stale |= {name for name in EQUIVALENT if name.startswith(f"{module}.")} - {mutant.name for mutant in found}
        kept = [mutant for mutant in found if (mutant.name in EQUIVALENT) == options.equivalent]
        counts[module]["left out"] = len(found) - len(kept)
        if options.limit is not None and options.limit < len(kept):
            kept = [kept[i] for i in sorted(random.Random(0).sample(range(len(kept)), options.limit))]
        mutants += kept
    if options.list:
        for mutant in mutants:
            print(f"{mutant.module}.py:{mutant.line} [{mutant.operator}] {mutant.name}")
        return 0
    wanted = "survived" if options.equivalent else "killed"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # No automatic refresh: that would be a thread, and a fork may hold the locks of other threads for ever.
    with tempfile.TemporaryDirectory() as scratch, Progress(*columns, TimeRemainingColumn(), auto_refresh=False) as bar:
        task = bar.add_task("without a mutant", total=len(mutants))
        bar.refresh()
        runner = Runner(root, options.package, tests, Path(scratch))
        seconds = runner.prepare()
        if not seconds:
            print(
                (Path(scratch) / "without" / "output").read_text(encoding="utf-8")
                + "The tests must pass before there is a mutant."
            )
            return 2
        for mutant, verdict in runner.run(mutants, limit=20 + 5 * seconds, jobs=options.jobs):
            counts[mutant.module][verdict] += 1
            bar.update(task, advance=1, description=mutant.module, refresh=True)
            if verdict != wanted:
                place = f"{mutant.module}.py:{mutant.line} [{mutant.operator}] {verdict}"
                text = f"{place}: {mutant.before}  =>  {mutant.after}"
                bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        edited = runner.edited()
    gc.unfreeze()
    print(f"{'module':24s} mutants  killed  by timeout  survived  left out")
    total = Counter[str]()
    for module, count in [*counts.items(), ("total", total)]:
        total.update(count if module != "total" else {})
        killed, late, survived = count["killed"], count["killed by timeout"], count["survived"]
        print(
            f"{module:24s} {killed + late + survived:7d}  {killed + late:6d}  {late:10d}  {survived:8d}  "
            f"{count['left out']:8d}"
        )
    for name in sorted(stale):
        print(f"EQUIVALENT names a mutant that there is not: {name}")
    if edited:
        print(f"Edited in the meantime, so the counts mean nothing: {', '.join(path.name for path in edited)}")
        return 2
    bad = sum(
        total[verdict] for verdict in ("killed", "killed by timeout", "survived") if not verdict.startswith(wanted)
    )
    return 1 if bad or stale else 0


if __name__ == "__main__":
    sys.exit(main())
