"""What an import of the library leaves in the process: nothing that another program in it would notice, and no module
that it can do without. torch alone takes 2 seconds.
"""

import json
import subprocess
import sys

# Prints what each group of modules that it is given changes when it is imported, and what is loaded then. torch and
# OmegaConf are imported before: what they set is theirs.
COMPARE = """
import gc, importlib, json, logging, os, signal, sys, threading, warnings
import torch
from omegaconf.basecontainer import BaseContainer
forks = []
os.register_at_fork = lambda **hooks: forks.append(str(hooks))

def state():
    return {
        "resolvers": dict(BaseContainer._resolvers),
        "environment": dict(os.environ),
        "signals": {str(number): signal.getsignal(number) for number in signal.Signals},
        "blocked": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "log": (logging.getLogger().handlers[:], logging.getLogger().level),
        "hooks": (sys.excepthook, threading.excepthook, warnings.showwarning),
        "warnings": warnings.filters[:],
        "threads": [thread.name for thread in threading.enumerate()],
        "collector": (gc.isenabled(), gc.get_threshold()),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()),
        "seed": (torch.initial_seed(), torch.get_rng_state().tolist()),
        "forks": forks[:],
    }

for modules in sys.argv[1:]:
    before = state()
    for module in modules.split():
        importlib.import_module(module)
    after = state()
    changed = [[name, str(before[name]), str(after[name])] for name in before if before[name] != after[name]]
    print(json.dumps([changed, list(sys.modules)]))
"""

LIBRARY = "args data distributed checkpoint optim probe shuffle_jobs stool"


def test_nothing_global_changes():
    layer, model = "lingua.product_key.memory", "apps.main.transformer"
    of_torch = "torch.distributed.tensor torch.distributed.checkpoint"
    library = " ".join(f"lingua.{name}" for name in LIBRARY.split())
    command = [sys.executable, "-c", COMPARE, layer, model, of_torch, library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.splitlines()
    (changed, _), (changed_by_model, modules_of_model), _, (changed_later, _) = map(json.loads, lines)
    assert changed == changed_by_model == changed_later == []
    # The layer, and a model, need nothing of a running job, nor torch's largest modules.
    of_a_job = {f"lingua.{name}" for name in ("args", "data", "distributed", "launch", "heartbeat")}
    assert not (of_a_job | {"torch.distributed.tensor", "torch._dynamo", "sympy"}) & set(modules_of_model)


# Programs and modules that do not compute with tensors.
WITHOUT_TORCH = (
    *("apps.capacity.people", "apps.main.config", "apps.plots.growth", "apps.plots.run", "lingua.data"),
    *("lingua.launch", "lingua.shuffle_jobs", "lingua.stool", "lingua.tokenizer", "setup.download_prepare_hf_data"),
)


def loaded_by(*modules: str) -> set[str]:
    """The modules that are loaded after `modules` are imported in a new process."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]; print(*sys.modules)"
    command = [sys.executable, "-c", code, *modules]
    return set(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split())


def test_programs_that_do_without_torch():
    assert "torch" not in loaded_by(*WITHOUT_TORCH)


# Runs the modules that it is given as programs, with a mistyped key.
MISTYPED = """
import runpy, sys
programs, sys.argv[1:] = sys.argv[1:], ["dump_dri=x"]
for program in programs:
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(program, end.code, "torch" in sys.modules)
"""


def test_mistyped_keys_are_reported_before_torch_is_imported():
    programs = [f"apps.main.{name}" for name in ("train", "eval", "generate", "plan")]
    result = subprocess.run([sys.executable, "-c", MISTYPED, *programs], capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines() == [f"{program} 1 False" for program in programs]
    assert result.stderr.count("error: dump_dri: unknown key") == len(programs) == len(result.stderr.splitlines())


def test_training_imports_evaluation_and_jobs_where_they_are_asked_for():
    loaded = loaded_by("apps.main.train")
    assert not {"apps.main.eval", "apps.main.generate", "lingua.stool"} & loaded
    assert not {name.partition(".")[0] for name in loaded} & {
        "datasets",
        "lm_eval",
        "submitit",
        "transformers",
        "wandb",
    }


def test_public_names():
    """`import lingua` loads nothing; each name loads what it needs."""
    code = "import lingua, sys; assert 'torch' not in sys.modules; "
    code += "from lingua import HashingMemory, LMTransformer, load_checkpoint; print(lingua.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(".") == 2
    done = subprocess.run([sys.executable, "-c", "import lingua; lingua.x"], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "AttributeError: module 'lingua' has no attribute 'x'"
