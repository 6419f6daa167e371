"""`--verify --logits`: what two checkpoints answer to the same prompts."""

import json
import re

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")

from checkpoints.convert import Wanted, convert, open_source  # noqa: E402
from checkpoints.formats.base import Derived  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from checkpoints.verify import compare  # noqa: E402
from launcher.cli import app  # noqa: E402
from launcher.commands import convert_logits  # noqa: E402
from launcher.errors import UserError  # noqa: E402
from launcher.recipe import load  # noqa: E402
from launcher.recipe.converted import source_fused  # noqa: E402
from launcher.workers.logits import _compared, _prompts  # noqa: E402
from tests.checkpoints import mindspore_fixtures  # noqa: E402
from tests.checkpoints import rank_fixtures as fixtures  # noqa: E402
from tests.checkpoints.test_rank_files import CORE  # noqa: E402


class Louder(Derived):
    """A model without tied tables whose every logit is twice as large."""

    def read(self, name: str) -> torch.Tensor:
        return self._source.read(name) * (2 if name == "decoder.final_layernorm.weight" else 1)


def test_one_file_per_rank_beside_a_folder_of_hugging_face(tmp_path):
    args = CORE | {"tensor_model_parallel_size": 2, "hidden_size": fixtures.H, "num_attention_heads": fixtures.HEADS, "kv_channels": fixtures.D}
    fixtures.write(tmp_path / "ours" / "release", fixtures.parts(2), "core", 2, [[0, 1], [2], [3, 4]], False, args)
    (tmp_path / "ours" / "latest_checkpointed_iteration.txt").write_text("release")
    weights = open_source(recognise(tmp_path / "ours"))
    convert(weights, tmp_path / "plain", Wanted("torch_dist"), lambda folder: None)
    convert(Louder(weights), tmp_path / "louder", Wanted("hf"), lambda folder: None)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"query": "1 2 3 4"}) + "\n" + json.dumps({"query": "9"}) + "\n")
    words = ["--verify", "--logits", "--input", str(tmp_path / "prompts.jsonl"), "launch.device=cpu", "launch.cpu_threads=1"]
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "plain"), str(tmp_path / "louder"), *words])
    assert done.exit_code == 1, (done.output, done.exception)
    assert "differs    decoder.final_layernorm.weight" in done.output and "likeliest  the same next token after 5 of 5" in done.output
    apart, spread = (float(re.search(pattern, done.output)[1]) for pattern in (r"apart +at most ([\d.e+-]+)", r"spread by ([\d.e+-]+)"))
    assert apart > spread > 0.1 and "beyond --tolerance 0.001" in done.output


def test_what_the_second_model_cannot_read_is_named(tmp_path):
    def recipe(positions: int, vocabulary: int):
        options = {"generate.input": (str(tmp_path / "prompts.jsonl"), "")}
        found = load([f"model.max_position_embeddings={positions}", "tokenizer.type=NullTokenizer", "tokenizer.vocab_size=99"], options, default="").recipe
        found.derived.vocab_size = vocabulary
        return found

    (tmp_path / "prompts.jsonl").write_text('{"query": "1 2 3 4"}\n\n{"query": "50"}\n')
    assert _prompts(recipe(8, 100), recipe(4, 51)) == [[1, 2, 3, 4], [50]]
    for second, line, fault in ((recipe(3, 60), 1, "4 tokens, up to id 4: the second model has 3 positions"), (recipe(4, 50), 3, "up to id 50: .* both have 50 ids")):
        with pytest.raises(UserError, match=fault) as told:
            _prompts(recipe(8, 100), second)
        assert told.value.where.endswith(f"prompts.jsonl:{line}")


def test_each_side_is_read_by_its_own_fused_layout(tmp_path, monkeypatch):
    whole, config = mindspore_fixtures.parts(), mindspore_fixtures.config(4, 4, 40)
    for layout in ("concat", "grouped"):
        mindspore_fixtures.write(tmp_path / layout, [mindspore_fixtures.rank(whole, layout, number, 2) for number in range(2)], config=config)
    given = []
    monkeypatch.setattr(convert_logits, "_run", given.append)
    words = ["--verify", "--logits", "--source-fused-layout", "concat", "--fused-layout", "grouped"]
    CliRunner().invoke(app, ["convert", str(tmp_path / "concat"), str(tmp_path / "grouped"), *words])
    sources = [open_source(recognise(tmp_path / layout), fused_layout=source_fused(recipe.convert)) for recipe, layout in zip(given[0], ("concat", "grouped"), strict=True)]
    assert {one.kind for one in compare(*sources)} == {"same"}


def test_what_is_told_of_two_models():
    first = [torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.5]])]
    second = [one.clone() for one in first]
    second[0][1] = torch.tensor([0.0, 0.5, 0.0])
    second[1][0, 2] = 0.25
    found = _compared([[5, 6], [7]], first, second)
    assert (found["tokens"], found["prompts"], found["largest"], found["agree"]) == (3, 2, 3.0, 2)
    assert found["mean"] == pytest.approx((3 + 0.5 + 0.25) / 9)
    assert found["most"] == {"prompt": 0, "ids": [5, 6], "place": 1, "likeliest": [0, 1]}


@pytest.mark.parametrize("words, fault", [
    (["--logits"], "of a comparison"), (["--verify", "--input", "x.jsonl"], "of a comparison"), (["--verify", "--logits", "--input", "x.jsonl"], "there is no file x.jsonl"),
])  # fmt: skip
def test_mistakes_are_told_at_once(tmp_path, words, fault, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["convert", "a", "b", *words])
    assert done.exit_code != 0 and fault in str(done.exception)
