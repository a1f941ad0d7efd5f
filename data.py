"""Images in memory as uint8 (N, C, H, W) and labels as int64 (N,): four data sets through
torchvision, a folder of the user's own, and `glyphs`, digits drawn by code."""

import sys
from functools import cache
from pathlib import Path

import numpy as np
import torch
import yaml
from click import ClickException as DataError  # one message on stderr, exit status 1
from PIL import Image, ImageDraw
from torch import Tensor

# torchvision's class, and the images of each split
PUBLIC = {
    "mnist": ("MNIST", {"train": 60_000, "test": 10_000}),
    "fmnist": ("FashionMNIST", {"train": 60_000, "test": 10_000}),
    "cifar10": ("CIFAR10", {"train": 50_000, "test": 10_000}),
    "svhn": ("SVHN", {"train": 73_257, "test": 26_032, "extra": 531_131}),
}
CLASSES = {
    "fmnist": "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot".split(),
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck".split(),
}


def class_names(name: str, data_dir: str, num_classes: int) -> list[str]:
    """What the labels stand for, in their order."""
    if name == "folder":
        return sorted(p.name for p in (Path(data_dir) / "train").iterdir() if p.is_dir())
    return CLASSES.get(name) or [str(k) for k in range(num_classes)]


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], the range of EBMs."""
    return images.float().div_(127.5).sub_(1)


def load(name: str, split: str, data_dir="data", image_shape=None, extra=False):
    """Images (N, C, H, W) uint8 and labels (N,) int64 of `split`, "train" or "test", or DataError.
    A folder's images are scaled to `image_shape` (C, H, W), others checked; `extra` adds SVHN's."""
    if name == "glyphs":
        images, labels = glyphs(split)
    elif name == "folder":
        images, labels = _folder(Path(data_dir), split, image_shape)
    else:
        own = images, labels = _public(name, split, data_dir)
        if extra and name == "svhn" and split == "train":
            images, labels = map(torch.cat, zip(own, _public(name, "extra", data_dir), strict=True))
    found, wanted = ("x".join(map(str, shape)) for shape in (images.shape[1:], image_shape or ()))
    if image_shape and found != wanted:
        raise DataError(
            f"{name} has images of {found} (channels x height x width), not {wanted}: "
            "choose other data, or train with --set data.image"
        )
    return images, labels


def _public(name: str, split: str, data_dir: str) -> tuple[Tensor, Tensor]:
    from torchvision import datasets

    kind, counts = PUBLIC[name]
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    where = f"{kind} ({split}) in {data_dir}"
    try:
        try:
            data = getattr(datasets, kind)(data_dir, download=False, **which)
        except RuntimeError:  # torchvision: "Dataset not found or corrupted"
            print(f"{where} is absent or incomplete: downloading", file=sys.stderr)
            data = getattr(datasets, kind)(data_dir, download=True, **which)
    except Exception as error:  # torchvision raises whatever its parsers and the network raise
        reason = str(error).partition("\n")[0] or repr(error)
        raise DataError(
            f"cannot read or download {where} ({reason}): check --data-dir and the "
            "network, or delete the damaged files"
        ) from error
    images = torch.as_tensor(data.data)
    images = images.permute(0, 3, 1, 2).contiguous() if name == "cifar10" else images
    images = images[:, None] if images.dim() == 3 else images
    labels = torch.as_tensor(data.labels if name == "svhn" else data.targets).long()
    if len(images) != len(labels) or len(images) != counts[split]:
        raise DataError(
            f"{where} has {len(images)} images and {len(labels)} labels, not "
            f"{counts[split]}: delete its files to download them anew"
        )
    return images, labels


def _folder(root: Path, split: str, image_shape) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import ImageFolder

    channels, (height, width) = 1 if image_shape[0] == 1 else 3, image_shape[1:]
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
    images = torch.empty(len(found), channels, height, width, dtype=torch.uint8)
    for image, (path, _) in zip(images, found.samples, strict=True):
        try:
            with Image.open(path) as picture:
                if picture.mode[0] in "IF":  # Pillow would clip it to 255
                    raise ValueError("more than 8 bits a pixel")
                picture = picture.convert("L" if channels == 1 else "RGB")
                pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR))
        except Exception as error:  # Pillow raises whatever the damage happens to provoke
            raise DataError(f"{path} cannot be read ({error}): replace or delete it") from error
        image.copy_(torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1))
    return images, torch.tensor(found.targets)


@cache
def glyphs(split: str) -> tuple[Tensor, Tensor]:
    """The embedded set: 10,000 training and 2,000 test digits (1, 28, 28), drawn from a fixed seed.
    The strokes of configs.yaml are jittered, joined by cubic splines, slanted, turned, scaled,
    shifted, and inked with a pen of random width. Callers share the tensors, read-only."""
    from scipy.interpolate import CubicSpline

    book = yaml.safe_load((Path(__file__).parent / "configs.yaml").read_text())
    count, seed = {"train": (10_000, 0), "test": (2_000, 1)}[split]
    random, scale = np.random.default_rng(seed), 4  # drawn four times as large
    # A spline is linear in its n points: from them to its values, four between two.
    spline = cache(lambda n: CubicSpline(range(n), np.eye(n))(np.arange(0, n - 0.99, 0.25)))
    labels, images = np.arange(count) % 10, np.empty((count, 1, 28, 28), np.uint8)
    for i in range(count):
        ways = book["strokes"][labels[i]]
        slant, turn = random.uniform(-0.5, 0.5), random.uniform(-0.2, 0.2)
        size = random.uniform(15, 22) * random.uniform(0.75, 1, 2)  # width, height in pixels
        shear = np.array([[1, turn], [-slant - turn, 1]])
        shift, width = 14 + random.uniform(-1.5, 1.5, 2), random.uniform(1.4, 3.4)
        sheet = Image.new("L", (28 * scale, 28 * scale))
        for stroke in ways[i // 10 % len(ways)].split("|"):
            points = np.array(stroke.split(), float).reshape(-1, 2) / 100 - 0.5
            points += random.normal(0, 0.048, points.shape)
            path = scale * (spline(len(points)) @ points * size @ shear + shift)
            ImageDraw.Draw(sheet).line(path.ravel().tolist(), 255, round(scale * width))
        images[i, 0] = sheet.reduce(scale)
    order = random.permutation(count)
    return torch.tensor(images[order]), torch.tensor(labels[order])
