"""Uploading a folder to the Hugging Face Hub."""

from __future__ import annotations

import json
import os
from pathlib import Path

from diffusion_align.errors import UserError, first_line
from diffusion_align.writing import write_text


def upload(folder: Path, repo_id: str, *, private: bool, token: str | None) -> str:
    """Put all files of ``folder`` into the model repository ``repo_id`` and return its address.

    Args:
        folder: what to upload.
        repo_id: "owner/name"; made if it is not there.
        private: whether a new repository is private.
        token: of the hub; the stored one if not given.

    Raises:
        UserError: the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    _leave_out_places(folder)
    api = HfApi(token=token)
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True, repo_type="model")
        message = "Upload with diffusion-align"
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), repo_type="model", commit_message=message)
    except Exception as error:  # of which kinds, depends on the library that speaks HTTP for the hub's client
        raise UserError(f"repo_id={repo_id!r} could not be uploaded to: {first_line(error)}") from error
    return str(address)


def _leave_out_places(folder: Path) -> None:
    """Folders of this machine, which diffusers writes into the configurations of what was loaded from them."""
    for file in folder.rglob("*.json"):
        settings = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(settings, dict) and os.path.isabs(str(settings.get("_name_or_path", ""))):
            del settings["_name_or_path"]
            write_text(file, json.dumps(settings, indent=2) + "\n")
