"""The training loop: Megatron-LM's, around megatron-core's schedules, with the same numbers at every step."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass, field

import torch
from megatron.core import num_microbatches_calculator as microbatches
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer_param_scheduler import get_canonical_lr_for_logging

from checkpoints.adapters import Adapters
from launcher.engine import compiled, data, model
from launcher.engine.optimizer import build_optimizer, build_scheduler, init_batch_calculator
from launcher.engine.step import from_last_stage, run_microbatches
from launcher.recipe.schema import Recipe
from launcher.recipe.size import flops_per_token


@dataclass
class Pending:
    """What the next line of metrics will tell of the steps since the last: also in a checkpoint, so that a line over a
    break is the uninterrupted one. Losses are of the last pipeline stage."""

    losses: list[float] = field(default_factory=list)
    skipped_losses: list[float] = field(default_factory=list)


@dataclass
class Best:
    """The lowest validation loss so far, how many evaluations in a row were not lower since, and the step of the newest one."""

    loss: float | None = None
    iteration: int = 0
    worse: int = 0
    judged: int = 0


@dataclass
class TrainState:
    """What training changes: all of it is in a checkpoint. Of adapters also what their checkpoints say of the weights beside them."""

    chunks: list
    optimizer: object
    scheduler: object
    iteration: int = 0
    consumed_train_samples: int = 0
    pending: Pending = field(default_factory=Pending)
    best: Best = field(default_factory=Best)
    adapters: Adapters | None = None

    def consumed_valid_samples(self, recipe: Recipe) -> int:
        """Where the next evaluation reads on: each one so far took eval_iters global batches."""
        training = recipe.training
        return self.iteration // training.eval_interval * training.eval_iters * training.global_batch_size


@dataclass
class Window:
    """The steps since the last line of metrics: their losses, still on the device, and what they cost."""

    losses: list[torch.Tensor] = field(default_factory=list)
    updated: list[bool] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    start: float = field(default_factory=time.perf_counter)


class NotFinite(RuntimeError):
    """The loss or the gradient is not a finite number, and a lower loss scale is no way out."""


def build(recipe: Recipe) -> TrainState:
    """Model, optimizer and schedule of this rank, with fresh weights."""
    init_batch_calculator(recipe, torch.distributed.get_rank())
    config = model.transformer_config(recipe)
    if recipe.training.torch_compile:
        compiled.ask_for_fused(config)
    chunks = model.build_chunks(recipe, config)
    if recipe.training.torch_compile:
        compiled.compile_norms(chunks)
    chunks = model.wrap_data_parallel(recipe, config, chunks)
    optimizer = build_optimizer(recipe, chunks)
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if recipe.parallel.overlap_param_gather:
        syncs = [chunk.start_param_sync for chunk in chunks]
        config.param_sync_func = syncs if len(syncs) > 1 else syncs[0]
    return TrainState(chunks, optimizer, build_scheduler(recipe, optimizer))


def train_step(recipe: Recipe, state: TrainState, batches: list) -> tuple[torch.Tensor, float | None, bool]:
    """One optimizer step over one global batch.

    Returns the mean loss over the batch's tokens (on the last pipeline stage), the gradient norm before clipping (None
    where the step was skipped) and whether the weights were updated (False: a gradient overflowed in fp16).
    """
    for chunk in state.chunks:
        chunk.zero_grad_buffer()
    state.optimizer.zero_grad()
    totals = run_microbatches(recipe, state.chunks, batches, microbatches.get_num_microbatches())
    updated, grad_norm, _ = state.optimizer.step()
    batch = microbatches.get_current_global_batch_size()
    if updated:
        state.scheduler.step(increment=batch)
    state.iteration += 1
    state.consumed_train_samples += batch
    return totals[0] / totals[1].clamp(min=1), grad_norm, updated


def evaluate(recipe: Recipe, state: TrainState, batches: list, iters: int, stop) -> float | None:
    """Mean loss per token over `iters` global batches, without dropout; None when `stop` asks to end."""
    for chunk in state.chunks:
        chunk.eval()
    count = recipe.training.global_batch_size // (recipe.training.micro_batch_size * recipe.derived.data_parallel_size)
    totals = torch.zeros(2, device="cuda")
    stopped = False
    with torch.no_grad():
        for _ in range(iters):
            stopped = agreed(stop.requested is not None)
            if stopped:
                break
            stop.watchdog.step()
            totals += run_microbatches(recipe, state.chunks, batches, count, forward_only=True)
    for chunk in state.chunks:
        chunk.train()
    total, tokens = from_last_stage(totals).tolist()
    return None if stopped else total / max(tokens, 1)


def agreed(*flags: bool) -> bool | list[bool]:
    """Whether any rank raised the flag: ranks must stop at the same step."""
    votes = torch.tensor([float(flag) for flag in flags], device="cuda")
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    answers = [vote > 0 for vote in votes.tolist()]
    return answers[0] if len(answers) == 1 else answers


def most(count: int) -> int:
    """The largest of all ranks' counts."""
    found = torch.tensor([float(count)], device="cuda")
    torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
    return int(found.item())


def refuse_not_finite(
    recipe: Recipe, iteration: int, loss: torch.Tensor, grad_norm: float | None, updated: bool, scale: torch.Tensor
) -> None:
    """Raise NotFinite, on all ranks together, where going on would train nothing; `scale` is the loss scale of this step.

    A gradient that overflowed in fp16 (`grad_norm` None) is no fault while the dynamic loss scale can still fall.
    """
    training = recipe.training
    overflowed = training.precision == "fp16" and not updated
    last = overflowed and (training.loss_scale is not None or scale.item() <= training.min_loss_scale)
    not_finite, last = agreed(not (math.isfinite(grad_norm or 0.0) and bool(torch.isfinite(loss))), last)
    if not_finite:
        what = f"the loss or the gradient is not finite at iteration {iteration} (loss {loss.item()}, gradient norm {grad_norm})"
    elif last and training.loss_scale is not None:
        what = (
            f"the gradient overflowed at iteration {iteration} with training.loss_scale={training.loss_scale:g}, which stays as it "
            "is: take a lower one, or null for one that adapts"
        )
    elif last:
        what = (
            f"the gradient overflowed at iteration {iteration} with the loss scale at its floor, "
            f"training.min_loss_scale={training.min_loss_scale:g}: a lower floor or training.precision=bf16 may do"
        )
    else:
        return
    raise NotFinite(f"{what}; this step is not saved; the same command goes on from the newest checkpoint, if there is one")


class Trainer:
    """Runs a recipe from the state's step to the end, a signal or a time limit."""

    def __init__(self, recipe: Recipe, state: TrainState, stop, progress, save):
        """`stop.requested` names a signal once one came; `progress`, on rank 0, writes metrics; `save(state, best)` writes a
        checkpoint on all ranks together, and where it is the best so far says so beside it."""
        self.recipe, self.state, self.stop, self.progress, self.save = recipe, state, stop, progress, save
        self.started = time.monotonic()
        self.saved_at: int | None = state.iteration
        self.window = Window()
        self.flops_per_token = flops_per_token(recipe)
        self.of_rows = recipe.data.train is not None
        train, self.valid, self.test = data.build_datasets(recipe)
        self.batches = self._loaders(train, state.consumed_train_samples)
        self.valid_batches = [] if self.of_rows else self._loaders(self.valid, state.consumed_valid_samples(recipe))
        self.has_valid, self.has_test = agreed(self.valid is not None, self.test is not None)
        self.supervised = train.share if self.of_rows and train is not None else None
        self.eval_iters = recipe.training.eval_iters
        if self.of_rows:  # the whole set, or so many batches of it, the same at every evaluation
            self.eval_iters = min(self.eval_iters, most(len(self.valid or ()) // recipe.training.global_batch_size))

    def _loaders(self, dataset, consumed: int) -> list:
        """One iterator per model chunk: under interleaving each chunk walks the same batches by itself."""
        return [data.loader(self.recipe, dataset, consumed) for _ in self.state.chunks]

    def run(self) -> str | None:
        """Train; returns why it ended early, or None when it is complete."""
        recipe, state = self.recipe, self.state
        for chunk in state.chunks:
            chunk.train()
        microbatches.update_num_microbatches(state.consumed_train_samples, consistency_check=False)
        self.window = Window()
        while not self._complete():
            microbatches.update_num_microbatches(state.consumed_train_samples, consistency_check=True)
            self._step()
            every = recipe.checkpoint.save_interval
            if every and state.iteration % every == 0 and not self._complete():
                self._save()
            reason = self._why_stop()
            if reason and not self._complete():
                self._save()
                return reason
        if self._unjudged():  # the last weights may be the best
            self._evaluate("final validation", self.has_valid, self.valid_batches)
        self._save()
        if self._unjudged():
            return self.stop.requested or "a signal to another rank"
        if self._stopped_early() and self.progress is not None:
            best, patience = state.best, recipe.training.early_stop_patience
            self.progress.note(f"early stop {patience} evaluations without a lower loss than {best.loss:.6f} of step {best.iteration}")
        if not self.of_rows:
            self._evaluate("final validation", self.has_valid, self.valid_batches)
        self._evaluate("test", self.has_test, self._loaders(self.test, 0))
        return None

    def _step(self) -> None:
        recipe, state = self.recipe, self.state
        scale = state.optimizer.get_loss_scale()  # a step that overflows lowers it
        loss, grad_norm, updated = train_step(recipe, state, self.batches)
        refuse_not_finite(recipe, state.iteration, loss, grad_norm, updated, scale)
        self.window.losses.append(loss)
        self.window.updated.append(updated)
        self.window.steps += 1
        self.stop.watchdog.step()
        self.window.tokens += microbatches.get_current_global_batch_size() * recipe.training.seq_length
        if state.iteration % recipe.logging.log_interval == 0 or state.iteration == 1 or self._complete():
            self._log(grad_norm)
        elif self.progress is not None:
            self.progress.step(state.iteration)
        if state.iteration % recipe.training.eval_interval == 0:
            self._evaluate("validation", self.has_valid, self.valid_batches)

    def _complete(self) -> bool:
        return self.state.iteration >= self.recipe.derived.train_iters or self._stopped_early()

    def _stopped_early(self) -> bool:
        patience = self.recipe.training.early_stop_patience
        return patience is not None and self.state.best.worse >= patience

    def _unjudged(self) -> bool:
        """Whether nobody knows if these weights are the best: their evaluation was stopped, or is still to come."""
        return self.of_rows and self.has_valid and self.eval_iters > 0 and self.state.best.judged != self.state.iteration

    def _settle(self) -> None:
        """Move the window's losses into the state, as numbers, the same on every rank."""
        if self.window.losses:
            values = from_last_stage(torch.stack(self.window.losses)).tolist()
            for value, updated in zip(values, self.window.updated, strict=True):
                (self.state.pending.losses if updated else self.state.pending.skipped_losses).append(value)
        self.window.losses, self.window.updated = [], []

    def _log(self, grad_norm: float | None) -> None:
        recipe, state, window = self.recipe, self.state, self.window
        self._settle()
        pending = state.pending
        seconds, tokens = (time.perf_counter() - window.start) / window.steps, window.tokens / window.steps
        record = {
            "iteration": state.iteration,
            "train_iters": recipe.derived.train_iters,
            "consumed_samples": state.consumed_train_samples,
            # Megatron-LM's mean: of the steps that were taken, in fp32 as they were computed.
            "lm_loss": torch.tensor(pending.losses).mean().item() if pending.losses else None,
            "learning_rate": get_canonical_lr_for_logging(state.optimizer.param_groups),
            "grad_norm": grad_norm,
            "loss_scale": state.optimizer.get_loss_scale().item(),
            "global_batch_size": microbatches.get_current_global_batch_size(),
            "skipped_iterations": len(pending.skipped_losses),
            "nan_iterations": sum(not math.isfinite(loss) for loss in pending.skipped_losses),
            "iteration_time_ms": seconds * 1000,
            "tokens_per_second": tokens / seconds,
            "supervised_tokens_per_second": None if self.supervised is None else tokens * self.supervised / seconds,
            "tflops": tokens * self.flops_per_token / seconds / 1e12 / recipe.derived.world_size,
            "memory_gib": memory_gib(),
            "eta_s": seconds * (recipe.derived.train_iters - state.iteration),
        }
        if self.progress is not None:
            self.progress.train(record)
        if state.iteration % recipe.logging.log_interval == 0:  # a line of the first step is of it, and of the next line too
            state.pending = Pending()
        self.window = Window()

    def _evaluate(self, name: str, there: bool, batches: list) -> None:
        started = time.perf_counter()
        if not there or not self.eval_iters:
            return
        if self.of_rows:
            batches = self._loaders(self.valid, 0)
        loss = evaluate(self.recipe, self.state, batches, self.eval_iters, self.stop)
        if loss is not None and self.progress is not None:
            at = {"iteration": self.state.iteration, "consumed_samples": self.state.consumed_train_samples}
            self.progress.validation(at | {"set": name, "lm_loss_validation": loss, "ppl": model.perplexity(loss)})
        self.window.start += time.perf_counter() - started
        if loss is not None and self.of_rows:
            self._judge(loss)

    def _judge(self, loss: float) -> None:
        state, best = self.state, self.state.best
        self.saved_at = None  # a checkpoint of this step, of a start that was stopped, lacks the evaluation
        if best.loss is not None and not loss < best.loss:
            best.worse, best.judged = best.worse + 1, state.iteration
            return
        state.best = Best(loss, state.iteration, judged=state.iteration)
        if self.recipe.checkpoint.keep_best:
            self._save(best=True)

    def _save(self, best: bool = False) -> None:
        if self.saved_at != self.state.iteration:
            started = time.perf_counter()
            self._settle()
            self.stop.watchdog.rest()
            self.save(self.state, best)
            self.saved_at = self.state.iteration
            self.window.start += time.perf_counter() - started

    def _why_stop(self) -> str | None:
        training, minutes = self.recipe.training, (time.monotonic() - self.started) / 60
        over = training.exit_duration_in_mins is not None and minutes > training.exit_duration_in_mins
        signalled, over = agreed(self.stop.requested is not None, over)
        if signalled:
            return self.stop.requested or "a signal to another rank"
        if over:
            return f"training.exit_duration_in_mins={training.exit_duration_in_mins}"
        if training.exit_interval and self.state.iteration % training.exit_interval == 0:
            return f"training.exit_interval={training.exit_interval}"
        return None


def memory_gib() -> float:
    """Peak memory of this rank's GPU, or of its process on a CPU, in GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
