"""What a text's tokens mean beside others: the space before a continuation, the bytes of the first token."""

import pytest

from apps.main.hf import _pretrained_tokenizer
from lingua.tokenizer import build_tokenizer
from tests.lingua.test_tokenizer import rank_lines, train_ranks, train_sentencepiece

VERBATIM = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}  # as Llama 2's
PROMPTS = ["import os", "the quick", "日本", "fox\n", "fox ", "x", "", " "]
TEXTS = [" and memory", "and memory", "  two", " 日本 x", "日本", "\n", ""]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name -> tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    contents = {
        "sp": train_sentencepiece(),
        "sp_verbatim": train_sentencepiece(**VERBATIM),
        "sp_without_prefix": train_sentencepiece(**VERBATIM, add_dummy_prefix=False),
        "tiktoken": rank_lines(train_ranks("the quick brown fox and memory " * 9, 20)),
    }
    models = {name: build_tokenizer(name) for name in ("bytes", "mock")}
    for name, content in contents.items():
        file = folder / name
        file.write_bytes(content)
        models[name] = build_tokenizer(name.partition("_")[0], str(file))
    return models


SP = ["sp", "sp_verbatim", "sp_without_prefix"]
ALL = ["bytes", "mock", "tiktoken", *SP]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", ALL)
def test_a_continuation_is_what_its_tokens_add_to_the_text(models, name, prompt):
    tokenizer = models[name]
    for text in TEXTS:
        whole = tokenizer.encode(prompt + text)
        for cut in range(len(whole) + 1):
            before, after = whole[:cut], whole[cut:]
            both = tokenizer.decode(whole)
            start = tokenizer.decode(before)
            # (Where the cut is within a character, the start is no start of the whole.)
            if both.startswith(start):
                assert tokenizer.decode(after, before=before) == both[len(start) :]
                assert tokenizer.decode(after, before=[tokenizer.bos_id, *before]) == both[len(start) :]


@pytest.mark.parametrize("name", SP)
def test_the_first_space_of_a_continuation(models, name):
    tokenizer = models[name]
    prompt = tokenizer.encode("import os", add_bos=True)
    space = tokenizer.model.piece_to_id("▁")
    (letter,) = [token for token in tokenizer.encode("x") if token != space]
    assert tokenizer.decode([space, letter], before=prompt) == " x"
    assert tokenizer.decode([letter], before=prompt) == "x"
    # At the start of a text there is nothing that a space could part it from.
    assert tokenizer.decode([space, letter], before=[tokenizer.bos_id]) == tokenizer.decode([space, letter])
    with pytest.raises(ValueError, match="is outside this tokenizer's"):
        tokenizer.decode([letter], before=[tokenizer.n_words])


def test_the_rest_of_a_character_that_the_prompt_has_begun(models):
    tokenizer = models["sp_verbatim"]
    pieces = [tokenizer.model.piece_to_id(f"<0x{byte:02X}>") for byte in "日".encode()]
    assert tokenizer.decode(pieces[1:], before=[*tokenizer.encode("x"), pieces[0]]) == "日"


@pytest.mark.parametrize("name", SP)
def test_transformers_add_the_same(models, name):
    """Its own decoding of whole sequences, with a tokenizer as it is exported."""
    tokenizer = models[name]
    theirs = _pretrained_tokenizer("sp", tokenizer, True, 64)
    n_compared = 0
    for prompt in PROMPTS[:-2]:
        ids = tokenizer.encode(prompt, add_bos=True)
        for text in TEXTS:
            more = tokenizer.encode(prompt + text)[len(ids) - 1 :]
            start, whole = (theirs.decode(part, skip_special_tokens=True) for part in (ids, ids + more))
            if whole.startswith(start):
                assert tokenizer.decode(more, before=ids) == whole[len(start) :]
                n_compared += bool(more)
    assert n_compared > 20


@pytest.mark.parametrize("name", ALL)
def test_the_bytes_of_the_first_token(models, name):
    tokenizer = models[name]
    for text in ["import os", "the quick", "memory", "x", ""]:
        tokens = tokenizer.encode(text)
        first = len(text) - len(tokenizer.decode(tokens[1:], before=tokens[:1]))
        assert tokenizer.count_first_bytes(text, tokens) == first
        assert tokenizer.count_first_bytes(text, tokenizer.encode(text, add_eos=True)) == first
        assert tokenizer.count_first_bytes(text, tokenizer.encode(text, add_bos=True, add_eos=True)) == 0
    # A part of a character, but where the first token is the dummy prefix, which stands for no byte.
    first = 0 if name in ("sp", "sp_verbatim") else 1
    assert tokenizer.count_first_bytes("日本", tokenizer.encode("日本")) == first
