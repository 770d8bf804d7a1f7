"""What the tests of evaluation and generation share: a small checkpoint, and a world of facts to be asked about."""

import json
import random
from pathlib import Path

from apps.main.train import TrainArgs
from apps.main.transformer import LMTransformer, LMTransformerArgs
from lingua.args import to_dict
from lingua.checkpoint import CheckpointArgs, CheckpointManager
from lingua.data import DataArgs
from lingua.optim import OptimArgs, build_optimizer
from lingua.product_key.memory import ProductKeyArgs

TEXTS = ["short", "a longer document, of more than one row, " * 4, "", "naïve 日本"]
MEMORY = {"is_enabled": True, "layers": "0,1", "mem_n_keys": 8, "mem_knn": 4, "mem_k_dim": 8, "mem_heads": 2}


def small_model(seed=42, max_seqlen=24, **changes):
    """Two blocks, both with memories, that were never trained."""
    memory = ProductKeyArgs(**(MEMORY | changes.pop("memory", {})))
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "vocab_size": 258}
    return LMTransformer(
        LMTransformerArgs(**(sizes | changes), max_seqlen=max_seqlen, seed=seed, productkey_args=memory)
    ).eval()


def write_run(folder: Path, steps=(7,), max_seqlen=24) -> Path:
    """A dump_dir with data and checkpoints of models that were never trained, another one at each step."""
    source = folder / "data" / "words"
    source.mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (source / "words.chunk.00.jsonl").write_text(lines)
    (source / "words.val.jsonl").write_text(lines)
    memory = ProductKeyArgs(**MEMORY)
    sizes = LMTransformerArgs(
        dim=32, n_layers=2, n_heads=2, vocab_size=258, max_seqlen=max_seqlen, productkey_args=memory
    )
    data = DataArgs(root_dir=str(folder / "data"), sources={"words": 1.0}, batch_size=3, seq_len=max_seqlen)
    args = TrainArgs(dump_dir=str(folder), model=sizes, data=data)
    manager = CheckpointManager(CheckpointArgs(), folder / "checkpoints")
    for step in steps:
        model = small_model(seed=step, max_seqlen=max_seqlen)
        optimizer, _ = build_optimizer(model, OptimArgs(), 10)
        manager.save(step, model, optimizer, {"step": step, "data_loader_state": {}}, to_dict(args))
    return folder


# --- facts -----------------------------------------------------------------------------------------------------------

NAMES = ("Ada", "Bo", "Cy", "Dee", "Eli", "Fay", "Gus", "Hal", "Ivy", "Jo")
CITIES = ("Rome", "Oslo", "Lima", "Cairo", "Paris", "Tokyo", "Quito", "Bonn", "Kyiv", "Riga")

_TASKS = {
    "facts_gen": """output_type: generate_until
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: " {{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
""",
    "facts_choice": """output_type: multiple_choice
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "facts_text": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


def write_facts(folder: Path) -> tuple[Path, Path]:
    """(data, tasks): documents that tell where each of ten people lives, and lm-eval tasks that ask for it.

    The tasks' names are facts_gen (exact match of what is generated), facts_choice and facts_text.
    """
    data, tasks = folder / "data", folder / "tasks"
    (data / "facts").mkdir(parents=True)
    tasks.mkdir()
    facts = list(zip(NAMES, CITIES, strict=True))
    rng = random.Random(0)
    documents = [f"Q: Where does {name} live?\nA: {city}\n" for name, city in (rng.choice(facts) for _ in range(300))]
    lines = [json.dumps({"text": document}) + "\n" for document in documents]
    (data / "facts" / "facts.chunk.00.jsonl").write_text("".join(lines))
    (data / "facts" / "facts.val.jsonl").write_text("".join(lines[:30]))
    with open(tasks / "facts.jsonl", "w") as file:
        for number, (name, city) in enumerate(facts):
            question = f"Where does {name} live?"
            text = f"Q: {question}\nA: {city}\n" * (number + 1)
            line = {"question": question, "answer": city, "choices": CITIES, "gold": number, "text": text}
            file.write(json.dumps(line) + "\n")
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks / 'facts.jsonl'}}}}}\ntest_split: test\n"
    )
    for name, rest in _TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n{source}{rest}")
    return data, tasks


def facts_config(data: Path, dump_dir: Path) -> dict:
    """Training that learns all facts within seconds."""
    return {
        "dump_dir": str(dump_dir),
        "steps": 120,
        "data": {"root_dir": str(data), "sources": {"facts": 1.0}, "batch_size": 8, "seq_len": 96, "prefetch_size": 8},
        "optim": {"lr": 4e-3, "warmup": 10},
        "model": {
            "dim": 64,
            "n_layers": 3,
            "n_heads": 4,
            "n_kv_heads": 2,
            "multiple_of": 32,
            "productkey_args": MEMORY | {"layers": "1,2", "mem_n_keys": 16, "mem_k_dim": 16},
        },
        "distributed": {"model_dtype": "fp32"},
        "checkpoint": {"dump": {"every": 0}, "eval": {"every": 60}},
        "logging": {"freq": 1},
    }
