"""MindSpore's Llama: the bytes of its files, every number of ranks and way of fusing into every other, and what is refused."""

import itertools
import json
import zlib

import pytest

torch = pytest.importorskip("torch")

from checkpoints.convert import Wanted, convert, open_source  # noqa: E402
from checkpoints.files import mindspore  # noqa: E402
from checkpoints.files.stored import raw  # noqa: E402
from checkpoints.folder import CheckpointError, UnsaidError  # noqa: E402
from checkpoints.formats.mindspore import agree_layout  # noqa: E402
from checkpoints.recognise import recognise  # noqa: E402
from tests.checkpoints import mindspore_fixtures as fixtures  # noqa: E402
from tests.checkpoints.mindspore_fixtures import LAYERS, config, encoded, parts, rank  # noqa: E402

KINDS = ("separate", "concat", "grouped")


def folder(path, whole, kind, ranks, **more):
    return fixtures.write(path, [rank(whole, kind, number, ranks) for number in range(ranks)], **more)


def source(path, **more):
    return open_source(recognise(path), **more)


def holds(found, whole) -> bool:
    """Whether a source gives the tensors of `parts` and no others, bit for bit."""
    wanted = fixtures.ours(whole)
    names = {tensor.name for tensor in found.tensors}
    return names == wanted.keys() and all(torch.equal(found.read(name), wanted[name]) for name in names)


def tensors(path) -> list[dict]:
    """Every rank's, by name."""
    found = [mindspore.read(next((path / f"rank_{number}").glob("*.ckpt"))) for number in range(recognise(path).tensor)]
    return [{name: one.read() for name, one in of_rank.items()} for of_rank in found]


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)


def as_written(whole: dict) -> bytes:
    """A file of these tensors."""
    each = (mindspore.whole(name, one.dtype, tuple(one.shape), raw(one)) for name, one in whole.items())
    return b"".join(bytes(part) for parts in each for part in parts)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_a_file_that_mindspore_wrote_is_read_and_written_byte_for_byte(tmp_path):
    found, wanted = mindspore.read(fixtures.MADE), fixtures.made()
    assert equal({name: found[name].read() for name in wanted}, wanted)
    assert found["epoch_num"].read() == 3 and bytes(found["name"].read()).decode("utf-32-le") == "hi"
    written = as_written(wanted)
    assert fixtures.MADE.read_bytes()[: len(written)] == written == encoded(wanted)


def test_a_large_tensor_is_several_slices(tmp_path, monkeypatch):
    monkeypatch.setattr(mindspore, "SLICE", 100)
    wanted = fixtures.made()
    (tmp_path / "mine.ckpt").write_bytes(as_written(wanted))
    assert (tmp_path / "mine.ckpt").read_bytes() == encoded(wanted, slice_bytes=100)
    assert equal({name: one.read() for name, one in mindspore.read(tmp_path / "mine.ckpt").items()}, wanted)


def test_a_checksum_at_the_end(tmp_path):
    content = fixtures.MADE.read_bytes()
    path = tmp_path / "x.ckpt"
    path.write_bytes(content + b"crc_num" + zlib.crc32(content).to_bytes(10, "big"))
    assert mindspore.read(path).keys() == mindspore.read(fixtures.MADE).keys() and not mindspore.wrong_checksum(path)
    path.write_bytes(content + b"crc_num" + (zlib.crc32(content) ^ 1).to_bytes(10, "big"))
    assert mindspore.wrong_checksum(path)


@pytest.mark.parametrize(
    "content, why",
    [
        (b"", "is empty"),
        (b"PK\3\4 something else", "is no .ckpt of MindSpore, is encrypted or cut off"),
        (encoded(fixtures.made())[:-3], "cut off"),
        (encoded(fixtures.made(), slice_bytes=100)[:160], "cut off"),
        (encoded({"x": torch.ones(40)}, slice_bytes=100)[:-80], r"x \[40\] has 100 bytes of 160"),
        (encoded({"x": torch.ones(2)}) + encoded({"x": torch.ones(3)}), "x is there twice, and the two differ"),
        (encoded({"x": torch.ones(2)}).replace(b"Float32", b"Float33"), "of the type Float33"),
    ],
)
def test_a_damaged_file(tmp_path, content, why):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=why):
        mindspore.read(tmp_path / "x.ckpt")


# ---- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads, groups, rows", [(4, 4, 40), (8, 4, 39)], ids=["", "grouped attention, a vocabulary that cannot be shared out"])
def test_any_number_of_ranks_and_way_of_fusing_into_any_other(tmp_path, heads, groups, rows):
    """All are read into the same tensors, bit for bit, and written from them as MindFormers' rules say: so each into each."""
    whole, model = parts(heads, groups, rows), config(heads, groups, rows)
    found = None
    for kind, ranks in itertools.product(KINDS, (1, 2, 4)):
        path = folder(tmp_path / f"{kind}{ranks}", whole, kind, ranks, config=model)
        found = source(path, fused_layout=None if kind == "separate" else kind)
        assert holds(found, whole)
    for kind, ranks in itertools.product(KINDS, (1, 2, 4)):
        target = tmp_path / f"to-{kind}{ranks}"
        convert(found, target, Wanted("mindspore", tensor=ranks, fused_layout=kind), lambda weights: None)
        written = tensors(target)
        assert len(written) == ranks and all(equal(one, rank(whole, kind, number, ranks)) for number, one in enumerate(written))
        assert holds(source(target), whole)  # config.json and conversion.json beside the ranks say the rest


def test_16_ranks(tmp_path):
    whole = parts(16, 16)
    found = source(folder(tmp_path / "8", whole, "concat", 8, config=config(16, 16, 40)), fused_layout="concat")
    convert(found, tmp_path / "16", Wanted("mindspore", tensor=16, fused_layout="concat"), lambda weights: None)
    assert all(equal(one, rank(whole, "concat", number, 16)) for number, one in enumerate(tensors(tmp_path / "16")))
    convert(source(tmp_path / "16"), tmp_path / "1", Wanted("mindspore", fused_layout="concat"), lambda weights: None)
    assert equal(tensors(tmp_path / "1")[0], rank(whole, "concat", 0, 1))


def test_a_training_of_two_stages_and_two_replicas(tmp_path):
    """Ranks 0 to 3 hold the first half of the layers, two tensor-parallel shares twice; the optimizer's tensors are not converted."""
    whole = parts()
    ranks = [rank(whole, "separate", number % 2, 2, half) for half in (range(2), range(2, LAYERS)) for number in range(4)]
    for one in ranks:
        one |= {"adam_m.model.layers.0.attention.wq.weight": torch.ones(3), "global_step": torch.tensor([7], dtype=torch.int32), "scale_sense": torch.ones(1)}
    found = source(fixtures.write(tmp_path / "run", ranks, config(4, 4, 40)))
    assert holds(found, whole)
    assert found.left_out["rank_6 to 7"] == "data-parallel copies of rank_4 to 5"
    assert found.left_out["adam_m.model.layers.0.attention.wq.weight"] == found.left_out["global_step"] == "the training's"
    ranks[7]["model.layers.2.attention.wq.weight"] = ranks[7]["model.layers.2.attention.wq.weight"] + 1
    found = source(fixtures.write(tmp_path / "differ", ranks, config(4, 4, 40)))
    with pytest.raises(CheckpointError, match="layers.2.attention.wq.weight: rank_7 should hold a data-parallel copy of rank_5's"):
        convert(found, tmp_path / "to", Wanted("hf"), lambda weights: None)
    table = "model.tok_embeddings.embedding_weight"
    for number in range(4, 8):  # a tied table may be on both stages
        ranks[number][table] = ranks[number - 4][table] + 1
    with pytest.raises(CheckpointError, match=f"{table} is on two pipeline stages, and that of rank_4"):
        source(fixtures.write(tmp_path / "tied", ranks, config(4, 4, 40)))


def test_the_file_with_the_highest_number_is_the_ranks(tmp_path):
    whole = parts()
    path = folder(tmp_path / "one", whole, "separate", 1, config=config(4, 4, 40))
    (path / "rank_0" / "llama_0.ckpt").rename(path / "rank_0" / "llama-12_10.ckpt")
    (path / "rank_0" / "llama-12_9.ckpt").write_bytes(encoded(rank(parts(8), "separate", 0, 1)))
    assert holds(source(path), whole)


def test_what_is_not_said_is_asked_for(tmp_path):
    whole = parts()
    path = folder(tmp_path / "two", whole, "concat", 2)
    with pytest.raises(UnsaidError, match="not what the model is: --hf-config DIR"):
        source(path, fused_layout="concat")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config(4, 4, 38)))
    with pytest.raises(UnsaidError, match="attention.w_qkv, which does not say how its rows lie: --source-fused-layout"):
        source(path, hf_config=tmp_path / "hf")
    found = source(path, hf_config=tmp_path / "hf", fused_layout="concat")
    assert found.left_out == {f"{name}[38:]": "2 rows that pad the vocabulary" for name in ("model.tok_embeddings.embedding_weight", "lm_head.weight")}
    with pytest.raises(CheckpointError, match="--fused-layout separate, concat or grouped"):
        convert(found, tmp_path / "to", Wanted("mindspore"), lambda weights: None)


def test_what_the_manifest_says_of_the_layout(tmp_path):
    path = folder(tmp_path / "one", parts(), "concat", 1, config=config(4, 4, 40))
    (path / "conversion.json").write_text('{"fused_layout": "concat"}')
    assert holds(source(path), parts())
    agree_layout(path, "concat")
    with pytest.raises(CheckpointError, match="lie as concat, and --source-fused-layout says grouped"):
        agree_layout(path, "grouped")
    for text, words in (("{", "cannot be read"), ('{"to": "hf"}', "fused_layout is None"), ('{"fused_layout": "other"}', "'other', and separate, concat")):
        (path / "conversion.json").write_text(text)
        with pytest.raises(CheckpointError, match=words):
            source(path, fused_layout="concat")


def test_shares_of_several_shapes(tmp_path):
    ranks = [rank(parts(), "separate", number, 2) for number in range(2)]
    name = "model.layers.0.attention.wq.weight"
    ranks[1][name] = torch.cat([ranks[1][name]] * 2)
    with pytest.raises(CheckpointError, match=f"{name} is not of one kind on all tensor-parallel ranks"):
        source(fixtures.write(tmp_path / "ms", ranks, config(4, 4, 40)))


def test_what_does_not_fit_is_refused(tmp_path):
    whole, model = parts(8, 4), config(8, 4, 40)
    found = source(folder(tmp_path / "two", whole, "separate", 2, config=model))
    with pytest.raises(CheckpointError, match="num_query_groups 4 cannot be shared out over 8 ranks"):
        convert(found, tmp_path / "to", Wanted("mindspore", tensor=8, fused_layout="concat"), lambda weights: None)
    ranks = [rank(whole, "separate", number, 2) for number in range(2)]
    ranks[1]["model.layers.2.ffn_norm.weight"] = torch.ones(fixtures.H).half()
    with pytest.raises(CheckpointError, match="ffn_norm.weight should be the same on every tensor-parallel rank, and rank 1's is not rank 0's"):
        convert(source(fixtures.write(tmp_path / "differ", ranks, model)), tmp_path / "to", Wanted("hf"), lambda weights: None)
    del ranks[1]["model.layers.2.ffn_norm.weight"]
    with pytest.raises(CheckpointError, match="not those of pipeline stages: 1, 1|cannot hold the model so|missing"):
        source(fixtures.write(tmp_path / "lacks", ranks, model))
