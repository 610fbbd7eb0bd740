"""Source files: search, formats and errors."""

import bz2
import gzip
import json
import lzma
import os
import re
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_attention.training.documents import Sources, standard_library

LINES = '{"text": "one"}\n\n{"text": "two\\nlines", "id": ' + "1" * 5000 + "}\n"
DOCUMENTS = ["one", "two\nlines"]


def texts(*paths: Path, text_field: str = "text", **options) -> list[str]:
    return ["".join(parts) for parts in Sources.find(paths, text_field, **options).documents()]


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".")).write_bytes(text.encode())
    return folder


def zstd(*parts: bytes) -> bytes:
    """Compress each part to a frame."""
    zstandard = pytest.importorskip("zstandard", reason="needs zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


# Name and content of a file, and its documents.
FILES: dict[str, tuple[str, Callable[[], bytes], list[str]]] = {
    "text": ("a.txt", lambda: "naïve\n".encode(), ["naïve\n"]),
    "code": ("a.py", lambda: b"pass", ["pass"]),
    "no suffix": ("LICENSE", lambda: b"free", ["free"]),
    "empty": ("a.txt", lambda: b"", [""]),
    "byte order mark": ("a.txt", lambda: b"\xef\xbb\xbfa\xef\xbb\xbfb", ["a\ufeffb"]),
    "CRLF and CR": ("a.txt", lambda: b"a\r\nb\rc\n", ["a\r\nb\rc\n"]),
    "lines": ("a.jsonl", LINES.encode, DOCUMENTS),
    "lines, capitals": ("A.JSONL", LINES.encode, DOCUMENTS),
    "lines, another suffix": ("a.ndjson", LINES.encode, DOCUMENTS),
    "lines, byte order mark": ("a.jsonl", lambda: b"\xef\xbb\xbf" + LINES.encode(), DOCUMENTS),
    "lines, CRLF": ("a.jsonl", lambda: LINES.replace("\n", "\r\n").encode(), DOCUMENTS),
    "lines, CR": ("a.jsonl", lambda: LINES.replace("\n", "\r").encode(), DOCUMENTS),
    "lines, no last end": ("a.jsonl", lambda: LINES.rstrip().encode(), DOCUMENTS),
    "lines, separators within": ("a.jsonl", lambda: '{"text": "a\u2028b\x85c"}'.encode(), ["a\u2028b\x85c"]),
    "lines, lone surrogate": ("a.jsonl", lambda: b'{"text": "a\\ud800b"}', ["a\ufffdb"]),
    "lines, long": ("a.jsonl", lambda: json.dumps({"text": "é" * 3_000_000}).encode(), ["é" * 3_000_000]),
    "text, gzip": ("a.txt.gz", lambda: gzip.compress(b"x" * 999_999), ["x" * 999_999]),
    "text, gzip, two members": ("a.gz", lambda: gzip.compress(b"one") + gzip.compress(b"two"), ["onetwo"]),
    "lines, gzip": ("a.jsonl.gz", lambda: gzip.compress(LINES.encode()), DOCUMENTS),
    "lines, gzip, capitals": ("A.NDJSON.GZ", lambda: gzip.compress(LINES.encode()), DOCUMENTS),
    "lines, bzip2": ("a.jsonl.bz2", lambda: bz2.compress(LINES.encode()), DOCUMENTS),
    "lines, xz": ("a.jsonl.xz", lambda: lzma.compress(LINES.encode()), DOCUMENTS),
    "lines, zstandard": ("a.jsonl.zst", lambda: zstd(LINES.encode()), DOCUMENTS),
    "text, zstandard, frames": ("a.zst", lambda: zstd(b"one" * 99_999, b"", b"two"), ["one" * 99_999 + "two"]),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
@pytest.mark.parametrize(("name", "content", "expected"), FILES.values(), ids=FILES)
def test_a_file_gives_its_documents(tmp_path, name, content, expected, named):
    (tmp_path / name).write_bytes(content())
    assert texts(tmp_path / name if named else tmp_path) == expected


@pytest.mark.parametrize("text_type", ["string", "large_string", "dictionary"])
def test_a_parquet_row_is_a_document(tmp_path, text_type):
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    rows = [f"text {i}" for i in range(1000)]
    kinds = {"string": pyarrow.string(), "large_string": pyarrow.large_string()}
    column = pyarrow.array(rows, kinds.get(text_type, pyarrow.string()))
    column = column.dictionary_encode() if text_type == "dictionary" else column
    parquet.write_table(pyarrow.table({"id": range(1000), "body": column}), tmp_path / "a.PARQUET", row_group_size=300)
    assert texts(tmp_path, text_field="body") == rows
    with pytest.raises(ValueError, match=r"a.PARQUET has no column 'text' or 'messages', but 'id', 'body'$"):
        Sources.find(tmp_path)
    for field in ("id", "empty"):
        table = pyarrow.table({"id": [1, 2], "empty": ["a", None]})
        parquet.write_table(table, tmp_path / "a.PARQUET")
        with pytest.raises(ValueError, match=rf"a.PARQUET, row \d: no text in '{field}'$"):
            texts(tmp_path, text_field=field)


@pytest.mark.parametrize("line", ["not json", '{"body": "x"}', '{"text": 3}', '["text"]', "3", "[" * 100_000])
@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson.gz"])
def test_an_invalid_line_is_named(tmp_path, line, name):
    content = ('{"text": "fine"}\n' + line + "\n").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"{name}, line 2: not a JSON object with a text in 'text'$"):
        texts(tmp_path / name)


# Name and content of a file, and the error.
DAMAGED: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "gzip, cut off": ("a.gz", lambda: gzip.compress(os.urandom(9999).hex().encode())[:-100], "a.gz is damaged"),
    "gzip, flipped": ("a.gz", lambda: gzip.compress(b"text" * 9)[:-8] + bytes(8), "a.gz is damaged"),
    "gzip in name only": ("a.gz", lambda: b"text", "a.gz is damaged, or not what its name says"),
    "bzip2, cut off": ("a.bz2", lambda: bz2.compress(b"text" * 99)[:-9], "a.bz2 is damaged"),
    "bzip2 in name only": ("a.bz2", lambda: b"text", "a.bz2 is damaged, or not what its name says"),
    "xz, cut off": ("a.xz", lambda: lzma.compress(b"text" * 99)[:-9], "a.xz is damaged"),
    "xz in name only": ("a.xz", lambda: b"text", "a.xz is damaged, or not what its name says"),
    "zstandard, cut off": (
        "a.zst",
        lambda: zstd(b"text", os.urandom(999_999).hex().encode())[:-99_999],
        "a.zst is damaged",
    ),
    "zstandard in name only": ("a.zst", lambda: zstd(b"")[:0] + b"text", "a.zst is damaged, or not what its"),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
@pytest.mark.parametrize(("name", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named(tmp_path, name, content, message, named):
    (tmp_path / "fine.txt").write_text("fine")
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / name if named else tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(ValueError, match=r"a.parquet is damaged, or not what its name says"):
        Sources.find(tmp_path)


@pytest.mark.parametrize(
    ("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")], ids=["parquet", "zstandard"]
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"some")
    for module in (package, "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    message = f"{tmp_path / name}: {package} not installed: run pip install 'lightning-attention[data]'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        Sources.find(tmp_path)


def test_folders_are_searched_and_skipped_files_counted(tmp_path):
    folder = write(tmp_path / "data", a_txt="one", b_py="two", c_jsonl='{"text": "three"}\n\n{"text": "four"}\n')
    (folder / "binary").write_bytes(b"\x00\x01")
    (folder / "latin").write_bytes("é".encode("latin-1"))
    (folder / "utf16").write_text("text", encoding="utf-16")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "itself").symlink_to("itself")
    write(folder / "tests", test_py="six")
    write(folder / "__pycache__", x_txt="no")
    write(folder / ".git", HEAD="hidden")
    alone = write(tmp_path / "more", d_txt="five") / "d.txt"
    sources = Sources.find([folder, alone])
    assert sorted("".join(parts) for parts in sources.documents()) == ["five", "four", "one", "six", "three", "two"]
    assert sources.skipped == {
        "not UTF-8 text": 3,
        "dangling links": 2,
        "hidden": 1,
        "caches, packages and the like": 1,
    }
    assert sources.describe_skipped() == (
        "skipped files and folders: 1 caches, packages and the like, 2 dangling links, 1 hidden, 3 not UTF-8 text"
    )
    assert Sources.find(alone).describe_skipped() == ""
    assert len(Sources.find([folder, alone], without=["tests"]).files) == len(sources.files) - 1
    assert Sources.find([folder, alone], seed=1).files != sources.files


@pytest.mark.parametrize(
    "again",
    ["data/a.txt", "data", "data/../data/a.txt", "data/link.txt", "hard.txt", "folder", "folder/a.txt"],
)
@pytest.mark.parametrize("reverse", [False, True], ids=["first", "last"])
def test_a_file_found_by_several_paths_is_read_once(tmp_path, again, reverse):
    data = write(tmp_path / "data", a_txt="some text")
    (data / "link.txt").symlink_to("a.txt")
    (tmp_path / "hard.txt").hardlink_to(data / "a.txt")
    (tmp_path / "folder").symlink_to(data)
    paths = [data, tmp_path / again]
    sources = Sources.find(paths[::-1] if reverse else paths)
    assert ["".join(parts) for parts in sources.documents()] == ["some text"]
    assert sources.skipped["found twice"] > 0


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    data = write(tmp_path / "data", a_txt="one")
    elsewhere = write(tmp_path / "elsewhere" / "deep", b_txt="two")
    (data / "elsewhere").symlink_to(elsewhere.parent)
    (elsewhere / "back").symlink_to(data)
    (elsewhere / "here").symlink_to(".")
    sources = Sources.find(data)
    assert sorted("".join(parts) for parts in sources.documents()) == ["one", "two"]
    assert sources.skipped == {"found twice": 2}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(os.path.relpath(path))  # the path of a socket has at most 107 bytes


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
@pytest.mark.parametrize("create", [fifo, unix_socket, device])
def test_special_files_are_refused_and_not_opened(tmp_path, monkeypatch, create, named):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, a_txt="one")
    create(tmp_path / "special")
    with pytest.raises(ValueError, match="special is not a regular file but a FIFO, socket or device: copy"):
        Sources.find(tmp_path / "special" if named else tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "there is no file or folder .*missing: it does not exist"),
        ("dangling", Path("nowhere"), "there is no file or folder .*dangling: it is a dangling link"),
        ("latin.txt", "é".encode("latin-1"), "latin.txt is not UTF-8 text"),
        ("latin.jsonl.gz", gzip.compress("é".encode("latin-1"), mtime=0), "latin.jsonl.gz is not UTF-8 text"),
        ("utf16.txt", "text".encode("utf-16"), "utf16.txt is not UTF-8 text"),
        ("zero.txt", b"a\x00b", "zero.txt is not UTF-8 text"),
        ("folder", "folder", "no text files found"),
    ],
)
@pytest.mark.parametrize("parent_too", [False, True], ids=["alone", "after its folder"])
def test_an_unusable_path_is_named(tmp_path, name, content, message, parent_too):
    path = tmp_path / "data" / name
    path.parent.mkdir()
    if content == "folder":
        path.mkdir()
    elif isinstance(content, Path):
        path.symlink_to(content)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Sources.find([path.parent, path] if parent_too else path)


def test_an_empty_search_reports_skipped_files(tmp_path):
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"no text files found; skipped files and folders: 1 dangling links$"):
        Sources.find(tmp_path)


def test_a_file_that_is_damaged_after_the_search_is_named(tmp_path):
    sources = Sources((write(tmp_path, a_txt="x") / "a.txt",))
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text"):
        list(next(sources.documents()))


LATE = b"\xe2\x82\xac" * 50_000  # more text than the search reads


@pytest.mark.parametrize("end", [b"\xff", b"\0", b"\xe2\x82"], ids=["not UTF-8", "NUL", "half a character"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_the_end_of_a_file_is_checked_when_it_is_read(tmp_path, name, end):
    content = b'{"text": "fine"}\n{"text": "' + LATE + end if name == "a.jsonl" else LATE + end
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    named, found = Sources.find(tmp_path / name), Sources.find(tmp_path)
    assert named.files == found.files == (tmp_path / name,)
    assert (named.optional, found.optional) == (frozenset(), {tmp_path / name})
    assert Sources.find([tmp_path, tmp_path / name]).optional == Sources.find([tmp_path / name, tmp_path]).optional
    assert not Sources.find([tmp_path, tmp_path / name]).optional
    for sources in (named, found):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / name))} is not UTF-8 text$"):
            ["".join(parts) for parts in sources.documents()]


def test_the_standard_library_has_text_files():
    assert len(Sources.find([standard_library()]).files) > 100
