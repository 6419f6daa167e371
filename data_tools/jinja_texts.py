"""Our chat templates as Jinja texts, for a tokenizer_config.json: what another tool writes with them is what we write.

What a text cannot say: that what a user spells never becomes a special token, and that an answer is encoded apart from what
stands before it. `transformers` gives the same ids but for these two; of SentencePiece models see `_differs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.errors import TokenizerError
from data_tools.jinja import jinja_source
from data_tools.templates import OWN, TEMPLATES, Alpaca, Template, build_template, name_of
from data_tools.tokenizers.base import CONFIG, TEMPLATE, Tokenizer, read_config
from data_tools.tokenizers.sentencepiece import SentencePieceTokenizer

# The class under which `transformers` builds the tokenizers that have no tokenizer_config.json of their own.
_CLASSES = {"GPT2BPETokenizer": "GPT2Tokenizer", "HuggingFaceTokenizer": "PreTrainedTokenizerFast", "SentencePieceTokenizer": "LlamaTokenizer"}
_SPLIT = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
)
_WHOLE = "(turn['content'] + '\\n' + turn['input'] if turn['content'] and turn.get('input') else turn['content'] + (turn.get('input') or ''))"


def _alpaca(template: Template) -> str:
    begin, end = _ends(template)
    preamble = f"(system or ({_quoted(Alpaca.WITH_INPUT)} if turns and turns[0].get('input') else {_quoted(Alpaca.WITHOUT)}))"
    asked = (
        "{%- if not loop.first %}{{- '\\n\\n' }}{%- endif %}{{- '### Instruction:\\n' + turn['content'] + '\\n\\n' }}"
        "{%- if turn.get('input') %}{{- '### Input:\\n' + turn['input'] + '\\n\\n' }}{%- endif %}{{- '### Response:' }}"
    )
    return _SPLIT + _put(f"{begin} + {preamble} + '\\n\\n'") + _turns(asked, _put(f"turn['content'] + {end}"))


def _plain(template: Template) -> str:
    begin, end = _ends(template)
    asked, answered = _put(f"{_WHOLE} + '\\n'"), _put(f"turn['content'] + {end}")
    return f"{{%- set turns = messages %}}{_put(begin)}{_turns(asked, answered)}"


def _llama2(template: Template) -> str:
    system = "('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if system and loop.first else '')"
    asked = _put(f"'<s>[INST] ' + {system} + {_WHOLE}.strip() + ' [/INST]'")
    return _SPLIT + _turns(asked, _put("' ' + turn['content'].strip() + ' </s>'"))


def _chatml(template: Template) -> str:
    turn = _put(f"'<|im_start|>' + turn['role'] + '\\n' + {_WHOLE} + '<|im_end|>\\n'")
    ask = "{%- if messages[-1]['role'] == 'user' %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    return f"{{%- for turn in messages %}}{turn}{{%- endfor %}}{ask}"


def _yuan(template: Template) -> str:
    asked = "{%- if not (loop.last and turn['role'] == 'assistant') %}{%- if not loop.first %}{{- '\\n' }}{%- endif %}"
    answer = "{%- if messages[-1]['role'] == 'assistant' %}{{- messages[-1]['content'] + '<eod>' }}{%- endif %}"
    said = "{%- set turns = messages[1:] if messages[0]['role'] == 'system' and not messages[0]['content'] else messages %}"
    return f"{said}{{%- for turn in turns %}}{asked}{_put(_WHOLE)}{{%- endif %}}{{%- endfor %}}{_put(_quoted('<sep>'))}{answer}"


_TEXTS: dict[str, Callable[[Template], str]] = {
    "alpaca": _alpaca, "llama2": _llama2, "chatml": _chatml, "yuan": _yuan, "plain": _plain,
}  # fmt: skip


def _turns(asked: str, answered: str) -> str:
    """What is asked and what is answered, each by its own text."""
    return f"{{%- for turn in turns %}}{{%- if turn['role'] == 'assistant' %}}{answered}{{%- else %}}{asked}{{%- endif %}}{{%- endfor %}}"


def _put(expression: str) -> str:
    return f"{{{{- {expression} }}}}"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _ends(template: Template) -> tuple[str, str]:
    """The tokens before and behind what is said, as literals: other tools take other ones for a missing bos_token."""
    tokenizer = template.tokenizer
    begin = "" if tokenizer.bos is None else name_of(tokenizer, tokenizer.bos)
    return _quoted(begin), _quoted(name_of(tokenizer, tokenizer.eod))


def jinja_text(template: Template) -> str:
    """The Jinja text of one of our templates, with the special tokens of its tokenizer."""
    return _TEXTS[template.name](template)


def template_beside(tokenizer: Tokenizer) -> str | None:
    """The name of the template of ours whose text lies beside a tokenizer, else `tokenizer`; None where no text does.

    Raises:
        TokenizerError: a file beside the tokenizer is broken.
    """
    text, where = jinja_source(tokenizer)
    if not where:
        return None
    for name in TEMPLATES:
        try:
            if jinja_text(build_template(name, tokenizer)) == text:
                return name
        except TokenizerError:  # it lacks a special token of that template
            continue
    return OWN


def write_template(folder: Path, name: str, tokenizer: Tokenizer) -> str:
    """Put one of our templates into the tokenizer_config.json of a Hugging Face folder, and the token that ends its answers into
    generation_config.json, where it is not the end of document. Returns what is to be told of it: why it cannot be, or
    why `transformers` will not write with it what we do; empty where it will.

    Raises:
        TokenizerError: the tokenizer cannot write the template, or a file of the folder is broken.
    """
    template, path = build_template(name, tokenizer), folder / CONFIG
    if not path.is_file() and tokenizer.type not in _CLASSES:
        return f"does not go along: a {tokenizer.type} without a {CONFIG} has no place for it"
    config = read_config(path) if path.is_file() else _config(tokenizer)
    _write(path, config | {"chat_template": jinja_text(template)})
    (folder / TEMPLATE).unlink(missing_ok=True)  # it would count more
    if template.end != tokenizer.eod:
        generation = folder / "generation_config.json"
        told = read_config(generation) if generation.is_file() else {"eos_token_id": tokenizer.eod}
        ends = told.get("eos_token_id", tokenizer.eod)
        ends = ends if isinstance(ends, list) else [ends]
        _write(generation, told | {"eos_token_id": list(dict.fromkeys([*ends, template.end]))})
    return _differs(tokenizer, config)


def _differs(tokenizer: Tokenizer, config: dict[str, Any]) -> str:
    """Why `transformers` (5.23) makes other ids of a SentencePiece model than SentencePiece does; empty where it does not, but
    for a text that begins with a space right behind a special token: there it leaves the dummy prefix out."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return ""
    if not tokenizer.is_like_llamas:
        return "goes along, but transformers takes the model for one like Llama's (BPE of texts as they are, with bytes), and makes other ids of some texts"
    if bool(config.get("legacy")) != tokenizer.dummy_prefix:
        wanted = json.dumps(_prefix(tokenizer))
        others = f"by the folder's own {CONFIG} transformers makes other ids behind special tokens than the training had"
        return f"goes along, but {others}; they are the same with {wanted} in it"
    return ""


def _prefix(tokenizer: SentencePieceTokenizer) -> dict[str, bool]:
    """Settings for a space before every text, as SentencePiece puts it, or before none."""
    return {"legacy": tokenizer.dummy_prefix, "add_prefix_space": tokenizer.dummy_prefix}


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    end = name_of(tokenizer, tokenizer.eod)
    begin = end if tokenizer.bos is None else name_of(tokenizer, tokenizer.bos)
    config = {"tokenizer_class": _CLASSES[tokenizer.type], "eos_token": end, "bos_token": begin, "unk_token": end}
    return config | {"unk_token": "<unk>"} | _prefix(tokenizer) if isinstance(tokenizer, SentencePieceTokenizer) else config


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
