"""1-NN, latent export and pictures: functions on tensors; images uint8 or in [-1, 1] as said."""

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
    """What `export` writes: NumPy arrays mean and std (N, D), energy (N,)."""
    def columns(x: Tensor) -> Tensor:
        posterior = model.posterior(x)
        return torch.cat([posterior.mean, posterior.stddev, model.energy(x)[:, None]], 1)

    out = in_batches(columns, images, device).cpu().numpy()
    dim = out.shape[1] // 2
    return {"mean": out[:, :dim], "std": out[:, dim:-1], "energy": out[:, -1]}


def nearest(train: Tensor, test: Tensor, floats: int = 2**24) -> Tensor:
    """Index (M,) of the training vector (N, D) nearest to each test vector (M, D) in L2.

    Exact: distances in float32 by one matrix product a chunk of at most `floats` numbers; whatever
    its rounding leaves undecided is decided in float64, ties to the lowest index.
    """
    centre = train.mean(0)
    a, b = train - centre, test - centre
    squares, lengths = (a * a).sum(1), a.norm(dim=1)
    # Rounding of |a|^2 - 2ab: a sum of D products of at most |a| |b|, each off by an ulp or two.
    unit = torch.finfo(a.dtype).eps * (a.shape[1] + 4)
    found = []
    for rows in b.split(max(1, floats // len(a))):
        scores = torch.addmm(squares, rows, a.T, alpha=-2)  # (rows, N)
        index = scores.argmin(1)
        reach = unit * (lengths + rows.norm(dim=1)[:, None]).square()
        close = scores - reach <= (scores + reach).amin(1, keepdim=True)
        for row in (close.sum(1) > 1).nonzero()[:, 0].tolist():
            candidates = close[row].nonzero()[:, 0]
            exact = train[candidates].double() - test[sum(map(len, found)) + row].double()
            index[row] = candidates[exact.square().sum(1).argmin()]
        found.append(index)
    return torch.cat(found)


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
