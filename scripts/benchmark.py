"""What a training epoch, the log-probs of tokens, and answers of the command line cost.

Not tests: run them on a quiet machine.

    python scripts/benchmark.py ddpo                # the embedded model, as ddpo_emoji_aesthetic trains it
    python scripts/benchmark.py diffusion-dpo       # the embedded model, as dpo_emoji_style trains it
    python scripts/benchmark.py grpo                # the embedded language model, as grpo_tiny trains it
    python scripts/benchmark.py dpo                 # and as dpo_multi_negative_tiny does
    python scripts/benchmark.py ddpo --growth       # and how time and memory grow with images and steps
    python scripts/benchmark.py token-log-probs     # in chunks of the vocabulary, and with log_softmax and gather
    python scripts/benchmark.py commands            # what is answered without a model, beside ``import torch``
    python scripts/benchmark.py report              # what report.html costs a run, and of 2000 epochs
    python scripts/benchmark.py pairs               # the start of pair training, by kind of file and number of pairs
    python scripts/benchmark.py peers               # our epochs beside TRL's; docs/performance.md

All but the last five: how much an epoch costs on top of the bare network passes it needs. Every epoch is followed by
exactly the passes it made (same batch sizes and lengths, same adapter, with or without a backward pass), so that both
see the same machine; the median of the ratios is what counts. Tokens per second are those of the backward passes,
padding and prompts too, over the whole epoch.

``token-log-probs`` (Linux, on the CPU; the defaults need 5 GB): every form and pass has its own process. Its memory is
the peak of the resident memory over what is resident once the inputs are there, so the result and the gradients
count: where logits are given, their gradient alone is as large as they are. "forward" is without a graph.

``pairs``: CPU-seconds and seconds per 1000 pairs before the first update, without the passes of the VAE; then the same
where all latents are there; then what opening a list of many rows takes. The images are synthetic.

``commands``: CPU-seconds, of Python's start too; ``import torch`` is measured in the same run, since machines differ.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peers import peers

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

ANSWERS = [
    ["--help"],
    ["--version"],
    ["train", "--help"],
    ["list"],
    *(["list", what] for what in ("methods", "configs", "models", "prompts", "pairs", "rewards", "settings")),
    ["list", "settings", "grpo"],
    ["list", "settings", "nosuch"],
    ["train", "nosuch"],
    ["train", "quickstart", "method=nosuch"],
    ["train", "quickstart", "epocs=3"],
    ["train", "dpo_emoji_style", "epocs=3"],
    ["train", "grpo_tiny", "epocs=3"],
    ["train", "quickstart", "epochs=-1"],
    ["train", "quickstart", "samples_per_epoch=7"],
    ["train", "quickstart", "reward=nosuch"],
]
"""Command lines that are answered without a model, the last ones by what is wrong with them."""


@app.callback()
def benchmarks() -> None:
    """Benchmarks, one command each."""


app.command()(peers)


@app.command()
def ddpo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe")] = None,
    recipe: str = "ddpo_emoji_aesthetic",
    epochs: int = 5,
    growth: Annotated[
        bool, typer.Option(help="also other numbers of images and steps, each in its own process")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """DDPO's epoch time over the time of its UNet passes, and the peak memory."""
    if growth:
        rows = [
            _in_own_process(
                *("ddpo", "--epochs", "3", "--recipe", recipe, *(overrides or [])),
                *(f"samples_per_epoch={samples}", f"sampler.steps={steps}"),
            )
            for samples, steps in ((16, 10), (32, 10), (64, 10), (32, 5), (32, 20))
        ]
    else:
        rows = [measure(recipe, overrides or [], epochs)]
    _print_epochs(rows, as_json)


@app.command()
def diffusion_dpo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe")] = None,
    recipe: str = "dpo_emoji_style",
    epochs: int = 9,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Diffusion-DPO's epoch time over the time of its UNet passes, and the peak memory; latents are there already."""
    _print_epochs([measure(recipe, overrides or [], epochs)], as_json)


@app.command()
def grpo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe")] = None,
    recipe: str = "grpo_tiny",
    epochs: int = 5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """GRPO's epoch time over the time of its forward, backward and generating passes; tokens per second."""
    _print_text([measure(recipe, overrides or [], epochs)], as_json)


@app.command()
def dpo(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe")] = None,
    recipe: str = "dpo_multi_negative_tiny",
    epochs: int = 5,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Online DPO's epoch time over the time of its forward, backward and generating passes; tokens per second."""
    _print_text([measure(recipe, overrides or [], epochs)], as_json)


@app.command()
def report(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value on top of the recipe")] = None,
    recipe: str = "quickstart",
    many: Annotated[int, typer.Option(help="epochs of a long run, made of the rows of the short one")] = 2000,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """How much of a run's time its report takes, and how long the report of a run of many epochs."""
    from diffusion_align import report as reports
    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.pipelines.run import run

    spent, write_report = [], reports.write_report

    def timed(folder: Path) -> Path:
        before = time.perf_counter()
        path = write_report(folder)
        spent.append(time.perf_counter() - before)
        return path

    with tempfile.TemporaryDirectory() as scratch:
        reports.write_report = timed
        config = read_config(recipe, [f"output_dir={scratch}/run", *(overrides or [])])
        folder = run(config).folder
        reports.write_report = write_report
        rows = reports.read_metrics(folder / "metrics.jsonl")
        took = sum(row.get("time/epoch", 0.0) for row in rows)
        steps, epochs = max(row["step"] for row in rows), max(row["epoch"] for row in rows)
        with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
            for turn in range(-(-many // epochs)):
                for row in rows:
                    later = {"step": row["step"] + turn * steps, "epoch": row["epoch"] + turn * epochs}
                    file.write(json.dumps(row | later) + "\n")
        before = time.perf_counter()
        write_report(folder)
        long = time.perf_counter() - before
    found = {"times": len(spent), "seconds": statistics.median(spent), "share": sum(spent) / took, "many": long}
    if as_json:
        print(json.dumps(found | {"peak_mib": _peak_mib()}))
        return
    each = f"{len(spent)} times in {epochs} epochs, {found['seconds']:.3f} s each (median)"
    print(f"{each}, {found['share']:.2%} of the epochs' time; {long:.2f} s for {many} epochs")


@app.command()
def pairs(
    counts: Annotated[list[int] | None, typer.Argument(help="numbers of pairs; 200 and 800 if not given")] = None,
    size: Annotated[int, typer.Option(help="side of the images, and of the run")] = 768,
    rows: Annotated[int, typer.Option(help="of the lists that are only opened; 0 for none")] = 1_000_000,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """What the start of pair training costs."""
    import pair_start

    stages = ("rows", "files", "identity", "images")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("png", "jpg"):
            for count in counts or [200, 800]:
                folder = pair_start.write_pairs(Path(scratch) / f"{kind}{count}", count, size, kind)
                for again in (False, True):
                    took = pair_start.start(folder, Path(scratch) / f"latents {kind}{count}", size)
                    each = {stage: [1000 / count * seconds for seconds in took[stage]] for stage in stages}
                    found.append({"kind": kind, "pairs": count, "again": again, "decoded": took["decoded"], **each})
        for suffix in (".jsonl", ".csv", ".parquet") if rows else ():
            path = pair_start.write_rows(Path(scratch) / f"{kind}{count}" / f"many{suffix}", rows, kind)
            found.append({"list": suffix, **pair_start.open_rows(path)})
    if as_json:
        print(json.dumps(found))
        return
    print(
        "CPU-seconds (seconds) per 1000 pairs\nfiles   pairs    latents  decoded" + "".join(f"{s:>16}" for s in stages)
    )
    for row in found:
        if "list" in row:
            took = f"{row['cpu']:.1f} CPU-seconds, {row['seconds']:.1f} s, {row['mib']:.0f} MiB"
            print(f"{row['list']} of {row['rows']} rows: {took}")
            continue
        each = "".join(f"{row[s][0]:8.2f} ({row[s][1]:5.2f})" for s in stages)
        there = "there" if row["again"] else "missing"
        print(f"{row['kind']}  {row['pairs']:8d}  {there:>9}  {row['decoded']:7d}{each}")


def _print_text(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows[0]))
        return
    print(" samples  epoch s  bare s  ratio (median, min-max)  trained tokens/s  peak MiB")
    for row in rows:
        print(
            f"{row['samples']:8d}  {row['epoch']:7.2f}  {row['bare']:6.2f}  "
            f"{row['ratio']:5.3f} ({row['low']:.3f}-{row['high']:.3f})  {row['tokens_per_second']:16.0f}  "
            f"{row['peak_mib']:8.0f}"
        )


def _print_epochs(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows[0]))
        return
    print(" samples  steps  epoch s  bare s  ratio (median, min-max)  peak MiB")
    for row in rows:
        print(
            f"{row['samples']:8d}  {row['steps']:5d}  {row['epoch']:7.2f}  {row['bare']:6.2f}  "
            f"{row['ratio']:5.3f} ({row['low']:.3f}-{row['high']:.3f})  {row['peak_mib']:18.0f}"
        )


def measure(recipe: str, overrides: list[str], epochs: int) -> dict[str, Any]:
    """Run ``epochs`` epochs after one to warm up; seconds, ratios, peak memory and, of text, tokens per second."""
    from bare_passes import LanguagePasses, UNetPasses, called_before_collecting

    from diffusion_align.methods import method_of
    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.pipelines.run import run

    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output_dir={folder}/run",
            f"epochs={epochs + 2}",
            "grid_every=0",
            "checkpoint_every=1000",
            *overrides,
        ]
        config: Any = read_config(recipe, settings)
        began: list[float] = []
        results: list[tuple[float, float, int]] = []

        def before_collecting(trainer: Any) -> None:
            now = time.perf_counter()
            if began:
                results.append((now - began.pop(), passes.seconds(trainer), passes.trained_tokens))
            passes.clear()
            began.append(time.perf_counter())

        of_images = method_of(config.method).model_kind == "image"
        counting: Any = UNetPasses() if of_images else LanguagePasses()
        with counting as passes, called_before_collecting(before_collecting):
            run(config)
    measured = results[1:]  # the first epoch warms up
    ratios = [epoch / bare for epoch, bare, _ in measured]
    row = {
        "samples": config.samples_per_epoch,
        "epoch": statistics.median(epoch for epoch, _, _ in measured),
        "bare": statistics.median(bare for _, bare, _ in measured),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "peak_mib": _peak_mib(),
    }
    if of_images:
        row["steps"] = getattr(config, "steps_per_pair", config.sampler.steps)
    else:
        row["tokens_per_second"] = statistics.median(tokens / epoch for epoch, _, tokens in measured)
    return row


def _peak_mib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


CASES = {  # what is given, and whether there is a backward pass
    "float32-logits-forward": (torch.float32, False),
    "float32-logits-backward": (torch.float32, True),
    "bfloat16-logits-forward": (torch.bfloat16, False),
    "bfloat16-logits-backward": (torch.bfloat16, True),
    "hidden-states-backward": (None, True),
    "frozen-head-backward": (None, True),  # as with LoRA: the weight has no gradient
}


@app.command()
def token_log_probs(
    batch: int = 4,
    length: int = 1024,
    vocabulary: int = 50_000,
    width: Annotated[int, typer.Option(help="of the hidden states")] = 576,
    chunk_size: int = 1024,
    repeats: Annotated[int, typer.Option(help="the median time of so many")] = 3,
    only: Annotated[
        str | None, typer.Option(help="this form and case, in this process: naive:hidden-states-backward")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Memory and time of token log-probs, in chunks of the vocabulary against log_softmax and gather."""
    if only is not None:
        form, case = only.split(":")
        print(json.dumps(measure_log_probs(form, case, (batch, length, vocabulary, width), chunk_size, repeats)))
        return
    sizes = {"batch": batch, "length": length, "vocabulary": vocabulary, "width": width}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    options += [f"--chunk-size={chunk_size}", f"--repeats={repeats}"]
    rows = {
        case: [_in_own_process("token-log-probs", f"--only={form}:{case}", *options) for form in ("naive", "chunked")]
        for case in CASES
    }
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{batch} x {length} tokens, {vocabulary} in the vocabulary, width {width}, chunks of {chunk_size}, ", end="")
    print(f"{torch.get_num_threads()} thread(s); the differences are the largest between the two forms")
    print("                             peak MiB above the inputs          seconds                 difference of")
    print("given, pass                 naive  chunked   ratio    naive  chunked   ratio      value   gradient")
    for case, (naive, chunked) in rows.items():
        print(
            f"{case:25s} {naive['mib']:7.0f}  {chunked['mib']:7.0f}  {naive['mib'] / chunked['mib']:6.2f}  "
            f"{naive['seconds']:7.2f}  {chunked['seconds']:7.2f}  {naive['seconds'] / chunked['seconds']:6.2f}  "
            f"{chunked['value']:9.1e}  " + (f"{chunked['gradient']:9.1e}" if CASES[case][1] else "        -")
        )


@app.command()
def commands(repeats: int = 3, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """CPU-seconds of answers that need no model, and their ratio to those of ``import torch``; medians."""
    reference = _cpu_seconds(["-c", "import torch"], repeats)
    lines = {" ".join(answer): _cpu_seconds(["-m", "diffusion_align", *answer], repeats) for answer in ANSWERS}
    if as_json:
        print(json.dumps({"import torch": reference, **lines}))
        return
    print(f"CPU s  ratio\n{reference:5.2f}   1.00  import torch")
    for line, seconds in lines.items():
        print(f"{seconds:5.2f}  {seconds / reference:5.2f}  {line}")


def _cpu_seconds(arguments: list[str], repeats: int) -> float:
    """Of Python run with ``arguments``: user and system time, the median."""
    seconds = []
    for _ in range(repeats):
        child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds.append(used.ru_utime + used.ru_stime)
    return statistics.median(seconds)


def measure_log_probs(
    form: str, case: str, sizes: tuple[int, int, int, int], chunk_size: int, repeats: int
) -> dict[str, float]:
    """Peak memory and median time of one form; of the chunked one also how far it is from the naive one."""
    from diffusion_align import estimators

    batch, length, vocabulary, width = sizes
    dtype, backward = CASES[case]
    torch.manual_seed(0)
    labels = torch.randint(0, vocabulary, (batch, length))
    if dtype is None:
        inputs = [torch.randn(batch, length, width), torch.randn(vocabulary, width).mul_(2 * width**-0.5)]
    else:
        inputs = [torch.randn(batch, length, vocabulary, dtype=dtype).mul_(2)]

    def naive(labels: torch.Tensor, first: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        logits = first @ weight[0].T if weight else first.float()
        return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    def chunked(labels: torch.Tensor, first: torch.Tensor, *weight: torch.Tensor) -> torch.Tensor:
        if weight:
            return estimators.linear_token_log_probs(first, *weight, labels, chunk_size=chunk_size)
        return estimators.token_log_probs(first, labels, chunk_size=chunk_size)

    def run(call: Callable[..., torch.Tensor], labels: torch.Tensor, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The value and the gradients of its sum."""
        trained = 1 if case.startswith("frozen") else len(inputs)
        leaves = [x.detach().requires_grad_(backward and i < trained) for i, x in enumerate(inputs)]
        with torch.set_grad_enabled(backward):
            value = call(labels, *leaves)
            return [value.detach(), *(torch.autograd.grad(value.sum(), leaves[:trained]) if backward else [])]

    call = {"naive": naive, "chunked": chunked}[form]
    run(call, labels[:1, :1], inputs[0][:1, :1], *inputs[1:])  # what is loaded at the first call is not to count
    seconds = []
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts anew
    for _ in range(repeats):
        result = None
        start = time.perf_counter()
        result = run(call, labels, *inputs)
        seconds.append(time.perf_counter() - start)
    measured = {"mib": max(_resident_mib("VmHWM") - before, 2**-10), "seconds": statistics.median(seconds)}
    if form == "chunked":
        differences = [(a - b).abs().max().item() for a, b in zip(result, run(naive, labels, *inputs))]
        measured |= {"value": differences[0], "gradient": max(differences[1:], default=0.0)}
    return measured


def _resident_mib(field: str) -> float:
    """VmRSS, resident now, or VmHWM, the peak of it."""
    (line,) = (
        x for x in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if x.startswith(f"{field}:")
    )
    return int(line.split()[1]) / 1024


def _in_own_process(command: str, *arguments: str) -> Any:
    line = [sys.executable, str(Path(__file__)), command, "--json", *arguments]
    finished = subprocess.run(line, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    return json.loads(finished.stdout.splitlines()[-1])


if __name__ == "__main__":
    app()
