"""Rows with the text that each becomes, what is trained of it between ⟦ and ⟧: written by hand, one by one."""

import pytest

from data_tools.conversations import conversation
from data_tools.packing import Packed
from data_tools.sft import Form, Rows, prepare
from data_tools.templates import OWN, build_template
from data_tools.tokenizers import build_tokenizer
from tests.data_tools.samples import write_jsonl, yuan_model
from tests.data_tools.test_templates import CHANNEL, CHATML, LLAMA2, MISTRAL, hugging_face

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
USER, ASSISTANT, SYSTEM = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>system\n"


def asked(question, answer, **more):
    return {"instruction": question, "output": answer, **more}


def said(*turns):
    """A conversation in OpenAI's form; user and assistant by turns, a leading `system:` apart."""
    system = [{"role": "system", "content": turns[0].removeprefix("system:")}] if turns[0].startswith("system:") else []
    roles = ("user", "assistant")
    return {"messages": system + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns[len(system) :])]}


GOLDEN = [
    # one question, one answer
    ("plain", asked("q", "a"), "<s>q\n⟦a</s>⟧"),
    ("plain", asked("q", "7"), "<s>q\n⟦7</s>⟧"),
    ("plain", asked("", "a text alone"), "<s>\n⟦a text alone</s>⟧"),
    ("plain", asked("two\nlines", "more\n\nlines\n"), "<s>two\nlines\n⟦more\n\nlines\n</s>⟧"),
    ("plain", asked(" spaces ", "  kept  "), "<s> spaces \n⟦  kept  </s>⟧"),
    ("plain", asked("q", "a", input="i"), "<s>q\ni\n⟦a</s>⟧"),
    ("plain", {"prompt": "p", "completion": "c"}, "<s>p\n⟦c</s>⟧"),
    ("plain", {"query": "今天天气?", "response": "很好，😀"}, "<s>今天天气?\n⟦很好，😀</s>⟧"),
    ("alpaca", asked("q", "a"), f"<s>{PREAMBLE}### Instruction:\nq\n\n### Response:⟦a</s>⟧"),
    ("alpaca", asked("q", "a", input="i"), f"<s>{WITH_INPUT}### Instruction:\nq\n\n### Input:\ni\n\n### Response:⟦a</s>⟧"),
    ("alpaca", asked("q", "\na"), f"<s>{PREAMBLE}### Instruction:\nq\n\n### Response:⟦\na</s>⟧"),
    ("alpaca", asked("q", "a", system="s"), "<s>s\n\n### Instruction:\nq\n\n### Response:⟦a</s>⟧"),
    ("alpaca", asked("翻译", "Übersetze"), f"<s>{PREAMBLE}### Instruction:\n翻译\n\n### Response:⟦Übersetze</s>⟧"),
    ("llama2", asked("q", "a"), "<s>[INST] q [/INST]⟦ a </s>⟧"),
    ("llama2", asked(" q ", " a\n"), "<s>[INST] q [/INST]⟦ a </s>⟧"),
    ("llama2", asked("q", "a", input="i"), "<s>[INST] q\ni [/INST]⟦ a </s>⟧"),
    ("llama2", asked("q", "a", system="s"), "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nq [/INST]⟦ a </s>⟧"),
    ("chatml", asked("q", "a"), f"{USER}q<|im_end|>\n{ASSISTANT}⟦a<|im_end|>⟧\n"),
    ("chatml", asked("q", "a", system="s"), f"{SYSTEM}s<|im_end|>\n{USER}q<|im_end|>\n{ASSISTANT}⟦a<|im_end|>⟧\n"),
    ("own chatml", asked("q", "a"), f"{USER}q<|im_end|>\n{ASSISTANT}⟦a<|im_end|>⟧\n"),
    ("own llama2", asked("q", " a "), "<s>[INST] q [/INST]⟦ a </s>⟧"),
    # what the text spells is text: in the question, in the answer, at its end
    ("plain", asked("</s>", "<s>"), "<s></s>\n⟦<s></s>⟧"),
    ("chatml", asked("<|im_end|>\n<|im_start|>assistant\nno", "a<|im_end|>"), f"{USER}<|im_end|>\n{ASSISTANT}no<|im_end|>\n{ASSISTANT}⟦a<|im_end|><|im_end|>⟧\n"),
    ("llama2", asked("[/INST] a </s><s>[INST] b", "[INST] c"), "<s>[INST] [/INST] a </s><s>[INST] b [/INST]⟦ [INST] c </s>⟧"),
    ("alpaca", asked("### Response:no", "### Instruction:\nb"), f"<s>{PREAMBLE}### Instruction:\n### Response:no\n\n### Response:⟦### Instruction:\nb</s>⟧"),
    # many turns: every answer, each with its end
    ("plain", said("a", "b", "c", "d", "e", "f"), "<s>a\n⟦b</s>⟧c\n⟦d</s>⟧e\n⟦f</s>⟧"),
    ("llama2", said("system:s", "a", "b", "c", "d"), "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST]⟦ b </s>⟧<s>[INST] c [/INST]⟦ d </s>⟧"),
    ("chatml", said("system:s", "a", "b", "c", "d"), f"{SYSTEM}s<|im_end|>\n{USER}a<|im_end|>\n{ASSISTANT}⟦b<|im_end|>⟧\n{USER}c<|im_end|>\n{ASSISTANT}⟦d<|im_end|>⟧\n"),
    ("alpaca", said("a", "b", "c", "d"), f"<s>{PREAMBLE}### Instruction:\na\n\n### Response:⟦b</s>⟧\n\n### Instruction:\nc\n\n### Response:⟦d</s>⟧"),
    ("own chatml", said("a", "b", "c", "d"), f"{USER}a<|im_end|>\n{ASSISTANT}⟦b<|im_end|>⟧\n{USER}c<|im_end|>\n{ASSISTANT}⟦d<|im_end|>⟧\n"),
    ("own llama2", said("a", "b", "c", "d"), "<s>[INST] a [/INST]⟦ b </s>⟧<s>[INST] c [/INST]⟦ d </s>⟧"),
    ("chatml", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, f"{USER}a<|im_end|>\n{ASSISTANT}⟦b<|im_end|>⟧\n"),
    ("plain", asked("q", "a", history=[["q0", "a0"]]), "<s>q0\n⟦a0</s>⟧q\n⟦a</s>⟧"),
    # what a template writes between its prompt and the answer is the model's to say, special tokens too, as gpt-oss's channel
    ("own channel", said("a", "b", "c", "d"), f"{USER}a<|im_end|><|im_start|>assistant⟦<s>final\nb<|im_end|>⟧{USER}c<|im_end|><|im_start|>assistant⟦<s>final\nd<|im_end|>⟧"),
    ("own mistral", asked(" q\n", " a\n"), "<s>[INST]  q\n[/INST]⟦ a</s>⟧"),  # which strips the answers alone
    # the last answer alone
    ("plain last", said("a", "b", "c", "d"), "<s>a\nb</s>c\n⟦d</s>⟧"),
    ("llama2 last", said("a", "b", "c", "d"), "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]⟦ d </s>⟧"),
    ("chatml last", said("a", "b", "c", "d"), f"{USER}a<|im_end|>\n{ASSISTANT}b<|im_end|>\n{USER}c<|im_end|>\n{ASSISTANT}⟦d<|im_end|>⟧\n"),
    # Yuan's lines: <sep> begins the answer and is trained, earlier turns are part of the question
    ("yuan", "the cat<sep>on that mat", "the cat⟦<sep>on that mat<eod>⟧"),
    ("yuan", asked("the cat", "世界"), "the cat⟦<sep>世界<eod>⟧"),
    ("yuan", said("the cat", "on", "that", "mat"), "the cat\non\nthat⟦<sep>mat<eod>⟧"),
    ("yuan", asked("a<sep>b<eod>", "c<sep>"), "a<sep>b<eod>⟦<sep>c<sep><eod>⟧"),
]  # fmt: skip


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "yuan.model").write_bytes(yuan_model())
    plain = hugging_face(folder / "plain", None)
    made = {name: build_template(name, plain) for name in ("plain", "alpaca", "llama2", "chatml")}
    for name, own in (("chatml", CHATML), ("llama2", LLAMA2), ("channel", CHANNEL), ("mistral", MISTRAL)):
        made[f"own {name}"] = build_template(OWN, hugging_face(folder / name, own))
    made["yuan"] = build_template("yuan", build_tokenizer("YuanTokenizer", tokenizer_model=folder / "yuan.model"))
    return made


@pytest.mark.parametrize(("name", "row", "wanted"), GOLDEN)
def test_golden_masks(templates, name, row, wanted):
    template = templates[name.removesuffix(" last")]
    rendered = template.render(conversation(row), last_only=name.endswith(" last"))
    decode, found = template.tokenizer.decode, ""
    edges = [0, *(i for i in range(1, len(rendered.ids)) if rendered.trained[i] != rendered.trained[i - 1]), len(rendered.ids)]
    for start, stop in zip(edges, edges[1:]):
        text = decode(rendered.ids[start:stop].tolist())
        found += f"⟦{text}⟧" if rendered.trained[start] else text
    assert found == wanted
    assert rendered.trained[rendered.ids == template.end].sum() == wanted.count("⟦")  # ends; what the text spells is none


SIZES = [  # row, sequence length, what is trained of it; None: the row is left out. "q" and a digit are a token each.
    (asked("q", "123"), 9, "123</s>"),
    (asked("q", "123"), 6, "123</s>"),  # <s> q \n 1 2 3, then </s> as the last label: the exact length
    (asked("q", "123"), 5, "123"),  # its end is cut off with the answer, and not trained in its place
    (asked("q", "123"), 3, "1"),
    (asked("q", "123"), 2, None),
    (asked("q", "1"), 4, "1</s>"),
    (asked("q", "1"), 3, "1"),
    (asked("qqqqqqqq", "1"), 8, None),
    (said("q", "1", "q", "2"), 9, "1</s>2</s>"),
    (said("q", "1", "q", "2"), 7, "1</s>2"),
    (said("q", "1", "q", "2"), 5, "1</s>"),
]


def trained_of(folder, template, rows, seq_length):
    """The trained labels of each sample as text, and how many rows are left out."""
    source = write_jsonl(folder / "rows.jsonl", rows)
    prepare(source, folder / "x", template.tokenizer, Form(template.name))
    packed = Packed(Rows(folder / "x"), seq_length)
    samples = [packed.sample(i, filling=0) for i in range(len(packed))]
    return [template.tokenizer.decode(one["labels"][one["loss_mask"] > 0].tolist()) for one in samples], packed.rows_left_out


@pytest.mark.parametrize(("row", "seq_length", "wanted"), SIZES)
def test_what_is_left_of_a_row_that_is_cut(templates, tmp_path, row, seq_length, wanted):
    assert trained_of(tmp_path, templates["plain"], [row], seq_length) == (([], 1) if wanted is None else ([wanted], 0))


def test_the_tail_of_a_pack(templates, tmp_path):
    """Two rows that fill a pack to its last position, and two of which the second does not fit into what is left."""
    (tmp_path / "1").mkdir()
    assert trained_of(tmp_path, templates["plain"], [asked("q", "9"), asked("q", "123")], 10) == (["9</s>123</s>"], 0)
    assert trained_of(tmp_path / "1", templates["plain"], [asked("q", "9"), asked("q", "123")], 9) == (["123</s>", "9</s>"], 0)
