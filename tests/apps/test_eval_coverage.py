"""Results say what they cover and how they were made; none is replaced by, or drawn with, those of other settings."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apps.main import harness
from apps.main.eval import (
    EvalArgs,
    find_conflict,
    flat_metrics,
    is_done,
    launch_eval,
    metrics_of,
    settings_of,
    with_folder_for_settings,
)
from apps.main.generate import GeneratorArgs
from apps.main.train import TrainArgs
from apps.main.train_eval import evaluation_args
from apps.main.validation import ValidationArgs, validation_files
from apps.plots.panels import build_panels
from apps.plots.read import read_run
from lingua.args import to_yaml
from tests.helpers.evaluation import write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run") / "run", steps=(7, 14))


def arguments(run, folder, step=7, **validation):
    checkpoint = run / "checkpoints" / f"{step:010d}"
    args = EvalArgs(ckpt_dir=str(checkpoint), dump_dir=str(folder), metric_log_dir=str(folder), global_step=step)
    args.generator = GeneratorArgs(dtype="fp32", device="cpu")
    args.validation = ValidationArgs(**validation)
    return args


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_results_say_what_they_cover_and_how_they_were_made(run, tmp_path):
    found = launch_eval(arguments(run, tmp_path, max_steps=2))
    written = json.loads((tmp_path / "validation.json").read_text())
    assert written == found["validation"]
    assert written["settings"] == {
        "checkpoint": str(run / "checkpoints" / "0000000007"),
        "global_step": 7,
        "dtype": "fp32",
        "max_steps": 2,
        "use_val_from_train_src": True,
        "root_dir": "",
        "sources": [],
    }
    assert all(written["words"][name] > 0 for name in ("n_documents", "n_bytes", "n_tokens"))
    (line,) = read_lines(tmp_path / "metrics.validation.jsonl")
    assert line["settings"] == written["settings"]
    assert not any("settings" in name for name in flat_metrics(found))


def test_other_settings_into_a_named_folder_are_refused(run, tmp_path):
    launch_eval(arguments(run, tmp_path))
    full = json.loads((tmp_path / "validation.json").read_text())
    before = contents(tmp_path)
    other = arguments(run, tmp_path)
    other.generator.dtype = "bf16"
    for args, difference in (
        (arguments(run, tmp_path, max_steps=2), "max_steps: null there, 2 here"),
        (other, 'dtype: "fp32" there, "bf16" here'),
        (arguments(run, tmp_path, step=14), "global_step: 7 there, 14 here"),
    ):
        with pytest.raises(ValueError, match=r"^dump_dir: .*validation\.json was made with other") as caught:
            launch_eval(args)
        assert f"({difference}); name another folder, or remove that file" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert contents(tmp_path) == before
    # What changes no number is no other setting.
    again = arguments(run, tmp_path)
    again.generator.max_tokens = 100
    launch_eval(again)
    assert json.loads((tmp_path / "validation.json").read_text())["words"]["n_bytes"] == full["words"]["n_bytes"]
    assert len(read_lines(tmp_path / "metrics.validation.jsonl")) == 2


def test_a_checkpoint_without_a_step_is_known_by_its_place(run, tmp_path):
    args = arguments(run, tmp_path)
    args.global_step = None
    (tmp_path / "validation.json").write_text(json.dumps({"settings": settings_of(args)["validation"]}))
    assert find_conflict(args) is None
    args.ckpt_dir = str(run / "checkpoints" / "0000000014")
    assert "checkpoint: " in find_conflict(args)


def make_older(folder):
    """As code wrote them that did not know of settings."""
    file = folder / "validation.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "settings"}))


def test_results_of_older_code_are_known_by_their_config(run, tmp_path):
    args = arguments(run, tmp_path, root_dir="${odd}", use_val_from_train_src=True)
    (tmp_path / "config.yaml").write_text(to_yaml(args))
    (tmp_path / "validation.json").write_text('{"words": {"loss": 1.0}}')
    assert find_conflict(args) is None
    assert is_done(args)
    args.validation.max_steps = 3
    assert "max_steps: null there, 3 here" in find_conflict(args)
    assert not is_done(args)
    (tmp_path / "config.yaml").unlink()
    assert "does not say with which settings it was made" in find_conflict(args)
    assert not is_done(args)
    # Other results than those that are asked for are in nobody's way.
    (tmp_path / "validation.json").rename(tmp_path / "results.json")
    assert find_conflict(args) is None
    assert not is_done(args)


def evaluate_run(run, which="all", **validation):
    args = EvalArgs(ckpt_dir=which, dump_dir=str(run), generator=GeneratorArgs(dtype="fp32", device="cpu"))
    args.validation = ValidationArgs(**validation)
    return launch_eval(args)


def test_other_settings_of_a_run_go_to_folders_beside_each_other(tmp_path, caplog):
    run = write_run(tmp_path / "run", steps=(3, 6))
    first = evaluate_run(run)
    before = contents(run / "evals")
    second = evaluate_run(run, max_steps=1)
    assert second["validation"]["settings"]["max_steps"] == 1
    assert contents(run / "evals").items() >= before.items()
    names = sorted(path.name for path in (run / "evals").iterdir())
    digest = names[1].partition(".")[2]
    assert names == ["0000000003", f"0000000003.{digest}", "0000000006", f"0000000006.{digest}"]
    assert len(digest) == 8
    # Both are found again, and nothing is computed anew; older results, too.
    for name in ("0000000003", "0000000006"):
        make_older(run / "evals" / name)
    n_lines = len(read_lines(run / "metrics.validation.jsonl"))
    assert n_lines == 4
    assert evaluate_run(run, max_steps=1) == second
    assert evaluate_run(run)["validation"]["words"] == first["validation"]["words"]
    assert evaluate_run(run, "latest", max_steps=1) == second
    lines = read_lines(run / "metrics.validation.jsonl")
    assert len(lines) == n_lines + 1  # `latest` evaluates what it is told to
    assert [line["settings"]["max_steps"] for line in lines] == [None, None, 1, 1, 1]
    assert series([run], "validation: loss") == {
        (0, "words", ", max_steps=null"): [3, 6],
        (0, "words", ", max_steps=1"): [3, 6],
    }


def test_training_evaluates_into_a_folder_for_its_settings(tmp_path):
    args = TrainArgs(dump_dir=str(tmp_path), eval={"validation": {"max_steps": 5}})
    wanted = evaluation_args(args, 10)
    folder = tmp_path / "evals" / "0000000010"
    assert wanted.dump_dir == str(folder)
    folder.mkdir(parents=True)
    (folder / "validation.json").write_text(json.dumps({"settings": settings_of(wanted)["validation"]}))
    assert evaluation_args(args, 10) == wanted
    assert is_done(wanted)
    args.eval = {"validation": {"max_steps": 6}}
    other = evaluation_args(args, 10)
    assert other.dump_dir.startswith(f"{folder}.")
    assert not is_done(other)
    assert Path(evaluation_args(args, 20).dump_dir).name == "0000000020"


def test_slots_that_were_read_are_not_replaced_either(run, tmp_path):
    args = arguments(run, tmp_path, slot_reads=10)
    (tmp_path / "validation.json").write_text(json.dumps({"settings": settings_of(args)["validation"]}))
    assert find_conflict(args) is None  # the validation is the same
    table = pa.table({"slot": [1]}).replace_schema_metadata({"settings": json.dumps(settings_of(args)["slot_reads"])})
    pq.write_table(table, tmp_path / "slot_reads.parquet")
    assert find_conflict(args) is None
    assert is_done(args)
    args.validation.slot_reads = 20
    assert "slot_reads.parquet was made with other settings (slot_reads: 10 there, 20 here)" in find_conflict(args)
    pq.write_table(pa.table({"slot": [1]}), tmp_path / "slot_reads.parquet")
    assert "slot_reads.parquet does not say" in find_conflict(args)


def test_the_file_of_slots_says_its_settings(run, tmp_path):
    args = arguments(run, tmp_path, slot_reads=3)
    launch_eval(args)
    metadata = pq.read_schema(tmp_path / "slot_reads.parquet").metadata
    assert json.loads(metadata[b"settings"]) == settings_of(args)["slot_reads"]


def test_results_of_tasks(run, tmp_path, monkeypatch):
    results = {"results": {"piqa": {"acc,none": 0.5, "sample_len": 3}}, "n-shot": {"piqa": 2}, "samples": {}}
    monkeypatch.setattr(harness, "run_harness", lambda *_: dict(results))
    monkeypatch.setattr(harness, "validate_harness_args", lambda *_: None)
    monkeypatch.setattr(harness, "tables", lambda _: "")
    args = arguments(run, tmp_path)
    args.validation, args.harness = None, {"tasks": ["piqa"], "limit": 3}
    found = launch_eval(args)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["settings"]["harness"] == {"tasks": ["piqa"], "limit": 3}
    assert written["settings"]["max_gen_len"] == 512
    (line,) = read_lines(tmp_path / "metrics.eval.jsonl")
    assert line["settings"] == {**written["settings"], "n_shot": {"piqa": 2}}
    assert flat_metrics(found) == {"eval/piqa/acc": 0.5, "eval/piqa/sample_len": 3}
    assert set(metrics_of({"results": results})["eval"]) == {"piqa"}  # of older code
    args.harness = {"tasks": ["piqa"], "limit": 30}
    with pytest.raises(ValueError, match=r"results\.json was made with other settings \(limit: 3 there, 30 here\)"):
        launch_eval(args)
    args.harness = {"tasks": ["piqa", "arc"], "limit": 3}
    with pytest.raises(ValueError, match=r'tasks: \["piqa"\] there, \["piqa", "arc"\] here'):
        launch_eval(args)
    # A validation beside them replaces nothing.
    args.harness, args.validation = None, ValidationArgs()
    launch_eval(args)
    assert json.loads((tmp_path / "results.json").read_text()) == written


def test_an_evaluation_that_had_nothing_to_validate_on_is_done(tmp_path):
    args = EvalArgs(ckpt_dir="x", dump_dir=str(tmp_path), harness={"tasks": ["piqa"]}, global_step=3)
    (tmp_path / "results.json").write_text(json.dumps({"settings": settings_of(args)["results"]}))
    assert not is_done(args)
    (tmp_path / "config.yaml").write_text(to_yaml(args))
    assert is_done(args)
    assert with_folder_for_settings(args) == args


def test_damaged_results_are_not_those_of_the_config_beside_them(tmp_path):
    args = EvalArgs(ckpt_dir="x", dump_dir=str(tmp_path), global_step=3)
    (tmp_path / "config.yaml").write_text(to_yaml(args))
    (tmp_path / "validation.json").write_text("{}")  # of older code
    assert is_done(args)
    (tmp_path / "validation.json").write_text('{"words": ')
    assert not is_done(args)
    assert "validation.json does not say" in find_conflict(args)


def test_names_of_sources_are_not_those_of_other_results(tmp_path):
    for name in ("settings", "memory_slots", "words"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.val.jsonl").write_text('{"text": "x"}\n')
    args = ValidationArgs(root_dir=str(tmp_path), sources=["settings", "memory_slots", "words"])
    found = validation_files(args, {"root_dir": None, "sources": {}})
    assert list(found) == [str(tmp_path / "settings"), str(tmp_path / "memory_slots"), "words"]


# --- pictures --------------------------------------------------------------------------------------------------------


def validation_line(step, loss, settings=None, n_bytes=1000, **changes):
    source = {"loss": loss, "n_documents": n_bytes // 100, "n_bytes": n_bytes, "n_tokens": n_bytes}
    slots = {"total": 100, "read_by_layer_4": 10, "read_by_layer_8": 20, "read": n_bytes // 100}
    line = {"global_step": step, "acc_step": 0, "wiki": source, "memory_slots": slots, **changes}
    return (
        line if settings is None else {**line, "settings": {"global_step": step, "checkpoint": str(step), **settings}}
    )


def series(folders, title):
    """(run, series, what the title adds) -> steps, of the panels whose titles begin so."""
    runs = [read_run(folder, folder.name) for folder in folders]
    panels = [panel for panel in build_panels(runs) if panel.title.startswith(title)]
    return {
        (line.run, line.series, panel.title.removeprefix(title)): line.x.tolist()
        for panel in panels
        for line in panel.lines
    }


def write_validations(folder, lines):
    folder.mkdir()
    (folder / "metrics.validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


FULL, SOME = {"max_steps": None, "dtype": "bf16"}, {"max_steps": 2, "dtype": "bf16"}


def test_a_line_is_of_one_setting(tmp_path):
    lines = [validation_line(10, 3.0, FULL), validation_line(20, 2.0, FULL), validation_line(20, 2.5, SOME, 200)]
    lines += [validation_line(10, 3.5, SOME, 200), validation_line(20, 2.1, FULL)]
    folder = write_validations(tmp_path / "run", lines)
    found = {(0, "wiki", ", max_steps=null"): [10, 20], (0, "wiki", ", max_steps=2"): [10, 20]}
    assert series([folder], "validation: loss") == found
    slots = series([folder], "slots read in validation")
    assert slots[0, "layer 4", ", max_steps=2"] == slots[0, "all layers", ", max_steps=null"] == [10, 20]
    run = read_run(folder, "run")
    (full,) = [c for r, c in run.validation.items() if r.metric == "loss" and "max_steps" not in r.settings]
    assert full.values.tolist() == [3.0, 2.1]  # the later one of the same


def test_one_setting_needs_no_name(tmp_path):
    lines = [validation_line(10, 3.0, FULL), validation_line(20, 2.0, {**FULL, "sources": ["more"]})]
    assert series([write_validations(tmp_path / "run", lines)], "validation: loss") == {(0, "wiki", ""): [10, 20]}


def test_lines_of_older_code_stay_by_themselves(tmp_path):
    lines = [validation_line(10, 3.0), validation_line(20, 2.0), validation_line(30, 1.0, FULL)]
    found = series([write_validations(tmp_path / "run", lines)], "validation: loss")
    assert found == {(0, "wiki", ", dtype=?"): [10, 20], (0, "wiki", ", dtype=bf16"): [30]}


def test_other_text_under_the_same_name(tmp_path):
    lines = [validation_line(10, 3.0, FULL), validation_line(20, 2.0, FULL, n_bytes=5000)]
    found = series([write_validations(tmp_path / "run", lines)], "validation: loss")
    assert found == {(0, "wiki", ", n_documents=10"): [10], (0, "wiki", ", n_documents=50"): [20]}


def test_runs_beside_each_other_have_settings_in_common_or_say_so(tmp_path):
    folders = [
        write_validations(tmp_path / name, [validation_line(10, 3.0, settings)])
        for name, settings in (("a", FULL), ("b", SOME), ("c", SOME))
    ]
    assert series(folders[1:], "validation: loss") == {(0, "wiki", ""): [10], (1, "wiki", ""): [10]}
    assert set(series(folders, "validation: loss")) == {
        (0, "wiki", ", max_steps=null"),
        (1, "wiki", ", max_steps=2"),
        (2, "wiki", ", max_steps=2"),
    }


def test_tasks_of_different_settings(tmp_path):
    def line(step, accuracy, n_shot=0, tasks=("piqa",), **arguments):
        settings = {"dtype": "bf16", "harness": {"tasks": list(tasks), **arguments}, "n_shot": {"piqa": n_shot}}
        return {"global_step": step, "piqa": {"acc,none": accuracy, "sample_len": 5}, "settings": settings}

    lines = [
        line(10, 0.1),
        line(20, 0.2, tasks=("piqa", "arc"), limit=None),
        line(20, 0.3, n_shot=5),
        line(20, 0.4, limit=5),
    ]
    (tmp_path / "metrics.eval.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = series([tmp_path], "evaluation: acc")
    assert sorted(found.values()) == [[10, 20], [20], [20]]
    assert {label for _, name, label in found if name == "piqa"} == {
        ", limit=null, num_fewshot=0",
        ", limit=null, num_fewshot=5",
        ", limit=5, num_fewshot=0",
    }
