"""Submits a script to SLURM: config, code and job script into dump_dir, from where the job can be started again.

    python -m lingua.stool config=apps/main/configs/debug.yaml nodes=2 ngpu=8 partition=P account=A [optim.lr=1e-3 ...]
    python -m lingua.stool script=apps.main.eval config=apps/main/configs/eval.yaml ckpt_dir=... dump_dir=...
    python -m lingua.stool config=... dump_dir=dumps/lr sweep.optim.lr=[1e-4,3e-4]     # a run for each value
    sbatch dump_dir/submit.slurm                                                        # the same job once more

Keys that are not stool's own (`StoolArgs`) are the script's, and go over its config. From a notebook:
`launch_job(StoolArgs(config={...}, nodes=2))`.

No value is ever pasted into a shell: SLURM's own commands get lists of arguments, and the job script quotes what it
holds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lingua.args import (
    check_config,
    check_writable,
    escape,
    first_line,
    from_dict,
    looks_secret,
    parse_args,
    read_argument,
    read_yaml,
    refuse_secrets,
    refusing_secrets,
    to_yaml,
    write_whole,
)
from lingua.errors import UserError
from lingua.launch import run_main, validate_environment
from lingua.slurm import PATIENCE, WARNING_SECONDS, ask_slurm, partition_minutes, scratch_variables, why_waiting

CONFIG_FILE, SCRIPT_FILE, CODE_FOLDER = "base_config.yaml", "submit.slurm", "code"

# What a copy of the code holds beside the folders that have Python files in them: files of these kinds.
CODE_SUFFIXES = {".py", ".pyi", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".json", ".txt", ".md", ".sh"}
# Of them, those that may hold secrets by their names.
_DATA_SUFFIXES = CODE_SUFFIXES - {".py", ".pyi", ".md", ".sh"} | {""}
MAX_CODE_BYTES = 2**20  # of a file

# Bytes that config, script and a copy of the code take, generously.
ROOM_FOR_FILES = 2**23

# Variables of the job or launcher that stool itself runs in, which the new job must not take for its own.
_OF_A_LAUNCHER = re.compile(
    r"(SLURM(D|STEPD)?_|SRUN_|STOOL_|TORCHELASTIC_|PMI|OMPI_)|(ENVIRONMENT|RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|WORLD_SIZE"
    r"|LOCAL_WORLD_SIZE|GROUP_WORLD_SIZE|ROLE_WORLD_SIZE|MASTER_ADDR|MASTER_PORT|CUDA_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES"
    r"|GPU_DEVICE_ORDINAL)$"
)
# Of srun's variables, those that speak of a job's resources.
_OF_AN_OUTER_JOB = (
    "SLURM_MEM_PER_CPU", "SLURM_MEM_PER_GPU", "SLURM_MEM_PER_NODE", "SLURM_MEM_BIND", "SLURM_CPU_BIND",
    "SLURM_GPU_BIND",
    "SLURM_GPUS", "SLURM_GPUS_PER_NODE", "SLURM_GPUS_PER_TASK", "SLURM_GPUS_PER_SOCKET", "SLURM_TRES_PER_TASK",
    "SLURM_HINT", "SLURM_EXCLUSIVE", "SLURM_EXACT",
)  # fmt: skip
# Variables by which sbatch would be told something else than by the script.
_OF_SBATCH = {
    "job-name": "JOB_NAME", "partition": "PARTITION", "time": "TIMELIMIT", "gres": "GRES", "signal": "SIGNAL",
    "array": "ARRAY_INX", "distribution": "DISTRIBUTION", "output": "OUTPUT", "export": "EXPORT",
    "requeue": "REQUEUE", "no-requeue": "NO_REQUEUE", "account": "ACCOUNT", "qos": "QOS", "constraint": "CONSTRAINT",
}  # fmt: skip
_OF_SBATCH_ALWAYS = {f"SBATCH_{name}" for name in ("GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "CPUS_PER_GPU", "WAIT")}
_MEMORY_OF_SBATCH = {f"SBATCH_MEM_PER_{what}" for what in ("NODE", "CPU", "GPU")}
# Steps from here on are SLURM's own: the shell of salloc, the batch script.
FIRST_STEP_OF_SLURM = 4294967290
# How SLURM is reached.
_OF_SLURM = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
# Of stool's keys for sbatch, those that only count where they are set.
_OPTIONAL = ("mem", "account", "qos", "constraint", "exclude")
# Of them, those that SLURM does not tell a job: it has them as STOOL_MEM and so on, for jobs that it submits itself.
FOR_JOBS_WITHIN = ("mem", "constraint", "exclude")


@dataclass
class StoolArgs:
    """How a script is to run on the cluster.

    `config`: the script's config: a YAML file, or its keys and values. `launcher`: `sbatch`, or `bash` to run now,
    within an allocation made by salloc. `ngpu`: per node, a rank each; 0 for a rank a node without GPUs. `ncpu`: per
    rank. `mem`: per node, as SLURM writes it ("": the cluster's default). `time`: minutes (-1: the partition's
    maximum). `nodes`: -1 is one node, or with `bash` all of the allocation. `anaconda`: name or folder of a conda
    environment, or folder of a venv (`default`: the one that stool runs in). `stdout`: all ranks into the job's one
    log, instead of a file each. `dryrun`: prints script and command, and writes nothing. `sweep`: keys of the config
    with lists of values; every combination is its own run, in a folder under dump_dir, and all are one job array.
    """

    config: Any = None
    launcher: str = "sbatch"
    script: str = "apps.main.train"
    copy_code: bool = True
    dirs_exists_ok: bool = False
    override: bool = False
    nodes: int = -1
    ngpu: int = 8
    ncpu: int = 16
    mem: str = ""
    anaconda: str = "default"
    constraint: str = ""
    exclude: str = ""
    time: int = -1
    account: str = ""
    qos: str = ""
    partition: str = "learn"
    stdout: bool = False
    dryrun: bool = False
    sweep: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A script's run to be submitted: its folder, and what it is to read."""

    dump_dir: Path
    config: DictConfig

    @property
    def name(self) -> str:
        # What it refers to may not be there before the job runs.
        given = None if OmegaConf.is_interpolation(self.config, "name") else self.config.get("name")
        return str(given or self.dump_dir.name)


# --- what is to be run ---------------------------------------------------------------------------------------------


@dataclass
class _AnyScript:
    """What is taken as text from the command line for scripts whose own keys are not known."""

    name: str = ""
    dump_dir: str = ""


def args_of_script(script: str) -> type | None:
    """The dataclass of a script's config, where its module says so (`ARGS = TrainArgs`).

    Only such a module is imported: others may do their work on being imported. Raises UserError without the module.
    """
    try:
        spec = importlib.util.find_spec(script) if re.fullmatch(r"\w+(\.\w+)*", script) else None
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError(
            f"script: there is no module {script!r} (from {os.getcwd()}); wanted one such as apps.main.train"
        )
    if not re.search(r"^ARGS = \w", Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE):
        return None
    return importlib.import_module(script).ARGS


def read_config(config: Any) -> DictConfig:
    """The script's config as it was given: a YAML file, a dataclass, or keys and values."""
    if isinstance(config, (str, os.PathLike)):
        return read_yaml(os.fspath(config))
    if dataclasses.is_dataclass(config):
        return OmegaConf.create(to_yaml(config))
    if isinstance(config, dict) and isinstance(config.get("dump_dir"), os.PathLike):
        config = {**config, "dump_dir": os.fspath(config["dump_dir"])}
    if isinstance(config, (Mapping, DictConfig)):
        return OmegaConf.create(config)
    raise UserError("config: not set; name the YAML file for the script to read")


def flatten_sweep(values: Mapping[str, Any], prefix: str = "") -> dict[str, list[Any]]:
    """Dotted keys and their lists of values. Raises UserError where there is no list, or an empty one."""
    flat: dict[str, list[Any]] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat |= flatten_sweep(value, f"{key}.")
        elif isinstance(value, list | tuple) and value and not any(isinstance(one, Mapping) for one in value):
            flat[key] = [one.item() if hasattr(one, "item") else one for one in value]  # numpy's numbers as Python's
        else:
            raise UserError(
                f"sweep.{key}: '{value}' where a list of single values is wanted, such as sweep.optim.lr=[1e-4,3e-4]"
            )
    return flat


def plan_runs(args: StoolArgs) -> tuple[Path, list[Run]]:
    """The folder of it all, absolute, and the runs: one, in that folder, or those of a sweep, in folders under it."""
    config = read_config(args.config)
    folder = OmegaConf.select(config, "dump_dir")
    if not folder or not isinstance(folder, str):
        raise UserError("dump_dir: not set in the config; name the folder for checkpoints and logs, dump_dir=...")
    root = Path(os.path.expanduser(folder)).absolute()
    if "\0" in folder:
        raise UserError("dump_dir: no folder's name has a zero byte in it")
    sweep = flatten_sweep(args.sweep)
    if "dump_dir" in sweep:
        raise UserError("sweep.dump_dir: follows from the sweep; leave it out")
    combinations = list(itertools.product(*([(key, value) for value in values] for key, values in sweep.items())))
    runs = []
    for number, combination in enumerate(combinations):
        run = Run(root, OmegaConf.create(config))
        for key, value in combination:
            OmegaConf.update(run.config, key, escape(value), merge=False)
        if combination:
            said = ",".join(f"{key}={value}" for key, value in combination)
            safe = re.sub(r"[^\w.,=+-]+", "_", said)[:100]
            run.dump_dir = root / f"{number:0{len(str(len(combinations) - 1))}d}_{safe}"
            if "name" not in sweep:
                OmegaConf.update(run.config, "name", f"{run.name if 'name' in config else root.name}_{number}")
        OmegaConf.update(run.config, "dump_dir", escape(str(run.dump_dir)))
        runs.append(run)
    paths = [OmegaConf.select(run.config, "checkpoint.path") for run in runs]
    if len(runs) > 1 and None not in paths and len(set(paths)) < len(paths):
        raise UserError(f"checkpoint.path: '{paths[0]}' for several runs of the sweep; leave it out")
    return root, runs


def validate_stool_args(args: StoolArgs) -> None:
    """Raises UserError, one line that names the key."""
    if args.launcher not in ("sbatch", "bash"):
        raise UserError(f"launcher: {args.launcher!r} is neither sbatch nor bash")
    for name, least in (("ngpu", 0), ("ncpu", 1)):
        if getattr(args, name) < least:
            raise UserError(f"{name}: {getattr(args, name)} is too small, it must be {least} or more")
    for name, what in (("nodes", "one node, or the allocation's"), ("time", "the partition's maximum")):
        if getattr(args, name) < 1 and getattr(args, name) != -1:
            raise UserError(f"{name}: {getattr(args, name)} is too small, it must be 1 or more, or -1 for {what}")
    for name in (*_OPTIONAL, "partition"):
        if re.search(r"[\x00-\x1f\x7f]", getattr(args, name)):
            raise UserError(f"{name}: {getattr(args, name)!r} has a line break or another control character in it")
    if not args.partition:
        raise UserError("partition: empty; name one of those that `sinfo` lists")
    if args.override and args.dirs_exists_ok:
        raise UserError("override: set together with dirs_exists_ok; one deletes what is there, the other keeps it")
    if args.launcher == "bash" and args.sweep:
        raise UserError("launcher: bash runs one job at a time, and a sweep is several; use sbatch")


# --- the job script ------------------------------------------------------------------------------------------------


def _directive(option: str, value: object) -> str:
    """A line that sbatch reads; it takes backslash and quote as a shell does, and nothing else."""
    text = re.sub(r'(["\\])', r"\\\1", str(value))
    return f'#SBATCH --{option}="{text}"'


def time_limit(args: StoolArgs) -> int | str | None:
    """Minutes of the job, or UNLIMITED; None where nobody knows. Raises UserError for more than the partition has."""
    if args.launcher != "sbatch" or shutil.which("sinfo") is None:
        return None if args.time == -1 else args.time
    longest = partition_minutes(args.partition)
    if args.time > longest:
        raise UserError(f"time: {args.time} minutes are more than the {longest:g} of partition '{args.partition}'")
    if args.time != -1:
        return args.time
    return "UNLIMITED" if longest == math.inf else int(longest)


def header(args: StoolArgs, name: str, limit: int | str | None, n_runs: int = 1) -> list[str]:
    """The lines for sbatch. Output goes to files that the script itself opens, whatever signs dump_dir has: sbatch
    reads a percent sign or a backslash there as its own.
    """
    tasks = max(args.ngpu, 1)
    options: list[tuple[str, object]] = [
        ("job-name", " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", name).split()) or "lingua"),
        ("nodes", args.nodes),
        ("ntasks-per-node", tasks),
        ("cpus-per-task", args.ncpu),
        ("distribution", "block"),
        ("partition", args.partition),
        ("output", "/dev/null"),
        ("export", "ALL"),
        ("signal", f"USR2@{WARNING_SECONDS}"),
    ]
    if args.ngpu:
        options.append(("gres", f"gpu:{args.ngpu}"))
    if limit is not None:
        options.append(("time", limit))
    options += [(name, value) for name in _OPTIONAL if (value := getattr(args, name))]
    if n_runs > 1:
        options.append(("array", f"0-{n_runs - 1}"))
    return ["#!/bin/bash", *(_directive(*option) for option in options), "#SBATCH --requeue"]


def _find_conda() -> str | None:
    return os.environ.get("CONDA_EXE") or shutil.which("conda")


def find_environment(environment: str) -> Path:
    """The folder of the Python environment that `anaconda` names. Raises UserError where there is none."""
    if environment == "default":
        return Path(sys.prefix)
    prefix = Path(environment).absolute()
    if os.access(prefix / "bin" / "python", os.X_OK):
        return prefix
    if conda := _find_conda():
        listed = subprocess.run([conda, "info", "--json"], capture_output=True, text=True, timeout=PATIENCE)
        with contextlib.suppress(ValueError, KeyError):
            info = json.loads(listed.stdout)
            names = {Path(folder).name: Path(folder) for folder in reversed(info["envs"])}
            prefix = {**names, "base": Path(info["root_prefix"])}.get(environment, prefix)
    elif not prefix.is_dir():
        raise UserError("anaconda: there is no conda on the PATH; name a venv's folder, or leave it out")
    if not os.access(prefix / "bin" / "python", os.X_OK):
        raise UserError(
            f"anaconda: {environment!r} is neither a folder with bin/python nor an environment that conda has"
        )
    return prefix


def activation(prefix: Path) -> list[str]:
    """Shell lines that put an environment's Python first."""
    # Without conda itself (micromamba, pixi) its Python is what can be had of an environment.
    if (prefix / "conda-meta").is_dir() and (conda := _find_conda()):
        hook = f'eval "$({shlex.quote(conda)} shell.bash hook)"'
        return [f"{hook} && conda activate {shlex.quote(str(prefix))} || exit 1"]
    lines = [f'export PATH={shlex.quote(str(prefix / "bin"))}"${{PATH:+:$PATH}}"']
    if (prefix / "pyvenv.cfg").exists():
        lines.append(f"export VIRTUAL_ENV={shlex.quote(str(prefix))}")
    return lines


def check_copy(code: Path, prefix: Path) -> None:
    """Raises UserError where a copy of the code cannot be put before the folder that the job runs in."""
    if os.pathsep in str(code):
        raise UserError(f"copy_code: cannot be with '{os.pathsep}' in dump_dir; set copy_code=false, or change that")
    version = sys.version_info[:2]
    if prefix != Path(sys.prefix):
        asked = [prefix / "bin" / "python", "-c", "import sys; print(*sys.version_info[:2])"]
        told = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE).stdout.split()
        version = tuple(map(int, told)) if len(told) == 2 else (0, 0)
    if version < (3, 11):
        raise UserError(f"copy_code: needs Python 3.11 or newer, not that of '{prefix}'; set copy_code=false")


def job_script(args: StoolArgs, run: Run, limit: int | str | None, code: Path | None, answers_signals: bool) -> str:
    """A job of one run. `limit`: its `time_limit`; `code`: the copy that it runs, if any; `answers_signals`: whether
    the script answers USR2 and TERM, or unblocks them.
    """
    tasks = max(args.ngpu, 1)
    prefix = find_environment(args.anaconda)
    # A system's own Python may go by the name of python3 alone.
    python = "python" if (prefix / "bin" / "python").exists() else shlex.quote(sys.executable)
    srun = [
        "srun",
        f"--nodes={args.nodes}",
        f"--ntasks={args.nodes * tasks}",
        f"--ntasks-per-node={tasks}",
        f"--cpus-per-task={args.ncpu}",
        *([f"--gres=gpu:{args.ngpu}"] if args.ngpu else []),
        "--kill-on-bad-exit=1",
        "--wait=0",  # for the first rank, which requeues the job when the others have left
        "--export=ALL",
    ]
    # One thread a rank, as torchrun has it, where ranks share a node.
    threads = 1 if args.ngpu else args.ncpu
    lines = [
        *header(args, run.name, limit),
        "",
        "# Written by lingua.stool. Start it again with sbatch: it goes on from the newest checkpoint.",
        f"dump_dir={shlex.quote(str(run.dump_dir))}",
        ": ${SLURM_JOB_ID:?no SLURM job; start this file with sbatch}",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        'export STOOL_LOGS="$dump_dir/logs/${job:-$SLURM_JOB_ID}"',
        "# Output has no place without it, so SLURM is told: scontrol show job.",
        'mkdir -p -- "$STOOL_LOGS" || {',
        '  scontrol update JobId="$SLURM_JOB_ID" Comment="$(hostname) cannot make dump_dir/logs"',
        "  exit 1",
        "}",
        '[ -n "${STOOL_TERMINAL:-}" ] || exec >> "$STOOL_LOGS/job.log" 2>&1',
        "# Paths in the config are relative to where it was submitted from.",
        f"cd -- {shlex.quote(os.getcwd())} || exit 1",
        *activation(prefix),
        "# What an interactive job around sbatch has said of memory, GPUs and cores would go over this job's own.",
        f"unset {' '.join(_OF_AN_OUTER_JOB)}",
        "# For jobs that this one submits.",
        *(f"export STOOL_{name.upper()}={shlex.quote(getattr(args, name))}" for name in FOR_JOBS_WITHIN),
    ]
    if code is not None:
        lines += [
            "# The copy of the code, and not what lies in the folder that this runs in.",
            f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONSAFEPATH=1',
        ]
    lines += [
        f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{threads}}}",
        f'command=({python} -u -m {shlex.quote(args.script)} config="$dump_dir/{CONFIG_FILE}")',
    ]
    if not args.stdout:
        to_file = 'exec "$@" >> "$STOOL_LOGS/rank_$SLURM_PROCID.log" 2>&1'
        lines.append(f'command=(bash -c {shlex.quote(to_file)} bash "${{command[@]}}")')
    if answers_signals:
        lines += [
            "# SLURM's signals before the end wait until the script is ready to answer them.",
            "env --block-signal=USR2,TERM true 2> /dev/null &&",
            '  command=(env --block-signal=USR2,TERM "${command[@]}")',
        ]
    lines.append(f'exec {shlex.join(srun)} "${{command[@]}}"')
    return "\n".join(lines) + "\n"


def array_script(args: StoolArgs, root: Path, runs: list[Run], limit: int | str | None) -> str:
    """A job array of a sweep: each task is the script of one run, which can be started alone, too."""
    folders = " ".join(shlex.quote(run.dump_dir.name) for run in runs)
    lines = [
        *header(args, runs[0].name.removesuffix("_0"), limit, len(runs)),
        "",
        "# Written by lingua.stool: a task a run. Each run's own submit.slurm starts it alone.",
        f"runs=({folders})",
        f'exec bash -- {shlex.quote(str(root))}/"${{runs[${{SLURM_ARRAY_TASK_ID:?start this file with sbatch}}]}}"/'
        f"{SCRIPT_FILE}",
    ]
    return "\n".join(lines) + "\n"


# --- folders -------------------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is one of a run or a sweep of ours."""
    with contextlib.suppress(OSError, UnicodeError):
        if "# Written by lingua.stool" in (folder / SCRIPT_FILE).read_text(encoding="utf-8"):
            return True
    return (folder / "config.yaml").is_file() and (folder / "train.log").is_file()


def script_of(folder: Path) -> str | None:
    """The script that a folder's job runs, or None where it was not submitted."""
    with contextlib.suppress(OSError):
        match = re.search(r" -u -m (\S+) config=", (folder / SCRIPT_FILE).read_text(encoding="utf-8"))
        return match[1] if match else None
    return None


def list_jobs(folders: Iterable[Path], inside: bool = False, patience: float = PATIENCE) -> dict[Path, set[str]]:
    """For each folder the numbers of its jobs (`inside`: and of those of folders in it) that wait or run.

    Raises OSError where SLURM does not answer within `patience` seconds.
    """
    listed = ask_slurm("squeue", "--noheader", f"--user={os.getuid()}", "--format=%A %o", patience=patience)
    rows = [row.partition(" ") for row in listed.splitlines()]
    commands = [(job, Path(command).resolve()) for job, _, command in rows]
    jobs = {}
    for folder in folders:
        script, whole = (folder / SCRIPT_FILE).resolve(), folder.resolve()
        jobs[folder] = {job for job, path in commands if path == script or (inside and path.is_relative_to(whole))}
        if "\n" in str(folder) and str(folder / SCRIPT_FILE) in listed:
            jobs[folder].add("(see squeue)")
    return jobs


def check_no_job(folder: Path, inside: bool) -> None:
    """Raises UserError where a job of this folder (`inside`: or of one in it) is in the queue or runs."""
    jobs = list_jobs([folder], inside)[folder]
    if jobs:
        first = min(jobs)
        raise UserError(
            f"dump_dir: job {', '.join(sorted(jobs))} of '{folder}' is waiting or running; `scancel {first}` ends it"
        )


def strings_in(value: Any) -> Iterator[str]:
    """All strings in nested lists and mappings, but for the values of dump_dir."""
    if isinstance(value, Mapping):
        yield from (text for key, inner in value.items() if key != "dump_dir" for text in strings_in(inner))
    elif isinstance(value, list):
        yield from (text for inner in value for text in strings_in(inner))
    elif isinstance(value, str):
        yield value


def refuse_secrets_of_run(config: dict[str, Any]) -> None:
    """In the sections that hold whatever is given, before they are written."""
    for section in (config, config.get("logging"), config.get("eval")):
        for name in ("env", "wandb"):
            if isinstance(section, Mapping):
                refuse_secrets(section.get(name), name)


def check_deletable(root: Path, args: StoolArgs, runs: list[Run]) -> None:
    """Raises UserError where `root` is no run of ours, or holds what somebody works with."""
    if root.is_symlink() or not is_run(root):
        raise UserError(f"override: '{root}' is no run of ours, so it is not deleted; name another dump_dir")
    check_no_job(root, inside=True)
    named = [text for run in runs for text in strings_in(OmegaConf.to_container(run.config, resolve=False))]
    if isinstance(args.config, (str, os.PathLike)):
        named.append(os.fspath(args.config))
    kept = [Path.cwd(), Path.home(), Path(__file__), Path(sys.prefix)]
    # What the config names within it: a checkpoint to start from or to evaluate, data, a tokenizer.
    kept += [Path(text) for text in dict.fromkeys(named) if 0 < len(text) < 4096 and "\0" not in text]
    for path in kept:
        with contextlib.suppress(OSError):  # a name that is too long for a file
            whole = Path(os.path.abspath(os.path.expanduser(path))).resolve()
            is_named_root = whole == root.resolve() and path not in kept[:4]
            if whole.exists() and whole.is_relative_to(root.resolve()) and not is_named_root:
                raise UserError(
                    f"override: '{root}' holds '{path}', which is in use, so it is not deleted; name another dump_dir"
                )


def check_folder(args: StoolArgs, root: Path, runs: list[Run]) -> bool:
    """Whether what is in `root` is to be deleted. Raises UserError where neither that nor going on in it will do."""
    try:
        check_writable("dump_dir", root, ROOM_FOR_FILES)
        if not root.exists() or not any(root.iterdir()):
            return False
    except OSError as error:
        raise UserError(f"dump_dir: '{str(root)[:200]}': {error.strerror}") from None
    script = script_of(root) or ("apps.main.train" if (root / "train.log").is_file() else None)
    if script not in (None, args.script) and (script_of(root) or args.script == "apps.main.eval"):
        raise UserError(
            f"dump_dir: '{root}' is a run of {script}; name another folder for {args.script}, and what it reads by "
            "its path (ckpt_dir=.../checkpoints/<step>)"
        )
    if args.override:
        check_deletable(root, args, runs)
        return True
    if not args.dirs_exists_ok:
        raise UserError(
            f"dump_dir: '{root}' is there already; sbatch {shlex.quote(str(root / SCRIPT_FILE))} goes on with a run, "
            "dirs_exists_ok=true submits it anew, override=true deletes it first"
        )
    if shutil.which("squeue"):
        check_no_job(root, inside=False)
    return False


def confirm_deletion(folder: Path) -> None:
    """Raises UserError unless the answer is yes."""
    try:
        answer = input(f"Delete {folder} and all that is in it, checkpoints too? (yes/no) ")
    except EOFError:
        raise UserError(
            f"override: asks before '{folder}' is deleted, and nobody answers; delete it yourself"
        ) from None
    if answer.strip().lower() != "yes":
        raise UserError(f"override: '{folder}' was not deleted, since the answer was not yes")


def code_roots(script: str) -> list[Path]:
    """The folders that hold the script's package and this library, less what is installed."""
    top = importlib.util.find_spec(script.split(".")[0])
    where = next(iter(top.submodule_search_locations or ()), None) or top.origin
    roots = dict.fromkeys([Path(where).resolve().parent, Path(__file__).resolve().parents[1]])
    return [root for root in roots if "site-packages" not in root.parts]


def code_files(root: Path, script: str, dump_dir: Path) -> Iterator[Path]:
    """The code under `root`: its own files, and all small files of its folders that have Python files in them.

    Runs, hidden folders, environments and what may be a secret by its name are left out.
    """
    seen: set[tuple[int, int]] = set()

    def is_new(folder: Path) -> bool:
        """Not a run, and not seen before: a link may lead back."""
        status = folder.stat()
        place = status.st_dev, status.st_ino
        if place in seen or folder.resolve() == dump_dir.resolve() or is_run(folder):
            return False
        seen.add(place)
        return True

    def is_code(path: Path) -> bool:
        secret = path.suffix in _DATA_SUFFIXES and looks_secret(path.stem)
        return not secret and not path.name.startswith(".") and path.is_file() and path.stat().st_size <= MAX_CODE_BYTES

    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or (path / "pyvenv.cfg").exists():
            continue
        if path.is_dir() and (path.name == script.split(".")[0] or any(path.glob("*.py"))):
            for folder, subfolders, names in os.walk(path, followlinks=True):
                subfolders[:] = [
                    name
                    for name in subfolders
                    if not name.startswith((".", "__pycache__")) and is_new(Path(folder, name))
                ]
                yield from (file for name in sorted(names) if is_code(file := Path(folder, name)))
        elif path.suffix in CODE_SUFFIXES and is_code(path):
            yield path


def copy_code(script: str, destination: Path) -> None:
    """Writes `destination` anew; what was there before stays until the new copy is whole."""
    beside = destination.with_name(f"{destination.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    for root in code_roots(script):
        taken = {path.name for path in beside.iterdir()} if beside.exists() else set()
        for file in list(code_files(root, script, destination.parent)):
            inner = file.relative_to(root)
            # The library's own folder fills up what the script's does not have.
            if inner.parts[0] not in taken:
                copy = beside / inner
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
    old = destination.with_name(f"{destination.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.rename(old)
    beside.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


class _Undo:
    """Within its `with`, what was written is taken back where an error follows, unless `keep` is set; an old folder
    that was put aside comes back then, and is deleted otherwise.
    """

    def __init__(self, folder: Path, delete: bool):
        self.folder, self.keep = folder, False
        self.was_empty = folder.is_dir() and not any(folder.iterdir())
        self.missing = [] if delete else [path for path in (folder, *folder.parents) if not path.exists()]
        self.aside = folder.with_name(f".{folder.name[:200]}.deleted.{os.getpid()}") if delete else None

    def __enter__(self) -> _Undo:
        if self.aside is not None:
            self.folder.rename(self.aside)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None and not self.keep:
            if self.missing or self.aside is not None or self.was_empty:
                shutil.rmtree(self.folder, ignore_errors=True)
            if self.was_empty:
                self.folder.mkdir()
            for path in self.missing[1:]:
                with contextlib.suppress(OSError):  # something else may be in it by now
                    path.rmdir()
            if self.aside is not None:
                self.aside.rename(self.folder)
        elif kind is not None:
            self.forget()

    def forget(self) -> None:
        """Deletes what was put aside, which can take its time, and tells of what cannot be deleted."""
        if self.aside is not None:
            try:
                shutil.rmtree(self.aside)
            except OSError as error:
                with contextlib.suppress(OSError, UnicodeError):
                    left = f"  left over   {shlex.quote(str(self.aside))} ({error.strerror}): delete it yourself"
                    print(left, flush=True)


# --- submission ----------------------------------------------------------------------------------------------------


def job_environment(args: StoolArgs) -> dict[str, str]:
    """This process's variables, less those of the job or launcher that it runs in itself, and those by which sbatch
    would be told something else than by the script.
    """
    told = {f"SBATCH_{name}" for option, name in _OF_SBATCH.items() if option not in _OPTIONAL or getattr(args, option)}
    told |= _OF_SBATCH_ALWAYS | (_MEMORY_OF_SBATCH if args.mem else set())
    scratch = scratch_variables()
    kept = {
        name: value
        for name, value in os.environ.items()
        if not _OF_A_LAUNCHER.match(name) and name not in told and scratch.get(name) != value
    }
    return kept | {name: os.environ[name] for name in _OF_SLURM if name in os.environ}


def launch_job(args: StoolArgs) -> str | None:
    """Writes dump_dir and submits the job; returns its id (None for a dry run). With launcher `bash` it waits for its
    end.

    Raises UserError or OSError, one line, with nothing left behind that was not there before.
    """
    apart = {"config": args.config, "sweep": args.sweep}
    args = dataclasses.replace(from_dict(StoolArgs, {**vars(args), "config": None, "sweep": {}}, "StoolArgs"), **apart)
    validate_stool_args(args)
    try:
        with refusing_secrets():
            root, runs = plan_runs(args)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {first_line(error)}") from None
    known = args_of_script(args.script)
    for run in runs:
        if known is not None:
            check_config(known, run.config, f"the config of {args.script}")
        refuse_secrets_of_run(OmegaConf.to_container(run.config, resolve=False))
        if isinstance(run.config.get("env"), Mapping | DictConfig):
            with refusing_secrets():
                validate_environment(run.config.env)
    args = dataclasses.replace(args, nodes=count_nodes(args))
    # What is installed stays where it is.
    code = root / CODE_FOLDER if args.copy_code and code_roots(args.script) else None
    if code is not None:
        check_copy(code, find_environment(args.anaconda))
    limit = time_limit(args)
    scripts = {run.dump_dir: job_script(args, run, limit, code, known is not None) for run in runs}
    if args.sweep:
        scripts[root] = array_script(args, root, runs, limit)
    command = ["bash" if args.launcher == "bash" else "sbatch", str(root / SCRIPT_FILE)]
    delete = check_folder(args, root, runs)
    if args.dryrun:
        for run in runs:
            print(f"# {run.dump_dir / CONFIG_FILE}\n{OmegaConf.to_yaml(run.config)}")
        for folder, script in scripts.items():
            print(f"# {folder / SCRIPT_FILE}\n{script}")
        print(f"# command\n{shlex.join(command)}")
        return None
    if shutil.which(command[0]) is None:
        raise UserError("launcher: there is no sbatch on this machine; log in where SLURM is, or train with torchrun")
    if delete:
        confirm_deletion(root)
    with _Undo(root, delete) as undo:
        root.mkdir(parents=True, exist_ok=True)
        if code is not None:
            copy_code(args.script, code)
        for run in runs:
            run.dump_dir.mkdir(exist_ok=True)
            write_whole(run.dump_dir / CONFIG_FILE, OmegaConf.to_yaml(run.config))
        for folder, script in scripts.items():
            write_whole(folder / SCRIPT_FILE, script)
        if args.launcher == "sbatch":
            undo.keep = True  # from here on SLURM may have the job, whatever happens to this process
            try:
                job = ask_slurm(command[0], "--parsable", *command[1:], environment=job_environment(args))
            except TimeoutError as error:
                raise OSError(f"{error}; the job may have been submitted all the same, see squeue") from None
            except OSError as error:
                undo.keep = False
                raise OSError(f"{error} (asked for {asked_for(args, limit)})") from None
            # Around its number a site's own wrapper of sbatch may say something.
            numbers = re.findall(r"^(\d+)(?:;.*)?$", job.strip(), re.MULTILINE)
            if not numbers:
                raise OSError(f"sbatch: submitted, but it told no job number ({job.strip()[:200]!r}); see squeue")
            job = numbers[-1]
    if args.launcher == "bash":
        job = os.environ["SLURM_JOB_ID"]
    try:
        with contextlib.suppress(OSError, UnicodeError):  # nobody reads it, but the job is on its way
            tell_of_job(args, job, root, runs)
    finally:
        undo.forget()
    if args.launcher == "bash":
        run_here(command, root / "logs" / job)
    return job


def asked_for(args: StoolArgs, limit: int | str | None) -> str:
    """What SLURM has refused, by the names of stool's keys."""
    asked = {name: getattr(args, name) for name in ("partition", "nodes", "ngpu", "ncpu")} | {"time": limit}
    asked |= {name: getattr(args, name) for name in _OPTIONAL}
    return " ".join(f"{name}={shlex.quote(str(value))}" for name, value in asked.items() if value not in ("", None))


def count_nodes(args: StoolArgs) -> int:
    """`nodes`, worked out where it is -1."""
    if args.launcher == "bash" and "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "launcher: bash runs within an allocation; make one with salloc, or submit with launcher=sbatch"
        )
    step = os.environ.get("SLURM_STEP_ID", "")
    if args.launcher == "bash" and step.isdecimal() and int(step) < FIRST_STEP_OF_SLURM:
        raise UserError(
            "launcher: bash within a step of srun would wait for what that step holds; run it in a shell of salloc"
        )
    if args.nodes != -1:
        return args.nodes
    return int(os.environ.get("SLURM_JOB_NUM_NODES", 1)) if args.launcher == "bash" else 1


def tell_of_job(args: StoolArgs, job: str, root: Path, runs: list[Run]) -> None:
    """Its number, and how to follow it."""
    name = "job.log" if args.stdout else "rank_0.log"
    if args.sweep:
        lines = [f"job {job}: {len(runs)} runs in {root}"]
        lines += [
            f"  {run.dump_dir.name}   tail -F {shlex.quote(str(run.dump_dir / 'logs' / f'{job}_{number}' / name))}"
            for number, run in enumerate(runs)
        ]
    else:
        folder = root / "logs" / job
        lines = [f"job {job}: {root}", f"  follow it   tail -F {shlex.quote(str(folder / name))}"]
        if not args.stdout:
            lines.append(f"  of SLURM    {shlex.quote(str(folder / 'job.log'))}")
    lines += [f"  state       squeue --job {job}", f"  end it      scancel {job}"]
    print("\n".join(lines), flush=True)
    if args.launcher == "sbatch" and shutil.which("squeue"):
        time.sleep(0.5)  # until SLURM has looked at it
        reason = why_waiting(job)
        if reason and reason not in ("Priority", "Resources"):
            print(f"  it waits    {reason}; if that does not change by itself, scancel it and ask for less", flush=True)


def run_here(command: list[str], logs: Path) -> None:
    """Runs the script within this allocation. Raises OSError where it fails."""
    # Ctrl-C is srun's to answer, which ends the ranks.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.Popen(command, env={**os.environ, "STOOL_TERMINAL": "1"}).wait()
    finally:
        signal.signal(signal.SIGINT, before)
    if code:
        raise OSError(f"the job ended with exit code {code}; see '{logs}', what its ranks say last")


def parse_command_line(argv: list[str]) -> StoolArgs:
    """Keys of StoolArgs are stool's; all others go over the script's config."""
    own_names = {known.name for known in dataclasses.fields(StoolArgs)}

    def is_own(argument: str) -> bool:
        return re.split(r"[.=\[]", argument, maxsplit=1)[0] in own_names or "=" not in argument

    files = [argument for argument in argv if argument.startswith("config=")]
    own = [argument for argument in argv if is_own(argument) and argument not in files]
    # Text as it stands: SLURM's own signs, such as the brackets of constraint=[rack1|rack2], are no YAML.
    strings = {known.name for known in dataclasses.fields(StoolArgs) if known.type == "str"}
    texts = dict(argument.split("=", 1) for argument in own if argument.split("=", 1)[0] in strings)
    args = parse_args(StoolArgs, [argument for argument in own if argument.split("=", 1)[0] not in strings])
    args = dataclasses.replace(args, **texts)
    if len(files) != 1:
        given = f"given {len(files)} times" if files else "not given"
        raise UserError(f"config: {given}; name one YAML file for the script to read, config=...")
    kind = args_of_script(args.script)
    overrides = [read_argument(argument, kind or _AnyScript) for argument in argv if not is_own(argument)]
    for override in overrides:
        if kind is not None:
            check_config(kind, override, f"command line; keys of stool are {', '.join(sorted(own_names))}")
    config = read_yaml(files[0].partition("=")[2])
    args.config = functools.reduce(OmegaConf.merge, overrides, config)
    return args


def main() -> None:
    if len(sys.argv) == 1 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        print(inspect.getdoc(StoolArgs))
        print("\nDefaults:\n" + "\n".join(f"  {name}={value}" for name, value in vars(StoolArgs()).items()))
        return
    launch_job(parse_command_line(sys.argv[1:]))


if __name__ == "__main__":
    run_main(main)
