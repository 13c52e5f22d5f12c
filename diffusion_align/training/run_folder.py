"""The folder of a run: what is in it, and what a run that failed before it trained leaves of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffusion_align.errors import Interrupted
from diffusion_align.folder_lock import LOCK_FILE, FolderLock
from diffusion_align.invocation import RESUME_WITH, Started
from diffusion_align.report.status import STATUS_FILE
from diffusion_align.training import checkpoint
from diffusion_align.training.places import BASE
from diffusion_align.training.processes import Processes
from diffusion_align.writing import make_folder

# What a run writes into its folder.
_FILES = ("config.yaml", "metrics.json", "metrics.jsonl", "report.html", STATUS_FILE, "evaluation.json")
_FOLDERS = (BASE, "samples", "checkpoints", "best", "final", "diffusion-align")


class RunFolder:
    """``output_dir`` of a run.

    Args:
        path: need not be there yet.
        processes: the main one writes.
        started: how the run was started.
        keeps: names in it that took long to make: with one of these it is not emptied.
    """

    def __init__(self, path: Path, processes: Processes, started: Started, keeps: tuple[str, ...] = ()) -> None:
        self.path, self.processes, self.started, self.keeps = path, processes, started, keeps
        self.is_new = False  # whether this process found it absent or empty

    @property
    def checkpoints(self) -> list[Path]:
        """Finished ones, oldest first."""
        return checkpoint.list_checkpoints(self.path / "checkpoints")

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    def how_to_resume(self, **settings: Any) -> str:
        """A line with the whole command, or in Python the call, that resumes the run, with ``settings`` changed."""
        return RESUME_WITH + self.started.again(resume=True, **settings)

    @contextlib.contextmanager
    def held(self, epochs: Callable[[], int]) -> Iterator[None]:
        """Inside, no other run uses the folder; one that fails in its first epoch leaves it as it was found.

        ``epochs``: how many are finished.

        Raises:
            UserError: another process holds it.
        """
        absent = [place for place in (self.path, *self.path.parents) if not place.exists()]
        self.is_new = bool(absent) or all(path.name in (LOCK_FILE, BASE) for path in self.path.iterdir())
        self.processes.wait()  # all have looked before the main process makes it
        with contextlib.ExitStack() as stack:
            if self.processes.is_main:
                for place in reversed(absent):
                    stack.callback(_remove_if_empty, place)
            self.processes.on_main(lambda: stack.enter_context(FolderLock(make_folder(self.path, parents=True))))
            try:
                yield
            except BaseException as error:
                if self.processes.is_main and self.is_forgotten(error, epochs()):
                    for name in (*_FILES, *_FOLDERS):
                        with contextlib.suppress(OSError):  # the first failure is the one reported
                            checkpoint.remove(self.path / name)
                raise

    def is_forgotten(self, error: BaseException, epochs: int) -> bool:
        """Whether what is in it is removed after ``error``: a run that was interrupted can be resumed."""
        return isinstance(error, Exception) and not isinstance(error, Interrupted) and self.nothing_trained(epochs)

    def nothing_trained(self, epochs: int) -> bool:
        """Whether this process began the run, no epoch is finished, and nothing is there that took long to make."""
        return self.is_new and epochs == 0 and not any((self.path / name).exists() for name in self.keeps)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
