"""The real command line in real processes, without paying for the imports each time.

Run as a script this is a server: it imports the project once and forks for every request, so that a run costs what it
computes. Each child has its own pid (and can be sent any signal), its own output files, environment and folder, and
calls ``diffusion_align.cli.main``. With ``processes`` > 1 the children get what ``torchrun`` would give them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PRELOADED = (
    "diffusion_align.cli",
    "diffusion_align.pipelines.image",
    "diffusion_align.pipelines.text",
    "transformers.models.llama.modeling_llama",
    "diffusion_align.diffusion.evaluation",
    "diffusion_align.report.html",
    "transformers.models.clip.modeling_clip",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.training_utils",
    "diffusers.guiders",
    "diffusers.pipelines.onnx_utils",
    "peft",
)


@dataclass
class Run:
    """Finished or killed processes of one command."""

    statuses: list[int]  # exit status, or minus the signal
    errors: list[str]
    outputs: list[str]
    timed_out: bool

    @property
    def status(self) -> int:
        return self.statuses[0]

    @property
    def error(self) -> str:
        return self.errors[0]


class ForkedCli:
    """Client of the server in this file; use as a context manager. Modules are looked for in ``path`` first."""

    def __init__(self, scratch: Path, path: Sequence[Path] = ()) -> None:
        self._scratch, self._count, self._path = scratch, 0, path

    def __enter__(self) -> ForkedCli:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment.pop("COLUMNS", None)
        if self._path:
            environment["PYTHONPATH"] = os.pathsep.join(map(str, self._path))
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def start(self, *arguments: object, cwd: Path | None = None, prelude: str = "", processes: int = 1) -> list[int]:
        """Pids of freshly started processes; ``prelude`` is Python that each runs before the command."""
        self._count += 1
        self._files = [self._scratch / f"{self._count}_{rank}" for rank in range(processes)]
        request = {
            "argv": [str(a) for a in arguments],
            "cwd": str(cwd or self._scratch),
            "prelude": prelude,
            "files": [str(f) for f in self._files],
        }
        return self._ask(request)

    def wait(self, pids: list[int], timeout: float = 120) -> Run:
        """Wait for the processes of the last ``start``; those still running after ``timeout`` seconds are killed."""
        statuses, timed_out = self._ask({"wait": pids, "timeout": timeout})
        errors, outputs = ([f.with_name(f.name + end).read_text() for f in self._files] for end in (".err", ".out"))
        return Run(statuses, errors, outputs, timed_out)

    def __call__(self, *arguments: object, timeout: float = 120, **options: object) -> Run:
        return self.wait(self.start(*arguments, **options), timeout)  # type: ignore[arg-type]

    def finish(self, *arguments: object, **options: object) -> Run:
        """The same of a command that must end well."""
        run = self(*arguments, **options)
        assert set(run.statuses) == {0}, run.errors
        return run

    def _ask(self, request: object) -> object:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    import importlib

    for module in PRELOADED:
        importlib.import_module(module)
    from diffusion_align.methods import SHIPPED, method_of

    with contextlib.suppress(ImportError):  # of transformers 4
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("clip")  # makes the table of all models, which takes 0.1 s
    for name in SHIPPED:
        method_of(name)
    replies = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        reply = _wait(request["wait"], request["timeout"]) if "wait" in request else _start(request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _start(request: dict) -> list[int]:
    pids = []
    port = _free_port()
    for rank, files in enumerate(request["files"]):
        pid = os.fork()
        if pid == 0:
            if len(request["files"]) > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(request["files"]), "MASTER_PORT": port}
                os.environ.update({k: str(v) for k, v in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
                os.environ["ACCELERATE_USE_CPU"] = "true"
            _become(request, files)
        pids.append(pid)
    return pids


def _become(request: dict, files: str) -> None:
    """In a child: the command with its own output files; never returns."""
    status = 1
    try:
        for end, number in ((".out", 1), (".err", 2)):
            os.dup2(os.open(files + end, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.close(0)
        os.chdir(request["cwd"])
        sys.argv = ["diffusion-align", *request["argv"]]
        exec(request["prelude"], {})
        from diffusion_align.cli import main

        main()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pids: list[int], timeout: float) -> tuple[list[int], bool]:
    deadline, statuses, timed_out = time.monotonic() + timeout, {}, False
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline and not timed_out:
            timed_out = True
            for pid in pids:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [statuses[pid] for pid in pids], timed_out


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    _serve()
