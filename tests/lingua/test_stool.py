"""What stool writes and refuses, and what a process reads of SLURM, without SLURM itself (tests/apps/test_slurm.py)."""

import io
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from apps.main import train_eval
from apps.main.eval import EvalArgs
from apps.main.train import TrainArgs
from lingua import slurm
from lingua.args import parse_args, to_yaml
from lingua.distributed import find_world
from lingua.stool import StoolArgs, job_environment, launch_job, main, parse_command_line

ONE_JOB = {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


@pytest.fixture(autouse=True)
def outside_of_slurm(monkeypatch, tmp_path):
    """No job around the test, no SLURM on the PATH, and a folder of its own to be in."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def command(tmp_path):
    """Puts a command on the PATH that notes its arguments, one a line, and prints what it is told to."""

    def command(name: str, prints: str = "", code: int = 0) -> Path:
        file, notes = tmp_path / "bin" / name, tmp_path / f"{name}.arguments"
        (tmp_path / f"{name}.prints").write_text(prints)
        lines = (
            f"import sys; open({str(notes)!r}, 'a').write('\\n'.join(sys.argv[1:]) + '\\n')",
            f"stream = sys.stderr if {code} else sys.stdout",
            f"print(open({str(tmp_path / f'{name}.prints')!r}).read(), end='', file=stream)",
            f"sys.exit({code})",
        )
        file.write_text(f"#!{sys.executable}\n" + "\n".join(lines))
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return notes

    return command


def write_command(name: str, *lines: str) -> None:
    """One on the PATH that is more than `command` makes, in sh."""
    file = Path("bin", name)
    file.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    file.chmod(0o755)


def shows_facts() -> str:
    """A line of sh that prints what `scontrol show job` does."""
    Path("facts").write_text(facts())
    return 'while IFS= read -r line; do echo "$line"; done < facts'


# --- a process in a job --------------------------------------------------------------------------------------------


def test_ranks_of_srun(monkeypatch):
    for name, value in ONE_JOB.items():
        monkeypatch.setenv(name, value)
    world = find_world()
    assert (world.rank, world.local_rank, world.size) == (3, 1, 4)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "5")  # of this step, in a job of four
    assert find_world().size == 5


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_JOB_ID": "12", "SLURM_NTASKS": "4"},  # a shell of salloc
        {**ONE_JOB, "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},  # a batch script, without srun
        {
            **ONE_JOB,
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_ID": "4294967290",
        },  # salloc's own step
    ],
)
def test_processes_that_run_alone(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    world = find_world()
    assert (world.rank, world.size) == (0, 1)


def test_torchrun_within_a_job_comes_first(monkeypatch):
    for name, value in {**ONE_JOB, "RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    world = find_world()
    assert (world.rank, world.size) == (5, 8)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu-[003-007,012],cpu[1-2]", "gpu-003"),
        ("h[12,14]", "h12"),
        ("r[1-2]n[04-08]-ib", "r1n04-ib"),
        ("a.b-c,d[1-2]", "a.b-c"),
        ("", ""),
    ],
)
def test_first_host(nodes, first):
    assert slurm.first_host(nodes) == first


def test_meeting_point(monkeypatch):
    """The same for all ranks of a step, another port for another step or job, and never one that Linux hands out."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[3-9]")
    points = set()
    for job in range(50):
        for step in range(2):
            monkeypatch.setenv("SLURM_JOB_ID", str(1000 + job))
            monkeypatch.setenv("SLURM_STEP_ID", str(step))
            assert slurm.meeting_point() == slurm.meeting_point()
            points.add(tuple(slurm.meeting_point().values()))
    assert {host for host, _ in points} == {"n3"}
    assert all(1024 < int(port) < 32768 for _, port in points)
    assert len(points) > 95
    monkeypatch.setenv("SLURM_STEP_NODELIST", "n7")
    assert slurm.meeting_point()["MASTER_ADDR"] == "n7"


@pytest.mark.parametrize(
    ("tasks", "node", "own"),
    [
        ("4(x2),3", 0, True),
        ("8", 0, False),
        ("2,5", 0, True),
        ("2,5", 1, False),
        ("8,4", 1, True),
        ("4", 1, False),
        ("", 0, False),
    ],
)
def test_a_gpu_of_its_own(monkeypatch, tasks, node, own):
    """On a node with four GPUs."""
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    monkeypatch.setenv("SLURM_NODEID", str(node))
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", tasks)
    assert slurm.has_gpu_of_its_own() is own


def test_scratch(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    slurm.use_scratch()
    assert "TRITON_CACHE_DIR" not in os.environ
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_TMPDIR", str(scratch))
    monkeypatch.setattr(slurm.tempfile, "tempdir", None)
    slurm.use_scratch()
    assert os.environ["TMPDIR"] == str(scratch)
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(scratch))
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    slurm.use_scratch()
    assert os.environ["TRITON_CACHE_DIR"] == "/mine"


# --- requeueing ----------------------------------------------------------------------------------------------------


def facts(state: str = "RUNNING", batch: int = 1, left: float = 100, preempted: str = "None") -> str:
    """What scontrol tells of a job, whose name tries to say otherwise."""
    end = datetime.fromtimestamp(time.time() + left).isoformat(timespec="seconds")
    return f"""\
JobId=12 JobName=   JobState=CANCELLED BatchFlag=0 PreemptTime=2026-01-01T00:00:00
   JobState={state} Reason=None Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag={batch} Reboot=0 ExitCode=0:0
   StartTime=2026-11-24T11:51:18 EndTime={end} Deadline=N/A
   PreemptEligibleTime=2026-11-24T11:51:18 PreemptTime={preempted}
"""


@pytest.mark.parametrize(
    ("said", "progress", "requeued"),
    [
        (facts(), True, True),
        (facts(batch=0), True, False),
        (facts(state="CANCELLED"), True, False),
        (facts(state="COMPLETING"), True, False),
        (facts(left=3000), False, True),  # a signal from somebody, not of the time limit
        (facts(preempted="2026-11-24T11:55:00"), False, True),
    ],
)
def test_requeueing(command, monkeypatch, said, progress, requeued):
    notes = command("scontrol", said)
    slurm.requeue(progress)
    assert not notes.exists(), "there is no job"
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    slurm.requeue(progress)
    assert notes.read_text().splitlines() == ["show", "job", "12"] + ["requeue", "12"] * requeued


def test_one_task_of_an_array_is_requeued_alone(command, monkeypatch):
    """Also the one whose own number is that of the array."""
    notes = command("scontrol", facts())
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    slurm.requeue(made_progress=True)
    assert notes.read_text().splitlines() == ["show", "job", "12_3", "requeue", "12_3"]


def test_signals_to_the_whole_job_do_not_end_the_requeueing(monkeypatch):
    """SLURM sends them to scontrol, too, which a rank has started."""
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    show = shows_facts()
    write_command("scontrol", "kill -TERM $$; kill -USR2 $$", 'echo "$*" >> asked', show)
    slurm.requeue(made_progress=True)
    assert Path("asked").read_text().splitlines() == ["show job 12", "requeue 12"]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGTERM, signal.SIGUSR2}


def test_without_scontrol_nothing_is_requeued(monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    slurm.requeue(made_progress=True)
    assert "no scontrol here" in caplog.text


def test_a_job_that_cannot_get_on_is_not_requeued_for_ever(command, monkeypatch):
    notes = command("scontrol", facts())
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(OSError, match="without getting on"):
        slurm.requeue(made_progress=False)
    assert "requeue" not in notes.read_text().splitlines()


def test_what_slurm_refuses_is_told(command, monkeypatch):
    notes = command("scontrol", "scontrol: error: Requested operation\nis presently disabled\n", code=1)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    with pytest.raises(OSError, match=r"^scontrol: Requested operation is presently disabled$"):
        slurm.requeue(made_progress=True)
    assert notes.read_text().splitlines() == ["show", "job", "12"], "asked once"


def test_a_requeueing_whose_answer_was_lost_is_done(monkeypatch):
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    show = shows_facts()
    refuse = "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; : > asked; exit 1"
    again = "echo 'scontrol: error: Job is pending execution for job 12' >&2; exit 1"
    write_command("scontrol", f'[ "$1" = show ] && {{ {show}; exit; }}', f"[ -e asked ] && {{ {again}; }}", refuse)
    slurm.requeue(made_progress=True)
    assert Path("asked").exists()


def test_a_controller_that_is_away_is_asked_again(monkeypatch, caplog):
    """For a while: it may be starting anew just when jobs are to be requeued."""
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    show = shows_facts()
    away = "echo slurm_load_jobs error: Unable to contact slurm controller \\(connect failure\\) >&2; exit 1"
    count = 'echo "$*" >> asked; n=0; while read -r _; do n=$((n + 1)); done < asked'
    write_command("scontrol", count, f"[ $n != 1 ] && [ $n != 3 ] || {{ {away}; }}", show)
    slurm.requeue(made_progress=True)
    assert Path("asked").read_text().splitlines() == ["show job 12"] * 2 + ["requeue 12"] * 2
    assert caplog.text.count("Unable to contact slurm controller (connect failure); asking again") == 2
    write_command("scontrol", away)
    monkeypatch.setattr(slurm, "RETRY_SECONDS", 0)
    with pytest.raises(OSError, match="^scontrol: .*Unable to contact slurm controller"):
        slurm.requeue(made_progress=True)


# --- what is submitted ---------------------------------------------------------------------------------------------


@given(value=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40))
def test_text_from_the_command_line_is_kept(value):
    """As it stands, unless YAML says that it is quoted, nothing, or a reference, or it begins with a home folder."""
    if "${" in value or value.strip() in ("", "~") or value.strip().lower() == "null" or value[0] in "'\"#[{~":
        return
    args = parse_args(TrainArgs, [f"dump_dir={value}", f"data.root_dir={value}", f"env.NAME={value}"])
    assert args.dump_dir == args.data.root_dir == args.env["NAME"] == value


def test_quotes_of_yaml_are_still_read():
    args = parse_args(TrainArgs, ["dump_dir='a b'", 'name="x: y"', "data.root_dir=null", "steps=12", "env.A=012"])
    assert (args.dump_dir, args.name, args.data.root_dir, args.steps) == ("a b", "x: y", None, 12)
    assert args.env["A"] == "012"


def write(file: str, text: str = "dump_dir: run\nname: n\n") -> str:
    Path(file).write_text(text)
    return file


def test_command_line_is_split():
    """What is not stool's goes over the script's config, with its types."""
    arguments = ["nodes=2", "account=007", "optim.lr=1e-3", "sweep.optim.lr=[1,2]", "dump_dir=a # b", "partition=x: y"]
    args = parse_command_line([f"config={write('c.yaml')}", *arguments])
    assert (args.nodes, args.account, args.partition) == (2, "007", "x: y")
    assert OmegaConf.to_container(args.config) == {"dump_dir": "a # b", "name": "n", "optim": {"lr": 1e-3}}
    assert args.sweep == {"optim": {"lr": [1, 2]}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config=c.yaml", "partion=x"], "partion: unknown key"),
        (["config=c.yaml", "optim.lr=fast"], "optim.lr: 'fast' is not a number"),
        (["config=c.yaml", "nodes=two"], "nodes: 'two' is not a whole number"),
        (["config=c.yaml", "nodes=0"], "nodes: 0 is too small"),
        (["config=c.yaml", "ngpu=-1"], "ngpu: -1 is too small"),
        (["config=c.yaml", "time=0"], "time: 0 is too small"),
        (["config=c.yaml", "launcher=ssh"], "launcher: 'ssh' is neither"),
        (["config=c.yaml", "launcher=bash"], "launcher: bash runs within an allocation"),
        (["config=c.yaml", "launcher=bash", "sweep.seed=[1]"], "launcher: bash runs one job"),
        (["config=c.yaml", "override=true", "dirs_exists_ok=true"], "override: set together"),
        (["config=c.yaml", "sweep.seed=3"], "sweep.seed: '3' where a list"),
        (["config=c.yaml", "sweep.sead=[3]"], "sead: unknown key"),
        (["config=c.yaml", "sweep.dump_dir=[a,b]"], "sweep.dump_dir: follows"),
        (["config=c.yaml", "script=apps.main.nothing"], "script: there is no module"),
        (["config=c.yaml", "script=apps/main/train.py"], "script: there is no module"),
        (["config=c.yaml", "anaconda=nowhere"], "anaconda: there is no conda"),
        (["config=c.yaml", "dump_dir=null"], "dump_dir: "),
        (["config=c.yaml", "dump_dir=a:b"], "copy_code: cannot be with ':' in dump_dir"),
        (["config=missing.yaml"], "config: no file 'missing.yaml'"),
        (["config=bad.yaml"], "stepz: unknown key"),
        (["nodes=2"], "config: not given"),
        (["config=c.yaml", "config=c.yaml"], "config: given 2 times"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, arguments, message):
    write("c.yaml")
    write("bad.yaml", "dump_dir: run\nstepz: 3\n")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="^.+$") as caught:
        launch_job(parse_command_line(arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_within_a_step_of_srun_nothing_is_started(monkeypatch):
    """It would wait for ever for what the step holds; the shell of salloc is one, too, by number."""
    args = StoolArgs(config={"dump_dir": "run"}, launcher="bash", dryrun=True)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(ValueError, match="^launcher: bash within a step of srun would wait"):
        launch_job(args)
    monkeypatch.setenv("SLURM_STEP_ID", "4294967290")
    launch_job(args)


def test_a_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    write("c.yaml")
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(sys, "argv", ["stool", "config=c.yaml", "dryrun=true", "nodes=3", "ngpu=4", "mem=64G"])
    main()
    printed = capsys.readouterr().out
    for line in ('nodes="3"', 'ntasks-per-node="4"', 'gres="gpu:4"', 'mem="64G"', 'signal="USR2@120"'):
        assert f"#SBATCH --{line}" in printed
    assert f"sbatch {tmp_path}/run/submit.slurm" in printed
    assert sorted(os.listdir(tmp_path)) == before


def test_a_sweep_is_one_array(capsys):
    launch_job(StoolArgs(config={"dump_dir": "run"}, sweep={"seed": [1, 2, 3]}, dryrun=True))
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if "--array" in line] == ['#SBATCH --array="0-2"']
    assert "runs=(0_seed=1 1_seed=2 2_seed=3)\n" in printed


@pytest.mark.parametrize(("n_gpus", "nodes", "per_node"), [(1, 1, 1), (8, 1, 8), (9, 2, 5), (16, 2, 8), (20, 3, 7)])
def test_nodes_of_an_evaluation(monkeypatch, n_gpus, nodes, per_node):
    """No more than 8 GPUs a node, and no more nodes than that takes."""
    submitted = []
    monkeypatch.setattr(train_eval, "launch_job", submitted.append)
    train_eval.submit_evaluation(EvalArgs(), n_gpus)
    (job,) = submitted
    assert (job.nodes, job.ngpu) == (nodes, per_node)


def test_script_without_sbatch_is_bash(tmp_path, command, capsys):
    """The script that a dry run prints is the one that is written, and bash can read it."""
    config = {"dump_dir": str(tmp_path / 'it\'s $(x) `y` "z"\nline'), "name": "n"}
    launch_job(StoolArgs(config=config, dryrun=True))
    printed = capsys.readouterr().out
    command("sbatch", "77;cluster\n")
    assert launch_job(StoolArgs(config=config)) == "77"
    script = Path(config["dump_dir"], "submit.slurm").read_text()
    assert script in printed
    checked = subprocess.run(
        ["/bin/bash", "-n", Path(config["dump_dir"], "submit.slurm")], capture_output=True, text=True
    )
    assert (checked.returncode, checked.stderr) == (0, "")


def test_what_is_left_in_dump_dir(tmp_path, command):
    notes = command("sbatch", "77\n")
    command("sinfo", "learn* 1-12:30:00\nlearn* 2:00:00\n")
    config = write("c.yaml", "dump_dir: deep/run\nsteps: ${data.batch_size}\nname: ${oc.env:SLURM_JOB_ID}\n")
    assert launch_job(parse_command_line([f"config={config}", "data.batch_size=4"])) == "77"
    run = tmp_path / "deep" / "run"
    assert notes.read_text().splitlines() == ["--parsable", str(run / "submit.slurm")]
    assert sorted(os.listdir(run)) == ["base_config.yaml", "code", "submit.slurm"]
    saved = OmegaConf.load(run / "base_config.yaml")
    assert OmegaConf.to_container(saved, resolve=False) == {
        "dump_dir": str(run), "steps": "${data.batch_size}", "name": "${oc.env:SLURM_JOB_ID}", "data": {"batch_size": 4}
    }  # fmt: skip
    assert '#SBATCH --time="120"' in (run / "submit.slurm").read_text()
    assert (run / "code" / "lingua" / "stool.py").read_bytes() == Path(slurm.__file__).with_name(
        "stool.py"
    ).read_bytes()
    assert not list((run / "code").rglob("*.pyc"))
    assert not (run / "code" / ".git").exists()


def test_partition_without_a_limit(command, tmp_path):
    command("sbatch", "77\n")
    command("sinfo", "learn infinite\n")
    launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False))
    script = Path("run/submit.slurm").read_text()
    assert '#SBATCH --time="UNLIMITED"' in script
    assert "PYTHONPATH" not in script


def test_more_time_than_the_partition_has(command, tmp_path):
    command("sbatch", "77\n")
    command("sinfo", "learn 1:00:00\n")
    with pytest.raises(ValueError, match="time: 61 minutes are more than the 60 of partition 'learn'"):
        launch_job(StoolArgs(config={"dump_dir": "run"}, time=61))
    assert not Path("run").exists()


def test_a_job_that_cannot_start_is_told(command, capsys):
    command("sbatch", "77\n")
    command("squeue", "PartitionNodeLimit\n")
    launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False))
    assert "it waits    PartitionNodeLimit" in capsys.readouterr().out


def test_the_number_is_told_whatever_surrounds_it(command, capsys):
    """A site's own wrapper of sbatch may say more, and squeue fail."""
    command("sbatch", "Welcome to\n3 clusters\n77;big\n\nYou have 12 hours left.\n")
    command("squeue", "squeue: error: Unable to contact slurm controller\n", code=1)
    assert launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False)) == "77"
    assert capsys.readouterr().out.startswith(f"job 77: {Path('run').absolute()}\n")
    command("squeue", "CLUSTER: big\nPartitionNodeLimit\n")
    launch_job(StoolArgs(config={"dump_dir": "third"}, copy_code=False))
    assert "it waits    PartitionNodeLimit" in capsys.readouterr().out
    command("sbatch", "thank you\n")
    with pytest.raises(OSError, match="^sbatch: submitted, but it told no job number .'thank you'.; see squeue$"):
        launch_job(StoolArgs(config={"dump_dir": "other"}, copy_code=False))
    assert Path("other/submit.slurm").exists(), "the job that there is may read it"


def test_a_refused_submission_takes_back_what_it_made(command, tmp_path):
    command("sbatch", "sbatch: error: invalid account\n", code=1)
    Path("kept").mkdir()
    for folder in ("a/b/run", "kept/run"):
        with pytest.raises(OSError, match="^sbatch: invalid account .asked for ") as caught:
            launch_job(StoolArgs(config={"dump_dir": folder}, account="it's mine", mem="4G", time=5))
        asked = "partition=learn nodes=1 ngpu=8 ncpu=16 time=5 mem=4G account='it'\"'\"'s mine'"
        assert str(caught.value) == f"sbatch: invalid account (asked for {asked})"
    assert os.listdir("kept") == []
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"env": {"HF_TOKEN": "hunter2"}}, "env.HF_TOKEN"),
        ({"logging": {"wandb": {"settings": {"api_key": "hunter2"}}}}, "wandb.settings.api_key"),
    ],
)
def test_secrets_are_not_saved(command, section, key):
    command("sbatch", "77\n")
    with pytest.raises(ValueError, match=f"^{key}: looks like a secret") as caught:
        launch_job(StoolArgs(config={"dump_dir": "run", **section}))
    assert "hunter2" not in str(caught.value)
    assert not Path("run").exists()


@pytest.mark.parametrize("inside", [".", "mine.txt", "checkpoints"])
def test_override_refuses_what_is_no_run(command, inside, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    command("sbatch", "77\n")
    Path("precious", inside).mkdir(parents=True, exist_ok=True)
    Path("precious/data").touch()
    with pytest.raises(ValueError, match="is no run of ours"):
        launch_job(StoolArgs(config={"dump_dir": "precious"}, override=True))
    assert Path("precious/data").exists()


def test_override_never_deletes_what_is_worked_with(command, monkeypatch):
    """The folder that one is in, and the data, are kept even in what looks like a run."""
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    command("squeue", "")
    make_run(command)
    Path("run/here").mkdir()
    Path("run/data").mkdir()
    with pytest.raises(ValueError, match="holds 'run/data', which is in use"):
        launch_job(StoolArgs(config={"dump_dir": "run", "data": {"root_dir": "run/data"}}, override=True))
    Path("link").symlink_to("run")
    with pytest.raises(ValueError, match="no run of ours"):
        launch_job(StoolArgs(config={"dump_dir": "link"}, override=True))
    folder = Path("run").absolute()
    monkeypatch.chdir("run/here")
    with pytest.raises(ValueError, match="so it is not deleted"):
        launch_job(StoolArgs(config={"dump_dir": str(folder)}, override=True))
    assert (folder / "data").is_dir()


def test_variables_of_the_job_around_are_not_handed_on(monkeypatch, tmp_path):
    """An evaluation that a training job submits must not take itself for one of its ranks, nor use its scratch."""
    around = ("SLURM_JOB_ID", "SLURM_MEM_PER_NODE", "RANK", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "ENVIRONMENT")
    for name in around:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(slurm.tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "before")
    slurm.use_scratch()
    kept = ("SLURM_CONF", "SBATCH_ACCOUNT", "SBATCH_MEM_PER_NODE", "WANDB_API_KEY", "PYTHONPATH")
    for name in kept:
        monkeypatch.setenv(name, "kept")
    for name in ("SBATCH_PARTITION", "SBATCH_GPUS"):
        monkeypatch.setenv(name, "other")
    found = job_environment(StoolArgs())
    assert not {*around, "TMPDIR", "TRITON_CACHE_DIR", "SBATCH_PARTITION", "SBATCH_GPUS"} & set(found)
    assert all(found[name] == "kept" for name in kept)
    assert "SBATCH_ACCOUNT" not in job_environment(StoolArgs(account="mine"))
    assert "SBATCH_MEM_PER_NODE" not in job_environment(StoolArgs(mem="4G"))


def test_what_a_job_has_of_the_one_around_it_and_hands_on(command, monkeypatch, tmp_path):
    """Nothing of the interactive job that sbatch was called in; to evaluations of its own, what stool was told."""
    command("sbatch", "77\n")
    told = {"mem": "64G", "constraint": "a b'\"; touch pwned $(touch pwned) \\ ü", "exclude": "n[1-2]"}
    launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False, **told))
    write_command("srun", "env -0 > environment")
    around = ("SLURM_MEM_PER_NODE", "SLURM_CPU_BIND", "SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK", "STOOL_MEM")
    variables = {"SLURM_JOB_ID": "12", "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **dict.fromkeys(around, "7")}
    subprocess.run(["/bin/bash", "run/submit.slurm"], env=variables, check=True)
    found = dict(entry.split("=", 1) for entry in Path("environment").read_text().split("\0") if entry)
    assert set(around) & set(found) == {"STOOL_MEM"}
    assert not list(tmp_path.rglob("pwned*"))

    submitted = []
    monkeypatch.setattr(train_eval, "launch_job", submitted.append)
    for name in set(found) - {"PATH"}:
        monkeypatch.setenv(name, found[name])
    args = TrainArgs(dump_dir="run", eval={}, async_eval_gpus=1)
    train_eval.submit_evaluation(train_eval.evaluation_args(args, 5), 1)
    (job,) = submitted
    assert {name: getattr(job, name) for name in told} == told
    assert job.time == -1
    assert not [name for name in job_environment(job) if name.startswith("STOOL_")]


def test_checkpoints_that_evaluations_wait_for(command, monkeypatch, caplog):
    """Not those of evaluations that are done, or whose jobs are gone; without SLURM's answer all that may be."""
    args = TrainArgs(dump_dir="run", eval={}, async_eval_gpus=1)
    for step in (5, 10, 15):
        folder = Path("run/evals", f"{step:010d}")
        folder.mkdir(parents=True)
        (folder / "submit.slurm").touch()
    done = Path("run/evals/0000000010")
    (done / "config.yaml").write_text(to_yaml(train_eval.evaluation_args(args, 10)))
    (done / "validation.json").write_text("{}")
    notes = command("squeue", f"7 (null)\n8 {Path('run/evals/0000000005/submit.slurm').absolute()}\n")
    assert train_eval.find_awaited(args, [10, 20]) == set()
    assert not notes.exists(), "there is nothing to ask"
    assert train_eval.find_awaited(args, [5, 10, 15, 20]) == {5}
    assert train_eval.find_awaited(replace(args, eval=None), [5, 10, 15, 20]) == {5}
    command("squeue", "squeue: error: Unable to contact slurm controller\n", code=1)
    assert train_eval.find_awaited(args, [5, 10, 15, 20]) == {5, 15}
    assert "Unable to contact slurm controller; checkpoints stay that evaluations may wait for: [5, 15]" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": "two"}, "nodes: 'two' is not a whole number"),
        ({"time": "1-00:00:00"}, "time: '1-00:00:00' is not a whole number"),
        ({"time": None}, "time: null"),
        ({"mem": None}, "mem: null"),
        ({"exclude": ["n1"]}, "exclude: "),
        ({"config": None}, "config: not set"),
        ({"config": {"dump_dir": "run", "name": "a${b"}}, "config: "),
        ({"config": {"dump_dir": "x" * 300}}, "dump_dir: "),
        ({"config": {"dump_dir": "run", "env": {"HF_TOKEN": "hf_x"}}}, "env.HF_TOKEN: looks like a secret"),
        ({"sweep": {"data": {"sources": [{"a": 1}]}}}, "sweep.data.sources: "),
        ({"sweep": {"seed": [1, 2]}, "config": {"dump_dir": "run", "checkpoint": {"path": "x"}}}, "checkpoint.path: "),
    ],
)
def test_what_a_notebook_gives_is_told_in_one_line(command, tmp_path, changes, message):
    command("sbatch", "77\n")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="^.+$") as caught:
        launch_job(StoolArgs(**{"config": {"dump_dir": "run"}, **changes}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_numbers_of_numpy_and_paths_are_taken(command, tmp_path):
    command("sbatch", "77\n")
    args = StoolArgs(config={"dump_dir": tmp_path / "run"}, sweep={"optim.lr": list(np.logspace(-4, -3, 2))}, mem="4")
    launch_job(args)
    values = [OmegaConf.load(file).optim.lr for file in sorted(tmp_path.glob("run/*/base_config.yaml"))]
    assert values == [1e-4, 1e-3]


def test_a_job_that_slurm_has_keeps_its_folder(command, tmp_path, monkeypatch):
    """Whatever happens to stool once sbatch has taken the job."""
    command("sbatch", "77\n")

    class Full(io.StringIO):
        def write(self, _text):
            raise OSError("No space left on device")

    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", Full())
        assert launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False)) == "77"
    assert Path("run/base_config.yaml").exists()

    def no_answer(*_args, **_kwargs):
        raise subprocess.TimeoutExpired("sbatch", 1)

    with monkeypatch.context() as context:
        context.setattr(slurm.subprocess, "run", no_answer)
        with pytest.raises(OSError, match="may have been submitted"):
            launch_job(StoolArgs(config={"dump_dir": "other"}, copy_code=False, time=5))
    assert Path("other/base_config.yaml").exists()


def make_run(command) -> Path:
    command("sbatch", "77\n")
    launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False))
    Path("run/mine").touch()
    return Path("run").absolute()


def test_override_deletes_once_the_new_job_is_taken(command, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    command("squeue", "")
    make_run(command)
    command("sbatch", "sbatch: error: no such account\n", code=1)
    with pytest.raises(OSError, match="no such account"):
        launch_job(StoolArgs(config={"dump_dir": "run"}, override=True))
    assert Path("run/mine").exists()
    assert not list(tmp_path.glob(".run*"))
    command("sbatch", "78\n")
    launch_job(StoolArgs(config={"dump_dir": "run"}, override=True))
    assert not Path("run/mine").exists()
    assert not list(tmp_path.glob(".run*"))


def test_override_tells_of_what_cannot_be_deleted(command, monkeypatch, tmp_path, capsys):
    """The job is on its way then."""
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    command("squeue", "")
    make_run(command)
    remove = shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if ".deleted." in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    command("sbatch", "78\n")
    assert launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False, override=True)) == "78"
    (left,) = tmp_path.glob(".run.deleted.*")
    printed = capsys.readouterr().out
    assert printed.index("job 78: ") < printed.index(f"left over   {left} (Permission denied): delete it yourself")
    assert (left / "mine").exists()
    assert Path("run/submit.slurm").exists()


def test_override_deletes_also_when_it_is_stopped_before_all_is_told(command, monkeypatch, tmp_path):
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    command("squeue", "")
    make_run(command)
    command("sbatch", "78\n")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lingua.stool.tell_of_job", stop)
    with pytest.raises(KeyboardInterrupt):
        launch_job(StoolArgs(config={"dump_dir": "run"}, copy_code=False, override=True))
    assert not list(tmp_path.glob(".run*"))
    assert not Path("run/mine").exists()


def test_override_keeps_what_the_new_job_reads(command, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    command("squeue", "")
    run = make_run(command)
    (run / "checkpoints" / "0000000010").mkdir(parents=True)
    config = {"dump_dir": "run", "checkpoint": {"init_ckpt_path": "run/checkpoints/0000000010"}}
    with pytest.raises(ValueError, match="override: .*holds 'run/checkpoints/0000000010', which is in use"):
        launch_job(StoolArgs(config=config, override=True))
    with pytest.raises(ValueError, match="is a run of apps.main.train; name another folder for apps.main.eval"):
        launch_job(StoolArgs(config={"dump_dir": "run"}, script="apps.main.eval", override=True))
    assert (run / "checkpoints").exists()


@pytest.mark.parametrize("command_of_job", ["run/submit.slurm", "link/submit.slurm", "run/2_x/submit.slurm"])
def test_override_waits_for_jobs(command, monkeypatch, tmp_path, command_of_job):
    monkeypatch.setattr("builtins.input", lambda _: "yes")
    make_run(command)
    Path("link").symlink_to("run")
    # Which shows less by the user's own settings, as squeue does.
    for name in ("SQUEUE_PARTITION", "SQUEUE_FORMAT"):
        monkeypatch.setenv(name, "other")
    write_command("squeue", f'[ -n "$SQUEUE_PARTITION$SQUEUE_FORMAT" ] || echo "5 {tmp_path}/{command_of_job}"')
    with pytest.raises(ValueError, match="job 5 of .* is waiting or running"):
        launch_job(StoolArgs(config={"dump_dir": "run"}, override=True))


def test_code_of_a_project_of_its_own(command, tmp_path, monkeypatch):
    """Its package with all small files in it, once; no runs, no secrets, and links that lead back are no trouble."""
    monkeypatch.syspath_prepend(str(tmp_path))
    command("sbatch", "77\n")
    package = tmp_path / "experiments_of_mine"
    (package / "sub").mkdir(parents=True)
    for name in ("mine.py", "prompts.json", "sub/template.jinja", "sub/hf_token.txt", "secrets.yaml"):
        (package / name).write_text("x = 1")
    (package / "sub" / "up").symlink_to("..")
    (tmp_path / "api_key.txt").write_text("hf_x")
    for number in (1, 2):
        config = {"dump_dir": f"experiments_of_mine/dumps/run{number}"}
        launch_job(StoolArgs(config=config, script="experiments_of_mine.mine"))
    code = package / "dumps" / "run2" / "code"
    found = {str(path.relative_to(code)) for path in code.rglob("*") if path.is_file()}
    assert {"experiments_of_mine/mine.py", "experiments_of_mine/prompts.json", "lingua/stool.py"} <= found
    assert "experiments_of_mine/sub/template.jinja" in found
    assert not [
        name for name in found if "token" in name and name.endswith(".txt") or "secret" in name or "dumps" in name
    ]
    script = (package / "dumps" / "run2" / "submit.slurm").read_text()
    assert "block-signal" not in script  # which a script without a StopSignal would never hear of


def test_conda_environments(command, tmp_path, monkeypatch):
    """By name, also where a folder here has it, and by folder; conda itself is a stand-in, or not there."""
    monkeypatch.delenv("CONDA_EXE", raising=False)
    command("sbatch", "77\n")
    root, environment = tmp_path / "conda", tmp_path / "envs" / "mine"
    for folder in (root, environment):
        (folder / "bin").mkdir(parents=True)
        (folder / "conda-meta").mkdir()
        (folder / "bin" / "python").symlink_to(sys.executable)
    Path("mine").mkdir()
    command("conda", f'{{"envs": ["{environment}", "{root}"], "root_prefix": "{root}"}}')

    def script(anaconda: str) -> str:
        launch_job(StoolArgs(config={"dump_dir": "run"}, anaconda=anaconda, copy_code=False, dirs_exists_ok=True))
        return Path("run/submit.slurm").read_text()

    for anaconda, folder in (("mine", environment), (str(environment), environment), ("base", root)):
        assert f"conda activate {folder} || exit 1" in script(anaconda)
    with pytest.raises(ValueError, match="anaconda: 'other' is neither"):
        launch_job(StoolArgs(config={"dump_dir": "other"}, anaconda="other"))
    Path("bin/conda").unlink()
    with pytest.raises(ValueError, match="anaconda: 'mine' is neither a folder with bin/python nor"):
        launch_job(StoolArgs(config={"dump_dir": "other"}, anaconda="mine"))
    assert f'export PATH={environment}/bin"${{PATH:+:$PATH}}"\n' in script(str(environment))
    assert "conda activate" not in script(str(environment))
