"""scripts/gpu_check.py on a machine without a GPU: every section on tiny models, and what it makes of failures."""

import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import gpu_check_meters as meters
import gpu_check_sections as sections
import pytest
import torch
from typer.testing import CliRunner

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
FAKE = """
import json, os, sys, time
name, file, settings = sys.argv[1:]
assert set(json.loads(settings)) == {"device", "tiny", "folder", "until"}
def say(**row):
    with open(file, "a") as out:
        out.write(json.dumps(row) + "\\n")
say(figure="speed", value=2.5, unit="images/s")
if name == "sd15":
    say(check="the ratio is 1", passed=True)
if name == "sdxl":
    time.sleep(100)
if name == "sd35":
    print("what it printed", flush=True)
    os.kill(os.getpid(), 9)
if name == "flux":
    say(skipped="it needs 40 GiB")
if name == "ratio":
    say(check="the ratio is exactly 1", passed=False)
if name == "resume":
    say(failed="ValueError: no such thing", traceback="Traceback: here")
    sys.exit(1)
"""


def check(*arguments):
    return CliRunner().invoke(gpu_check.app, ["--device", "cpu", "--tiny", *map(str, arguments)])


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Its sections by name, the text to read and what was printed, of fake sections that end in every way."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(gpu_check, "SECTIONS", tmp_path / "fake.py")
    monkeypatch.setattr(gpu_check, "MOST", gpu_check.MOST | {"sdxl": 1})
    monkeypatch.setattr(gpu_check, "NEEDS", gpu_check.NEEDS | {"tests": 10_000})
    done = check("--output", tmp_path / "out")
    assert done.exit_code == 1
    found = json.loads((tmp_path / "out/gpu_check.json").read_text())
    return {one["section"]: one for one in found["sections"]}, (tmp_path / "out/gpu_check.md").read_text(), done.output


def test_a_section_that_fails_is_reported_and_the_others_run(report):
    found, text, printed = report
    assert {name: one["status"] for name, one in found.items()} == {
        **dict.fromkeys(("machine", "sd15", "batch-sizes", "text-135m", "text-1b"), "passed"),
        **dict.fromkeys(("sdxl", "sd35", "ratio", "resume"), "failed"),
        **dict.fromkeys(("flux", "tests"), "skipped"),
    }
    assert found["sdxl"]["why"] == "it did not end within 4 s"
    assert found["sd35"]["why"] == "its process ended with status -9"
    assert found["sd35"]["traceback"] == "what it printed\n"
    assert found["ratio"]["why"] == "not so: the ratio is exactly 1"
    assert (found["resume"]["why"], found["resume"]["traceback"]) == ("ValueError: no such thing", "Traceback: here")
    assert found["flux"]["why"] == "it needs 40 GiB"
    assert "s were left, and it needs about 1000 s" in found["tests"]["why"]
    assert all(one["figures"] == [["speed", 2.5, "images/s"]] for one in found.values() if one["section"] != "tests")
    assert "| speed | 2.5 | images/s |" in text
    assert "- **not so**: the ratio is exactly 1" in text
    assert "Traceback: here" in text
    assert "5 passed, 4 failed, 2 skipped" in printed


def test_what_cannot_be_is_refused_in_a_sentence(tmp_path):
    for arguments, sentence in (
        (["--only", "sdx"], "--only 'sdx' is no section: use machine, sd15"),
        (["--device", "tpu"], "--device 'tpu' must be cuda or cpu"),
    ):
        done = check(*arguments, "--output", tmp_path)
        assert done.exit_code == 2
        assert sentence in done.output
    done = CliRunner().invoke(gpu_check.app, ["--device", "cpu"])
    assert (done.exit_code, "add --tiny" in done.output) == (2, True)
    if not torch.cuda.is_available():
        done = CliRunner().invoke(gpu_check.app, [])
        assert (done.exit_code, "torch sees no CUDA GPU here" in done.output) == (2, True)
    assert list(gpu_check.NEEDS) == list(gpu_check.MOST) == list(sections.SECTIONS)
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in sections.SECTIONS)


def where(tmp_path, device="cpu"):
    return sections.Where(device, True, str(tmp_path / "runs"), 2e10)


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_error_and_a_skip_are_written_by_the_process_itself(tmp_path, monkeypatch):
    def broken(find, where):
        find.figure("first", 1, "s")
        raise ValueError("no such thing")

    def skipping(find, where):
        raise sections.Skipped("not here")

    monkeypatch.setattr(sections, "SECTIONS", {"broken": broken, "skipping": skipping})
    settings = json.dumps(asdict(where(tmp_path)))
    threads = torch.get_num_threads()
    try:
        assert sections.main("broken", str(tmp_path / "a"), settings) == 1
        assert sections.main("skipping", str(tmp_path / "b"), settings) == 0
    finally:
        torch.set_num_threads(threads)
    first, failed = rows(tmp_path / "a")
    assert (first["value"], failed["failed"]) == (1, "ValueError: no such thing")
    assert "in broken" in failed["traceback"]
    assert rows(tmp_path / "b") == [{"skipped": "not here"}]


def test_the_batch_is_halved_until_doctor_says_it_fits(tmp_path, monkeypatch):
    size, found = sections.IMAGE_SIZES["sd15"], []
    place = where(tmp_path, "cuda")
    find = sections.Findings(tmp_path / "found")
    for free in (2**60, None, 0):
        if free is None:  # too little for the batch of the recipe, enough for half of it
            free = int(sections.ROOM * found[0].peak)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        if free == 0:
            with pytest.raises(sections.Skipped, match=r"needs .* GiB.* with a batch of one, and 0\.0 GiB are free"):
                sections._fitting(find, place, size)
            continue
        settings, estimate = sections._fitting(find, place, size)
        found.append(estimate)
        assert settings["micro_batch_size"] == settings["sample_batch_size"]
    assert [row["value"] for row in rows(tmp_path / "found")] == [4, 2]
    assert found[1].peak < found[0].peak


def test_operators_and_operations_are_counted():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    assert meters.operators(lambda: (a @ b).view(-1).add_(1).t()) == 2  # views are none
    assert meters.operations(lambda: a @ b) == 2 * 3 * 4 * 5
    assert meters.matrix_rate(CPU, torch.float32, 32) > 0
    assert meters.seconds(lambda: None, CPU) >= 0
    assert meters.kernels(lambda: None, CPU) is None


def test_kernels_of_a_profile_are_told_from_copies(monkeypatch):
    """There is no GPU: its events are made up, with the attributes that torch's own have."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).add_(1)
    real = profiler.events()[0]
    assert real.time_range.elapsed_us() >= 0
    assert real.device_type == torch.autograd.DeviceType.CPU

    def event(name, us, kind=torch.autograd.DeviceType.CUDA, **more):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(elapsed_us=lambda: us), **more)

    events = [event("aten::add", 50, torch.autograd.DeviceType.CPU), event("vectorized_elementwise_kernel", 30)]
    events += [
        event("Memcpy HtoD (Pageable -> Device)", 5),
        event("gemm", 7),
        event("step", 99, is_user_annotation=True),
    ]

    class Profile:
        def __init__(self, activities):
            self.events = lambda: events

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    found = meters.kernels(lambda: None, torch.device("cuda"))
    assert (found.count, found.copies) == (2, 1)
    assert found.seconds == pytest.approx(42e-6)


def test_waits_of_the_host_are_counted_by_the_line_they_are_in(monkeypatch):
    with meters.waits() as waited:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("another", stacklevel=1)
        assert waited.count == 3
    [(line, count)] = waited.lines().items()
    assert line.startswith("scripts/test_gpu_check.py:")
    assert count == 3
    assert not torch.is_warn_always_enabled()


def test_tensors_of_two_runs_are_compared_bit_for_bit():
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3])}
    assert sections._distance(one, {name: tensor.clone() for name, tensor in one.items()}) == 0
    assert sections._distance(one, one | {"a": torch.tensor([1.0, 2.5])}) == 0.25
    with pytest.raises(RuntimeError, match="other tensors: \\['b'\\]"):
        sections._distance(one, {"a": one["a"]})


def run(tmp_path, *arguments, timeout):
    """As a person runs it."""
    command = [sys.executable, "scripts/gpu_check.py", "--device", "cpu", "--tiny", "--output", str(tmp_path / "out")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )
    found = json.loads((tmp_path / "out/gpu_check.json").read_text())
    return done, {one["section"]: one for one in found["sections"]}


def test_one_section_in_its_own_process(tmp_path):
    done, found = run(tmp_path, "--only", "machine", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = {name: value for name, value, _ in found["machine"]["figures"]}
    assert figures["torch"].startswith(torch.__version__.partition("+")[0])
    assert figures["matrix products in bfloat16"] >= 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a process is killed")
def test_every_section_runs_on_tiny_models(tmp_path):
    done, found = run(tmp_path, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr + json.dumps(found, indent=1)
    assert list(found) == list(sections.SECTIONS)
    assert {one["status"] for one in found.values()} == {"passed"}
    for name in ("sd15", "sdxl", "sd35", "flux"):
        figures = {(figure, unit): value for figure, value, unit in found[name]["figures"]}
        assert figures["sampling", "images/s, decoding and reward too"] > 0
        assert figures["training", "samples x steps/s"] > 0
        assert figures["adapted layers", ""] > 0
        assert figures["bare forward pass", "operators"] > 0
    assert found["resume"]["checks"] == [
        ["a run killed in epoch 3 left a checkpoint", True],
        ["the resumed run has the bits of the whole one, they differ by 0", True],
    ]
