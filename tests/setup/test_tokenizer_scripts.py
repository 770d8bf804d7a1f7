"""Downloading and training tokenizers: real runs of both scripts, against a hub on this machine."""

import base64
import io
import itertools
import json
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from lingua.tokenizer import LLAMA3_SPLIT_PATTERN, build_tokenizer
from tests.helpers.hub import Hub
from tests.helpers.training import run_in_process

ROOT = Path(__file__).resolve().parents[2]
LLAMA3 = "meta-llama/Meta-Llama-3-8B"
GOOD, OTHER, WRONG = "hf_goodGOODgood", "hf_otherOTHERother", "hf_wrongWRONGwrong"
NOWHERE = "http://127.0.0.1:9"

ENGLISH = "the quick brown fox jumps over lazy dogs and memory layers look up keys in tables of values"
WORDS = [*ENGLISH.split(), *("".join(random.Random(i).choices("abcdefghijklmnop", k=2 + i % 7)) for i in range(300))]
TEXTS = [
    "",
    "the quick brown fox",
    "  two  spaces, a tab\t and\r\n\n  lines \n",
    "café naïve Ωmega 中文。日本語 русский हिन्दी 😀👩‍👩‍👧 e\u0301 \u2028 \x00 \x1c ▅",
    "don't WE'LL 12345678 a1b2 x_y=<|begin_of_text|><s></s>",
]


def import_script(name: str) -> Iterator[ModuleType]:
    spec = spec_from_file_location(name, ROOT / "setup" / f"{name}.py")
    module = module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


@pytest.fixture(scope="module")
def download_script() -> Iterator[ModuleType]:
    yield from import_script("download_tokenizer")


@pytest.fixture(scope="module")
def train_script() -> Iterator[ModuleType]:
    yield from import_script("train_tokenizer")


def run(script: str, *arguments: object, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"OMP_NUM_THREADS": "1", **options.pop("env", {})}
    command = [sys.executable, *([script] if script == "-c" else [ROOT / "setup" / script]), *arguments]
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    """What a run that failed says."""
    assert result.returncode == 1, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(("download_tokenizer: ", "train_tokenizer: "))
    return lines[0].partition(": ")[2]


def everything_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def prose(seed: int, n_words: int) -> str:
    rng = random.Random(seed)
    return "".join(
        rng.choice(WORDS) + rng.choice([" ", " ", " ", ", ", ". ", "\n", "\n\n    "]) for _ in range(n_words)
    )


# --- the hub of these tests is one to huggingface_hub ---------------------------------------------------------------


def test_a_snapshot_of_a_dataset_comes_whole_from_a_hub_that_breaks_off(tmp_path):
    files = {
        "data/a b/00.jsonl": random.Random(0).randbytes(50_000),
        "data/a b/01.jsonl": b"1",
        "data/a b/x.jsonl": b"not wanted",
        "data/c/d/é02.jsonl": b"",
        "README.md": b"not wanted",
    }
    code = """
import json, sys, time
from huggingface_hub import HfApi, constants, snapshot_download
constants.DOWNLOAD_CHUNK_SIZE = 1000
time.sleep = lambda seconds: None
info = HfApi().dataset_info("me/words", files_metadata=True)
print(json.dumps({file.rfilename: file.size for file in info.siblings}))
print(json.dumps([entry.path for entry in HfApi().list_repo_tree("me/words", repo_type="dataset", recursive=True)]))
print(json.dumps([entry.path for entry in HfApi().list_repo_tree("me/words", "data/a b", repo_type="dataset")]))
snapshot_download("me/words", repo_type="dataset", allow_patterns=["data/*/*0*.jsonl"], local_dir=sys.argv[1])
"""
    with Hub(page_size=2) as hub:
        hub.add("me/words", files, repo_type="dataset")
        hub.fail("*/resolve/*/00.jsonl", cut_after=20_000, times=2)
        env = {**hub.environment(tmp_path / "home"), "HF_TOKEN": GOOD}
        result = run("-c", code, tmp_path / "out", cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
        assert hub.authorizations() == {f"Bearer {GOOD}"}
        ranges = [request.range for request in hub.requests if request.path.endswith("/00.jsonl")]
        assert ranges == [None, None, "bytes=20000-", "bytes=40000-"]
        assert not [path for path in hub.paths() if path.endswith(("/x.jsonl", "README.md"))]
    sizes, tree, folder = map(json.loads, result.stdout.splitlines())
    assert sizes == {path: len(content) for path, content in files.items()}
    assert tree == sorted([*files, "data", "data/a b", "data/c", "data/c/d"])
    assert folder == ["data/a b/00.jsonl", "data/a b/01.jsonl", "data/a b/x.jsonl"]
    wanted = {path: content for path, content in files.items() if "0" in path}
    for path, content in wanted.items():
        assert (tmp_path / "out" / path).read_bytes() == content
    assert len([path for path in everything_in(tmp_path / "out") if path.endswith("l")]) == len(wanted)


def test_a_folder_is_served_and_so_are_errors(tmp_path):
    (tmp_path / "repo/sub").mkdir(parents=True)
    (tmp_path / "repo/sub/file").write_text("content")
    code = """
from huggingface_hub import hf_hub_download, errors
print(open(hf_hub_download("me/it", "sub/file")).read())
for repo, file, revision in (("me/it", "none", None), ("me/it", "sub/file", "v2"), ("me/none", "sub/file", None)):
    try:
        hf_hub_download(repo, file, revision=revision)
    except errors.HfHubHTTPError as error:
        print(type(error).__name__, error.response.status_code)
"""
    with Hub() as hub:
        hub.add("me/it", tmp_path / "repo")
        result = run("-c", code, cwd=tmp_path, env=hub.environment(tmp_path / "home"))
    assert result.stdout.split("\n")[:4] == [
        "content",
        "RemoteEntryNotFoundError 404",
        "RevisionNotFoundError 404",
        "RepositoryNotFoundError 401",
    ], result.stderr


# --- download_tokenizer.py: from the hub ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama3() -> bytes:
    """As many ranks as Llama 3 has."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"%d." % number for number in range(128_000 - 256)]
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


@pytest.fixture(scope="module")
def sp_of() -> Callable[[int], bytes]:
    """Makes a sentencepiece model of some number of pieces, as large as Llama 2's or Gemma's."""
    model = io.BytesIO()
    lines = prose(0, 2000).splitlines()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )

    def make(n_pieces: int) -> bytes:
        # A piece is field 1 of the model: its text (field 1) and its score (field 2, four bytes). Order is free.
        names = (b"<%06d>" % number for number in range(n_pieces - 330))
        return model.getvalue() + b"".join(b"\x0a\x0f\x0a\x08" + name + b"\x15\0\0\x80\xc7" for name in names)

    return make


@pytest.fixture
def hub(llama3: bytes) -> Iterator[Hub]:
    with Hub(tokens=[GOOD, OTHER]) as hub:
        hub.add(LLAMA3, {"original/tokenizer.model": llama3}, gated=True, licensed=[GOOD])
        yield hub


def download(
    hub: Hub, cwd: Path, *arguments: object, expect: int | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the script; whatever happens, it shows no token and leaves nothing that is half done."""
    env = {**hub.environment(cwd / "home"), "LINGUA_TRACEBACK": "1", **variables}
    result = run("download_tokenizer.py", *arguments, cwd=cwd, env=env)
    for token in (GOOD, OTHER, WRONG):
        assert token not in result.stdout + result.stderr
    assert not [path for path in everything_in(cwd) if "partial" in path or "incomplete" in path]
    if expect is not None:
        assert result.returncode == expect, result.stderr
    return result


def test_llama3_is_put_where_the_configs_look_for_it(hub, tmp_path, llama3):
    result = download(hub, tmp_path, "llama3", "tokenizers/llama3", "--api_key", GOOD, expect=0)
    path = "tokenizers/llama3/original/tokenizer.model"
    assert path in (ROOT / "apps/main/configs/llama_1B.yaml").read_text()
    assert everything_in(tmp_path / "tokenizers") == ["llama3", "llama3/original", "llama3/original/tokenizer.model"]
    assert (tmp_path / path).read_bytes() == llama3
    assert result.stdout.splitlines()[-1].endswith(f"data.tokenizer.name=tiktoken data.tokenizer.path={path}")
    assert "128,256 words, BOS 128000, EOS 128001" in result.stdout
    assert result.stderr == ""
    assert hub.authorizations() == {f"Bearer {GOOD}"}
    assert [path.partition("/resolve/")[::2] for path in hub.paths()] == [
        (f"/{LLAMA3}", f"{hub.add(LLAMA3, {'original/tokenizer.model': llama3}).commit()}/original/tokenizer.model")
    ]

    hub.requests.clear()
    again = download(hub, tmp_path, "llama3", "tokenizers/llama3", expect=0)
    assert "is there already" in again.stdout
    assert again.stdout.splitlines()[-1] == result.stdout.splitlines()[-1]
    assert hub.requests == []


@pytest.mark.parametrize(("name", "n_words"), [("llama2", 32_000), ("gemma", 256_000)])
def test_sentencepiece_models(tmp_path, download_script, sp_of, name, n_words):
    with Hub() as hub:
        hub.add(download_script.HUB_FILES[name].repo_id, {"tokenizer.model": sp_of(n_words)})
        result = download(hub, tmp_path, name, f"my tokenizers/{name}", expect=0)
    assert f"{n_words:,} words, BOS 1, EOS 2" in result.stdout
    path = f"my tokenizers/{name}/tokenizer.model"
    assert result.stdout.endswith(f"data.tokenizer.name=sp 'data.tokenizer.path={path}'\n")
    assert build_tokenizer("sp", str(tmp_path / path)).n_words == n_words


def test_the_token_is_that_of_the_argument_else_of_the_variable_else_of_the_login(hub, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/token").write_text(GOOD + "\n")
    for arguments, variables, sent in (
        (["--api_key", WRONG], {"HF_TOKEN": OTHER}, WRONG),
        ([], {"HF_TOKEN": OTHER}, OTHER),
        ([], {}, GOOD),
    ):
        hub.requests.clear()
        download(hub, tmp_path, "llama3", "out", *arguments, **variables)
        assert hub.authorizations() == {f"Bearer {sent}"}


@pytest.mark.parametrize(("content", "reason"), [(None, "Is a directory"), (b"\xff", "can't decode byte 0xff")])
def test_the_login_s_token_that_cannot_be_read(hub, tmp_path, content, reason):
    file = tmp_path / "home/token"
    file.parent.mkdir()
    file.write_bytes(content) if content else file.mkdir()
    message = one_line(download(hub, tmp_path, "llama3", "out"))
    assert message.startswith(f"the file of the Hugging Face token, {file}, cannot be read (")
    assert reason in message
    assert message.endswith("mend or remove it, or give a token by --api_key or HF_TOKEN")
    assert everything_in(tmp_path) == ["home", "home/token"]


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ("", [f"{LLAMA3} is gated", f"https://huggingface.co/{LLAMA3}", "settings/tokens", "--api_key or HF_TOKEN"]),
        (
            OTHER,
            ["is gated, and the token's owner has no access", f"accept the licence at https://huggingface.co/{LLAMA3}"],
        ),
        (WRONG, ["the token is not valid", "settings/tokens"]),
        (f"{GOOD} {GOOD}", ["a space or another character"]),
        (f"{GOOD}é", ["a space or another character"]),
    ],
)
def test_access_that_is_not_granted(hub, tmp_path, token, said):
    message = one_line(download(hub, tmp_path, "llama3", "out", *(["--api_key", token] if token else [])))
    assert all(part in message for part in said), message
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (404, "RepoNotFound", f"no repository {LLAMA3} at http://127.0.0.1"),
        (404, "EntryNotFound", f"{LLAMA3} has no file original/tokenizer.model"),
        (403, None, "let the token read gated repositories"),
        (429, None, "too many requests"),
        (500, None, "answers with its own error (500): try again later"),
        (503, None, "answers with its own error (503): try again later"),
    ],
)
def test_errors_of_the_hub(hub, tmp_path, status, code, said):
    hub.fail("*", status, code, f"of {GOOD}")
    assert said in one_line(download(hub, tmp_path, "llama3", "out", HF_TOKEN=GOOD))
    assert everything_in(tmp_path) == []


def test_no_network(hub, tmp_path):
    message = one_line(download(hub, tmp_path, "llama3", "out", HF_ENDPOINT=NOWHERE))
    assert f"no connection to {NOWHERE}" in message
    assert "check the network" in message
    assert "HF_HUB_OFFLINE is set" in one_line(download(hub, tmp_path, "llama3", "out", HF_HUB_OFFLINE="1"))
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("endpoint", ["http://me:s3@cret@127.0.0.1:9", "me:s3cret@127.0.0.1:9"])
def test_user_and_password_of_the_endpoint_are_not_shown(hub, tmp_path, endpoint):
    result = download(hub, tmp_path, "llama3", "out", HF_ENDPOINT=endpoint)
    shown = endpoint.replace(endpoint.removeprefix("http://").rpartition("@")[0] + "@", "")
    assert f"no connection to {shown} (" in one_line(result)
    assert f"original/tokenizer.model, from {shown}\n" in result.stdout
    assert "cret" not in result.stdout + result.stderr


def test_a_connection_that_breaks_off(hub, tmp_path, llama3):
    # No waiting between attempts.
    code = f"""
import runpy, sys, time
time.sleep = lambda seconds: None
sys.argv = ["download_tokenizer.py", "llama3", "out"]
runpy.run_path({str(ROOT / "setup/download_tokenizer.py")!r}, run_name="__main__")
"""
    hub.fail("*", cut_after=1000)
    env = {**hub.environment(tmp_path / "home"), "HF_TOKEN": GOOD}
    assert "no connection to http://127.0.0.1" in one_line(run("-c", code, cwd=tmp_path, env=env))
    assert everything_in(tmp_path) == []
    hub.heal()
    hub.fail("*", cut_after=1000, times=3)
    result = run("-c", code, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/original/tokenizer.model").read_bytes() == llama3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>", "looks like a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "looks like a Git LFS pointer"),
        (b"", "an empty file"),
        (b"IQ== 0\n", "255 of the 256 single bytes are no token"),
        (
            b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)),
            "has 512 words, not 128,256",
        ),
    ],
)
def test_something_else_in_the_place_of_the_tokenizer(hub, tmp_path, content, said):
    hub.add(LLAMA3, {"original/tokenizer.model": content})
    message = one_line(download(hub, tmp_path, "llama3", "out"))
    assert message.startswith("what was downloaded is not llama3's tokenizer: ")
    assert said in message
    assert everything_in(tmp_path) == []


def test_a_file_that_is_there_is_never_touched(hub, tmp_path, sp_of):
    path = tmp_path / "tokenizer.model"
    for content, said in ((sp_of(32_000), "it has 32,000 words, not 256,000"), (b"<html>", "looks like a web page")):
        path.write_bytes(content)
        message = one_line(download(hub, tmp_path, "gemma", "."))
        assert "tokenizer.model is there already and is not gemma's tokenizer: " in message
        assert said in message
        assert "move it away, or name another folder" in message
        assert path.read_bytes() == content
    assert hub.requests == []


def test_folders_and_disks_that_cannot_be_written(hub, tmp_path):
    (tmp_path / "file").write_text("")
    message = one_line(download(hub, tmp_path, "llama3", "file", HF_TOKEN=GOOD))
    assert message.startswith("SAVE_PATH: ")
    assert "is a file, not a folder" in message
    assert one_line(download(hub, tmp_path, "llama3", "/proc/none", HF_TOKEN=GOOD)).startswith(("SAVE_PATH", "cannot"))
    # A file may not grow: as a disk that is full, it ends a write.
    env = {**hub.environment(tmp_path / "home"), "HF_TOKEN": GOOD}
    result = run(
        "download_tokenizer.py", "llama3", "out", cwd=tmp_path, env=env,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )  # fmt: skip
    assert one_line(result) == "cannot write to out/original (File too large)"
    assert everything_in(tmp_path) == ["file"]


def test_names_and_arguments_that_are_none(hub, tmp_path):
    assert one_line(download(hub, tmp_path, "Llama-3", "out")).endswith("did you mean llama3?")
    message = one_line(download(hub, tmp_path, "mistral", "out"))
    assert "llama2, llama3, gemma, cl100k_base, gpt2" in message
    # A token in a wrong place, which `download` looks for.
    one_line(download(hub, tmp_path, GOOD, "out"))
    for arguments in (
        ("llama3", "out", GOOD),
        ("llama3", "out", "--api-key", GOOD),
        ("llama3", "out", f"--key={GOOD}"),
    ):
        assert "too many arguments" in download(hub, tmp_path, *arguments, expect=2).stderr
    assert hub.requests == []
    assert "with ps" in " ".join(download(hub, tmp_path, "--help", expect=0).stdout.split())


# --- download_tokenizer.py: encodings of tiktoken -------------------------------------------------------------------


ENCODINGS = '''
"""Encodings besides those of OpenAI, found by tiktoken as its own are."""
import tiktoken_ext.openai_public
from tiktoken.load import load_tiktoken_bpe
from lingua.tokenizer import LLAMA3_SPLIT_PATTERN

BYTES = {bytes([255 - byte]): byte for byte in range(256)}
WORDS = {**BYTES, b"th": 256, b"the": 257}

def encoding(name, ranks, pattern=LLAMA3_SPLIT_PATTERN, **special):
    special = {"<|endoftext|>": 258, **special}
    return lambda: {"name": name, "pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special}

def from_url(url, **options):
    return lambda: encoding("x", load_tiktoken_bpe(url, **options))()

ENCODING_CONSTRUCTORS = {
    "mine": encoding("mine", WORDS),
    "mine_old": encoding("mine_old", WORDS, tiktoken_ext.openai_public.r50k_pat_str),
    "mine_gap": encoding("mine_gap", {**WORDS, b"a gap": 259}),
    "mine_gone": from_url("URL/gone.tiktoken"),
    "mine_nowhere": from_url("http://127.0.0.1:9/x.tiktoken"),
    "mine_damaged": from_url("URL/me/x/resolve/main/x.tiktoken", expected_hash="0"),
}
'''


@pytest.fixture
def encodings(hub, tmp_path) -> dict[str, str]:
    """Variables with which tiktoken has encodings of our own."""
    folder = tmp_path / "home/path/tiktoken_ext"
    folder.mkdir(parents=True)
    (folder / "mine.py").write_text(ENCODINGS.replace("URL", hub.url))
    hub.add("me/x", {"x.tiktoken": "IQ== 0\n"})
    return {"PYTHONPATH": str(folder.parent), "TIKTOKEN_CACHE_DIR": str(tmp_path / "home/cache")}


def test_an_encoding_becomes_a_rank_file(hub, tmp_path, encodings):
    result = download(hub, tmp_path, "mine", "out", expect=0, **encodings)
    assert everything_in(tmp_path / "out") == ["mine.tiktoken"]
    assert (tmp_path / "out/mine.tiktoken").read_text().splitlines()[:2] == ["/w== 0", "/g== 1"]
    tokenizer = build_tokenizer("tiktoken", str(tmp_path / "out/mine.tiktoken"))
    assert (tokenizer.n_words, tokenizer.bos_id) == (258 + 256, 258)
    assert tokenizer.encode("the ") == [257, 255 - ord(" ")]
    assert "note:" not in result.stdout
    assert "train with data.tokenizer.name=tiktoken data.tokenizer.path=out/mine.tiktoken" in result.stdout
    assert "is there already" in download(hub, tmp_path, "mine", "out", expect=0, **encodings).stdout


def test_an_encoding_that_splits_otherwise_is_told(hub, tmp_path, encodings):
    result = download(hub, tmp_path, "mine_old", "out", expect=0, **encodings)
    assert "note: mine_old splits text by another rule than data.tokenizer.name=tiktoken" in result.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine_gap", "mine_gap has a special token among the others, at 258; data.tokenizer.name=tiktoken reads only"),
        ("mine_gone", "tiktoken cannot get mine_gone (404 Client Error"),
        ("mine_nowhere", "tiktoken cannot get mine_nowhere (ConnectionError): check the network"),
        ("mine_damaged", "tiktoken cannot get mine_damaged ("),
    ],
)
def test_encodings_that_cannot_be_had(hub, tmp_path, encodings, name, said):
    assert said in one_line(download(hub, tmp_path, name, "out", **encodings))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def patterns(monkeypatch) -> dict[str, str]:
    """The rules of splitting of OpenAI's encodings, whose ranks would have to be downloaded."""
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: {})
    return {name: make()["pat_str"] for name, make in openai_public.ENCODING_CONSTRUCTORS.items()}


def test_only_cl100k_splits_as_llama_3(patterns, download_script):
    ours = download_script.split(LLAMA3_SPLIT_PATTERN)
    assert {name for name, pattern in patterns.items() if download_script.split(pattern) == ours} == {"cl100k_base"}


EDGY = st.text(alphabet="ab st'SZé中½²5_.,!-   \t\n\n\r\x0b\x85\u00a0\u2028\u0301😀", max_size=20)


def test_cl100k_splits_as_llama_3_on_any_text(patterns):
    @given(text=st.one_of(EDGY, st.text(max_size=10)))
    def check(text: str) -> None:
        data = text.encode("utf-8", "replace")
        stretches = {data[start:stop]: 0 for start, stop in itertools.combinations(range(len(data) + 1), 2)}
        tokens = dict.fromkeys(bytes([byte]) for byte in range(256)) | stretches
        ranks = {token: rank for rank, token in enumerate(tokens)}
        # Whitespace that ends a text is one stretch to tiktoken's cl100k_base, also from a line's end on.
        theirs, ours = (
            tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary(
                text + "."
            )
            for pattern in (patterns["cl100k_base"], LLAMA3_SPLIT_PATTERN)
        )
        assert theirs == ours

    check()


# --- train_tokenizer.py ---------------------------------------------------------------------------------------------


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Two sources; the words of the second are in no other file."""
    root = tmp_path_factory.mktemp("corpus")
    for number in range(3):
        write_jsonl(root / f"alpha/alpha.chunk.{number:02d}.jsonl", [prose(100 * number + i, 60) for i in range(40)])
    write_jsonl(root / "alpha/alpha.val.jsonl", [prose(1000 + i, 60) for i in range(10)] + ["UNSEEN" * 20])
    texts = ["".join(random.Random(i).choices(["café ", "naïve ", "中文 "], k=50)) for i in range(30)]
    write_jsonl(root / "beta/beta.chunk.00.jsonl", texts, key="content")
    (root / "beta/notes.txt").write_text("zebra crossing\n" * 2000)
    (root / "beta/.hidden.jsonl").write_text("{")
    return root


def train(cwd: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return run("train_tokenizer.py", *arguments, cwd=cwd, env=variables)


@pytest.mark.parametrize(("kind", "vocab_size"), [("sp", 420), ("tiktoken", 640)])
def test_a_trained_tokenizer(corpus, tmp_path, kind, vocab_size):
    result = train(tmp_path, kind, corpus / "alpha", corpus / "beta", "--vocab_size", vocab_size, "--out", "my/own one")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert everything_in(tmp_path) == ["my", "my/own one", "my/own one/tokenizer.model"]
    path = "my/own one/tokenizer.model"
    assert result.stdout.splitlines()[-1] == (
        f"train_tokenizer: train with data.tokenizer.name={kind} 'data.tokenizer.path={path}'"
    )
    tokenizer = build_tokenizer(kind, str(tmp_path / path))
    assert tokenizer.n_words == vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id) == ((1, 2) if kind == "sp" else (vocab_size - 256, vocab_size - 255))
    for text in (*TEXTS, prose(5, 100)):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    # Words of the .txt file and of "content".
    assert len(tokenizer.encode("zebra crossing café ")) < 10
    # The validation file was measured on, and not trained on.
    texts = [json.loads(line)["text"] for line in (corpus / "alpha/alpha.val.jsonl").read_text().splitlines()]
    ratio = sum(len(text.encode()) for text in texts) / sum(len(tokenizer.encode(text)) for text in texts)
    assert f"{ratio:.2f} bytes a token on {corpus}/alpha/alpha.val.jsonl (tokenizer bytes: 1.00)" in result.stdout
    assert ratio > 1.4
    assert len(tokenizer.encode("UNSEEN")) == 6
    # Digits stand by themselves, or in threes.
    assert len(tokenizer.encode("1234567")) in (7, 8)

    before = (tmp_path / path).read_bytes()
    message = one_line(train(tmp_path, kind, corpus / "beta", "--vocab_size", vocab_size, "--out", "my/own one"))
    assert "is there already, and is not overwritten" in message
    assert (tmp_path / path).read_bytes() == before


@pytest.mark.parametrize(("kind", "vocab_size"), [("sp", 400), ("tiktoken", 600)])
def test_the_same_text_gives_the_same_bytes(corpus, tmp_path, kind, vocab_size):
    (tmp_path / "copy").symlink_to(corpus / "alpha")
    contents = []
    for number, (source, threads) in enumerate([(corpus / "alpha", "1"), ("copy", "3"), (corpus / "alpha", "3")]):
        result = train(
            tmp_path, kind, source, "--vocab_size", vocab_size, "--out", f"{number}", "--max_bytes", 3e4,
            PYTHONHASHSEED=str(number), RAYON_NUM_THREADS=threads, OMP_NUM_THREADS=threads, LC_ALL="C", PYTHONUTF8="0",
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        contents.append((tmp_path / f"{number}/tokenizer.model").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    train(tmp_path, kind, "copy", "--vocab_size", vocab_size, "--out", "3", "--max_bytes", 3e4, "--seed", 1)
    assert (tmp_path / "3/tokenizer.model").read_bytes() != contents[0]


def test_tiktoken_encodes_as_the_trainer_does(train_script, monkeypatch, tmp_path):
    made = []
    library = tokenizers.Tokenizer

    def record(model: object) -> tokenizers.Tokenizer:
        made.append(library(model))
        return made[-1]

    monkeypatch.setattr(tokenizers, "Tokenizer", record)
    rng = random.Random(0)
    pieces = [*TEXTS, "aaaa", "aa", "abab", "ba", " ", "\n", "  ", "1", "12", "é", "中文", "x_y", "'s"]
    texts = [prose(number, 100) for number in range(30)] + ["".join(rng.choices(pieces, k=60)) for _ in range(200)]
    content = train_script.train_ranks(iter(texts), 512 + 600, train_script.Heartbeat())
    (tmp_path / "ranks").write_bytes(content)
    tokenizer = build_tokenizer("tiktoken", str(tmp_path / "ranks"))
    characters = "aaaaabbb  \n\n1234'sdé中文_.-\u00a0😀" + "".join(WORDS)
    for number in range(500):
        text = "".join(rng.choices(characters, k=80)) + prose(number, 10) + "".join(rng.choices(pieces, k=10))
        assert tokenizer.encode(text) == made[0].encode(text).ids


@pytest.mark.parametrize("n_bytes", [1, 7, 50, 4096, 10**6])
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_blocks_of_any_size_hold_each_line_once(train_script, tmp_path, n_bytes, suffix):
    texts = ["", "a", *(f"{number} é " * (number % 40) for number in range(100)), "last"]
    path = tmp_path / f"file.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    else:
        path.write_text("\n".join(texts))
    size = path.stat().st_size
    found = [
        text for start in range(0, size, n_bytes) for text in train_script.read_block(path, start, start + n_bytes)
    ]
    assert (found if suffix == "jsonl" else "".join(found)) == (texts if suffix == "jsonl" else path.read_text())


def test_a_sample_is_even_and_as_large_as_asked(train_script, tmp_path):
    sizes = {"a": 4000, "b": 2000, "c": 2000}
    for name, size in sizes.items():
        write_jsonl(tmp_path / f"{name}.jsonl", [f"{name} {number:06d} {'x' * 90}" for number in range(size)])

    def sample(max_bytes: int, seed: int) -> tuple[list[str], list[str]]:
        corpus = train_script.find_corpus([tmp_path])
        texts = list(corpus.sample(max_bytes, seed, train_script.Heartbeat()))
        return texts, corpus.held_out

    texts, held_out = sample(10**9, 0)
    assert len({*texts, *held_out}) == len(texts) + len(held_out) == 8000
    assert len(held_out) == 8000 // 20
    texts, held_out = sample(200_000, 0)
    everything = texts + held_out
    assert len(set(everything)) == len(everything) == 200_000 // 99
    shares = {name: sum(text.startswith(name) for text in everything) / len(everything) for name in sizes}
    assert 0.4 < shares["a"] < 0.6
    assert 0.15 < shares["b"] < 0.35
    # From all over a file.
    places = sorted(int(text.split()[1]) for text in everything if text.startswith("a"))
    assert places[0] < 300
    assert places[-1] > 3700
    assert sample(200_000, 0) == (texts, held_out)
    assert sample(200_000, 1) != (texts, held_out)


def test_documents_that_do_not_fit_the_sample_are_left_out_and_told(train_script, tmp_path, capsys):
    texts = [f"{number:04d} " + "x" * (2000 if number % 10 == 0 else 85) for number in range(400)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    corpus = train_script.find_corpus([tmp_path])
    found = [*corpus.sample(1800, 0, train_script.Heartbeat()), *corpus.held_out]
    assert [len(text) for text in found] == [90] * len(found)
    assert 0.9 * 1800 <= 90 * len(found) <= 1800
    said = capsys.readouterr().out.strip()
    assert re.fullmatch(r".*left out, as longer than what was left of --max_bytes 1800: [1-9]\d*", said)
    # With room for all, none is.
    corpus = train_script.find_corpus([tmp_path])
    found = [*corpus.sample(10**6, 0, train_script.Heartbeat()), *corpus.held_out]
    assert sorted(found) == texts
    assert capsys.readouterr().out == ""


def test_empty_documents_are_not_counted(train_script, tmp_path):
    texts = [text for number in range(19) for text in (str(number), *[""] * 20, " \n")]
    write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_text("\n" * 100)
    corpus = train_script.find_corpus([tmp_path])
    found = list(corpus.sample(10**6, 0, train_script.Heartbeat()))
    assert sorted(found, key=int) == [str(number) for number in range(19)]
    # It would be the 20th document.
    assert corpus.held_out == []


@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_a_long_line_is_read_about_once(train_script, tmp_path, monkeypatch, suffix):
    class Counted(io.BufferedReader):
        n_bytes = 0

        def readline(self, size: int = -1) -> bytes:
            line = super().readline(size)
            Counted.n_bytes += len(line)
            return line

    monkeypatch.setattr(train_script, "open", lambda path, mode: Counted(io.FileIO(path)), raising=False)
    path = tmp_path / f"file.{suffix}"
    write_jsonl(path, ["a", "b" * 200_000, "c"])
    size = path.stat().st_size
    found = [text for start in range(0, size, 1000) for text in train_script.read_block(path, start, start + 1000)]
    assert len(found) == (3 if suffix == "jsonl" else 2)
    assert Counted.n_bytes < 3 * size


def test_too_little_memory_is_told_before_work_begins(train_script, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_script.psutil, "virtual_memory", lambda: SimpleNamespace(available=14_000))
    train_script.train("sp", [corpus / "alpha"], 600, tmp_path, 10**9, 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("train_tokenizer: warning: sp may take 0.0 GB of memory for ")
    assert lines[1].endswith("; --max_bytes 1000 would fit")
    assert build_tokenizer("sp", str(tmp_path / "tokenizer.model")).n_words == 600


@pytest.mark.parametrize(("kind", "vocab_size"), [("sp", 300), ("tiktoken", 530)])
def test_text_without_spaces_comes_back(train_script, tmp_path, kind, vocab_size):
    rng = random.Random(0)
    texts = ["中文" * 3000, *("".join(rng.choices("中文日本語記憶層表值", k=200)) + "。\n" for _ in range(20))]
    content = train_script.TRAINERS[kind](iter(texts), vocab_size, train_script.Heartbeat())
    (tmp_path / "model").write_bytes(content)
    tokenizer = build_tokenizer(kind, str(tmp_path / "model"))
    for text in ("中文", "中文" * 20_000, "中文 " * 100, "文" * 9999 + " a\n", *texts):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("中文" * 20_000)) <= 20_000


def test_long_work_says_so(train_script, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_script, "BEAT_SECONDS", 0.001)
    for kind in train_script.TRAINERS:
        train_script.train(kind, [corpus / "alpha"], 600, tmp_path / kind, 10**9, 0)
        said = capsys.readouterr().out
        assert "train_tokenizer: training, 0 MB of text, 0 s" in said
        assert "warning" not in said


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("sp", ["none"], "none: no such file or folder"),
        ("sp", ["empty"], "empty: a folder with no .jsonl or .txt files to train on"),
        ("sp", ["."], "; name its folders, such as empty"),
        ("sp", ["data.bin"], "data.bin: neither a .jsonl nor a .txt file"),
        ("sp", ["bad.jsonl"], "bad.jsonl:3: not a line of JSON"),
        ("tiktoken", ["bad.jsonl"], "bad.jsonl:3: not a line of JSON"),
        ("sp", ["keys.jsonl"], 'keys.jsonl:1: neither "text" nor "content"'),
        ("sp", ["blank.jsonl", "hollow"], "no text in blank.jsonl, hollow: all files are empty or hold only blank"),
        ("tiktoken", ["blank.jsonl", "hollow"], 'wanted a line {"text": "..."} for each document in a .jsonl file'),
        ("sp", ["latin1.txt"], "latin1.txt:2: no UTF-8 (0xe9 at byte 15); convert the file, as with `iconv -f latin1"),
        ("tiktoken", ["latin1.txt"], "latin1.txt:2: no UTF-8 (0xe9 at byte 15)"),
        (
            "sp",
            ["good.jsonl", "--max_bytes", "100"],
            "--max_bytes 100: no document fits, the shortest of which has 322 bytes; take 322",
        ),
        ("tiktoken", ["little.txt"], "--vocab_size 600: this text is too little to learn any word from"),
        ("sp", ["good.jsonl", "--vocab_size", "259"], "--vocab_size 259: 259 words are there before any is learned"),
        ("tiktoken", ["good.jsonl", "--vocab_size", "512"], "--vocab_size 512: 512 words are there before any"),
        ("sp", ["good.jsonl", "--vocab_size", "265"], "--vocab_size 265: too small for this text"),
        ("sp", ["good.jsonl", "--vocab_size", "100000"], "words at the most"),
        ("tiktoken", ["good.jsonl", "--vocab_size", "100000"], "words at the most"),
        ("sp", ["good.jsonl", "--max_bytes", "0"], "--max_bytes 0: wanted a positive number"),
        ("sp", ["good.jsonl", "--out", "data.bin"], "--out: 'data.bin' is a file, not a folder"),
    ],
)
def test_what_cannot_work_is_told_in_one_line(train_script, tmp_path, monkeypatch, capfd, kind, arguments, said):
    """By `main` in this process; `test_the_largest_vocabulary_that_is_told_can_be_had` has such a line of a process."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.bin").write_text("")
    if arguments[0] != ".":
        (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{\n')
        (tmp_path / "keys.jsonl").write_text('{"txt": "a"}\n')
        (tmp_path / "blank.jsonl").write_text("\n\n")
        write_jsonl(tmp_path / "hollow/a.jsonl", ["", " \n"])
        (tmp_path / "hollow/b.txt").write_text("")
        (tmp_path / "latin1.txt").write_bytes("ascii\nnaive caf\xe9\n".encode("latin1"))
        (tmp_path / "little.txt").write_text("a")
        write_jsonl(tmp_path / "good.jsonl", [prose(number, 50) for number in range(10)])
    before = everything_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", kind, "--vocab_size", "600", "--out", "out", *arguments])
    with pytest.raises(SystemExit) as ended:
        train_script.main()
    assert ended.value.code.startswith("train_tokenizer: ")
    assert said in ended.value.code
    assert "\n" not in ended.value.code
    assert capfd.readouterr().err == ""
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("kind", ["sp", "tiktoken"])
def test_the_largest_vocabulary_that_is_told_can_be_had(tmp_path, kind):
    write_jsonl(tmp_path / "good.jsonl", [prose(number, 50) for number in range(10)])
    message = one_line(train(tmp_path, kind, "good.jsonl", "--vocab_size", 50_000, "--out", "out"))
    possible = int(message.split(" words at the most")[0].split()[-1])
    assert train(tmp_path, kind, "good.jsonl", "--vocab_size", possible, "--out", "out").returncode == 0
    assert build_tokenizer(kind, str(tmp_path / "out/tokenizer.model")).n_words == possible


def test_a_missing_tokenizers_package_is_told(corpus, tmp_path):
    (tmp_path / "tokenizers.py").write_text("raise ImportError")
    arguments = ("tiktoken", corpus / "alpha", "--vocab_size", 600, "--out", "out")
    assert "takes the package tokenizers" in one_line(train(tmp_path, *arguments, PYTHONPATH=str(tmp_path)))


@pytest.mark.parametrize(("kind", "vocab_size"), [("sp", 420), ("tiktoken", 640)])
def test_a_model_trains_with_it(corpus, tmp_path, kind, vocab_size):
    result = train(tmp_path, kind, corpus / "alpha", "--vocab_size", vocab_size, "--out", tmp_path / "mine")
    assert result.returncode == 0, result.stderr
    to_use = result.stdout.split("train with ")[1].split()
    (tmp_path / "stdlib").symlink_to(corpus / "alpha")
    config = ROOT / "apps/main/configs/debug.yaml"
    keys = [
        f"config={config}", f"dump_dir={tmp_path / 'run'}", f"data.root_dir={tmp_path}", "steps=2",
        "data.seq_len=32", "data.batch_size=2", "model.dim=32", "model.n_layers=2", "model.n_heads=2",
        'model.productkey_args.layers="1"', "model.productkey_args.mem_n_keys=16", "logging.freq=1", "optim.warmup=1",
    ]  # fmt: skip
    run_in_process([*keys, *to_use], tmp_path).ok()
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["global_step"] for line in metrics] == [1, 2]
    assert f"vocab_size: {vocab_size}" in (tmp_path / "run/config.yaml").read_text()
