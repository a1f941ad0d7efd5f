"""Every model of the supplement's Table 4, on the networks of its Tables 5 to 8.

p(x) is proportional to exp(-E(x)): low energy is likely, chains descend E. Natural parameters `lam`
and statistics `t` are tensors (..., S, D), S statistics for each of D latent dimensions: a
posterior's parameters are `lam + t(x)`. Images x (B, C, H, W) in [-1, 1], latents z (B, D), labels
y (B,), energies (B,), at least float32. A `loss` is a scalar and its parts for the log; `chain`
says how its `chains` move, None that it has none."""

import math
from itertools import pairwise, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as td

AMX = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
CONVS = ((3, 1), (4, 2), (4, 2), (4, 2))  # (size, stride) of Tables 5 to 8, padding 1 throughout
# Upconvolutions (width, size, stride, padding) by the image's side; width None: its channels.
# Table 7b as printed ends at 31x31x1: here its third kernel is 4x4, its last stride 1, C channels.
DECODER = {
    28: ((32, 4, 2, 1), (64, 4, 2, 1), (64, 4, 2, 0), (None, 3, 1, 0)),
    32: ((32, 4, 2, 1), (64, 4, 2, 1), (64, 4, 2, 1), (None, 3, 1, 1)),
}
GENERATOR = {
    28: ((64, 4, 1, 1), (64, 4, 2, 1), (32, 3, 2, 1), (32, 4, 2, 1), (None, 4, 2, 1)),
    32: ((512, 4, 2, 1), (256, 4, 2, 1), (128, 4, 2, 1), (64, 4, 2, 1), (None, 4, 2, 1)),
}


def upconvolutions(image_shape, inputs: int, table, normalise=False) -> nn.Sequential:
    """The upward half of Tables 7 and 8: (B, inputs, h, h) -> (B, C, H, W), raw."""
    layers = []
    for out, size, stride, padding in table[image_shape[1]]:
        layers.append(nn.ConvTranspose2d(inputs, out or image_shape[0], size, stride, padding))
        if out:
            layers += [BatchNorm(out)] * normalise + [nn.ReLU()]
        inputs = out
    return nn.Sequential(*layers)


def linears(*sizes: int, activation=nn.SiLU) -> nn.Sequential:
    """Fully connected layers with an activation between, none after the last."""
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), activation())]
    return nn.Sequential(*layers[:-1])


def in_float32(head: nn.Module, features: Tensor) -> Tensor:
    """`head` outside autocast: convolutions may run in bfloat16, energies at most in TF32."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.to(torch.promote_types(features.dtype, torch.float32)))


def normal(mean: Tensor, std: Tensor) -> td.Independent:
    """A diagonal Gaussian, event (D,). Not validated: a NaN is for the training loop to see."""
    return td.Independent(td.Normal(mean, std, validate_args=False), 1)


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm2d` of (B, C, H, W) over rows of pixels: second derivatives are faster so."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return super().forward(rows.flatten(0, 2)).view(rows.shape).permute(0, 3, 1, 2)


class PixelGradient(torch.autograd.Function):
    """A 3x3 convolution whose gradient is by pixels alone: on a Zen 4 oneDNN's takes longer."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (weight,), pixels = ctx.saved_tensors, gradient.permute(0, 2, 3, 1).flatten(1, 2)
        patches = (pixels @ weight.flatten(1).to(gradient.dtype)).mT.to(weight.dtype)
        return F.fold(patches, gradient.shape[2:], 3, padding=1), None, None


class Network(nn.Module):
    """Convolutions of Tables 5 to 8, then fully connected `heads` side by side, in float32.
    28x28 -> 28, 14, 7, 3 and 32x32 -> 32, 16, 8, 4 pixels a side. A head: its layers' widths."""

    def __init__(self, config, image_shape, heads, activation, normalise=False):
        super().__init__()
        layers, (previous, height, width) = [], image_shape
        for out, (size, stride) in zip(config.channels, CONVS, strict=True):
            layers.append(nn.Conv2d(previous, out, size, stride, padding=1))
            layers += [BatchNorm(out)] * normalise + [activation()]
            height, width = ((side + 2 - size) // stride + 1 for side in (height, width))
            previous = out
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        sizes = [(previous * height * width, *head) for head in heads]
        self.heads = nn.ModuleList(linears(*s, activation=activation) for s in sizes)

    def first(self, x: Tensor) -> Tensor:
        """`trunk[0]`; compiled a product with 3x3 patches, after which a GPU has channels last."""
        weight, bias, (h, w) = self.trunk[0].weight, self.trunk[0].bias, x.shape[2:]
        if not torch.compiler.is_compiling():
            chain = x.device.type == "cpu" and not (weight.requires_grad or AMX)
            return PixelGradient.apply(x, weight, bias) if chain else self.trunk[0](x)
        x, fill = F.pad(x, (1, 1, 1, 1)), (0, -weight[0].numel() % 16)
        x = torch.stack([x[:, :, i : i + h, j : j + w] for i, j in product(range(3), range(3))], -1)
        x = F.pad(x.permute(0, 2, 3, 1, 4).flatten(3), fill)  # (B, h, w, 9 C)
        return F.linear(x, F.pad(weight.flatten(1), fill), bias).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs)."""
        features = self.trunk[1:](self.first(x))
        return torch.cat([in_float32(head, features) for head in self.heads], dim=1)


class Gaussian:
    """eta(z) = (z, z^2), A(lam) = sum_d -lam_1^2 / (4 lam_2) - log(-2 lam_2) / 2, lam_2 < 0.
    Mean -lam_1 / (2 lam_2), variance -1 / (2 lam_2). Shapes (..., D) of z, (..., 2, D) of eta, lam.
    A is short of log(2 pi) / 2 a dimension, which cancels in every difference."""

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        return torch.stack([z, z * z], dim=-2)

    @staticmethod
    def log_partition(lam: Tensor) -> Tensor:
        lam1, lam2 = lam.unbind(-2)
        return (-lam1 * lam1 / (4 * lam2) - 0.5 * torch.log(-2 * lam2)).sum(-1)

    @staticmethod
    def member(lam: Tensor) -> td.Independent:
        lam1, lam2 = lam.unbind(-2)
        return normal(-lam1 / (2 * lam2), (-2 * lam2).rsqrt())


class Bernoulli:
    """eta(z) = z, A(lam) = sum_d softplus(lam), S = 1; E_lam(z) = -<lam, z> as in Eq. 29 and 33."""

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        return z[..., None, :]

    @staticmethod
    def log_partition(lam: Tensor) -> Tensor:
        return F.softplus(lam).sum((-1, -2))

    @staticmethod
    def member(lam: Tensor) -> td.Independent:
        return td.Independent(td.Bernoulli(logits=lam[..., 0, :], validate_args=False), 1)


class Prior(nn.Module):
    """p_lam(z), a mixture of K members of a family, and its posteriors given statistics t(x).
    K = 1: E_lam(z) = -<lam, eta(z)> + A(lam) of N(0, I), or of a learned Bernoulli. K > 1 Gaussians
    are learned; y is uniform over them and summed out."""

    def __init__(self, config, family=Gaussian):
        super().__init__()
        self.family, size = family, (config.components, config.latent)
        if family is Bernoulli:
            self.theta_z = nn.Parameter(torch.zeros(1, 1, config.latent))
        elif config.components == 1:
            self.register_buffer("location", torch.zeros(size))
            self.register_buffer("log_std", torch.zeros(size))
        else:
            self.location = nn.Parameter(config.prior_mean_std * torch.randn(size))
            self.log_std = nn.Parameter(torch.empty(size).uniform_(*sorted(config.prior_std)).log())

    def lam(self) -> Tensor:
        """Natural parameters (K, S, D)."""
        if self.family is Bernoulli:
            return self.theta_z
        precision = torch.exp(-2 * self.log_std)
        return torch.stack([self.location * precision, -0.5 * precision], dim=1)

    def energy(self, z: Tensor) -> Tensor:
        """E_lam(z), -log p_lam(z) of Gaussians: (B, D) -> (B,)."""
        if self.family is Bernoulli:
            return -(self.theta_z * Bernoulli.eta(z)).sum((-1, -2))
        members = self.family.member(self.lam())  # batch (K,)
        return math.log(len(self.location)) - members.log_prob(z[:, None]).logsumexp(1)

    def log_joint(self, t: Tensor) -> Tensor:
        """log p(x, y = k) + const: log pi_k + A(lam_k + t) - A(lam_k), (B, S, D) -> (B, K)."""
        lam = self.lam()
        constant = self.family.log_partition(lam) if self.family is Gaussian else 0.0
        return self.family.log_partition(lam + t[:, None]) - constant - math.log(len(lam))

    def posterior(self, t: Tensor) -> td.Distribution:
        """The member, or mixture of members, of parameters lam_k + t: batch (B,), event (D,)."""
        members = self.lam() + t[:, None]  # (B, K, S, D)
        if members.shape[1] == 1:
            return self.family.member(members[:, 0])
        y = td.Categorical(logits=self.log_joint(t), validate_args=False)
        return td.MixtureSameFamily(y, self.family.member(members), validate_args=False)

    def mean(self, t: Tensor, likeliest: bool) -> Tensor:
        """The posterior's mean, or that of its likeliest component: (B, S, D) -> (B, D)."""
        joint = self.log_joint(t)  # (B, K)
        share = F.one_hot(joint.argmax(1), joint.shape[1]) if likeliest else joint.softmax(1)
        return (share[..., None] * self.family.member(self.lam() + t[:, None]).mean).sum(1)

    def sample(self, count: int) -> Tensor:
        """z ~ p_lam of Gaussians (count, D), differentiable in locations and deviations."""
        y = torch.randint(len(self.location), (count,), device=self.location.device)
        return normal(self.location[y], self.log_std[y].exp()).rsample()


class LinearStatistics(nn.Module):
    """Eq. 33: t(x) = [t_x(x)^T theta_xz, <theta_x, t_x(x)>].
    Bernoulli x: t_x = v = (x + 1) / 2, grey pixels as chances. Gaussian x: t_x = (x, x^2), where
    theta_xz = 0 and theta_x = -1 / (2 s^2) are fixed for the square."""

    def __init__(self, config, image_shape):
        super().__init__()
        self.image_shape, self.binary = image_shape, config.name == "rbm"
        self.variance, dim = config.visible_std**2, math.prod(image_shape)
        self.theta_xz = nn.Parameter(0.01 * torch.randn(dim, config.latent))
        self.theta_x = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> t (B, 1, D) and the term of x alone (B,)."""
        with torch.autocast(x.device.type, enabled=False):
            x = (x.flatten(1) + 1) / 2 if self.binary else x.flatten(1)
            square = 0.0 if self.binary else (x * x).sum(1) / (2 * self.variance)
            return (x @ self.theta_xz)[:, None], x @ self.theta_x - square

    def sample(self, z: Tensor, generator=None) -> Tensor:
        """x ~ p(x | z) of Eq. 31: (B, D) -> (B, C, H, W)."""
        natural = self.theta_x + z @ self.theta_xz.T
        if self.binary:
            x = torch.bernoulli(natural.sigmoid(), generator=generator) * 2 - 1
        else:
            x = torch.normal(self.variance * natural, self.variance**0.5, generator=generator)
        return x.view(-1, *self.image_shape)


def contrastive(data: Tensor, chains: Tensor, config) -> tuple[Tensor, dict[str, Tensor]]:
    """Persistent contrastive divergence of energies (B,), L2 on them (supplement C)."""
    magnitude = (data * data).mean() + ((chains * chains).mean() if config.l2_on == "both" else 0)
    gap = data.mean() - chains.mean()
    metrics = {"energy_data": data.mean(), "energy_chains": chains.mean(), "gap": gap}
    return gap + config.l2 * magnitude, metrics


class Conjugate(nn.Module):
    """E(x, z) = -<t(x), eta(z)> + E_lam(z) (Eq. 17): CEBM, GMM-CEBM; with linear t, RBM, EFH.
    `head`: one hidden layer for both statistics ("shared", Table 5) or one each ("separate")."""

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config, self.chain, family = config, "langevin", Gaussian
        if config.name in ("rbm", "efh"):
            self.chain, family = "gibbs", Bernoulli
            self.network = LinearStatistics(config, image_shape)
        else:
            outputs = [2 * config.latent] if config.head == "shared" else [config.latent] * 2
            heads = [(config.hidden, out) for out in outputs]
            self.network = Network(config, image_shape, heads, nn.SiLU)
        self.prior = Prior(config, family)

    def t(self, x: Tensor) -> tuple[Tensor, Tensor | float]:
        """Statistics (B, C, H, W) -> (B, S, D), and a term of x alone (B,) (Eq. 33) or 0. t_2 <= 0,
        so that posteriors exist: -h^2 or -softplus(h) of the network's raw output h."""
        if self.chain == "gibbs":
            return self.network(x)
        t1, h = self.network(x).chunk(2, dim=1)
        return torch.stack([t1, -h * h if self.config.t2 == "square" else -F.softplus(h)], 1), 0.0

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z): (B, C, H, W), (B, D) -> (B,), B broadcast; its x-gradient is Eq. 41's."""
        t, alone = self.t(x)
        return self.prior.energy(z) - (t * self.prior.family.eta(z)).sum((-1, -2)) - alone

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = -log sum_k pi_k exp(A(lam_k + t(x)) - A(lam_k)), exact: (B, C, H, W) -> (B,)."""
        t, alone = self.t(x)
        return -(a.logsumexp(1) if (a := self.prior.log_joint(t)).shape[1] > 1 else a[:, 0]) - alone

    def posterior(self, x: Tensor) -> td.Distribution:
        """p(z | x), of natural parameters lam + t(x): batch (B,), event (D,)."""
        return self.prior.posterior(self.t(x)[0])

    def represent(self, x: Tensor) -> Tensor:
        """The posterior mean, or that of its likeliest component: (B, C, H, W) -> (B, D)."""
        return self.prior.mean(self.t(x)[0], self.config.represent == "component")

    @torch.no_grad()
    def gibbs(self, sweeps: int, generator, x: Tensor) -> Tensor:
        """`sweeps` times z ~ p(z | x) (Eq. 32), then x ~ p(x | z) (Eq. 31); linear t alone."""
        for _ in range(sweeps):
            z = torch.bernoulli(self.represent(x), generator=generator)
            x = self.network.sample(z, generator)
        return x

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence of as many chains as images: scalar, metrics."""
        return contrastive(*self.energy(torch.cat([x, chains])).split(len(x)), self.config)


class EnergyNetwork(nn.Module):
    """E(x, y) = -f(x)[y], E(x) = -logsumexp_y f(x)[y] (Tables 4, 6): JEM, HDGE; IGEBM as -f."""

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config, self.chain = config, None if config.name == "hdge" else "langevin"
        network = Network(config, image_shape, [(config.hidden, config.latent)], nn.SiLU)
        self.features = nn.Sequential(network, nn.SiLU())
        self.head = nn.Linear(config.latent, 1 if config.name == "igebm" else num_classes)

    def represent(self, x: Tensor) -> Tensor:
        """The last hidden layer of Table 6 before its Swish, as in the authors' code: -> (B, D)."""
        return self.features[0](x)

    def f(self, x: Tensor) -> Tensor:
        """The network's outputs, a classifier's logits: (B, C, H, W) -> (B, 1 or classes)."""
        return in_float32(self.head, self.features(x))

    def energy(self, x: Tensor) -> Tensor:
        """E(x): (B, C, H, W) -> (B,)."""
        return -self.f(x).logsumexp(1)

    def loss(self, x: Tensor, y: Tensor, chains: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Contrastive divergence on E(x); of classifiers + the cross-entropy of p(y | x). HDGE,
        without chains: -log(exp f(x_i)[y_i] / sum_j exp f(x_j)[y_i]), j over the batch."""
        logits = self.f(x if chains is None else torch.cat([x, chains]))
        if chains is None:
            loss = F.cross_entropy(logits.T[y], torch.arange(len(y), device=y.device))
            metrics = {"contrast": loss}
        else:
            loss, metrics = contrastive(*(-logits.logsumexp(1)).split(len(x)), self.config)
        if self.config.name == "igebm":
            return loss, metrics
        metrics["accuracy"] = ((own := logits[: len(x)]).argmax(1) == y).float().mean()
        return F.cross_entropy(own, y) + loss, metrics


class VAE(nn.Module):
    """E(x, z) = -log p(x | z) - log p(z) (Table 4), networks of Table 7, pixels in [0, 1] there."""

    chain = None

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config, self.prior, self.standardise = config, Prior(config), nn.Identity()
        self.encoder = Network(config, image_shape, [(config.hidden, 2 * config.latent)], nn.ReLU)
        side, width = image_shape[1] // 8, config.channels[-1]
        self.decoder = nn.Sequential(
            linears(config.latent, 128, side * side * width, activation=nn.ReLU),
            nn.ReLU(),
            nn.Unflatten(1, (width, side, side)),
            upconvolutions(image_shape, width, DECODER),
        )

    def posterior(self, x: Tensor) -> td.Independent:
        """q(z | x), the encoder's diagonal Gaussian: batch (B,), event (D,)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return normal(self.standardise(mean), (0.5 * log_variance).exp())

    def represent(self, x: Tensor) -> Tensor:
        """The mean of q(z | x): (B, C, H, W) -> (B, D)."""
        return self.posterior(x).mean

    def log_likelihood(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z): (B, C, H, W), (B, D) -> (B,)."""
        family = {"bernoulli": td.Bernoulli, "continuous_bernoulli": td.ContinuousBernoulli}
        p = family[self.config.likelihood](logits=self.decoder(z).float(), validate_args=False)
        return p.log_prob((x + 1) / 2).flatten(1).sum(1)

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z): (B, C, H, W), (B, D) -> (B,)."""
        return self.prior.energy(z) - self.log_likelihood(x, z)

    def divergence(self, q: td.Independent, z: Tensor) -> Tensor:
        """KL(q(z | x) || p(z)): closed for N(0, I), else by the sample z of q: -> (B,)."""
        if self.config.components == 1:
            return td.kl_divergence(q, normal(torch.zeros_like(z), torch.ones_like(z)))
        return q.log_prob(z) + self.prior.energy(z)

    def _bound(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (q := self.posterior(x)).rsample()
        return self.divergence(q, z), -self.log_likelihood(x, z)

    def energy(self, x: Tensor) -> Tensor:
        """-ELBO(x) by one sample of z, in expectation at least E(x): (B, C, H, W) -> (B,)."""
        return sum(self._bound(x))

    def decode(self, z: Tensor) -> Tensor:
        """sigmoid of the likelihood's parameters, in [-1, 1]: (B, D) -> (B, C, H, W)."""
        return self.decoder(z).float().sigmoid() * 2 - 1

    def generate(self, count: int) -> Tensor:
        """`decode` of z from the prior: (count, C, H, W)."""
        return self.decode(self.prior.sample(count))

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """-ELBO, the batch's mean."""
        divergence, distortion = (part.mean() for part in self._bound(x))
        return distortion + divergence, {"distortion": distortion, "divergence": divergence}


class Discriminator(nn.Module):
    """Logit of "real" for images, or for pairs of image and latent (Table 8)."""

    def __init__(self, config, image_shape, latent: int):
        super().__init__()
        network = Network(config, image_shape, [(128,)], nn.LeakyReLU, normalise=True)
        self.image = nn.Sequential(network, nn.LeakyReLU())
        self.hidden = nn.Sequential(nn.Linear(128 + latent, 128), nn.LeakyReLU())
        self.head = nn.Linear(128, 1)

    def represent(self, x: Tensor, *z: Tensor) -> Tensor:
        """The last hidden layer before LeakyReLU: (B, C, H, W), for pairs (B, D) -> (B, 128)."""
        return in_float32(self.hidden[0], torch.cat([self.image(x), *z], dim=1))

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        """(B, C, H, W), for pairs (B, D) -> (B,)."""
        return in_float32(self.head, self.hidden[1](self.represent(x, *z)))[:, 0]


class GAN(nn.Module):
    """Generator and discriminator of Table 8; E(z) = -log p(z) - logit D(G(z)) (Table 4)."""

    chain, generate = None, VAE.generate

    def __init__(self, config, image_shape, num_classes: int, pairs: bool = False):
        super().__init__()
        self.config, self.prior = config, Prior(config)
        self.discriminator = Discriminator(config, image_shape, config.latent * pairs)
        self.generator = nn.Sequential(
            nn.Unflatten(1, (config.latent, 1, 1)),
            upconvolutions(image_shape, config.latent, GENERATOR, normalise=True),
            nn.Tanh(),
        )

    def represent(self, x: Tensor) -> Tensor:
        """That of the discriminator, as in the authors' code: (B, C, H, W) -> (B, 128)."""
        return self.discriminator.represent(x)

    def latent_energy(self, z: Tensor) -> Tensor:
        """E(z) = -log p(z) - logit D(G(z)): (B, D) -> (B,)."""
        return self.prior.energy(z) - self.discriminator(self.decode(z))

    def decode(self, z: Tensor) -> Tensor:
        """G(z): (B, D) -> (B, C, H, W)."""
        return self.generator(z).float()

    def play(self, real: tuple, fake: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' losses, summed; each has gradients for its own parameters alone."""
        judge, weight = self.discriminator, self.config.gradient_penalty
        (x, *z), made = ([v.detach().requires_grad_(True) for v in side] for side in (real, fake))
        on_real, on_fake = judge(x.requires_grad_(weight > 0), *z), judge(*made)
        judging = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        making = F.softplus(-on_fake).mean() + (F.softplus(on_real).mean() if z else 0.0)
        slopes = torch.autograd.grad(making, (*z, *made), retain_graph=True)  # not D's own
        pull = sum((v * s).sum() for v, s in zip((*real[1:], *fake), slopes, strict=True))
        right = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        if weight:  # on D's slope in real images: R1 of Mescheder et al. (2018)
            (slope,) = torch.autograd.grad(on_real.sum(), x, create_graph=True)
            judging = judging + weight / 2 * slope.square().sum() / len(slope)
        making = making.detach() + pull - pull.detach()  # its value, with the gradients of `pull`
        return judging + making, {"discriminator": judging, "generator": making, "accuracy": right}

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The non-saturating game of G and D."""
        return self.play((x,), (self.generate(len(x)),))


class BiGAN(GAN):
    """BiGAN, GMM-BiGAN: D tells x, E(x) from G(z), z (Table 8), E's means standardised or not."""

    posterior, represent = VAE.posterior, VAE.represent

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__(config, image_shape, num_classes, pairs=True)
        head, norm = (config.hidden, 2 * config.latent), nn.BatchNorm1d(config.latent, affine=False)
        self.encoder = Network(config, image_shape, [head], nn.LeakyReLU, normalise=True)
        self.standardise = norm if config.standardise else nn.Identity()

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The non-saturating game of G and E against D."""
        z = self.prior.sample(len(x))
        return self.play((x, self.posterior(x).rsample()), (self.decode(z), z))


def build(config, image_shape, num_classes: int) -> nn.Module:
    """The model that `config` (the `model` section) names, for images of shape (C, H, W)."""
    kinds = {
        Conjugate: "cebm gmm-cebm rbm efh",
        EnergyNetwork: "igebm jem hdge",
        VAE: "vae gmm-vae",
        GAN: "gan",
        BiGAN: "bigan gmm-bigan",
    }
    kind = next(kind for kind, names in kinds.items() if config.name in names.split())
    return kind(config, image_shape, num_classes)
