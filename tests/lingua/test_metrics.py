import json

import pytest

from lingua.metrics import MetricsLogger


def test_lines_that_cannot_be_written_are_kept_and_told_of_once(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    metrics = MetricsLogger(file)
    for step in (1, 2):
        metrics.log({"global_step": step, "acc_step": 0})
    assert caplog.text.count(f"{file} cannot be written ([Errno 28] No space left on device)") == 1
    file.unlink()  # which makes room for a file
    metrics.log({"global_step": 3, "acc_step": 0})
    metrics.close()
    assert [json.loads(line)["global_step"] for line in file.read_text().splitlines()] == [1, 2, 3]
    assert f"{file} was deleted; it is begun anew" in caplog.text


def test_lines_that_are_lost_are_told_of(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.symlink_to("/dev/full")
    metrics = MetricsLogger(file)
    for step in (1, 2):
        metrics.log({"global_step": step, "acc_step": 0})
    with pytest.raises(OSError, match=r"metrics.jsonl: the last 2 lines are not written \(\[Errno 28\] No space"):
        metrics.close()
