"""1-NN, probe, AUROC and pictures: functions on tensors, images uint8 unless said."""

import io
from contextlib import contextmanager

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data import normalise


@torch.no_grad()
def in_batches(function, images: Tensor, device, size: int = 1000) -> Tensor:
    """`function` of normalised uint8 images (N, C, H, W), a batch at a time -> (N, ...)."""
    parts = (normalise(part.to(device)) for part in images.split(size))
    return torch.cat([function(x.contiguous(memory_format=torch.channels_last)) for x in parts])


@contextmanager
def seeded(seed: int, device):
    """torch's random numbers start from `seed` inside and are as before after it."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def nearest(train: Tensor, test: Tensor, floats: int = 2**24) -> Tensor:
    """Index (M,) of the training vector (N, D) nearest in L2 to each of (M, D), the first if equal.
    |a|^2 - 2ab in float64, `floats` numbers at a time: exact for pixels, to 1e-15 of |a|^2 else."""
    test = test.double()
    least = torch.full_like(test[:, 0], torch.inf)
    index, size = torch.zeros_like(least, dtype=torch.long), max(1, floats // max(test.shape))
    for i, part in enumerate(train.split(size)):
        a = part.double()
        value, row = torch.addmm(a.square().sum(1), test, a.T, alpha=-2).min(1)
        index = torch.where(value < least, row + i * size, index)
        least = torch.minimum(least, value)
    return index


def whiten(train: Tensor, test: Tensor, damping: float = 0.03) -> tuple[Tensor, Tensor]:
    """Latents (N, D), (M, D) along the principal directions of `train`, each divided by its
    deviation + `damping` of the largest one."""
    _, s, v = torch.linalg.svd((train - train.mean(0)).double(), full_matrices=False)
    return tuple(x.double() @ (v.T / (s + damping * s[0] + 1e-30)) for x in (train, test))


def logistic_regression(x: Tensor, y: Tensor, classes: int, penalty: float = 1.0) -> Tensor:
    """Softmax regression of y (N,) on x (N, D): weights (D + 1, classes), the last row the bias,
    of the least summed cross-entropy + penalty / 2 |weights but for the bias|^2, by LBFGS."""
    x = torch.nn.functional.pad(x.double(), (0, 1), value=1.0)
    w = torch.zeros(x.shape[1], classes, device=x.device, dtype=x.dtype, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [w],
        max_iter=1000,
        max_eval=2000,
        tolerance_grad=1e-6,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        loss = torch.nn.functional.cross_entropy(x @ w, y, reduction="sum")
        loss = (loss + penalty / 2 * w[:-1].square().sum()) / len(x)
        (w.grad,) = torch.autograd.grad(loss, w)
        return loss

    lbfgs.step(closure)
    return w.detach()


def probe(train, train_y, test, test_y, classes: int, per_class: int | None, draws: int = 10):
    """Percent of test latents (M, D) that logistic regression on latents (N, D) gets right.
    Fitted to `per_class` labels a class, drawn `draws` times, or to all of them once: mean, std."""
    scores = []
    for draw in range(draws if per_class else 1):
        order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(draw))
        chosen = torch.cat([order[train_y[order] == k][:per_class] for k in range(classes)])
        w = logistic_regression(train[chosen], train_y[chosen], classes)
        scores.append(100 * ((test.double() @ w[:-1] + w[-1]).argmax(1) == test_y).double().mean())
    return torch.stack(scores).mean().item(), torch.stack(scores).std(correction=0).item()


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance in percent that a score of `inside` (N,) exceeds one of `outside` (M,), ties half."""
    ranked = outside.double().sort()[0]
    below, up_to = (torch.searchsorted(ranked, inside.double(), right=r) for r in (False, True))
    return 50 * (below + up_to).double().mean().item() / len(ranked)


def density_scores(model, images: Tensor, device) -> dict[str, Tensor]:
    """Scores (N,) of images, higher for what is likelier: log p(x) + const, -|grad log p(x)|."""

    def pair(x: Tensor) -> Tensor:
        with torch.enable_grad():
            energy = model.energy(x.requires_grad_(True))
            (gradient,) = torch.autograd.grad(energy.sum(), x)
        return -torch.stack([energy.detach(), gradient.flatten(1).norm(dim=1)], 1)

    with seeded(0, device):
        return dict(zip(("logp", "gradient"), in_batches(pair, images, device, 500).T, strict=True))


def plane(latents: Tensor) -> tuple[Tensor, str]:
    """Latents (N, D) in two dimensions (N, 2) by UMAP if `umap-learn` is installed, else by PCA."""
    try:
        import umap
    except ImportError:
        u, scale, _ = torch.linalg.svd(latents - latents.mean(0), full_matrices=False)
        return torch.nn.functional.pad(u * scale, (0, 1))[:, :2], "PCA"
    return torch.tensor(umap.UMAP(random_state=0).fit_transform(latents.numpy())), "UMAP"


def table(rows: list[dict], markdown: bool = False) -> str:
    """Rows as aligned text or as Markdown, without lists; what a row lacks is "-"."""
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if type(v) is not list))
    cells = [columns] + [
        [
            f"{v:.2f}" if isinstance(v, float) else str(v)
            for v in (row.get(key, "-") for key in columns)
        ]
        for row in rows
    ]
    if markdown:
        cells.insert(1, ["---"] * len(columns))
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def png(picture) -> bytes:
    """A Pillow image as the content of a PNG file."""
    picture.save(content := io.BytesIO(), format="PNG")
    return content.getvalue()


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """Images (N, C, H, W) clipped to [-1, 1] as a grid of `columns` (near square if None)."""
    from torchvision.utils import make_grid

    grid = make_grid(images.float().cpu().clamp(-1, 1), columns or round(len(images) ** 0.5))
    return png(Image.fromarray(grid.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy()))


def confusion_png(counts: Tensor, names: list[str], cell: int = 60) -> bytes:
    """Counts (K, K), rows true and columns predicted, as a picture shaded by share of the row."""
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    draw = ImageDraw.Draw(picture := Image.new("L", (cell * (len(names) + 1),) * 2, 255))
    for i, (name, row) in enumerate(zip(["true", *names], [names, *counts.tolist()], strict=True)):
        for j, text in enumerate([name, *row]):
            shade = 255 - int(255 * share[i - 1, j - 1]) if i and j else 255
            draw.rectangle((cell * j, cell * i, cell * (j + 1), cell * (i + 1)), fill=shade)
            draw.text((cell * j + 4, cell * i + cell // 3), str(text)[:9], fill=255 * (shade < 128))
    return png(picture)


def map_png(points: Tensor, labels: Tensor, names: list[str], title: str, side: int = 700) -> bytes:
    """Points (N, 2) in class colours, with a legend of the classes and a title."""
    low, high = (torch.quantile(points.double(), q, dim=0) for q in (0.002, 0.998))
    places = ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(side - 40).add(20)
    colours = [f"hsv({360 * k // len(names)}, 85%, {90 - k % 2 * 35}%)" for k in range(len(names))]
    height = max(side + 30, 40 + 18 * len(names))
    draw = ImageDraw.Draw(picture := Image.new("RGB", (side + 120, height), "white"))
    draw.text((20, 8), title, fill="black")
    for (x, y), label in zip(places.tolist(), labels.tolist(), strict=True):
        draw.rectangle((x - 1, y + 29, x + 1, y + 31), fill=colours[label])
    for k, name in enumerate(names):
        draw.rectangle((side + 4, 40 + 18 * k, side + 14, 50 + 18 * k), fill=colours[k])
        draw.text((side + 20, 40 + 18 * k), name[:14], fill="black")
    return png(picture)
