"""The state of a run: ``status.json``, which its main process writes with every report, and the lock of its folder."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from diffusion_align.errors import UserError
from diffusion_align.folder_lock import LOCK_FILE, check_not_in_use
from diffusion_align.writing import write_text

STATUS_FILE = "status.json"
_HEADINGS = {
    "running": "Running",
    "interrupted": "Interrupted",
    "failed": "Failed",
    "stopped": "Stopped early",
    "finished": "Finished",
    "gone": "Ended without notice",
    "unknown": "Not finished",
}
_GONE = (
    "the process of this run no longer exists and did not report how it ended: it was killed, ran out of memory, or "
    "its machine went down"
)


@dataclass(frozen=True)
class RunStatus:
    """The state of a run.

    Attributes:
        state: "running", "interrupted", "failed", "stopped" (early, by a rule or a callback) or "finished"; as it is
            read also "gone", if it says running but no process holds the folder, and "unknown", for older runs.
        epoch: number of finished ones.
        began, at: when the run, or its resumption, began, and when this was written; seconds since 1970, UTC.
        by: the signal that interrupted it, if known.
        why: the sentence that ended it, without ``resume``.
        resume: the command, or in Python the call, that resumes it; empty if it cannot be resumed, or need not be.
        locked: whether its file system has locks, which tell whether a process holds the folder.
    """

    state: str
    epoch: int = 0
    began: float = 0.0
    at: float = 0.0
    by: str = ""
    why: str = ""
    resume: str = ""
    locked: bool = False

    @property
    def running(self) -> bool:
        return self.state == "running"


def write_status(folder: Path, status: RunStatus) -> None:
    """Write it as of now; ``locked`` is determined here.

    Raises:
        WriteError: it cannot be written.
    """
    now = replace(status, at=time.time(), locked=(folder / LOCK_FILE).exists())
    write_text(folder / STATUS_FILE, json.dumps(asdict(now), indent=1, ensure_ascii=False) + "\n")


def read_status(folder: Path) -> RunStatus:
    """As its process wrote it last, or as far as it can be told without."""
    status = _read(folder / STATUS_FILE)
    if status is None:
        held = _in_use(folder)
        return RunStatus("running" if held else "finished" if (folder / "final").exists() else "unknown")
    if status.running and status.locked and not _in_use(folder):
        return replace(status, state="gone", why=_GONE)
    return status


def status_text(status: RunStatus, epochs: int | None) -> dict[str, Any]:
    """What the report says: ``heading``, ``facts``, ``why``, ``resume``; ``epochs``: of how many, if known."""
    done = f"{status.epoch} of {epochs} epochs" if epochs else f"{status.epoch} epochs"
    facts = [done] if status.epoch or status.at else []
    if status.running and epochs and status.epoch < epochs and status.at:
        facts = [f"epoch {status.epoch + 1} of {epochs}"]
    if status.at:
        facts.append(f"began {_moment(status.began)}")
        noun = "written" if status.running else "last heard of" if status.state == "gone" else "ended"
        facts.append(f"{noun} {_moment(status.at)}")
    if status.state == "unknown":
        facts.append("there is no final/ folder")
    return {
        "state": status.state,
        "heading": _HEADINGS.get(status.state, status.state) + (f" by {status.by}" if status.by else ""),
        "facts": facts,
        "why": status.why,
        "resume": status.resume if status.state not in ("running", "finished", "stopped") else "",
        "written": status.at,
    }


def _moment(seconds: float) -> str:
    """In this machine's time zone, which is named as an offset."""
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %z")


def _read(path: Path) -> RunStatus | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        blank = asdict(RunStatus(found["state"]))
        return RunStatus(**{name: type(value)(found.get(name, value)) for name, value in blank.items()})
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None


def _in_use(folder: Path) -> bool:
    try:
        check_not_in_use(folder)
    except UserError:
        return True
    return False
