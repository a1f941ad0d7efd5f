"""Images in memory as uint8 (N, C, H, W) and labels as int64 (N,).

`DATASETS` names what there is: four public sets through torchvision, a folder of the user's own,
and `glyphs`, digits drawn by code. To add one, write a reader (split, root, image shape) -> images,
labels, with labels from 0 on, and a line there and in configs.yaml.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from click import ClickException as DataError  # one message on stderr, exit status 1
from PIL import Image, ImageDraw
from torch import Tensor


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], the range of the models."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images of {images.dtype}: pixels have to be uint8, from 0 to 255")
    return images.float().div_(127.5).sub_(1)


def load(name: str, split: str, data_dir="data", image_shape=None, extra=False):
    """Images (N, C, H, W) uint8 and labels (N,) int64 of `split`, "train" or "test".

    `image_shape` (C, H, W) is by default the data set's own; a folder's images are scaled to it,
    those of other sets have to be of it. `extra` adds SVHN's third split to its training images.
    Raises DataError where files are missing or damaged or of another shape; it says what to do.
    """
    if name not in DATASETS or split not in ("train", "test"):
        raise ValueError(
            f"{name}, {split}: data sets are {', '.join(DATASETS)}, each train or test"
        )
    dataset = DATASETS[name]
    shape = tuple(image_shape or dataset.shape)
    images, labels = dataset.read(split, Path(data_dir), shape)
    if extra and split == "train" and "extra" in dataset.counts:
        more_images, more_labels = dataset.read("extra", Path(data_dir), shape)
        images, labels = torch.cat([images, more_images]), torch.cat([labels, more_labels])
    if images.shape[1:] != shape:
        found, wanted = ("x".join(map(str, sizes)) for sizes in (images.shape[1:], shape))
        raise DataError(
            f"{name} has images of {found} (channels x height x width), not {wanted}: "
            "choose other data, or train with --set data.image"
        )
    return images, labels


def class_names(name: str, data_dir: str, num_classes: int) -> list[str]:
    """What the labels stand for, in their order."""
    if DATASETS[name].classes is None:
        return sorted(path.name for path in (Path(data_dir) / "train").iterdir() if path.is_dir())
    return list(DATASETS[name].names) or [str(label) for label in range(num_classes)]


# Public sets


def read_torchvision(
    kind: str, counts: dict[str, int], split: str, root: Path, shape
) -> tuple[Tensor, Tensor]:
    """A split of torchvision's class `kind`, checked to hold counts[split] images."""
    data = open_torchvision(kind, split, root)
    images = torch.as_tensor(data.data)
    if images.dim() == 3:  # MNIST: (N, H, W)
        images = images[:, None]
    elif images.shape[3] == 3:  # CIFAR-10: (N, H, W, C)
        images = images.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(data.labels if hasattr(data, "labels") else data.targets).long()
    if len(images) != len(labels) or len(images) != counts[split]:
        raise DataError(
            f"{kind} ({split}) in {root} has {len(images)} images and {len(labels)} labels, not "
            f"{counts[split]}: delete its files to download them anew"
        )
    return images, labels


def open_torchvision(kind: str, split: str, root: Path):
    """Opens a data set of torchvision, downloading it if it is absent."""
    from torchvision import datasets

    which = {"split": split} if kind == "SVHN" else {"train": split == "train"}
    where = f"{kind} ({split}) in {root}"
    try:
        try:
            return getattr(datasets, kind)(root, download=False, **which)
        except RuntimeError:  # torchvision: "Dataset not found or corrupted"
            print(f"{where} is absent or incomplete: downloading", file=sys.stderr)
            return getattr(datasets, kind)(root, download=True, **which)
    except Exception as error:  # torchvision raises whatever its parsers and the network raise
        reason = str(error).partition("\n")[0] or repr(error)
        raise DataError(
            f"cannot read or download {where} ({reason}): check --data-dir and the network, or "
            "delete the damaged files"
        ) from error


# A folder of the user's own


def read_folder(split: str, root: Path, shape) -> tuple[Tensor, Tensor]:
    """Images of `root`/SPLIT/CLASS/, scaled to `shape`; labels are the classes' order by name."""
    from torchvision.datasets import ImageFolder

    try:
        found, train = ImageFolder(root / split), ImageFolder(root / "train")
    except OSError as error:  # no such folder, no classes, or a class without images
        raise DataError(
            f"{str(error).splitlines()[0]}. Images belong in {root}/train/CLASS/ and "
            f"{root}/test/CLASS/ (--data-dir {root})"
        ) from error
    if found.classes != train.classes:
        raise DataError(
            f"{root}: train has the classes {', '.join(train.classes)}, {split} has "
            f"{', '.join(found.classes)}; they have to be the same"
        )
    channels = 1 if shape[0] == 1 else 3
    height, width = shape[1:]
    images = torch.empty(len(found), channels, height, width, dtype=torch.uint8)
    for image, (path, _) in zip(images, found.samples, strict=True):
        pixels = read_image(path, channels, height, width)
        image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return images, torch.tensor(found.targets)


def read_image(path: str, channels: int, height: int, width: int) -> np.ndarray:
    """An image file scaled to uint8 (height, width, channels); DataError if it cannot be read."""
    try:
        with Image.open(path) as picture:
            if picture.mode[0] in "IF":  # Pillow would clip it to 255
                raise ValueError("more than 8 bits a pixel")
            picture = picture.convert("L" if channels == 1 else "RGB")
            pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR))
            return pixels.reshape(height, width, channels)
    except Exception as error:  # Pillow raises whatever the damage happens to provoke
        raise DataError(f"{path} cannot be read ({error}): replace or delete it") from error


# The embedded digits

# Ways to write each digit: x y pairs on a 100 x 100 sheet, y downwards, "|" lifts the pen.
GLYPH_STROKES = (
    ("50 10 27 25 20 50 27 77 50 90 73 77 80 50 72 23 50 10",),  # 0
    (
        "50 10 50 36 50 63 50 90",
        "34 30 52 10 51 50 50 90",
        "34 28 52 10 50 90 | 30 90 50 90 70 90",
    ),  # 1
    (
        "24 30 35 13 58 10 75 27 62 50 40 72 22 90 50 88 80 90",
        "24 28 50 10 74 28 58 58 32 84 24 80 34 74 56 88 80 84",
    ),  # 2
    ("24 18 50 10 73 24 64 42 44 48 68 55 77 73 52 91 22 82",),  # 3
    (
        "60 10 40 36 20 62 50 62 82 60 | 64 38 62 65 60 92",
        "25 10 24 50 48 54 74 50 | 74 10 73 50 70 92",
    ),  # 4
    ("76 12 36 12 32 46 56 42 77 60 68 85 42 92 22 82",),  # 5
    ("66 10 40 30 25 60 35 87 60 89 74 70 57 53 30 64",),  # 6
    (
        "20 14 50 13 80 12 62 45 45 90",
        "20 14 50 13 80 12 62 45 45 90 | 36 50 54 50 72 48",
    ),  # 7
    ("50 48 28 30 50 10 72 28 50 48 25 70 50 92 76 70 50 48",),  # 8
    (
        "72 30 50 11 29 28 45 49 70 38 72 30 69 60 60 92",
        "72 30 50 11 29 28 45 49 72 30 71 60 70 92",
    ),  # 9
)


def read_glyphs(split: str, root: Path, shape) -> tuple[Tensor, Tensor]:
    """The embedded digits; `root` and `shape` are unused."""
    images, labels = glyphs(split)
    return images.clone(), labels.clone()


@cache
def glyphs(split: str) -> tuple[Tensor, Tensor]:
    """10,000 training or 2,000 test digits (1, 28, 28), drawn from a fixed seed.

    Strokes are jittered, joined by cubic splines, slanted, turned, scaled, shifted, and inked with
    a pen of random width.
    """
    count, seed = {"train": (10_000, 0), "test": (2_000, 1)}[split]
    random = np.random.default_rng(seed)
    labels, images = np.arange(count) % 10, np.empty((count, 1, 28, 28), np.uint8)
    for i, label in enumerate(labels):
        ways = GLYPH_STROKES[label]
        images[i, 0] = draw_glyph(ways[i // 10 % len(ways)], random)
    order = random.permutation(count)
    return torch.tensor(images[order]), torch.tensor(labels[order])


def draw_glyph(strokes: str, random: np.random.Generator, scale: int = 4) -> Image.Image:
    """One digit of 28 x 28 pixels, drawn `scale` times as large and reduced."""
    slant, turn = random.uniform(-0.5, 0.5), random.uniform(-0.2, 0.2)
    size = random.uniform(15, 22) * random.uniform(0.75, 1, 2)  # width, height in pixels
    shear = np.array([[1, turn], [-slant - turn, 1]])  # of points (x, y) as rows
    centre = 14 + random.uniform(-1.5, 1.5, 2)
    pen_width = random.uniform(1.4, 3.4)
    sheet = Image.new("L", (28 * scale, 28 * scale))
    for stroke in strokes.split("|"):
        points = np.array(stroke.split(), float).reshape(-1, 2) / 100 - 0.5
        points += random.normal(0, 0.048, points.shape)
        curve = spline_matrix(len(points)) @ points
        path = scale * (curve * size @ shear + centre)
        ImageDraw.Draw(sheet).line(path.ravel().tolist(), 255, round(scale * pen_width))
    return sheet.reduce(scale)


@cache
def spline_matrix(points: int) -> np.ndarray:
    """The matrix from control points to points on the cubic spline through them, four a segment.

    The values of a spline are linear in its control points.
    """
    from scipy.interpolate import CubicSpline

    return CubicSpline(range(points), np.eye(points))(np.arange(0, points - 0.99, 0.25))


# The registry


@dataclass(frozen=True)
class Dataset:
    """How a data set is read and what it holds."""

    read: Callable[[str, Path, tuple], tuple[Tensor, Tensor]]  # (split, root, image shape)
    shape: tuple[int, int, int]  # (C, H, W); a folder's images are scaled to it
    classes: int | None  # how many; None: as many as the folder has
    names: tuple[str, ...] = ()  # of the classes; empty: their numbers
    counts: dict[str, int] = field(default_factory=dict)  # images of each split


def public(kind: str, shape, train: int, test: int, names: str = "", **more: int) -> Dataset:
    """A data set of ten classes that torchvision reads and downloads."""
    counts = {"train": train, "test": test, **more}
    read = partial(read_torchvision, kind, counts)
    return Dataset(read, shape, 10, tuple(names.split()), counts)


FASHION = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
OBJECTS = "airplane automobile bird cat deer dog frog horse ship truck"
DATASETS = {
    "mnist": public("MNIST", (1, 28, 28), 60_000, 10_000),
    "fmnist": public("FashionMNIST", (1, 28, 28), 60_000, 10_000, FASHION),
    "cifar10": public("CIFAR10", (3, 32, 32), 50_000, 10_000, OBJECTS),
    "svhn": public("SVHN", (3, 32, 32), 73_257, 26_032, extra=531_131),
    "glyphs": Dataset(read_glyphs, (1, 28, 28), 10, counts={"train": 10_000, "test": 2_000}),
    "folder": Dataset(read_folder, (1, 28, 28), None),
}
