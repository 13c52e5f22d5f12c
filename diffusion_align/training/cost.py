"""What an epoch asks for, told from a method's settings alone: for ``diffusion-align doctor``."""

from __future__ import annotations

from dataclasses import dataclass

Lines = list[tuple[str, str]]
"""(name, value); a name without a value is the heading of those that follow."""


@dataclass(frozen=True)
class EpochCost:
    """Passes of the network on one sample, of all processes together; those of the evaluation are not among them.

    Attributes:
        what: what an epoch is about, a name and a value such as ("images an epoch", "64, each 20 steps").
        units: samples or pairs that the epoch's updates divide among themselves.
        actions: what is trained on, of all units together: steps of an image or pair, completions.
        sampling: forward passes to sample.
        trained: forward and backward passes.
        reference, probed: forward passes for the reference, and to estimate how far the policy is from it.
        decoded: images decoded.
        width: samples in a training pass for each action of a micro-batch.
        recorded: latents kept of an epoch.
    """

    what: tuple[str, str]
    units: int
    actions: int
    sampling: int = 0
    trained: int = 0
    reference: int = 0
    probed: int = 0
    decoded: int = 0
    width: int = 1
    recorded: int = 0
