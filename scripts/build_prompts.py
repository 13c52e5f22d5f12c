"""Writes the prompt lists for images that follow from others or from a rule; the same files each time.

    python scripts/build_prompts.py                         # into diffusion_align/assets/prompts
    python scripts/build_prompts.py --out-dir FOLDER

``animals``, ``emoji_concepts`` and ``emoji_heldout`` are read and ``emoji_weak`` has a script of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_align.assets import asset_path

SHIPPED = asset_path("emoji-prompts").parent
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")
"""Of DDPO (Black et al. 2023, arXiv:2305.13301), as the animals are."""
NUMBERS = ("one", "two", "three", "four", "five", "six")
COUNTED = {
    "apple": "apples",
    "balloon": "balloons",
    "banana": "bananas",
    "bird": "birds",
    "book": "books",
    "candle": "candles",
    "cat": "cats",
    "chair": "chairs",
    "coin": "coins",
    "cup": "cups",
    "dog": "dogs",
    "egg": "eggs",
    "fish": "fish",
    "flower": "flowers",
    "key": "keys",
    "leaf": "leaves",
    "lemon": "lemons",
    "mushroom": "mushrooms",
    "pencil": "pencils",
    "star": "stars",
}
"""Thing -> several of them."""
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
COLOURED = (
    "backpack",
    "balloon",
    "bed",
    "bicycle",
    "bird",
    "book",
    "bus",
    "car",
    "cat",
    "chair",
    "cup",
    "dress",
    "flower",
    "guitar",
    "hat",
    "house",
    "shoe",
    "teapot",
    "train",
    "umbrella",
)
TEXTS = {
    "a sign that says": ("HELLO", "OPEN", "CLOSED", "EXIT", "STOP"),
    "a poster that says": ("SUMMER SALE", "LIVE MUSIC", "THINK BIG", "VOTE", "FREE TODAY"),
    "a shop window that says": ("BAKERY", "COFFEE", "FLOWERS", "BOOKS", "TOYS"),
    "a t-shirt that says": ("TEAM 7", "RELAX", "PARIS", "ROCKET", "I LOVE CATS"),
    "a mug that says": ("GOOD MORNING", "TEA", "BOSS", "HAPPY DAY", "NO SUGAR"),
    "a book cover that says": ("THE SEA", "GHOSTS", "MATHS", "A LONG WALK", "POEMS"),
    "a blackboard that says": ("2 + 2 = 4", "LESSON 1", "QUIET", "ART CLASS", "HOMEWORK"),
    "a birthday cake that says": ("HAPPY BIRTHDAY", "30", "FOR ANNA", "HURRAY", "MAKE A WISH"),
    "a neon sign that says": ("PIZZA", "HOTEL", "CINEMA", "24 HOURS", "JAZZ"),
    "a road sign that says": ("SLOW DOWN", "50", "BRIDGE AHEAD", "LONDON", "NO PARKING"),
}


def with_article(words: str) -> str:
    """``words`` after "a", or "an" before the letter of a vowel, which is right for the words of this file."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def animals_activities() -> list[dict[str, Any]]:
    """Each of the animals at each of the activities."""
    return [
        {"prompt": f"{with_article(animal)} {activity}", "animal": animal, "activity": activity}
        for animal in _lines("animals")
        for activity in ACTIVITIES
    ]


def counting() -> list[dict[str, Any]]:
    """One to six things of a kind."""
    return [
        {"prompt": f"{number} {thing if count == 1 else things}", "object": thing, "count": count}
        for thing, things in COUNTED.items()
        for count, number in enumerate(NUMBERS, start=1)
    ]


def colours() -> list[dict[str, Any]]:
    """Things in each of the colours."""
    return [
        {"prompt": with_article(f"{colour} {thing}"), "object": thing, "colour": colour}
        for thing in COLOURED
        for colour in COLOURS
    ]


def text_in_pictures() -> list[dict[str, Any]]:
    """Things with a text on them, which stands in quotes."""
    return [{"prompt": f'{thing} "{text}"', "text": text} for thing, texts in TEXTS.items() for text in texts]


def emoji_train() -> list[str]:
    """The concepts that are not held out."""
    heldout = set(_lines("emoji_heldout"))
    return [prompt for prompt in _lines("emoji_concepts") if prompt not in heldout]


LISTS: dict[str, Callable[[], list[Any]]] = {
    "animals_activities": animals_activities,
    "colours": colours,
    "counting": counting,
    "emoji_train": emoji_train,
    "text_in_pictures": text_in_pictures,
}


def write(folder: Path) -> list[Path]:
    """The files written into ``folder``: texts as .txt, rows with metadata as .jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, rows_of in LISTS.items():
        rows = rows_of()
        plain = isinstance(rows[0], str)
        path = folder / f"{name}.{'txt' if plain else 'jsonl'}"
        lines = rows if plain else [json.dumps(row) for row in rows]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
        written.append(path)
    return written


def _lines(name: str) -> list[str]:
    return (SHIPPED / f"{name}.txt").read_text(encoding="utf-8").splitlines()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out-dir", type=Path, default=SHIPPED)
    for file in write(parser.parse_args().out_dir):
        print(file)
