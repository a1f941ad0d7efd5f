"""Langevin dynamics on an energy (chains descend E), block Gibbs and the replay buffer.

`langevin` is the reference; `fast_langevin` is the same chain with frozen parameters, channels-last
memory and, where the hardware has it, bfloat16. Chains are images (B, C, H, W) of [-1, 1] pixels.
"""

import ctypes
from contextlib import suppress

import torch
from torch import Tensor, nn


def langevin(energy, x: Tensor, steps: int, step_size: float, noise_std: float, generator=None):
    """x <- x - step_size dE/dx + noise_std N(0, I), `steps` times: (B, ...) -> (B, ...)."""
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = x.detach() - step_size * gradient + noise_std * noise
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


def fast_langevin(module: nn.Module, energy, x: Tensor, bfloat16: bool, *chain) -> Tensor:
    """`langevin` on `energy`, a function of `module`'s parameters; equal to it up to rounding."""
    x = x.contiguous(memory_format=torch.channels_last)
    needing = [p.requires_grad_(False) for p in module.parameters() if p.requires_grad]
    try:  # chains differentiate by pixels only
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return langevin(energy, x, *chain).contiguous()
    finally:
        for p in needing:
            p.requires_grad_(True)


def advance(model, energy, x, steps, step_size, noise_std, generator, bfloat16=False) -> Tensor:
    """Chains (B, C, H, W) `steps` on: Langevin on `energy`, or the model's block Gibbs sweeps."""
    if model.chain != "gibbs":
        return fast_langevin(model, energy, x, bfloat16, steps, step_size, noise_std, generator)
    with torch.no_grad():
        for _ in range(steps):
            x = model.gibbs(x, generator)
    return x


class ReplayBuffer:
    """Chains `images` that persist over updates; new and restarted ones are uniform on [-1, 1]."""

    def __init__(self, size: int, image_shape, reuse: float, generator: torch.Generator):
        self.reuse, self.generator = reuse, generator
        self.images = uniform((size, *image_shape), generator)  # (size, C, H, W)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` distinct slots (count,) and their chains, restarted with chance 1 - reuse."""
        at = {"generator": self.generator, "device": self.generator.device}
        slots = torch.randperm(len(self.images), **at)[:count]
        restart = torch.rand((count, 1, 1, 1), **at) >= self.reuse
        fresh = uniform((count, *self.images.shape[1:]), self.generator)
        return slots, torch.where(restart, fresh, self.images[slots])


def uniform(shape, generator: torch.Generator) -> Tensor:
    """Noise on [-1, 1], where chains start."""
    return torch.rand(shape, generator=generator, device=generator.device).mul_(2).sub_(1)
