"""The shell scripts that a newcomer runs first. `setup/test.sh` has made .venv before any test runs."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CREATE_ENV = ROOT / "setup" / "create_env.sh"


def bash(*arguments, cwd=ROOT, **variables):
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    return subprocess.run(
        ["bash", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def project(tmp_path):
    """A copy of what create_env.sh reads, with a Python whose pip installs nothing but leaves a note."""
    folder = tmp_path / "a project"
    (folder / "setup").mkdir(parents=True)
    for name in ("pyproject.toml", "setup/constraints.txt", "setup/create_env.sh"):
        shutil.copy(ROOT / name, folder / name)
    python = tmp_path / "python3"
    python.write_text(f"""#!/usr/bin/env bash
if [ "$1 $2" = "-m venv" ]; then
  for prefix; do :; done
  mkdir -p "$prefix/bin" && cp "$0" "$prefix/bin/python"
elif [ "$1 $2 $3" = "-m pip install" ]; then
  echo "$@" >> "{tmp_path}/installs"
  [ ! -e "{tmp_path}/broken" ]
else
  exec {shutil.which("python3")} "$@"
fi
""")
    python.chmod(0o755)
    return folder


def installs(project):
    file = project.parent / "installs"
    return file.read_text().splitlines() if file.exists() else []


def create_env(project, *arguments, **variables):
    return bash(project / "setup/create_env.sh", *arguments, PYTHON=project.parent / "python3", **variables)


def test_environment_is_made_once(project):
    first = create_env(project)
    assert first.returncode == 0, first.stderr
    assert "ready; source .venv/bin/activate" in first.stdout
    assert len(installs(project)) == 1
    assert "-c setup/constraints.txt -e .[dev]" in installs(project)[0]
    second = create_env(project)
    assert "up to date" in second.stdout
    assert len(installs(project)) == 1


def test_environment_is_made_again_when_what_it_wants_changed(project):
    create_env(project)
    with open(project / "setup/constraints.txt", "a") as file:
        file.write("einops==0.8.1\n")
    assert "ready" in create_env(project).stdout
    assert len(installs(project)) == 2
    create_env(project, "--extras", "dev,eval")
    assert ".[dev,eval]" in installs(project)[2]


def test_interrupted_install_is_taken_up_again(project):
    (project.parent / "broken").touch()
    assert create_env(project).returncode != 0
    (project.parent / "broken").unlink()
    assert "ready" in create_env(project).stdout


def test_as_a_job_it_finds_the_project_where_it_was_submitted(project, tmp_path):
    spooled = shutil.copy(CREATE_ENV, tmp_path / "slurm_script")
    result = bash(spooled, cwd=tmp_path, PYTHON=tmp_path / "python3", SLURM_JOB_ID=1, SLURM_SUBMIT_DIR=project)
    assert "ready" in result.stdout, result.stderr
    assert (project / ".venv").is_dir()


def test_conda_environment_where_asked(project, tmp_path):
    """With a conda that is a few lines of shell: which commands it is given, and where packages go."""
    prefix = tmp_path / "envs" / "lingua"
    conda = tmp_path / "bin" / "conda"
    conda.parent.mkdir()
    conda.write_text(f"""#!/usr/bin/env bash
echo "$@" >> "{tmp_path}/conda-calls"
case $1 in
  create) mkdir -p "{prefix}/bin" && cp "{tmp_path}/python3" "{prefix}/bin/python" ;;
  run) [ -d "{prefix}" ] && {{ [ -z "$6" ] || echo "{prefix}"; }} ;;
esac
""")
    conda.chmod(0o755)
    path = f"{conda.parent}:{os.environ['PATH']}"
    first = create_env(project, "--conda", "lingua", PATH=path)
    assert "conda activate lingua" in first.stdout, first.stderr
    assert not (project / ".venv").exists()
    assert "create -y -n lingua python=3.11" in (tmp_path / "conda-calls").read_text()
    assert "up to date" in create_env(project, "--conda", "lingua", PATH=path).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bogus"], "unknown argument '--bogus'"),
        (["--conda"], "--conda wants the environment's name"),
        (["--conda", "x"], "there is no conda on the PATH"),
    ],
)
def test_environment_errors(project, arguments, message):
    result = create_env(project, *arguments)
    assert result.returncode == 1
    assert result.stderr.strip().startswith("create_env: ")
    assert message in result.stderr
    assert installs(project) == []


def test_wrong_python_is_named(project):
    result = bash(project / "setup/create_env.sh", PYTHON="/nowhere/python3")
    assert result.returncode == 1
    assert "'/nowhere/python3' is not a Python 3.10 or newer" in result.stderr


def test_help():
    result = bash(CREATE_ENV, "--help")
    assert result.returncode == 0
    assert "--conda" in result.stdout


def test_quickstart(tmp_path):
    """All its stages with a smaller model; run again, it trains, validates and writes nothing anew."""
    arguments = [ROOT / "setup/quickstart.sh", f"dump_dir={tmp_path / 'my run'}", "steps=12", "checkpoint.dump.every=6"]
    arguments += ["model.dim=32", "model.n_layers=2", "model.productkey_args.layers='0,1'", "data.seq_len=512"]
    first = bash(*arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    for stage in range(1, 7):
        assert f"[{stage}/6]" in first.stdout
    results = tmp_path / "my run" / "evals" / "0000000012"
    validation = json.loads((results / "validation.json").read_text())
    assert f"{validation['stdlib']['bits_per_byte']:.3f}" in first.stdout
    assert f"{validation['memory_slots']['read']:,} of 65,536" in first.stdout
    assert (results / "continuation.jsonl").read_text().startswith('{"prompt": "The function returns"')
    picture = tmp_path / "my run" / "plots" / "run.png"
    assert first.stdout.rstrip().endswith(f"picture                          {picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")
    metrics = (tmp_path / "my run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["global_step"] for line in metrics.splitlines()] == [10, 12]

    # As a resume leaves one that it has passed over.
    (tmp_path / "my run" / "checkpoints" / "0000000012.damaged").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    second = bash(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "all 12 steps are done" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (
        second.stdout[second.stdout.index("parameters, dense") :]
        == first.stdout[first.stdout.index("parameters, dense") :]
    )


def test_quickstart_stops_at_the_first_failure(tmp_path):
    result = bash(ROOT / "setup/quickstart.sh", f"dump_dir={tmp_path / 'run'}", "steps=none")
    assert result.returncode == 1
    assert "error: steps: 'none' is not a whole number" in result.stderr
    assert "[4/6]" not in result.stdout
