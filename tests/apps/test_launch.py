"""Several ranks as users launch them: on two nodes, started again by torchrun, and what is left where one is lost."""

import re
import signal
import socket

import psutil
import pytest

from lingua.checkpoint import find_damage
from tests.helpers.training import (
    Training,
    finish_command,
    free_port,
    last_step,
    list_steps,
    read_losses,
    read_metrics,
    start_command,
    start_ranks,
    wait_until,
)

STEPS = 20
# Seconds, of distributed.timeout, for the runs in which a rank hangs.
TIMEOUT = 5

# What torch says by itself where a sign of life is given in the milliseconds between the end of the rank that kept the
# store and the moment at which the giver finds it lost.
SIGN_INTO_NOTHING = re.compile(
    r"^\[rank\d\]:\[W.*TCPStore.*\nException raised from.*\n((frame #|<omitting python frames>).*\n)*\n?",
    re.MULTILINE,
)


@pytest.fixture
def run(tiny, tmp_path):
    """Arguments of a run: `run(*key_values)`."""
    return lambda *arguments: [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", f"steps={STEPS}", *arguments]


@pytest.fixture
def start_group(tmp_path):
    """`start_group(n_ranks, argv)`, of which nothing outlives the test: a rank that hangs would."""
    started = []

    def start(n_ranks, argv):
        started.extend(ranks := start_ranks(n_ranks, argv, tmp_path))
        return ranks

    yield start
    for rank in started:
        rank.kill()
        rank.process.join()


@pytest.fixture
def torchrun():
    """`torchrun(*options, argv)`: an agent of its own, of which nothing outlives the test."""
    agents = []

    def start(*options, argv):
        agents.append(start_command(["torch.distributed.run", *options, "-m", "apps.main.train", *argv]))
        return agents[-1]

    yield start
    for agent in agents:
        if agent.poll() is None:
            for process in (*psutil.Process(agent.pid).children(recursive=True), agent):
                process.kill()
            agent.communicate()


def test_two_nodes(run, torchrun, pair, tmp_path):
    """An agent on each; they agree on the ranks where they meet."""
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "7"]
    agents = [
        torchrun("--nnodes", 2, "--node-rank", node, "--nproc-per-node", 1, *meeting, argv=run()) for node in (0, 1)
    ]
    results = [finish_command(agent) for agent in agents]
    assert sum(f"done: {STEPS} steps" in result.ok().out for result in results) == 1
    assert read_losses(tmp_path / "run") == read_losses(pair)
    assert list_steps(tmp_path / "run") == list_steps(pair)


def test_started_again_by_torchrun(run, torchrun, pair, tmp_path):
    """The rank that writes most of the files is killed: torchrun starts both anew, in a run that goes on."""
    agent = torchrun("--standalone", "--nproc-per-node", 2, "--max-restarts", 2, argv=run())
    wait_until(lambda: agent.poll() is not None or last_step(tmp_path / "run") >= 7)
    (first,) = [rank for rank in psutil.Process(agent.pid).children() if rank.environ().get("RANK") == "0"]
    first.kill()
    starts = re.findall(r"starting at step (\d+) of", finish_command(agent).ok().out)
    assert starts[0] == "0"
    assert len(starts) == 2
    assert int(starts[1]) in list_steps(tmp_path / "run")
    assert read_losses(tmp_path / "run") == read_losses(pair)
    assert list_steps(tmp_path / "run") == list_steps(pair)


def test_interrupted_from_the_keyboard(run, torchrun, tmp_path):
    """torchrun passes Ctrl-C on to all ranks, whose last step is saved; the traceback is torchrun's own."""
    argv = run("steps=100000", "checkpoint.dump.every=100000")
    agent = torchrun("--standalone", "--nproc-per-node", 2, argv=argv)
    wait_until(lambda: agent.poll() is not None or last_step(tmp_path / "run") >= 3)
    agent.send_signal(signal.SIGINT)
    result = finish_command(agent)
    stopped = last_step(tmp_path / "run")
    assert list_steps(tmp_path / "run") == [stopped]
    assert result.out.count("Ctrl-C: ending after this step") == 1
    assert f"stopped after step {stopped} by SIGINT" in result.out
    assert "apps/main" not in result.err


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGSTOP])
def test_lost_rank(run, start_group, pair, tmp_path, ending):
    """The other one says so and ends; the checkpoints stay, and the run goes on from the newest."""
    argv = run(f"distributed.timeout={TIMEOUT}")
    first, second = start_group(2, argv)
    assert first.wait_for(lambda: last_step(tmp_path / "run") >= 7)
    second.kill(ending)
    assert_tells(first, "rank 1")
    second.kill()
    second.finish()

    *_, newest = steps = list_steps(tmp_path / "run")
    assert steps == list(range(5, newest + 5, 5))
    assert find_damage(tmp_path / "run" / "checkpoints" / f"{newest:010d}") is None
    results = [rank.finish().ok() for rank in start_group(2, argv)]
    assert f"starting at step {newest} of {STEPS}" in results[0].out
    assert read_losses(tmp_path / "run") == read_losses(pair)


@pytest.mark.parametrize(
    ("lost", "ending", "named"),
    [
        (1, signal.SIGSTOP, "rank 1"),
        # This one keeps the store, at which the others could have asked for each other.
        (0, signal.SIGSTOP, "rank 0"),
        (0, signal.SIGKILL, "(rank 0|another rank)"),
    ],
)
def test_lost_rank_of_three(run, start_group, tmp_path, lost, ending, named):
    ranks = start_group(3, run(f"distributed.timeout={TIMEOUT}", "steps=100000", "checkpoint.dump.every=0"))
    assert ranks[0].wait_for(lambda: last_step(tmp_path / "run") >= 3)
    ranks.pop(lost).kill(ending)
    for rank in ranks:
        assert_tells(rank, named, store_is_gone=(lost, ending) == (0, signal.SIGKILL))


@pytest.mark.parametrize(
    ("layout", "ending"),
    [("distributed.fsdp_type=full_shard", signal.SIGKILL), ("distributed.memory_parallel_size=2", signal.SIGSTOP)],
)
def test_lost_rank_within_a_step(run, start_group, tmp_path, layout, ending):
    """In a forward or backward pass: the first step is of so many batches that it is not over by then."""
    long_step = ["grad_acc_steps=400", "logging.acc_freq=20"]
    first, second = start_group(2, run(layout, *long_step, f"distributed.timeout={TIMEOUT}"))
    file = tmp_path / "run" / "metrics.jsonl"
    assert first.wait_for(lambda: file.exists() and file.read_text().endswith("\n"))
    second.kill(ending)
    assert_tells(first, "rank 1")
    assert {line["global_step"] for line in read_metrics(tmp_path / "run")} == {0}


def test_ended_while_it_waits_for_the_others(run, tmp_path):
    """As torchrun ends those that have come, where one of them could not; else it would wait for them, too."""
    port = free_port()
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rank = Training(run(), tmp_path, **launch)
    assert rank.wait_for(lambda: is_open(port))
    rank.kill(signal.SIGTERM)
    result = rank.finish()
    assert result.code != 0
    assert result.err == ""
    assert not (tmp_path / "run").exists()


def test_ranks_that_do_not_meet(run, tmp_path):
    """One line tells that not all of them came."""
    launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    rank = Training(run("distributed.timeout=2"), tmp_path, **launch, MASTER_PORT=str(free_port()))
    error = rank.finish().the_error()
    assert error.startswith("error: the 2 ranks have not met within 2 s (distributed.timeout)")
    assert not (tmp_path / "run").exists()


def is_open(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def assert_tells(rank, named, store_is_gone=False):
    result = rank.finish()
    if store_is_gone:
        result.err = SIGN_INTO_NOTHING.sub("", result.err)
    assert result.code == 1
    assert re.match(rf"error: lost {named}( \(.*\))?: ", result.the_error())
