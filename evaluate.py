"""Evaluation of trained models: 1-NN (supplement E.1), linear probe, OOD scores, files, pictures.

Images are uint8 (N, C, H, W) unless said, latents (N, D), labels (N,). Scores are in percent. A
model is in evaluation mode and has `represent(x)`, and where its `ModelKind` (models.py) says so
`energy(x)`, `posterior(x)` and `classify(x)`, of images x in [-1, 1]. Functions return a row of a
table, arrays, or a matplotlib figure. A new evaluation is a function here that returns a row, and a
command in cebm.py that prints it.
"""

from __future__ import annotations

import csv
import io
import textwrap
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from click import ClickException as EvaluationError  # one message on stderr, exit status 1
from torch import Tensor

import sampling  # not names of it: it may be half executed (see `lazy_import` in cebm.py)
from data import as_pixels, normalise, progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Encoding


@torch.no_grad()
def in_batches(function, images, device="cpu", size: int = 1000, label: str = "") -> Tensor:
    """`function` of images, `size` at a time: (N, ...) on `device`.

    `images` are those of `data.as_pixels`: uint8, or floats in [-1, 1], as arrays or tensors. A
    `label` asks for a bar on a terminal. EvaluationError if anything is not finite, since no score
    could be trusted.
    """
    device, images, outputs = torch.device(device), as_pixels(images), []
    parts = images.split(size)
    with progress(parts, len(parts), label) as shown:
        for part in shown:
            x = part.to(device)
            x = normalise(x) if x.dtype == torch.uint8 else x
            outputs.append(function(x.contiguous(memory_format=torch.channels_last)))
    values = torch.cat(outputs)
    if device.type == "mps":  # which has no float64, that 1-NN and whitening compute in
        values = values.cpu()
    wrong = (~values.reshape(len(values), -1).isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        first = ", ".join(map(str, wrong[:5])) + (", ..." if len(wrong) > 5 else "")
        raise EvaluationError(
            f"what the model says of {len(wrong)} of {len(images)} images is not finite (images "
            f"{first}): its weights have diverged"
        )
    return values


@contextmanager
def seeded(seed: int, device):
    """Seeds torch's random numbers of the CPU and of `device` inside, and restores them afterwards.

    Those of other devices stay as they are: a training may draw from them.
    """
    generators = torch.default_generator, sampling.default_generator(torch.device(device))
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(seed)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def latents(model, images, device="cpu") -> dict[str, np.ndarray]:
    """`mean` (N, D) from `represent`; `energy` (N,), the posterior's `std` (N, D) if the model has
    them.

    `images` are NumPy arrays or tensors as `data.as_pixels` describes; ValueError where they are of
    another size than the model's. Of a mixture `std` is that of the whole posterior, while `mean`
    may be one component's. A VAE's energy is drawn with a fixed seed.
    """
    device, pixels = torch.device(device), as_pixels(images)
    wanted = getattr(model, "image_shape", pixels.shape[1:])
    if tuple(pixels.shape[1:]) != tuple(wanted):
        hint = ". A single image needs a first axis: image[None]" if np.ndim(images) == 3 else ""
        raise ValueError(
            f"images of {tuple(pixels.shape[1:])} (channels, height, width): the model is for "
            f"{tuple(wanted)}{hint}"
        )
    shapes = {}  # of each column's rows

    def joined(x: Tensor) -> Tensor:
        columns = encode(model, x)
        shapes.update({name: values.shape[1:] for name, values in columns.items()})
        return torch.cat([values.reshape(len(x), -1) for values in columns.values()], dim=1)

    with seeded(0, device):
        values = in_batches(joined, pixels, device, label="encoding").cpu()
    parts = values.split([shape.numel() for shape in shapes.values()], dim=1)
    return {
        name: part.reshape(-1, *shape).contiguous().numpy()
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def encode(model, x: Tensor) -> dict[str, Tensor]:
    """`mean` (B, D), `energy` (B,) and `std` (B, D) of images, as far as a model has them.

    By the model's own `encode`, if there is one: it may be faster than one after the other.
    """
    if hasattr(model, "encode"):
        return model.encode(x)
    columns = {"mean": model.represent(x)}
    if hasattr(model, "energy"):
        columns["energy"] = model.energy(x)
    if hasattr(model, "posterior"):
        columns["std"] = model.posterior(x).variance.sqrt()
    return columns


# 1-NN


BLOCK = 64  # training vectors that `nearest` looks at a second time together


def nearest(train: Tensor, test: Tensor, floats: int = 2**24, label: str = "") -> Tensor:
    """For each test vector (M, D) the index of its nearest training vector (N, D) in L2: (M,).

    Ties go to the lower index. Exact for pixels, otherwise with an error of about 1e-15 |a|^2: a
    first look in float32 tells which blocks of training vectors can hold the nearest one, given the
    bound on float32's rounding, and only these are looked at in float64. About `floats` numbers are
    held at a time. A `label` asks for a bar on a terminal.
    """
    blocks = -(-len(train) // BLOCK)
    parts = test.split(max(1, floats // max(blocks, test.shape[1])))
    blocks_at_once = max(1, floats // (BLOCK * max(len(parts[0]), train.shape[1])))
    pieces = train.split(blocks_at_once * BLOCK)
    centre = train.mean(0, dtype=torch.float64)  # distances are the same, rounding is less
    nearest_of_parts = []
    with progress(pieces * len(parts), len(pieces) * len(parts), label) as shown:
        upcoming = iter(shown)  # all pieces for the first part, all for the second, ...
        for part in parts:
            bounds = [block_bounds(a, part, centre) for a in islice(upcoming, len(pieces))]
            low, high = (torch.cat(bound, 1) for bound in zip(*bounds, strict=True))
            # Not `<=`: where float32 overflows, bounds are NaN, and the block is looked at.
            candidates = ~(low > high.amin(1, keepdim=True))
            nearest_of_parts.append(nearest_of_blocks(train, part, candidates))
    return torch.cat(nearest_of_parts)


def block_bounds(train: Tensor, test: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper bounds (M, blocks) on |a|^2 - 2 ab, minimised over each block of a (N, D).

    b are (M, D), both less `centre`, and computed in float32. The term |b|^2, the same for all a,
    is left out. A sum of D products in any order is off by at most D u |a| |b|, u = 2^-24; eight
    more roundings are allowed for. (Torch's default; with TF32 switched on the bounds do not hold.)
    """
    a, b = ((vectors - centre).float() for vectors in (train, test))
    squares = a.square().sum(1)
    with torch.autocast(a.device.type, enabled=False):
        values = torch.addmm(squares, b, a.T, alpha=-2)
    short = -len(a) % BLOCK
    least = F.pad(values, (0, short), value=torch.inf).view(len(b), -1, BLOCK).amin(2)
    largest = F.pad(squares, (0, short)).view(-1, BLOCK).amax(1)
    unit = (a.shape[1] + 8) * 2**-24
    smallest = torch.finfo(torch.float32).tiny * a.shape[1]  # where products vanish
    error = smallest + unit * (largest + 2 * torch.outer(b.norm(dim=1), largest.sqrt()))
    return least - error, least + error


def nearest_of_blocks(train: Tensor, test: Tensor, candidates: Tensor) -> Tensor:
    """As `nearest` in float64, for each test vector within its `candidates` (M, blocks), a mask."""
    least = torch.full((len(test),), torch.inf, dtype=torch.float64, device=test.device)
    index = torch.zeros_like(least, dtype=torch.long)
    for i, (block, chosen) in enumerate(zip(train.split(BLOCK), candidates.T, strict=True)):
        rows = chosen.nonzero()[:, 0]
        if not len(rows):
            continue
        # Not centred: products of whole pixels are exact, so that ties stay ties.
        a, b = block.double(), test[rows].double()
        value, place = torch.addmm(a.square().sum(1), b, a.T, alpha=-2).min(1)
        nearer = value < least[rows]
        rows = rows[nearer]
        least[rows] = value[nearer]
        index[rows] = i * BLOCK + place[nearer]
    return index


def whiten(train: Tensor, test: Tensor, damping: float = 0.03) -> tuple[Tensor, Tensor]:
    """Latents (N, D), (M, D) along the principal directions of `train`, brought to one scale.

    They are float64 and not centred. Each direction is divided by its singular value + `damping`
    times the largest one, so that directions that hardly vary are not blown up.
    """
    _, s, v = torch.linalg.svd((train - train.mean(0)).double(), full_matrices=False)
    scale = v.T / (s + damping * s[0] + 1e-30)
    return train.double() @ scale, test.double() @ scale


WHITENED = {"latent": "whitened", "untrained": "untrained whitened"}  # columns of `knn_row`


def knn_row(model, untrained, train, test, classes: int, device) -> dict[str, object]:
    """Accuracy of exact 1-NN on `latent` vectors, on those of the `untrained` network, on pixels.

    Latents are taken as they are and `whitened`. `train` and `test` are images and labels.
    `confusion`, K lists of K counts, is that of the latents as they are: rows are true and columns
    predicted classes.
    """
    (images, labels), (test_images, test_labels) = train, test
    row = {}
    for name, network in ("latent", model), ("untrained", untrained):
        a, b = (
            in_batches(network.represent, x, device, label=f"encoding, {name}")
            for x in (images, test_images)
        )
        predicted = labels[nearest(a, b, label=f"1-NN, {name}").cpu()]
        row[name] = percent_equal(predicted, test_labels)
        if name == "latent":
            counts = torch.bincount(test_labels * classes + predicted, minlength=classes**2)
            row["confusion"] = counts.view(classes, classes).tolist()
        whitened = nearest(*whiten(a, b), label=f"1-NN, {name}, whitened").cpu()
        row[WHITENED[name]] = percent_equal(labels[whitened], test_labels)
    place = "cpu" if torch.device(device).type == "mps" else device
    a, b = (x.flatten(1).to(place) for x in (images, test_images))
    row["pixels"] = percent_equal(labels[nearest(a, b, label="1-NN, pixels").cpu()], test_labels)
    return row


def advice_on_latents(row: dict) -> str | None:
    """Advice if pixels or the untrained network do better than the latents in a `knn_row`."""
    better = [name for name in ("untrained", "pixels") if row["latent"] < row[name]]
    if not better:
        return None
    whitened = "Whitened latents are better neighbours. " if row["whitened"] > row["latent"] else ""
    return (
        f"The latents are worse neighbours than {' and '.join(better)}. {whitened}1-NN falls "
        "before it rises: see the learning curve, and whether more updates help (docs/recipes.md)"
    )


def accuracy(model, test, device) -> float:
    """A classifier's accuracy on `test`, images and labels."""
    return percent_equal(in_batches(model.classify, test[0], device).cpu(), test[1])


def percent_equal(a: Tensor, b: Tensor) -> float:
    return round(100 * (a == b).double().mean().item(), 2)


# Linear probe


def probe(train, train_y, test, test_y, classes: int, per_class: int | None, draws: int = 10):
    """Percent of test latents (M, D) that logistic regression on latents (N, D) gets right.

    It is fitted to `per_class` labels per class, drawn `draws` times, or to all of them once: mean
    and standard deviation. The penalty is scikit-learn's default, half the squared weights.
    """
    from sklearn.linear_model import LogisticRegression

    if classes == 1:
        return 100.0, 0.0
    scores = []
    for draw in range(draws if per_class else 1):
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(draw))
        drawn = [order[train_y[order] == label] for label in range(classes)]
        chosen = torch.cat([own[:per_class] for own in drawn])  # all of them if None
        regression = LogisticRegression(C=1.0, tol=1e-6, max_iter=10_000)
        regression.fit(train[chosen].double().numpy(), train_y[chosen].numpy())
        scores.append(100 * regression.score(test.double().numpy(), test_y.numpy()))
    return float(np.mean(scores)), float(np.std(scores))


def probe_row(model, train, test, classes: int, device) -> dict[str, float]:
    """`probe` with 1, 10, 100 (if there are as many) and all labels per class, and so `scaled`.

    Scaled latents are centred and divided by one number, so that their mean variance is 1; the
    penalty would otherwise weigh more on small latents.
    """
    a, b = (
        in_batches(model.represent, images, device, label="encoding").cpu()
        for images, _ in (train, test)
    )
    mean, scale = a.mean(0), a.var(0).mean().sqrt().clamp(min=1e-30)
    kinds = {"": (a, b), " scaled": ((a - mean) / scale, (b - mean) / scale)}
    fewest, row = train[1].bincount().min(), {}
    fits = [(n, kind) for n in (1, 10, 100) if n <= fewest for kind in kinds]
    fits += [(None, kind) for kind in kinds]
    with progress(fits, len(fits), "fitting") as shown:
        for count, kind in shown:
            a, b = kinds[kind]
            average, std = probe(a, train[1], b, test[1], classes, count)
            name = f"{count or 'all'}{kind}"
            row[name], row[f"{name} std"] = round(average, 2), round(std, 2)
    return row


# OOD scores


def density_scores(model, images: Tensor, device) -> dict[str, Tensor]:
    """Scores (N,) of images, higher for what is likelier: log p(x) + const, -|grad log p(x)|."""

    def energy_and_slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = model.energy(x.requires_grad_(True))
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return -torch.stack([energy.detach(), gradient.flatten(1).norm(dim=1)], 1)

    with seeded(0, device):
        scores = in_batches(energy_and_slope, images, device, 500, "scoring").cpu()
    return dict(zip(("log p", "gradient"), scores.T, strict=True))


def detection(inside: Tensor, outside: Tensor) -> dict[str, float]:
    """How well scores tell images of the model's data, `inside` (N,), from others (M,), in percent.

    AUROC: chance that a score of `inside` exceeds one of `outside`, ties half. AUPR: area under
    precision and recall (average precision), `inside` being what is to be found; by chance it is
    N / (N + M). FPR95: share of `outside` that is let in by the threshold that lets in 95 % of
    `inside`.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    is_inside = np.repeat([1, 0], [len(inside), len(outside)])
    scores = torch.cat([inside, outside]).double().numpy()
    threshold = np.sort(scores[: len(inside)])[len(inside) // 20]
    figures = {
        "AUROC": roc_auc_score(is_inside, scores),
        "AUPR": average_precision_score(is_inside, scores),
        "FPR95": (scores[len(inside) :] >= threshold).mean(),
    }
    return {name: round(100 * float(value), 2) for name, value in figures.items()}


def ood_rows(model, own: Tensor, others: dict[str, Tensor], device) -> list[dict]:
    """`detection` of images `own` against each of `others`, uniform noise and constant images.

    A row for each and for both scores of `density_scores`. A constant image has one random level of
    grey, from black to white, in all its pixels and channels.
    """
    generator = torch.Generator().manual_seed(0)
    level = torch.randint(256, (len(own), 1, 1, 1), generator=generator)
    noise = torch.randint(256, own.shape, generator=generator).byte()
    built_in = [("uniform noise", noise), ("constant", level.expand(own.shape).byte())]
    inside, rows = density_scores(model, own, device), []
    for name, images in [*others.items(), *built_in]:
        outside = density_scores(model, images, device)
        for score in inside:
            figures = detection(inside[score], outside[score])
            rows.append({"against": name, "score": score, **figures})
    return rows


def plane(points: np.ndarray) -> tuple[np.ndarray, str]:
    """Latents (N, D) in two dimensions (N, 2) and the method: UMAP if it is installed, else PCA."""
    try:
        from umap import UMAP

        return UMAP(random_state=0).fit_transform(points), "UMAP"
    except ImportError as error:  # not installed, another package named umap, a broken one
        reason = "umap-learn is not installed" if error.name == "umap" else str(error)
    from sklearn.decomposition import PCA

    directions = min(2, *points.shape)
    projected = PCA(directions, svd_solver="full").fit_transform(points)
    return np.pad(projected, ((0, 0), (0, 2 - directions))), f"PCA ({reason})"


# Files and pictures

PICTURES = (".png", ".jpg", ".pdf", ".svg")  # endings of a picture's name


def as_array(values) -> np.ndarray:
    """A column as an array: words as they are, bytes of file names that are no letters escaped."""
    if len(values) and isinstance(values[0], str):
        values = [printable(value) for value in values]
    return np.asarray(values)


def csv_bytes(arrays: dict[str, np.ndarray]) -> bytes:
    """Arrays as the content of a .csv file, a row an image: `mean` (N, D) as mean_0, mean_1, ...

    Beside the numbers of `labels` stand their names, if there are `classes`.
    """
    arrays = dict(arrays)
    if "classes" in arrays:
        arrays["class"] = arrays.pop("classes")[arrays["labels"]]
    columns = {}
    for name in sorted(arrays, key=lambda name: arrays[name].ndim):  # vectors last
        if arrays[name].ndim == 1:
            columns[name] = arrays[name]
        else:
            columns |= {f"{name}_{d}": column for d, column in enumerate(arrays[name].T)}
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


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


def printable(text: str) -> str:
    """Names of files may hold bytes that are no letters, which no font has."""
    return text.encode("utf-8", "backslashreplace").decode()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches, 100 pixels each, without a window."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=100, layout="constrained")


def grid_figure(images: Tensor, columns: int | None = None, caption: str = "") -> Figure:
    """Images (N, C, H, W), floats in [-1, 1] and clipped to it, in a grid with a caption below.

    Pixels are enlarged by a whole factor, until the shorter side has 600 pixels or the longer one
    would exceed 2,400. `columns` None gives a nearly square grid.
    """
    from matplotlib.figure import Figure

    sheet = arrange(images, columns or round(len(images) ** 0.5))
    scale = max(1, min(-(-600 // min(sheet.shape[:2])), 2400 // max(sheet.shape[:2])))
    height, width = (scale * side for side in sheet.shape[:2])
    lines = textwrap.wrap(
        printable(caption), (width - 24) // 8
    )  # letters of 9 points are up to 8 pixels wide
    below = 18 * len(lines) + 8 if lines else 0
    figure = Figure((width / 100, (height + below) / 100), dpi=100)
    axes = figure.add_axes((0, below / (height + below), 1, height / (height + below)))
    # Grey images as colours, since a colour map would round their values.
    colours = sheet if sheet.ndim == 3 else np.stack([sheet] * 3, axis=2)
    axes.imshow(colours, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    place = {"ha": "center", "va": "center", "fontsize": 9, "parse_math": False}
    figure.text(0.5, below / 2 / (height + below), "\n".join(lines), **place)
    return figure


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
    """Counts (K, K), rows true and columns predicted, coloured by their share of the true class.

    With more than `most` classes only those with the most errors are shown, and the title says so.
    """
    counts = np.asarray(counts)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    if len(counts) > most:
        errors = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        shown = np.sort(np.argsort(-errors, kind="stable")[:most])
        title += f"\nthe {most} of {len(counts)} classes with most errors"
        counts, share = (table[np.ix_(shown, shown)] for table in (counts, share))
        names = [names[k] for k in shown]
    side = max(5.5, 0.62 * len(names)) if len(names) <= 20 else 12.0
    figure = new_figure(side + 1.5, side)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.046)
    small = 10 if len(names) <= 20 else 7
    places = range(len(names))
    plain = {"fontsize": small, "parse_math": False}  # a dollar sign is a dollar sign
    shown_names = [printable(name)[:15] for name in names]
    axes.set_xticks(places, shown_names, rotation=90, **plain)
    axes.set_yticks(places, shown_names, **plain)
    axes.set_title(printable(title), parse_math=False)
    axes.set(xlabel="predicted", ylabel="true")
    if len(names) <= 20:
        for (i, j), count in np.ndenumerate(counts):
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(j, i, count, ha="center", va="center", color=colour, fontsize=8)
    return figure


def map_figure(points: np.ndarray, labels, names: list[str], title: str, method: str) -> Figure:
    """Points (N, 2) in the colours of their classes, axes labelled with the projection `method`.

    The legend names 90 classes at most.
    """
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    if len(names) <= 10:
        palette = [colormaps["tab10"](k) for k in range(len(names))]
    else:
        palette = [colormaps["gist_rainbow"](k / len(names)) for k in range(len(names))]
    columns = min(3, -(-len(names) // 30))  # of the legend
    figure = new_figure(7.5 + 1.5 * columns, 7)
    axes = figure.add_subplot()
    axes.scatter(*points.T, s=4, c=[palette[k] for k in np.asarray(labels)], linewidths=0)
    # The 0.4 % of points that are farthest out may lie outside.
    for (low, high), limit in zip(
        np.quantile(points, [0.002, 0.998], axis=0).T, (axes.set_xlim, axes.set_ylim), strict=True
    ):
        margin = 0.03 * (high - low) + 1e-9
        limit(low - margin, high + margin)
    axes.set_title("\n".join(textwrap.wrap(printable(title), 80)), parse_math=False)
    axes.set_xlabel(f"{method}, first axis", parse_math=False)
    axes.set_ylabel("second axis")
    # A space before each name, since matplotlib leaves out those that begin with an underscore.
    entries = [
        Line2D([], [], marker="o", linestyle="", color=colour, label=f" {printable(name)[:15]}")
        for colour, name in zip(palette[:90], names, strict=False)
    ]
    if not any(names):
        return figure
    place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)}
    legend = axes.legend(handles=entries, ncols=columns, fontsize=8, **place)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


PANELS = {  # of curves_figure: title -> columns of the log, with how each line is drawn
    "energy": {"energy_data": "-", "energy_chains": "--"},
    "loss": {"loss": "-"},
    "gap of energies": {"gap": "-"},
    "concentration of latents": {"concentration": "-"},
    "pixels of chains": {"pixel_min": "-", "pixel_max": "-"},
    "learning rate": {"rate": "-"},
    "1-NN, percent": {
        "knn": "-",
        "knn_whitened": "-.",
        "knn_untrained": ":",
        "knn_pixels": "--",
    },
}
CURVE_NAMES = {
    "energy_data": "data",
    "energy_chains": "chains",
    "knn": "latent",
    "knn_whitened": "whitened",
    "knn_untrained": "untrained",
    "knn_pixels": "pixels",
}


def curves_figure(runs: dict[str, dict[str, list[float]]]) -> Figure:
    """Learning curves of runs over each other, a panel a kind; vertical lines are rollbacks.

    A run is columns of its log (`update`, `rollbacks` and some of `PANELS`), NaN where it has no
    value. The loss is shown where a run has no energies.
    """
    has = [{k for k, v in columns.items() if np.isfinite(v).any()} for columns in runs.values()]
    panels = {
        title: lines for title, lines in PANELS.items() if any(own & set(lines) for own in has)
    }
    if all("energy_data" in own for own in has):
        panels.pop("loss", None)
    figure = new_figure(12, 3 * -(-len(panels) // 2))
    palette = [f"C{i % 10}" for i in range(len(runs))]
    grid = list(figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, (title, lines) in zip(grid, panels.items(), strict=False):
        for colour, columns in zip(palette, runs.values(), strict=True):
            draw_curves(axes, columns, lines, colour)
        axes.set_title(title, fontsize=10)
        if len(lines) > 1 and title != "pixels of chains":
            axes.legend(
                handles=[axes.plot([], [], how, color="grey")[0] for how in lines.values()],
                labels=[CURVE_NAMES[name] for name in lines],
                fontsize=8,
            )
    if len(runs) > 1:
        handles = [axes.plot([], [], color=colour)[0] for colour in palette]
        legend = figure.legend(handles, map(printable, runs), loc="outside lower center", ncols=2)
        for text in legend.get_texts():
            text.set_parse_math(False)
    else:
        figure.suptitle(printable(next(iter(runs))), parse_math=False)
    return figure


def draw_curves(axes, columns: dict[str, list[float]], lines: dict[str, str], colour) -> None:
    """Lines of one run in one panel, and where it was rolled back."""
    update, rollbacks = np.asarray(columns["update"]), np.asarray(columns["rollbacks"])
    for name, how in lines.items():
        if name in columns:
            value = np.asarray(columns[name])
            shown = ~np.isnan(value)
            marker = "." if shown.sum() < 30 else None  # a single point has no line
            axes.plot(update[shown], value[shown], how, color=colour, linewidth=1, marker=marker)
    for place in update[np.diff(rollbacks, prepend=0) > 0]:
        axes.axvline(place, color=colour, linestyle=":", linewidth=0.8)
