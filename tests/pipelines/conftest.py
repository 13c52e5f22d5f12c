"""No report, an Accelerator for each test, and a Hub that takes uploads into a folder."""

import shutil
import sys

import pytest


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("diffusion_align.report.write_report", lambda folder: None)
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What was asked of the Hub; the folder uploaded is copied to tmp_path/hub."""
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
