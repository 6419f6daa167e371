"""Days of a training from the share of the GPUs' peak that it reaches, and what a step's time is spent on.

`training_seconds` takes the share as given (launch.mfu). `step` tells layouts apart: a model of a few constants, good for
an order of layouts and rough in seconds. None of its communication is hidden behind arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from launcher.recipe.estimate.activations import BYTES, tokens
from launcher.recipe.estimate.memory import sharded, trained_parameters
from launcher.recipe.estimate.stages import Chunk, chunks
from launcher.recipe.schema import Recipe
from launcher.recipe.size import filter_products, flops_per_token, layer_products, vocabulary_table, widths

A100_TFLOPS = 312.0  # dense bf16 and fp16, where launch.gpu_peak_tflops is not given
# Of one A100 machine with NVLink and a 200 Gb/s adapter per GPU; a step's order of layouts hardly changes on an H100,
# whose links and arithmetic are both faster.
WITHIN, BETWEEN = 200e9, 20e9  # bytes/s that one GPU reaches within a machine, and between machines
MATRIX = 0.68  # of the peak, of large products and what lies between them: Yuan 2.0 102B then takes the 238 s a step of its authors' own model
FEW_TOKENS, NARROW = 256, 128  # rows of a micro-batch, columns per rank, at which a product reaches half of that
LATENCY = 20e-6  # seconds of starting one collective or one kernel-bound pass through a layer's seams


@dataclass(frozen=True)
class Step:
    """Seconds of one training step, by what they are spent on; they add up.

    Attributes:
        arithmetic: the model's own products, on the fullest pipeline stage.
        recompute: the forward passes that are made again.
        bubble: waiting for the pipeline to fill and drain.
        tensor: tensor parallelism's sums over the hidden width.
        pipeline: activations and their gradients from stage to stage.
        data: gradients summed and weights gathered over the data-parallel ranks.
    """

    arithmetic: float
    recompute: float
    bubble: float
    tensor: float
    pipeline: float
    data: float

    @property
    def seconds(self) -> float:
        return sum(getattr(self, part.name) for part in fields(self))

    def share(self, part: str) -> float:
        return getattr(self, part) / self.seconds


def total_flops(recipe: Recipe) -> float:
    """Floating-point operations of the whole training, forward and backward."""
    return flops_per_token(recipe) * recipe.derived.train_samples * recipe.training.seq_length


def training_seconds(recipe: Recipe) -> float | None:
    """Seconds of the whole training at launch.mfu of the peak; None without launch.gpu_peak_tflops."""
    peak = recipe.launch.gpu_peak_tflops
    return total_flops(recipe) / (recipe.derived.world_size * peak * 1e12 * recipe.launch.mfu) if peak else None


def peak_flops(recipe: Recipe) -> float:
    """Operations per second of one GPU at its peak."""
    return (recipe.launch.gpu_peak_tflops or A100_TFLOPS) * 1e12


def step(recipe: Recipe) -> Step:
    """The seconds of one step, reckoned for GPUs in machines of launch.nproc_per_node."""
    p, d = recipe.parallel, recipe.derived
    stages = chunks(recipe)
    rate = peak_flops(recipe) * _efficiency(recipe)
    forward = [_forward_flops(recipe, stage) / rate for stage in stages]  # of one micro-batch
    slowest = max(forward)
    again = slowest * _recomputed(recipe, stages[forward.index(slowest)])
    passes = 2 if recipe.lora.rank else 3  # forward, the input's gradients, and the weights' where they are trained
    busy = (passes * slowest + again) * d.num_microbatches
    virtual = len(stages[0])
    tensor = d.num_microbatches * _tensor(recipe, max(sum(chunk.layers for chunk in stage) for stage in stages))
    bubble = (busy + tensor) * (p.pipeline_model_parallel_size - 1) / (virtual * d.num_microbatches)
    return Step(
        passes * slowest * d.num_microbatches, again * d.num_microbatches, bubble, tensor, _pipeline(recipe, virtual), _data(recipe)
    )


def _efficiency(recipe: Recipe) -> float:
    """The share of the peak that products of these shapes reach: small micro-batches and thin slices reach less."""
    rows, columns = tokens(recipe), widths(recipe).hidden / recipe.parallel.tensor_model_parallel_size
    return MATRIX * rows / (rows + FEW_TOKENS) * columns / (columns + NARROW)


def _forward_flops(recipe: Recipe, stage: list[Chunk]) -> float:
    """Of one micro-batch on one rank of a stage."""
    tp = recipe.parallel.tensor_model_parallel_size
    whole = 0 if recipe.parallel.sequence_parallel else filter_products(recipe)  # of the whole sequence, on every rank
    products = sum(chunk.layers for chunk in stage) * ((layer_products(recipe) - whole) / tp + whole)
    if stage[-1].output:
        products += vocabulary_table(recipe) / tp
    return 2.0 * products * tokens(recipe)


def _recomputed(recipe: Recipe, stage: list[Chunk]) -> float:
    """The share of a stage's layers that go forward twice."""
    p, layers = recipe.parallel, sum(chunk.layers for chunk in stage)
    if p.recompute_granularity != "full" or not layers:
        return 0.0
    if p.recompute_method == "uniform":
        return 1.0
    return sum(min(p.recompute_num_layers, chunk.layers) for chunk in stage) / layers


def _tensor(recipe: Recipe, layers: int) -> float:
    """Four sums of the residual stream per layer and micro-batch, two more where a layer goes forward twice."""
    p = recipe.parallel
    tp = p.tensor_model_parallel_size
    if tp == 1:
        return 0.0
    bandwidth = WITHIN if tp <= recipe.launch.nproc_per_node else BETWEEN
    stream = tokens(recipe) * recipe.model.hidden_size * BYTES[recipe.training.precision]
    sums = 6 if p.recompute_granularity == "full" else 4
    return layers * sums * (2 * (tp - 1) / tp * stream / bandwidth + 2 * LATENCY)


def _pipeline(recipe: Recipe, virtual: int) -> float:
    """Every micro-batch leaves a rank once forward and once backward for each of its chunks."""
    p = recipe.parallel
    pp = p.pipeline_model_parallel_size
    if pp == 1:
        return 0.0
    within = recipe.derived.world_size <= recipe.launch.nproc_per_node  # neighbours are world / PP ranks apart
    share = p.tensor_model_parallel_size if p.sequence_parallel else 1
    sent = tokens(recipe) * recipe.model.hidden_size * BYTES[recipe.training.precision] / share
    return 2 * virtual * recipe.derived.num_microbatches * (sent / (WITHIN if within else BETWEEN) + LATENCY)


def _data(recipe: Recipe) -> float:
    """A ring's reduce-scatter of the gradients and all-gather of the weights, or of the gradients again. ZeRO 2 and 3 reduce after
    every micro-batch; 2 gathers once a step, 3 before every pass forward and backward."""
    p, d = recipe.parallel, recipe.derived
    dp = d.data_parallel_size
    if dp == 1:
        return 0.0
    held = max(trained_parameters(recipe, stage) for stage in chunks(recipe))
    gradient, weight = 2 if recipe.training.precision == "fp16" else 4, BYTES[recipe.training.precision]
    reduced, gathered = gradient, weight if p.use_distributed_optimizer else gradient
    if sharded(recipe):
        reduced, gathered = d.num_microbatches * gradient, weight * (1 if p.zero == 2 else 2 * d.num_microbatches)
    size = held * (reduced + gathered)
    within = p.tensor_model_parallel_size * dp <= recipe.launch.nproc_per_node
    return (dp - 1) / dp * size / (WITHIN if within else BETWEEN)
