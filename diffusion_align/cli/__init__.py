"""The command line. Every command is a few lines over the Python entry points; errors are one sentence and exit 2."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from diffusion_align.bounds import LARGEST, MOST
from diffusion_align.errors import ConfigError, Interrupted, UserError, first_line, short

app = typer.Typer(
    help="Align diffusion models and language models with rewards and preferences.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_console = Console()
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


def _show_version(wanted: bool) -> None:
    if wanted:
        from diffusion_align import __version__

        _print(f"diffusion-align {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="print the traceback of an error; may stand after the command, too")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="print the version and leave")
    ] = False,
) -> None:
    pass  # main() reads --debug wherever it stands


def _between(low: float, high: float) -> Any:
    """An option that is a number; nan, which some comparisons let through, lies between no two bounds."""

    def number(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise typer.BadParameter(f"{str(text)[:40]!r} is not a number from {low:g} to {high:g}")
        return value

    return typer.Option(parser=number, metavar=f"FLOAT from {low:g} to {high:g}")


def _path(text: str | Path) -> Path:
    """Of an option: ``Path("")`` would be the folder that we are in, and no shell expands the ~ of ``--output=~/a``."""
    if not str(text).strip():
        raise typer.BadParameter("the path is empty")
    return Path(os.path.expanduser(text))


def _place(*names: str, help: str | None = None) -> Any:
    return typer.Option(*names, parser=_path, metavar="PATH", help=help)


Prompts = Annotated[list[str] | None, typer.Option("--prompt", "-p", help="a prompt; repeat for more")]
PromptFile = Annotated[
    str | None,
    typer.Option(
        "--prompts", help="file (.txt, .jsonl, .jsonl.gz, .json, .csv, .parquet), folder, Hub dataset or shipped list"
    ),
]
RewardOptions = Annotated[list[str] | None, typer.Option("--option", help="key=value of the reward; repeat")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Steps = Annotated[int | None, typer.Option(min=1, max=MOST)]
GuidanceScale = Annotated[float | None, _between(0, LARGEST)]
Eta = Annotated[float | None, _between(0, 1)]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, max=MOST, help="of language models; 128 if not given")]
Temperature = Annotated[float | None, _between(0.01, 1000)]
Gaussian = tuple[float, float]
_Q, _P = (0.1, 0.2), (0.0, 1.0)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a YAML file or the name of a shipped recipe")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted keys, values as YAML")] = None,
) -> None:
    """Train as CONFIG says; `resume=true` resumes the run in output_dir."""
    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.pipelines.run import run

    settings: Any = read_config(config, overrides or [])
    _hide_loading_bars()
    trainer = run(settings)
    if trainer.accelerator.is_main_process:
        if trainer.stopped:
            _print(f"stopped after epoch {trainer.epoch}: {trainer.stopped}")
        _print(f"finished: see {trainer.folder / 'report.html'}; the weights are in {trainer.folder / 'final'}")


@app.command()
def sample(
    model: Annotated[str, typer.Argument(help="embedded name, folder, Hub id or run folder")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    output: Annotated[Path, _place("--output", "-o", help="folder for the images")] = Path("samples"),
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    eta: Eta = None,
) -> None:
    """Sample one image per prompt, and write a grid of them all."""
    from diffusion_align.pipelines import ImageAlignmentPipeline

    texts = [text for text, _ in _prompts(prompt, prompts)]
    _check_output(output, "folder")
    _hide_loading_bars()
    pipeline = ImageAlignmentPipeline.from_pretrained(model)
    sampled = pipeline(texts, seed=seed, steps=steps, guidance_scale=guidance_scale, eta=eta)
    sampled.save(output)
    _print(f"wrote {len(texts)} images and grid.png to {output}")


@app.command()
def complete(
    model: Annotated[str, typer.Argument(help="language model: embedded name, folder, Hub id or run folder")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="text to complete; repeat for more")
    ] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", help="file of prompts, or a shipped list")] = None,
    output: Annotated[Path | None, _place("--output", "-o", help=".jsonl file to write as well")] = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST)] = 128,
    temperature: Annotated[float, _between(0.01, 1000)] = 1.0,
) -> None:
    """Complete each prompt with a language model."""
    import json

    from diffusion_align.pipelines import TextAlignmentPipeline
    from diffusion_align.pipelines.text import check_completions
    from diffusion_align.rewards import text_of
    from diffusion_align.streams import printable
    from diffusion_align.writing import make_folder, write_text

    texts = [text for text, _ in _prompts(prompt, prompts, "text")]
    if output is not None:
        _check_output_file(output)
    _hide_loading_bars()
    check_completions(model, texts, max_new_tokens)
    pipeline = TextAlignmentPipeline.from_pretrained(model)
    written = pipeline(texts, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature).texts
    for text, completion in zip(texts, written, strict=True):
        last = text if isinstance(text, str) else text_of(text[-1:])
        question, answer = (printable(one, keep="\n\t") for one in (last, completion))
        shown = Text(question, style="dim").append(answer, "not dim")
        _console.print(shown, highlight=False, soft_wrap=True)
    if output is not None:
        rows = [{"prompt": text, "completion": completion} for text, completion in zip(texts, written, strict=True)]
        make_folder(output.parent, parents=True)
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@app.command()
def score(
    reward: Annotated[str, typer.Argument(help="name or module:function")],
    images: Annotated[list[Path], typer.Argument(parser=_path, metavar="IMAGES...", help="image files")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    option: RewardOptions = None,
    model: Annotated[str, typer.Option(help="the model the reward's default backbone goes with")] = "emoji-sd",
) -> None:
    """Score images with a reward; give one prompt for all, or one per image. The default prompt is empty."""
    from diffusion_align.inputs import default_device
    from diffusion_align.pipelines.image import score_images

    given = _prompts(prompt, prompts) if prompt or prompts else [("", {})]
    if len(given) == 1:
        given = given * len(images)
    if len(given) != len(images):
        raise UserError(f"{len(given)} prompts for {len(images)} images: give one prompt, or one per image")
    texts, metadata = zip(*given, strict=True)
    pictures = [_open(path) for path in images]
    _hide_loading_bars()
    function = _reward(reward, option, model, default_device())
    scores = score_images(function, pictures, texts, metadata)
    for path, value in zip(images, scores.tolist(), strict=True):
        _print(f"{value:10.4f}  {path}")
    _print(f"{scores.mean().item():10.4f}  mean of {len(images)}")


@app.command("serve-reward")
def serve_reward(
    reward: Annotated[str, typer.Argument(help="name or module:function")],
    option: RewardOptions = None,
    model: Annotated[str, typer.Option(help="the model the reward's default backbone goes with")] = "emoji-sd",
    host: Annotated[str, typer.Option(help="address to bind; other machines need a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8901,
    token_file: Annotated[
        Path | None, typer.Option(parser=_path, help="file with the token; without it DIFFUSION_ALIGN_TOKEN, if set")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=MOST, help="images per request")] = 64,
    max_bytes: Annotated[int, typer.Option(min=1000, max=10**10, help="bytes per request")] = 64_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, max=10**10, help="pixels per request, of all images together")] = 8
    * 1024
    * 1024,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="of torch; a training run scores with one")] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one")] = None,
    prompts: Annotated[str | None, typer.Option(help="prompts like those to come, for the check at the start")] = None,
) -> None:
    """Serve a reward over HTTP; runs elsewhere call it with reward: {name: remote, url: ...}."""
    import torch

    from diffusion_align.inputs import check_device, default_device
    from diffusion_align.rewards import check_reward, reward_name
    from diffusion_align.rewards.endpoints import read_token

    try:
        from diffusion_align.rewards import serving
    except ImportError as error:
        raise UserError(f"serve-reward needs {error.name}: pip install 'diffusion-align[serve]'") from None
    token = read_token(token_file, serving.TOKEN)
    device = default_device() if device is None else device
    check_device(device, f"--device {device if len(device) < 80 else short(device)}")
    texts, metadata = zip(*_prompts(None, prompts), strict=True) if prompts else (None, None)
    with serving.bind(host, port, token=token) as bound:
        _hide_loading_bars()
        torch.set_num_threads(threads)
        function = _reward(reward, option, model, device)
        check_reward(function, image_size=256, device=device, prompts=texts, metadata=metadata)
        limits = serving.Limits(max_batch, max_bytes, max_pixels)
        calls = serving.CallsHere()
        served = serving.create_app(function, token=token, limits=limits, threads=threads, device=device, calls=calls)
        line = f"serving {reward_name(function)} at {serving.address_of(bound)}"
        serving.RewardServer(served, lambda: _print(line)).serve_on(bound, calls)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="model or run folder A")],
    second: Annotated[str, typer.Argument(help="model or run folder B")],
    judge: Annotated[str, typer.Option(help="reward that judges the pairs")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    per_prompt: Annotated[int, typer.Option(min=1, max=MOST, help="samples per prompt by each model")] = 1,
    output: Annotated[
        Path | None, _place("--output", "-o", help="compare.png; of language models compare.md, or a .jsonl file")
    ] = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
) -> None:
    """Sample the same prompts with the same seeds by two models, of images or of text, and let a reward judge them."""
    from diffusion_align.models.language_models import model_kind
    from diffusion_align.pipelines.compare import compare_models, compare_texts

    kind = model_kind([first, second])
    of_text = _given(max_new_tokens=max_new_tokens, temperature=temperature)
    _check_kind(kind, {}, of_text)
    found = _prompts(prompt, prompts, kind)
    texts, metadata = zip(*found, strict=True)
    output = output or Path("compare.md" if kind == "text" else "compare.png")
    _check_output_file(output)
    _hide_loading_bars()
    options: Any = {"metadata": metadata, "seed": seed, "output": output, "per_prompt": per_prompt}
    with _bar("samples", 2 * per_prompt * len(texts)) as update:
        judged: Any = compare_texts if kind == "text" else compare_models
        result = judged(first, second, texts, judge, on_samples=update, **options, **of_text)
    _print(f"{result}; {'texts' if kind == 'text' else 'images'} in {output}")


@app.command()
def pairs(
    model: Annotated[str, typer.Argument(help="embedded name, folder, Hub id or run folder")],
    judge: Annotated[str, typer.Option(help="reward that chooses the best and the worst sample")],
    output: Annotated[Path, _place("--output", "-o", help="folder for the pairs")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    per_prompt: Annotated[int, typer.Option(min=2, max=MOST, help="samples per prompt")] = 4,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    eta: Eta = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the pairs in the folder")] = False,
) -> None:
    """Sample several images or completions per prompt and keep the best and the worst as a preference pair."""
    from diffusion_align.models.language_models import model_kind
    from diffusion_align.pipelines.pairs import PAIRS, ImageCandidates, TextCandidates, make_pairs

    kind = model_kind([model])
    of_images = _given(steps=steps, guidance_scale=guidance_scale, eta=eta)
    of_text = _given(max_new_tokens=max_new_tokens, temperature=temperature)
    _check_kind(kind, of_images, of_text)
    wanted = _prompts(prompt, prompts, kind)
    _hide_loading_bars()
    candidates = TextCandidates(model, **of_text) if kind == "text" else ImageCandidates(model, **of_images)
    options: Any = {"per_prompt": per_prompt, "seed": seed, "resume": resume}
    with _bar("prompts", len(wanted)) as update:
        made = make_pairs(candidates, wanted, judge, output, on_prompt=update, **options)
    gap = f", mean score gap {made.mean_gap:.4g}" if made.pairs else ""
    _print(f"{made.pairs} pairs, {made.ties} ties dropped{gap}; see {output / PAIRS if made.pairs else output}")


def _given(**options: Any) -> dict[str, Any]:
    """Those options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _check_kind(kind: str, of_images: dict[str, Any], of_text: dict[str, Any]) -> None:
    unfit, what = (of_images, "image models") if kind == "text" else (of_text, "language models")
    for name in unfit:
        raise UserError(f"--{name.replace('_', '-')} is for {what}: leave it out")


@app.command()
def report(folder: Annotated[Path, typer.Argument(parser=_path, metavar="FOLDER", help="run folder")]) -> None:
    """Rewrite report.html of a run, also while it is running."""
    from diffusion_align.report import write_report

    try:
        written = write_report(folder)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    _print(f"wrote {written}")


@app.command()
def estimators(
    q: Annotated[Gaussian, typer.Option(help="mean and std of the Gaussian that is sampled")] = _Q,
    p: Annotated[Gaussian, typer.Option(help="mean and std of the reference")] = _P,
    samples: Annotated[int, typer.Option(min=2, max=10_000_000, help="sampled from q")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="of the samples")] = 0,
    actions: Annotated[int, typer.Option(min=2, max=1000, help="of the softmax policy; 4 is a fixed example")] = 4,
    softmax_seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="of random logits")] = None,
    plot: Annotated[Path | None, _place(help="folder for two figures")] = None,
) -> None:
    """Compare the KL estimators: their values for two Gaussians, their expected gradients for a softmax policy."""
    from diffusion_align.report.estimator_plots import write_estimator_plots
    from diffusion_align.report.estimator_tables import EXAMPLE, Normal, gradient_report, random_softmax, value_report
    from diffusion_align.writing import make_folder

    fixed = softmax_seed is None and actions == len(EXAMPLE.policy)
    example = EXAMPLE if fixed else random_softmax(actions, softmax_seed or 0)
    try:
        parts = [*value_report(Normal(*q), Normal(*p), samples=samples, seed=seed), "", *gradient_report(example)]
    except ValueError as error:
        raise UserError(str(error)) from None
    if plot is not None:
        _check_output(plot, "folder", "--plot")
        make_folder(plot, parents=True)
        parts += ["", *(f"wrote {path}" for path in write_estimator_plots(plot, seed=seed))]
    for part in parts:
        _console.print(part, highlight=False, markup=False)


@app.command("list")
def list_(
    what: Annotated[
        str,
        typer.Argument(help="methods, configs, models, prompts, pairs, rewards or settings; not given, all of them"),
    ] = "",
    method: Annotated[str, typer.Argument(help="of which method, for `list settings`")] = "",
) -> None:
    """List the methods, models, rewards, prompts, pairs and recipes a configuration can name, and its settings."""
    from diffusion_align.cli.listing import LISTINGS, settings_of
    from diffusion_align.methods import DEFAULT

    if what and what not in (*LISTINGS, "settings"):
        raise UserError(f"there is no list {short(what)}: choose one of {', '.join([*LISTINGS, 'settings'])}")
    if method and what != "settings":
        raise UserError(f"only `list settings` takes a method: leave {short(method)} out")
    if what == "settings":
        return _print_list(f"settings of {method or DEFAULT}", settings_of(method or DEFAULT))
    for name in [what] if what else LISTINGS:
        _print_list(name, LISTINGS[name]())
    if not what:
        _console.print("`diffusion-align list settings METHOD` lists the settings of a method", highlight=False)


def _print_list(title: str, entries: list[tuple[str, list[str]]]) -> None:
    _console.print(f"[bold]{title}[/bold]")
    for entry, lines in entries:
        _console.print(f"  {entry}", highlight=False, markup=False)
        for line in lines:
            _console.print(Padding(Text(line), (0, 0, 0, 6)))


@app.command()
def doctor(
    config: Annotated[str | None, typer.Argument(help="recipe to check; nothing is downloaded")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
) -> None:
    """Check this machine and, with CONFIG, whether a recipe would run and what it would cost."""
    from diffusion_align.doctor.describe import describe_config, describe_machine

    about, problems = describe_config(config, overrides or []) if config is not None else ([], [])
    _print_aligned(describe_machine() + about)
    if problems:
        raise ConfigError(problems)


def _print_aligned(lines: list[tuple[str, str]]) -> None:
    """Names and their values side by side, at most 100 columns; a name without a value heads those that follow."""
    import textwrap

    for name, value in lines:
        if not value:
            _console.print(f"\n[bold]{name}[/bold]", highlight=False)
        for i, part in enumerate(textwrap.wrap(value, 72, break_long_words=False, break_on_hyphens=False)):
            _console.print(f"  {name if i == 0 else '':<26}{part}", highlight=False, soft_wrap=True, markup=False)


def main() -> None:
    """Run a command; the exit status is 0, 2 (a user's error), 130 (interrupted) or 1 (anything unexpected)."""
    from diffusion_align import interrupt
    from diffusion_align.streams import LastingStreams

    streams = LastingStreams()
    arguments, debug = _without_debug(sys.argv[1:])
    try:
        status = app(arguments, standalone_mode=False, prog_name="diffusion-align")
        if status == interrupt.INTERRUPTED:  # what typer makes of Ctrl-C in its newer versions
            _errors.print("stopped")
    except Interrupted as stop:
        _errors.print(str(stop), markup=False)
        status = interrupt.INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        _errors.print("stopped")
        status = interrupt.INTERRUPTED
    except BaseException as error:
        if debug:
            _errors.print(_traceback(error), markup=False)
        if isinstance(error, UserError) or _is_a(error, "OutOfMemoryError"):
            status = _say(_with_notes(error))
        elif isinstance(error, SystemExit):  # never ours, so nothing was finished, whatever its code
            called = f"sys.exit({error.code!r}) was called by code outside this package"
            status = _say(f"{called}: let it raise an error instead")
        elif _is_a(error, "ClickException"):
            status = _usage(error)
        else:
            status = _unexpected(error, debug)
    lost = streams.close()
    if lost is not None:
        failed = _say(f"what was printed was cut off ({lost}): make room where it goes")
        status = status or failed
    status = status if isinstance(status, int) else 0
    if interrupt.left_behind:
        os._exit(status)
    sys.exit(status)


def _without_debug(arguments: list[str]) -> tuple[list[str], bool]:
    """The command line without --debug, and whether it was there; what stands behind "--" are values."""
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    kept = [word for word in options if word != "--debug"]
    return kept + arguments[len(options) :], len(kept) < len(options)


def _unexpected(error: BaseException, debug: bool) -> int:
    """One sentence about an error that nobody foresaw, and its traceback in a file that only the user can read."""
    import tempfile

    try:
        what = f"{type(error).__name__}: {first_line(error)}"
    except Exception:  # even its text fails
        what = type(error).__name__
    place = "above"
    if not debug:
        try:
            with tempfile.NamedTemporaryFile(
                "w", encoding="utf-8", errors="backslashreplace", prefix="diffusion-align-", suffix=".txt", delete=False
            ) as file:  # with mode 0600
                file.write(_traceback(error))
            place = f"in {file.name} (--debug prints it)"
        except OSError:
            _errors.print(_traceback(error), markup=False)
    notes = [note for note in getattr(error, "__notes__", ()) if "resume=true" in note]  # other libraries write some
    _say("; ".join([f"unexpected {what}; the traceback is {place}", *notes]))
    return 1


def _traceback(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error))


def _hide_loading_bars() -> None:
    """The libraries show one for every model part, and remarks about packages nobody needs here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _say(sentences: str) -> int:
    from diffusion_align.streams import printable

    for sentence in sentences.split("\n"):
        _errors.print(f"error: {printable(sentence)}", markup=False)
    return 2


def _with_notes(error: BaseException) -> str:
    """The sentence and what was noted about it on the way, unless it says so itself."""
    notes = [note for note in getattr(error, "__notes__", ()) if "resume=true" not in str(error)]
    return "; ".join([str(error), *notes])


def _usage(error: Any) -> int:
    """A wrong command line; without any arguments the help."""
    if _is_a(error, "NoArgsIsHelpError"):
        error.show()
        return 2
    command = error.ctx.command_path if getattr(error, "ctx", None) else "diffusion-align"
    message = error.format_message().rstrip(".")
    if len(message) > 500:  # whatever was typed is in it
        message = message[:500] + "..."
    return _say(f"{message}: see {command} --help")


def _is_a(error: BaseException, *names: str) -> bool:
    """By name: neither torch for `--help`, nor the click that typer has in this version (its own or the package)."""
    return any(cls.__name__ in names for cls in type(error).__mro__)


def _print(line: str) -> None:
    """Print as it is: no markup in it, not cut at the terminal's width, nothing that steers a terminal."""
    from diffusion_align.streams import printable

    _console.print(printable(line), highlight=False, markup=False, soft_wrap=True)


def _reward(name: str, options: list[str] | None, model: str, device: str) -> Any:
    from diffusion_align.rewards import build_reward
    from diffusion_align.training.config import apply_overrides

    given = apply_overrides({}, options or [])
    if "name" in given:
        raise UserError(f"--option name={given['name']!r}: the reward is named already, '{name}': leave this out")
    return build_reward(given | {"name": name}, model=model, device=device)


@contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr, gone when done, and the function that sets it; nothing where nobody looks."""
    from diffusion_align.training.progress import progress_bars

    console = Console(stderr=True)
    with progress_bars(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def _prompts(
    prompt: list[str] | None, prompts: str | None, kind: Literal["image", "text"] = "image"
) -> list[tuple[Any, dict[str, Any]]]:
    """Texts, for language models also conversations, with their metadata: the other columns of their rows."""
    if kind == "image":
        from diffusion_align.data.prompts import check_image_prompts as check
        from diffusion_align.data.prompts import load_prompts as read
    else:
        from diffusion_align.data.prompts import check_unicode as check
        from diffusion_align.pipelines.text import read_prompts as read  # type: ignore[assignment]
    check(prompt or [])
    found: list[tuple[Any, dict[str, Any]]] = [(text, {}) for text in prompt or []]
    if prompts is not None:
        found += read(prompts)
    if not found:
        raise UserError("no prompt given: use --prompt TEXT (repeatable) or --prompts FILE")
    return found


def _open(path: Path) -> Any:
    from diffusion_align.images import UnreadableImage, open_image
    from diffusion_align.inputs import check_path

    check_path(path, f"image {short(str(path))}")
    if not path.exists():
        raise UserError(f"there is no image {path}")
    try:
        return open_image(path)
    except UnreadableImage as problem:
        raise UserError(f"{path} {problem}") from None


def _check_output(path: Path, want: Literal["file", "folder"], option: str = "--output") -> None:
    """Whether it can be written, or made; nothing is left behind."""
    from diffusion_align.inputs import check_output

    shown = path if len(str(path)) <= 80 and str(path).isprintable() else short(str(path))
    check_output(path, f"{option}: the {want} {shown} cannot be used: it", want)


def _check_output_file(path: Path) -> None:
    """Its folder first, unless all is well: into that of /dev/stdout nobody else may write."""
    try:
        _check_output(path, "file")
    except UserError:
        _check_output(path.parent, "folder")
        raise
