"""The setup scripts take `~` in every path, as after an equals sign, where a shell leaves it; and what the data script
leaves out of documents."""

import json
import signal
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

SETUP = Path(__file__).resolve().parents[2] / "setup"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    return tmp_path


@pytest.fixture
def load(monkeypatch) -> Callable[[str], ModuleType]:
    def load(name: str) -> ModuleType:
        spec = spec_from_file_location(f"script_{name}", SETUP / f"{name}.py")
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look for their module
        spec.loader.exec_module(module)
        return module

    return load


def main(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr("sys.argv", ["script.py", *arguments])
    script.main()


def test_train_tokenizer(home, load, monkeypatch):
    script, called = load("train_tokenizer"), []
    monkeypatch.setattr(script, "train", lambda kind, sources, size, out, *_: called.append((sources, out)))
    main(script, monkeypatch, "sp", "~/a", "b", "--vocab_size=1000", "--out=~/t")
    assert called == [([home / "a", Path("b")], home / "t")]


def test_download_tokenizer(home, load, monkeypatch):
    script, called = load("download_tokenizer"), []
    monkeypatch.setattr(script, "download", lambda *arguments: called.append(arguments))
    main(script, monkeypatch, "llama3", "~/t")
    assert called == [("llama3", home / "t", None)]


def test_make_sample_data(home, load, monkeypatch):
    script, called = load("make_sample_data"), []
    monkeypatch.setattr(script, "build", lambda library: {})
    monkeypatch.setattr(script, "MIN_TRAIN_BYTES", 0)
    monkeypatch.setattr(script, "write", lambda folder, contents: called.append(folder) or exit())
    with pytest.raises(SystemExit):
        main(script, monkeypatch, "--out=~/s")
    assert called == [home / "s" / "stdlib"]


def test_prepare_debian_text(home, load, monkeypatch):
    script, called = load("prepare_debian_text"), []
    monkeypatch.setattr(script, "prepare", lambda package, data_dir, cache, *_: called.append((data_dir, cache)))
    main(script, monkeypatch, "--data_dir=~/d", "--cache_dir=~/c", "--packages", "dict-gcide")
    assert called == [(home / "d", home / "c")]


def test_prepare_data(home, load, monkeypatch, capsys):
    """Documents that are no documents are left out and counted, at the end and in the manifest; columns too."""
    documents = [json.dumps({"text": f"document {number}", "raw": "x", "url": "u"}) for number in range(200)]
    documents[50:150:10] = ['{"text": null}'] * 5 + ["no JSON"] * 5
    (home / "in").mkdir()
    (home / "in" / "a.jsonl").write_text("\n".join(documents))
    script = load("download_prepare_hf_data")
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
    monkeypatch.setattr(sys.stderr, "reconfigure", lambda **_: None, raising=False)
    options = ["--files", "~/in", "--data_dir=~/data", "--scratch=~/scratch", "--nchunks=2", "--workers=1"]
    with pytest.raises(ValueError, match=r"a.jsonl:51: .*NoneType.*\(--on_error skip leaves it out\)$"):
        main(script, monkeypatch, "mine", "0.5", *options)
    main(script, monkeypatch, "mine", "0.5", *options, "--on_error", "skip", "--columns", "url", "text")
    told = capsys.readouterr().out
    out = home / "data" / "mine_shuffled"
    assert "skipped, in all: 10 documents" in told
    assert f"189 in 2 chunks, 1 for validation; 10 skipped; {out}" in told
    manifest = json.loads((out / "mine.manifest.json").read_bytes())
    assert (manifest["documents"], manifest["skipped"], manifest["columns"]) == (190, 10, ["url", "text"])
    lines = [json.loads(line) for file in out.glob("*.jsonl") for line in file.read_text().splitlines()]
    assert sorted(line["text"] for line in lines) == sorted(
        json.loads(document)["text"] for document in documents if "document" in document
    )
    assert all(line.keys() == {"text", "url"} for line in lines)
    assert not list(Path.cwd().glob("~*"))


def test_columns_without_text_are_refused(load):
    with pytest.raises(ValueError, match="--columns url: text or content has to be among them"):
        load("download_prepare_hf_data").parse(["mine", "1", "--files", "x", "--columns", "url"])
