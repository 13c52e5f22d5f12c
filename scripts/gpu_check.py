"""What this package does on this machine's GPU: speed, memory, exactness and resume, in one report.

    python scripts/gpu_check.py                         # on a machine with CUDA, from a checkout: under 10 minutes
    python scripts/gpu_check.py --only machine,sdxl     # some sections
    python scripts/gpu_check.py --device cpu --tiny     # the same code on tiny models, for a machine without a GPU

It needs the package and its dependencies with a torch for CUDA (``pip install -e .``; the section "tests" pytest too),
no network and no weights: models of the published sizes are built on the GPU with random weights in bfloat16.

Sections: machine; sd15, sdxl, sd35, flux (an epoch of the shipped recipe, fewer images and steps: images per second,
memory against ``doctor``, share of the measured matrix rate, kernels, waits of the host); ratio (1 before any update);
resume (killed and resumed, the same tensors); batch-sizes; text-135m, text-1b (GRPO, tokens per second); tests
(``pytest -m gpu tests/gpu``). Each has a process of its own. One that does not fit into the GPU's memory or the time
that is left is skipped, with the reason; one that fails is in the report with its traceback, and the others run.

``gpu_check.json`` and ``gpu_check.md`` hold every figure with its unit. The exit status is 0 only if every section that
ran has passed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a checkout works without an installation

NEEDS = {"machine": 20, "sd15": 40, "sdxl": 50, "sd35": 60, "flux": 70, "ratio": 40, "resume": 40} | {
    "batch-sizes": 30,
    "text-135m": 35,
    "text-1b": 35,
    "tests": 40,
}
"""Seconds that must be left for a section to begin."""
MOST = dict.fromkeys(NEEDS, 120) | {"tests": 150}
"""Seconds after which a section is ended; on a CPU, which may be slow, four times as many."""
SECTIONS = Path(__file__).with_name("gpu_check_sections.py")


@dataclass
class Result:
    """One section: "passed", "failed" or "skipped", and what it found.

    Attributes:
        why: of the failure, or why it was skipped, in one sentence.
        figures: [name, value, unit] each.
        checks: [sentence, whether it passed] each.
        notes: what was left out, and why.
    """

    section: str
    status: str
    seconds: float = 0.0
    why: str = ""
    figures: list[list[Any]] = field(default_factory=list)
    checks: list[list[Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    traceback: str = ""


def check_gpu(
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="tiny models, as a CPU needs them")] = False,
    minutes: Annotated[float, typer.Option(min=0.1, help="for everything; what does not fit is skipped")] = 9.5,
    only: Annotated[str, typer.Option(help=f"sections, joined by commas: {', '.join(NEEDS)}")] = "",
    output: Annotated[Path, typer.Option(help="folder of gpu_check.json and gpu_check.md")] = Path("runs/gpu_check"),
) -> None:
    begun = time.time()
    chosen = [name.strip() for name in only.split(",") if name.strip()] or list(NEEDS)
    if unknown := [name for name in chosen if name not in NEEDS]:
        _refuse(f"--only {unknown[0]!r} is no section: use {', '.join(NEEDS)}")
    if device not in ("cuda", "cpu"):
        _refuse(f"--device {device!r} must be cuda or cpu")
    if device == "cpu" and not tiny:
        _refuse("--device cpu takes hours with models of the published sizes: add --tiny")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            _refuse("torch sees no CUDA GPU here: use --device cpu --tiny, or a torch for CUDA")
    output.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gpu_check-") as scratch:
        for name in chosen:
            results.append(_run(name, device, tiny, Path(scratch), begun + 60 * minutes))
            _say(results[-1])
            write_report(output, results, time.time() - begun, device=device, tiny=tiny)  # a kill leaves it
    counts = {status: sum(r.status == status for r in results) for status in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), f"in {time.time() - begun:.0f} s")
    print(f"report: {output / 'gpu_check.md'}")
    raise typer.Exit(1 if counts["failed"] else 0)


def _refuse(sentence: str) -> None:
    print(sentence, file=sys.stderr)
    raise typer.Exit(2)


def _run(name: str, device: str, tiny: bool, scratch: Path, end: float) -> Result:
    """A section in its own process, ended when its time is over."""
    left = end - time.time()
    needs = NEEDS[name] / (10 if tiny else 1)
    if left < needs:
        return Result(name, "skipped", why=f"{max(0, left):.0f} s were left, and it needs about {needs:.0f} s")
    most = min(MOST[name] * (4 if device == "cpu" else 1), left)
    file, log = scratch / f"{name}.jsonl", scratch / f"{name}.log"
    where = {"device": device, "tiny": tiny, "folder": str(scratch / name), "until": time.time() + most - 2}
    command = [sys.executable, str(SECTIONS), name, str(file), json.dumps(where)]
    begun = time.time()
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(device),
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )
        try:
            status = process.wait(most)
        except subprocess.TimeoutExpired:
            status = None
        finally:  # whatever it has started ends with it
            _end_group(process)
    result = _read(name, file, status)
    result.seconds = round(time.time() - begun, 1)
    if status is None:
        result.status, result.why = "failed", f"it did not end within {most:.0f} s"
    if result.status == "failed" and not result.traceback:
        result.traceback = log.read_text(encoding="utf-8", errors="replace")[-4000:]
    return result


def _end_group(process: subprocess.Popen[bytes]) -> None:
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()


def _environment(device: str) -> dict[str, str]:
    """Of a section: this checkout and the scripts first, and nothing from the Hub."""
    paths = [str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    given |= {"TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        given |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "GPU_TESTS_ON": "cpu"}
    return given


def _read(name: str, file: Path, status: int | None) -> Result:
    """What a section wrote, and how it stands."""
    result = Result(name, "passed")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # it was ended while it wrote
            continue
        if "figure" in row:
            result.figures.append([row["figure"], row["value"], row["unit"]])
        elif "check" in row:
            result.checks.append([row["check"], row["passed"]])
        elif "note" in row:
            result.notes.append(row["note"])
        elif "skipped" in row:
            result.status, result.why = "skipped", row["skipped"]
        else:
            result.status, result.why, result.traceback = "failed", row["failed"], row["traceback"]
    broken = [sentence for sentence, passed in result.checks if not passed]
    if result.status == "passed" and broken:
        result.status, result.why = "failed", f"not so: {broken[0]}"
    if result.status == "passed" and status != 0:
        result.status, result.why = "failed", f"its process ended with status {status}"
    return result


def _say(result: Result) -> None:
    why = f"  {result.why.splitlines()[0][:160]}" if result.why else ""
    print(f"{result.section:12} {result.status:8} {result.seconds:6.1f} s{why}", flush=True)


def write_report(output: Path, results: list[Result], seconds: float, *, device: str, tiny: bool) -> None:
    """``gpu_check.json`` and ``gpu_check.md``."""
    about = {"device": device, "tiny": tiny, "seconds": round(seconds, 1)}
    found = about | {"sections": [asdict(result) for result in results]}
    (output / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "gpu_check.md").write_text(as_markdown(results, about), encoding="utf-8")


def as_markdown(results: list[Result], about: dict[str, Any]) -> str:
    """The report to read: a table of the sections, then the figures of each."""
    small = "tiny models, whose figures say nothing of a GPU; " if about["tiny"] else ""
    lines = ["# GPU check", "", f"{small}device {about['device']}, {about['seconds']:.0f} s", ""]
    lines += ["| section | status | seconds | why |", "|---|---|---:|---|"]
    lines += [f"| {r.section} | {r.status} | {r.seconds} | {_cell(r.why)} |" for r in results]
    for result in results:
        lines += ["", f"## {result.section}", ""]
        if result.figures:
            lines += ["| figure | value | unit |", "|---|---:|---|"]
            lines += [f"| {name} | {_cell(_shown(value))} | {unit} |" for name, value, unit in result.figures]
            lines += [""]
        lines += [f"- {'passed' if passed else '**not so**'}: {sentence}" for sentence, passed in result.checks]
        lines += [f"- {note.splitlines()[0]}" for note in result.notes]
        if result.traceback:
            lines += ["", "```", result.traceback.rstrip(), "```"]
        elif printed := [note for note in result.notes if "\n" in note]:
            lines += ["", "```", *printed, "```"]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return ", ".join(f"{key}: {inner}" for key, inner in value.items()) if isinstance(value, dict) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:400]


check_gpu.__doc__ = __doc__
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command()(check_gpu)

if __name__ == "__main__":
    app()
