"""A memory of `model.memories` from the command line: training, resume, plan, export."""

import json

from tests.helpers.training import list_steps, read_losses, read_metrics, run_command

TOKENS = ["model.memories.tokens.layers='0,1'", "model.memories.tokens.n_slots=64", "model.productkey_args.layers='2'"]


def test_training_resumes_is_planned_and_not_exported(start, tiny, tmp_path):
    for folder, parts in (("whole", [20]), ("parts", [10, 20])):
        for steps in parts:
            options = [*TOKENS, "optim.scheduler=constant", "optim.value_update=sparse", f"steps={steps}"]
            assert start(tmp_path / folder, *options).finish().ok().err == ""
    losses = read_losses(tmp_path / "whole")
    assert losses == read_losses(tmp_path / "parts")
    assert sum(loss for _, loss in losses[-3:]) < sum(loss for _, loss in losses[:3]) - 1
    assert read_metrics(tmp_path / "whole")[-1]["pk/layer_0/ever_read"] > 0
    assert list_steps(tmp_path / "whole")[-1] == 20

    out = tmp_path / "plan.json"
    planned = run_command(["apps.main.plan", f"config={tiny}", *TOKENS, "model.vocab_size=258", f"out={out}"])
    assert planned.code == 0, planned.err
    assert json.loads(out.read_text())

    export = run_command(
        ["apps.main.hf", "export", f"ckpt_dir={tmp_path}/whole/checkpoints/0000000020", f"out_dir={tmp_path}/hf"]
    )
    assert export.code == 1
    assert "a model with model.memories.tokens has no Hugging Face format" in export.err
    assert not (tmp_path / "hf").exists()
