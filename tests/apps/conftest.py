from collections.abc import Callable
from pathlib import Path

import pytest
from training import Training, list_steps, start_ranks, tiny_config, write_config, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data")


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> Path:
    """The small config as a file; give each run a dump_dir of its own."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_config(folder / "tiny.yaml", tiny_config(corpus, folder / "nobody's"))


@pytest.fixture
def start(tiny, tmp_path) -> Callable[..., Training]:
    """Starts to train the small config: `start(dump_dir, *key_values, **environment)`."""
    return lambda dump_dir, *arguments, **variables: Training(
        [f"config={tiny}", f"dump_dir={dump_dir}", *arguments], tmp_path, **variables
    )


@pytest.fixture(scope="session")
def reference(tiny, tmp_path_factory) -> Path:
    """What an uninterrupted run of 60 steps left, with all its checkpoints. To be copied, not written to."""
    folder = tmp_path_factory.mktemp("reference")
    result = Training([f"config={tiny}", f"dump_dir={folder / 'run'}"], folder).finish().ok()
    assert result.err == ""
    assert list_steps(folder / "run") == list(range(5, 65, 5))
    return folder / "run"


@pytest.fixture(scope="session")
def pair(tiny, tmp_path_factory) -> Path:
    """What an uninterrupted run of two ranks and 20 steps left. To be copied, not written to."""
    folder = tmp_path_factory.mktemp("pair")
    for rank in start_ranks(2, [f"config={tiny}", f"dump_dir={folder / 'run'}", "steps=20"], folder):
        assert rank.finish().ok().err == ""
    assert list_steps(folder / "run") == [5, 10, 15, 20]
    return folder / "run"
