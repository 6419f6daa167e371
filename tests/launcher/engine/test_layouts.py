"""One step on from the same checkpoint at every layout: the same losses, whatever computes them."""

import shutil

import pytest

from tests.launcher.engine.runs import layout, losses, records, yuan

LAYOUTS = {
    "tp2": layout(tp=2),
    "tp2_sequence_parallel": layout(tp=2, sequence_parallel=True),
    "pp2": layout(pp=2),
    "pp2_uneven": layout(pp=2, decoder_first_pipeline_num_layers=1),
    "pp2_layout": layout(pp=2) + ["parallel.pipeline_model_parallel_layout=Etttt|L"],
    "pp2_interleaved": layout(pp=2, num_layers_per_virtual_pipeline_stage=1),
    "pp4": layout(pp=4),
    "tp2_pp2": layout(tp=2, pp=2, sequence_parallel=True),
    "dp2": layout(dp=2),
    "dp2_overlap": layout(dp=2, overlap_grad_reduce=True),
    "dp2_zero1": layout(dp=2, use_distributed_optimizer=True),
    "dp2_zero1_overlap": layout(dp=2, use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    "dp2_tp2_zero1": layout(dp=2, tp=2, use_distributed_optimizer=True),
}
NO_DROPOUT = ["model.attention_dropout=0", "model.hidden_dropout=0"]


def resumed(small, straight, name: str, source: str, words: list[str]) -> dict[int, float]:
    """The run `source`, cut at its checkpoint of step 4, gone on with in a copy."""
    runs = small / "runs"
    shutil.copytree(runs / source, runs / name)
    shutil.rmtree(runs / name / "checkpoints" / "iter_0000008")
    (runs / name / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("4")
    done = yuan(small, "pretrain", "recipe=small", f"run.name={name}", *words)
    assert "step 4" in done.stderr
    return losses(small, name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_goes_on_at_another_layout(small, straight, name):
    source = straight("plain", *layout(), *NO_DROPOUT)
    curve = losses(small, source)
    assert resumed(small, straight, f"to_{name}", source, LAYOUTS[name] + NO_DROPOUT) == pytest.approx(curve, abs=1e-4)
    before, after = (records(small / "runs" / run / "validation.jsonl")[-1]["lm_loss_validation"] for run in (source, f"to_{name}"))
    assert after == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize("name", ["pp2_interleaved", "tp2_pp2", "dp2_zero1_overlap"])
def test_and_back_to_one_process(small, straight, name):
    source = straight(f"from_{name}", *LAYOUTS[name], *NO_DROPOUT)
    assert resumed(small, straight, f"back_{name}", source, layout() + NO_DROPOUT) == pytest.approx(losses(small, source), abs=1e-4)


@pytest.mark.parametrize("recompute", [
    ["parallel.recompute_granularity=selective"],
    ["parallel.recompute_granularity=full", "parallel.recompute_method=uniform", "parallel.recompute_num_layers=1"],
    ["parallel.recompute_granularity=full", "parallel.recompute_method=block", "parallel.recompute_num_layers=2"],
])  # fmt: skip
def test_recomputing_changes_no_number_with_dropout(small, straight, recompute):
    curve = losses(small, straight("dropout"))
    name = "-".join(word.rsplit("=")[1] for word in recompute)
    assert losses(small, straight(name, *recompute)) == curve


@pytest.mark.parametrize("words", [layout(), layout(dp=2, use_distributed_optimizer=True)], ids=["plain", "zero1"])
def test_16_bit_precision_follows_fp32(small, straight, words):
    curve = losses(small, straight("plain", *layout(), *NO_DROPOUT))
    for precision in ("bf16", "fp16"):
        name = f"{precision}_{len(words)}"
        straight(name, *words, *NO_DROPOUT, f"training.precision={precision}", "training.initial_loss_scale=65536")
        assert losses(small, name) == pytest.approx(curve, abs=0.05)
        scales = {record["loss_scale"] for record in records(small / "runs" / name / "metrics.jsonl")}
        assert scales == ({65536.0} if precision == "fp16" else {1.0})


def test_fp16_skips_steps_that_overflow_and_lowers_the_scale(small, straight):
    name = straight("overflow", *layout(), *NO_DROPOUT, "training.precision=fp16", "training.hysteresis=1")
    record = records(small / "runs" / name / "metrics.jsonl")
    assert record[0]["skipped_iterations"] == 1 and record[0]["grad_norm"] is None and record[0]["learning_rate"] == 0.0
    assert record[1]["loss_scale"] == record[0]["loss_scale"] / 2


def test_fp16_with_a_fixed_scale_that_overflows_fails(small):
    words = ["recipe=small", "run.name=fixed", *layout(), "training.precision=fp16", "training.loss_scale=1e9"]
    done = yuan(small, "pretrain", *words, check=False)
    assert done.returncode not in (0, 2) and "training.loss_scale=1e+09" in done.stderr
    assert not list((small / "runs" / "fixed" / "checkpoints").glob("iter_*"))
