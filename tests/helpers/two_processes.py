"""The same run in one process and in two, and what of both must be equal; runs that both processes end."""

import torch
from safetensors.torch import load_file

from tests.helpers.kills import QUICK
from tests.helpers.problems import problems

# Writes the summed gradients of every optimizer step, before clipping.
GRADIENTS = """
import os, torch
from accelerate import Accelerator
clip, steps = Accelerator.clip_grad_norm_, []
def record(self, parameters, *arguments):
    steps.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
    torch.save(steps, f"{SCRATCH}/gradients_{self.num_processes}_{self.process_index}.pt")
    return clip(self, parameters, *arguments)
Accelerator.clip_grad_norm_ = record
"""
# Adam divides by the gradient's own size: where it is 0 but for rounding, only its sign would be compared.
PLAIN_STEPS = """
import torch
class Plain(torch.optim.SGD):
    def __init__(self, parameters, lr, betas, weight_decay, fused):
        super().__init__(parameters, lr=lr, momentum=0.9)
torch.optim.AdamW = Plain
"""


def run_both(forked, config, scratch, prelude=""):
    """Folders of the same run in one process and in two, and the gradients of each process."""
    prelude, folders = QUICK + f"SCRATCH = {str(scratch)!r}\n" + GRADIENTS + prelude, []
    for processes in (1, 2):
        folders.append(scratch / f"in_{processes}")
        run = forked("train", config, f"output_dir={folders[-1]}", processes=processes, prelude=prelude, timeout=90)
        assert not run.timed_out, run.errors
        assert set(run.statuses) == {0}, run.errors
    found = [scratch / f"gradients_{name}.pt" for name in ("1_0", "2_0", "2_1")]
    return folders, [torch.load(path) if path.exists() else [] for path in found]


def assert_same_gradients(gradients, tolerance, *, least=1.0):
    """Of every step to ``tolerance`` of the largest, or of ``least``; the two processes hold the same sums."""
    one, first, second = gradients
    assert len(one) == len(first) == len(second) > 0
    for a, b, c in zip(one, first, second):
        assert torch.equal(b, c), "the processes hold different sums"
        assert a.abs().max() > 1e-4, "nothing to compare"
        assert (a - b).abs().max() <= tolerance * max(least, a.abs().max().item())


def assert_same_weights(folders):
    """Of the newest checkpoints; returns them."""
    newest = [sorted((folder / "checkpoints").iterdir())[-1] / "trained.safetensors" for folder in folders]
    a, b = map(load_file, newest)
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=1e-6, rtol=0)
    return a


def end_in_a_sentence(forked, config, scratch, *overrides, prelude=""):
    """The sentence in which each of two processes ends a run that fails, where neither waits for the other."""
    arguments = ["train", config, f"output_dir={scratch}/run", *overrides]
    run = forked(*arguments, processes=2, timeout=60, prelude=QUICK + prelude)
    assert not run.timed_out, "a process went on waiting for one that is gone"
    assert run.statuses == [2, 2], run.errors
    assert "Traceback" not in "".join(run.errors)
    return [problems(error)[-1] for error in run.errors]
