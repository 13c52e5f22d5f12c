"""The command line. Every command is a few lines over the Python entry points; errors are one sentence and exit 2."""

from diffusion_align.cli.commands import app, serve_reward
from diffusion_align.cli.entry import main

__all__ = ["app", "main", "serve_reward"]
