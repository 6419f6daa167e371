"""Checks of LoRA: which matrices have adapters, of what size, and the frozen weights beside them."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from checkpoints.adapters import find_bases
from checkpoints.folder import CheckpointError, has_checkpoints
from checkpoints.recognise import checkpoint_in
from launcher.recipe.problem import Case, Problem
from launcher.recipe.size import matrices, matrix_names

TARGETS = "lora.target_modules"
_SIZES = """model.hidden_size model.ffn_hidden_size model.num_attention_heads model.num_query_groups model.kv_channels""".split()
# Hugging Face's names, of Llama and of GPT-2, as the matrices that they are part of here; yuan2 has two for linear_qkv.
_HUGGING_FACE = {
    "q_proj": "linear_qkv", "k_proj": "linear_qkv", "v_proj": "linear_qkv", "c_attn": "linear_qkv", "query_key_value": "linear_qkv",
    "o_proj": "linear_proj", "gate_proj": "linear_fc1", "up_proj": "linear_fc1", "c_fc": "linear_fc1", "down_proj": "linear_fc2",
}  # fmt: skip
_OF_YUAN = {"q_proj": "linear_qk", "k_proj": "linear_qk", "v_proj": "linear_v", "linear_qkv": "linear_qk,linear_v"}


def lora(case: Case) -> Iterator[Problem]:
    """The adapters' own values, and what does not go with adapters."""
    r, c = case.recipe.lora, case.recipe.checkpoint
    given = [key for key in ("lora.alpha", "lora.dropout", TARGETS) if case.given(key)]
    if r.rank is None:
        if given:
            what = f"{' and '.join(given)} {'say' if len(given) > 1 else 'says'} nothing without lora.rank: all weights are trained"
            yield Problem(what, case.at(*given, "lora.rank"), f"lora.rank=16, or leave out {' and '.join(given)}")
        return
    if r.rank < 1:
        return  # refused by `ranges`
    yield from _targets(case)
    yield from _size(case)
    if c.format == "torch":
        yield Problem("adapters are saved in torch_dist, not in files per rank", case.at("checkpoint.format", "lora.rank"), "checkpoint.format=torch_dist")
    if c.load is None and case.recipe.data.train is None and not has_checkpoints(Path(case.recipe.run.dir or "") / "checkpoints"):
        fix = "checkpoint.load=RUN_OR_CHECKPOINT, or lora.rank=null to train all weights"
        yield Problem("adapters stand beside trained weights, and none are named", case.at("checkpoint.load", "lora.rank"), fix)
    elif c.load is not None and not c.finetune and case.recipe.data.train is None:  # else `check_finetuning.weights` says so
        what = "adapters begin at step 0, and not at that of the training that the weights come from"
        yield Problem(what, case.at("checkpoint.finetune", "lora.rank"), "checkpoint.finetune=true, or leave it out")


def base(case: Case) -> Iterator[Problem]:
    """The frozen weights that a run's own adapters stand beside, or those of checkpoint.load, are there and what they were."""
    c, own = case.recipe.checkpoint, Path(case.recipe.run.dir or "") / "checkpoints"
    resumes = has_checkpoints(own)
    try:
        checkpoint = checkpoint_in(own if resumes else Path(c.load)) if resumes or c.load else None
        if checkpoint and find_bases(checkpoint, Path(c.load) if c.load and resumes else None):
            if not resumes and not c.finetune:
                what = f"{checkpoint} holds adapters: of it the weights can be taken, not the step and the optimizer"
                yield Problem(what, case.at("checkpoint.load", "checkpoint.finetune"), "checkpoint.finetune=true")
    except CheckpointError as error:
        if error.fix:  # what else is wrong with it, other rules say
            yield Problem(str(error), case.at("checkpoint.load"), error.fix)


def _targets(case: Case) -> Iterator[Problem]:
    names, family = case.recipe.lora.target_modules, case.recipe.model.family
    known = matrix_names(family)
    if not names:
        yield Problem("no matrix is to have adapters", case.at(TARGETS), f"{TARGETS}=[{','.join(known)}], or leave it out for all of them")
    for name in dict.fromkeys(names or ()):
        if name not in known:
            yield Problem(f"a layer of {family} has no {name}", case.at(TARGETS), _meant(name, known))
        elif names.count(name) > 1:
            yield Problem(f"{name} is named twice", case.at(TARGETS), f"{TARGETS}=[{','.join(dict.fromkeys(names))}]")


def _meant(name: str, known: tuple[str, ...]) -> str:
    leaf = name.rsplit(".", 1)[-1]
    meant = (_OF_YUAN.get(leaf) if "linear_qk" in known else None) or _HUGGING_FACE.get(leaf)
    if leaf == "c_proj":  # GPT-2 has two of that name
        meant = "linear_proj or linear_fc2"
    near = [meant] if meant else get_close_matches(leaf, known, n=1)
    return (f"did you mean {near[0]}? " if near else "") + f"the matrices are {', '.join(known)}"


def _size(case: Case) -> Iterator[Problem]:
    """Adapters as wide as the matrix itself are more numbers than it has."""
    r = case.recipe.lora
    if not r.target_modules or any((case.value(key) or 0) < 1 for key in _SIZES):
        return
    sizes = {name: one for name, one in matrices(case.recipe).items() if name in r.target_modules}
    most = {name: one.inputs * one.outputs // (one.inputs + one.outputs) for name, one in sizes.items()}
    name = min(most, key=most.__getitem__, default="")
    if name and r.rank > most[name]:
        what = f"adapters of rank {r.rank} have more numbers than {name} itself, {sizes[name].outputs:,} x {sizes[name].inputs:,}"
        yield Problem(what, case.at("lora.rank"), f"lora.rank={max(1, most[name])} or less, or null to train all weights")
