"""Fine-tuning: the loss and its gradients are those of the rows one by one, whatever the layout and however they are packed:
Yuan 2.0 in plain PyTorch, GPT-2 and Llama by `transformers`' models and its own loss."""

import json

import pytest

from data_tools.sft import Rows
from launcher.recipe.converted import model_of
from launcher.recipe.frozen import write_frozen
from launcher.run.folder import RunFolder
from tests.launcher.engine import sft_worker as worker
from tests.launcher.engine.runs import launched
from tests.launcher.engine.sft_worker import TOKENS

TENSORS = {"yuan2": 4 * 12 + 2, "gpt2": 4 * 12 + 4, "llama": 4 * 6 + 3}


def by_transformers(folder, case: str) -> None:
    """A random model, its loss on the rows one by one and the gradients of that, under our names: a file for each normalization."""
    import torch
    import transformers

    from checkpoints.models import gpt2, llama

    recipe = worker.of_case(case)
    m, sizes = recipe.model, {"vocab_size": recipe.derived.vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    if m.family == "gpt2":
        config = transformers.GPT2Config(n_embd=m.hidden_size, n_layer=m.num_layers, n_head=4, n_positions=TOKENS, **sizes)
    else:
        config = transformers.LlamaConfig(hidden_size=m.hidden_size, num_hidden_layers=m.num_layers, num_attention_heads=4,
            intermediate_size=m.ffn_hidden_size, rms_norm_eps=m.norm_epsilon, max_position_embeddings=TOKENS, **sizes)  # fmt: skip
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    of, table = dict(model.named_parameters()), {"gpt2": gpt2, "llama": llama}[m.family].foreign(model_of(recipe))
    for normalization in ("token", "sample"):
        model.zero_grad()
        loss = transformers_loss(model, Rows(folder / "rows"), normalization)
        loss.backward()
        weights, gradients = ({one.tensor.name: one.layout.join([take(of[name]) for name in one.names]) for one in table}
            for take in (lambda parameter: parameter.detach(), lambda parameter: parameter.grad.clone()))  # fmt: skip
        torch.save({"loss": loss.item(), "weights": weights, "gradients": gradients}, folder / f"{m.family}_{normalization}.pt")


def transformers_loss(model, rows, normalization):
    import torch

    losses, counts = [], []
    for number in range(len(rows) - 1):  # the last one is left out
        row = rows.row(number)
        ids, trained = torch.tensor(row.ids[: TOKENS + 1]).long(), torch.tensor(row.trained[: TOKENS + 1])
        labels = ids.where(trained, -100)[None, 1:]  # shifted already: the model has no place for the last token
        losses.append(model(ids[None, :-1], labels=labels, shift_labels=labels).loss)
        counts.append(trained[1:].sum())
    losses, counts = torch.stack(losses), torch.stack(counts)
    return (losses * counts).sum() / counts.sum() if normalization == "token" else losses.mean()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What four ranks found: for each case the largest differences from the rows one by one."""
    pytest.importorskip("transformers")
    folder = RunFolder(tmp_path_factory.mktemp("sft"))
    folder.logs.mkdir()
    worker.write_rows(folder.path / "rows")
    for case in ("gpt2_packed", "llama_packed_tp4"):
        by_transformers(folder.path, case)
    recipe = worker.of_case("packed")
    write_frozen(recipe, folder.recipe)
    launched(folder, worker.__file__)
    return json.loads((folder.path / "result.json").read_text())


@pytest.mark.parametrize("name", worker.CASES)
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(found, name):
    gradients = [value for key, value in found[name].items() if key.startswith("gradient")]
    assert found[name]["loss"] < 1e-5
    assert len(gradients) == (0 if "zero1" in name else TENSORS[worker.CASES[name][-1]])
    assert max(gradients, default=0) < 1e-5


def test_every_epoch_sees_each_sample_once(tmp_path):
    """Whatever fills its last batch: more epochs than were meant at first begin where the last one ended."""
    from launcher.engine.rows import build_row_sets
    from launcher.recipe.finetuning import settle_length

    worker.write_rows(tmp_path / "rows")
    recipe, epochs = worker.of_case("packed"), {}
    recipe.training.global_batch_size, recipe.derived.train_rows = 4, [str(tmp_path / "rows")]
    for count in (1, 3):
        recipe.training.epochs = count
        settle_length(recipe, {}, 5)
        samples = build_row_sets(recipe)[0]
        assert (len(samples.samples), len(samples), recipe.derived.train_iters) == (5, 8 * count, 2 * count)
        found = [samples[i] for i in range(len(samples))]
        trained = [tuple(one["labels"].tolist()) if one["loss_mask"].any() else () for one in found]
        epochs[count] = [trained[i : i + 8] for i in range(0, len(trained), 8)]
    assert epochs[1] == epochs[3][:1] and epochs[3][0] != epochs[3][1]
    assert all(len(set(epoch) - {()}) == 5 and epoch.count(()) == 3 and set(epoch) == set(epochs[1][0]) for epoch in epochs[3])
