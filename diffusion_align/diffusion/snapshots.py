"""Named copies of what a policy trains, such as the old policy that forward-process methods sample and compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from diffusion_align.errors import CheckpointError

_FILE = "snapshot_"


class Snapshots:
    """Copies of ``trainable``, name -> parameter, each under a name of its own."""

    def __init__(self, trainable: Mapping[str, nn.Parameter]) -> None:
        self._trainable = trainable
        self._kept: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    @torch.no_grad()
    def take(self, name: str) -> None:
        """Copy the weights as they are now."""
        self._kept[name] = {key: parameter.detach().clone() for key, parameter in self._trainable.items()}

    @torch.no_grad()
    def blend(self, name: str, decay: float) -> None:
        """Move a snapshot towards the weights as they are now: ``decay * snapshot + (1 - decay) * weights``."""
        for key, kept in self._kept[name].items():
            kept.lerp_(self._trainable[key].detach(), 1 - decay)

    @contextlib.contextmanager
    def active(self, name: str) -> Iterator[None]:
        """Inside, the parameters are the snapshot, and nothing has a gradient."""
        own = {key: parameter.data for key, parameter in self._trainable.items()}
        try:
            for key, parameter in self._trainable.items():
                parameter.data = self._kept[name][key]
            with torch.no_grad():
                yield
        finally:
            for key, parameter in self._trainable.items():
                parameter.data = own[key]

    # -- for checkpoints -------------------------------------------------------------------------------------------

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """File stem -> name -> tensor."""
        return {f"{_FILE}{name}": kept for name, kept in self._kept.items()}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Mapping[str, Tensor]], names: Iterable[str]) -> None:
        """Take back the snapshots ``names`` of the same parameters from ``weights()``, among which other files may be.

        Raises:
            CheckpointError: one is not there.
        """
        for name in names:
            if f"{_FILE}{name}" not in weights:
                raise CheckpointError(f"the checkpoint lacks {_FILE}{name}.safetensors: choose a new output_dir")
            self.take(name)
            for key, kept in self._kept[name].items():
                kept.copy_(weights[f"{_FILE}{name}"][key])
