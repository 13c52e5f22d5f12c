"""What the reference says about the rows of a data set, computed once and kept in a file of the run."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.data.text_rows import PreferenceRow
from diffusion_align.errors import CheckpointError
from diffusion_align.llm.dynamic_beta import prompt_features
from diffusion_align.llm.policy import LanguagePolicy
from diffusion_align.llm.preference_batches import PreferenceBatch, pack_rows, places_of
from diffusion_align.training.checkpoint import open_tensors
from diffusion_align.training.digests import content_digest
from diffusion_align.training.finite import require_finite_logits
from diffusion_align.training.loop import Trainer
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

    def fill(self, trainer: Trainer[Any]) -> None:
        """Write the file unless one of these rows is there, every process its part; between batches it can be stopped.

        Raises:
            CheckpointError: the file is damaged, or it is gone or of other rows and cannot be made again.
            Interrupted: the run was asked to stop.
        """
        if self._full:
            return
        models = [trainer.identity.get(name) for name in ("model", "reference_model")]
        self._model = content_digest([[digest for _, digest in places] for places in models if places])
        # Other rows were accepted, or the checkpoint refused them, unless the trainer does not say what it is made of.
        accepted = bool(trainer.identity) and self._can_be_made(trainer)
        there = self.path.is_file() and (not accepted or self._is_of_these())
        trainer.accelerator.wait_for_everyone()  # all have looked before it is written
        if not there:
            tensors = self._compute(trainer)
            trainer.on_main_process(lambda: self._write(tensors))
        if not self._is_of_these():
            raise CheckpointError(
                f"the rows are not those that this run began with ({self.path} is of others): put them back or choose "
                "a new output_dir"
            )
        self._full = True

    def _can_be_made(self, trainer: Trainer[Any]) -> bool:
        return self.policy.has_reference or trainer.step == 0

    def _is_of_these(self) -> bool:
        with open_tensors(self.path) as file:
            found = file.metadata() or {}
        return {"model": self._model, **found} == self._identity()  # older versions did not say the model

    def _write(self, tensors: dict[str, Tensor]) -> None:
        with new_file(self.path) as aside:
            save_file(tensors, aside, self._identity())

    def put_into(self, batch: PreferenceBatch, indices: Sequence[int]) -> None:
        """Fill in what is known of a batch of rows ``indices`` that ``pack_rows`` packed."""
        device, mask = self.policy.device, batch.sequences.mask
        with open_tensors(self.path) as file:
            logp = file.get_slice("logp")
            flat = torch.cat([logp[self._ends[i] : self._ends[i + 1]] for i in indices]).to(device)
            batch.logp_ref = torch.zeros(mask.shape, dtype=flat.dtype, device=device).masked_scatter(mask, flat)
            if self.with_features:
                embeddings, entropy = (file.get_tensor(name) for name in _FEATURES)
                batch.embeddings, batch.entropy = embeddings[indices].to(device), entropy[indices].to(device)

    @torch.no_grad()
    def _compute(self, trainer: Trainer[Any]) -> dict[str, Tensor]:
        policy, size, accelerator = self.policy, trainer.config.sample_batch_size, trainer.accelerator
        if not self._can_be_made(trainer):
            raise CheckpointError(f"{self.path} is gone and the model has been trained since: choose a new output_dir")
        share = -(-len(self.rows) // accelerator.num_processes)
        own = self.rows[share * accelerator.process_index : share * (accelerator.process_index + 1)]
        parts: dict[str, list[Tensor]] = {name: [] for name in (*_FEATURES, "logp")}
        with (
            policy.reference() if policy.has_reference else contextlib.nullcontext(),
            trainer.progress("  reference", len(own)) as bar,
        ):
            for start in range(0, share, size):
                trainer.stop_if_interrupted()
                if some := own[start : start + size]:
                    sequences = pack_rows(some, pad=policy.pad, device=policy.device)
                    parts["logp"].append(policy.log_probs(policy.score(sequences))[sequences.mask].cpu())
                    if self.with_features:
                        chosen = sequences[places_of(some)[0].to(policy.device)]
                        for name, feature in zip(_FEATURES, prompt_features(policy, chosen), strict=True):
                            parts[name].append(feature.cpu())
                    trainer.advance(bar, len(some))
        everyones = gather_object([parts]) if accelerator.num_processes > 1 else [parts]
        joined = {name: [x for part in everyones for x in part[name]] for name in parts}
        tensors = {name: torch.cat(found) for name, found in joined.items() if found}
        require_finite_logits(tensors["logp"], what="the reference")
        return tensors

    def _identity(self) -> dict[str, str]:
        digest = hashlib.sha256()
        for row in self.rows:
            digest.update(json.dumps([row.ids, row.chosen, row.rejected]).encode())
        rows = {"rows": str(len(self.rows)), "sha256": digest.hexdigest(), "features": str(self.with_features)}
        return rows | {"model": self._model}
