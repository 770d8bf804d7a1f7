"""What cannot work ends with one line that tells what and where, exit code 1, and nothing written.

In the test's process (`run_here`), but for some of each kind, which end a process, as users start it (`run`).
"""

import json
import os
import pickle
import shutil
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch

from apps.main.train import TrainArgs, validate_train_args
from lingua.args import parse_args
from lingua.checkpoint import consolidate_checkpoints, read_metadata
from lingua.distributed import World
from tests.helpers.training import (
    bytes_of,
    free_port,
    last_step,
    list_steps,
    run_command,
    run_in_process,
    small_disk,
    snapshot,
    start_ranks,
    torchrun,
    wait_until,
)

MEMORY = "model.productkey_args"
SIZES = ("dp_shard", "dp_replicate", "tp_size", "memory_parallel_size")
# Under torchrun the ranks' ends race each other; that the message gets through is to hold on every try.
RANKS = 2

# (arguments, what the line must name)
CASES = [
    # keys
    (["steppes=3"], ["steppes", "did you mean steps"]),
    (["model.productkey_args.mem_nkeys=3"], ["model.productkey_args.mem_nkeys", "mem_n_keys?"]),
    (["modell.dim=32"], ["modell", "did you mean model"]),
    (["data.tokenizer.nmae=bytes"], ["data.tokenizer.nmae"]),
    (["--steps=3"], ["--steps"]),
    (["steps"], ["steps", "key=value"]),
    (["=3"], ["=3", "key=value"]),
    # types
    (["steps=many"], ["steps", "many"]),
    (["steps=1.5"], ["steps", "1.5"]),
    (["steps=true"], ["steps"]),
    (["steps=null"], ["steps"]),
    (["steps=[1,2]"], ["steps"]),
    (["optim.lr=fast"], ["optim.lr", "fast"]),
    (["optim.lr=null"], ["optim.lr"]),
    (["data.load_async=7"], ["data.load_async", "7"]),
    (["data.load_async=maybe"], ["data.load_async", "maybe"]),
    (["model=3"], ["model", "3"]),
    (["model.dim={a: 1}"], ["model.dim"]),
    ([f"{MEMORY}.layers=[1,2]"], [f"{MEMORY}.layers"]),
    (["data.sources=alpha"], ["data.sources", "alpha"]),
    (["data.sources.alpha=heavy"], ["data.sources.alpha", "heavy"]),
    (["data.sources.alpha=true"], ["data.sources.alpha"]),
    (["name=${nowhere}"], ["name", "nowhere"]),
    (["name=${name}"], ["name"]),
    (["steps=${name}"], ["steps"]),
    (["data.tokenizer=bytes"], ["data.tokenizer"]),
    (["env=3"], ["env"]),
    (["logging.wandb=3"], ["logging.wandb"]),
    # numbers out of range
    (["steps=0"], ["steps"]),
    (["grad_acc_steps=0"], ["grad_acc_steps"]),
    (["gc_collect_freq=0"], ["gc_collect_freq"]),
    (["seed=-1"], ["seed"]),
    (["data.seed=-1"], ["data.seed"]),
    (["data.batch_size=0"], ["data.batch_size"]),
    (["data.seq_len=0"], ["data.seq_len"]),
    (["data.n_views=1"], ["data.n_views"]),
    (["data.prefetch_size=0"], ["data.prefetch_size"]),
    (["optim.lr=-1"], ["optim.lr"]),
    (["optim.lr=nan"], ["optim.lr"]),
    (["optim.clip=0"], ["optim.clip"]),
    (["optim.beta1=1"], ["optim.beta1"]),
    (["optim.scheduler=cosin"], ["optim.scheduler", "cosin", "cosine"]),
    (["optim.warmup=-1"], ["optim.warmup"]),
    (["optim.scheduler=wsd", "optim.lr_min_ratio=0"], ["optim.lr_min_ratio"]),
    (["logging.freq=0"], ["logging.freq"]),
    (["logging.acc_freq=0"], ["logging.acc_freq"]),
    # folders and files
    (["dump_dir="], ["dump_dir"]),
    (["data.root_dir=null"], ["data.root_dir"]),
    (["data.root_dir=/no/such"], ["data.root_dir", "/no/such"]),
    (["data.sources.gamma=1"], ["data.sources.gamma"]),
    (["data.sources.alpha=0", "data.sources.beta=0"], ["data.sources", "weight"]),
    (["data.sources.alpha=-1"], ["data.sources.alpha", "-1"]),
    (["data.sources.alpha=nan"], ["data.sources.alpha", "nan"]),
    (["data.sources.alpha=inf"], ["data.sources.alpha", "inf"]),
    (["data.tokenizer.name=byte"], ["data.tokenizer.name", "byte", "bytes"]),
    (["data.tokenizer.name=sp"], ["data.tokenizer.path"]),
    (["data.tokenizer.name=tiktoken"], ["data.tokenizer.path"]),
    (["data.tokenizer.name=sp", "data.tokenizer.path=/no/such"], ["data.tokenizer.path", "/no/such"]),
    (["data.tokenizer.name=sp", f"data.tokenizer.path={__file__}"], ["data.tokenizer.path", __file__]),
    (["data.tokenizer.name=tiktoken", f"data.tokenizer.path={__file__}"], ["data.tokenizer.path", __file__]),
    (["config=/no/such.yaml"], ["config", "2 times"]),
    ([f"dump_dir={'x' * 5000}"], ["dump_dir", "too long"]),
    ([f"data.root_dir={'x' * 300}"], ["data.root_dir", "too long"]),
    (["checkpoint.init_ckpt_path=/dev/null"], ["checkpoint.init_ckpt_path", "/dev/null"]),
    (["data.on_error=maybe"], ["data.on_error", "maybe", "stop", "skip"]),
    (["env={'A=B': x}"], ["env.A=B"]),
    (["env={'': x}"], ["env."]),
    (["distributed.timeout=1000000000000"], ["distributed.timeout"]),
    (["seed=9223372036854775808"], ["seed", "64 bits"]),
    (["model.dim=1000000000"], ["model.dim=1000000000", "GiB"]),
    (["model.ffn_dim_multiplier=1e308"], ["model.ffn_dim_multiplier"]),
    # the model
    (["model.vocab_size=100"], ["model.vocab_size", "100", "258"]),
    (["model.vocab_size=0"], ["model.vocab_size"]),
    (["model.dim=0"], ["model.dim"]),
    (["model.n_layers=0"], ["model.n_layers"]),
    (["model.n_heads=3"], ["model.n_heads", "3", "32"]),
    (["model.n_heads=null"], ["model.n_heads"]),
    (["model.n_heads=null", "model.head_dim=5"], ["model.head_dim", "5", "32"]),
    (["model.n_heads=4", "model.n_kv_heads=3"], ["model.n_kv_heads", "3", "4"]),
    (["model.head_dim=7"], ["model.head_dim", "7"]),
    (["model.multiple_of=0"], ["model.multiple_of"]),
    (["model.ffn_dim_multiplier=0.001"], ["model.ffn_dim_multiplier"]),
    (["model.norm_eps=nan"], ["model.norm_eps"]),
    (["model.init_std_factor=none"], ["model.init_std_factor", "none"]),
    (["model.sliding_window=0"], ["model.sliding_window"]),
    (["model.seed=-1"], ["model.seed"]),
    # the memory
    ([f"{MEMORY}.layers='1,3'"], [f"{MEMORY}.layers", "3", "n_layers=3"]),
    ([f"{MEMORY}.layers='-1'"], [f"{MEMORY}.layers", "-1"]),
    ([f"{MEMORY}.layers="], [f"{MEMORY}.layers"]),
    ([f"{MEMORY}.layers='1,1'"], [f"{MEMORY}.layers", "twice"]),
    ([f"{MEMORY}.layers=all"], [f"{MEMORY}.layers", "all"]),
    ([f"{MEMORY}.mem_k_dim=15"], [f"{MEMORY}.mem_k_dim", "15"]),
    ([f"{MEMORY}.mem_k_dim=0"], [f"{MEMORY}.mem_k_dim"]),
    ([f"{MEMORY}.mem_knn=17"], [f"{MEMORY}.mem_knn", "17", "16"]),
    ([f"{MEMORY}.mem_knn=0"], [f"{MEMORY}.mem_knn"]),
    ([f"{MEMORY}.mem_n_keys=0"], [f"{MEMORY}.mem_n_keys"]),
    ([f"{MEMORY}.mem_heads=0"], [f"{MEMORY}.mem_heads"]),
    ([f"{MEMORY}.mem_v_dim=-2"], [f"{MEMORY}.mem_v_dim"]),
    ([f"{MEMORY}.mem_v_dim=8", f"{MEMORY}.peer_variant=true"], [f"{MEMORY}.mem_v_dim"]),
    ([f"{MEMORY}.value_fixed_lr=-1"], [f"{MEMORY}.value_fixed_lr", "-1"]),
    ([f"{MEMORY}.value_fixed_lr=nan"], [f"{MEMORY}.value_fixed_lr", "nan"]),
    # layouts (more of them in LAYOUTS), and what is still to come
    (["distributed.memory_parallel_size=3"], ["distributed.memory_parallel_size", "3", "1 ranks"]),
    (["distributed.tp_size=2"], ["distributed.tp_size", "2", "1 ranks"]),
    (["distributed.dp_shard=2"], ["distributed.dp_shard", "2", "1 ranks"]),
    (["distributed.model_dtype=fp8"], ["distributed.model_dtype", "fp8"]),
    (["distributed.fsdp_type=shard"], ["distributed.fsdp_type", "shard"]),
    (["distributed.float8_recipe=rowwise"], ["distributed.float8_recipe", "GPU", "a CPU"]),
    (["distributed.float8_recipe=columnwise"], ["distributed.float8_recipe", "columnwise", "rowwise"]),
    (["profiling.run=true"], ["profiling.mem_warmup", "100", "steps=3"]),
    (["profiling.profile_steps=-1"], ["profiling.profile_steps", "-1"]),
    (["probe_freq=0"], ["probe_freq", "0"]),
    (["async_eval_gpus=1"], ["async_eval_gpus"]),
    (["eval={}"], ["eval"]),
    # what wandb.init does not take, or what the run gives it
    (["logging.wandb={porject: x}"], ["logging.wandb.porject"]),
    (["logging.wandb={project: x, mode: offline, config: {}}"], ["logging.wandb.config"]),
    (["logging.wandb={project: x, mode: sideways}"], ["logging.wandb", "sideways"]),
    # checkpoints
    (["checkpoint.init_ckpt_path=/no/such"], ["/no/such"]),
    (["checkpoint.continue_training_from_init=true"], ["checkpoint.continue_training_from_init", "init_ckpt_path"]),
    (
        ["checkpoint.continue_training_from_init=true", "checkpoint.init_ckpt_path=/no/such"],
        ["/no/such", "no checkpoint"],
    ),
]


# Of them, those that end a process: a key, a type, a path, a value that the model does not take.
OF_A_PROCESS = ("steppes=3", "steps=many", "data.root_dir=/no/such", "model.n_heads=3")


@pytest.fixture
def run(start):
    """As `run_here`, in a process."""
    return lambda *arguments, **variables: start(*arguments, **variables).finish()


def refuse(run, dump_dir, *arguments, **variables):
    """The error line of a start that must leave no trace. `run`: a fixture, of this name or `run_here`."""
    line = run(dump_dir, "steps=3", *arguments, **variables).the_error()
    assert not dump_dir.exists()
    return line


def check_refusal(run, dump_dir, arguments, words):
    line = refuse(run, dump_dir, *arguments)
    missing = [word for word in words if word not in line]
    assert not missing, f"{missing} not in: {line}"


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=[" ".join(arguments)[:60] for arguments, _ in CASES])
def test_config(run_here, tmp_path, arguments, words):
    check_refusal(run_here, tmp_path / "run", arguments, words)


@pytest.mark.parametrize("argument", OF_A_PROCESS)
def test_config_in_a_process(run, tmp_path, argument):
    ((arguments, words),) = [case for case in CASES if case[0] == [argument]]
    check_refusal(run, tmp_path / "run", arguments, words)


def test_the_command_itself(tiny, tmp_path):
    """As users start it, from nothing: everything else here goes through the same `main`."""
    line = run_command(["apps.main.train", f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=0"]).the_error()
    assert "steps" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "word"), [([], "dump_dir"), (["config=/no/such.yaml"], "/no/such.yaml"), (["config="], "config")]
)
def test_no_config(tmp_path, arguments, word):
    assert word in run_in_process(arguments, tmp_path).the_error()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: 3\nmodel:\n  dimm: 3\n", ["model.dimm", "bad.yaml"]),
        ("steps: 3\nmodel: [1\n", ["bad.yaml:3"]),
        ("steps: 3\n\tmodel: 1\n", ["bad.yaml:2"]),
        ("steps: 3\nsteps: 4\n", ["bad.yaml", "steps"]),
        ("- steps\n", ["bad.yaml", "mapping"]),
        ("just text", ["bad.yaml"]),
        ("", ["dump_dir"]),
        ("model:\n", ["model", "bad.yaml"]),
        ("\x00\xff", ["bad.yaml"]),
        ("dump_dir: x\ndata: {sources: {}}\n", ["data.sources"]),
        ("dump_dir: x\ndata: {sources: {alpha: }}\n", ["data.sources", "alpha"]),
        ("dump_dir: x\nnothing: ${oc.env:HF_TOKEN}\n", ["nothing"]),
        ("dump_dir: x\nname: ${oc.env:HF_TOKEN}\n", ["HF_TOKEN", "secret"]),
    ],
)
def test_config_file(tmp_path, text, words):
    file = tmp_path / "bad.yaml"
    file.write_text(text, encoding="latin-1")
    line = run_in_process([f"config={file}"], tmp_path, HF_TOKEN="hunter2").the_error()
    assert all(word in line for word in words), line
    assert "hunter2" not in line
    assert not (Path.cwd() / "x").exists()


# --- data -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bad_corpus(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "data")
    return tmp_path / "data"


BAD_LINES = [
    (b'{"text": "cut of', "JSON"),
    (b"plain text", "JSON"),
    (b'["text"]', "list"),
    (b"null", "NoneType"),
    (b'{"txet": "a", "id": 1}', "txet"),
    (b"{}", "neither"),
    (b'{"text": 7}', "int"),
    (b'{"text": null}', "NoneType"),
    (b'{"text": "\xff\xfe"}', "JSON"),
    (b"[" * 100_000, "JSON"),
]


def check_line(run, bad_corpus, dump_dir, line, word, load_async):
    file = bad_corpus / "alpha" / "alpha.chunk.00.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b"", line, *lines[1:]]))
    keys = [f"data.root_dir={bad_corpus}", "data.sources.beta=0", f"data.load_async={load_async}"]
    message = refuse(run, dump_dir, *keys)
    assert f"{file}:3:" in message
    assert word in message


@pytest.mark.parametrize("load_async", ["true", "false"])
@pytest.mark.parametrize(("line", "word"), BAD_LINES)
def test_line(run_here, bad_corpus, tmp_path, line, word, load_async):
    check_line(run_here, bad_corpus, tmp_path / "run", line, word, load_async)


def test_line_in_a_process(run, bad_corpus, tmp_path):
    check_line(run, bad_corpus, tmp_path / "run", *BAD_LINES[0], "true")


@pytest.mark.parametrize(("load_async", "how"), [("true", "run"), ("false", "run_here")])
def test_line_met_in_the_middle_of_training(request, bad_corpus, tmp_path, load_async, how):
    """It is not seen at the start; the run ends all the same with the one line, and its checkpoints stay."""
    for file in bad_corpus.rglob("*.jsonl"):
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:12]) + b"no JSON\n")
    keys = [f"data.root_dir={bad_corpus}", f"data.load_async={load_async}", "steps=1000"]
    line = request.getfixturevalue(how)(tmp_path / "run", *keys).the_error()
    assert ".jsonl:13: not a line of JSON" in line
    assert list_steps(tmp_path / "run")


def test_source_without_chunk_files(run_here, bad_corpus, tmp_path):
    for file in (bad_corpus / "beta").iterdir():
        file.rename(file.with_name(file.name.replace("chunk.", "")))
    (bad_corpus / "beta" / "beta.val.jsonl").write_text('{"text": "a"}\n')
    line = refuse(run_here, tmp_path / "run", f"data.root_dir={bad_corpus}")
    assert "data.sources.beta" in line
    assert str(bad_corpus / "beta") in line


def test_source_that_is_a_file(run_here, bad_corpus, tmp_path):
    shutil.rmtree(bad_corpus / "beta")
    (bad_corpus / "beta").touch()
    assert "data.sources.beta" in refuse(run_here, tmp_path / "run", f"data.root_dir={bad_corpus}")


@pytest.mark.parametrize(
    ("content", "load_async"), [("", "true"), ("", "false"), ("\n \n\n", "true"), ('{"text": ""}\n', "true")]
)
def test_empty_chunk_files(run_here, bad_corpus, tmp_path, content, load_async):
    for file in (bad_corpus / "beta").iterdir():
        file.write_text(content)
    keys = ["data.sources.alpha=0", "data.add_bos=false", "data.add_eos=false"]
    line = refuse(run_here, tmp_path / "run", f"data.root_dir={bad_corpus}", f"data.load_async={load_async}", *keys)
    assert "data.sources" in line


def test_loader_that_is_killed(start, tmp_path):
    """Say, by the kernel, out of memory."""
    run = start(tmp_path / "run", "steps=100000")
    run.wait_for(lambda: last_step(tmp_path / "run") >= 2)
    (loader,) = psutil.Process(run.process.pid).children()
    loader.kill()
    line = run.finish().the_error()
    assert "loader" in line
    assert "SIGKILL" in line


# --- checkpoints --------------------------------------------------------------------------------------------------

SHAPES = [
    (["model.dim=64"], ["layers.0.attention.wq.weight", "[32, 32]", "[64, 64]"]),
    ([f"{MEMORY}.mem_n_keys=17"], ["layers.1.feed_forward.keys", "[64, 8]", "[68, 8]"]),
    (["model.n_layers=4"], ["layers.3."]),
    (["model.n_layers=2", f"{MEMORY}.layers='1'"], ["layers.2."]),
]


def check_initial_checkpoint(run, source, dump_dir, change, words):
    line = refuse(run, dump_dir, f"checkpoint.init_ckpt_path={source}", *change)
    assert all(word in line for word in [str(source), *words]), line


@pytest.mark.parametrize("form", ["distributed", "consolidated"])
@pytest.mark.parametrize(("change", "words"), SHAPES)
def test_initial_checkpoint_of_another_shape(run_here, reference, tmp_path, form, change, words):
    source = shutil.copytree(reference / "checkpoints" / "0000000030", tmp_path / "source")
    if form == "consolidated":
        source = consolidate_checkpoints(source)
    check_initial_checkpoint(run_here, source, tmp_path / "run", ["data.load_async=false", *change], words)


def test_initial_checkpoint_of_another_shape_in_a_process(run, reference, tmp_path):
    check_initial_checkpoint(run, reference / "checkpoints" / "0000000030", tmp_path / "run", *SHAPES[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *SHAPES,
        (["data.seq_len=16"], ["data.seq_len", "16", "32"]),
        (["data.seed=1"], ["data.seed"]),
        (["data.sources.beta=2"], ["data.sources"]),
        (["data.tokenizer.name=mock"], ["tokenizer"]),
    ],
)
def test_resuming_with_what_does_not_fit(run_here, reference, tmp_path, change, words):
    dump_dir = shutil.copytree(reference, tmp_path / "run")
    shutil.rmtree(dump_dir / "checkpoints" / "0000000060")
    before = snapshot(dump_dir)
    line = run_here(dump_dir, *change).the_error()
    assert all(word in line for word in words), line
    assert snapshot(dump_dir) == before


def test_hostile_checkpoint(run, tmp_path):
    """A file from a stranger is refused and not run."""

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch '{tmp_path / 'mark'}'",)

    torch.save({"model": {"norm.weight": Hostile()}}, tmp_path / "consolidated.pth")
    line = refuse(run, tmp_path / "run", f"checkpoint.init_ckpt_path={tmp_path / 'consolidated.pth'}")
    assert "not a consolidated checkpoint" in line
    assert not (tmp_path / "mark").exists()


# --- secrets and wandb ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "SLURM_JWT"])
def test_secret_in_the_config(run_here, tmp_path, name):
    line = refuse(run_here, tmp_path / "run", f"env.{name}=hunter2")
    assert f"env.{name}" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("section", ["logging.wandb", "eval.wandb"])
def test_secret_in_the_settings_of_wandb(run_here, tmp_path, section):
    line = refuse(
        run_here, tmp_path / "run", f"{section}={{project: x, mode: offline, settings: {{api_key: hunter2}}}}"
    )
    assert f"{section}.settings.api_key: looks like a secret" in line
    assert "hunter2" not in line


def test_variable_that_only_sounds_like_a_secret(run_here, tmp_path):
    """Commonly set beside Hugging Face's tokenizers, to be quiet."""
    run_here(tmp_path / "run", "steps=1", "env.TOKENIZERS_PARALLELISM=false").ok()


def test_wandb_without_a_key(run, tmp_path):
    line = refuse(run, tmp_path / "run", "logging.wandb={project: x, mode: online}", HOME=str(tmp_path))
    assert "logging.wandb" in line


# --- dump_dir -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["dump_dir", "checkpoint.path"])
@pytest.mark.parametrize("inside", ["", "run", "a/b/c"])
def test_full_disk(run_here, tmp_path, key, inside):
    disk = tmp_path / "disk"
    with small_disk(disk, "256k"):
        line = run_here(tmp_path / "run", f"{key}={disk / inside}").the_error()
        assert f"{key}: '{disk}' has" in line
        assert os.listdir(disk) == []
    assert not (tmp_path / "run").exists()


def test_small_disk_for_the_logs_alone(run_here, tmp_path):
    """Room for a checkpoint is wanted where checkpoints go."""
    disk = tmp_path / "disk"
    with small_disk(disk, "256k"):
        run_here(disk / "run", f"checkpoint.path={tmp_path / 'checkpoints'}", "steps=2").ok()


@pytest.mark.parametrize("key", ["dump_dir", "checkpoint.path"])
@pytest.mark.parametrize("inside", ["", "run"])
def test_read_only_disk(run_here, tmp_path, key, inside):
    disk = tmp_path / "disk"
    with small_disk(disk, "16m", ",ro"):
        line = run_here(tmp_path / "run", f"{key}={disk / inside}").the_error()
    assert f"{key}: '{disk}' is read-only" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["dump_dir", "checkpoint.path"])
@pytest.mark.parametrize("inside", ["", "run", "a/b"])
def test_file_in_the_way(run_here, tmp_path, key, inside):
    file = tmp_path / "file"
    file.write_text("mine")
    line = run_here(tmp_path / "run", f"{key}={file / inside}").the_error()
    assert f"{key}: '{file}' is a file" in line
    assert file.read_text() == "mine"
    assert not (tmp_path / "run").exists()


def test_room_taken_by_a_half_written_checkpoint(run_here, reference, tmp_path):
    """What a kill left behind is removed before its room is found wanting."""
    disk = tmp_path / "disk"
    one = bytes_of(reference / "checkpoints" / "0000000005")
    with small_disk(disk, int(2.9 * one)):
        shutil.copytree(reference / "checkpoints" / "0000000005", disk / "run/checkpoints/0000000005")
        half = shutil.copytree(disk / "run/checkpoints/0000000005", disk / "run/checkpoints/.0000000010.tmp")
        with open(half / "filler", "wb") as filler:
            filler.write(bytes(int(0.7 * one)))
        run_here(disk / "run", "steps=7", "checkpoint.dump.keep=1").ok()
        assert list_steps(disk / "run") == [7]


# --- several ranks ------------------------------------------------------------------------------------------------


def the_ranks_error(runs):
    """One line from all ranks together, where the end of one ends the others a little later, as torchrun has it."""
    wait_until(lambda: any(run.process.exitcode is not None for run in runs))
    time.sleep(0.5)
    for run in runs:
        run.kill(signal.SIGTERM)
    results = [run.finish() for run in runs]
    assert all(result.code != 0 for result in results)
    lines = [line for result in results for line in result.err.splitlines()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


# (number of ranks, distributed.*, arguments, what the line must name)
LAYOUTS = [
    # groups that the ranks cannot be split into
    (8, {"memory_parallel_size": 3}, [], ["distributed.memory_parallel_size", "3", "8 ranks"]),
    (8, {"memory_parallel_size": 16}, [], ["distributed.memory_parallel_size", "16", "8 ranks"]),
    (8, {"tp_size": 3}, [], ["distributed.tp_size", "3", "8 ranks"]),
    (8, {"dp_shard": 3, "fsdp_type": "full_shard"}, [], ["distributed.dp_shard", "3", "8 ranks"]),
    (2, {"dp_shard": 2, "tp_size": 2, "fsdp_type": "full_shard"}, [], ["dp_shard=2", "tp_size=2", "2 ranks"]),
    (6, {"dp_shard": 6, "tp_size": 2, "fsdp_type": "full_shard"}, [], ["dp_shard=6", "tp_size=2", "6 ranks"]),
    # sizes of the model that a group does not divide
    (4, {"tp_size": 4}, ["model.n_heads=2"], ["distributed.tp_size", "4", "model.n_heads=2"]),
    (4, {"tp_size": 4}, ["model.n_heads=4", "model.n_kv_heads=2"], ["distributed.tp_size", "model.n_kv_heads=2"]),
    (4, {"tp_size": 4}, ["model.n_heads=4"], ["distributed.tp_size", "4", "model.vocab_size=258"]),
    (2, {"tp_size": 2}, ["data.seq_len=31"], ["distributed.tp_size", "2", "data.seq_len=31"]),
    (2, {"tp_size": 2}, ["model.multiple_of=1"], ["distributed.tp_size", "2", "hidden size=85"]),
    (2, {"tp_size": 2}, [f"{MEMORY}.mem_v_dim=7"], ["distributed.tp_size", "2", "7 columns", f"{MEMORY}.mem_v_dim"]),
    (4, {"memory_parallel_size": 4}, [f"{MEMORY}.mem_v_dim=6"], ["distributed.memory_parallel_size", "6 columns"]),
    (3, {"memory_parallel_size": 3}, [], ["distributed.memory_parallel_size", "3", "32 columns", "model.dim"]),
    (3, {"memory_parallel_size": 3}, [f"{MEMORY}.peer_variant=true"], ["distributed.memory_parallel_size"]),
    # what does not go together
    (4, {"tp_size": 2, "memory_parallel_size": 2}, [], ["distributed.memory_parallel_size", "tp_size=2"]),
    (2, {"dp_shard": 2}, [], ["distributed.fsdp_type", "no_shard", "dp_shard=2"]),
    (2, {"dp_shard": 2, "fsdp_type": "no_shard"}, [], ["distributed.fsdp_type", "no_shard", "dp_shard=2"]),
    (2, {"tp_size": 2, "compile": "true"}, [], ["distributed.compile", "tp_size=2"]),
    (2, {"float8_recipe": "rowwise"}, [], ["distributed.float8_recipe", "GPU", "a CPU"]),
    # out of range
    *((2, {name: 0}, [], [f"distributed.{name}", "0"]) for name in SIZES),
    *((2, {name: -2}, [], [f"distributed.{name}", "-2"]) for name in SIZES),
    (2, {"timeout": 0}, [], ["distributed.timeout", "0 seconds"]),
    (2, {"timeout": -1}, [], ["distributed.timeout", "-1 seconds"]),
    (1, {"compile_cache_size_limit": 0}, [], ["distributed.compile_cache_size_limit", "0"]),
]


@pytest.mark.parametrize(("n_ranks", "layout", "arguments", "words"), LAYOUTS)
def test_layout(tiny, n_ranks, layout, arguments, words):
    args = parse_args(TrainArgs, [f"config={tiny}", *in_section("distributed", layout), *arguments])
    with pytest.raises(ValueError, match=r"^distributed\.[^\n]*$") as error:
        validate_train_args(args, World(size=n_ranks))
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{missing} not in: {error.value}"


def in_section(name, values):
    return [f"{name}.{key}={value}" for key, value in values.items()]


@pytest.mark.parametrize(
    ("n_ranks", "layout"),
    [
        (8, {"memory_parallel_size": 4, "fsdp_type": "full_shard", "dp_shard": 2}),
        (4, {"tp_size": 2, "dp_shard": 2, "fsdp_type": "full_shard"}),
        (8, {"dp_shard": 2, "dp_replicate": 3, "fsdp_type": "full_shard"}),
        (2, {"compile": "true", "checkpoint_each_layer": "true"}),
        (2, {"selective_activation_checkpointing": "true"}),
    ],
)
def test_layout_that_is_taken(tiny, n_ranks, layout):
    """`dp_replicate` follows from the others, whatever it says: published configs rely on it."""
    args = parse_args(TrainArgs, [f"config={tiny}", *in_section("distributed", layout)])
    validate_train_args(args, World(size=n_ranks))
    assert args.distributed.dp_replicate * args.distributed.dp_shard * args.distributed.tp_size == n_ranks


@pytest.mark.parametrize(
    ("how", "n_ranks", "arguments", "words"),
    [
        ("run", 8, ["distributed.memory_parallel_size=3"], ["distributed.memory_parallel_size", "3", "8 ranks"]),
        ("run_here", 4, ["distributed.tp_size=4", "model.n_heads=4"], ["distributed.tp_size", "model.vocab_size=258"]),
        (
            "run_here",
            4,
            ["distributed.tp_size=2", "distributed.memory_parallel_size=2"],
            ["distributed.memory_parallel_size"],
        ),
        ("run_here", 2, ["distributed.dp_shard=2"], ["distributed.fsdp_type", "no_shard"]),
        ("run_here", 2, ["distributed.float8_recipe=rowwise"], ["distributed.float8_recipe", "a CPU"]),
    ],
)
def test_layout_is_refused_before_ranks_meet(request, tmp_path, how, n_ranks, arguments, words):
    """The first rank comes to its end alone: it would wait in vain for the others, and say so, in a process group."""
    launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables = {name: str(value) for name, value in launch.items()}
    run = request.getfixturevalue(how)
    line = refuse(run, tmp_path / "run", "distributed.timeout=20", *arguments, **variables)
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["distributed.memory_parallel_size=3"], ["distributed.memory_parallel_size", "3", "2 ranks"]),
        (["checkpoint.init_ckpt_path=/no/such"], ["/no/such"]),
        (["dump_dir=/proc/nothing"], ["dump_dir"]),
    ],
)
def test_ranks(tiny, tmp_path, arguments, words):
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", *arguments]
    line = the_ranks_error(start_ranks(RANKS, argv, tmp_path))
    assert all(word in line for word in words), line
    assert not (tmp_path / "run").exists()


def test_training_state_that_is_missing(tiny, pair, tmp_path):
    """The place in the data of one of the ranks that wrote the checkpoint, which has no checksums that tell of it."""
    dump_dir = shutil.copytree(pair, tmp_path / "run")
    folder = dump_dir / "checkpoints" / "0000000020"
    (folder / "train_state_00000.json").unlink()
    metadata = read_metadata(folder)
    metadata.storage_meta.modules.clear()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "checksums.json").unlink()
    before = snapshot(dump_dir)
    line = the_ranks_error(start_ranks(RANKS, [f"config={tiny}", f"dump_dir={dump_dir}", "steps=30"], tmp_path))
    assert "train_state_00000.json is missing" in line
    assert snapshot(dump_dir) == before


def test_line_that_one_rank_reads(tiny, bad_corpus, tmp_path):
    """The other rank waits in vain, until it loses the connection or torchrun ends it: of that, no tale."""
    file = bad_corpus / "alpha" / "alpha.chunk.01.jsonl"  # its second line is the first that the second rank reads
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([lines[0], b"no JSON\n", *lines[2:]]))
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", f"data.root_dir={bad_corpus}", "data.sources.beta=0"]
    first, second = start_ranks(RANKS, argv, tmp_path)
    line = second.finish().the_error()
    first.process.join(20)
    first.kill(signal.SIGKILL)
    assert "Traceback" not in first.finish().err
    assert f"{file}:2:" in line
    assert not (tmp_path / "run").exists()


def test_line_that_one_rank_reads_while_training(tiny, bad_corpus, tmp_path):
    """The loader of the second rank meets it in mid-run: both stop, and one of them says why."""
    lines = [json.dumps({"text": f"document {number} of many words"}) for number in range(1000)]
    lines[201] = "no JSON"  # one file for two ranks: odd lines, counted from 0, are the second one's
    (bad_corpus / "long").mkdir()
    (bad_corpus / "long" / "long.chunk.00.jsonl").write_text("\n".join(lines))
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", f"data.root_dir={bad_corpus}", "data.sources.alpha=0"]
    argv += ["data.sources.beta=0", "data.sources.long=1", "steps=100000", "checkpoint.dump.every=0"]
    line = the_ranks_error(start_ranks(RANKS, argv, tmp_path))
    assert "long.chunk.00.jsonl:202:" in line
    assert last_step(tmp_path / "run") > 0


def test_torchrun(tiny, tmp_path):
    """The error gets through though another rank than the first meets it first, and torchrun ends all with that one.

    Where the first meets it first, torchrun ends the others after it has said so: `test_ranks`.
    """
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import os, time
        if os.environ.get("RANK") == "0":
            time.sleep(3)
        """)
    )
    argv = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "distributed.memory_parallel_size=3"]
    result = run_command(torchrun(2, argv), PYTHONPATH=str(tmp_path))
    assert result.code != 0
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.err
    assert "distributed.memory_parallel_size" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "slurm", "message"),
    [
        ("run", {"PROCID": "one"}, "SLURM_PROCID: no number"),
        ("run_here", {"LOCALID": ""}, "SLURM_LOCALID: no number"),
        ("run_here", {"PROCID": "2"}, "SLURM_PROCID: rank 2 of 2 tasks"),
        ("run_here", {"JOB_NODELIST": ""}, "SLURM_JOB_NODELIST: not in the environment"),
    ],
)
def test_variables_of_slurm_that_say_nothing(request, tmp_path, how, slurm, message):
    good = {"JOB_ID": "1", "NTASKS": "2", "PROCID": "0", "LOCALID": "0", "JOB_NODELIST": "n1"}
    run = request.getfixturevalue(how)
    line = refuse(run, tmp_path / "run", **{f"SLURM_{name}": value for name, value in (good | slurm).items()})
    assert message in line


def test_traceback_on_request(run_here, tmp_path):
    result = run_here(tmp_path / "run", "steps=0", LINGUA_TRACEBACK="1")
    assert result.code != 0
    assert "Traceback" in result.err
