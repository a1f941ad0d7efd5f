"""CEBM against numerical integration over z, torch.distributions, finite differences and Bayes."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import cebm
import models

SHAPE = (1, 8, 8)


def small(latent=1, **changes):
    """An untrained float64 CEBM for 8x8 images, its statistics scaled up, far from the prior."""
    config = replace(cebm.compose("cebm-mnist").model, channels=(4, 4, 4, 4), hidden=8,
                     latent=latent, **changes)
    torch.manual_seed(0)
    model = models.build(config, SHAPE, 10).double()
    with torch.no_grad():
        for head in model.t.heads:
            head[-1].weight.mul_(8)
            head[-1].bias.normal_()
    return model


@pytest.fixture
def x():
    return torch.randn(5, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def grid(dim):
    """Points of a fine lattice over [-15, 15]^dim (N, dim) and the volume of its cell."""
    axis = torch.linspace(-15, 15, 4001 if dim == 1 else 601, dtype=torch.float64)
    return torch.cartesian_prod(*[axis] * dim).view(-1, dim), (axis[1] - axis[0]).item() ** dim


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("t2", ["square", "softplus"])
@pytest.mark.parametrize("head", ["shared", "separate"])
def test_the_energy_is_the_joint_energy_integrated_over_z(x, dim, t2, head):
    model = small(dim, t2=t2, head=head)
    z, cell = grid(dim)
    for image in x[:3]:
        joint = model.joint_energy(image[None], z)
        integral = -torch.log(torch.exp(-joint).sum() * cell)
        torch.testing.assert_close(integral, model.energy(image[None])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("t2", ["square", "softplus"])
def test_the_posterior_is_the_normalised_joint_density(x, t2):
    model = small(1, t2=t2)
    z, cell = grid(1)
    for image in x[:3]:
        weight = torch.exp(-model.joint_energy(image[None], z))
        weight = weight / weight.sum()
        posterior = model.posterior(image[None])
        density = posterior.log_prob(z).exp() * cell
        torch.testing.assert_close(density, weight, atol=1e-8, rtol=1e-6)
        mean = (weight * z[:, 0]).sum()
        torch.testing.assert_close(mean, model.represent(image[None])[0, 0], atol=1e-6, rtol=0)
        variance = (weight * (z[:, 0] - mean) ** 2).sum()
        torch.testing.assert_close(variance, posterior.variance[0, 0], atol=1e-6, rtol=0)


def test_bayes_rule_holds_between_joint_marginal_and_posterior(x):
    model = small(6)
    z = torch.randn(5, 6, dtype=torch.float64)
    log_posterior = model.energy(x) - model.joint_energy(x, z)
    torch.testing.assert_close(model.posterior(x).log_prob(z), log_posterior, atol=1e-9, rtol=0)


def test_without_evidence_the_model_is_its_prior(x):
    model = small(3)
    with torch.no_grad():
        for head in model.t.heads:
            head[-1].weight.zero_()
            head[-1].bias.zero_()
    prior = Independent(Normal(torch.zeros(5, 3).double(), torch.ones(5, 3).double()), 1)
    assert kl_divergence(model.posterior(x), prior).abs().max() < 1e-12
    assert model.energy(x).abs().max() < 1e-12
    z = torch.randn(5, 3).double()
    torch.testing.assert_close(model.joint_energy(x, z), -prior.log_prob(z))


def test_the_log_partition_is_the_gaussian_normaliser():
    mean, std = torch.tensor([0.7, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    lam = torch.stack([mean / std**2, -0.5 / std**2])
    z = torch.tensor([0.1, 0.2]).double()
    log_density = (lam * models.Gaussian.eta(z)).sum() - models.Gaussian.log_partition(lam)
    log_density = log_density - 2 * models.Gaussian.log_base
    torch.testing.assert_close(log_density, Normal(mean, std).log_prob(z).sum())
    torch.testing.assert_close(models.Gaussian.distribution(lam).mean, mean)
    torch.testing.assert_close(models.Gaussian.distribution(lam).stddev, std)


def test_the_energy_gradient_agrees_with_finite_differences(x):
    model = small(4)
    x, z = x[:2].requires_grad_(True), torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(model.energy, x, atol=1e-6)
    assert torch.autograd.gradcheck(lambda v: model.joint_energy(v, z), x, atol=1e-6)


@pytest.mark.parametrize(("preset", "sides", "features"), [
    ("cebm-mnist", [28, 14, 7, 3], 288), ("cebm-cifar10", [32, 16, 8, 4], 8192)])
def test_table_5_shapes_at_every_stage(preset, sides, features):
    config = cebm.compose(preset)
    model = models.build(config.model, config.data.image, 10)
    h, seen = torch.zeros(2, *config.data.image), []
    for layer in model.t.trunk:
        h = layer(h)
        if isinstance(layer, torch.nn.Conv2d):
            seen.append(tuple(h.shape[1:]))
    assert seen == [(c, s, s) for c, s in zip(config.model.channels, sides, strict=True)]
    assert h.shape == (2, features)
    assert model.t(torch.zeros(2, *config.data.image)).shape == (2, 2, 128)
    assert model.t.heads[0][0].out_features == {288: 128, 8192: 1024}[features]


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e6, 1e12])
@pytest.mark.parametrize("t2", ["square", "softplus"])
def test_energies_are_finite_float32_under_autocast_for_any_finite_image(scale, t2):
    config = replace(cebm.compose("cebm-mnist").model, t2=t2)
    torch.manual_seed(0)
    model = models.build(config, (1, 28, 28), 10)
    x = scale * torch.randn(4, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model.energy(x), model.represent(x), model.posterior(x).stddev,
                   model.joint_energy(x, model.represent(x))]
    for output in outputs:
        assert output.dtype == torch.float32
        assert output.isfinite().all()


@pytest.mark.parametrize("l2_on", ["data", "both"])
def test_the_loss_is_the_gap_plus_l2_and_reaches_every_parameter(x, l2_on):
    model = small(3, l2_on=l2_on)
    chains = torch.rand_like(x[:4])
    loss, metrics = model.loss(x, None, chains)
    data, fake = model.energy(x), model.energy(chains)
    magnitude = data.square().mean() + (fake.square().mean() if l2_on == "both" else 0)
    torch.testing.assert_close(loss, data.mean() - fake.mean() + 0.1 * magnitude)
    torch.testing.assert_close(metrics["gap"], data.mean() - fake.mean())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_posterior_mean_shifts_and_narrows_with_evidence(monkeypatch):
    # One image, one dimension, t = (t1, t2) by hand: precision 1 - 2 t2, mean t1 / precision.
    model = small(1)
    statistics = torch.tensor([[[3.0], [-1.0]]]).double()
    monkeypatch.setattr(models.StatisticsNetwork, "forward", lambda self, x: statistics)
    posterior = model.posterior(torch.zeros(1, *SHAPE))
    assert math.isclose(posterior.mean.item(), 1.0)
    assert math.isclose(posterior.variance.item(), 1 / 3)
    # E = A(0, -1/2) - A(3, -3/2) = 0 - (9/6 - log(3)/2)
    assert math.isclose(model.energy(None).item(), -1.5 + 0.5 * math.log(3))
