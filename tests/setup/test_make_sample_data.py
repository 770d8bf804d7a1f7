"""The sample data: real runs of the script, and its failures."""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "setup" / "make_sample_data.py"
NAMES = [*(f"stdlib.chunk.{number:02d}.jsonl" for number in range(4)), "stdlib.val.jsonl"]


def run(cwd: Path, out: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--out", out]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


def normalised(text: str) -> str:
    return " ".join(text.split())


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = spec_from_file_location("make_sample_data", SCRIPT)
    module = module_from_spec(spec)
    # Named tuples look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def first_run(build_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """The folder that a run wrote to, by a relative path."""

    def build(cwd: Path) -> None:
        result = run(cwd, "sample", PYTHONHASHSEED="1")
        assert result.returncode == 0, result.stderr
        assert "prose; written to" in result.stdout

    return build_once("sample", build) / "sample" / "stdlib"


@pytest.fixture(scope="module")
def documents(first_run: Path) -> dict[str, list[dict[str, str]]]:
    lines = {name: (first_run / name).read_bytes().decode("utf-8").split("\n") for name in NAMES}
    assert all(parts[-1] == "" for parts in lines.values())
    return {name: [json.loads(line) for line in parts[:-1]] for name, parts in lines.items()}


@pytest.fixture(scope="module")
def train(documents: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return [document for name in NAMES[:4] for document in documents[name]]


@pytest.fixture(scope="module")
def val(documents: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    return documents["stdlib.val.jsonl"]


def test_same_bytes_whatever_the_hash_seed_folder_and_locale(first_run: Path, tmp_path: Path) -> None:
    before = {name: (first_run / name).stat().st_mtime_ns for name in NAMES}
    result = run(tmp_path, str(first_run.parent), PYTHONHASHSEED="2", LC_ALL="C", PYTHONUTF8="0", TZ="Asia/Tokyo")
    assert result.returncode == 0, result.stderr
    assert "nothing to do" in result.stdout
    assert {name: (first_run / name).stat().st_mtime_ns for name in NAMES} == before
    assert list(tmp_path.iterdir()) == []


def test_files_and_sizes(first_run: Path) -> None:
    assert sorted(path.name for path in first_run.iterdir()) == NAMES
    sizes = [(first_run / name).stat().st_size for name in NAMES]
    assert 5_000_000 <= sum(sizes[:4]) <= 20_000_000
    assert min(sizes[:4]) > 0.8 * max(sizes[:4])
    assert 200_000 <= sizes[4] <= 500_000


def test_documents_are_text_with_a_source(train: list[dict[str, str]], val: list[dict[str, str]]) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    for document in train + val:
        assert set(document) == {"text", "source"}
        assert document["text"].strip()
        assert (library / document["source"]).is_file()


def test_lengths_are_natural(train: list[dict[str, str]], val: list[dict[str, str]]) -> None:
    lengths = sorted(len(document["text"]) for document in train + val)
    assert lengths[0] >= 500
    assert lengths[-1] <= 21_000
    assert 2_000 < statistics.median(lengths) < 15_000


def test_prose_and_code(train: list[dict[str, str]]) -> None:
    texts = {}
    for document in train:
        texts.setdefault(document["source"], []).append(document["text"])
    assert any(text.startswith("argparse\n\nCommand-line parsing library") for text in texts["argparse.py"])
    assert any("class ArgumentParser(" in text for text in texts["argparse.py"])
    assert any(text.startswith('The "raise" statement') for text in texts["pydoc_data/topics.py"])
    # Another topic, "compound", has this one as a section.
    assert not any(text.startswith('The "if" statement') for text in texts["pydoc_data/topics.py"])
    assert not any(source.startswith(("encodings/", "test/", "site-packages/")) for source in texts)


def test_no_duplicates(train: list[dict[str, str]], val: list[dict[str, str]]) -> None:
    texts = [normalised(document["text"]) for document in train + val]
    assert len(set(texts)) == len(texts)


def test_validation_is_apart(train: list[dict[str, str]], val: list[dict[str, str]]) -> None:
    assert not {document["source"] for document in train} & {document["source"] for document in val}
    train_texts = {normalised(document["text"]) for document in train}
    assert not any(normalised(line) in train_texts for document in val for line in document["text"].split("\n"))


def test_small_library(script: ModuleType, tmp_path: Path) -> None:
    shared = "Does what both modules do, in so many words. " * 15
    method = '    def method(self):\n        """{0}"""\n        # {0}\n        return {1}\n\n'
    methods = "".join(method.format(f"Number {number}: {'a word ' * 60}", number) for number in range(60))
    (tmp_path / "long.py").write_text(f"class Long:\n{methods}\nTABLE = {list(range(9000))}\n")
    (tmp_path / "one.py").write_text(f'def f():\n    """{shared}"""\n')
    (tmp_path / "two.py").write_text(f'def g():\n    """{shared}"""\n')
    (tmp_path / "bare.py").write_text("x = 1\n" * 1000)
    (tmp_path / "broken.py").write_text("def\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9" * 1000)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(f'"""{"Not of the library. " * 50}"""\n')

    docs = [doc for docs in script.build(tmp_path).values() for doc in docs]
    assert {doc.source for doc in docs} == {"long.py", "one.py", "two.py"}
    assert sorted(doc.is_prose for doc in docs if doc.source != "long.py") == [False, False, True]
    pieces = [doc.text for doc in docs if doc.source == "long.py" and not doc.is_prose]
    assert len(pieces) > 1
    assert sum(piece.count("    def method(self):\n") for piece in pieces) == 60
    assert all(piece.startswith(("class Long:", "    def method(self):")) for piece in pieces)
    assert not any("TABLE" in piece for piece in pieces)


def test_too_little_text_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "python313.zip"))
    monkeypatch.setattr(sys, "argv", ["make_sample_data.py", "--out", str(tmp_path / "sample")])
    with pytest.raises(SystemExit, match=r"python313\.zip has 0\.0 MB .* full Python installation") as caught:
        script.main()
    assert "\n" not in caught.value.code
    assert list((tmp_path / "sample" / "stdlib").iterdir()) == []


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_bad_output_is_one_line(tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("mine")
    result = run(tmp_path, out)
    assert result.returncode == 1
    assert result.stderr.startswith("make_sample_data: cannot make file")
    assert result.stderr.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_a_failure_while_writing_leaves_no_file(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bytes = Path.write_bytes

    def disk_full(path: Path, data: bytes) -> int:
        write_bytes(path, data[:1])
        if "val" in path.name:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="No space left"):
        script.write(tmp_path, dict.fromkeys(NAMES, b"whole"))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_is_completed_by_the_next(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if "chunk.02" in target.name:
            raise KeyboardInterrupt
        replace(source, target)

    contents = {name: name.encode() * 1000 for name in NAMES}
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            script.write(tmp_path, contents)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: contents[name] for name in NAMES[:2]}
    assert script.write(tmp_path, contents)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents
    assert not script.write(tmp_path, contents)


def test_a_file_that_cannot_be_replaced_is_one_line(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stdlib" / NAMES[0]).mkdir(parents=True)
    document = script.Document("one.py", "text", True)
    monkeypatch.setattr(script, "build", lambda library: {name: [document] for name in NAMES})
    monkeypatch.setattr(script, "MIN_TRAIN_BYTES", 1)
    monkeypatch.setattr(sys, "argv", ["make_sample_data.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"cannot write to .*stdlib: \w+") as caught:
        script.main()
    assert "\n" not in caught.value.code
