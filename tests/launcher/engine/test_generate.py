"""Greedy and sampled decoding with the cache, against whole forward passes of the training model, at TP and PP."""

import json

import pytest

from tests.launcher.engine.generate_worker import FAMILIES, PROMPTS, run, tiny

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}
EOD = 49


@pytest.fixture(scope="module")
def references(trained):
    return json.loads((trained / "result.json").read_text())


@pytest.fixture(scope="module")
def results(trained):
    return {name: run(trained.parent / name, tiny("answer", *layout)) for name, layout in LAYOUTS.items()}


def stopped(ids: list[int]) -> tuple[list[int], str]:
    """What an answer must be when the uncached model goes on to say `ids`."""
    return (ids[: ids.index(EOD)], "stop") if EOD in ids else (ids, "length")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_greedy_is_the_uncached_model_token_for_token(references, results, layout, family):
    expected = [stopped(ids) for ids in references[family]]
    answers = results[layout][family]["greedy"]
    assert [(answer["ids"], answer["finish_reason"]) for answer in answers] == expected
    assert len({token for ids, _ in expected for token in ids}) > 5  # a model that repeats one token would prove little


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sampled_answer_belongs_to_seed_and_line_not_to_its_batch_or_layout(results, family):
    one = results["tp1"][family]
    assert one["sampled"] == one["sampled_alone"]
    assert results["tp2"][family]["sampled"] == results["pp2"][family]["sampled"] == one["sampled"]
    assert one["other_seed"] != one["sampled"] != one["greedy"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_penalty_that_forbids_leaves_no_token_twice(results, family):
    for layout in LAYOUTS:
        for prompt, answer in zip(PROMPTS, results[layout][family]["penalised"], strict=True):
            assert answer["ids"] and len(set(answer["ids"])) == len(answer["ids"])
            assert not set(answer["ids"]) & set(prompt)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_broken_model_answers_nothing(results, layout, family):
    assert results[layout][family]["broken"] == [{"line": 1, "ids": [], "finish_reason": "error"}]
