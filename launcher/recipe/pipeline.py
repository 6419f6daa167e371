"""Megatron's notation of pipeline stages: `Et*3|t*3L`."""

from __future__ import annotations

import re


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


def layers_of_stages(layout: str | None) -> list[int] | None:
    """How many layers each stage of a layout has; None of none."""
    return None if layout is None else [stage.count("t") for stage in parse_layout(layout)]
