"""Where test processes are forked from: a server that has imported what they need, which takes seconds of computing."""

import multiprocessing

PROCESSES = multiprocessing.get_context("forkserver")
# The last one makes all that is there by then permanent (frozen.py).
PROCESSES.set_forkserver_preload(
    ["apps.main.train", "apps.main.train_eval", "apps.main.harness", "pytest", "torch._dynamo", "tests.helpers.frozen"]
)
