"""Chains against known answers and against the reference, the replay buffer, and what both teach.

Learned models are small, on images of 3 x 3 and 8 x 8 pixels.
"""

import math
from types import SimpleNamespace

import pytest
import torch

import cebm
import models
import sampling


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def of_chains(step_size=1.0, noise_std=0.01, bound=0.0):
    """The settings of Langevin dynamics."""
    return SimpleNamespace(step_size=step_size, noise_std=noise_std, bound=bound)


def build(preset, shape=None, *settings):
    """The untrained model of a preset, the same at every call, and three images for it."""
    config = cebm.compose(preset, settings)
    shape = shape or config.data.image
    torch.manual_seed(0)
    x = torch.rand(3, *shape, generator=seeded()) * 2 - 1
    return models.build(config.model, shape, 10), x


def network():
    """A small CEBM for images of 28 x 28."""
    narrow = "model.channels=[8,8,8,8]", "model.hidden=16", "model.latent=8"
    return build("cebm-mnist", None, *narrow)[0]


def test_long_chains_on_a_gaussian_have_its_mean_and_the_discretised_variance():
    mean, variance, step = 1.5, 2.0, 0.5
    x = sampling.langevin(
        lambda x: (x - mean).square().sum(1) / (2 * variance),
        torch.zeros(20_000, 3),
        200,
        step,
        step**0.5 * 2**0.5,
        seeded(),
    )
    # x <- a x + noise with a = 1 - step / variance settles at variance noise^2 / (1 - a^2).
    settled = 2 * step / (1 - (1 - step / variance) ** 2)
    error = (settled / 20_000) ** 0.5
    assert (x.mean(0) - mean).abs().max() < 5 * error
    assert (x.var(0) / settled - 1).abs().max() < 5 * (2 / 20_000) ** 0.5


def test_without_noise_a_chain_descends():
    model, x = network(), torch.rand(16, 1, 28, 28, generator=seeded())
    energies = []
    for _ in range(5):
        energies.append(model.energy(x).mean().item())
        x = sampling.langevin(model.energy, x, 1, 0.5, 0.0)
    assert energies == sorted(energies, reverse=True)
    assert energies[-1] < energies[0]


def test_given_z_chains_descend_the_joint_energy():
    model, x = network(), torch.rand(16, 1, 28, 28, generator=seeded())
    with torch.no_grad():
        z = model.represent(torch.rand(16, 1, 28, 28, generator=seeded(1)))

    def energy(v):
        return model.joint_energy(v, z)

    end = sampling.mover("langevin", model, energy, 5, of_chains(0.5, 0.0), None)(x)
    assert (energy(end) < energy(x)).all()


def test_a_bounded_step_ends_at_the_nearest_point_within_the_bound_on_both_paths():
    model, x = network(), torch.rand(4, 1, 28, 28, generator=seeded()) * 4 - 2
    free = sampling.langevin(model.energy, x, 1, 1.0, 0.3, seeded(1))
    near = free.clamp(-0.7, 0.7)
    assert not torch.equal(near, free)
    assert torch.equal(sampling.langevin(model.energy, x, 1, 1.0, 0.3, seeded(1), bound=0.7), near)
    settings = of_chains(1.0, 0.3, bound=0.7)
    fast = sampling.mover("langevin", model, model.energy, 1, settings, seeded(1))
    torch.testing.assert_close(fast(x), near, atol=2e-5, rtol=0)


def test_bounded_chains_without_an_energy_fill_the_range_evenly_but_for_the_ends():
    x = sampling.langevin(
        lambda x: 0 * x.sum(1), torch.zeros(20_000, 1), 400, 1.0, 0.2, seeded(), bound=1.0
    )
    inner = x[x.abs() < 0.5].abs()
    assert x.abs().max() == 1
    assert abs((inner < 0.25).double().mean() - 0.5) < 5 * 0.5 / len(inner) ** 0.5


def test_the_same_generator_gives_the_same_chains_and_another_does_not():
    model, x = network(), torch.zeros(4, 1, 28, 28)
    one, two, other = (
        sampling.langevin(model.energy, x, 3, 1.0, 0.01, seeded(s)) for s in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_chains_leave_parameters_as_they_are_and_without_gradients_also_after_an_error():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.network.heads[0][0].bias.requires_grad_(False)

    def fail(x):
        raise ArithmeticError

    x = sampling.mover("langevin", model, model.energy, 3, of_chains(), seeded())(
        torch.zeros(4, 1, 28, 28)
    )
    assert not x.requires_grad
    tf32 = torch.backends.cuda.matmul.allow_tf32
    with pytest.raises(ArithmeticError):
        sampling.fast_langevin(model, fail, x, 3, of_chains(), seeded(), bfloat16=True)
    assert torch.backends.cuda.matmul.allow_tf32 == tf32
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == (name != "network.heads.0.0.bias")  # as it was


@pytest.mark.parametrize("path", ["products", "oneDNN", "compiled"])
@pytest.mark.parametrize(
    "name", ["cebm-fmnist", "cebm-cifar10", "gmm-cebm-fmnist", "igebm-cifar10"]
)
def test_every_path_of_a_chain_is_the_reference_to_float32_rounding(name, path, monkeypatch):
    # The first convolution's gradient as a product without AMX, oneDNN's with it; or compiled.
    monkeypatch.setattr(models, "AMX", path == "oneDNN")
    reference, x = build(name)
    model = build(name)[0].to(memory_format=torch.channels_last)  # as in training
    energy = model.energy
    if path == "compiled":
        torch.compiler.reset()  # else a process compiles a function for eight models, then no more
        energy = torch.compile(energy, backend="aot_eager", fullgraph=True)
    for steps, step_size, noise_std in ((2, 1e3, 0.0), (10, 1.0, 0.0075)):
        expected = sampling.langevin(reference.energy, x, steps, step_size, noise_std, seeded(1))
        assert (expected - x).abs().max() > 0.01
        settings = of_chains(step_size, noise_std)
        move = sampling.mover("langevin", model, energy, steps, settings, seeded(1))
        end = move(x)
        assert end.is_contiguous()
        torch.testing.assert_close(end, expected, atol=2e-5, rtol=0)
    if path == "compiled":  # of parameters that ask for gradients too
        end = sampling.langevin(energy, x, steps, step_size, noise_std, seeded(1))
        torch.testing.assert_close(end, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["cebm-cifar10", "gmm-cebm-fmnist", "igebm-mnist", "jem-fmnist"])
def test_the_first_convolutions_gradient_by_pixels_is_autograds(name, monkeypatch):
    monkeypatch.setattr(models, "AMX", False)
    model, x = build(name)
    model, x, ends = model.double(), x.double(), []
    for frozen in (False, True):
        for p in model.parameters():
            p.requires_grad_(not frozen)  # frozen, as chains have them, the product is taken
        ends.append(sampling.langevin(model.energy, x, 1, 1.0, 0.0))
    torch.testing.assert_close(ends[1] - x, ends[0] - x, atol=0, rtol=1e-9)
    assert (ends[0] - x).norm() > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it records")
@pytest.mark.parametrize("compile", [False, True])
def test_what_cannot_be_compiled_or_recorded_is_told_and_chains_move_all_the_same(compile):
    model, x = network(), torch.zeros(4, 1, 28, 28)
    chain = "langevin", model, model.energy, 3, of_chains()
    plain = sampling.mover(*chain, seeded())(x)
    move = sampling.mover(*chain, seeded(), record=True, compile=compile)
    with pytest.warns(UserWarning, match="slower: .+") as warned:
        ends = move(x), move(x)
    assert len(warned) == 1 + compile
    assert move.graph is None
    assert torch.equal(ends[0], plain)
    assert not torch.equal(ends[1], plain)  # the generator went on


@pytest.mark.filterwarnings("error")
def test_sweeps_of_gibbs_are_neither_compiled_nor_recorded():
    model, x = build("rbm-mnist", (1, 3, 3))
    move = sampling.mover("gibbs", model, None, 2, None, seeded(), record=True, compile=True)
    expected = model.gibbs_sweep(model.gibbs_sweep(x, generator := seeded()), generator)
    assert torch.equal(move(x), expected)


# "gpu" in the name, since tests/conftest.py hides a GPU from other tests.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error:updates are")
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_a_recorded_chain_is_the_reference_and_follows_the_weights(compile, monkeypatch):
    torch.compiler.reset()
    for kind in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(kind, "allow_tf32", False)
    model, x = network().cuda(), torch.zeros(4, 1, 28, 28, device="cuda")
    generator = torch.Generator("cuda")
    chain = "langevin", model, model.energy, 5, of_chains(bound=0.02)
    move = sampling.mover(*chain, generator, record=True, compile=compile)
    for call in range(6):  # three aside, then recorded
        generator.manual_seed(7)
        expected = sampling.langevin(model.energy, x, 5, 1.0, 0.01, generator, bound=0.02)
        generator.manual_seed(7)
        torch.testing.assert_close(move(x), expected, atol=2e-6, rtol=0)
        assert (move.graph is not None) == (call >= 3)
        with torch.no_grad():
            model.network.heads[0][0].bias.add_(0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        move(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_in_bfloat16_one_step_differs_by_under_two_percent_of_its_length():
    model = network()
    with torch.no_grad():
        for head in model.network.heads:
            head[-1].weight.mul_(10)
    x = torch.rand(8, 1, 28, 28, generator=seeded()) * 2 - 1
    plain = sampling.langevin(model.energy, x, 1, 1.0, 0.0)
    settings = of_chains(1.0, 0.0)
    fast = sampling.mover("langevin", model, model.energy, 1, settings, None, bfloat16=True)(x)
    assert 1e-4 < (fast - plain).norm() / (plain - x).norm() < 0.02


def test_in_bfloat16_what_an_energy_computes_in_float32_has_its_gradient_in_float32_too():
    head = torch.nn.Linear(784, 20)
    x = torch.rand(8, 1, 28, 28, generator=seeded()) * 2 - 1

    def energy(x):
        return models.in_float32(head, x.flatten(1)).square().sum(1)

    plain = sampling.langevin(energy, x, 1, 1.0, 0.0)
    fast = sampling.fast_langevin(head, energy, x, 1, of_chains(1.0, 0.0), None, bfloat16=True)
    torch.testing.assert_close(fast, plain, rtol=1e-6, atol=1e-6)


# The replay buffer


def test_five_percent_of_chains_restart_uniformly():
    buffer = sampling.ReplayBuffer(500, (1, 4, 4), 0.95, seeded())
    buffer.images.fill_(7.0)
    restarted, drawn = [], 0
    for _ in range(200):
        _, x = buffer.draw(torch.zeros(100, 1, 4, 4))
        fresh = x[(x != 7).flatten(1).all(1)]
        assert len(fresh) + (x == 7).flatten(1).all(1).sum() == 100
        restarted.append(fresh)
        drawn += 100
    fresh = torch.cat(restarted)
    assert abs(len(fresh) / drawn - 0.05) < 5 * (0.05 * 0.95 / drawn) ** 0.5
    assert fresh.min() >= -1
    assert fresh.max() <= 1
    assert abs(fresh.mean()) < 5 * (1 / 3 / fresh.numel()) ** 0.5
    assert abs(fresh.var() - 1 / 3) < 0.02


@pytest.mark.parametrize("share", [0.4, 1.0])
def test_a_share_of_restarted_chains_are_images_with_noise(share):
    buffer = sampling.ReplayBuffer(500, (1, 4, 4), 0.8, seeded(), share, 0.1)
    buffer.images.fill_(7.0)
    x = torch.full((100, 1, 4, 4), -3.0)
    chains = torch.cat([buffer.draw(x)[1] for _ in range(200)])
    kept = (chains == 7).flatten(1).all(1)
    noised = (chains + 3).flatten(1).abs().amax(1) < 1  # ten deviations; uniform ones are 2 away
    for chance, found in ((0.8, kept), (0.2 * share, noised)):
        assert abs(found.double().mean() - chance) < 5 * (chance * (1 - chance) / len(found)) ** 0.5
    assert abs((chains[noised] + 3).std() - 0.1) < 0.005
    uniform = chains[~kept & ~noised]
    assert bool(len(uniform)) == (share < 1)
    assert uniform.abs().le(1).all()


def test_slots_are_distinct_and_hold_the_chains_that_were_drawn_until_others_are_stored():
    buffer = sampling.ReplayBuffer(50, (1, 2, 2), 1.0, seeded())
    before = buffer.images.clone()
    slots, x = buffer.draw(torch.zeros(40, 1, 2, 2))
    assert len(slots.unique()) == 40
    assert torch.equal(x, before[slots])
    assert torch.equal(buffer.images, before)
    buffer.store(slots, x + 5)
    before[slots] += 5
    assert torch.equal(buffer.images, before)


def test_every_slot_is_drawn_in_time():
    buffer = sampling.ReplayBuffer(50, (1, 2, 2), 1.0, seeded())
    counts = torch.zeros(50)
    for _ in range(1000):
        counts[buffer.draw(torch.zeros(10, 1, 2, 2))[0]] += 1
    assert (counts - 200).abs().max() < 5 * 160**0.5


def test_buffer_and_generator_state_bring_back_the_same_draws():
    first = sampling.ReplayBuffer(20, (1, 2, 2), 0.5, seeded())
    first.draw(x := torch.zeros(5, 1, 2, 2))
    second = sampling.ReplayBuffer(20, (1, 2, 2), 0.5, seeded(9))
    second.images.copy_(first.images)
    second.generator.set_state(first.generator.get_state())
    for a, b in zip(first.draw(x), second.draw(x), strict=True):
        assert torch.equal(a, b)


# Learning by persistent contrastive divergence


def learn(model, images, settings, updates, batch, rate, generator):
    """Trains on `images` by chains that persist: the 200 of them at the end."""
    sampler = "gibbs" if hasattr(model, "gibbs_sweep") else "langevin"
    move = sampling.mover(sampler, model, model.energy, settings.steps, settings, generator)
    buffer = sampling.ReplayBuffer(200, images.shape[1:], settings.reuse, generator)
    optimiser = torch.optim.Adam(model.parameters(), rate, betas=(0.0, 0.999))
    for _ in range(updates):
        x = images[torch.randint(len(images), (batch,), generator=generator)]
        slots, start = buffer.draw(x)
        buffer.store(slots, chains := move(start))
        optimiser.zero_grad()
        model.loss(x, None, chains)[0].backward()
        optimiser.step()
    return buffer.images


def test_an_rbm_learns_what_no_model_of_separate_pixels_can():
    # The 14 images of 3 x 3 whose rows, or whose columns, are of one colour: each pixel is white in
    # half of them, so a model of separate pixels has a log-likelihood of -9 log 2 = -6.24 at best.
    model, _ = build("rbm-mnist", (1, 3, 3), "model.latent=12")
    one, every = (torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * n) for n in (3, 9))
    rows = one.view(8, 1, 3, 1).expand(8, 1, 3, 3)
    images, every = torch.cat([rows, rows.mT]).unique(dim=0), every.view(512, 1, 3, 3)
    assert len(images) == 14
    assert (images.mean(0) == 0).all()

    @torch.no_grad()
    def log_likelihood():
        log_normaliser = torch.logsumexp(-model.energy(every), 0)
        return (-model.energy(images) - log_normaliser).mean().item()

    assert math.isclose(log_likelihood(), -9 * math.log(2), abs_tol=0.05)
    settings = cebm.compose("rbm-mnist", ["chains.steps=5"]).chains
    learn(model, images, settings, 1000, 50, 0.01, seeded())
    assert -math.log(14) >= log_likelihood() > -9 * math.log(2) + 1.5


@pytest.mark.parametrize("name", ["cebm", "igebm"])
def test_an_energy_learns_two_shapes_from_noisy_images_and_its_chains_draw_both(name):
    small = "model.channels=[8,8,8,8]", "model.hidden=16", "model.latent=8"
    model, _ = build(f"{name}-mnist", (1, 8, 8), *small)
    shapes, generator = torch.full((2, 1, 8, 8), -1.0), seeded()
    shapes[0, :, 3:5] = shapes[0, :, :, 3:5] = 1.0  # a cross
    shapes[1, :, 1:7, 1:7] = 1.0  # a ring
    shapes[1, :, 3:5, 3:5] = -1.0
    images = shapes.repeat(350, 1, 1, 1)
    images += 0.2 * torch.randn(images.shape, generator=generator)
    images, held_out = images[:500], images[500:]
    order = torch.randperm(64, generator=generator)  # the same pixels, elsewhere
    others = [sampling.uniform((200, 1, 8, 8), generator), held_out.flatten(1)[:, order]]
    others = torch.cat([others[0], others[1].view_as(held_out)])

    @torch.no_grad()
    def margin():
        """How far the least energy of another image is above the greatest of a shape."""
        return (model.energy(others).min() - model.energy(held_out).max()).item()

    assert abs(margin()) < 0.1
    settings = cebm.compose(f"{name}-mnist", ["chains.steps=10"]).chains
    chains = learn(model, images, settings, 200, 16, 2e-3, generator)
    assert margin() > 1
    # Squared distance of a pixel from the nearer shape: 0.04 of images, 1.2 of noise.
    distance, nearer = (chains[:, None] - shapes).square().flatten(2).mean(2).min(1)
    assert distance.median() < 0.5
    assert 0.2 < nearer.double().mean() < 0.8
