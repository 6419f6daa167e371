"""megatron-core on a machine without CUDA: the one place in this repository that patches anything, but for `data.py`, which
while it builds the sample index puts two functions of torch.distributed's aside.

megatron-core 0.16 takes its device from `torch.cuda` wherever it allocates, seeds or synchronises. On a CPU each of
those names is redirected to what it means there; the model, the pipeline schedules, the distributed optimizer and the
checkpoints then run unchanged over gloo. `install()` lists every redirection; a test pins it to the minor version.
"""

import contextlib
import functools
import queue
import sys
import types

import torch

MEGATRON_CORE = "0.16"  # the minor version these redirections were made for
CPU = torch.device("cpu")

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint", "as_tensor",
              "zeros_like", "ones_like", "empty_like", "full_like", "empty_strided")  # fmt: skip
_CUDA_TYPES = {  # what `Tensor.type()` answers on a GPU: the mixed-precision optimizers compare against these strings
    "torch.FloatTensor": "torch.cuda.FloatTensor",
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
}


class _Stream:
    """A stream on a CPU: everything is already in order, so waiting is nothing."""

    def __init__(self, *args, **kwargs):
        self.device = CPU

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or _Event()


class _Event:
    """An event on a CPU: it has always happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


class _Generators:
    """`torch.cuda.default_generators`: every device is the CPU, so every index is its generator."""

    def __getitem__(self, index):
        return torch.default_generator


def _is_cuda(device) -> bool:
    return device is not None and (
        (isinstance(device, str) and device.startswith("cuda")) or (isinstance(device, torch.device) and device.type == "cuda")
    )


def _factory_on_cpu(function):
    @functools.wraps(function)
    def on_cpu(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return on_cpu


def _no_gpu(*_):
    raise RuntimeError("there is no GPU")


def _tensor_to(original):
    @functools.wraps(original)
    def to(self, *args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        args = tuple(CPU if _is_cuda(a) else a for a in args)
        return original(self, *args, **kwargs)

    return to


def _tensor_type(original):
    @functools.wraps(original)
    def type_(self, dtype=None, *args, **kwargs):
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        name = original(self)
        return _CUDA_TYPES.get(name, name)

    return type_


def _accumulate_weight_gradient(inputs: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += gradient.T @ inputs, of [tokens, out] and [tokens, in]."""
    if main_grad.dtype == inputs.dtype:
        main_grad.addmm_(gradient.t(), inputs)
    else:
        main_grad.add_(gradient.t() @ inputs)


def _compiled_when_called(function):
    """torch.compile at the first call, not at import: loading the compiler takes 2.6 s and 66 MB in each rank, and on a CPU
    megatron-core's fused functions are called only with training.torch_compile."""

    @functools.wraps(function)
    def compiled(*args, **kwargs):
        nonlocal ready
        ready = ready or torch.compile(function)
        return ready(*args, **kwargs)

    ready = None
    return compiled


def save_without_a_manager() -> None:
    """Have a rank that saves hand itself what it wrote. megatron-core gets it from a process that it spawns for that, so that
    another one may write while training goes on: 3 s of CPU at the first save, and 280 MB in each rank until it ends. Here
    every save is waited for. On GPUs too; call once, after megatron.core is imported."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = queue.SimpleQueue()


def install() -> None:
    """Redirect CUDA names to the CPU. Call once, before megatron.core is imported, where there is no CUDA."""
    cuda = torch.cuda
    if getattr(cuda, "_redirected_to_cpu", False):
        return
    cuda._redirected_to_cpu = True

    # Where am I: allocations say device=torch.cuda.current_device().
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda device: None
    cuda.device_count = lambda: 0

    # Random numbers: the CPU has one generator. It plays both parts, as it does in Megatron-LM's own runs on a CPU.
    cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.random.get_rng_state = cuda.get_rng_state
    cuda.random.set_rng_state = cuda.set_rng_state
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.default_generators = _Generators()
    cuda._lazy_call = lambda function, **kwargs: function()
    cuda._lazy_init = lambda: None

    # Order of execution: a CPU runs in program order.
    cuda.Stream = cuda.ExternalStream = _Stream
    cuda.Event = _Event
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None

    # torch.compile asks for the GPU's properties, and takes this for "there is none".
    cuda.get_device_properties = _no_gpu

    jit = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = _compiled_when_called
    sys.modules[jit.__name__] = jit

    # Allocations and moves with device="cuda".
    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))
    torch.Tensor.to = _tensor_to(torch.Tensor.to)
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self

    # Types: the optimizers sort parameters by the name of their CUDA type, the model by isinstance.
    torch.Tensor.type = _tensor_type(torch.Tensor.type)
    cuda.FloatTensor, cuda.HalfTensor, cuda.BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor

    # Apex's kernel behind gradient_accumulation_fusion: no gradient of its own for each matrix, to be added up afterwards.
    apex = types.ModuleType("fused_weight_gradient_mlp_cuda")
    apex.wgrad_gemm_accum_fp32 = apex.wgrad_gemm_accum_fp16 = _accumulate_weight_gradient
    sys.modules[apex.__name__] = apex
