"""The Hugging Face Hub where it can be reached, its local cache where it cannot: found out once, within seconds.

Left to itself, its client asks again and again for half a minute and more for each file, and says so each time.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECONDS = 2.0  # for an answer; whoever is slower sets HF_HUB_ETAG_TIMEOUT, which the Hub's client knows too
LASTS = 60.0  # seconds that an answer, or that there was none, is good for
_answer: tuple[float, bool] | None = None  # when, and whether there was one
_lock = threading.Lock()


@contextmanager
def hub_or_cache(*sources: Any) -> Iterator[None]:
    """Around whatever may read ``sources`` from the Hub: without a connection it reads the cache alone, at once.

    Args:
        sources: names as the libraries take them; nothing is asked where all of them are files or folders here.
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
