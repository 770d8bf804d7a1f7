import base64
import errno
import io
import itertools
import os
import pickle
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from lingua import tokenizer as tokenizer_module
from lingua.errors import UserError
from lingua.tokenizer import LLAMA3_SPLIT_PATTERN, SAFE_CUT, TokenizerArgs, build_tokenizer

ENGLISH = "the quick brown fox jumps over lazy dogs and memory layers look up keys"
WORDS = [*ENGLISH.split(), "café", "中文", "don't", "x=1234"]
TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "  two  spaces, a tab\t and\r\n\n  lines \n",
    "café naïve Ωmega 中文。日本語、テスト русский हिन्दी",
    "😀👩‍👩‍👧 e\u0301 \u2028 \x00 \x1c",
    "don't WE'LL 12345678 a1b2 x_y=<|begin_of_text|><s></s>",
]
NAMES = ["bytes", "mock", "sp", "tiktoken"]


def prose(seed: int, n_words: int) -> str:
    rng = random.Random(seed)
    ends = [" ", " ", " ", " ", ", ", ". ", "\n", "\n\n    ", "。"]
    return "".join(rng.choice(WORDS) + rng.choice(ends) for _ in range(n_words))


def train_ranks(text: str, n_merges: int) -> dict[bytes, int]:
    """Byte-pair encoding in its plainest form: join the most frequent pair of neighbours, over and over."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    words = [[bytes([byte]) for byte in word.encode()] for word in text.replace(" ", "\n ").split("\n")]
    for _ in range(n_merges):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        first, second = max(pairs, key=lambda pair: (pairs[pair], pair))
        ranks[first + second] = len(ranks)
        for word in words:
            for place in range(len(word) - 2, -1, -1):
                if word[place : place + 2] == [first, second]:
                    word[place : place + 2] = [first + second]
    return ranks


def rank_lines(ranks: dict[bytes, int]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def train_sentencepiece(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prose(1, 4000).splitlines()),
        model_writer=model,
        minloglevel=2,
        **{"model_type": "bpe", "vocab_size": 330, "byte_fallback": True, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    runs = {character * 2**power: 0 for character in (b"a", b" ") for power in (1, 2, 3)}
    trained = train_ranks(prose(2, 400), 60)
    return {token: rank for rank, token in enumerate({**trained, **runs})}


@pytest.fixture(scope="module")
def files(ranks, tmp_path_factory) -> dict[str, str]:
    """A path for every tokenizer; `bytes` and `mock` need none and get one that does not exist."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "sp.model").write_bytes(train_sentencepiece())
    (folder / "tiktoken.model").write_bytes(rank_lines(ranks))
    return {name: str(folder / f"{name}.model") for name in NAMES}


@pytest.fixture(params=NAMES)
def tokenizer(request, files):
    return build_tokenizer(request.param, files[request.param])


@pytest.fixture
def llama(files):
    return build_tokenizer("tiktoken", files["tiktoken"])


@pytest.fixture
def build_from(tmp_path):
    """Build tokenizer `name` from a file of this content, and return the one line it is refused with."""

    def build(name: str, content: bytes) -> str:
        path = tmp_path / "some.model"
        path.write_bytes(content)
        return refusal(name, str(path))

    return build


def refusal(name: str, path: str | None) -> str:
    with pytest.raises(ValueError, match=r"data\.tokenizer\.") as caught:
        build_tokenizer(name, path)
    message = str(caught.value)
    assert "\n" not in message
    assert path is None or repr(path) in message
    return message


# What all tokenizers promise


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer, text):
    decoded = tokenizer.decode(tokenizer.encode(text))
    if isinstance(tokenizer, tokenizer_module.SentencePieceTokenizer):
        # sentencepiece normalises: NFKC in the main, and one space for any run of whitespace.
        text = tokenizer.model.normalize(text).replace("▁", " ").strip()
    assert decoded == text


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_in_range_and_framed_as_asked(tokenizer, text):
    tokens = tokenizer.encode(text)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert type(tokens) is list
    assert all(type(token) is int and 0 <= token < tokenizer.n_words for token in [*tokens, bos, eos])
    assert bos != eos
    assert not {bos, eos} & set(tokens)
    assert tokenizer.encode(text, True) == [bos, *tokens]
    assert tokenizer.encode(text, False, True) == [*tokens, eos]
    assert tokenizer.encode(text, add_bos=True, add_eos=True) == [bos, *tokens, eos]
    assert tokenizer.decode([bos, *tokens, eos]) == tokenizer.decode(tokens)


@pytest.mark.parametrize(("add_bos", "add_eos"), [*itertools.product([False, True], repeat=2)])
def test_a_batch_is_encoded_as_its_texts_are(tokenizer, add_bos, add_eos):
    texts = [*TEXTS, "fox \ud800 dog", "the quick brown fox " * 1000]
    batch = tokenizer.encode_batch(texts, add_bos, add_eos)
    assert all(tokens.dtype == np.int32 for tokens in batch)
    assert [tokens.tolist() for tokens in batch] == [tokenizer.encode(text, add_bos, add_eos) for text in texts]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_point_at_the_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)
    texts, offsets = tokenizer.get_token_offsets(text)
    assert len(texts) == len(offsets) == len(tokens)
    assert offsets == sorted(offsets)
    assert all(text.startswith(part, offset) for part, offset in zip(texts, offsets, strict=True))
    assert "".join("".join(texts).split()) == "".join(text.split())
    assert tokenizer.get_token_offsets(text, tokens) == (texts, offsets)
    framed = tokenizer.get_token_offsets(text, tokenizer.encode(text, True, True))
    assert framed == (["", *texts, ""], [0, *offsets, len(text)])


def test_offsets_refuse_tokens_of_another_text(tokenizer):
    with pytest.raises(ValueError, match="not .* encoding of the text"):
        tokenizer.get_token_offsets("the quick fox", tokenizer.encode("the quick dog"))


def test_a_lone_surrogate_becomes_a_question_mark(tokenizer):
    text = "fox \ud800 dog"
    assert tokenizer.encode(text) == tokenizer.encode("fox ? dog")
    assert "".join(tokenizer.get_token_offsets(text)[0]) == text


def test_decode_refuses_ids_out_of_range(tokenizer):
    for token in (-1, tokenizer.n_words, 10**12):
        with pytest.raises(ValueError, match=rf"token id {token} is outside this tokenizer's 0\.\."):
            tokenizer.decode([token])


@pytest.mark.parametrize("character", ["a", " ", "\n", ".", "中", " \n", "a\t"])
def test_a_megabyte_of_one_thing_is_fast(tokenizer, character):
    text = character * (1_000_000 // len(character.encode()))
    start = time.perf_counter()
    tokens = tokenizer.encode(text)
    assert time.perf_counter() - start < 5
    # But for whitespace, which sentencepiece normalises.
    assert "".join(tokenizer.decode(tokens).split()) == "".join(text.split())


def test_args_are_a_structured_config():
    config = OmegaConf.merge(OmegaConf.structured(TokenizerArgs), {"name": "sp", "path": "some.model"})
    assert OmegaConf.to_object(config) == TokenizerArgs(name="sp", path="some.model")
    assert TokenizerArgs() == TokenizerArgs(name="bytes", path=None)


def test_the_heavy_libraries_are_imported_only_where_used():
    code = (
        "import sys; from lingua.tokenizer import build_tokenizer; build_tokenizer('bytes'); build_tokenizer('mock');"
        "print({'torch', 'sentencepiece', 'tiktoken'} & set(sys.modules))"
    )
    root = os.path.dirname(os.path.dirname(tokenizer_module.__file__))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout.strip() == "set()"


# bytes and mock


def test_bytes_are_utf8():
    tokenizer = build_tokenizer("bytes")
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (258, 256, 257)
    assert tokenizer.encode("aé", True, True) == [256, 97, 0xC3, 0xA9, 257]
    assert tokenizer.decode([97, 0xC3, 98]) == "a\ufffdb"
    assert tokenizer.get_token_offsets("aéb") == (["a", "", "é", "b"], [0, 1, 1, 2])


def test_mock_stays_within_256():
    tokenizer = build_tokenizer("mock")
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (256, 254, 255)
    assert tokenizer.encode("aé", True, True) == [254, 97, 0xC3, 0xA9, 255]


# sentencepiece


def test_sp_uses_the_ids_of_the_model(files):
    tokenizer = build_tokenizer("sp", files["sp"])
    model = sentencepiece.SentencePieceProcessor(model_file=files["sp"])
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (330, 1, 2)
    assert tokenizer.encode(prose(3, 500)) == model.encode(prose(3, 500))


def test_sp_offsets_count_characters(files):
    texts, offsets = build_tokenizer("sp", files["sp"]).get_token_offsets("the  日b")
    assert (texts[-4:], offsets[-4:]) == (["", "", "日", "b"], [5, 5, 5, 6])
    assert "".join(texts) == "the  日b"


@pytest.mark.parametrize("key", ["bos", "eos"])
def test_sp_without_a_bos_or_eos_says_so_when_asked_for_one(tmp_path, key):
    path = tmp_path / "some.model"
    path.write_bytes(train_sentencepiece(**{f"{key}_id": -1}))
    tokenizer = build_tokenizer("sp", str(path))
    assert getattr(tokenizer, f"{key}_id") == -1
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    with pytest.raises(ValueError, match=rf"^data\.add_{key}=true, .* has no {key.upper()} token; .*$"):
        tokenizer.encode("the fox", add_bos=key == "bos", add_eos=key == "eos")
    with pytest.raises(UserError, match=f"^data.add_{key}=true"):
        tokenizer.encode_batch(["the fox"], add_bos=key == "bos", add_eos=key == "eos")


@pytest.mark.parametrize("model_type", ["unigram", "char"])
def test_sp_takes_other_kinds_of_model(tmp_path, model_type):
    path = tmp_path / "some.model"
    path.write_bytes(train_sentencepiece(model_type=model_type, byte_fallback=False, hard_vocab_limit=False))
    tokenizer = build_tokenizer("sp", str(path))
    assert tokenizer.decode(tokenizer.encode("the quick fox")) == "the quick fox"


def test_sp_refuses_a_model_cut_anywhere(files, build_from, capfd):
    content = Path(files["sp"]).read_bytes()
    # Between two pieces (a byte 10, a byte of size, as many bytes) the rest still parses as a model of fewer pieces.
    between = [0]
    while content[between[-1]] == 10:
        between.append(between[-1] + 2 + content[between[-1] + 1])
    assert len(between) == 331
    for size in (*between[1::30], between[-1], 4, 100, len(content) // 2, len(content) - 1):
        assert "cut short or damaged" in build_from("sp", content[:size]), size
    assert capfd.readouterr() == ("", "")


# tiktoken


def test_tiktoken_places_the_special_tokens_of_llama_3(llama, ranks):
    n = len(ranks)
    assert (llama.n_words, llama.bos_id, llama.eos_id) == (n + 256, n, n + 1)
    names = sorted(llama.special_tokens, key=llama.special_tokens.get)
    assert list(llama.special_tokens.values()) == list(range(n, n + 256))
    assert names[:13] == [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
        "<|reserved_special_token_2|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eom_id|>",
        "<|eot_id|>",
        "<|python_tag|>",
        "<|reserved_special_token_3|>",
        "<|reserved_special_token_4|>",
    ]
    assert names[-1] == "<|reserved_special_token_247|>"


def test_tiktoken_takes_special_tokens_in_text_as_text(llama, ranks):
    for name in llama.special_tokens:
        tokens = llama.encode(f"a {name} b")
        assert max(tokens) < len(ranks)
        assert llama.decode(tokens) == f"a {name} b"


def test_tiktoken_decodes_every_id(llama, ranks):
    assert llama.decode(list(llama.special_tokens.values())) == ""
    for token, rank in ranks.items():
        assert llama.decode([llama.bos_id, rank, llama.eos_id]) == token.decode("utf-8", "replace")


@pytest.mark.parametrize("separator", [" ", "\n", "", "。", "5"])
def test_tiktoken_in_pieces_gives_the_tokens_of_the_whole(llama, ranks, separator):
    direct = tiktoken.Encoding("direct", pat_str=LLAMA3_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    text = prose(4, 60_000).replace(" ", separator)
    assert len(list(tokenizer_module._pieces(text))) > 40
    assert llama.encode(text) == direct.encode_ordinary(text)


def test_pieces_are_never_longer_than_promised():
    for text in (prose(5, 5000), "x" * 100_000, "", " " * tokenizer_module.PIECE_CHARS * 2):
        pieces = list(tokenizer_module._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces)) <= 2 * tokenizer_module.PIECE_CHARS


EDGY = st.text(alphabet="ab st'SZé中½²5_.,!。-   \t\n\n\r\x0b\x1c\x85\u00a0\u2028\u0301😀", max_size=20)


@given(text=st.one_of(EDGY, EDGY, st.text(max_size=10)))
def test_a_safe_cut_changes_no_token(text):
    # With every stretch of the text in the vocabulary, each match of the split pattern becomes one token of its own.
    data = text.encode("utf-8", "replace")
    stretches = {data[start:stop]: 0 for start, stop in itertools.combinations(range(len(data) + 1), 2)}
    encoding = tiktoken.Encoding(
        "stretches",
        pat_str=LLAMA3_SPLIT_PATTERN,
        mergeable_ranks={
            token: rank for rank, token in enumerate({bytes([byte]): 0 for byte in range(256)} | stretches)
        },
        special_tokens={},
    )
    whole = encoding.encode_ordinary(text)
    for cut in SAFE_CUT.finditer(text):
        place = cut.start()
        assert encoding.encode_ordinary(text[:place]) + encoding.encode_ordinary(text[place:]) == whole, place


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[:-1] + [lines[-1][:3]], r"line 300 is not '<base64> <rank>'"),
        (lambda lines: lines[:-1] + [lines[-1][:-2]], r"ranks are not 0\.\.299, each once"),
        (lambda lines: lines[:50] + [b"@@@@ 50"] + lines[51:], r"line 51 is not .* but b'@@@@ 50'"),
        (lambda lines: lines[:50] + [b"IQ== 33 34"] + lines[51:], r"line 51 is not"),
        (lambda lines: lines[:50] + [b"IQ== x"] + lines[51:], r"line 51 is not"),
        (lambda lines: lines[:50] + lines[51:], r"ranks are not 0\.\.298, each once; the first amiss is 50"),
        (lambda lines: lines[:50] + lines[49:], r"1 of its 301 lines repeat a token"),
        (lambda lines: lines[:200], r"56 of the 256 single bytes are no token, the first 0xc8"),
    ],
)
def test_tiktoken_refuses_damaged_ranks(ranks, build_from, damage, said):
    lines = rank_lines(dict(itertools.islice(ranks.items(), 300))).splitlines()
    message = build_from("tiktoken", b"\n".join(damage(lines)))
    assert "cut short or damaged" in message
    assert re.search(said, message)


def test_tiktoken_takes_ranks_in_any_order_and_blank_lines(ranks, tmp_path, llama):
    path = tmp_path / "some.model"
    lines = rank_lines(ranks).splitlines()
    path.write_bytes(b"\r\n".join(reversed(lines)) + b"\n\n")
    reordered, text = build_tokenizer("tiktoken", str(path)), prose(6, 100)
    assert reordered.encode(text) == llama.encode(text)
    assert reordered.decode(llama.encode(text)) == text


# Settings that cannot work


def test_an_unknown_name_lists_those_there_are():
    assert refusal("tiktokn", None).endswith("not one of bytes, mock, sp, tiktoken; did you mean tiktoken?")
    assert refusal("SP", None).endswith("did you mean sp?")
    assert refusal("llama", None).endswith("not one of bytes, mock, sp, tiktoken")
    assert "data.tokenizer.name=None" in refusal(None, None)


@pytest.mark.parametrize(("name", "kind"), [("sp", "sentencepiece model"), ("tiktoken", "tiktoken rank file")])
def test_a_path_that_is_no_file(tmp_path, name, kind):
    for unset in (None, ""):
        with pytest.raises(ValueError, match=rf"^data\.tokenizer\.path is not set; .*{name} needs a {kind} there$"):
            build_tokenizer(name, unset)
    assert "no such file" in refusal(name, str(tmp_path / "none.model"))
    assert "a folder" in refusal(name, str(tmp_path))
    assert "not a file" in refusal(name, os.devnull)
    assert refusal(name, "none.model").endswith(
        f"({os.path.abspath('none.model')!r}); data.tokenizer.name={name} needs a {kind}"
    )


@pytest.mark.parametrize("name", ["sp", "tiktoken"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (bytes(range(128, 256)) * 8, "a file of another kind"),
        (b"the quick brown fox\n", "a file of another kind"),
        (b"\n", "a file of another kind"),
        (b'{\n  "version": "1.0",', "tokenizer.json"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html>", "a web page"),
        (b"PK\x03\x04rest", "PyTorch checkpoint"),
        (b"\x1f\x8brest", "gzip"),
    ],
)
def test_a_file_of_another_kind(build_from, capfd, name, content, said):
    message = build_from(name, content)
    assert said in message
    assert f"data.tokenizer.name={name} needs a" in message
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["sp", "tiktoken"])
@pytest.mark.parametrize("protocol", [0, 4])
def test_a_pickle_runs_no_code(build_from, tmp_path, name, protocol):
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'mark'}'",)

    build_from(name, pickle.dumps(Hostile(), protocol))
    assert not (tmp_path / "mark").exists()


def test_a_file_for_the_other_tokenizer(files):
    assert refusal("sp", files["tiktoken"]).endswith(
        "looks like a tiktoken rank file, not a sentencepiece model; set data.tokenizer.name=tiktoken"
    )
    assert refusal("tiktoken", files["sp"]).endswith(
        "looks like a sentencepiece model, not a tiktoken rank file; set data.tokenizer.name=sp"
    )


def test_a_file_that_may_not_be_read(files, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    # Root may read everything, so permissions on the file would show nothing where the tests run as root.
    monkeypatch.setattr(tokenizer_module, "open", refuse, raising=False)
    assert "cannot be read (Permission denied)" in refusal("tiktoken", files["tiktoken"])
