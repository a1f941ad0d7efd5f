"""Chains against known answers, and the replay buffer's bookkeeping."""

from dataclasses import replace

import pytest
import torch

import cebm
import models
import sampling


def network(latent=8):
    config = cebm.compose("cebm-mnist").model
    config = replace(config, channels=[8, 8, 8, 8], hidden=16, latent=latent)
    torch.manual_seed(0)
    return models.build(config, (1, 28, 28), 10)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


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
    end = sampling.mover(model, lambda v: model.joint_energy(v, z), 5, 0.5, 0.0, None)(x)
    assert (model.joint_energy(end, z) < model.joint_energy(x, z)).all()


def test_a_bounded_step_ends_at_the_nearest_point_within_the_bound_on_both_paths():
    model, x = network(), torch.rand(4, 1, 28, 28, generator=seeded()) * 4 - 2
    free = sampling.langevin(model.energy, x, 1, 1.0, 0.3, seeded(1))
    near = free.clamp(-0.7, 0.7)
    assert not torch.equal(near, free)
    assert torch.equal(sampling.langevin(model.energy, x, 1, 1.0, 0.3, seeded(1), bound=0.7), near)
    fast = sampling.mover(model, model.energy, 1, 1.0, 0.3, seeded(1), bound=0.7)
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


def test_chains_leave_parameters_as_they_are_and_without_gradients():
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.network.heads[0][0].bias.requires_grad_(False)
    start = torch.zeros(4, 1, 28, 28)
    x = sampling.mover(model, model.energy, 3, 1.0, 0.01, seeded())(start)
    assert not x.requires_grad
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == (name != "network.heads.0.0.bias")  # as it was


@pytest.mark.parametrize("channels", [1, 3])
def test_the_fast_path_is_the_reference_to_float32_rounding(channels):
    config = cebm.compose("cebm-mnist").model
    torch.manual_seed(0)
    model = models.build(config, (channels, 28, 28), 10)
    x = torch.rand(8, channels, 28, 28, generator=seeded()) * 2 - 1
    plain = sampling.langevin(model.energy, x, 10, 1.0, 0.0075, seeded(1))
    model = model.to(memory_format=torch.channels_last)
    fast = sampling.mover(model, model.energy, 10, 1.0, 0.0075, seeded(1))(x)
    torch.testing.assert_close(fast, plain, atol=2e-5, rtol=0)
    assert fast.is_contiguous()


@pytest.mark.parametrize("name", ["cebm-cifar10", "gmm-cebm-fmnist", "igebm-mnist", "jem-fmnist"])
def test_the_first_convolutions_gradient_by_pixels_is_autograds(name):
    config = cebm.compose(name)
    torch.manual_seed(0)
    model = models.build(config.model, config.data.image, 10).double()
    x = torch.rand(3, *config.data.image, generator=seeded()).double() * 2 - 1
    ends = []
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
    plain = sampling.mover(model, model.energy, 3, 1.0, 0.01, seeded())(x)
    move = sampling.mover(model, model.energy, 3, 1.0, 0.01, seeded(), True, compile)
    with pytest.warns(UserWarning, match="slower: .+") as warned:
        ends = move(x), move(x)
    assert len(warned) == 1 + compile
    assert torch.equal(ends[0], plain)
    assert not torch.equal(ends[1], plain)  # the generator went on


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error:updates are")
@pytest.mark.parametrize("compile", [False, True])
def test_a_recorded_chain_is_the_reference_and_follows_the_weights(compile, monkeypatch):
    torch.compiler.reset()
    for kind in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(kind, "allow_tf32", False)
    model, x = network().cuda(), torch.zeros(4, 1, 28, 28, device="cuda")
    generator = torch.Generator("cuda")
    move = sampling.mover(model, model.energy, 5, 1.0, 0.01, generator, True, compile, bound=0.02)
    for _ in range(6):  # three aside, then recorded
        generator.manual_seed(7)
        expected = sampling.langevin(model.energy, x, 5, 1.0, 0.01, generator, bound=0.02)
        generator.manual_seed(7)
        torch.testing.assert_close(move(x), expected, atol=2e-6, rtol=0)
        with torch.no_grad():
            model.network.heads[0][0].bias.add_(0.1)
    assert move.calls == 4  # recorded
    torch.cuda.set_sync_debug_mode("error")
    try:
        move(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["cebm-fmnist", "cebm-cifar10", "igebm-mnist", "gmm-cebm-fmnist"])
def test_compiled_chains_are_the_reference_to_float32_rounding(name):
    config = cebm.compose(name)
    torch.manual_seed(0)
    model = models.build(config.model, config.data.image, 10)
    x = torch.rand(3, *config.data.image, generator=seeded()) * 2 - 1
    torch.compiler.reset()  # else a process compiles a function for eight models, then no more
    energy = torch.compile(model.energy, backend="aot_eager", fullgraph=True)
    expected = sampling.langevin(model.energy, x, 2, 1e3, 0.0)
    for frozen in (True, False):
        for p in model.parameters():
            p.requires_grad_(not frozen)
        torch.testing.assert_close(
            sampling.langevin(energy, x, 2, 1e3, 0.0), expected, atol=2e-5, rtol=0
        )
    assert (expected - x).abs().max() > 0.01


def test_in_bfloat16_one_step_differs_by_under_two_percent_of_its_length():
    model = network()
    with torch.no_grad():
        for head in model.network.heads:
            head[-1].weight.mul_(10)
    x = torch.rand(8, 1, 28, 28, generator=seeded()) * 2 - 1
    plain = sampling.langevin(model.energy, x, 1, 1.0, 0.0)
    fast = sampling.mover(model, model.energy, 1, 1.0, 0.0, None, bfloat16=True)(x)
    assert 1e-4 < (fast - plain).norm() / (plain - x).norm() < 0.02


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


def test_slots_are_distinct_and_hold_the_chains_that_were_drawn():
    buffer = sampling.ReplayBuffer(50, (1, 2, 2), 1.0, seeded())
    before = buffer.images.clone()
    slots, x = buffer.draw(torch.zeros(40, 1, 2, 2))
    assert len(slots.unique()) == 40
    assert torch.equal(x, before[slots])
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


@pytest.mark.parametrize("name", ["cebm-fmnist", "igebm-cifar10"])
def test_chains_of_processors_with_and_without_amx_are_the_same_in_float32(name, monkeypatch):
    config = cebm.compose(name)
    torch.manual_seed(0)
    model = models.build(config.model, config.data.image, 10)
    x = torch.rand(3, *config.data.image, generator=seeded()) * 2 - 1
    move = sampling.mover(model, model.energy, 2, 1e3, 0.0, None)
    ends = []
    for amx in (False, True):
        monkeypatch.setattr(models, "AMX", amx)
        ends.append(move(x))
    assert (ends[0] - x).abs().max() > 0.01
    torch.testing.assert_close(*ends, atol=2e-5, rtol=0)
