"""Langevin dynamics on an energy (chains descend E), block Gibbs and the replay buffer.

`langevin` is the reference, `fast_langevin` the same chain with frozen parameters, channels-last
memory and, where it pays, bfloat16; on a GPU compiled and one `Graph`. Chains are (B, C, H, W)."""

import ctypes
import warnings
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn


def langevin(energy, x: Tensor, steps, step_size, noise_std, generator=None, bound=0.0) -> Tensor:
    """x (B, ...) <- x - step_size dE/dx + noise_std N(0, I), in +-bound if > 0, `steps` times."""
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x), x, x.new_ones(len(x)))
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = torch.sub(x.detach(), gradient, alpha=step_size).add_(noise, alpha=noise_std)
        x = x.clamp_(-bound, bound) if bound else x
    return x.detach()


def bfloat16_pays(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware (other CPUs are 100 times slower)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks, which it would unmap: a third of a step on a CPU."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30) or mallopt(-3, 2**25)  # M_MMAP_THRESHOLD: such blocks are of the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays with the process


def fast_langevin(
    module: nn.Module,
    energy,
    steps,
    step_size,
    noise_std,
    generator,
    x: Tensor,
    bfloat16=False,
    bound=0.0,
) -> Tensor:
    """`langevin` on `energy`, a function of `module`'s parameters; equal to it up to rounding."""
    x = x.contiguous(memory_format=torch.channels_last)
    needing = [p.requires_grad_(False) for p in module.parameters() if p.requires_grad]
    matmul, tf32 = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:  # chains differentiate by pixels only; the heads may use TF32, as convolutions do
        matmul.allow_tf32 = bfloat16 or tf32
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return langevin(energy, x, steps, step_size, noise_std, generator, bound).contiguous()
    finally:
        matmul.allow_tf32 = tf32
        for p in needing:
            p.requires_grad_(True)


class Graph:
    """A function of tensors to one: the first of `ways` that can be recorded as a CUDA graph, at
    the fourth call, and launched whole from then on; if none can, the last; warnings say why."""

    def __init__(self, ways: list, generator: torch.Generator):
        self.ways, self.plain, self.generator, self.calls = ways, ways[-1], generator, 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        while self.ways and self.calls < 4:
            try:
                with torch.cuda.stream(before := torch.cuda.current_stream()):  # restored on error
                    if self.calls < 3:  # aside, as capture asks for
                        (aside := torch.cuda.Stream()).wait_stream(before)
                        with torch.cuda.stream(aside):
                            end = self.ways[0](*inputs)
                        before.wait_stream(aside)
                        self.calls += 1
                        return end
                    self.inputs, graph = [x.clone() for x in inputs], torch.cuda.CUDAGraph()
                    torch.__version__ < (2, 14) and graph.register_generator_state(self.generator)
                    with torch.cuda.graph(graph):
                        self.end = self.ways[0](*self.inputs)
                    self.graph, self.calls = graph, 4
            except Exception as error:  # a compiler raises any kind
                if self.calls < 3 and len(self.ways) == 1 and torch.cuda.is_available():
                    raise  # no failure to record
                warnings.warn(f"updates are slower: {error!s:.80}", stacklevel=2)
                self.ways, self.calls = self.ways[1:], 0
        if self.calls < 4:
            return self.plain(*inputs)
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.end.clone()


def mover(model, energy, steps, step_size, noise_std, generator, graph=False, compile=False, **how):
    """A function that moves chains (B, C, H, W) on: the model's Gibbs or `fast_langevin`, `how`."""
    if model.chain == "gibbs":
        return partial(model.gibbs, steps, generator)
    options = {"force_pointwise_cat": True, "combo_kernels": True}  # fewer kernels
    ways = [
        partial(fast_langevin, model, e, steps, step_size, noise_std, generator, **how)
        for e in (lambda x: torch.compile(energy, dynamic=False, options=options)(x), energy)
    ]
    return Graph(ways if compile else ways[1:], generator) if graph else ways[1]


class ReplayBuffer:
    """Chains `images` that persist over updates. They start uniform on [-1, 1], anew with chance
    1 - reuse, so again or, a `share` of them, from data with noise of deviation `std`."""

    def __init__(self, size, image_shape, reuse, generator: torch.Generator, share=0.0, std=0.0):
        self.reuse, self.generator, self.share, self.std = reuse, generator, share, std
        self.images = uniform((size, *image_shape), generator)  # (size, C, H, W)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct slots (B,) and their chains, as many as images x (B, C, H, W)."""
        at = {"generator": self.generator, "device": self.generator.device}
        slots = torch.randperm(len(self.images), **at)[: len(x)]
        chance, fresh = torch.rand((len(x), 1, 1, 1), **at), uniform(x.shape, self.generator)
        if self.share:
            noised = x + self.std * torch.randn(x.shape, **at)
            fresh = torch.where(chance >= 1 - self.share * (1 - self.reuse), noised, fresh)
        return slots, torch.where(chance >= self.reuse, fresh, self.images[slots])


def uniform(shape, generator: torch.Generator) -> Tensor:
    """Noise on [-1, 1], where chains start."""
    return torch.rand(shape, generator=generator, device=generator.device).mul_(2).sub_(1)
