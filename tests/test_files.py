from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap

import pytest

from fastbert.errors import InputError
from fastbert.files import atomic_write, writing_failed


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_text_is_written_as_it_is(tmp_path):
    path = tmp_path / "text.txt"
    with atomic_write(path) as file:
        file.write("Wal\u2028fisch\nändern\r\n")
    assert path.read_bytes() == "Wal\u2028fisch\nändern\r\n".encode()
    assert names(tmp_path) == ["text.txt"]


def test_bytes_are_written_as_they_are(tmp_path):
    path = tmp_path / "bytes"
    with atomic_write(str(path), "wb") as file:
        file.write(b"\x00\xff\r\n")
    assert path.read_bytes() == b"\x00\xff\r\n"


def test_the_name_appears_only_at_the_end(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("before")
    with atomic_write(path) as file:
        file.write("after")
        file.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("before")
    with pytest.raises(KeyError), atomic_write(path) as file:
        file.write("half of it")
        raise KeyError
    assert path.read_text() == "before"
    assert names(tmp_path) == ["text.txt"]


def test_the_bytes_are_on_disk_before_the_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    with atomic_write(tmp_path / "text.txt") as file:
        file.write("text")
    assert calls == ["fsync", "replace", "fsync"]


def test_a_missing_folder_is_one_line(tmp_path):
    path = tmp_path / "nowhere" / "text.txt"
    with pytest.raises(InputError) as error, atomic_write(path):
        pass
    assert str(error.value) == f"{path}: cannot write: No such file or directory"


def test_a_folder_in_the_way_is_one_line(tmp_path):
    path = tmp_path / "text.txt"
    path.mkdir()
    with pytest.raises(InputError, match="cannot write: Is a directory"), atomic_write(path):
        pass
    assert names(tmp_path) == ["text.txt"]


def test_no_space_left_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("before")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left") as error, atomic_write(path) as file:
        file.write("after")
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")
    assert path.read_text() == "before"
    assert names(tmp_path) == ["text.txt"]


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path, root):
    pytest.importorskip("resource", reason="needs a limit on file sizes")
    (tmp_path / "text.txt").write_text("before")
    program = """
        import resource
        from fastbert.errors import InputError
        from fastbert.files import atomic_write
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with atomic_write("text.txt") as file:
                file.write("x" * 1_000_000)
        except InputError as error:
            print(error)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == "text.txt: cannot write: File too large\n"
    assert (tmp_path / "text.txt").read_text() == "before"
    assert names(tmp_path) == ["text.txt"]


def test_the_line_names_the_file():
    error = writing_failed("runs/x", PermissionError(errno.EACCES, "Permission denied"))
    assert isinstance(error, ValueError)
    assert str(error) == "runs/x: cannot write: Permission denied"
