"""What latents are worth: 1-NN (supplement E.1), a linear probe, OOD scores, pictures of them.

Images are uint8 (N, C, H, W) unless said, latents (N, D), labels (N,). Scores are in percent.
Functions return a row of figures, arrays, or a matplotlib figure.
"""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data import normalise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Encoding


@torch.no_grad()
def in_batches(function, images: Tensor, device, size: int = 1000) -> Tensor:
    """`function` of normalised images, `size` at a time: (N, ...) on `device`."""
    outputs = []
    for part in images.split(size):
        x = normalise(part.to(device))
        outputs.append(function(x.contiguous(memory_format=torch.channels_last)))
    return torch.cat(outputs)


@contextmanager
def seeded(seed: int, device):
    """torch's random numbers start from `seed` inside and are as before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def latents(
    model, images: Tensor, device, with_std: bool, with_energy: bool
) -> dict[str, np.ndarray]:
    """`mean` (N, D), what `represent` says, and if asked for `energy` (N,) and the whole
    posterior's `std` (N, D)."""
    columns = {"mean": model.represent}
    if with_energy:
        columns["energy"] = model.energy
    if with_std:
        columns["std"] = lambda x: model.posterior(x).variance.sqrt()
    with seeded(0, device):
        return {k: in_batches(f, images, device).cpu().numpy() for k, f in columns.items()}


# 1-NN


def nearest(train: Tensor, test: Tensor, floats: int = 2**24) -> Tensor:
    """Index (M,) of the training vector (N, D) nearest in L2 to each of (M, D), the first if equal.

    |a|^2 - 2ab in float64, `floats` numbers at a time: exact for pixels, else to 1e-15 of |a|^2.
    """
    test = test.double()
    least = torch.full_like(test[:, 0], torch.inf)
    index = torch.zeros_like(least, dtype=torch.long)
    size = max(1, floats // max(test.shape))
    for i, part in enumerate(train.split(size)):
        a = part.double()
        value, row = torch.addmm(a.square().sum(1), test, a.T, alpha=-2).min(1)
        index = torch.where(value < least, row + i * size, index)
        least = torch.minimum(least, value)
    return index


def whiten(train: Tensor, test: Tensor, damping: float = 0.03) -> tuple[Tensor, Tensor]:
    """Latents along the principal directions of `train`, each over its deviation + `damping` of
    the largest one."""
    _, s, v = torch.linalg.svd((train - train.mean(0)).double(), full_matrices=False)
    scale = v.T / (s + damping * s[0] + 1e-30)
    return train.double() @ scale, test.double() @ scale


def knn_row(
    model, untrained, train, test, classes: int, device, whitened=False
) -> dict[str, object]:
    """Exact 1-NN accuracy: `latent`, that of the `untrained` network, `pixel`, and `confusion`.

    `train` and `test` are images and labels. `confusion` (K lists of K counts) is of the latents,
    rows are true and columns predicted classes.
    """
    row = {}
    spaces = {
        "latent": model.represent,
        "untrained": untrained.represent,
        "pixel": lambda x: (x.flatten(1) * 127.5 + 127.5).round().byte(),
    }
    for space, represent in spaces.items():
        a, b = (in_batches(represent, images, device) for images in (train[0], test[0]))
        if whitened and space != "pixel":
            a, b = whiten(a, b)
        predicted = train[1][nearest(a, b).cpu()]
        row[space] = percent_equal(predicted, test[1])
        if space == "latent":
            counts = torch.bincount(test[1] * classes + predicted, minlength=classes**2)
            row["confusion"] = counts.view(classes, classes).tolist()
    return row


def accuracy(model, test, device) -> float:
    """How often a classifier is right about `test`, images and labels."""
    return percent_equal(in_batches(model.classify, test[0], device).cpu(), test[1])


def percent_equal(a: Tensor, b: Tensor) -> float:
    return round(100 * (a == b).double().mean().item(), 2)


# Linear probe


def probe(train, train_y, test, test_y, classes: int, per_class: int | None, draws: int = 10):
    """Percent of test latents (M, D) that logistic regression on latents (N, D) gets right.

    Fitted to `per_class` labels a class, drawn `draws` times, or to all of them once: mean and
    deviation. The penalty is scikit-learn's default, half the squared weights.
    """
    from sklearn.linear_model import LogisticRegression

    scores = []
    for draw in range(draws if per_class else 1):
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(draw))
        chosen = torch.cat([order[train_y[order] == k][:per_class] for k in range(classes)])
        regression = LogisticRegression(C=1.0, tol=1e-6, max_iter=10_000)
        regression.fit(train[chosen].double().numpy(), train_y[chosen].numpy())
        scores.append(100 * regression.score(test.double().numpy(), test_y.numpy()))
    return float(np.mean(scores)), float(np.std(scores))


def probe_row(model, train, test, classes: int, device, scaled=False) -> dict[str, float]:
    """`probe` with 1, 10, 100 (if there are as many) and all labels a class: means and deviations.

    With `scaled` latents are centred and all alike brought to variance 1, since the penalty bears
    harder on small ones.
    """
    a, b = (in_batches(model.represent, images, device).cpu() for images, _ in (train, test))
    if scaled:
        mean, scale = a.mean(0), a.var(0).mean().sqrt().clamp(min=1e-30)
        a, b = (a - mean) / scale, (b - mean) / scale
    row = {}
    fewest = train[1].bincount().min()
    for count in [n for n in (1, 10, 100) if n <= fewest] + [None]:
        mean, std = probe(a, train[1], b, test[1], classes, count)
        name = str(count or "all")
        row[name], row[f"{name} std"] = round(mean, 2), round(std, 2)
    return row


# OOD scores


def density_scores(model, images: Tensor, device) -> dict[str, Tensor]:
    """Scores (N,) of images, higher for what is likelier: log p(x) + const, -|grad log p(x)|."""

    def pair(x: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = model.energy(x.requires_grad_(True))
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return -torch.stack([energy.detach(), gradient.flatten(1).norm(dim=1)], 1)

    with seeded(0, device):
        scores = in_batches(pair, images, device, 500).cpu()
    return dict(zip(("logp", "gradient"), scores.T, strict=True))


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance in percent that a score of `inside` (N,) exceeds one of `outside` (M,), ties half."""
    from sklearn.metrics import roc_auc_score

    is_inside = np.repeat([1, 0], [len(inside), len(outside)])
    return 100 * float(roc_auc_score(is_inside, torch.cat([inside, outside]).double().numpy()))


def ood_row(model, own: Tensor, others: dict[str, Tensor], device) -> dict[str, float]:
    """AUROC of telling images `own` from each of `others`, uniform noise and constant images."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(256, (len(own), 1, 1, 1), generator=generator)
    others = dict(others)
    others["uniform"] = torch.randint(256, own.shape, generator=generator).byte()
    others["constant"] = level.expand(own.shape).byte()
    inside, row = density_scores(model, own, device), {}
    for name, images in others.items():
        outside = density_scores(model, images, device)
        row |= {
            f"{name} {score}": round(auroc(inside[score], outside[score]), 2) for score in inside
        }
    return row


def plane(points: np.ndarray) -> tuple[np.ndarray, str]:
    """Latents (N, D) in two dimensions (N, 2), and by what: UMAP if it can be had, else PCA."""
    try:
        from umap import UMAP

        return UMAP(random_state=0).fit_transform(points), "UMAP"
    except ImportError as error:  # absent, another package of that name, or one that fails
        reason = "umap-learn is not installed" if error.name == "umap" else str(error)
    from sklearn.decomposition import PCA

    directions = min(2, *points.shape)
    plane = PCA(directions, svd_solver="full").fit_transform(points)
    return np.pad(plane, ((0, 0), (0, 2 - directions))), f"PCA ({reason})"


# Tables and pictures

PICTURES = (".png", ".jpg", ".pdf", ".svg")  # endings of a picture's name


def table(rows: list[dict], markdown: bool = False) -> str:
    """Rows as aligned text or as Markdown, without lists; what a row lacks is "-"."""
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if type(v) is not list))
    cells = [columns]
    for row in rows:
        values = (row.get(key, "-") for key in columns)
        cells.append([f"{v:.2f}" if isinstance(v, float) else str(v) for v in values])
    if markdown:
        cells.insert(1, ["---"] * len(columns))
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def npz_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as the content of an .npz file."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def figure_bytes(figure: Figure, path) -> bytes:
    """A figure as the content of a file whose name ends in one of `PICTURES`."""
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix[1:].lower())
    return content.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, 100 pixels each, without a window."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=100, layout="constrained")


def grid_figure(images: Tensor, columns: int | None = None, caption: str = "") -> Figure:
    """Images (N, C, H, W), float in [-1, 1] and clipped to it, side by side, at least 600 pixels.

    Each pixel is enlarged by the same whole factor; `columns` None is near square.
    """
    from matplotlib.figure import Figure

    sheet = arrange(images, columns or round(len(images) ** 0.5))
    scale = -(-600 // min(sheet.shape[:2]))
    height, width = (scale * side for side in sheet.shape[:2])
    strip = 44 if caption else 0  # pixels below for two lines of text
    figure = Figure((width / 100, (height + strip) / 100), dpi=100)
    axes = figure.add_axes((0, strip / (height + strip), 1, height / (height + strip)))
    colours = sheet if sheet.ndim == 3 else np.stack([sheet] * 3, axis=2)  # exact, unlike a map
    axes.imshow(colours, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    if caption:
        size = min(10, 1.55 * width / len(caption) * 2)
        middle = strip / 2 / (height + strip)
        figure.text(0.5, middle, wrap_line(caption), ha="center", va="center", fontsize=size)
    return figure


def wrap_line(text: str) -> str:
    """A long line as two, broken at the space nearest to its middle."""
    spaces = [i for i, letter in enumerate(text) if letter == " "]
    if len(text) < 60 or not spaces:
        return text
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return f"{text[:middle]}\n{text[middle + 1 :]}"


def arrange(images: Tensor, columns: int, gap: int = 2) -> np.ndarray:
    """Images (N, C, H, W) in rows of `columns` with a black gap: uint8 (h, w) or (h, w, 3)."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    pixels = images.float().cpu().clamp(-1, 1).add(1).mul(127.5).round().byte().numpy()
    sheet = np.zeros(
        (channels, rows * (height + gap) + gap, columns * (width + gap) + gap), np.uint8
    )
    for i, image in enumerate(pixels):
        top, left = (gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap))
        sheet[:, top : top + height, left : left + width] = image
    return sheet[0] if channels == 1 else sheet.transpose(1, 2, 0)


def confusion_figure(counts: Tensor, names: list[str], title: str, most: int = 50) -> Figure:
    """Counts (K, K), rows true and columns predicted, coloured by their share of the row.

    Of more than `most` classes the ones with most errors are shown, and the title says so.
    """
    counts = np.asarray(counts)
    if len(counts) > most:
        errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        shown = np.sort(np.argsort(-errors, kind="stable")[:most])
        title += f"\nthe {most} of {len(counts)} classes with most errors"
        counts, names = counts[np.ix_(shown, shown)], [names[k] for k in shown]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(5.5, 0.62 * len(names)) if len(names) <= 20 else 12.0
    figure = new_figure(side + 1.5, side)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    small = 10 if len(names) <= 20 else 7
    places = range(len(names))
    axes.set_xticks(places, [name[:15] for name in names], rotation=90, fontsize=small)
    axes.set_yticks(places, [name[:15] for name in names], fontsize=small)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    if len(names) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, count, ha="center", va="center", color=colour, fontsize=8)
    return figure


def map_figure(points: np.ndarray, labels, names: list[str], title: str, method: str) -> Figure:
    """Points (N, 2) in the colours of their classes, with axes, a legend, and by which method."""
    from matplotlib import colormaps

    columns = -(-len(names) // 30)  # of the legend
    figure = new_figure(7.5 + 1.5 * columns, 7)
    axes = figure.add_subplot()
    palette = colormaps["tab10" if len(names) <= 10 else "gist_rainbow"]
    for k, name in enumerate(names):
        colour = palette(k) if len(names) <= 10 else palette(k / len(names))
        own = points[np.asarray(labels) == k]
        axes.scatter(own[:, 0], own[:, 1], s=4, color=colour, linewidths=0, label=name[:15])
    low, high = np.quantile(points, [0.002, 0.998], axis=0)  # a few far points stay outside
    margin = 0.03 * (high - low) + 1e-9
    axes.set(xlim=(low[0] - margin[0], high[0] + margin[0]))
    axes.set(ylim=(low[1] - margin[1], high[1] + margin[1]))
    axes.set(title=title, xlabel=f"{method}, first axis", ylabel="second axis")
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), markerscale=4, ncols=columns, fontsize=8
    )
    return figure
