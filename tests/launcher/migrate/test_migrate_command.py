"""`yuan migrate` and `recipes show --as megatron` as one types them."""

from pathlib import Path

import pytest
import yaml

from launcher.errors import UserError
from launcher.recipe import load
from tests.launcher.migrate.conftest import COMMANDS

SCRIPT = str(COMMANDS / "train_gpt2_345m_1dp1pp_distributed.sh")
GPT = "torchrun --nproc_per_node 2 pretrain_gpt.py --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32"


def test_a_recipe_is_written_where_recipe_finds_it_and_never_over_another(yuan, here):
    report = yuan("migrate", SCRIPT)
    path = here / "recipes" / "train_gpt2_345m_1dp1pp_distributed.yaml"
    assert "written    recipes/train_gpt2_345m_1dp1pp_distributed.yaml" in report
    assert "use it     yuan pretrain recipe=train_gpt2_345m_1dp1pp_distributed" in report
    assert load(["recipe=train_gpt2_345m_1dp1pp_distributed"]).recipe.derived.data_parallel_size == 4
    path.write_text("mine: 1\n")
    with pytest.raises(UserError, match="is there already"):
        yuan("migrate", SCRIPT)
    assert path.read_text() == "mine: 1\n"
    yuan("migrate", "--force", SCRIPT)
    assert "mine" not in path.read_text()


def test_dry_run_and_stdout_write_nothing(yuan, here):
    assert "num_layers: 24" in yuan("migrate", "--dry-run", SCRIPT)
    text = yuan("migrate", "--output", "-", SCRIPT)
    assert yaml.safe_load(text)["model"]["num_layers"] == 24
    assert not list(here.iterdir())


@pytest.mark.parametrize("words", [GPT.split(), [GPT], GPT.replace("torchrun", "python3 -m torch.distributed.launch").split(),
                                   ["bash", "-x", "run.sh"], ["./run.sh"], ["run.sh"], ["CUDA_VISIBLE_DEVICES=0,1", *GPT.split()]])  # fmt: skip
def test_ways_of_giving_a_command(migrated, here, words):
    (here / "run.sh").write_text(f"#!/bin/bash\nset -e\nmkdir -p x\n{GPT}\n")
    values, report = migrated(*words)
    assert (values["model.num_layers"], values["launch.nproc_per_node"]) == (2, 2)
    assert ("line 3: `mkdir -p x` is no part of a recipe" in report) == ("run.sh" in words[-1])


def test_options_of_the_old_command_are_its_own_without_dashes_before_it(yuan, here):
    words = "bash ckpt_convert.sh -f distributed_weight_transfer -p fp16 -w 4 -sc /a_qkv -dc /b".split()
    with_dashes, without = (yuan("migrate", "--output", "-", *dashes, *words) for dashes in (["--"], []))
    assert without == with_dashes
    assert "tensor_model_parallel_size: 4" in without
    assert "num_layers: 2" in yuan("migrate", *GPT.split(), "--dry-run")
    assert not list(here.iterdir())


def test_a_script_takes_arguments_and_calls_others(migrated, here):
    (here / "outer.sh").write_text("DATA=$1\nexport LAYERS=6\nbash inner.sh $DATA ${2:-/vocab.json}\n")
    (here / "inner.sh").write_text(f"{GPT} --num-layers $LAYERS --data-path $1 --vocab-file $2\n")
    values, _ = migrated("bash", "outer.sh", "/data/text")
    assert (values["model.num_layers"], values["data.data_path"], values["tokenizer.vocab_file"]) == (
        6,
        "/data/text",
        "/vocab.json",
    )


def test_several_commands_become_several_recipes(yuan, here):
    (here / "all.sh").write_text(f"python tools/preprocess_data.py --input a.jsonl --output-prefix a --workers 2\n{GPT}\n")
    report = yuan("migrate", "all.sh")
    assert {path.name for path in (here / "recipes").iterdir()} == {"all.yaml", "all_2.yaml"}
    assert "use it     yuan preprocess recipe=all\n" in report
    with pytest.raises(UserError, match="2 commands make 2 recipes"):
        yuan("migrate", "--output", "one.yaml", "all.sh")


def test_a_name_never_hides_a_recipe_that_comes_with_yuan(yuan, here):
    (here / "345m.sh").write_text(GPT)
    assert "recipes/345m_migrated.yaml" in yuan("migrate", "345m.sh")


@pytest.mark.parametrize("words", [[f'{GPT} --bf16 "$@"'], [f"{GPT} --bf16 $@"], [*GPT.split(), "--bf16", '"$@"'], [*GPT.split(), "$@", "--bf16"]])
def test_no_arguments_are_nothing(migrated, words):
    values, report = migrated(*words)
    assert (values["training.seq_length"], values["training.precision"]) == (32, "bf16")
    assert "could not be carried over" not in report


@pytest.mark.parametrize("before", ["", "--bf16 ", "--data-path a ", "--data-path 0.5 $A 0.5 b "])
def test_a_variable_that_nothing_sets_is_missing_and_no_flags_value(migrated, before):
    values, report = migrated(f"{GPT} {before}$OPTS --lr 1e-4")
    assert (values["training.seq_length"], values["optimizer.lr"]) == (32, 1e-4)
    assert "$OPTS: nothing here sets it" in report
    assert "OPTS" not in str(values)
    text = Path("m.yaml").read_text()
    assert "#   missing: $OPTS: nothing here sets it" in text


def test_a_word_behind_such_a_variable_is_not_lost(migrated):
    report = migrated(f"{GPT} $OPTS 70 --lr 1e-4")[1]
    assert "$OPTS 70: nothing here sets it" in report


@pytest.mark.parametrize("start", ["torchrun $DISTRIBUTED_ARGS", "$PYTHON", "$LAUNCHER"])
def test_a_launcher_that_nothing_sets_is_missing(migrated, start):
    values, report = migrated(f"{start} {GPT.split(' ', 3)[3]}")
    assert values["model.num_layers"] == 2
    assert f"{start.split()[-1]}: nothing here sets it: give launch.nproc_per_node" in report


def test_a_script_chooses_by_its_argument(migrated, here):
    (here / "run.sh").write_text(f"case $1 in\n  big) N=48;;\n  *) N=12;;\nesac\n{GPT} --num-layers $N\n")
    assert migrated("bash", "run.sh", "big")[0]["model.num_layers"] == 48
    assert migrated("run.sh", "small")[0]["model.num_layers"] == 12
    values, report = migrated("run.sh")
    assert "1 argument could not be carried over" in report and "run, line 1: `case $1 in`" in report


@pytest.mark.parametrize("script", [f"for i in 1 2; do\n  {GPT}\ndone\n", f"f() {{\n  {GPT}\n}}\nf\n"])
def test_a_training_in_a_loop_is_an_error_that_says_where(yuan, script):
    with pytest.raises(UserError, match="line 1: `.*`: loops and functions are not read"):
        yuan("migrate", script)


def test_a_recipe_of_gpus_is_for_gpus(yuan, here):
    """Else a machine without any would check it as a training on its CPU."""
    text = yuan("migrate", "--output", "-", SCRIPT)
    assert "  gpu_memory_gib: 80  # assumed" in text
    yuan("migrate", SCRIPT)
    recipe = load(["recipe=train_gpt2_345m_1dp1pp_distributed"]).recipe
    assert (recipe.derived.device, recipe.launch.gpu_memory_gib) == ("cuda", 80)
    assert "device" not in yuan("migrate", "--output", "-", f"{GPT} --distributed-backend gloo")
    assert "device" not in yuan("migrate", "--output", "-", "python tools/preprocess_data.py --input a.jsonl --output-prefix a")


SHAPE = GPT + " --micro-batch-size 1 --lr 1e-4 --max-position-embeddings 32"


@pytest.mark.parametrize(("command", "said"), [
    (SHAPE + " --train-iters 5", "checked    the values go together; files and this machine: yuan check recipe="),
    (SHAPE + " --train-iters 5 --lr-decay-iters 90", "are odd in places\nwarning: the training ends after 5 of 90"),
    (SHAPE, "it would not run: 1 error\nerror: nothing says how long to train"),
    (GPT, "error: training.micro_batch_size is not given"),
    (SHAPE.replace("node 2", "node 8") + " --train-iters 5 --global-batch-size 9", "global_batch_size 9"),
    (SHAPE + " --train-iters 5 --tensor-model-parallel-size 3", "processes"),
])  # fmt: skip
def test_what_was_written_is_judged(yuan, command, said):
    assert said in yuan("migrate", "--dry-run", command)


def test_what_was_written_is_judged_without_its_files_and_without_gpus(yuan):
    text = (COMMANDS / "pai_pretrain.sh").read_text()
    assert "checked    the values go together" in yuan("migrate", "--dry-run", text)
    nine = yuan("migrate", "--dry-run", text.replace("8 \\\n1e-5", "9 \\\n1e-5"))
    assert "it would not run: 1 error\nerror: global_batch_size 9 " in nine
    assert "would not run" in yuan("migrate", "--dry-run", text.replace("7B ", "70B "))  # on 8 GPUs, as one whole model on each
    with pytest.raises(UserError, match="attention heads of no Llama-2"):
        yuan("migrate", "--dry-run", "bash ckpt_convert.sh -f distributed_weight_transfer -p fp16 -w 3 -sc /a_qkv -dc /b")


def test_nothing_is_run(migrated, here):
    (here / "run.sh").write_text(f"touch ran\nX=$(touch ran2)\n{GPT} --seed $X --save `touch ran3`\n")
    migrated("run.sh")
    assert not list(here.glob("ran*"))


@pytest.mark.parametrize(("words", "said"), [
    ([], "there is no command"),
    (["sh", "run_pretrain_megatron_lama.sh", "dsw"], "did you mean run_pretrain_megatron_llama.sh"),
    (["python", "train.py"], "no command that yuan migrates"),
    (["echo 1\nls\n"], "no command in it can be migrated; it has echo, ls"),
    ([f"{GPT} --seed x"], "--seed must be a whole number"),
    (["--", *GPT.replace(" --num", " 24 --num", 1).split()], "'24' stands before the first flag"),
])  # fmt: skip
def test_what_cannot_be_migrated_is_an_error_that_helps(yuan, words, said):
    with pytest.raises(UserError) as caught:
        yuan("migrate", *words)
    assert said in str(caught.value)


def test_paths_with_signs_come_through(migrated):
    values, _ = migrated(*GPT.split(), "--data-path", "/my data/a:b #1/'x'")
    assert values["data.data_path"] == "/my data/a:b #1/'x'"
    assert load(["recipe=m.yaml"]).recipe.data.data_path == "/my data/a:b #1/'x'"


def test_as_megatron_needs_a_recipe_that_trains(yuan):
    with pytest.raises(UserError, match="describes no model"):
        yuan("recipes", "show", "preprocess", "--as", "megatron")
    with pytest.raises(UserError, match="questions and answers"):
        yuan("recipes", "show", "llama2_7b_sft", "--as", "megatron")
    with pytest.raises(UserError, match="'toml'"):
        yuan("recipes", "show", "345m_1dp", "--as", "toml")


def test_as_megatron_says_what_has_no_flag(yuan, here):
    words = ["345m_1dp", "checkpoint.keep_last=3", "training.exit_duration_in_mins=1.5", "launch.device=cuda"]
    text = yuan("recipes", "show", *words, "--as", "megatron")
    assert "# no flag in Megatron-LM: checkpoint.keep_last=3" in text
    assert "rounded up" in text
    assert "--exit-duration-in-mins 2" in text
    everything = yuan("recipes", "show", *words, "--as", "megatron", "--all")
    assert "--weight-decay 0.1" in text and "--adam-beta1 0.9" in everything and "--adam-beta1" not in text


def test_the_documentation_of_every_flag_is_a_key():
    from launcher.migrate.flags import flags
    from launcher.recipe.keys import table

    assert {flag.key for flag in flags().values()} <= table().keys()
    assert Path(SCRIPT).is_file()


SLURM = """#!/bin/bash
#SBATCH -A my_account
#SBATCH --partition=batch
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=2-00:00:00
#SBATCH --exclusive
#SBATCH --job-name=gpt
export MASTER_ADDR=$(scontrol show hostnames | head -n 1)
OPTIONS=" --num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32"
run_cmd="cd /code && torchrun --nnodes $SLURM_NNODES --nproc_per_node 8 --master_addr $MASTER_ADDR pretrain_gpt.py ${OPTIONS}"
"""


@pytest.mark.parametrize("call", ['srun -l --container-image x.sqsh sh -c "${run_cmd}"', "eval $run_cmd", 'bash -c "$run_cmd"'])
def test_a_batch_script_becomes_a_recipe_for_slurm(migrated, here, call):
    (here / "train.sbatch").write_text(SLURM + call + "\n")
    values, report = migrated("train.sbatch")
    expected = {
        "launch.kind": "slurm", "launch.nnodes": 4, "launch.nproc_per_node": 8, "slurm.account": "my_account",
        "slurm.partition": "batch", "slurm.time": "2-00:00:00", "slurm.sbatch_args": ["--exclusive"], "model.num_layers": 2,
    }  # fmt: skip
    assert {key: values.get(key) for key in expected} == expected
    assert "launch.rdzv_endpoint" not in values
    assert "could not be carried over" not in report


def test_a_variable_that_is_not_exported_does_not_reach_another_script(migrated, here):
    (here / "outer.sh").write_text("HIDDEN=8\nexport SEEN=9\nSET=10 bash inner.sh\n")
    (here / "inner.sh").write_text(f"{GPT} --seed $SEEN --eval-iters $SET --log-interval $HIDDEN\n")
    values, report = migrated("outer.sh")
    assert (values["training.seed"], values["training.eval_iters"]) == (9, 10)
    assert "$HIDDEN is set nowhere here" in report


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
@pytest.mark.parametrize("name", ["pai_pretrain.sh", "pai_deepspeed.sh", "yuan_51b.sh", "mindspore_4_to_8.sh"])
def test_no_line_of_the_report_is_wider_than_the_terminal(yuan, monkeypatch, columns, name):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = yuan("migrate", "--dry-run", str(COMMANDS / name)).split("\n\n# ")[0].splitlines()
    assert columns / 2 < max(map(len, report)) <= columns
    monkeypatch.setenv("COLUMNS", "10000")
    wide = yuan("migrate", "--dry-run", str(COMMANDS / name)).split("\n\n# ")[0]
    if columns >= 80:  # below, old values are cut shorter; what they became never is
        assert "".join(wide.split()) == "".join("\n".join(report).split())
