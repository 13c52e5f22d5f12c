"""The run report: one HTML file that holds everything it shows, readable years later and without the run folder."""

from __future__ import annotations

import base64
import functools
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from PIL import Image

from diffusion_align import yaml_text
from diffusion_align.errors import short
from diffusion_align.images import UnreadableImage, open_image
from diffusion_align.inputs import check_path
from diffusion_align.report import plots
from diffusion_align.report.metrics import (
    IMAGE_KL,
    Row,
    is_number,
    natural_x,
    numeric_keys,
    read_descriptions,
    read_evaluation,
    read_metrics,
    series,
)
from diffusion_align.report.plots import Panel
from diffusion_align.report.status import RunStatus, read_status, status_text
from diffusion_align.writing import write_text

MAX_GRIDS = 6
MAX_OTHER_METRICS = 24
MIN_FOR_ERROR = 5  # fewer updates tell too little about their spread for a standard error
MAX_IMAGE_WIDTH = 1600  # wider images are shrunk inside the report; the files keep their size
FOLDED_BEYOND = 400  # characters of a text that are shown before the rest is folded away
FOLDED_LINES = 8
MAX_ROWS = 32  # of a table; the files hold the others
PATIENCE = 120.0  # seconds beyond three epochs after which a page that says running says that it has no news
FIRST_PATIENCE = 900.0  # seconds until then where no epoch has ended yet, whose length is not known

PREFERENCE_PANELS = (
    Panel({"rewards/accuracies": "accuracy"}, (0.5, "chance")),
    Panel({"rewards/margins": "margin"}, (0.0, "reference")),
    Panel({"rewards/chosen": "chosen", "rewards/rejected": "rejected"}, (0.0, "reference"), title="Implicit reward"),
    Panel({"error/winner": "winner", "error/loser": "loser"}, (0.0, "reference"), title="Error − the reference's"),
    Panel({"kl/winner": "winner", "kl/loser": "loser"}, title="KL to the reference, per step"),
    Panel({"error/winner_ratio": "winner"}, (1.0, "reference")),
    Panel({"drift": "drift"}),
)
SCORE_PANELS = (
    Panel({"accuracy": "trained on", "eval/accuracy": "held out"}, (0.5, "chance")),
    Panel({"margin": "trained on", "eval/margin": "held out"}, (0.0, "no preference")),
    Panel({"scores/chosen": "chosen", "scores/rejected": "rejected"}, (0.0, "0"), title="Scores"),
)
COMPLETION_PANELS = (
    Panel(
        {"completions/mean_length": "mean", "completions/min_length": "shortest", "completions/max_length": "longest"}
    ),
    Panel({"completions/clipped_ratio": "without"}),
    Panel({"entropy": "entropy"}, title="Entropy per token"),
)
CLIP_PANELS = (
    Panel(
        {"clip_ratio/region_mean": "either side", "clip_ratio/low_mean": "below", "clip_ratio/high_mean": "above"},
        unit="fraction of actions",
        smooth=False,
    ),
)
RATIO_PANELS = (
    Panel(
        {"ratio/mean": "mean", "ratio/max": "largest", "ratio/min": "smallest"},
        (0.0, "as sampled"),
        title="Importance ratio",
        unit="ratio − 1",
        less=1.0,
        smooth=False,
    ),
    Panel({"ratio/first_pass_deviation": "deviation"}, smooth=False),
)
NORM_PANELS = (Panel({"grad_norm": "norm"}, smooth=False),)


class Figure(NamedTuple):
    """A figure of the report: how it is plotted, over which x, the metrics (any one is enough), and how to read it."""

    draw: Callable[[Sequence[Row]], plots.Figure]
    x: str
    keys: Sequence[str]
    reading: str


def _of_panels(panels: Sequence[Panel], reading: str) -> Figure:
    keys = [key for panel in panels for key in panel.lines]
    return Figure(functools.partial(plots.plot_panels, shown=panels), "step", keys, reading)


_FIGURES = {
    "reward": Figure(
        plots.plot_reward,
        "epoch",
        ("reward",),
        "The mean reward of each epoch's samples, scored before the updates on them. Bands that do not overlap "
        "are a real difference.",
    ),
    "gold": Figure(
        plots.plot_held_out_reward,
        "epoch",
        ("gold", "gold_stderr", "diversity"),
        "Measured on the same prompts and the same noise every time; not trained on. If the training reward rises "
        "while the held-out reward falls, the reward is being hacked; a diversity that falls towards 0 means that all "
        "samples become one.",
    ),
    "preference": _of_panels(
        PREFERENCE_PANELS,
        "How often, and by how much, the policy prefers the chosen sample more than the reference does. The loss only "
        "depends on the gap between chosen and rejected: both rewards below 0, or both errors above 0, mean that both "
        "became less likely. A winner's error that keeps rising is divergence.",
    ),
    "score": _of_panels(
        SCORE_PANELS,
        "How often, and by how much, the chosen completion scores higher. Held-out pairs that fall behind those "
        "trained on are overfitting.",
    ),
    "completions": _of_panels(
        COMPLETION_PANELS,
        "How long the completions are, how many the length limit cut off before their end, and how undecided the "
        "policy is about the next token. Lengths that run away, or an entropy that falls towards 0, mean that a "
        "reward is exploited.",
    ),
    "clip": _of_panels(
        CLIP_PANELS,
        "Share of actions (steps or tokens) whose gradient the clip removed. Near 0 the clip does nothing; near 1 most "
        "of the gradient is lost.",
    ),
    "ratio": _of_panels(
        RATIO_PANELS,
        "Probability of a sampled action (step or token) now, divided by its probability when it was sampled. On the "
        "first pass nothing has been updated yet, so any deviation from 1 is numerical.",
    ),
    "norm": _of_panels(NORM_PANELS, "The norm of each update's gradient."),
    "time": Figure(
        plots.plot_time_split,
        "epoch",
        ("time/sample", "time/score", "time/update", "time/evaluation", "time/grid", "time/epoch"),
        "Where the seconds of each epoch went.",
    ),
}
_KL = ("kl", "kl_path", "kl_coef")
Described = Mapping[str, tuple[str, str, str]]
"""Metric -> its title, unit and how it is read."""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path.

    The file needs nothing beside it and nothing from the network. It is written whole or not at all. Whatever the run
    does not hold (no metrics yet, no samples) is left out, and the report mentions it. While the run lives, the page
    loads itself again every few seconds, and shows how old it is.

    Raises:
        ValueError: the folder holds nothing of a run, or its ``metrics.jsonl`` is damaged.
    """
    check_path(run_dir, f"the run folder {short(str(run_dir))}", error=ValueError)
    run_dir = Path(run_dir)
    if not any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl", "samples")):
        raise ValueError(
            f"{run_dir} is not a run folder, it holds neither config.yaml nor metrics.jsonl nor samples: "
            "give the output_dir of a run"
        )
    metrics = run_dir / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    config_path = run_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    config = _load_config(config_text)
    described = read_descriptions(run_dir / "metrics.json", config)
    status = read_status(run_dir)
    samples = run_dir / "samples"
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.get_template("report.html.j2").render(
        title=_title(run_dir, config),
        folder=run_dir.resolve().name,
        summary=" ".join([summary(rows, described), *_evaluation_sentences(rows, run_dir / "evaluation.json", status)]),
        status=_status(status, rows, config),
        before_after=_inline(samples / "before_after.png"),
        before_after_texts=before_after_table(samples),
        figures=list(_figures(rows, described)),
        other=_other_metrics(rows, described),
        grids=list(_grids(samples)),
        texts=[samples_table(path, label) for path, label in _some_epochs(samples, "jsonl")],
        config=list(_flatten(config)) if isinstance(config, dict) else [],
        config_text=config_text,
    )
    path = run_dir / "report.html"
    write_text(path, html)
    return path


def _status(status: RunStatus, rows: Sequence[Row], config: object) -> dict[str, Any]:
    """What the page says of how the run stands; its epochs and their length are those of the metrics."""
    epochs, seconds = series(rows, "time/epoch", x="epoch")
    epoch = max([status.epoch, *epochs[-1:].astype(int).tolist()])
    of = config.get("epochs") if isinstance(config, dict) else None
    patience = PATIENCE + 3 * float(seconds.mean()) if len(seconds) else FIRST_PATIENCE
    shown = status_text(replace(status, epoch=epoch), of if isinstance(of, int) else None)
    return shown | {"patience": patience if math.isfinite(patience) else FIRST_PATIENCE}


def summary(rows: Sequence[Row], described: Described = IMAGE_KL) -> str:
    """The run in one paragraph: reward or accuracy from start to end, cost, KL, largest ratio deviation.

    A text run says how long its completions were; one that logs neither rewards nor ratios says nothing of them.
    """
    if not rows:
        return "No metrics have been written yet."
    preference = _preference_sentences(rows)
    has_reward = len(series(rows, "reward", x="epoch")[0]) > 0
    has_ratio = len(series(rows, "ratio/first_pass_deviation")[0]) > 0
    samples = has_reward or any(key.startswith("ratio/") for key in numeric_keys(rows))
    compares = bool(preference) or not samples
    has_kl = len(series(rows, "kl")[0]) > 0
    sentences = [_reward_sentence(rows)] if has_reward or not compares else []
    sentences += preference + _completion_sentences(rows)
    if compares and not has_reward and (cost := _cost(rows)):
        sentences.append(f"The run took {cost}.")
    if has_kl or not compares:
        sentences.append(_kl_sentence(rows, described))
    if has_ratio or not compares:
        sentences.append(_ratio_sentence(rows))
    return " ".join(sentences)


def _reward_sentence(rows: Sequence[Row]) -> str:
    epochs, reward = series(rows, "reward", x="epoch")
    cost = _cost(rows)
    if not len(epochs):
        return f"No reward was logged; the run took {cost}." if cost else "No reward was logged."
    errors = dict(zip(*series(rows, "reward_stderr", x="epoch")))
    first, last = (_plus_minus(reward[i], 2 * errors.get(epochs[i], math.nan)) for i in (0, -1))
    note = " (± 2 standard errors)" if "±" in first + last else ""
    if len(epochs) == 1:
        return f"The mean reward of the only epoch so far is {first}{note}" + (f", after {cost}." if cost else ".")
    change = reward[-1] - reward[0]
    sentence = f"The mean reward {_verb(change)} from {first} to {last}{note}"
    error = math.hypot(errors.get(epochs[0], math.nan), errors.get(epochs[-1], math.nan))
    if error > 0:
        sentence += f", a change of {abs(change) / error:.1f} standard errors"
    return f"{sentence}, over {cost}."


def _evaluation_sentences(rows: Sequence[Row], path: Path, status: RunStatus) -> list[str]:
    """The held-out reward at the start, at its best and at the end; and why the run stopped early, if it did and its
    status does not tell."""
    sentences = []
    epochs, rewards = series(rows, "gold", x="epoch")
    if len(rewards):
        best = rewards.argmax()
        sentences.append(
            f"The held-out reward was {rewards[0]:.4g} after epoch {epochs[0]:.0f}, {rewards[best]:.4g} at its best "
            f"after epoch {epochs[best]:.0f} and {rewards[-1]:.4g} after epoch {epochs[-1]:.0f}."
        )
    if (stopped := read_evaluation(path).get("stopped")) and status.state != "stopped":
        sentences.append(f"The run was stopped by a rule: {stopped}.")
    return sentences


def _verb(change: float) -> str:
    return "rose" if change > 0 else "fell" if change < 0 else "went"


def _preference_sentences(rows: Sequence[Row]) -> list[str]:
    """Accuracy from the first to the last tenth of the updates; margin and errors in the last tenth."""
    name, key = "implicit accuracy", "rewards/accuracies"
    if not len(series(rows, key)[0]):
        name, key = "accuracy", "accuracy"
    _, accuracy = series(rows, key)
    count = len(accuracy)
    if not count:
        return []
    (start, first), (end, last) = _tenth(accuracy, first=True), _tenth(accuracy, first=False)
    if count == 1:
        sentence = f"The {name} of the only update so far is {last}"
    else:
        part = "first tenth" if count >= 20 else "first"
        sentence = (
            f"The {name} {_verb(end - start)} from {first} in the {part} of {count} updates to {last} in the last"
        )
    note = "; ± 2 standard errors" if "±" in first + last else ""
    sentences = [f"{sentence} (chance is 0.5{note})."]
    phrases = {
        "rewards/margins": "the implicit reward margin was {}",
        "margin": "the chosen one scored {} more",
        "error/winner": "the winner's error minus the reference's was {} nats",
        "error/loser": "the loser's error minus the reference's was {} nats",
    }
    ends = {key: series(rows, key)[1] for key in phrases}
    found = [phrases[key].format(_tenth(values, first=False)[1]) for key, values in ends.items() if len(values)]
    if found:
        sentences.append(f"There {_listed(found)}.")
    return sentences + _held_out_sentences(rows)


def _completion_sentences(rows: Sequence[Row]) -> list[str]:
    """How long the completions were in the first epoch and in the last, and how many were cut off."""
    _, lengths = series(rows, "completions/mean_length", x="epoch")
    _, clipped = series(rows, "completions/clipped_ratio", x="epoch")
    if not len(lengths):
        return []
    change = f"went from {lengths[0]:.3g} to {lengths[-1]:.3g}" if len(lengths) > 1 else f"was {lengths[0]:.3g}"
    cut = f"; the limit cut {100 * clipped[-1]:.3g} % of them off in the last epoch" if len(clipped) else ""
    return [f"The mean length of completions {change} tokens{cut}."]


def _held_out_sentences(rows: Sequence[Row]) -> list[str]:
    """The accuracy of a reward model on pairs it was not trained on."""
    _, accuracy = series(rows, "eval/accuracy", x="epoch")
    if not len(accuracy):
        return []
    last = f" and {accuracy[-1]:.3g} after the last" if len(accuracy) > 1 else ""
    return [f"On the held-out pairs it was {accuracy[0]:.3g} after the first epoch{last}."]


def _tenth(values: np.ndarray, *, first: bool) -> tuple[float, str]:
    """The mean of the first or last tenth, and as text with 2 standard errors if it has ``MIN_FOR_ERROR`` values."""
    size = max(1, len(values) // 10)
    part = values[:size] if first else values[-size:]
    error = part.std(ddof=1) / math.sqrt(size) if size >= MIN_FOR_ERROR else math.nan
    return float(part.mean()), _plus_minus(part.mean(), 2 * error)


def _listed(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _cost(rows: Sequence[Row]) -> str:
    """Epochs, pairs or else samples, and minutes, as far as they were logged."""
    parts = []
    n_epochs = len({row["epoch"] for row in rows if row.get("epoch") and not _is_update(row)})
    if n_epochs:
        parts.append(_count(n_epochs, "epoch"))
    for noun in ("pair", "sample"):
        _, used = series(rows, f"{noun}s_used", x="epoch")
        if len(used):
            parts.append(f"{_count(int(used.sum()), noun)} trained on")
            break
    _, seconds = series(rows, "time/epoch", x="epoch")
    if len(seconds):
        parts.append(f"{seconds.sum() / 60:.1f} minutes")
    return _listed(parts)


def _is_update(row: Row) -> bool:
    return "loss" in row or "grad_norm" in row


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _kl_sentence(rows: Sequence[Row], described: Described) -> str:
    found, count = [], 0
    for key in ("kl", "kl_path"):
        with_key = [row for row in rows if key in row]
        last_epoch = [row for row in with_key if row.get("epoch") == with_key[-1].get("epoch")]
        _, values = series(last_epoch, key)
        if len(values):
            found.append(f"{values.mean():.3g} {described[key][1] if key in described else 'nats'}")
            count = len(values)
    if not found:
        return "KL to the reference was not logged."
    mean = "over its samples" if count == 1 else "over its updates"
    return f"In the last epoch the policy was {' and '.join(found)} away from the reference (KL, mean {mean})."


def _ratio_sentence(rows: Sequence[Row]) -> str:
    _, deviations = series(rows, "ratio/first_pass_deviation")
    if not len(deviations):
        return "The importance ratio on the first pass was not logged."
    largest = deviations.max()
    if largest == 0:
        return "On the first pass over its samples the importance ratio was exactly 1 everywhere."
    return f"On the first pass over its samples the importance ratio strayed from 1 by at most {largest:.2g}."


def _plus_minus(value: float, error: float) -> str:
    """``value ± error`` to two digits of the error; the value alone where no error is known."""
    if not math.isfinite(value) or not math.isfinite(error):
        return f"{value:.4g}"
    decimals = 3 if error <= 0 else min(12, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def _title(run_dir: Path, config: object) -> str:
    parts = []
    if isinstance(config, dict):
        for key in ("method", "reward", "model"):
            value = config.get(key)
            if key == "reward" and not value:
                value = _source(config)
            if isinstance(value, dict):
                value = value.get("name") or " + ".join(map(str, value))
            elif isinstance(value, list):
                value = " + ".join(str(item.get("name", "")) if isinstance(item, dict) else str(item) for item in value)
            if value:
                place, _, name = str(value).rpartition(":")  # of a class of one's own
                shown = name if place else name.upper().replace("_", "-")
                parts.append(shown if key == "method" else Path(str(value)).name)
    return " · ".join(parts) or run_dir.resolve().name


def _source(config: dict) -> Any:
    """Where the pairs come from, if that has a name."""
    data = config.get("pairs") or config.get("dataset")
    source = data.get("source") if isinstance(data, dict) else None
    return source if isinstance(source, str) else None


def _load_config(text: str) -> Any:
    try:
        return yaml_text.parse(text)
    except yaml_text.YamlProblem:
        return None


def _flatten(config: dict, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys, as the command line takes them, with their values as YAML."""
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            text = yaml_text.dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
            yield f"{prefix}{key}", text.removesuffix("\n").removesuffix("\n...")


def _figures(rows: Sequence[Row], described: Described) -> Iterator[dict[str, Any]]:
    for name, (draw, x, keys, reading) in _FIGURES.items():
        if set(numeric_keys(rows, x=x)).intersection(keys):
            yield _figure(draw(rows), reading)
        if name == "reward" and len(components := plots.reward_component_keys(rows)) > 1:
            yield _figure(plots.plot_metrics(rows, components), "The rewards that were logged, one by one.")
        if name == "preference" and (kl := [key for key in _KL if key in numeric_keys(rows, x="step")]):
            titles = {key: described[key][0] for key in kl if key in described} | {"kl_coef": "Price of the KL"}
            panels = [Panel({key: "KL"}, title=titles.get(key, key)) for key in kl]
            yield _figure(
                plots.plot_panels(rows, panels), " ".join(described[key][2] for key in kl if key in described)
            )
    for key in _own(rows, described):
        yield _figure(plots.plot_metrics(rows, [key], described=described), described[key][2])


def _shown() -> set[str]:
    """Metrics that a plot of the report shows."""
    return {key for figure in _FIGURES.values() for key in figure.keys} | {*_KL, "reward_stderr", "kl_path_stderr"}


def _own(rows: Sequence[Row], described: Described) -> list[str]:
    """Metrics that the method declares and no plot of the report shows, as far as they were logged."""
    return [key for key in described if key in {*_drawable(rows)} - _shown()]


def _drawable(rows: Sequence[Row]) -> list[str]:
    return [key for key in numeric_keys(rows) if len(series(rows, key, x=natural_x([rows], key))[0])]


def _other_metrics(rows: Sequence[Row], described: Described) -> dict[str, Any] | None:
    """Every metric that no figure above shows, so that an algorithm that declares nothing is reported as well."""
    shown = _shown() | {*_own(rows, described), *plots.reward_component_keys(rows)}
    keys = [key for key in _drawable(rows) if key not in shown]
    if not keys:
        return None
    left_out = keys[MAX_OTHER_METRICS:]
    reading = f"Not plotted, see metrics.jsonl: {', '.join(left_out)}." if left_out else ""
    return _figure(plots.plot_metrics(rows, keys[:MAX_OTHER_METRICS], columns=3), reading)


def _figure(figure: plots.Figure, reading: str) -> dict[str, Any]:
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    return {
        "source": _data_uri(plots.figure_png(figure)),
        "alt": "Plot: " + "; ".join(titles),
        "wide": len(titles) > 1,
        "reading": reading,
    }


def _grids(samples: Path) -> Iterator[dict[str, Any]]:
    """The grids of some epochs."""
    for path, label in _some_epochs(samples, "png"):
        if source := _inline(path):
            yield {"source": source, "label": label}


def _some_epochs(samples: Path, suffix: str) -> Iterator[tuple[Path, str]]:
    """At most ``MAX_GRIDS`` of the epochs' files, evenly spread, the first and the last among them."""
    numbered = sorted(
        (int(match[1]), path)
        for path in samples.glob(f"epoch_*.{suffix}")
        if (match := re.fullmatch(r"epoch_(\d+)", path.stem))
    )
    count = min(MAX_GRIDS, len(numbered))
    for i in range(count):
        epoch, path = numbered[round(i * (len(numbered) - 1) / max(count - 1, 1))]
        yield path, f"After epoch {epoch}" if epoch else "Before training"


def _inline(path: Path) -> str | None:
    """The PNG as a data URI, shrunk if very wide; None if it is missing or cannot be read."""
    if not path.is_file():
        return None
    try:
        image = open_image(path)
        if image.width <= MAX_IMAGE_WIDTH:
            return _data_uri(path.read_bytes())
    except (OSError, UnreadableImage):
        return None
    height = max(1, round(image.height * MAX_IMAGE_WIDTH / image.width))
    small = image.resize((MAX_IMAGE_WIDTH, height), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG")
    return _data_uri(buffer.getvalue())


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


@dataclass(frozen=True)
class Passage:
    """A text as the report shows it, with its reward, if any; ``rest`` is folded away."""

    start: str
    rest: str = ""
    reward: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of passages under ``columns``, and a note on what is missing."""

    label: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Passage]]
    note: str


def before_after_table(samples: Path) -> Table | None:
    """The prompts with what was written before and after training; None if there is no such file."""
    path = samples / "before_after.jsonl"
    if not path.is_file():
        return None
    return _table(path, "", {"Before": ("before", "reward_before"), "After": ("after", "reward_after")})


def samples_table(path: Path, label: str) -> Table:
    """The prompts and completions of one epoch."""
    return _table(path, label, {"Completion": ("completion", "reward")})


def _table(path: Path, label: str, columns: Mapping[str, tuple[str, str]]) -> Table:
    """``columns``: heading -> the keys of its text and of its reward."""
    rows, damaged = [], 0
    rewards: dict[str, list[float]] = {heading: [] for heading in columns}
    for line in _lines(path):
        try:
            row = json.loads(line)
            passages = [passage(plain_text(row["prompt"]))]
            for text, reward in columns.values():
                if not isinstance(row[text], str):
                    raise TypeError(text)
                passages.append(passage(row[text], row.get(reward)))
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += 1
            continue
        rows.append(passages)
        for heading, (_, reward) in columns.items():
            rewards[heading] += [row[reward]] if _finite(row.get(reward)) else []
    means = {heading: f", mean reward {math.fsum(x) / len(x):.3g}" if x else "" for heading, x in rewards.items()}
    notes = []
    if len(rows) > MAX_ROWS:
        notes.append(f"The first {MAX_ROWS} of {len(rows)} samples; the others are in samples/{path.name}.")
    if damaged:
        lines = "line is damaged and was" if damaged == 1 else "lines are damaged and were"
        notes.append(f"{damaged} {lines} left out.")
    return Table(
        label, ("Prompt", *(heading + means[heading] for heading in columns)), rows[:MAX_ROWS], " ".join(notes)
    )


def plain_text(text: Any) -> str:
    """A prompt as lines: a text as it is, of a conversation a line ``role: content`` for each message.

    Raises:
        TypeError, KeyError: neither of them.
    """
    if isinstance(text, str):
        return text
    if not isinstance(text, list) or not text:
        raise TypeError("neither a text nor messages")
    return "\n".join(f"{message['role']}: {_content(message['content'])}" for message in text)


def passage(text: str, reward: Any = None) -> Passage:
    """The text, folded where it is long, and its reward if that is a number."""
    # A lone half of a surrogate pair is valid JSON and cannot be written as UTF-8.
    text = text.encode("utf-8", "replace").decode("utf-8")
    shown = f"{reward:.3g}" if _finite(reward) else ""
    start = "\n".join(text[:FOLDED_BEYOND].split("\n")[:FOLDED_LINES])
    if len(start) == FOLDED_BEYOND:  # at the end of a word, if there is one
        start = start[: start.rfind(" ", FOLDED_BEYOND // 2) + 1] or start
    rest = text[len(start) :].removeprefix("\n")
    short = len(rest) < FOLDED_BEYOND // 4 and rest.count("\n") < 2  # not worth folding
    return Passage(text, "", shown) if short else Passage(start, rest, shown)


def _lines(path: Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line.strip()]
    except OSError:
        return [b""]


def _content(content: Any) -> str:
    """A message's text: itself, nothing, or its parts of type text."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _finite(value: Any) -> bool:
    return is_number(value) and abs(value) <= 1e300  # JSON knows whole numbers beyond any float
