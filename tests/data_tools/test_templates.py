"""What of a conversation is trained: golden masks, and that an answer is begun by what was read before it in training."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.conversations import Turn, conversation
from data_tools.errors import TokenizerError
from data_tools.records import BadLine
from data_tools.templates import OWN, build_template
from data_tools.tokenizers import build_tokenizer, train_sentencepiece
from tests.data_tools.samples import HARD_TEXTS, yuan_model

CHATML = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}"
    "{% for message in rest %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHANNEL = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant<s>final\n' + m.content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)
STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}{{ m.content | upper }}{% endfor %}"
ONE = conversation({"instruction": "add", "input": "1 2", "output": "3"})
TWO = conversation({"system": "be kind", "history": [["q1", "a1"]], "instruction": "q2", "output": "a2"})


def hugging_face(folder, template=CHATML):
    """A byte-level tokenizer.json of few words, with the special tokens of ChatML and Llama."""
    from tokenizers import AddedToken, ByteLevelBPETokenizer

    backend = ByteLevelBPETokenizer()
    backend.train_from_iterator(HARD_TEXTS[:4], vocab_size=300, min_frequency=1, show_progress=False)
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return build_tokenizer("HuggingFaceTokenizer", tokenizer_model=folder / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hugging_face(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A SentencePiece model with <s>, </s> and a dummy prefix."""
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(train_sentencepiece([text for text in HARD_TEXTS if len(text) < 200] * 20, 400))
    return build_tokenizer("SentencePieceTokenizer", tokenizer_model=path)


def shown(tokenizer, rendered) -> list[str]:
    """Runs of trained and untrained tokens as text, the trained ones in brackets."""
    runs, last = [], None
    for token, trained in zip(rendered.ids.tolist(), rendered.trained.tolist(), strict=True):
        if trained != last:
            runs.append([])
        runs[-1].append(token)
        last = trained
    first = bool(rendered.trained[0])
    return [f"[{tokenizer.decode(run)}]" if (number % 2 == 0) == first else tokenizer.decode(run) for number, run in enumerate(runs)]


GOLDEN = {
    "alpaca": [
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nq1\n\n### Response:",
        "[a1</s>]",
    ],
    "chatml": [
        "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n",
        "[a1<|im_end|>]",
        "\n",
    ],
    "llama2": ["<s>[INST] q1 [/INST]", "[ a1 </s>]"],
    "plain": ["<s>q1\n", "[a1</s>]"],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_masks(tokenizer, name):
    one = (Turn("user", "q1"), Turn("assistant", "a1"))
    assert shown(tokenizer, build_template(name, tokenizer).render(one)) == GOLDEN[name]


def test_input_system_and_turns(tokenizer):
    alpaca = build_template("alpaca", tokenizer)
    (prompt, answer) = shown(tokenizer, alpaca.render(ONE))
    assert prompt.startswith("<s>Below is an instruction that describes a task, paired with an input") and answer == "[3</s>]"
    assert prompt.endswith("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:")
    assert shown(tokenizer, alpaca.render(TWO))[:3] == [
        "<s>be kind\n\n### Instruction:\nq1\n\n### Response:",
        "[a1</s>]",
        "\n\n### Instruction:\nq2\n\n### Response:",
    ]
    llama = build_template("llama2", tokenizer)
    assert shown(tokenizer, llama.render(TWO)) == [
        "<s>[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nq1 [/INST]", "[ a1 </s>]", "<s>[INST] q2 [/INST]", "[ a2 </s>]",
    ]  # fmt: skip
    assert shown(tokenizer, llama.render(TWO, last_only=True))[-1] == "[ a2 </s>]"
    assert llama.render(TWO, last_only=True).trained.sum() == llama.render(ONE[:0] + TWO[3:]).trained.sum()


def test_yuans_form(tmp_path):
    (tmp_path / "yuan.model").write_bytes(yuan_model())
    tokenizer = build_tokenizer("YuanTokenizer", tokenizer_model=tmp_path / "yuan.model")
    yuan = build_template("yuan", tokenizer)
    rendered = yuan.render(conversation("the cat<sep>on that mat"))
    assert rendered.ids.tolist() == tokenizer.encode("the cat<sep>on that mat<eod>")
    at = rendered.ids.tolist().index(tokenizer.special_tokens["<sep>"])
    assert rendered.trained.tolist() == [place >= at for place in range(len(rendered.ids))]
    assert yuan.render(TWO).ids.tolist() == tokenizer.encode("be kind\nq1\na1\nq2<sep>a2<eod>")
    assert yuan.render(TWO).trained.sum() == len(tokenizer.encode("<sep>a2<eod>"))
    spelled = yuan.render((Turn("user", "a <sep> b<eod>"), Turn("assistant", "c")))
    assert [spelled.ids.tolist().count(tokenizer.special_tokens[name]) for name in ("<sep>", "<eod>")] == [1, 1]


def test_llama2_tokens_are_those_of_one_text(llama):
    """The form is Meta's where its dialogue is encoded turn by turn, question and answer as one text."""
    rendered = build_template("llama2", llama).render((Turn("user", "the quick"), Turn("assistant", "brown fox")))
    assert rendered.ids.tolist() == [llama.bos, *llama.encode("[INST] the quick [/INST] brown fox "), llama.eod]


@pytest.mark.parametrize(("own", "name"), [(CHATML, "chatml"), (LLAMA2, "llama2")])
def test_a_tokenizers_own_template(tmp_path, own, name):
    """As `transformers` renders it; and where the form has a name here, ids and masks are those of that name."""
    transformers = pytest.importorskip("transformers")
    tokenizer = hugging_face(tmp_path / "tokenizer", own)
    template = build_template(OWN, tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    messages = [{"role": turn.role, "content": turn.whole} for turn in TWO]
    assert template.render(TWO).ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    assert template.prompt(TWO[:-1]) == theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    mine, named = template.render(TWO), build_template(name, tokenizer).render(TWO)
    assert (mine.ids.tolist(), mine.trained.tolist()) == (named.ids.tolist(), named.trained.tolist())


def test_spaces_before_texts_are_the_librarys(tmp_path):
    """A Metaspace that puts a space before the first text alone, not behind special tokens; its own template begins with text."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    signs = "▁[]INSTuseratnwo/ q1a2<|>"
    backend = Tokenizer(models.BPE(vocab={sign: i for i, sign in enumerate(dict.fromkeys(signs))}, merges=[], unk_token="<"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens([AddedToken("</s>", special=True)])
    backend.save(str(tmp_path / "tokenizer.json"))
    own = "{% for m in messages %}[INST] {{ m['role'] }} {{ m['content'] }}{% generation %}{{ eos_token }}{% endgeneration %}{% endfor %}{{ bos_token }}"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "</s>", "chat_template": own}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = build_template(OWN, build_tokenizer("HuggingFaceTokenizer", tokenizer_model=tmp_path / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": turn.role, "content": turn.whole} for turn in TWO[1:]]
    assert template.render(TWO[1:]).ids.tolist() == theirs.apply_chat_template(messages, return_dict=False)


def test_templates_that_do_not_go(tmp_path, llama):
    with pytest.raises(TokenizerError, match=r"needs the special token <\|im_start\|>, which this tokenizer has not"):
        build_template("chatml", llama)
    with pytest.raises(TokenizerError, match="no chat template of its own"):
        build_template(OWN, hugging_face(tmp_path / "none", None))
    with pytest.raises(TokenizerError, match="not Jinja"):
        build_template(OWN, hugging_face(tmp_path / "broken", "{% for %}"))
    strict = build_template(OWN, hugging_face(tmp_path / "strict", STRICT))
    with pytest.raises(BadLine, match="refuses it: no system here"):
        strict.render(TWO)
    with pytest.raises(BadLine, match="changes what is said"):
        strict.render(ONE)


texts = st.text(st.sampled_from("ab :)\n\\'<>|天😀") | st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["<s>", "</s>", "<|im_end|>", "<eod>", "<sep>", "[/INST]", "### Response:", " :)", "\n\n"]
)
said = st.tuples(texts, texts.filter(str.strip))


@settings(deadline=None, max_examples=150)
@given(dialogue=st.lists(said, min_size=1, max_size=3), name=st.sampled_from([*GOLDEN, OWN]), last_only=st.booleans(), spm=st.booleans())
def test_an_answer_follows_what_was_read_in_training(tokenizer, llama, dialogue, name, last_only, spm):
    """For every template and text: the prompt of a turn is how the training row begins up to that answer; the answer and one
    end are trained; nothing that a user spells is a special token."""
    chosen = llama if spm and name in ("alpaca", "llama2", "plain") else tokenizer
    template = build_template(name, chosen)
    turns = tuple(Turn(role, text) for pair in dialogue for role, text in zip(("user", "assistant"), pair, strict=True))
    whole = template.render(turns, last_only)
    ids, trained = whole.ids.tolist(), whole.trained.tolist()
    prompt = template.prompt(turns[:-1])
    answer = ids[len(prompt) :]
    assert ids[: len(prompt)] == prompt
    end = chosen.special_tokens["<|im_end|>"] if name in ("chatml", OWN) else chosen.eod
    length = answer.index(end) + 1
    assert trained[len(prompt) :] == [place < length for place in range(len(answer))]
    assert chosen is llama or chosen.decode(answer[: length - 1]).strip() == turns[-1].text.strip()  # sentencepiece normalises
    assert sum(token in chosen.special_ids for token in ids) == sum(
        token in chosen.special_ids for token in template.render(tuple(Turn(turn.role, "x") for turn in turns)).ids.tolist()
    )
    assert not last_only or sum(trained) == length
