"""apps/capacity: people, the bits that a model knows about them, and the ladder."""

import itertools
import json
import math
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml

from apps.capacity import people as bios
from apps.capacity import run as ladder
from apps.capacity.measure import measure
from apps.capacity.people import ATTRIBUTES, N_NAMES, People, write_exposures
from apps.capacity.templates import TEMPLATES
from apps.main.eval import EvalArgs
from lingua.args import from_dict
from lingua.errors import UserError
from lingua.tokenizer import build_tokenizer
from tests.helpers.evaluation import write_facts
from tests.helpers.training import run_in_process

CONFIGS = Path(ladder.__file__).parent / "configs"


# --- people ----------------------------------------------------------------------------------------------------------


def test_lists_have_the_papers_sizes():
    names = [bios.FIRST_NAMES, bios.MIDDLE_NAMES, bios.LAST_NAMES]
    lists = [*names, bios.CITIES, bios.UNIVERSITIES, bios.MAJORS, bios.EMPLOYERS]
    assert [len(words) for words in lists] == [400, 400, 1000, 200, 300, 100, 263]
    assert all(len(set(words)) == len(words) for words in lists)
    assert len(bios.WORK_CITIES) == 263
    assert set(bios.WORK_CITIES) <= set(bios.CITIES)
    assert [len(set(lines)) for lines in TEMPLATES.values()] == [40] * 6
    assert all(line.count("_") == 1 for lines in TEMPLATES.values() for line in lines)


def test_people_differ_and_follow_from_the_seed():
    people, same, others = People(500, 3), People(500, 3), People(500, 4)
    names = [people.name(i) for i in range(500)]
    assert len(set(names)) == 500
    assert [same.name(i) for i in range(500)] == names
    assert [same.values(i) for i in range(500)] == [people.values(i) for i in range(500)]
    assert [others.name(i) for i in range(500)] != names
    values = people.values(7)
    assert values["work_city"] == bios.WORK_CITIES[bios.EMPLOYERS.index(values["employer"])]


def test_an_exposure_tells_everything_in_words_of_its_own():
    people = People(30, 1)
    first, again, second = (list(people.exposures(number)) for number in (0, 0, 1))
    assert first == again
    texts = {biography.text[slice(*biography.spans["name"])]: biography.text for biography in first}
    assert len(texts) == 30
    for biography in second:
        name = biography.text[slice(*biography.spans["name"])]
        assert biography.text.startswith(name)
        assert biography.text.count(name) == 1
        assert texts[name] != biography.text
        person = next(i for i in range(30) if people.name(i) == name)
        assert {key: biography.text[slice(*biography.spans[key])] for key in TEMPLATES} == people.values(person)
        assert biography.text.count(". ") == 5
    assert [b.text for b in first] != [texts[people.name(i)] for i in range(30)]  # in an order of its own


def test_training_text_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bios, "CHUNK_DOCUMENTS", 20)
    people = People(10, 1)
    write_exposures(people, 5, tmp_path, workers=1)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == [f"bios.chunk.{number:04d}.jsonl" for number in range(3)]
    texts = [json.loads(line)["text"] for file in files for line in file.read_text().splitlines()]
    assert texts == [biography.text for number in range(5) for biography in people.exposures(number)]
    files[1].unlink()
    files[2].write_text("kept")
    write_exposures(people, 5, tmp_path, workers=1)
    assert len(files[1].read_text().splitlines()) == 20
    assert files[2].read_text() == "kept"


def test_more_people_than_names_are_refused():
    with pytest.raises(ValueError, match="people: 100000000 must be between 1 and 80000000"):
        People(100_000_000)


# --- the measure -----------------------------------------------------------------------------------------------------


class Reader:
    """A model over bytes that knows some texts: what may come next is as likely as it is frequent among those."""

    def __init__(self, texts):
        self.counts = Counter(text[:end] for text in texts for end in range(len(text) + 1))

    def nll(self, text):
        return [-math.log(self.counts[text[: i + 1]] / self.counts[text[:i]]) for i in range(len(text))]


def scorer(people, name_reader, value_readers):
    """Scores biographies of `people` in their order: names and values as the readers do, all else as certain."""
    biographies = iter(people.for_measurement)

    def score(sequences):
        results = []
        for sequence, biography in zip(sequences, biographies, strict=False):
            nll = torch.zeros(len(sequence) - 1)
            for name, reader in {"name": name_reader, **value_readers(biography)}.items():
                begin, end = biography.spans[name]
                nll[begin:end] = torch.tensor(reader.nll(biography.text[begin:end]))
            results.append((-nll, nll == 0))
        return results

    return score


def test_who_knows_everything_has_all_bits():
    people = People(64, 5)
    names = Reader([people.name(i) for i in range(64)])
    score = scorer(people, names, lambda b: {k: Reader([b.text[slice(*b.spans[k])]]) for k in ATTRIBUTES})
    found = measure(score, build_tokenizer("bytes"), people)
    values = sum(math.log2(size) for size in ATTRIBUTES.values())
    assert found["bits"] == pytest.approx(64 * (math.log2(N_NAMES / 64) + values), rel=1e-4)
    assert found["bits"] == pytest.approx(found["possible_bits"], rel=1e-4)
    assert found["exact_match"] == dict.fromkeys(ATTRIBUTES, 1.0)


def test_who_knows_only_the_lists_has_no_bits():
    people = People(64, 5)
    dates = [f"{m} {d + 1}, {1900 + y}" for y in range(200) for m in bios.MONTHS for d in range(28)]
    lists = {
        "birth_date": Reader(dates),
        "birth_city": Reader(bios.CITIES),
        "university": Reader(bios.UNIVERSITIES),
        "major": Reader(bios.MAJORS),
        "employer": Reader(bios.EMPLOYERS),
    }
    words = [Reader(f"{word} " for word in names) for names in (bios.FIRST_NAMES, bios.MIDDLE_NAMES)]
    words.append(Reader(bios.LAST_NAMES))

    class Names:
        def nll(self, text):
            first, middle, last = text.split(" ")
            parts = (f"{first} ", f"{middle} ", last)
            return list(itertools.chain.from_iterable(r.nll(p) for r, p in zip(words, parts, strict=True)))

    found = measure(scorer(people, Names(), lambda _: lists), build_tokenizer("bytes"), people)
    assert found["possible_bits"] > 3000
    assert abs(found["bits"]) < 0.5
    assert all(abs(bits) < 0.1 for bits in found["value_bits"].values())
    assert found["exact_match_mean"] == 0


def test_a_token_that_reaches_into_a_value_counts_as_the_values(tmp_path, tokenizer_file):
    people = People(20, 5)
    tokenizer = build_tokenizer("sp", str(tokenizer_file))

    def score(sequences):
        return [(torch.full((len(s) - 1,), -1.0), torch.ones(len(s) - 1, dtype=torch.bool)) for s in sequences]

    found = measure(score, tokenizer, people)
    n_tokens = 0
    for biography in people.for_measurement:
        begin, end = biography.spans["employer"]
        assert tokenizer.decode(tokenizer.encode(biography.text)) == biography.text
        before, until = (len(tokenizer.encode(biography.text[:place].rstrip())) for place in (begin, end))
        n_tokens += until - before
    bits = 20 * math.log2(ATTRIBUTES["employer"]) - n_tokens / math.log(2)
    # A word before a border may be cut into other tokens than the whole text is, in some of them.
    assert found["value_bits"]["employer"] == pytest.approx(bits, abs=0.2 * n_tokens)


# --- the ladder ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "TOKENIZER_BIOGRAPHIES", 3000)
        ladder.train_tokenizer(file, 3000)
    return file


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_shipped_ladders_have_equal_flops(name, tmp_path, tokenizer_file):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    args = from_dict(ladder.LadderArgs, {**config, "dump_dir": str(tmp_path)}, name)
    ladder.validate_ladder_args(args)
    (tmp_path / "data" / "bios").mkdir(parents=True)
    (tmp_path / "data" / "bios" / "bios.chunk.0000.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    runs = ladder.plan_runs(args, [40, 64])
    assert len({run.name for run in runs}) == sum(model.seeds for model in args.models) == len(runs)
    flops = {run.model: ladder.flops(from_dict(ladder.TrainArgs, with_vocabulary(run.config), name)) for run in runs}
    for model in args.models:
        assert flops[model.name] == pytest.approx(model.flops * flops["dense"], rel=ladder.FLOPS_TOLERANCE)
    assert len([model for model in args.models if model.flops == 1]) >= 5
    exposures = runs[0].steps * runs[0].config["data"]["batch_size"] * runs[0].config["data"]["seq_len"] / 52
    assert exposures / args.people == pytest.approx(args.exposures, rel=0.01)


def test_the_shipped_ladder_on_text_has_equal_flops(tmp_path, tokenizer_file, monkeypatch):
    """In steps of its own, with the data that it names."""
    config = yaml.safe_load((CONFIGS / "text.yaml").read_text())
    data = config["train"]["data"]
    for source in data["sources"]:
        (tmp_path / data["root_dir"] / source).mkdir(parents=True)
        (tmp_path / data["root_dir"] / source / f"{source}.chunk.0.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / data["tokenizer"]["path"]).parent.mkdir()
    (tmp_path / data["tokenizer"]["path"]).write_bytes(tokenizer_file.read_bytes())
    monkeypatch.chdir(tmp_path)
    args = from_dict(ladder.LadderArgs, config, "text")
    runs = ladder.plan_runs(args)
    flops = {run.model: ladder.flops(from_dict(ladder.TrainArgs, with_vocabulary(run.config), "text")) for run in runs}
    for model in args.models:
        assert flops[model.name] == pytest.approx(model.flops * flops["dense"], rel=ladder.FLOPS_TOLERANCE)
    assert [model.flops for model in args.models] == [1, 2, 4, 1, 1, 1, 1]
    for run in runs:
        assert run.steps == run.config["steps"] == args.steps
        assert run.config["data"] == {**data, "seed": 0}


def with_vocabulary(config):
    return {**config, "model": {**config["model"], "vocab_size": 3000, "max_seqlen": config["data"]["seq_len"]}}


def test_flops_that_cannot_be_reached_are_refused(tmp_path, tokenizer_file):
    small = {"dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 8}
    memory = {"is_enabled": True, "layers": "1", "mem_n_keys": 256, "mem_k_dim": 64}
    models = [{"name": "dense"}, {"name": "memory", "train": {"model": {"productkey_args": memory}}}]
    values = {"dump_dir": str(tmp_path), "people": 10, "exposures": 1, "train": {"model": small}, "models": models}
    (tmp_path / "data" / "bios").mkdir(parents=True)
    (tmp_path / "data" / "bios" / "bios.chunk.0000.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    with pytest.raises(ValueError, match=r"^models\.memory: .* FLOPs per token with feed-forwards of 8 hidden units"):
        ladder.plan_runs(from_dict(ladder.LadderArgs, values, "test"), [40, 64])


def test_rows_that_are_too_short_are_refused_before_training(tmp_path, tokenizer_file):
    train = {"data": {"seq_len": 64}, "model": {"dim": 16, "n_layers": 1, "n_heads": 1}}
    values = {"dump_dir": str(tmp_path), "people": 10, "exposures": 1, "train": train, "models": [{"name": "a"}]}
    with pytest.raises(ValueError, match=r"^models\.a\.train\.data\.seq_len: 64 is too short .* make it 84 or more"):
        ladder.plan_runs(from_dict(ladder.LadderArgs, values, "test"), [50, 70])


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"dump_dir": ""}, "dump_dir: not set"),
        ({"exposures": 0}, "exposures: 0"),
        ({"minutes": 0}, "minutes: 0"),
        ({"models": []}, "models: empty"),
        ({"models": [{"name": "a/b"}]}, "models.0.name: 'a/b'"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "models: two have the same name"),
        ({"models": [{"name": "a", "flops": 0}]}, "models.0: flops"),
        ({"models": [{"name": "a", "flops": math.inf}]}, "models.0: flops"),
        ({"people_seed": -1}, "people_seed"),
        ({"steps": 0}, "steps: 0"),
        ({"eval": {}}, "eval: measures models of real text; set steps"),
        ({"steps": 9, "eval": {"ckpt_dir": "x"}}, "eval.ckpt_dir: follows from the run"),
        ({"steps": 9, "eval": {"validation": {"max_steps": 0}}}, "eval.validation.max_steps: 0"),
        ({"train": "fast"}, "train: 'fast' where keys of the training config are wanted"),
        ({"train": {"data": 5}}, "train.data: '5' where a section"),
    ],
)
def test_bad_ladders_are_refused(tmp_path, changes, line):
    values = {"dump_dir": str(tmp_path), "models": [{"name": "dense"}], **changes}
    with pytest.raises(ValueError, match=line):
        ladder.validate_ladder_args(from_dict(ladder.LadderArgs, values, "test"))


def train_with(command, tmp_path, monkeypatch, **values):
    """`train_all` of one run, for which `command` stands in."""

    def start(worker, module, *argv):
        worker.errors = (tmp_path / "training.err").open("wb")
        return subprocess.Popen(command, stderr=worker.errors)

    monkeypatch.setattr(ladder.Worker, "_start", start)
    args = from_dict(ladder.LadderArgs, {"dump_dir": str(tmp_path), **values}, "test")
    return ladder.train_all(args, [ladder.Run("a.seed0", "a", tmp_path, {}, 10)])


def test_a_run_that_is_stopped_in_time_has_not_failed(tmp_path, monkeypatch):
    """Measuring does not answer TERM: it ends by that, and begins again next time."""
    assert not train_with(["sleep", "60"], tmp_path, monkeypatch, minutes=1e-3)


def test_a_run_that_fails_ends_in_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"^a\.seed0: training ended with code 3: no room; all of it: .*training\.err$"):
        train_with(["bash", "-c", "echo no room >&2; exit 3"], tmp_path, monkeypatch)


def test_a_vocabulary_that_the_text_does_not_give_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "TOKENIZER_BIOGRAPHIES", 20)
    with pytest.raises(UserError, match="^vocab_size: 10 cannot be had"):
        ladder.train_tokenizer(tmp_path / "tokenizer.model", 10)
    assert list(tmp_path.iterdir()) == []


def test_a_ladder_from_end_to_end(tmp_path, tokenizer_file, monkeypatch, caplog):
    """One memory model; the second call finds everything done, and other people in the same folder are refused."""
    memory = {"is_enabled": True, "layers": "1", "mem_n_keys": 16, "mem_heads": 1, "mem_knn": 4, "mem_k_dim": 8}
    model = {"dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 8, "productkey_args": memory}
    train = {"data": {"batch_size": 4, "seq_len": 128}, "optim": {"warmup": 1}, "model": model}
    train["distributed"] = {"model_dtype": "fp32"}
    values = {"dump_dir": str(tmp_path / "ladder"), "people": 12, "exposures": 2, "vocab_size": 3000, "train": train}
    values["models"] = [{"name": "memory"}]
    args = from_dict(ladder.LadderArgs, values, "test")
    (tmp_path / "ladder").mkdir()
    (tmp_path / "ladder" / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    runs = ladder.prepare(args)
    assert ladder.train_all(args, runs)
    ladder.report(args, runs)
    [row] = json.loads((tmp_path / "ladder" / "results.json").read_text())
    assert (row["run"], row["slots"], row["people"], row["steps"]) == ("memory.seed0", 256, 12, runs[0].steps)
    assert row["memory_parameters"] == 256 * 16
    assert row["bits_per_parameter"] == pytest.approx(row["bits"] / row["parameters"])
    assert (tmp_path / "ladder" / "capacity.png").stat().st_size > 10_000

    monkeypatch.setattr(ladder, "Worker", None)  # nothing may be started
    assert ladder.train_all(args, ladder.prepare(args))
    args.people = 13
    with pytest.raises(ValueError, match="dump_dir: .* holds text of"):
        ladder.prepare(args)


class Done:
    """A process that has ended."""

    def __init__(self, code):
        self.code = code

    def poll(self):
        return self.code


def test_a_ladder_on_text_from_end_to_end(tmp_path, monkeypatch, caplog):
    """Two models, measured by held-out text and a task. Another measure in the same folder is refused."""
    data, tasks = write_facts(tmp_path)
    folder = tmp_path / "ladder"
    memory = {"is_enabled": True, "layers": "1", "mem_n_keys": 16, "mem_heads": 1, "mem_knn": 4, "mem_k_dim": 8}
    values = {
        "dump_dir": str(folder),
        "steps": 3,
        "train": {
            "data": {
                "root_dir": str(data),
                "sources": {"facts": 1.0},
                "batch_size": 4,
                "seq_len": 96,
                "load_async": False,
            },
            "optim": {"warmup": 1},
            "model": {"dim": 16, "n_layers": 2, "n_heads": 2, "multiple_of": 2},
            "distributed": {"model_dtype": "fp32"},
            "logging": {"freq": 1},
        },
        "eval": {"harness": {"tasks": ["facts_choice"], "include_path": str(tasks), "bootstrap_iters": 0}},
        "models": [{"name": "dense"}, {"name": "memory", "train": {"model": {"productkey_args": memory}}}],
    }

    def start(worker, module, *argv):
        worker.errors = (worker.run.folder / f"{worker.stage}.err").open("wb")
        return Done(run_in_process(argv, tmp_path, module).ok().code)

    monkeypatch.setattr(ladder.Worker, "_start", start)
    monkeypatch.setattr(ladder.time, "sleep", lambda seconds: None)
    args = from_dict(ladder.LadderArgs, values, "test")
    ladder.validate_ladder_args(args)
    assert ladder.train_all(args, ladder.prepare(args))
    dense, memory = json.loads((folder / "results.json").read_text())
    assert (dense["run"], dense["slots"], dense["tokens"]) == ("dense.seed0", 0, 3 * 4 * 96)
    assert (memory["slots"], memory["memory_parameters"]) == (256, 256 * 16)
    assert memory["flops_per_token"] == pytest.approx(dense["flops_per_token"], rel=0.01)
    names = ["facts_choice: acc", "facts_choice: acc_norm", "facts: bits per byte"]
    assert list(dense["measures"]) == list(memory["measures"]) == names
    validation = json.loads((folder / "runs" / "dense.seed0" / "evals" / "0000000003" / "validation.json").read_text())
    assert validation["settings"]["dtype"] == "fp32"
    assert dense["measures"]["facts: bits per byte"] == validation["facts"]["bits_per_byte"]
    assert (folder / "capacity.svg").stat().st_size > 10_000

    monkeypatch.setattr(ladder, "Worker", None)  # nothing may be started
    assert ladder.train_all(args, ladder.prepare(args))
    args.eval = EvalArgs()
    with pytest.raises(UserError, match="dump_dir: .* holds text of"):
        ladder.prepare(args)
