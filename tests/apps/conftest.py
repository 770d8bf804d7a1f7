import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.plain import STEPS, train_plainly
from tests.helpers.training import (
    Result,
    Training,
    list_steps,
    run_in_process,
    start_ranks,
    tiny_config,
    write_config,
    write_corpus,
)


@pytest.fixture(scope="session")
def corpus(build_once) -> Path:
    return build_once("corpus", lambda folder: write_corpus(folder / "data")) / "data"


@pytest.fixture(scope="session")
def tiny(corpus, build_once) -> Path:
    """The small config as a file; give each run a dump_dir of its own."""
    config = tiny_config(corpus, corpus.parent / "nobody's")
    return build_once("tiny", lambda folder: write_config(folder / "tiny.yaml", config)) / "tiny.yaml"


@pytest.fixture
def start(tiny, tmp_path) -> Callable[..., Training]:
    """Starts to train the small config: `start(dump_dir, *key_values, **environment)`."""
    return lambda dump_dir, *arguments, **variables: Training(
        [f"config={tiny}", f"dump_dir={dump_dir}", *arguments], tmp_path, **variables
    )


@pytest.fixture
def run_here(tiny, tmp_path) -> Callable[..., Result]:
    """The same in the test's process, to its end: `run_here(dump_dir, *key_values, **environment)`."""
    return lambda dump_dir, *arguments, **variables: run_in_process(
        [f"config={tiny}", f"dump_dir={dump_dir}", *arguments], tmp_path, **variables
    )


@pytest.fixture(scope="session")
def reference(tiny, build_once) -> Path:
    """What an uninterrupted run of 60 steps left, with all its checkpoints. To be copied, not written to."""

    def build(folder):
        result = Training([f"config={tiny}", f"dump_dir={folder / 'run'}"], folder).finish().ok()
        assert result.err == ""
        assert list_steps(folder / "run") == list(range(5, 65, 5))

    return build_once("reference", build) / "run"


@pytest.fixture(scope="session")
def pair(tiny, build_once) -> Path:
    """What an uninterrupted run of two ranks and 20 steps left. To be copied, not written to."""

    def build(folder):
        for rank in start_ranks(2, [f"config={tiny}", f"dump_dir={folder / 'run'}", "steps=20"], folder):
            assert rank.finish().ok().err == ""
        assert list_steps(folder / "run") == [5, 10, 15, 20]

    return build_once("pair", build) / "run"


@pytest.fixture(scope="session")
def plain(tiny, tmp_path_factory) -> Callable[..., tuple]:
    """`plain(n_ranks, grad_acc_steps, *key_values)`: what `train_plainly` gives, worked out once each."""
    known = {}

    def get(n_ranks, grad_acc_steps, *arguments):
        key = n_ranks, grad_acc_steps, arguments
        if key not in known:
            folder = tmp_path_factory.mktemp("plain")
            argv = [f"config={tiny}", f"dump_dir={folder}", f"steps={STEPS}", f"grad_acc_steps={grad_acc_steps}"]
            known[key] = train_plainly([*argv, *arguments], n_ranks)
        return known[key]

    return get


@pytest.fixture(scope="session")
def train_in(tiny) -> Callable[..., Path]:
    """`train_in(folder, name, n_ranks, {distributed.*}, *key_values, **environment)` as torchrun would.

    Returns the dump_dir. Without a word of checkpoints there is one at the end.
    """

    def run(folder, name, n_ranks, distributed, *arguments, **variables):
        argv = [f"config={tiny}", f"dump_dir={folder / name}", f"steps={STEPS}", "distributed.timeout=120"]
        argv += [f"checkpoint.dump.every={STEPS}"]
        argv += [f"distributed.{key}={value}" for key, value in distributed.items()]
        ranks = start_ranks(n_ranks, [*argv, *arguments], folder, **variables)
        results = [rank.finish() for rank in ranks]
        for result in results:
            result.ok()
        return folder / name

    return run


@pytest.fixture
def train(train_in, tmp_path) -> Callable[..., Path]:
    """`train_in` the test's own folder."""
    return functools.partial(train_in, tmp_path)
