"""Published weights: the file, given or downloaded once; its tensors, read without running any code; the tokenizer."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import PlainValidator, ValidationInfo
from torch import Tensor, nn

from diffusion_align.errors import short
from diffusion_align.inputs import check_path
from diffusion_align.pretrained import hub_or_cache
from diffusion_align.rewards.base import RewardError, describe_exception
from diffusion_align.rewards.places import note
from diffusion_align.rewards.text.loading import place


def weights_file(weights: str | Path | None, repository: str, file: str) -> Path:
    """The local file ``weights``, else ``file`` of a Hub repository, downloaded once.

    Raises:
        RewardError: it cannot be downloaded.
    """
    if weights is not None:
        path = Path(weights).expanduser()
    else:
        try:
            from huggingface_hub import hf_hub_download

            with hub_or_cache():
                path = Path(hf_hub_download(repository, file))
        except Exception as error:
            raise RewardError(
                f"{file} could not be downloaded from {repository} ({describe_exception(error)}): "
                "connect once, or give a local file as weights"
            ) from error
    note(path)
    return path


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


LocalFile = Annotated[str | Path | None, PlainValidator(_existing_file)]
"""An option that is a local file in place of a download."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a .safetensors or PyTorch file, on the CPU; of a checkpoint those under its key "state_dict".

    Raises:
        RewardError: not a file of tensors; a pickle of anything else is refused, not run.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, weights_only=True, map_location="cpu")
        content = content.get("state_dict", content)
        tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    except Exception as error:
        raise RewardError(f"'{path}' is not a file of tensors ({describe_exception(error)})") from error
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
        faults += [f"has '{name}', for which the network has no place" for name in tensors if name not in targets]
    if faults:
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise RewardError(f"'{path}' {faults[0]}{more}: give the published file")
    state = {key: tensors[name].to(value.dtype) for name, (key, value) in targets.items()}
    module.load_state_dict(state, assign=True)


@contextmanager
def unfilled() -> Iterator[None]:
    """Networks made here have no parameters yet, only their shapes, for `load_tensors` to put in.

    Drawing a billion initial weights at random would take most of a minute. The global RNG stays put.
    """
    from accelerate import init_empty_weights

    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        yield


def fitting_tokenizer(name: str, vocabulary: int) -> Any:
    """The tokenizer in a folder or Hub repository, for a network that knows ``vocabulary`` tokens.

    Raises:
        RewardError: there is none, or it is of another network. Where a folder holds a network without its tokenizer,
            transformers makes up one that knows only the special tokens, and every text would read alike.
    """
    from transformers import AutoTokenizer

    advice = "give a folder that holds the network's own, or check the connection for a Hub id"
    note(place(name))
    try:
        with hub_or_cache(place(name)):
            tokenizer = AutoTokenizer.from_pretrained(place(name))
    except Exception as error:
        raise RewardError(f"'{name}' has no tokenizer that loads ({describe_exception(error)}): {advice}") from error
    if len(tokenizer) < vocabulary // 2:
        raise RewardError(f"'{name}' has no tokenizer of {vocabulary} tokens but one of {len(tokenizer)}: {advice}")
    return tokenizer
