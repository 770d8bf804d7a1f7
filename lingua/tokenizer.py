"""Text to token ids and back.

Four tokenizers share one interface: `bytes` (UTF-8, no file), `mock` (the same within 256 ids, for tests and speed
measurements), `sp` (a sentencepiece model) and `tiktoken` (a rank file in the layout of Llama 3).

sentencepiece and tiktoken are imported only by the class that needs them, and torch never: the data loader's worker
processes import this module and should start fast.
"""

import base64
import difflib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Optional

import numpy as np

from lingua.errors import UserError

N_TIKTOKEN_SPECIALS = 256

# Llama 3's rule for the stretches of text that no token may cross.
LLAMA3_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Llama 3.1's special tokens that have a name of their own, by their place after the ranks. The rest are numbered.
LLAMA3_NAMED_SPECIALS = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
}

# tiktoken's regex engine panics on a run of a million spaces, and older releases take quadratic time to merge a long
# word, so no call gets more than 2 * PIECE_CHARS characters.
PIECE_CHARS = 4096

# Places where LLAMA3_SPLIT_PATTERN starts a new match whatever stands before and after, so that cutting the text there
# changes no token: before a space that follows something visible, before punctuation that follows a letter or number,
# before a digit that follows a letter, and between a line's end and something visible. No branch of the pattern matches
# across one of these, and its only look-ahead is asked within whitespace. Python and tiktoken may know different
# versions of Unicode, so the characters on one side are listed rather than described.
SAFE_CUT = re.compile(
    r"(?<=\S) |(?<=[^\W_])[!-/:-@\[-`{-~、。，！？；：…「」『』（）]|(?<=[A-Za-z])[0-9]|(?<=[\r\n])(?=\S)"
)

# What a file that is no tokenizer begins with, and what to call it.
OTHER_FILES = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the file itself with `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"{", "JSON, such as Hugging Face's tokenizer.json; the model's tokenizer.model is wanted"),
    (b"<", "a web page"),
)


@dataclass
class TokenizerArgs:
    """`name` is one of the keys of TOKENIZERS; `path` is the file that `sp` and `tiktoken` read."""

    name: str = "bytes"
    path: Optional[str] = None  # noqa: UP045 - OmegaConf reads this annotation


class Tokenizer(ABC):
    """Ids are 0..n_words-1. `bos_id` and `eos_id` begin and end a document; -1 where a model file has none."""

    n_words: int
    bos_id: int
    eos_id: int

    @abstractmethod
    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        """Return the ids of `text`, between BOS and EOS where asked for.

        Nothing in `text` becomes a special token, and a lone surrogate counts as "?". Raises UserError if a BOS or
        EOS is asked for that the tokenizer lacks.
        """

    def encode_batch(self, texts: list[str], add_bos: bool = False, add_eos: bool = False) -> list[np.ndarray]:
        """Return what `encode` returns for each text, as int32; may be called by several threads at once."""
        return [np.array(self.encode(text, add_bos, add_eos), dtype=np.int32) for text in texts]

    @abstractmethod
    def decode(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        """Return the text of `tokens`; special ids have none, and bytes that are not UTF-8 become U+FFFD.

        `before` are the tokens that precede `tokens`, such as a prompt's. They matter where a model drops the space at
        the start of a text (sentencepiece's dummy prefix): after other text that space is kept. Raises UserError for
        an id outside 0..n_words-1.
        """

    @abstractmethod
    def count_first_bytes(self, text: str, tokens: Sequence[int]) -> int:
        """Return how many bytes of the UTF-8 of `text` its first token stands for; 0 for BOS and EOS.

        `tokens` is what `encode` returns for `text`.
        """

    @abstractmethod
    def get_token_offsets(self, text: str, tokens: list[int] | None = None) -> tuple[list[str], list[int]]:
        """Return the text of each token, and the offset in `text`, in characters, at which each begins.

        `tokens` is an encoding of `text`, with or without BOS and EOS; None stands for `encode(text)`. Tokens that
        share a character share its offset, and the last of them carries its text. Raises UserError if `tokens` is
        not an encoding of `text`.
        """

    def _framed(self, tokens: list[int], add_bos: bool, add_eos: bool) -> list[int]:
        for key, wanted, token in (("add_bos", add_bos, self.bos_id), ("add_eos", add_eos, self.eos_id)):
            if wanted and token < 0:
                raise UserError(
                    f"data.{key}=true, but the model at data.tokenizer.path has no {key[4:].upper()} token; "
                    f"set data.{key}=false or use a model that has one"
                )
        return [self.bos_id] * add_bos + tokens + [self.eos_id] * add_eos

    def _checked(self, tokens: Sequence[int]) -> list[int]:
        ids = [int(token) for token in tokens]
        for token in (min(ids, default=0), max(ids, default=0)):
            if not 0 <= token < self.n_words:
                raise UserError(f"token id {token} is outside this tokenizer's 0..{self.n_words - 1}")
        return ids


class ByteLevelTokenizer(Tokenizer):
    """A tokenizer whose tokens are byte strings that, joined, give the text's UTF-8.

    `token_bytes` has one entry per id; those of special tokens are empty.
    """

    def __init__(self, token_bytes: list[bytes], bos_id: int, eos_id: int) -> None:
        self.token_bytes = token_bytes
        self.n_words = len(token_bytes)
        self.bos_id = bos_id
        self.eos_id = eos_id

    def decode(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        # "replace" and not "backslashreplace": a mark that is no text, rather than ASCII that the model never wrote.
        return b"".join(self.token_bytes[token] for token in self._checked(tokens)).decode("utf-8", "replace")

    def count_first_bytes(self, text: str, tokens: Sequence[int]) -> int:
        return len(self.token_bytes[tokens[0]]) if tokens else 0

    def get_token_offsets(self, text: str, tokens: list[int] | None = None) -> tuple[list[str], list[int]]:
        ids = self.encode(text) if tokens is None else self._checked(tokens)
        parts = [self.token_bytes[token] for token in ids]
        if b"".join(parts) != _utf8(text):
            raise UserError("the tokens given are not an encoding of the text given")
        bounds = list(accumulate(map(len, parts), initial=0))
        return _char_spans(text, bounds[:-1], bounds[1:])


class ByteTokenizer(ByteLevelTokenizer):
    """The bytes of UTF-8 are the ids 0..n_bytes-1, and BOS and EOS follow: by default, 256 and 257."""

    def __init__(self, n_bytes: int = 256) -> None:
        super().__init__([bytes([byte]) for byte in range(n_bytes)] + [b"", b""], bos_id=n_bytes, eos_id=n_bytes + 1)

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return self._framed(list(_utf8(text)), add_bos, add_eos)


class MockTokenizer(ByteTokenizer):
    """A ByteTokenizer of 256 ids in all: BOS and EOS are 254 and 255, two bytes that UTF-8 never uses."""

    def __init__(self) -> None:
        super().__init__(n_bytes=254)


class TiktokenTokenizer(ByteLevelTokenizer):
    """A rank file in Llama 3's layout: n ranks, then 256 special tokens, of which BOS and EOS are the first two.

    `special_tokens` maps the name of each special token, such as "<|eot_id|>", to its id.
    """

    def __init__(self, path: str) -> None:
        import tiktoken

        ranks = _parse_ranks(_read_file("tiktoken", path), path)
        self.special_tokens = {name: len(ranks) + place for place, name in enumerate(_llama3_special_names())}
        super().__init__(
            sorted(ranks, key=ranks.__getitem__) + [b""] * N_TIKTOKEN_SPECIALS,
            bos_id=self.special_tokens["<|begin_of_text|>"],
            eos_id=self.special_tokens["<|end_of_text|>"],
        )
        self._encoding = tiktoken.Encoding(
            name=os.path.basename(path),
            pat_str=LLAMA3_SPLIT_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        tokens: list[int] = []
        for piece in _pieces(_utf8(text).decode()):
            # The "ordinary" encoding knows no special tokens, so a document cannot smuggle one in.
            tokens += self._encoding.encode_ordinary(piece)
        return self._framed(tokens, add_bos, add_eos)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model with its own ids. It may normalise text, so that decoding gives back similar text only.

    `model` is sentencepiece's own processor.
    """

    def __init__(self, path: str) -> None:
        from sentencepiece import SentencePieceProcessor

        data = _read_file("sp", path)
        damaged = f"data.tokenizer.path={path!r}: a sentencepiece model that is cut short or damaged; fetch it again"
        try:
            # From memory: given a path, the library opens the file a second time and has its own way with errors.
            self.model = SentencePieceProcessor(model_proto=data)
        except (RuntimeError, OSError) as error:
            raise UserError(damaged) from error
        # Cut between two pieces, the file still parses. Trainer and normalizer settings (2, 3) come after the pieces.
        if not {2, 3} <= {field for field, _ in proto_fields(data)}:
            raise UserError(damaged)
        self.n_words = self.model.vocab_size()
        self.bos_id = self.model.bos_id()
        self.eos_id = self.model.eos_id()

    def encode(self, text: str, add_bos: bool = False, add_eos: bool = False) -> list[int]:
        return self._framed(self.model.encode(_utf8(text).decode(), out_type=int), add_bos, add_eos)

    def encode_batch(self, texts: list[str], add_bos: bool = False, add_eos: bool = False) -> list[np.ndarray]:
        # One call for all texts and no Python integer per token, so that threads rarely wait for Python's lock.
        self._framed([], add_bos, add_eos)  # raises where there is no such token
        inputs = [_utf8(text).decode() for text in texts]
        return self.model.encode(inputs, out_type="numpy", num_threads=1, add_bos=add_bos, add_eos=add_eos)

    def decode(self, tokens: Sequence[int], before: Sequence[int] = ()) -> str:
        ids, context = self._checked(tokens), ""
        start = len(before)
        # The fewest of the tokens before that have a text: what follows a text keeps its space.
        while not context and start > 0:
            start -= 1
            context = self.model.decode(self._checked(before[start:]))
        text = self.model.decode(self._checked(before[start:]) + ids)
        # Not all of `context` is in `text` where `tokens` begin with the rest of its last character.
        return text[len(os.path.commonprefix([context, text])) :]

    def count_first_bytes(self, text: str, tokens: Sequence[int]) -> int:
        if not tokens or tokens[0] in (self.bos_id, self.eos_id):
            return 0
        # Of a character in byte pieces, sentencepiece gives the last piece all bytes.
        return max(self._pieces_of(text)[0].get(5, 0), int(self.model.is_byte(tokens[0])))

    def get_token_offsets(self, text: str, tokens: list[int] | None = None) -> tuple[list[str], list[int]]:
        """As in Tokenizer. Text that the normalisation drops, such as doubled spaces, may be in no token.

        The only encoding of `text` that `tokens` may be is the one that `encode` gives.
        """
        pieces = self._pieces_of(text)
        begins = [piece.get(4, 0) for piece in pieces]
        ends = [piece.get(5, 0) for piece in pieces]
        if tokens is not None:
            bos, eos = tokens[:1] == [self.bos_id], tokens[-1:] == [self.eos_id]
            if self._framed([piece.get(2, 0) for piece in pieces], bos, eos) != tokens:
                raise UserError("the tokens given are not this tokenizer's encoding of the text given")
            size = len(_utf8(text))
            begins = [0] * bos + begins + [size] * eos
            ends = [0] * bos + ends + [size] * eos
        return _char_spans(text, begins, ends)

    def _pieces_of(self, text: str) -> list[dict[int, int | bytes]]:
        """The pieces of `text` as sentencepiece_model.proto's fields: id (2), first and last place (4, 5) in bytes."""
        # The one form of the result that gives positions in all of sentencepiece 0.2.x: SentencePieceText, whose field
        # 2 holds the pieces.
        result = self.model.encode(_utf8(text).decode(), out_type="serialized_proto")
        return [dict(proto_fields(value)) for field, value in proto_fields(result) if field == 2]


TOKENIZERS = {
    "bytes": ByteTokenizer,
    "mock": MockTokenizer,
    "sp": SentencePieceTokenizer,
    "tiktoken": TiktokenTokenizer,
}
FILE_KINDS = {"sp": "sentencepiece model", "tiktoken": "tiktoken rank file"}


def build_tokenizer(name: str, path: str | None = None) -> Tokenizer:
    """Return the tokenizer called `name`; `path` is its file, and is not looked at where none is needed.

    Raises UserError, in one line that names the config key, for an unknown name and for a file that is missing, of
    another kind, or damaged.
    """
    if name not in TOKENIZERS:
        close = difflib.get_close_matches(str(name).lower(), TOKENIZERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UserError(f"data.tokenizer.name={name!r}: not one of {', '.join(TOKENIZERS)}{hint}")
    if name not in FILE_KINDS:
        return TOKENIZERS[name]()
    if not path:
        raise UserError(f"data.tokenizer.path is not set; data.tokenizer.name={name} needs a {FILE_KINDS[name]} there")
    return TOKENIZERS[name](path)


def _utf8(text: str) -> bytes:
    # JSON can hold half a surrogate pair ("\ud800"), which has no UTF-8; one such document must not end a run.
    return text.encode("utf-8", "replace")


def _char_spans(text: str, begins: list[int], ends: list[int]) -> tuple[list[str], list[int]]:
    """Turn positions in the UTF-8 of `text` into pieces of `text` and their offsets in characters."""
    char_at = [place for place, char in enumerate(text) for _ in _utf8(char)] + [len(text)]
    offsets = [char_at[begin] for begin in begins]
    return [text[start : char_at[end]] for start, end in zip(offsets, ends, strict=True)], offsets


def _pieces(text: str) -> Iterator[str]:
    """Cut `text` into pieces of at most 2 * PIECE_CHARS characters, at safe places as long as there are any."""
    start = 0
    while len(text) - start > 2 * PIECE_CHARS:
        stop = start + 2 * PIECE_CHARS
        safe = SAFE_CUT.search(text, start + PIECE_CHARS, stop)
        if safe:
            stop = safe.start()
        yield text[start:stop]
        start = stop
    yield text[start:]


def _llama3_special_names() -> list[str]:
    number = count()
    names = (
        LLAMA3_NAMED_SPECIALS.get(place) or f"reserved_special_token_{next(number)}"
        for place in range(N_TIKTOKEN_SPECIALS)
    )
    return [f"<|{name}|>" for name in names]


def _read_file(name: str, path: str) -> bytes:
    """Return the content of `path`, after a look at its head has shown that it is a file for tokenizer `name`."""
    setting = f"data.tokenizer.path={path!r}"
    wanted = f"data.tokenizer.name={name} needs a {FILE_KINDS[name]}"
    if not os.path.isfile(path):
        found = "no such file" if not os.path.exists(path) else "a folder" if os.path.isdir(path) else "not a file"
        raise UserError(f"{setting}: {found} ({os.path.abspath(path)!r}); {wanted}")
    try:
        with open(path, "rb") as file:
            head = file.read(4096)
            found = _file_kind(head)
            if found == name:
                return head + file.read()
    except OSError as error:
        raise UserError(f"{setting}: cannot be read ({error.strerror})") from error
    if found in FILE_KINDS:
        raise UserError(
            f"{setting}: looks like a {FILE_KINDS[found]}, not a {FILE_KINDS[name]}; set data.tokenizer.name={found}"
        )
    raise UserError(f"{setting}: {found}; {wanted}")


def _file_kind(head: bytes) -> str:
    """Return the name of the tokenizer that reads files with this head, or else words for what the file is."""
    if not head:
        return "an empty file"
    # A sentencepiece model starts with a piece (field 1, its size), which starts with its text (field 1, its size).
    if len(head) > 3 and head[0] == head[2] == 0x0A and head[3] + 2 <= head[1] < 0x80:
        return "sp"
    if re.match(rb"[A-Za-z0-9+/]+={0,2}[ \t]+\d+\s", head + b"\n"):
        return "tiktoken"
    for start, words in OTHER_FILES:
        if head.lstrip().startswith(start):
            return f"looks like {words}"
    return "a file of another kind"


def _parse_ranks(data: bytes, path: str) -> dict[bytes, int]:
    """Return the rank of each token in a file of lines "<base64 of the token> <rank>".

    Raises UserError unless the ranks are 0..n-1, each once, and every single byte is a token.
    """
    damaged = f"data.tokenizer.path={path!r}: a tiktoken rank file that is cut short or damaged:"
    entries: list[tuple[bytes, int]] = []
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            entries.append((base64.b64decode(token, validate=True), int(rank)))
        except ValueError:
            raise UserError(f"{damaged} line {number} is not '<base64> <rank>' but {line[:40]!r}") from None
    ranks = dict(entries)
    if len(ranks) < len(entries):
        raise UserError(f"{damaged} {len(entries) - len(ranks)} of its {len(entries)} lines repeat a token")
    for place, rank in enumerate(sorted(ranks.values())):
        if place != rank:
            raise UserError(f"{damaged} its ranks are not 0..{len(ranks) - 1}, each once; the first amiss is {place}")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{damaged} {len(missing)} of the 256 single bytes are no token, the first 0x{missing[0]:02x}")
    return ranks


def proto_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and the value of each field of a serialized protobuf message, one level deep.

    `data` comes from sentencepiece or has been parsed by it, so it is well formed.
    """
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        if tag & 7 == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(tag & 7)
        if size is None:
            size, place = _varint(data, place)
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the number at `place`, seven bits to the byte and the lowest first, and the place after it."""
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place += 1
        if byte < 0x80:
            return value, place
        shift += 7
