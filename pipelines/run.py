"""One entry for every method, and what both pipelines share.

And what a run is made of, by content: its model, data, images and rewards. Checkpoints hold it, and resume compares.
"""

from __future__ import annotations

import html
import os
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, cast

import torch

from diffusion_align.arguments import also_called
from diffusion_align.assets import EMBEDDED_MODELS, asset_path
from diffusion_align.errors import UserError, short
from diffusion_align.inputs import check_device
from diffusion_align.invocation import PythonCall, Started
from diffusion_align.methods import method_of
from diffusion_align.models.language_models import model_places
from diffusion_align.models.model_ref import ModelRef
from diffusion_align.pipelines.configuration import check_config
from diffusion_align.references import module_of
from diffusion_align.report import RunReport, read_metrics
from diffusion_align.rewards.build import user_modules
from diffusion_align.rewards.networks import recorded
from diffusion_align.training.callbacks import named_callbacks
from diffusion_align.training.config import TrainingConfig
from diffusion_align.training.context import RunContext
from diffusion_align.training.digests import code_files, content_digest, file_digest, place_digest
from diffusion_align.training.launch import agreed, decide_precision, processes, start
from diffusion_align.training.places import BASE, absolute_paths
from diffusion_align.training.trainer import Trainer
from diffusion_align.writing import make_folder, output_folder

Places = list[tuple[str, str | None]]
Config = TypeVar("Config", bound=TrainingConfig)


def run(
    config: TrainingConfig,
    *,
    pipeline: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    started: Started | None = None,
) -> Trainer[Any]:
    """Train as ``config`` says and return the finished trainer.

    Args:
        config: checked settings of any method, from ``read_config`` or ``check_config``.
        pipeline: a loaded diffusers pipeline, see ``image_context``.
        model, tokenizer: a loaded language model, see ``text_context``.
        started: how the run was started, which is printed where it can be resumed; as ``build_trainer`` if not given.

    Raises:
        UserError: data, models or rewards that do not fit; and see ``Trainer.train``.
    """
    trainer = _trainer(config, pipeline, model, tokenizer, started)
    trainer.train()
    return trainer


def build_trainer(config: TrainingConfig) -> Trainer[Any]:
    """The trainer of a configuration, with its model, data and rewards, ready for ``train()``.

    Args:
        config: of any method, as ``DDPOConfig(model="emoji-sd", reward=..., prompts=..., output_dir=...)``.

    Raises:
        UserError: everything that is wrong with the settings; data, models or rewards that do not fit.
    """
    if not isinstance(config, TrainingConfig):
        raise UserError(
            "build_trainer takes a configuration: give DDPOConfig(model=..., ...) or the like, or what read_config of "
            "diffusion_align.pipelines.configuration makes of a recipe"
        )
    if not config.method:
        raise UserError(f"{type(config).__name__} does not say what trains: set method to 'module:Class'")
    given = {name: getattr(config, name) for name in config.model_fields_set}
    return _trainer(check_config(given | {"method": config.method}))


def align_call(config: TrainingConfig) -> Started:
    """``align`` of a pipeline, as whoever resumes the run calls it."""
    return PythonCall("align({})", {"output_dir": config.output_dir})


def _trainer(
    config: TrainingConfig,
    pipeline: Any = None,
    model: Any = None,
    tokenizer: Any = None,
    started: Started | None = None,
) -> Trainer[Any]:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    method = method_of(config.method)
    callbacks = agreed(lambda: named_callbacks(config.callbacks))
    config = decide_precision(config)
    if method.model_kind == "image":
        from diffusion_align.pipelines.image_context import image_context

        context = image_context(config, pipeline)  # type: ignore[arg-type]
    elif method.model_kind is None:
        context = RunContext(*start(config, lambda use_bf16: 0.0))
    else:
        from diffusion_align.pipelines.text_context import text_context

        context = text_context(config, model, tokenizer)
    trainer = method.from_run(replace(context, callbacks=callbacks))
    form = f"build_trainer({type(config).__name__}({{}})).train()"
    trainer.run_folder.started = started or PythonCall(form, {"output_dir": config.output_dir})
    own = code_content([sys.modules[method.__module__]])  # this package's is known by its version
    trainer.model_given = model is not None
    trainer.identity = context.identity | ({"method": own} if own else {})
    return trainer


@contextmanager
def on_disk(
    config: Config, model: str | None, save: Callable[[Path], None], *, without: Iterable[str] = ()
) -> Iterator[Config]:
    """``config`` whose model is ``model``; None stands for weights that are in no folder.

    ``save`` writes those to ``base/`` of the run folder: what the run can be resumed from, and its adapter loaded on,
    ``without`` some settings of loading. Where the run does not begin, they are gone again.
    """
    if model is not None:
        yield config.model_copy(update=absolute_paths({"model": model}))
        return
    base = config.output_dir / BASE
    absent = [place for place in (config.output_dir, *config.output_dir.parents) if not place.exists()]

    def write() -> None:
        if processes().is_main_process:
            make_folder(config.output_dir, parents=True)
            save(base)

    agreed(lambda: None)  # all have looked at the folder before the main process writes to it
    try:
        agreed(write)
        yield config.model_copy(update={"model": str(base)} | dict.fromkeys(without))
    except BaseException:
        if processes().is_main_process and not (config.output_dir / "config.yaml").exists():
            shutil.rmtree(base, ignore_errors=True)
            for place in absent:
                with suppress(OSError):
                    place.rmdir()
        raise


def not_uploaded(why: str) -> UserError:
    """Of an adapter that nobody could load from the Hub."""
    return UserError(f"{why}: give merged=True to upload the whole model")


def not_in_memory(run: Path) -> UserError:
    """Of a run that cannot be resumed by the pipeline at hand."""
    place = repr(str(run / BASE)) if (run / BASE).is_dir() else "the model of its config.yaml"
    return UserError(
        f"resume=True needs the reference of {str(run)!r}, which is not in memory: load {place} by from_pretrained and "
        "align that, or use the command line"
    )


LOADING = {
    "torch_dtype": "dtype",
    **dict.fromkeys(("pretrained_model_name_or_path", "model_id", "model_name", "model_name_or_path"), "model"),
}
NOT_LOADED = {
    "cache_dir": "set HF_HOME",
    "device_map": "give device",
    "revision": "download that revision and give its folder",
    "use_safetensors": "leave it out, weights are read from safetensors only",
}
NOT_FROM_PIPE = {
    **dict.fromkeys(("dtype", "torch_dtype"), "load it in that dtype"),
    "device": "call to(device) afterwards",
    "lora": "load its LoRA weights before",
}


def dtype_of(given: torch.dtype | str | None) -> torch.dtype:
    """The floating-point dtype that ``given`` is or names; float32 if it is None.

    Raises:
        UserError: it is none.
    """
    found = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given or torch.float32
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f"dtype={short(given)} is not supported: give torch.float32, torch.bfloat16 or torch.float16")
    return found


class AlignmentPipeline(ABC):
    """A model that can be saved and uploaded with the card of the run whose result it is.

    Attributes:
        run: the run folder whose result this is, None if it is of no run.
    """

    run: Path | None = None
    inside: ClassVar[str]
    """The attribute that holds the weights."""
    load_time: Mapping[str, str] = {}
    """Setting -> the argument of ``from_pretrained`` that it is."""

    def __repr__(self) -> str:
        model, adapted = self._about
        about = {
            "model": model,
            "run": None if self.run is None else str(self.run),
            "adapter": adapted,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in about.items())})"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return cast(torch.device, self._loaded.device)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the model's weights."""
        return cast(torch.dtype, self._loaded.dtype)

    @also_called({}, dict.fromkeys(("dtype", "torch_dtype"), "give dtype to from_pretrained"))
    def to(self, device: str | torch.device) -> Self:
        """Move the model; returns this pipeline.

        Args:
            device: "cpu", "cuda", "cuda:1" or the like.

        Raises:
            UserError: there is no such device.
        """
        if isinstance(device, torch.dtype):
            raise UserError(f"dtype={device} is for loading a model: give it to from_pretrained")
        check_device(device, f"device={str(device)!r}")
        self._loaded.to(device)
        return self

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Raise; where the loaded model has the attribute, the error says so."""
            place = self.inside
            has = not name.startswith("_") and hasattr(self.__dict__.get(place), name)
            where = f": use .{place}.{name}" if has else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{where}")

    def _made(self, folder: Path) -> bool:
        """Whether this is the result of the run in ``folder``."""
        return self.run is not None and self.run.resolve() == folder.resolve()

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of the run's ``metrics.jsonl``, one per update and one per epoch; none without a run.

        ``pandas.DataFrame(pipe.metrics)`` is a table of them.
        """
        path = None if self.run is None else self.run / "metrics.jsonl"
        return read_metrics(path) if path is not None and path.is_file() else []

    def report(self) -> RunReport:
        """The report of the run, which a notebook shows.

        Raises:
            UserError: it is of no run, or the run folder is gone.
        """
        if self.run is None:
            raise UserError("there is no run to report on: call align() first")
        if not self.run.is_dir():
            raise UserError(f"the run folder {short(str(self.run))} is not there any more: call align() again")
        return RunReport(self.run)

    def _repr_html_(self) -> str | None:
        if self.run is None or not (self.run / "report.html").is_file():
            return None
        return f"<pre>{html.escape(repr(self))}</pre>{self.report()._repr_html_()}"

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model with its adapters merged in, for plain diffusers or transformers.

        The result of a run comes with a model card, README.md.

        Args:
            folder: made if it is not there.

        Raises:
            UserError: it is a file.
        """
        target = output_folder(folder)
        self._save_merged(target)
        self._write_card(target, location=str(target), merged=True)

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None, merged: bool = False) -> str:
        """Upload the adapter and its model card, or the whole model, to the Hugging Face Hub.

        Args:
            repo_id: "owner/name"; the repository is made if it is not there.
            private: whether a new repository is seen by its owner only; one that is there keeps its visibility.
            token: of the Hub; the one this machine is logged in with if not given.
            merged: upload the whole model with the adapter merged in.

        Returns:
            The address of the repository.

        Raises:
            UserError: there is no adapter, or it does not stand on its own; or the Hub refuses or cannot be reached.
        """
        from diffusion_align.models.model_card import upload

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            if merged:
                self.save_pretrained(folder)
            else:
                self._save_adapter(folder)
            self._write_card(folder, location=repo_id, merged=merged)
            return upload(folder, repo_id, private=private, token=token)

    def _refuse_load_time(self, settings: Mapping[str, Any]) -> None:
        """Load-time settings are not settings of ``align``."""
        if "model" in settings:
            raise UserError(f"model={settings['model']!r} is not this pipeline's: load it with from_pretrained")
        for name, argument in self.load_time.items():
            if name in settings:
                raise UserError(f"{name}={settings[name]!r} is for loading a model: give {argument} to from_pretrained")

    @property
    def _loaded(self) -> Any:
        return getattr(self, self.inside)

    @property
    @abstractmethod
    def _about(self) -> tuple[str | None, bool]:
        """What the model is called, and whether it carries LoRA weights."""

    @abstractmethod
    def _save_merged(self, folder: Path) -> None:
        """Write the whole model."""

    @abstractmethod
    def _save_adapter(self, folder: Path) -> None:
        """Write the adapter alone, if it stands on what others can load."""

    @abstractmethod
    def _write_card(self, target: Path, *, location: str, merged: bool) -> None:
        """Write the model card of the run, if it is of one."""


def image_model_content(ref: ModelRef, base_config: str | None) -> Places:
    described = base_config or ref.base_config
    return _of_places([ref.base, *([described] if described else []), *map(str, ref.adapters)])


def family_content(family: str | None) -> Places:
    """The user's own files that a model family is made of, if one is named."""
    return [] if family is None else code_content([module_of(family, "family", noun="Class")])


def language_model_content(name: str) -> Places:
    try:
        return _of_places(model_places(name))
    except UserError:  # a model in memory whose name leads nowhere
        return _of_places([name])


def _of_places(places: Iterable[str]) -> Places:
    return [(place, place_digest(asset_path(place) if place in EMBEDDED_MODELS else place)) for place in places]


def rows_content(setting: Any, rows: Iterable[Any]) -> tuple[str, str]:
    """The rows as they are used: the same whatever kind of file, or list, they are read from."""
    source = getattr(setting, "source", None)
    return source if isinstance(source, str) else "the rows given", content_digest(rows)


def built(spec: Any, build: Callable[[], Any]) -> tuple[Any, Places]:
    """The reward that ``build`` makes of ``spec``, and its content.

    That is the user's code, what the networks were loaded from, and files that options of the user's own rewards name.

    A function given in Python is known by its name alone: its source says nothing of the values it has closed over,
    bytecode differs between versions of Python, and a notebook defines it anew in every session.
    """
    with recorded() as places:
        reward = agreed(build)
    others = [option for option in _texts(spec) if option not in places and _is_file(option)]
    return reward, code_content(user_modules(spec)) + _of_places([*places, *others])


def code_content(modules: Iterable[ModuleType]) -> Places:
    """The user's own files that ``modules`` are made of."""
    files = dict.fromkeys(file for module in modules for file in code_files(module))
    return [(str(file), file_digest(file)) for file in files]


def _texts(spec: Any) -> list[str]:
    """Every text in a reward's setting but for names of rewards."""
    if isinstance(spec, Mapping):
        return [text for key, value in spec.items() if key != "name" for text in _texts(value)]
    if isinstance(spec, list | tuple):
        return [text for value in spec for text in _texts(value)]
    return [spec] if isinstance(spec, str) else []


def _is_file(text: str) -> bool:
    try:
        return os.path.isabs(text) and os.path.isfile(text)
    except ValueError:
        return False
