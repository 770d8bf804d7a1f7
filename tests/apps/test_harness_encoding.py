"""How lm-eval's requests are encoded where tokens span context and continuation, beside lm-eval's own HF backend."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers looks

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from apps.main.generate import GeneratorArgs, PackedCausalTransformerGenerator, load_consolidated_model_and_tokenizer
from apps.main.harness import LinguaLM, SharedGenerator
from apps.main.hf import export_hf
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import to_dict
from lingua.data import DataArgs
from lingua.tokenizer import TokenizerArgs, build_tokenizer
from tests.lingua.test_tokenizer import prose, rank_lines, train_ranks, train_sentencepiece


@pytest.fixture(scope="module", params=["tiktoken", "sp"])
def both(request, tmp_path_factory):
    """(our model as lm-eval sees it, the same model exported, behind lm-eval's own backend)."""
    folder = tmp_path_factory.mktemp(request.param)
    file = folder / "tokenizer.model"
    file.write_bytes(
        rank_lines(train_ranks(prose(2, 300), 60)) if request.param == "tiktoken" else train_sentencepiece()
    )
    tokenizer = build_tokenizer(request.param, str(file))
    sizes = LMTransformerArgs(dim=32, n_layers=2, n_heads=2, vocab_size=tokenizer.n_words, max_seqlen=24)
    data = DataArgs(tokenizer=TokenizerArgs(request.param, str(file)))
    checkpoint = folder / "ours"
    checkpoint.mkdir()
    torch.save({"model": LMTransformer(sizes).state_dict()}, checkpoint / "consolidated.pth")
    (checkpoint / "params.json").write_text(json.dumps({"model": to_dict(sizes), "data": to_dict(data)}))
    model, tokenizer, _ = load_consolidated_model_and_tokenizer(checkpoint)
    generator = PackedCausalTransformerGenerator(GeneratorArgs(dtype="fp32", device="cpu"), model, tokenizer)
    exported = export_hf(checkpoint, folder / "theirs")
    theirs = HFLM(pretrained=str(exported), device="cpu", dtype="float32", batch_size=1)
    return LinguaLM(SharedGenerator(generator)), theirs


def score(lm, context, continuation):
    (answer,) = lm.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)], disable_tqdm=True)
    return answer


def spanning(lm):
    """A (context, continuation) that one token spans."""
    words = ("station", "nation", "motion", "the", "memory", "quick", "brown", "layers")
    parts = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    return next(part for part in parts if len(lm.tok_encode("".join(part))) <= len(lm.tok_encode(part[0])))


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("a station", " of caution"), ("a station ", "of"), ("a st", "ation"), ("", "motion"), ("  ", "x"), ("on", "on")],
)
def test_scores_are_those_of_lm_evals_own_backend(both, context, continuation):
    ours, theirs = (score(lm, context, continuation) for lm in both)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
    assert ours[1] == theirs[1]
    assert ours[0] < 0


def test_a_token_that_spans_context_and_continuation(both):
    """Encoded apart: the score is that of the continuation's own tokens after the context's."""
    ours, theirs = both
    context, continuation = spanning(ours)
    apart = theirs.tok_encode(context), theirs.tok_encode(continuation, add_special_tokens=False)
    assert theirs._encode_pair(context, continuation)[1] in ([], apart[1])  # the latter in releases after 0.4.13
    ((likelihood, greedy),) = theirs._loglikelihood_tokens([((context, continuation), *apart)], disable_tqdm=True)
    found = score(ours, context, continuation)
    assert found[0] == pytest.approx(likelihood, abs=1e-4)
    assert found[1] == greedy
    assert found[0] < 0  # 0 would be better than any other choice


def test_an_empty_text_is_certain(both):
    ours, _ = both
    assert score(ours, "a station", "") == (0.0, True)
    assert score(ours, "", "") == (0.0, True)


def test_a_text_that_the_tokenizer_drops_has_no_score(both):
    ours, _ = both
    if ours.generator.tokenizer.encode(" "):
        assert score(ours, "a", " ")[0] < 0
        return
    for context in ("a", ""):
        with pytest.raises(ValueError, match="harness.tasks: the tokenizer has no token for the continuation '  '"):
            score(ours, context, "  ")
    assert score(ours, "a ", "") == (0.0, True)
