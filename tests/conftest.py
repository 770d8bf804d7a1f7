"""One thread for each test process: two cores are busier with several small models than with one spread over both.

`--long` adds the tests marked `long`, and draws more examples for property tests.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# Without --long, the same few examples in every run: a failure is found by whoever causes it.
settings.register_profile("few", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=300, deadline=None)

# Started first, or all else would be done while these still run. Tests on SLURM wait more than they compute.
LONGEST = (
    "test_slurm.py",
    "test_layouts.py",
    "test_parallelize.py",
    "test_shuffle.py",
    "test_config_fuzz.py",
    "test_lookup_kernels.py",
    "test_kills.py",
    "test_search.py",
    "test_train.py",
    "test_harness.py",
    "test_scripts.py",
    "test_sparse_update.py",
    "test_probe.py",
)

N_DESELECTED = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run tests marked long, draw more examples for property tests")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("many" if config.getoption("long") else "few")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.fspath).name, len(rank)))
    if not config.getoption("long"):
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if not item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=long)
        config.stash[N_DESELECTED] = len(long)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker of xdist, whose terminal is the controller's
        session.config.workeroutput["n_deselected"] = session.config.stash.get(N_DESELECTED, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """What a worker of xdist has deselected; all of them collect the same tests."""
    if hasattr(node, "workeroutput"):  # not of one that crashed
        node.config.stash[N_DESELECTED] = node.workeroutput["n_deselected"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if n_tests := config.stash.get(N_DESELECTED, 0):
        terminalreporter.line(f"{n_tests} long tests were left out: --long runs them")
