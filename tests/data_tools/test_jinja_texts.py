"""Our templates as Jinja texts: `transformers` writes with them, token for token, what we write."""

import json

import pytest

from data_tools.conversations import Turn
from data_tools.jinja_texts import jinja_text, template_beside, write_template
from data_tools.templates import build_template
from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import HARD_TEXTS, small_gpt2

transformers = pytest.importorskip("transformers")
SPECIAL = ["<s>", "</s>", "<sep>", "<eod>", "<|im_start|>", "<|im_end|>"]
CONVERSATIONS = [
    (Turn("user", "What is 2+2?"), Turn("assistant", "4")),
    (Turn("system", "You add.\nNothing else."), Turn("user", "'quotes\"\\ and {{ braces }}"), Turn("assistant", "{% no %}")),
    (Turn("user", "今天"), Turn("assistant", "天气"), Turn("user", " spaces "), Turn("assistant", " kept? ")),
    (Turn("user", "Sum them.", "3\n4"), Turn("assistant", "7")),
    (Turn("user", HARD_TEXTS[1]), Turn("assistant", HARD_TEXTS[4])),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """hf: a tokenizer.json with every template's special tokens; gpt2: vocab.json and merges.txt alone."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("jinja")
    (folder / "gpt2").mkdir()
    files = small_gpt2(folder / "gpt2")
    backend = ByteLevelBPETokenizer(str(files["vocab_file"]), str(files["merge_file"]))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    (folder / "hf").mkdir()
    backend.save(str(folder / "hf/tokenizer.json"))
    (folder / "hf/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def tokenizer_of(folder):
    if (folder / "tokenizer.json").is_file():
        return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder / "tokenizer.json")
    return build_tokenizer("GPT2BPETokenizer", vocab_file=folder / "vocab.json", merge_file=folder / "merges.txt")


@pytest.mark.parametrize(
    "kind, name", [("hf", name) for name in ("alpaca", "llama2", "chatml", "yuan", "plain")] + [("gpt2", "alpaca"), ("gpt2", "plain")]
)
def test_transformers_writes_the_same_tokens(folders, kind, name):
    folder = folders / kind
    assert write_template(folder, name, tokenizer_of(folder)) == ""
    ours = build_template(name, tokenizer_of(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for turns in CONVERSATIONS:
        messages = [{"role": turn.role, "content": turn.text} | ({"input": turn.input} if turn.input else {}) for turn in turns]
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == ours.prompt(turns[:-1])
        answered = theirs.apply_chat_template(messages, tokenize=False)
        assert answered == theirs.decode(ours.render(turns).ids.tolist(), clean_up_tokenization_spaces=False)
    assert template_beside(tokenizer_of(folder)) == name
    generation = folder / "generation_config.json"
    assert generation.is_file() == (ours.end != ours.tokenizer.eod)
    if generation.is_file():
        assert json.loads(generation.read_text()) == {"eos_token_id": [ours.tokenizer.eod, ours.end]}
        generation.unlink()


def test_a_text_that_is_not_ours_is_the_tokenizers_own(folders):
    path = folders / "hf/tokenizer_config.json"
    config = json.loads(path.read_text())
    text = jinja_text(build_template("chatml", tokenizer_of(folders / "hf")))
    path.write_text(json.dumps(config | {"chat_template": text + " "}))
    assert template_beside(tokenizer_of(folders / "hf")) == "tokenizer"
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "chat_template"}))
    assert template_beside(tokenizer_of(folders / "hf")) is None


def test_what_has_no_place_for_a_text_is_told(tmp_path):
    assert "NullTokenizer" in write_template(tmp_path, "plain", build_tokenizer("NullTokenizer", vocab_size=9))
    assert not [*tmp_path.iterdir()]
