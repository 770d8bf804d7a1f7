"""Runs killed by SIGKILL at random moments go on, and compute what an uninterrupted run does, to the last bit.

LINGUA_KILLS=500 LINGUA_KILLS_SEED=7 pytest tests/apps/test_kills.py     # more of them, and others
"""

import os
import random
import signal
import time
from collections import Counter

import pytest

from tests.helpers.training import Hold, computed, list_steps, start_ranks

KILLS = int(os.environ.get("LINGUA_KILLS", "50"))
SEED = os.environ.get("LINGUA_KILLS_SEED", "0")
# Two ranks cost more.
N_KILLS = {1: KILLS - KILLS // 3, 2: KILLS // 3}

KINDS = ("loading", "saving", "saving", "training")

EVERY = 5  # steps between checkpoints


def newest_checkpoint(dump_dir):
    folder = dump_dir / "checkpoints"
    return max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0) if folder.is_dir() else 0


def pick_moment(rng, newest, n_steps):
    """(kind, pattern for Hold or a step): before which access to a file, or behind which step, the run is killed."""
    kind = rng.choice(KINDS)
    if kind == "loading" and not newest:
        kind = "saving"
    if kind == "training":
        return kind, min(newest + rng.randint(1, EVERY + 2), n_steps - 1)
    if kind == "loading":
        return kind, rf"open .*/{newest:010d}/{rng.choice(['checksums', r'[.]metadata', '__', 'train_state'])}"
    step = min(newest + EVERY * rng.randint(1, 2), n_steps)
    place = rf".*/\.{step:010d}\.tmp"
    begun = [rf"open {place}/{name}" for name in ("train_state", "params", "__", r"\.metadata", "checksums")]
    moments = [*begun, *begun, rf"os.rename {place}$", rf"os.rename {place}$"]
    if step > 2 * EVERY:
        moments.append(rf"os.rename .*/{step - 2 * EVERY:010d}$")  # which retention gives up for this one
    return kind, rng.choice(moments)


@pytest.mark.timeout(max(600, 30 * KILLS))
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_at_any_moment(tiny, reference, pair, tmp_path, n_ranks):
    """One run after another, each killed until it gets to its end; some of its starts save in the background."""
    whole, n_steps = {1: (reference, 60), 2: (pair, 20)}[n_ranks]
    rng = random.Random(f"{SEED} {n_ranks}")
    killed: Counter[str] = Counter()
    n_runs, complete = 0, True
    while not (complete and killed.total() >= N_KILLS[n_ranks]):
        n_runs += complete
        dump_dir = tmp_path / f"run.{n_runs}"
        newest = newest_checkpoint(dump_dir)
        argv = [f"config={tiny}", f"dump_dir={dump_dir}", f"steps={n_steps}", "checkpoint.dump.keep=2"]
        argv.append(f"checkpoint.save_async={rng.choice(['true', 'false'])}")
        kind, moment = pick_moment(rng, newest, n_steps)
        if killed.total() >= N_KILLS[n_ranks]:
            ranks = start_ranks(n_ranks, argv, tmp_path)
        else:
            ranks = start_and_kill(rng, n_ranks, argv, tmp_path, moment)
        results = [rank.finish() for rank in ranks]
        complete = -signal.SIGKILL not in [result.code for result in results]
        assert "passing over" not in results[0].out
        if newest == n_steps:  # killed behind all that matters
            assert f"all {n_steps} steps are done" in results[0].out
        elif complete or kind != "loading":
            assert f"starting at step {newest} of {n_steps}" in results[0].out
        if complete:
            assert [result.ok().err for result in results] == [""] * n_ranks
            assert computed(dump_dir) == computed(whole)
            assert newest == n_steps or list_steps(dump_dir) == [n_steps - EVERY, n_steps]
        else:
            killed[kind] += 1
    if N_KILLS[n_ranks] >= 4 * len(KINDS):
        assert min(killed[kind] for kind in KINDS) >= N_KILLS[n_ranks] // 10, killed


def start_and_kill(rng, n_ranks, argv, folder, moment):
    """At the moment, or a little past it; a run may come to its end before."""
    if isinstance(moment, int):
        ranks = start_ranks(n_ranks, argv, folder)
        ranks[0].wait_for(lambda: f"step: {moment}  " in ranks[0].out())
    else:
        (folder / "hold.reached").unlink(missing_ok=True)
        hold = Hold(folder / "hold", moment)
        ranks = start_ranks(n_ranks, argv, folder, **hold.variables)
        ranks[0].wait_for(hold.is_reached)
        if rng.random() < 0.5:
            hold.release()
    for rank in rng.sample(ranks, n_ranks):
        time.sleep(rng.uniform(0, 0.03))
        rank.kill()
    return ranks
