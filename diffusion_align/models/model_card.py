"""What is published of a run: its model card, every figure read from what it has logged, and the upload to the Hub."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2

from diffusion_align import __version__, yaml_text
from diffusion_align.assets import EMBEDDED_PIPELINES, asset_path
from diffusion_align.errors import UserError, first_line
from diffusion_align.models.adapters import LORA_FILE
from diffusion_align.models.families import SHIPPED, family_of
from diffusion_align.models.families.flow_matching import is_flow
from diffusion_align.models.image_pipelines import diffusers_scheduler, takes_eta
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.models.model_ref import ModelRef, image_model_ref
from diffusion_align.models.single_file import is_one_file
from diffusion_align.models.smollm2 import smollm2_folder
from diffusion_align.report import read_metrics
from diffusion_align.report.metrics import NAMES, Row, is_number, read_evaluation, series
from diffusion_align.streams import cell, fence, literal, plain
from diffusion_align.training.evaluation import SUMMARY
from diffusion_align.training.places import found_from
from diffusion_align.training.reading import load_yaml
from diffusion_align.training.resume import WATCHING, resume_fingerprint
from diffusion_align.writing import new_file, write_text

BEFORE_AFTER = "before_after.png"
# With 1 diffusers' DDIM takes, for some numbers of steps (50 of emoji-sd's), the root of a number just below 0 where a
# schedule begins in pure noise, and the images are black.
LARGEST_ETA = 1 - 1e-6
OF_SAMPLES = ("height", "width", "negative_prompt")
"""Settings of a run, beside its sampler, that the result's samples are made with."""
_GIVEN = {
    "reward": "reward",
    "reward_weights": "weights of the rewards",
    "pairs": "pairs",
    "dataset": "dataset",
    "variant": "variant",
    "beta": "beta",
    "beta_dpo": "beta_dpo",
    "kl_coef": "kl_coef, the price of a nat of KL",
    "height": "height of images, in pixels",
    "width": "width of images, in pixels",
    "negative_prompt": "negative prompt",
}
_LONG_LIST = 12
_TEXTS = ("prompts", "show_prompts", "dataset", "source")  # lists of these hold texts, whatever they begin with
_LOADS = ("model", "base_config", "family")  # with what stands there the model is loaded
_EXAMPLES, _LONG_TEXT = 4, 300
_BEST = " These are its weights with the highest held-out reward; the figures below are of the whole run."
Kind = Literal["image", "text", "classifier"]


class _Words(NamedTuple):
    """What a card says of one kind of model and not of the others."""

    task: str
    of: str
    whole: str
    samples: str = "completions"
    kl: str = "per completion"
    library: str = "transformers"
    adapter_library: str = "peft"


_WORDS = {
    "image": _Words(
        "text-to-image",
        "the {network} of",
        "A text-to-image pipeline made from",
        "images",
        "over all trained steps per image",
        library="diffusers",
        adapter_library="diffusers",
    ),
    "text": _Words("text-generation", "the language model", "A language model made from"),
    "classifier": _Words("text-classification", "a reward model on", "A reward model made from"),
}


class PipelineFacts(NamedTuple):
    """What the lines of a card depend on, of a diffusers pipeline.

    Attributes:
        kind: its class.
        network: what its trained network is called.
        loads_lora: whether diffusers loads a LoRA for it.
        call_options: of its family.
        scheduler: the configuration of its scheduler.
        takes_eta: whether its call does.
        absent: its text encoders and tokenizers that are None, which diffusers must be told of.
        call_guidance: of its family.
    """

    kind: str = "DiffusionPipeline"
    network: str = "UNet"
    loads_lora: bool = True
    call_options: Mapping[str, Any] = {}
    scheduler: Mapping[str, Any] = {}
    takes_eta: bool = True
    absent: Sequence[str] = ()
    call_guidance: Callable[[float], Mapping[str, float]] = SHIPPED["StableDiffusionPipeline"].call_guidance


def facts_of(pipeline: Any) -> PipelineFacts:
    """Those of a loaded pipeline."""
    family, loads_lora = family_of(pipeline), hasattr(pipeline, "load_lora_weights")
    options, scheduler = family.call_options, pipeline.scheduler.config
    title = family.network_title
    reads = (name for name, part in pipeline.components.items() if part is None and name.startswith(("text", "token")))
    kind, absent = type(pipeline).__name__, tuple(reads)
    eta, guidance = takes_eta(pipeline), family.call_guidance
    return PipelineFacts(kind, title, loads_lora, options, scheduler, eta, absent, guidance)


# Adapters are float32, and on weights of half the width, as some models are saved in, they do not run unaided.
# By the name that diffusers 0.36 knows and later ones, before 1.0, still take; what they do not know they ignore.
_DTYPE = "torch_dtype=torch.float32"


def model_card(
    folder: Path,
    *,
    kind: Kind = "image",
    weights: Literal["final", "best"] = "final",
    location: str | None = None,
    merged: bool = False,
    pipeline: PipelineFacts | None = None,
) -> str:
    """The text of README.md for the result of a run.

    Args:
        folder: the run folder: ``config.yaml`` and, as far as they are there, ``metrics.jsonl``, ``evaluation.json``
            and ``samples/before_after.png`` or ``.jsonl``.
        kind: of the model.
        weights: which of the run's.
        location: where the result is to be loaded from; the run's own folder of these weights if not given. On the
            Hub, say, it is read by others, for whom folders of this machine are called by their names.
        merged: there is a whole model at ``location``; without it, the run's adapter if it trained one.
        pipeline: of an image model, for the lines that load and sample.

    Raises:
        ValueError: ``metrics.jsonl`` or ``evaluation.json`` is damaged.
        ConfigError: there is no ``config.yaml``, or it cannot be read.
    """
    settings = _named(resume_fingerprint(load_yaml(folder / "config.yaml")))
    metrics = folder / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    summary = read_evaluation(folder / SUMMARY)
    model = str(settings.get("model"))
    below = _below(found_from(folder, model) or model, kind)
    if merged or (location is not None and not os.path.isabs(location)):
        adapters = tuple(Path(*path.parts[-2:]) for path in below.adapters)
        below = replace(below, base=_name(below.base), base_config=_name(below.base_config), adapters=adapters)
        settings = {key: _name(value) if key in _LOADS else value for key, value in settings.items()}
    lora = bool(settings.get("lora")) and not merged
    method = str(settings.get("method"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pipeline = pipeline or PipelineFacts()
    network = pipeline.network + (" and the text encoders" if (settings.get("lora") or {}).get("text_encoder") else "")
    words = _WORDS[kind]._replace(of=_WORDS[kind].of.format(network=network))
    figures, reading = _figures(rows, settings, words)
    location = location or str(folder / weights)
    if kind == "image":
        code = _image_code(below, settings, location, lora, pipeline)
    else:
        code = _text_code(below, settings, location, lora, kind)
    shown = _settings(settings)
    return environment.get_template("model_card.md.j2").render(
        front_matter=_front_matter(below.base, method, lora, words),
        title=plain(f"{Path(below.origin or below.base).stem} aligned with {_title(method)}"),
        opening=_opening(below, lora, words) + (_BEST if weights == "best" else ""),
        image=BEFORE_AFTER if (folder / "samples" / BEFORE_AFTER).is_file() else None,
        examples=_examples(folder / "samples" / "before_after.jsonl"),
        facts=[(name, cell(value)) for name, value in _facts(rows, settings, below, summary, words)],
        figures=figures,
        reading=reading,
        code=code,
        settings=shown,
        fence=fence(code + shown, least=3),
        version=__version__,
    )


def write_model_card(folder: Path, target: Path, **options: Any) -> None:
    """Write the card of the run ``folder`` into ``target``, with the image it shows; ``options`` as above."""
    image = folder / "samples" / BEFORE_AFTER
    if image.is_file():
        with new_file(target / BEFORE_AFTER) as temporary:
            shutil.copyfile(image, temporary)
    write_text(target / "README.md", model_card(folder, **options))


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Put all files of ``folder`` into the model repository ``repo_id``, made if it is not there; returns its address.

    Raises:
        UserError: the Hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    _leave_out_places(folder)
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        message = "Upload with diffusion-align"
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), repo_type="model", commit_message=message)
    except Exception as error:  # of which kinds, depends on the library that speaks HTTP for the Hub's client
        raise UserError(f"repo_id={repo_id!r} could not be uploaded to: {first_line(error)}") from error
    return str(address)


def _leave_out_places(folder: Path) -> None:
    """Folders of this machine, which diffusers writes into the configurations of what was loaded from them."""
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and os.path.isabs(str(settings.get("_name_or_path", ""))):
            del settings["_name_or_path"]
            write_text(file, json.dumps(settings, indent=2) + "\n")


def _below(model: str, kind: Kind) -> ModelRef:
    if kind == "image":
        return image_model_ref(model)
    embedded = {str(asset_path("tiny-lm")): "tiny-lm", str(smollm2_folder()): "smollm2"}
    try:
        below = language_model_ref(model, ("causal", "classifier"))
    except UserError:  # a model in memory whose name leads nowhere
        below = ModelRef(model)
    return replace(below, base=embedded.get(below.base, below.base))


def _title(method: str) -> str:
    """ "grpo" -> "GRPO", "diffusion_dpo" -> "Diffusion-DPO"; of a user's own class its name."""
    if ":" in method:
        return method.rpartition(":")[2]
    return "-".join(word.upper() if len(word) <= 4 else word.capitalize() for word in method.split("_"))


def _examples(file: Path) -> list[tuple[str, str, str]]:
    """(prompt, before, after) of the first fixed prompts of a run on text."""
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:_EXAMPLES]]

    def shown(value: Any) -> str:
        text = _short(value)
        return cell(literal(text if len(text) <= _LONG_TEXT else text[:_LONG_TEXT] + " ..."))

    return [(shown(row["prompt"]), shown(row["before"]), shown(row["after"])) for row in rows]


def _front_matter(base: str, method: str, lora: bool, words: _Words) -> str:
    library = words.adapter_library if lora else words.library
    kinds = ["lora"] if lora else []
    tags = [words.task, library, *kinds, _title(method).lower(), "diffusion-align"]
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": words.task, "tags": tags}
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) and not os.path.exists(base)
    if hub_id:  # the Hub refuses a card whose base_model is not one of its own
        front = {"base_model": base, "base_model_relation": "adapter" if lora else "finetune"} | front
    return yaml_text.dump(front, sort_keys=False, allow_unicode=True)


def _opening(below: ModelRef, lora: bool, words: _Words) -> str:
    what = f"A LoRA adapter for {words.of}" if lora else words.whole
    base = literal(below.base)
    if below.base in (*EMBEDDED_PIPELINES, "tiny-lm"):
        base += " (the model inside the Python package diffusion-align)"
    if not below.adapters:
        return f"{what} {base}."
    runs = ", then ".join(literal(str(path)) for path in below.adapters)
    return f"{what} {base}, with the adapters of earlier runs merged into it: {runs}."


def _facts(
    rows: Sequence[Row], settings: Mapping[str, Any], below: ModelRef, summary: Mapping[str, Any], words: _Words
) -> list[tuple[str, str]]:
    facts = [("base model", literal(below.base)), ("method", literal(str(settings.get("method"))))]
    if below.run is not None:
        facts.append(("trained on, and reference", f"the run {literal(str(settings['model']))}"))
    for key, name in _GIVEN.items():
        if settings.get(key) not in (None, ""):
            facts.append((name, literal(_short(settings[key]))))
    _, beta = series(rows, "beta_nats", x="epoch")
    if len(beta):
        facts.append(("beta per nat", f"{beta[-1]:.4g}"))
    _, kl = _epoch_means(rows, "kl_path")
    if kl:
        facts.append(("KL to the reference, last epoch", f"{kl[-1]:.4g} nats, {words.kl}"))
    epochs = {row["epoch"] for row in rows if "time/epoch" in row}  # which every trainer logs at its end
    count = len(epochs) * settings.get("samples_per_epoch", 0)
    given = {"pairs": "pairs trained on", "dataset": "rows trained on"}
    counted = next((name for key, name in given.items() if settings.get(key) is not None), f"{words.samples} sampled")
    facts += [("epochs", str(len(epochs))), (counted, str(count))]
    if summary.get("stopped"):
        facts.append(("ended early", plain(str(summary["stopped"]))))
    if summary.get("best"):
        best = summary["best"]
        facts.append(("highest held-out reward", f"{best['gold']:.4g}, after epoch {best['epoch']}"))
    return facts


def _figures(rows: Sequence[Row], settings: Mapping[str, Any], words: _Words) -> tuple[list[tuple[str, str, str]], str]:
    """(name, first, last) per metric of an epoch, and how the table is read."""
    found = []
    for key, name in NAMES.items():
        epochs, values = _epoch_means(rows, key)
        if len(epochs):
            first, last = f"{values[0]:.4g} (epoch {epochs[0]:g})", f"{values[-1]:.4g} (epoch {epochs[-1]:g})"
            found.append((name, first, last if len(epochs) > 1 else "the same"))
    reading = (
        f"The reward is of the {words.samples} sampled in an epoch, before its updates; held-out reward and diversity "
        "are measured after them, in epoch 0 of the model as it was."
        if len(_epoch_means(rows, "reward")[0])
        else "The first epoch starts from the reference."
    )
    if settings.get("ema_decay") is not None:
        reading += f" The weights here are an average over the updates (ema_decay={settings['ema_decay']})."
    return found, reading


def _epoch_means(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Epochs, and the mean of ``key`` over the rows of each that hold it."""
    values: dict[float, list[float]] = {}
    for row in rows:
        if is_number(row.get(key)) and math.isfinite(row[key]) and is_number(row.get("epoch")):
            values.setdefault(row["epoch"], []).append(row[key])
    return sorted(values), [sum(values[epoch]) / len(values[epoch]) for epoch in sorted(values)]


def _image_code(
    below: ModelRef,
    settings: Mapping[str, Any],
    location: str,
    lora: bool,
    pipeline: PipelineFacts,
) -> str:
    """Lines that sample an image with diffusers as the run's own sampler does."""
    sampler = {"name": "ddim", "steps": 50, "eta": 1.0, "guidance_scale": 5.0} | (settings.get("sampler") or {})
    window, eta = "", min(sampler["eta"], LARGEST_ETA)
    if sampler.get("noisy_steps") is not None:
        window, eta = ".preview", 0.0
    else:
        sampler = {name: value for name, value in sampler.items() if not name.startswith("noisy_")}
    scheduler = diffusers_scheduler(sampler["name"], pipeline.scheduler)
    noiseless = sampler.get("noise_level") == 0 or (eta == 0 and sampler["name"] in (None, "ddim", "flow"))
    as_loaded = is_flow(pipeline.scheduler) and (noiseless or bool(window))
    pipeline_class = pipeline.kind
    if lora and is_one_file(below.base) and pipeline_class == "DiffusionPipeline":
        pipeline_class = "StableDiffusionPipeline"  # the general class reads folders only
    own = lora and not pipeline.loads_lora
    classes = [*([scheduler] if scheduler else []), *([] if own else [pipeline_class])]
    lines = ["import torch", *([f"from diffusers import {', '.join(classes)}"] if classes else [])]
    if own:
        lines.append("from diffusion_align import ImageAlignmentPipeline")
    elif lora and below.base in EMBEDDED_PIPELINES:
        lines.append("from diffusion_align.assets import asset_path")
    if scheduler is None and not as_loaded:
        lines.append("from diffusion_align.diffusion.rollout import scheduler_of")
        lines.append("from diffusion_align.diffusion.schedule import SamplerConfig")
    lines.append("")
    if not lora:
        lines.append(f"pipeline = {pipeline_class}.from_pretrained({_quoted(location)}, {_loading(pipeline)})")
    elif own:
        options = {"lora": location} | {k: settings[k] for k in ("family",) if settings.get(k)}
        loading = ", ".join(f"{key}={_quoted(value)}" for key, value in options.items())
        lines.append(f"aligned = ImageAlignmentPipeline.from_pretrained({_quoted(str(settings['model']))}, {loading})")
        lines.append("pipeline = aligned.pipeline")
    else:
        lines.append(f"pipeline = {_load_base(below, settings, pipeline_class, _loading(pipeline))}")
        for adapter in below.adapters:
            lines.append(_load_lora(str(adapter)))
            lines += ["pipeline.fuse_lora()", "pipeline.unload_lora_weights()"]
        lines.append(_load_lora(location))
    given = {name: settings[name] for name in OF_SAMPLES if settings.get(name) is not None}
    arguments = {**given, **pipeline.call_options}
    extra = "".join(
        f", {name}={_quoted(value) if isinstance(value, str) else value!r}" for name, value in arguments.items()
    )
    if as_loaded:
        extra += ", generator=[torch.Generator().manual_seed(0)]"
    elif scheduler is None:
        extra += ", generator=[torch.Generator().manual_seed(0)]"
        lines.append(f"pipeline.scheduler = scheduler_of(SamplerConfig(**{sampler}){window}, pipeline.scheduler)")
    else:
        config = '{"clip_sample": False, **pipeline.scheduler.config}'
        lines.append(f"pipeline.scheduler = {scheduler}.from_config({config})")
    extra = f", eta={eta}{extra}" if pipeline.takes_eta else extra
    guidance = ", ".join(f"{name}={value}" for name, value in pipeline.call_guidance(sampler["guidance_scale"]).items())
    lines.append(
        f"image = pipeline({_quoted(_example(settings))}, num_inference_steps={sampler['steps']}, "
        f"{guidance}{extra}).images[0]"
    )
    return "\n".join(lines)


def _text_code(below: ModelRef, settings: Mapping[str, Any], location: str, lora: bool, kind: Kind) -> str:
    """Lines that complete or score a prompt with transformers (and peft) as the run does."""
    family = "AutoModelForCausalLM" if kind == "text" else "AutoModelForSequenceClassification"
    of_base = {
        "tiny-lm": ("from diffusion_align.assets import asset_path", 'asset_path("tiny-lm")'),
        "smollm2": ("from diffusion_align.models.smollm2 import smollm2_folder", "smollm2_folder()"),
    }
    load, found = of_base.get(below.base, (None, _quoted(below.base)))
    lines = [f"from transformers import {family}, AutoTokenizer", ""]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({_quoted(location)})")
    labels = "" if kind == "text" else ", num_labels=1"
    if not lora:
        lines.append(f"model = {family}.from_pretrained({_quoted(location)}).float()")
    else:
        lines[:0] = [*([load] if load else []), "from peft import PeftModel"]
        lines.append(f"model = {family}.from_pretrained({found}{labels}).float()")
        stack = [*map(str, below.adapters), location]
        lines += [f"model = PeftModel.from_pretrained(model, {_quoted(one)}).merge_and_unload()" for one in stack]
    prompt = _example(settings)
    if isinstance(prompt, str):
        lines.append(f'inputs = tokenizer({_quoted(prompt)}, return_tensors="pt")')
    else:
        options = "" if kind == "classifier" else "add_generation_prompt=True, "
        call = f'apply_chat_template({prompt!r}, {options}return_dict=True, return_tensors="pt")'
        lines.append(f"inputs = tokenizer.{call}")
    inputs = 'inputs["input_ids"], attention_mask=inputs["attention_mask"]'
    if kind == "classifier":
        lines.append(f"score = model({inputs}).logits[0, 0].item()")
        return "\n".join(lines)
    lines += [
        f"output = model.generate({inputs}, "
        f"max_new_tokens={settings.get('max_completion_length', 256)}, do_sample=True, "
        f"temperature={settings.get('temperature', 1.0)}, top_k=0)",
        'text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)',
    ]
    return "\n".join(lines)


def _load_lora(location: str) -> str:
    """With the file's name, without which diffusers 0.36 queries the Hub."""
    return f"pipeline.load_lora_weights({_quoted(location)}, weight_name={_quoted(LORA_FILE)})"


def _loading(pipeline: PipelineFacts) -> str:
    return ", ".join([_DTYPE, *(f"{name}=None" for name in pipeline.absent)])


def _load_base(below: ModelRef, settings: Mapping[str, Any], pipeline_class: str, options: str) -> str:
    own = below.run is None
    variant = settings.get("weights_variant") if own else below.variant
    base_config = settings.get("base_config") if own else below.base_config
    if below.base in EMBEDDED_PIPELINES:
        return f"{pipeline_class}.from_pretrained(asset_path({_quoted(below.base)}), {options})"
    if is_one_file(below.base):
        config = f", config={_quoted(base_config)}" if base_config else ""
        return f"{pipeline_class}.from_single_file({_quoted(below.base)}{config}, {options})"
    chosen = f", variant={_quoted(variant)}" if variant else ""
    return f"{pipeline_class}.from_pretrained({_quoted(below.base)}{chosen}, {options})"


def _settings(settings: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in settings.items() if key not in WATCHING}  # nobody else's business
    for key in _TEXTS:
        if isinstance(kept.get(key), list) and len(kept[key]) > _LONG_LIST:
            kept[key] = [*kept[key][:_LONG_LIST], f"... {len(kept[key])} in all"]
    return yaml_text.dump(kept, sort_keys=False, allow_unicode=True)


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which files of this machine are called by their names, but for what loads the model."""

    def named(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {inner: named(inner, one) for inner, one in value.items()}
        if isinstance(value, list):
            return value if key in _TEXTS else [named(key, one) for one in value]
        return _name(value)

    kept = (*_LOADS, "negative_prompt")
    return {key: value if key in kept else named(key, value) for key, value in settings.items()}


def _name(value: Any) -> Any:
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _example(settings: Mapping[str, Any]) -> Any:
    """A prompt: a text, or a list of messages."""
    for key in ("show_prompts", "prompts", "dataset"):
        prompts = settings.get(key)
        prompts = prompts.get("source") if isinstance(prompts, dict) else prompts
        first = prompts[0] if isinstance(prompts, list) and prompts else None
        first = first.get("prompt") if isinstance(first, dict) else first
        if first:
            return first
    return "a cat"


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _quoted(text: str) -> str:
    """A Python literal; JSON's escapes are Python's too."""
    return json.dumps(text, ensure_ascii=False)
