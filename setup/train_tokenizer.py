"""Trains a tokenizer on text that is here: on the chunks of data/<source>, or any .jsonl and .txt files.

    python setup/train_tokenizer.py sp data/sample/stdlib --vocab_size 8000 --out tokenizers/mine
    python setup/train_tokenizer.py tiktoken data/wiki data/code --vocab_size 32000 --out tokenizers/mine

writes tokenizers/mine/tokenizer.model, whole or not at all. The same text, --max_bytes and --seed give the same bytes.

`sp` is a sentencepiece model: byte-pair encoding, bytes for characters that it does not know, each digit by itself,
runs of spaces as words of their own, and text as it is: no normalisation, and no space put before it, so that decoding
gives the text back exactly (but for U+2581, which is sentencepiece's sign for a space). A word never spans lines.
`tiktoken` is a rank file of byte-level byte-pair encoding, split by Llama 3's rule.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import random
import re
import shlex
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import psutil

from lingua.args import check_writable, first_line, user_path
from lingua.documents import line_at
from lingua.errors import UserError
from lingua.sources import parse_document, read_documents
from lingua.tokenizer import LLAMA3_SPLIT_PATTERN, N_TIKTOKEN_SPECIALS, build_tokenizer

FILE_NAME = "tokenizer.model"
# The words that there are before any is learned: bytes, and unknown, BOS, EOS or Llama 3's special tokens.
N_FIXED = {"sp": 256 + 3, "tiktoken": 256 + N_TIKTOKEN_SPECIALS}
# Bytes of memory that training takes for a byte of text, measured on 20 and 50 MB of Python files.
MEMORY_FACTORS = {"sp": 14, "tiktoken": 9}

BLOCK_BYTES = 2**20  # of a file, what is taken into the sample as one
MAX_BLOCKS = 1_000_000  # that are drawn; far more than --max_bytes can need
TEXT_BYTES = 10_000  # of whole lines of a .txt file, which make one document
PIECE_CHARS = 4000  # sentencepiece leaves out what is too long, so longer lines are cut
HELD_OUT_BYTES = 2**20
HELD_OUT_EVERY = 20  # documents, where there is no validation file
FULL_ENOUGH = 0.9  # of --max_bytes; from here on a document that does not fit ends the sample
BEAT_SECONDS = 5


class Heartbeat:
    """Says every few seconds what is going on, while the trainers, which are silent, work in their own threads.

    `n_bytes` counts the text read so far.
    """

    def __init__(self) -> None:
        self.doing, self.n_bytes = "reading", 0

    def __enter__(self) -> Heartbeat:
        self._start, self._end = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            seconds = time.monotonic() - self._start
            say(f"{self.doing}, {self.n_bytes / 1e6:,.0f} MB of text, {seconds:.0f} s")


@dataclass
class Corpus:
    """Files to train on, and those to measure on, if any, out of `sources`."""

    sources: list[Path]
    files: list[Path]
    val_files: list[Path]
    held_out: list[str] = field(default_factory=list)

    def sample(self, max_bytes: int, seed: int, heartbeat: Heartbeat) -> Iterator[str]:
        """Documents out of random places of all files, of at most `max_bytes` of text in all, or all there are.

        Those that are blank are left out, and so are those longer than what is left of `max_bytes`, which is told.
        Where there is no validation file, a few go to `held_out` instead. Reads little more than it gives and
        leaves out. Raises UserError, with file and line, for what is no document, and if there is no text, or none
        that fits.
        """
        room = 0 if self.val_files else HELD_OUT_BYTES
        number = n_too_long = 0
        shortest = sys.maxsize
        for text in self._in_random_order(max_bytes, seed):
            if not text or text.isspace():
                continue
            size = len(text.encode())
            if heartbeat.n_bytes + size > max_bytes:
                if heartbeat.n_bytes >= FULL_ENOUGH * max_bytes:
                    break
                n_too_long += 1
                shortest = min(shortest, size)
                continue
            heartbeat.n_bytes += size
            number += 1
            if number % HELD_OUT_EVERY == 0 and size <= room:
                room -= size
                self.held_out.append(text)
            else:
                yield text
        if n_too_long and not number:
            raise UserError(
                f"--max_bytes {max_bytes}: no document fits, the shortest of which has {shortest} bytes; "
                f"take {shortest} or more"
            )
        if not number:
            raise UserError(
                f"no text in {', '.join(map(str, self.sources))}: all files are empty or hold only blank documents; "
                'wanted a line {"text": "..."} for each document in a .jsonl file, or plain text in a .txt file'
            )
        if n_too_long:
            say(f"documents left out, as longer than what was left of --max_bytes {max_bytes}: {n_too_long}")

    def _in_random_order(self, max_bytes: int, seed: int) -> Iterator[str]:
        """All documents, those of a block of a file together."""
        block_bytes = max(4096, min(BLOCK_BYTES, max_bytes // 256))
        n_blocks = [-(-file.stat().st_size // block_bytes) for file in self.files]
        firsts = list(accumulate(n_blocks, initial=0))
        for block in random.Random(seed).sample(range(firsts[-1]), min(firsts[-1], MAX_BLOCKS)):
            which = bisect_right(firsts, block) - 1
            start = (block - firsts[which]) * block_bytes
            yield from read_block(self.files[which], start, start + block_bytes)

    def to_measure_on(self) -> tuple[list[str], str]:
        """Up to a megabyte of documents that were not trained on, and words for what they are."""
        if not self.val_files:
            return self.held_out, f"{len(self.held_out)} held-out documents"
        texts, room = [], HELD_OUT_BYTES
        for text in (clean(text) for file in self.val_files for text, _ in read_documents(file)):
            room -= len(text.encode())
            if room < 0:
                break
            texts.append(text)
        return texts, ", ".join(map(str, self.val_files))


def say(line: str) -> None:
    print(f"train_tokenizer: {line}", flush=True)


def clean(text: str) -> str:
    """`text` as the tokenizers see it, without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def find_corpus(sources: list[Path]) -> Corpus:
    """The files that `sources` name or hold. Raises UserError where one has none."""
    files: dict[Path, None] = {}
    val_files: dict[Path, None] = {}
    for source in sources:
        if not source.exists():
            raise UserError(f"{source}: no such file or folder")
        if source.is_file():
            if source.suffix not in (".jsonl", ".txt"):
                raise UserError(f"{source}: neither a .jsonl nor a .txt file")
            files[source] = None
            continue
        inside = sorted(path for path in source.iterdir() if not path.name.startswith("."))
        found = [path for path in inside if path.suffix in (".jsonl", ".txt") and path.is_file()]
        validation = [path for path in found if path.name.endswith(".val.jsonl")]
        if len(found) == len(validation):
            folders = [str(path) for path in inside if path.is_dir()]
            hint = f"; name its folders, such as {folders[0]}" if folders else ""
            raise UserError(f"{source}: a folder with no .jsonl or .txt files to train on{hint}")
        val_files |= dict.fromkeys(validation)
        files |= dict.fromkeys(path for path in found if path not in validation)
    return Corpus(sources, list(files), list(val_files))


def read_block(path: Path, start: int, stop: int) -> Iterator[str]:
    """The documents whose first byte is among `start` .. `stop`-1 of a file; of a .txt file, some lines at a time.

    Raises UserError, with file and line, for what is no document or no UTF-8.
    """
    with open(path, "rb") as file:
        # The byte before tells whether a line starts at `start`. If none does, it is the block's before. A line that
        # reaches beyond this block is not read on: its other blocks would do the same.
        file.seek(max(start - 1, 0))
        place = file.tell() + len(file.readline(stop - file.tell())) if start else 0
        lines: list[bytes] = []
        size = 0
        while place < stop:
            line = file.readline()
            if not line:
                break
            place += len(line)
            if path.suffix == ".txt":
                lines.append(line)
                size += len(line)
                if size >= TEXT_BYTES:
                    yield decode(b"".join(lines), path, place - size)
                    lines, size = [], 0
            elif not line.isspace():
                yield clean(parse_line(line, path, place - len(line)))
        if lines:
            yield decode(b"".join(lines), path, place - size)


def decode(data: bytes, path: Path, place: int) -> str:
    """The text of some lines of a .txt file, the first of which begins at byte `place`."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        place += error.start
        raise UserError(
            f"{path}:{line_number(path, place)}: no UTF-8 (0x{data[error.start]:02x} at byte {place}); convert the "
            "file, as with `iconv -f latin1 -t utf-8` if it is Latin-1"
        ) from None


def parse_line(line: bytes, path: Path, place: int) -> str:
    try:
        return parse_document(line, path, 0)
    except ValueError:
        return parse_document(line, path, line_number(path, place))


def line_number(path: Path, place: int) -> int:
    with open(path, "rb") as file:
        return line_at(file, place)


def train_sentencepiece(texts: Iterator[str], vocab_size: int, heartbeat: Heartbeat) -> bytes:
    """A model with `vocab_size` pieces. Raises UserError if `texts` have too few, or too many characters for it."""
    from sentencepiece import SentencePieceTrainer

    unreadable: list[Exception] = []

    def lines() -> Iterator[str]:
        try:
            for line in (line for text in texts for line in text.split("\n")):
                yield from (line[start : start + PIECE_CHARS] for start in range(0, len(line), PIECE_CHARS))
        except (ValueError, OSError) as error:
            unreadable.append(error)  # which sentencepiece makes a RuntimeError of
            raise
        heartbeat.doing = "training"

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            required_chars="\u2581",  # a space, which in text with few of them would come back as this sign
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=4 * PIECE_CHARS,  # in bytes
            # It is written into the model, which should not depend on the machine. The pieces do not depend on it.
            num_threads=16,
            minloglevel=2,
        )
    except RuntimeError as error:
        if unreadable:
            raise unreadable[0] from None
        # It tells the numbers, in its own words and with the place in its source.
        if found := re.search(r"Vocabulary size too high .* <= (\d+)", str(error)):
            raise UserError(too_little_text("sp", vocab_size, int(found[1]))) from None
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"--vocab_size {vocab_size}: too small for this text, whose characters are words, too; "
                f"take {found[1]} or more"
            ) from None
        raise UserError(f"sentencepiece cannot train on this text: {first_line(error)}") from None
    return model.getvalue()


def train_ranks(texts: Iterator[str], vocab_size: int, heartbeat: Heartbeat) -> bytes:
    """A rank file for `vocab_size` words, special tokens included. Raises UserError if `texts` have too few."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError(
            "training a tiktoken file takes the package tokenizers: `bash setup/create_env.sh` or "
            "`pip install 'tokenizers>=0.22'`; sp does without"
        ) from None

    def all_texts() -> Iterator[str]:
        yield from texts
        heartbeat.doing = "training"

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - N_TIKTOKEN_SPECIALS,
        initial_alphabet=alphabet,
        min_frequency=2,  # a word that is there once is not worth one of the vocabulary
        show_progress=False,
    )
    trained.train_from_iterator(all_texts(), trainer)
    n_words = trained.get_vocab_size() + N_TIKTOKEN_SPECIALS
    if n_words < vocab_size:
        raise UserError(too_little_text("tiktoken", vocab_size, n_words))

    # The library writes a byte as a visible character: of Latin-1 as that itself, others in order from U+0100 on.
    others = (char for char in alphabet if ord(char) >= 256)
    byte_of = {chr(byte) if chr(byte) in alphabet else next(others): byte for byte in range(256)}
    vocabulary = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[char] for char in token) for token, _ in vocabulary]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def too_little_text(kind: str, vocab_size: int, possible: int) -> str:
    if possible <= N_FIXED[kind]:
        return f"--vocab_size {vocab_size}: this text is too little to learn any word from; more text is needed"
    return (
        f"--vocab_size {vocab_size}: this text has {possible} words at the most; take {possible} or less, or more text"
    )


TRAINERS = {"sp": train_sentencepiece, "tiktoken": train_ranks}


def train(kind: str, sources: list[Path], vocab_size: int, out: Path, max_bytes: int, seed: int) -> None:
    """Write a tokenizer into folder `out`, and tell how well it does. Raises UserError for what cannot work."""
    path = out / FILE_NAME
    if path.exists():
        raise UserError(f"--out {out}: {path} is there already, and is not overwritten; name another folder")
    if vocab_size <= N_FIXED[kind]:
        raise UserError(f"--vocab_size {vocab_size}: {N_FIXED[kind]} words are there before any is learned; take more")
    if max_bytes <= 0:
        raise UserError(f"--max_bytes {max_bytes}: wanted a positive number of bytes")
    corpus = find_corpus(sources)
    check_writable("--out", out, needed=64 * vocab_size)

    n_bytes = sum(file.stat().st_size for file in corpus.files)
    say(f"files: {len(corpus.files)}, {n_bytes / 1e6:,.1f} MB")
    warn_of_memory(kind, min(n_bytes, max_bytes))
    with Heartbeat() as heartbeat:
        content = TRAINERS[kind](corpus.sample(max_bytes, seed, heartbeat), vocab_size, heartbeat)
        out.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{FILE_NAME}.part")
        part.write_bytes(content)
        tokenizer = build_tokenizer(kind, str(part))
        os.replace(part, path)
        say(f"trained on {heartbeat.n_bytes / 1e6:,.1f} MB of text; written to {path}")
        heartbeat.doing = "measuring"
        measured, what = corpus.to_measure_on()
        n_tokens = sum(len(tokenizer.encode(text)) for text in measured)
        n_bytes = sum(len(text.encode()) for text in measured)

    say(f"{tokenizer.n_words:,} words, BOS {tokenizer.bos_id}, EOS {tokenizer.eos_id}")
    if n_tokens:
        say(f"{n_bytes / n_tokens:.2f} bytes a token on {what} (tokenizer bytes: 1.00)")
    say(f"train with data.tokenizer.name={kind} {shlex.quote(f'data.tokenizer.path={path}')}")


def warn_of_memory(kind: str, n_bytes: int) -> None:
    """Says so if training on `n_bytes` of text may take more memory than this machine has left."""
    wanted, available = MEMORY_FACTORS[kind] * n_bytes, psutil.virtual_memory().available
    if wanted > available:
        say(
            f"warning: {kind} may take {wanted / 1e9:,.1f} GB of memory for {n_bytes / 1e9:,.2f} GB of text (more "
            f"without spaces between words), and {available / 1e9:,.1f} GB are available; --max_bytes "
            f"{available // MEMORY_FACTORS[kind]} would fit"
        )


def number_of_bytes(value: str) -> int:
    return int(min(float(value), sys.maxsize))  # inf: all there is


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a tokenizer on local text.")
    parser.add_argument("kind", choices=TRAINERS, help="sentencepiece model, or rank file in tiktoken's format")
    parser.add_argument(
        "sources",
        nargs="+",
        type=user_path,
        help="folders of .jsonl or .txt files (*.val.jsonl is kept to measure on), files",
    )
    parser.add_argument(
        "--vocab_size", type=int, required=True, help="words in all: bytes and special tokens are included"
    )
    parser.add_argument("--out", type=user_path, required=True, help=f"folder to write {FILE_NAME} into")
    parser.add_argument(
        "--max_bytes",
        type=number_of_bytes,
        default=10**9,
        help="of text to train on; more is sampled evenly (default: 1e9). sp takes 9 to 14 times as much memory, "
        "tiktoken 2 to 9 times; for text without spaces between words, such as Chinese, 40 and 110 times",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    args = parser.parse_args()
    try:
        train(args.kind, args.sources, args.vocab_size, args.out, args.max_bytes, args.seed)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        sys.exit(f"train_tokenizer: {' '.join(str(error).split())}")
    except OSError as error:
        sys.exit(f"train_tokenizer: {error.filename or args.out}: {error.strerror or first_line(error)}")


if __name__ == "__main__":
    main()
