"""Our epochs beside TRL's at equal work, alternating in one run: ``benchmark.py peers``.

A process of ours and one of TRL's load their models and then make an epoch in turn, whenever this one asks, so that
both see the same machine: a round is one epoch of each, and a ratio is taken within a round. Work is counted, not
assumed: rows (of images) or tokens (of text) that went through the network, without and with a gradient.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from peer_environment import OFFLINE, default_folder, environment, python_of

SCRIPTS = Path(__file__).resolve().parent
Epoch = dict[str, Any]
"""What ``peer_side.Side`` tells of an epoch."""

PROMPTS = ["a lion", "a panda", "a red apple", "a pizza", "a rocket", "a guitar", "a crab", "an umbrella"]
MICRO_BATCH = 8
COMPLETIONS, GROUP, PAIRS_PER_STEP, PAIR_TOKENS = 16, 8, 16, 64


@dataclass(frozen=True)
class Variant:
    """One side: how its process is started."""

    name: str
    python: Path
    script: str
    given: Mapping[str, Any]
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return [str(self.python), str(SCRIPTS / self.script), json.dumps(dict(self.given))]


class Process(contextlib.AbstractContextManager["Process"]):
    """A side that is asked for its epochs.

    Attributes:
        told: what it told once its model was loaded.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (in __exit__)
        own = {"PYTHONPATH": str(SCRIPTS.parent)} if variant.script == "peer_ours.py" else {}
        self._process = subprocess.Popen(
            variant.command,
            env=environment(**OFFLINE, **own, **variant.variables),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
        )
        try:
            self.told: dict[str, Any] = self._read()
        except BaseException:
            self._process.kill()
            raise

    def epoch(self) -> Epoch:
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read()[-3000:]
            raise SystemExit(f"{self.variant.name} ended with exit status {self._process.returncode}:\n{last}")
        found: dict[str, Any] = json.loads(line)
        return found


def alternate(variants: Sequence[Variant], rounds: int) -> tuple[dict[str, list[Epoch]], dict[str, dict[str, Any]]]:
    """Name -> ``rounds`` epochs after one to warm up, made in turn; and what each told at first."""
    found: dict[str, list[Epoch]] = {variant.name: [] for variant in variants}
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(Process(variant)) for variant in variants]
        for turn in range(rounds + 1):
            for process in processes:
                epoch = process.epoch()
                if turn:
                    found[process.variant.name].append(epoch)
        return found, {process.variant.name: process.told for process in processes}


# -- what is made of the epochs ----------------------------------------------------------------------------------------


def middle(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, smallest, largest."""
    return statistics.median(values), min(values), max(values)


def training(epoch: Epoch) -> float:
    """Seconds of an epoch that are not of sampling."""
    return float(epoch["wall"] - epoch["sampling"])


SECONDS: dict[str, Callable[[Epoch], float]] = {
    "epoch": lambda epoch: epoch["wall"],
    "CPU": lambda epoch: epoch["cpu"],
    "sampling": lambda epoch: epoch["sampling"],
    "training": training,
}


def advantage(ours: Sequence[Epoch], theirs: Sequence[Epoch], seconds: str) -> tuple[float, float, float]:
    """Theirs over ours, round by round: above 1 we are faster. Median, smallest, largest."""
    of = SECONDS[seconds]
    return middle([of(their) / of(our) if of(our) else float("nan") for our, their in zip(ours, theirs, strict=True)])


def epoch_table(found: Mapping[str, Sequence[Epoch]]) -> list[str]:
    """A line for each variant: seconds, and what was done in them."""
    width = max(map(len, found))
    lines = [f"{'':{width}s}  epoch s (min-max)      CPU s  sampling s  training s  peak MiB  sampled   trained"]
    for name, epochs in found.items():
        wall, low, high = middle([epoch["wall"] for epoch in epochs])
        cpu, sampling, trained = (
            statistics.median(SECONDS[of](epoch) for epoch in epochs) for of in ("CPU", "sampling", "training")
        )
        work = epochs[-1]["work"]
        lines.append(
            f"{name:{width}s}  {wall:6.2f} ({low:.2f}-{high:.2f})  {cpu:9.2f}  {sampling:10.2f}  {trained:10.2f}  "
            f"{max(epoch['peak'] for epoch in epochs):8.0f}  {work.get('sampled', 0):7d}  {work.get('trained', 0):8d}"
        )
    return lines


def ratio_table(
    found: Mapping[str, Sequence[Epoch]], ours: Sequence[str], theirs: Sequence[str], seconds: str
) -> list[str]:
    """Every variant of ours over every one of theirs."""
    width = max(map(len, ours))
    lines = [f"{'':{width}s}  " + "  ".join(f"{name:>22s}" for name in theirs)]
    for our in ours:
        cells = [advantage(found[our], found[their], seconds) for their in theirs]
        lines.append(
            f"{our:{width}s}  " + "  ".join(f"{f'{m:.2f} ({low:.2f}-{high:.2f})':>22s}" for m, low, high in cells)
        )
    return lines


def parts_table(found: Mapping[str, Sequence[Epoch]]) -> list[str]:
    """Share of the epoch's time of each named part, over all epochs, and of what has no name."""
    names = sorted({part for epochs in found.values() for epoch in epochs for part in epoch["parts"]})
    width = max(map(len, [*names, "without a name"]))
    lines = [f"{'':{width}s}  " + "  ".join(f"{name:>22s}" for name in found)]
    totals = {name: sum(epoch["wall"] for epoch in epochs) for name, epochs in found.items()}
    named = dict.fromkeys(found, 0.0)
    for part in names:
        cells = []
        for name, epochs in found.items():
            seconds = sum(epoch["parts"].get(part, 0.0) for epoch in epochs)
            named[name] += seconds
            cells.append(f"{seconds / len(epochs):12.3f} s  {seconds / totals[name]:6.1%}")
        lines.append(f"{part:{width}s}  " + "  ".join(f"{cell:>22s}" for cell in cells))
    rest = {name: totals[name] - named[name] for name in found}
    cells = [f"{rest[name] / len(epochs):12.3f} s  {rest[name] / totals[name]:6.1%}" for name, epochs in found.items()]
    return [*lines, f"{'without a name':{width}s}  " + "  ".join(f"{cell:>22s}" for cell in cells)]


# -- images ------------------------------------------------------------------------------------------------------------


def ddpo_overrides(samples: int, steps: int, guidance: float, threads: int | None) -> list[str]:
    """On top of ddpo_emoji_jpeg: TRL's settings, every step, and nothing beside the epoch."""
    return [
        "reward=jpeg_compressibility",
        f"prompts={json.dumps(PROMPTS)}",
        f"sampler={{steps: {steps}, guidance_scale: {guidance:g}, eta: 1.0}}",
        f"samples_per_epoch={samples}",
        "group_size=1",
        "advantages=prompt_history",
        "timestep_range=null",
        "timestep_fraction=1",
        "updates_per_epoch=2",
        "lora={rank: 4, layers: attention}",
        "learning_rate=3e-4",
        "adam_betas=[0.9, 0.999]",
        "kl_coef=0",
        "clip_range_nats=null",
        "grid_every=0",
        *([] if threads is None else [f"num_threads={threads}"]),
    ]


def shape(sampling: int, training: int, precision: str) -> list[str]:
    return [f"sample_batch_size={sampling}", f"micro_batch_size={training}", f"mixed_precision={precision}"]


@dataclass(frozen=True)
class Images:
    """The task of the image table."""

    samples: int = 32
    steps: int = 10
    guidance: float = 5.0
    threads: int | None = None

    @property
    def batch(self) -> int:
        """Of equal shapes: 8, as TRL's examples have, where there are enough samples for two updates."""
        return min(MICRO_BATCH, self.samples // 2)

    def ours(self, name: str, overrides: Sequence[str], **given: Any) -> Variant:
        settings = [*ddpo_overrides(self.samples, self.steps, self.guidance, self.threads), *overrides]
        return Variant(
            name, Path(sys.executable), "peer_ours.py", {"recipe": "ddpo_emoji_jpeg", "overrides": settings, **given}
        )

    def theirs(self, python: Path, model: Path, sampling: int, training: int, precision: str) -> Variant:
        given = {
            "model": str(model),
            "samples": self.samples,
            "steps": self.steps,
            "guidance": self.guidance,
            "updates": 2,
            "prompts": PROMPTS,
            "sample_batch_size": sampling,
            "train_batch_size": training,
            "mixed_precision": precision,
            "threads": self.threads,
        }
        return Variant(f"TRL {sampling}/{training} {PRECISIONS[precision]}", python, "peer_trl_ddpo.py", given)

    def shapes(self) -> Iterator[tuple[int, int]]:
        """Of TRL: batches of sampling, and of training, that divide them and leave two updates."""
        for sampling in (self.samples, self.samples // 2, self.samples // 4):
            for training in (self.samples // 2, self.samples // 4):
                if training and sampling and sampling % training == 0:
                    yield sampling, training


PRECISIONS = {"no": "float32", "bf16": "bf16"}


def write_image_model(folder: Path) -> None:
    """emoji-sd as diffusers saves it, with a tokenizer as transformers 4 reads it too."""
    from diffusion_align.pipelines import ImageAlignmentPipeline

    ImageAlignmentPipeline.from_pretrained("emoji-sd").save_pretrained(str(folder))
    place = folder / "tokenizer"
    tokenizer = json.loads((place / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (place / "vocab.json").write_text(json.dumps(tokenizer["vocab"]), encoding="utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["merges"]]
    (place / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")


def compare_images(task: Images, free: Sequence[str], rounds: int, folder: Path) -> dict[str, Any]:
    """Equal shapes in float32 and bf16, TRL's best shape, and ours with each of the overrides ``free``."""
    python, batch = python_of("trl-0.23", folder), task.batch
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "emoji-sd"
        write_image_model(model)
        theirs = [task.theirs(python, model, batch, batch, precision) for precision in PRECISIONS]
        tried = {}
        for sampling, training in task.shapes():
            candidate = task.theirs(python, model, sampling, training, "no")
            found, _ = alternate([candidate], 1)
            tried[candidate.name] = (found[candidate.name][0]["wall"], candidate)
        best = min(tried.values(), key=lambda pair: pair[0])[1]
        if best.name not in [variant.name for variant in theirs]:
            theirs.append(best)
        ours = [task.ours(f"ours {batch}/{batch} {PRECISIONS[p]}", shape(batch, batch, p)) for p in PRECISIONS]
        ours += [task.ours(f"ours {overrides}", overrides.split()) for overrides in free]
        # In turn, one of ours and one of theirs, as far as both go.
        longest = max(len(ours), len(theirs))
        order = [side[i] for i in range(longest) for side in (ours, theirs) if i < len(side)]
        found, told = alternate(order, rounds)
    names = [variant.name for variant in ours], [variant.name for variant in theirs]
    shapes = {name: seconds for name, (seconds, _) in tried.items()}
    return {"epochs": found, "told": told, "ours": names[0], "theirs": names[1], "shapes": shapes, "best": best.name}


def print_images(result: Mapping[str, Any], task: Images) -> None:
    found = result["epochs"]
    print(
        f"DDPO, emoji-sd, {task.samples} images x {task.steps} steps, guidance {task.guidance:g}, LoRA rank 4, two "
        "updates, every step, JPEG; sampling batch/training batch"
    )
    print(versions(result["told"]))
    print("\n".join(epoch_table(found)))
    for seconds, what in (("epoch", "wall seconds"), ("CPU", "CPU-seconds")):
        print(f"\nTRL's {what} over ours, median of {len(next(iter(found.values())))} rounds (smallest-largest)")
        print("\n".join(ratio_table(found, result["ours"], result["theirs"], seconds)))
    print(f"\nTRL's best shape is {result['best']}; one epoch each: ", end="")
    print(", ".join(f"{name.removeprefix('TRL ')} {seconds:.2f} s" for name, seconds in result["shapes"].items()))
    for name in result["ours"]:
        print(f"{name}: {json.dumps(result['told'][name]['settings'])}")
    print("\nWhere the time goes, seconds per epoch")
    print("\n".join(parts_table({name: found[name] for name in (result["ours"][0], result["theirs"][0])})))


def versions(told: Mapping[str, Mapping[str, Any]]) -> str:
    """What ran, in one line."""
    trl = {one["version"] for one in told.values() if "version" in one}
    torch, threads = {one["torch"] for one in told.values()}, {one["threads"] for one in told.values()}
    load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores" if hasattr(os, "getloadavg") else ""
    return (
        f"TRL {', '.join(sorted(trl)) or '-'}, torch {', '.join(sorted(torch))}, "
        f"{', '.join(map(str, sorted(threads)))} threads{load}"
    )


# -- text --------------------------------------------------------------------------------------------------------------


def write_language_model(folder: Path, vocabulary: int) -> None:
    """A Llama of hidden size 256 and 6 layers with random weights, and a tokenizer of words w0, w1, ..."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    words = special + [f"w{i}" for i in range(vocabulary - len(special))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(str(folder))


def text_rows(vocabulary: int, count: int, words: int, *, pairs: bool) -> list[dict[str, str]]:
    """Prompts of 16 words; with ``pairs`` also two completions of ``words`` words."""
    import random

    stream, most = random.Random(0), vocabulary - 4

    def text(length: int) -> str:
        return " ".join(f"w{stream.randrange(most)}" for _ in range(length))

    rows = [{"prompt": text(16)} for _ in range(count)]
    if not pairs:
        return rows
    return [row | {"chosen": " " + text(words), "rejected": " " + text(words)} for row in rows]


@dataclass(frozen=True)
class Text:
    """One line of the text table."""

    method: str
    vocabulary: int
    length: int
    samples: int = COMPLETIONS
    micro_batch: int = MICRO_BATCH
    threads: int | None = None
    rise: bool = False
    precision: str = "no"
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.method} {self.vocabulary:6d} {self.length:4d}"

    def sides(self, python: Path, folder: Path) -> list[Variant]:
        """Ours and TRL's of the model in ``folder``, where the data of ours is written."""
        rows = text_rows(self.vocabulary, 64, self.length, pairs=self.method == "dpo")
        data = folder / f"{self.method}{self.length}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        group = min(GROUP, self.samples)
        settings = [
            f"model={folder}",
            f"samples_per_epoch={self.samples}",
            f"sample_batch_size={self.samples}",
            f"micro_batch_size={self.micro_batch}",
            "updates_per_epoch=1",
            f"max_completion_length={self.length}",
            "learning_rate=1e-5",
            f"mixed_precision={self.precision}",
            "lora=null",
            "grid_every=0",
            *([] if self.threads is None else [f"num_threads={self.threads}"]),
        ]
        if self.method == "grpo":
            settings += [f"prompts={data}", "reward=peer_reward:digits", f"group_size={group}", "kl_coef=0"]
        else:
            settings += [f"dataset={data}", "beta=0.1"]
        recipe = folder / f"{self.method}{self.length}.yaml"
        recipe.write_text(f"method: {self.method}\n", encoding="utf-8")
        # Freed blocks go back to the system, so that the resident memory shows what is in use.
        variables = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if self.rise else {}
        given: dict[str, Any] = {"recipe": str(recipe), "overrides": [*settings, *self.overrides], "rise": self.rise}
        ours = Variant("ours", Path(sys.executable), "peer_ours.py", given, variables)
        given = {
            "method": self.method,
            "model": str(folder),
            "rows": rows,
            "samples": self.samples,
            "micro_batch_size": self.micro_batch,
            "group_size": group,
            "length": self.length,
            "learning_rate": 1e-5,
            "bf16": self.precision == "bf16",
            "threads": self.threads,
            "rise": self.rise,
        }
        return [ours, Variant("TRL", python, "peer_trl_text.py", given, variables)]


def compare_text(tasks: Sequence[Text], rounds: int, folder: Path) -> dict[str, Any]:
    """Task -> its epochs; each task has its own two processes."""
    python = python_of("trl-newest", folder)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for task in tasks:
            model = Path(scratch) / str(task.vocabulary)
            if not model.is_dir():
                write_language_model(model, task.vocabulary)
            found, told = alternate(task.sides(python, model), rounds)
            result[task.name + (" rise" if task.rise else "")] = {"epochs": found, "told": told}
            print(f"{task.name} measured", file=sys.stderr, flush=True)
    return result


def text_table(result: Mapping[str, Any]) -> list[str]:
    lines = [
        "method  vocab  tokens     ours s    TRL s  TRL/ours (min-max)    CPU  sampling  training  "
        "passed without, with a gradient (ours; TRL)"
    ]
    for name, one in result.items():
        ours, theirs = one["epochs"]["ours"], one["epochs"]["TRL"]
        seconds = [statistics.median(epoch["wall"] for epoch in side) for side in (ours, theirs)]
        ratio, low, high = advantage(ours, theirs, "epoch")
        cpu, sampling, trained = (advantage(ours, theirs, of)[0] for of in ("CPU", "sampling", "training"))
        tokens = "; ".join(
            f"{side[-1]['work'].get('sampled', 0)}, {side[-1]['work'].get('trained', 0)}" for side in (ours, theirs)
        )
        shown = f"{ratio:.2f} ({low:.2f}-{high:.2f})"
        apart = f"{sampling:8.2f}" if sampling == sampling else "       -"
        lines.append(
            f"{name:20s}  {seconds[0]:9.3f}  {seconds[1]:7.3f}  {shown:>18s}  {cpu:5.2f}  {apart}  {trained:8.2f}  "
            f"{tokens}"
        )
    return lines


def print_text(result: Mapping[str, Any]) -> None:
    rises = {name: one for name, one in result.items() if name.endswith(" rise")}
    timed = {name: one for name, one in result.items() if name not in rises}
    for one in list(result.values())[:1]:
        print(f"Llama, hidden 256, 6 layers, trained as a whole, float32; {versions(one['told'])}")
    if timed:
        print("\n".join(text_table(timed)))
        for name, one in timed.items():
            print(f"\n{name}: where the time goes, seconds per epoch")
            print("\n".join(parts_table(one["epochs"])))
    for name, one in rises.items():
        above = {side: max(epoch["rise"] for epoch in epochs) for side, epochs in one["epochs"].items()}
        print(
            f"\n{name.removesuffix(' rise')}: from before the loss to the end of the backward pass, the memory rises "
            + ", ".join(f"{side} {mib:.0f} MiB" for side, mib in above.items())
        )


# -- levers ------------------------------------------------------------------------------------------------------------


def levers(task: Images) -> dict[str, list[str]]:
    """Name -> overrides, one lever each, and all of them."""
    small, large = shape(task.batch, task.batch, "no"), shape(task.samples, task.samples, "no")
    return {
        "none": small,
        "batch": large,
        "channels_last": [*small, "channels_last=true"],
        "bf16": shape(task.batch, task.batch, "bf16"),
        "attention sdpa": [*small, "attention=sdpa"],
        "batch, channels_last": [*large, "channels_last=true"],
        "batch, bf16": shape(task.samples, task.samples, "bf16"),
        "batch, bf16, channels_last": [*shape(task.samples, task.samples, "bf16"), "channels_last=true"],
        "previews every epoch": [*small, "grid_every=1"],
    }


def compare_levers(task: Images, rounds: int) -> dict[str, Any]:
    variants = [task.ours(name, overrides) for name, overrides in levers(task).items()]
    found, told = alternate([*variants, task.ours("KL monitor", levers(task)["none"], monitor=True)], rounds)
    return {"epochs": found, "told": told}


def lever_table(found: Mapping[str, Sequence[Epoch]]) -> list[str]:
    """How much faster than without any lever, in each round."""
    width = max(map(len, found))
    lines = [f"{'':{width}s}  epoch s  CPU s   times as fast (min-max)   by CPU  sampling  training"]
    base = found["none"]
    for name, epochs in found.items():
        ratio, low, high = advantage(epochs, base, "epoch")
        cpu, sampling, trained = (advantage(epochs, base, of)[0] for of in ("CPU", "sampling", "training"))
        wall, used = (statistics.median(SECONDS[of](epoch) for epoch in epochs) for of in ("epoch", "CPU"))
        shown = f"{ratio:.2f} ({low:.2f}-{high:.2f})"
        lines.append(
            f"{name:{width}s}  {wall:7.2f}  {used:5.2f}  {shown:>24s}  {cpu:7.2f}  {sampling:8.2f}  {trained:8.2f}"
        )
    return lines


# -- the command -------------------------------------------------------------------------------------------------------


def peers(
    what: Annotated[
        list[str] | None, typer.Argument(help="ddpo, grpo, dpo, memory (of the loss); all if not given")
    ] = None,
    rounds: Annotated[int, typer.Option("--pairs", help="epochs of each side, after one to warm up")] = 5,
    ours: Annotated[
        list[str] | None,
        typer.Option(help="another variant of ours, such as 'sample_batch_size=auto micro_batch_size=auto'"),
    ] = None,
    samples: Annotated[int, typer.Option(help="images per epoch")] = 32,
    steps: Annotated[int, typer.Option(help="of the image sampler")] = 10,
    vocabularies: Annotated[str, typer.Option(help="of the language models")] = "8192,49152",
    lengths: Annotated[str, typer.Option(help="of GRPO's completions")] = "32,128,512",
    text_overrides: Annotated[str, typer.Option(help="key=value for ours of the text lines")] = "",
    threads: Annotated[int | None, typer.Option(help="torch's, on both sides; its own number if not given")] = None,
    environment_folder: Annotated[
        Path | None,
        typer.Option("--environment", help="where TRL's environments are; in the user's cache if not given"),
    ] = None,
    levers: Annotated[bool, typer.Option("--levers", help="instead: what each lever of ours gives")] = False,
    growth: Annotated[bool, typer.Option("--growth", help="instead: how our time and memory grow")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="everything that was measured")] = False,
) -> None:
    """Our epochs beside TRL's at equal work, in turn; or our own levers, or how our time and memory grow."""
    task, folder = Images(samples, steps, threads=threads), environment_folder or default_folder()
    result: dict[str, Any] = {}
    if growth:
        from peer_growth import grow, growth_tables

        result["growth"] = grow(threads)
        lines = growth_tables(result["growth"])
        print(json.dumps(result) if as_json else "\n".join(lines))
        return
    if levers:
        result["levers"] = compare_levers(task, rounds)
        if as_json:
            print(json.dumps(result))
            return
        found = result["levers"]["epochs"]
        print(f"{versions(result['levers']['told'])}; {task.samples} images x {task.steps} steps, guidance 5")
        print("\n".join(lever_table(found)))
        print("\nWhere the time goes, seconds per epoch")
        print("\n".join(parts_table({name: found[name] for name in ("none", "batch, bf16, channels_last")})))
        return
    chosen = what or ["ddpo", "grpo", "dpo", "memory"]
    if unknown := set(chosen) - {"ddpo", "grpo", "dpo", "memory"}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: choose from ddpo, grpo, dpo, memory")
    if "ddpo" in chosen:
        result["ddpo"] = compare_images(task, ours or [], rounds, folder)
        if not as_json:
            print_images(result["ddpo"], task)
            print(flush=True)
    tasks = text_tasks(chosen, numbers(vocabularies), numbers(lengths), threads, tuple(text_overrides.split()))
    if tasks:
        result["text"] = compare_text(tasks, rounds, folder)
        if not as_json:
            print_text(result["text"])
    if as_json:
        print(json.dumps(result))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def text_tasks(
    chosen: Sequence[str],
    vocabularies: Sequence[int],
    lengths: Sequence[int],
    threads: int | None,
    overrides: tuple[str, ...] = (),
) -> list[Text]:
    """The lines of the text table; memory is of four completions of 256 tokens of the largest vocabulary."""
    tasks = []
    for vocabulary in vocabularies:
        of = {"vocabulary": vocabulary, "threads": threads, "overrides": overrides}
        if "grpo" in chosen:
            tasks += [Text("grpo", length=length, **of) for length in lengths]
        if "dpo" in chosen:
            tasks.append(Text("dpo", length=PAIR_TOKENS, samples=PAIRS_PER_STEP, **of))
    if "memory" in chosen:
        of = {"vocabulary": max(vocabularies), "threads": threads, "overrides": overrides}
        tasks.append(Text("grpo", length=min(256, max(lengths)), samples=4, micro_batch=4, rise=True, **of))
    return tasks
