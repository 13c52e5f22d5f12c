"""Python that a forked command runs first: it ends the process at one exact place, or leaves out what takes long."""

import shlex

QUICK = "import diffusion_align.report as report\nreport.write_report = lambda folder: None\n"
KILL = "import os, signal\ndie = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
# A second one would end the run at once.
_ASK = """
import os, signal
def die():
    os.kill(os.getpid(), signal.{name})
    globals()["die"] = lambda: None
"""
STOP, TERMINATE = _ASK.format(name="SIGINT"), _ASK.format(name="SIGTERM")  # as Ctrl-C, and as a batch system
# After a `place` and one of those above: `die()` at the `n`-th pass through `owner.name`, before or after it.
HOOK = """
original, passes, self_of = getattr(owner, name), [0], [None]
def hooked(*arguments, **options):
    self_of[0] = arguments[0]
    passes[0] += 1
    if passes[0] == n and not after:
        die()
    result = original(*arguments, **options)
    if passes[0] == n:
        die()
    return result
setattr(owner, name, staticmethod(hooked) if isinstance(owner.__dict__[name], staticmethod) else hooked)
"""


def place(owner, name, n, *, after=False):
    """What HOOK reads, of a class, or of a module."""
    module, _, cls = owner.rpartition(".")
    what = f"from {module} import {cls} as owner" if cls[0].isupper() else f"import {owner} as owner"
    return f"{what}\nname, n, after = {name!r}, {n}, {after}\n"


def renaming(part, *, after):
    """The first time that something with ``part`` in its path is renamed into place."""
    return f"""
import diffusion_align.writing as writing
rename = writing.rename
class owner: chosen = staticmethod(rename)
name, n, after = "chosen", 1, {after}
writing.rename = lambda source, target: (owner.chosen if {part!r} in str(target) else rename)(source, target)
"""


def resumed_with(*arguments):
    """The line that a command prints which is to be resumed."""
    kept = [str(word) for word in arguments if word != "resume=true"]
    return "resume with: " + shlex.join(["diffusion-align", *kept, "resume=true"])


STEP = "diffusion_align.training.optimization.Optimization"
TRAINER = "diffusion_align.training.trainer.Trainer"
UPDATING = {
    "between two updates": place(STEP, "step", 2),
    "after the row, before the checkpoint": place(TRAINER, "save", 1),
    "before a checkpoint is renamed": renaming("checkpoints/step_", after=False),
    "after a checkpoint is renamed, the old ones still there": renaming("checkpoints/step_", after=True),
}
"""Moments of every run's updates."""
