"""Rebuilds the embedded models and preference data from public emoji drawings (npm packages), stage by stage.

    python scripts/build_emoji_sd.py                        # everything; about 4 CPU-hours
    python scripts/build_emoji_sd.py --scale 0.002          # every stage, a few steps each: minutes
    python scripts/build_emoji_sd.py --stages head evaluate

Results go to --out-dir; drawings, downloads and progress to --work-dir. A stage whose result is there is skipped, an
interrupted one continues where it was. Needs npm, and ``pip install 'diffusion-align[build-emoji]'``.
"""

import argparse
import json
import sys
import time
from pathlib import Path

STAGES = ("data", "vae", "clip", "unet", "flow", "preferences", "head", "evaluate")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="which stages (default: all)")
    p.add_argument("--work-dir", type=Path, default=Path("runs/build-emoji/work"), help="downloads and progress")
    p.add_argument("--out-dir", type=Path, default=Path("runs/build-emoji/out"), help="the assets")
    p.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    p.add_argument("--scale", type=float, default=1.0, help="multiplies every number of steps (default 1)")
    p.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's choice)")
    p.add_argument("--seed", type=int, default=0)
    return p


def run(arguments: argparse.Namespace) -> None:
    """The stages asked for, in their own order."""
    import torch
    from build_emoji import clip, data, evaluate, flow, head, preferences, unet, vae
    from build_emoji.common import Build, BuildError, written_atomically

    from diffusion_align.assets import asset_path

    if not arguments.scale > 0:
        raise BuildError(f"--scale is {arguments.scale}: give a number above 0")
    if arguments.threads is not None and arguments.threads < 1:
        raise BuildError(f"--threads is {arguments.threads}: give at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise BuildError("--device is cuda and PyTorch sees no GPU: use --device cpu")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    cuda = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    build = Build(
        work=arguments.work_dir,
        out=arguments.out_dir,
        device=torch.device("cuda" if cuda else "cpu"),
        scale=arguments.scale,
        seed=arguments.seed,
        concepts=asset_path("emoji-concepts"),
    )
    settings = {"scale": build.scale, "seed": build.seed}
    kept = build.work / "settings.json"
    try:
        build.out.mkdir(parents=True, exist_ok=True)
        build.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot create {error.filename}: {error.strerror}; choose another folder") from error
    begun = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
    if begun is not None and json.loads(begun) != settings:
        raise BuildError(f"{build.work} was begun with {begun}: pass the same, or another --work-dir")
    with written_atomically(kept) as temporary:
        temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")
    functions = {
        "data": data.build_data,
        "vae": vae.build_vae,
        "clip": clip.build_clip,
        "unet": unet.build_unet,
        "flow": flow.build_flow,
        "preferences": preferences.build_preferences,
        "head": head.build_head,
        "evaluate": evaluate.build_evaluation,
    }
    for stage in STAGES:
        if stage in arguments.stages:
            began = time.monotonic()
            functions[stage](build)
            print(f"{stage}: {time.monotonic() - began:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    from build_emoji.common import BuildError

    try:
        run(arguments)
    except BuildError as error:
        print(f"build_emoji_sd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("build_emoji_sd: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
