"""Stages of ``scripts/build_emoji_sd.py``, one a file: each writes its result aside and renames it when it is whole."""
