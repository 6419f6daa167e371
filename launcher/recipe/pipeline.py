"""Megatron's notation of pipeline stages: `Et*3|t*3L`."""

from __future__ import annotations

import re

from launcher.recipe.schema import Convert


class LayoutError(ValueError):
    """A layout that is not in Megatron's notation."""


def parse_layout(layout: str) -> list[str]:
    """The stages of a layout, each as its letters: 'Et*2|(t|)*2L' → ['Ett', 't', 't', 'L'].

    `(...)*n` and `x*n` repeat; commas are decoration. Source: PipelineParallelLayerLayout of megatron-core 0.16, of
    which the multi-token-prediction letter `m` is left out: no model here has such layers.

    Raises:
        LayoutError: a sign that means nothing there.
    """
    text = layout.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]+)\)\*(\d+)", r"(.)\*(\d+)"):
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    unknown = sorted(set(text) - set("EtL|"))
    if unknown:
        raise LayoutError(f"{' and '.join(map(repr, unknown))} mean nothing in a pipeline layout")
    return text.split("|")


def stages_asked(asked: Convert, layers: int) -> list[int] | None:
    """How many layers each stage has that a conversion is to write, virtual ones each by itself; None: as many on each rank."""
    if asked.pipeline_model_parallel_layout is not None:
        return [stage.count("t") for stage in parse_layout(asked.pipeline_model_parallel_layout)]
    each = asked.num_layers_per_virtual_pipeline_stage
    return None if each is None else [each] * (layers // each)
