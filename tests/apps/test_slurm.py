"""stool, training, evaluation, preemption and sweeps on a real SLURM of two nodes (`cluster`)."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lingua.stool import StoolArgs, launch_job
from tests.helpers import training
from tests.helpers.cluster import Cluster, running_cluster
from tests.helpers.training import (
    REPOSITORY,
    Result,
    clean_environment,
    last_step,
    list_steps,
    read_losses,
    read_metrics,
    run_command,
    snapshot,
    start_ranks,
    tiny_config,
    write_config,
    write_corpus,
)

# SLURM's commands, a process each time, are not to take the cores from the ranks that are waited for.
wait_until = functools.partial(training.wait_until, pause=0.1)

HOSTILE = "a b'\"; touch pwned $(touch pwned) `touch pwned` \\ %j # ü*?~!&|<>"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "data")
    for source in ("alpha", "beta"):
        first = sorted((corpus / source).iterdir())[0]
        (corpus / source / f"{source}.val.jsonl").write_bytes(first.read_bytes())
    return corpus


@pytest.fixture
def slurm(cluster, monkeypatch):
    """The cluster, for launch_job in this process. Jobs that are left over are ended."""
    for name, value in cluster.variables.items():
        monkeypatch.setenv(name, value)
    yield cluster
    cluster.run("scancel", "--user=root")
    wait_until(lambda: not cluster.run("squeue", "--noheader"))


def stool(cluster: Cluster, *arguments: object, folder: Path = REPOSITORY, answer: str = "") -> Result:
    """`python -m lingua.stool`, in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "lingua.stool", *map(str, arguments)],
        cwd=folder,
        env=clean_environment(**cluster.variables),
        input=answer,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def submitted(result: Result) -> str:
    """The job's id, as told."""
    return result.ok().out.split()[1].rstrip(":")


def logs_of(dump_dir: Path) -> str:
    return "\n".join(f"== {file}\n{file.read_text()}" for file in sorted(dump_dir.glob("logs/*/*")))


def finish(cluster: Cluster, job: str, dump_dir: Path, state: str = "COMPLETED") -> None:
    cluster.wait(job)
    assert cluster.job(job)["JobState"] == state, logs_of(dump_dir)


def uninterrupted(run: Path, n_ranks: int, folder: Path) -> list[tuple[int, float]]:
    """The losses of the same run under torchrun's variables."""
    arguments = [f"config={run / 'base_config.yaml'}", f"dump_dir={folder / 'reference'}"]
    for rank in start_ranks(n_ranks, arguments, folder):
        rank.finish().ok()
    return read_losses(folder / "reference")


def test_training_on_two_nodes(cluster, corpus, tmp_path):
    """Four ranks on two nodes have the losses of four ranks under torchrun; started again, the job knows it is done."""
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    (data / "stdlib").symlink_to(corpus / "alpha")  # the source that the config names
    resources = ("nodes=2", "ngpu=2", "ncpu=1", "partition=learn")
    # As the published config has it, but for a shorter run with smaller tables.
    changes = ("steps=12", "logging.freq=1", "data.batch_size=2", "data.seq_len=64", "optim.warmup=5",
               "model.productkey_args.mem_n_keys=32")  # fmt: skip
    paths = (f"data.root_dir={data}", f"dump_dir={run}")
    result = stool(cluster, "config=apps/main/configs/debug.yaml", *resources, *changes, *paths)
    job = submitted(result)
    assert f"tail -F {run}/logs/{job}/rank_0.log" in result.out
    assert f"scancel {job}" in result.out
    reference = uninterrupted(run, 4, tmp_path)
    finish(cluster, job, run)
    assert len(reference) == 12
    assert read_losses(run) == reference
    assert {file.name for file in (run / "logs" / job).iterdir()} == {
        "job.log", "rank_0.log", "rank_1.log", "rank_2.log", "rank_3.log"
    }  # fmt: skip
    assert "4 rank(s)" in (run / "train.log").read_text()
    # The copy of the code is what ran.
    assert (run / "code" / "apps" / "main" / "train.py").read_bytes() == (
        REPOSITORY / "apps" / "main" / "train.py"
    ).read_bytes()

    again = cluster.run("sbatch", "--parsable", run / "submit.slurm")
    finish(cluster, again, run)
    assert "all 12 steps are done" in (run / "logs" / again / "rank_0.log").read_text()
    assert read_losses(run) == reference


def test_the_copied_code_runs_and_not_the_one_in_the_folder(slurm, corpus, tmp_path, monkeypatch):
    """What is changed in the project after a job was submitted is no matter of that job."""
    project = tmp_path / "project"
    for package in ("lingua", "apps"):
        shutil.copytree(REPOSITORY / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    run = tmp_path / "run"
    file = write_config(project / "c.yaml", tiny_config(corpus, run) | {"steps": 2})
    result = stool(slurm, f"config={file}", "ngpu=1", "ncpu=1", "--", folder=project)
    assert "argument '--'" in result.the_error()
    # Held back until the project is broken.
    slurm.run("scontrol", "update", "partition=learn", "state=down")
    job = submitted(stool(slurm, "config=c.yaml", "ngpu=1", "ncpu=1", folder=project))
    for file in project.rglob("*.py"):
        file.write_text("raise SystemExit('the code of the folder ran')")
    slurm.run("scontrol", "update", "partition=learn", "state=up")
    finish(slurm, job, run)
    assert last_step(run) == 2


def test_preemption_requeues_and_goes_on_exactly(slurm, corpus, tmp_path):
    """USR2 by SLURM itself, for a job of a higher partition: checkpoint, back into the queue, the same losses."""
    run = tmp_path / "run"
    config = tiny_config(corpus, run) | {"steps": 150}
    config["checkpoint"]["dump"]["every"] = 1000
    job = launch_job(StoolArgs(config=config, nodes=2, ngpu=2, ncpu=1))
    wait_until(lambda: last_step(run) >= 5)
    urgent = slurm.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--gres=gpu:2", "--output=/dev/null",
                       "--wrap", "sleep 1")  # fmt: skip
    slurm.wait(urgent)
    reached = list_steps(run)
    assert len(reached) == 1, logs_of(run)
    assert 5 <= reached[0] < 150
    reference = uninterrupted(run, 4, tmp_path)
    finish(slurm, job, run)
    assert slurm.job(job)["Restarts"] == "1"
    assert read_losses(run) == reference
    log = (run / "logs" / job / "rank_0.log").read_text()
    assert f"stopped after step {reached[0]} by SIGUSR2" in log
    assert log.count(f"requeueing job {job}") == 1
    assert f"starting at step {reached[0]} of 150" in log


def test_time_limit_and_cancelling(slurm, corpus, tmp_path):
    """Before its time is over a job writes a checkpoint and is requeued; TERM does the same; a cancelled one is not.

    Submitted again it goes on.
    """
    run = tmp_path / "run"
    config = tiny_config(corpus, run) | {"steps": 1_000_000}
    config["checkpoint"]["dump"]["every"] = 10**9
    config["logging"]["freq"] = 20
    # USR2 comes 120 s before the end, or up to 60 s sooner.
    job = launch_job(StoolArgs(config=config, nodes=2, ngpu=1, ncpu=1, time=3))
    assert slurm.job(job)["TimeLimit"] == "00:03:00"
    wait_until(lambda: slurm.job(job)["Restarts"] == "1")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # no third one, however slow the machine
    (first,) = list_steps(run)
    log = run / "logs" / job / "rank_0.log"
    wait_until(lambda: f"starting at step {first} of" in log.read_text())
    wait_until(lambda: last_step(run) >= first + 20)

    slurm.run("scancel", "--signal=TERM", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "2")
    second = list_steps(run)[-1]
    assert second > first
    wait_until(lambda: f"starting at step {second} of" in log.read_text())
    wait_until(lambda: last_step(run) >= second + 20)

    slurm.run("scancel", job)
    wait_until(lambda: not slurm.run("squeue", "--noheader"))
    assert slurm.job(job)["Restarts"] == "2"
    assert slurm.job(job)["JobState"] == "CANCELLED"
    text = log.read_text()
    assert text.count("by SIGUSR2") == 1
    assert text.count("by SIGTERM") == 2
    assert text.count("requeueing") == 2
    third = list_steps(run)[-1]
    assert third > second

    again = slurm.run("sbatch", "--parsable", run / "submit.slurm")
    log = run / "logs" / again / "rank_0.log"
    wait_until(lambda: log.exists() and f"starting at step {third} of" in log.read_text())
    wait_until(lambda: last_step(run) >= third + 20)
    slurm.run("scancel", again)
    wait_until(lambda: not in_queue(slurm))
    steps = [step for step, _ in read_losses(run)]
    assert steps == list(range(20, steps[-1] + 1, 20))


def test_signals_that_come_early_and_late(slurm, corpus, tmp_path):
    """TERM before the ranks have met, and again while a stopped run ends: each time it is back in the queue once."""
    run = tmp_path / "run"
    config = tiny_config(corpus, run) | {"steps": 1_000_000}
    config["checkpoint"]["dump"]["every"] = 10**9
    job = launch_job(StoolArgs(config=config, nodes=2, ngpu=1, ncpu=1))
    log = run / "logs" / job / "rank_1.log"
    wait_until(lambda: log.exists() and log.with_name("rank_0.log").exists())
    slurm.run("scancel", "--signal=TERM", job)
    assert last_step(run) == 0
    wait_until(lambda: slurm.job(job)["Restarts"] == "1")
    assert last_step(run) == 0
    wait_until(lambda: last_step(run) >= 5)

    slurm.run("scancel", "--signal=USR2", job)
    while (facts := slurm.job(job))["JobState"] == "RUNNING" and facts["Restarts"] == "1":
        # Ended before it asks again, as it does for a job that is just being requeued: a later start is not meant.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(["scancel", "--signal=TERM", job], env=slurm.environment(), capture_output=True, timeout=2)
    wait_until(lambda: slurm.job(job)["Restarts"] != "1" or in_queue(slurm) == "")
    assert slurm.job(job)["Restarts"] == "2", logs_of(run)
    assert "saved" in log.with_name("rank_0.log").read_text()
    (reached,) = list_steps(run)
    wait_until(lambda: f"starting at step {reached} of" in log.with_name("rank_0.log").read_text())


def test_a_failing_checkpoint_ends_the_job(slurm, corpus, tmp_path):
    """It is not requeued, to fail for ever."""
    run = tmp_path / "run"
    config = tiny_config(corpus, run) | {"steps": 1_000_000}
    config["checkpoint"]["dump"]["every"] = 10**9
    job = launch_job(StoolArgs(config=config, nodes=2, ngpu=1, ncpu=1))
    wait_until(lambda: last_step(run) >= 5)
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").write_text("in the way")
    slurm.run("scancel", "--signal=USR2", job)
    finish(slurm, job, run, "FAILED")
    assert slurm.job(job)["Restarts"] == "0"
    errors = [line for line in logs_of(run).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, errors
    assert "checkpoints" in errors[0]


def test_evaluation_by_stool_and_during_training(slurm, corpus, tmp_path):
    """Jobs of their own, submitted by the training job, and one by hand that is preempted: the same numbers.

    A checkpoint stays as long as an evaluation waits for it.
    """
    run = tmp_path / "run"
    config = tiny_config(corpus, run) | {"steps": 10, "async_eval_gpus": 1}
    config["eval"] = {"validation": {"max_steps": 2}}
    config["checkpoint"] = {"dump": {"every": 5, "keep": 1}, "eval": {"every": 5, "keep": 1}}
    job = launch_job(StoolArgs(config=config, nodes=1, ngpu=2, ncpu=1, mem="1M", exclude="n2"))
    slurm.wait(job, "RUNNING")
    # What is submitted from now on waits.
    slurm.run("scontrol", "update", "partition=learn", "state=down")
    try:
        finish(slurm, job, run)
        assert list_steps(run) == [5, 10]
    finally:
        slurm.run("scontrol", "update", "partition=learn", "state=up")
    results = [run / "evals" / f"{step:010d}" for step in (5, 10)]
    wait_until(lambda: all((folder / "validation.json").exists() for folder in results) or not in_queue(slurm))
    assert all((folder / "validation.json").exists() for folder in results), [logs_of(folder) for folder in results]
    for folder in results:
        script = (folder / "submit.slurm").read_text()
        assert all(f"#SBATCH --{line}\n" in script for line in ('mem="1M"', 'exclude="n2"', 'time="60"'))
    wait_until(lambda: not in_queue(slurm))
    assert {line["global_step"] for line in map(json.loads, (run / "metrics.validation.jsonl").open())} == {5, 10}

    by_hand = tmp_path / "evals"
    file = write_config(tmp_path / "eval.yaml", {"validation": {"max_steps": 2}})
    checkpoint = run / "checkpoints" / "0000000010"
    arguments = ["script=apps.main.eval", f"config={file}", f"ckpt_dir={checkpoint}", f"dump_dir={by_hand}"]
    job = submitted(stool(slurm, *arguments, "generator.dtype=fp32", "nodes=2", "ngpu=1", "ncpu=1"))
    wait_until(lambda: len(list((by_hand / "logs" / job).glob("rank_*.log"))) == 2)
    slurm.run("scancel", "--signal=TERM", job)
    wait_until(lambda: slurm.job(job)["Restarts"] == "1")
    assert not (by_hand / "validation.json").exists()
    finish(slurm, job, by_hand)
    assert json.loads((by_hand / "validation.json").read_text()) == json.loads(
        (results[1] / "validation.json").read_text()
    )
    for what in ("dirs_exists_ok=true", "override=true"):
        refused = stool(slurm, *arguments[:-1], f"dump_dir={run}", what, "ngpu=1", answer="yes").the_error()
        assert "is a run of apps.main.train" in refused


def in_queue(cluster: Cluster) -> str:
    return cluster.run("squeue", "--noheader")


def test_a_stopped_task_of_an_array_is_requeued_alone(slurm, corpus, tmp_path):
    """The last one, which SLURM knows by the array's own number, while another one was cancelled."""
    root = tmp_path / "sweep"
    config = tiny_config(corpus, root) | {"steps": 1_000_000}
    config["checkpoint"]["dump"]["every"] = 10**9
    array = launch_job(StoolArgs(config=config, ngpu=0, ncpu=1, sweep={"model.seed": [1, 2]}))
    runs = sorted(folder for folder in root.iterdir() if folder.name[0].isdigit())
    wait_until(lambda: all(last_step(run) >= 5 for run in runs))
    slurm.run("scancel", f"{array}_0")
    slurm.wait(f"{array}_0")
    slurm.run("scancel", "--signal=USR2", f"{array}_1")
    wait_until(lambda: slurm.job(f"{array}_1")["Restarts"] == "1")
    assert slurm.job(f"{array}_0")["JobState"] == "CANCELLED"
    assert slurm.job(f"{array}_0")["Restarts"] == "0"


def test_two_jobs_in_one_folder(slurm, corpus, tmp_path):
    """The second one, started by hand, does not write into what the first one writes."""
    run = tmp_path / "run"
    config = tiny_config(corpus, run) | {"steps": 1_000_000}
    first = launch_job(StoolArgs(config=config, ngpu=0, ncpu=1))
    wait_until(lambda: last_step(run) >= 5)
    second = slurm.run("sbatch", "--parsable", run / "submit.slurm")
    finish(slurm, second, run, "FAILED")
    assert "error: dump_dir: another run is writing into" in (run / "logs" / second / "rank_0.log").read_text()
    assert slurm.job(first)["JobState"] == "RUNNING"


def test_sweep(slurm, corpus, tmp_path):
    """One array, a folder a run; on CPUs only, and each can be started alone."""
    root = tmp_path / "sweep"
    file = write_config(tmp_path / "c.yaml", tiny_config(corpus, root) | {"steps": 2, "name": "try"})
    result = stool(slurm, f"config={file}", "ngpu=0", "ncpu=1", "sweep.optim.lr=[1e-3,1e-2]", "sweep.model.seed=[1,2]",
                   "sweep.name=['x; touch pwned']")  # fmt: skip
    job = submitted(result)
    runs = sorted(folder for folder in root.iterdir() if folder.name[0].isdigit())
    assert [folder.name for folder in runs] == [
        f"{number}_optim.lr={lr},model.seed={seed},name=x_touch_pwned"
        for number, (lr, seed) in enumerate([(0.001, 1), (0.001, 2), (0.01, 1), (0.01, 2)])
    ]
    wait_until(lambda: not in_queue(slurm))
    for number, folder in enumerate(runs):
        assert (folder / "logs" / f"{job}_{number}" / "rank_0.log").exists()
        assert f"{folder}/logs/{job}_{number}/rank_0.log" in result.out
    for folder, lr in zip(runs, (0.001, 0.001, 0.01, 0.01), strict=True):
        assert last_step(folder) == 2, logs_of(folder)
        assert read_metrics(folder)[-1]["optim/lr"] == pytest.approx(lr * 1 / 5)
        assert "1 rank(s)" in (folder / "train.log").read_text()
    assert job in result.out
    alone = slurm.run("sbatch", "--parsable", runs[2] / "submit.slurm")
    finish(slurm, alone, runs[2])


def test_hostile_names_run_nothing_and_lose_nothing(slurm, corpus, tmp_path, monkeypatch):
    """In folders, data, names, account and environment; through the real sbatch, and started again."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    data = work / f"data {HOSTILE.replace('/', '')}\nline"
    shutil.copytree(corpus, data)
    environment = work / f"env {HOSTILE}"
    environment.symlink_to(sys.prefix)
    run = work / f"run {HOSTILE}\nline ${{x"
    config = tiny_config(data, run) | {"steps": 2, "name": f"{HOSTILE}\nline"}
    config = {**config, "dump_dir": f"dumps/{HOSTILE}\n$(touch pwned)"}
    args = StoolArgs(config=config, ngpu=1, ncpu=1, account=HOSTILE, qos="", anaconda=str(environment))
    job = launch_job(args)
    run = work / config["dump_dir"]
    facts = slurm.run("scontrol", "show", "job", job)
    assert f"JobName={HOSTILE} line\n" in facts
    assert f"Account={HOSTILE.lower()} " in facts
    finish(slurm, job, run)
    assert last_step(run) == 2
    again = slurm.run("sbatch", "--parsable", run / "submit.slurm")
    finish(slurm, again, run)
    assert "all 2 steps are done" in (run / "logs" / again / "rank_0.log").read_text()
    assert not any(tmp_path.rglob("pwned*"))


@pytest.mark.parametrize("name", ["partition", "constraint", "exclude", "mem", "anaconda", "script", "launcher"])
@pytest.mark.parametrize("value", [HOSTILE, "--help", "line\nbreak"])
def test_hostile_values_are_refused_in_one_line(slurm, corpus, tmp_path, monkeypatch, name, value):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run" / "inner"
    with pytest.raises((ValueError, OSError)) as caught:
        launch_job(StoolArgs(config=tiny_config(corpus, run), ngpu=1, ncpu=1, **{name: value}))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert not (REPOSITORY / "pwned").exists()


def test_in_an_allocation(slurm, corpus, tmp_path):
    """`launcher=bash` within salloc, and srun by hand there."""
    run, by_hand = tmp_path / "run", tmp_path / "by_hand"
    file = write_config(tmp_path / "c.yaml", tiny_config(corpus, run) | {"steps": 2})
    commands = (
        f"{sys.executable} -m lingua.stool config={file} launcher=bash ngpu=1 ncpu=1 && "
        f"srun -n 2 {sys.executable} -u -m apps.main.train config={file} dump_dir={by_hand} && "
        f"{sys.executable} -u -m apps.main.train config={file} dump_dir={tmp_path}/alone"
    )
    allocation = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:1", "--job-name=interactive")
    done = subprocess.run(
        ["salloc", *allocation, "bash", "-c", commands],
        cwd=REPOSITORY, env=clean_environment(**slurm.variables), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + logs_of(run)
    for folder, n_ranks in ((run, 2), (by_hand, 2), (tmp_path / "alone", 1)):
        assert last_step(folder) == 2
        assert f"{n_ranks} rank(s)" in (folder / "train.log").read_text()


def test_submission_that_slurm_refuses_leaves_nothing(slurm, corpus, tmp_path):
    file = write_config(tmp_path / "c.yaml", tiny_config(corpus, tmp_path / "a" / "run"))
    assert "partition: SLURM has no 'nowhere'; it has learn, urgent" in (
        stool(slurm, f"config={file}", "partition=nowhere").the_error()
    )
    refused = stool(slurm, f"config={file}", "ngpu=5", "ncpu=1").the_error()
    assert "Requested node configuration is not available" in refused
    assert "(asked for partition=learn nodes=1 ngpu=5 ncpu=1 time=60)" in refused
    assert not (tmp_path / "a").exists()


def test_override_asks(slurm, corpus, tmp_path):
    run = tmp_path / "run"
    file = write_config(tmp_path / "c.yaml", tiny_config(corpus, run) | {"steps": 2})
    arguments = [f"config={file}", "ngpu=1", "ncpu=1"]
    slurm.run("scontrol", "update", "partition=learn", "state=down")
    job = submitted(stool(slurm, *arguments))
    assert f"job {job} of '{run}' is waiting or running" in stool(slurm, *arguments, "override=true").the_error()
    slurm.run("scancel", job)
    wait_until(lambda: not in_queue(slurm))
    slurm.run("scontrol", "update", "partition=learn", "state=up")
    (run / "mine").touch()
    assert "is there already" in stool(slurm, *arguments).the_error()
    for answer in ("no\n", ""):
        assert stool(slurm, *arguments, "override=true", answer=answer).code == 1
        assert (run / "mine").exists()
    job = submitted_after_question(stool(slurm, *arguments, "override=true", answer="yes\n"))
    assert not (run / "mine").exists()
    finish(slurm, job, run)
    job = submitted(stool(slurm, *arguments, "dirs_exists_ok=true"))
    finish(slurm, job, run)
    assert "all 2 steps are done" in logs_of(run)


def submitted_after_question(result: Result) -> str:
    return result.ok().out.split("(yes/no) ")[1].split()[1].rstrip(":")


def test_data_is_shuffled_by_job_arrays(slurm, corpus, tmp_path):
    """The same files as one process writes, on two nodes; a job that cannot read its file is told of."""

    def prepare(folder: str, *arguments: object) -> Result:
        script = [
            sys.executable,
            "setup/download_prepare_hf_data.py",
            "mine",
            "0.4",
            "--files",
            corpus / "*" / "*.chunk.*",
        ]
        done = subprocess.run(
            list(map(str, [*script, "--data_dir", tmp_path / folder, "--nchunks", "3", *arguments])),
            cwd=REPOSITORY, env=clean_environment(**slurm.variables), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    on_slurm = ("--slurm_partition", "learn", "--slurm_tasks", "2")
    prepare("alone", "--workers", "1").ok()
    told = prepare("array", *on_slurm).ok().out
    assert "scatter: job " in told
    assert "data.sources={mine_shuffled: 1}" in told
    assert "--slurm_time 61: more than the 60 minutes" in prepare("long", *on_slurm, "--slurm_time", "61").err
    names = {f"mine.chunk.{number:02d}.jsonl" for number in range(3)} | {"mine.val.jsonl", "mine.manifest.json"}
    written = [snapshot(tmp_path / folder / "mine_shuffled") for folder in ("alone", "array")]
    assert written[0].keys() == written[1].keys() == names
    assert all(written[0][name] == written[1][name] for name in names if name.endswith(".jsonl"))

    (corpus / "alpha" / "bad.chunk.00.jsonl").write_text('{"text": "good"}\n{"text": \n')
    try:
        refused = prepare("bad", *on_slurm)
    finally:
        (corpus / "alpha" / "bad.chunk.00.jsonl").unlink()
    assert refused.code == 1
    assert "bad.chunk.00.jsonl:2: " in refused.err.splitlines()[-1]


def test_no_sbatch_is_told(corpus, tmp_path, monkeypatch):
    file = write_config(tmp_path / "c.yaml", tiny_config(corpus, tmp_path / "run"))
    result = run_command(["lingua.stool", f"config={file}"], PATH="/nonexistent")
    assert "there is no sbatch on this machine" in result.the_error()
    assert not (tmp_path / "run").exists()
