"""Every model of the supplement's Table 4, on the networks of its Tables 5 to 8.

Sign convention: p(x) is proportional to exp(-E(x)), so low energy is likely and chains descend E.

Shapes: images x (B, C, H, W) in [-1, 1], latents z (B, D), labels y (B,), energies (B,). Natural
parameters `lam` and statistics `t` of an exponential family are tensors (..., S, D): S statistics
for each of D latent dimensions. The parameters of a posterior are `lam + t(x)`.

`config` is the section `model` of a configuration (`ModelConfig` in cebm.py says what each key
means). Energies and losses are at least float32, whatever the autocast.

Every model has `represent(x)`, its latents (B, D), and `loss(x, y, chains)`, a scalar to minimise
and the parts of it that the log shows, 0-d tensors; `chains` are images that no gradient goes
through, or None. `MODELS`, at the end, names all models and says what else each can do. A new model
is a class here, a line there and a section in configs.yaml.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise, product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch import distributions as td

# Layers

# (size, stride) of the convolutions of Tables 5 to 8, padding 1 throughout. `PixelGradient` and
# `patch_convolution` rely on the first.
CONVOLUTIONS = ((3, 1), (4, 2), (4, 2), (4, 2))

# Upconvolutions (width, size, stride, padding), keyed by the image's side; width None is the
# image's own number of channels. Tables 7a and 8 are as printed. Table 7b as printed ends at
# 31x31x1: here its third kernel is 4x4 and its last one has stride 1 and C channels.
DECODER = {
    28: ((32, 4, 2, 1), (64, 4, 2, 1), (64, 4, 2, 0), (None, 3, 1, 0)),
    32: ((32, 4, 2, 1), (64, 4, 2, 1), (64, 4, 2, 1), (None, 3, 1, 1)),
}
GENERATOR = {
    28: ((64, 4, 1, 1), (64, 4, 2, 1), (32, 3, 2, 1), (32, 4, 2, 1), (None, 4, 2, 1)),
    32: ((512, 4, 2, 1), (256, 4, 2, 1), (128, 4, 2, 1), (64, 4, 2, 1), (None, 4, 2, 1)),
}

# Whether this CPU has AMX, where oneDNN's gradient of a convolution is faster than `PixelGradient`.
AMX = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def linears(*sizes: int, activation=nn.SiLU) -> nn.Sequential:
    """Fully connected layers with an activation between, none after the last."""
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def upconvolutions(image_shape, inputs: int, table, normalise=False) -> nn.Sequential:
    """The upward half of Tables 7 and 8: (B, inputs, h, h) -> (B, C, H, W), raw."""
    layers = []
    for width, size, stride, padding in table[image_shape[1]]:
        outputs = width or image_shape[0]
        layers.append(nn.ConvTranspose2d(inputs, outputs, size, stride, padding))
        if width:
            layers += [BatchNorm(width)] * normalise + [nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


def in_float32(head: nn.Module, features: Tensor) -> Tensor:
    """`head` with autocast off: convolutions may run in bfloat16, these products stay float32 (TF32
    on a GPU where torch allows it)."""
    with torch.autocast(features.device.type, enabled=False):
        return head(features.to(torch.promote_types(features.dtype, torch.float32)))


def gradients(output: Tensor, inputs, **options) -> tuple[Tensor, ...]:
    """`torch.autograd.grad` with autocast off, which would round the gradients of `in_float32`."""
    with torch.autocast(output.device.type, enabled=False):
        return torch.autograd.grad(output, inputs, **options)


def normal(mean: Tensor, std: Tensor) -> td.Independent:
    """A diagonal Gaussian, event (D,). Not validated: a NaN is for the training loop to see."""
    return td.Independent(td.Normal(mean, std, validate_args=False), 1)


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm2d` of (B, C, H, W), computed over rows of pixels.

    Its second derivatives, which a gradient penalty needs, are faster so: an update of
    `bigan-mnist-r1` takes 595 ms, with BatchNorm2d 1,035 (a core of a Xeon, medians of ten).
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.permute(0, 2, 3, 1)
        return super().forward(rows.flatten(0, 2)).view(rows.shape).permute(0, 3, 1, 2)


class PixelGradient(torch.autograd.Function):
    """A 3x3 convolution with a gradient for its input only, which is all that a chain needs.

    As a matrix product this gradient is faster than oneDNN's on a CPU without AMX: a step of
    `cebm-fmnist` takes 51.9 ms for 57.8 in bfloat16 and 44.8 for 47.8 in float32 (two cores of a
    Xeon kept to AVX-512, medians of twenty); with AMX it takes 20.0 for 18.5 in bfloat16.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return F.conv2d(x, weight, bias, padding=1)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (weight,) = ctx.saved_tensors
        rows = gradient.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, outputs)
        patches = (rows @ weight.flatten(1).to(gradient.dtype)).mT.to(weight.dtype)
        return F.fold(patches, gradient.shape[2:], 3, padding=1), None, None


def patch_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The first 3x3 convolution as a product with patches, for a compiled energy on a GPU.

    (B, C, H, W) -> (B, outputs, H, W), channels last. Patches and product took 36 of the 192
    microseconds of a step of `cebm-fmnist` on an H100. How long cuDNN's convolution of one channel
    takes in their place was not kept: to be timed again.
    """
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    shifts = [padded[:, :, i : i + height, j : j + width] for i, j in product(range(3), range(3))]
    patches = torch.stack(shifts, -1).permute(0, 2, 3, 1, 4).flatten(3)  # (B, H, W, 9 C)
    fill = (0, -weight[0].numel() % 16)  # tensor cores take multiples of 16
    rows = F.linear(F.pad(patches, fill), F.pad(weight.flatten(1), fill), bias)
    return rows.permute(0, 3, 1, 2)


class LocalContrast(nn.Module):
    """Images less a blurred copy of themselves, then of mean 0 and standard deviation 1/2 each.

    (B, C, H, W) -> the same. The blur is a Gaussian of 3/16 of the image's side in each channel,
    over what lies in the image. So what follows does not see how bright an image is, its tint,
    slow changes of light nor its contrast, unless that is below about 0.05; in photos these have
    most of the variance. Not in the paper: subtractive and divisive normalisation (Jarrett et al.,
    2009), here with one deviation for the whole image.
    """

    def __init__(self, image_shape):
        super().__init__()
        for name, side in zip(("blur_rows", "blur_columns"), image_shape[1:], strict=True):
            place = torch.arange(side, dtype=torch.float32)
            weights = torch.exp(-(((place[:, None] - place) / (3 / 16 * side)) ** 2) / 2)
            weights /= weights.sum(1, keepdim=True)
            self.register_buffer(name, weights, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = x - self.blur_rows @ x @ self.blur_columns.T
            x = x - x.mean((1, 2, 3), keepdim=True)
            return 0.5 * x * (x.square().mean((1, 2, 3), keepdim=True) + 0.05**2).rsqrt()


class Network(nn.Module):
    """Convolutions of Tables 5 to 8, then fully connected heads side by side, in float32.

    With `config.contrast` "local" they see `LocalContrast` of the images.

    `heads` are tuples of the widths of a head's layers. Sides of 28 pixels become 28, 14, 7, 3 and
    sides of 32 become 32, 16, 8, 4.
    """

    def __init__(self, config, image_shape, heads, activation, normalise=False):
        super().__init__()
        self.contrast = LocalContrast(image_shape) if config.contrast == "local" else None
        layers, (inputs, height, width) = [], image_shape
        for outputs, (size, stride) in zip(config.channels, CONVOLUTIONS, strict=True):
            layers.append(nn.Conv2d(inputs, outputs, size, stride, padding=1))
            layers += [BatchNorm(outputs)] * normalise + [activation()]
            height, width = ((side + 2 - size) // stride + 1 for side in (height, width))
            inputs = outputs
        self.trunk = nn.Sequential(*layers, nn.Flatten())
        features = inputs * height * width
        self.heads = nn.ModuleList(
            linears(features, *head, activation=activation) for head in heads
        )

    def first_convolution(self, x: Tensor) -> Tensor:
        """`trunk[0]` of (B, C, H, W), in the form that is fastest where it runs."""
        convolution = self.trunk[0]
        if torch.compiler.is_compiling():
            return patch_convolution(x, convolution.weight, convolution.bias)
        frozen = not any(p.requires_grad for p in convolution.parameters())  # in a chain
        if frozen and x.device.type == "cpu" and not AMX:
            return PixelGradient.apply(x, convolution.weight, convolution.bias)
        return convolution(x)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, outputs of all heads)."""
        if self.contrast is not None:
            x = self.contrast(x).contiguous(memory_format=torch.channels_last)
        features = self.trunk[1:](self.first_convolution(x))
        return torch.cat([in_float32(head, features) for head in self.heads], dim=1)


# Conjugate families and priors
#
# The joint energy is E(x, z) = -<t(x), eta(z)> + E_lam(z), where E_lam is that of the prior. So the
# posterior p(z | x) is the family's member of natural parameters lam + t(x), and summing out z
# leaves E(x) = A(lam) - A(lam + t(x)). Of a mixture of K members with weights pi_k = 1 / K it is
# E(x) = -log sum_k pi_k exp(A(lam_k + t(x)) - A(lam_k)). Below, `lam1`, `lam2` are the statistics.


class Gaussian:
    """eta(z) = (z, z^2), A(lam) = sum_d -lam1^2 / (4 lam2) - log(-2 lam2) / 2, lam2 < 0.

    The mean is -lam1 / (2 lam2), the variance -1 / (2 lam2). z is (..., D); eta and lam are
    (..., 2, D). A leaves out log(2 pi) / 2 a dimension, which cancels in every difference.
    """

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        return torch.stack([z, z * z], dim=-2)

    @staticmethod
    def log_partition(lam: Tensor) -> Tensor:
        lam1, lam2 = lam.unbind(-2)
        return (-lam1 * lam1 / (4 * lam2) - 0.5 * torch.log(-2 * lam2)).sum(-1)

    @staticmethod
    def log_partition_change(lam: Tensor, t: Tensor) -> Tensor:
        """A(lam + t) - A(lam), without the difference of two large numbers.

        With precisions p = -2 lam2 and s = -2 t2 it is, summed over dimensions,
        (t1^2 / 2 + lam1 t1 - lam1^2 s / (2 p)) / (p + s) - log(1 + s / p) / 2. In float32 and 128
        dimensions the plain difference is off by up to 0.16 for components of standard deviation
        0.01, this form by 3e-5 (greatest of 1,000 random ones).
        """
        (lam1, lam2), (t1, t2) = lam.unbind(-2), t.unbind(-2)
        p, s = -2 * lam2, -2 * t2
        quadratic = (t1 * t1 / 2 + lam1 * t1 - lam1 * (lam1 / p) * s / 2) / (p + s)
        return (quadratic - 0.5 * torch.log1p(s / p)).sum(-1)

    @staticmethod
    def member(lam: Tensor) -> td.Independent:
        lam1, lam2 = lam.unbind(-2)
        return normal(-lam1 / (2 * lam2), (-2 * lam2).rsqrt())


class Bernoulli:
    """eta(z) = z, A(lam) = sum_d softplus(lam); z is (..., D), eta and lam are (..., 1, D)."""

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        return z[..., None, :]

    @staticmethod
    def log_partition(lam: Tensor) -> Tensor:
        return F.softplus(lam).sum((-1, -2))

    @staticmethod
    def member(lam: Tensor) -> td.Independent:
        return td.Independent(td.Bernoulli(logits=lam[..., 0, :], validate_args=False), 1)


class ConjugatePrior(nn.Module):
    """p_lam(z), a mixture of K members of a `family`, and what follows from statistics t(x).

    A subclass has the natural parameters `lam` (K, S, D) and E_lam(z).
    """

    family: type

    def lam(self) -> Tensor:
        """Natural parameters (K, S, D)."""
        raise NotImplementedError

    def energy(self, z: Tensor) -> Tensor:
        """E_lam(z): (B, D) -> (B,)."""
        raise NotImplementedError

    def log_integral(self, t: Tensor) -> Tensor:
        """log of the integral of exp(<t, eta(z)> - E_lam_k(z)) over z: (B, S, D) -> (B, K)."""
        raise NotImplementedError

    def joint_energy(self, t: Tensor, z: Tensor) -> Tensor:
        """E(x, z) = -<t(x), eta(z)> + E_lam(z) (Eq. 17): (B, S, D), (B, D) -> (B,)."""
        return self.energy(z) - (t * self.family.eta(z)).sum((-1, -2))

    def log_joint(self, t: Tensor) -> Tensor:
        """log p(x, y = k) + const, y the component: (B, S, D) -> (B, K)."""
        log_integral = self.log_integral(t)
        return log_integral - math.log(log_integral.shape[1])

    def marginal_energy(self, t: Tensor) -> Tensor:
        """E(x) = -log sum_k p(x, y = k), exact: (B, S, D) -> (B,)."""
        log_joint = self.log_joint(t)
        return -(log_joint[:, 0] if log_joint.shape[1] == 1 else log_joint.logsumexp(1))

    def posterior(self, t: Tensor) -> td.Distribution:
        """The member of parameters lam + t, or the mixture of K of them: batch (B,), event (D,)."""
        members = self.lam() + t[:, None]  # (B, K, S, D)
        if members.shape[1] == 1:
            return self.family.member(members[:, 0])
        y = td.Categorical(logits=self.log_joint(t), validate_args=False)
        return td.MixtureSameFamily(y, self.family.member(members), validate_args=False)

    def mean(self, t: Tensor, likeliest: bool) -> Tensor:
        """The posterior's mean, or that of its likeliest component: (B, S, D) -> (B, D)."""
        log_joint = self.log_joint(t)  # (B, K)
        if likeliest:
            share = F.one_hot(log_joint.argmax(1), log_joint.shape[1])
        else:
            share = log_joint.softmax(1)
        return (share[..., None] * self.family.member(self.lam() + t[:, None]).mean).sum(1)


class GaussianPrior(ConjugatePrior):
    """K = 1: N(0, I). K > 1: Gaussians with learned means and standard deviations.

    A component y is drawn uniformly; E_lam(z) = -log p_lam(z), with y summed out. First means have
    the standard deviation `mean_std`, first standard deviations lie between the two of `std`.
    """

    family = Gaussian

    def __init__(self, latent: int, components=1, mean_std=0.31, std=(1.0, 6.0)):
        super().__init__()
        size = (components, latent)
        if components == 1:
            self.register_buffer("location", torch.zeros(size))
            self.register_buffer("log_std", torch.zeros(size))
        else:
            self.location = nn.Parameter(mean_std * torch.randn(size))
            self.log_std = nn.Parameter(torch.empty(size).uniform_(*sorted(std)).log())

    @classmethod
    def of(cls, config) -> GaussianPrior:
        """The one that a configuration's section `model` asks for."""
        return cls(config.latent, config.components, config.prior_mean_std, config.prior_std)

    def lam(self) -> Tensor:
        precision = torch.exp(-2 * self.log_std)
        return torch.stack([self.location * precision, -0.5 * precision], dim=1)

    def energy(self, z: Tensor) -> Tensor:
        members = normal(self.location, self.log_std.exp())  # batch (K,)
        return math.log(len(self.location)) - members.log_prob(z[:, None]).logsumexp(1)

    def log_integral(self, t: Tensor) -> Tensor:
        """A(lam_k + t) - A(lam_k), since E_lam is normalised."""
        return Gaussian.log_partition_change(self.lam(), t[:, None])

    def sample(self, count: int) -> Tensor:
        """z ~ p_lam (count, D), differentiable in the prior's parameters."""
        y = torch.randint(len(self.location), (count,), device=self.location.device)
        return normal(self.location[y], self.log_std[y].exp()).rsample()


class BernoulliPrior(ConjugatePrior):
    """A learned Bernoulli. E_lam(z) = -<lam, z> without A(lam), as Eq. 29 and 33 have it."""

    family = Bernoulli

    def __init__(self, latent: int):
        super().__init__()
        self.theta_z = nn.Parameter(torch.zeros(1, 1, latent))

    def lam(self) -> Tensor:
        return self.theta_z

    def energy(self, z: Tensor) -> Tensor:
        return -(self.theta_z * Bernoulli.eta(z)).sum((-1, -2))

    def log_integral(self, t: Tensor) -> Tensor:
        """A(lam + t), since E_lam is without A(lam)."""
        return Bernoulli.log_partition(self.lam() + t[:, None])


# Energy-based models


def contrastive(
    data: Tensor, chains: Tensor, l2: float, l2_on: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Persistent contrastive divergence of energies (B,), with L2 on them (supplement C).

    mean E(data) - mean E(chains) + l2 * (mean E(data)^2 [+ mean E(chains)^2 if l2_on is "both"]).
    """
    magnitude = (data * data).mean()
    if l2_on == "both":
        magnitude = magnitude + (chains * chains).mean()
    gap = data.mean() - chains.mean()
    metrics = {"energy_data": data.mean(), "energy_chains": chains.mean(), "gap": gap}
    return gap + l2 * magnitude, metrics


def contrastive_loss(
    model, x: Tensor, chains: Tensor, l2: float, l2_on: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """`contrastive` of a model's energies of images and chains: scalar, metrics."""
    energies = model.energy(torch.cat([x, chains]))
    return contrastive(energies[: len(x)], energies[len(x) :], l2, l2_on)


def concentration(z: Tensor) -> Tensor:
    """How few directions have the variance of latents z: (B, D) -> a scalar, for B of at least 3.

    The sum of <z_i, z_j>^2 over that of |z_i|^2 |z_j|^2, i and j all pairs of different images, the
    batch's mean taken away: 0 if they are orthogonal, 1 if they lie on a line. In large batches it
    is tr(C^2) / tr(C)^2 of the covariance C, which is one over the participation ratio of C's
    eigenvalues, so from 1 / D to 1. Terms that decorrelate latents are known from Barlow Twins
    (Zbontar et al., 2021) and VICReg (Bardes et al., 2022); this one leaves their scale alone.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z - z.mean(0)
        lengths = z.square().sum(1)
        with_itself = lengths.square().sum()
        return ((z @ z.T).square().sum() - with_itself) / (lengths.sum().square() - with_itself)


class Conjugate(nn.Module):
    """CEBM and GMM-CEBM: E(x, z) = -<t(x), eta(z)> + E_lam(z) (Eq. 17), eta(z) = (z, z^2).

    `network` is any module that maps images (B, C, H, W) to a pair (t1, h), each (B, D), or to both
    in one tensor (B, 2 D). `t2` says what the second statistic is of h. `prior` is N(0, I) with
    `GaussianPrior(D)`, a mixture with `GaussianPrior(D, components)`. `represent` is "component" or
    "mixture": whose mean is the latent vector. `l2`, `l2_on`: see `contrastive`. `spread`, not in
    the paper, is the weight of `concentration` of the data's latents in the loss: without it few
    directions come to have most of their variance, and plain distances see little else.

    Normalisation over the batch (nn.BatchNorm2d) in `network` would let the images of a batch
    change each other's energies: keep such layers in evaluation mode, or use others.
    """

    def __init__(
        self,
        network: nn.Module,
        prior: GaussianPrior,
        t2: Literal["square", "softplus"] = "square",
        represent: Literal["component", "mixture"] = "component",
        l2: float = 0.1,
        l2_on: Literal["data", "both"] = "data",
        spread: float = 0.0,
    ):
        super().__init__()
        self.network, self.prior = network, prior
        self.t2, self.likeliest = t2, represent == "component"
        self.l2, self.l2_on, self.spread = l2, l2_on, spread

    @classmethod
    def of(cls, config, image_shape, num_classes: int) -> Conjugate:
        """On the network of Table 5.

        `config.head`: one hidden layer for both statistics ("shared", as in the table) or one each
        ("separate"). `config.t1_scale`: what t1 is multiplied by before training. From small values
        the energy's quadratic term grows fastest where it is largest already, so that few
        directions of z come to hold most of the variance of the latents.
        """
        outputs = [2 * config.latent] if config.head == "shared" else [config.latent] * 2
        heads = [(config.hidden, size) for size in outputs]
        network = Network(config, image_shape, heads, nn.SiLU)
        with torch.no_grad():
            for parameter in network.heads[0][-1].parameters():
                parameter[: config.latent] *= config.t1_scale
        prior = GaussianPrior.of(config)
        return cls(
            network, prior, config.t2, config.represent, config.l2, config.l2_on, config.spread
        )

    def t(self, x: Tensor) -> Tensor:
        """Statistics of images: (B, C, H, W) -> (B, 2, D).

        t_2 <= 0, so that posteriors exist: -h^2 or -softplus(h) of the network's raw output h.
        """
        outputs = self.network(x)
        t1, h = outputs.chunk(2, dim=1) if isinstance(outputs, Tensor) else outputs
        t2 = -h * h if self.t2 == "square" else -F.softplus(h)
        return torch.stack([t1, t2], 1)

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z): (B, C, H, W), (B, D) -> (B,), B broadcast.

        Its gradient in x is that of -log p(x | z), -d<t(x), eta(z)>/dx (Eq. 41).
        """
        return self.prior.joint_energy(self.t(x), z)

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = -log sum_k pi_k exp(A(lam_k + t(x)) - A(lam_k)): (B, C, H, W) -> (B,)."""
        return self.prior.marginal_energy(self.t(x))

    def posterior(self, x: Tensor) -> td.Distribution:
        """p(z | x), of natural parameters lam + t(x): batch (B,), event (D,)."""
        return self.prior.posterior(self.t(x))

    def represent(self, x: Tensor) -> Tensor:
        """The posterior's mean, or that of its likeliest component: (B, C, H, W) -> (B, D)."""
        return self.prior.mean(self.t(x), self.likeliest)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        """What `represent`, `energy` and `posterior` say, by one pass of the network.

        (B, C, H, W) -> `mean` (B, D), `energy` (B,), and `std` (B, D), the posterior's deviations.
        """
        t = self.t(x)
        return {
            "mean": self.prior.mean(t, self.likeliest),
            "energy": self.prior.marginal_energy(t),
            "std": self.prior.posterior(t).variance.sqrt(),
        }

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence on E(x); labels y are unused and may be None."""
        t = self.t(torch.cat([x, chains]))
        energies = self.prior.marginal_energy(t)
        loss, metrics = contrastive(energies[: len(x)], energies[len(x) :], self.l2, self.l2_on)
        if self.spread:
            latents = self.prior.mean(t[: len(x)], self.likeliest)
            metrics["concentration"] = concentration(latents)
            loss = loss + self.spread * metrics["concentration"]
        return loss, metrics


class LinearStatistics(nn.Module):
    """Eq. 33: t(x) = t_x(x)^T theta_xz and the term of x alone, <theta_x, t_x(x)>.

    Bernoulli x: t_x = v = (x + 1) / 2; grey pixels enter as values between 0 and 1, not sampled to
    bits. Gaussian x: t_x = (x, x^2), where for the square theta_xz = 0 and theta_x = -1 / (2 s^2)
    are fixed.
    """

    def __init__(self, config, image_shape, binary: bool):
        super().__init__()
        self.image_shape, self.binary = image_shape, binary
        self.variance = config.visible_std**2
        pixels = math.prod(image_shape)
        self.theta_xz = nn.Parameter(0.01 * torch.randn(pixels, config.latent))
        self.theta_x = nn.Parameter(torch.zeros(pixels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> t (B, 1, D) and the term of x alone (B,)."""
        with torch.autocast(x.device.type, enabled=False):
            if self.binary:
                v = (x.flatten(1) + 1) / 2
                return (v @ self.theta_xz)[:, None], v @ self.theta_x
            v = x.flatten(1)
            square = (v * v).sum(1) / (2 * self.variance)
            return (v @ self.theta_xz)[:, None], v @ self.theta_x - square

    def sample(self, z: Tensor, generator=None) -> Tensor:
        """x ~ p(x | z) of Eq. 31: (B, D) -> (B, C, H, W)."""
        natural = self.theta_x + z @ self.theta_xz.T
        if self.binary:
            x = torch.bernoulli(natural.sigmoid(), generator=generator) * 2 - 1
        else:
            x = torch.normal(self.variance * natural, self.variance**0.5, generator=generator)
        return x.view(-1, *self.image_shape)


class Harmonium(nn.Module):
    """EFH (Eq. 29 to 33): Gaussian x, Bernoulli z, both conditionals tractable.

    A conjugate EBM with linear statistics: E(x, z) = -<t(x), z> - <theta_x, t_x(x)> + E_lam(z).
    """

    binary = False

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config = config
        self.network = LinearStatistics(config, image_shape, self.binary)
        self.prior = BernoulliPrior(config.latent)

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z): (B, C, H, W), (B, D) -> (B,), B broadcast."""
        t, term_of_x = self.network(x)
        return self.prior.joint_energy(t, z) - term_of_x

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = -A(theta_z + t(x)) - <theta_x, t_x(x)>: (B, C, H, W) -> (B,)."""
        t, term_of_x = self.network(x)
        return self.prior.marginal_energy(t) - term_of_x

    def posterior(self, x: Tensor) -> td.Distribution:
        """p(z | x) (Eq. 32): batch (B,), event (D,)."""
        t, _ = self.network(x)
        return self.prior.posterior(t)

    def represent(self, x: Tensor) -> Tensor:
        """The probabilities of z = 1: (B, C, H, W) -> (B, D)."""
        return self.posterior(x).mean

    @torch.no_grad()
    def gibbs_sweep(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """z ~ p(z | x) (Eq. 32), then x ~ p(x | z) (Eq. 31): (B, C, H, W) -> the same."""
        z = torch.bernoulli(self.represent(x), generator=generator)
        return self.network.sample(z, generator)

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence on E(x)."""
        return contrastive_loss(self, x, chains, self.config.l2, self.config.l2_on)


class RBM(Harmonium):
    """Binary x (pixels of -1 and 1) and binary z."""

    binary = True


class IGEBM(nn.Module):
    """E(x) = -f(x), a network with one output (Table 6)."""

    def __init__(self, config, image_shape, num_classes: int, outputs: int = 1):
        super().__init__()
        self.config = config
        network = Network(config, image_shape, [(config.hidden, config.latent)], nn.SiLU)
        self.features = nn.Sequential(network, nn.SiLU())
        self.head = nn.Linear(config.latent, outputs)

    def represent(self, x: Tensor) -> Tensor:
        """The last hidden layer of Table 6 before its Swish, as in the authors' code: -> (B, D)."""
        return self.features[0](x)

    def f(self, x: Tensor) -> Tensor:
        """The network's outputs, a classifier's logits: (B, C, H, W) -> (B, 1 or classes)."""
        return in_float32(self.head, self.features(x))

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = -logsumexp_y f(x)[y], of one output -f(x): (B, C, H, W) -> (B,)."""
        return -self.f(x).logsumexp(1)

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence on E(x)."""
        return contrastive_loss(self, x, chains, self.config.l2, self.config.l2_on)


class JEM(IGEBM):
    """E(x, y) = -f(x)[y], E(x) = -logsumexp_y f(x)[y] (Tables 4, 6), an output a class."""

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__(config, image_shape, num_classes, outputs=num_classes)

    def classify(self, x: Tensor) -> Tensor:
        """The likeliest class: (B, C, H, W) -> (B,)."""
        return self.f(x).argmax(1)

    def classification(self, logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of p(y | x) = softmax f(x), and accuracy: scalars."""
        accuracy = (logits.argmax(1) == y).float().mean()
        return F.cross_entropy(logits, y), accuracy

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of p(y | x) + persistent contrastive divergence on E(x)."""
        logits = self.f(torch.cat([x, chains]))
        energies = -logits.logsumexp(1)
        generative, metrics = contrastive(
            energies[: len(x)], energies[len(x) :], self.config.l2, self.config.l2_on
        )
        cross_entropy, metrics["accuracy"] = self.classification(logits[: len(x)], y)
        return cross_entropy + generative, metrics


class HDGE(JEM):
    """The energy of JEM, trained by contrast within the batch in place of chains."""

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of p(y | x) - mean log(exp f(x_i)[y_i] / sum_j exp f(x_j)[y_i]).

        j runs over the images of the batch, the negatives of image i.
        """
        logits = self.f(x)
        contrast = F.cross_entropy(logits.T[y], torch.arange(len(y), device=y.device))
        cross_entropy, accuracy = self.classification(logits, y)
        return cross_entropy + contrast, {"contrast": contrast, "accuracy": accuracy}


# Models with a decoder


class VAE(nn.Module):
    """VAE and GMM-VAE: E(x, z) = -log p(x | z) - log p(z) (Table 4), networks of Table 7.

    The likelihood is of pixels in [0, 1].
    """

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config, self.prior = config, GaussianPrior.of(config)
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
        return normal(mean, (0.5 * log_variance).exp())

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

    def negative_elbo(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Divergence and distortion -log p(x | z) by one sample of z: (B,), (B,)."""
        q = self.posterior(x)
        z = q.rsample()
        return self.divergence(q, z), -self.log_likelihood(x, z)

    def energy(self, x: Tensor) -> Tensor:
        """-ELBO(x) by one sample of z, in expectation at least -log p(x): (B, C, H, W) -> (B,)."""
        divergence, distortion = self.negative_elbo(x)
        return divergence + distortion

    def decode(self, z: Tensor) -> Tensor:
        """The sigmoid of the decoder's logits, scaled to [-1, 1]: (B, D) -> (B, C, H, W)."""
        return self.decoder(z).float().sigmoid() * 2 - 1

    def generate(self, count: int) -> Tensor:
        """`decode` of z from the prior: (count, C, H, W)."""
        return self.decode(self.prior.sample(count))

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """-ELBO, the batch's mean."""
        divergence, distortion = (part.mean() for part in self.negative_elbo(x))
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
        """The last hidden layer before LeakyReLU (B, 128), of images or pairs as in `forward`."""
        return in_float32(self.hidden[0], torch.cat([self.image(x), *z], dim=1))

    def forward(self, x: Tensor, *z: Tensor) -> Tensor:
        """Logits (B,) of images (B, C, H, W), of pairs with latents (B, D) too."""
        return in_float32(self.head, self.hidden[1](self.represent(x, *z)))[:, 0]


class Game(nn.Module):
    """A generator of images from z against a discriminator, both of Table 8."""

    pairs = False  # whether the discriminator sees z beside x

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__()
        self.config, self.prior = config, GaussianPrior.of(config)
        self.discriminator = Discriminator(config, image_shape, config.latent * self.pairs)
        self.generator = nn.Sequential(
            nn.Unflatten(1, (config.latent, 1, 1)),
            upconvolutions(image_shape, config.latent, GENERATOR, normalise=True),
            nn.Tanh(),
        )

    def decode(self, z: Tensor) -> Tensor:
        """G(z): (B, D) -> (B, C, H, W)."""
        return self.generator(z).float()

    def generate(self, count: int) -> Tensor:
        """G(z) of z from the prior: (count, C, H, W)."""
        return self.decode(self.prior.sample(count))

    def play(self, real: tuple, generated: tuple) -> tuple[Tensor, dict[str, Tensor]]:
        """Both players' losses, summed; each has gradients for its own parameters alone.

        `real` is (x,) or (x, encoder's z), `generated` is (G(z),) or (G(z), z). The discriminator
        sees detached copies, so that its loss moves it alone. The slopes of the generator's loss
        in these copies are then carried back through the originals, by the chain rule
        dL/dtheta = sum of slope * dvalue/dtheta. So one pass through the discriminator serves both.
        """
        weight = self.config.gradient_penalty
        x, *z = (value.detach().requires_grad_(True) for value in real)
        copies = [value.detach().requires_grad_(True) for value in generated]
        on_real = self.discriminator(x.requires_grad_(weight > 0), *z)
        on_generated = self.discriminator(*copies)
        loss_d = F.softplus(-on_real).mean() + F.softplus(on_generated).mean()
        loss_g = F.softplus(-on_generated).mean()
        if self.pairs:  # the encoder wants its pairs to be taken for generated ones
            loss_g = loss_g + F.softplus(on_real).mean()
        slopes = gradients(loss_g, (*z, *copies), retain_graph=True)
        originals = (*real[1:], *generated)
        carried = sum((v * slope).sum() for v, slope in zip(originals, slopes, strict=True))
        accuracy = ((on_real > 0).float().mean() + (on_generated < 0).float().mean()) / 2
        if weight:  # R1 of Mescheder et al. (2018), here of a D whose BatchNorm links the images
            (slope,) = gradients(on_real.sum(), x, create_graph=True)
            loss_d = loss_d + weight / 2 * slope.square().sum() / len(slope)
        loss_g = loss_g.detach() + carried - carried.detach()  # its value, the gradients of carried
        metrics = {"discriminator": loss_d, "generator": loss_g, "accuracy": accuracy}
        return loss_d + loss_g, metrics


class GAN(Game):
    """Energy-based on its latents: E(z) = -log p(z) - logit D(G(z)) (Table 4)."""

    def represent(self, x: Tensor) -> Tensor:
        """That of the discriminator, as in the authors' code: (B, C, H, W) -> (B, 128)."""
        return self.discriminator.represent(x)

    def latent_energy(self, z: Tensor) -> Tensor:
        """E(z) = -log p(z) - logit D(G(z)): (B, D) -> (B,)."""
        return self.prior.energy(z) - self.discriminator(self.decode(z))

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The non-saturating game of G and D."""
        return self.play((x,), (self.generate(len(x)),))


class BiGAN(Game):
    """BiGAN and GMM-BiGAN: D tells pairs of x and its encoding from pairs of G(z) and z (Table 8).

    With `model.standardise` the encoder's means are standardised: over the batch in training, by
    running averages after it; their standard deviations stay as they are.
    """

    pairs = True

    def __init__(self, config, image_shape, num_classes: int):
        super().__init__(config, image_shape, num_classes)
        head = (config.hidden, 2 * config.latent)
        self.encoder = Network(config, image_shape, [head], nn.LeakyReLU, normalise=True)
        if config.standardise:
            self.standardise = nn.BatchNorm1d(config.latent, affine=False)
        else:
            self.standardise = nn.Identity()

    def posterior(self, x: Tensor) -> td.Independent:
        """q(z | x), the encoder's diagonal Gaussian: batch (B,), event (D,)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return normal(self.standardise(mean), (0.5 * log_variance).exp())

    def represent(self, x: Tensor) -> Tensor:
        """The mean of q(z | x): (B, C, H, W) -> (B, D)."""
        return self.posterior(x).mean

    def loss(self, x: Tensor, y: Tensor, chains: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The non-saturating game of G and E against D."""
        z = self.prior.sample(len(x))
        return self.play((x, self.posterior(x).rsample()), (self.decode(z), z))


# The registry


@dataclass(frozen=True)
class ModelKind:
    """How a model is built and what it can do, beside `represent` and `loss`.

    `build` takes (config, image_shape, num_classes). The model has to have

    - `energy(x) -> (B,)` if `density`, and in any case if `chains` are Langevin dynamics on it,
    - `gibbs_sweep(x, generator) -> x` if `chains` are block Gibbs,
    - `posterior(x)`, a torch distribution with mean and variance, if `posterior`,
    - `joint_energy(x, z) -> (B,)` if `posterior` and not `decoder`,
    - `decode(z) -> x`, `generate(count) -> x` and a `prior` with `sample(count)` if `decoder`,
    - `latent_energy(z) -> (B,)` if `latent_energy`, and `classify(x) -> (B,)` if `labels`.

    It may have `encode(x)`, its latents, energies and deviations at once (see `Conjugate.encode`).
    """

    build: Callable[..., nn.Module]
    chains: Literal["langevin", "gibbs"] | None  # how chains move in training: a key of SAMPLERS
    density: bool  # E(x), or a bound on it
    posterior: bool  # p(z | x), or an encoder's q(z | x)
    decoder: bool = False  # draws images from z, without chains
    latent_energy: bool = False  # E(z), by which latents can be refined before they are decoded
    labels: bool = False  # learns from them
    sides: tuple[int, ...] | None = None  # sizes of images, square; None: any of at least 8 x 8
    keys: frozenset[str] = frozenset()  # of `config` that it uses, beside its widths and `latent`


DECODED_SIDES = tuple(DECODER)
MIXTURE = frozenset(("components", "prior_mean_std", "prior_std"))
DIVERGENCE = frozenset(("l2", "l2_on"))  # of contrastive divergence
IN_PIXELS = DIVERGENCE | {"contrast"}
CONJUGATE = ModelKind(
    Conjugate.of,
    "langevin",
    density=True,
    posterior=True,
    keys=IN_PIXELS | {"head", "t2", "t1_scale", "spread"},
)
AUTOENCODER = ModelKind(
    VAE,
    None,
    density=True,
    posterior=True,
    decoder=True,
    sides=DECODED_SIDES,
    keys=frozenset({"likelihood"}),
)
ENCODED_GAME = ModelKind(
    BiGAN,
    None,
    density=False,
    posterior=True,
    decoder=True,
    sides=DECODED_SIDES,
    keys=frozenset({"gradient_penalty", "standardise"}),
)


def with_mixture(kind: ModelKind, *keys: str) -> ModelKind:
    """`kind` with a prior of several components, and further `keys`."""
    return replace(kind, keys=kind.keys | MIXTURE | set(keys))


MODELS = {
    "cebm": CONJUGATE,
    "gmm-cebm": with_mixture(CONJUGATE, "represent"),
    "igebm": ModelKind(IGEBM, "langevin", density=True, posterior=False, keys=IN_PIXELS),
    "vae": AUTOENCODER,
    "gmm-vae": with_mixture(AUTOENCODER),
    "bigan": ENCODED_GAME,
    "gmm-bigan": with_mixture(ENCODED_GAME),
    "gan": ModelKind(
        GAN,
        None,
        density=False,
        posterior=False,
        decoder=True,
        latent_energy=True,
        sides=DECODED_SIDES,
        keys=frozenset({"gradient_penalty"}),
    ),
    "jem": ModelKind(JEM, "langevin", density=True, posterior=False, labels=True, keys=IN_PIXELS),
    "hdge": ModelKind(
        HDGE, None, density=True, posterior=False, labels=True, keys=frozenset({"contrast"})
    ),
    "rbm": ModelKind(RBM, "gibbs", density=True, posterior=True, keys=DIVERGENCE),
    "efh": ModelKind(
        Harmonium, "gibbs", density=True, posterior=True, keys=DIVERGENCE | {"visible_std"}
    ),
}


def build(config, image_shape, num_classes: int) -> nn.Module:
    """The model that `config` (the `model` section) names, for images of shape (C, H, W)."""
    return MODELS[config.name].build(config, image_shape, num_classes)
