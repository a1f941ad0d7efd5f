"""Conjugate energy-based models (Wu et al., ICML 2021) in the notation of the supplement.

Every model is an unnormalised density p(x) proportional to exp(-E(x)): low energy is likely, chains
descend E. Natural parameters `lam` and statistics `t` are tensors (..., S, D), S statistics for
each of D latent dimensions (S = 2 for a Gaussian), so that a posterior is just `lam + t(x)`.
Shapes: images x (B, C, H, W), latents z (B, D), energies (B,). Energies are at least float32.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal

KERNELS = ((3, 1), (4, 2), (4, 2), (4, 2))  # (size, stride) of Tables 5 to 8, padding 1 throughout


class Gaussian:
    """Diagonal Gaussian as an exponential family: eta(z) = (z, z^2), lam_2 < 0."""

    statistics = 2
    log_base = 0.5 * math.log(2 * math.pi)  # what log_partition leaves out, a dimension

    @staticmethod
    def eta(z: Tensor) -> Tensor:
        """Sufficient statistics: (..., D) -> (..., 2, D)."""
        return torch.stack([z, z * z], dim=-2)

    @staticmethod
    def log_partition(lam: Tensor) -> Tensor:
        """A(lam) = sum_d -lam_1^2 / (4 lam_2) - log(-2 lam_2) / 2: (..., 2, D) -> (...).

        Short of log_base D, which cancels in every difference.
        """
        lam1, lam2 = lam.unbind(-2)
        return (-lam1 * lam1 / (4 * lam2) - 0.5 * torch.log(-2 * lam2)).sum(-1)

    @staticmethod
    def distribution(lam: Tensor) -> Independent:
        """Mean -lam_1 / (2 lam_2), variance -1 / (2 lam_2): (..., 2, D) -> event shape (D,)."""
        lam1, lam2 = lam.unbind(-2)
        return Independent(Normal(-lam1 / (2 * lam2), (-2 * lam2).rsqrt()), 1)

    @staticmethod
    def standard(dim: int) -> Tensor:
        """Natural parameters of N(0, I), the spherical prior: (2, dim)."""
        return torch.stack([torch.zeros(dim), torch.full((dim,), -0.5)])


def trunk(image_shape, channels, activation=nn.SiLU) -> nn.Sequential:
    """The convolutions of Tables 5 and 6: (B, C, H, W) -> (B, features), flattened.

    28x28 -> 28, 14, 7, 3 and 32x32 -> 32, 16, 8, 4 pixels a side.
    """
    layers, previous = [], image_shape[0]
    for width, (size, stride) in zip(channels, KERNELS, strict=True):
        layers += [nn.Conv2d(previous, width, size, stride, padding=1), activation()]
        previous = width
    return nn.Sequential(*layers, nn.Flatten())


def trunk_features(image_shape, channels) -> int:
    """Length of the trunk's output vector."""
    _, height, width = image_shape
    for size, stride in KERNELS:
        height, width = ((side + 2 - size) // stride + 1 for side in (height, width))
    return channels[-1] * height * width


class StatisticsNetwork(nn.Module):
    """t_theta(x) of Table 5: (B, C, H, W) -> (B, 2, D), with t_2 <= 0 so that posteriors exist.

    `head` is one hidden layer for both statistics ("shared", the table) or one each ("separate",
    the authors' trained models). `t2` is -h^2 or -softplus(h) of the network's raw output h.
    """

    def __init__(self, image_shape, channels, hidden: int, latent: int, head: str, t2: str):
        super().__init__()
        features = trunk_features(image_shape, channels)
        self.trunk = trunk(image_shape, channels)
        outputs = {"shared": [2 * latent], "separate": [latent, latent]}[head]
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(features, hidden), nn.SiLU(), nn.Linear(hidden, out))
            for out in outputs
        )
        self.negative = {"square": lambda h: -h * h, "softplus": lambda h: -F.softplus(h)}[t2]

    def forward(self, x: Tensor) -> Tensor:
        features = self.trunk(x)
        # Convolutions may run in bfloat16; what the energy is made of does not.
        with torch.autocast(x.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            t1, h = torch.cat([head(features) for head in self.heads], dim=1).chunk(2, dim=1)
            return torch.stack([t1, self.negative(h)], dim=1)  # (B, 2, D)


class CEBM(nn.Module):
    """E(x, z) = -<t(x), eta(z)> + E_lam(z), E_lam(z) = -<lam, eta(z)> + A(lam) (Eq. 17, App. B)."""

    chain = "langevin"

    def __init__(self, statistics: nn.Module, lam: Tensor, family, l2: float, l2_on: str):
        super().__init__()
        self.t, self.family, self.l2, self.l2_on = statistics, family, l2, l2_on
        self.register_buffer("lam", lam)

    def joint_energy(self, x: Tensor, z: Tensor) -> Tensor:
        """E(x, z) of Eq. 17 for pairs: (B, C, H, W), (B, D) -> (B,), B broadcast.

        Its x-gradient is that of -log p(x | z), supplement Eq. 41.
        """
        natural = (self.lam + self.t(x)) * self.family.eta(z)
        constant = self.family.log_partition(self.lam) + self.family.log_base * z.shape[-1]
        return constant - natural.flatten(1).sum(1)

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = A(lam) - A(lam + t(x)), z integrated out exactly: (B, C, H, W) -> (B,)."""
        return self.family.log_partition(self.lam) - self.family.log_partition(self.lam + self.t(x))

    def posterior(self, x: Tensor) -> torch.distributions.Distribution:
        """p(z | x), the family's member with parameters lam + t(x): batch (B,), event (D,)."""
        return self.family.distribution(self.lam + self.t(x))

    def represent(self, x: Tensor) -> Tensor:
        """The posterior mean, the paper's latent: (B, C, H, W) -> (B, D)."""
        return self.posterior(x).mean

    def loss(self, x: Tensor, y: Tensor, chains: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Persistent contrastive divergence, L2 on the energies (supplement C): scalar, metrics."""
        data, fake = self.energy(torch.cat([x, chains])).split([len(x), len(chains)])
        magnitude = (data * data).mean()
        if self.l2_on == "both":
            magnitude = magnitude + (fake * fake).mean()
        gap = data.mean() - fake.mean()
        metrics = {"energy_data": data.mean(), "energy_chains": fake.mean(), "gap": gap}
        return gap + self.l2 * magnitude, {name: m.detach() for name, m in metrics.items()}


def build(config, image_shape, num_classes: int) -> nn.Module:
    """The model that `config` (the `model` section) describes, for images of shape (C, H, W)."""
    statistics = StatisticsNetwork(
        image_shape, config.channels, config.hidden, config.latent, config.head, config.t2
    )
    return CEBM(statistics, Gaussian.standard(config.latent), Gaussian, config.l2, config.l2_on)
