"""Faults within a training process: `Training(..., FAULT="gradient 1 6-8")`, of a kind, on a rank ("all"), at steps.

loss       is NaN
gradient   is NaN, at one place of what flows back through the second block
spike      the loss is higher by 100
weight     one is infinite behind the step
sleep      before the step
pause      of four seconds before it
skip       the optimizer is not asked in the step: what a bad step must be like
"""

import contextlib
import os
import time

import torch

from apps.main.train import Run
from lingua.distributed import local_part


def inject(fault: str) -> None:
    """Changes this process's `Run` where it is its rank's turn."""
    kind, rank, steps = fault.split()
    if rank not in ("all", os.environ.get("RANK", "0")):
        return
    first, _, last = steps.partition("-")
    train_step = Run.train_step

    def train_step_with_fault(self, batches):
        with contextlib.ExitStack() as stack:
            if int(first) <= self.step + 1 <= int(last or first):
                FAULTS[kind](self, stack)
            return train_step(self, batches)

    Run.train_step = train_step_with_fault


def loss(run, stack):
    stack.callback(run.model.register_forward_hook(lambda _model, _inputs, loss: loss * float("nan")).remove)


def spike(run, stack):
    stack.callback(run.model.register_forward_hook(lambda _model, _inputs, loss: loss + 100).remove)


def gradient(run, stack):
    def change(grad):
        changed = grad.clone()
        local_part(changed).view(-1)[0] = float("nan")
        return changed

    def watch(_block, _inputs, output):
        output.register_hook(change)

    stack.callback(run.model.layers[1].register_forward_hook(watch).remove)


def weight(run, stack):
    @torch.no_grad()
    def change():
        local_part(run.model.get_parameter("layers.1.attention.wq.weight")).view(-1)[5] = float("inf")

    stack.callback(change)


def skip(run, stack):
    step = run.optimizer.step
    run.optimizer.step = lambda: None
    stack.callback(setattr, run.optimizer, "step", step)


def sleep(run, stack):
    time.sleep(100_000)


def pause(run, stack):
    time.sleep(4)


FAULTS = {function.__name__: function for function in (loss, spike, gradient, weight, skip, sleep, pause)}
