"""A file per rank: read as the original tools write them, written as they read them, at any layout into any other format."""

import itertools
import json
import os
import re
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from checkpoints.convert import Wanted, convert, open_source  # noqa: E402
from checkpoints.folder import CheckpointError  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from tests.checkpoints import rank_fixtures as fixtures  # noqa: E402
from tests.checkpoints.rank_fixtures import HEADS, LAYERS, ROWS, YUAN, F, H  # noqa: E402

EVEN, BLOCKS = [[0, 1, 2, 3, 4]], [[0, 1], [2], [3, 4]]
INTERLEAVED = [[[0], [2, 3]], [[1], [4]]]
CORE = YUAN | {
    "ffn_hidden_size": F, "norm_epsilon": 1e-6, "position_embedding_type": "rope", "rotary_base": 10000, "swiglu": True, "normalization": "RMSNorm",
    "add_bias_linear": False, "untie_embeddings_and_output_weights": True, "vocab_size": 130, "group_query_attention": True, "num_query_groups": 2,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "vocab_size": ROWS, "hidden_size": H, "intermediate_size": F, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
}  # fmt: skip


def source(path: Path, **more):
    return open_source(recognise(path), **more)


def holds(found, whole: dict) -> bool:
    """Whether a source gives these tensors and no others, bit for bit; a table without the rows that pad it."""
    same = {one.name: torch.equal(found.read(one.name), whole[one.name][: one.shape[0]]) for one in found.tensors}
    return same.keys() == whole.keys() and all(same.values())


def write(folder: Path, found, to: str, **more):
    convert(found, folder, Wanted(to, **{"pipeline": len(more.get("stages", "1")), **more}), lambda weights: None)
    return folder


def loaded(path: Path):
    with torch.serialization.safe_globals([Namespace]):
        return torch.load(path, mmap=True, weights_only=True)


def equal(one, other) -> bool:
    """Whether two nested dictionaries hold the same tensors under the same names."""
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("tp, stages", [(1, EVEN), (4, EVEN), (1, BLOCKS), (2, BLOCKS)])
def test_yuan(tmp_path, tp, stages):
    model = fixtures.parts(yuan=True)
    fixtures.write(tmp_path / "release", model, "yuan", tp, stages, True, YUAN)
    found = source(tmp_path / "release")
    assert (found.format, found.model.family, found.model.norm_epsilon, found.model.vocab_size) == ("yuan", "yuan2", 1e-6, ROWS)
    assert holds(found, fixtures.expected(model, tied=True))
    written = write(tmp_path / "written", source(tmp_path / "release", vocab_size=ROWS), "yuan", tensor=tp, stages=[len(own) for own in stages])
    files = sorted((tmp_path / "release").glob("*/*.pt"))
    assert [path.relative_to(tmp_path / "release") for path in files] == sorted(p.relative_to(written / "release") for p in written.glob("*/*/*.pt"))
    for path in files:
        one, other = torch.load(path, weights_only=False), loaded(written / "release" / path.parent.name / path.name)
        table = other["model"]["language_model"].get("embedding") or other["model"].get("word_embeddings_for_head")
        assert len(table.get("word_embeddings", table)["weight"]) == 256 // tp if table else True  # 132 up to a multiple of 128
        for whole in (one, other):
            whole["model"]["language_model"].pop("embedding", None), whole["model"].pop("word_embeddings_for_head", None)
        assert equal(one["model"], other["model"])
        said = {key: getattr(other["args"], key) for key in YUAN if key != "layernorm_epsilon"}
        assert said == {key: YUAN[key] for key in said} and other["checkpoint_version"] == 3.0
        assert (other["args"].tensor_model_parallel_size, other["args"].pipeline_model_parallel_size) == (tp, len(stages))
        assert zipfile.ZipFile(written / "release" / path.parent.name / path.name).testzip() is None
        assert other["args"].add_position_embedding is False and other["args"].padded_vocab_size == 256


@pytest.mark.parametrize("release", ["v0.5", "v0.6"])
@pytest.mark.parametrize("groups", [HEADS, 2])
@pytest.mark.parametrize("tp, stages", [(1, EVEN), (2, BLOCKS)])
def test_pai(tmp_path, release, groups, tp, stages):
    model, root = fixtures.parts(groups), tmp_path / "pai"
    args = {"num_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS, "orig_vocab_size": ROWS, "padded_vocab_size": ROWS}
    fixtures.write(root / "release", model, release, tp, stages, False, args)
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    with pytest.raises(CheckpointError, match="norm_epsilon, max_position_embeddings, rotary_base") as refused:
        source(root)
    assert "--hf-config" in refused.value.fix
    (root / "config.json").write_text(json.dumps(LLAMA | {"num_key_value_heads": groups}))
    found = source(root)
    assert found.format == "pai" and holds(found, fixtures.expected(model, tied=False))
    if release == "v0.5":
        assert {"lm_head.weight", "word_embeddings_for_head.weight"} < found.left_out.keys()
    written = write(tmp_path / "written", found, "pai", tensor=tp, stages=[len(own) for own in stages], pai_release=release)
    for path in sorted((root / "release").glob("*/*.pt")):
        one, other = torch.load(path, weights_only=False)["model"], loaded(written / "release" / path.parent.name / path.name)["model"]
        junk = [name for name in ("lm_head", "word_embeddings_for_head") if release == "v0.5" and one.pop(name, None)]
        assert equal(one, other), junk
    assert json.loads((written / "config.json").read_text())["num_key_value_heads"] == groups
    (written / "config.json").unlink()
    assert source(written).model == found.model  # said by the settings too


@pytest.mark.parametrize("kind", ["core", "core with Transformer Engine"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp, stages", [(1, EVEN), (2, BLOCKS), (1, INTERLEAVED), (2, INTERLEAVED)])
def test_megatron_core(tmp_path, kind, tied, tp, stages):
    model = fixtures.parts(2)
    args = CORE | {"untie_embeddings_and_output_weights": not tied}
    fixtures.write(tmp_path / "release", model, kind, tp, stages, tied, args | {"tensor_model_parallel_size": tp})
    found = source(tmp_path / "release")
    assert found.format == "torch" and holds(found, fixtures.expected(model, tied))
    assert found.left_out["embedding.word_embeddings.weight[130:]"] == "2 rows that pad the vocabulary"
    assert ("output_layer.weight" in found.left_out) is (tied and stages is not EVEN)
    with pytest.raises(CheckpointError, match="--vocab-size"):
        fixtures.write(tmp_path / "unsaid" / "release", model, kind, tp, stages, tied, {key: args[key] for key in args if key != "vocab_size"})
        source(tmp_path / "unsaid" / "release")
    if stages is INTERLEAVED:
        return
    impl = "transformer_engine" if "Engine" in kind else "local"
    written = write(tmp_path / "written", found, "torch", tensor=tp, stages=[len(own) for own in stages], transformer_impl=impl)
    for path in sorted((tmp_path / "release").glob("*/*.pt")):
        one, other = torch.load(path, weights_only=False)["model"], loaded(written / "release" / path.parent.name / path.name)["model"]
        tables = {name: other.pop(name) for name in list(other) if name.endswith(("embeddings.weight", "output_layer.weight"))}
        assert {len(table) for table in tables.values()} <= {256 // tp}  # 130 ids, up to a multiple of 128 x TP
        assert one.keys() - tables.keys() <= other.keys()
        assert all(name.endswith("_extra_state") or torch.equal(one[name], tensor) for name, tensor in other.items())


def layouts():
    return itertools.cycle([(2, [1, 4]), (1, [5]), (2, [5]), (1, [0, 2, 3]), (2, [2, 0, 3])])


@pytest.mark.parametrize("family", ["llama", "yuan2"])
def test_every_format_into_every_other_at_any_layout(tmp_path, family):
    yuan = family == "yuan2"
    model = fixtures.parts(HEADS if yuan else 2, yuan)
    first = tmp_path / "first" / "release"
    fixtures.write(first, model, "yuan" if yuan else "v0.6", 1, BLOCKS, yuan, YUAN | {"norm_epsilon": 1e-6, "rotary_base": 10000})
    formats = [("hf", {}), ("torch_dist", {}), ("torch", {}), ("torch", {"transformer_impl": "transformer_engine"})]
    formats += [("yuan", {})] if yuan else [("pai", {}), ("pai", {"pai_release": "v0.5"}), ("mindspore", {"fused_layout": "grouped"})]
    layout, made = layouts(), []

    def into(name: str, found, number: int) -> Path:
        to, more = formats[number]
        tensor, stages = next(layout)
        return write(tmp_path / name, found, to, **more, **({} if to in ("hf", "torch_dist") else {"tensor": tensor, "stages": stages}))

    for number in range(len(formats)):
        made.append(into(f"{number}", source(first), number))
    for one, other in itertools.permutations(range(len(formats)), 2):
        again = source(into(f"{one} to {other}", source(made[one]), other))
        assert holds(again, fixtures.expected(model, tied=yuan)), (formats[one], formats[other])


# ---- what is refused -------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def change(path: Path, how) -> None:
    content = torch.load(path, weights_only=False)
    how(content)
    torch.save(content, path)


@pytest.fixture
def two_by_two(tmp_path):
    fixtures.write(tmp_path / "release", fixtures.parts(yuan=True), "yuan", 2, [[0, 1, 2], [3, 4]], True, YUAN)
    return tmp_path / "release"


def _rename(path):
    path.rename(path.with_name("model_optim_rng_2.pt"))


def _cut(path):
    path.write_bytes(path.read_bytes()[:-3000])


def _filter(content):
    content["model"]["language_model"]["encoder"]["layers.1.self_attention.lf_gate.conv1.bias"][3] += 1


def _lacking(content):
    del content["model"]["language_model"]["encoder"]["layers.0.mlp.dense_4h_to_h.weight"]


def _renamed(content):
    encoder = content["model"]["language_model"]["encoder"]
    encoder["layers.0.mlp.dense_4h_to_h.wieght"] = encoder.pop("layers.0.mlp.dense_4h_to_h.weight")


def _head(content):
    content["model"]["word_embeddings_for_head"]["weight"][0, 0] += 1


def _shape(content):
    encoder = content["model"]["language_model"]["encoder"]
    encoder["layers.0.mlp.dense_4h_to_h.weight"] = torch.zeros(H, 5).bfloat16()


def _nan(content):
    content["model"]["language_model"]["encoder"]["layers.0.mlp.dense_4h_to_h.weight"][0, 0] = float("nan")


def _two_parts(content):
    content["model0"] = content["model1"] = content.pop("model")


def _later(content):
    content["iteration"] = 500


def _old(content):
    content["checkpoint_version"] = 1.0
    encoder = content["model"]["language_model"]["encoder"]
    encoder["layers.0.self_attention.query_key_value.weight"] = encoder["layers.0.self_attention.dense.weight"]


DAMAGE = {
    "a rank's folder is missing": ("mp_rank_01_001", lambda p: p.unlink(), "no weights .* for mp_rank_01_001 of its 4 ranks"),
    "a file has another name": ("mp_rank_00_001", _rename, r"mp_rank_00_001 of its 4 ranks \(mp_rank_00_001 holds model_optim_rng_2.pt\)"),
    "a file is cut off": ("mp_rank_01_000", _cut, "mp_rank_01_000/model_optim_rng.pt is cut off"),
    "a filter differs between ranks": ("mp_rank_01_000", _filter, r"layers.1.*conv1.bias should be the same .* rank 1's is not rank 0's"),
    "a rank lacks a tensor": ("mp_rank_01_001", _lacking, "mp_rank_01_001 has no .*layers.0.mlp.dense_4h_to_h.weight"),
    "a tensor has another name": ("mp_rank_0*_001", _renamed, r"missing: .*layers.3.mlp.dense_4h_to_h.weight\s+not known: .*wieght"),
    "the head is no copy": ("mp_rank_00_001", _head, "word_embeddings_for_head.weight should be a copy of .*embedding.* and is not"),
    "shares differ in shape": ("mp_rank_01_000", _shape, r"layers.0.mlp.dense_4h_to_h.weight is not of one kind .*\[16, 12\].*\[16, 5\]"),
    "a rank is of another iteration": ("mp_rank_01_001", _later, "not of one checkpoint, they say iteration 1 and 500"),
    "a rank is interleaved": ("mp_rank_01_001", _two_parts, "not of one checkpoint, they hold 1 and 2 parts of the model"),
    "a share is NaN": ("mp_rank_01_001", _nan, "decoder.layers.3.mlp.linear_fc2.weight holds NaN .* --allow-nan"),
    "an old order": ("mp_rank_0*_000", _old, "checkpoint_version 1.0"),
    "code": ("mp_rank_01_001", lambda c: c.update(args=Evil()), "asks for posix.system, .* nothing of it was run"),
    "no model": ("mp_rank_01_001", lambda c: c.pop("model"), "mp_rank_01_001/model_optim_rng.pt holds no model, but args"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(two_by_two, monkeypatch, case):
    monkeypatch.chdir(two_by_two.parent)
    ranks, how, words = DAMAGE[case]
    for path in two_by_two.glob(f"{ranks}/*.pt"):
        how(path) if how in (_rename, _cut) or case.startswith("a rank's") else change(path, how)
    with pytest.raises(CheckpointError, match=words):
        write(two_by_two.parent / "written", source(two_by_two), "torch")
    assert not Path("written").exists() and not Path("executed").exists()


def test_stages_that_are_missing_at_the_end_are_told(tmp_path):
    fixtures.write(tmp_path / "release", fixtures.parts(2), "core", 1, BLOCKS, False, CORE | {"pipeline_model_parallel_size": 3})
    shutil.rmtree(tmp_path / "release" / "mp_rank_00_002")
    with pytest.raises(CheckpointError, match=r"missing: decoder.layers.3.(.|\n)*settings say TP 1 x PP 3, there are TP 1 x PP 2"):
        source(tmp_path / "release")
    shutil.rmtree(tmp_path / "release" / "mp_rank_00_001")
    with pytest.raises(CheckpointError, match="no weights .* for mp_rank_00_001 of its 2 ranks"):
        source(tmp_path / "release")


@pytest.mark.parametrize("dtype", [None, "fp32"])
def test_ranks_that_are_not_what_their_conversion_wrote(two_by_two, dtype):
    """A rank's file in another's place is a model as any; only the checksums tell."""
    written = write(two_by_two.parent / "written", source(two_by_two), "yuan", tensor=2) / "release"
    write(two_by_two.parent / "again", source(written), "torch", dtype=dtype)
    shutil.copy(written / "mp_rank_00" / "model_optim_rng.pt", written / "mp_rank_01")
    with pytest.raises(CheckpointError, match="embedding.word_embeddings.weight is not what conversion.json there says"):
        write(two_by_two.parent / "wrong", source(written), "torch", dtype=dtype)
    assert not (two_by_two.parent / "wrong").exists()


CONTRADICTIONS = {
    "two of four ranks": ({"tensor_model_parallel_size": 4}, 2, r"tensor_model_parallel_size 4, the files hold 2.*copy what is missing: mp_rank_02, mp_rank_03"),
    "ranks that nothing counts": ({}, 2, "kv_channels 4, the files hold 2"),
    "layers": ({"num_layers": 99}, 4, r"num_layers 99, the files hold 5 .*another layout or model: --hf-config FOLDER"),
    "ffn": ({"ffn_hidden_size": 48}, 4, "ffn_hidden_size 48, the files hold 24"),
    "vocabulary": ({"padded_vocab_size": 256}, 4, "padded_vocab_size 256, the files hold 132"),
    "stages, and no layers": ({"num_layers": None, "pipeline_model_parallel_size": 2}, 4, "pipeline_model_parallel_size 2, the files hold 1"),
}


@pytest.mark.parametrize("kind", ["yuan", "v0.6"])
@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_settings_that_contradict_the_tensors(tmp_path, kind, case):
    """Half of the ranks are a model too, of heads half as wide: only the settings tell."""
    args, ranks, words = CONTRADICTIONS[case]
    yuan, root = kind == "yuan", tmp_path / "release"
    fixtures.write(root, fixtures.parts(yuan=yuan), kind, 4, EVEN, yuan, YUAN | {"norm_epsilon": 1e-6, "rotary_base": 10000} | args)
    for rank in range(ranks, 4):
        shutil.rmtree(root / f"mp_rank_{rank:02d}")
    with pytest.raises(CheckpointError) as refused:
        source(root)
    assert re.search(words, f"{refused.value} | {refused.value.fix}")
    if kind == "v0.6" and ranks == 4:  # a config.json stands above settings
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_key_value_heads": HEADS}))
        assert holds(source(root), fixtures.expected(fixtures.parts(), tied=False))


def test_what_lies_beside_a_folder_that_is_no_checkpoints_is_not_its_own(tmp_path):
    args = YUAN | {"norm_epsilon": 1e-6, "rotary_base": 10000}
    for name in ("release", "mine"):
        fixtures.write(tmp_path / name, fixtures.parts(), "v0.6", 1, EVEN, False, args)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_key_value_heads": HEADS, "max_position_embeddings": 64}))
    found = {name: source(tmp_path / name) for name in ("release", "mine")}
    assert {name: one.model.max_position_embeddings for name, one in found.items()} == {"release": 64, "mine": 32}
    assert [len(one.companions) for one in found.values()] == [1, 0]


def test_layouts_that_cannot_be_are_refused(tmp_path):
    fixtures.write(tmp_path / "release", fixtures.parts(2), "v0.6", 1, EVEN, False, CORE)
    found = source(tmp_path / "release", vocab_size=ROWS)
    for wanted, words in (
        ({"tensor": 3}, "4 heads in 2 groups cannot be shared out over TP 3"),
        ({"tensor": 4}, "4 heads in 2 groups cannot be shared out over TP 4"),
        ({"pipeline": 2}, "5 layers cannot be shared out over 2 pipeline stages evenly: give --layout"),
        ({"stages": [3, 3]}, "stages of 3, 3 layers, and the model has 5"),
    ):
        with pytest.raises(CheckpointError, match=words):
            write(tmp_path / "written", found, "pai", **wanted)
    with pytest.raises(CheckpointError, match="Yuan 2.0 has no family=llama"):
        write(tmp_path / "written", found, "yuan")
    assert not (tmp_path / "written").exists()


def test_rows_beyond_the_ids_are_asked_for(tmp_path):
    """Pai adds rows for new tokens; whether they are any, or padding, nothing says."""
    fixtures.write(tmp_path / "release", fixtures.parts(2), "v0.6", 1, EVEN, False, {"num_attention_heads": HEADS})
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"vocab_size": 130}))
    with pytest.raises(CheckpointError, match="has 132 rows .* speaks of 130 ids: --vocab-size 130 if .* padding, --vocab-size 132"):
        source(tmp_path / "release")
    assert source(tmp_path / "release", vocab_size=132).model.vocab_size == 132
    assert "2 rows that pad" in source(tmp_path / "release", vocab_size=130).left_out["language_model.embedding.word_embeddings.weight[130:]"]


def test_what_settings_say_of_the_vocabulary_and_of_other_models(tmp_path):
    """Megatron-LM's --vocab-size is before the end of a document, and may be of no meaning; a norm may count from 1."""

    def settings(name: str, **more):
        fixtures.write(tmp_path / name / "release", fixtures.parts(2), "core", 1, EVEN, False, CORE | {"padded_vocab_size": ROWS, "make_vocab_size_divisible_by": 12} | more)
        return source(tmp_path / name / "release")

    assert settings("null", vocab_size=129, tokenizer_type="NullTokenizer").model.vocab_size == 130
    assert settings("other", vocab_size=129, tokenizer_type="TikTokenizer").model.vocab_size == 129
    with pytest.raises(CheckpointError, match="padded to 132 rows.* --vocab-size"):
        settings("stale", vocab_size=100, tokenizer_type="Llama2Tokenizer")
    with pytest.raises(CheckpointError, match="was trained with apply_layernorm_1p True, rotary_interleaved True, which"):
        settings("norm", apply_layernorm_1p=True, rotary_interleaved=True, rotary_seq_len_interpolation_factor=1.0, softmax_type="vanilla")
