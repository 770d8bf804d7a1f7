"""Debian's text: packages made here, in place of a mirror's."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import pytest

from apps.capacity.measure_text import measure_text
from apps.main.eval import EvalArgs
from apps.main.generate import GeneratorArgs
from lingua.errors import UserError
from lingua.shuffle_jobs import Resources
from lingua.sources import read_documents
from tests.helpers.evaluation import write_run

SCRIPT = Path(__file__).resolve().parents[2] / "setup" / "prepare_debian_text.py"
PACKAGES = ("linux-source", "dict-gcide", "wordnet-base")
CODE = "int f(void)\n{\n\treturn 0;\n}\n" * 20

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed")


def write_deb(folder: Path, name: str, files: dict[str, bytes], depends: str = "") -> None:
    root = folder / f"root-{name}"
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "DEBIAN").mkdir(parents=True)
    fields = {"Package": name, "Version": "1:6.1-2", "Architecture": "all", "Maintainer": "N <n@example.org>"}
    fields |= {"Depends": depends} if depends else {}
    control = "".join(f"{key}: {value}\n" for key, value in fields.items())
    (root / "DEBIAN" / "control").write_text(f"{control}Description: a test\n")
    command = ["dpkg-deb", "--root-owner-group", "-Znone", "--build", str(root), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    shutil.rmtree(root)


def kernel() -> bytes:
    """A tarball with forty files that count, and some that do not."""
    files = {f"fs/file{number}.c": f"// {number}\n{CODE}".encode() for number in range(38)}
    files |= {"Documentation/locking.rst": b"Locks\n=====\n\n" + b"Take them in order. " * 20}
    files |= {"fs/twice.c": files["fs/file0.c"], "fs/no_text.c": CODE.encode() + b"\0", "fs/short.c": b"int x;\n"}
    files |= {"fs/latin.c": b"// caf\xe9\n" * 100, "fs/long.c": CODE.encode() * 500, "logo.svg": b"<svg/>" * 100}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", preset=0) as tar:
        for path, content in files.items():
            member = tarfile.TarInfo(f"linux-source-6.1/{path}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def base64_of(number: int) -> str:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    return (base64_of(number // 64) if number >= 64 else "") + digits[number % 64]


def dictionary() -> dict[str, bytes]:
    entry = "Word{0} \\Word{0}\\, n. [OE. ?.]\n   What one says,\n   for the {0}th time. [Obs.]\n   [1913 Webster]\n\n"
    entry += "   Syn: utterance. [WordNet 1.5 +PJC]\n\n"
    content, index = b"00-database-info\n   free\n\n", [("00-database-info", 0, 26)]
    for number in range(100):
        text = entry.format(number).encode()
        index += [(word, len(content), len(text)) for word in (f"word{number}", f"form of word{number}")]
        content += text
    lines = "".join(f"{word}\t{base64_of(start)}\t{base64_of(length)}\n" for word, start, length in index)
    folder = "usr/share/dictd/gcide"
    return {f"{folder}.dict.dz": gzip.compress(content), f"{folder}.index": lines.encode()}


def wordnet() -> dict[str, bytes]:
    """Two hundred nouns; verbs that are defined twice or together with others; one adverb, too few to ask for."""
    line = "{:08d} 03 {} {:02x} {} 001 @ 00001740 n 0000 | {}  \n"
    license = "  1 This software and database is being provided to you\n"
    gloss = 'a thing of the kind {0:03d}; "there are {0}"'
    nouns = [line.format(i, "n", 1, f"noun_{chr(97 + i % 26)}{i} 0", gloss.format(i)) for i in range(200)]
    verbs = [line.format(number, "v", 1, "go 0", f"to move in the way {number}") for number in range(9)]
    verbs += [line.format(90 + i, "v", 2, f"do{i} 0 act{i}(p) 0", f"to bring about the thing {i}") for i in range(9)]
    files = {"noun": nouns, "verb": verbs, "adv": [line.format(7, "r", 1, "well 0", "in a good or proper manner")]}
    files["adj"] = []
    return {f"usr/share/wordnet/data.{pos}": (license + "".join(lines)).encode() for pos, lines in files.items()}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages, which stands for a mirror."""
    folder = tmp_path_factory.mktemp("archive")
    write_deb(folder, "linux-source", {"usr/share/doc/readme": b"see the other"}, "linux-source-6.1 (= 6.1-2), bash")
    write_deb(folder, "linux-source-6.1", {"usr/src/linux-source-6.1.tar.xz": kernel()})
    write_deb(folder, "dict-gcide", dictionary())
    write_deb(folder, "wordnet-base", wordnet())
    write_deb(folder, "bash", {"bin/bash": b"\x7fELF"})
    return folder


@pytest.fixture
def prepare(archive: Path, monkeypatch: pytest.MonkeyPatch):
    """The script, whose apt-get takes packages out of the archive and notes their names in `asked`."""
    spec = spec_from_file_location("prepare_debian_text", SCRIPT)
    script = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    call, script.asked = script.call, []
    monkeypatch.setattr(script, "Resources", lambda memory: Resources(memory, workers=1))

    def stand_in(*command: str, folder: Path | None = None) -> str:
        if command[0] != "apt-get":
            return call(*command, folder=folder)
        script.asked.append(command[2])
        found = list(archive.glob(f"{command[2]}_*.deb"))
        if not found:
            raise UserError(f"{' '.join(command)}: Unable to locate package {command[2]}")
        shutil.copy(found[0], folder)
        return ""

    monkeypatch.setattr(script, "call", stand_in)

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        script.main()

    script.run_with = run
    return script


def texts(folder: Path, pattern: str = "*.jsonl") -> list[str]:
    return [text for file in sorted(folder.glob(pattern)) for text, _ in read_documents(file)]


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and ".cache" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.suffix != ".yaml"}


def test_all_packages(prepare, tmp_path, capsys):
    out = tmp_path / "debian"
    prepare.run_with("--data_dir", out)
    assert prepare.asked == ["linux-source", "linux-source-6.1", "dict-gcide", "wordnet-base"]
    assert sorted(path.name for path in out.iterdir()) == sorted([".cache", "tasks", *PACKAGES])
    assert sorted(path.suffix for path in (out / ".cache").iterdir()) == ["", *[".deb"] * 4]
    for package in PACKAGES:
        assert len(list((out / package).glob(f"{package}.chunk.*.jsonl"))) == 8
    kernel_texts = texts(out / "linux-source")
    assert len(kernel_texts) == 39
    assert any(text.startswith("Locks\n=====\n") for text in kernel_texts)
    assert kernel_texts[:10] != sorted(kernel_texts)[:10]
    entries = texts(out / "dict-gcide")
    assert len(entries) == 100
    assert "Word7 \\Word7\\, n. [OE. ?.] What one says, for the 7th time. [Obs.]\nSyn: utterance." in entries
    assert len(texts(out / "dict-gcide", "*.val.jsonl")) == 1
    definitions = texts(out / "wordnet-base")
    assert len(definitions) == 200 + 9 + 9 + 1
    assert 'noun b1 (noun): a thing of the kind 001; "there are 1"' in definitions
    assert "do3, act3 (verb): to bring about the thing 3" in definitions
    manifest = json.loads((out / "linux-source" / "linux-source.manifest.json").read_text())
    assert manifest["inputs"][0][0] == "linux-source-6.1_6.1-2_all.jsonl"
    assert f"train with data.root_dir={out}" in capsys.readouterr().out

    # Again: nothing is asked for, and nothing is changed. Elsewhere, from the same packages: the same bytes.
    before, prepare.asked[:] = contents(out), []
    prepare.run_with("--data_dir", out)
    assert prepare.asked == []
    assert contents(out) == before
    prepare.run_with("--data_dir", tmp_path / "other", "--cache_dir", out / ".cache")
    assert prepare.asked == []
    assert contents(tmp_path / "other") == before


def test_questions_ask_for_what_is_in_the_training_text(prepare, tmp_path):
    prepare.run_with("--data_dir", tmp_path / "debian", "--packages", "wordnet-base")
    training = texts(tmp_path / "debian" / "wordnet-base", "*.chunk.*.jsonl")
    lines = (tmp_path / "debian" / "tasks" / "debian_dictionary.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    assert len(questions) > 150
    for question in questions:
        assert len(set(question["choices"])) == 4
        right = question["choices"][question["answer"]]
        assert any(text.startswith(f"{question['word']} ({question['pos']}): {right}") for text in training)
        assert question["pos"] == "noun"
        assert '"' not in right
    assert {question["answer"] for question in questions} == {0, 1, 2, 3}

    checkpoint = write_run(tmp_path / "run", max_seqlen=96) / "checkpoints" / "0000000007"
    harness = {"tasks": ["debian_dictionary"], "include_path": str(tmp_path / "debian" / "tasks"), "limit": 20}
    args = EvalArgs(dump_dir=str(tmp_path / "eval"), ckpt_dir=str(checkpoint), validation=None)
    args.generator, args.harness = GeneratorArgs(dtype="fp32", device="cpu"), {**harness, "bootstrap_iters": 0}
    measures = measure_text(args)["measures"]
    assert list(measures) == ["debian_dictionary: acc", "debian_dictionary: acc_mutual_info"]
    assert all(0 <= value < 0.7 for value in measures.values())


def test_a_definition_with_the_word_in_it_is_not_asked_for(prepare):
    assert prepare.gives_away("swivel chair", "a chair that swivels on its base")
    assert prepare.gives_away("anchorless", "without an anchor")
    assert not prepare.gives_away("liana", "a woody climbing usually tropical plant")


def test_a_part_of_a_package(prepare, tmp_path):
    for name in ("a", "b"):
        prepare.run_with("--data_dir", tmp_path / name, "--packages", "dict-gcide", "--max_gb", 4e-6)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    prepare.run_with("--data_dir", tmp_path / "c", "--packages", "dict-gcide", "--max_gb", 4e-6, "--seed", 1)
    prepare.run_with("--data_dir", tmp_path / "all", "--packages", "dict-gcide")
    parts = [set(texts(tmp_path / name / "dict-gcide")) for name in ("a", "c", "all")]
    assert 20 < len(parts[0]) < 40
    assert parts[0] != parts[1]
    assert parts[0] | parts[1] < parts[2]
    assert sum(file.stat().st_size for file in (tmp_path / "a" / "dict-gcide").glob("*.jsonl")) <= 4000
    assert not (tmp_path / "a" / "tasks").exists()
    with pytest.raises(UserError, match=r'dict-gcide: made with source .*"max_gb": 4e-06.* wanted .*"max_gb": null'):
        prepare.run_with("--data_dir", tmp_path / "a", "--packages", "dict-gcide")


def test_a_run_that_was_stopped_goes_on(prepare, tmp_path, monkeypatch):
    arguments = ("--data_dir", tmp_path / "debian", "--packages", "linux-source", "dict-gcide")
    for name in ("read_all", "run"):  # while a package is read, and while its text is shuffled
        with monkeypatch.context() as patch:
            patch.setattr(prepare, name, mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                prepare.run_with(*arguments)
        assert list((tmp_path / "debian").rglob("*.chunk.*")) == []
        assert {path.suffix for path in (tmp_path / "debian" / ".cache").iterdir()} == {".deb", ""}
        assert not (tmp_path / "debian" / ".cache" / prepare.WORK).exists()
    prepare.run_with(*arguments)
    assert prepare.asked == ["linux-source", "linux-source-6.1", "dict-gcide"]
    prepare.run_with("--data_dir", tmp_path / "whole", *arguments[2:])
    assert contents(tmp_path / "debian") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--packages", "linux-sauce"], "--packages linux-sauce: .*Unable to locate package linux-sauce"),
        (["--packages", "bash"], r"--packages bash: has no file that this script can read \(usr/src/"),
        (["--packages", "../x"], r"--packages \.\./x: not the name of a package"),
        (["--packages", "dict-gcide", "--max_gb", "1e-9"], "--max_gb 1e-09: less than one document of dict-gcide"),
        (["--max_gb", "0"], "--max_gb 0: must be above 0"),
    ],
)
def test_what_cannot_work_is_one_line(prepare, tmp_path, arguments, line):
    with pytest.raises(UserError, match=f"^{line}"):
        prepare.run_with("--data_dir", tmp_path / "debian", *arguments)
    assert list((tmp_path / "debian").rglob("*.jsonl")) == []


def test_without_apt(prepare, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / prepare.WORK).mkdir()
    with pytest.raises(UserError, match="^--packages dict-gcide: apt-get: not installed; this script needs a Debian"):
        prepare.fetch("dict-gcide", tmp_path)
