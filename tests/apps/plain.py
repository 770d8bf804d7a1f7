"""Training in a loop of a few lines, for what the real one must equal."""

import contextlib

import torch

from apps.main.train import TrainArgs, validate_train_args
from apps.main.transformer import LMTransformer
from lingua.args import parse_args
from lingua.data import build_dataloader_from_args, init_dataloader_state_from_args
from lingua.distributed import World
from lingua.optim import build_optimizer, clip_gradients


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
