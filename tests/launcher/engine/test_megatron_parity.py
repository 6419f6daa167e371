"""Training against Megatron-LM itself: the curves that its pretrain_gpt.py printed for the same data and arguments."""

import json

import pytest

from tests.data_tools.samples import SHARED
from tests.launcher.engine.runs import layout, records, yuan

LAYOUTS = {
    "gpt_tp1": layout(),
    "gpt_tp2": layout(tp=2),
    "gpt_pp2": layout(pp=2),
    "gpt_dp2": layout(dp=2),
    "gpt_dp2_zero1": layout(dp=2, use_distributed_optimizer=True),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_curve_is_megatron_lms(reference, name):
    yuan(reference, "pretrain", "recipe=reference", f"run.name={name}", *LAYOUTS[name])
    curve = json.loads((SHARED / "reference" / "gpt_tiny_curves.json").read_text())["curves"][name]
    ours = records(reference / "runs" / name / "metrics.jsonl")
    assert [record["iteration"] for record in ours] == list(range(1, 21))
    for theirs, record in zip(curve["train"], ours, strict=True):
        assert record["lm_loss"] == pytest.approx(theirs["lm_loss"], abs=2e-5)
        assert record["grad_norm"] == pytest.approx(theirs["grad_norm"], abs=2e-3)
        assert record["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-6)
    validation = {f"{r['iteration']}" + {"validation": "", "final validation": "_validation", "test": "_test"}[r["set"]]: r["lm_loss_validation"]
                  for r in records(reference / "runs" / name / "validation.jsonl")}  # fmt: skip
    assert validation == pytest.approx(curve["validation"], abs=2e-5)
