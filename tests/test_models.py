"""Energies against integration, enumeration, finite differences and Bayes; losses; MODELS."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence

import cebm
import data
import models
import sampling

SHAPE = (1, 8, 8)


def build(name, shape=(1, 28, 28), **changes):
    """An untrained, narrow model, the same at every call."""
    changes = {"channels": (4, 4, 4, 4), "hidden": 8, "latent": 6} | changes
    torch.manual_seed(0)
    return models.build(replace(cebm.compose(f"{name}-mnist").model, **changes), shape, 10)


def small(latent=1, name="cebm", **changes):
    """A float64 CEBM for 8x8 images, its statistics scaled up, far from the prior."""
    model = build(name, SHAPE, latent=latent, **changes).double()
    with torch.no_grad():
        for head in model.network.heads:
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


def mixture(latent=1, components=3, **changes):
    """A GMM-CEBM whose components differ and are of different widths."""
    return small(
        latent,
        "gmm-cebm",
        components=components,
        prior_mean_std=2.0,
        prior_std=(0.5, 1.5),
        **changes,
    )


FORMS = [
    pytest.param(partial(make, t2=t2, head=head), id=f"{make.__name__}-{t2}-{head}")
    for make in (small, mixture)
    for t2 in ("square", "softplus")
    for head in ("shared", "separate")
]


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("make", FORMS)
def test_the_energy_is_the_joint_energy_integrated_over_z(x, make, dim):
    model = make(dim)
    z, cell = grid(dim)
    for image in x[:3]:
        joint = model.joint_energy(image[None], z)
        integral = -torch.log(torch.exp(-joint).sum() * cell)
        torch.testing.assert_close(integral, model.energy(image[None])[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", FORMS)
def test_the_posterior_is_the_normalised_joint_density(x, make):
    model = make(1, represent="mixture")
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


@pytest.mark.parametrize("make", FORMS)
def test_bayes_rule_holds_between_joint_marginal_and_posterior(x, make):
    model = make(6)
    z = torch.randn(5, 6, dtype=torch.float64)
    log_posterior = model.energy(x) - model.joint_energy(x, z)
    torch.testing.assert_close(model.posterior(x).log_prob(z), log_posterior, atol=1e-9, rtol=0)


def test_without_evidence_the_model_is_its_prior(x):
    model = small(3)
    with torch.no_grad():
        for head in model.network.heads:
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
    log_density = log_density - math.log(2 * math.pi)
    torch.testing.assert_close(log_density, Normal(mean, std).log_prob(z).sum())
    torch.testing.assert_close(models.Gaussian.member(lam).mean, mean)
    torch.testing.assert_close(models.Gaussian.member(lam).stddev, std)


def test_the_energy_gradient_agrees_with_finite_differences(x):
    model = small(4)
    x, z = x[:2].requires_grad_(True), torch.randn(2, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(model.energy, x, atol=1e-6)
    assert torch.autograd.gradcheck(lambda v: model.joint_energy(v, z), x, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "sides", "features"),
    [("cebm-mnist", [28, 14, 7, 3], 288), ("cebm-cifar10", [32, 16, 8, 4], 8192)],
)
def test_table_5_shapes_at_every_stage(preset, sides, features):
    config = cebm.compose(preset)
    model = models.build(config.model, config.data.image, 10)
    h, seen = torch.zeros(2, *config.data.image), []
    for layer in model.network.trunk:
        h = layer(h)
        if isinstance(layer, torch.nn.Conv2d):
            seen.append(tuple(h.shape[1:]))
    assert seen == [(c, s, s) for c, s in zip(config.model.channels, sides, strict=True)]
    assert h.shape == (2, features)
    assert model.t(torch.zeros(2, *config.data.image)).shape == (2, 2, 128)
    assert model.network.heads[0][0].out_features == {288: 128, 8192: 1024}[features]


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0, 1e6, 1e12])
@pytest.mark.parametrize("t2", ["square", "softplus"])
def test_energies_are_finite_float32_under_autocast_for_pixels_up_to_1e12(scale, t2):
    model = build("cebm", t2=t2, hidden=128, latent=128)
    x = scale * torch.randn(4, 1, 28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [
            model.energy(x),
            model.represent(x),
            model.posterior(x).stddev,
            model.joint_energy(x, model.represent(x)),
        ]
    for output in outputs:
        assert output.dtype == torch.float32
        assert output.isfinite().all()


@pytest.mark.parametrize("l2_on", ["data", "both"])
def test_the_loss_is_the_gap_plus_l2_and_reaches_every_parameter(x, l2_on):
    model = small(3, l2_on=l2_on)
    chains = torch.rand_like(x[:4])
    loss, metrics = model.loss(x, None, chains)
    real, fake = model.energy(x), model.energy(chains)
    magnitude = real.square().mean() + (fake.square().mean() if l2_on == "both" else 0)
    torch.testing.assert_close(loss, real.mean() - fake.mean() + 0.1 * magnitude)
    torch.testing.assert_close(metrics["gap"], real.mean() - fake.mean())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_mixtures_deviations_start_in_their_range_whichever_end_is_named_first():
    for ends in ((0.5, 1.5), (1.5, 0.5)):
        std = small(64, "gmm-cebm", components=9, prior_std=ends).prior.log_std.exp()
        assert 0.5 <= std.min() < 0.51
        assert 1.49 < std.max() <= 1.5


def test_a_mixture_of_one_standard_component_is_the_cebm(x):
    # Three components at N(0, I) are one.
    plain = small(4)
    model = small(4, "gmm-cebm", components=3, prior_mean_std=0.0, prior_std=(1.0, 1.0))
    model.network.load_state_dict(plain.network.state_dict())
    z = torch.randn(5, 4, dtype=torch.float64)
    for a, b in [
        (plain.energy(x), model.energy(x)),
        (plain.represent(x), model.represent(x)),
        (plain.joint_energy(x, z), model.joint_energy(x, z)),
        (plain.posterior(x).log_prob(z), model.posterior(x).log_prob(z)),
    ]:
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_class_of_an_image_follows_bayes_rule_by_hand(monkeypatch):
    # N(-1, 1) and N(2, 1), t = (1, 0): exp(A(lam + t) - A(lam)) is exp(m + 1/2), so p(y = 1) is
    # exp(2.5) / (exp(2.5) + exp(-0.5)); the posteriors are N(0, 1) and N(3, 1).
    model = mixture(1, 2)
    with torch.no_grad():
        model.prior.location.copy_(torch.tensor([[-1.0], [2.0]]))
        model.prior.log_std.zero_()
    monkeypatch.setattr(model, "t", lambda x: torch.tensor([[[1.0], [0.0]]]).double())
    chance = 1 / (1 + math.exp(-3))
    chances = model.posterior(None).mixture_distribution.probs
    assert math.isclose(chances[0, 1].item(), chance, rel_tol=1e-9)
    assert math.isclose(model.represent(None).item(), 3.0)  # the likeliest component's mean
    model.likeliest = False
    assert math.isclose(model.represent(None).item(), 3 * chance, rel_tol=1e-9)
    assert math.isclose(model.posterior(None).mean.item(), 3 * chance, rel_tol=1e-9)


@pytest.mark.parametrize("head", ["shared", "separate"])
def test_a_first_scale_multiplies_t1_and_leaves_t2_and_the_random_numbers(head):
    x, outputs, after = torch.rand(3, 1, 28, 28) * 2 - 1, [], []
    for scale in (1.0, 4.0):
        torch.manual_seed(0)
        outputs.append(build("cebm", head=head, t1_scale=scale).t(x))
        after.append(torch.rand(1))
    torch.testing.assert_close(outputs[1][:, 0], 4 * outputs[0][:, 0])
    torch.testing.assert_close(outputs[1][:, 1], outputs[0][:, 1])
    assert after[0] == after[1]


def test_concentration_is_1_on_a_line_and_known_for_corners_of_a_simplex():
    line = torch.randn(6, 1) * torch.randn(8) + torch.randn(8)
    torch.testing.assert_close(models.concentration(line), torch.tensor(1.0))
    corners = 3 * torch.eye(6) + 10  # seen from their middle, the cosine of two of them is -1 / 5
    torch.testing.assert_close(models.concentration(corners), torch.tensor(1 / 25))


def test_concentration_of_many_latents_is_one_over_the_participation_ratio():
    scales = torch.tensor([3.0, 2.0, 1.0, 1.0, 0.5]).double()
    z = torch.randn(2000, 5).double() * scales @ torch.randn(5, 5).double() + 7
    variances = torch.linalg.eigvalsh(torch.cov(z.T))
    ratio = variances.sum() ** 2 / variances.square().sum()
    torch.testing.assert_close(models.concentration(z), 1 / ratio, rtol=0.01, atol=0)
    torch.testing.assert_close(models.concentration(100 * z), models.concentration(z))


@pytest.mark.parametrize("name", ["cebm", "gmm-cebm"])
def test_encode_is_mean_energy_and_deviation_by_one_pass_of_the_network(name, monkeypatch):
    model, x = build(name), torch.rand(5, 1, 28, 28) * 2 - 1
    expected = {
        "mean": model.represent(x),
        "energy": model.energy(x),
        "std": model.posterior(x).variance.sqrt(),
    }
    passes, forward = [], model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda x: passes.append(len(x)) or forward(x))
    found = model.encode(x)
    assert passes == [5]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["cebm", "gmm-cebm"])
def test_spread_adds_the_concentration_of_the_datas_latents_to_the_loss(name):
    model, spread = (build(name).double() for _ in range(2))
    spread.load_state_dict(model.state_dict())
    spread.spread = 7.0
    x, chains = (torch.rand(5, 1, 28, 28).double() * 2 - 1 for _ in range(2))
    (plain, _), (more, metrics) = (m.loss(x, None, chains) for m in (model, spread))
    expected = models.concentration(model.represent(x))
    torch.testing.assert_close(metrics["concentration"], expected)
    torch.testing.assert_close(more, plain + 7 * expected)


@pytest.mark.parametrize("name", ["cebm", "gmm-cebm", "igebm", "jem", "hdge"])
def test_with_local_contrast_light_tint_and_contrast_do_not_change_an_energy(name):
    model = build(name, (3, 32, 32), contrast="local").double()
    x = torch.randn(4, 3, 32, 32).double()
    tint, light = torch.randn(4, 3, 1, 1), torch.randn(4, 1, 1, 1)
    seen = model.energy(x)
    torch.testing.assert_close(model.energy(x + tint + light), seen)
    torch.testing.assert_close(model.energy(3 * x), seen, rtol=1e-2, atol=1e-3)
    assert (build(name, (3, 32, 32)).double().energy(x + tint) - model.energy(x)).abs().min() > 1e-6
    x = torch.zeros(2, 3, 32, 32).double().requires_grad_(True)  # no contrast at all
    (gradient,) = torch.autograd.grad(model.energy(x).sum(), x)
    assert gradient.isfinite().all()


def test_local_contrast_has_mean_0_and_deviation_one_half():
    y = models.LocalContrast((3, 24, 40))(5 + 2 * torch.randn(6, 3, 24, 40))
    torch.testing.assert_close(y.mean((1, 2, 3)), torch.zeros(6), atol=1e-5, rtol=0)
    deviations = y.flatten(1).std(1)
    torch.testing.assert_close(deviations, torch.full((6,), 0.5), atol=2e-3, rtol=0)


def test_any_network_that_returns_t1_and_h_makes_a_conjugate_model():
    class Trunk(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.t1, self.h = (torch.nn.Linear(12, 5) for _ in range(2))

        def forward(self, x):
            return self.t1(x.flatten(1)), self.h(x.flatten(1))

    x = torch.rand(4, 3, 2, 2) * 2 - 1
    trunk = Trunk()
    model = models.Conjugate(trunk, models.GaussianPrior(5), t2="softplus")
    t1, h = trunk(x)
    precision = 1 + 2 * torch.nn.functional.softplus(h)
    torch.testing.assert_close(model.represent(x), t1 / precision)
    energy = -(t1**2 / precision / 2 - precision.log() / 2).sum(1)
    torch.testing.assert_close(model.energy(x), energy)
    joined = models.Conjugate(lambda x: torch.cat(trunk(x), 1), models.GaussianPrior(5), "softplus")
    torch.testing.assert_close(joined.energy(x), energy)
    _, metrics = model.loss(x, None, -x)
    assert metrics["gap"] == model.energy(x).mean() - model.energy(-x).mean()
    mixture = models.Conjugate(trunk, models.GaussianPrior(5, components=3))
    assert mixture.posterior(x).mean.shape == (4, 5)


def test_draws_from_a_mixture_have_its_mean_and_second_moment():
    prior, count = mixture(2, 3).prior, 100_000
    z, square = prior.sample(count), prior.location**2 + torch.exp(2 * prior.log_std)
    for draws, expected in (z, prior.location.mean(0)), (z * z, square.mean(0)):
        assert ((draws.mean(0) - expected).abs() < 5 * draws.std(0) / count**0.5).all()


def harmonium(name, shape, hidden):
    """A float64 RBM or EFH with weights far from 0."""
    model = build(name, shape, latent=hidden).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def binary(dim):
    """All 2^dim states (2^dim, dim)."""
    return torch.cartesian_prod(*[torch.tensor([0.0, 1.0]).double()] * dim).view(-1, dim)


@pytest.mark.parametrize("name", ["rbm", "efh"])
def test_a_harmoniums_joint_energy_is_eq_29_and_30_and_its_energy_their_sum(name):
    model, z = harmonium(name, (1, 2, 3), 8), binary(8)
    x = torch.randn(4, 1, 2, 3, dtype=torch.float64)
    if name == "rbm":
        x = x.sign()
    theta_xz, theta_x, theta_z = model.network.theta_xz, model.network.theta_x, model.prior.theta_z
    for image in x:
        v = (image.flatten() + 1) / 2 if name == "rbm" else image.flatten()
        square = 0 if name == "rbm" else (v * v).sum() / (2 * model.config.visible_std**2)
        by_hand = -(v @ theta_xz * z).sum(1) - v @ theta_x - z @ theta_z.flatten() + square
        joint = model.joint_energy(image[None], z)
        torch.testing.assert_close(joint, by_hand, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.energy(image[None])[0], -torch.logsumexp(-by_hand, 0))
        weight = torch.softmax(-by_hand, 0)
        torch.testing.assert_close(model.posterior(image[None]).mean[0], weight @ z)


def test_an_efhs_x_given_z_is_its_normalised_joint_density():
    model, z = harmonium("efh", (1, 1, 1), 5), binary(5)[19:20]
    axis = torch.linspace(-12, 12, 24_001).double()
    weight = torch.softmax(-model.joint_energy(axis.view(-1, 1, 1, 1), z), 0)
    generator = torch.Generator().manual_seed(0)
    x = model.network.sample(z.expand(100_000, 5), generator).flatten()
    mean = (weight * axis).sum()
    variance = (weight * (axis - mean) ** 2).sum()
    assert math.isclose(variance.sqrt().item(), model.config.visible_std, rel_tol=1e-4)
    assert abs(x.mean() - mean) < 5 * (variance / 100_000) ** 0.5
    assert abs(x.var() / variance - 1) < 5 * (2 / 100_000) ** 0.5


def test_block_gibbs_on_a_tiny_rbm_reaches_the_enumerated_marginal():
    model = harmonium("rbm", (1, 2, 2), 3)
    states = binary(4).view(-1, 1, 2, 2) * 2 - 1
    exact = torch.softmax(-model.energy(states), 0)
    chains = torch.ones(20_000, 1, 2, 2).double()
    generator = torch.Generator().manual_seed(0)
    x = sampling.mover("gibbs", model, None, 100, None, generator)(chains)
    code = ((x.flatten(1) + 1) / 2 @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long()
    found = torch.bincount(code, minlength=16) / 20_000
    assert ((found - exact).abs() < 5 * (exact * (1 - exact) / 20_000) ** 0.5 + 1e-9).all()


def test_gaussian_chains_of_an_efh_forget_their_start():
    model = build("efh", latent=8)
    ends = [
        sampling.mover("gibbs", model, None, 30, None, torch.Generator().manual_seed(0))(
            torch.full((500, 1, 28, 28), start)
        )
        for start in (-3.0, 3.0)
    ]
    assert abs(ends[0].mean() - ends[1].mean()) < 0.01
    assert abs(ends[0].std() - model.config.visible_std) < 0.05


@pytest.mark.parametrize("name", models.MODELS)
def test_the_registry_says_the_truth_about_each_model(name):
    kind = models.MODELS[name]
    said = {
        "energy": kind.density,
        "posterior": kind.posterior,
        "decode": kind.decoder,
        "generate": kind.decoder,
        "latent_energy": kind.latent_energy,
        "classify": kind.labels,
        "gibbs_sweep": kind.chains == "gibbs",
    }
    model = build(name)
    assert {method: hasattr(model, method) for method in said} == said
    if kind.posterior:  # x given z: by chains on E(x, z), or decoded
        assert hasattr(model, "joint_energy") or kind.decoder
    assert kind.chains is None or kind.chains in sampling.SAMPLERS


@pytest.mark.parametrize("name", models.MODELS)
def test_a_model_learns_from_images_of_every_size_that_the_registry_says_it_is_for(name):
    kind = models.MODELS[name]
    sizes = [(side, side) for side in kind.sides or (28, 32)]
    for size in sizes if kind.sides else [*sizes, (8, 11)]:
        x, y = torch.rand(4, 3, *size) * 2 - 1, torch.arange(4)
        model = build(name, x.shape[1:])
        assert model.loss(x, y, -x if kind.chains else None)[0].isfinite()
        assert len(model.represent(x)) == 4
        if kind.decoder:
            assert model.generate(2).shape == (2, 3, *size)


def test_configs_yaml_names_exactly_the_models_and_data_sets_that_there_are():
    book = cebm.read_recipes()
    assert set(book["models"]) == set(models.MODELS)
    assert set(book["data"]) == set(data.DATASETS)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_parameter_of_every_model_receives_a_gradient(name):
    model = build(name)
    x, y = torch.rand(16, 1, 28, 28) * 2 - 1, torch.arange(16) % 10
    loss, metrics = model.loss(x, y, x.flip(0) ** 3 if models.MODELS[name].chains else None)
    loss.backward()
    assert loss.isfinite()
    assert loss.dim() == 0
    assert all(m.dim() == 0 for m in metrics.values())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key
    assert model.represent(x).shape[0] == 16


@pytest.mark.parametrize("name", models.MODELS)
def test_under_bfloat16_losses_energies_and_latents_are_float32(name):
    model, kind = build(name), models.MODELS[name]
    x, y = torch.rand(8, 1, 28, 28) * 2 - 1, torch.arange(8)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [model.represent(x), model.loss(x, y, x.flip(0) if kind.chains else None)[0]]
        outputs += [model.energy(x)] if kind.density else []
        outputs += [model.generate(3)] if kind.decoder else []
    for output in outputs:
        assert output.dtype == torch.float32
        assert output.isfinite().all()


def test_igebm_jem_and_hdge_are_one_network_read_as_table_4_says():
    x, y = torch.rand(6, 1, 28, 28) * 2 - 1, torch.tensor([3, 1, 4, 1, 5, 9])
    igebm, jem, hdge = (build(n) for n in ("igebm", "jem", "hdge"))
    torch.testing.assert_close(igebm.energy(x), -igebm.f(x)[:, 0])
    swish = torch.nn.functional.silu(igebm.represent(x))  # latents come before it
    torch.testing.assert_close(igebm.energy(x), -igebm.head(swish)[:, 0])
    f, chains = jem.f(x), -x
    torch.testing.assert_close(jem.energy(x), -f.exp().sum(1).log())
    for model in jem, hdge:
        assert model.classify(x).tolist() == model.f(x).argmax(1).tolist()
    log_p = f - torch.log(f.exp().sum(1, keepdim=True))
    cross_entropy = -log_p[torch.arange(6), y].mean()
    l2 = jem.config.l2, jem.config.l2_on
    contrastive = models.contrastive(jem.energy(x), jem.energy(chains), *l2)[0]
    torch.testing.assert_close(jem.loss(x, y, chains)[0], cross_entropy + contrastive)
    f = hdge.f(x)
    shares = torch.stack([f[i, y[i]].exp() / f[:, y[i]].exp().sum() for i in range(6)])
    cross_entropy = -(f - torch.log(f.exp().sum(1, keepdim=True)))[torch.arange(6), y].mean()
    torch.testing.assert_close(hdge.loss(x, y, None)[0], cross_entropy - shares.log().mean())


def stages(network, x):
    """Shapes after each convolution on the way up."""
    seen = []
    for layer in network:
        x = layer(x)
        if isinstance(layer, torch.nn.ConvTranspose2d):
            seen.append(tuple(x.shape[1:]))
    return seen


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("vae-mnist", [(32, 6, 6), (64, 12, 12), (64, 26, 26), (1, 28, 28)]),
        ("vae-cifar10", [(32, 8, 8), (64, 16, 16), (64, 32, 32), (3, 32, 32)]),
        ("bigan-mnist", [(64, 2, 2), (64, 4, 4), (32, 7, 7), (32, 14, 14), (1, 28, 28)]),
        ("bigan-cifar10", [(512, 2, 2), (256, 4, 4), (128, 8, 8), (64, 16, 16), (3, 32, 32)]),
    ],
)
def test_decoders_and_generators_have_the_shapes_of_tables_7_and_8(preset, expected):
    config = cebm.compose(preset)
    model = models.build(config.model, config.data.image, 10).eval()
    z = torch.zeros(2, 128)
    if preset.startswith("vae"):
        body, first = model.decoder, (config.model.channels[-1], *[config.data.image[1] // 8] * 2)
        assert body[:3](z).shape[1:] == first
        assert stages(body[3], body[:3](z)) == expected
    else:
        assert stages(model.generator[1], z.view(2, 128, 1, 1)) == expected
        assert isinstance(model.generator[-1], torch.nn.Tanh)
        for network in model.generator, model.encoder, model.discriminator:
            assert sum(isinstance(m, models.BatchNorm) for m in network.modules()) == 4
    images = model.generate(2)
    assert images.shape == (2, *config.data.image)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("name", ["gan", "bigan", "gmm-bigan"])
def test_each_player_has_the_gradient_of_its_own_loss_alone(name):
    pairs, softplus = name != "gan", torch.nn.functional.softplus
    x = torch.rand(8, 1, 28, 28) * 2 - 1

    def losses(model):
        torch.manual_seed(1)  # z of the prior, then of the encoder
        z = model.prior.sample(8)
        real = (x, model.posterior(x).rsample()) if pairs else (x,)
        fake = (model.decode(z), z)[: len(real)]
        on_real, on_fake = model.discriminator(*real), model.discriminator(*fake)
        judging = softplus(-on_real).mean() + softplus(on_fake).mean()
        return judging, softplus(-on_fake).mean() + (softplus(on_real).mean() if pairs else 0)

    model = build(name)
    torch.manual_seed(1)
    model.loss(x, None, None)[0].backward()
    for player in (0, 1):
        alone = build(name)
        losses(alone)[player].backward()
        own = dict(alone.named_parameters())
        for key, parameter in model.named_parameters():
            if key.startswith("discriminator") == (player == 0):
                gradient = own[key].grad
                torch.testing.assert_close(parameter.grad, gradient, atol=1e-6, rtol=1e-4, msg=key)


def test_a_bigans_means_are_standardised_over_a_batch_and_later_by_what_batches_had():
    model, x = build("bigan", standardise=True), torch.rand(50, 1, 28, 28)
    with torch.no_grad():
        model.encoder.heads[0][-1].bias += 5
        means = torch.stack([model.posterior(x).mean for _ in range(200)])
    torch.testing.assert_close(means.mean(1), torch.zeros(200, means.shape[2]), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        means.var(1, correction=0), torch.ones(200, means.shape[2]), atol=0.02, rtol=0
    )  # short of one by the norm's epsilon
    model.eval()
    later = model.represent(x[:7])
    torch.testing.assert_close(later, model.represent(x)[:7])  # by itself, not by its batch
    torch.testing.assert_close(later, means[-1, :7], atol=0.1, rtol=0.1)
    one, other = (build("bigan", standardise=s).posterior(x) for s in (False, True))
    assert one.mean.var(0).mean() < 0.5
    torch.testing.assert_close(one.variance, other.variance)


class Square(torch.nn.Module):
    """A discriminator of logit a |x|^2 + b |z|^2, whose slope in x is 2 a x."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.tensor(v)) for v in (0.03, 0.2))

    def forward(self, x, *z):
        return self.a * x.square().flatten(1).sum(1) + sum(self.b * v.square().sum(1) for v in z)


@pytest.mark.parametrize("penalty", [0.0, 10.0])
def test_under_autocast_a_game_has_the_gradients_of_what_is_computed_in_float32(penalty):
    class InFloat32(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.head = torch.nn.Linear(784, 20), torch.nn.Linear(20, 1)

        def forward(self, x):
            hidden = models.in_float32(self.hidden, x.flatten(1)).tanh()
            return models.in_float32(self.head, hidden)[:, 0]

    model, found = build("gan", gradient_penalty=penalty), []
    model.discriminator = InFloat32()
    x, generated = (torch.rand(6, 1, 28, 28) * 2 - 1 for _ in range(2))
    generated.requires_grad_(True)
    for bfloat16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, _ = model.play((x,), (generated,))
        tensors = generated, *model.discriminator.parameters()
        found.append(torch.autograd.grad(loss, tensors))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gan", "bigan"])
def test_the_gradient_penalty_is_half_its_weight_times_the_squared_slope_in_real_images(name):
    x, ends = torch.rand(8, 1, 28, 28) * 2 - 1, []
    for weight in (0.0, 3.0):
        model = build(name, gradient_penalty=weight)
        model.discriminator = Square()
        torch.manual_seed(1)
        loss, metrics = model.loss(x, None, None)
        loss.backward()
        ends.append((loss, metrics, {k: p.grad for k, p in model.named_parameters()}))
    (plain, _, without), (loss, metrics, gradients) = ends
    a, square = model.discriminator.a.item(), x.square().flatten(1).sum(1).mean()
    torch.testing.assert_close(loss - plain, 1.5 * 4 * a * a * square)
    torch.testing.assert_close(metrics["discriminator"] + metrics["generator"], loss)
    more = {"discriminator.a": 1.5 * 8 * a * square}
    for key, gradient in gradients.items():  # the other players have none of it
        if gradient is not None:
            torch.testing.assert_close(gradient - without[key], more.get(key, 0 * gradient))


def test_batch_normalisation_sees_real_and_generated_images_alike():
    model = build("gan")
    norm = next(m for m in model.discriminator.modules() if isinstance(m, models.BatchNorm))
    model.loss(torch.rand(8, 1, 28, 28), None, None)
    assert int(norm.num_batches_tracked) == 2


def test_batch_normalisation_of_rows_is_that_of_maps_with_second_derivatives():
    x, ends = torch.randn(6, 3, 5, 4, dtype=torch.double), []
    for norm in models.BatchNorm(3).double(), torch.nn.BatchNorm2d(3).double():
        torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        at = x.clone().to(memory_format=torch.channels_last).requires_grad_(True)
        (slope,) = torch.autograd.grad((y := norm(at)).pow(3).sum(), at, create_graph=True)
        slope.square().sum().backward()
        ends.append(
            [y, slope, at.grad, norm.weight.grad, *norm.state_dict().values(), norm.eval()(at)]
        )
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("std", [1.0, 0.1, 0.01, 1e-3])
def test_the_change_of_the_log_partition_does_not_cancel_for_narrow_components(std):
    generator = torch.Generator().manual_seed(0)
    mean, t1, h = torch.randn(3, 50, 128, generator=generator)
    lam = torch.stack([mean / std**2, torch.full_like(mean, -0.5 / std**2)], 1)
    t = torch.stack([t1, -h * h], 1)
    exact = models.Gaussian.log_partition(lam.double() + t.double())
    exact = exact - models.Gaussian.log_partition(lam.double())
    change = models.Gaussian.log_partition_change(lam, t).double()
    torch.testing.assert_close(change, exact, atol=1e-4, rtol=1e-5)


def test_a_bias_above_a_frozen_weight_has_its_gradient(monkeypatch):
    monkeypatch.setattr(models, "AMX", False)  # where the weight's gradient alone was asked about
    model, x = build("cebm"), torch.rand(4, 1, 28, 28)
    first = model.network.trunk[0]
    first.weight.requires_grad_(False)
    model.energy(x).sum().backward()
    assert first.weight.grad is None
    assert first.bias.grad.abs().sum() > 0


def test_there_may_be_more_chains_than_images_and_fewer(x):
    model = small(3)
    for chains in (torch.rand(9, *SHAPE).double(), torch.rand(2, *SHAPE).double()):
        _, metrics = model.loss(x, None, chains)
        torch.testing.assert_close(metrics["energy_data"], model.energy(x).mean())
        torch.testing.assert_close(metrics["energy_chains"], model.energy(chains).mean())


def test_narrow_components_have_the_energy_of_their_density():
    model = build("gmm-vae", components=5, latent=128, prior_mean_std=1.0, prior_std=(0.01, 0.01))
    z = model.prior.location[2:3] + 0.01 * torch.randn(4, 128)
    energy, exact = model.prior.energy(z), model.prior.double().energy(z.double())
    torch.testing.assert_close(energy.double(), exact, atol=1e-2, rtol=1e-5)


def test_langevin_refinement_lowers_a_gans_latent_energy():
    model = build("gan").eval()
    z = model.prior.sample(64).detach()
    end = sampling.langevin(model.latent_energy, z, 50, 0.05, 0.0)
    assert (model.latent_energy(end) < model.latent_energy(z)).all()
    assert torch.allclose(
        model.latent_energy(z),
        -Normal(0, 1).log_prob(z).sum(1) - model.discriminator(model.generator(z)),
        atol=1e-4,
    )


def test_a_linear_gaussian_vaes_elbo_is_below_its_evidence_and_tight_at_the_optimum(monkeypatch):
    # x = W z + noise of deviation s, columns of W orthogonal: p(z | x) is diagonal.
    model, s = build("vae", latent=2), 0.5
    w = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.5, 0.5], [0.5, -0.5]])
    x = torch.tensor([[0.3, -0.7, 1.1, 0.2]])
    cov = w @ w.T + s**2 * torch.eye(4)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(4), cov).log_prob(x)
    variance = 1 / (1 + w.square().sum(0) / s**2)
    mean = variance * (x @ w) / s**2
    monkeypatch.setattr(
        model, "log_likelihood", lambda x, z: Normal(z @ w.T, s).log_prob(x.flatten(1)).sum(1)
    )
    many = x.expand(100_000, 4)
    for shift, scale, tight in [(0.0, 1.0, True), (0.3, 1.0, False), (0.0, 1.7, False)]:
        q = models.normal(*(v.expand(100_000, 2) for v in (mean + shift, scale * variance**0.5)))
        monkeypatch.setattr(model, "posterior", lambda x, q=q: q)
        energies = model.energy(many)
        elbo, error = -energies.mean(), energies.std() / 100_000**0.5
        kl = kl_divergence(
            models.normal(mean + shift, scale * variance**0.5), models.normal(mean, variance**0.5)
        )  # evidence - ELBO
        assert abs(evidence - kl - elbo) < 5 * error
        assert tight == (abs(evidence - elbo) < 5 * error).item()


def test_the_sampled_divergence_from_a_mixture_of_equal_components_is_the_closed_form():
    model = build("gmm-vae", components=3, prior_mean_std=0.0, prior_std=(1.0, 1.0))
    mean, std = torch.randn(6), torch.rand(6) + 0.5
    q = models.normal(mean.expand(50_000, 6), std.expand(50_000, 6))
    sampled = model.divergence(q, q.sample())
    closed = kl_divergence(models.normal(mean, std), models.normal(torch.zeros(6), torch.ones(6)))
    assert abs(sampled.mean() - closed) < 5 * sampled.std() / 50_000**0.5
    plain = build("vae").divergence(q, q.sample())
    torch.testing.assert_close(plain, closed.expand(50_000))


@pytest.mark.parametrize("likelihood", ["bernoulli", "continuous_bernoulli"])
def test_a_vaes_likelihood_is_that_of_its_decoders_logits(likelihood):
    model = build("vae", likelihood=likelihood)
    x, z = torch.rand(3, 1, 28, 28) * 2 - 1, torch.randn(3, 6)
    chance, v = model.decoder(z).double().sigmoid(), (x.double() + 1) / 2
    log_prob = v * chance.log() + (1 - v) * (1 - chance).log()
    if likelihood == "continuous_bernoulli":  # normaliser C = 2 atanh(1 - 2 p) / (1 - 2 p)
        log_prob = log_prob + torch.log(2 * torch.atanh(1 - 2 * chance) / (1 - 2 * chance))
    expected = log_prob.flatten(1).sum(1).float()
    torch.testing.assert_close(model.log_likelihood(x, z), expected, atol=0.05, rtol=1e-4)
    joint = expected + Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(model.joint_energy(x, z), -joint, atol=0.05, rtol=1e-4)
    torch.testing.assert_close(model.decode(z), (2 * chance - 1).float())


def test_a_posterior_mean_shifts_and_narrows_with_evidence(monkeypatch):
    # One image, one dimension, t = (t1, t2) by hand: precision 1 - 2 t2, mean t1 / precision.
    model = small(1)
    statistics = torch.tensor([[[3.0], [-1.0]]]).double()
    monkeypatch.setattr(model, "t", lambda x: statistics)
    posterior = model.posterior(torch.zeros(1, *SHAPE))
    assert math.isclose(posterior.mean.item(), 1.0)
    assert math.isclose(posterior.variance.item(), 1 / 3)
    # E = A(0, -1/2) - A(3, -3/2) = 0 - (9/6 - log(3)/2)
    assert math.isclose(model.energy(None).item(), -1.5 + 0.5 * math.log(3))
