"""Preference pairs from a model's own samples: several per prompt, of which a judge chooses the best and the worst.

A folder of pairs holds ``pairs.jsonl`` (one pair per line), ``ties.jsonl`` (the prompts whose samples all scored alike)
and ``pairs_settings.yaml``; of images also ``images/``, where the pairs name paths, and, when all is done, the grid
``pairs.png``. Rows of completions are what ``dpo`` and ``reward_model`` take as their dataset.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_align import yaml_text
from diffusion_align.data.prompts import Prompt, check_image_prompts
from diffusion_align.data.text_encoding import Text, as_completion_message
from diffusion_align.errors import ConfigError, Interrupted, UserError, problems_of, short
from diffusion_align.folder_lock import LOCK_FILE, FolderLock
from diffusion_align.images import UnreadableImage, open_image
from diffusion_align.inputs import check_output, check_path
from diffusion_align.invocation import RESUME_WITH, PythonCall, Started
from diffusion_align.models.language_models import language_model_ref
from diffusion_align.models.model_ref import image_model_ref
from diffusion_align.pipelines.compare import judged_texts
from diffusion_align.pipelines.image import ImageAlignmentPipeline, sampling_problems
from diffusion_align.pipelines.run import built, family_content, image_model_content, language_model_content
from diffusion_align.pipelines.scoring import as_batch
from diffusion_align.pipelines.text import IN_MEMORY, TextAlignmentPipeline
from diffusion_align.report import before_after, save_png
from diffusion_align.rewards import IMAGES, TEXT, build_reward, build_text_reward, call_reward, declare
from diffusion_align.rewards.base import reward_name
from diffusion_align.streams import print_warning
from diffusion_align.training.digests import Identity, changed_content
from diffusion_align.training.reading import load_yaml
from diffusion_align.writing import WriteError, append_line, make_folder, sweep, write_text

PAIRS, TIES, SETTINGS = "pairs.jsonl", "ties.jsonl", "pairs_settings.yaml"
_SHOWN = 24
_KEYS = {
    PAIRS: {"prompt", "chosen", "rejected", "score_chosen", "score_rejected", "seed_chosen", "seed_rejected"},
    TIES: {"prompt", "score", "seed"},
}
Row = dict[str, Any]


@dataclass(frozen=True)
class PairsWritten:
    """What a folder holds: pairs, prompts without one as all scores were equal, mean score gap (nan without pairs)."""

    pairs: int
    ties: int
    mean_gap: float


class ImageCandidates:
    """Images of a model, which is what ``ImageAlignmentPipeline.from_pretrained`` takes.

    Attributes:
        model: as the settings name it.
        family: of a model of no shipped family.
        sampling: settings of sampling, kept with the pairs; None is the model's own.
        sample_name: of one sample, for messages.
    """

    sample_name = "image"

    def __init__(
        self,
        model: str,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        negative_prompt: str | None = None,
        height: int | None = None,
        width: int | None = None,
        family: str | None = None,
    ) -> None:
        self.model, self.family = model, family
        self.sampling: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
        self.sampling |= {"negative_prompt": negative_prompt, "height": height, "width": width}

    def problems(self, prompts: Sequence[Prompt], judge: Any) -> list[str]:
        """Sentences about what is wrong, before anything is loaded."""
        check_image_prompts([text for text, _ in prompts])
        steps, guidance, eta, *_ = self.sampling.values()
        blank = next((i for i, (text, _) in enumerate(prompts) if not text.strip()), None)
        wrong = {
            f"prompts: entry {blank} is blank: give it a text or drop it": blank is not None,
            f"steps={steps} must be at least 1": steps is not None and steps < 1,
            f"guidance_scale={guidance} must be a number from 0": guidance is not None and not 0 <= guidance < math.inf,
            f"eta={eta} must lie between 0 and 1": eta is not None and not 0 <= eta <= 1,
        }
        problems = [sentence for sentence, is_wrong in wrong.items() if is_wrong]
        checked = {name: value for name, value in self.sampling.items() if name not in ("steps", "eta")}
        return [
            *problems,
            *sampling_problems(self.model, family=self.family, **checked),
            *problems_of(declare, IMAGES, judge),
        ]

    def load(self, judge: Any) -> Identity:
        """Load the model and the judge; what they hold."""
        self.pipeline = ImageAlignmentPipeline.from_pretrained(self.model, family=self.family)
        device = self.pipeline.pipeline.device
        making = partial(build_reward, judge, model=self.pipeline.origin, device=device)
        self.reward, content = built(judge, making)
        ref = image_model_ref(self.model)
        family = family_content(self.family or ref.family)
        return {"model": image_model_content(ref, None) + family, "judge": content}

    def sample(self, prompt: str, notes: Mapping[str, Any], seeds: Sequence[int]) -> tuple[list[Any], list[float]]:
        """One sample per seed, and their scores."""
        texts, metadata = [prompt] * len(seeds), [dict(notes) for _ in seeds]
        images = self.pipeline(texts, seed=seeds[0], **self.sampling).images
        return images, call_reward(self.reward, as_batch(images), texts, metadata).tolist()

    def usable(self, sample: Any) -> bool:
        """Whether a sample can be in a pair."""
        return True

    def row(self, output: Path, index: int, prompt: str, notes: Mapping[str, Any], best: Any, worst: Any) -> Row:
        """``prompt``, ``chosen`` and ``rejected`` as ``pairs.jsonl`` has them, files written."""
        row = {"prompt": prompt} | {side: f"images/{index:05d}_{side}.png" for side in ("chosen", "rejected")}
        save_png(best, output / row["chosen"])
        save_png(worst, output / row["rejected"])
        return row

    def finish(self, output: Path, pairs: Sequence[Row]) -> None:
        """Write what is made of all pairs."""
        save_png(_grid(output, pairs[:_SHOWN]), output / "pairs.png")


class TextCandidates:
    """The same of a language model: a pipeline, or what ``TextAlignmentPipeline.from_pretrained`` takes."""

    sample_name = "completion"

    def __init__(
        self, model: str | TextAlignmentPipeline, *, max_new_tokens: int = 128, temperature: float = 1.0
    ) -> None:
        self.pipeline = model if isinstance(model, TextAlignmentPipeline) else None
        self.model = str(model) if self.pipeline is None else self.pipeline.name or IN_MEMORY
        self.sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}

    def problems(self, prompts: Sequence[tuple[Text, dict[str, Any]]], judge: Any) -> list[str]:
        of_model = [] if self.pipeline else problems_of(language_model_ref, self.model)
        return [*of_model, *problems_of(declare, TEXT, judge)]

    def load(self, judge: Any) -> Identity:
        self.pipeline = self.pipeline or TextAlignmentPipeline.from_pretrained(self.model)
        making = partial(build_text_reward, judge, device=self.pipeline.model.device)
        self.reward, content = built(judge, making)
        return {"model": language_model_content(self.model), "judge": content}

    def sample(self, prompt: Text, notes: Mapping[str, Any], seeds: Sequence[int]) -> tuple[list[Any], list[float]]:
        assert self.pipeline is not None
        prompts = [prompt] * len(seeds)
        texts = self.pipeline.sample_each(prompts, seeds, **self.sampling)
        return texts, judged_texts(self.pipeline, prompts, texts, self.reward, [notes] * len(seeds)).tolist()

    def usable(self, sample: str) -> bool:
        """Not where the model ended at once: trainers refuse empty completions."""
        return bool(sample.strip())

    def row(self, output: Path, index: int, prompt: Text, notes: Mapping[str, Any], best: Any, worst: Any) -> Row:
        sides = {"chosen": best, "rejected": worst}
        return {**notes, "prompt": prompt} | {side: as_completion_message(text, prompt) for side, text in sides.items()}

    def finish(self, output: Path, pairs: Sequence[Row]) -> None:
        pass


Candidates = ImageCandidates | TextCandidates


def make_pairs(
    candidates: Candidates,
    prompts: Sequence[tuple[Any, dict[str, Any]]],
    judge: Any,
    output: str | Path,
    *,
    per_prompt: int = 4,
    seed: int = 0,
    resume: bool = False,
    on_prompt: Callable[[int], object] | None = None,
    started: Started | None = None,
) -> PairsWritten:
    """Sample ``per_prompt`` times per prompt and write the best and the worst of each as a pair.

    Sample i of prompt p has the seed ``seed + p * per_prompt + i``, and a pair is written as soon as its prompt is
    judged: a run that was stopped and resumed leaves the same files as one that was not.

    Args:
        candidates: what samples.
        prompts: with what the judge receives of each.
        judge: a reward; the first of several best or worst samples counts.
        output: the folder; new or empty unless ``resume`` is set.
        per_prompt: at least 2.
        seed: of the first sample.
        resume: continue the pairs in ``output``, which must have been begun with the same settings.
        on_prompt: called with the number of prompts done, also before the first.
        started: how, for whoever resumes it; as a call in Python if not given.

    Raises:
        UserError: wrong settings, a folder that cannot be used, a model that cannot be loaded.
        RewardError: a judge that cannot be built, raises, or gives anything but one finite score per sample.
        Interrupted: Ctrl-C.
    """
    check_path(output, f"output={short(str(output))}")
    output = Path(output).expanduser()
    settings = {"model": candidates.model, "per_prompt": per_prompt, "seed": seed, **candidates.sampling}
    settings |= {"judge": _plain(judge), "prompts": _digest(prompts)}
    call = started or PythonCall("make_pairs({})", {"output": output})
    _check(candidates, prompts, judge, per_prompt, seed)
    _check_folder(output, settings, resume)
    output = output.absolute()  # whatever folder a judge changes to
    with contextlib.ExitStack() as stack:
        held = output.is_dir()
        if held:
            stack.enter_context(FolderLock(output))
            _check_folder(output, settings, resume)  # another process may have begun, and ended, since
            sweep(output)  # what is left there is a killed writer's only now
        pairs, ties = _read_rows(output / PAIRS), _read_rows(output / TIES)
        seeds = [row["seed_chosen"] for row in pairs] + [row["seed"] for row in ties]
        done = max(((used - seed) // per_prompt + 1 for used in seeds), default=0)

        def kept() -> str:
            return (
                f"{len(pairs)} pairs are in {output}\n{RESUME_WITH}{call.again(resume=True)}" if pairs or ties else ""
            )

        content = candidates.load(judge)
        _check_content(output, content)
        try:
            for index in range(done, len(prompts)):
                if on_prompt is not None:
                    on_prompt(index)
                prompt, notes = prompts[index]
                first = seed + index * per_prompt
                samples, scores = candidates.sample(prompt, notes, range(first, first + per_prompt))
                usable = [i for i, one in enumerate(samples) if candidates.usable(one)] or [0]
                best, worst = max(usable, key=scores.__getitem__), min(usable, key=scores.__getitem__)
                if not held:
                    make_folder(output, parents=True)
                    stack.enter_context(FolderLock(output))
                    _check_folder(output, settings, resume=False)
                    held = True
                _begin(output, settings | {"content": {name: list(map(list, one)) for name, one in content.items()}})
                if scores[best] == scores[worst]:
                    ties.append({"prompt": prompt, "score": scores[best], "seed": first})
                    _append(output / TIES, ties[-1])
                    continue
                row = candidates.row(output, index, prompt, notes, samples[best], samples[worst]) | {
                    "score_chosen": scores[best],
                    "score_rejected": scores[worst],
                    "seed_chosen": first + best,
                    "seed_rejected": first + worst,
                }
                _append(output / PAIRS, row)
                pairs.append(row)
            if on_prompt is not None:
                on_prompt(len(prompts))
            if pairs:
                candidates.finish(output, pairs)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {kept() or 'nothing written'}") from None
        except WriteError as error:
            if kept():
                error.add_note(kept())
            raise
        except OSError as error:
            raise UserError(
                f"output={str(output)!r}: {error.filename or 'a file'}: {error.strerror or error}"
            ) from error
        gaps = [row["score_chosen"] - row["score_rejected"] for row in pairs]
        return PairsWritten(len(pairs), len(ties), sum(gaps) / len(gaps) if gaps else math.nan)


def _check(candidates: Candidates, prompts: Sequence[Any], judge: Any, per_prompt: int, seed: int) -> None:
    """Raise everything that is wrong with the settings, before anything is loaded."""
    wrong = {
        "prompts is empty: give at least one": not prompts,
        f"per_prompt={per_prompt} must be at least 2: a pair needs two {candidates.sample_name}s": per_prompt < 2,
        f"seed={seed} must lie between 0 and 2**63 - 1": not 0 <= seed < 2**63,
    }
    problems = [sentence for sentence, is_wrong in wrong.items() if is_wrong] + candidates.problems(prompts, judge)
    if problems:
        raise ConfigError(problems)


def _check_folder(output: Path, settings: Mapping[str, Any], resume: bool) -> None:
    check_output(output, f"output={short(str(output), 320)}", "folder")
    if not output.is_dir() or all(path.name == LOCK_FILE for path in output.iterdir()):
        return
    if not resume:
        raise UserError(f"output={str(output)!r} is already used: choose another folder, or resume it (--resume)")
    if not (output / SETTINGS).is_file():
        raise UserError(f"output={str(output)!r} has no {SETTINGS} to resume from: choose another folder")
    begun = load_yaml(output / SETTINGS)
    differing = [key for key in settings if begun.get(key) != settings[key]]
    if differing:
        was, now = (", ".join(f"{key}={values.get(key)!r}" for key in differing) for values in (begun, settings))
        raise UserError(f"output={str(output)!r} was begun with {was}, not {now}: use those, or choose another folder")


def _check_content(output: Path, content: Identity) -> None:
    """The model and the judge of resumed pairs must hold what they held."""
    if not (output / SETTINGS).is_file():
        return
    begun = load_yaml(output / SETTINGS).get("content")
    if begun is None:
        print_warning(f"{output} does not record the content of its model and judge: a change was not checked for")
    if changed := changed_content(begun or {}, content):
        what = " and ".join(f"{name} ({', '.join(places)})" for name, places in changed.items())
        raise UserError(
            f"output={str(output)!r} was begun with other content of {what}: put it back, or choose another folder"
        )


def _begin(output: Path, settings: Mapping[str, Any]) -> None:
    """Settings are kept with the first result: a judge that fails at once leaves no used folder behind."""
    if not (output / SETTINGS).exists():
        make_folder(output, parents=True)
        write_text(output / SETTINGS, yaml_text.dump(dict(settings), sort_keys=False))


def _append(path: Path, row: Row) -> None:
    append_line(path, json.dumps(row, default=str))  # of a column that JSON has no form for


def _read_rows(path: Path) -> list[Row]:
    """Rows of the whole lines; one that a kill cut off is removed from the file."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        rows = [json.loads(line) for line in whole.splitlines()]
        if whole != text:
            write_text(path, whole)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): fix it, or choose another output folder") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not _KEYS[path.name] <= row.keys():
            problem = f"{path}: line {number} was not written by this command"
            raise UserError(f"{problem}: fix or remove it, or choose another output folder")
    return rows


def _grid(output: Path, rows: Sequence[Row]) -> Image.Image:
    sides: tuple[list[Image.Image], list[Image.Image]] = ([], [])
    for row in rows:
        for images, side in zip(sides, ("chosen", "rejected")):
            try:
                images.append(open_image(output / row[side]))
            except UnreadableImage as problem:
                raise UserError(f"{output / row[side]} {problem}: choose another output folder") from None
    return before_after(
        *sides,
        captions=[row["prompt"] for row in rows],
        rewards_before=[row["score_chosen"] for row in rows],
        rewards_after=[row["score_rejected"] for row in rows],
        labels=("chosen", "rejected"),
    )


def _digest(prompts: Sequence[Any]) -> str:
    """What tells one list of prompts from another in the settings."""
    text = json.dumps([[text, metadata] for text, metadata in prompts], default=str, sort_keys=True)
    return f"{len(prompts)} (sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]})"


def _plain(judge: Any) -> Any:
    """A judge as YAML can hold it."""
    if isinstance(judge, Mapping):
        return {str(key): _plain(value) for key, value in judge.items()}
    if callable(judge):
        return reward_name(judge)
    return judge if isinstance(judge, bool | int | float | None) else str(judge)
