"""What rewards with a network share: the file, given or downloaded once; its tensors, read without running any code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, PlainValidator, ValidationInfo

from diffusion_align.bounds import MOST
from diffusion_align.errors import short
from diffusion_align.inputs import check_path
from diffusion_align.pretrained import hub_or_cache, load_in_dtype
from diffusion_align.rewards.base import RewardError, foreign_code
from diffusion_align.rewards.settings import Device, RewardSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_places: ContextVar[list[str] | None] = ContextVar("_places", default=None)


class NetworkSettings(RewardSettings):
    """The options of every reward that runs a network."""

    dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="precision of the network; half precision needs a GPU"
    )
    batch_size: int = Field(64, ge=1, le=MOST, description="images or texts per forward pass")
    device: Device = None


class TextNetworkSettings(NetworkSettings):
    """The options of every reward that reads text with a network."""

    max_length: int | None = Field(
        None, ge=1, le=MOST, description="tokens of a text that count; by default as many as the network can take"
    )


def is_missing_folder(name: str) -> bool:
    """Whether ``name`` reads like a path, not like a Hub id, and no folder is there."""
    looks_like_a_path = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    return looks_like_a_path and not Path(name).expanduser().is_dir()


def _folder_or_id(name: str) -> str:
    if is_missing_folder(name):
        raise ValueError("give a folder that holds a transformers model, or a Hub id")
    return name


def _existing_file(file: str | Path | None, info: ValidationInfo) -> str | Path | None:
    if file is None:
        return None
    if isinstance(file, str | Path):
        check_path(file, f"{info.field_name}={short(str(file))}", "file", error=RewardError)
    if not isinstance(file, str | Path) or not Path(file).expanduser().is_file():
        raise RewardError(
            f"{info.field_name}={short(str(file), 200)} is not a file: give a local file of tensors, or leave it out"
        )
    return file


NetworkName = Annotated[str, Field(min_length=1), AfterValidator(_folder_or_id)]
"""An option that is a folder or a Hub id."""
LocalFile = Annotated[str | Path | None, PlainValidator(_existing_file)]
"""An option that is a local file in place of a download."""


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Inside, every file, folder and Hub id that a reward is loaded from is appended to the list, in order.

    For a run to recognise. Not to the lists of those further out.
    """
    places: list[str] = []
    token = _places.set(places)
    try:
        yield places
    finally:
        _places.reset(token)


def note(place: str | Path) -> None:
    """Say that a network or its tokenizer is read from a file, a folder or a Hub id."""
    places = _places.get()
    if places is not None and str(place) not in places:
        places.append(str(place))


def place(name: str) -> str:
    """A folder where there is one of this name, else the Hub id."""
    folder = Path(name).expanduser()
    return str(folder) if folder.is_dir() else name


def torch_dtype(dtype: str, device: str | torch.device) -> torch.dtype:
    """The dtype called ``dtype``; RewardError for half precision on a CPU."""
    import torch

    if torch.device(device).type == "cpu" and dtype != "float32":
        raise RewardError(f"dtype={dtype!r} needs a GPU: leave it out, rewards run in float32 on a CPU")
    found: torch.dtype = getattr(torch, dtype)
    return found


def has_digest(file: Path, sha256: str) -> bool:
    """Whether the SHA-256 of a file is this one."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest() == sha256


def weights_file(weights: str | Path | None, repository: str, file: str) -> Path:
    """The local file ``weights``, else ``file`` of a Hub repository, downloaded once.

    Raises:
        RewardError: it cannot be downloaded.
    """
    if weights is None:
        advice = "connect once, or give a local file as weights"
        with foreign_code(f"{file} could not be downloaded from {repository} (", f"): {advice}"), hub_or_cache():
            from huggingface_hub import hf_hub_download

            weights = hf_hub_download(repository, file)
    path = Path(weights).expanduser()
    note(path)
    return path


def settings_beside(network: str, file: str) -> dict[str, Any]:
    """The JSON ``file`` in the folder or Hub repository of a network; nothing where there is none."""
    from transformers.utils import cached_file

    try:
        with hub_or_cache(place(network)):
            return json.loads(Path(str(cached_file(place(network), file))).read_text(encoding="utf-8"))
    except OSError:
        return {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors or PyTorch file, on the CPU; of a checkpoint those under its key "state_dict".

    Raises:
        RewardError: not a file of tensors; a pickle of anything else is refused, not run.
    """
    import torch
    from torch import Tensor

    with foreign_code(f"'{path}' is not a file of tensors (", ")"):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
        content = content.get("state_dict", content)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise RewardError(f"'{path}' holds no tensors: give the published file")
    return tensors


def shape_of(tensors: Mapping[str, Tensor], name: str, dimensions: int, path: Path) -> tuple[int, ...]:
    """The shape of one tensor of the file ``path``; RewardError where it is missing or has other ``dimensions``."""
    if name not in tensors:
        raise RewardError(f"'{path}' lacks '{name}': give the published file")
    shape = tuple(tensors[name].shape)
    if len(shape) != dimensions:
        raise RewardError(f"'{path}' has '{name}' of shape {shape} where {dimensions} dimensions are expected")
    return shape


def load_tensors(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    path: Path,
    *,
    name_of: Callable[[str], str] = str,
    strict: bool = True,
) -> None:
    """Make the tensors of the file ``path`` those of ``module``, every one of it, in its own dtypes.

    Args:
        name_of: what the file calls a key of ``module``; the same by default.
        strict: whether tensors that ``module`` has no place for are an error.

    Raises:
        RewardError: a tensor is missing, of another shape, or one too many.
    """
    targets = {name_of(key): (key, value) for key, value in module.state_dict().items()}
    faults = [f"lacks '{name}'" for name in targets if name not in tensors]
    faults += [
        f"has '{name}' of shape {tuple(tensors[name].shape)} instead of {tuple(value.shape)}"
        for name, (_, value) in targets.items()
        if name in tensors and tensors[name].shape != value.shape
    ]
    if strict:
        faults += [f"has '{name}', which the network does not have" for name in tensors if name not in targets]
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise RewardError(f"'{path}' {faults[0]}{more}: give the published file")
    state = {key: tensors[name].to(value.dtype) for name, (key, value) in targets.items()}
    module.load_state_dict(state, assign=True)


@contextmanager
def unfilled() -> Iterator[None]:
    """Networks made here have no parameters yet, only their shapes, for `load_tensors` to put in.

    Sampling a billion initial weights at random would take most of a minute. The global RNG stays put.
    """
    import torch
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        yield


def load_network(
    auto: str,
    name: str,
    *,
    dtype: str,
    device: str | torch.device,
    may_lack: Callable[[str], bool] = lambda key: False,
    **settings: Any,
) -> Any:
    """The network in a folder or Hub repository, in evaluation mode, without gradients, on ``device``.

    Args:
        auto: the transformers class that loads it, e.g. "AutoModel".
        name: folder or Hub id; only its safetensors files are read, and no code of it is run.
        dtype: "float32", "float16" or "bfloat16".
        may_lack: which weights may be missing, because something else supplies them or nothing uses them.
        settings: for ``from_pretrained``.

    Raises:
        RewardError: not found, not safetensors, weights missing.
    """
    import transformers

    wanted = torch_dtype(dtype, device)
    note(place(name))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # of missing weights it warns even where an adapter brings them
    advice = "give a folder or Hub id that holds the network as safetensors, and check the connection for a Hub id"
    try:
        options = {"use_safetensors": True, "output_loading_info": True} | settings
        load = getattr(transformers, auto).from_pretrained
        with foreign_code(f"'{name}' could not be loaded (", f"): {advice}"), hub_or_cache(place(name)):
            network, loading = load_in_dtype(load, place(name), dtype=wanted, **options)
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = sorted(key for key in loading["missing_keys"] if not may_lack(key))
    if missing:
        raise RewardError(f"'{name}' lacks weights ({missing[0]}, ...): give a network with all of its weights")
    return network.to(device).eval().requires_grad_(False)


def load_tokenizer(name: str, vocabulary: int = 0) -> Any:
    """The tokenizer in a folder or Hub repository, for a network that knows ``vocabulary`` tokens.

    Raises:
        RewardError: there is none, or it is of another network. Where a folder holds a network without its tokenizer,
            transformers makes up one that knows only the special tokens, and every text would read alike.
    """
    from transformers import AutoTokenizer

    advice = "give a folder that holds the network's own tokenizer, or check the connection for a Hub id"
    note(place(name))
    with foreign_code(f"the tokenizer of '{name}' could not be loaded (", f"): {advice}"), hub_or_cache(place(name)):
        tokenizer = AutoTokenizer.from_pretrained(place(name))
    if len(tokenizer) < vocabulary // 2:
        raise RewardError(f"the tokenizer of '{name}' has {len(tokenizer)} tokens, not {vocabulary}: {advice}")
    return tokenizer


def without_token_types(tokenizer: Any, config: Any) -> None:
    """Let ``tokenizer`` give no ``token_type_ids`` to a network without such embeddings, as transformers 4 does.

    GPT-2 would add the embedding of token 0 to every token; most others ignore them.
    """
    if not getattr(config, "type_vocab_size", None):
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]


def tokenize_batch(
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


def embed_each(texts: Sequence[str], batch_size: int, embed: Callable[[list[str]], Tensor]) -> Tensor:
    """What ``embed`` makes of ``texts``, (B, D), in batches; equal texts are embedded once."""
    import torch

    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    unique = list(rows)
    parts = [unique[start : start + batch_size] for start in range(0, len(unique), batch_size)]
    return torch.cat([embed(part) for part in parts])[[rows[text] for text in texts]]
