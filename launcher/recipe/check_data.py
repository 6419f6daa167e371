"""Checks of files: the tokenizer's, the data's, and whether every share of a split holds something.

The last matters most: where a share has no token, megatron-core 0.16 loops for ever while it counts epochs.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from launcher.recipe.blend import BlendError, parse_blend, parse_split
from launcher.recipe.problem import Case, Problem, typed
from launcher.recipe.tokenizer import tokenizer_of

SETS = ("train", "valid", "test")
_INPUT_FIX = (
    'give a JSONL file, one object such as {{"text": "..."}} per line, with --input FILE.jsonl;'
    " for a small one to try: python examples/make_corpus.py {}"
)


def tokenizer(case: Case) -> Iterator[Problem]:
    """Its files are there and make a tokenizer; a vocab_size that was given has room for theirs; nothing was typed in vain."""
    from data_tools.tokenizers import TOKENIZER_ARGUMENTS, TokenizerError

    t = case.recipe.tokenizer
    for key, value in vars(t).items():
        users = " or ".join(name for name, takes in TOKENIZER_ARGUMENTS.items() if key in takes)
        in_vain = value is not None and key not in ("type", "vocab_size", "chat_template", *TOKENIZER_ARGUMENTS[t.type])
        if in_vain and typed(case.sources[f"tokenizer.{key}"]):
            fix = f"leave it out, or tokenizer.type={users}"
            yield Problem(f"tokenizer.{key} is of no use to {t.type}", case.at(f"tokenizer.{key}"), fix)
    try:
        built = tokenizer_of(t)
    except TokenizerError as error:
        where = error.where if error.where not in case.sources else case.at(error.where)
        yield Problem(error.what, where, error.fix)
        return
    if t.type != "NullTokenizer" and case.given("tokenizer.vocab_size") and t.vocab_size < built.vocab_size:
        yield Problem(
            f"the tokenizer's files hold {built.vocab_size} ids, more than {t.vocab_size}",
            case.at("tokenizer.vocab_size"),
            "tokenizer.vocab_size=null",
        )


def preprocess_input(case: Case) -> Iterator[Problem]:
    """The text to tokenize and a place for the result."""
    from data_tools.errors import InputError
    from data_tools.sources import find_sources

    p = case.recipe.preprocess
    if not p.output_prefix:
        yield Problem("preprocess.output_prefix is not given", "no recipe and no option gives it", "--output-prefix data/my-gpt2")
    if not p.input:
        yield Problem("preprocess.input is not given", "no recipe and no option gives it", _INPUT_FIX.format("data/corpus.jsonl"))
    else:
        try:
            find_sources(p.input, p.format)
        except InputError as error:
            fix = error.fix if not isinstance(p.input, str) or Path(p.input).exists() else _INPUT_FIX.format(p.input)
            yield Problem(error.what, case.at("preprocess.input"), fix)
    try:
        parse_shard(p.shard)
    except ValueError as error:
        yield Problem(str(error), case.at("preprocess.shard"), "such as preprocess.shard=0/4 for the first of four")
    if not p.json_keys:
        yield Problem("no key of the JSON objects is named", case.at("preprocess.json_keys"), "preprocess.json_keys=[text]")


def parse_shard(shard: str | None) -> tuple[int, int]:
    """'i/n' as (i, n); (0, 1) where none is given.

    Raises:
        ValueError: it is not two numbers with i below n.
    """
    index, slash, number = (shard or "0/1").partition("/")
    if not (slash and index.isdigit() and number.isdigit() and int(index) < int(number)):
        raise ValueError(f"{shard!r} is no share i/n, counted from 0")
    return int(index), int(number)


def data(case: Case) -> Iterator[Problem]:
    """The data sets are there, were made with this tokenizer, and give every share of the split something to read."""
    d = case.recipe.data
    own = [f"data.{name}_data_path" for name in SETS if case.value(f"data.{name}_data_path") is not None]
    if d.data_path is None and "data.train_data_path" not in own:
        yield Problem("no training data is given", "data", "data.data_path=PREFIX, the path of a .bin/.idx pair without suffix")
        return
    if d.data_path is not None and own:
        yield Problem(
            "data_path with a split, or a path for each set, but not both",
            case.at("data.data_path", *own),
            f"{', and '.join(f'{one}=null' for one in own)}, or data.data_path=null" + ", and data.split=null" * case.given("data.split"),
        )
        return
    if own and case.given("data.split"):
        yield Problem("sets with paths of their own are not split", case.at("data.split", *own), "data.split=null")
    shares: list[tuple[float, float] | None] = [(0.0, 1.0)]
    if not own:
        try:
            shares = parse_split(d.split)
        except ValueError as error:
            yield Problem(str(error), case.at("data.split"), "such as data.split=969,30,1: train, validation, test")
            return
        if shares[0] is None:
            yield Problem("the split leaves nothing to train on", case.at("data.split"), "such as data.split=969,30,1")
    if case.recipe.training.eval_iters and (shares[1] is None if not own else "data.valid_data_path" not in own):
        yield Problem(
            "there are no validation data, so nothing is evaluated",
            case.at(own[0] if own else "data.split"),
            "training.eval_iters=0, or give validation a share",
            "warning",
        )
    for key in own or ["data.data_path"]:
        try:
            prefixes, weights = parse_blend(case.value(key))
        except BlendError as error:
            yield Problem(str(error), case.at(key), f"such as {key}=a_text_document, or {key}=[0.7,a_text_document,0.3,b_text_document]")
            continue
        found = [problem for prefix in dict.fromkeys(prefixes) for problem in _one_data_set(case, key, prefix, shares)]
        yield from found
        if weights is None and len(prefixes) > 1 and not found:
            yield from _read_once(case, key, prefixes, shares)


def _one_data_set(case: Case, key: str, prefix: str, shares: list[tuple[float, float] | None]) -> Iterator[Problem]:
    missing = [f"{prefix}{suffix}" for suffix in (".bin", ".idx") if not Path(f"{prefix}{suffix}").is_file()]
    if missing:
        yield Problem(f"no such file: {' and '.join(missing)}", case.at(key), _fix_missing(case, key, prefix))
        return
    from data_tools.errors import DataError
    from data_tools.indexed import IndexedReader  # and numpy

    try:
        reader = IndexedReader(prefix)
    except DataError as error:
        yield Problem(error.what, error.where, error.fix)
        return
    yield from _ends_of_documents(case, prefix, reader.description)
    other = list(_made_with(case, key, prefix, reader.description))
    yield from other or _ids(case, key, prefix, reader)
    empty = [i for i, share in enumerate(shares) if share and not _holds_tokens(reader, share)]
    if empty:
        names = " and ".join(SETS[i] for i in empty)
        what = f"{prefix} has {reader.sequences} documents, and the share of {names} comes to no token"
        whole = len(shares) == 1 or not reader.tokens
        fix = (
            "a data set with text in it"
            if whole
            else f"data.split={_nearest_split(reader, case.recipe.data.split)}, or more documents"
        )
        yield Problem(what, case.at(key if whole else "data.split"), fix)


def _ends_of_documents(case: Case, prefix: str, description: dict[str, Any] | None) -> Iterator[Problem]:
    """What looks for the end-of-document token needs data that have it."""
    asked = [key for key in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss") if getattr(case.recipe.data, key)]
    if asked and description and description.get("append_eod") is False:
        keys = [f"data.{key}" for key in asked]
        what = f"{prefix} was made without end-of-document tokens, which {' and '.join(keys)} look{'s' * (len(keys) == 1)} for"
        yield Problem(what, case.at(*keys), "make the data again with --append-eod", "warning")


def _read_once(case: Case, key: str, prefixes: list[str], shares: list[tuple[float, float] | None]) -> Iterator[Problem]:
    """A blend without weights is read once and never again: megatron-core wants a whole sample of each data set and has
    no more after the last; with weights it begins anew."""
    from data_tools.indexed import IndexedReader

    names = [key.removeprefix("data.").removesuffix("_data_path")] if len(shares) == 1 else list(SETS)
    readers = [IndexedReader(prefix) for prefix in prefixes]
    weighted = ",".join(f"{reader.tokens},{prefix}" for reader, prefix in zip(readers, prefixes))
    fix = f"give weights, and it is read again and again: {key}=[{weighted}]"
    for name, share in zip(names, shares):
        seq_length, needed = case.recipe.training.seq_length, _samples_read(case, name)
        if share is None or not seq_length or needed is None:
            continue
        samples = [max(0, (_tokens(reader, share) - 1) // seq_length) for reader in readers]
        if 0 in samples:
            what = f"{prefixes[samples.index(0)]} has no whole sample of {seq_length} tokens for {name}"
            yield Problem(f"{what}, and a blend without weights wants one of each", case.at(key), fix)
        elif sum(samples) < needed:
            what = f"a blend without weights is read once: {sum(samples)} samples for {name}, and {needed} are wanted"
            yield Problem(what, case.at(key), fix)


def _samples_read(case: Case, name: str) -> int | None:
    """Samples of one of the three sets that the whole run reads; None where sizes are missing, which other checks say."""
    t, derived = case.recipe.training, case.recipe.derived
    if derived.train_samples is None or not t.global_batch_size or t.eval_interval < 1:
        return None
    evaluations = {"train": 0, "valid": derived.train_iters // t.eval_interval + 1, "test": 1}[name]
    return evaluations * t.eval_iters * t.global_batch_size if evaluations else derived.train_samples


def _tokens(reader: Any, share: tuple[float, float]) -> int:
    """Tokens of a share, cut where megatron-core cuts."""
    begin, end = (int(round(edge * float(reader.sequences))) for edge in share)
    return int(reader.lengths[begin:end].sum())


def _holds_tokens(reader: Any, share: tuple[float, float]) -> bool:
    return _tokens(reader, share) > 0


def _nearest_split(reader: Any, split: str) -> str:
    """The split with the empty shares given to the training; whole numbers stay whole."""
    numbers = [float(number) for number in re.findall(r"[.0-9]+", split)] + [0.0] * 2
    train, valid, test = numbers[:3]
    total = train + valid + test
    for candidate in ((train + test, valid, 0.0), (0.9 * total, 0.1 * total, 0.0)):
        text = ",".join(f"{number:g}" for number in candidate)
        if all(share is None or _holds_tokens(reader, share) for share in parse_split(text)):
            return text
    return f"{total:g},0,0"


def _made_with(case: Case, key: str, prefix: str, description: dict[str, Any] | None) -> Iterator[Problem]:
    """Whether the data were made with this recipe's tokenizer, where that was noted beside them."""
    from data_tools.tokenizers import TokenizerError

    made = (description or {}).get("tokenizer")
    try:
        mine = tokenizer_of(case.recipe.tokenizer)
    except TokenizerError:
        return  # reported by `tokenizer`
    if made and made.get("sha256") != mine.hash():
        was, now = (made.get("type"), made.get("vocab_size")), (mine.type, mine.vocab_size)
        differs = f"{was[0]} of {was[1]} ids, not {now[0]} of {now[1]}"
        if was == now:
            differs = f"also a {now[0]} of {now[1]} ids, but from other files or with other options"
        yield Problem(
            f"{prefix} was made with another tokenizer: {differs}",
            case.at(key, "tokenizer.type"),
            f"take the tokenizer's files of then, or make the data again: {preprocess_command(case, prefix)}",
        )


def _ids(case: Case, key: str, prefix: str, reader: Any) -> Iterator[Problem]:
    """Whether every id is one of the tokenizer's: of data that other tools made, only a sample is looked at."""
    size, padded = case.recipe.derived.vocab_size, case.recipe.derived.padded_vocab_size
    known = (reader.description or {}).get("largest_id")
    least, largest = (0, known) if isinstance(known, int) else reader.sampled_id_range()
    if size is not None and (largest >= size or least < 0):
        yield Problem(
            f"{prefix} holds the id {largest if largest >= size else least}, and the vocabulary is {size} ids, padded to {padded}",
            case.at(key, "tokenizer.type"),
            f"take the tokenizer that the data were made with, or make them again: {preprocess_command(case, prefix)}",
        )


def _fix_missing(case: Case, key: str, prefix: str) -> str:
    bare = re.sub(r"\.(bin|idx)$", "", prefix)
    if bare != prefix:
        return f"leave out the suffix: {key}={bare}"
    for suffix in ("_text_document", "_text_sentence"):
        if Path(f"{prefix}{suffix}.idx").is_file():
            return f"{key}={prefix}{suffix}"
    if len(prefix.split()) > 1:
        try:
            parse_blend(yaml.safe_load(f"[{','.join(prefix.split())}]"))
        except (BlendError, yaml.YAMLError):
            return f"a blend is a list of weights and prefixes, such as '{key}=[0.7,a_text_document,0.3,b_text_document]'"
        return f"a blend is a list: '{key}=[{','.join(prefix.split())}]'"
    return f"make it: {preprocess_command(case, prefix)}"


def preprocess_command(case: Case, prefix: str) -> str:
    """The `yuan preprocess` line that makes the data set `prefix` with this recipe's tokenizer."""
    p, t = case.recipe.preprocess, case.recipe.tokenizer
    output = re.sub(r"_[^_/]+_document$", "", prefix)
    words = ["yuan", "preprocess", "--input", p.input if isinstance(p.input, str) else "FILE.jsonl", "--output-prefix", output, "--tokenizer-type", t.type]
    for flag, value in (("--vocab-file", t.vocab_file), ("--merge-file", t.merge_file), ("--tokenizer-model", t.tokenizer_model)):
        words += [flag, value] if value else []
    if t.type == "NullTokenizer" and t.vocab_size:
        words += ["--vocab-size", str(t.vocab_size)]
    return shlex.join(words) + (" --append-eod" if p.append_eod else "")
