"""A source with fewer documents than ranks: said before the first step, trained on by all."""

import json
import shutil

from tests.helpers.training import computed, last_step, start_ranks, write_corpus


def test_one_document_serves_two_ranks_and_resumes_exactly(tiny, tmp_path):
    root = write_corpus(tmp_path / "data")
    (root / "single").mkdir()
    (root / "single" / "x.chunk.0.jsonl").write_text(json.dumps({"text": "the only one there is"}) + "\n")
    settings = [f"config={tiny}", f"dump_dir={tmp_path / 'run'}", "steps=10"]
    settings += [f"data.root_dir={root}", "data.sources={alpha: 1, beta: 0, single: 1}"]

    def train() -> str:
        for rank in start_ranks(2, settings, tmp_path):
            rank.finish().ok()
        return (tmp_path / "run" / "train.log").read_text()

    log = train()
    line = "data.sources.single: not every one of 2 ranks has a document in its share, so all of the source is read by"
    assert log.count(f"{line} rank 1 too") == 1
    assert log.index(line) < log.index("starting at step 0")
    # From the checkpoint of step 5 it goes on as it did.
    expected = computed(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "0000000010")
    assert train().count(f"{line} rank 1 too") == 2
    assert last_step(tmp_path / "run") == 10
    assert computed(tmp_path / "run") == expected
