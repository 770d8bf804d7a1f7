"""Checksums: what they find, where they are compared, by whom, and what goes without them."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from lingua import checkpoint_integrity
from lingua.checkpoint import (
    CheckpointArgs,
    CheckpointManager,
    SaveEvery,
    consolidate_checkpoints,
    load_model,
    load_training,
    read_consolidated,
    refuse_damaged,
    refuse_damaged_distributed,
)
from lingua.checkpoint_integrity import (
    BLOCK_BYTES,
    CHECKSUMS_FILE,
    Checksums,
    SummingStream,
    find_other_bytes,
    read_checksums,
    write_checksums,
    writing,
)
from tests.helpers.ranks import run_ranks
from tests.helpers.training import snapshot


def build():
    """With weights whose moments come behind them in the file, and blocks of their own, where these are small."""
    model = nn.Linear(64, 48)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(64)).sum().backward()
    optimizer.step()
    return model, optimizer


def save(path, step=1, **config):
    model, optimizer = build()
    state = {"step": step, "data_loader_state": {}}
    return CheckpointManager(CheckpointArgs(), path).save(step, model, optimizer, state, config)


def flip(file, place, bit=0):
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoint_integrity, "BLOCK_BYTES", 512)


# --- making ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bytes", [0, 1, 511, 512, 513, 1024, 5000])
def test_checksums_of_blocks(tmp_path, small_blocks, n_bytes):
    """However the file is written; each is that of xxhash's own, of the block alone."""
    content, sums = os.urandom(n_bytes), {}
    for name, step in (("whole", 10_000), ("bits", 1), ("pieces", 700)):
        with writing(tmp_path / name, sums) as stream:
            for begin in range(0, n_bytes, step):
                stream.write(content[begin : begin + step])
        assert (tmp_path / name).read_bytes() == content
    expected = [
        checkpoint_integrity.xxhash.xxh3_64_hexdigest(content[begin : begin + 512]) for begin in range(0, n_bytes, 512)
    ]
    assert all(of_file == Checksums(n_bytes, expected) for of_file in sums.values())
    write_checksums(tmp_path, sums)
    assert read_checksums(tmp_path) == sums
    assert find_other_bytes(tmp_path) is None


def test_a_tensor_is_written_as_it_stands(tmp_path):
    """Whatever a stream is given: its bytes, not its items, are counted."""
    tensor, sums = torch.arange(1000), {}
    with writing(tmp_path / "file", sums) as stream:
        assert isinstance(stream, SummingStream)
        assert stream.write(memoryview(tensor.numpy())) == 8000
        assert stream.tell() == 8000
    assert sums["file"].bytes == 8000


def test_a_checkpoint_reads_as_one_without_checksums_does(tmp_path):
    """PyTorch's own reader takes it; the files are those that its own writer makes."""
    folder = save(tmp_path / "run")
    model, optimizer = build()
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(tmp_path / "plain"), no_dist=True)
    state = {"model": {"weight": torch.empty(48, 64), "bias": torch.empty(48)}}
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert state["model"]["weight"].abs().sum() > 0
    assert sorted(read_checksums(folder)) == sorted(set(os.listdir(folder)) - {CHECKSUMS_FILE})
    (folder / CHECKSUMS_FILE).unlink()
    with pytest.raises(ValueError, match="the file checksums.json is missing"):
        load_training(folder, model, optimizer)


# --- comparing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", CHECKSUMS_FILE, "params.json", "train_state_00000.json"])
def test_a_flipped_bit_anywhere_is_found(tmp_path, name):
    """In 40 places of each file."""
    file = save(tmp_path, text="a config") / name
    size = file.stat().st_size
    for number in range(40):
        place = number * (size - 1) // 39
        flip(file, place, number % 8)
        with pytest.raises(ValueError, match=CHECKSUMS_FILE if name == CHECKSUMS_FILE else name) as caught:
            refuse_damaged_distributed(file.parent)
        assert "\n" not in str(caught.value)
        assert str(file.parent) in str(caught.value)
        flip(file, place, number % 8)
    refuse_damaged_distributed(file.parent)


def test_damage_is_named_with_its_place_and_a_remedy(tmp_path, small_blocks):
    folder = save(tmp_path)
    flip(folder / "__0_0.distcp", 1500)
    with pytest.raises(ValueError, match="__0_0.distcp holds other bytes than were written .*at 1024.*copy it anew"):
        refuse_damaged_distributed(folder)


def test_who_wants_the_weights_reads_no_more(tmp_path, small_blocks):
    """Damage of the optimizer's state alone is nothing to who evaluates, and stops who would go on training."""
    folder = save(tmp_path)
    places = {index.fqn: stored for index, stored in dcp.FileSystemReader(folder).read_metadata().storage_data.items()}
    model, optimizer = build()
    of_moment = places["optim.state.weight.exp_avg"]
    flip(folder / "__0_0.distcp", of_moment.offset + of_moment.length // 2)
    load_model(folder, model)
    consolidate_checkpoints(folder)
    with pytest.raises(ValueError, match="__0_0.distcp holds other bytes"):
        load_training(folder, model, optimizer)
    shutil.rmtree(folder / "consolidated")
    of_weight = places["model.weight"]
    flip(folder / "__0_0.distcp", of_weight.offset + of_weight.length // 2)
    before = model.weight.detach().clone()
    for use in (lambda: load_model(folder, model), lambda: consolidate_checkpoints(folder)):
        with pytest.raises(ValueError, match="__0_0.distcp holds other bytes"):
            use()
    assert torch.equal(model.weight, before)
    assert not (folder / "consolidated").exists()


@pytest.mark.parametrize("name", ["consolidated.pth", "params.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut short", "deleted"])
def test_a_damaged_consolidated_checkpoint(tmp_path, name, damage):
    folder = save(tmp_path)
    consolidated = consolidate_checkpoints(folder)
    model, _ = build()
    for path in (folder, consolidated, consolidated / "consolidated.pth"):
        refuse_damaged(path)
        load_model(path, model)
    file = consolidated / name
    if damage == "flipped":
        flip(file, file.stat().st_size // 2)
    elif damage == "cut short":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
        if name == "consolidated.pth":  # there is the distributed one, still, but nothing in the folder below it
            load_model(folder, model)
            with pytest.raises(ValueError, match="no checkpoint in"):
                load_model(consolidated, model)
            return
    for path in (folder, consolidated, consolidated / "consolidated.pth"):
        with pytest.raises(ValueError, match=f"consolidated: not a whole checkpoint; the file {name} "):
            load_model(path, model)


def test_the_config_above_a_consolidated_file_is_compared(tmp_path):
    """It is the one that is read of the checkpoint's folder."""
    folder = save(tmp_path, text="a config")
    consolidate_checkpoints(folder)
    flip(folder / "params.json", 3)
    with pytest.raises(ValueError, match="params.json holds other bytes"):
        refuse_damaged(folder)


def test_a_file_that_was_changed_on_purpose(tmp_path):
    """A tokenizer's path in params.json, say: as the message tells."""
    folder = save(tmp_path)
    (folder / "params.json").write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"params.json has 11 bytes, and 2 by checksums.json"):
        refuse_damaged(folder)
    content = json.loads((folder / CHECKSUMS_FILE).read_text())
    del content["files"]["params.json"]
    (folder / CHECKSUMS_FILE).write_text(json.dumps(content))
    refuse_damaged(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", "null", '{"algorithm": "md5", "block_bytes": 1, "files": {}}'])
def test_no_file_of_checksums(tmp_path, content):
    (tmp_path / CHECKSUMS_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"checksums.json is damaged \("):
        read_checksums(tmp_path)


def test_checkpoints_without_checksums_load(tmp_path):
    """The published code's, and older ones."""
    model, _ = build()
    (tmp_path / "distributed").mkdir()
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(tmp_path / "distributed"), no_dist=True)
    torch.save({"model": model.state_dict()}, tmp_path / "consolidated.pth")
    for path in (tmp_path / "distributed", tmp_path / "consolidated.pth"):
        other, _ = build()
        load_model(path, other)
        assert torch.equal(other.weight, model.weight)


def test_a_short_file_is_found_without_checksums(tmp_path):
    """By what the table of contents says of its size."""
    model, _ = build()
    dcp.save({"model": model.state_dict()}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    file = tmp_path / "__0_0.distcp"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ValueError, match=f"the file __0_0.distcp has {size - 1} bytes of {size}$"):
        load_model(tmp_path, model)


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    """As a broken disk has it."""
    folder = save(tmp_path)

    def pread(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", pread)
    with pytest.raises(ValueError, match=r"the file .metadata cannot be read \(\[Errno 5\] Input/output error\)"):
        refuse_damaged_distributed(folder)


def test_progress_is_told(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint_integrity, "SECONDS_BETWEEN_REPORTS", -1)
    with caplog.at_level(logging.INFO, "lingua"):
        refuse_damaged_distributed(save(tmp_path))
    assert f"comparing checksums of {tmp_path / '0000000001'}: 0.0 of 0.0 GiB" in caplog.text


# --- several ranks ---------------------------------------------------------------------------------------------------


def find_on_ranks(folder: Path, wanted: dict | None) -> tuple[str | None, list[int]]:
    """What this rank is told, and the numbers of the blocks that it has read."""
    read: list[int] = []
    original = checkpoint_integrity._checksum

    def checksum(descriptor: int, number: int) -> str:
        read.append(number)
        return original(descriptor, number)

    checkpoint_integrity._checksum = checksum
    return find_other_bytes(folder, wanted), sorted(read)


def test_ranks_share_out_one_file(tmp_path):
    sums = {}
    with writing(tmp_path / "file", sums) as stream:
        for _ in range(5):
            stream.write(bytes(BLOCK_BYTES))
        stream.write(b"end")
    write_checksums(tmp_path, sums)
    assert run_ranks(2, find_on_ranks, tmp_path, None) == [(None, [0, 1, 2]), (None, [3, 4, 5])]
    wanted = {"file": [(1, 2), (BLOCK_BYTES - 1, BLOCK_BYTES), (4 * BLOCK_BYTES - 1, 4 * BLOCK_BYTES + 1)]}
    assert run_ranks(2, find_on_ranks, tmp_path, wanted) == [(None, [0]), (None, [3, 4])]
    flip(tmp_path / "file", 5 * BLOCK_BYTES)
    told = [problem for problem, _ in run_ranks(2, find_on_ranks, tmp_path, None)]
    assert told[0] == told[1]
    assert f"the block at {5 * BLOCK_BYTES}," in told[0]


# --- retention -------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_set_aside(tmp_path, caplog):
    """It keeps no place of a whole one, and neither retention nor a new checkpoint of its step touches its files."""
    model, optimizer = build()
    for step in (2, 4, 6, 7):
        save(tmp_path, step)
    flip(tmp_path / "0000000006" / "__0_0.distcp", 700)
    (tmp_path / "0000000007" / "params.json").unlink()
    (tmp_path / "0000000006.damaged").mkdir()  # by an earlier start
    damaged = {step: snapshot(tmp_path / f"{step:010d}") for step in (6, 7)}
    manager = CheckpointManager(CheckpointArgs(dump=SaveEvery(2, 2)), tmp_path)
    assert manager.latest() == tmp_path / "0000000004"
    assert caplog.text.count("passing over the checkpoint") == 2
    manager.set_aside()
    manager.save(7, model, optimizer, {"step": 7, "data_loader_state": {}}, {})
    names = ["0000000004", "0000000006.damaged", "0000000006.damaged.2", "0000000007", "0000000007.damaged"]
    assert sorted(os.listdir(tmp_path)) == names
    assert snapshot(tmp_path / "0000000006.damaged.2") == damaged[6]
    assert snapshot(tmp_path / "0000000007.damaged") == damaged[7]
    assert manager.latest() == tmp_path / "0000000007"


def test_a_damaged_checkpoint_is_not_overwritten(tmp_path):
    """Nor by whoever saves without setting aside before."""
    model, optimizer = build()
    for step in (2, 4):
        save(tmp_path, step)
    flip(tmp_path / "0000000004" / "__0_0.distcp", 700)
    before = snapshot(tmp_path / "0000000004")
    manager = CheckpointManager(CheckpointArgs(dump=SaveEvery(1, 1)), tmp_path)
    assert manager.latest() == tmp_path / "0000000002"
    for step in (3, 4, 5):
        manager.save(step, model, optimizer, {"step": step, "data_loader_state": {}}, {})
    assert sorted(os.listdir(tmp_path)) == ["0000000004.damaged", "0000000005"]
    assert snapshot(tmp_path / "0000000004.damaged") == before


def test_retention_leaves_alone_what_is_not_of_the_run(tmp_path, caplog):
    """Where `checkpoint.path` leads, also over a link, to the checkpoints of another run."""
    theirs, ours = tmp_path / "theirs" / "checkpoints", tmp_path / "ours"
    for step in (2, 4):
        save(theirs, step, dump_dir=str(tmp_path / "theirs"))
    (theirs / ".0000000009.tmp").mkdir()
    (theirs / ".0000000009.tmp" / "params.json").write_text(json.dumps({"dump_dir": str(tmp_path / "theirs")}))
    before = {file: file.read_bytes() for file in theirs.rglob("*") if file.is_file()}
    ours.mkdir()
    (ours / "checkpoints").symlink_to(theirs)
    model, optimizer = build()
    for path in (theirs, ours / "checkpoints", tmp_path / "ours" / ".." / "theirs" / "checkpoints"):
        manager = CheckpointManager(CheckpointArgs(dump=SaveEvery(1, 1)), path, run=ours)
        manager.clean_up()
        for step in (5, 6):
            manager.save(step, model, optimizer, {"step": step, "data_loader_state": {}}, {"dump_dir": str(ours)})
        assert sorted(os.listdir(theirs)) == [".0000000009.tmp", "0000000002", "0000000004", "0000000006"]
    assert all(file.read_bytes() == content for file, content in before.items())
    assert "is not of this run; remove it yourself" in caplog.text
    for step in (4, 9):
        with pytest.raises(OSError, match=f"step {step} .*a checkpoint of this step is there that is not of this run"):
            manager.save(step, model, optimizer, {"step": step, "data_loader_state": {}}, {"dump_dir": str(ours)})
    assert all(file.read_bytes() == content for file, content in before.items())


def test_retention_follows_no_links(tmp_path):
    """Of a checkpoint that is a link to another run's, the link is removed."""
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    theirs = save(elsewhere, 2)
    checkpoints = run / "checkpoints"
    checkpoints.mkdir(parents=True)
    for name in ("0000000002", ".0000000003.tmp", ".0000000004.old", ".0000000005.tmp"):
        (checkpoints / name).symlink_to(theirs)
    model, optimizer = build()
    manager = CheckpointManager(CheckpointArgs(dump=SaveEvery(1, 1)), checkpoints, run=run)
    (checkpoints / ".0000000005.tmp").rename(checkpoints / "kept")
    manager.clean_up()
    assert sorted(os.listdir(checkpoints)) == ["0000000002", "kept"]
    (checkpoints / "kept").rename(checkpoints / ".0000000005.tmp")
    manager.save(5, model, optimizer, {"step": 5, "data_loader_state": {}}, {"dump_dir": str(run)})
    assert os.listdir(checkpoints) == ["0000000005"]
    assert not (checkpoints / "0000000005").is_symlink()
    refuse_damaged_distributed(theirs)
    assert read_consolidated(consolidate_checkpoints(theirs) / "consolidated.pth").keys() == {"weight", "bias"}
