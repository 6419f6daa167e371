"""Our templates as Jinja texts: `transformers` writes with them, token for token, what we write."""

import io
import json
import shutil

import pytest
import sentencepiece

from data_tools.conversations import Turn
from data_tools.errors import TokenizerError
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
    (Turn("system", ""), Turn("user", "No system?"), Turn("assistant", "None.")),
]


def sentencepiece_model(path, **settings):
    """Of Llama's kind, unless told otherwise."""
    made, texts = io.BytesIO(), [text for text in HARD_TEXTS if len(text) < 200]
    told = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "vocab_size": 330}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts * 20), model_writer=made, minloglevel=2, **told | settings)
    path.parent.mkdir()
    path.write_bytes(made.getvalue())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """hf: a tokenizer.json with every template's special tokens; gpt2: vocab.json and merges.txt alone; sp, llama: a SentencePiece
    model alone, as `yuan tokenizer train` makes it and with Llama's space before every text."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("jinja")
    (folder / "gpt2").mkdir()
    files = small_gpt2(folder / "gpt2")
    backend = ByteLevelBPETokenizer(str(files["vocab_file"]), str(files["merge_file"]))
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    (folder / "hf").mkdir()
    backend.save(str(folder / "hf/tokenizer.json"))
    (folder / "hf/tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}))
    sentencepiece_model(folder / "sp/tokenizer.model", add_dummy_prefix=False)
    sentencepiece_model(folder / "llama/tokenizer.model")
    return folder


def tokenizer_of(folder):
    if (folder / "tokenizer.model").is_file():
        return build_tokenizer("SentencePieceTokenizer", tokenizer_model=folder / "tokenizer.model")
    if (folder / "tokenizer.json").is_file():
        return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder / "tokenizer.json")
    return build_tokenizer("GPT2BPETokenizer", vocab_file=folder / "vocab.json", merge_file=folder / "merges.txt")


@pytest.mark.parametrize(
    "kind, name",
    [("hf", name) for name in ("alpaca", "llama2", "chatml", "yuan", "plain")] + [("gpt2", "alpaca"), ("gpt2", "plain")]
    + [(kind, name) for kind in ("sp", "llama") for name in ("alpaca", "llama2", "plain")],
)  # fmt: skip
def test_transformers_writes_the_same_tokens(folders, kind, name):
    folder = folders / kind
    assert write_template(folder, name, tokenizer_of(folder)) == ""
    ours = build_template(name, tokenizer_of(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for turns in CONVERSATIONS:
        if (kind, name) == ("llama", "plain") and any(turn.text.startswith(" ") for turn in turns):
            continue  # there transformers leaves the dummy prefix out
        messages = [{"role": turn.role, "content": turn.text} | ({"input": turn.input} if turn.input else {}) for turn in turns]
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == ours.prompt(turns[:-1])
        answered = theirs.apply_chat_template(messages, tokenize=False)
        whole = ours.render(turns).ids.tolist()
        if kind in ("hf", "gpt2"):  # of the others' texts decoding drops spaces
            assert answered == theirs.decode(whole, clean_up_tokenization_spaces=False)
        else:
            assert answered == "".join(piece.text for piece in ours.pieces(turns))
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
    assert "does not go along: a NullTokenizer" in write_template(tmp_path, "plain", build_tokenizer("NullTokenizer", vocab_size=9))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "settings, config, told",
    [
        ({}, {"legacy": True}, ""),
        ({}, {"legacy": False}, '"legacy": true'),
        ({"model_type": "unigram", "vocab_size": 329}, None, "like Llama's"),
        ({"remove_extra_whitespaces": True}, None, "like Llama's"),
        ({"byte_fallback": False, "vocab_size": 200}, None, "like Llama's"),
    ],
)
def test_where_transformers_makes_other_ids_it_is_told(tmp_path, settings, config, told):
    """Measured with transformers 5.23: each of those told has other ids in one of the conversations above."""
    sentencepiece_model(tmp_path / "sp/tokenizer.model", **settings)
    if config is not None:
        (tmp_path / "sp/tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "LlamaTokenizer"}))
    said = write_template(tmp_path / "sp", "alpaca", tokenizer_of(tmp_path / "sp"))
    assert told in said and bool(said) == bool(told)


@pytest.mark.parametrize("kind", ["sp", "gpt2"])
@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\n", "[]", "\udcff"])
def test_a_broken_file_beside_a_tokenizer_is_named(folders, tmp_path, kind, text):
    shutil.copytree(folders / kind, tmp_path / "it")
    (tmp_path / "it/tokenizer_config.json").write_text(text, errors="surrogateescape")
    tokenizer = tokenizer_of(tmp_path / "it")
    for ask in (lambda: template_beside(tokenizer), lambda: build_template("tokenizer", tokenizer), lambda: write_template(tmp_path / "it", "plain", tokenizer)):
        with pytest.raises(TokenizerError) as raised:
            ask()
        assert raised.value.where.endswith("tokenizer_config.json")
    (tmp_path / "it/chat_template.jinja").write_text("{{ eos_token }}")
    with pytest.raises(TokenizerError, match="tokenizer_config.json"):  # and not with every row
        build_template("tokenizer", tokenizer)
