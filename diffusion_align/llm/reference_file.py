"""The reference's log-probs of the rows of a dataset, computed once and kept in a file of the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.data.text_rows import PreferenceRow
from diffusion_align.errors import CheckpointError
from diffusion_align.llm.dynamic_beta import prompt_features
from diffusion_align.llm.policy import LanguagePolicy
from diffusion_align.llm.preferences import PreferenceBatch, given_preferences
from diffusion_align.training.checkpoint import open_tensors
from diffusion_align.training.digests import Identity, content_digest
from diffusion_align.training.finite import require_finite_logits
from diffusion_align.training.processes import Processes
from diffusion_align.training.progress import Bars
from diffusion_align.writing import new_file

_FEATURES = ("embeddings", "entropy")


class ReferenceFile:
    """What the reference says about all rows, computed once before the first update and kept in one file.

    The file belongs to one run, whose settings (temperature) cannot change on resume, and says of which rows and, by
    content, of which model it is: one of others is made again. Before the first update a policy without a reference is
    its own.

    Args:
        path: of the file; its folder is the run's.
        rows: all of them.
        policy: the language model.
        with_features: keep ``prompt_features`` too.
    """

    def __init__(
        self, path: Path, rows: Sequence[PreferenceRow], policy: LanguagePolicy, *, with_features: bool
    ) -> None:
        self.path, self.rows, self.policy, self.with_features = path, rows, policy, with_features
        tokens = [sum(map(len, (row.chosen, *row.rejected))) for row in rows]
        self._ends = [0, *torch.tensor(tokens).cumsum(0).tolist()]  # row i's log-probs are those from end i to end i+1
        self._full = False
        self._model = ""  # digest of the models that the rows are looked at with

    def fill(self, identity: Identity, *, untrained: bool, batch_size: int, processes: Processes, bars: Bars) -> None:
        """Write the file unless one of these rows is there, every process its part; between batches it can be stopped.

        Args:
            identity: what the run is made of.
            untrained: whether no update was made, so that a policy without a reference is its own.
            batch_size: rows looked at at once.
            processes, bars: of the run.

        Raises:
            CheckpointError: the file is damaged, or it is gone or of other rows and cannot be made again.
            Interrupted: the run received an interrupt.
        """
        if self._full:
            return
        models = [identity.get(name) for name in ("model", "reference_model")]
        self._model = content_digest([[digest for _, digest in places] for places in models if places])
        # Other rows were accepted, or the checkpoint refused them, unless the trainer does not say what it is made of.
        can_be_made = self.policy.has_reference or untrained
        accepted = bool(identity) and can_be_made
        there = self.path.is_file() and (not accepted or self._is_of_these())
        processes.wait()  # all have looked before it is written
        if not there:
            if not can_be_made:
                raise CheckpointError(
                    f"{self.path} is gone and the model has been trained since: choose a new output_dir"
                )
            tensors = self._compute(batch_size, processes, bars)
            processes.on_main(lambda: self._write(tensors))
        if not self._is_of_these():
            raise CheckpointError(
                f"the rows have changed since this run began ({self.path} is for others): restore them or choose a new "
                "output_dir"
            )
        self._full = True

    def _is_of_these(self) -> bool:
        with open_tensors(self.path) as file:
            found = file.metadata() or {}
        return {"model": self._model, **found} == self._identity()  # older versions did not say the model

    def _write(self, tensors: dict[str, Tensor]) -> None:
        with new_file(self.path) as temporary:
            save_file(tensors, temporary, self._identity())

    def put_into(self, batch: PreferenceBatch, indices: Sequence[int]) -> PreferenceBatch:
        """A batch of the given rows ``indices``, with what is known of them."""
        device, mask = self.policy.device, batch.sequences.mask
        with open_tensors(self.path) as file:
            logp = file.get_slice("logp")
            flat = torch.cat([logp[self._ends[i] : self._ends[i + 1]] for i in indices]).to(device)
            logp_ref = torch.zeros(mask.shape, dtype=flat.dtype, device=device).masked_scatter(mask, flat)
            features = {name: file.get_tensor(name)[indices].to(device) for name in _FEATURES if self.with_features}
        return replace(batch, logp_ref=logp_ref, **features)

    @torch.no_grad()
    def _compute(self, batch_size: int, processes: Processes, bars: Bars) -> dict[str, Tensor]:
        policy = self.policy
        share = -(-len(self.rows) // processes.count)
        own = self.rows[share * processes.index : share * (processes.index + 1)]
        parts: dict[str, list[Tensor]] = {name: [] for name in (*_FEATURES, "logp")}
        with (
            policy.reference() if policy.has_reference else contextlib.nullcontext(),
            bars.task("  reference", len(own)) as advance,
        ):
            for start in range(0, share, batch_size):
                processes.stop_if_interrupted()
                if some := own[start : start + batch_size]:
                    batch = given_preferences(some, torch.arange(len(some)), pad=policy.pad, device=policy.device)
                    sequences = batch.sequences
                    parts["logp"].append(policy.log_probs(policy.score(sequences))[sequences.mask].cpu())
                    if self.with_features:
                        features = prompt_features(policy, sequences[batch.chosen])
                        for name, feature in zip(_FEATURES, features, strict=True):
                            parts[name].append(feature.cpu())
                    advance(len(some))
        gathered = processes.gather_in_order([parts])
        joined = {name: [x for part in gathered for x in part[name]] for name in parts}
        tensors = {name: torch.cat(found) for name, found in joined.items() if found}
        require_finite_logits(tensors["logp"], what="the reference")
        return tensors

    def _identity(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.ids, row.chosen, row.rejected]).encode())
        rows = {"rows": str(len(self.rows)), "sha256": digest.hexdigest(), "features": str(self.with_features)}
        return rows | {"model": self._model}
