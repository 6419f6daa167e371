"""`yuan recipes`: what it lists, that what it shows can be saved, and that a copy never overwrites."""

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import UserError
from launcher.recipe import load
from launcher.recipe.find import package_folder
from launcher.recipe.keys import table


@pytest.fixture
def yuan(tmp_path, monkeypatch):
    """yuan(*words) → what it printed; the current folder is empty, and so is the config folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("YUAN_CONFIG_DIR", str(tmp_path / "config"))

    def run(*words: str) -> str:
        return CliRunner().invoke(app, ["recipes", *words], catch_exceptions=False).stdout

    return run


def test_list_has_every_recipe_once_under_its_verb_within_a_terminal(yuan, tmp_path):
    lines = yuan("list").splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(rows) == sorted(path.stem for path in package_folder().glob("*.yaml"))
    headings = [line.split()[0] for line in lines if not line.startswith("  ")]
    assert headings == ["preprocess", "pretrain", "sft", "convert", "generate", "serve"]
    assert [row for row in rows if row.endswith("b")][:3] == ["llama2_7b", "llama2_13b", "llama2_70b"]
    assert "  345m_1dp    GPT-2 345M, one process" in lines


def test_list_has_ones_own_recipes_with_their_files(yuan, tmp_path):
    (tmp_path / "recipes" / "folder.yaml").mkdir(parents=True)
    (tmp_path / "recipes" / "link.yaml").symlink_to("gone")  # what is no recipe is none
    (tmp_path / "recipes" / "quickstart.yaml").write_text("# My own\n#   yuan pretrain recipe=quickstart\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "night.yaml").write_text("run: {}\n")
    lines = yuan("list").splitlines()
    assert lines[-2] == "other" and lines[-1].split()[0] == "night" and "config/night.yaml)" in lines[-1]
    (row,) = [line for line in lines if "quickstart " in line]
    assert row.split(maxsplit=1)[1] == "My own  (./recipes/quickstart.yaml)"
    assert lines.index("pretrain") < lines.index(row) < next(i for i, line in enumerate(lines) if line.startswith("sft"))
    assert [line.split()[0] for line in yuan("list", "night").splitlines()] == ["other", "night"]


@pytest.mark.parametrize("more", [[], ["--all"]])
@pytest.mark.parametrize("name", ["345m_4dp", "quickstart", "generate"])
def test_what_show_prints_is_a_recipe_with_the_same_values(yuan, tmp_path, name, more):
    words = ["optimizer.lr=1e-5", "data.data_path=[0.3, 'a b', 0.7, c]", "run.name='007'"]
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "saved.yaml").write_text(yuan("show", name, *words, *more))
    again, first = load(["recipe=saved"]), load([f"recipe={name}", *words])
    assert again.recipe == first.recipe


def test_show_says_where_each_value_came_from(yuan):
    lines = [line.split() for line in yuan("show", "recipe=345m_1dp", "training.seed=7", "launch.device=cpu").splitlines()]
    assert "seed: 7 # command line".split() in lines
    assert "num_layers: 24 # recipes/345m.yaml".split() in lines
    assert "# ffn_hidden_size: 4096 # derived".split() in lines
    assert any(line[:2] == ["precision:", "fp32"] and "${on_gpu:fp16,fp32}" in line for line in lines)
    assert not any("default" in line for line in lines)
    everything = yuan("show", "345m_1dp", "--all")
    assert all(f" {name.split('.')[1]}: " in everything for name in table() if not name.startswith("derived."))


def test_copy_makes_a_recipe_that_hides_the_packaged_one_and_never_overwrites(yuan, tmp_path):
    yuan("copy", "345m_1dp")
    copied = tmp_path / "recipes" / "345m_1dp.yaml"
    assert copied.read_text() == (package_folder() / "345m_1dp.yaml").read_text()
    copied.write_text(copied.read_text() + "training: {seed: 3}\n")
    assert load(["recipe=345m_1dp"]).recipe.training.seed == 3
    for words in (["quickstart", "recipes/345m_1dp.yaml"], ["345m_1dp"]):
        with pytest.raises(UserError, match="already"):
            yuan("copy", *words)
    assert "seed: 3" in copied.read_text()
    yuan("copy", "quickstart", "recipes/345m_1dp.yaml", "--force")
    assert copied.read_text() == (package_folder() / "quickstart.yaml").read_text()


def test_a_copy_by_a_bare_name_is_a_recipe_of_that_name(yuan, tmp_path):
    yuan("copy", "quickstart", "mine")
    assert (tmp_path / "recipes" / "mine.yaml").is_file() and not (tmp_path / "mine").exists()
    assert load(["recipe=mine"]).recipe.training.seq_length == 128
    yuan("copy", "quickstart", "elsewhere/mine")
    yuan("copy", "quickstart", "mine.yaml")
    assert (tmp_path / "elsewhere" / "mine.yaml").is_file() and (tmp_path / "mine.yaml").is_file()


def test_a_copy_of_a_recipe_finds_its_bases_and_a_copied_base_is_found_first(yuan, tmp_path):
    packaged = load(["recipe=llama2_70b"]).recipe
    yuan("copy", "llama2_70b")
    assert load(["recipe=llama2_70b"]).recipe == packaged
    yuan("copy", "bases/llama2_70b")
    base = tmp_path / "recipes" / "bases" / "llama2_70b.yaml"
    base.write_text(base.read_text().replace("num_layers: 80", "num_layers: 8"))
    assert load(["recipe=llama2_70b"]).recipe.model.num_layers == 8
    assert load(["recipe=serve_llama2_70b"]).sources["model.num_layers"] == "recipes/bases/llama2_70b.yaml"


def test_keys_documents_a_group_or_one_key(yuan):
    assert yuan("keys").count("\n") == 2 * len(table())
    launch = yuan("keys", "launch").splitlines()
    assert launch[0] == "launch.kind  (one of torchrun, slurm, default torchrun)"
    assert yuan("keys", "training.seed").splitlines()[0] == "training.seed  (a whole number, default 1234)"
    with pytest.raises(UserError, match="trainin") as raised:
        yuan("keys", "trainin")
    assert "training" in raised.value.fix
