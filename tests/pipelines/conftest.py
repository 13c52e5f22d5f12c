"""A Hub that takes uploads into a folder."""

import pytest


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What was asked of the hub; the folder uploaded is copied to tmp_path/hub."""
    import shutil

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return f"https://example.org/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "hub", dirs_exist_ok=True)
            calls.append(("upload", repo_id, options["repo_type"]))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return calls
