"""One thread for each test process: two cores are busier with several small models than with one spread over both."""

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# Begun first, or all else would be done while these still run. Tests on SLURM wait more than they compute.
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(Path(item.fspath).name, len(rank)))
