"""Windows, files and tables of the profiler, within this process; apps/test_profiled_training.py has it in training."""

import gzip
import json
import logging

import pytest
import torch

from lingua.flops import measured_peak, peak_by_name
from lingua.profiling import (
    Profiler,
    ProfilingArgs,
    Workload,
    _kernels,
    _memory_curve,
    _operators,
    _table,
    validate_profiling_args,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_of_a_gpu(name, tflops):
    assert peak_by_name(name) == (None if tflops is None else tflops * 1e12)


def test_measuring_a_peak_draws_no_random_number_of_the_run():
    before = torch.get_rng_state()
    assert measured_peak(CPU, torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mem_warmup": -1}, ["profiling.mem_warmup", "-1"]),
        ({"profile_steps": -1, "run": False}, ["profiling.profile_steps", "-1"]),
        ({"trace_folder": ""}, ["profiling.trace_folder"]),
        ({"mem_steps": 0, "profile_steps": 0}, ["profiling.run", "mem_steps", "profile_steps"]),
        ({"profile_warmup": 200}, ["profiling.profile_warmup", "200", "steps=200", "profile_steps=0"]),
        ({"mem_warmup": 200}, ["profiling.mem_warmup", "200"]),
        ({"profile_warmup": 101}, ["profiling.profile_warmup", "101", "mem_warmup=100", "102 or more"]),
        ({"mem_warmup": 103}, ["profiling.mem_warmup", "103", "profile_warmup=102", "104 or more"]),
        ({"mem_warmup": 102}, ["_warmup", "102", "104 or more"]),
    ],
)
def test_windows_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match="^profiling") as caught:
        validate_profiling_args(ProfilingArgs(**{"run": True, **changes}), steps=200)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, caught.value
    assert "\n" not in str(caught.value)


def test_windows_that_can_be():
    validate_profiling_args(ProfilingArgs(run=True), steps=103)
    validate_profiling_args(ProfilingArgs(run=True, mem_steps=0, profile_warmup=100), steps=101)
    validate_profiling_args(ProfilingArgs(run=True, mem_warmup=104), steps=200)
    validate_profiling_args(ProfilingArgs(profile_warmup=10**9), steps=1)  # not run


def profiler(folder, **args):
    workload = Workload(flops_per_token=2 * 64**3, tokens_per_step=1, dtype=torch.float32)
    defaults = {"run": True, "mem_steps": 0, "profile_warmup": 2, "profile_steps": 2}
    return Profiler(ProfilingArgs(**{**defaults, **args}), str(folder), 0, 1, CPU, workload)


def steps(watching, n_steps, first=1):
    """Whether files were written, behind each step."""
    written = []
    for step in range(first, first + n_steps):
        watching.begin_step(step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        written.append(watching.end_step())
    return written


def names(folder):
    return sorted(path.name for path in (folder / "profiling").iterdir())


TRACE, TABLES = "rank_0.trace.json.gz", "rank_0.kernels.txt"


def test_files_of_both_windows(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with profiler(tmp_path, mem_warmup=1, mem_steps=1, profile_warmup=4) as watching:
        # A resumed run: its steps are numbered on, and counted from this process's first.
        assert steps(watching, 8, first=11) == [False, True, False, False, False, True, False, False]
    memory = "0000000012-0000000012.rank_0.memory.json.gz"
    assert names(tmp_path) == [memory, f"0000000015-0000000016.{TABLES}", f"0000000015-0000000016.{TRACE}"]
    events = json.loads(gzip.decompress((tmp_path / "profiling" / memory).read_bytes()))["traceEvents"]
    curve = [event["args"]["MiB"] for event in events if event["ph"] == "C"]
    assert max(curve) >= 3 * 64 * 64 * 4 / 2**20
    trace = json.loads(gzip.decompress((tmp_path / "profiling" / f"0000000015-0000000016.{TRACE}").read_bytes()))
    assert sum(event["name"] == "aten::mm" for event in trace["traceEvents"]) == 2
    tables = (tmp_path / "profiling" / f"0000000015-0000000016.{TABLES}").read_text()
    for words in ("Steps 15 to 16, rank 0 of 1, on a CPU", "mean of 2", "MFU", "aten::mm\n", "524,288 FLOPs a token"):
        assert words in tables
    of_memory, of_time = (record.message for record in caplog.records)
    assert "no GPU" in of_memory
    assert memory in of_memory
    assert "steps 15 to 16: MFU" in of_time
    assert "ui.perfetto.dev" in of_time
    assert TABLES in of_time


def test_speed_is_told_of_steps_before_the_windows_too(tmp_path):
    with profiler(tmp_path, profile_warmup=5, profile_steps=1) as watching:
        steps(watching, 6)
    text = (tmp_path / "profiling" / f"0000000006-0000000006.{TABLES}").read_text()
    assert "steps not traced, median of 4" in text


def test_the_first_step_of_all(tmp_path):
    with profiler(tmp_path, profile_warmup=0, profile_steps=1) as watching:
        steps(watching, 2)
    assert "not traced" not in (tmp_path / "profiling" / f"0000000001-0000000001.{TABLES}").read_text()


def test_a_run_that_ends_in_a_window(tmp_path):
    with profiler(tmp_path, profile_steps=100) as watching:
        steps(watching, 5)
    assert names(tmp_path) == [f"0000000003-0000000005.{TABLES}", f"0000000003-0000000005.{TRACE}"]


def test_a_run_that_fails_in_a_window(tmp_path):
    def fail():
        with profiler(tmp_path) as watching:
            steps(watching, 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert names(tmp_path) == []
    with profiler(tmp_path) as watching:  # the profiler is free for the next
        steps(watching, 4)
    assert len(names(tmp_path)) == 2


def test_a_run_that_ends_before(tmp_path, caplog):
    with profiler(tmp_path) as watching:
        steps(watching, 2)
    assert names(tmp_path) == []
    assert "ended after 2 steps" in caplog.text


def test_what_a_killed_process_left_is_taken_away(tmp_path):
    (tmp_path / "profiling").mkdir()
    for name in ("tmp.0000000001-0000000002.rank_0.trace.json.gz", "tmp.0000000001-0000000002.rank_1.kernels.txt"):
        (tmp_path / "profiling" / name).touch()
    (tmp_path / "profiling" / "mine.txt").touch()
    with profiler(tmp_path) as watching:
        steps(watching, 1)
    assert names(tmp_path) == ["mine.txt", "tmp.0000000001-0000000002.rank_1.kernels.txt"]


def test_a_folder_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    (tmp_path / "profiling").touch()
    with profiler(tmp_path) as watching:
        assert steps(watching, 5) == [False, False, False, True, False]
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert str(tmp_path / "profiling") in caplog.text


def test_switched_off(tmp_path):
    with profiler(tmp_path, run=False) as watching:
        assert not any(steps(watching, 5))
    assert list(tmp_path.iterdir()) == []


def event(name, begin, duration, thread=1, cat="cpu_op"):
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": thread, "ts": begin, "dur": duration}


def test_own_time_is_without_that_of_what_is_within():
    events = [
        event("outer", 0, 10),
        event("inner", 1, 3),
        event("inner", 4, 2),
        event("innermost", 4, 1),
        event("outer", 10, 5),
        event("outer", 2, 7, thread=2),
        event("a line of Python", 0, 20, cat="python_function"),
    ]
    spent = _operators(events)
    assert {name: (s.own, s.whole, s.calls) for name, s in spent.items()} == {
        "outer": (10 - 5 + 5 + 7, 22, 3),
        "inner": (3 + 1, 5, 2),
        "innermost": (1, 1, 1),
    }


def test_tables_are_sorted_and_end_with_the_rest():
    events = [event(f"kernel {i}", i, i, cat="kernel") for i in range(1, 51)] + [event("copy", 0, 99, cat="gpu_memcpy")]
    lines = _table("Title", _kernels(events)).splitlines()
    assert lines[0] == "Title"
    assert lines[3].split() == ["0.099", "7.2%", "0.099", "1", "copy"]
    assert lines[4].endswith("kernel 50")
    assert lines[-1].split()[-4:] == ["0.066", "11", "11", "more"]
    assert len(lines) == 3 + 40 + 1
    assert len(_table("Nothing", {}).splitlines()) == 3


def test_memory_curve_in_order_of_time():
    def memory(begin, n_bytes, device=0):
        arguments = {"Bytes": n_bytes, "Device Type": device}
        return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": begin, "args": arguments}

    curve = _memory_curve([memory(2, -(2**20)), memory(1, 2**21), event("x", 0, 1), memory(3, 5, device=1)])
    assert [(point["ts"], point["args"]["MiB"]) for point in curve] == [(1, 2.0), (2, 1.0)]
