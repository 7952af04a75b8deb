"""Temporary files of programs: in a folder of their own, which no program leaves behind for long."""

import os
import tempfile
import time

import pytest
import tensorflow as tf

from tf_repvgg import storage, temporary_files
from tf_repvgg.layers import RepVGGBlock


def convert():
    """Has AutoGraph convert a function, which leaves a temporary file."""
    tf.autograph.to_graph(lambda number: number + 1)


def test_files_of_autograph_go_with_their_program(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    default = tempfile.gettempdir()
    with pytest.raises(RuntimeError), temporary_files.use_own_folder() as folder:
        convert()
        assert folder.parent == tmp_path and list(folder.glob("__autograph_generated_file*"))
        raise RuntimeError
    assert not list(tmp_path.iterdir()) and tempfile.gettempdir() == default


def test_functions_of_the_library_are_not_rewritten():
    with temporary_files.use_own_folder() as folder, tf.Graph().as_default():
        RepVGGBlock(4, norm="oabn")(tf.zeros([1, 8, 8, 4]), training=True)
        assert not list(folder.glob("__autograph_generated_file*"))


def test_only_folders_of_killed_programs_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with temporary_files.use_own_folder() as folder:
        prefix = folder.name[: -len("12345678")]
        assert prefix.endswith("-")
        names = {"killed", "killed_at_once", "running", "starting"}
        for name in names:
            (tmp_path / f"{prefix}{name}").mkdir()
        (tmp_path / f"{prefix}killed" / ".lock").write_text("123456789\n")
        storage.claim_folder(tmp_path / f"{prefix}running")
        (tmp_path / f"{prefix}link").symlink_to(tmp_path / "precious")
        (tmp_path / "precious").mkdir()
        for name in names - {"starting"}:
            os.utime(tmp_path / f"{prefix}{name}", (time.time() - 60,) * 2)
        with temporary_files.use_own_folder():
            pass
        names = {path.name.removeprefix(prefix) for path in tmp_path.iterdir()} - {folder.name.removeprefix(prefix)}
    assert names == {"running", "starting", "link", "precious"}


@pytest.mark.parametrize("folder", ["missing", "file"])
def test_a_useless_tmpdir_is_refused_at_the_start(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TMPDIR", str(tmp_path / folder))
    message = rf"^temporary files cannot be written to '.*/{folder}' \(.*\); set the environment variable TMPDIR to a"
    with pytest.raises(PermissionError, match=message), temporary_files.use_own_folder():
        pass
