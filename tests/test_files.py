"""A file is replaced whole or stays as it was."""

import os

import pytest

from lightning_attention.files import replacing, write


@pytest.mark.parametrize("content", ["naïve 文", b"\0\xff"], ids=["text", "bytes"])
def test_a_file_is_created_and_replaced(tmp_path, content):
    path = tmp_path / "file"
    for new in (type(content)(), content):
        write(path, new)
        assert path.read_bytes() == (new.encode() if isinstance(new, str) else new)
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write(path, "old")

    def fail() -> None:
        with replacing(path) as file:
            file.write("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_lines_of_a_file_are_written_as_they_are(tmp_path):
    write(tmp_path / "file", "a\r\nb\nc\r")
    assert (tmp_path / "file").read_bytes() == b"a\r\nb\nc\r"
