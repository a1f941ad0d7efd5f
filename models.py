"""Every model of the supplement's Table 4, with the networks of its Tables 5 to 8.

Each model is an unnormalised density p(x) proportional to exp(-E(x)): low energy is likely, chains
descend E. Natural parameters `lam` and statistics `t` are tensors (..., S, D), S statistics for
each of D latent dimensions, so that a posterior's parameters are `lam + t(x)`. Shapes: images x
(B, C, H, W) in [-1, 1], latents z (B, D), labels y (B,), energies (B,), at least float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, ContinuousBernoulli, Distribution
from torch.distributions import Independent, MixtureSameFamily, Normal, kl_divergence

CONVS = ((3, 1), (4, 2), (4, 2), (4, 2))  # (size, stride) of Tables 5 to 8, padding 1 throughout
# (width, size, stride, padding) of upconvolutions by the image's side; None is its channels.
# Table 7b as printed ends at 31x31x1: here its third kernel is 4x4 and its last stride 1.
DECODER = {28: ((32, 4, 2, 1), (64, 4, 2, 1), (64, 4, 2, 0), (None, 3, 1, 0)),
           32: ((32, 4, 2, 1), (64, 4, 2, 1), (64, 4, 2, 1), (None, 3, 1, 1))}
GENERATOR = {28: ((64, 4, 1, 1), (64, 4, 2, 1), (32, 3, 2, 1), (32, 4, 2, 1), (None, 4, 2, 1)),
             32: ((512, 4, 2, 1), (256, 4, 2, 1), (128, 4, 2, 1), (64, 4, 2, 1), (None, 4, 2, 1))}


def convolutions(image_shape, channels, activation, normalise=False) -> tuple[nn.Sequential, int]:
    """The trunk of Tables 5 to 8: (B, C, H, W) -> (B, features), and the number of features.

    28x28 -> 28, 14, 7, 3 and 32x32 -> 32, 16, 8, 4 pixels a side.
    """
    layers, (previous, height, width) = [], image_shape
    for out, (size, stride) in zip(channels, CONVS, strict=True):
        layers.append(nn.Conv2d(previous, out, size, stride, padding=1))
        layers += [nn.BatchNorm2d(out)] * normalise + [activation()]
        height, width = ((side + 2 - size) // stride + 1 for side in (height, width))
        previous = out
    return nn.Sequential(*layers, nn.Flatten()), previous * height * width


def upconvolutions(image_shape, inputs: int, table, last, normalise=False) -> nn.Sequential:
    """The upward half of Tables 7 and 8: (B, inputs, h, h) -> (B, C, H, W), then `last`."""
    layers = []
    for out, size, stride, padding in table[image_shape[1]]:
        width = out or image_shape[0]
        layers.append(nn.ConvTranspose2d(inputs, width, size, stride, padding))
        layers += [nn.BatchNorm2d(width)] * (normalise and out is not None)
        layers += [nn.ReLU()] * (out is not None)
        inputs = width
    return nn.Sequential(*layers, last)


def linears(*sizes: int, activation=nn.SiLU) -> nn.Sequential:
    """Fully connected layers with an activation between, none after the last."""
    layers = []
    for a, b in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def in_float32(head: nn.Module, features: Tensor) -> Tensor:
    """`head` outside autocast: convolutions may run in bfloat16, what energies are made of not."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.to(torch.promote_types(features.dtype, torch.float32)))


class StatisticsNetwork(nn.Module):
    """t_theta(x) of Table 5: (B, C, H, W) -> (B, 2, D), with t_2 <= 0 so that posteriors exist.

    `head` is one hidden layer for both statistics ("shared", the table) or one each ("separate").
    `t2` is -h^2 or -softplus(h) of the network's raw output h.
    """

    def __init__(self, config, image_shape):
        super().__init__()
        self.trunk, features = convolutions(image_shape, config.channels, nn.SiLU)
        outputs = {"shared": [2 * config.latent], "separate": [config.latent] * 2}[config.head]
        self.heads = nn.ModuleList(linears(features, config.hidden, out) for out in outputs)
        self.negative = {"square": lambda h: -h * h, "softplus": lambda h: -F.softplus(h)}[config.t2]

    def forward(self, x: Tensor) -> tuple[Tensor, float]:
        features = self.trunk(x)
        raw = torch.cat([in_float32(head, features) for head in self.heads], dim=1)
        t1, h = raw.chunk(2, dim=1)
        return torch.stack([t1, self.negative(h)], dim=1), 0.0  # (B, 2, D)


class LinearStatistics(nn.Module):
    """Eq. 33: t(x) = [t_x(x)^T theta_xz, <theta_x, t_x(x)>] -> (B, 1, D) and (B,).

    Bernoulli x, as t_x(v) = v of v = (x + 1) / 2, or Gaussian x of fixed variance s^2 around
    s^2 theta, as t_x(x) = (x, x^2) with -1 / (2 s^2) before the square.
    """

    def __init__(self, config, image_shape):
        super().__init__()
        self.image_shape, self.binary = image_shape, config.visible == "bernoulli"
        self.variance = config.visible_std**2
        dim = math.prod(image_shape)
        self.theta_xz = nn.Parameter(0.01 * torch.randn(dim, config.latent))
        self.theta_x = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            x = (x + 1).flatten(1) / 2 if self.binary else x.flatten(1)
            rest = x @ self.theta_x
            if not self.binary:
                rest = rest - (x * x).sum(1) / (2 * self.variance)
            return (x @ self.theta_xz)[:, None], rest

    def sample(self, z: Tensor, generator=None) -> Tensor:
        """x ~ p(x | z) of Eq. 31: (B, D) -> (B, C, H, W)."""
        natural = self.theta_x + z @ self.theta_xz.T
        if self.binary:
            x = torch.bernoulli(natural.sigmoid(), generator=generator) * 2 - 1
        else:
            noise = torch.empty_like(natural).normal_(generator=generator)
            x = self.variance * natural + self.variance**0.5 * noise
        return x.view(-1, *self.image_shape)


class GaussianFamily(nn.Module):
    """p_lam(z), a mixture of K diagonal Gaussians, and its posteriors; K = 1 fixed is N(0, I).

    eta(z) = (z, z^2), A(lam) = sum -lam_1^2 / (4 lam_2) - log(-2 lam_2) / 2, lam_2 < 0, short of
    log(2 pi) D / 2, which cancels in every difference. `pick` is what a mixture's mean is: of the whole, or of the likeliest component.
    """

    def __init__(self, config):
        super().__init__()
        shape, self.pick = (config.components, config.latent), config.represent
        if config.components == 1:
            self.register_buffer("mean", torch.zeros(shape))
            self.register_buffer("log_std", torch.zeros(shape))
        else:
            low, high = config.prior_std
            self.mean = nn.Parameter(config.prior_mean_std * torch.randn(shape))
            self.log_std = nn.Parameter((low + (high - low) * torch.rand(shape)).log())

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        """Sufficient statistics: (..., D) -> (..., 2, D)."""
        return torch.stack([z, z * z], dim=-2)

    @staticmethod
    def log_partition(lam: Tensor) -> Tensor:
        """A(lam): (..., 2, D) -> (...)."""
        lam1, lam2 = lam.unbind(-2)
        return (-lam1 * lam1 / (4 * lam2) - 0.5 * torch.log(-2 * lam2)).sum(-1)

    def lam(self) -> Tensor:
        """Natural parameters of the components (K, 2, D)."""
        precision = torch.exp(-2 * self.log_std)
        return torch.stack([self.mean * precision, -0.5 * precision], dim=1)

    def log_joint(self, t: Tensor) -> Tensor:
        """log pi_k + A(lam_k + t) - A(lam_k), for pi_k = 1 / K: (B, 2, D) -> (B, K)."""
        lam = self.lam()
        evidence = self.log_partition(lam + t[:, None]) - self.log_partition(lam)
        return evidence - math.log(len(lam))

    def log_evidence(self, t: Tensor) -> Tensor:
        """log of the integral of exp(<t, eta(z)> - E_lam(z)) over z: (B, 2, D) -> (B,)."""
        return self.log_joint(t).logsumexp(1)

    def prior(self) -> Distribution:
        """p_lam(z): batch (), event (D,)."""
        return self._mixture(torch.zeros_like(self.mean[:, 0]), self.mean, self.log_std.exp())

    def prior_energy(self, z: Tensor) -> Tensor:
        """E_lam(z) = -log p_lam(z): (B, D) -> (B,)."""
        return -self.prior().log_prob(z)

    def posterior(self, t: Tensor) -> Distribution:
        """The member, or mixture of members, of parameters lam_k + t: batch (B,), event (D,)."""
        lam1, lam2 = (self.lam() + t[:, None]).unbind(-2)  # (B, K, D)
        return self._mixture(self.log_joint(t), -lam1 / (2 * lam2), (-2 * lam2).rsqrt())

    @staticmethod
    def _mixture(logits: Tensor, mean: Tensor, std: Tensor):
        if mean.shape[-2] == 1:
            return Independent(Normal(mean.squeeze(-2), std.squeeze(-2)), 1)
        return MixtureSameFamily(Categorical(logits=logits), Independent(Normal(mean, std), 1))

    def mean_of(self, t: Tensor) -> Tensor:
        """The posterior's mean, or that of its likeliest component: (B, 2, D) -> (B, D)."""
        posterior = self.posterior(t)
        if self.pick == "mixture" or len(self.mean) == 1:
            return posterior.mean
        best = self.log_joint(t).argmax(1)
        return posterior.component_distribution.mean[torch.arange(len(t)), best]

    def sample(self, count: int) -> Tensor:
        """z ~ p_lam (count, D), differentiable in means and deviations."""
        component = torch.randint(len(self.mean), (count,), device=self.mean.device)
        mean, std = self.mean[component], self.log_std[component].exp()
        return mean + std * torch.randn_like(mean)


class BernoulliFamily(nn.Module):
    """Binary z: eta(z) = z, A(lam) = sum softplus(lam), E_lam(z) = -<lam, z> as in Eq. 29 and 33."""

    def __init__(self, config):
        super().__init__()
        self.theta_z = nn.Parameter(torch.zeros(1, config.latent))

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        """Sufficient statistics: (..., D) -> (..., 1, D)."""
        return z[..., None, :]

    def log_evidence(self, t: Tensor) -> Tensor:
        """A(lam + t), the sum over all z of exp(<t + lam, z>): (B, 1, D) -> (B,)."""
        return F.softplus(self.theta_z + t).sum((-1, -2))

    def prior_energy(self, z: Tensor) -> Tensor:
        """E_lam(z): (B, D) -> (B,)."""
        return -(self.theta_z[0] * z).sum(-1)

    def posterior(self, t: Tensor) -> Independent:
        """p(z | x) of Eq. 32: batch (B,), event (D,)."""
        return Independent(Bernoulli(logits=(self.theta_z + t)[..., 0, :]), 1)

    def mean_of(self, t: Tensor) -> Tensor:
        """Probabilities: (B, 1, D) -> (B, D)."""
        return self.posterior(t).mean


def contrastive(energy, x: Tensor, chains: Tensor, config) -> tuple[Tensor, dict[str, Tensor]]:
    """Persistent contrastive divergence, L2 on the energies (supplement C): scalar, metrics."""
    data, fake = energy(torch.cat([x, chains])).split([len(x), len(chains)])
    magnitude = (data * data).mean()
    if config.l2_on == "both":
        magnitude = magnitude + (fake * fake).mean()
    gap = data.mean() - fake.mean()
    metrics = {"energy_data": data.mean(), "energy_chains": fake.mean(), "gap": gap}
    return gap + config.l2 * magnitude, {name: m.detach() for name, m in metrics.items()}


class Conjugate(nn.Module):
    """E(x, z) = -<t(x), eta(z)> + E_lam(z) (Eq. 17): CEBM, GMM-CEBM and, with linear t, RBM, EFH."""

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config, linear = config, config.name in ("rbm", "efh")
        self.chain = "gibbs" if linear else "langevin"
        self.t = (LinearStatistics if linear else StatisticsNetwork)(config, image_shape)
        self.family = (BernoulliFamily if linear else GaussianFamily)(config)

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z) of Eq. 17 for pairs: (B, C, H, W), (B, D) -> (B,), B broadcast.

        Its x-gradient is that of -log p(x | z), supplement Eq. 41. A mixture's y is summed out.
        """
        t, rest = self.t(x)
        return self.family.prior_energy(z) - (t * self.family.eta(z)).sum((-1, -2)) - rest

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = A(lam) - A(lam + t(x)), z integrated out exactly: (B, C, H, W) -> (B,)."""
        t, rest = self.t(x)
        return -self.family.log_evidence(t) - rest

    def posterior(self, x: Tensor) -> Distribution:
        """p(z | x), of natural parameters lam + t(x): batch (B,), event (D,)."""
        return self.family.posterior(self.t(x)[0])

    def represent(self, x: Tensor) -> Tensor:
        """The posterior mean, the paper's latent: (B, C, H, W) -> (B, D)."""
        return self.family.mean_of(self.t(x)[0])

    def classes(self, x: Tensor) -> Tensor:
        """p(y | x) over the mixture's components: (B, C, H, W) -> (B, K)."""
        return self.family.log_joint(self.t(x)[0]).softmax(1)

    def gibbs(self, x: Tensor, generator=None) -> Tensor:
        """One sweep, z ~ p(z | x) (Eq. 32), then x ~ p(x | z) (Eq. 31); linear t alone."""
        z = torch.bernoulli(self.posterior(x).mean, generator=generator)
        return self.t.sample(z, generator)

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence -> scalar, metrics."""
        return contrastive(self.energy, x, chains, self.config)


class IGEBM(nn.Module):
    """E(x) = f(x), the network of Table 6."""

    chain, outputs = "langevin", 1

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config = config
        self.trunk, features = convolutions(image_shape, config.channels, nn.SiLU)
        self.features = nn.Sequential(linears(features, config.hidden, config.latent), nn.SiLU())
        self.head = nn.Linear(config.latent, self.outputs or num_classes)

    def represent(self, x: Tensor) -> Tensor:
        """The last hidden layer's activations: (B, C, H, W) -> (B, 128)."""
        return in_float32(self.features, self.trunk(x))

    def f(self, x: Tensor) -> Tensor:
        """The network's outputs: (B, C, H, W) -> (B, outputs)."""
        return in_float32(self.head, self.represent(x))

    def energy(self, x: Tensor) -> Tensor:
        """E(x): (B, C, H, W) -> (B,)."""
        return self.f(x)[:, 0]

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence -> scalar, metrics."""
        return contrastive(self.energy, x, chains, self.config)


class JEM(IGEBM):
    """E(x, y) = -f(x)[y], a classifier's logits read as energies (Table 4)."""

    outputs = None  # as many as classes

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = -logsumexp_y f(x)[y]: (B, C, H, W) -> (B,)."""
        return -self.f(x).logsumexp(1)

    def classify(self, x: Tensor) -> Tensor:
        """The likeliest label: (B, C, H, W) -> (B,)."""
        return self.f(x).argmax(1)

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of p(y | x) plus persistent contrastive divergence on E(x)."""
        loss, metrics = contrastive(self.energy, x, chains, self.config)
        logits = self.f(x)
        metrics["accuracy"] = (logits.argmax(1) == y).float().mean()
        return loss + F.cross_entropy(logits, y), metrics


class HDGE(JEM):
    """JEM's energy; p(x | y) by contrast with the batch's other images instead of chains."""

    chain = None

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy plus -log exp f(x_i)[y_i] / sum_j exp f(x_j)[y_i] over the batch."""
        logits = self.f(x)
        cross_entropy = F.cross_entropy(logits, y)
        contrast = F.cross_entropy(logits.T[y], torch.arange(len(y), device=y.device))
        accuracy = (logits.argmax(1) == y).float().mean()
        metrics = {"cross_entropy": cross_entropy, "contrast": contrast, "accuracy": accuracy}
        return cross_entropy + contrast, {name: m.detach() for name, m in metrics.items()}


class Encoder(nn.Module):
    """q(z | x) of Tables 7 and 8: images -> a diagonal Gaussian."""

    def __init__(self, config, image_shape, activation, normalise=False):
        super().__init__()
        self.trunk, features = convolutions(image_shape, config.channels, activation, normalise)
        self.head = linears(features, config.hidden, 2 * config.latent, activation=activation)

    def forward(self, x: Tensor) -> Independent:
        mean, log_variance = in_float32(self.head, self.trunk(x)).chunk(2, dim=1)
        return Independent(Normal(mean, (0.5 * log_variance).exp()), 1)


class VAE(nn.Module):
    """E(x, z) = -log p(x | z) - log p(z) (Table 4), the networks of Table 7; also GMM-VAE.

    The likelihood is on pixels of [0, 1]. `energy` is an upper bound of E(x): the negative ELBO.
    """

    chain = None

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.encoder = Encoder(config, image_shape, nn.ReLU)
        self.family, self.likelihood = GaussianFamily(config), config.likelihood
        side, width = image_shape[1] // 8, config.channels[-1]
        self.decoder = nn.Sequential(
            linears(config.latent, 128, side * side * width, activation=nn.ReLU), nn.ReLU(),
            nn.Unflatten(1, (width, side, side)),
            upconvolutions(image_shape, width, DECODER, nn.Identity()))

    def posterior(self, x: Tensor) -> Independent:
        """q(z | x), the encoder's approximation: batch (B,), event (D,)."""
        return self.encoder(x)

    def represent(self, x: Tensor) -> Tensor:
        """The mean of q(z | x): (B, C, H, W) -> (B, D)."""
        return self.encoder(x).mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z): (B, C, H, W), (B, D) -> (B,)."""
        logits = self.decoder(z).float().to(z.dtype)
        pixels = (x.to(z.dtype) + 1) / 2
        log_prob = -F.binary_cross_entropy_with_logits(logits, pixels, reduction="none")
        if self.likelihood == "continuous_bernoulli":
            log_prob = ContinuousBernoulli(logits=logits).log_prob(pixels.clamp(0, 1))
        return log_prob.flatten(1).sum(1)

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z): (B, C, H, W), (B, D) -> (B,)."""
        return self.family.prior_energy(z) - self.log_likelihood(x, z)

    def divergence(self, posterior: Independent, z: Tensor) -> Tensor:
        """KL(q(z | x) || p(z)): closed for one component, else by the sample z: -> (B,)."""
        prior = self.family.prior()
        if len(self.family.mean) == 1:
            return kl_divergence(posterior, prior.expand(z.shape[:1]))
        return posterior.log_prob(z) - prior.log_prob(z)

    def energy(self, x: Tensor) -> Tensor:
        """-ELBO(x) with one sample of z: (B, C, H, W) -> (B,)."""
        posterior = self.encoder(x)
        z = posterior.rsample()
        return self.divergence(posterior, z) - self.log_likelihood(x, z)

    def decode(self, z: Tensor) -> Tensor:
        """Means of a Bernoulli p(x | z): (B, D) -> (B, C, H, W)."""
        return self.decoder(z).float().sigmoid() * 2 - 1

    def generate(self, count: int) -> Tensor:
        """`decode` of z from the prior: (count, C, H, W)."""
        return self.decode(self.family.sample(count))

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """-ELBO, the batch's mean."""
        posterior = self.encoder(x)
        z = posterior.rsample()
        divergence = self.divergence(posterior, z).mean()
        distortion = -self.log_likelihood(x, z).mean()
        metrics = {"distortion": distortion.detach(), "divergence": divergence.detach()}
        return distortion + divergence, metrics


class Discriminator(nn.Module):
    """Logit of "real" for images, or for pairs of image and latent (Table 8)."""

    def __init__(self, config, image_shape, pairs: bool):
        super().__init__()
        self.trunk, features = convolutions(image_shape, config.channels, nn.LeakyReLU, True)
        self.hidden = nn.Sequential(nn.Linear(features, 128), nn.LeakyReLU())
        self.head = nn.Linear(128, 1)
        if pairs:
            self.head = linears(128 + config.latent, 128, 1, activation=nn.LeakyReLU)

    def represent(self, x: Tensor) -> Tensor:
        return in_float32(self.hidden, self.trunk(x))

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        return in_float32(self.head, torch.cat([self.represent(x), *z], dim=1))[:, 0]


class GAN(nn.Module):
    """Generator and discriminator of Table 8; E(z) = -log p(z) - logit D(G(z)) (Che et al. 2020)."""

    chain, pairs = None, False

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.family = GaussianFamily(config)
        self.discriminator = Discriminator(config, image_shape, self.pairs)
        self.generator = nn.Sequential(
            nn.Unflatten(1, (config.latent, 1, 1)),
            upconvolutions(image_shape, config.latent, GENERATOR, nn.Tanh(), normalise=True))

    def represent(self, x: Tensor) -> Tensor:
        """The discriminator's last hidden layer: (B, C, H, W) -> (B, 128)."""
        return self.discriminator.represent(x)

    def latent_energy(self, z: Tensor) -> Tensor:
        """E(z) = -log p(z) - logit D(G(z)): (B, D) -> (B,)."""
        return self.family.prior_energy(z) - self.discriminator(self.decode(z))

    def decode(self, z: Tensor) -> Tensor:
        """G(z): (B, D) -> (B, C, H, W)."""
        return self.generator(z).float()

    def generate(self, count: int) -> Tensor:
        """G(z), z from the prior: (count, C, H, W)."""
        return self.decode(self.family.sample(count))

    def play(self, real: tuple, fake: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' losses, each with gradients for its own parameters alone.

        The discriminator sees detached pairs; the others see a discriminator of detached weights.
        """
        d = self.discriminator
        frozen = {k: v.detach() for k, v in d.state_dict(keep_vars=True).items()}
        on_real = d(*(v.detach() for v in real))
        on_fake = d(*(v.detach() for v in fake))
        judge = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        maker = F.softplus(-torch.func.functional_call(d, frozen, fake)).mean()
        if self.pairs:  # the encoder plays on the real pairs
            maker = maker + F.softplus(torch.func.functional_call(d, frozen, real)).mean()
        accuracy = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        metrics = {"discriminator": judge, "generator": maker, "accuracy": accuracy}
        return judge + maker, {name: m.detach() for name, m in metrics.items()}

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The non-saturating game's two losses, added."""
        return self.play((x,), (self.generate(len(x)),))


class BiGAN(GAN):
    """D tells (x, E(x)) from (G(z), z) (Table 8); also GMM-BiGAN."""

    pairs = True

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__(config, image_shape, num_classes)
        self.encoder = Encoder(config, image_shape, nn.LeakyReLU, normalise=True)

    def posterior(self, x: Tensor) -> Independent:
        """The encoder's q(z | x): batch (B,), event (D,)."""
        return self.encoder(x)

    def represent(self, x: Tensor) -> Tensor:
        """The mean of q(z | x): (B, C, H, W) -> (B, D)."""
        return self.encoder(x).mean

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The non-saturating game's two losses on pairs, added."""
        z = self.family.sample(len(x))
        return self.play((x, self.encoder(x).rsample()), (self.decode(z), z))


MODELS = {"cebm": Conjugate, "gmm-cebm": Conjugate, "igebm": IGEBM, "vae": VAE, "gmm-vae": VAE,
          "bigan": BiGAN, "gmm-bigan": BiGAN, "gan": GAN, "jem": JEM, "hdge": HDGE,
          "rbm": Conjugate, "efh": Conjugate}


def build(config, image_shape, num_classes: int) -> nn.Module:
    """The model that `config` (the `model` section) names, for images of shape (C, H, W)."""
    return MODELS[config.name](config, image_shape, num_classes)
