"""Checks of how long a training is and how learning rate, weight decay and batch size run over it."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.recipe.problem import Case, Problem, nearest
from launcher.recipe.ramp import batch_sizes, whole_ramp

LENGTHS = ("training.train_iters", "training.train_samples", "training.train_tokens")
WARMUPS = (
    "optimizer.lr_warmup_iters",
    "optimizer.lr_warmup_samples",
    "optimizer.lr_warmup_tokens",
    "optimizer.lr_warmup_fraction",
)


def _by_iters(case: Case) -> bool:
    return case.recipe.training.train_iters is not None


def length(case: Case) -> Iterator[Problem]:
    """Exactly one of train_iters, train_samples, train_tokens, of at least one step."""
    given = [key for key in LENGTHS if case.value(key) is not None]
    if not given:
        yield Problem("nothing says how long to train", "training", "give one of " + ", ".join(LENGTHS))
    elif len(given) > 1:
        yield Problem(
            "the length of the training is given twice",
            case.at(*given),
            ", or ".join(f"{key}=null" for key in given),
        )
    elif case.recipe.derived.train_iters == 0 and case.value(given[0]) > 0:
        t = case.recipe.training
        least = t.global_batch_size * (t.seq_length if given[0].endswith("tokens") else 1)
        yield Problem(
            f"{given[0]} {case.value(given[0])} is less than one step",
            case.at(given[0], "training.global_batch_size"),
            f"{given[0]}={least} or more",
        )


def units(case: Case) -> Iterator[Problem]:
    """A training counted in steps has its schedule in steps, one counted in samples in samples; nothing twice."""
    if all(case.value(key) is None for key in LENGTHS):
        return
    wrong, right = ("samples", "iters") if _by_iters(case) else ("iters", "samples")
    batch = case.recipe.training.global_batch_size or 1
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        keys = [f"optimizer.{name}_{unit}" for unit in ("iters", "samples", "tokens")]
        given = [key for key in keys if case.given(key) and case.value(key)]
        if len(given) > 1:
            yield Problem(f"{name} is given twice", case.at(*given), ", or ".join(map(_left_out, given)))
        elif f"optimizer.{name}_{wrong}" in given:
            value = case.value(given[0])
            other = value * batch if right == "samples" else -(-value // batch)
            counted = "steps" if right == "iters" else "samples or tokens"
            yield Problem(
                f"a training counted in {counted} cannot have optimizer.{name}_{wrong}",
                case.at(given[0]),
                f"{_left_out(given[0])}, and optimizer.{name}_{right}={other}",
            )
    warmups = [key for key in WARMUPS if case.given(key) and case.value(key)]
    if WARMUPS[3] in warmups and len(warmups) > 1:
        yield Problem("the warm-up is given twice", case.at(*warmups), ", or ".join(map(_left_out, warmups)))


def _left_out(key: str) -> str:
    return f"{key}=0" if key in WARMUPS[:3] else f"{key}=null"


def _in_samples(case: Case, name: str) -> int | None:
    """The length of a part of the schedule in samples, as Megatron counts it."""
    o, batch = case.recipe.optimizer, case.recipe.training.global_batch_size
    iters, samples = getattr(o, f"{name}_iters"), getattr(o, f"{name}_samples")
    if _by_iters(case):
        return iters * batch if iters is not None and batch else None
    return samples


def _asked(case: Case, name: str) -> tuple[str, int]:
    """The key in which a length of the schedule was given, or else the one that the training counts in; and its units
    in an iteration, or in a sample where samples are counted."""
    t, unit = case.recipe.training, "iters" if _by_iters(case) else "samples"
    if case.given(f"optimizer.{name}_tokens") and case.value(f"optimizer.{name}_tokens"):
        return f"optimizer.{name}_tokens", (t.seq_length or 1) * ((t.global_batch_size or 1) if unit == "iters" else 1)
    return f"optimizer.{name}_{unit}", 1


def learning_rate(case: Case) -> Iterator[Problem]:
    """Floor, peak and start in order; a warm-up shorter than the decay; WSD's last phase; and what will never be reached."""
    o, batch = case.recipe.optimizer, case.recipe.training.global_batch_size
    if o.lr is not None:
        for key in ("optimizer.min_lr", "optimizer.lr_warmup_init"):
            if case.value(key) > o.lr:
                yield Problem(f"{key} is above the peak", case.at(key, "optimizer.lr"), f"{key}={o.lr} or less")
    decay, warmup = _in_samples(case, "lr_decay"), _in_samples(case, "lr_warmup") or 0
    decay_key, one_decay = _asked(case, "lr_decay")
    if decay == 0 and decay_key.endswith("tokens"):
        what = f"a decay of {case.value(decay_key)} tokens is less than one step"
        yield Problem(what, case.at(decay_key), f"{decay_key}={one_decay} or more, or {decay_key}=null")
    if not decay or not batch:
        return
    if o.lr_warmup_fraction is not None:
        warmup = o.lr_warmup_fraction * decay
    yield from _warmup_of_nothing(case, warmup / batch, decay / batch)
    yield from list(_out_of_order(case, decay, warmup)) or _unreached(case, warmup / batch, decay / batch)


def _out_of_order(case: Case, decay: int, warmup: float) -> Iterator[Problem]:
    """Lengths in samples: the warm-up ends before the decay does, and WSD's last phase begins after it."""
    o, batch = case.recipe.optimizer, case.recipe.training.global_batch_size
    unit, per = ("iters", batch) if _by_iters(case) else ("samples", 1)
    decay_key, _ = _asked(case, "lr_decay")
    if warmup >= decay:
        key, one = _asked(case, "lr_warmup")
        key = WARMUPS[3] if o.lr_warmup_fraction is not None else key
        more = "" if case.given(decay_key) else ", or a longer training"
        yield Problem(
            f"a warm-up of {warmup / per:g} {unit} must be shorter than the decay of {decay / per:g} {unit}",
            case.at(key, decay_key),
            (f"{key}={(decay // per - 1) * one} or less" if decay // per > 1 else f"{key}=0") + more,
        )
    key, one = _asked(case, "lr_wsd_decay")
    wsd = _in_samples(case, "lr_wsd_decay")
    if o.lr_decay_style == "WSD" and not wsd:
        yield Problem(
            "WSD needs the length of its last phase",
            case.at("optimizer.lr_decay_style"),
            f"{key}={max(1, decay // per // 10) * one}, for a tenth",
        )
    elif o.lr_decay_style == "WSD" and wsd > decay - warmup:
        yield Problem(
            "WSD's last phase begins within the warm-up",
            case.at(key, decay_key),
            f"{key}={int((decay - warmup) // per) * one} or less",
        )


def _warmup_of_nothing(case: Case, warmup: float, decay: float) -> Iterator[Problem]:
    """Lengths in steps. Asked for, and shorter than a step: old scripts divided tokens by a batch and got 0."""
    asked = [key for key in WARMUPS if case.given(key) and case.value(key)]
    if len(asked) == 1 and warmup < 1:
        key, t = asked[0], case.recipe.training
        step = {"samples": t.global_batch_size, "tokens": t.global_batch_size * (t.seq_length or 1)}
        least = step.get(key.rsplit("_", 1)[1]) or f"{2 / decay:.1g}"  # of a share two steps, so that rounding leaves one
        yield Problem(f"a warm-up of {warmup:.2g} steps is none", case.at(key), f"{key}={least} or more, or {key}=0 for none", "warning")


def _unreached(case: Case, warmup: float, decay: float) -> Iterator[Problem]:
    """Lengths in steps. A training that ends within its warm-up or decay is allowed, and often a mistake."""
    steps, style = case.recipe.derived.train_iters, case.recipe.optimizer.lr_decay_style
    if not steps:
        return
    if steps < warmup:
        what = f"the training ends after {steps} of {warmup:g} warm-up steps: the learning rate never reaches its peak"
    elif steps < int(decay) and style not in ("constant", "inverse-square-root"):
        what = f"the training ends after {steps} of {decay:g} steps of decay: the learning rate never falls to min_lr"
    else:
        return
    key, _ = _asked(case, "lr_decay")
    yield Problem(what, case.at(key), f"{key}=null makes the decay as long as the training", "warning")


def first_step(case: Case) -> Iterator[Problem]:
    """Megatron's warm-up begins with a step at `lr_warmup_init`, however short it is: with one step that is all."""
    warmups = [key for key in WARMUPS if case.value(key)]
    if case.recipe.derived.train_iters == 1 and warmups and not case.recipe.optimizer.lr_warmup_init:
        what = "the only step is the first of a warm-up, at a learning rate of 0: it changes no weight"
        yield Problem(what, case.at(*warmups), f"{_left_out(warmups[0])}, or more steps", "warning")


def of_epochs(case: Case) -> Iterator[Problem]:
    """What is known of a training in epochs once its samples are counted, which a warm-up in steps or samples may outlast."""
    o, batch = case.recipe.optimizer, case.recipe.training.global_batch_size
    warmup = o.lr_warmup_samples or (o.lr_warmup_iters or 0) * batch
    decay = o.lr_decay_samples or (o.lr_decay_iters or 0) * batch or case.recipe.derived.train_samples
    if warmup >= decay and o.lr_warmup_fraction is None:
        given = [key for key in WARMUPS if case.value(key)]
        what = f"a warm-up of {warmup / batch:g} steps must be shorter than the decay of {decay / batch:g} steps"
        yield Problem(what, case.at(*given), f"{_left_out(given[0])}, and optimizer.lr_warmup_fraction=0.1 or none; or a longer training")
    else:
        yield from first_step(case)


def weight_decay(case: Case) -> Iterator[Problem]:
    """A constant weight decay has no first and last value; a growing one has both."""
    o = case.recipe.optimizer
    ends = ("optimizer.start_weight_decay", "optimizer.end_weight_decay")
    if o.weight_decay_incr_style == "constant":
        for key in ends:
            if case.value(key) is not None:
                yield Problem(
                    f"a constant weight decay has no {key}",
                    case.at(key, "optimizer.weight_decay_incr_style"),
                    f"{key}=null, or optimizer.weight_decay_incr_style=linear",
                )
        return
    missing = [key for key in ends if case.value(key) is None]
    for key in missing:
        yield Problem(f"a weight decay that grows needs {key}", case.at("optimizer.weight_decay_incr_style"), f"add {key}=…")
    if not missing and not 0 <= o.start_weight_decay <= o.end_weight_decay:
        yield Problem("a weight decay grows from 0 or more upward", case.at(*ends), _growing(o.start_weight_decay, o.end_weight_decay))


def _growing(start: float, end: float) -> str:
    first, last = "optimizer.start_weight_decay", "optimizer.end_weight_decay"
    if start < 0:
        return f"{first}=0" if end >= 0 else f"{first}=0, and {last}=0"
    return f"{last}={start} or more" + (f", or {first}={end}" if end >= 0 else "")


def rampup(case: Case) -> Iterator[Problem]:
    """[start, increment, samples]: whole steps of batch size, each made of whole micro batches; by samples only."""
    t, key = case.recipe.training, "training.rampup_batch_size"
    if t.rampup_batch_size is None:
        return
    if _by_iters(case):
        total = t.train_iters * (t.global_batch_size or 1)
        yield Problem(
            "a batch that grows needs a training counted in samples",
            case.at(key, "training.train_iters"),
            f"training.train_samples={total}, and training.train_iters=null",
        )
    if len(t.rampup_batch_size) != 3 or any(number < 1 for number in t.rampup_batch_size):
        yield Problem(f"{key} is [start, increment, samples], all above 0", case.at(key), f"{key}=null, or such as {key}=[16,16,100000]")
        return
    start, increment, _ = t.rampup_batch_size
    total = t.global_batch_size or 0
    at_once = (t.micro_batch_size or 0) * (case.recipe.derived.data_parallel_size or 0)
    mended = whole_ramp(t.rampup_batch_size, total, max(at_once, 1))
    ramp = f"{key}={str(mended).replace(' ', '') if mended else 'null'}"
    if total <= start:
        yield Problem(
            f"the batch cannot grow from {start} to {total}",
            case.at(key, "training.global_batch_size"),
            ramp + (f", or {key}=null" if mended else ""),
        )
    elif (total - start) % increment:
        fits = " or ".join(str(start + int(n)) for n in nearest(total - start, increment).split(" or "))
        yield Problem(
            f"steps of {increment} do not lead from {start} to {total}",
            case.at(key, "training.global_batch_size"),
            f"{ramp}, or training.global_batch_size={fits}",
        )
    torn = [size for size in batch_sizes(case.recipe)[:-1] if at_once > 0 and size % at_once]
    if torn:
        yield Problem(
            f"the batch grows through {torn[0]}, no multiple of micro_batch_size x data-parallel size = {at_once}",
            case.at(key, "training.micro_batch_size"),
            ramp,
        )
