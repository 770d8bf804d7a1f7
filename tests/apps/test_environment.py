"""Section `env` of a config is set before anything looks at a device, so CUDA, its allocator and NCCL read it."""

import os
import subprocess
import sys
from unittest import mock

import pytest
import torch

from apps.main.train import TrainArgs, train
from lingua.args import parse_args
from lingua.launch import validate_environment

LOOKS = [
    "is_available",
    "device_count",
    "init",
    "_lazy_init",
    "current_device",
    "get_device_properties",
    "mem_get_info",
]

IMPORT = f"""
import torch, traceback
for name in {LOOKS}:
    def look(*args, name=name, real=getattr(torch.cuda, name)):
        traceback.print_stack()
        raise SystemExit("torch.cuda." + name)
    setattr(torch.cuda, name, look)
import apps.main.train, apps.main.eval, apps.main.generate
"""


def test_no_import_looks_at_a_device():
    """Training, evaluation and generation, each with all that it imports at its start."""
    result = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=False, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")


class Looked(Exception):
    pass


@pytest.mark.parametrize("look", ["is_available", "device_count"])
def test_variables_are_set_before_the_first_look(tiny, tmp_path, monkeypatch, look):
    variables = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "CUDA_VISIBLE_DEVICES": "1"}
    seen = {}

    def first_look(*_):
        seen.update({name: os.environ.get(name) for name in variables})
        raise Looked

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, look, first_look)
    settings = [f"env.{name}={value}" for name, value in variables.items()]
    args = parse_args(TrainArgs, [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", *settings])
    with mock.patch.dict(os.environ), pytest.raises(Looked):
        train(args)
    assert seen == variables


def test_a_variable_that_cannot_be_is_refused_before_it_is_set(tiny, tmp_path, monkeypatch):
    args = parse_args(TrainArgs, [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "env.HF_TOKEN=hunter2"])
    with mock.patch.dict(os.environ), pytest.raises(ValueError, match=r"^env\.HF_TOKEN: looks like a secret"):
        train(args)
    assert "HF_TOKEN" not in os.environ or os.environ["HF_TOKEN"] != "hunter2"


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_an_allocator_that_is_chosen_too_late_is_refused(monkeypatch, name):
    """torch 2.11 ends in an internal assertion (seen on an H100) where it is set after the import."""
    monkeypatch.delenv(name, raising=False)
    validate_environment({name: "expandable_segments:True,backend:native"})
    with pytest.raises(ValueError, match=rf"^env.{name}: backend:cudaMallocAsync is read when torch is imported"):
        validate_environment({name: "backend:cudaMallocAsync"})
    monkeypatch.setenv(name, "backend:cudaMallocAsync")
    validate_environment({name: "backend:cudaMallocAsync,release_lock_on_cudamalloc:True"})
