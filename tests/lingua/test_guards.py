"""Steps that are not finite: skipped on all ranks, to the bit; spikes."""

import contextlib

import torch
from layouts import LAYOUTS, MODELS, SEQ_LEN, VOCABULARY, build, here
from ranks import run_ranks

from lingua.distributed import local_part, reduce_sum
from lingua.guards import Guard, GuardArgs, seed_of_backward
from lingua.optim import OptimArgs, build_optimizer, clip_gradients

NAN, INF = float("nan"), float("inf")


# --- a bad step ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gradient_of(module, value):
    """What flows back through the output of `module` is `value` at one place."""

    def change(grad):
        spoilt = grad.clone()
        local_part(spoilt).view(-1)[3] = value
        return spoilt

    hook = module.register_forward_hook(lambda _module, _inputs, output: output.register_hook(change) and None)
    yield
    hook.remove()


@contextlib.contextmanager
def loss_of(model, value):
    hook = model.register_forward_hook(lambda _module, _inputs, loss: loss + value)
    yield
    hook.remove()


FAULTS = {
    "loss nan": lambda model: loss_of(model, NAN),
    "loss inf": lambda model: loss_of(model, INF),
    "gradient nan": lambda model: gradient_of(model.layers[1], NAN),
    "gradient inf": lambda model: gradient_of(model.layers[2], -INF),
    # Of the value table and of what lies before it.
    "memory's gradient nan": lambda model: gradient_of(model.layers[0].feed_forward, NAN),
}


class Trainer:
    """A step as apps/main/train.py does it, of two batches."""

    def __init__(self, model_name, value_update, layout):
        half = layout.get("model_dtype") == "bf16"
        self.model, self.reducer = build(MODELS[model_name], **layout)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
        rounding = "stochastic" if half and value_update == "sparse" else "nearest"
        args = OptimArgs(lr=0.1, warmup=0, value_update=value_update, value_rounding=rounding)
        self.optimizer, _ = build_optimizer(self.model, args, 10)
        self.guard, self.n_steps = Guard(GuardArgs(), self.model, here()), 0
        # Ranks of tensor parallelism work on the same tokens.
        self.random = torch.Generator().manual_seed(0 if "tp_size" in layout else here().rank)

    def step(self, fault=None):
        """`fault`: on rank 1. Returns what the guard says."""
        self.n_steps += 1
        with FAULTS[fault](self.model) if fault and here().rank == 1 else contextlib.nullcontext():
            losses = torch.zeros(())
            for last in (False, True):
                tokens = torch.randint(VOCABULARY, (2, SEQ_LEN), generator=self.random)
                self.reducer.begin(last=last)
                with self.autocast:
                    loss = self.model(tokens, tokens)
                (loss / 2).backward(seed_of_backward(loss))
                losses += loss.detach()
        self.reducer.finish()
        norms = clip_gradients(self.model, 1.0)
        self.optimizer.found_inf = self.guard.decide(self.n_steps, losses / 2, norms)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.guard.read()
        return self.guard.explain() if self.guard.hear(reduce_sum(self.guard.tell())) else []

    def state(self):
        """Copies of weights, moments and numbers of steps."""
        state = {}
        for name, parameter in self.model.named_parameters():
            state |= {name: parameter.detach()}
            state |= {f"{name} {key}": value for key, value in self.optimizer.state[parameter].items()}
        return {name: local_part(tensor).clone() for name, tensor in state.items()}


def spoil(every_case):
    """Of each case and fault: whether the bad step has changed anything on this rank, and what the guard says."""
    found = []
    for faults, *case in every_case:
        trainer, of_case = Trainer(*case), {}
        trainer.step()
        before = trainer.state()
        for fault in faults:
            lines = trainer.step(fault)
            now = trainer.state()
            of_case[fault] = [
                now.keys() == before.keys() and all(map(torch.equal, now.values(), before.values())),
                lines,
            ]
        assert trainer.step() == []
        after = trainer.state()
        assert all(tensor.isfinite().all() for tensor in after.values())
        assert after["norm.weight step"] == before["norm.weight step"] + 1
        assert not torch.equal(after["norm.weight"], before["norm.weight"])
        assert trainer.guard.skipped == len(faults)
        found.append(of_case)
    return found


def test_a_bad_step_of_one_rank_changes_nothing_on_any():
    """On every layout, with one model or another; with sparse updates where they go."""
    dense = [(list(FAULTS), list(MODELS)[n % 2], "dense", layout) for n, layout in enumerate(LAYOUTS[2].values())]
    sparse = [
        (list(FAULTS)[::2], "one table", "sparse", layout)
        for layout in ({}, {"memory_parallel_size": 2, "model_dtype": "bf16"})
    ]
    for of_rank in run_ranks(2, spoil, dense + sparse):
        for (_, model, _, layout), of_case in zip(dense + sparse, of_rank, strict=True):
            for fault, (is_same, lines) in of_case.items():
                what = f"{model}, {layout}, {fault}: {lines}"
                assert is_same, what
                (line,) = lines
                assert " is skipped" in line, what
                assert "rank 1 (" in line, what
                # Ranks of tensor parallelism give it to each other within the pass.
                assert "rank 0 (" not in line or "tp_size" in layout, what
                assert ("the loss is not finite" in line) == fault.startswith("loss"), what
