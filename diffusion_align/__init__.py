"""Align diffusion models (and text policies) with rewards and preferences."""

__version__ = "0.1.0"
