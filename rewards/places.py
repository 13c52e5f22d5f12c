"""Where the networks of rewards come from: the files, folders and Hub ids that were read, for a run to recognise."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

_places: ContextVar[list[str] | None] = ContextVar("_places", default=None)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Inside, every place that a reward is loaded from is appended to the list, in order; not to those further out."""
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
