"""1-NN, probe, AUROC, export and pictures: functions on tensors, images uint8 unless said."""

import io

import torch
from torch import Tensor

from data import normalise


@torch.no_grad()
def in_batches(function, images: Tensor, device, size: int = 1000) -> Tensor:
    """`function` of normalised uint8 images (N, C, H, W), a batch at a time -> (N, ...)."""
    outputs = []
    for part in images.split(size):
        x = normalise(part.to(device)).contiguous(memory_format=torch.channels_last)
        outputs.append(function(x))
    return torch.cat(outputs)


def latents(model, images: Tensor, device) -> Tensor:
    """`represent` of uint8 images (N, C, H, W) -> (N, D); without a model, the pixels."""
    if model is None:
        return images.flatten(1).to(device).float()
    return in_batches(model.represent, images, device)


def describe(model, images: Tensor, device) -> dict:
    """What `export` writes, as NumPy arrays: mean (N, D) and, where the model has them, std, energy.

    `mean` is `represent`; std is the posterior's.
    """
    columns = {"mean": model.represent}
    if hasattr(model, "posterior"):
        columns["std"] = lambda x: model.posterior(x).stddev
    if hasattr(model, "energy"):
        columns["energy"] = model.energy
    return {k: in_batches(f, images, device).cpu().numpy() for k, f in columns.items()}


def drawn(model, count: int, seed: int, refine=None) -> Tensor | None:
    """`count` images of the model's generator, None without one; the random state stays as it was.

    `refine` moves the latents (count, D) before the generator sees them.
    """
    if not hasattr(model, "generate"):
        return None
    training, device = model.training, next(model.parameters()).device
    model.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        z = model.family.sample(count).detach()
        z = refine(z) if refine else z
        with torch.no_grad():
            images = model.decode(z)
    model.train(training)
    return images


def nearest(train: Tensor, test: Tensor, floats: int = 2**26) -> Tensor:
    """Index (M,) of the training vector (N, D) nearest to each test vector (M, D) in L2.

    Exact: distances in float32 by one matrix product a chunk of at most `floats` numbers; whatever
    its rounding leaves undecided is decided in float64, ties to the lowest index.
    """
    centre = train.mean(0)
    a, b = train - centre, test - centre
    squares = (a * a).sum(1)
    # Rounding of |a|^2 - 2ab: a sum of D products of at most |a| |b|, each off by an ulp or two.
    unit = torch.finfo(a.dtype).eps * (a.shape[1] + 4)
    found = []
    for rows in b.split(max(1, floats // len(a))):
        scores = torch.addmm(squares, rows, a.T, alpha=-2)  # (rows, N)
        best, index = scores.min(1)
        reach = unit * (squares.max().sqrt() + rows.norm(dim=1)).square()
        close = scores <= (best + 2 * reach)[:, None]
        for row in (close.sum(1) > 1).nonzero()[:, 0].tolist():
            candidates = close[row].nonzero()[:, 0]
            exact = train[candidates].double() - test[sum(map(len, found)) + row].double()
            index[row] = candidates[exact.square().sum(1).argmin()]
        found.append(index)
    return torch.cat(found)


def logistic_regression(x: Tensor, y: Tensor, classes: int, penalty: float = 1.0):
    """Softmax regression of y (N,) on x (N, D): weights (D + 1, classes), the last row the bias.

    Minimises the summed cross-entropy + penalty / 2 |weights without bias|^2 by LBFGS, in float64.
    """
    x = torch.cat([x.double(), torch.ones(len(x), 1, device=x.device, dtype=torch.float64)], 1)
    w = torch.zeros(x.shape[1], classes, device=x.device, dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-7 * len(x), history_size=20,
                              tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = torch.nn.functional.cross_entropy(x @ w, y, reduction="sum")
        loss = loss + penalty / 2 * w[:-1].square().sum()
        loss.backward()
        return loss

    lbfgs.step(closure)
    return w.detach()


def probe(train, train_y, test, test_y, classes: int, per_class: int | None, draws: int = 10):
    """Percent of test latents (M, D) that logistic regression on latents (N, D) gets right.

    Fitted to `per_class` labels a class, drawn `draws` times, or to all of them once: mean, std.
    """
    scores = []
    for draw in range(draws if per_class else 1):
        chosen = torch.arange(len(train_y))
        if per_class:
            order = torch.randperm(len(train_y), generator=torch.Generator().manual_seed(draw))
            chosen = torch.cat([order[train_y[order] == k][:per_class] for k in range(classes)])
        w = logistic_regression(train[chosen], train_y[chosen], classes)
        predicted = (test.double() @ w[:-1] + w[-1]).argmax(1)
        scores.append(100 * (predicted == test_y).double().mean().item())
    scores = torch.tensor(scores)
    return scores.mean().item(), scores.std(correction=0).item()


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Chance in percent that a score of `inside` (N,) exceeds one of `outside` (M,), ties half."""
    ranked = outside.double().sort()[0]
    below, up_to = (torch.searchsorted(ranked, inside.double(), right=r) for r in (False, True))
    return 100 * (below + up_to).double().mean().item() / (2 * len(ranked))


def density_scores(model, images: Tensor, device) -> dict[str, Tensor]:
    """Scores of uint8 images, higher for what is likelier: log p(x) + const and -|grad log p(x)|."""
    scores = []
    with torch.enable_grad():
        for part in images.split(500):
            x = normalise(part.to(device)).requires_grad_(True)
            energy = model.energy(x)
            (gradient,) = torch.autograd.grad(energy.sum(), x)
            scores.append(torch.stack([-energy.detach(), -gradient.flatten(1).norm(dim=1)]))
    logp, slope = torch.cat(scores, 1)
    return {"logp": logp, "gradient": slope}


def plane(latents: Tensor) -> tuple[Tensor, str]:
    """Latents (N, D) in two dimensions (N, 2) by UMAP if `umap-learn` is installed, else by PCA."""
    try:
        import umap
    except ImportError:
        centred = latents.double() - latents.double().mean(0)
        axes = torch.linalg.eigh(centred.T @ centred)[1][:, -2:].flip(1)
        return centred @ axes, "PCA"
    return torch.tensor(umap.UMAP(random_state=0).fit_transform(latents.numpy())), "UMAP"


def map_png(points: Tensor, labels: Tensor, names: list[str], title: str, side: int = 700) -> bytes:
    """Points (N, 2) in class colours, with a legend of the classes and a title."""
    import colorsys

    from PIL import Image, ImageDraw

    low, high = (torch.quantile(points.double(), q, dim=0) for q in (0.002, 0.998))
    where = ((points - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).mul(side - 40).add(20)
    colours = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / len(names), 0.8, 0.5 + k % 2 / 3))
               for k in range(len(names))]
    picture = Image.new("RGB", (side + 120, side + 30), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((20, 8), title, fill="black")
    for (x, y), label in zip(where.round().long().tolist(), labels.tolist(), strict=True):
        draw.rectangle((x - 1, y + 29, x + 1, y + 31), fill=colours[label])
    for k, name in enumerate(names):
        draw.rectangle((side + 4, 40 + 18 * k, side + 14, 50 + 18 * k), fill=colours[k])
        draw.text((side + 20, 40 + 18 * k), name[:14], fill="black")
    return png(picture)


def confusion(true: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Counts (classes, classes), rows true, columns predicted."""
    return torch.bincount(true * classes + predicted, minlength=classes**2).view(classes, classes)


def confusion_text(counts: list[list[int]], names: list[str]) -> str:
    """The confusion matrix for a terminal."""
    width = max(len(str(max(map(max, counts)))), max(len(n[:5]) for n in names)) + 1
    lines = [" " * 12 + "".join(f"{n[:5]:>{width}}" for n in names)]
    lines += [f"{n[:11]:12}" + "".join(f"{c:{width}}" for c in row)
              for n, row in zip(names, counts, strict=True)]
    return "\n".join(lines)


def table(rows: list[dict], markdown: bool = False) -> str:
    """Rows with the same keys as aligned text or as Markdown."""
    cells = [list(rows[0])] + [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in r.values()]
                               for r in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
             for row in cells]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in cells]
        lines.insert(1, "|---" * len(widths) + "|")
    return "\n".join(lines)


def png(picture) -> bytes:
    """A Pillow image as the content of a PNG file."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def grid_png(images: Tensor, columns: int | None = None) -> bytes:
    """Images (N, C, H, W) clipped to [-1, 1] as a grid of `columns` (near square if None)."""
    from PIL import Image
    from torchvision.utils import make_grid

    columns = columns or max(1, round(len(images) ** 0.5))
    grid = make_grid(images.float().cpu().clamp(-1, 1).add(1).div(2), nrow=columns, pad_value=0.5)
    return png(Image.fromarray(grid.mul(255).round().byte().permute(1, 2, 0).numpy()))


def confusion_png(counts: list[list[int]], names: list[str], cell: int = 44) -> bytes:
    """The confusion matrix as a picture, rows true and columns predicted, shaded by row share."""
    from PIL import Image, ImageDraw

    margin, size = 90, cell * len(names)
    picture = Image.new("RGB", (margin + size, margin + size), "white")
    draw = ImageDraw.Draw(picture)
    for i, row in enumerate(counts):
        draw.text((4, margin + i * cell + cell // 3), names[i][:14], fill="black")
        draw.text((margin + i * cell + 3, margin - 14 - 12 * (i % 2)), names[i][:14], fill="black")
        for j, count in enumerate(row):
            shade = 255 - round(255 * count / max(1, sum(row)))
            left, top = margin + j * cell, margin + i * cell
            draw.rectangle((left, top, left + cell, top + cell), fill=(shade, shade, 255))
            ink = "white" if shade < 128 else "black"
            draw.text((left + 6, top + cell // 3), str(count), fill=ink)
    draw.text((4, 4), "rows: true class, columns: predicted", fill="black")
    return png(picture)
