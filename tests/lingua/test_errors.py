"""What a command prints for an error of the user, and for a bug."""

import pytest
import torch.distributed as dist

from lingua.distributed import World, process_group, raise_on_all_ranks
from lingua.errors import UserError
from lingua.launch import run_main
from tests.helpers.ranks import run_ranks


def of_the_user():
    raise UserError("steps: 0 is too small,\nit must be 1 or more")


def of_a_disk():
    raise OSError(28, "No space left on device", "/full/file")


def a_bug():
    list(zip([1], [], strict=True))  # a plain ValueError, as torch raises them, too


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (of_the_user, "error: steps: 0 is too small, it must be 1 or more"),
        (of_a_disk, "error: [Errno 28] No space left on device: '/full/file'"),
    ],
)
@pytest.mark.parametrize("asked", [False, True], ids=["", "LINGUA_TRACEBACK"])
def test_an_error_of_the_user_is_one_line(main, line, asked, monkeypatch, capfd):
    if asked:
        monkeypatch.setenv("LINGUA_TRACEBACK", "1")
    with pytest.raises(SystemExit) as left:
        run_main(main)
    assert left.value.code == 1
    *traceback, last = capfd.readouterr().err.splitlines()
    assert last == line
    assert bool(traceback) == asked


def test_a_bug_shows_its_traceback(capfd):
    with pytest.raises(SystemExit) as left:
        run_main(a_bug)
    assert left.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("Traceback (most recent call last)")
    assert "in a_bug" in error
    assert "error: " not in error.replace("ValueError: ", "")


def test_one_rank_raises_what_it_has():
    """With its traceback."""
    for main, kind in ((of_the_user, UserError), (of_a_disk, OSError), (a_bug, ValueError)):
        with pytest.raises(kind) as caught, raise_on_all_ranks():
            main()
        assert caught.traceback[-1].name == main.__name__


def outcome_of(kind: str) -> str:
    """Of this rank, where the second one fails."""
    try:
        with raise_on_all_ranks():
            if dist.get_rank() == 1:
                {"user": of_the_user, "disk": of_a_disk, "bug": a_bug}[kind]()
    except (Exception, SystemExit) as error:
        return type(error).__name__
    return "went on"


@pytest.mark.parametrize(("kind", "name"), [("user", "UserError"), ("disk", "OSError"), ("bug", "ValueError")])
def test_ranks_agree_on_an_error_of_one_of_them(kind, name):
    """On a bug's ValueError, too: callers catch it, and a rank that alone went on would wait in vain for the others."""
    assert run_ranks(2, outcome_of, kind) == ["SystemExit", name]


@pytest.mark.parametrize("port", [None, "abc"])
def test_ranks_that_know_no_place_to_meet(port, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    if port is not None:
        monkeypatch.setenv("MASTER_ADDR", "localhost")
        monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match="^MASTER_ADDR, MASTER_PORT: ranks cannot meet"), process_group(World(1, 1, 2)):
        pass
