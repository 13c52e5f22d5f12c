"""Stages of ``scripts/build_emoji_sd.py``, one per file: each writes its result atomically."""
