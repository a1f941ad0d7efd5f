"""Langevin dynamics on an energy (supplement C, Eq. 41), block Gibbs (Eq. 31, 32), replay buffer.

Chains x are (B, C, H, W) and descend E, since p(x) is proportional to exp(-E(x)). A *step* is one
SGLD step or one sweep of Gibbs. `langevin` is the reference; `SAMPLERS` names what training
runs: `fast_langevin`, equal to the reference up to rounding, and `block_gibbs`. A new sampler is a
function with the arguments of `fast_langevin` and a line there. An `energy` maps chains (B, ...) to
(B,), each from its own chain alone. On a GPU `mover` can compile Langevin dynamics and record them
as one CUDA graph.
"""

import ctypes
import warnings
from contextlib import suppress
from functools import partial

import torch
from torch import Tensor, nn


def langevin(
    energy, x: Tensor, steps: int, step_size: float, noise_std: float, generator=None, bound=0.0
) -> Tensor:
    """x (B, ...) <- x - step_size dE/dx + noise_std N(0, I), in +-bound if > 0, `steps` times."""
    for _ in range(steps):
        x = x.detach().requires_grad_(True)
        # With gradients of (B,) in place of the sum, torch would import SymPy first: half a second.
        (gradient,) = torch.autograd.grad(energy(x).sum(), x)
        noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        x = torch.sub(x.detach(), gradient, alpha=step_size).add_(noise, alpha=noise_std)
        if bound:
            x = x.clamp_(-bound, bound)
    return x.detach()


def fast_langevin(
    model: nn.Module, energy, x: Tensor, steps: int, settings, generator, bfloat16=False
) -> Tensor:
    """Runs `langevin`, faster. `energy` may use the parameters of `model` and no others.

    `settings` has step_size, noise_std and bound (the section `chains` of a configuration). While
    it runs, parameters ask for no gradient, images are in channels-last order and, with `bfloat16`,
    the network is under autocast. Together a step is 3.6 times as fast as in the plain loop of the
    public code bases on a Xeon with AMX, 2.3 times on a Zen 4 (`tests/benchmark.py`).
    """

    def rounded_energy(x: Tensor) -> Tensor:
        # Not the gradient too: it would round what the energy computes in float32.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            return energy(x)

    x = x.contiguous(memory_format=torch.channels_last)
    frozen = [p for p in model.parameters() if p.requires_grad]
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.allow_tf32
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        matmul.allow_tf32 = bfloat16 or tf32  # for the heads, which autocast leaves in float32
        x = langevin(
            rounded_energy,
            x,
            steps,
            settings.step_size,
            settings.noise_std,
            generator,
            settings.bound,
        )
        return x.contiguous()
    finally:
        matmul.allow_tf32 = tf32
        for parameter in frozen:
            parameter.requires_grad_(True)


def block_gibbs(
    model: nn.Module, energy, x: Tensor, steps: int, settings, generator, bfloat16=False
) -> Tensor:
    """`steps` sweeps of z ~ p(z | x), x ~ p(x | z); `energy`, `settings`, `bfloat16` are unused."""
    for _ in range(steps):
        x = model.gibbs_sweep(x, generator)
    return x


SAMPLERS = {"langevin": fast_langevin, "gibbs": block_gibbs}


def mover(
    sampler: str,
    model: nn.Module,
    energy,
    steps: int,
    settings,
    generator,
    bfloat16=False,
    record=False,
    compile=False,
):
    """A function that moves chains (B, C, H, W) by `steps` of the named sampler.

    On a GPU `record` launches Langevin chains as one CUDA graph and `compile` compiles their energy
    first; where either fails a warning says why. Other samplers run as they are.
    """
    run = partial(
        SAMPLERS[sampler],
        model,
        steps=steps,
        settings=settings,
        generator=generator,
        bfloat16=bfloat16,
    )
    plain = partial(run, energy)
    if not record or sampler != "langevin":
        return plain
    candidates = [partial(run, compiled(energy))] if compile else []
    return GraphedFunction([*candidates, plain], generator)


def compiled(energy):
    """`energy`, compiled at its first call."""
    # Fewer kernels: patches of the first convolution as one, small ones combined.
    options = {"force_pointwise_cat": True, "combo_kernels": True}
    return lambda x: torch.compile(energy, dynamic=False, options=options)(x)  # torch keeps it


class GraphedFunction:
    """A function of CUDA tensors that is recorded as a CUDA graph and then launched whole.

    `ways` are implementations of it, the fastest first and a plain one last. Three calls run the
    first one as it is (warm up), the fourth records it (capture) and replays it, and so does every
    later one, for inputs of the same shapes. An implementation that cannot be compiled or recorded
    gives way to the next, with a warning; if none can be recorded, the plain one is called. The
    function returns a tensor or a dictionary of tensors.
    """

    WARM_UP_CALLS = 3

    def __init__(self, ways: list, generator: torch.Generator):
        self.ways, self.plain, self.generator = ways, ways[-1], generator
        self.warm_up_calls = 0
        self.graph = None

    def __call__(self, *inputs: Tensor):
        while self.graph is None and self.ways:
            try:
                with torch.cuda.stream(torch.cuda.current_stream()):  # restored after an error
                    if self.warm_up_calls < self.WARM_UP_CALLS:
                        return self.warm_up(inputs)
                    self.capture(inputs)  # there is a graph now, so that the loop ends
            except Exception as error:  # a compiler raises any kind
                self.fall_back(error)
        return self.replay(inputs) if self.graph else self.plain(*inputs)

    def warm_up(self, inputs: tuple):
        """An ordinary call on a stream of its own, as capture asks for."""
        current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            outputs = self.ways[0](*inputs)
        current.wait_stream(aside)
        self.warm_up_calls += 1
        return outputs

    def capture(self, inputs: tuple) -> None:
        """Records the call on copies of `inputs`, which replays fill anew; nothing runs yet."""
        self.inputs = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        if torch.__version__ < (2, 14):  # from then on generators register themselves
            graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.outputs = self.ways[0](*self.inputs)
        self.graph = graph

    def replay(self, inputs: tuple):
        """Runs the recorded call on `inputs` and returns copies of its outputs."""
        for recorded, given in zip(self.inputs, inputs, strict=True):
            recorded.copy_(given)
        self.graph.replay()
        if isinstance(self.outputs, dict):
            return {name: tensor.clone() for name, tensor in self.outputs.items()}
        return self.outputs.clone()

    def fall_back(self, error: Exception) -> None:
        """Goes on with the next implementation, after a warning.

        An error of the plain one while it warms up is no failure to record, and is raised again.
        """
        is_plain = len(self.ways) == 1 and self.warm_up_calls < self.WARM_UP_CALLS
        if is_plain and torch.cuda.is_available():
            raise error
        warnings.warn(f"updates are slower: {error!s:.200}", stacklevel=3)
        self.ways, self.warm_up_calls = self.ways[1:], 0


class ReplayBuffer:
    """Chains `images` (size, C, H, W) that persist over updates.

    They start uniform on [-1, 1]. With probability 1 - `reuse` a drawn chain is restarted: with
    probability `data_restarts` from a training image plus Gaussian noise of standard deviation
    `restart_std`, otherwise from uniform noise.
    """

    def __init__(
        self,
        size: int,
        image_shape,
        reuse: float,
        generator: torch.Generator,
        data_restarts=0.0,
        restart_std=0.0,
    ):
        self.reuse, self.generator = reuse, generator
        self.data_restarts, self.restart_std = data_restarts, restart_std
        self.images = uniform((size, *image_shape), generator)

    def draw(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct slots (B,) and chains to move on, as many as images x (B, C, H, W).

        The images are what chains restart from. `store` puts the moved chains back.
        """
        if len(x) > len(self.images):
            raise ValueError(f"a batch of {len(x)} from a buffer of {len(self.images)} chains")
        place = {"generator": self.generator, "device": self.generator.device}
        slots = torch.randperm(len(self.images), **place)[: len(x)]
        chance = torch.rand((len(x), 1, 1, 1), **place)
        fresh = uniform(x.shape, self.generator)
        if self.data_restarts:
            noised = x + self.restart_std * torch.randn(x.shape, **place)
            # Of the chances from `reuse` to 1, which restart, the upper share restarts from data.
            from_data = chance >= 1 - self.data_restarts * (1 - self.reuse)
            fresh = torch.where(from_data, noised, fresh)
        return slots, torch.where(chance >= self.reuse, fresh, self.images[slots])

    def store(self, slots: Tensor, chains: Tensor) -> None:
        """Puts moved chains into the slots that they were drawn from."""
        self.images[slots] = chains


def default_generator(device: torch.device) -> torch.Generator:
    """The one that torch draws from on `device` where no other is named."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":  # Apple's GPUs; torch has no public name for it
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def uniform(shape, generator: torch.Generator) -> Tensor:
    """Noise on [-1, 1], where chains start."""
    return torch.rand(shape, generator=generator, device=generator.device).mul_(2).sub_(1)


def bfloat16_pays(device: torch.device) -> bool:
    """Whether `device` multiplies bfloat16 in hardware. A CPU that emulates it takes 100 times as
    long as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return device.type == "cpu" and any(getattr(torch.cpu, p, lambda: False)() for p in probes)


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks, which it would unmap: saves a third of a CPU's step."""
    with suppress(OSError, AttributeError, TypeError):  # other systems, other C libraries
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: blocks up to it come from the heap. Some accept 2^25 at most.
        if not mallopt(-3, 2**30):
            mallopt(-3, 2**25)
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays with the process
