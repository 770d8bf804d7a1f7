"""Runs killed by SIGKILL go on, and compute what an uninterrupted run does, to the last bit.

LINGUA_KILLS=500 LINGUA_KILLS_SEED=7 pytest --long tests/apps/test_kills.py     # more at random, and others
"""

import os
import random
import signal
import time

import pytest

from tests.helpers.training import Hold, computed, list_steps, start_ranks

KILLS = int(os.environ.get("LINGUA_KILLS", "50"))
SEED = os.environ.get("LINGUA_KILLS_SEED", "0")
# Two ranks cost more.
N_KILLS = {1: KILLS - KILLS // 3, 2: KILLS // 3}

EVERY = 5  # steps between checkpoints

# Patterns for Hold, by the newest checkpoint, the next one, and the one that retention gives up for that.
LOADING = [rf"open .*/{{newest:010d}}/{name}" for name in ("checksums", r"\.metadata", "__", "train_state")]
SAVING = [
    rf"open .*/\.{{step:010d}}\.tmp/{name}" for name in ("train_state", "params", "__", r"\.metadata", "checksums")
]
RENAMING = [r"os.rename .*/\.{step:010d}\.tmp$", r"os.rename .*/{given_up:010d}$"]
MOMENTS = [*LOADING, *SAVING, *RENAMING, "training"]


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_at_each_moment(tiny, reference, pair, tmp_path, n_ranks):
    """Each both of runs that save in the background and of runs that wait, the one on one rank, the other on two."""
    kills = [(moment, (number + n_ranks) % 2 == 0) for number, moment in enumerate(MOMENTS)]
    kill_and_compare(kills, n_ranks, tiny, reference, pair, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(max(600, 30 * KILLS))
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_killed_at_random_moments(tiny, reference, pair, tmp_path, n_ranks):
    rng = random.Random(f"{SEED} {n_ranks} kills")
    kills = [(rng.choice(MOMENTS), rng.random() < 0.5) for _ in range(N_KILLS[n_ranks])]
    kill_and_compare(kills, n_ranks, tiny, reference, pair, tmp_path)


def kill_and_compare(kills, n_ranks, tiny, reference, pair, folder):
    """One run after another, each killed and started again until it gets to its end, until all `kills` were made.

    Each is a moment and whether the run saves in the background. They come in any order: the first one that can be.
    """
    whole, n_steps = {1: (reference, 60), 2: (pair, 20)}[n_ranks]
    rng = random.Random(f"{SEED} {n_ranks}")
    rng.shuffle(kills)
    n_runs, complete = 0, True
    while kills or not complete:
        n_runs += complete
        dump_dir = folder / f"run.{n_runs}"
        newest = newest_checkpoint(dump_dir)
        moment, saves_async = kill = None, rng.random() < 0.5
        if kills and newest < n_steps:
            moment, saves_async = kill = next(
                (kill for kill in kills if is_possible(kill[0], newest)), ("training", saves_async)
            )
        argv = [f"config={tiny}", f"dump_dir={dump_dir}", f"steps={n_steps}", "checkpoint.dump.keep=2"]
        argv.append(f"checkpoint.save_async={str(saves_async).lower()}")
        if moment:
            ranks = start_and_kill(rng, n_ranks, argv, folder, moment, newest, n_steps)
        else:
            ranks = start_ranks(n_ranks, argv, folder)
        results = [rank.finish() for rank in ranks]
        complete = -signal.SIGKILL not in [result.code for result in results]
        if not complete and kill in kills:
            kills.remove(kill)
        assert "passing over" not in results[0].out
        if newest == n_steps:  # killed when all that matters was done
            assert f"all {n_steps} steps are done" in results[0].out
        elif complete or moment not in LOADING:
            assert f"starting at step {newest} of {n_steps}" in results[0].out
        if complete:
            assert [result.ok().err for result in results] == [""] * n_ranks
            assert computed(dump_dir) == computed(whole)
            assert newest == n_steps or list_steps(dump_dir) == [n_steps - EVERY, n_steps]


def newest_checkpoint(dump_dir):
    folder = dump_dir / "checkpoints"
    return max((int(name) for name in os.listdir(folder) if name.isdigit()), default=0) if folder.is_dir() else 0


def is_possible(moment, newest):
    """Whether there is a checkpoint to load, or one to give up."""
    return newest >= (EVERY if moment in LOADING else 2 * EVERY if "given_up" in moment else 0)


def start_and_kill(rng, n_ranks, argv, folder, moment, newest, n_steps):
    """At the moment, or a little later; by then a run may have come to its end."""
    if moment == "training":
        step = min(newest + rng.randint(1, EVERY + 2), n_steps - 1)
        ranks = start_ranks(n_ranks, argv, folder)
        ranks[0].wait_for(lambda: f"step: {step}  " in ranks[0].out())
    else:
        step = min(newest + EVERY * rng.randint(1, 2), n_steps)
        (folder / "hold.reached").unlink(missing_ok=True)
        hold = Hold(folder / "hold", moment.format(newest=newest, step=step, given_up=step - 2 * EVERY))
        ranks = start_ranks(n_ranks, argv, folder, **hold.variables)
        assert ranks[0].wait_for(hold.is_reached)
        if rng.random() < 0.5:
            hold.release()
    for rank in rng.sample(ranks, n_ranks):
        time.sleep(rng.uniform(0, 0.03))
        rank.kill()
    return ranks
