"""Images in memory as uint8 (N, C, H, W) and labels as int64 (N,).

`DATASETS` names what there is: four public sets through torchvision, a folder of the user's own,
and `glyphs`, digits drawn by code. To add one, write a reader (split, root, image shape, options)
-> images, labels, with labels from 0 on, and a line there and in configs.yaml.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from operator import attrgetter
from pathlib import Path

import click
import numpy as np
import torch
from click import ClickException as DataError  # one message on stderr, exit status 1
from PIL import Image, ImageCms, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels -> float32 in [-1, 1], the range of the models."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images of {images.dtype}: pixels have to be uint8, from 0 to 255")
    return images.float().div_(127.5).sub_(1)


def as_pixels(images) -> Tensor:
    """Somebody's images as the models take them: uint8, or float32 in [-1, 1].

    `images` is a NumPy array or a tensor (N, C, H, W), (N, H, W, C) or, if grey, (N, H, W), or a
    list of N arrays.
    ValueError for other shapes and for floats that look as if they were in [0, 1] or [0, 255].
    """
    if isinstance(images, (list, tuple)):
        images = np.stack(images)
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images)  # a[::-1] has strides that torch cannot hold
    images = torch.as_tensor(images)
    if images.dim() == 3:
        images = images[:, None]
    if images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images = images.permute(0, 3, 1, 2).contiguous()
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ValueError(
            f"images of shape {tuple(images.shape)}: it has to be (N, C, H, W), (N, H, W, C) or "
            "(N, H, W), with C 1 or 3 and N at least 1"
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images of {images.dtype}: pixels are uint8 or floats in [-1, 1]")
    low, high = images.min().item(), images.max().item()
    if not (-1.001 <= low <= high <= 1.001):
        raise ValueError(f"pixels from {low:.3g} to {high:.3g}: floats have to be in [-1, 1]")
    if low >= 0 and high > low:
        raise ValueError(
            f"pixels from {low:.3g} to {high:.3g}, as if in [0, 1]: scale them to [-1, 1], 2 x - 1"
        )
    return images.float()


@dataclass(frozen=True)
class FolderOptions:
    """How a folder of images is read."""

    split_seed: int = 0  # which images are for testing, where the folder has no split
    skip_unreadable: bool = False  # go on without images that cannot be read


def load(
    name: str, split: str, data_dir="data", image_shape=None, extra=False, options=FolderOptions()
):
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
    images, labels = dataset.read(split, Path(data_dir), shape, options)
    if extra and split == "train" and "extra" in dataset.counts:
        more_images, more_labels = dataset.read("extra", Path(data_dir), shape, options)
        images, labels = torch.cat([images, more_images]), torch.cat([labels, more_labels])
    if images.shape[1:] != shape:
        found, wanted = ("x".join(map(str, sizes)) for sizes in (images.shape[1:], shape))
        raise DataError(
            f"{name} has images of {found} (channels x height x width), not {wanted}: "
            "choose other data, or train with --set data.image"
        )
    return images, labels


def class_names(name: str, data_dir: str, num_classes: int, options=FolderOptions()) -> list[str]:
    """What the labels stand for, in their order."""
    if DATASETS[name].classes is None:
        return list(find_folder(Path(data_dir), options.split_seed).train)
    return list(DATASETS[name].names) or [str(label) for label in range(num_classes)]


# Public sets


@dataclass(frozen=True)
class PublicSet:
    """A data set that torchvision reads, and downloads where it is absent."""

    kind: str  # torchvision's class
    files: str  # where its files belong below the data folder, as a pattern
    counts: dict[str, int]  # images of each split
    sums: dict[str, int]  # CRC-32 of its images and labels, where torchvision checks no sums

    def read(self, split: str, root: Path, shape, options) -> tuple[Tensor, Tensor]:
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

EXIF_ORIENTATION = 0x0112
# Formats whose first frame Pillow reads without plugins.
ENDINGS = frozenset(".jpg .jpeg .png .bmp .ppm .pgm .tif .tiff .webp .gif".split())


@dataclass(frozen=True)
class Folder:
    """Where the images of a folder are, class by class and split by split.

    Three layouts: DIR/train/CLASS/* with DIR/test/CLASS/*; DIR/CLASS/*, of whose classes a fifth
    each is for testing; DIR/*, unlabelled, likewise split.
    """

    root: Path
    layout: str  # in words
    train: dict[str, list[Path]]  # class name -> files
    test: dict[str, list[Path]] | None  # None: DIR/test is not there
    is_split: bool = False  # by this program

    def split(self, name: str) -> dict[str, list[Path]]:
        """Files of "train" or "test" by class; DataError if there are none."""
        files = self.train if name == "train" else self.test
        if files is None:
            raise DataError(f"{self.root / name} is no folder. {WHERE_IMAGES_BELONG}")
        if not any(files.values()):
            raise DataError(f"{self.root} has no images for the split {name}")
        return files


UNLABELLED = ""  # the class of images that have none
WHERE_IMAGES_BELONG = (
    "Images belong in DIR/train/CLASS/ and DIR/test/CLASS/, or in DIR/CLASS/, or without labels in "
    "DIR/; DIR is what --data-dir names"
)


def find_folder(root: Path, split_seed: int = 0) -> Folder:
    """Finds out how a folder is laid out; DataError says what is missing."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}. {WHERE_IMAGES_BELONG}")
    if (root / "train").is_dir() and subfolders(root / "train"):
        train = require_images(root / "train")
        test = require_images(root / "test") if (root / "test").is_dir() else None
        if test is not None and list(train) != list(test):
            raise DataError(
                f"{root}: train has the classes {', '.join(train)}, test has {', '.join(test)}; "
                "they have to be the same"
            )
        return Folder(root, "DIR/train/CLASS", train, test)
    given = {"train", "test"} == {path.name for path in subfolders(root)}  # both without classes
    if given:
        layout = "DIR/train and DIR/test, unlabelled"
        train, test = (
            {UNLABELLED: find_images(root / name, outside(root))} for name in ("train", "test")
        )
    else:
        layout, found = "DIR/CLASS", find_classes(root)
        if any(found.values()):
            require_classes(root, [name for name, files in found.items() if files])
        else:
            layout, found = "DIR, unlabelled", {UNLABELLED: find_images(root, outside(root))}
        found = {name: files for name, files in found.items() if files}
        train, test = split_classes(found, root, split_seed)
    if not any(train.values()):
        endings = ", ".join(sorted(ENDINGS))
        raise DataError(f"{root} has no images ({endings}). {WHERE_IMAGES_BELONG}")
    return Folder(root, layout, train, test, is_split=not given)


SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}


def require_classes(root: Path, names: list[str]) -> None:
    """DataError where folders with images are hardly classes, so that labels would be wrong."""
    listed = ", ".join(names)
    if {name.lower() for name in names} <= SPLITS:
        raise DataError(
            f"{root} has the folders {listed}: a split has to be called `train` and `test`, both "
            "with a folder a class or both without"
        )
    if len(names) == 1 and any(find_classes(root / names[0]).values()):
        raise DataError(
            f"{root} has only {names[0]}, which has folders of its own: name {root / names[0]} if "
            "these are the classes, or move the images up if there are none"
        )
    files = (entry.name for entry in entries(root) if entry.is_file())
    beside = [name for name in files if Path(name).suffix.lower() in ENDINGS]
    if beside:
        raise DataError(
            f"{root} has {len(beside)} images beside the folders {listed}, which are its classes: "
            "move the ones or the others elsewhere"
        )


def describe_folder(root: Path, options: FolderOptions) -> str:
    """A line on the layout, the classes and how many images each split has."""
    folder = find_folder(root, options.split_seed)
    counts = {name: len(files) for name, files in folder.train.items()}
    if UNLABELLED in counts:
        classes = "no classes"
    else:
        listed = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:12])
        word = "class" if len(counts) == 1 else "classes"
        classes = f"{len(counts)} {word}: {listed}{', ...' if len(counts) > 12 else ''}"
    test = 0 if folder.test is None else sum(map(len, folder.test.values()))
    how = ""
    if folder.is_split:
        of_what = "of all" if UNLABELLED in counts else "of each class"
        how = f", a fifth {of_what}, chosen by data.split_seed = {options.split_seed}"
    return (
        f"{root}, laid out as {folder.layout}: {sum(counts.values())} image files to train on, "
        f"{test} to test{how}; {classes}{describe_others(root)}"
    )


def describe_others(root: Path) -> str:
    """What is said of files in a folder that are not read, such as phones' .heic."""
    counts = Counter()
    for _, folders, names in os.walk(root):
        folders[:] = filter(is_shown, folders)  # where the walk goes on
        endings = (Path(name).suffix.lower() or "no ending" for name in names if is_shown(name))
        counts.update(ending for ending in endings if ending not in ENDINGS)
    if not counts:
        return ""
    listed = ", ".join(f"{ending} ({count})" for ending, count in counts.most_common(3))
    return f"; not read: {listed}{', ...' if len(counts) > 3 else ''}"


def split_classes(classes: dict[str, list[Path]], root: Path, seed: int, share=5):
    """A `share`-th of each class for testing: classes for training, classes for testing.

    Which images these are depends on their names and the seed alone, so that few change sides when
    images are added. A class of one image has none to test.
    """

    def chance(path: Path) -> bytes:
        name = f"{seed}/{path.relative_to(root).as_posix()}".encode(errors="surrogateescape")
        return hashlib.blake2b(name).digest()

    train, test = {}, {}
    for name, files in classes.items():
        count = round(len(files) / share) if len(files) != 2 else 1
        chosen = set(sorted(files, key=chance)[:count])
        train[name] = [path for path in files if path not in chosen]
        test[name] = [path for path in files if path in chosen]
    return train, test


def outside(folder: Path) -> set[Path]:
    """Folders that a link in `folder` may not lead to: those around it."""
    return set(folder.resolve().parents)


def entries(folder: Path) -> list[os.DirEntry | Path]:
    """What is in a folder, by name, without hidden things; DataError if it cannot be read.

    Links are paths, which are neither files nor folders where they lead nowhere.
    """
    try:
        with os.scandir(folder) as everything:
            shown = [entry for entry in everything if is_shown(entry.name)]
        shown = [folder / entry.name if entry.is_symlink() else entry for entry in shown]
        return sorted(shown, key=attrgetter("name"))
    except OSError as error:
        reason = f"{error.strerror}: make it readable, or move it elsewhere"
        raise DataError(f"{folder} cannot be read ({reason})") from error


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name, without links to itself or to what is around it."""
    around = {folder.resolve(), *outside(folder)}
    paths = [folder / entry.name for entry in entries(folder) if entry.is_dir()]
    return [path for path in paths if path.resolve() not in around]


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """The folders in `folder` in the order of their names, each with its image files."""
    seen = {folder.resolve(), *outside(folder)}
    return {path.name: find_images(path, seen) for path in subfolders(folder)}


def require_images(folder: Path) -> dict[str, list[Path]]:
    """`find_classes`, or DataError where there are none or one is empty."""
    classes = find_classes(folder)
    if not classes:
        raise DataError(f"{folder} has no classes. {WHERE_IMAGES_BELONG}")
    if empty := [name for name, files in classes.items() if not files]:
        endings = ", ".join(sorted(ENDINGS))
        raise DataError(f"{folder} has classes without images ({endings}): {', '.join(empty)}")
    return classes


def find_images(folder: Path, seen: set[Path]) -> list[Path]:
    """Image files at any depth, by name; `seen` are the folders that have been looked into.

    Only regular files count, each once; links are followed to places that were not seen before.
    """
    here = folder.resolve()
    if here in seen:
        return []
    seen.add(here)
    images, files = [], set()
    for entry in entries(folder):
        path = folder / entry.name
        if entry.is_dir():
            images += find_images(path, seen)
        elif path.suffix.lower() in ENDINGS and entry.is_file():
            # 60,000 calls of resolve() take seconds, and it is needed for links alone.
            file = path.resolve() if entry.is_symlink() else here / entry.name
            if file not in files:
                files.add(file)
                images.append(path)
    return images


def is_shown(name: str) -> bool:
    """Not hidden, and not what macOS and Windows leave beside files."""
    return not name.startswith((".", "__MACOSX"))


def find_files(paths: list[Path]) -> list[Path]:
    """Image files among `paths`, and those of folders among them, at any depth."""
    files = []
    for path in paths:
        files += find_images(path, outside(path)) if path.is_dir() else [path]
    if not files:
        raise DataError(f"no images ({', '.join(sorted(ENDINGS))}) in {', '.join(map(str, paths))}")
    return files


def read_folder(split: str, root: Path, shape, options: FolderOptions) -> tuple[Tensor, Tensor]:
    """Images of a split, scaled to `shape`; labels are the classes' order by name."""
    images, labels, _ = read_folder_files(split, root, shape, options)
    return images, labels


def read_folder_files(split: str, root: Path, shape, options: FolderOptions):
    """`read_folder`, and the images' files in their order."""
    folder = find_folder(root, options.split_seed)
    classes, others = folder.split(split), folder.test if split == "train" else folder.train
    paths = [path for files in classes.values() for path in files]
    labels = [label for label, files in enumerate(classes.values()) for _ in files]
    beside = [path for files in (others or {}).values() for path in files]
    images, read = read_images(paths, shape, options.skip_unreadable, f"{split}: ", beside)
    labels = torch.tensor(labels, dtype=torch.long)[read]
    left = labels.bincount(minlength=len(classes)).tolist()
    for (name, files), count in zip(classes.items(), left, strict=True):
        if files and not count:
            raise DataError(f"{root}: no image of the class {name} can be read ({split})")
    return images, labels, [paths[i] for i in read]


def read_images(
    paths: list[Path], shape, skip_unreadable=False, what="", beside=()
) -> tuple[Tensor, list[int]]:
    """Image files scaled to `shape` (C, H, W), C 1 or 3: uint8 (N, C, H, W), and which they are.

    `what` they are begins the lines on them.

    Says what a user may not expect: transparency, lost colours, other shapes. DataError lists all
    files that cannot be read, unless they are to be skipped; then also those of the paths `beside`,
    which are to be read later, so that all can be mended at once.
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise DataError(f"images have 1 channel (grey) or 3 (colours), not {channels}")
    images = torch.empty(len(paths), *shape, dtype=torch.uint8)
    read, problems, sizes = [], [], Counter()
    transparent = coloured = 0
    attempt = partial(try_image, channels=channels, height=height, width=width)
    with ThreadPoolExecutor() as pool:
        found = pool.map(attempt, paths)
        with progress(found, len(paths), "reading images") as pictures:
            for i, picture in enumerate(pictures):
                if isinstance(picture, DataError):
                    problems.append(picture.message)
                    continue
                images[i] = torch.from_numpy(picture.pixels).permute(2, 0, 1)
                read.append(i)
                sizes[picture.size] += 1
                transparent += picture.transparent
                coloured += picture.coloured
    count = len(paths)
    if problems and not skip_unreadable:
        count += len(beside)
        problems += unreadable(beside, attempt)
    report_unreadable(problems, count, skip_unreadable)
    if len(read) < len(paths):
        images = images[read]
    say_sizes(sizes, shape, what)
    if transparent:
        echo(f"{what}{transparent} of {len(read)} images are transparent: shown on white")
    if coloured and channels == 1:
        echo(
            f"{what}{coloured} of {len(read)} images have colours and are read as grey; to keep "
            f'the colours, train with --set "data.image=[3,{height},{width}]"'
        )
    return images, read


def unreadable(paths, attempt) -> list[str]:
    """What is wrong with those of the files that `attempt`, a `try_image`, cannot read."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(attempt, paths)
        return [picture.message for picture in found if isinstance(picture, DataError)]


def report_unreadable(problems: list[str], count: int, skip: bool, most: int = 20) -> None:
    """Lists images that cannot be read: DataError, or a note if they are to be skipped."""
    if not problems:
        return
    listed = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        listed.append(f"  and {len(problems) - most} more")
    lines = "\n".join([f"{len(problems)} of {count} images cannot be read:", *listed])
    if len(problems) == count:
        raise DataError(f"{lines}\nThere is no other")
    if not skip:
        raise DataError(f"{lines}\nReplace or delete them, or go on with --skip-unreadable")
    echo(f"{lines}\nThey are left out")


def say_sizes(sizes: Counter, shape, what: str) -> None:
    """A line on the images' sizes in pixels, and on what they become, if that is another."""
    _, height, width = shape
    if set(sizes) <= {(width, height)}:
        return
    listed = ", ".join(f"{w} x {h} ({n})" for (w, h), n in sizes.most_common(3))
    others = len(sizes) - 3
    more = f" and {others} other size{'s' * (others > 1)}" if others > 0 else ""
    stretched = any(w * height != h * width for w, h in sizes)
    how = ", stretched to that shape" if stretched else ""
    echo(f"{what}images of {listed}{more} (width x height) are scaled to {width} x {height}{how}")


def echo(line: str) -> None:
    """Tells the user something, apart from results."""
    print(line, file=sys.stderr)


@contextmanager
def progress(items, length: int, label: str):
    """`items`, with a bar on a terminal if there is a `label` and more than one of them.

    The bar vanishes at the end.
    """
    narrow = shutil.get_terminal_size().columns < 75  # a longer line would begin anew each time
    hidden = not label or length < 2 or narrow or not sys.stderr.isatty()
    options = {"file": sys.stderr, "hidden": hidden, "width": 24, "update_min_steps": length // 100}
    with click.progressbar(items, length, label, **options) as shown:
        yield shown
    if not hidden:
        print("\x1b[1A\x1b[2K", end="", file=sys.stderr)  # one line up, and clear it


@dataclass(frozen=True)
class Picture:
    """An image as a viewer shows it."""

    pixels: np.ndarray  # uint8 (height, width, channels), scaled
    size: tuple[int, int]  # width and height in pixels, before
    transparent: bool  # it was, somewhere
    coloured: bool  # it has other colours than greys


def try_image(path: Path, **size) -> Picture | DataError:
    """`read_image`, or why it cannot be read."""
    try:
        return read_image(path, **size)
    except DataError as error:
        return error


def read_image(path: Path, channels: int, height: int, width: int) -> Picture:
    """An image file, scaled; of an animation the first frame. DataError if it cannot be read."""
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        with Image.open(path) as picture:
            swapped = picture.getexif().get(EXIF_ORIENTATION, 1) >= 5  # it lies on its side
            size = picture.size[::-1] if swapped else picture.size
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
            return Picture(pixels, size, transparent, coloured)
    except Exception as error:  # Pillow raises whatever the damage happens to provoke
        reason = "no image" if isinstance(error, UnidentifiedImageError) else error
        raise DataError(f"{path} ({reason})") from error


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


def read_glyphs(split: str, root: Path, shape, options) -> tuple[Tensor, Tensor]:
    """The embedded digits, whatever the other arguments."""
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
    with progress(labels, count, "drawing digits") as shown:
        for i, label in enumerate(shown):
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

    read: Callable[..., tuple[Tensor, Tensor]]  # (split, root, image shape, FolderOptions)
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
    "folder": Dataset(read_folder, COLOURS, None),
}
