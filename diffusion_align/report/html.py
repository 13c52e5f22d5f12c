"""The run report: one HTML file that holds everything it shows, readable years later and without the run folder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2

from diffusion_align import yaml_text
from diffusion_align.errors import short
from diffusion_align.inputs import check_path
from diffusion_align.report import svg
from diffusion_align.report.embedding import grids, inline, some_epochs
from diffusion_align.report.figures import figures, other_metrics
from diffusion_align.report.metrics import MetricTable, Row, read_descriptions, read_metrics, series
from diffusion_align.report.status import RunStatus, read_status, status_text
from diffusion_align.report.summary import evaluation_sentences, summary
from diffusion_align.report.texts import before_after_table, samples_table
from diffusion_align.writing import write_text

PATIENCE = 120.0  # seconds beyond three epochs after which a page that says running says that it has no news
FIRST_PATIENCE = 900.0  # seconds until then where no epoch has ended yet, whose length is not known


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
    rows = MetricTable(read_metrics(metrics) if metrics.is_file() else [])
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
        width=svg.WIDTH,
        height=svg.HEIGHT,
        left=svg.LEFT,
        right=svg.RIGHT,
        top=svg.TOP,
        bottom=svg.BOTTOM,
        title=_title(run_dir, config),
        folder=run_dir.resolve().name,
        summary=" ".join([summary(rows, described), *evaluation_sentences(rows, run_dir / "evaluation.json", status)]),
        status=_status(status, rows, config),
        before_after=inline(samples / "before_after.png"),
        before_after_texts=before_after_table(samples),
        figures=list(figures(rows, described)),
        other=other_metrics(rows, described),
        grids=list(grids(samples)),
        texts=[samples_table(path, label) for path, label in some_epochs(samples, "jsonl")],
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
