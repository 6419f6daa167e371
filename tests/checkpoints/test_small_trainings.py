"""Trainings of one rank as Megatron-LM saves them: compared, inspected once converted, and refused where they are damaged."""

import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from checkpoints.formats.dialects import registered  # noqa: E402
from launcher.cli import app  # noqa: E402
from tests.checkpoints import rank_fixtures as fixtures  # noqa: E402
from tests.checkpoints.test_rank_files import CORE  # noqa: E402

FILE = "iter_0000002/mp_rank_00/model_optim_rng.pt"


def yuan(*words: object, code: int = 0) -> str:
    """What `yuan` said, its exit code being `code`; of an error its text."""
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == code, (done.output, done.exception)
    return done.output if isinstance(done.exception, (SystemExit, type(None))) else f"{type(done.exception).__name__}: {done.exception}"


def write(folder, ids=130, rows=fixtures.ROWS):
    """A training of fp32 weights with the plain optimizer, after two steps."""
    parts = fixtures.parts(2)
    random = torch.Generator().manual_seed(5)
    parts |= {name: torch.randn(rows, fixtures.H, generator=random).bfloat16() for name in ("embedding", "head")}
    args = CORE | {
        "vocab_size": ids, "padded_vocab_size": rows, "hidden_size": fixtures.H, "num_attention_heads": fixtures.HEADS, "kv_channels": fixtures.D,
        "use_distributed_optimizer": False,
    }  # fmt: skip
    fixtures.write(folder / "iter_0000002", parts, "core", 1, [list(range(fixtures.LAYERS))], False, args)
    content = torch.load(folder / FILE, weights_only=False)
    model = {name: one.float() for name, one in content["model"].items() if one is not None}
    model = {name: model[name] for name in registered(model)}
    decaying, others = ([name for name, one in model.items() if (one.dim() > 1) is several] for several in (True, False))
    moments = [{kind: torch.randn(model[name].shape, generator=random) for kind in ("exp_avg", "exp_avg_sq")} for name in (*decaying, *others)]
    content |= {
        "model": model, "iteration": 2, "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 16},
        "optimizer": {"state": {number: {"step": torch.tensor(2.0), **one} for number, one in enumerate(moments)}, "param_groups": [
            {"lr": 1e-3, "wd_mult": 1.0, "params": list(range(len(decaying)))},
            {"lr": 1e-3, "wd_mult": 0.0, "params": list(range(len(decaying), len(moments)))},
        ]},
    }  # fmt: skip
    torch.save(content, folder / FILE)
    (folder / "latest_checkpointed_iteration.txt").write_text("2")
    return folder


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    return write(tmp_path_factory.mktemp("training") / "run")


@pytest.fixture
def changed(training, tmp_path):
    def copied(change):
        shutil.copytree(training, tmp_path / "changed")
        content = torch.load(training / FILE, weights_only=False)
        change(content)
        torch.save(content, tmp_path / "changed" / FILE)
        return tmp_path / "changed"

    return copied


def test_rows_that_pad_a_table_are_no_damage(training, tmp_path):
    """The training goes along with all 132 rows, of which the weights alone have 130."""
    yuan("convert", training, tmp_path / "kept", "--optimizer", "keep")
    assert "problems   none" in yuan("inspect", tmp_path / "kept", "--deep")
    manifest = tmp_path / "kept" / "iter_0000002" / "conversion.json"
    text = manifest.read_text()
    for damaged, fault in ((text[:-40], "cannot be read"), ('{"tensors": []}', "tensors is no object"), ('{"tensors": {"x": 1}}', "x is no object")):
        manifest.write_text(damaged)
        assert fault in yuan("inspect", tmp_path / "kept", "--deep", code=1)
        assert fault in yuan("convert", tmp_path / "kept", tmp_path / "target", "--to", "hf", code=1)


def test_vocabularies_of_different_sizes_differ(training, tmp_path):
    said = yuan("convert", training, write(tmp_path / "larger", 200, 256), "--verify", code=1)
    assert "differs    vocab_size: 130 and 200" in said and "differs    embedding.word_embeddings.weight: [130, 16] and [200, 16]" in said


def test_only_where_none_was_saved_the_optimizer_need_not_be_compared(training, changed, tmp_path):
    said = yuan("convert", training, changed(lambda content: content.pop("optimizer")), "--verify")
    assert "optimizer  not compared: " in said and "33 the same bit for bit, 0 differ" in said
    shutil.rmtree(tmp_path / "changed")
    said = yuan("convert", training, changed(lambda content: content["optimizer"].update(state={})), "--verify", code=1)
    assert "optimizer  not compared: " in said and "holds no moments" in said and "33 the same bit for bit, 0 differ" in said


def itself(content):
    content["args"].me = content["args"]


@pytest.mark.parametrize("change, fault", [
    (lambda content: content.pop("iteration"), "does not say at which iteration"),
    (lambda content: content.update(iteration=[2]), "iteration is no number"),
    (lambda content: content["optimizer"].pop("param_groups"), "its optimizer has no param_groups"),
    (lambda content: content["optimizer"]["param_groups"][0].pop("params"), "its parameter groups have no params"),
    (lambda content: content["optimizer"]["state"].update({0: 7}), "exp_avg of embedding.word_embeddings.weight [132, 16] is missing"),
    (lambda content: [one.update(step="two") for one in content["optimizer"]["state"].values()], "the optimizer's step is no number"),
    (lambda content: content["optimizer"].update(grad_scaler=1), "its grad_scaler is no state of a loss scale"),
    (lambda content: content.update(opt_param_scheduler=3), "no optimizer's state with its schedule"),
    (itself, "holds itself"),
    (lambda content: vars(content["args"]).update(deep=Namespace(deeper=SimpleNamespace(me=content["args"]))), "holds itself"),
    (lambda content: vars(content["args"]).update({7: 7}), "a setting whose name is none"),
    (lambda content: content.update(rng_state=Namespace(a=1)), "its rng_state is none of random number generators"),
    (lambda content: content.update(optimizer=3), "its optimizer has no param_groups"),
    (lambda content: content.update(rng_state=[{"np_rng_state": torch.device("cpu")}]), "its rng_state is none of random number generators"),
    (lambda content: vars(content["args"]).update(large=torch.zeros(1).expand(10**6, 10**6)), "of more numbers than it has bytes for"),
    (lambda content: vars(content["args"]).update(large=torch.zeros(2 * 10**5).as_strided((10**5, 10**5), (1, 1))), "of more numbers than it has bytes for"),
])  # fmt: skip
def test_damaged_and_hostile_files_are_told(changed, tmp_path, change, fault):
    said = yuan("convert", changed(change), tmp_path / "target", "--to", "torch", "--optimizer", "keep", code=1)
    assert said.startswith("UserError") and fault in said and not (tmp_path / "target").exists()


def test_random_numbers_of_some_ranks_alone(training, tmp_path):
    yuan("convert", training, tmp_path / "two", "--to", "torch", "--tp", 2, "--optimizer", "keep")
    path = tmp_path / "two" / FILE
    content = torch.load(path, weights_only=False)
    torch.save(content | {"rng_state": [{"torch_rng_state": torch.get_rng_state()}]}, path)
    for words in (["--tp", 2], []):
        said = yuan("convert", tmp_path / "two", tmp_path / "target", "--to", "torch", *words, "--optimizer", "keep", code=1)
        assert said.startswith("UserError") and "random numbers' states of 1 ranks, and the layout is PP 1 x TP 2" in said
