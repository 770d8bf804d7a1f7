"""Downloads Debian packages that hold text, and makes data to train on: code and prose of the Linux kernel, a
dictionary, WordNet. No account or root is needed, only `apt-get` and `dpkg-deb`.

    python setup/prepare_debian_text.py                              # data/debian, about 0.9 GB
    python setup/prepare_debian_text.py --max_gb 0.02                # at most 20 MB of each package: a quick try
    python setup/prepare_debian_text.py --packages linux-source-6.12 dict-foldoc --data_dir data/other

Each package is a source: DATA_DIR/PACKAGE/PACKAGE.chunk.0.jsonl and so on, PACKAGE.val.jsonl, and a manifest that names
the version. What can be read: source tarballs (usr/src), dictionaries of dictd (dict-*), and WordNet's database. A
package that only depends on the current version, as linux-source does, stands for that.

From what WordNet's training files define, DATA_DIR/tasks gets `debian_dictionary`, a task for lm-eval: a word, and four
definitions to choose from.

Stopped at any moment and started again it goes on with the first package that is not done. The same packages and the
same seed give the same files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import string
import subprocess
import sys
import tarfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import orjson

from lingua.args import check_writable, user_path
from lingua.documents import InputFile
from lingua.errors import UserError
from lingua.shuffle import Plan, write_whole, writing
from lingua.shuffle_jobs import Progress, Resources, of_documents, run
from lingua.shuffle_output import find_result, lock
from lingua.sources import TRAIN_FILES, matching_files

PROGRAM = "prepare_debian_text"
PACKAGES = ("linux-source", "dict-gcide", "wordnet-base")
WORK = "work"  # in the cache, as long as this script runs
CHUNKS = 8
SHUFFLE_BYTES = 10**9  # of RAM

# Of a source tarball. Longer files are tables that a program wrote (400 MB of registers of one GPU driver).
CODE_AND_PROSE = {".c", ".h", ".S", ".rs", ".py", ".pl", ".sh", ".dts", ".dtsi", ".yaml", ".rst", ".md", ".txt"}
MIN_BYTES, MAX_BYTES = 200, 200_000

# Who wrote what in GCIDE, after nearly every paragraph.
ORIGINS = re.compile(r"\s*\[[^][]*(?:1913 Webster|Webster 1913 Suppl|WordNet 1\.5|PJC)[^][]*\]")
DIGITS = {
    char: digit for digit, char in enumerate(string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/")
}

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
TASK = "debian_dictionary"
QUESTIONS, CHOICES = 2000, 4
DEFINITION_CHARS = range(20, 200)
# Wrong definitions are taken from this number of words of the same part of speech, those nearest in length.
NEAREST = 100
STEM = 4

Document = dict[str, str]


@dataclass
class Reader:
    """How one kind of file in a package is read. `pattern`: of its path in the package."""

    pattern: str
    read: Callable[[Path, IO[bytes]], Iterator[Document]]


# --- packages --------------------------------------------------------------------------------------------------------


def call(*command: str, folder: Path | None = None) -> str:
    """What a program prints. Raises UserError, with its last line on stderr, where it fails or is not installed."""
    if shutil.which(command[0]) is None:
        raise UserError(f"{command[0]}: not installed; this script needs a Debian or Ubuntu system")
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"{' '.join(command)}: {lines[-1].removeprefix('E: ')}")
    return done.stdout


def fetch(package: str, cache: Path) -> Path:
    """The package's file, out of the cache or downloaded into it. Raises UserError where that fails."""
    cached = sorted(cache.glob(f"{package}_*.deb"))
    if cached:
        return cached[-1]
    say(package, "downloading")
    unfinished = cache / WORK / "download"
    unfinished.mkdir()
    try:
        call("apt-get", "download", package, folder=unfinished)
    except UserError as error:
        raise UserError(f"--packages {package}: {error}") from None
    [file] = unfinished.glob("*.deb")
    file = file.rename(cache / file.name)
    unfinished.rmdir()
    return file


def unpack(package: str, cache: Path) -> tuple[Path, list[tuple[Path, Reader]]]:
    """Unpacks a package into the cache's work folder: its file, and what of it can be read.

    Where it holds no text, a package that it depends on and whose name begins with its own is taken in its place.
    Raises UserError where nothing in them can be read.
    """
    waiting = [package]
    while waiting:
        file = fetch(waiting.pop(0), cache)
        folder = cache / WORK / file.stem
        call("dpkg-deb", "--extract", str(file), str(folder))
        found = [(path, reader) for reader in READERS for path in sorted(folder.glob(reader.pattern))]
        if found:
            return file, found
        depends = call("dpkg-deb", "--field", str(file), "Depends")
        names = [name.split()[0] for name in depends.split(",") if name.strip()]
        waiting += [name for name in names if name.startswith(f"{package}-")]
    patterns = ", ".join(reader.pattern for reader in READERS)
    raise UserError(f"--packages {package}: has no file that this script can read ({patterns})")


# --- documents -------------------------------------------------------------------------------------------------------


def read_tarball(path: Path, stream: IO[bytes]) -> Iterator[Document]:
    """Code and prose of a source tarball, a file a document."""
    with tarfile.open(fileobj=stream, mode="r|*") as tarball:
        for member in tarball:
            name = member.name.partition("/")[2]
            is_text = Path(name).suffix in CODE_AND_PROSE and MIN_BYTES <= member.size <= MAX_BYTES
            if member.isreg() and is_text:
                content = tarball.extractfile(member).read()
                try:
                    text = content.decode()
                except UnicodeDecodeError:
                    continue
                if "\0" not in text:
                    yield {"text": text, "source": name}


def read_dictionary(path: Path, stream: IO[bytes]) -> Iterator[Document]:
    """Entries of a dictionary of dictd, a line a paragraph."""
    index = path.with_name(path.name.replace(".dict.dz", ".index"))
    places = set()
    for line in index.read_text().splitlines():
        word, offset, length = line.split("\t")[:3]
        if not word.startswith("00"):
            places.add((from_base64(offset), from_base64(length)))
    content = gzip.open(stream).read()
    for offset, length in sorted(places):
        entry = ORIGINS.sub("", content[offset : offset + length].decode(errors="replace"))
        paragraphs = (" ".join(paragraph.split()) for paragraph in entry.split("\n\n"))
        yield {"text": "\n".join(filter(None, paragraphs)), "source": f"{path.name.split('.')[0]}/{offset}"}


def from_base64(number: str) -> int:
    """A number of dictd's indexes: digits of base 64, the highest first."""
    value = 0
    for char in number:
        value = 64 * value + DIGITS[char]
    return value


def read_wordnet(path: Path, stream: IO[bytes]) -> Iterator[Document]:
    """Definitions of WordNet, one a document, as in "lotus position (noun): a sitting position with ...".

    Where the definition is that of one word alone, which has no other one, the document has `word` and `pos`, too: that
    can be asked for.
    """
    pos = PARTS_OF_SPEECH[path.suffix[1:]]
    synsets = []
    for line in stream.read().decode().splitlines():
        if line.startswith(" "):  # the license
            continue
        head, _, gloss = line.partition(" | ")
        offset, _, _, n_words, *rest = head.split()
        words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in rest[: 2 * int(n_words, 16) : 2]]
        synsets.append((offset, words, gloss.strip()))
    senses = Counter(word.lower() for _, words, _ in synsets for word in {*words})
    for offset, words, gloss in synsets:
        document = {"text": f"{', '.join(words)} ({pos}): {gloss}", "source": f"{path.suffix[1:]}/{offset}"}
        if len(words) == 1 and senses[words[0].lower()] == 1:
            document |= {"word": words[0], "pos": pos}
        yield document


READERS = (
    Reader("usr/src/**/*.tar.*", read_tarball),
    Reader("usr/share/dictd/*.dict.dz", read_dictionary),
    Reader("usr/share/wordnet/data.*", read_wordnet),
)


def read_all(found: list[tuple[Path, Reader]]) -> Iterator[Document]:
    """The documents of a package's files, each text once, with progress."""
    seen: set[bytes] = set()
    sizes = [path.stat().st_size for path, _ in found]
    progress = Progress("extract", sizes, list(range(len(found))))
    for number, (path, reader) in enumerate(found):
        n_documents = 0
        with open(path, "rb") as stream:
            for document in reader.read(path, stream):
                digest = hashlib.blake2b(document["text"].encode(), digest_size=16).digest()
                if digest not in seen:
                    seen.add(digest)
                    n_documents += 1
                    yield document
                progress.update(number, min(stream.tell() / sizes[number], 0.999), n_documents)
        progress.update(number, 1.0, n_documents)
    progress.finish()


def write_documents(file: Path, documents: Iterator[Document], max_bytes: float, seed: int) -> None:
    """Writes documents as JSON lines; where they are more than `max_bytes`, a part of that size, drawn by `seed`."""
    everything = file.with_suffix(".all")
    places: list[tuple[bytes, int, int]] = []
    begin = 0
    with open(everything, "wb") as out:
        for document in documents:
            line = orjson.dumps(document, option=orjson.OPT_APPEND_NEWLINE)
            out.write(line)
            key = hashlib.blake2b(f"{seed}/{document['source']}".encode(), digest_size=8).digest()
            places.append((key, begin, begin + len(line)))
            begin += len(line)
    if begin <= max_bytes:
        everything.rename(file)
        return
    chosen, size = [], 0
    for _, start, stop in sorted(places):
        size += stop - start
        if size > max_bytes:
            break
        chosen.append((start, stop))
    with open(everything, "rb") as source, writing(file) as out:
        for start, stop in sorted(chosen):
            source.seek(start)
            out.write(source.read(stop - start))
    everything.unlink()


def prepare(package: str, data_dir: Path, cache: Path, max_gb: float | None, seed: int) -> None:
    """Makes the source of one package, unless it is there. Raises UserError for what is there of other arguments."""
    out = data_dir / package
    source = {"package": package, "max_gb": max_gb}
    wanted = {"seed": seed, "nchunks": CHUNKS, "n_validation": None, "source": source} | of_documents("stop", None)
    if manifest := find_result(str(out), package, wanted):
        say(package, f"nothing to do, {out} has {manifest['documents']:,} documents")
        return
    deb, found = unpack(package, cache)
    raw = cache / WORK / f"{deb.stem}.jsonl"  # the manifest has its name, and with it the version
    write_documents(raw, read_all(found), float("inf") if max_gb is None else 1e9 * max_gb, seed)
    status = raw.stat()
    if status.st_size == 0 and max_gb is not None:
        raise UserError(f"--max_gb {max_gb:g}: less than one document of {package}; give more")
    plan = Plan(
        name=package,
        out=str(out),
        work=str(out / ".work"),
        stage=str(out / ".work"),
        files=(InputFile(str(raw), raw.name, status.st_size, str(status.st_mtime_ns)),),
        seed=seed,
        nchunks=CHUNKS,
    )
    manifest = run(plan, Resources(SHUFFLE_BYTES), source, say=lambda line: say(package, line))
    n_validation = manifest["files"].get(plan.validation_name, {"documents": 0})["documents"]
    say(
        package,
        f"{deb.stem}: {manifest['documents']:,} documents, {manifest['bytes'] / 1e6:,.1f} MB, {n_validation:,} of them "
        f"for validation; {out}",
    )


# --- the task --------------------------------------------------------------------------------------------------------


def entry_of(document: Document) -> Document:
    """`word`, `pos` and `definition`, which ends before the first example."""
    word, pos = document["word"], document["pos"]
    definition = document["text"].removeprefix(f"{word} ({pos}): ").partition('; "')[0]
    return {"word": word, "pos": pos, "definition": definition}


def make_questions(entries: list[Document], seed: int) -> list[dict[str, Any]]:
    """Questions about words: `word`, `pos`, `choices` (definitions), and which of them is right, `answer`.

    Definitions that have a word's first letters in them are not asked for, nor given as wrong ones: they can be picked
    without knowing the word.
    """
    rng = random.Random(seed)
    by_pos: dict[str, list[Document]] = {}
    for entry in sorted(entries, key=lambda entry: (len(entry["definition"]), entry["definition"], entry["word"])):
        if len(entry["definition"]) in DEFINITION_CHARS:
            by_pos.setdefault(entry["pos"], []).append(entry)
    lengths = {pos: [len(entry["definition"]) for entry in alike] for pos, alike in by_pos.items()}
    candidates = [entry for alike in by_pos.values() for entry in alike]
    rng.shuffle(candidates)
    questions = []
    for entry in candidates:
        word, pos, definition = entry["word"], entry["pos"], entry["definition"]
        if len(questions) == QUESTIONS:
            break
        middle = bisect_left(lengths[pos], len(definition))
        near = by_pos[pos][max(0, middle - NEAREST // 2) : middle + NEAREST // 2]
        others = sorted({other["definition"] for other in near} - {definition})
        others = [other for other in others if not gives_away(word, other)]
        if gives_away(word, definition) or len(others) < CHOICES - 1:
            continue
        choices = [definition, *rng.sample(others, CHOICES - 1)]
        rng.shuffle(choices)
        questions.append({"word": word, "pos": pos, "choices": choices, "answer": choices.index(definition)})
    return questions


def gives_away(word: str, definition: str) -> bool:
    """Whether a word of the definition begins as one of `word` does."""
    stems = {part[:STEM] for part in re.findall(r"\w+", word.lower())}
    return not stems.isdisjoint(part[:STEM] for part in re.findall(r"\w+", definition.lower()))


def write_task(folder: Path, sources: list[Path], seed: int) -> None:
    """Writes the task for lm-eval, of what the sources' training files define, if they define enough."""
    entries = []
    for source in sources:
        for file in matching_files(source, TRAIN_FILES):
            with open(file, "rb") as lines:
                entries += [entry_of(document) for document in map(orjson.loads, lines) if "word" in document]
    questions = make_questions(entries, seed)
    if not questions:
        say(TASK, "not written: the packages define too few words (wordnet-base does)")
        return
    folder.mkdir(exist_ok=True)
    data = folder / f"{TASK}.jsonl"
    write_whole(data, b"".join(orjson.dumps(question, option=orjson.OPT_APPEND_NEWLINE) for question in questions))
    task = f"""# Which of four definitions is the word's? All are in the training text. Written by setup/{PROGRAM}.py.
task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {json.dumps(str(data))}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{word}}}} ({{{{pos}}}}):"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}}
"""
    write_whole(folder / f"{TASK}.yaml", task.encode())
    say(TASK, f"{len(questions):,} questions; harness.tasks=[{TASK}] harness.include_path={folder}")


# --- all of it -------------------------------------------------------------------------------------------------------


def say(what: str, line: str) -> None:
    print(f"{what}: {line}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes training data of Debian packages.")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, help=f"default: {' '.join(PACKAGES)}")
    parser.add_argument("--data_dir", type=user_path, default=Path("data/debian"), help="default: %(default)s")
    parser.add_argument("--cache_dir", type=user_path, help="for the packages' files (default: DATA_DIR/.cache)")
    parser.add_argument("--max_gb", type=float, help="of each package; of more, documents are drawn (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args()
    if args.max_gb is not None and not args.max_gb > 0:
        raise UserError(f"--max_gb {args.max_gb:g}: must be above 0")
    for package in args.packages:
        if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", package):
            raise UserError(f"--packages {package}: not the name of a package")
    cache = args.cache_dir or args.data_dir / ".cache"
    check_writable("--data_dir", args.data_dir, 0)
    check_writable("--cache_dir", cache, 0)
    with lock(cache):
        for package in args.packages:
            shutil.rmtree(cache / WORK, ignore_errors=True)
            (cache / WORK).mkdir()
            try:
                prepare(package, args.data_dir, cache, args.max_gb, args.seed)
            finally:
                shutil.rmtree(cache / WORK)
    write_task(args.data_dir / "tasks", [args.data_dir / package for package in args.packages], args.seed)
    say(PROGRAM, f"train with data.root_dir={args.data_dir} 'data.sources={{{': 1, '.join(args.packages)}: 1}}'")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; start again, it goes on", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        if os.environ.get("LINGUA_TRACEBACK"):
            raise
        sys.exit(f"{PROGRAM}: {' '.join(str(error).split())}")
