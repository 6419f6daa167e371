"""What is refused before a launch, and with which way out."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from data_tools.indexed import IndexedReader, idx_path
from launcher.errors import UserError
from launcher.recipe import device, load
from launcher.recipe.check import check, ensure
from launcher.recipe.problem import Problem
from tests.launcher.recipe.conftest import BASE

FOUR = ("launch.nproc_per_node=4",)
BY_SAMPLES = ("training.train_samples=800",)
INTERLEAVED = (
    "launch.nproc_per_node=2", "parallel.pipeline_model_parallel_size=2", "parallel.num_layers_per_virtual_pipeline_stage=2",
)  # fmt: skip


@pytest.fixture
def problems(write_recipe, write_data):
    """problems(*words) → what `check` says about BASE with these words; BASE by itself is sound."""
    write_recipe("base", BASE)
    write_data("data_text_document", [20] * 20)

    def ask(*words: str, verb: str = "pretrain") -> list[Problem]:
        loaded = load(["recipe=base", *words])
        return check(loaded.recipe, loaded.sources, verb)

    assert ask() == []
    return ask


def test_a_sound_recipe_passes_and_an_unsound_one_is_raised_whole(problems):
    with pytest.raises(UserError) as raised:
        ensure(load(["recipe=base", "training.global_batch_size=7", "optimizer.min_lr=1", "optimizer.lr_decay_iters=200"]))
    assert len(raised.value.each) == 2
    (warning,) = ensure(load(["recipe=base", "optimizer.lr_decay_iters=200"]))
    assert warning.severity == "warning" and "100 of 200 steps" in warning.what
    assert problems("training.train_samples=803") == []  # the 3 samples that fill no step are no reason to warn


@pytest.mark.parametrize(
    ("words", "what", "fix"),
    [
        (
            ("training.global_batch_size=7",),
            "global_batch_size 7 is no multiple of micro_batch_size 2",
            "training.global_batch_size=6 or 8",
        ),
        (("training.micro_batch_size=3",), "micro_batch_size 3", "training.micro_batch_size=2 or 4"),
        (
            (*FOUR, "parallel.tensor_model_parallel_size=3", "model.num_attention_heads=3"),
            "4 processes cannot be shared out",
            "launch.nproc_per_node=3 or 6",
        ),
        (
            ("model.hidden_size=98", "model.ffn_hidden_size=384"),
            "hidden_size 98 cannot be shared out over 4 heads",
            "model.hidden_size=96 or 100",
        ),
        (("model.num_query_groups=3",), "4 heads cannot be shared out over 3 query groups", "model.num_query_groups=2 or 4"),
        (("model.max_position_embeddings=8",), "seq_length 16 is longer", "training.seq_length=8"),
        (
            ("model.position_embedding_type=rope", "model.kv_channels=25"),
            "25 channels of a head are no pairs",
            "model.kv_channels=24 or 26",
        ),
        (
            (*FOUR, "parallel.tensor_model_parallel_size=4", "model.ffn_hidden_size=390"),
            "390 cannot be cut into TP 4",
            "model.ffn_hidden_size=388 or 392",
        ),
        (("parallel.sequence_parallel=true",), "there is one", "parallel.sequence_parallel=false"),
        (
            (
                "launch.nproc_per_node=2",
                "parallel.tensor_model_parallel_size=2",
                "parallel.sequence_parallel=true",
                "training.seq_length=15",
            ),
            "seq_length 15",
            "training.seq_length=14 or 16",
        ),
        (
            ("launch.nproc_per_node=3", "parallel.pipeline_model_parallel_size=3"),
            "8 layers cannot be shared out over 3",
            "model.num_layers=6 or 9, or stages of your own",  # PP 2 or 4 would not fit 3 processes
        ),
        (
            (
                "launch.nproc_per_node=2",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.num_layers_per_virtual_pipeline_stage=3",
            ),
            "4 layers cannot be cut",
            "parallel.num_layers_per_virtual_pipeline_stage=2 or 4",
        ),
        (
            ("parallel.num_layers_per_virtual_pipeline_stage=4",),
            "a pipeline of at least 2 stages",
            "parallel.num_layers_per_virtual_pipeline_stage=null",
        ),
        (
            (
                "launch.nproc_per_node=2",
                "parallel.pipeline_model_parallel_size=2",
                "parallel.num_layers_per_virtual_pipeline_stage=2",
                "training.global_batch_size=6",
            ),
            "groups of PP 2, and a step of 6 samples has 3",
            "training.global_batch_size=4 or 8",
        ),
        ((*INTERLEAVED, *BY_SAMPLES, "training.rampup_batch_size=[2,6,100]"), "a step of 2 samples has 1", "training.rampup_batch_size=[4,4,100]"),
        ((*INTERLEAVED, *BY_SAMPLES, "training.rampup_batch_size=[4,2,100]"), "a step of 6 samples has 3", "training.rampup_batch_size=[4,4,100]"),
        (("parallel.pipeline_model_parallel_layout=Et*8Lx",), "'x' mean", "Et*3|t*3L"),
        (("parallel.pipeline_model_parallel_layout=Et*7L",), "places 7 layers, and the model has 8", "8 times t"),
        (
            ("parallel.recompute_granularity=full", "parallel.recompute_num_layers=1"),
            "needs a method",
            "parallel.recompute_method=uniform",
        ),
        (
            ("parallel.recompute_granularity=selective", "parallel.recompute_method=block"),
            "with selective recomputation",
            "parallel.recompute_method=null",
        ),
        (
            ("parallel.overlap_param_gather=true", "parallel.overlap_grad_reduce=true"),
            "works with the distributed optimizer",
            "parallel.use_distributed_optimizer=true",
        ),
        (("launch.nnodes=2", "training.global_batch_size=8"), "a place to meet", "launch.rdzv_endpoint="),
        (("training.train_iters=null",), "how long to train", "training.train_samples"),
        (("training.train_iters=null", "training.train_tokens=64"), "less than one step", "training.train_tokens=128"),
        (
            ("optimizer.lr_warmup_iters=100",),
            "a warm-up of 100 iters must be shorter than the decay of 100",
            "optimizer.lr_warmup_iters=99",
        ),
        (("optimizer.min_lr=0.01",), "above the peak", "optimizer.min_lr=0.001"),
        (("optimizer.lr_decay_style=WSD",), "length of its last phase", "optimizer.lr_wsd_decay_iters=10"),
        (("optimizer.lr_decay_samples=800",), "counted in steps", "optimizer.lr_decay_iters=100"),
        ((*BY_SAMPLES, "optimizer.lr_warmup_iters=3"), "counted in samples", "optimizer.lr_warmup_samples=24"),
        (("optimizer.lr_warmup_iters=3", "optimizer.lr_warmup_fraction=0.1"), "warm-up is given twice", "optimizer.lr_warmup_iters=0, or optimizer.lr_warmup_fraction=null"),
        (("optimizer.start_weight_decay=0.1",), "constant weight decay", "optimizer.start_weight_decay=null"),
        (
            ("optimizer.weight_decay_incr_style=linear", "optimizer.start_weight_decay=0.1"),
            "optimizer.end_weight_decay",
            "add optimizer.end_weight_decay",
        ),
        (("training.rampup_batch_size=[2,2,100]",), "counted in samples", "training.train_samples=800"),
        ((*BY_SAMPLES, "training.rampup_batch_size=[2,4,100]"), "do not lead from 2 to 8", "training.global_batch_size=6 or 10"),
        ((*BY_SAMPLES, "training.rampup_batch_size=[6,1,100]"), "the batch grows through 7", "training.rampup_batch_size=[6,2,100]"),
        ((*BY_SAMPLES, "training.rampup_batch_size=[8,2,100]"), "cannot grow from 8 to 8", "training.rampup_batch_size=null"),
        (("model.hidden_dropout=1.5",), "model.hidden_dropout must be below 1", "below 1"),
        (("optimizer.lr=.nan",), "optimizer.lr must be above 0", "above 0"),
        (
            ("training.precision=fp16", "training.min_loss_scale=10", "training.initial_loss_scale=2"),
            "starts below its floor",
            "training.min_loss_scale=2",
        ),
        (("training.loss_scale=4",), "does nothing in fp32", "training.precision=fp16"),
        (("tokenizer.vocab_size=null",), "NullTokenizer needs a vocab_size", "tokenizer.vocab_size"),
        (
            ("tokenizer.type=SentencePieceTokenizer", "tokenizer.tokenizer_model=gone.model", "tokenizer.vocab_size=null"),
            "no such file: gone.model",
            "yuan tokenizer train",
        ),
        (("data.data_path=null",), "no training data", "data.data_path=PREFIX"),
        (("data.train_data_path=data_text_document",), "but not both", "data.train_data_path=null"),
        (("data.data_path=data_text_document.bin",), "no such file", "data.data_path=data_text_document"),
        (("data.data_path=data",), "no such file: data.bin and data.idx", "data.data_path=data_text_document"),
        (
            ("data.data_path=x_text_document",),
            "no such file",
            "yuan preprocess --input FILE.jsonl --output-prefix x --tokenizer-type NullTokenizer --vocab-size 50",
        ),
        (("data.data_path=0.5 a 0.5 b",), "no such file", "'data.data_path=[0.5,a,0.5,b]'"),
        (("data.data_path=[0.5,data_text_document,0.5]",), "weight, prefix", "data.data_path=[0.7,"),
        (("data.data_path=d 0.5 few",), "no such file", "such as 'data.data_path=[0.7,"),
        (("checkpoint.finetune=true",), "and none is named", "checkpoint.finetune=false"),
        (("launch.device=cuda",), "1 process wants a GPU", "launch.device=cpu"),
        (("data.split='0,1,1'",), "nothing to train on", "969,30,1"),
        (("data.split=few",), "'few' is not up to three shares", "969,30,1"),
    ],
)
def test_refused_with_the_nearest_way_out(problems, words, what, fix):
    found = problems(*words)
    assert len([problem for problem in found if problem.severity == found[0].severity]) == 1, [problem.what for problem in found]
    assert what in found[0].what
    assert fix in found[0].fix


def test_one_virtual_stage_per_rank_is_the_ordinary_schedule(problems):
    assert problems("parallel.num_layers_per_virtual_pipeline_stage=8") == []
    two = ("launch.nproc_per_node=2", "parallel.pipeline_model_parallel_size=2", "training.global_batch_size=6")
    assert problems(*two, "parallel.num_layers_per_virtual_pipeline_stage=4") == []
    assert problems(*INTERLEAVED, *BY_SAMPLES, "training.rampup_batch_size=[4,4,100]") == []


def test_what_is_required_is_named_all_at_once(write_recipe):
    write_recipe("empty", "# nothing\n")
    loaded = load(["recipe=empty"])
    named = " ".join(problem.what for problem in check(loaded.recipe, loaded.sources))
    for key in (
        "model.num_layers",
        "model.hidden_size",
        "model.num_attention_heads",
        "training.seq_length",
        "training.micro_batch_size",
        "optimizer.lr",
        "how long",
        "tokenizer.vocab_file",
        "training data",
    ):
        assert key in named


def test_more_processes_than_gpus(problems, monkeypatch):
    monkeypatch.setattr("launcher.recipe.check_layout.gpu_count", lambda: 2)
    (problem,) = problems("launch.device=cuda", "launch.nproc_per_node=4")
    assert "torch can use 2" in problem.what and problem.fix.startswith("launch.nproc_per_node=2") and problem.severity == "warning"


@pytest.mark.parametrize(
    ("lengths", "split", "fix"),
    [
        ([20] * 20, "949,50,1", "data.split=950,50,0"),
        ([20] * 20, "998,1,1", "data.split=900,100,0"),
        ([20] * 19 + [0], "90,5,5", "data.split=90,10,0"),
        ([20], "9,1,0", "data.split=10,0,0"),
    ],
)
def test_a_share_without_a_token_is_refused_and_the_split_named_instead_passes(problems, write_data, lengths, split, fix):
    """Here megatron-core would loop for ever."""
    write_data("data_text_document", lengths)
    (problem,) = problems(f"data.split='{split}'")
    assert "comes to no token" in problem.what
    assert problem.fix == f"{fix}, or more documents"
    assert [rest for rest in problems(fix) if rest.severity == "error"] == []


def test_evaluation_without_validation_data_is_remarked(problems):
    (problem,) = problems("data.split='1,0,0'")
    assert problem.severity == "warning" and "nothing is evaluated" in problem.what
    assert problems("data.split='1,0,0'", "training.eval_iters=0") == []


def test_each_set_of_a_blend_is_looked_at(problems, write_data):
    write_data("small_text_document", [20, 20])
    write_data("void_text_document", [0, 0, 0])
    (small,) = problems("data.data_path=[0.5,data_text_document,0.5,small_text_document]")
    assert small.what.startswith("small_text_document has 2 documents")
    (void,) = problems(
        "data.data_path=null",
        "data.split=null",
        "data.train_data_path=data_text_document",
        "data.valid_data_path=void_text_document",
    )
    assert void.fix == "a data set with text in it"


def test_a_torn_index_is_refused(problems):
    path = idx_path("data_text_document")
    path.write_bytes(path.read_bytes()[:-8])
    (problem,) = problems()
    assert problem.where == "data_text_document.idx"


def test_data_of_another_tokenizer_are_refused(problems, write_data, workspace):
    prefix = write_data("data_text_document", [20] * 20)
    (workspace / f"{prefix}.json").write_text(
        json.dumps(
            {"documents": 20, "tokens": 400, "tokenizer": {"type": "GPT2BPETokenizer", "sha256": "x", "vocab_size": 50257}}
        )
    )
    (problem,) = problems()
    assert "GPT2BPETokenizer of 50257 ids, not NullTokenizer of 51" in problem.what


def test_data_without_ends_of_documents_are_remarked_where_they_are_looked_for(problems, workspace):
    (workspace / "data_text_document.json").write_text(json.dumps({"documents": 20, "tokens": 400, "append_eod": False}))
    assert problems() == []
    (problem,) = problems("data.reset_attention_mask=true", "data.eod_mask_loss=true")
    assert "without end-of-document tokens, which data.reset_attention_mask and data.eod_mask_loss look for" in problem.what
    assert problem.severity == "warning"


def test_data_of_other_files_of_an_equal_size_say_so(problems, workspace):
    tokenizer = {"type": "NullTokenizer", "sha256": "x", "vocab_size": 51}
    (workspace / "data_text_document.json").write_text(json.dumps({"documents": 20, "tokens": 400, "tokenizer": tokenizer}))
    (problem,) = problems()
    assert problem.what.endswith("also a NullTokenizer of 51 ids, but from other files or with other options")


@pytest.mark.parametrize("place", [0, 399])
def test_ids_outside_the_vocabulary_are_refused(problems, place):
    """Data of another tool: the first and last tokens are looked at. Megatron would die of an index, on a GPU by an assert."""
    assert problems("tokenizer.vocab_size=49") == []
    (known,) = problems("tokenizer.vocab_size=18", "model.make_vocab_size_divisible_by=16")
    assert known.what == "data_text_document holds the id 19, and the vocabulary is 19 ids, padded to 32"
    tokens = np.memmap("data_text_document.bin", "<u2", "r+")
    tokens[place] = 300
    (problem,) = problems()
    assert problem.what == "data_text_document holds the id 300, and the vocabulary is 51 ids, padded to 128"
    (inside,) = (one for one in problems("tokenizer.vocab_size=200") if "300" in one.what)
    assert "padded to 256" in inside.what
    assert problems("tokenizer.vocab_size=300") == []


def test_the_largest_id_of_all_is_believed_where_it_was_noted(problems, workspace):
    (workspace / "data_text_document.json").write_text(json.dumps({"documents": 20, "tokens": 400, "largest_id": 51}))
    (problem,) = problems()
    assert "holds the id 51, and the vocabulary is 51 ids" in problem.what


def test_gpus_are_counted_as_torch_would_see_them(monkeypatch):
    monkeypatch.setattr(device, "version", lambda _: "2.13.0")
    monkeypatch.setattr(device.Path, "glob", lambda self, _: [1, 2, 3])
    for visible, count in ((None, 3), ("0,2", 2), ("", 0), ("-1", 0)):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert device.gpu_count.__wrapped__() == count
    monkeypatch.setattr(device, "version", lambda _: "2.13.0+cpu")
    assert device.gpu_count.__wrapped__() == 0


def test_the_other_verbs_have_their_own_checks(problems, workspace):
    found = problems(
        "preprocess.output_prefix=null", "preprocess.input=gone.jsonl", "training.global_batch_size=7", verb="preprocess"
    )
    assert [problem.what for problem in found] == ["preprocess.output_prefix is not given", "no such file: gone.jsonl"]
    Path("in.jsonl").write_text("{}\n")
    (problem,) = problems("generate.input=in.jsonl", "generate.top_p=1.5", "training.global_batch_size=7", verb="generate")
    assert problem.what == "generate.top_p must be at most 1, not 1.5"
    (problem,) = problems("tokenizer.merge_file=x", verb="tokenizer")
    assert problem.what == "tokenizer.merge_file is of no use to NullTokenizer" and "GPT2BPETokenizer" in problem.fix
    (problem,) = problems("generate.input=in.jsonl", "parallel.tensor_model_parallel_size=0", verb="generate")
    assert problem.what == "parallel.tensor_model_parallel_size must be at least 1, not 0"


def test_the_written_data_are_what_they_should_be(write_data):
    """The fixture itself: 34 bytes of header, documents + 1 boundaries."""
    reader = IndexedReader(write_data("x", [3, 0, 5]))
    assert (reader.documents, list(reader.lengths)) == (3, [3, 0, 5])
    assert struct.unpack_from("<QQ", idx_path("x").read_bytes(), 18) == (3, 4)
