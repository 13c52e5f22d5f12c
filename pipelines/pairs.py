"""Preference pairs from a model's own pictures: draw several a prompt, and a judge chooses the best and the worst.

A folder of pairs holds ``pairs.jsonl`` (one pair a line, paths relative to the folder), ``ties.jsonl`` (the prompts
whose pictures all scored alike), ``pictures/``, ``pairs_settings.yaml`` and, when all is done, the grid ``pairs.png``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_align import yaml_text
from diffusion_align.data.prompts import Prompt, check_image_prompts
from diffusion_align.errors import ConfigError, Interrupted, UserError, short
from diffusion_align.images import UnreadableImage, open_image
from diffusion_align.models.model_ref import image_model_problem
from diffusion_align.paths import output_problem, path_problem
from diffusion_align.pipelines.identity import pairs_identity
from diffusion_align.pipelines.image import ImageAlignmentPipeline, as_batch
from diffusion_align.report import before_after, save_png
from diffusion_align.rewards import build_reward, call_reward, reward_problem
from diffusion_align.rewards.base import reward_name
from diffusion_align.rewards.places import recorded
from diffusion_align.training.config import load_yaml
from diffusion_align.training.digests import Identity, changed_content
from diffusion_align.training.lock import LOCK_FILE, FolderLock
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


def make_pairs(
    model: str,
    prompts: Sequence[Prompt],
    judge: Any,
    output: str | Path,
    *,
    per_prompt: int = 4,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    eta: float | None = None,
    resume: bool = False,
    on_prompt: Callable[[int], object] | None = None,
) -> PairsWritten:
    """Draw ``per_prompt`` pictures a prompt and write the best and the worst of each as a pair.

    Picture i of prompt p is drawn with the seed ``seed + p * per_prompt + i``, and a pair is written as soon as its
    prompt is judged: a run that was stopped and resumed leaves the same files as one that was not.

    Args:
        model: what ``ImageAlignmentPipeline.from_pretrained`` takes.
        prompts: texts with the metadata the judge receives, from ``load_prompts``.
        judge: what ``build_reward`` takes; the first of several best or worst pictures counts.
        output: the folder; new or empty unless ``resume`` is set.
        per_prompt: at least 2.
        seed: of the first picture.
        steps, guidance_scale, eta: instead of the model's own sampler settings.
        resume: go on with the pairs in ``output``, which must have been begun with the same settings.
        on_prompt: called with the number of prompts done, also before the first.

    Raises:
        UserError: wrong settings, a folder that cannot be used, a model that cannot be loaded.
        RewardError: a judge that cannot be built, raises, or gives anything but one finite score a picture.
        Interrupted: Ctrl-C.
    """
    if problem := path_problem(output):
        raise UserError(f"output={short(str(output))} {problem}")
    output = Path(output).expanduser()
    sampling: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "eta": eta}
    drawing = {"model": str(model), "per_prompt": per_prompt, "seed": seed, **sampling}
    settings = drawing | {"judge": _plain(judge), "prompts": _digest(prompts)}
    _check(prompts, judge, drawing)
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

        pipeline = ImageAlignmentPipeline.from_pretrained(model)
        with recorded() as places:
            reward = build_reward(judge, model=pipeline.origin, device=pipeline.pipeline.device)
        content = pairs_identity(str(model), judge, places)
        _check_content(output, content)
        try:
            for index in range(done, len(prompts)):
                if on_prompt is not None:
                    on_prompt(index)
                text, metadata = prompts[index]
                first = seed + index * per_prompt
                images = pipeline([text] * per_prompt, seed=first, **sampling).images
                scores = _scores(reward, images, text, metadata)
                best, worst = scores.index(max(scores)), scores.index(min(scores))
                if not held:
                    make_folder(output, parents=True)
                    stack.enter_context(FolderLock(output))
                    _check_folder(output, settings, resume=False)
                    held = True
                _begin(
                    output, settings | {"content": {name: list(map(list, found)) for name, found in content.items()}}
                )
                if scores[best] == scores[worst]:
                    ties.append({"prompt": text, "score": scores[best], "seed": first})
                    _append(output / TIES, ties[-1])
                    continue
                row: Row = {
                    "prompt": text,
                    "chosen": f"pictures/{index:05d}_chosen.png",
                    "rejected": f"pictures/{index:05d}_rejected.png",
                    "score_chosen": scores[best],
                    "score_rejected": scores[worst],
                    "seed_chosen": first + best,
                    "seed_rejected": first + worst,
                }
                save_png(images[best], output / row["chosen"])
                save_png(images[worst], output / row["rejected"])
                _append(output / PAIRS, row)
                pairs.append(row)
            if on_prompt is not None:
                on_prompt(len(prompts))
            if pairs:
                save_png(_grid(output, pairs[:_SHOWN]), output / "pairs.png")
        except KeyboardInterrupt:
            kept = (
                f"{len(pairs)} pairs are in {output}: resume (--resume) to go on"
                if pairs or ties
                else "nothing written"
            )
            raise Interrupted(f"stopped; {kept}") from None
        except WriteError as error:
            if pairs or ties:
                error.add_note(f"{len(pairs)} pairs are in {output}: resume (--resume) to go on")
            raise
        except OSError as error:
            raise UserError(
                f"output={str(output)!r}: {error.filename or 'a file'}: {error.strerror or error}"
            ) from error
        gaps = [row["score_chosen"] - row["score_rejected"] for row in pairs]
        return PairsWritten(len(pairs), len(ties), sum(gaps) / len(gaps) if gaps else math.nan)


def _check(prompts: Sequence[Prompt], judge: Any, drawing: Mapping[str, Any]) -> None:
    """Raise everything that is wrong with the settings, before anything is loaded."""
    model, per_prompt, seed, steps, guidance, eta = drawing.values()
    check_image_prompts([text for text, _ in prompts])
    blank = next((i for i, (text, _) in enumerate(prompts) if not text.strip()), None)
    wrong = {
        "prompts is empty: give at least one": not prompts,
        f"prompts: entry {blank} is blank: give it a text or drop it": blank is not None,
        f"per_prompt={per_prompt} must be at least 2: a pair needs two pictures": per_prompt < 2,
        f"seed={seed} must lie between 0 and 2**63 - 1": not 0 <= seed < 2**63,
        f"steps={steps} must be at least 1": steps is not None and steps < 1,
        f"guidance_scale={guidance} must be a number from 0": guidance is not None and not 0 <= guidance < math.inf,
        f"eta={eta} must lie between 0 and 1": eta is not None and not 0 <= eta <= 1,
    }
    problems = [sentence for sentence, is_wrong in wrong.items() if is_wrong]
    problems += [problem for problem in (image_model_problem(model), reward_problem(judge)) if problem]
    if problems:
        raise ConfigError(problems)


def _check_folder(output: Path, settings: Mapping[str, Any], resume: bool) -> None:
    if problem := output_problem(output, "folder"):
        raise UserError(f"output={short(str(output), 320)} {problem}")
    if not output.is_dir() or all(path.name == LOCK_FILE for path in output.iterdir()):
        return
    if not resume:
        raise UserError(f"output={str(output)!r} is already used: choose another folder, or resume (--resume) to go on")
    if not (output / SETTINGS).is_file():
        raise UserError(f"output={str(output)!r} cannot be resumed: it has no {SETTINGS}, choose another folder")
    begun = load_yaml(output / SETTINGS)
    differing = [key for key in settings if begun.get(key) != settings[key]]
    if differing:
        was, now = (", ".join(f"{key}={values.get(key)!r}" for key in differing) for values in (begun, settings))
        raise UserError(f"output={str(output)!r} was begun with {was}, not {now}: use those, or choose another folder")


def _check_content(output: Path, content: Identity) -> None:
    """The model and the judge of pairs that are gone on with must hold what they held."""
    if not (output / SETTINGS).is_file():
        return
    begun = load_yaml(output / SETTINGS).get("content")
    if begun is None:
        print(f"{output}: whether its model and judge are the same was not checked: it does not say", file=sys.stderr)
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


def _scores(reward: Any, images: Sequence[Image.Image], prompt: str, metadata: Mapping[str, Any]) -> list[float]:
    return call_reward(reward, as_batch(images), [prompt] * len(images), [dict(metadata) for _ in images]).tolist()


def _append(path: Path, row: Row) -> None:
    append_line(path, json.dumps(row))


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
        raise UserError(f"{path} cannot be read ({error}): mend it, or choose another output folder") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or not _KEYS[path.name] <= row.keys():
            raise UserError(f"{path}: line {number} is none of ours: mend it, or choose another output folder")
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


def _digest(prompts: Sequence[Prompt]) -> str:
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
