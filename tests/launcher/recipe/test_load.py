"""Composition: what wins, where a value came from, and every fault at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.errors import UserError
from launcher.recipe import device, load
from launcher.recipe.find import package_folder
from launcher.recipe.frozen import read_frozen, write_frozen
from launcher.recipe.keys import table
from launcher.recipe.schema import Recipe


def faults(*words: str, **more) -> list[UserError]:
    with pytest.raises(UserError) as raised:
        load(list(words), **more)
    return list(raised.value.each)


def test_later_layers_win_and_each_value_knows_its_source(write_recipe):
    write_recipe("a", "training: {seed: 1, seq_length: 8, micro_batch_size: 2}\nrun: {name: from-a}\n")
    write_recipe("b", "training:\n  seed: 2\n")
    write_recipe("c", "# C\nbase: [a, b]\nmodel:\n  num_layers: 3\n")
    loaded = load(
        ["recipe=c", "training.seq_length=16"], {"training.micro_batch_size": (4, "--micro"), "run.dir": (None, "--dir")}
    )
    training = loaded.recipe.training
    assert (training.seed, training.seq_length, training.micro_batch_size) == (2, 16, 4)
    assert (loaded.recipe.run.name, loaded.recipe.run.dir, loaded.name) == ("from-a", "runs/from-a", "c")
    wanted = {
        "training.seed": "./recipes/b.yaml",
        "training.seq_length": "command line",
        "training.micro_batch_size": "--micro",
        "run.name": "./recipes/a.yaml",
        "run.dir": "derived",
        "model.num_layers": "./recipes/c.yaml",
        "model.rotary_base": "default",
    }
    assert {key: loaded.sources[key] for key in wanted} == wanted
    assert loaded.sources.keys() == table().keys()


def test_folders_are_searched_in_order_and_a_path_works(write_recipe, tmp_path):
    config = tmp_path / "config"
    write_recipe("mine", "training: {seed: 1}\n", config)
    assert load(["recipe=mine"]).recipe.training.seed == 1
    write_recipe("mine", "training: {seed: 2}\n")
    assert load(["recipe=mine"]).recipe.training.seed == 2
    assert load([f"recipe={config / 'mine.yaml'}"]).recipe.training.seed == 1
    assert load(["recipe=345m_1dp"]).sources["model.num_layers"] == "recipes/345m.yaml"
    assert load([], default="mine").recipe.training.seed == 2


def test_a_users_recipe_builds_on_the_packaged_one_of_its_name(write_recipe):
    write_recipe("345m_1dp", "base: 345m_1dp\ntraining: {seed: 5}\n")
    loaded = load(["recipe=345m_1dp"])
    assert (loaded.recipe.training.seed, loaded.recipe.model.num_layers) == (5, 24)


def test_a_circle_of_bases_is_refused_with_its_chain(write_recipe):
    write_recipe("a", "base: b\n")
    write_recipe("b", "base: c\n")
    write_recipe("c", "base: a\n")
    (fault,) = faults("recipe=a")
    assert "./recipes/a.yaml → ./recipes/b.yaml → ./recipes/c.yaml → ./recipes/a.yaml" in fault.what


def test_all_faults_at_once_each_with_its_place(write_recipe):
    write_recipe(
        "a", "training:\n  seed: 1\n  train_itres: 3\n  seq_length: long\nmodle: {num_layers: 2}\nderived:\n  device: cpu\n"
    )
    found = faults(
        "recipe=a",
        "optimizer.lr=fast",
        "lr=3",
        "oops",
        "training=3",
        "data.data_path=[a",
        "run.name=${training.seed",
        "recipe=",
        "launch.device=gpu",
        "training.seed=null",
    )
    assert {(fault.what, fault.where) for fault in found} == {
        ("unknown key training.train_itres", "./recipes/a.yaml:3"),
        ("training.seq_length must be a whole number or null, not 'long'", "./recipes/a.yaml:4"),
        ("unknown group modle", "./recipes/a.yaml:5"),
        ("derived.device cannot be given", "./recipes/a.yaml:7"),
        ("optimizer.lr must be a number or null, not 'fast'", "command line"),
        ("unknown key lr", "command line"),
        ("'oops' is not key=value", "command line"),
        ("training is a group of keys, not a value", "command line"),
        ("the value of data.data_path cannot be read: [a", "command line"),
        ("the value of run.name cannot be read: ${training.seed", "command line"),
        ("'recipe=' is not key=value", "command line"),
        ("launch.device must be one of auto, cpu, cuda, not 'gpu'", "command line"),
        ("training.seed must be a whole number, not null", "command line"),
    }
    fixes = {fault.what: fault.fix for fault in found}
    assert "training.train_iters" in fixes["unknown key training.train_itres"]
    assert fixes["unknown key lr"] == "did you mean optimizer.lr?"


def test_a_key_given_twice_is_refused_with_both_lines(write_recipe):
    write_recipe("a", "training:\n  seed: 1\n  seq_length: 4\n  seed: 2\n")
    (fault,) = faults("recipe=a")
    assert fault.what == "training.seed is given twice, on lines 2 and 4"
    assert fault.where == "./recipes/a.yaml:4"


def test_a_key_given_twice_hides_nothing_of_its_file(write_recipe):
    write_recipe("a", "base: gone\ntraining:\n  seed: 1\n  sed: 4\n  seed: 2\noptimizer: {lr: fast}\n")
    assert [fault.what for fault in faults("recipe=a")] == [
        "training.seed is given twice, on lines 3 and 5",
        "no recipe is named 'gone'",
        "unknown key training.sed",
        "optimizer.lr must be a number or null, not 'fast'",
    ]


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("optimizer.lr_decay_style=cos", "did you mean optimizer.lr_decay_style=cosine?"),
        ("training.precision=BF16", "did you mean training.precision=bf16?"),
        ("training.precision=int4", "take one of fp32, bf16, fp16"),
        ("training.seed=1.5", "training.seed=1 or 2"),
        ("training.seed=null", "leave it out for the default, 1234"),
        ("training.seed=some", "digits alone, such as training.seed=8"),
        ("model.swiglu=perhaps", "model.swiglu=true or false"),
        ("training.rampup_batch_size=8", "such as training.rampup_batch_size=[1,2,3]"),
    ],
)
def test_a_wrong_type_is_told_with_a_right_value(write_recipe, word, fix):
    write_recipe("empty", "")
    (fault,) = faults("recipe=empty", word)
    assert fault.fix == fix


@pytest.mark.parametrize("word", ["ok", "recpie=ok", "recipes=ok", "Recipe=ok", "recipes/ok.yaml"])
def test_a_recipe_that_was_meant_is_named_and_its_other_faults_with_it(write_recipe, word):
    write_recipe("ok", "training: {sed: 2}\n")
    name = word.rpartition("=")[2]
    first, *others = faults(word, "training.train_itres=1")
    assert first.fix == f"did you mean recipe={name}?"
    assert [fault.what for fault in others] == ["unknown key training.sed", "unknown key training.train_itres"]


def test_without_a_recipe_the_words_are_looked_at_all_the_same():
    assert [fault.what for fault in faults("training.sed=1")] == ["no recipe is named", "unknown key training.sed"]


@pytest.mark.parametrize(("name", "near"), [("OK", "ok"), ("ok.yaml", "ok"), ("OKK", "ok"), ("Ok.yml", "ok"), ("big", "BIG")])
def test_recipes_of_nearly_that_name_are_named(write_recipe, name, near):
    write_recipe("ok", "")
    write_recipe("BIG", "")
    (fault,) = faults(f"recipe={name}")
    assert fault.fix.startswith(f"did you mean {near}? ")


def test_a_base_that_is_not_there_is_not_the_recipe_itself(write_recipe):
    write_recipe("mine", "base: minee\n")
    (fault,) = faults("recipe=mine")
    assert "mine?" not in fault.fix


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("training: ]\n", "not YAML"),
        ("- a\n", "a recipe is made of groups"),
        ("training: 3\n", "training is a group of keys"),
        ("run: {name: '${training.seed'}\n", "cannot be read: no viable alternative"),
        ("base: 345\n", "no recipe's name"),
        ("base: 345n\n", "no recipe is named '345n'"),
    ],
)
def test_a_broken_file_is_named(write_recipe, text, what):
    write_recipe("a", text)
    (fault,) = faults("recipe=a")
    assert what in fault.what and fault.where.startswith("./recipes/a.yaml") and fault.fix


def test_an_unknown_recipe_and_no_recipe_and_two_recipes():
    (fault,) = faults("recipe=345m_1d")
    assert "did you mean 345m_1dp" in fault.fix and "yuan recipes list" in fault.fix
    (fault,) = faults()
    assert "recipe=NAME" in fault.fix and "yuan recipes list" in fault.fix
    (fault,) = faults("recipe=345m_1dp", "recipe=quickstart")
    assert "345m_1dp and quickstart" in fault.what
    (fault,) = faults("recipe=nowhere/a.yaml")
    assert fault.what == "no recipe file nowhere/a.yaml"


@pytest.mark.parametrize(
    ("word", "key", "value"),
    [
        ("optimizer.lr=1e-4", "optimizer.lr", 1e-4),
        ("training.train_tokens=1e9", "training.train_tokens", 10**9),
        ("run.name=007", "run.name", "007"),
        ("run.name=true", "run.name", "true"),
        ("data.split=100", "data.split", "100"),
        ("data.data_path=a=b", "data.data_path", "a=b"),
        ("data.data_path=[0.7, a, 0.3, b]", "data.data_path", [0.7, "a", 0.3, "b"]),
        ("parallel.pipeline_model_parallel_layout=Et*3|t*3L", "parallel.pipeline_model_parallel_layout", "Et*3|t*3L"),
        ("training.rampup_batch_size=[1,2,3]", "training.rampup_batch_size", [1, 2, 3]),
        ("data.split=null", "data.split", None),
    ],
)
def test_values_of_the_command_line(write_recipe, word, key, value):
    write_recipe("empty", "")
    group, leaf = key.split(".")
    assert getattr(getattr(load(["recipe=empty", word]).recipe, group), leaf) == value


def test_another_length_of_training_puts_the_recipes_aside(write_recipe):
    write_recipe("a", "training: {train_iters: 5, seq_length: 10, micro_batch_size: 1}\noptimizer: {lr_decay_iters: 7}\n")
    loaded = load(["recipe=a", "training.train_tokens=100", "optimizer.lr_decay_tokens=50"])
    assert (loaded.recipe.training.train_iters, loaded.recipe.training.train_tokens) == (None, 100)
    assert (loaded.recipe.optimizer.lr_decay_iters, loaded.recipe.optimizer.lr_decay_samples) == (None, 5)
    write_recipe("b", "training: {train_iters: 5, train_tokens: 100}\n")
    both = load(["recipe=b"]).recipe.training
    assert (both.train_iters, both.train_tokens) == (5, 100)  # left for `check` to refuse


@pytest.mark.parametrize(
    ("where", "gpus", "precision"), [("auto", 1, "fp16"), ("auto", 0, "fp32"), ("cuda", 0, "fp16"), ("cpu", 1, "fp32")]
)
def test_a_value_may_depend_on_the_device(monkeypatch, where, gpus, precision):
    monkeypatch.setattr(device, "gpu_count", lambda: gpus)
    loaded = load(["recipe=345m_1dp", f"launch.device={where}"])
    assert loaded.recipe.training.precision == precision
    assert loaded.sources["training.precision"] == f"recipes/345m.yaml: ${{on_gpu:fp16,fp32}} on {loaded.recipe.derived.device}"
    assert loaded.recipe.launch.device == where


def test_an_expression_without_a_value_is_a_fault_with_its_key(write_recipe):
    write_recipe("a", "training:\n  seed: ${model.no_such}\n  precision: ${on_gpu:fp8,fp8}\n")
    assert [fault.what.split(":")[0] for fault in faults("recipe=a")] == ["training.seed", "training.precision"]


@pytest.mark.parametrize("name", sorted(path.stem for path in package_folder().glob("*.yaml")))
def test_a_packaged_recipe_loads_and_freezes(name, tmp_path):
    recipe = load([f"recipe={name}"]).recipe
    write_frozen(recipe, tmp_path / "recipe.yaml")
    assert read_frozen(tmp_path / "recipe.yaml") == recipe
    first = (package_folder() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and len(first) > 20


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.floats(1e-12, 1e3), st.text("abc/_.-=é 1", min_size=1).map(str.strip).filter(bool))
def test_any_value_survives_the_command_line_and_the_frozen_file(tmp_path_factory, seed, rate, prefix):
    recipe = load([f"training.seed={seed}", f"optimizer.lr={rate!r}", f'run.name="{prefix}"'], default="quickstart").recipe
    assert (recipe.training.seed, recipe.optimizer.lr, recipe.run.name) == (seed, rate, prefix)
    path = tmp_path_factory.mktemp("frozen") / "recipe.yaml"
    write_frozen(recipe, path)
    assert read_frozen(path) == recipe


def test_every_key_is_documented():
    assert [name for name, key in table().items() if len(key.doc) < 4] == []
    assert len(table()) == sum(len(vars(group)) for group in vars(Recipe()).values())
