"""What holds for all tests: their order, `--long`, one thread for each process, and folders that workers share.

Two cores are busier with several small models, a thread each, than with one spread over both.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.helpers import ranks

torch.set_num_threads(1)

# Without --long the same examples in every run, so that a test fails for the change that breaks it. All property tests
# together take some seconds for these.
settings.register_profile("few", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("many", max_examples=300, deadline=None)

# Started first, or all else would be done while these still run. Tests on SLURM wait more than they compute.
LONGEST = (
    "test_slurm.py",
    "test_layouts.py",
    "test_parallelize.py",
    "test_shuffle.py",
    "test_config_fuzz.py",
    "test_kills.py",
    "test_interpreter.py",
    "test_train.py",
    "test_harness.py",
    "test_scripts.py",
    "test_sparse_adamw.py",
    "test_probe.py",
)

N_DESELECTED = pytest.StashKey[int]()


class OneQueue(LoadScopeScheduling):
    """Each test goes to the worker that is free first, but for those on SLURM: one worker runs them all.

    There can be one SLURM on a machine. (xdist's own groups, --dist loadgroup, do not work with pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return file if file.endswith("test_slurm.py") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneQueue | None:
    return OneQueue(config, log) if config.getvalue("dist") == "loadscope" else None


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
    if n_tests := getattr(node, "workeroutput", {}).get("n_deselected"):  # none of a worker that crashed
        node.config.stash[N_DESELECTED] = n_tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if n_tests := config.stash.get(N_DESELECTED, 0):
        terminalreporter.line(f"{n_tests} long tests were left out: --long runs them")
    if config.option.xmlpath:
        write_durations(terminalreporter, Path(config.option.xmlpath).with_suffix(".txt"))


def write_durations(terminalreporter: pytest.TerminalReporter, file: Path) -> None:
    """What `--durations=0` would print, of every phase of every test, beside the file of `--junitxml`."""
    reports = [report for some in terminalreporter.stats.values() for report in some if hasattr(report, "duration")]
    reports.sort(key=lambda report: -report.duration)
    lines = [f"{report.duration:8.2f} {report.when:8} {report.nodeid}\n" for report in reports]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(lines))


@pytest.fixture(scope="module", autouse=True)
def end_pools() -> Iterator[None]:
    """Of ranks, which the next file's tests seldom need."""
    yield
    ranks.end_pools()


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """`build_once(name, build)`: a folder that `build(folder)` has filled, once a run for all workers of xdist.

    To be copied, not written to. Where `build` fails, the next worker that needs the folder tries again.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def get(name: str, build: Callable[[Path], object]) -> Path:
        folder, complete = root / "shared" / name, root / "shared" / f"{name}.complete"
        folder.parent.mkdir(exist_ok=True)
        with open(root / "shared" / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                complete.touch()
        return folder

    return get
