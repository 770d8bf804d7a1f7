"""Training in a loop of a few lines, for what the real one must equal, on any layout of ranks."""

import contextlib

import pytest
import torch

from apps.main.train import TrainArgs, validate_train_args
from apps.main.transformer import LMTransformer
from lingua.args import parse_args
from lingua.checkpoint import load_model
from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from lingua.distributed import World
from lingua.optim import build_optimizer, clip_gradients
from tests.helpers.training import read_metrics

STEPS = 10  # of runs on several ranks
METRICS = ("loss/out", "optim/grad_norm", "optim/value_grad_norm")


def train_plainly(argv, n_ranks):
    """One process with all ranks' batches: (loss, gradient norm, the tables') of each step, and the model."""
    args = parse_args(TrainArgs, [str(argument) for argument in argv])
    validate_train_args(args, World(size=n_ranks))
    model = LMTransformer(args.model)
    optimizer, scheduler = build_optimizer(model, args.optim, args.steps)
    done = []
    with contextlib.ExitStack() as stack:
        states = [init_dataloader_state_from_args(args.data, rank, n_ranks) for rank in range(n_ranks)]
        loaders = [stack.enter_context(build_dataloader_from_args(args.data, state)) for state in states]
        for _ in range(args.steps):
            total = 0.0
            for _ in range(args.grad_acc_steps):
                batch = torch.cat([torch.from_numpy(next(loader)[0]) for loader in loaders])
                loss = model(batch[..., 0], batch[..., 1])
                (loss / args.grad_acc_steps).backward()
                total += loss.item() / args.grad_acc_steps
            grad_norm, value_grad_norm = clip_gradients(model, args.optim.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            done.append((total, grad_norm.item(), value_grad_norm.item()))
    return done, model


def load(dump_dir, step=STEPS):
    model = LMTransformer(parse_args(TrainArgs, [f"config={dump_dir / 'config.yaml'}"]).model)
    load_model(dump_dir / "checkpoints" / f"{step:010d}", model)
    return model


def assert_follows(dump_dir, expected):
    """That a run of STEPS steps computed what `train_plainly` did."""
    steps, expected_model = expected
    metrics = read_metrics(dump_dir)
    assert [line["global_step"] for line in metrics] == list(range(1, STEPS + 1))
    assert steps[-1][0] < 0.7 * steps[0][0], "it learns nothing, so it compares nothing"
    for line, values in zip(metrics, steps, strict=True):
        assert [line[name] for name in METRICS] == pytest.approx(values, rel=1e-4)
    model = load(dump_dir)
    for name, parameter in expected_model.named_parameters():
        close = {"rtol": 1e-4, "atol": 1e-6} if "values" in name else {"rtol": 1e-3, "atol": 1e-4}
        torch.testing.assert_close(model.get_parameter(name), parameter, **close)
