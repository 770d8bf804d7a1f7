"""The data script: its command line, downloads from a hub on this machine, failures in one line, being stopped."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lingua.data import DataArgs, validate_data_args
from tests.helpers.hub import Hub, _Handler

SCRIPT = Path(__file__).resolve().parents[2] / "setup" / "download_prepare_hf_data.py"
TOKEN = "hf_verysecret"


def run(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env={**without_hub_settings(), **variables}, capture_output=True, text=True, timeout=120
    )


def without_hub_settings() -> dict[str, str]:
    """This process's variables: other tests set some of the hub's."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")}


def check_fails(result: subprocess.CompletedProcess[str], message: str) -> None:
    """In one line, behind which progress may be."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert re.search(rf"^download_prepare_hf_data: .*{message}", last), result.stderr
    assert TOKEN not in result.stdout + result.stderr


def texts(prefix: str, count: int) -> list[str]:
    return [f"{prefix} {number} " + "é" * (number % 50) for number in range(count)]


def parquet(prefix: str, count: int) -> bytes:
    sink = pa.BufferOutputStream()
    columns = {"id": list(range(count)), "text": texts(prefix, count), "score": [0.5] * count}
    pq.write_table(pa.table(columns), sink, row_group_size=40)
    return sink.getvalue().to_pybytes()


def jsonl(prefix: str, count: int) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts(prefix, count))


def found_texts(folder: Path) -> list[str]:
    """Of all chunk and validation files."""
    return [json.loads(line)["text"] for path in sorted(folder.glob("*.jsonl")) for line in open(path, "rb")]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub(tokens=[TOKEN, "hf_other"]) as hub:
        yield hub


@pytest.fixture
def prepare(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the script in a folder, against the hub."""

    def prepare(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(*arguments, cwd=tmp_path, **{**hub.environment(tmp_path / "home"), **variables})

    return prepare


Prepare = Callable[..., subprocess.CompletedProcess[str]]

# --- files of this machine ---------------------------------------------------------------------------------------


def test_local_files_to_training(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(jsonl("a", 300))
    (tmp_path / "in" / "b.parquet").write_bytes(parquet("b", 200))
    result = run("mine", "0.5", "--files", "in", "--nchunks", "3", "--seed", "7", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "500 documents" in result.stdout
    assert "as many out: 495 in 3 chunks, 5 for validation" in result.stdout
    assert "'data.sources={mine_shuffled: 1}', and data.sources.OTHER=0 for each other source" in result.stdout
    folder = tmp_path / "data" / "mine_shuffled"
    assert sorted(path.name for path in folder.iterdir()) == [
        "mine.chunk.00.jsonl", "mine.chunk.01.jsonl", "mine.chunk.02.jsonl", "mine.manifest.json", "mine.val.jsonl",
    ]  # fmt: skip
    assert sorted(found_texts(folder)) == sorted(texts("a", 300) + texts("b", 200))
    validate_data_args(DataArgs(root_dir=str(tmp_path / "data"), sources={"mine_shuffled": 1.0}))

    again = run("mine", "0.3", "--files", tmp_path / "in", "--nchunks", "3", "--seed", "7", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stdout
    check_fails(
        run("mine", "0.5", "--files", "in", cwd=tmp_path), "made with seed 7, wanted 42; remove the folder to make it"
    )
    # The result in the same folder is no input.
    other = run("other", "0.5", "--files", "in", "--nchunks", "3", "--data_dir", "in", cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    again = run("other", "1", "--files", "in", "--nchunks", "3", "--data_dir", "in", cwd=tmp_path)
    assert "nothing to do" in again.stdout


def test_scratch_and_urls(tmp_path: Path) -> None:
    """`memory://` ends with the process, but not before it was asked for its size."""
    (tmp_path / "a.jsonl").write_bytes(jsonl("a", 300))
    files = f"file://{tmp_path}/a.jsonl"
    for options in ([], ["--scratch", "tmp"]):
        result = run(
            "a", "0.5", "--files", files, "--data_dir", "memory://out", *options, cwd=tmp_path, TMPDIR=str(tmp_path)
        )
        assert result.returncode == 0, result.stderr
        assert "training reads folders of the machine that it runs on: copy memory://out/a_shuffled" in result.stdout
        assert list(tmp_path.iterdir()) == [tmp_path / "a.jsonl"]
    # One of the same name, for another folder, has ended early in the same scratch folder.
    (tmp_path / "wrong.jsonl").write_text("wrong")
    check_fails(run("a", "0.5", "--files", "wrong.jsonl", "--scratch", "tmp", cwd=tmp_path), "wrong.jsonl:1: not a")
    left = [path.relative_to(tmp_path) for path in tmp_path.glob("tmp/**/*")]
    assert left
    result = run("a", "0.5", "--files", files, "--data_dir", f"file://{tmp_path}/out", "--scratch", "tmp", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert all((tmp_path / path).exists() for path in left)
    assert sorted(found_texts(tmp_path / "out" / "a_shuffled")) == sorted(texts("a", 300))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: name, memory"),
        (["nonsense", "1"], "unknown dataset 'nonsense'; known: fineweb_edu, fineweb_edu_10bt, dclm_baseline_1.0, "),
        (["fineweb_edu", "much"], "argument memory: invalid float value: 'much'"),
        (["fineweb_edu", "-1"], "MEMORY -1: GB, more than 0"),
        (["fineweb_edu", "nan"], "MEMORY nan: GB, more than 0"),
        (["fineweb_edu", "100000"], "MEMORY 100000: this machine has .* GB; it works with less"),
        (["fineweb_edu", "1", "--nchunks", "0"], "--nchunks 0: 1 or more"),
        (["fineweb_edu", "1", "--workers", "0"], "--workers 0: 1 or more"),
        (["fineweb_edu", "1", "--slurm_cpus", "0"], "--slurm_cpus 0: 1 or more"),
        (["fineweb_edu", "1", "--files", "x"], "one of a known name, --repo and --files, not several"),
        (["x", "1", "--pattern", "*"], "unknown dataset 'x'"),
        (["x", "1", "--files", "x", "--pattern", "*"], "--pattern is for files of --repo"),
        (["x", "1", "--files", "x", "--revision", "y"], "--revision is for datasets of the hub"),
        (["../x", "1", "--files", "x"], r"name '\.\./x': only letters"),
        (["x", "1", "--files", "nothing"], "nothing: no such files; wanted names that end in .parquet, .jsonl"),
        (["x", "1", "--files", "x.csv"], "x.csv: not a name of JSON lines or parquet"),
        (["x", "1", "--files", "wrong.jsonl"], "wrong.jsonl:2: not a line of JSON"),
        (["x", "1", "--files", "few.jsonl"], "3 documents are too few for 32 chunks and 1 .*; use --nchunks 2"),
        (["x", "1", "--files", "few.jsonl", "--data_dir", "x.csv"], "x.csv' is a file, not a folder"),
        (["x", "1", "--files", "s3://bucket/x"], "no package for 's3://' is installed; pip install s3fs"),
        (["x", "1", "--files", "few.jsonl", "--slurm_tasks", "2"], "no SLURM here: "),
    ],
)
def test_what_is_wrong_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "x.csv").write_text("x")
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\nb\n')
    (tmp_path / "few.jsonl").write_bytes(jsonl("few", 3))
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments, cwd=tmp_path, PATH="/nonexistent")
    check_fails(result, message)
    assert not list(tmp_path.rglob("*.jsonl.*"))
    assert not list(tmp_path.glob("data/*/*.jsonl"))
    if "--files" not in arguments:
        assert sorted(tmp_path.rglob("*")) == before


def test_help(tmp_path: Path) -> None:
    result = run("--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "fineweb_edu_10bt 8" in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_it_goes_on(tmp_path: Path, number: signal.Signals, code: int) -> None:
    for part in range(4):
        (tmp_path / f"{part}.jsonl").write_bytes(jsonl(str(part), 1000) * 240)
    command = [sys.executable, str(SCRIPT), "x", "0.3", "--files", "*.jsonl", "--workers", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As in a terminal, also where the tests run in the background of a shell, which then ignores SIGINT.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    work = tmp_path / "data" / "x_shuffled" / ".work"
    deadline = time.monotonic() + 60
    while not list(work.glob("units-*/*.part")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    # As a terminal does, to all of the group.
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert not list(work.rglob("*.part"))
    assert (work / "plan.json").exists()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 0)
        pytest.fail("a worker is left")
    result = run("x", "0.3", "--files", "*.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "960,000 documents" in result.stdout


def test_as_jobs_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl("a", 500))
    outputs = []
    for number, options in enumerate(([], ["--cluster", "local", "--slurm_tasks", "2", "--slurm_cpus", "2"])):
        folder = f"out{number}"
        result = run("a", "0.5", "--files", "a.jsonl", "--nchunks", "3", "--data_dir", folder, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / folder / "a_shuffled").glob("*.jsonl")})
    assert len(outputs[0]) == 4
    assert outputs[0] == outputs[1]


# --- the hub -----------------------------------------------------------------------------------------------------

FINEWEB = {
    "README.md": b"about",
    "sample/10BT/000.parquet": parquet("ten0", 120),
    "sample/10BT/001.parquet": parquet("ten1", 80),
    "data/CC-1/000.parquet": parquet("all0", 90),
    "data/CC-2/000.parquet": parquet("all1", 60),
}


def test_catalogue(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    hub.add("HuggingFaceFW/fineweb-edu", FINEWEB, repo_type="dataset")
    compressed = pa.compress(jsonl("dclm", 150), "zstd", asbytes=True)
    hub.add(
        "mlfoundations/dclm-baseline-1.0",
        {
            f"global-shard_{shard:02}_of_10/local-shard_0_of_10/shard_0_processed.jsonl.zst": compressed
            for shard in (1, 2)
        },
        repo_type="dataset",
    )
    expected = {
        "fineweb_edu": texts("all0", 90) + texts("all1", 60),
        "fineweb_edu_10bt": texts("ten0", 120) + texts("ten1", 80),
        "dclm_baseline_1.0": texts("dclm", 150) * 2,
        "dclm_baseline_1.0_10prct": texts("dclm", 150),
    }
    for name, documents in expected.items():
        result = prepare(name, "0.5", "--data_dir", "./data", "--seed", "42", "--nchunks", "4")
        assert result.returncode == 0, result.stderr
        folder = tmp_path / "data" / f"{name}_shuffled"
        assert (folder / f"{name}.chunk.03.jsonl").exists()
        assert sorted(found_texts(folder)) == sorted(documents)
    line = (tmp_path / "data/fineweb_edu_shuffled/fineweb_edu.val.jsonl").read_bytes()
    assert list(json.loads(line)) == ["text", "id", "score"]
    assert (tmp_path / "data/fineweb_edu_10bt/sample/10BT/001.parquet").exists()


def test_what_is_here_is_not_asked_for_again(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    hub.add("HuggingFaceFW/fineweb-edu", FINEWEB, repo_type="dataset")
    arguments = ["fineweb_edu_10bt", "0.5", "--nchunks", "4"]
    assert prepare(*arguments).returncode == 0
    assert hub.paths(pattern="*/resolve/*/sample/10BT/*")
    assert not hub.paths(pattern="*/resolve/*/data/*")
    hub.requests.clear()
    first = found_texts(tmp_path / "data/fineweb_edu_10bt_shuffled")

    result = prepare(*arguments)
    assert "nothing to do" in result.stdout
    for path in (tmp_path / "data/fineweb_edu_10bt_shuffled").iterdir():
        path.unlink()
    assert prepare(*arguments, HF_HUB_OFFLINE="1").returncode == 0
    assert found_texts(tmp_path / "data/fineweb_edu_10bt_shuffled") == first
    # Nor are the raw files needed when all is done.
    (tmp_path / "data/fineweb_edu_10bt/sample/10BT/000.parquet").unlink()
    assert "nothing to do" in prepare(*arguments).stdout
    assert hub.requests == []
    check_fails(prepare(*arguments, "--revision", "x"), 'made with source .*"revision": "main".*, wanted .*"x"')

    # One that is missing is asked for, the other is not.
    for path in (tmp_path / "data/fineweb_edu_10bt_shuffled").iterdir():
        path.unlink()
    result = prepare(*arguments)
    assert result.returncode == 0, result.stderr
    assert "1 of 2 files to get" in result.stdout
    assert {Path(path).name for path in hub.paths(pattern="*/resolve/*")} == {"000.parquet"}


def test_any_dataset(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    files = {"x/0.jsonl": jsonl("x", 50), "y/0.jsonl": jsonl("y", 50), "README.md": b"", "dataset_infos.json": b"{}"}
    hub.add("me/words", files, "dataset")
    result = prepare("all", "0.5", "--repo", "me/words", "--nchunks", "2")
    assert result.returncode == 0, result.stderr
    assert sorted(found_texts(tmp_path / "data/all_shuffled")) == sorted(texts("x", 50) + texts("y", 50))
    result = prepare("some", "0.5", "--repo", "me/words", "--pattern", "x/*", "--nchunks", "2", "--revision", "main")
    assert result.returncode == 0, result.stderr
    assert sorted(found_texts(tmp_path / "data/some_shuffled")) == sorted(texts("x", 50))
    check_fails(
        prepare("none", "0.5", "--repo", "me/words", "--pattern", "z/*"),
        r"me/words: no files like 'z/\*' among its 4 \(README.md, dataset_infos.json, x/0.jsonl",
    )
    check_fails(
        prepare("none", "0.5", "--repo", "me/words", "--pattern", "*.md"), "'README.md' is no file of documents"
    )
    check_fails(prepare("none", "0.5", "--repo", "me/words", "--revision", "v2"), "me/words: no such --revision")
    check_fails(prepare("none", "0.5", "--repo", "a b/c/d"), "'a b/c/d' is not the name of a dataset such as org/name")
    assert not (tmp_path / "data" / "none").exists()


def test_a_download_that_breaks_goes_on(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    hub.add("me/words", {f"{number}.jsonl": jsonl(str(number), 50) for number in range(5)}, "dataset")
    hub.fail("*/resolve/*/3.jsonl", status=501)  # which huggingface_hub does not try again
    arguments = ["words", "0.5", "--repo", "me/words", "--nchunks", "2"]
    check_fails(prepare(*arguments), "me/words: the hub answers 501: start again later, it goes on")
    assert not (tmp_path / "data" / "words_shuffled").exists()
    hub.heal()
    result = prepare(*arguments)
    assert result.returncode == 0, result.stderr
    assert len(found_texts(tmp_path / "data" / "words_shuffled")) == 250


def test_a_download_is_ended_at_once(
    hub: Hub, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C, while files are on their way that do not come."""
    hub.add("me/words", {f"{number}.jsonl": jsonl(str(number), 50) for number in range(5)}, "dataset")
    released, send = threading.Event(), _Handler._send_file

    def wait_and_send(handler: _Handler, *arguments: object) -> None:
        if handler.command == "GET":
            released.wait(60)
        send(handler, *arguments)

    monkeypatch.setattr(_Handler, "_send_file", wait_and_send)
    arguments = ["words", "0.5", "--repo", "me/words", "--nchunks", "2"]
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        cwd=tmp_path,
        env={**without_hub_settings(), **hub.environment(tmp_path / "home")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not hub.paths(pattern="*/resolve/*"):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    try:
        _, errors = process.communicate(timeout=8)
    finally:
        process.kill()
        released.set()
    assert process.returncode == 130
    assert errors.strip().splitlines()[-1] == "download_prepare_hf_data: stopped; start again, it goes on"
    result = prepare(*arguments)
    assert result.returncode == 0, result.stderr
    assert len(found_texts(tmp_path / "data" / "words_shuffled")) == 250


def test_gated_and_missing(hub: Hub, prepare: Prepare) -> None:
    hub.add("me/gated", {"0.jsonl": jsonl("g", 50)}, "dataset", gated=True, licensed=[TOKEN])
    hub.add("me/private", {"0.jsonl": jsonl("p", 50)}, "dataset", private=True, licensed=[TOKEN])
    gated, private = (["x", "0.5", "--nchunks", "2", "--repo", f"me/{name}"] for name in ("gated", "private"))
    ask = "me/gated is gated: ask for access at http://.*/datasets/me/gated and set HF_TOKEN to a token of yours"
    check_fails(prepare(*gated), ask)
    check_fails(prepare(*gated, HF_TOKEN="hf_other"), ask)
    check_fails(prepare(*private), "me/private: no such dataset on the hub, or a private one")
    check_fails(prepare("x", "1", "--repo", "me/nothing"), "me/nothing: no such dataset on the hub")
    check_fails(prepare(*private, HF_TOKEN="hf_unknown"), "me/private: the hub answers 401: the token is not valid")
    for number, arguments in enumerate((gated, private)):
        result = prepare(f"x{number}", *arguments[1:], HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr
        assert TOKEN not in result.stdout + result.stderr


def test_faults_of_the_hub_and_the_network(hub: Hub, prepare: Prepare, tmp_path: Path) -> None:
    hub.add("me/words", {"0.jsonl": jsonl("w", 50)}, "dataset")
    arguments = ["x", "0.5", "--repo", "me/words"]
    check_fails(
        prepare(*arguments, HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN=TOKEN),
        r"me/words: the download stopped \(.*\); is the network there\? start again, it goes on",
    )
    check_fails(prepare(*arguments, HF_HUB_OFFLINE="1"), "me/words: HF_HUB_OFFLINE is set")
    check_fails(prepare(*arguments, HF_TOKEN=f"{TOKEN} é"), "HF_TOKEN is no token; set it to one of yours")
    for status, message in ((429, "too many requests"), (403, "the token gives no access"), (503, "start again later")):
        hub.heal()
        hub.fail("/api/*", status=status, headers={"Retry-After": "0"})
        check_fails(prepare(*arguments), f"me/words: the hub answers {status}: {message}")
    hub.heal()
    hub.fail("/api/*", status=403)
    with_password = prepare(*arguments, HF_ENDPOINT=hub.url.replace("//", "//me:s3@cret@"))
    check_fails(with_password, "the token gives no access; ask for it at http://127.0.0.1:.*/datasets/me/words")
    assert "cret" not in with_password.stdout + with_password.stderr
    assert not (tmp_path / "data").exists()


# --- what only a look inside can tell ----------------------------------------------------------------------------


@pytest.fixture
def script() -> Iterator[ModuleType]:
    spec = spec_from_file_location("download_prepare_hf_data", SCRIPT)
    module = module_from_spec(spec)
    # Data classes look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_free_disk_is_checked_before_the_download(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, raw = script.CATALOGUE["fineweb_edu_10bt"], tmp_path / "raw"
    monkeypatch.setattr(script, "list_repository", lambda *args: ("0" * 40, {"sample/10BT/0.parquet": 10**15}))
    with pytest.raises(ValueError, match=r"MiB free, and 4,196,166,992.2 MiB are needed at once"):
        script.download(dataset, {"revision": "main"}, raw, str(tmp_path / "out"), tmp_path / "out" / ".work")
    assert not list(tmp_path.iterdir())


def test_importing_it_takes_neither_torch_nor_datasets() -> None:
    """Workers and their main process are to stay small."""
    code = (
        "import sys, lingua.shuffle_jobs as _\n"
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'fsspec') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
