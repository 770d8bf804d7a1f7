"""What a run leaves, what it starts from, and what it does not do: grow, or tell secrets."""

import json
import re
import shutil
import statistics
from datetime import datetime

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml

from apps.main.train import TrainArgs, train
from apps.main.transformer import LMTransformer
from lingua.args import parse_args
from lingua.checkpoint import consolidate_checkpoints, load_model, read_consolidated
from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from tests.helpers.training import (
    last_step,
    list_steps,
    read_losses,
    read_metrics,
    run_command,
    run_in_process,
    snapshot,
    write_config,
)

# Where only losses are compared: a checkpoint takes as long as three steps.
AT_THE_END = "checkpoint.dump.every=60"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- what a run leaves ------------------------------------------------------------------------------------------------


def test_the_command_itself(tiny, reference, tmp_path):
    """Started from nothing, as users do, it does what the forked processes of the other tests do."""
    result = run_command(["apps.main.train", f"config={tiny}", f"dump_dir={tmp_path / 'run'}", AT_THE_END]).ok()
    assert result.err == ""
    assert result.out.splitlines()[-1].endswith("done: 60 steps")
    assert read_losses(tmp_path / "run") == read_losses(reference)


def test_files(reference):
    assert sorted(path.name for path in reference.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "train.log",
    ]
    names = {path.name for path in (reference / "checkpoints" / "0000000060").iterdir()}
    assert {".metadata", "params.json", "train_state_00000.json"} <= names


def test_metrics(reference):
    metrics = read_metrics(reference)
    keys = {"global_step", "acc_step", "speed/wps", "speed/FLOPS", "speed/curr_iter_time", "speed/data_load_time"}
    keys |= {"optim/grad_norm", "optim/lr", "optim/total_tokens", "loss/out", "created_at"}
    before = None
    for step, line in enumerate(metrics, start=1):
        assert keys <= line.keys()
        assert any(key.startswith("memory/") for key in line)
        assert line["global_step"] == step
        assert line["acc_step"] == 0
        assert line["optim/total_tokens"] == step * 2 * 2 * 32
        assert all(isinstance(value, int | float) for key, value in line.items() if key != "created_at")
        created = datetime.fromisoformat(line["created_at"])
        assert created.tzinfo is not None
        assert before is None or created >= before
        before = created
    assert metrics[-1]["loss/out"] < 0.6 * metrics[0]["loss/out"]
    # Warmup over 5 steps to 0.01, and down by the cosine to a tenth; the tables have a rate of their own.
    assert [line["optim/lr"] for line in metrics[:6]] == pytest.approx([0, 0.002, 0.004, 0.006, 0.008, 0.01])
    assert metrics[-1]["optim/lr"] == pytest.approx(0.001, rel=0.02)
    assert metrics[5]["optim/value_lr"] == pytest.approx(0.001)


def test_log_lines(reference):
    lines = (reference / "train.log").read_text().splitlines()
    steps = [line for line in lines if "  loss: " in line]
    number = r"[0-9.e+-]+"
    wanted = ["loss", "grad", "flops", "wps", "iter", "data", "lr"]
    pattern = r"step: (\d+)  acc: 0  " + "  ".join(rf"{name}: {number}" for name in wanted)
    pattern += r"  mem: \d+%  pow: (-|\d+ W)  left: [\d:]+$"
    for step, line in enumerate(steps, start=1):
        found = re.search(pattern, line)
        assert found, line
        assert int(found[1]) == step
    assert len(steps) == 60
    assert any("parameters: " in line and "8,192 in memory values" in line for line in lines)


def test_log_is_what_is_shown(run_here, tmp_path):
    """train.log holds what the terminal showed, and a second start adds to it."""
    shown = run_here(tmp_path / "run", "steps=2").ok().out.splitlines()
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert log == shown[-len(log) :]
    run_here(tmp_path / "run", "steps=4").ok()
    assert (tmp_path / "run" / "train.log").read_text().splitlines()[: len(log)] == log


def test_lines_every_few_steps(run_here, reference, tmp_path):
    """Of the steps themselves, not means over several; the last step is always there."""
    run_here(tmp_path / "run", "logging.freq=7", AT_THE_END).ok()
    assert read_losses(tmp_path / "run") == [
        (step, loss) for step, loss in read_losses(reference) if step % 7 == 0 or step == 60
    ]


def test_lines_within_a_step(run_here, tmp_path):
    run_here(tmp_path / "run", "logging.acc_freq=2", "grad_acc_steps=5", "steps=3").ok()
    metrics = read_metrics(tmp_path / "run")
    places = [(line["global_step"], line["acc_step"]) for line in metrics]
    assert places == [(0, 2), (0, 4), (1, 0), (1, 2), (1, 4), (2, 0), (2, 2), (2, 4), (3, 0)]
    log = (tmp_path / "run" / "train.log").read_text()
    assert [(int(step), int(acc)) for step, acc in re.findall(r"step: (\d+)  acc: (\d+)  loss: [\d.]+", log)] == places


def test_number_of_batches_does_not_change_the_loss(run_here, tmp_path):
    """Two batches of a step, or one of twice the size and the same rows: the same training."""
    data = ["data.load_async=false", "steps=12", "logging.freq=1"]
    run_here(tmp_path / "two", "grad_acc_steps=2", "data.batch_size=2", "data.prefetch_size=8", *data).ok()
    run_here(tmp_path / "one", "grad_acc_steps=1", "data.batch_size=4", "data.prefetch_size=4", *data).ok()
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    for key in ("loss/out", "optim/grad_norm", "optim/value_grad_norm", "optim/total_tokens"):
        assert [line[key] for line in two] == pytest.approx([line[key] for line in one], rel=1e-3), key


def test_what_must_not_change_the_loss(run_here, reference, tmp_path):
    arguments = ["data.load_async=false", "gc_collect_freq=25", "name=other", "seed=7"]
    run_here(tmp_path / "run", *arguments, AT_THE_END).ok()
    assert read_losses(tmp_path / "run") == read_losses(reference)


def test_config_is_saved_and_can_be_used_again(reference, tiny, tmp_path):
    saved = yaml.safe_load((reference / "config.yaml").read_text())
    assert saved == json.loads((reference / "checkpoints" / "0000000060" / "params.json").read_text())
    assert saved["model"]["vocab_size"] == 258
    assert saved["model"]["max_seqlen"] == 32
    for section, values in yaml.safe_load(tiny.read_text()).items():
        if section == "dump_dir":
            assert saved[section] == str(reference)
        elif isinstance(values, dict):
            assert saved[section].keys() >= values.keys()
        else:
            assert saved[section] == values
    run_in_process([f"config={reference / 'config.yaml'}", f"dump_dir={tmp_path / 'run'}"], tmp_path).ok()
    assert read_losses(tmp_path / "run") == read_losses(reference)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == {
        **saved,
        "dump_dir": str(tmp_path / "run"),
    }
    # params.json is YAML, too.
    params = reference / "checkpoints" / "0000000060" / "params.json"
    assert parse_args(TrainArgs, [f"config={params}"]) == parse_args(TrainArgs, [f"config={reference / 'config.yaml'}"])


@pytest.mark.parametrize("name", ["null", "0123", "a: b", "#x", "é"])
def test_odd_names_survive_in_the_config(corpus, tiny, tmp_path, name):
    """Words that YAML could take for something else."""
    config = yaml.safe_load(tiny.read_text()) | {"name": name, "steps": 1, "dump_dir": str(tmp_path / "run")}
    run_in_process([f"config={write_config(tmp_path / 'odd.yaml', config)}"], tmp_path).ok()
    assert parse_args(TrainArgs, [f"config={tmp_path / 'run' / 'config.yaml'}"]).name == name


def test_number_formats(run_here, tmp_path):
    """The tables are in bf16 unless everything is in fp32; all else is in fp32."""
    for dtype in ("bf16", "fp16"):
        folder = tmp_path / dtype
        run_here(folder, "steps=12", f"distributed.model_dtype={dtype}").ok()
        losses = read_losses(folder)
        assert losses[-1][1] < 0.8 * losses[0][1]
        shutil.copytree(folder / "checkpoints" / "0000000010", tmp_path / f"{dtype}.checkpoint")
        state = read_consolidated(consolidate_checkpoints(tmp_path / f"{dtype}.checkpoint") / "consolidated.pth")
        tables = {key for key in state if ".values" in key}
        assert len(tables) == 1
        assert all(
            state[key].dtype == (torch.bfloat16 if key in tables and dtype == "bf16" else torch.float32)
            for key in state
        )


def test_two_runs_in_one_process(tiny, tmp_path, capfd):
    """`train` is a function that scripts call: a second call is a run of its own, with a log of its own."""
    logs = {}
    for name in ("first", "second"):
        train(parse_args(TrainArgs, [f"config={tiny}", f"dump_dir={tmp_path / name}", "steps=2"]))
        logs[name] = (tmp_path / name / "train.log").read_text()
    assert read_losses(tmp_path / "first") == read_losses(tmp_path / "second")
    assert (tmp_path / "first" / "train.log").read_text() == logs["first"], "the second run wrote into the first's log"
    assert len(logs["second"].splitlines()) == len(logs["first"].splitlines())


# --- what it starts from ----------------------------------------------------------------------------------------------


def first_batches(args):
    """The first step's batches."""
    with build_dataloader_from_args(args.data, init_dataloader_state_from_args(args.data, 0, 1)) as loader:
        return [torch.from_numpy(next(loader)[0]) for _ in range(args.grad_acc_steps)]


@pytest.fixture
def source(reference, tmp_path):
    return shutil.copytree(reference / "checkpoints" / "0000000030", tmp_path / "source")


def published_state(source):
    """The model's state dict, with the shared table under both memory layers."""
    state = read_consolidated(consolidate_checkpoints(source) / "consolidated.pth")
    table = state["layers.1.feed_forward.values.weight"]
    return {**state, "layers.2.feed_forward.values.weight": table}


@pytest.mark.parametrize(
    "form",
    ["distributed", "consolidated folder", "consolidated file", "published file", "published distributed"],
)
def test_initial_weights(run_here, reference, source, tmp_path, form):
    path = source
    if form.startswith("consolidated"):
        path = consolidate_checkpoints(source)
        if form.endswith("file"):
            path = path / "consolidated.pth"
    elif form == "published file":
        path = tmp_path / "published.pth"
        torch.save({"model": published_state(source)}, path)
    elif form == "published distributed":
        path = tmp_path / "published"
        dcp.save({"model": published_state(source)}, checkpoint_id=path, no_dist=True)

    run_here(tmp_path / "run", f"checkpoint.init_ckpt_path={path}", "steps=3").ok()

    args = parse_args(TrainArgs, [f"config={reference / 'config.yaml'}"])
    model = LMTransformer(args.model)
    load_model(source, model)
    with torch.no_grad():
        losses = [model(batch[..., 0], batch[..., 1]).item() for batch in first_batches(args)]
    steps = read_losses(tmp_path / "run")
    assert [step for step, _ in steps] == [1, 2, 3]
    assert steps[0][1] == pytest.approx(statistics.mean(losses), rel=1e-6)
    assert steps[0][1] < 0.6 * read_losses(reference)[0][1]
    # The optimizer and the schedule begin anew.
    assert read_metrics(tmp_path / "run")[0]["optim/lr"] == 0


def test_a_run_of_its_own_goes_before_the_initial_weights(start, run_here, reference, source, tmp_path):
    """Started again, it resumes, although `init_ckpt_path` still stands in the command."""
    keys = [f"checkpoint.init_ckpt_path={source}", "checkpoint.dump.every=3"]
    run_here(tmp_path / "whole", *keys, "steps=9").ok()
    run = start(tmp_path / "run", *keys, "steps=9")
    run.wait_for(lambda: (tmp_path / "run" / "checkpoints" / "0000000003").is_dir())
    run.kill()
    run.finish()
    assert list_steps(tmp_path / "run")[0] == 3
    run_here(tmp_path / "run", *keys, "steps=9").ok()
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")


def test_training_continued_from_another_run(run_here, reference, source, tmp_path):
    """Weights, optimizer, step and place in the data: it is the same run in another folder."""
    keys = [f"checkpoint.init_ckpt_path={source}", "checkpoint.continue_training_from_init=true"]
    before = snapshot(source)
    run_here(tmp_path / "run", *keys, "steps=60").ok()
    assert read_losses(tmp_path / "run") == read_losses(reference)[30:]
    assert list_steps(tmp_path / "run") == [35, 40, 45, 50, 55, 60]
    assert snapshot(source) == before


# --- what it does not do ----------------------------------------------------------------------------------------------


def test_memory_stays_flat(start, tmp_path):
    """Trainer and loader, resident, at step 400 and at step 1,400.

    A batch is 8 KiB here, so that one kept per step would make 8 MiB; so would a few kilobytes of anything else. By
    step 400 the first checkpoints have been written and garbage has been collected, so that what these take once is
    there. The bound of 4 MiB lies above what the allocator's moods make of it (under 1 MiB), and the medians over
    some steps above those of a single moment.
    """
    dump_dir = tmp_path / "run"
    memory = ["layers='1'", "mem_heads=1", "mem_n_keys=8", "mem_knn=2"]
    keys = [f"model.productkey_args.{key}" for key in memory]
    keys += ["model.dim=16", "model.n_layers=2", "model.n_heads=1", "model.multiple_of=16"]
    keys += ["data.batch_size=4", "data.seq_len=128", "data.prefetch_size=16", "grad_acc_steps=1", "steps=1400"]
    keys += ["gc_collect_freq=100", "checkpoint.dump.every=200", "checkpoint.dump.keep=1", "logging.freq=5"]
    run = start(dump_dir, *keys)
    assert run.wait_for(lambda: last_step(dump_dir) > 0)
    (loader,) = psutil.Process(run.process.pid).children()
    loader_memory = []

    def watch():
        try:
            loader_memory.append((last_step(dump_dir), loader.memory_info().rss))
        except psutil.NoSuchProcess:  # the end
            return True
        return False

    run.wait_for(watch, pause=0.2)
    run.finish().ok()
    trainer_memory = [(line["global_step"], line["memory/rss_gib"] * 2**30) for line in read_metrics(dump_dir)]
    assert trainer_memory[-1][0] == 1400
    for memory in (trainer_memory, loader_memory):
        early = statistics.median(size for step, size in memory if 350 <= step <= 450)
        late = statistics.median(size for step, size in memory if step >= 1350)
        assert late - early < 4 * 2**20


SECRETS = {
    "HF_TOKEN": "hf_OrangeElephant",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_SECRET_ACCESS_KEY": "PurpleGiraffe",
    "MY_PASSWORD": "GreenWalrus",
    "OPENAI_API_KEY": "sk-YellowHeron",
    "TORCH_AUTH_TOKEN": "BlueOtter",
    "NCCL_SECRET": "RedPanda",
    # Slurm's own: whoever has it can submit jobs as the user.
    "SLURM_JWT": "eyJWhiteRaven",
}


def at_home(folder):
    """For wandb: nobody's key, and no settings or caches but in `folder`."""
    return {"HOME": str(folder)}


@pytest.mark.parametrize("wandb", ["null", "{project: x, mode: offline}"])
def test_secrets_stay_where_they_are(start, tmp_path, wandb):
    keys = ["env.MY_FLAG=harmless", "steps=3", f"logging.wandb={wandb}"]
    result = start(tmp_path / "run", *keys, **SECRETS, **at_home(tmp_path), MY_FLAG="before").finish().ok()
    written = snapshot(tmp_path / "run")
    assert "train.log" in written
    written |= {"stdout": result.out.encode(), "stderr": result.err.encode()}
    leaks = [(name, key) for key, value in SECRETS.items() for name in written if value.encode() in written[name]]
    assert leaks == []


def read_wandb_history(dump_dir):
    """step -> (acc_step, loss) as wandb has it, of the last start.

    Its file is a header of 7 bytes, then blocks of 32 KiB of records: checksum (4), length (2), type (1), a part of a
    protobuf message (type 1: all of it; 2, 3, 4: its beginning, middle, end).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    folder = sorted((dump_dir / "wandb").glob("offline-run-*"))[-1]
    (file,) = folder.glob("run-*.wandb")
    content, place, message, history = file.read_bytes(), 7, b"", {}
    while place < len(content):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record, message = Record.FromString(message), b""
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                row = {key: json.loads(value) for key, value in items.items()}
                history[row["global_step"]] = (row["acc_step"], row["loss/out"])
    return history


def test_wandb_offline(start, reference, tmp_path):
    """Its folder lies in dump_dir, one for each start, and holds the losses; a run goes on as without it."""
    dump_dir = tmp_path / "run"
    keys = ["logging.wandb={project: x, mode: offline}", "name=orange-elephant", "checkpoint.dump.every=10"]
    run = start(dump_dir, *keys, **at_home(tmp_path))
    assert run.wait_for(lambda: last_step(dump_dir) >= 12)
    run.kill()
    run.finish()
    start(dump_dir, *keys, **at_home(tmp_path)).finish().ok()
    assert read_losses(dump_dir) == read_losses(reference)
    folders = sorted((dump_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    (file,) = folders[-1].glob("run-*.wandb")
    assert b"orange-elephant" in file.read_bytes()
    history = read_wandb_history(dump_dir)
    assert history == {step: (0, loss) for step, loss in read_losses(reference) if step >= min(history)}
    assert 10 < min(history) <= 16


def test_wandb_keeps_the_loss_of_a_step(start, tmp_path):
    """Lines within the next step carry the same step number, and must not take the place of the step's own line."""
    keys = ["logging.wandb={project: x, mode: offline}", "logging.acc_freq=1", "steps=4"]
    start(tmp_path / "run", *keys, **at_home(tmp_path)).finish().ok()
    losses = {line["global_step"]: line["loss/out"] for line in read_metrics(tmp_path / "run") if not line["acc_step"]}
    assert [read_wandb_history(tmp_path / "run")[step] for step in losses] == [(0, loss) for loss in losses.values()]
