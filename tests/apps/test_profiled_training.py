"""Training with `profiling.run`: the same losses, and whole files of each rank."""

import gzip
import json

from tests.helpers.training import last_step, list_steps, read_losses, read_metrics, start_ranks

WATCHED = ["profiling.run=true", "profiling.mem_warmup=2", "profiling.mem_steps=1", "profiling.profile_warmup=3"]


def read_trace(file):
    return json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]


def names(dump_dir):
    return sorted(path.name for path in (dump_dir / "profiling").iterdir())


def test_losses_are_those_of_a_run_without_it(start, run_here, tmp_path):
    run_here(tmp_path / "plain", "steps=6").ok()
    result = start(tmp_path / "watched", "steps=6", *WATCHED).finish().ok()
    assert result.err == ""
    assert read_losses(tmp_path / "watched") == read_losses(tmp_path / "plain")
    stem = "0000000004-0000000005.rank_0"
    memory = "0000000003-0000000003.rank_0.memory.json.gz"
    assert names(tmp_path / "watched") == [memory, f"{stem}.kernels.txt", f"{stem}.trace.json.gz"]
    events = read_trace(tmp_path / "watched" / "profiling" / f"{stem}.trace.json.gz")
    # Two steps of two batches each, and two memories.
    assert sum(event["name"] == "lingua::search" for event in events) == 8
    assert any(event["name"] == "nn.Module: HashingMemory_0" for event in events)
    log = (tmp_path / "watched" / "train.log").read_text()
    assert "profiling: steps 4 to 5: MFU" in log
    assert "ui.perfetto.dev" in log
    assert "speed/mfu" not in read_metrics(tmp_path / "watched")[-1]  # of a CPU nobody knows the peak

    # The next process counts anew, and its files stand beside the first one's.
    start(
        tmp_path / "watched", "steps=8", *WATCHED, "profiling.mem_steps=0", "profiling.profile_warmup=1"
    ).finish().ok()
    assert "0000000008-0000000008.rank_0.trace.json.gz" in names(tmp_path / "watched")
    assert len(names(tmp_path / "watched")) == 5


def test_ranks_that_end_in_a_window(tiny, tmp_path):
    arguments = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=3", "profiling.run=true"]
    windows = ["profiling.mem_steps=0", "profiling.profile_warmup=1", "profiling.profile_steps=50"]
    for rank in start_ranks(2, [*arguments, *windows], tmp_path):
        assert rank.finish().ok().err == ""
    stem = "0000000002-0000000003"
    assert names(tmp_path / "run") == [
        f"{stem}.rank_{rank}.{ending}" for rank in (0, 1) for ending in ("kernels.txt", "trace.json.gz")
    ]
    for rank in (0, 1):
        events = read_trace(tmp_path / "run" / "profiling" / f"{stem}.rank_{rank}.trace.json.gz")
        assert any("all_reduce" in event["name"] for event in events)
    assert "each of the 2 ranks" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_stopped_in_a_window(start, tmp_path):
    windows = ["profiling.mem_steps=0", "profiling.profile_warmup=1", "profiling.profile_steps=100000"]
    run = start(tmp_path / "run", "steps=100000", "profiling.run=true", *windows)
    assert run.wait_for(lambda: last_step(tmp_path / "run") >= 3)
    run.kill(15)
    assert run.finish().ok().err == ""
    step = list_steps(tmp_path / "run")[-1]
    stem = f"0000000002-{step:010d}.rank_0"
    assert names(tmp_path / "run") == [f"{stem}.kernels.txt", f"{stem}.trace.json.gz"]
    assert read_trace(tmp_path / "run" / "profiling" / f"{stem}.trace.json.gz")
