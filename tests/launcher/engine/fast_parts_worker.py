"""Two ranks that hold the fast parts of a step against plain torch and against megatron-core's own, for test_fast_parts.py."""

import dataclasses
import json
import math
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from launcher.workers.entry import run_worker

sys.path.insert(1, str(Path(__file__).parents[3]))  # started as a script
from tests.launcher.engine.generate_worker import FAMILIES, tiny  # noqa: E402

TIED, UNTIED = "tied, learned positions", "untied, grouped queries"
CASES = {
    f"TP 1, {TIED}": (1, "gpt2", False),
    f"TP 2, {TIED}": (2, "gpt2", False),
    f"TP 2, {UNTIED}": (2, "llama", False),
    f"TP 2, sequence parallel, {UNTIED}": (2, "llama", True),
    f"TP 2, sequence parallel, {TIED}": (2, "gpt2", True),
}
CLIPPED = {  # precision, distributed optimizer
    "fp32": ("fp32", False),
    "fp32, shared out": ("fp32", True),
    "fp16": ("fp16", False),
    "fp16, shared out": ("fp16", True),
}
MODELS = {  # keys of `model`
    "GELU": {},
    "GELU by tanh": {"openai_gelu": True},
    "GELU by tanh without biases": {"openai_gelu": True, "add_bias_linear": False},
    "llama": FAMILIES["llama"],
    "yuan2": FAMILIES["yuan2"],
}
LOSS_SCALE = 4096.0
TOKENS, WIDTH, ROWS = 11, 8, 12
IDS = (None, 9, 6, 5)  # rows that have ids, None: all; at two ranks the second pads some of its rows, all of them, and the first too


def main(recipe, folder, stop) -> None:
    from launcher.engine.initialize import finish, initialize

    initialize(recipe)
    found = {"loss": losses(), "gradients": {name: gradients(*case) for name, case in CASES.items()}}
    found |= {"clip": {name: clipped(*case) for name, case in CLIPPED.items()}, "refusals": refusals()}
    found["documents"] = documents_apart()
    found["otherwise"] = {name: otherwise(keys) for name, keys in MODELS.items()}
    if dist.get_rank() == 0:
        (folder.path / "result.json").write_text(json.dumps(found))
    finish()


def losses() -> dict[str, float]:
    """Largest relative differences of loss and gradients from torch.nn.functional.cross_entropy, chunks of four tokens."""
    from launcher.engine import loss

    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    return {
        f"{dtype}, {group.size()} ranks": max(one_loss(getattr(torch, dtype), group, loss, ids) for ids in IDS)
        for dtype in ("float32", "bfloat16", "float16")
        for group in (alone, dist.group.WORLD)
    }


def one_loss(dtype: torch.dtype, group, loss, ids: int | None) -> float:
    torch.manual_seed(5)
    whole = (8 * torch.randn(ROWS, WIDTH)).to(dtype)  # likely and unlikely targets, some with probabilities that vanish
    hidden, labels, mask = torch.randn(TOKENS, WIDTH).to(dtype), torch.randint(ids or ROWS, (TOKENS,)), torch.ones(TOKENS)
    mask[3:5], scale = 0.0, 2.0**12 / TOKENS
    exact = [hidden.double().requires_grad_(), whole.double().requires_grad_()]
    expected = (torch.nn.functional.cross_entropy(exact[0] @ exact[1][:ids].t(), labels, reduction="none") * mask).sum()
    (expected * scale).backward()
    share = slice(group.rank() * ROWS // group.size(), (group.rank() + 1) * ROWS // group.size())
    hidden.requires_grad_()
    weight = torch.nn.Parameter(whole[share].clone())
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    with mock.patch.dict(loss.LOGIT_ROWS, cpu=4):
        with torch.no_grad():
            unwanted = loss.linear_cross_entropy(hidden, weight, labels, mask, group, ids=ids)
        total = loss.linear_cross_entropy(hidden, weight, labels, mask, group, add_to_main_grad=True, expected_scale=scale, ids=ids)
    (total * scale).backward()
    hidden_grad = hidden.grad.double()
    dist.all_reduce(hidden_grad, group=group)
    weight_grad = exact[1].grad.clone()
    weight_grad[share] = weight.main_grad.double() - 1
    pairs = (
        (total, expected),
        (unwanted, expected),
        (hidden_grad, exact[0].grad),
        (weight_grad, exact[1].grad),
    )
    return max(((ours.double() - theirs).abs().max() / theirs.abs().max()).item() for ours, theirs in pairs)


def gradients(tp: int, family: str, sequence_parallel: bool) -> float:
    """Largest difference of any parameter's gradient from that of megatron-core's GPTModel, relative to the latter's largest."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from launcher.engine import model

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp)
    model_parallel_cuda_manual_seed(1)
    recipe = tiny("fast", tp)
    for key, value in FAMILIES[family].items():
        setattr(recipe.model, key, value)
    recipe.parallel.sequence_parallel = sequence_parallel
    config = model.transformer_config(recipe)
    ours = model.build_chunk(recipe, config, pre=True, post=True)
    plain = dataclasses.replace(config, gradient_accumulation_fusion=False)
    with mock.patch.object(model, "LanguageModel", GPTModel):
        theirs = model.build_chunk(recipe, plain, pre=True, post=True)
    theirs.load_state_dict(ours.state_dict())
    (wrapped,) = model.wrap_data_parallel(recipe, config, [ours])
    torch.manual_seed(6)
    ids, mask = torch.randint(49, (2, 25)), torch.ones(2, 24)
    mask[0, 7:9] = 0
    inputs = ids[:, :-1], torch.arange(24).expand(2, 24), None
    for _ in range(2):  # the second backward pass adds to the first
        (wrapped(*inputs, labels=ids[:, 1:], loss_mask=mask) / 2).backward()
    (theirs(*inputs, labels=ids[:, 1:]) * mask).sum().backward()
    found = [difference(p.main_grad, q.grad) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)]
    assert all(p.grad is None for p in ours.parameters())
    return max(found)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def otherwise(keys: dict) -> dict[str, float]:
    """Largest difference of a model's logits over two documents a sample from those of its fused attention on a CPU: as it is configured
    for a GPU, its fused functions as they are written, and with megatron-core's unfused attention."""
    from megatron.core import parallel_state

    from launcher.engine import model

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    recipe, logits, weights = tiny("fast"), {}, None
    recipe.model = dataclasses.replace(recipe.model, **keys)
    ids = torch.randint(49, (2, 24), generator=torch.Generator().manual_seed(7))
    document = (torch.arange(24) >= torch.tensor([[9], [20]])).long()
    for name, device, backend in (("plain", "cpu", "auto"), ("GPU", "cuda", "auto"), ("unfused", "cpu", "unfused")):
        recipe.derived.device, recipe.model.attention_backend = device, backend
        config = model.transformer_config(recipe)
        chunk = model.build_chunk(recipe, config, pre=True, post=True)
        weights = weights or chunk.state_dict()
        chunk.load_state_dict(weights)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            logits[name] = chunk(ids, torch.arange(24).expand(2, 24), document)
    plain = logits.pop("plain")
    return {name: difference(found, plain) for name, found in logits.items()}


def documents_apart() -> bool:
    """Whether the loader's documents hide from each other what Megatron's mask of the same tokens hides."""
    from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids

    from launcher.engine.attention import document_mask
    from launcher.engine.data import loader

    recipe = tiny("fast")
    recipe.data.reset_attention_mask, recipe.training.micro_batch_size = True, 3
    recipe.data.num_workers, eod = 0, recipe.derived.vocab_size - 1
    samples = torch.tensor([[eod, 1, 2, eod, eod, 3, 4, eod], [1, eod, 2, 3, 4, 5, eod, 6], [1, 2, 3, 4, 5, 6, 7, 8]])
    batch = next(loader(recipe, 2 * [{"tokens": sample} for sample in samples], 0))  # for two data-parallel ranks
    theirs = [_get_ltor_masks_and_position_ids(sample, eod, False, True, False, True)[0] for sample in samples]
    return torch.equal(document_mask(batch["document"]), torch.stack(theirs))


def clipped(precision: str, shared_out: bool) -> float:
    """Largest difference of a weight after two clipped steps from torch's own clipping and AdamW in fp32, relative to a step (in
    fp16 to the weight). Both data-parallel ranks have the same gradients."""
    from megatron.core import parallel_state

    from launcher.engine import model
    from launcher.engine.optimizer import build_optimizer

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    recipe, half = tiny("fast"), precision == "fp16"
    recipe.model.num_layers, recipe.optimizer.clip_grad = 1, 0.5
    recipe.training.precision, recipe.training.loss_scale = precision, LOSS_SCALE if half else None
    recipe.parallel.use_distributed_optimizer = shared_out
    config = model.transformer_config(recipe)
    chunks = model.wrap_data_parallel(recipe, config, model.build_chunks(recipe, config))
    optimizer = build_optimizer(recipe, chunks)
    for group in optimizer.param_groups:
        group["weight_decay"] *= group["wd_mult"]  # as the schedule does
    ours = list(chunks[0].parameters())
    copies = [torch.nn.Parameter(parameter.detach().float().clone()) for parameter in ours]
    groups = [{"params": [c for c in copies if c.ndim > 1]}, {"params": [c for c in copies if c.ndim == 1], "weight_decay": 0.0}]
    o = recipe.optimizer
    plain = torch.optim.AdamW(groups, o.lr, (o.adam_beta1, o.adam_beta2), o.adam_eps, weight_decay=o.weight_decay)
    torch.manual_seed(8)
    for factor in (1.0, 1e-3):  # above and below the limit
        for parameter, copy in zip(ours, copies, strict=True):
            gradient = factor * torch.randn_like(copy)
            parameter.main_grad.copy_(gradient * (LOSS_SCALE if half else 1.0))
            copy.grad = parameter.main_grad.float() / (LOSS_SCALE if half else 1.0)
        norm = torch.nn.utils.clip_grad_norm_(copies, o.clip_grad)
        plain.step()
        chunks[0].finish_grad_sync()
        updated, told, _ = optimizer.step()
        assert updated and abs(told / norm.item() - 1) < 1e-5, (precision, shared_out, told, norm)
    assert half or shared_out or nothing_moves(optimizer, ours)
    apart = [(p.float() - c).abs() / (c.abs() + 1e-3 if half else o.lr) for p, c in zip(ours, copies, strict=True)]
    return max(one.max().item() for one in apart)


def nothing_moves(optimizer, parameters: list[torch.Tensor]) -> bool:
    """Whether gradients that are no numbers leave weights and moments as they are."""
    held = [*parameters, *(value for part in optimizer.chained_optimizers for state in part.optimizer.state.values() for value in state.values())]
    before = [tensor.detach().clone() for tensor in held]
    for bad in (float("nan"), float("inf")):
        parameters[0].main_grad.view(-1)[0] = bad
        updated, norm, _ = optimizer.step()
        assert not updated and not math.isfinite(norm)
    return len(held) == 4 * len(parameters) and all(map(torch.equal, held, before))


def refusals() -> dict[str, str]:
    """What stops a run in fp16, by the case: of the loss, the loss scale, whether a step was taken, on one rank of two."""
    from launcher.engine.train import NotFinite, refuse_not_finite

    cases = {
        "taken": (1.0, 8.0, True, None),
        "skipped": (1.0, 8.0, False, None),
        "at the floor": (1.0, 2.0, False, None),
        "fixed": (1.0, 8.0, False, 8.0),
        "fixed, taken": (1.0, 8.0, True, 8.0),
        "loss": (math.nan, 8.0, False, None),
    }
    found, recipe, other = {}, tiny("fast"), dist.get_rank() == 1
    recipe.training.precision, recipe.training.min_loss_scale = "fp16", 2.0
    for name, (loss, scale, updated, fixed) in cases.items():
        recipe.training.loss_scale, found[name] = fixed, ""
        loss = torch.tensor(1.0 if other else loss)  # the other is no last pipeline stage
        try:
            refuse_not_finite(recipe, 7, loss, 1.0 if updated else None, updated, torch.tensor([scale]))
        except NotFinite as fault:
            found[name] = str(fault)
    return found


if __name__ == "__main__":
    run_worker(main)
