"""What a finished run prints: its result, and commands that can be pasted where it was started."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

from diffusion_align.invocation import CommandLine, shown_path

_PROMPTS, _LONG = 2, 80
_OPENERS = {"darwin": "open", "win32": "start"}


def last_lines(trainer: Any, started: CommandLine) -> list[str]:
    """How far the run came, what it changed, where the weights are; then the commands, indented."""
    from diffusion_align.report.change import result_line

    total = trainer.config.epochs
    end = f"stopped after epoch {trainer.epoch} of {total}: {trainer.stopped}"
    lines = [end if trainer.stopped else f"finished {total} epoch{'s' if total > 1 else ''}"]
    lines += [line for line in [result_line(trainer.log.rows())] if line]
    lines.append(f"the weights are in {shown_path(trainer.folder / 'final')}; next:")
    return lines + [f"  {command}" for command in next_commands(trainer, started)]


def next_commands(trainer: Any, started: CommandLine) -> list[str]:
    """Commands that open the report, sample, compare with the model before, export, and train on."""
    config, run = trainer.config, shown_path(trainer.folder)
    commands = [[_OPENERS.get(sys.platform, "xdg-open"), shown_path(trainer.folder / "report.html")]]
    if trainer.model_kind in ("image", "text"):
        given = [word for text in _prompts(trainer) for word in ("-p", text)]
        sample = ["sample", run, *given, "-o", "images"] if trainer.model_kind == "image" else ["complete", run, *given]
        commands.append([*started.own, *sample])
        judge = getattr(getattr(config, "evaluation", None), "reward", None) or getattr(config, "reward", None)
        if isinstance(judge, str) and not getattr(config, "base_config", None):
            base = shown_path(config.model) if os.path.isabs(config.model) else config.model
            commands.append([*started.own, "compare", base, run, "--judge", judge, *given])
        commands.append([*started.own, "export", run, "-o", "model"])
    lines = [shlex.join(words) for words in commands]
    if not trainer.stopped and config.lr_schedule == "constant":  # under another one the number of epochs is fixed
        lines.append(started.again(resume=True, epochs=2 * config.epochs))
    return lines


def _prompts(trainer: Any) -> list[str]:
    """The first of those that the run's previews are of, where a shell's line has room for them."""
    previews = getattr(trainer, "previews", None)
    found = getattr(previews, "texts", None) or [row.prompt for row in getattr(previews, "rows", ())]
    short = [text for text in found if isinstance(text, str) and len(text) <= _LONG and text.isprintable()]
    return short[:_PROMPTS] or ["a lion" if trainer.model_kind == "image" else "Once upon a time"]
