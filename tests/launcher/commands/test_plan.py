"""`yuan plan`: layouts that fit and pass, the words that ask for the best, and what is said where none does."""

import re
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import UserError
from launcher.recipe import load
from launcher.recipe.check_memory import memory
from launcher.recipe.estimate.change import RULES
from launcher.recipe.estimate.layouts import search, uneven_layout
from launcher.recipe.estimate.memory import BAND, GIB, stage_memory
from launcher.recipe.estimate.time import step
from launcher.recipe.pipeline import parse_layout
from launcher.recipe.problem import Case

BATCH = "training.global_batch_size=1024"


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """plan(*words) → (exit code, what it printed), in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["plan", *words], catch_exceptions=False)
        return result.exit_code, result.stdout

    return run


def best_words(text: str) -> list[str]:
    """The words after `best`, as a shell would read them."""
    found = re.search(r"^best(.*?)^\w", text, re.MULTILINE | re.DOTALL)
    return shlex.split(found.group(1))


def on_gpus(name: str, gpus: int, *words: str):
    """A recipe resolved for machines of 8 GPUs, as `yuan plan` does it."""
    machines = {"launch.nnodes": (gpus // 8, ""), "launch.nproc_per_node": (8, ""), "launch.device": ("cuda", "")}
    return load([f"recipe={name}", *words], machines)


@pytest.mark.parametrize("recipe", ["llama2_7b", "llama2_70b", "yuan2_51b", "yuan2_102b"])
def test_the_words_of_the_best_make_a_recipe_that_fits_and_passes(plan, recipe):
    code, text = plan(f"recipe={recipe}", BATCH, "--gpus", "64")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 110
    loaded = load([f"recipe={recipe}", BATCH, *best_words(text)])
    case = Case(loaded.recipe, loaded.sources)
    assert loaded.recipe.derived.world_size == 64
    assert [problem for rule in (*RULES, memory) for problem in rule(case) if problem.severity == "error"] == []
    rows = [line.split() for line in text.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    assert 1 < len(rows) <= 8
    p = loaded.recipe.parallel
    assert rows[0][:2] == [str(p.tensor_model_parallel_size), str(p.pipeline_model_parallel_size)]
    head = next(line for line in text.splitlines() if " time " in line)
    column = slice(0, head.index(" time ") + len(" time"))
    seconds = [float(line[column].split()[-1]) for line in text.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    assert len(seconds) == len(rows) and seconds == sorted(seconds) and seconds[0] == 1


def test_every_layout_found_is_valid_and_fits_and_none_is_said_twice():
    loaded = on_gpus("llama2_13b", 16, BATCH)
    found = search(loaded.recipe, loaded.sources)
    asked = [tuple(sorted(one.change.items(), key=str)) for one in found.fitting]
    assert len(set(asked)) == len(asked) > 50
    for one in found.fitting:
        case = Case(one.recipe, loaded.sources)
        assert not [problem for rule in RULES for problem in rule(case) if problem.severity == "error"]
        assert max(stage.total for stage in stage_memory(one.recipe)) == one.memory <= 80 * GIB * (1 - BAND)
        p = one.recipe.parallel
        assert p.tensor_model_parallel_size * p.pipeline_model_parallel_size * one.recipe.derived.data_parallel_size == 16
    assert [one.step.seconds for one in found.fitting] == sorted(one.step.seconds for one in found.fitting)
    assert found.broken["batch"] == 0 and found.too_large > 0


def test_the_time_is_the_one_of_yuan_check(plan):
    words = ["recipe=llama2_70b", BATCH]
    (said,) = re.findall(r"the training takes (.*?) at launch.mfu, 40% of", " ".join(plan(*words, "--gpus", "64")[1].split()))
    checked = CliRunner().invoke(app, ["check", *words, "--nodes", "8", "--gpus-per-node", "8"]).stdout
    assert f" FLOP in all: {said} on 64 at 40% of " in checked


def test_where_nothing_fits_it_tells_how_many_gpus_would_do(plan):
    code, text = plan("recipe=llama2_70b", BATCH, "--gpus", "8")
    assert code == 2
    needed = float(re.search(r"^nearest .* ([\d.]+) GiB$", text, re.MULTILINE).group(1))
    assert needed > 80 * (1 - BAND)
    gpus = re.search(r"^enough +(\d+) GPUs", text, re.MULTILINE).group(1)
    assert int(gpus) > 8
    assert plan("recipe=llama2_70b", BATCH, "--gpus", gpus)[0] == 0
    assert plan("recipe=llama2_70b", BATCH, "--gpus", str(int(gpus) // 2))[0] == 2


def test_what_is_missing_is_named_at_once(plan):
    with pytest.raises(UserError) as error:
        plan("recipe=quickstart", "training.global_batch_size=8")
    assert [one.what for one in error.value.each] == ["launch.gpu_memory_gib is not known", "derived.vocab_size is not known"]
    with pytest.raises(UserError, match="training.seq_length must be at least 1"):
        plan("recipe=llama2_7b", "training.seq_length=-1")
    with pytest.raises(UserError, match="12 GPUs make no whole machines of 8") as error:
        plan("recipe=llama2_7b", "--gpus", "12")
    assert error.value.fix == "--gpus 8 or 16, or --gpus-per-node 6 or 12"


@settings(max_examples=100, deadline=None)
@given(pp=st.integers(1, 40), more=st.integers(0, 100))
def test_uneven_stages_differ_by_one_layer_at_most(pp, more):
    layers = pp + more
    stages = parse_layout(uneven_layout(layers, pp))
    counts = [stage.count("t") for stage in stages]
    assert (len(stages), sum(counts)) == (pp, layers)
    assert stages[0][0] == "E" and stages[-1][-1] == "L"
    assert max(counts) - min(counts) <= 1 and counts[-1] == min(counts)


def test_the_layout_of_yuan_51b_is_the_published_one():
    published = load(["recipe=yuan2_51b"]).recipe.parallel.pipeline_model_parallel_layout
    assert [stage.count("t") for stage in parse_layout(uneven_layout(42, 16))] == [s.count("t") for s in parse_layout(published)]


def test_a_step_costs_what_its_layout_asks_for():
    """One cost at a time, against the plainest layout: each grows where it should, and the others stay away."""

    def parts(*words: str):
        return step(on_gpus("llama2_7b", 64, "training.global_batch_size=512", "training.micro_batch_size=1", *words).recipe)

    tp, pp = "parallel.tensor_model_parallel_size=", "parallel.pipeline_model_parallel_size="
    plain = parts(f"{tp}1", f"{pp}1", "parallel.sequence_parallel=false", "parallel.recompute_granularity=null")
    assert plain.bubble == plain.tensor == plain.pipeline == plain.recompute == 0 < plain.data
    two, four = (parts(f"{tp}1", f"{pp}{size}", "parallel.sequence_parallel=false") for size in (2, 4))
    assert 0 < two.bubble < four.bubble and two.data > four.data > 0 and two.pipeline > 0
    virtual = "parallel.num_layers_per_virtual_pipeline_stage=1"
    interleaved = parts(f"{tp}1", f"{pp}4", "parallel.sequence_parallel=false", virtual)
    assert interleaved.bubble == pytest.approx(four.bubble / 8) and interleaved.pipeline == pytest.approx(8 * four.pipeline)
    assert parts(f"{tp}8", f"{pp}1").tensor > parts(f"{tp}2", f"{pp}1").tensor > 0
    again = parts(f"{tp}1", f"{pp}1", "parallel.sequence_parallel=false", "parallel.recompute_granularity=full",
                  "parallel.recompute_method=uniform", "parallel.recompute_num_layers=1")  # fmt: skip
    assert again.recompute == pytest.approx(again.arithmetic / 3)


def test_zero_2_and_3_cost_what_they_gather_and_reduce():
    """8 micro-batches a step: 4 bytes of gradient and 2 of weight a number are moved once; 4 each time and 2 once; 4 and 2 x 2 each time."""
    words = ["training.global_batch_size=512", "training.micro_batch_size=1", "parallel.tensor_model_parallel_size=1"]
    one, two, three = (step(on_gpus("llama2_7b", 64, *words, f"parallel.zero={stage}").recipe).data for stage in (1, 2, 3))
    assert (two / one, three / one) == (pytest.approx(34 / 6), pytest.approx(64 / 6))


def test_zero_is_proposed_and_its_words_make_a_recipe_that_fits(plan):
    words = ["recipe=llama2_7b", BATCH, "launch.gpu_memory_gib=40"]
    loaded = on_gpus("llama2_7b", 8, *words[1:])
    assert {one.recipe.parallel.zero for one in search(loaded.recipe, loaded.sources).fitting} == {None, 2, 3}
    text = plan("recipe=yuan2_2b", "launch.gpu_memory_gib=16", "--gpus", "8")[1]
    assert "parallel.zero=3" in best_words(text)
    loaded = load(["recipe=yuan2_2b", "launch.gpu_memory_gib=16", *best_words(text)])
    case = Case(loaded.recipe, loaded.sources)
    assert [problem for rule in (*RULES, memory) for problem in rule(case) if problem.severity == "error"] == []


def test_what_offloading_needs_is_a_rule_of_the_search(plan):
    code, text = plan("recipe=llama2_7b", BATCH, "--gpus", "8", "optimizer.optimizer_cpu_offload=true")
    assert code == 0 and "offloading without what it needs" in " ".join(text.split())


def test_a_published_step_is_met():
    """Yuan 2.0 102B, TP 1 x PP 32, two layers of a stage recomputed: the paper (table 6) says 238 s a step on 96 chips
    and 101 s on 256, by a model of its authors that they say is within 3.2 % of what they measured."""
    for gpus, seconds in [(96, 238), (256, 101)]:
        r = on_gpus("yuan2_102b", gpus).recipe
        assert step(r).seconds == pytest.approx(seconds, rel=0.05)


def test_planning_needs_no_torch(tmp_path):
    code = "import sys; from launcher.commands.plan import plan; plan(['recipe=llama2_7b'], 8); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
