"""Networks that judge text: from a folder or the hub, safetensors only, frozen; and their tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from diffusion_align.bounds import MOST
from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.rewards.base import RewardError, describe_exception
from diffusion_align.rewards.image.clip import DTYPES, is_missing_folder
from diffusion_align.rewards.places import note
from diffusion_align.rewards.settings import NetworkSettings


def load_network(
    auto: str,
    name: str,
    *,
    dtype: str,
    device: str | torch.device,
    may_lack: Callable[[str], bool] = lambda key: False,
    **settings: Any,
) -> Any:
    """The network in a folder or hub repository, in evaluation mode, without gradients, on ``device``.

    Args:
        auto: the transformers class that loads it, e.g. "AutoModel".
        name: folder or hub id; only its safetensors files are read, and no code of it is run.
        dtype: a key of `DTYPES`.
        may_lack: which weights may be missing, because something else supplies them or nothing uses them.
        settings: for ``from_pretrained``.

    Raises:
        RewardError: not found, not safetensors, weights missing.
    """
    import transformers

    if torch.device(device).type == "cpu" and dtype != "float32":
        raise RewardError(f"dtype={dtype!r} is for GPUs: on a CPU rewards run in float32")
    note(place(name))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of missing weights it warns even where an adapter brings them
    try:
        options = {"use_safetensors": True, "output_loading_info": True} | settings
        load = getattr(transformers, auto).from_pretrained
        with hub_or_cache(place(name)):
            network, loading = load_in_dtype(load, place(name), dtype=DTYPES[dtype], **options)
    except Exception as error:
        raise RewardError(
            f"'{name}' could not be loaded ({describe_exception(error)}): give a folder or hub id that holds the "
            "network as safetensors, and check the connection for a hub id"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(key for key in loading["missing_keys"] if not may_lack(key))
    if missing:
        raise RewardError(f"'{name}' lacks weights ({missing[0]}, ...): give a network trained for this, whole")
    return network.to(device).eval().requires_grad_(False)


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder or hub repository; RewardError where there is none."""
    from transformers import AutoTokenizer

    try:
        with hub_or_cache(place(name)):
            return AutoTokenizer.from_pretrained(place(name))
    except Exception as error:
        raise RewardError(
            f"'{name}' has no tokenizer that loads ({describe_exception(error)}): save one there"
        ) from error


def without_token_types(tokenizer: Any, config: Any) -> None:
    """Let ``tokenizer`` give no ``token_type_ids`` to a network without such embeddings, as transformers 4 does.

    GPT-2 would add the embedding of token 0 to every token; most others ignore them.
    """
    if not getattr(config, "type_vocab_size", None):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]


def tokens_of(
    tokenizer: Any, texts: list[Any], *, limit: int | None, device: torch.device, **settings: Any
) -> dict[str, Tensor]:
    """Padded input of the network, (n, L) on ``device``; a text of no token at all becomes one end of sequence."""
    if not tokenizer("").input_ids:
        texts = [text or tokenizer.eos_token or tokenizer.pad_token for text in texts]
    encoded = tokenizer(
        texts, padding=True, truncation=limit is not None, max_length=limit, return_tensors="pt", **settings
    )
    return {key: value.to(device) for key, value in encoded.items()}


def token_limit(tokenizer: Any, config: Any, max_length: int | None) -> int | None:
    """The most tokens of one text that the option, the tokenizer and the network all allow; None for no end."""
    limits = [max_length, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    # A tokenizer writes 10**30 for no limit, some configurations -1.
    known = [int(limit) for limit in limits if isinstance(limit, int | float) and 0 < limit < 10**9]
    return min(known, default=None)


def place(name: str) -> str:
    """A folder where there is one of this name, else the hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


class TextNetworkSettings(NetworkSettings):
    """The options of every reward that reads text with a network."""

    max_length: int | None = Field(
        None, ge=1, le=MOST, description="tokens of a text that count; by default as many as the network can take"
    )


def _folder_or_id(name: str) -> str:
    if is_missing_folder(name):
        raise ValueError("it is not a folder: give one that holds a transformers model")
    return name


NetworkName = Annotated[str, Field(min_length=1), AfterValidator(_folder_or_id)]
"""An option that is a folder or a hub id."""
