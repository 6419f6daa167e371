"""Peak memory of every pipeline stage's ranks, part by part, of a training step and of saving a checkpoint.

Which moment is the fullest depends on the shapes, so each is reckoned and the fullest counts:

    loss      the last stage has its logits, and all that its forward passes kept
    layer     the first layer of the backward pass makes its gradients; with recomputation its activations come anew
    end       the gradient of the vocabulary's table is whole, the activations are gone
    update    in fp16 the optimizer makes fp32 copies of the gradients; gloo copies those that it shares out
    save      on a CPU: what a checkpoint is written from; data-parallel rank 0 gathers the distributed optimizer's state
"""

from __future__ import annotations

from dataclasses import dataclass

from launcher.recipe.estimate import activations
from launcher.recipe.estimate.activations import BYTES, STATISTIC, tokens
from launcher.recipe.estimate.stages import Chunk, chunks, in_flight
from launcher.recipe.schema import Recipe
from launcher.recipe.size import LOGIT_ROWS, adapter_parameters, layer_parameters, norm, position_table, vocabulary_table, whole_logits, widths

GIB = 2**30
BAND = 0.10  # what the estimate may be off by, either way (tests/benchmarks/README.md)
# Of a process without a model. CPU: resident after the imports, measured. GPU: the CUDA context, cuBLAS's workspace and
# NCCL's buffers, which no allocator of torch counts.
BASE = {"cpu": int(0.34 * GIB), "cuda": int(1.5 * GIB)}
# glibc's heap of a CPU process, which keeps what is freed for the next step (launcher/launch/torchrun.py), has holes: so much, and
# a share of what comes and goes, by ten cases that were measured; of little, 0.7. Twice that with tensor-parallel ranks, whose
# shares are gathered and summed meanwhile (two cases: 0.5 and 0.7 GiB of 0.4 that come and go). ZeRO 2 and 3 gather and let go
# of each layer's weights between the others' activations: 0.22 to 0.44 GiB more (four cases).
HOLES, GATHERED_HOLES = (int(0.35 * GIB), 0.2), int(0.25 * GIB)
PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "base")


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its fullest moment.

    Attributes:
        weights: the model's, and those of its adapters.
        gradients: the buffer that the data-parallel ranks reduce, of what is trained.
        optimizer: Adam's moments of that, and in 16 bits its fp32 weights.
        activations: of all micro-batches in flight.
        workspace: the logits and their loss, a layer's gradients, recomputed activations, a checkpoint's gathered state.
        base: of a process without a model, and on a CPU the holes of its heap.
        saving: the fullest moment is that of writing a checkpoint.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    base: int
    saving: bool

    @property
    def total(self) -> int:
        return sum(getattr(self, part) for part in PARTS)


def stage_memory(recipe: Recipe, saves: bool = True) -> list[Memory]:
    """The memory of a rank on each pipeline stage. Data-parallel rank 0 `saves`, and is the fullest of its group."""
    return [_rank(recipe, number, stage, saves) for number, stage in enumerate(chunks(recipe))]


def stage_parameters(recipe: Recipe, stage: list[Chunk]) -> int:
    """Numbers of the model that one rank of a stage holds, adapters not."""
    tp = recipe.parallel.tensor_model_parallel_size
    shared, whole = layer_parameters(recipe)
    count = sum(chunk.layers for chunk in stage) * (shared // tp + whole)
    if stage[0].embedding:
        count += vocabulary_table(recipe) // tp + position_table(recipe)
    if stage[-1].output:
        # tied, the last of several stages has a copy of the table; the first of one stage has it already
        own_table = recipe.model.untie_embeddings_and_output_weights or not stage[0].embedding
        count += norm(recipe) + (vocabulary_table(recipe) // tp if own_table else 0)
    return count


def trained_parameters(recipe: Recipe, stage: list[Chunk]) -> int:
    """Numbers that one rank of a stage trains: all that it holds, or its adapters alone."""
    if not recipe.lora.rank:
        return stage_parameters(recipe, stage)
    shared, whole = adapter_parameters(recipe)
    return sum(chunk.layers for chunk in stage) * (shared // recipe.parallel.tensor_model_parallel_size + whole)


def bytes_per_parameter(recipe: Recipe) -> tuple[float, float, float]:
    """Bytes of weight, gradient and optimizer state for each number that a rank holds.

    Megatron's 18, or 6 + 12 / DP with the distributed optimizer, are bf16: its gradients are reduced in fp32. With ZeRO 2 and 3
    all 16 / DP are fp32; the weights that are gathered come on top.
    """
    precision = recipe.training.precision
    if sharded(recipe):
        return 4 / recipe.derived.data_parallel_size, 4 / recipe.derived.data_parallel_size, 8 / recipe.derived.data_parallel_size
    share = recipe.derived.data_parallel_size if recipe.parallel.use_distributed_optimizer else 1
    moments, main_weights = 8, 0 if precision == "fp32" else 4
    return BYTES[precision], 2 if precision == "fp16" else 4, (moments + main_weights) / share


def sharded(recipe: Recipe) -> bool:
    """Whether every rank keeps rows alone: ZeRO 2 and 3."""
    return (recipe.parallel.zero or 0) >= 2


def gathered(recipe: Recipe, stage: list[Chunk]) -> int:
    """Weights that ZeRO's ranks gather from each other: in stage 2 all for the whole step, in stage 3 those of a layer, of the
    one that is gathered meanwhile, and of what surrounds the layers."""
    if not sharded(recipe):
        return 0
    size, (shared, whole) = BYTES[recipe.training.precision], layer_parameters(recipe)
    count, layers = stage_parameters(recipe, stage), sum(chunk.layers for chunk in stage)
    layer = shared // recipe.parallel.tensor_model_parallel_size + whole
    return size * (count if recipe.parallel.zero == 2 else count - max(layers - 2, 0) * layer)


def _rank(recipe: Recipe, number: int, stage: list[Chunk], saves: bool) -> Memory:
    count, each = trained_parameters(recipe, stage), bytes_per_parameter(recipe)
    held = stage_parameters(recipe, stage) + (count if recipe.lora.rank else 0)
    weights, gradients, optimizer = int(held * each[0]) + gathered(recipe, stage), int(count * each[1]), int(count * each[2])
    kept = _kept(recipe, number, stage)
    # moments in which the activations are there, and in which they are not
    full = max(_loss(recipe, stage), _layer(recipe, stage) - (activations.norm(recipe) if stage[-1].output else 0))
    save = _save(recipe, stage, count) if saves else 0
    built = count * BYTES[recipe.training.precision] - weights - gradients - optimizer if sharded(recipe) else 0
    empty = max(_end(recipe, stage), _update(recipe, count), save, built)
    # The rows' gradients are made by the first backward pass, and the activations are there until then.
    late = gradients if sharded(recipe) and recipe.derived.num_microbatches == 1 else 0
    there, workspace = (kept, full) if kept + full - late >= empty else (0, empty)
    gradients -= late if there else 0
    saving = not there and workspace == save > 0
    passing = max(kept + full, empty) + (count * (BYTES[recipe.training.precision] + 4) if sharded(recipe) else 0)  # gathered, summed
    base = BASE[recipe.derived.device] + (_holes(recipe, passing) if recipe.derived.device == "cpu" else 0)
    return Memory(weights, gradients, optimizer, there, workspace + _always(recipe), base, saving)


def _holes(recipe: Recipe, passing: int) -> int:
    """Of the heap, by the bytes that come and go in a step or are gathered for a checkpoint. Adapters' small tensors lie between
    the large ones: Llama with 0.7 GiB of activations had 1.2 GiB of holes, with 0.9 GiB 1.4."""
    if recipe.lora.rank:
        return int(1.5 * passing)
    times = 1 if recipe.parallel.tensor_model_parallel_size == 1 else 2
    holes = min(int(0.7 * times * passing), HOLES[0] * times + int(HOLES[1] * passing))
    return holes + (GATHERED_HOLES if sharded(recipe) else 0)


def _kept(recipe: Recipe, number: int, stage: list[Chunk]) -> int:
    """Activations of every micro-batch in flight on a pipeline rank."""
    held = in_flight(recipe, number, len(stage))
    return sum(count * _chunk(recipe, chunk) for count, chunk in zip(held, stage, strict=True))


def _chunk(recipe: Recipe, chunk: Chunk) -> int:
    """What one forward pass through a chunk keeps, without the logits."""
    p, stream = recipe.parallel, activations.boundary(recipe)
    kept = chunk.layers * activations.layer(recipe)
    if p.recompute_granularity == "full":
        if p.recompute_method == "uniform":
            kept = -(-chunk.layers // p.recompute_num_layers) * stream
        else:
            again = min(p.recompute_num_layers, chunk.layers)
            kept = again * stream + (chunk.layers - again) * activations.layer(recipe)
    if chunk.embedding:
        kept += activations.dropout_mask(recipe)
    if chunk.output:
        kept += activations.norm(recipe)
    elif recipe.derived.device == "cpu":
        kept += stream  # a GPU frees what was sent to the next stage; gloo may still be reading it
    return kept


def _loss(recipe: Recipe, stage: list[Chunk]) -> int:
    """Logits and loss; a frozen table has no gradient. In chunks (launcher/engine/loss.py): a chunk's logits or their gradients, in fp32 and in 16 bits, the
    table's gradient in fp32, a product in 16 bits to be added to it, the gradient of the layer's input."""
    if not stage[-1].output:
        return 0
    size, tp, device = BYTES[recipe.training.precision], recipe.parallel.tensor_model_parallel_size, recipe.derived.device
    copy = size if size != STATISTIC else 0
    rows, table = min(tokens(recipe), LOGIT_ROWS[device]), 0 if recipe.lora.rank else vocabulary_table(recipe) // tp
    logits = rows * recipe.derived.padded_vocab_size // tp
    stream = tokens(recipe) * recipe.model.hidden_size * size
    if whole_logits(recipe):  # whole, by megatron-core: then their gradient, and those of the output layer
        return max(logits * (size + (STATISTIC if copy else 0)), logits * size + stream + table * size)
    return (logits + table) * (STATISTIC + copy) + stream


def _layer(recipe: Recipe, stage: list[Chunk]) -> int:
    """A layer's backward pass: gradients of the feed-forward layer's and of its weights, recomputed activations; on a GPU a
    tied table's gradient waits from the loss to the embedding."""
    p, w = recipe.parallel, widths(recipe)
    size, tp = BYTES[recipe.training.precision], p.tensor_model_parallel_size
    work = size * (tokens(recipe) * (w.hidden + w.up // tp) + (0 if recipe.lora.rank else w.ffn * w.hidden // tp))
    if p.recompute_granularity == "full":
        layers, number = max(chunk.layers for chunk in stage), p.recompute_num_layers
        # block recomputes the first layers, when those after them have let go of theirs
        together = min(number, layers) if p.recompute_method == "uniform" else int(number >= layers)
        work += together * activations.layer(recipe)
    elif p.recompute_granularity == "selective":
        work += activations.core_attention(recipe)
    if sharded(recipe):  # a whole layer's, and their copy in fp32 that is summed
        shared, whole = layer_parameters(recipe)
        work += (shared // tp + whole) * (size + 4)
    tied = _tied_here(recipe, stage) and (recipe.derived.device == "cuda" or sharded(recipe)) and not recipe.lora.rank
    return work + (_table(recipe) if tied else 0)


def _end(recipe: Recipe, stage: list[Chunk]) -> int:
    """The vocabulary's table at the end of the backward pass: its gradient, and tied that of the logits and their sum. A CPU
    adds the batch's rows to the buffer."""
    if not stage[0].embedding or recipe.derived.device == "cpu" and not sharded(recipe) or recipe.lora.rank:
        return 0
    summed = vocabulary_table(recipe) // recipe.parallel.tensor_model_parallel_size * 4 if sharded(recipe) else 0
    return _table(recipe) * (3 if _tied_here(recipe, stage) else 1) + summed


def _update(recipe: Recipe, count: int) -> int:
    p, d = recipe.parallel, recipe.derived
    shared_out = p.use_distributed_optimizer and d.data_parallel_size > 1
    copies = 4 * count // (d.data_parallel_size if p.use_distributed_optimizer else 1) if recipe.training.precision == "fp16" else 0
    gradients = int(bytes_per_parameter(recipe)[1] * count)
    return max(copies, gradients if shared_out and d.device == "cpu" else 0)


def _save(recipe: Recipe, stage: list[Chunk], count: int) -> int:
    """Host memory to write a checkpoint from; on a GPU nothing of it lies in the GPU's memory.

    The distributed optimizer's fp32 weights and moments: a rank's own shares, the whole of a data-parallel group, and
    its tensors cut out of that. Without it only the gated matrices are copied: each half is a tensor of its own.
    """
    p, m, w = recipe.parallel, recipe.model, widths(recipe)
    if recipe.derived.device == "cuda":
        return 0
    if sharded(recipe):  # the weights in the training's precision, of fp32 ones
        return 0 if recipe.training.precision == "fp32" else 2 * count // recipe.derived.data_parallel_size
    if p.use_distributed_optimizer:
        return (12 + 12) * count + 12 * count // recipe.derived.data_parallel_size
    weight, _, state = bytes_per_parameter(recipe)
    if recipe.lora.rank:
        return 0  # that of the adapters is small
    gated = sum(chunk.layers for chunk in stage) * w.hidden * w.up // p.tensor_model_parallel_size if m.swiglu else 0
    return int(gated * (weight + state))


def _always(recipe: Recipe) -> int:
    """Buffers that megatron-core keeps: scores of an unfused attention, the sequence gathered from its parts."""
    always = 0 if activations.fused_attention(recipe) else activations.scores(recipe) * BYTES[recipe.training.precision]
    if recipe.parallel.sequence_parallel:
        always += activations.boundary(recipe) * recipe.parallel.tensor_model_parallel_size
    return always


def _table(recipe: Recipe) -> int:
    """Bytes of a gradient of the vocabulary's table, before it is added to the buffer."""
    return vocabulary_table(recipe) // recipe.parallel.tensor_model_parallel_size * BYTES[recipe.training.precision]


def _tied_here(recipe: Recipe, stage: list[Chunk]) -> bool:
    return stage[0].embedding and stage[-1].output and not recipe.model.untie_embeddings_and_output_weights
