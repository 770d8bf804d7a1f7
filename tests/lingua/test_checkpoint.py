import io
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua import slurm
from lingua.checkpoint import (
    CheckpointArgs,
    CheckpointManager,
    SaveEvery,
    consolidate_checkpoints,
    find_damage,
    list_checkpoints,
    load_model,
    load_training,
    read_consolidated,
    read_metadata,
    read_train_state,
    refuse_parent,
)
from lingua.optim import OptimArgs, build_optimizer, make_state
from lingua.product_key.memory import ProductKeyArgs
from tests.helpers.ranks import run_ranks

PROCESSES = multiprocessing.get_context("forkserver")


def train_state(step: int) -> dict[str, object]:
    return {"step": step, "data_loader_state": {}}


class Small:
    """A model that fits in a few kilobytes, its optimizer and their manager; after step n every weight is n."""

    def __init__(self, path, **args):
        self.model = nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(4)).sum().backward()
        self.optimizer.step()
        self.manager = CheckpointManager(CheckpointArgs(**args), path)

    def save(self, step):
        self.set(step)
        return self.manager.save(step, self.model, self.optimizer, train_state(step), {"name": "small"})

    def set(self, number):
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(number)
                self.optimizer.state[parameter]["exp_avg"].fill_(number)

    def assert_loads(self, folder):
        """The folder holds what `save` wrote into it."""
        step = int(folder.name)
        self.set(-1)
        load_training(folder, self.model, self.optimizer)
        for parameter in self.model.parameters():
            assert (parameter == step).all()
            assert (self.optimizer.state[parameter]["exp_avg"] == step).all()
        assert read_train_state(folder, 0, 1) == train_state(step)
        assert json.loads((folder / "params.json").read_text()) == {"name": "small"}


def steps_in(path):
    return [int(folder.name) for folder in list_checkpoints(path)]


# --- retention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dump", "evaluation", "steps", "kept"),
    [
        # all kept
        ((2, 0), (0, 0), [2, 4, 6, 8], [2, 4, 6, 8]),
        ((2, -1), (0, 0), [2, 4, 6, 8], [2, 4, 6, 8]),
        ((2, 0), (4, 0), [2, 4, 6, 8], [2, 4, 6, 8]),
        # the last of one kind
        ((2, 1), (0, 0), [2, 4, 6, 8], [8]),
        ((2, 2), (0, 0), [2, 4, 6, 8], [6, 8]),
        ((2, 9), (0, 0), [2, 4, 6, 8], [2, 4, 6, 8]),
        ((0, 0), (3, 2), [3, 6, 9, 12], [9, 12]),
        # two kinds with nothing in common
        ((10, 1), (7, 2), [7, 10, 14, 20, 21, 28, 30], [21, 28, 30]),
        ((10, 0), (7, 1), [7, 10, 14, 20, 21, 28, 30], [10, 20, 28, 30]),
        ((10, 1), (7, 0), [7, 10, 14, 20, 21, 28, 30], [7, 14, 21, 28, 30]),
        # one that is of both kinds stays while either keeps it
        ((2, 1), (6, 2), [2, 4, 6, 8, 10, 12, 14], [6, 12, 14]),
        ((2, 2), (6, 1), [2, 4, 6, 8, 10, 12, 14], [12, 14]),
        ((2, 1), (6, 0), [2, 4, 6, 8, 10, 12, 14, 16, 18, 20], [6, 12, 18, 20]),
        ((6, 1), (2, 2), [2, 4, 6, 8, 10, 12, 14, 16], [12, 14, 16]),
        # of neither kind: after a signal, or the last step. It counts among the dumps, and is gone with them
        ((5, 2), (0, 0), [5, 7, 10, 12], [10, 12]),
        ((5, 1), (4, 1), [4, 5, 7, 8], [7, 8]),
        ((5, 1), (4, 1), [4, 5, 8, 9], [8, 9]),
    ],
)
def test_retention(tmp_path, dump, evaluation, steps, kept):
    small = Small(tmp_path, dump=SaveEvery(*dump), eval=SaveEvery(*evaluation))
    for step in steps:
        small.save(step)
        assert steps_in(tmp_path)[-1] == step, "the newest always stays"
    assert steps_in(tmp_path) == kept
    assert sorted(os.listdir(tmp_path)) == [f"{step:010d}" for step in kept]


def test_saving_that_takes_longer_than_slurm_gives_is_told(tmp_path, caplog, monkeypatch):
    small = Small(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(slurm, "WARNING_SECONDS", 0)
    small.save(1)
    assert "SLURM" not in caplog.text
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    small.save(2)
    assert "and SLURM warns 0 s before it ends a job: a last checkpoint may not be whole by then" in caplog.text


def test_a_checkpoint_that_somebody_waits_for_stays(tmp_path):
    """Until nobody does; nothing is asked of those that stay anyway."""
    small = Small(tmp_path, dump=SaveEvery(2, 1))
    awaited, asked = {2}, []
    small.manager.find_awaited = lambda steps: asked.append(steps) or awaited & set(steps)
    for step in (2, 4, 6):
        small.save(step)
    assert steps_in(tmp_path) == [2, 6]
    assert asked == [[2], [2, 4]]
    awaited.clear()
    small.save(8)
    assert steps_in(tmp_path) == [8]


@pytest.mark.parametrize("save_async", [False, True])
def test_an_old_checkpoint_that_cannot_be_removed_stays(tmp_path, caplog, monkeypatch, save_async):
    """The new one is whole all the same, and it is told once."""
    small = Small(tmp_path, dump=SaveEvery(2, 1), save_async=save_async)
    original = Path.rename

    def rename(path, target):
        if path.name == "0000000002":
            raise PermissionError("it is not yours")
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    for step in (2, 4, 6):
        small.save(step)
        small.manager.finish()
    assert steps_in(tmp_path) == [2, 6]
    small.assert_loads(tmp_path / "0000000006")
    assert caplog.text.count("the old checkpoint of step 2 could not be removed: it is not yours") == 1


def test_is_due():
    manager = CheckpointManager(CheckpointArgs(dump=SaveEvery(4), eval=SaveEvery(6)), Path("nowhere"))
    assert [step for step in range(1, 13) if manager.is_due(step)] == [4, 6, 8, 12]
    manager = CheckpointManager(CheckpointArgs(dump=SaveEvery(0), eval=SaveEvery(-1)), Path("nowhere"))
    assert not any(manager.is_due(step) for step in range(1, 13))


def test_what_is_not_ours_stays(tmp_path):
    foreign = ["best", "step_4", "0000000004.bak", "00000000004", ".cache", ".0000000004.tmp.txt", "4"]
    for name in foreign:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("mine")
    (tmp_path / "0000000003").write_text("a file, no folder")
    (tmp_path / ".0000000009.tmp").mkdir()
    (tmp_path / ".0000000008.old").mkdir()
    small = Small(tmp_path, dump=SaveEvery(1, 1))
    small.manager.clean_up()
    for step in (5, 6):
        small.save(step)
    assert sorted(os.listdir(tmp_path)) == sorted([*foreign, "0000000003", "0000000006"])
    assert all((tmp_path / name / "file").read_text() == "mine" for name in foreign)
    assert small.manager.latest() == tmp_path / "0000000006"


def test_checkpoints_past_the_one_resumed_from_stay(tmp_path):
    """Whoever set a run back by hand keeps what lies ahead until it is computed again."""
    small = Small(tmp_path, dump=SaveEvery(1, 1))
    shutil.copytree(small.save(9), tmp_path / "kept")
    shutil.rmtree(tmp_path / "0000000009")
    small.save(3)
    (tmp_path / "kept").rename(tmp_path / "0000000009")
    small.save(4)
    assert steps_in(tmp_path) == [4, 9]


# --- a folder is whole or it is not there -----------------------------------------------------------------------------

# What changes files, as Python's audit events tell it.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


def _save_until(path: str, last_event: int, report: str) -> None:
    """In a process of its own: checkpoints of steps 1 and 2, of which one stays; killed at an event of the second.

    Events are counted while step 2 is saved, in this folder alone; without an end by then, their number is reported.
    """
    torch.set_num_threads(1)
    small = Small(Path(path), dump=SaveEvery(1, 1))
    small.save(1)
    count, lock = itertools.count(1), threading.Lock()

    def watch(event, arguments):
        if event in EVENTS and arguments and path in os.fsdecode(arguments[0] if arguments[0] else b""):
            with lock:
                if next(count) == last_event:
                    os.kill(os.getpid(), signal.SIGKILL)

    original = os.fsync  # has no event of its own

    def fsync(file):
        original(file)
        watch("open", (path,))

    os.fsync = fsync
    sys.addaudithook(watch)
    small.save(2)
    Path(report).write_text(str(next(count) - 1))
    os._exit(0)


def test_killed_at_every_change_of_a_file(tmp_path):
    report = tmp_path / "report"
    PROCESSES.set_forkserver_preload(["apps.main.train", "apps.main.train_eval", "pytest", "torch._dynamo"])

    def save_until(event):
        path = tmp_path / f"killed.{event}"
        process = PROCESSES.Process(target=_save_until, args=(str(path), event, str(report)))
        process.start()
        process.join()
        assert process.exitcode == (-signal.SIGKILL if event else 0)
        return path

    assert steps_in(save_until(0)) == [2]
    n_events = int(report.read_text())
    assert n_events > 10
    seen = set()
    for event in range(1, n_events + 1):
        path = save_until(event)
        small = Small(path, dump=SaveEvery(1, 1))
        newest = small.manager.latest()
        assert newest is not None, f"event {event}: no checkpoint is left"
        small.assert_loads(newest)
        seen.add((int(newest.name), len(os.listdir(path))))
        assert all(find_damage(folder) is None for folder in list_checkpoints(path))

        small.manager.clean_up()
        assert all(name.isdigit() for name in os.listdir(path))
        small.assert_loads(small.save(2))
        assert os.listdir(path) == ["0000000002"]
        shutil.rmtree(path)
    # Kills were seen before, while and after the new folder was there beside the old one.
    assert {(1, 1), (1, 2), (2, 2)} <= seen


@pytest.mark.parametrize("save_async", [False, True])
@pytest.mark.parametrize(
    ("place", "name"),
    [
        (Path, "mkdir"),
        (torch, "save"),
        (os, "fsync"),
        (json, "dumps"),
        (Path, "rename"),
        (Path, "rename of the folder"),
    ],
)
@pytest.mark.parametrize("n_failures", [2, 3])
def test_failed_save_is_tried_again_and_leaves_nothing_behind(
    tmp_path, monkeypatch, caplog, place, name, n_failures, save_async
):
    monkeypatch.setattr("lingua.checkpoint.PAUSES", (0, 0))
    small = Small(tmp_path, dump=SaveEvery(1, 1), save_async=save_async)
    small.save(1)
    small.manager.finish()
    name, _, of_the_folder = name.partition(" ")
    original = getattr(place, name)
    left = itertools.count(n_failures, -1)

    def fail(*arguments, **keywords):
        if (of_the_folder and not arguments[0].is_dir()) or next(left) <= 0:
            return original(*arguments, **keywords)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(place, name, fail)
    if n_failures == 2:
        small.save(2)
        small.manager.finish()
        assert os.listdir(tmp_path) == ["0000000002"]
    else:
        message = "checkpoint of step 2 in .* could not be written: .*No space left"
        with pytest.raises(OSError, match=message) as caught:  # noqa: PT012 - the one or the other
            small.save(2)
            small.manager.finish()
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == ["0000000001"]
        assert small.manager.saved == 1
        small.save(2)
        small.manager.finish()
    assert caplog.text.count("No space left on device; trying again in 0 s") == 2
    small.assert_loads(tmp_path / "0000000002")


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    """And is not waited for."""
    small = Small(tmp_path, dump=SaveEvery(1, 1))
    small.save(1)
    n_bytes = 3 * 4 * 15 + 2 * 4  # two parameters, of 12 and of 3 numbers, two moments, and how often each was updated
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes - 1))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: pytest.fail("it writes"))
    with pytest.raises(OSError, match=r"step 2 .* No space left on device: 0.0 MiB are needed, and 0.0 MiB are free"):
        small.save(2)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=n_bytes))
    small.assert_loads(small.save(2))


def test_saving_a_step_again_replaces_it(tmp_path):
    small = Small(tmp_path)
    (small.save(1) / "of the first").touch()
    small.assert_loads(small.save(1))
    assert os.listdir(tmp_path) == ["0000000001"]
    assert not (tmp_path / "0000000001" / "of the first").exists()


# --- damage -------------------------------------------------------------------------------------------------------

FILES = [".metadata", "__0_0.distcp", "checksums.json", "train_state_00000.json", "params.json"]


def test_files_of_a_checkpoint(tmp_path):
    assert sorted(os.listdir(Small(tmp_path).save(1))) == sorted(FILES)


@pytest.mark.parametrize("damage", ["deleted", "emptied", "cut in half", "one byte short", "longer", "zeroed"])
@pytest.mark.parametrize("name", FILES)
def test_damaged_file_is_noticed(tmp_path, caplog, name, damage):
    """The checkpoint before it is taken: the step, the loader's place and all else come from one whole folder."""
    small = Small(tmp_path)
    small.save(1)
    file = small.save(2) / name
    assert small.manager.latest().name == "0000000002"
    content = file.read_bytes()
    file.unlink()
    kept = {"emptied": 0, "cut in half": len(content) // 2, "one byte short": len(content) - 1}
    if damage in kept:
        file.write_bytes(content[: kept[damage]])
    elif damage == "longer":
        file.write_bytes(content + b"x")
    elif damage == "zeroed":
        file.write_bytes(bytes(len(content)))

    assert small.manager.latest() == tmp_path / "0000000001"
    assert f"passing over the checkpoint {file.parent}: " in caplog.text
    assert name in caplog.text
    small.assert_loads(tmp_path / "0000000001")


def test_any_damage_of_the_table_of_contents_is_survived(tmp_path):
    """`.metadata` is a pickle: flipped bits in it can raise nearly anything, or give nearly anything."""
    small = Small(tmp_path)
    small.save(1)
    file = small.save(2) / ".metadata"
    content = file.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        place, bit = (int(torch.randint(bound, (1,), generator=generator)) for bound in (len(content), 8))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        assert small.manager.latest().name in ("0000000001", "0000000002")


def test_flipped_bits_of_the_table_of_contents_are_refused_or_harmless(tmp_path, monkeypatch):
    """Two bits of each byte: nothing but a ValueError, and no memory to speak of."""
    file = Small(tmp_path).save(1) / ".metadata"
    content = file.read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    n_refused = 0
    for place, shift in itertools.product(range(len(content)), (0, 3)):
        bit = (place + shift) % 8
        damaged = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
        monkeypatch.setattr(Path, "read_bytes", lambda _, damaged=damaged: damaged)  # a disk takes its time
        try:
            read_metadata(file.parent)
        except ValueError as error:
            n_refused += 1
            assert str(error).startswith(f"{file} is damaged (")  # noqa: PT017
    assert n_refused > 0.5 * 2 * len(content)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"p2147483647\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_table_of_contents_that_asks_for_much_memory_is_refused(tmp_path, opcode):
    """The unpickler would write 32 GiB of empty places first."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x04N" + opcode + b".")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"\.metadata is damaged \(place 2147483647 of the memo\)"):
        read_metadata(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


# --- the training state -------------------------------------------------------------------------------------------


def write_train_states(folder, n_ranks, step=7):
    """As `n_ranks` ranks write them at the start of a run; the loader's place in stream n is "place n"."""
    for rank in range(n_ranks):
        loader = {
            "made_with": {"data.batch_size": 2, "streams": n_ranks},
            "streams": [{"stream": rank, "rows_given": 2, "rows_used": 0, "place": f"place {rank}"}],
            "turn": [0, 1],
        }
        state = {"step": step, "acc_step": 0, "data_loader_state": loader}
        (folder / f"train_state_{rank:05d}.json").write_text(json.dumps(state))


def change_train_state(folder, rank, **changes):
    file = folder / f"train_state_{rank:05d}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused_train_state(folder, rank, world_size):
    """The one line with which the training state is refused."""
    with pytest.raises(ValueError, match=".") as caught:
        read_train_state(folder, rank, world_size)
    assert len(str(caught.value).splitlines()) == 1
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_each_rank_reads_its_own_training_state_alone(tmp_path):
    write_train_states(tmp_path, 3)
    (tmp_path / "train_state_00001.json").write_text("not JSON")
    for rank in (0, 2):
        written = json.loads((tmp_path / f"train_state_{rank:05d}.json").read_text())
        assert read_train_state(tmp_path, rank, 3) == written
    assert "train_state_00001.json: not JSON" in refused_train_state(tmp_path, 1, 3)


@pytest.mark.parametrize(
    ("written", "world_size", "places", "turns"),
    [
        (4, 2, [[0, 1], [2, 3]], [[0, 1]] * 2),
        (4, 1, [[0, 1, 2, 3]], [[0, 1]]),
        (4, 3, [[0], [1], [2, 3]], [[0, 1]] * 3),
        (1, 3, [[0], [0], [0]], [[0, 3], [1, 3], [2, 3]]),
        (2, 3, [[0], [0], [1]], [[0, 2], [1, 2], [0, 1]]),
    ],
)
def test_other_ranks_share_out_the_training_states(tmp_path, written, world_size, places, turns):
    write_train_states(tmp_path, written)
    for rank in range(world_size):
        state = read_train_state(tmp_path, rank, world_size)
        assert (state["step"], state["acc_step"]) == (7, 0)
        streams = state["data_loader_state"]["streams"]
        assert [stream["place"] for stream in streams] == [f"place {number}" for number in places[rank]]
        assert state["data_loader_state"]["turn"] == turns[rank]


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_training_state_is_named(tmp_path, missing, world_size):
    write_train_states(tmp_path, 4)
    (tmp_path / f"train_state_{missing:05d}.json").unlink()
    assert f"train_state_{missing:05d}.json is missing" in refused_train_state(tmp_path, 0, world_size)


def test_training_states_that_do_not_go_together(tmp_path):
    write_train_states(tmp_path, 4)
    (tmp_path / "train_state_00003.json").unlink()
    assert "lack stream 3 of 4" in refused_train_state(tmp_path, 0, 2)
    write_train_states(tmp_path, 4)
    change_train_state(tmp_path, 2, step=8)
    message = refused_train_state(tmp_path, 0, 2)
    assert "train_state_00000.json is of step 7 and train_state_00002.json of step 8" in message
    change_train_state(tmp_path, 2, step=7, data_loader_state={"made_with": {}, "place": None})
    assert "is not one of this code" in refused_train_state(tmp_path, 0, 2)


def test_no_training_state(tmp_path):
    assert "no train_state_*.json" in refused_train_state(tmp_path, 0, 1)


# --- files of strangers -------------------------------------------------------------------------------------------


class Touch:
    """A pickle of this makes a file when it is loaded without care."""

    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


class System(Touch):
    def __reduce__(self):
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize("kind", [Touch, System])
def test_hostile_table_of_contents_runs_no_code(tmp_path, kind):
    small, mark = Small(tmp_path / "run"), tmp_path / "mark"
    small.save(1)
    folder = small.save(2)
    (folder / ".metadata").write_bytes(pickle.dumps(kind(mark)))
    assert small.manager.latest().name == "0000000001"
    for use in (lambda: load_model(folder, small.model), lambda: consolidate_checkpoints(folder)):
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            use()
    assert not mark.exists()
    (folder / "checksums.json").unlink()
    with pytest.raises(ValueError, match="no place in it"):
        load_model(folder, small.model)
    assert not mark.exists()
    pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 - that it would have worked
    assert mark.exists()


def test_table_of_contents_of_another_shape(tmp_path):
    """Made of the right classes, and still no table of contents."""
    small = Small(tmp_path)
    small.save(1)
    folder = small.save(2)
    metadata = dcp.FileSystemReader(folder).read_metadata()
    for storage in (None, [], {"a": "b"}, {1: None}):
        metadata.storage_data = storage
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (folder / "checksums.json").unlink(missing_ok=True)
        if storage != []:
            assert small.manager.latest().name == "0000000001", storage


def test_hostile_object_in_a_distributed_checkpoint_runs_no_code(tmp_path):
    """A distributed checkpoint may hold pickles beside tensors; where a tensor is wanted, one must not be loaded."""
    small, mark = Small(tmp_path / "run"), tmp_path / "mark"
    state = {"model": {"weight": Touch(mark), "bias": torch.zeros(3)}}
    dcp.save(state, checkpoint_id=tmp_path / "hostile", no_dist=True)
    with pytest.raises(ValueError, match=r"model\.weight"):
        load_model(tmp_path / "hostile", small.model)
    assert not mark.exists()


@pytest.mark.parametrize("kind", [Touch, System])
def test_hostile_consolidated_file_runs_no_code(tmp_path, kind):
    mark, file = tmp_path / "mark", tmp_path / "consolidated.pth"
    for content in (kind(mark), {"model": kind(mark)}, {"model": {"weight": kind(mark)}}):
        for zipped in (True, False):
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match="consolidated.pth: not a consolidated checkpoint"):
                load_model(file, nn.Linear(4, 3))
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": [1]}, {"model": {"weight": 1}}, {"a": 1}, torch.ones(2), "text"])
def test_consolidated_file_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "consolidated.pth")
    with pytest.raises(ValueError, match="not a consolidated checkpoint"):
        load_model(tmp_path, nn.Linear(4, 3))


def test_damaged_consolidated_file(tmp_path):
    file = tmp_path / "consolidated.pth"
    buffer = io.BytesIO()
    torch.save({"model": nn.Linear(4, 3).state_dict()}, buffer)
    content = buffer.getvalue()
    for damaged in [b"", b"text", *(content[:size] for size in range(1, len(content), 37)), os.urandom(500)]:
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a consolidated checkpoint"):
            load_model(file, nn.Linear(4, 3))


# --- models -------------------------------------------------------------------------------------------------------


def build_model(seed=0, **args):
    memory = {"layers": "1,2", "mem_n_keys": 8, "mem_heads": 2, "mem_knn": 3, "mem_k_dim": 8}
    memory |= args.pop("memory", {})
    sizes = {"dim": 16, "n_layers": 3, "n_heads": 2, "multiple_of": 16, "max_seqlen": 8, "vocab_size": 20, "seed": seed}
    sizes |= args
    return LMTransformer(LMTransformerArgs(**sizes, productkey_args=ProductKeyArgs(is_enabled=True, **memory)))


def save_model(model, path):
    """A checkpoint of our own making, after a step of training."""
    optimizer, _ = build_optimizer(model, OptimArgs(), 10)
    tokens = torch.arange(16).view(2, 8)
    model(tokens, tokens).backward()
    optimizer.step()
    return CheckpointManager(CheckpointArgs(), path).save(1, model, optimizer, train_state(1), {"name": "model"})


def assert_same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def repeat_tables(model):
    """The model's state dict with shared tables under every memory layer, as published checkpoints have it."""
    state = dict(model.state_dict())
    for number, memory in model.memories().items():
        names = ("values_u", "values_v") if memory.peer_variant else ("values",)
        for name, table in zip(names, memory.tables, strict=True):
            state[f"layers.{number}.feed_forward.{name}.weight"] = table.weight.detach()
    assert len(state) > len(model.state_dict())
    return state


@pytest.mark.parametrize("memory", [{}, {"peer_variant": True}, {"mem_share_values": False}, {"mem_v_dim": 5}])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, memory, tied):
    model = build_model(memory=memory, weight_tying=tied)
    folder = save_model(model, tmp_path)
    expected = 3 if memory.get("mem_share_values", True) else 0
    names = [name for name in model.state_dict() if ".values" in name]
    if expected:
        assert all(name.startswith("layers.1.") for name in names), "a shared table is stored once, under the first"
    for source in (folder, consolidate_checkpoints(folder), folder / "consolidated" / "consolidated.pth"):
        loaded = build_model(seed=1, memory=memory, weight_tying=tied)
        load_model(source, loaded)
        assert_same_weights(loaded, model)
    stored = read_consolidated(folder / "consolidated" / "consolidated.pth")
    assert stored.keys() == model.state_dict().keys()
    assert json.loads((folder / "consolidated" / "params.json").read_text()) == {"name": "model"}


@pytest.mark.parametrize("memory", [{}, {"peer_variant": True}])
@pytest.mark.parametrize("form", ["consolidated", "bare", "distributed"])
def test_published_form(tmp_path, memory, form):
    model = build_model(memory=memory)
    state = repeat_tables(model)
    if form == "distributed":
        dcp.save({"model": state}, checkpoint_id=tmp_path, no_dist=True)
    else:
        torch.save({"model": state} if form == "consolidated" else state, tmp_path / "consolidated.pth")
    loaded = build_model(seed=1, memory=memory)
    load_model(tmp_path, loaded)
    assert_same_weights(loaded, model)
    if form == "distributed":
        again = build_model(seed=2, memory=memory)
        load_model(consolidate_checkpoints_without_config(tmp_path), again)
        assert_same_weights(again, model)


def consolidate_checkpoints_without_config(folder):
    (folder / "params.json").write_text("{}")
    return consolidate_checkpoints(folder)


def test_training_goes_on_from_a_published_checkpoint(tmp_path):
    """With the optimizer's state: what the later layers repeat is left unread."""
    model = build_model()
    optimizer, _ = build_optimizer(model, OptimArgs(), 10)
    tokens = torch.arange(16).view(2, 8)
    model(tokens, tokens).backward()
    optimizer.step()
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = {names[parameter]: dict(state) for parameter, state in optimizer.state.items()}
    states["layers.2.feed_forward.values.weight"] = states["layers.1.feed_forward.values.weight"]
    dcp.save(
        {"model": repeat_tables(model), "optim": {"state": states, "param_groups": {"lr": 0.1}}},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    other = build_model(seed=1)
    other_optimizer, _ = build_optimizer(other, OptimArgs(lr=7.0), 10)
    load_training(tmp_path, other, other_optimizer)
    assert_same_weights(other, model)
    for name, parameter in other.named_parameters():
        for key, value in states[name].items():
            assert torch.equal(other_optimizer.state[parameter][key], value), (name, key)
    assert other_optimizer.param_groups[0]["initial_lr"] == 7.0


@pytest.mark.parametrize("form", ["distributed", "consolidated"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 32}, ["layers.0.attention.wq.weight", "[16, 16]", "[32, 32]"]),
        ({"vocab_size": 21}, ["tok_embeddings.weight", "[20, 16]", "[21, 16]"]),
        ({"memory": {"mem_n_keys": 9}}, ["layers.1.feed_forward.keys", "[32, 4]", "[36, 4]"]),
        ({"n_layers": 4}, ["layers.3."]),
        # The checkpoint has more than the model: to leave it out in silence would train another model.
        ({"n_layers": 2, "memory": {"layers": "1"}}, ["layers.2."]),
        ({"memory": {"layers": "1"}}, ["layers.2.feed_forward"]),
        ({"memory": {"swilu_projection": False}}, ["swilu_projection"]),
        ({"memory": {"mem_share_values": False}}, ["layers.2.feed_forward.values.weight"]),
        ({"weight_tying": True}, ["output.weight"]),
    ],
)
def test_checkpoint_of_another_shape(tmp_path, form, change, words):
    folder = save_model(build_model(), tmp_path)
    source = folder if form == "distributed" else consolidate_checkpoints(folder)
    model = build_model(seed=1, **change)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=".") as caught:
        load_model(source, model)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    if form == "distributed":
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "half loaded"
        optimizer, _ = build_optimizer(model, OptimArgs(), 10)
        with pytest.raises(ValueError, match=".") as caught:
            load_training(source, model, optimizer)
        assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("form", ["distributed", "consolidated"])
def test_separate_tables_do_not_become_a_shared_one(tmp_path, form):
    folder = save_model(build_model(memory={"mem_share_values": False}), tmp_path)
    source = folder if form == "distributed" else consolidate_checkpoints(folder)
    with pytest.raises(ValueError, match="mem_share_values"):
        load_model(source, build_model(seed=1))


def test_no_checkpoint(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="no checkpoint in"):
            load_model(path, nn.Linear(4, 3))
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            consolidate_checkpoints(path)


def test_consolidating_twice_does_it_once(tmp_path):
    folder = save_model(build_model(), tmp_path)
    file = consolidate_checkpoints(folder) / "consolidated.pth"
    before = file.stat()
    assert consolidate_checkpoints(str(folder)) / "consolidated.pth" == file
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert find_damage(folder) is None
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]


def test_a_checkpoint_holds_little_more_than_its_tensors(tmp_path):
    model = build_model(dim=64, vocab_size=1000, memory={"mem_n_keys": 32})
    folder = save_model(model, tmp_path)
    tensors = 3 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    stored = sum(file.stat().st_size for file in folder.iterdir())
    assert tensors < stored < 1.1 * tensors + 100_000


# --- memory ---------------------------------------------------------------------------------------------------------

TABLE_BYTES = 2**26


def peak_of(folder: Path, resumes: bool) -> int:
    """Bytes that a process takes at the most for two steps with sparse updates of a table, or to go on from them."""
    model = LMTransformer(
        LMTransformerArgs(
            dim=256,
            n_layers=1,
            n_heads=2,
            vocab_size=16,
            max_seqlen=16,
            productkey_args=ProductKeyArgs(is_enabled=True, layers="0", mem_n_keys=256, mem_k_dim=16),
        )
    )
    optimizer, _ = build_optimizer(model, OptimArgs(value_update="sparse"), 10)
    if resumes:
        make_state(optimizer)
        load_training(folder, model, optimizer)
    else:
        for _ in range(2):
            model(torch.zeros(2, 16, dtype=torch.long), torch.zeros(2, 16, dtype=torch.long)).backward()
            optimizer.step()
            optimizer.zero_grad()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not resumes:
        CheckpointManager(CheckpointArgs(), folder.parent).save(1, model, optimizer, train_state(1), {})
    return peak


def test_resuming_takes_no_more_memory_than_the_run(tmp_path):
    """Neither a gradient of the table's size, nor a second table while it is read."""
    folder = tmp_path / "0000000001"
    ran, resumed = (run_ranks(1, peak_of, folder, resumes, anew=True)[0] for resumes in (False, True))
    assert ran > 3 * TABLE_BYTES
    assert resumed < 1.05 * ran


# --- where there are several ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("above", [False, True])
def test_the_folder_of_checkpoints_is_no_checkpoint(tmp_path, above):
    path = tmp_path / "run" / "checkpoints"
    small = Small(path)
    folder = small.save(2)
    refuse_parent(folder)
    refuse_parent(tmp_path)
    for step in (10, 20, 30, 40):
        small.save(step)
    named = tmp_path / "run" if above else path
    with pytest.raises(ValueError, match=".") as caught:
        load_model(named, small.model)
    assert str(caught.value) == (
        f"'{named}' is no checkpoint; there are 5 in '{path}': 0000000002, 0000000010, ..., 0000000030, 0000000040; "
        f"name one of them, such as {path / '0000000040'}"
    )
