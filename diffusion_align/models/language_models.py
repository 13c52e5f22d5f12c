"""From a name, folder or Hub id to a causal language model and its tokenizer. Weights come from safetensors only."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from diffusion_align.assets import EMBEDDED_MODELS, LANGUAGE_MODELS, asset_path
from diffusion_align.data.text_encoding import context_length, eos_token_ids
from diffusion_align.errors import UserError, first_line, nearest, problems_of, short
from diffusion_align.inputs import check_path
from diffusion_align.models.model_ref import ModelRef, check_image_model
from diffusion_align.models.smollm2 import NOT_INSTALLED, convert_smollm2, installed_weights, smollm2_folder
from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.training.places import found_from
from diffusion_align.training.reading import load_yaml

if TYPE_CHECKING:
    import torch


Kind = Literal["causal", "classifier"]
MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""What families call their number in config.json."""


def model_places(name: str) -> list[str]:
    """The full model's folder or Hub id that ``name`` stands for, then the folders of the adapters on it."""
    ref = language_model_ref(name, ("causal", "classifier"))
    return [ref.base, *map(str, ref.adapters)]


def load_language_model(name: str, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """The model ``name`` stands for, adapters merged into it, in eval mode on the CPU; and its tokenizer.

    Args:
        name: "tiny-lm", "smollm2" (converted once into ``smollm2_folder()``), a folder with a full model or a PEFT
            adapter, a run folder (``config.yaml`` and ``final/``), or a Hub id of a full model.
        dtype: of the weights; float32 if not given.

    Raises:
        UserError: the model is not there, is not a causal language model, or cannot be read.
    """
    ref = language_model_ref(name, ("causal",))
    with _quietly(), _in_one_sentence(name), hub_or_cache(ref.base):
        model = _full_model(name, ref.base, dtype, ("causal",))
        for folder in ref.adapters:
            model = _merged(model, folder)
        return model.eval(), _tokenizer(name, ref, model.get_input_embeddings().num_embeddings)


def use_attention(model: Any, name: str) -> None:
    """Let "eager", "sdpa" or "flash_attention_2" compute the attention of a loaded model; "auto" leaves it as it is.

    Raises:
        UserError: it cannot.
    """
    if name == "auto":
        return
    try:
        with _quietly():
            model.set_attn_implementation(name)
        why = f"a {type(model).__name__} does not support it"
    except (ValueError, ImportError) as error:  # transformers' sentences
        why = first_line(error).rstrip(".:")
    if model.config._attn_implementation != name:
        raise UserError(f"attention={name} is not possible: {why}: leave it out")


def load_tokenizer(name: str) -> tuple[Any, int | None]:
    """The tokenizer of a language model or classifier, and the most tokens it takes if it says; no weights are read."""
    ref = language_model_ref(name, ("causal", "classifier"))
    with _quietly(), _in_one_sentence(name), hub_or_cache(ref.base):
        config, _ = _config(name, ref.base, ("causal", "classifier"))
        return _tokenizer(name, ref, config.get_text_config().vocab_size), context_length(config)


def load_ends(name: str, tokenizer: Any) -> list[int]:
    """The tokens that end a sample of the language model ``name``, as its policy has them; no weights are read."""
    from transformers import GenerationConfig

    ref = language_model_ref(name, ("causal",))
    with _quietly(), _in_one_sentence(name), hub_or_cache(ref.base):
        config, _ = _config(name, ref.base, ("causal",))
        try:
            settings = GenerationConfig.from_pretrained(ref.base)
        except OSError:  # there is no such file: transformers then takes them from the model's configuration
            settings = GenerationConfig.from_model_config(config)
        return _ends(name, tokenizer, settings)


def load_sequence_classifier(name: str, num_labels: int = 1, *, dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """A classifier on top of the language model ``name`` (or the saved classifier it is), and its tokenizer.

    The head reads the last token that is not padding. A language model gets a head of zeros, so that all scores start
    at 0; what ``RewardModelTrainer`` saved brings its own. A tokenizer without padding pads with its end of
    sequence, and then the head reads the token before the end.

    Args:
        name: as for ``load_language_model``; also folders, runs and Hub ids of classifiers.
        num_labels: numbers a text gets; 1 for a reward model.
        dtype: of the weights; float32 if not given.

    Raises:
        UserError: the model is not there, of another kind, has another number of labels, or cannot be read.
    """
    kinds: tuple[Kind, ...] = ("causal", "classifier")
    ref = language_model_ref(name, kinds)
    with _quietly(), _in_one_sentence(name), hub_or_cache(ref.base):
        model = _full_model(name, ref.base, dtype, kinds)
        for folder in ref.adapters:
            if _adapter_kind(_json(name, folder / "adapter_config.json")) == "classifier":
                model = _with_head(model, num_labels)
            model = _merged(model, folder)
        model = _with_head(model, num_labels)
        tokenizer = _tokenizer(name, ref, model.get_input_embeddings().num_embeddings)
    if model.config.num_labels != num_labels:
        raise UserError(
            f"model={name!r} is a classifier of {model.config.num_labels} labels, but {num_labels} are required"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(f"model={name!r}: its tokenizer has neither a padding token nor an end of sequence")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def language_model_ref(name: str, kinds: tuple[Kind, ...] = ("causal",), above: tuple[str, ...] = ()) -> ModelRef:
    """What to load for ``name``.

    Args:
        name: as for ``load_language_model``, or ``load_sequence_classifier`` where ``kinds`` has classifiers.
        kinds: of models.
        above: the adapters and runs that led here.

    Raises:
        UserError: there is no such model, or it is of another kind. Nothing is loaded.
    """
    subject = f"model={name!r}"
    embedded = ", ".join(LANGUAGE_MODELS)
    check_path(name, f"model={short(name)}", "folder")
    if name in above:
        raise UserError(f"{subject} is trained on itself: correct base_model_name_or_path, or model in config.yaml")
    if name == "tiny-lm":
        return ModelRef(str(asset_path(name)), origin=name)
    folder = Path(os.path.expanduser(name))
    if name == "smollm2" or folder == smollm2_folder():  # adapters on it name the folder
        if not smollm2_folder().is_dir() and installed_weights() is None:
            raise UserError(NOT_INSTALLED)
        return ModelRef(str(smollm2_folder()), origin="smollm2")
    if name in EMBEDDED_MODELS:
        raise UserError(f"{subject} is an image model, not a language model: embedded language models are {embedded}")
    if os.path.isdir(folder):  # unlike Path.is_dir it answers about any text
        ref = _folder_ref(name, folder, kinds, (*above, name))
        of_run = folder.name in ("final", "best") and (folder.parent / "config.yaml").is_file()
        return replace(ref, run=folder.parent) if of_run else ref
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        hint = nearest(name, LANGUAGE_MODELS)
        raise UserError(
            f"{subject} is neither an embedded language model, nor a folder, nor a Hub id 'owner/name': {hint}"
        )
    return ModelRef(name, origin=name)


def model_kind(names: Sequence[str]) -> Literal["image", "text"]:
    """The kind of all ``names``, as the loaders take them; "image" unless they are known to be language models.

    Raises:
        UserError: they are of both kinds.
    """
    known = {}
    for name in names:
        text, image = (not problems_of(check, name) for check in (language_model_ref, check_image_model))
        kind = ("image" if image else "text") if text != image else None
        kind = _on_the_hub(name) if text and image else kind
        if kind is not None:
            known[name] = kind
    kinds = set(known.values())
    if len(kinds) == 2:
        of_kind = {kind: next(name for name in known if known[name] == kind) for kind in kinds}
        raise UserError(
            f"{of_kind['image']!r} is a text-to-image model and {of_kind['text']!r} a language model: give models of "
            "one kind"
        )
    return "text" if kinds == {"text"} else "image"


def _on_the_hub(name: str) -> Literal["image", "text"] | None:
    """By the files that a repository of the Hub, or its cache, has; None where that is not known."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with hub_or_cache(name):
        for file, kind in (("model_index.json", "image"), ("config.json", "text")):
            try:
                hf_hub_download(name, file)
            except EntryNotFoundError:
                continue
            except Exception:  # no such repository, say: loading it says so
                return None
            return kind  # type: ignore[return-value]
    return None


def _folder_ref(name: str, folder: Path, kinds: tuple[Kind, ...], above: tuple[str, ...]) -> ModelRef:
    subject = f"model={name!r}"
    if (folder / "model_index.json").is_file():
        raise UserError(f"{subject} is the folder of a text-to-image pipeline, not of a language model")
    if (folder / "adapter_config.json").is_file():
        config = _json(name, folder / "adapter_config.json")
        if _adapter_kind(config) not in kinds:
            raise UserError(
                f"{subject} is an adapter for task_type={config.get('task_type')!r}, not for text generation"
            )
        return _on_base(name, folder, config.get("base_model_name_or_path"), kinds, above)
    if (folder / "config.json").is_file():
        config = _json(name, folder / "config.json")
        text = config.get("text_config")
        for part in (config, text if isinstance(text, dict) else {}):
            for layers in (part[key] for key in _LAYERS if key in part):
                if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:  # they would be built one by one
                    raise UserError(f"{subject}: config.json has {short(layers)} layers, not 1 to {MOST_LAYERS}")
        _check_kind(subject, config.get("model_type"), config.get("architectures"), kinds)
        return ModelRef(str(folder), origin=str(folder))
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{subject}: the folder has no config.json, no adapter_config.json and no config.yaml of a run")
    final = folder / "final"
    if not final.is_dir():
        raise UserError(f"{subject} is a run that has no final/ yet: let it finish, or give the model it trains")
    try:
        run = load_yaml(folder / "config.yaml")
    except UserError as error:
        raise UserError(f"{subject}: config.yaml cannot be read: {first_line(error)}") from error
    base = run.get("model")
    if not any((final / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise UserError(
            f"{subject} is a run of method={run.get('method')!r} whose final/ holds no language model: name another"
        )
    if base is None or (final / "config.json").is_file():
        return replace(_folder_ref(str(final), final, kinds, above), run=folder, settings=run)
    config = _json(name, final / "adapter_config.json")
    if _adapter_kind(config) not in kinds:
        raise UserError(f"{subject} trained an adapter for task_type={config.get('task_type')!r}, not a language model")
    return replace(_on_base(name, final, base, kinds, above), run=folder, settings=run)


def _on_base(name: str, adapter: Path, base: Any, kinds: tuple[Kind, ...], above: tuple[str, ...]) -> ModelRef:
    if not isinstance(base, str) or not base:
        raise UserError(
            f"model={name!r} is an adapter that does not say on what: set base_model_name_or_path in {adapter}"
        )
    found = found_from(adapter, base)
    if found is None:
        raise UserError(
            f"model={name!r} is an adapter whose base model {base!r} was found neither near its folder nor in the "
            "current one: correct base_model_name_or_path, or model in config.yaml"
        )
    if not (adapter / "adapter_model.safetensors").is_file():
        raise UserError(f"model={name!r} has no adapter_model.safetensors in {adapter}: other formats are not read")
    try:
        ref = language_model_ref(found, kinds, above)
    except UserError as error:
        raise UserError(f"model={name!r} is an adapter whose base model cannot be used: {error}") from None
    return ModelRef(ref.base, (*ref.adapters, adapter), below=base, origin=ref.origin)


def _adapter_kind(config: dict[str, Any]) -> Kind | None:
    """By PEFT's ``task_type``; adapters without one are taken for a language model's."""
    kinds: dict[Any, Kind] = {None: "causal", "CAUSAL_LM": "causal", "SEQ_CLS": "classifier"}
    return kinds.get(config.get("task_type"))


def _check_kind(subject: str, model_type: Any, architectures: Any, kinds: tuple[Kind, ...]) -> Kind:
    """The kind of model that a configuration is of.

    Raises:
        UserError: it is none of ``kinds``.
    """
    from transformers.models.auto import modeling_auto

    known = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    }
    # Encoders such as BERT have a causal class too: the saved class decides, if it is recorded.
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    for kind in kinds:
        if model_type in known["causal"] and (name is None or name == known[kind].get(model_type)):
            return kind
    what = name or model_type or "model of unknown type"
    raise UserError(f"{subject} is a {what}, not a causal language model: give another one")


def _config(name: str, source: str, kinds: tuple[Kind, ...]) -> tuple[Any, Kind]:
    """The configuration of a folder or Hub id, and its kind; smollm2 is converted first."""
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    if Path(source) == smollm2_folder():
        convert_smollm2()
    elif not os.path.isdir(source) and find_adapter_config_file(source) is not None:
        raise UserError(f"model={name!r} is an adapter on the Hub: download it and give its folder")
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return config, _check_kind(f"model={name!r}", config.model_type, config.architectures, kinds)


def _full_model(name: str, source: str, dtype: torch.dtype | None, kinds: tuple[Kind, ...]) -> Any:
    """The model of a folder or Hub id, every weight found."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = torch.float32 if dtype is None else dtype
    _, kind = _config(name, source, kinds)
    family: Any = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    options = {"use_safetensors": True, "trust_remote_code": False, "output_loading_info": True}
    model, found = load_in_dtype(family.from_pretrained, source, dtype=dtype, **options)
    if found["missing_keys"]:  # transformers would continue with random ones
        raise UserError(f"model={name!r} is incomplete: its weights lack {min(found['missing_keys'])}")
    _ends(name, SimpleNamespace(eos_token_id=None), getattr(model, "generation_config", None))
    return model


def _ends(name: str, tokenizer: Any, settings: Any) -> list[int]:
    try:
        return eos_token_ids(tokenizer, settings)
    except (TypeError, ValueError):
        found = f"eos_token_id={short(settings.eos_token_id)} of generation_config.json must be a token's number"
        raise UserError(f"model={name!r}: {found}") from None


def _merged(model: Any, folder: Path) -> Any:
    """The model with the adapter added to its weights; it is called after the adapter's folder from now on."""
    from diffusion_align.models.lora import forget_adapters, load_peft

    adapted = load_peft(model, folder)
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise UserError(f"{folder} is an adapter that cannot be merged into a model: use one of LoRA's kind")
    model = adapted.merge_and_unload(safe_merge=True)
    forget_adapters(model)  # peft's settings stay on it
    model.name_or_path = model.config.name_or_path = str(folder)
    return model


def _with_head(model: Any, num_labels: int) -> Any:
    """The model if it is a classifier already, else a classifier with its body and a new head."""
    from torch import nn
    from transformers import AutoModelForSequenceClassification

    if not problems_of(_check_kind, "", model.config.model_type, [type(model).__name__], ("classifier",)):
        return model
    config = copy.deepcopy(model.config)
    config.num_labels = num_labels
    make = AutoModelForSequenceClassification.from_config
    classifier = load_in_dtype(make, config, dtype=model.dtype, trust_remote_code=False)
    classifier.base_model.load_state_dict(model.base_model.state_dict())
    nn.init.zeros_(classifier.score.weight)
    return classifier


def _tokenizer(name: str, ref: ModelRef, rows: int) -> Any:
    """The tokenizer of the last adapter that has one, or of the full model."""
    from transformers import AutoTokenizer

    own = [str(folder) for folder in reversed(ref.adapters) if (folder / "tokenizer_config.json").is_file()]
    tokenizer = AutoTokenizer.from_pretrained([*own, ref.base][0], trust_remote_code=False)
    if not isinstance(tokenizer.model_max_length, int | float):  # transformers compares whatever is written there
        found = f"model_max_length={short(tokenizer.model_max_length)} of its tokenizer must be a number"
        raise UserError(f"model={name!r}: {found}: correct tokenizer_config.json")
    # Some models have special tokens of their images beyond those of their text.
    known = [i for i, token in tokenizer.added_tokens_decoder.items() if i < rows or not token.special]
    tokens = max(tokenizer.vocab_size, *(i + 1 for i in known)) if known else tokenizer.vocab_size
    if not 0 < tokens <= rows:  # transformers makes up an empty one where there is none
        raise UserError(
            f"model={name!r}: its tokenizer has {len(tokenizer)} tokens, and the model {rows}: save the model's own "
            "tokenizer with it"
        )
    return tokenizer


def _json(name: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"model={name!r}: {file.name} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"model={name!r}: {file.name} holds no JSON object")
    return content


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No warnings, logs or progress bars of the libraries: what matters is raised."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _in_one_sentence(name: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers and peft raise whatever a wrong value leads to
        raise UserError(f"model={name!r} could not be loaded: {first_line(error)}") from error
