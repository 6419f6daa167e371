"""A hundred broken recipes, as typed: each fault is named with its place, and the values offered instead pass."""

import math
import re
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import cli
from launcher.recipe import load
from launcher.recipe.check import CHECKS, check
from launcher.recipe.keys import table
from launcher.recipe.resolve import resolve
from launcher.recipe.schema import Recipe
from tests.launcher.recipe.conftest import BASE

VALUE = re.compile(r"(?P<key>[a-z]+\.\w+)=(?P<values>(\[.*\]|[^\s,]+)( or (?!less|more)[^\s,]+(?=$|\s))*)")
PLACEHOLDER = re.compile("…|[A-Z]{4}|'")
TP4 = "launch.nproc_per_node=4 parallel.tensor_model_parallel_size=4 "
PP2 = "launch.nproc_per_node=2 parallel.pipeline_model_parallel_size=2 "
PP4 = "launch.nproc_per_node=4 parallel.pipeline_model_parallel_size=4 "
VP = PP2 + "parallel.num_layers_per_virtual_pipeline_stage=2 "
SAMPLES = "training.train_samples=800 "
ROPE = "model.position_embedding_type=rope "
YUAN2 = ROPE + "model.family=yuan2 model.normalization=RMSNorm model.swiglu=true model.add_bias_linear=false "
FULL = "parallel.recompute_granularity=full "
LAYOUT = "parallel.pipeline_model_parallel_layout="
GROWS = "optimizer.weight_decay_incr_style=linear "

# what is typed after `yuan check recipe=base`: words that the message must have
BROKEN = {
    # keys, types, names
    "model.num_layer=8": "unknown key model.num_layer; did you mean model.num_layers",
    "modle.num_layers=8": "unknown key modle.num_layers; model.num_layers",
    "num_layers=8": "unknown key num_layers; model.num_layers",
    "model=8": "model is a group of keys",
    "derived.world_size=8": "derived.world_size cannot be given",
    "training.seq_length=long": "training.seq_length must be a whole number or null, not 'long'",
    "training.train_iters=1.5": "training.train_iters must be a whole number",
    "training.precision=fp8": "training.precision must be one of; bf16",
    "model.normalization=BatchNorm": "model.normalization must be one of; RMSNorm",
    "launch.device=tpu": "launch.device must be one of; cuda",
    "launch.kind=pbs": "launch.kind must be one of; slurm",
    "checkpoint.format=zip": "checkpoint.format must be one of; torch_dist",
    "recipe=bsae": "no recipe; base",
    "recipe=base": "two recipes are named",
    "model.num_layers": "'model.num_layers' is not key=value",
    "training.rampup_batch_size=[1,": "the value of training.rampup_batch_size cannot be read",
    "training.rampup_batch_size=[a]": "training.rampup_batch_size must be",
    # the model
    "model.num_layers=null": "model.num_layers is not given",
    "model.num_layers=0": "model.num_layers must be at least 1, not 0",
    "model.hidden_size=-96": "model.hidden_size must be at least 1",
    "optimizer.lr=null": "optimizer.lr is not given",
    "model.hidden_size=98 model.ffn_hidden_size=384": "hidden_size 98 cannot be shared out over 4 heads; model.num_attention_heads=2 or 7",
    "model.num_query_groups=3": "4 heads cannot be shared out over 3 query groups",
    "model.max_position_embeddings=8": "seq_length 16 is longer than the model's 8 positions",
    ROPE + "model.kv_channels=25": "25 channels of a head are no pairs",
    ROPE + "model.rotary_percent=0.01": "0 channels of a head are no pairs",
    ROPE + "model.rotary_percent=1.5": "model.rotary_percent must be at most 1",
    "model.rotary_bf16=true": "rotary_bf16 is for the released weights of Yuan 2.0",
    YUAN2 + "model.swiglu=false": "Yuan 2.0 has swiglu true; model.swiglu=true; bases/yuan2",
    YUAN2 + "model.normalization=LayerNorm": "Yuan 2.0 has normalization RMSNorm",
    YUAN2 + "model.use_rope_scaling=true": "Yuan 2.0 has use_rope_scaling false",
    YUAN2 + "model.num_query_groups=2": "Yuan 2.0 has a key for each query head: 4 heads, 2 query groups; model.num_query_groups=4",
    YUAN2 + "model.hidden_size=99 model.num_attention_heads=3 model.kv_channels=32": "Yuan 2.0's filter halves hidden_size 99; 98 or 100",
    "model.hidden_dropout=1.5": "model.hidden_dropout must be below 1",
    "model.attention_dropout=-0.1": "model.attention_dropout must be at least 0",
    "model.norm_epsilon=0": "model.norm_epsilon must be above 0",
    "model.init_method_std=-1": "model.init_method_std must be at least 0",
    "model.make_vocab_size_divisible_by=0": "model.make_vocab_size_divisible_by must be at least 1",
    "model.swiglu=true model.hidden_size=16": "model.ffn_hidden_size must be at least 1, not 0",
    # processes
    "launch.nproc_per_node=4 parallel.tensor_model_parallel_size=3 model.num_attention_heads=3": "4 processes cannot be shared out over TP 3 x PP 1",
    "parallel.tensor_model_parallel_size=2": "1 process cannot be shared out over TP 2; launch.nproc_per_node=2",
    "parallel.tensor_model_parallel_size=0": "parallel.tensor_model_parallel_size must be at least 1",
    "launch.nproc_per_node=0": "launch.nproc_per_node must be at least 1",
    "launch.nnodes=2 launch.nproc_per_node=1 parallel.tensor_model_parallel_size=4 launch.rdzv_endpoint=a:1": "2 processes cannot be shared out over TP 4",
    # the rule's own neighbours fail other rules: further values, or two at once, are offered
    TP4 + "model.num_attention_heads=6 model.hidden_size=252 model.num_query_groups=6": "model.num_attention_heads 6 cannot be cut; size=2",
    "launch.nnodes=3 launch.nproc_per_node=2 launch.rdzv_endpoint=a:1 training.global_batch_size=16 parallel.tensor_model_parallel_size=4": "launch.nnodes=2 or 4",
    "launch.nproc_per_node=6 training.global_batch_size=16 parallel.tensor_model_parallel_size=3 model.hidden_size=256 model.num_attention_heads=8": "size=4, and launch.nproc_per_node=4",
    "launch.nproc_per_node=4 training.train_samples=800 training.global_batch_size=16 training.rampup_batch_size=[8,5,50]": "training.rampup_batch_size=[8,8,50]",
    "launch.nproc_per_node=8 parallel.tensor_model_parallel_size=8 model.num_attention_heads=12 model.hidden_size=768": "_parallel_size=4",
    "launch.node_rank=1": "machine number 1 of 1",
    "launch.mfu=2": "launch.mfu must be at most 1",
    "launch.gpu_memory_gib=-1": "launch.gpu_memory_gib must be above 0",
    TP4 + "model.num_attention_heads=6": "model.num_attention_heads 6 cannot be cut into TP 4 parts",
    TP4 + "model.ffn_hidden_size=390": "model.ffn_hidden_size 390 cannot be cut into TP 4",
    TP4 + "model.num_attention_heads=12 model.num_query_groups=6": "num_query_groups 6 is neither a multiple nor a divisor of TP 4",
    TP4 + "model.num_query_groups=1 model.kv_channels=25": "keys and values of 1 group x 25 channels cannot be cut into TP 4",
    TP4 + "parallel.sequence_parallel=true training.seq_length=15": "sequence parallelism cannot cut seq_length 15 into TP 4",
    "parallel.overlap_param_gather=true parallel.overlap_grad_reduce=true": "overlap_param_gather works with the distributed optimizer",
    "parallel.overlap_param_gather=true parallel.use_distributed_optimizer=true": "overlap_param_gather works with overlap_grad_reduce",
    "parallel.distributed_timeout_minutes=0": "parallel.distributed_timeout_minutes must be at least 1",
    # stages
    "launch.nproc_per_node=3 parallel.pipeline_model_parallel_size=3 training.global_batch_size=9": "8 layers cannot be shared out over 3 pipeline stages",
    PP2 + "parallel.num_layers_per_virtual_pipeline_stage=3": "a stage's 4 layers cannot be cut into virtual stages of 3",
    "parallel.num_layers_per_virtual_pipeline_stage=4": "virtual stages need a pipeline of at least 2 stages",
    VP + "training.global_batch_size=6": "groups of PP 2, and a step of 6 samples has 3",
    VP + SAMPLES + "training.rampup_batch_size=[2,6,100]": "groups of PP 2, and a step of 2 samples has 1",
    VP + "parallel.decoder_first_pipeline_num_layers=3": "cannot be cut into virtual stages by layers",
    PP2 + "parallel.decoder_first_pipeline_num_layers=8": "0 layers are left for the 1 other stage; parallel.decoder_first_pipeline_num_layers=7",
    PP4 + "parallel.decoder_first_pipeline_num_layers=3": "the 5 layers between the first and last stage cannot be shared out over 3; parallel.decoder_first_pipeline_num_layers=2 or 5",
    LAYOUT + "Et*8Lx": "'x' mean nothing in a pipeline layout",
    LAYOUT + "Et*7L": "the layout places 7 layers, and the model has 8",
    LAYOUT + "t*8L": "a layout has one E, at its beginning",
    LAYOUT + "EEt*8L": "a layout has one E, at its beginning",
    LAYOUT + "Et*4Lt*4": "one L, at its end",
    PP2 + LAYOUT + "Et*4|t*2|t*2L": "the layout has 3 stages, no multiple of PP 2",
    PP2 + LAYOUT + "Et*4|t*4L parallel.decoder_last_pipeline_num_layers=4": "says all about the stages",
    VP + LAYOUT + "Et*2|t*2|t*2|t*2L": "parallel.num_layers_per_virtual_pipeline_stage cannot be given too",
    # recomputation
    FULL + "parallel.recompute_num_layers=1": "full recomputation needs a method",
    FULL + "parallel.recompute_method=block": "full recomputation needs a number of layers",
    FULL + "parallel.recompute_method=uniform parallel.recompute_num_layers=3": "3 layers are recomputed at once, and a stage has 8",
    "parallel.recompute_granularity=selective parallel.recompute_method=block": "parallel.recompute_method says nothing with selective",
    "parallel.recompute_granularity=selective parallel.recompute_num_layers=1": "parallel.recompute_num_layers says nothing with selective",
    # batches and lengths
    "training.global_batch_size=7": "global_batch_size 7 is no multiple of micro_batch_size 2 x data-parallel size 1",
    "training.micro_batch_size=3": "micro_batch_size 3",
    "launch.nproc_per_node=3": "data-parallel size 3 = 6",
    "training.micro_batch_size=0": "training.micro_batch_size must be at least 1",
    "training.global_batch_size=-8": "training.global_batch_size must be at least 1",
    "training.train_iters=null": "nothing says how long to train",
    "training.train_iters=5 training.train_samples=40": "the length of the training is given twice",
    "training.train_tokens=64": "training.train_tokens 64 is less than one step",
    "training.train_iters=0": "training.train_iters must be at least 1",
    "training.rampup_batch_size=[2,2,100]": "a batch that grows needs a training counted in samples",
    SAMPLES + "training.rampup_batch_size=[2,2]": "is [start, increment, samples], all above 0",
    SAMPLES + "training.rampup_batch_size=[2,4,100]": "steps of 4 do not lead from 2 to 8",
    SAMPLES + "training.rampup_batch_size=[6,1,100]": "the batch grows through 7, no multiple of",
    SAMPLES + "training.rampup_batch_size=[8,2,100]": "the batch cannot grow from 8 to 8",
    "training.eval_interval=0": "training.eval_interval must be at least 1",
    "training.exit_duration_in_mins=0": "training.exit_duration_in_mins must be above 0",
    # precision
    "training.precision=fp16 training.min_loss_scale=10 training.initial_loss_scale=2": "the loss scale starts below its floor",
    "training.precision=fp16 training.loss_scale=-1": "training.loss_scale must be above 0",
    # the schedule
    "optimizer.lr=0": "optimizer.lr must be above 0",
    "optimizer.lr=-1e-3": "optimizer.lr must be above 0, not -0.001",
    "optimizer.lr=.nan": "optimizer.lr must be above 0, not nan",
    "optimizer.min_lr=0.01": "optimizer.min_lr is above the peak",
    "optimizer.lr_warmup_init=0.01": "optimizer.lr_warmup_init is above the peak",
    "optimizer.adam_beta2=1": "optimizer.adam_beta2 must be below 1",
    "optimizer.lr_warmup_fraction=1": "optimizer.lr_warmup_fraction must be below 1",
    "optimizer.lr_warmup_iters=100": "a warm-up of 100 iters must be shorter than the decay of 100 iters",
    "optimizer.lr_warmup_tokens=1e6": "a warm-up of 7812 iters; optimizer.lr_warmup_tokens=12672 or less",
    "optimizer.lr_decay_tokens=100": "a decay of 100 tokens is less than one step; optimizer.lr_decay_tokens=128 or more",
    "optimizer.lr_warmup_iters=3 optimizer.lr_warmup_fraction=0.1": "the warm-up is given twice",
    "optimizer.lr_decay_samples=800": "a training counted in steps cannot have optimizer.lr_decay_samples",
    SAMPLES + "optimizer.lr_warmup_iters=3": "a training counted in samples or tokens cannot have optimizer.lr_warmup_iters",
    "optimizer.lr_decay_style=WSD": "WSD needs the length of its last phase",
    "optimizer.lr_decay_style=WSD optimizer.lr_wsd_decay_iters=96 optimizer.lr_warmup_iters=10": "WSD's last phase begins within the warm-up",
    "optimizer.start_weight_decay=0.1": "a constant weight decay has no optimizer.start_weight_decay",
    GROWS + "optimizer.start_weight_decay=0.1": "needs optimizer.end_weight_decay",
    GROWS + "optimizer.start_weight_decay=0.2 optimizer.end_weight_decay=0.1": "a weight decay grows; optimizer.start_weight_decay=0.1",
    GROWS + "optimizer.start_weight_decay=-0.2 optimizer.end_weight_decay=0.1": "a weight decay grows; optimizer.start_weight_decay=0",
    # data and tokenizer
    "data.data_path=null": "no training data is given",
    "data.data_path=gone": "no such file: gone.bin and gone.idx",
    "data.data_path=data_text_document.idx": "no such file",
    "data.data_path=data": "no such file: data.bin and data.idx",
    "data.data_path=[0.5,data_text_document,0.5]": "a blend is weight, prefix",
    "data.data_path=[1,data_text_document,0,small]": "every weight of a blend is above 0",
    "data.data_path=[data_text_document,small] data.split=1,0,0": "small has no whole sample of 16 tokens for train",
    "data.data_path=[data_text_document,data_text_document] data.split=1,0,0 training.train_iters=1000": "read once: 498 samples for train, and 8000 are wanted",
    "data.train_data_path=data_text_document": "but not both",
    "data.train_data_path=data_text_document data.valid_data_path=small": "data.train_data_path=null, and data.valid_data_path=null",
    "data.split=0,1,1": "the split leaves nothing to train on",
    "data.split=few": "'few' is not up to three shares",
    "data.split=-1,1,0": "'-1,1,0' has a share below 0",
    "data.split=998,1,1": "the share of valid and test comes to no token",
    "tokenizer.vocab_size=null": "NullTokenizer needs a vocab_size",
    "tokenizer.vocab_size=30": "holds the id 49, and the vocabulary is 31 ids",
    "tokenizer.type=SentencePieceTokenizer tokenizer.tokenizer_model=gone.model tokenizer.vocab_size=null": "no such file: gone.model",
    # checkpoints and the run folder
    "checkpoint.load=gone": "there is no whole checkpoint in gone",
    "checkpoint.save_interval=0": "checkpoint.save_interval must be at least 1",
    "checkpoint.keep_last=0": "checkpoint.keep_last must be at least 1",
    "run.name=../../other": "leads out of runs/",
    "run.dir=base_file": "the run folder cannot be made",
    "run.dir=torn": "the run's recipe cannot be read",
    "run.dir=trackless": "latest_checkpointed_iteration.txt",
}  # fmt: skip


@pytest.fixture
def yuan_check(write_recipe, write_data, workspace, monkeypatch, capsys):
    """yuan_check(words) → (exit code, all that was printed), through the program's own main."""
    write_recipe("base", BASE)
    write_data("data_text_document", [200] * 20)
    write_data("small", [15])
    (workspace / "base_file").write_text("a file")
    for name in ("torn", "trackless/checkpoints/iter_0000005"):
        (workspace / name).mkdir(parents=True)
    (workspace / "torn/recipe.yaml").write_text("model: {no_such_key: 1}\n")
    (workspace / "trackless/recipe.yaml").write_text("model: {num_layers: 8}\n")

    def run(words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["yuan", "check", "recipe=base", *words.split()])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


def test_there_are_a_hundred_and_the_recipe_they_are_made_of_is_sound(yuan_check):
    assert len(BROKEN) > 100
    code, text = yuan_check("")
    assert code == 0 and "error" not in text and "warning" not in text


@pytest.mark.parametrize("typed", BROKEN)
def test_each_fault_is_named_and_what_is_offered_instead_passes(yuan_check, typed):
    code, text = yuan_check(typed)
    assert code == 2, text
    for words in BROKEN[typed].split("; "):
        assert words in text
    assert "Traceback" not in text
    errors = errors_of(text)
    for error in errors:
        for change in offered(error):
            keys = [word.partition("=")[0] for word in change.split()]
            others = [word for word in typed.split() if word.partition("=")[0] not in keys]
            left = set(map(what, errors_of(yuan_check(" ".join([*others, change]))[1])))
            assert left <= set(map(what, errors)) - {what(error)}, (change, left)


def errors_of(text: str) -> list[str]:
    """The errors of an output, each with its `where` and `fix` lines."""
    blocks = re.split(r"^(?=error: |warning: |\S)", text, flags=re.MULTILINE)
    return [block for block in blocks if block.startswith("error: ")]


def what(error: str) -> str:
    return error.splitlines()[0]


def offered(error: str) -> list[str]:
    """The changes that an error's fix offers, each as words to type: `a=1 or 2, or b=3, and c=4` are three."""
    fix = error.partition("  fix:   ")[2].partition("\n")[0]
    changes = []
    for part in fix.partition("such as")[0].split(", or "):
        assignments = [VALUE.match(word) for word in part.split(", and ")]
        if all(assignments) and not PLACEHOLDER.search(part):
            values = [one["values"].split(" or ") for one in assignments]
            changes += [" ".join(f"{one['key']}={value}" for one, value in zip(assignments, each)) for each in zip(*values)]
    return changes


@pytest.mark.parametrize("typed", ["optimizer.lr=-1e-3", "optimizer.lr_warmup_fraction=1.5", "optimizer.lr_warmup_tokens=1e6", "optimizer.lr_decay_tokens=100"])
def test_what_follows_from_a_fault_is_not_told_beside_it(yuan_check, typed):
    _, text = yuan_check(typed)
    assert len(errors_of(text)) == 1 and "warning" not in text


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("training.precision=fp8 training.micro_batch_size=0", ["training.precision must be", "training.micro_batch_size must be"]),
        ("model.num_layer=6 training.global_batch_size=7", ["unknown key model.num_layer", "global_batch_size 7 is no multiple"]),
        ("training.train_itres=6 training.train_iters=null", ["unknown key training.train_itres"]),
        ("parallel.tensor_model_parallel_size=two launch.nproc_per_node=8 model.num_query_groups=3", ["parallel.tensor", "4 heads cannot"]),
        ("optimizer.lr=fast data.data_path=gone", ["optimizer.lr must be", "no such file: gone.bin"]),
        ("optimizer.lr=-1 training.global_batch_size=7", ["optimizer.lr must be above 0", "global_batch_size 7 is no multiple"]),
    ],
)
def test_faults_of_keys_and_of_rules_are_told_together_and_what_may_follow_from_them_is_not(yuan_check, typed, told):
    code, text = yuan_check(typed)
    assert code == 2
    errors = sorted(map(what, errors_of(text)))
    assert len(errors) == len(told) and all(any(f"error: {one}" in error for error in errors) for one in told), errors
    assert f"would not run: {len(told)} error" in text


def test_a_launch_tells_faults_of_keys_and_of_rules_together(yuan_check, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", "yuan pretrain recipe=base training.precision=fp8 training.micro_batch_size=0".split())
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert len(errors_of(capsys.readouterr().err)) == 2


SIZES = {
    "launch.nproc_per_node": [1, 2, 3, 4, 6, 8],
    "launch.nnodes": [1, 2, 3],
    "parallel.tensor_model_parallel_size": [1, 2, 3, 4, 8],
    "parallel.pipeline_model_parallel_size": [1, 2, 3, 4],
    "parallel.num_layers_per_virtual_pipeline_stage": [1, 2, 3],
    "parallel.decoder_first_pipeline_num_layers": [1, 3],
    "model.num_attention_heads": [4, 6, 8, 12],
    "model.num_query_groups": [1, 2, 3, 4, 6],
    "model.hidden_size": [96, 252, 256, 768],
    "training.global_batch_size": [7, 8, 16, 24],
    "training.micro_batch_size": [1, 2, 3],
    "optimizer.lr_warmup_tokens": [10**5, 10**7],
}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(sorted(SIZES)), min_size=1, max_size=6, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: st.sampled_from(SIZES[key]) for key in keys})
))  # fmt: skip
def test_what_is_offered_for_sizes_that_do_not_fit_mends_its_fault_and_makes_no_other(sizes):
    def faults_of(changes: dict[str, object]) -> dict[str, str]:
        loaded = load([f"{key}={value}" for key, value in changes.items()], default="345m_1dp")
        return {one.what: one.fix for one in check(loaded.recipe, loaded.sources) if one.severity == "error"}

    faults = faults_of(sizes)
    for fault, fix in faults.items():
        for change in offered(f"  fix:   {fix}"):
            left = faults_of(sizes | dict(word.split("=") for word in change.split()))
            assert left.keys() <= faults.keys() - {fault}, (fault, change)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_no_value_makes_the_check_itself_fail(data):
    """Whatever numbers stand in a recipe, they are told of; a traceback would hide the other faults."""
    recipe, sources = Recipe(), dict.fromkeys(table(), "default")
    sound = {"num_layers": 8, "hidden_size": 96, "num_attention_heads": 4}, {"seq_length": 16, "micro_batch_size": 2, "train_iters": 9}
    vars(recipe.model).update(sound[0])
    vars(recipe.training).update(sound[1])
    recipe.tokenizer.type, recipe.tokenizer.vocab_size, recipe.optimizer.lr = "NullTokenizer", 50, 1e-3
    values = {int: [-3, 0, 1, 2, 7, 10**6], float: [-1.0, 0.0, 1e-9, 0.5, 1.0, math.nan, math.inf], bool: [False, True]}
    keys = [key for name, key in table().items() if key.type in values and not name.startswith("derived.")]
    for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4)):
        group, leaf = key.name.split(".")
        empty = [None] if "null" in key.expected else []
        setattr(getattr(recipe, group), leaf, data.draw(st.sampled_from(values[key.type] + empty)))
        sources[key.name] = "command line"
    recipe.parallel.pipeline_model_parallel_layout = data.draw(st.sampled_from([None, None, "", "|", "E", "Et*8L", "Et*4|t*4L"]))
    recipe.training.rampup_batch_size = data.draw(st.none() | st.lists(st.sampled_from([-1, 0, 1, 2, 8]), max_size=4))
    recipe.launch.device = data.draw(st.sampled_from(["cpu", "cuda"]))
    resolve(recipe, sources, "fuzz")
    for verb in CHECKS:
        check(recipe, sources, verb)
