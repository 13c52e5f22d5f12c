"""DDPO whose reward another process serves: the same run, also when that process is killed; and how to go on."""

import os
import signal
import time

import pytest
import yaml

from tests.helpers.hard_runs import HARD_RUN, assert_same_run, rows_of
from tests.helpers.kills import QUICK

SERVED = {
    "samples_per_epoch": 8,
    "sample_batch_size": 4,
    "micro_batch_size": 8,
    "updates_per_epoch": 1,
    "epochs": 2,
    "sampler": {"steps": 2, "guidance_scale": 1.0},
}
# Requests: one before training, then two an epoch. The process dies with a request of the second epoch in its hands.
DIES = """
import os, signal
import diffusion_align.rewards.serving as serving
call, calls = serving.call_reward, [0]
def call_or_die(*arguments):
    calls[0] += 1
    if calls[0] == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*arguments)
serving.call_reward = call_or_die
"""


class Process:
    """One command in a process of its own, beside others."""

    def __init__(self, forked, *arguments, **options):
        self.forked, self.pids, self.over = forked, forked.start(*arguments, **options), False
        self.files = forked._files

    def wait(self):
        self.forked._files, self.over = self.files, True
        return self.forked.wait(self.pids)

    def printed(self, where="out"):
        path = self.files[0].with_name(f"{self.files[0].name}.{where}")
        return path.read_text() if path.is_file() else ""

    def wait_for(self, text, where="out"):
        """All that is printed once ``text`` is there."""
        deadline = time.monotonic() + 60
        while text not in self.printed(where) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.printed(where)


@pytest.fixture
def serve(forked):
    """``serve(port=0, prelude="")``: a process that serves the aesthetic reward, and its address."""
    processes = []

    def start(port=0, prelude=""):
        process = Process(forked, "serve-reward", "aesthetic", "--model", "emoji-sd", "--port", port, prelude=prelude)
        processes.append(process)
        return process, process.wait_for("\n").split()[-1]

    yield start
    for process in processes:
        if not process.over:
            os.kill(process.pids[0], signal.SIGTERM)
            run = process.wait()
            assert (run.status, run.error) == (0, "")


@pytest.fixture(scope="module")
def train(forked):
    return lambda *arguments: Process(forked, "train", *arguments, prelude=QUICK)


@pytest.fixture(scope="module")
def here(train, tmp_path_factory):
    """Folder of the run that computes the same reward itself."""
    scratch = tmp_path_factory.mktemp("here")
    (scratch / "tiny.yaml").write_text(yaml.safe_dump(HARD_RUN | SERVED | {"reward": "aesthetic"}))
    run = train(scratch / "tiny.yaml", f"output_dir={scratch}/run").wait()
    assert run.status == 0, run.error
    return scratch / "run"


def remote(url, patience):
    return {"name": "remote", "url": url, "patience": patience}


def test_a_served_reward_gives_the_run_that_computes_it_itself(serve, train, here, settings, tmp_path):
    _, url = serve()
    run = train(settings(**SERVED, reward=remote(url, 60)), f"output_dir={tmp_path}/run").wait()
    assert (run.status, run.error) == (0, "")
    assert_same_run(tmp_path / "run", here)


def test_a_run_waits_for_a_server_that_was_killed(serve, train, here, settings, tmp_path):
    server, url = serve(prelude=DIES)
    process = train(settings(**SERVED, reward=remote(url, 60)), f"output_dir={tmp_path}/run")
    assert server.wait().status == -signal.SIGKILL
    time.sleep(0.5)
    serve(port=url.rsplit(":", 1)[1])
    run = process.wait()
    assert run.status == 0, run.error
    (said,) = run.error.splitlines()
    assert said.startswith(f"reward server {url} does not answer (")
    assert said.endswith("trying again for up to 60 s")
    assert_same_run(tmp_path / "run", here)


def test_a_run_whose_server_stays_away_stops_and_can_go_on(serve, train, here, settings, tmp_path):
    server, url = serve(prelude=DIES)
    folder = tmp_path / "run"
    arguments = [settings(**SERVED, reward=remote(url, 2), checkpoint_every=100), f"output_dir={folder}"]
    process = train(*arguments)
    assert server.wait().status == -signal.SIGKILL
    run = process.wait()
    assert run.status == 2
    errors = [line for line in run.error.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert run.error.splitlines()[-2] == errors[0]
    assert f"reward server {url} gave no answer for 2 s" in errors[0]
    assert run.error.splitlines()[-1].startswith("resume with: ")
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000001"]
    assert len(rows_of(folder)) == 2
    _, elsewhere = serve()
    run = train(*arguments, "resume=true", f"reward.url={elsewhere}", "reward.patience=60").wait()
    assert (run.status, run.error) == (0, "")
    assert_same_run(folder, here)


def test_ctrl_c_ends_the_waiting(serve, train, settings, tmp_path):
    server, url = serve(prelude=DIES)
    process = train(settings(**SERVED, reward=remote(url, 1000)), f"output_dir={tmp_path}/run")
    assert server.wait().status == -signal.SIGKILL
    assert f"{url} does not answer" in process.wait_for("does not answer", "err")
    os.kill(process.pids[0], signal.SIGINT)
    run = process.wait()
    assert (run.status, run.error.splitlines()[-2]) == (130, "stopped after epoch 1 of 2")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]
