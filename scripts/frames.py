"""How much of the project a reader meets: files on the way to a first update, lines, and what must not come back.

    python scripts/frames.py                     # of DDPO (ddpo_emoji_aesthetic) and of GRPO (grpo_tiny); lines; counts
    python scripts/frames.py --files             # and the names of the files

A file is on the way if one of its functions runs between the command (``diffusion-align train RECIPE``) and the first
``optimizer.step``, imports not counted; "in the epoch" are those of which one runs from ``collect`` on.
"""

import argparse
import ast
import inspect
import os
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = {"DDPO": "ddpo_emoji_aesthetic", "GRPO": "grpo_tiny"}
PACKAGE = ("diffusion_align", "pipelines", "rewards")
FOLDERS = tuple(f"{ROOT / name}{os.sep}" for name in PACKAGE)


def trace(recipe: str) -> None:
    """Print the files on the way in the order in which they are reached, those in the epoch after an empty line."""
    import torch

    from diffusion_align.cli import main

    found: dict[str, None] = {}
    inside: dict[str, None] = {}
    training = False

    def seen(frame, event, _):  # type: ignore[no-untyped-def]
        nonlocal training
        path = frame.f_code.co_filename
        if event != "call" or not path.startswith(FOLDERS):
            return
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # the body of a module or a class
            return
        training = training or frame.f_code.co_name == "collect"
        name = str(Path(path).resolve().relative_to(ROOT))
        if name not in (inside if training else found) and not while_importing(frame):
            found[name] = None
            if training:
                inside[name] = None

    def stop(*_, **__):  # type: ignore[no-untyped-def]
        sys.setprofile(None)
        print("\n".join([*found, "", *inside]), flush=True)
        sys.stderr.flush()
        os._exit(0)

    torch.optim.AdamW.step = stop  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        sys.argv = ["diffusion-align", "train", recipe, f"output_dir={folder}/run"]
        threading.setprofile(seen)
        sys.setprofile(seen)
        main()


def while_importing(frame: types.FrameType | None) -> bool:
    """Whether the frame belongs to the import of a module of the project."""
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename != __file__:
            return True
        frame = frame.f_back
    return False


def sources(*folders: str) -> list[Path]:
    """Python files, links not followed."""
    return [path for name in folders for path in sorted((ROOT / name).rglob("*.py")) if "__pycache__" not in path.parts]


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def counts() -> dict[str, int]:
    """Dispatches over methods by ``isinstance``, and functions that say in prose what another one does."""
    found = {"isinstance of a Trainer or its config": 0, "functions named *_problem(s)": 0}
    for path in sources(*PACKAGE):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name.endswith(("_problem", "_problems")):
                found["functions named *_problem(s)"] += 1
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                names = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
                kinds = ("Trainer", "DDPOConfig", "DPOConfig", "GRPOConfig", "PPOConfig", "KTOConfig", "ModelConfig")
                names.discard("Trainer")  # what all methods are: methods.py refuses what is none
                if any(name.endswith(kinds) or name in ("DenoisingConfig", "TextConfig") for name in names):
                    found["isinstance of a Trainer or its config"] += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="name the files")
    parser.add_argument("--trace", metavar="RECIPE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trace:
        return trace(options.trace)
    for method, recipe in RECIPES.items():
        command = [sys.executable, __file__, "--trace", recipe]
        output = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout
        found, inside = (part.split() for part in output.rsplit("\n\n", 1))
        print(f"{method} ({recipe}): {len(found)} files, {len(inside)} in the epoch")
        if options.files:
            print("".join(f"  {name}{'' if name in inside else '  (before)'}\n" for name in found), end="")
    package, tests = lines(sources(*PACKAGE)), lines(sources("tests"))
    print(f"lines: {package} package + {tests} tests = {package + tests}")
    for what, count in counts().items():
        print(f"{what}: {count}")


if __name__ == "__main__":
    main()
