"""A text corpus that anyone can get: documentation in Debian's packages, cleaned, without repetitions.

`apt-get download` fetches the packages of the release that runs, as any user; nothing is installed. Texts keep the
licences of their packages, whose copyright files are copied; a package may share that of another, which is then named.
"""

import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from lightning_attention.files import replacing, writable_folder, write

# Packages of Debian 12, section main, with much text in English for their size; other releases have other versions.
PACKAGES = (
    "anarchism",
    "cppreference-doc-en-html",
    "debian-handbook",
    "debian-reference-en",
    "dict-foldoc",
    "dict-gcide",
    "dict-jargon",
    "dict-wn",
    "erlang-doc",
    "ghc-doc",
    "gimp-help-en",
    "libboost1.81-doc",
    "libreoffice-help-en-us",
    "lilypond-doc-html",
    "linux-doc-6.1",
    "openjdk-17-doc",
    "perl-doc",
    "postgresql-doc-15",
    "python-astropy-doc",
    "python-scipy-doc",
    "python-statsmodels-doc",
    "python-sympy-doc",
    "python3.11-doc",
    "racket-doc",
    "rust-doc",
    "twisted-doc",
)
# Shares of the documents. A document belongs to a split by the hash of its text.
SPLITS = {"test": 0.01, "validation": 0.01, "train": 0.98}

LEAST_CHARACTERS, MOST_CHARACTERS = 500, 1 << 20  # of a document; longer ones are cut
LONG = 80  # characters of a block that may come once; a shorter one may come REPEATS times
REPEATS = 20
# A document is English prose if these are a share LEAST_COMMON of its words.
COMMON_WORDS = set(
    re.findall(
        r"\w+",
        """
        a all also an and any are as at be but by can do for from has have if in is it its may must no not of on one
        only or other same so such than that the their then there these they this to use used using was we when where
        which will with would you your
        """,
    )
)
LEAST_COMMON = 0.2

MANIFEST = "manifest.json"
PAGES = {".html", ".htm", ".xhtml"}
PLAIN = {".txt", ".rst", ".md", ".pod", ".dict", ""}
SKIPPED_NAMES = re.compile(r"(?i)copyright|changelog|changes|news|authors|credits|thanks")

_DROPPED = re.compile(
    r"<!--.*?-->|<(head|nav|script|style|svg|math|form|footer|button|template|noscript|select)\b.*?</\1\s*>",
    re.S | re.I,
)
_CODE = re.compile(r"(<pre\b.*?</pre\s*>)", re.S | re.I)
_BLOCK = re.compile(
    r"</?(?:address|article|aside|blockquote|br|caption|center|d[dlt]|details|div|fieldset|figcaption|figure|h[1-6]|header|"
    r"hr|legend|li|main|ol|option|p|section|summary|table|tbody|td|tfoot|th|thead|title|tr|ul)\b[^>]*>",
    re.I,
)
_TAG = re.compile(r"<[^>]*>")


@dataclass(frozen=True)
class Package:
    """Text of a package.

    Attributes:
        name: its name.
        version: its version.
        sha256: hash of its file.
        copyright: text of its copyright file, or a line that names the package whose file it shares.
        documents: path of every document in the package, and its blocks: paragraphs, items, lines of code.
    """

    name: str
    version: str
    sha256: str
    copyright: str
    documents: list[tuple[str, list[str]]]


@dataclass
class Counts:
    """Documents, bytes and words of a part of the corpus."""

    documents: int = 0
    bytes: int = 0
    words: int = 0

    def add(self, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode())
        self.words += len(text.split())

    def __str__(self) -> str:
        return f"{self.bytes / 1e6:.1f} MB, {self.words:,} words, {self.documents:,} documents"


def build(output: Path, packages: Sequence[str], echo: Callable[[str], None]) -> None:
    """Download packages and write a corpus of their documentation.

    Args:
        output: folder for `train.jsonl`, `validation.jsonl` and `test.jsonl`, with a text and its source a line;
            `licences/`, the copyright file of every package; and `manifest.json`, their versions and sizes.
        packages: names of Debian packages.
        echo: prints a line.

    Raises:
        OSError: apt-get is missing or fails, or a file cannot be written.
        ValueError: a name is not that of a package, or the packages hold no such text.
    """
    if wrong := [name for name in packages if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name)]:
        raise ValueError(f"{wrong[0]!r} is not the name of a Debian package")
    with writable_folder(output), tempfile.TemporaryDirectory() as folder:
        files = download(packages, Path(folder))
        seen: Counter[int] = Counter()
        splits = {name: Counts() for name in SPLITS}
        licences, manifest = {}, []
        with ExitStack() as stack:
            written = {name: stack.enter_context(replacing(output / f"{name}.jsonl")) for name in SPLITS}
            # Not forked: other packages have threads, whose locks a worker would wait for.
            workers = stack.enter_context(ProcessPoolExecutor(mp_context=get_context("spawn")))
            for package in workers.map(read_package, files):
                kept = Counts()
                for source, text in distinct_texts(package, seen):
                    split = split_of(text)
                    for counts in (kept, splits[split]):
                        counts.add(text)
                    written[split].write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
                about = {"package": package.name, "version": package.version, "sha256": package.sha256}
                manifest.append(about | asdict(kept))
                licences[package.name] = package.copyright
                echo(f"{package.name} {package.version}: {kept}")
            if empty := [name for name, counts in splits.items() if not counts.documents]:
                raise ValueError(f"the packages hold too little English text for {', '.join(empty)}: name more")
        (output / "licences").mkdir(exist_ok=True)
        for name, text in licences.items():
            write(output / "licences" / name, text)
        content = {"splits": {name: asdict(counts) for name, counts in splits.items()}, "packages": manifest}
        write(output / MANIFEST, json.dumps(content, indent=1) + "\n")
        for name, counts in splits.items():
            echo(f"{name}: {counts}")


def read_splits(folder: Path) -> dict[str, dict[str, int]]:
    """Sizes of the splits of a corpus: `documents`, `bytes` and `words` by name.

    Raises:
        ValueError: there is no corpus in the folder.
    """
    try:
        return json.loads((folder / MANIFEST).read_text())["splits"]
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no corpus in {folder}: make one with `python -m benchmarks paper corpus`"
        ) from error


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """Files of packages, in their order."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise OSError("the corpus is made of Debian's packages: apt-get and dpkg-deb are needed")
    done = subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"apt-get download failed: {' '.join(done.stderr.split())}")
    return [next(folder.glob(f"{name}_*.deb")) for name in packages]


def read_package(file: Path) -> Package:
    """Read the documents of a package."""
    fields = subprocess.run(
        ["dpkg-deb", "--field", file, "Package", "Version"], capture_output=True, text=True, check=True
    )
    name, version = (line.split(": ", 1)[1] for line in fields.stdout.splitlines())
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", file, folder], check=True)
        root = Path(folder)
        documents = []
        for path in sorted(root.rglob("*")):
            kind = Path(path.name.removesuffix(".gz").removesuffix(".dz")).suffix.lower()
            if path.is_symlink() or not path.is_file() or SKIPPED_NAMES.match(path.name):
                continue
            if (text := read_text(path) if kind in PAGES | PLAIN else None) is not None:
                blocks = page_blocks(text) if kind in PAGES else plain_blocks(text)
                documents.append((str(path.relative_to(root)), blocks))
        about = root / "usr/share/doc" / name
        if (about / "copyright").is_file():
            copyright = (about / "copyright").read_text(errors="replace")
        else:  # a link to the folder of another package
            copyright = f"the copyright file of {about.readlink().name}\n"
    return Package(name, version, hashlib.sha256(file.read_bytes()).hexdigest(), copyright, documents)


def read_text(path: Path) -> str | None:
    """Text of a file; None if it is not text, or damaged. Bytes that are not UTF-8 become U+FFFD."""
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return None
    return None if b"\0" in content else content.decode("utf-8-sig", errors="replace")


def page_blocks(page: str) -> list[str]:
    """Blocks of text of an HTML page, without its head, menus and forms; code keeps its lines."""
    blocks = []
    for i, part in enumerate(_CODE.split(_DROPPED.sub(" ", page))):
        if i % 2:
            blocks.append(html.unescape(_TAG.sub("", part)).strip("\n"))
        else:
            blocks += (" ".join(html.unescape(_TAG.sub("", block)).split()) for block in _BLOCK.split(part))
    return [cleaned for block in blocks if (cleaned := block.replace("¶", "").rstrip())]


def plain_blocks(text: str) -> list[str]:
    """Paragraphs of plain text."""
    return [block.strip("\n") for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")) if block.strip()]


def distinct_texts(package: Package, seen: Counter[int]) -> Iterator[tuple[str, str]]:
    """Source and text of every document of English prose, without blocks that came before.

    Args:
        package: the package.
        seen: number of times that each block came, by its hash; counts on.
    """
    for source, blocks in package.documents:
        kept = []
        for block in blocks:
            key = int.from_bytes(hashlib.blake2b(block.encode(), digest_size=8).digest(), "big")
            seen[key] += 1
            if seen[key] <= (1 if len(block) >= LONG else REPEATS):
                kept.append(block)
        for text in _pieces("\n".join(kept)):
            if len(text) >= LEAST_CHARACTERS and is_prose(text):
                yield f"{package.name}/{source}", text


def is_prose(text: str) -> bool:
    """True if a fifth of the words are the commonest of English."""
    words = re.findall(r"[a-z]+", text.lower())
    return sum(word in COMMON_WORDS for word in words) >= LEAST_COMMON * len(words) > 0


def split_of(text: str) -> str:
    """Split of a document, by the hash of its text."""
    point = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    for name, share in SPLITS.items():
        if point < share:
            return name
        point -= share
    return "train"


def _pieces(text: str) -> Iterator[str]:
    """A text, cut after a line where it exceeds the largest size."""
    while len(text) > MOST_CHARACTERS:
        end = text.rfind("\n", 0, MOST_CHARACTERS) + 1 or MOST_CHARACTERS
        yield text[:end]
        text = text[end:]
    yield text
