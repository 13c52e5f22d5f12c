"""What comes from the Hugging Face Hub or its local cache, in the dtype that is required.

Whether the Hub can be reached is found out once, within seconds: left to itself, its client retries again and again for
half a minute and more for each file, and says so each time.
"""

from __future__ import annotations

import importlib.metadata
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

SECONDS = 2.0  # for an answer; whoever is slower sets HF_HUB_ETAG_TIMEOUT, which the Hub's client knows too
LASTS = 60.0  # seconds that an answer, or that there was none, is good for
_answer: tuple[float, bool] | None = None  # when, and whether there was one
_lock = threading.Lock()


@contextmanager
def hub_or_cache(*sources: Any) -> Iterator[None]:
    """Around whatever may read ``sources`` from the Hub: without a connection it reads the cache alone, at once.

    Args:
        sources: names as the libraries take them; nothing is requested where all of them are files or folders here.
    """
    from huggingface_hub import constants

    local = all(os.path.exists(os.path.expanduser(str(source))) for source in sources)
    if (sources and local) or constants.HF_HUB_OFFLINE or _reachable():
        yield
        return
    with _offline():
        yield


@contextmanager
def _offline() -> Iterator[None]:
    """What HF_HUB_OFFLINE=1 would have set when the libraries were imported, those that look at it themselves too."""
    import sys

    places = [(sys.modules["huggingface_hub.constants"], "HF_HUB_OFFLINE")]
    places += [
        (sys.modules[module], name)
        for module, name in (("transformers.utils.hub", "_is_offline_mode"), ("datasets.config", "HF_HUB_OFFLINE"))
        if module in sys.modules and hasattr(sys.modules[module], name)
    ]
    before = [(module, name, getattr(module, name)) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def _reachable() -> bool:
    """Whether anything answers at the Hub's address, by whatever proxy its client uses; remembered for a while."""
    global _answer
    with _lock:
        now = time.monotonic()
        if _answer is None or now - _answer[0] > LASTS:
            _answer = now, _ask(float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or SECONDS))
        return _answer[1]


def _ask(seconds: float) -> bool:
    from huggingface_hub import constants, get_session

    answered: list[Any] = []

    def ask() -> None:
        try:
            answered.append(get_session().head(constants.ENDPOINT, timeout=seconds))
        except Exception:  # of which kinds, depends on the library that speaks HTTP for the Hub's client
            answered.append(None)

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered) and answered[0] is not None


def load_in_dtype(
    load: Callable[..., Any], *source: Any, dtype: torch.dtype | Mapping[str, torch.dtype], **options: Any
) -> Any:
    """What ``load`` returns, every floating-point weight of it in ``dtype``.

    An unknown keyword is ignored by diffusers and by some versions of transformers, and the weights are float32 then:
    the keyword is chosen by version, and the result is checked.

    Args:
        load: ``from_pretrained``, ``from_single_file`` or ``from_config`` of a class of diffusers or transformers.
        source: its positional arguments.
        dtype: of the weights; for a pipeline also one for each part by name, and "default" for the others.
        options: further arguments. Parts of a pipeline that are given here stay as they are.

    Raises:
        UserError: a weight came back in another dtype.
    """
    import torch
    from torch import nn

    reads = getattr(load, "__name__", "") != "from_config"
    # transformers 4 draws initial weights even for what it reads from a file.
    with torch.random.fork_rng(devices=[], enabled=reads):
        loaded = load(*source, **{_keyword(load): dtype}, **options)
    found = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
    if isinstance(found, nn.Module):
        _check(type(found).__name__, found, dtype["default"] if isinstance(dtype, Mapping) else dtype)
        return loaded
    for name, part in found.components.items():
        if isinstance(part, nn.Module) and name not in options:
            wanted = dtype.get(name, dtype["default"]) if isinstance(dtype, Mapping) else dtype
            _check(name, part, wanted)
    return loaded


def _keyword(load: Callable[..., Any]) -> str:
    """What ``load`` calls the dtype: diffusers renamed the argument in 0.40, transformers in 4.56, below our bound."""
    owner = getattr(load, "__self__", None)
    if not getattr(owner, "__module__", "").startswith("diffusers."):
        return "dtype"
    major, minor = importlib.metadata.version("diffusers").split(".")[:2]
    return "dtype" if (int(major), int(minor)) >= (0, 40) else "torch_dtype"


def _check(name: str, network: nn.Module, wanted: torch.dtype) -> None:
    """UserError where a weight is not in ``wanted``; what a network keeps in float32 by its own rule may be that."""
    import torch

    rules = (getattr(network, rule, None) or () for rule in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"))
    kept = tuple(part for rule in rules for part in rule)
    for key, weight in network.named_parameters():
        if not weight.is_floating_point() or weight.dtype == wanted:
            continue
        if weight.dtype == torch.float32 and any(part in key for part in kept):
            continue
        library = type(network).__module__.partition(".")[0]
        raise UserError(
            f"{name} was loaded in {_name(weight.dtype)} instead of {_name(wanted)} ({key}): this version of {library} "
            "does not honour the dtype, install one that is tested"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
