"""A file is replaced atomically."""

import os
from errno import ENOSPC
from pathlib import Path

import pytest

from lightning_attention.files import replacing, writable_folder, write


@pytest.mark.parametrize("content", ["naïve 文", b"\0\xff"], ids=["text", "bytes"])
def test_a_file_is_created_and_replaced(tmp_path, content):
    path = tmp_path / "file"
    for new in (type(content)(), content):
        write(path, new)
        assert path.read_bytes() == (new.encode() if isinstance(new, str) else new)
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_content_and_no_other_file(tmp_path):
    path = tmp_path / "file"
    write(path, "old")

    def fail() -> None:
        with replacing(path) as file:
            file.write("unfinished")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_line_ends_are_written_unchanged(tmp_path):
    write(tmp_path / "file", "a\r\nb\nc\r")
    assert (tmp_path / "file").read_bytes() == b"a\r\nb\nc\r"


@pytest.mark.parametrize("named", [(), ("another file",)], ids=["no file named", "another file named"])
def test_a_system_error_names_the_file(tmp_path, named):
    with pytest.raises(OSError, match="No space left") as raised, replacing(tmp_path / "file"):
        raise OSError(ENOSPC, "No space left on device", *named)
    assert raised.value.filename == (named[0] if named else str(tmp_path / "file"))


def use_folder(folder: Path, *, fails: bool, writes: bool = False) -> None:
    with writable_folder(folder) as made:
        assert made == folder
        assert folder.is_dir()
        if writes:
            (folder / "file").touch()
        if fails:
            raise KeyboardInterrupt


@pytest.mark.parametrize("writes", [False, True], ids=["empty", "with a file"])
@pytest.mark.parametrize("existed", [False, True], ids=["new", "existing"])
def test_an_error_removes_only_a_new_and_empty_folder(tmp_path, existed, writes):
    folder = tmp_path / "a" / "b"
    if existed:
        folder.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        use_folder(folder, fails=True, writes=writes)
    assert folder.exists() == (existed or writes)
    assert folder.parent.exists() == (existed or writes)


def test_a_folder_is_created_and_kept_without_an_error(tmp_path):
    use_folder(tmp_path / "a" / "b", fails=False)
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/a", 300 * "a"], ids=["a file", "in a file", "too long"])
def test_a_folder_that_cannot_be_created_is_named(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to this folder"):
        use_folder(tmp_path / name, fails=False)
    assert os.listdir(tmp_path) == ["file"]
