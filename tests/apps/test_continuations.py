"""Generated texts: the space that they begin with, stop strings that begin with one, their log-likelihoods."""

import io
import json
import sys

import pytest
import torch
from lm_eval.api.instance import Instance

from apps.main import generate
from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator
from apps.main.harness import LinguaLM, SharedGenerator
from lingua.tokenizer import build_tokenizer
from tests.helpers.evaluation import small_model
from tests.lingua.test_tokenizer import train_sentencepiece

PROMPT = "import os"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A sentencepiece model with the trainer's defaults, among them a dummy prefix."""
    file = tmp_path_factory.mktemp("sp") / "sp.model"
    file.write_bytes(train_sentencepiece())
    return build_tokenizer("sp", str(file))


@pytest.fixture
def says(tokenizer, monkeypatch):
    """`says(text, **arguments)`: a generator whose model continues PROMPT with `text`, whatever it computes."""

    def make(text, **arguments):
        tokens = tokenizer.encode(PROMPT + text)[len(tokenizer.encode(PROMPT)) :] + [tokenizer.eos_id]
        steps = iter(tokens * 10)
        monkeypatch.setattr(generate, "sample", lambda logits, *_: torch.full(logits.shape[:1], next(steps)))
        args = GeneratorArgs(**{"max_gen_len": 40, "dtype": "fp32", "device": "cpu"} | arguments)
        return PackedCausalTransformerGenerator(
            args, small_model(max_seqlen=96, vocab_size=tokenizer.n_words), tokenizer
        )

    return make


@pytest.mark.parametrize("text", [" and memory", "x", " 日本"])
def test_the_first_space_stays(says, text):
    assert says(text).generate([PROMPT])[0] == [text]


@pytest.mark.parametrize(("until", "text"), [([" and"], ""), (["and"], " "), ([" memory"], " and"), (["import"], None)])
def test_stop_strings_that_begin_with_a_space(says, until, text):
    whole = " and memory"
    generator = says(whole, until=until)
    (continuation,) = generator.continuations([PROMPT])
    assert continuation.text == (whole if text is None else text)
    assert continuation.finish_reason == ("eos" if text is None else "stop")


def test_lm_evals_requests_get_the_space_too(says):
    lm = LinguaLM(SharedGenerator(says(" and memory")))
    cases = [({"until": [" memory"]}, " and"), ({"until": []}, " and memory"), ({"until": [" and"]}, "")]
    for arguments, text in cases:
        (answer,) = lm.generate_until([Instance("generate_until", {}, (PROMPT, arguments | {"max_gen_toks": 30}), 0)])
        lm.shared.generator = lm.generator = says(" and memory")
        assert answer == text


def test_the_terminal_shows_prompt_and_text_as_one(says, capsys):
    answer = generate.answer_one(says(" and memory"), PROMPT, lambda answer: None)
    assert capsys.readouterr().out == "import os and memory\n"
    assert answer["text"] == " and memory"


def test_an_empty_prompt_is_the_start_of_a_text(says, tokenizer):
    assert says(" and").generate([""])[0] == ["and"]


# --- log-likelihoods -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab_size", [258, 300])
def test_log_likelihoods_of_the_text_are_those_of_scoring_it(temperature, vocab_size):
    """Of each token, given all before it; `generate` returns those of the prompt."""
    args = GeneratorArgs(max_gen_len=12, max_tokens=60, dtype="fp32", device="cpu", temperature=temperature, top_k=9)
    model = small_model(max_seqlen=64, vocab_size=vocab_size)
    generator = PackedCausalTransformerGenerator(args, model, build_tokenizer("bytes"))
    prompts = ["ab", "a longer prompt, much more", "xyz" * 5]
    found = generator.continuations(prompts)
    for prompt, continuation in zip(prompts, found, strict=True):
        tokens = generator.encode(prompt)
        assert len(continuation.log_likelihoods) == len(continuation.tokens) == 12
        ((whole, _),) = generator.score_batch([tokens + continuation.tokens])
        assert torch.allclose(torch.tensor(continuation.log_likelihoods), whole[len(tokens) - 1 :], atol=1e-5)
    texts, of_prompts, _ = generator.generate(prompts)
    assert len(texts[0]) > 0
    assert [len(likelihoods) for likelihoods in of_prompts] == [len(prompt) for prompt in prompts]


def test_the_command_writes_log_likelihoods(says, tokenizer, tmp_path, monkeypatch, capsys):
    generator = says(" and memory")
    loaded = small_model(max_seqlen=96, vocab_size=tokenizer.n_words), tokenizer, {"data": {"add_bos": True}}
    monkeypatch.setattr(generate, "load_consolidated_model_and_tokenizer", lambda *_: loaded)
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    for name, prompt in (("list", [f'prompts=["{PROMPT}"]']), ("one", [f"prompt={PROMPT}"]), ("terminal", [])):
        says(" and memory")
        out = tmp_path / name
        fixed = ["ckpt=x", f"out={out}", "dtype=fp32", "device=cpu", "max_gen_len=40"]
        monkeypatch.setattr(sys, "argv", ["generate", *fixed, *prompt])
        generate.main()
        line = json.loads(out.read_text())
        tokens = tokenizer.encode(PROMPT, add_bos=True)
        more = tokenizer.encode(PROMPT + line["text"], add_bos=True)[len(tokens) :]
        ((whole, _),) = generator.score_batch([tokens + more])
        assert line["log_likelihoods"] == pytest.approx(whole[len(tokens) - 1 :].tolist(), abs=1e-4)
        assert len(line["log_likelihoods"]) == line["n_tokens"] == len(more)
