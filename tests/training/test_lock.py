"""One run at a time in a folder."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from diffusion_align import folder_lock
from diffusion_align.errors import UserError
from diffusion_align.folder_lock import LOCK_FILE, FolderLock, check_not_in_use
from diffusion_align.writing import WriteError

HOLD = """
import sys, time
from pathlib import Path
from diffusion_align.folder_lock import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_one_is_told_who_holds_it_and_a_killed_one_blocks_nobody(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        wanted = f"{str(tmp_path)!r} is in use by process {holder.pid} on {socket.gethostname()}: wait until it ends"
        for _ in range(2):  # looking and trying leave it as it is
            with pytest.raises(UserError, match=f"^{re.escape(wanted)}"):
                check_not_in_use(tmp_path)
            with pytest.raises(UserError, match=f"^{re.escape(wanted)}"), FolderLock(tmp_path):
                pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    assert (tmp_path / LOCK_FILE).is_file()  # what it left behind
    check_not_in_use(tmp_path)
    with FolderLock(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"):
        check_not_in_use(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_forked_child_does_not_keep_it(tmp_path):
    with FolderLock(tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_forked_child_that_goes_on_ends_only_its_own(tmp_path):
    """It leaves the block of its parent, whose file's number may by then be another file's."""
    reader, writer = os.pipe()
    with FolderLock(tmp_path):
        child = os.fork()
        if child:
            os.close(writer)
            said = os.read(reader, 1000)
            os.waitpid(child, 0)
            with pytest.raises(UserError):
                check_not_in_use(tmp_path)
            assert (tmp_path / LOCK_FILE).is_file()
        else:
            reused = os.dup(writer)
    if not child:
        try:
            os.write(reused, b"still open")
        finally:
            os._exit(0)
    os.close(reader)
    assert said == b"still open"
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def unsupported(descriptor, *, shared=False):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock, "_lock", unsupported)
    with FolderLock(tmp_path):
        check_not_in_use(tmp_path)
        said = capsys.readouterr().err
        assert said.startswith(f"warning: {tmp_path}: its file system has no locks (No locks available): make sure")
        assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_moved_meanwhile_loses_only_its_own_lock(tmp_path):
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run"):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        with FolderLock(tmp_path / "run"):
            pass


def test_without_room_for_it_nothing_is_left_or_held(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(folder_lock.os, "write", full)
        with pytest.raises(WriteError, match=r"\.lock cannot be written \(No space left"), FolderLock(tmp_path):
            pass
    assert not list(tmp_path.iterdir())
    with FolderLock(tmp_path):
        pass
