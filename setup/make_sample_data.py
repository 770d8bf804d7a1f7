"""Writes real English and code to train on, with no download: the standard library of the Python that runs this.

    python setup/make_sample_data.py              # data/sample/stdlib/stdlib.{chunk.00 .. chunk.03,val}.jsonl
    python setup/make_sample_data.py --out DIR    # DIR/stdlib/...

A line is {"text": ..., "source": "json/decoder.py"}. The texts are module sources, the docstrings of each module
as one prose document, the topics of the language reference, and the licence. The same Python gives the same bytes
each time; another version of Python has another library, and so gives other texts.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import sys
import sysconfig
import tempfile
import tokenize
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

CHUNKS = 4
SEED = 0
MIN_CHARS, MAX_CHARS = 500, 20_000  # of a document
MIN_TRAIN_BYTES = 5_000_000
# Validation takes whole modules, in the order of their paths' hashes, until it has this much; large ones stay in
# training, so that it has many modules, and close to this size with any version of Python.
VAL_CHARS, VAL_MODULE_CHARS = 350_000, 80_000
# Module sources with a smaller share of docstrings and comments are left out, for more English in the mixture.
MIN_COMMENTED = 0.2

# Tests (Debian has none), code pages, tables of Windows installers, and what is not the standard library.
SKIPPED_FOLDERS = {
    "__pycache__", "_bundled", "dist-packages", "encodings", "idle_test", "lib-dynload", "msilib", "site-packages",
    "test", "tests",
}  # fmt: skip
# A text in rot13, and what an administrator may have put there.
SKIPPED_FILES = {"this.py", "sitecustomize.py", "usercustomize.py"}
GENERATED = ("config-", "_sysconfigdata")
TOPICS = "pydoc_data/topics.py"
# Of no use in a text, and some cannot be written as UTF-8.
CONTROL_CHARACTERS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


class LibraryFile(NamedTuple):
    """What one file of the library gives; `docstrings` are pairs of a heading and a docstring."""

    source: str
    code: str = ""
    docstrings: tuple[tuple[str, str], ...] = ()
    texts: tuple[str, ...] = ()

    def chars(self) -> int:
        return len(self.code) + sum(len(text) for _, text in self.docstrings) + sum(map(len, self.texts))


class Document(NamedTuple):
    source: str
    text: str
    is_prose: bool

    def line(self) -> bytes:
        return (json.dumps({"text": self.text, "source": self.source}, ensure_ascii=False) + "\n").encode()


def library_paths(library: Path) -> list[str]:
    """Paths of the modules and plain texts under `library`, relative to it and sorted."""
    paths = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(GENERATED)]
        for name in names:
            path = Path(folder, name)
            wanted = path.suffix in {".py", ".rst", ".txt"} and name not in SKIPPED_FILES
            if wanted and not name.startswith(GENERATED) and path.is_file():
                paths.append(path.relative_to(library).as_posix())
    return sorted(paths)


def docstrings_of(node: ast.AST, heading: str, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The docstrings of `node` and of the classes and functions in it, in the order of the source."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield heading, CONTROL_CHARACTERS.sub("", docstring)
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from docstrings_of(child, f"class {prefix}{child.name}", f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            signature = f"{prefix}{child.name}({ast.unparse(child.args)})"
            yield from docstrings_of(child, signature, f"{prefix}{child.name}.")
        elif isinstance(child, ast.stmt | ast.ExceptHandler):
            yield from docstrings_of(child, "", prefix)


def topics_of(tree: ast.Module) -> tuple[str, ...]:
    """The topics of the language reference, less those that are sections of longer ones."""
    tables = [node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)]
    topics = [text for table in tables for text in ast.literal_eval(table).values()]
    kept, seen = [], set()
    for topic in sorted(topics, key=lambda text: (-len(text), text)):
        paragraphs = {paragraph.strip() for paragraph in topic.split("\n\n")}
        if len(paragraphs & seen) <= len(paragraphs) / 2:
            kept.append(CONTROL_CHARACTERS.sub("", topic))
        seen |= paragraphs
    return tuple(kept)


def read_file(library: Path, source: str) -> LibraryFile:
    """Reads a file as text; never imports it (some modules do things when imported)."""
    with tokenize.open(library / source) as stream:
        text = CONTROL_CHARACTERS.sub("", stream.read())
    if not source.endswith(".py"):
        return LibraryFile(source, texts=(text,))
    tree = ast.parse(text)
    if source == TOPICS:
        return LibraryFile(source, texts=topics_of(tree))
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    docstrings = tuple(docstrings_of(tree, name))
    comments = sum(len(line.strip()) for line in text.split("\n") if line.lstrip().startswith("#"))
    is_commented = comments + sum(len(docstring) for _, docstring in docstrings) >= MIN_COMMENTED * len(text)
    return LibraryFile(source, text if is_commented else "", docstrings)


def read_library(library: Path) -> list[LibraryFile]:
    paths = library_paths(library)
    print(f"sample data: reading {len(paths)} files in {library}", flush=True)
    files = []
    for number, path in enumerate(paths, 1):
        try:
            files.append(read_file(library, path))
        except (OSError, SyntaxError, ValueError) as error:  # ValueError: not UTF-8
            print(f"sample data: leaving out {path}: {error}")
        if number % 200 == 0:
            print(f"sample data: {number} files read", flush=True)
    return files


def statement_ends(body: list[ast.stmt], lines: list[str]) -> Iterator[int]:
    """Numbers of the lines that end a statement of `body`, and within a too long class or function those of its own."""
    for statement in body:
        length = sum(map(len, lines[statement.lineno - 1 : statement.end_lineno]))
        if length > MAX_CHARS:
            yield from statement_ends(getattr(statement, "body", []), lines)
        yield statement.end_lineno


def code_pieces(code: str) -> list[str]:
    """The statements of a module, each with the comments before it."""
    lines = [line + "\n" for line in code.split("\n")]
    ends = [0, *statement_ends(ast.parse(code).body, lines), len(lines)]
    return ["".join(lines[start:end]) for start, end in pairwise(ends)]


def packed(pieces: list[str], separator: str) -> Iterator[str]:
    """Joins pieces to texts of about equal length. A piece that is too long by itself, a table, is left out."""
    pieces = [piece + separator for piece in pieces if len(piece) <= MAX_CHARS]
    total = sum(map(len, pieces))
    wanted = total / max(1, math.ceil(total / MAX_CHARS))
    text = ""
    for piece in pieces:
        if text and (len(text) + len(piece) / 2 > wanted or len(text) + len(piece) > MAX_CHARS):
            yield text
            text = ""
        text += piece
    yield text


def documents_of(file: LibraryFile, seen: set[str]) -> Iterator[Document]:
    """The documents of a file, less the docstrings and documents in `seen`, which it adds to."""

    def is_new(text: str) -> bool:
        count = len(seen)
        seen.add(" ".join(text.split()))
        return len(seen) > count

    entries = [f"{heading}\n\n{docstring}" for heading, docstring in file.docstrings if is_new(docstring)]
    prose = list(packed(entries, "\n\n"))
    for text in file.texts:
        prose += packed(text.split("\n\n"), "\n\n")
    code = packed(code_pieces(file.code), "") if len(file.code) > MAX_CHARS else [file.code]
    for texts, is_prose in ((prose, True), (code, False)):
        for text in texts:
            # The first line keeps its indentation: it may be a method's.
            text = text.strip("\n").rstrip()
            if len(text) >= MIN_CHARS and is_new(text):
                yield Document(file.source, text, is_prose)


def held_out(files: list[LibraryFile]) -> set[str]:
    """The sources whose documents are for validation."""
    chosen, chars = set(), 0
    for file in sorted(files, key=lambda file: hashlib.sha256(file.source.encode()).digest()):
        if chars < VAL_CHARS and file.chars() <= VAL_MODULE_CHARS:
            chosen.add(file.source)
            chars += file.chars()
    return chosen


def build(library: Path) -> dict[str, list[Document]]:
    """The documents of each file to write, by its name, validation last."""
    files = read_library(library)
    for_validation = held_out(files)
    seen: set[str] = set()
    # Training first: what both sides have is left out of validation.
    train = [doc for file in files if file.source not in for_validation for doc in documents_of(file, seen)]
    val = [doc for file in files if file.source in for_validation for doc in documents_of(file, seen)]
    shuffler = random.Random(SEED)
    shuffler.shuffle(train)
    shuffler.shuffle(val)
    chunks = {f"stdlib.chunk.{number:02d}.jsonl": train[number::CHUNKS] for number in range(CHUNKS)}
    return {**chunks, "stdlib.val.jsonl": val}


def write(folder: Path, contents: dict[str, bytes]) -> bool:
    """Writes the files, unless all are there with these contents; whether it did. None is half-written when killed."""
    if all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in contents.items()):
        return False
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
        for name, data in contents.items():
            Path(partial, f"{name}.tmp").write_bytes(data)
        for name in contents:
            os.replace(Path(partial, f"{name}.tmp"), folder / name)
    return True


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Writes text of the Python standard library as sample training data.")
    parser.add_argument("--out", default=root / "data" / "sample", help="default: %(default)s")
    folder = Path(os.path.expanduser(parser.parse_args().out), "stdlib")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"make_sample_data: cannot make {folder}: {error.strerror}")

    warnings.simplefilter("ignore")  # of the parser, about the library's own code
    library = Path(sysconfig.get_path("stdlib"))
    documents = build(library)
    contents = {name: b"".join(doc.line() for doc in docs) for name, docs in documents.items()}
    train_bytes = sum(len(data) for name, data in contents.items() if "chunk" in name)
    if train_bytes < MIN_TRAIN_BYTES:
        sys.exit(
            f"make_sample_data: {library} has {train_bytes / 1e6:.1f} MB of usable text, less than the "
            f"{MIN_TRAIN_BYTES / 1e6:.0f} MB needed; run this with a full Python installation, not a minimal one"
        )
    try:
        written = write(folder, contents)
    except OSError as error:
        sys.exit(f"make_sample_data: cannot write to {folder}: {error.strerror}")

    for name, data in contents.items():
        print(f"  {name:22} {len(documents[name]):5} documents {len(data) / 1e6:6.2f} MB")
    lengths = [(len(doc.text), doc.is_prose) for docs in documents.values() for doc in docs]
    prose = sum(length for length, is_prose in lengths if is_prose) / sum(length for length, _ in lengths)
    megabytes = sum(map(len, contents.values())) / 1e6
    where = f"written to {folder}" if written else f"nothing to do, {folder} has them already"
    print(f"sample data: {len(lengths)} documents, {megabytes:.2f} MB, {prose:.0%} prose; {where}")


if __name__ == "__main__":
    main()
