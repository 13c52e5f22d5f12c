"""``python -m diffusion_align`` and ``accelerate launch -m diffusion_align``."""

from diffusion_align.cli import main

if __name__ == "__main__":
    main()
