"""Langevin dynamics on an energy (chains descend E), block Gibbs and the replay buffer.

`langevin` is the reference; `fast_langevin` is the same chain with frozen parameters, channels-last
memory and, where the hardware has it, bfloat16. Chains are images (B, C, H, W) of [-1, 1] pixels.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn


def langevin(
    energy: Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int,
    step_size: float,
    noise_std: float,
    generator: torch.Generator | None = None,
) -> Tensor:
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
    """Lets glibc reuse large freed blocks, which it would unmap and fault in anew at every step.

    For the whole process; a quarter to a third of a step on a CPU. Elsewhere it does nothing.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays with the process


def fast_langevin(module: nn.Module, energy, x: Tensor, bfloat16: bool = False, **chain) -> Tensor:
    """`langevin` on `energy`, a function of `module`'s parameters; equal to it up to rounding."""
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    needing = [p.requires_grad_(False) for p in module.parameters() if p.requires_grad]
    try:  # chains differentiate by their state only
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return langevin(energy, x, **chain).contiguous()
    finally:
        for p in needing:
            p.requires_grad_(True)


def advance(model, x: Tensor, steps: int, generator, energy=None, bfloat16=False, **settings):
    """Chains (B, ...) `steps` on: block Gibbs if the model can, else Langevin on `energy` or E."""
    if model.chain != "gibbs":
        chain = {"steps": steps, "generator": generator, **settings}
        return fast_langevin(model, energy or model.energy, x, bfloat16, **chain)
    with torch.no_grad():
        for _ in range(steps):
            x = model.gibbs(x, generator)
    return x


class ReplayBuffer:
    """Chains that persist over updates; new and restarted ones are uniform on [-1, 1]."""

    def __init__(self, size: int, image_shape, reuse: float, generator: torch.Generator):
        self.reuse, self.generator = reuse, generator
        self.images = self._uniform(size, *image_shape)  # (size, C, H, W)

    def _uniform(self, *shape: int) -> Tensor:
        device = self.generator.device
        return torch.rand(shape, generator=self.generator, device=device).mul_(2).sub_(1)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` distinct slots (count,) and their chains, restarted with chance 1 - reuse."""
        device = self.generator.device
        order = torch.randperm(len(self.images), generator=self.generator, device=device)
        slots = order[:count]
        restart = torch.rand(count, generator=self.generator, device=device) >= self.reuse
        fresh = self._uniform(count, *self.images.shape[1:])
        return slots, torch.where(restart[:, None, None, None], fresh, self.images[slots])

    def put(self, slots: Tensor, chains: Tensor) -> None:
        """Writes chains (count, C, H, W) back to the slots that they were drawn from."""
        self.images[slots] = chains
