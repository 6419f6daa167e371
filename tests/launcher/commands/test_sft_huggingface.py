"""From a Hugging Face folder to a Hugging Face folder in one command: `yuan sft` without a model in its recipe."""

import json
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from launcher.cli import app
from launcher.errors import UserError
from launcher.recipe import load
from launcher.recipe.frozen import read_frozen
from tests.data_tools.samples import small_gpt2, write_jsonl
from tests.launcher.engine.runs import records, yuan

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
RECIPE = """\
training: {seq_length: 64, micro_batch_size: 4, global_batch_size: 4, epochs: 32, eval_interval: 20, eval_iters: 100}
optimizer: {lr: 2.0e-2, lr_decay_style: cosine, weight_decay: 0.0}
tokenizer: {chat_template: chatml}
data: {train: train.jsonl, valid: valid.json}
checkpoint: {load: hf, keep_best: true, export_hf: tuned, save_interval: 64}
logging: {log_interval: 1, tensorboard: false}
launch: {device: cpu, cpu_threads: 1}
"""
ROWS = [{"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]} for a in range(5) for b in range(5)]


def make(folder):
    """A Llama with random weights, and a tokenizer.json with ChatML's special tokens."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    folder.mkdir()
    files = small_gpt2(folder)
    backend = ByteLevelBPETokenizer(*map(str, files.values()))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    backend.save(str(folder / "tokenizer.json"))
    for path in files.values():
        path.unlink()
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(end | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=302,
        max_position_embeddings=64, tie_word_embeddings=True, rms_norm_eps=1e-6, bos_token_id=299, eos_token_id=299,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A folder with hf, fine-tuned on 25 sums into tuned; what was printed."""
    folder = tmp_path_factory.mktemp("huggingface")
    make(folder / "hf")
    write_jsonl(folder / "train.jsonl", ROWS)
    (folder / "valid.json").write_text(json.dumps(ROWS[::5]))
    (folder / "tuned.yaml").write_text(RECIPE)
    done = yuan(folder, "sft", "recipe=tuned.yaml")
    return folder, done.stderr + done.stdout


@pytest.fixture
def inside(story, monkeypatch):
    """The folder of the story as the working folder; `inside(*words)` is the output of `yuan WORDS` in this process."""
    monkeypatch.chdir(story[0])

    def run(*words):
        return CliRunner().invoke(app, [*map(str, words)]).output

    return run


def test_the_folder_says_what_the_recipe_leaves_out(story, inside):
    loaded = load(["recipe=tuned.yaml"])
    saved = str(sorted((story[0] / "runs/tuned/checkpoints").glob("iter_*"))[-1].relative_to(story[0]) / "recipe.yaml")
    assert (loaded.sources["model.num_layers"], loaded.sources["tokenizer.chat_template"]) == (saved, "./tuned.yaml")  # the run's own by now
    loaded = load(["recipe=tuned.yaml", "run.name=another"])
    m, t = loaded.recipe.model, loaded.recipe.tokenizer
    assert (m.family, m.num_layers, m.num_query_groups, m.norm_epsilon, m.untie_embeddings_and_output_weights) == ("llama", 2, 2, 1e-6, False)
    assert (t.type, t.tokenizer_model, t.vocab_size) == ("HuggingFaceTokenizer", "hf/tokenizer.json", 302)
    assert loaded.sources["model.num_layers"] == loaded.sources["tokenizer.type"] == "hf/config.json"
    assert "num_layers: 2  " in (shown := inside("recipes", "show", "tuned.yaml", "run.name=another")) and "# hf/config.json" in shown


def test_what_comes_out_is_what_was_trained(story):
    """The loss of `transformers` on the validation rows, of the exported weights and by the exported template, is the run's lowest."""
    folder, printed = story
    assert "export     tuned" in printed and "read back and found equal" in printed
    assert (folder / "runs/tuned/finished").read_text() == "128\n"
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned"), transformers.AutoTokenizer.from_pretrained(folder / "tuned")
    total, count = 0.0, 0
    for row in ROWS[::5]:
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        begin = len(tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_dict=False))
        end = len(ids) - 1  # the line's end behind <|im_end|> is not trained
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, begin - 1 : end - 1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[begin:end]), reduction="sum").item()
        count += end - begin
    found = {one["iteration"]: one["lm_loss_validation"] for one in records(folder / "runs/tuned/validation.jsonl")}
    assert total / count == pytest.approx(min(found.values()), rel=1e-4)
    best = (folder / "runs/tuned/checkpoints/best_checkpointed_iteration.txt").read_text()
    assert int(best) == min(found, key=found.get) and 128 in found  # save_interval comes out even at the last step


def test_it_answers_in_the_form_that_it_was_trained_in(story):
    folder, _ = story
    write_jsonl(folder / "asked.jsonl", [{"query": row["messages"][0]["content"]} for row in ROWS[:6]])
    yuan(folder, "generate", "--load", "tuned", "--input", "asked.jsonl", "--output", "answers.jsonl", "--max-new-tokens", 8)
    answers = records(folder / "answers.jsonl")
    assert [answer["finish_reason"] for answer in answers] == ["stop"] * 6 and all(answer["output"].isdigit() for answer in answers)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder / "tuned"), transformers.AutoModelForCausalLM.from_pretrained(folder / "tuned")
    for row, answer in zip(ROWS, answers, strict=False):
        ids = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=False)
        told = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :].tolist()
        assert tokenizer.decode(told, skip_special_tokens=True) == answer["output"] and len(told) < 8  # <|im_end|> ended it


def test_the_template_comes_back_by_its_name(story, inside):
    assert "read back and found equal" in inside("convert", "tuned", "back")
    recipe = read_frozen(story[0] / "back/release/recipe.yaml")
    assert (recipe.tokenizer.type, recipe.tokenizer.chat_template) == ("HuggingFaceTokenizer", "chatml")
    assert "chat_template" not in (story[0] / "hf/tokenizer_config.json").read_text()


def test_the_check_of_it_imports_no_torch(story):
    ask = "import sys; from launcher.cli import app\ntry:\n    app(['check', 'recipe=tuned.yaml', 'run.name=another', 'checkpoint.export_hf=new'])\n"
    ask += "finally:\n    print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", ask], cwd=story[0], capture_output=True, text=True)
    assert "tuned would run with `yuan sft`" in done.stdout and done.stdout.endswith("False\n"), done


def test_a_finished_run_is_exported_once(story, inside):
    folder, _ = story
    words = ["recipe=tuned.yaml", "training.eval_iters=0"]
    assert "would run" in inside("check", *words)
    assert "is there already" not in inside("sft", *words) and "is there already" in inside("check", *words, "run.name=another")
    said = inside("sft", *words, "checkpoint.export_hf=again")
    assert "export     again" in said and (folder / "again/model.safetensors").read_bytes() == (folder / "tuned/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "word, said, fix",
    [
        ("model.num_layers=3 model.hidden_size=32 model.num_attention_heads=4", "model.num_layers: 2 there, 3 here", "model.num_layers=2 "),
        ("tokenizer.vocab_size=400", "speaks of 302 ids, and the tokenizer has 400", "tokenizer.vocab_size=302"),
        ("checkpoint.load=gone", "no whole checkpoint in gone", "checkpoint.load="),
        ("checkpoint.load=half", "half lacks model-00002-of-00003.safetensors of its 3 files", "download the rest"),
        ("checkpoint.load=pointer", "model.safetensors only points to the weights", "lfs pull"),
        ("checkpoint.load=other", "model_type 'mamba' is none of gpt2, llama, yuan", "checkpoint.load="),
        ("checkpoint.load=torn", "not a tokenizer.json: ", "where: torn/tokenizer.json"),
        ("checkpoint.load=bare", "no such file: bare/tokenizer.json", "give the folder of a model"),
        ("tokenizer.chat_template=tokenizer", "the tokenizer has no chat template of its own", "tokenizer.chat_template=alpaca"),
        ("checkpoint.export_hf=train.jsonl/hf", "cannot be made", "checkpoint.export_hf="),
        ("checkpoint.export_hf=hf", "hf is there already", "another checkpoint.export_hf"),
        ("checkpoint.export_hf=runs/another/hf", "the run's own folder", "A_FOLDER_OF_ITS_OWN"),
        ("model.num_layers=2 model.hidden_size=32 model.num_attention_heads=4 model.position_embedding_type=rope", "Hugging Face's GPT-2 has no", "checkpoint.export_hf=null"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_starts(story, inside, word, said, fix):
    folder, _ = story
    for name in ("half", "pointer", "other", "torn", "bare"):
        if not (folder / name).is_dir():
            shutil.copytree(folder / "hf", folder / name)
    (folder / "torn/tokenizer.json").write_text('{"half": ')
    for path in (folder / "bare").glob("tokenizer*"):
        path.unlink()
    (folder / "half/model.safetensors").unlink(missing_ok=True)
    shards = {name: f"model-{number:05d}-of-00003.safetensors" for number, name in enumerate("abc", 1)}
    (folder / "half/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for number in (1, 3):
        (folder / f"half/model-{number:05d}-of-00003.safetensors").write_bytes(b"")
    (folder / "pointer/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    (folder / "other/config.json").write_text('{"model_type": "mamba"}')
    output = inside("check", "--for", "sft", "recipe=tuned.yaml", "run.name=another", *word.split())
    assert "would not run" in output and said in output and fix in output


def test_a_recipe_with_the_model_of_another_folder_is_told_what_to_paste(story, inside):
    output = inside("check", "--for", "sft", "recipe=tuned.yaml", "run.name=another", "checkpoint.export_hf=new", "model.num_layers=2")
    line = next(line for line in output.splitlines() if "model.family=llama" in line)
    assert "would run" in inside("check", "--for", "sft", "recipe=tuned.yaml", "run.name=another", "checkpoint.export_hf=new", "model.num_layers=2",
                                 *line.split(":", 1)[1].split())  # fmt: skip


def test_another_tokenizer_than_the_folders_is_told(story, inside):
    """Its vocabulary is not filled up from the folder: 300 ids are not 302. The folder's own file, elsewhere, is no other one."""
    folder, _ = story
    small_gpt2(folder)
    words = ["check", "--for", "sft", "recipe=tuned.yaml", "run.name=another", "checkpoint.export_hf=new"]
    output = inside(*words, "tokenizer.type=GPT2BPETokenizer", f"tokenizer.vocab_file={folder}/vocab.json", f"tokenizer.merge_file={folder}/merges.txt")
    assert "would not run" in output and "trained with another tokenizer" in output and "302 ids, and the tokenizer has 300" in output
    shutil.copytree(folder / "hf", folder / "moved", dirs_exist_ok=True)
    output = inside(*words, "tokenizer.type=HuggingFaceTokenizer", "tokenizer.tokenizer_model=moved/tokenizer.json")
    assert "would run" in output and "another tokenizer" not in output


def test_what_answers_is_compared_with_a_named_recipe_too(story, inside):
    folder, _ = story
    keys = vars(load(["recipe=tuned.yaml", "run.name=another"]).recipe.model) | {"rotary_base": 77, "norm_epsilon": 0.01}
    (folder / "named.yaml").write_text(json.dumps({"model": keys, "generate": {"load": "hf"}, "launch": {"device": "cpu"}, "tokenizer": {
        "type": "HuggingFaceTokenizer", "tokenizer_model": "hf/tokenizer.json"}}))  # fmt: skip
    write_jsonl(folder / "asked.jsonl", [{"query": "1+1"}])
    with pytest.raises(UserError) as error:
        app(["generate", "recipe=named.yaml", "--input", "asked.jsonl", "--load", "hf"], standalone_mode=False)
    assert "model.rotary_base: 10000 there, 77 here" in str(error.value) and "model.norm_epsilon: 1e-06 there, 0.01 here" in str(error.value)


def test_of_what_answers_the_tokenizer_is_named_where_it_is_broken(story, inside):
    folder, _ = story
    write_jsonl(folder / "asked.jsonl", [{"query": "1+1"}])
    assert "would run with `yuan generate`" in inside("check", "recipe=generate", "generate.input=asked.jsonl", "generate.load=hf")
    for name, word in (("tokenizer.json", "not a tokenizer.json"), ("chat_template.jinja", "not Jinja")):
        shutil.copytree(folder / "hf", folder / name)
        (folder / name / name).write_text("{% half")
        with pytest.raises(UserError, match=word) as error:
            app(["generate", "--input", "asked.jsonl", "--load", name], standalone_mode=False)
        assert f"{name}/{name}" in error.value.where


def test_a_recipe_with_sizes_takes_the_folders_dropout(story, inside):
    sizes = ["model.num_layers=2", "model.hidden_size=32", "model.num_attention_heads=4"]
    loaded = load(["recipe=tuned.yaml", "run.name=another", *sizes])
    assert (loaded.recipe.model.attention_dropout, loaded.sources["model.attention_dropout"]) == (0.0, "hf/config.json")


def test_a_run_goes_on_without_the_folder_that_it_started_from(story, inside):
    folder, _ = story
    (folder / "hf").rename(folder / "away")
    try:
        output = inside("check", "recipe=tuned.yaml", "training.epochs=33")
        assert "would not run" in output and "tuned is there already" in output and "checkpoint.export_hf=" in output and "tokenizer" not in output
        yuan(folder, "sft", "recipe=tuned.yaml", "training.epochs=33", "checkpoint.export_hf=null", "training.eval_iters=0")
        assert (folder / "runs/tuned/finished").read_text() == "132\n"
    finally:
        (folder / "away").rename(folder / "hf")
