"""The commands: each a few lines over the Python entry points, which it imports only when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from diffusion_align.bounds import MOST
from diffusion_align.cli.next_commands import last_lines
from diffusion_align.cli.options import (
    Config,
    Eta,
    Family,
    Gaussian,
    GuidanceScale,
    Height,
    ImageReward,
    Judge,
    MaxNewTokens,
    Model,
    NegativePrompt,
    Overrides,
    PromptFile,
    Prompts,
    RewardOptions,
    Seed,
    Steps,
    Temperature,
    Width,
    check_kind,
    check_output_file,
    check_output_path,
    completed_by,
    given_options,
    number_option,
    path_option,
    read_image,
    read_prompts,
    read_reward,
    to_path,
)
from diffusion_align.cli.terminal import (
    console,
    hide_loading_bars,
    print_aligned,
    print_line,
    print_listing,
    print_note,
    progress_bar,
)
from diffusion_align.errors import ConfigError, Interrupted, UserError, short
from diffusion_align.invocation import IN_COMMANDS, command_line

_Q, _P = (0.1, 0.2), (0.0, 1.0)

app = typer.Typer(
    help="Fine-tune diffusion models and language models with rewards and preferences.",
    epilog="Start with: diffusion-align train quickstart\n\n"
    "Recipes, rewards, models: diffusion-align list\n\n"
    "More about a command: diffusion-align COMMAND --help",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _epilog(example: str, *more: str) -> str:
    """The end of a command's help: a command to try, and where to read on."""
    return "\n\n".join([f"Example: diffusion-align {example}", *more])


_SETTINGS = "Settings: diffusion-align list settings METHOD\n\nRecipes: diffusion-align list configs"
_REWARDS = "Rewards and their options: diffusion-align list rewards\n\nDocs: docs/rewards.md"


def _show_version(wanted: bool) -> None:
    if wanted:
        from diffusion_align import __version__

        print_line(f"diffusion-align {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="print the traceback of an error; also accepted after the command")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", "-v", is_eager=True, callback=_show_version, help="print the version and exit"),
    ] = False,
) -> None:
    pass  # main() reads --debug wherever it stands


@app.command(
    epilog=_epilog("train quickstart seed=1", _SETTINGS, "Docs: docs/forward.md, ddpo.md, diffusion_dpo.md, text.md")
)
def train(config: Config, overrides: Overrides = None) -> None:
    """Train a model as a recipe says.

    Weights, checkpoints, metrics and report.html go to output_dir; resume=true resumes the run that is there.
    """
    from diffusion_align.pipelines.configuration import read_config
    from diffusion_align.training.aliases import aliases_of

    settings: Any = read_config(config, overrides or [])

    from diffusion_align.pipelines.run import run  # with torch, without which wrong settings are answered at once

    hide_loading_bars()
    started = command_line(aliases_of(settings.__class__))
    try:
        trainer = run(settings, started=started)
    except KeyboardInterrupt as stop:  # the second Ctrl-C; typer would make another error of it
        raise Interrupted("\n".join(["stopped", *getattr(stop, "__notes__", ())])) from None
    if trainer.accelerator.is_main_process:
        for line in last_lines(trainer, started):
            print_line(line, keep=IN_COMMANDS)


@app.command(epilog=_epilog('sample runs/quickstart -p "a lion" -p "a rocket" -o images'))
def sample(
    model: Model,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    output: Annotated[Path, path_option("--output", "-o", help="folder for the images")] = Path("samples"),
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    eta: Eta = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    family: Family = None,
) -> None:
    """Sample one image per prompt, and write a grid of them all.

    The model may be a base model or what a run has trained; the same seed gives the same images.
    """
    from diffusion_align.pipelines.image import ImageAlignmentPipeline, sampling_problems

    texts = [text for text, _ in read_prompts(prompt, prompts)]
    check_output_path(output, "folder")
    checked: Any = {"guidance_scale": guidance_scale, "negative_prompt": negative_prompt}
    checked |= {"height": height, "width": width}
    if problems := sampling_problems(model, family=family, **checked):
        raise ConfigError(problems)
    hide_loading_bars()
    pipeline = ImageAlignmentPipeline.from_pretrained(model, family=family)
    sampled = pipeline(texts, seed=seed, steps=steps, eta=eta, **checked)
    sampled.save(output)
    print_line(f"wrote {len(texts)} {'image' if len(texts) == 1 else 'images'} and grid.png to {output}")


@app.command(epilog=_epilog('complete tiny-lm -p "And the king said"', "Docs: docs/text.md"))
def complete(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="text to complete; repeat for more")
    ] = None,
    prompts: PromptFile = None,
    output: Annotated[Path | None, path_option("--output", "-o", help=".jsonl file to write as well")] = None,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=MOST, help="tokens per completion")] = 128,
    temperature: Annotated[
        float, number_option(0.01, 1000, help="sampling temperature; below 1 favours likely tokens")
    ] = 1.0,
) -> None:
    """Complete each prompt with a language model.

    The model may be a base model or what a run has trained; the same seed gives the same texts.
    """
    import json

    from diffusion_align.pipelines import TextAlignmentPipeline
    from diffusion_align.pipelines.text import check_completions
    from diffusion_align.rewards import text_of
    from diffusion_align.streams import printable
    from diffusion_align.writing import make_folder, write_text

    texts = [text for text, _ in read_prompts(prompt, prompts, "text")]
    if output is not None:
        check_output_file(output)
    hide_loading_bars()
    check_completions(model, texts, max_new_tokens)
    pipeline = TextAlignmentPipeline.from_pretrained(model)
    written = pipeline(texts, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature).texts
    for text, completion in zip(texts, written, strict=True):
        last = text if isinstance(text, str) else text_of(text[-1:])
        question, answer = (printable(one, keep="\n\t") for one in (last, completion))
        shown = Text(question, style="dim").append(answer, "not dim")
        console.print(shown, highlight=False, soft_wrap=True)
    if output is not None:
        rows = [{"prompt": text, "completion": completion} for text, completion in zip(texts, written, strict=True)]
        make_folder(output.parent, parents=True)
        write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@app.command(epilog=_epilog("export runs/quickstart -o model"))
def export(
    model: Model,
    output: Annotated[Path, path_option("--output", "-o", help="folder for the model")],
    family: Family = None,
) -> None:
    """Write the whole model of a run, its adapter merged in, as plain diffusers or transformers load it."""
    from diffusion_align.models.language_models import model_kind
    from diffusion_align.pipelines import ImageAlignmentPipeline, TextAlignmentPipeline

    kind = model_kind([model])
    check_kind(kind, given_options(family=family), {})
    check_output_path(output, "folder")
    hide_loading_bars()
    images, text = ImageAlignmentPipeline.from_pretrained, TextAlignmentPipeline.from_pretrained
    pipeline: Any = text(model) if kind == "text" else images(model, family=family)
    pipeline.save_pretrained(output)
    print_line(f"wrote the model to {output}")


@app.command(epilog=_epilog("score aesthetic images/0000.png images/0001.png", _REWARDS))
def score(
    reward: ImageReward,
    images: Annotated[list[Path], typer.Argument(parser=to_path, metavar="IMAGES...", help="image files")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    option: RewardOptions = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="the model that sampled them; emoji-sd and emoji-flow are judged by the embedded CLIP and aesthetic "
            "head, any other by the published ones; default: emoji-sd for images of 64x64 pixels"
        ),
    ] = None,
) -> None:
    """Score image files with a reward, and name the network that scored.

    Give one prompt for all images or one per image; without any the prompt is empty.

    Photographs need the published networks: from the Hub, or --option head=FILE --option clip=FOLDER (aesthetic).
    """
    from diffusion_align.inputs import default_device
    from diffusion_align.pipelines.scoring import score_images
    from diffusion_align.rewards import scored_by
    from diffusion_align.rewards.image.clip import model_for_images

    given = read_prompts(prompt, prompts) if prompt or prompts else [("", {})]
    if len(given) == 1:
        given = given * len(images)
    if len(given) != len(images):
        raise UserError(f"{len(given)} prompts for {len(images)} images: give one prompt, or one per image")
    texts, metadata = zip(*given, strict=True)
    opened = [read_image(path) for path in images]
    hide_loading_bars()
    if model is None:
        model = model_for_images(image.size for image in opened)
    function = read_reward(reward, option, model, default_device())
    scores = score_images(function, opened, texts, metadata)
    print_note(f"scored by {scored_by(function)}")
    for path, value in zip(images, scores.tolist(), strict=True):
        print_line(f"{value:10.4f}  {path}")
    print_line(f"{scores.mean().item():10.4f}  mean of {len(images)}")


@app.command("serve-reward", epilog=_epilog("serve-reward aesthetic --model emoji-sd --port 8901", _REWARDS))
def serve_reward(
    reward: ImageReward,
    option: RewardOptions = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="the model whose images are scored; emoji-sd and emoji-flow are judged by the embedded CLIP and "
            "aesthetic head, any other by the published ones, the default"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="address to bind; other machines need a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port")] = 8901,
    token_file: Annotated[
        Path | None,
        typer.Option(parser=to_path, help="file with the token; default: the variable DIFFUSION_ALIGN_TOKEN, if set"),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=MOST, help="images per request")] = 64,
    max_bytes: Annotated[int, typer.Option(min=1000, max=10**10, help="bytes per request")] = 64_000_000,
    max_pixels: Annotated[int, typer.Option(min=1, max=10**10, help="pixels per request, of all images together")] = 8
    * 1024
    * 1024,
    threads: Annotated[
        int, typer.Option(min=1, max=1024, help="torch's CPU threads; a training run scores with one")
    ] = 1,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: a GPU if there is one")] = None,
    prompts: Annotated[str | None, typer.Option(help="prompts to check the reward with at startup")] = None,
) -> None:
    """Serve a reward over HTTP for runs in another environment or on another machine.

    They call it with reward: {name: remote, url: ...}.
    """
    import torch

    from diffusion_align.inputs import check_device, default_device
    from diffusion_align.rewards import check_reward, scored_by
    from diffusion_align.rewards.endpoints import read_token

    try:
        from diffusion_align.rewards import serving
    except ImportError as error:
        raise UserError(f"serve-reward needs {error.name}: pip install 'diffusion-align[serve]'") from None
    token = read_token(token_file, serving.TOKEN)
    device = default_device() if device is None else device
    check_device(device, f"--device={short(device)}")
    texts, metadata = zip(*read_prompts(None, prompts), strict=True) if prompts else (None, None)
    with serving.bind(host, port, token=token) as bound:
        hide_loading_bars()
        torch.set_num_threads(threads)
        function = read_reward(reward, option, model, device)
        check_reward(function, image_size=256, device=device, prompts=texts, metadata=metadata)
        limits = serving.Limits(max_batch, max_bytes, max_pixels)
        calls = serving.CallsHere()
        served = serving.create_app(function, token=token, limits=limits, threads=threads, device=device, calls=calls)
        line = f"serving {scored_by(function)} at {serving.address_of(bound)}"
        serving.RewardServer(served, lambda: print_line(line)).serve_on(bound, calls)


@app.command(epilog=_epilog("compare emoji-sd runs/quickstart --judge aesthetic --prompts emoji_weak", _REWARDS))
def compare(
    first: Annotated[str, typer.Argument(help="model or run folder A", autocompletion=completed_by("models"))],
    second: Annotated[str, typer.Argument(help="model or run folder B", autocompletion=completed_by("models"))],
    judge: Judge,
    prompt: Prompts = None,
    prompts: PromptFile = None,
    per_prompt: Annotated[int, typer.Option(min=1, max=MOST, help="samples per prompt by each model")] = 1,
    output: Annotated[
        Path | None,
        path_option("--output", "-o", help="default: compare.png, or compare.md for language models; or a .jsonl file"),
    ] = None,
    seed: Seed = 0,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    family: Family = None,
) -> None:
    """Compare two models, of images or of text: a reward judges samples of the same prompts and seeds.

    Prints the mean rewards and how often B wins, and writes the samples side by side.
    """
    from diffusion_align.models.language_models import model_kind
    from diffusion_align.pipelines.compare import compare_models, compare_texts

    kind = model_kind([first, second])
    of_text = given_options(max_new_tokens=max_new_tokens, temperature=temperature)
    of_images = given_options(family=family)
    check_kind(kind, of_images, of_text)
    found = read_prompts(prompt, prompts, kind)
    texts, metadata = zip(*found, strict=True)
    output = output or Path("compare.md" if kind == "text" else "compare.png")
    check_output_file(output)
    hide_loading_bars()
    options: Any = {"metadata": metadata, "seed": seed, "output": output, "per_prompt": per_prompt}
    with progress_bar("samples", 2 * per_prompt * len(texts)) as update:
        judged: Any = compare_texts if kind == "text" else compare_models
        result = judged(first, second, texts, judge, on_samples=update, **options, **of_images, **of_text)
    print_line(f"{result}; {'texts' if kind == 'text' else 'images'} in {output}")


@app.command(
    epilog=_epilog(
        "pairs emoji-sd --judge jpeg_compressibility --prompts emoji_weak -o my_pairs",
        "Then: diffusion-align train dpo_emoji_style pairs=my_pairs",
        "Docs: docs/diffusion_dpo.md",
    )
)
def pairs(
    model: Model,
    judge: Judge,
    output: Annotated[Path, path_option("--output", "-o", help="folder for the pairs")],
    prompt: Prompts = None,
    prompts: PromptFile = None,
    per_prompt: Annotated[int, typer.Option(min=2, max=MOST, help="samples per prompt")] = 4,
    seed: Seed = 0,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    eta: Eta = None,
    negative_prompt: NegativePrompt = None,
    height: Height = None,
    width: Width = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    family: Family = None,
    resume: Annotated[bool, typer.Option("--resume", help="continue the pairs in the folder")] = False,
) -> None:
    """Make a preference dataset with a model: of several samples per prompt, a reward keeps the best and the worst."""
    from diffusion_align.models.language_models import model_kind
    from diffusion_align.pipelines.pairs import PAIRS, ImageCandidates, TextCandidates, make_pairs

    kind = model_kind([model])
    of_images = given_options(steps=steps, guidance_scale=guidance_scale, eta=eta, family=family)
    of_images |= given_options(negative_prompt=negative_prompt, height=height, width=width)
    of_text = given_options(max_new_tokens=max_new_tokens, temperature=temperature)
    check_kind(kind, of_images, of_text)
    wanted = read_prompts(prompt, prompts, kind)
    hide_loading_bars()
    candidates = TextCandidates(model, **of_text) if kind == "text" else ImageCandidates(model, **of_images)
    options: Any = {"per_prompt": per_prompt, "seed": seed, "resume": resume, "started": command_line()}
    with progress_bar("prompts", len(wanted)) as update:
        made = make_pairs(candidates, wanted, judge, output, on_prompt=update, **options)
    gap = f", mean score gap {made.mean_gap:.4g}" if made.pairs else ""
    print_line(f"{made.pairs} pairs, {made.ties} ties dropped{gap}; see {output / PAIRS if made.pairs else output}")


@app.command(epilog=_epilog("report runs/quickstart"))
def report(
    folder: Annotated[
        Path, typer.Argument(parser=to_path, metavar="FOLDER", help="run folder", autocompletion=completed_by("runs"))
    ],
) -> None:
    """Write report.html of a run again, also while it is running: curves, images or texts, settings on one page."""
    from diffusion_align.report import write_report

    try:
        written = write_report(folder)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from None
    print_line(f"wrote {written}")


@app.command(epilog=_epilog("estimators --q 0.1 0.2 --p 0 1", "Docs: docs/mathematics/kl.md"))
def estimators(
    q: Annotated[Gaussian, typer.Option(help="mean and std of the Gaussian that is sampled")] = _Q,
    p: Annotated[Gaussian, typer.Option(help="mean and std of the reference")] = _P,
    samples: Annotated[int, typer.Option(min=2, max=10_000_000, help="number of samples from q")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="seed of the samples")] = 0,
    actions: Annotated[
        int, typer.Option(min=2, max=1000, help="number of actions of the softmax policy; 4 is a fixed example")
    ] = 4,
    softmax_seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="seed of random logits")] = None,
    plot: Annotated[Path | None, path_option(help="folder for two figures")] = None,
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
        check_output_path(plot, "folder", "--plot")
        make_folder(plot, parents=True)
        parts += ["", *(f"wrote {path}" for path in write_estimator_plots(plot, seed=seed))]
    for part in parts:
        console.print(part, highlight=False, markup=False)


@app.command("list", epilog=_epilog("list settings ddpo", "Example: diffusion-align list rewards aesthetic"))
def list_(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, configs, models, prompts, pairs, rewards or settings; by default all but settings",
            autocompletion=completed_by("listings"),
        ),
    ] = "",
    name: Annotated[
        str,
        typer.Argument(
            help="a method, for settings; a reward, for rewards", autocompletion=completed_by("listed_names")
        ),
    ] = "",
) -> None:
    """List the methods, models, rewards, prompts, pairs and recipes a configuration can name, and its settings.

    In a pipe every entry is one line, for grep.
    """
    from diffusion_align.cli.listing import LISTINGS, reward_called, settings_of
    from diffusion_align.methods import DEFAULT

    if what and what not in (*LISTINGS, "settings"):
        raise UserError(f"there is no list {short(what)}: choose one of {', '.join([*LISTINGS, 'settings'])}")
    if name and what not in ("settings", "rewards"):
        raise UserError(f"only `list settings` and `list rewards` take a name: leave {short(name)} out")
    if what == "settings":
        print_listing(settings_of(name or DEFAULT))
    elif name:
        print_listing(reward_called(name))
    else:
        print_listing([part for one in ([what] if what else LISTINGS) for part in LISTINGS[one]()])
    if what == "settings" and not name:
        print_note("`diffusion-align list settings METHOD` lists those of another method")
    if what in ("", "rewards") and not name:
        print_note("`diffusion-align list rewards NAME` lists the options of a reward")
    if not what:
        print_note("`diffusion-align list settings METHOD` lists the settings of a method")


@app.command(epilog=_epilog("doctor ddpo_sd15_aesthetic", _SETTINGS))
def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            help="a shipped recipe or a YAML file; nothing is downloaded",
            metavar="CONFIG",
            autocompletion=completed_by("recipes"),
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Check this machine and, with CONFIG, whether a recipe would run and what it would cost."""
    from diffusion_align.doctor.describe import describe_config, describe_machine, describe_recipes

    about, problems = describe_config(config, overrides or []) if config is not None else (describe_recipes(), [])
    print_aligned(describe_machine() + about)
    if problems:
        raise ConfigError(problems)
