"""Images in memory as uint8 (N, C, H, W) and labels as int64 (N,).

`DATASETS` names what there is: four public sets through torchvision, a folder of the user's own,
and `glyphs`, digits drawn by code. To add one, write a reader (split, root, image shape) -> images,
labels, with labels from 0 on, and a line there and in configs.yaml.
"""

import io
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import click
import numpy as np
import torch
from click import ClickException as DataError  # one message on stderr, exit status 1
from PIL import Image, ImageCms, ImageDraw, ImageOps
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
        return list(find_classes(Path(data_dir) / "train"))
    return list(DATASETS[name].names) or [str(label) for label in range(num_classes)]


# Public sets


@dataclass(frozen=True)
class PublicSet:
    """A data set that torchvision reads, and downloads where it is absent."""

    kind: str  # torchvision's class
    files: str  # where its files belong below the data folder, as a pattern
    counts: dict[str, int]  # images of each split
    sums: dict[str, int]  # CRC-32 of its images and labels, where torchvision checks no sums

    def read(self, split: str, root: Path, shape) -> tuple[Tensor, Tensor]:
        """Images and labels of a split, checked to be those of this set."""
        data = self.open(split, root)
        images = torch.as_tensor(data.data)
        if images.dim() == 3:  # MNIST: (N, H, W)
            images = images[:, None]
        elif images.shape[3] == 3:  # CIFAR-10: (N, H, W, C); SVHN: (N, C, H, W)
            images = images.permute(0, 3, 1, 2).contiguous()
        labels = torch.as_tensor(data.labels if hasattr(data, "labels") else data.targets).long()
        where, count = f"{self.kind} ({split}) in {root}", self.counts[split]
        if len(images) != len(labels) or len(images) != count:
            raise DataError(
                f"{where} has {len(images)} images and {len(labels)} labels, not {count}: delete "
                f"{root / self.files} to download it anew"
            )
        if split in self.sums and checksum(images, labels) != self.sums[split]:
            raise DataError(
                f"{where} holds other images than {self.kind} has, perhaps another data set's: "
                f"delete {root / self.files} to download it anew"
            )
        return images, labels

    def open(self, split: str, root: Path):
        """torchvision's object of a split, downloaded if it is not there."""
        from torchvision import datasets

        which = {"split": split} if self.kind == "SVHN" else {"train": split == "train"}
        make = partial(getattr(datasets, self.kind), root, **which)
        where = f"{self.kind} ({split})"
        try:
            return make(download=False)
        except RuntimeError:  # torchvision: "Dataset not found or corrupted"
            echo(f"{where} in {root} is absent or incomplete: downloading")
        except Exception as error:  # its parsers raise whatever the damage provokes
            reason = " ".join(str(error).split()) or repr(error)
            raise DataError(
                f"{where} in {root} cannot be read ({reason}): delete {root / self.files} to "
                "download it anew"
            ) from error
        folders = [root / self.kind / "raw", root / self.kind, root]  # that torchvision may make
        absent = [folder for folder in folders if not folder.exists()]
        try:
            return make(download=True)
        except Exception as error:  # whatever the network, or its parsers, raise
            for folder in absent:
                with suppress(OSError):  # it is not empty
                    folder.rmdir()
            reason = " ".join(str(error).split()) or repr(error)
            raise DataError(
                f"{where} was looked for in {root / self.files}; {contents(root)}. The download "
                f"failed: {reason}. Put the files there, or choose another --data-dir"
            ) from error


def checksum(images: Tensor, labels: Tensor) -> int:
    """CRC-32 of the images' bytes and then the labels'."""
    return zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))


def contents(folder: Path, most: int = 6) -> str:
    """What is in a folder, for a message."""
    if not folder.is_dir():
        return f"{folder} is no folder"
    names = sorted(path.name for path in folder.iterdir())
    more = ", ..." if len(names) > most else ""
    return f"{folder} has {', '.join(names[:most])}{more}" if names else f"{folder} is empty"


# A folder of the user's own

# Formats whose first frame Pillow reads without plugins.
ENDINGS = frozenset(".jpg .jpeg .png .bmp .ppm .pgm .tif .tiff .webp .gif".split())


def read_folder(split: str, root: Path, shape) -> tuple[Tensor, Tensor]:
    """Images of `root`/SPLIT/CLASS/, scaled to `shape`; labels are the classes' order by name."""
    classes = find_classes(root / split)
    other = "train" if split == "test" else "test"  # found out before days of training
    if (root / other).is_dir() and list(find_classes(root / other)) != list(classes):
        raise DataError(
            f"{root}: {split} has the classes {', '.join(classes)}, {other} has "
            f"{', '.join(find_classes(root / other))}; they have to be the same"
        )
    paths = [path for files in classes.values() for path in files]
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    return read_images(paths, shape), torch.tensor(labels)


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """The classes of `folder` in the order of their names, each with its image files."""
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. {WHERE_IMAGES_BELONG.format(folder.parent)}")
    seen = {folder.resolve(), *folder.resolve().parents}  # a link to them is no class
    classes = {}
    for path in sorted(folder.iterdir()):
        if is_shown(path) and path.is_dir() and path.resolve() not in seen:
            classes[path.name] = find_images(path, seen)
    if not classes:
        raise DataError(f"{folder} has no classes. {WHERE_IMAGES_BELONG.format(folder.parent)}")
    if empty := [name for name, files in classes.items() if not files]:
        endings = ", ".join(sorted(ENDINGS))
        raise DataError(f"{folder} has classes without images ({endings}): {', '.join(empty)}")
    return classes


WHERE_IMAGES_BELONG = "Images belong in {0}/train/CLASS/ and {0}/test/CLASS/ (--data-dir {0})"


def find_images(folder: Path, seen: set[Path]) -> list[Path]:
    """Image files at any depth, by name; `seen` are the folders that have been looked into.

    Only regular files count, each once; links are followed to places that were not seen before.
    """
    seen.add(folder.resolve())
    images, files = [], set()
    for path in sorted(folder.iterdir()):
        if not is_shown(path):
            continue
        if path.is_dir() and path.resolve() not in seen:
            images += find_images(path, seen)
        elif path.suffix.lower() in ENDINGS and path.is_file() and path.resolve() not in files:
            files.add(path.resolve())
            images.append(path)
    return images


def is_shown(path: Path) -> bool:
    """Not hidden, and not what macOS and Windows leave beside files."""
    return not path.name.startswith((".", "__MACOSX"))


def read_images(paths: list[Path], shape) -> Tensor:
    """Image files scaled to `shape` (C, H, W), C 1 or 3: uint8 (N, C, H, W).

    Says once what a user may not expect: transparency, colours that are lost.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise DataError(f"images have 1 channel (grey) or 3 (colours), not {channels}")
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    transparent = coloured = 0
    read = partial(read_image, channels=channels, height=height, width=width)
    with ThreadPoolExecutor() as pool, progress(pool.map(read, paths), len(paths)) as pictures:
        for image, picture in zip(images, pictures, strict=True):
            image.copy_(torch.from_numpy(picture.pixels).permute(2, 0, 1))
            transparent += picture.transparent
            coloured += picture.coloured
    if transparent:
        echo(f"{transparent} of {len(paths)} images are transparent: shown on white")
    if coloured and channels == 1:
        echo(
            f"{coloured} of {len(paths)} images have colours and are read as grey; to keep the "
            f'colours, train with --set "data.image=[3,{height},{width}]"'
        )
    return images


def echo(line: str) -> None:
    """Tells the user something, apart from results."""
    print(line, file=sys.stderr)


def progress(items, length: int):
    """`items` with a bar on a terminal, where there are many."""
    hidden = length < 200 or not sys.stderr.isatty()
    return click.progressbar(items, length, "reading images", file=sys.stderr, hidden=hidden)


@dataclass(frozen=True)
class Picture:
    """An image as a viewer shows it."""

    pixels: np.ndarray  # uint8 (height, width, channels)
    transparent: bool  # it was, somewhere
    coloured: bool  # it has other colours than greys


def read_image(path: Path, channels: int, height: int, width: int) -> Picture:
    """An image file, scaled; of an animation the first frame. DataError if it cannot be read."""
    try:
        with Image.open(path) as picture:
            picture.draft(None, (2 * width, 2 * height))  # a JPEG decodes faster at half its size
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # 16 bits a pixel, of which a viewer shows 8
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            elif picture.mode[0] in "IF":
                raise ValueError("more than 16 bits a pixel")
            shown, transparent = as_shown(picture)
            shown = shown.resize((width, height), Image.Resampling.BILINEAR)
            colours = np.asarray(shown)
            coloured = bool(np.ptp(colours.astype(np.int16), axis=2).max() > 8)
            pixels = np.array(shown.convert("L"))[..., None] if channels == 1 else colours.copy()
            return Picture(pixels, transparent, coloured)
    except Exception as error:  # Pillow raises whatever the damage happens to provoke
        raise DataError(f"{path} cannot be read ({error}): replace or delete it") from error


def as_shown(picture: Image.Image) -> tuple[Image.Image, bool]:
    """In sRGB and on white: RGB, and whether it was transparent anywhere."""
    profile = picture.info.get("icc_profile")
    if {"A", "a"} & set(picture.getbands()) or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        transparent = layer.getextrema()[3][0] < 255
        white = Image.new("RGBA", layer.size, "white")
        shown = Image.alpha_composite(white, layer).convert("RGB")
    else:
        transparent, shown = False, picture.convert("RGB")
    return (in_srgb(shown, profile) if profile and picture.mode != "CMYK" else shown), transparent


def in_srgb(picture: Image.Image, profile: bytes) -> Image.Image:
    """An RGB picture whose colours are meant in another profile, as it would be in sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(picture, source, ImageCms.createProfile("sRGB"))
    except (ImageCms.PyCMSError, OSError):  # of another kind, as of grey images, or damaged
        return picture


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
    embedded: bool = False  # drawn by code, so that no data folder is needed


def public(kind: str, files: str, shape, train, test, names="", sums=(), **more) -> Dataset:
    """A data set of ten classes that torchvision reads: `train` and `test` images, and `more`."""
    counts = {"train": train, "test": test, **more}
    sums = dict(zip(("train", "test"), sums, strict=False))
    public_set = PublicSet(kind, files, counts, sums)
    return Dataset(public_set.read, shape, 10, tuple(names.split()), counts)


FASHION = "T-shirt Trouser Pullover Dress Coat Sandal Shirt Sneaker Bag Boot"
OBJECTS = "airplane automobile bird cat deer dog frog horse ship truck"
GREY, COLOURS = (1, 28, 28), (3, 32, 32)
MNIST_SUMS = (0x60637407, 0x895A175A)
FASHION_SUMS = (0x566FCE17, 0xA4D3026C)
DATASETS = {
    "mnist": public("MNIST", "MNIST/raw", GREY, 60_000, 10_000, sums=MNIST_SUMS),
    "fmnist": public(
        "FashionMNIST", "FashionMNIST/raw", GREY, 60_000, 10_000, FASHION, FASHION_SUMS
    ),
    "cifar10": public("CIFAR10", "cifar-10-batches-py", COLOURS, 50_000, 10_000, OBJECTS),
    "svhn": public("SVHN", "*_32x32.mat", COLOURS, 73_257, 26_032, extra=531_131),
    "glyphs": Dataset(
        read_glyphs, GREY, 10, counts={"train": 10_000, "test": 2_000}, embedded=True
    ),
    "folder": Dataset(read_folder, GREY, None),
}
