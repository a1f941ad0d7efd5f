"""Each loader on files of its real format, made here, whole and damaged; the embedded set."""

import hashlib
import os
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision import datasets

import cebm
import data

KINDS = {"mnist": "MNIST", "fmnist": "FashionMNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}


def write_idx(folder, count=20, name="MNIST"):
    """MNIST's four files with `count` images each; pixel values say which image and pixel it is."""
    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    pixels = (np.arange(count * 784) % 251).astype(np.uint8).reshape(count, 28, 28)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for split in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, count, 28, 28)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, count) + labels.tobytes()
        )
    return torch.tensor(pixels)[:, None], torch.tensor(labels).long()


@pytest.fixture
def offline(monkeypatch):
    """Downloads fail as they do without a network."""

    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    for module in (datasets.mnist, datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", refuse)
    monkeypatch.setattr(datasets.svhn, "download_url", refuse)


@pytest.fixture
def counted(monkeypatch):
    """The public sets are of 20 images a split, as the files made here."""
    few = {
        name: data.public(kind, "files", data.DATASETS[name].shape, 20, 20, extra=20)
        for name, kind in KINDS.items()
    }
    monkeypatch.setattr(data, "DATASETS", data.DATASETS | few)


@pytest.mark.parametrize("name", ["mnist", "fmnist"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_idx_files_come_back_pixel_for_pixel(tmp_path, counted, name, split):
    pixels, labels = write_idx(tmp_path, name=KINDS[name])
    images, found = data.load(name, split, tmp_path)
    assert images.dtype == torch.uint8
    assert torch.equal(images, pixels)
    assert torch.equal(found, labels)


def test_cifar_batches_come_back_as_channels_first(tmp_path, counted, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    batches = [
        put(f"data_batch_{i + 1}", {"data": pixels[4 * i : 4 * i + 4], "labels": [i] * 4})
        for i in range(5)
    ]
    meta = put("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", batches)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", batches)
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    )
    images, labels = data.load("cifar10", "train", str(tmp_path), (3, 32, 32))
    assert torch.equal(images, torch.tensor(pixels).view(20, 3, 32, 32))
    assert labels.tolist() == [i // 4 for i in range(20)]


def test_svhn_files_come_back_with_zero_for_the_digit_zero_and_extra_appended(
    tmp_path, counted, monkeypatch
):
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
    labels = np.arange(20) % 10 + 1  # the files count 1 to 10, 10 being the digit 0
    listed = {}
    for split in ("train", "test", "extra"):
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": pixels, "y": labels[:, None]})
        listed[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", listed)
    images, found = data.load("svhn", "train", str(tmp_path), (3, 32, 32))
    assert torch.equal(images, torch.tensor(pixels).permute(3, 2, 0, 1))
    assert found.tolist() == [k % 10 for k in labels]
    more, _ = data.load("svhn", "train", str(tmp_path), (3, 32, 32), extra=True)
    assert torch.equal(more, torch.cat([images, images]))
    assert len(data.load("svhn", "test", str(tmp_path), (3, 32, 32), extra=True)[0]) == 20


@pytest.mark.parametrize("name", KINDS)
def test_an_absent_set_without_a_network_is_an_error_that_names_it(tmp_path, offline, name):
    with pytest.raises(data.DataError, match=rf"{KINDS[name]} \(train\).*--data-dir"):
        data.load(name, "train", str(tmp_path))


def test_a_failed_download_says_what_was_looked_for_what_is_there_and_why(tmp_path, offline):
    (tmp_path / "train-images.idx3-ubyte").write_text("as Kaggle names it")
    with pytest.raises(data.DataError) as error:
        data.load("mnist", "train", tmp_path)
    for part in ("MNIST/raw", "train-images.idx3-ubyte", "no route to host", "ossci-datasets"):
        assert part in error.value.message
    assert [path.name for path in tmp_path.iterdir()] == ["train-images.idx3-ubyte"]
    with pytest.raises(data.DataError, match="is no folder"):
        data.load("mnist", "train", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_sets_files_in_a_sets_place_are_refused(tmp_path, monkeypatch):
    pixels, labels = write_idx(tmp_path)
    sums = 2 * [data.checksum(pixels, labels)]
    for name, known in ("mnist", sums), ("fmnist", [0, 0]):
        small = data.public("MNIST", "MNIST/raw", (1, 28, 28), 20, 20, sums=known)
        monkeypatch.setitem(data.DATASETS, name, small)
    assert torch.equal(data.load("mnist", "train", tmp_path)[0], pixels)
    with pytest.raises(data.DataError, match="holds other images than MNIST has"):
        data.load("fmnist", "train", tmp_path)


def test_an_absent_set_is_downloaded(tmp_path, counted, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: write_idx(tmp_path))
    assert len(data.load("mnist", "train", str(tmp_path))[0]) == 20


@pytest.mark.parametrize("keep", [0, 3, 16, 1000, -1])
def test_a_truncated_idx_file_is_refused(tmp_path, counted, offline, keep):
    write_idx(tmp_path)
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(data.DataError, match="MNIST"):
        data.load("mnist", "train", str(tmp_path))


def test_a_set_of_another_length_is_refused(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(data.DataError, match="20 images and 20 labels, not 60000"):
        data.load("mnist", "train", str(tmp_path))


def test_images_of_another_shape_are_refused():
    with pytest.raises(data.DataError, match=r"1x28x28.*not 3x32x32"):
        data.load("glyphs", "train", image_shape=(3, 32, 32))


@pytest.mark.parametrize(("name", "split"), [("minst", "train"), ("mnist", "extra")])
def test_a_set_or_split_that_does_not_exist_is_refused_with_those_that_do(tmp_path, name, split):
    with pytest.raises(ValueError, match=r"mnist.*folder.*train or test"):
        data.load(name, split, tmp_path)


@pytest.mark.parametrize("name", data.DATASETS)
def test_a_preset_is_for_the_images_and_classes_that_its_data_set_has(name):
    dataset, settings = data.DATASETS[name], cebm.compose("cebm-mnist", [f"data.name={name}"]).data
    assert settings.image == dataset.shape
    assert dataset.classes in (settings.classes, None)
    assert len(dataset.names) in (0, dataset.classes)


def test_labels_stand_for_names_where_a_set_has_them_and_else_for_digits(tmp_path):
    assert data.class_names("mnist", tmp_path, 10) == list("0123456789")
    names = data.class_names("fmnist", tmp_path, 10)
    assert (len(names), names[0], names[7], names[9]) == (10, "T-shirt", "Sneaker", "Boot")
    assert data.class_names("cifar10", tmp_path, 10)[:3] == ["airplane", "automobile", "bird"]


def write_folder(root, sizes=((28, 28), (40, 20))):
    for split in ("train", "test"):
        for k, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for i, size in enumerate(sizes):
                picture = Image.new("RGB", size, (100 * k, 100 * k, 100 * k))
                picture.save(root / split / name / f"{i}.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_scaled_to_the_configured_size_and_channels(tmp_path, channels):
    write_folder(tmp_path)
    images, labels = data.load("folder", "train", str(tmp_path), (channels, 16, 24))
    assert images.shape == (4, channels, 16, 24)
    assert labels.tolist() == [0, 0, 1, 1]
    assert (images[:2] == 0).all()
    assert (images[2:] == 100).all()
    assert data.class_names("folder", str(tmp_path), 2) == ["cat", "dog"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_folder_is_read_in_its_default_shape_without_further_settings(tmp_path, split):
    write_folder(tmp_path)
    images, labels = data.load("folder", split, str(tmp_path))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1]


def test_a_folder_keeps_pixels_that_already_fit(tmp_path):
    write_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train/cat/0.png")
    images, _ = data.load("folder", "train", str(tmp_path), (3, 8, 9))
    assert torch.equal(images[0], torch.tensor(pixels).permute(2, 0, 1))


def draw(picture, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)


@pytest.fixture
def disc():
    """A black disc in the middle of nothing: an image with transparency (20 x 20)."""
    y, x = np.mgrid[:20, :20] - 9.5
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[..., 3] = 255 * (x**2 + y**2 < 36)
    return Image.fromarray(pixels)


def with_key(picture, mode, path):
    """The disc with one colour declared transparent, in place of an alpha channel."""
    grey = Image.new("L", picture.size, 200)
    grey.paste(0, mask=picture.getchannel("A"))
    if mode == "P":
        draw(grey.convert("P"), path, transparency=200)
    else:
        draw(grey.convert(mode), path, transparency=200 if mode == "L" else (200, 200, 200))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "L", "RGB", "P"])
def test_what_is_transparent_is_shown_on_white_and_said_once(
    tmp_path, capsys, disc, mode, channels
):
    path = tmp_path / "train/a/0.png"
    if mode in ("RGBA", "LA"):
        draw(disc.convert(mode), path)
    elif mode == "PA":
        draw(disc.convert("PA"), path.with_suffix(".tif"))
    else:
        with_key(disc, mode, path)
    draw(disc, tmp_path / "train/a/1.png")
    images, _ = data.load("folder", "train", tmp_path, (channels, 20, 20))
    assert (images[:, :, 10, 10] == 0).all()  # ink
    assert (images[:, :, 0, 0] == 255).all()  # paper
    assert capsys.readouterr().err == "train: 2 of 2 images are transparent: shown on white\n"


def test_sixteen_drawings_in_ink_on_nothing_differ_from_their_ground_and_each_other(tmp_path):
    for k in range(16):
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[2 * k : 2 * k + 2, :, 3] = 255
        draw(Image.fromarray(pixels), tmp_path / f"train/a/{k:02}.png")
    images, _ = data.load("folder", "train", tmp_path, (1, 32, 32))
    assert len(images.flatten(1).unique(dim=0)) == 16
    assert all(image.min() == 0 and image.max() == 255 for image in images)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_upright_however_the_camera_was_held(tmp_path, orientation):
    upright = Image.new("L", (32, 32), 255)
    upright.paste(0, (0, 0, 12, 6))  # ink at the top left
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    draw(stored, tmp_path / "train/a/0.png", exif=exif)
    images, _ = data.load("folder", "train", tmp_path, (1, 32, 32))
    assert np.array_equal(images[0, 0].numpy(), np.asarray(upright))


def test_colours_of_another_profile_are_shown_in_srgb(tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = (profile.index(name, 128) for name in (b"rXYZ", b"gXYZ"))  # in its table of tags
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    plain = Image.new("RGB", (8, 8), (90, 120, 150))
    draw(plain, tmp_path / "train/a/0.png")
    draw(plain, tmp_path / "train/a/1.png", icc_profile=bytes(profile))
    draw(plain, tmp_path / "train/a/2.png", icc_profile=b"no profile")
    images, _ = data.load("folder", "train", tmp_path, (3, 8, 8))
    assert images[0, :, 0, 0].tolist() == images[2, :, 0, 0].tolist() == [90, 120, 150]
    swapped = images[1, :, 0, 0].int() - torch.tensor([120, 90, 150])
    assert swapped.abs().max() <= 1  # what the file calls red is green


def test_of_16_bits_a_pixel_the_upper_8_are_shown_and_of_more_none(tmp_path):
    ramp = (np.arange(64, dtype=np.uint16) * 1024).reshape(8, 8)
    draw(Image.fromarray(ramp), tmp_path / "train/a/0.png")
    images, _ = data.load("folder", "train", tmp_path, (1, 8, 8))
    assert images[0, 0].flatten().tolist() == list(range(0, 256, 4))
    draw(Image.fromarray(ramp.astype(np.float32)), tmp_path / "train/a/1.tif")
    with pytest.raises(data.DataError, match=r"a/1\.tif \(more than 16 bits"):
        data.load("folder", "train", tmp_path, (1, 8, 8))


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("L", (8, 8), level) for level in (10, 200)]
    draw(frames[0], tmp_path / "train/a/0.gif", save_all=True, append_images=frames[1:])
    images, _ = data.load("folder", "train", tmp_path, (1, 8, 8))
    assert (images == 10).all()


def test_colours_that_are_read_as_grey_are_told_with_the_setting_that_keeps_them(tmp_path, capsys):
    draw(Image.new("RGB", (8, 8), (200, 30, 30)), tmp_path / "train/a/0.png")
    draw(Image.new("RGB", (8, 8), (90, 90, 90)), tmp_path / "train/a/1.png")
    data.load("folder", "train", tmp_path, (1, 8, 8))
    said = capsys.readouterr().err
    assert said.startswith("train: 1 of 2 images have colours and are read as grey")
    assert "image=[3,8,8]" in said
    data.load("folder", "train", tmp_path, (3, 8, 8))
    assert capsys.readouterr().err == ""


def test_what_systems_and_notebooks_leave_is_no_class_and_no_image(tmp_path):
    write_folder(tmp_path)
    expected, labels = data.load("folder", "train", tmp_path, (1, 28, 28))
    stray = Image.new("L", (9, 9), 77)
    for name in (".ipynb_checkpoints", "__MACOSX", ".hidden"):
        draw(stray, tmp_path / "train" / name / "0.png")
        draw(stray, tmp_path / "train/cat" / name / "0.png")
    draw(stray, tmp_path / "train/cat/._0.png")
    (tmp_path / "train/cat/Thumbs.db").write_bytes(b"\0")
    (tmp_path / "train/.DS_Store").write_bytes(b"\0")
    images, found = data.load("folder", "train", tmp_path, (1, 28, 28))
    assert torch.equal(images, expected)
    assert torch.equal(found, labels)
    assert data.class_names("folder", str(tmp_path), 2) == ["cat", "dog"]


def test_links_are_followed_once_and_only_regular_files_are_read(tmp_path):
    write_folder(tmp_path)
    expected, labels = data.load("folder", "train", tmp_path, (1, 28, 28))
    cat = tmp_path / "train/cat"
    for link, target in [("here", "."), ("up", ".."), ("far", "../.."), ("again.png", "0.png")]:
        (cat / link).symlink_to(target)
    for link, target in [("loop", "."), ("above", "..")]:
        (tmp_path / "train" / link).symlink_to(target)
    (cat / "broken.png").symlink_to("nowhere")
    (cat / "itself.png").symlink_to("itself.png")
    (tmp_path / "train" / "itself").symlink_to("itself")
    os.mkfifo(cat / "pipe.png")
    images, found = data.load("folder", "train", tmp_path, (1, 28, 28))
    assert torch.equal(images, expected)
    assert torch.equal(found, labels)


def test_a_class_or_an_image_may_be_a_link_to_where_it_lies(tmp_path):
    write_folder(tmp_path / "real")
    for split in ("train", "test"):
        (tmp_path / "linked" / split).mkdir(parents=True)
        for name in ("cat", "dog"):
            (tmp_path / "linked" / split / name).symlink_to(tmp_path / "real" / split / name)
    one, other = (data.load("folder", "test", tmp_path / d, (1, 9, 9)) for d in ("real", "linked"))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    shape = (1, 28, 28)
    with pytest.raises(data.DataError, match=r"has no images.*Images belong in"):
        data.load("folder", "train", str(tmp_path), shape)
    write_folder(tmp_path)
    truncated = tmp_path / "train/dog/0.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    with pytest.raises(data.DataError, match=r"1 of 8 images cannot be read:\n.*dog/0\.png"):
        data.load("folder", "train", str(tmp_path), shape)
    pixels = np.zeros((24, 24), np.uint8)
    Image.fromarray(pixels).save(picture := tmp_path / "train/cat/1.tif")
    flipped = picture.read_bytes().replace(b"\x11\x01\x04\0", b"\x11\x01\x0c\0")  # a float offset
    picture.write_bytes(flipped)
    truncated.unlink()
    with pytest.raises(data.DataError, match=r"cannot be read:\n.*train/cat/1\.tif"):
        data.load("folder", "train", str(tmp_path), shape)
    (tmp_path / "test/emu").mkdir()
    with pytest.raises(data.DataError, match="emu"):
        data.load("folder", "test", str(tmp_path), shape)
    Image.new("L", (9, 9)).save(tmp_path / "test/emu/0.png")
    for split in ("test", "train"):  # also before training, not only after it
        with pytest.raises(data.DataError, match=r"cat, dog, emu.* they have to be the same"):
            data.load("folder", split, str(tmp_path), shape)


def write_classes(root, counts, side=8):
    """Images of one grey level each, no two alike, in root/CLASS/ or, for "", in root itself."""
    level = 0
    for name, count in counts.items():
        for i in range(count):
            draw(Image.new("L", (side, side), level), root / name / f"{i}.png")
            level += 1


def levels(split, root, seed=0):
    options = data.FolderOptions(split_seed=seed)
    images, labels = data.load("folder", split, root, (1, 8, 8), options=options)
    return images[:, 0, 0, 0].tolist(), labels.tolist()


def test_of_a_folder_of_classes_a_fifth_of_each_is_for_testing(tmp_path):
    write_classes(tmp_path, {"cat": 40, "dog": 25, "emu": 2, "fox": 1})
    (tmp_path / "notes").mkdir()  # without images it is no class
    train, test = levels("train", tmp_path), levels("test", tmp_path)
    assert sorted(train[0] + test[0]) == list(range(68))
    assert [test[1].count(label) for label in range(4)] == [8, 5, 1, 0]
    assert [train[1].count(label) for label in range(4)] == [32, 20, 1, 1]
    assert all((level < 40) == (label == 0) for level, label in zip(*train, strict=True))
    assert data.class_names("folder", tmp_path, 0) == ["cat", "dog", "emu", "fox"]
    assert levels("test", tmp_path) == test  # each time the same
    assert levels("test", tmp_path, seed=1)[0] != test[0]
    said = data.describe_folder(tmp_path, data.FolderOptions())
    assert "DIR/CLASS: 54 image files to train on, 14 to test" in said
    assert "4 classes: cat (32), dog (20), emu (1), fox (1)" in said


def test_images_that_are_added_leave_nearly_all_others_in_their_split(tmp_path):
    write_classes(tmp_path, {"cat": 100})
    before = set(levels("test", tmp_path)[0])
    for i in range(100, 110):
        draw(Image.new("L", (8, 8), i), tmp_path / f"cat/{i}.png")
    after = {level for level in levels("test", tmp_path)[0] if level < 100}
    assert len(before ^ after) <= 6


def test_a_flat_folder_is_unlabelled_and_split(tmp_path):
    write_classes(tmp_path, {"": 50})
    train, test = levels("train", tmp_path), levels("test", tmp_path)
    assert sorted(train[0] + test[0]) == list(range(50))
    assert len(test[0]) == 10
    assert set(train[1] + test[1]) == {0}
    assert data.class_names("folder", tmp_path, 0) == [data.UNLABELLED]
    assert "no classes" in data.describe_folder(tmp_path, data.FolderOptions())


def test_a_given_split_without_classes_is_unlabelled_too(tmp_path):
    write_classes(tmp_path, {"train": 5, "test": 3})
    assert levels("train", tmp_path) == ([0, 1, 2, 3, 4], [0] * 5)
    assert levels("test", tmp_path) == ([5, 6, 7], [0] * 3)


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ({"Train/cat": 3, "Test/cat": 3}, "a split has to be called"),
        ({"train": 3, "test": 3, "val": 3}, "a split has to be called"),
        ({"data/cat": 3, "data/dog": 3}, "name .*/data if"),
        ({"": 3, "thumbs": 3}, "3 images beside the folders thumbs"),
        ({"notes/": 0}, "has no images"),
    ],
)
def test_a_layout_that_is_nearly_one_of_the_three_is_refused(tmp_path, counts, says):
    write_classes(tmp_path, counts)
    with pytest.raises(data.DataError, match=says):
        data.find_folder(tmp_path)


def test_a_folder_too_small_for_a_test_split_says_so(tmp_path):
    write_classes(tmp_path, {"cat": 1, "dog": 1})
    assert levels("train", tmp_path)[0] == [0, 1]
    with pytest.raises(data.DataError, match="no images for the split test"):
        levels("test", tmp_path)


def test_files_that_are_not_read_are_counted_by_their_endings(tmp_path):
    write_classes(tmp_path, {"cat": 2, "dog": 2})
    for name in ("a.HEIC", "b.heic", "notes", ".DS_Store"):
        (tmp_path / "cat" / name).write_text("")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "index.db").write_text("")
    said = data.describe_folder(tmp_path, data.FolderOptions())
    assert said.endswith("; not read: .heic (2), no ending (1)")


def test_arrays_with_strides_backwards_are_pixels_too():
    array = np.arange(2 * 8 * 8, dtype=np.uint8).reshape(2, 8, 8)
    assert torch.equal(data.as_pixels(array[::-1]), data.as_pixels(array).flip(0))


def test_a_list_of_arrays_is_as_good_as_one_array():
    array = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
    assert torch.equal(data.as_pixels(list(array)), data.as_pixels(array))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    write_classes(tmp_path, {"cat": 2, "lost+found": 1})
    honest = os.scandir

    def scandir(folder):
        if Path(folder).name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return honest(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(data.DataError, match=r"lost\+found cannot be read \(Permission denied"):
        data.find_folder(tmp_path)


def test_a_class_of_which_no_image_can_be_read_is_named(tmp_path):
    write_classes(tmp_path / "train", {"cat": 2, "dog": 1})
    (tmp_path / "train/dog/0.png").write_text("no picture")
    options = data.FolderOptions(skip_unreadable=True)
    with pytest.raises(data.DataError, match="no image of the class dog"):
        data.load("folder", "train", tmp_path, (1, 8, 8), options=options)
    with pytest.raises(data.DataError, match="There is no other"):
        data.read_images([tmp_path / "train/dog/0.png"], (1, 8, 8), True)


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, {"plane": 5, "train": 5, "test": 5})
    assert data.class_names("folder", tmp_path, 0) == ["plane", "test", "train"]


def test_images_that_cannot_be_read_are_all_listed_and_can_be_left_out(tmp_path, capsys):
    write_classes(tmp_path / "train", {"cat": 5, "dog": 5})
    for name in ("cat/1.png", "dog/3.png"):
        (tmp_path / "train" / name).write_bytes(b"no picture")
    with pytest.raises(data.DataError) as refusal:
        levels("train", tmp_path)
    for said in ("2 of 10 images", "cat/1.png (no image)", "dog/3.png (no image)", "--skip-un"):
        assert said in refusal.value.message
    options = data.FolderOptions(skip_unreadable=True)
    images, labels = data.load("folder", "train", tmp_path, (1, 8, 8), options=options)
    assert images[:, 0, 0, 0].tolist() == [0, 2, 3, 4, 5, 6, 7, 9]
    assert labels.tolist() == [0] * 4 + [1] * 4
    assert "dog/3.png (no image)\nThey are left out" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_that_cannot_be_read_are_listed_for_both_splits_at_once(tmp_path, split):
    for place in ("train", "test"):
        write_classes(tmp_path / place, {"cat": 5})
        (tmp_path / place / "cat/1.png").write_bytes(b"no picture")
    with pytest.raises(data.DataError) as refusal:
        levels(split, tmp_path)
    for said in ("2 of 10 images", "train/cat/1.png (no image)", "test/cat/1.png (no image)"):
        assert said in refusal.value.message


def test_files_and_folders_of_any_layout_are_found(tmp_path):
    write_classes(tmp_path, {"a": 2, "a/b": 1})
    found = data.find_files([tmp_path / "a/1.png", tmp_path])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "a/1.png",
        "a/0.png",
        "a/1.png",
        "a/b/0.png",
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(data.DataError, match="no images"):
        data.find_files([tmp_path / "empty"])


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (np.zeros((2, 8, 9), np.uint8), (2, 1, 8, 9)),
        (np.zeros((2, 8, 9, 3), np.uint8), (2, 3, 8, 9)),
        (torch.zeros(2, 3, 8, 9) - 1, (2, 3, 8, 9)),
        (np.full((2, 1, 8, 9), -0.5), (2, 1, 8, 9)),
    ],
)
def test_somebodys_arrays_become_pixels(images, shape):
    pixels = data.as_pixels(images)
    assert pixels.shape == shape
    assert pixels.dtype in (torch.uint8, torch.float32)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (np.linspace(0, 1, 128).reshape(2, 8, 8), "as if in \\[0, 1\\]"),
        (np.linspace(0, 255, 128).reshape(2, 8, 8), "from 0 to 255: floats have to be"),
        (np.full((2, 8, 8), np.nan), "from nan to nan"),
        (np.zeros((2, 8, 8), int), "of torch.int64"),
        (np.zeros((8, 8), np.uint8), "of shape \\(8, 8\\)"),
        (np.zeros((0, 8, 8), np.uint8), "N at least 1"),
        (np.zeros((2, 4, 8, 8), np.uint8), "with C 1 or 3"),
    ],
)
def test_arrays_that_are_no_pixels_are_refused(images, says):
    with pytest.raises(ValueError, match=says):
        data.as_pixels(images)


def test_the_embedded_set_is_what_the_readme_says():
    images, labels = data.load("glyphs", "train", image_shape=(1, 28, 28))
    test, test_labels = data.load("glyphs", "test")
    assert images.shape == (10_000, 1, 28, 28)
    assert test.shape == (2_000, 1, 28, 28)
    assert labels.bincount().tolist() == [1000] * 10
    assert test_labels.bincount().tolist() == [200] * 10
    assert data.DATASETS["glyphs"].counts == {"train": len(images), "test": len(test)}
    assert torch.equal(data.glyphs.__wrapped__("test")[0], test)
    data.load("glyphs", "test")[0].zero_()
    assert torch.equal(data.load("glyphs", "test")[0], test)  # each caller has its own
    assert 0.05 < (images > 127).float().mean() < 0.25  # ink, not noise
    assert len(torch.unique(images.flatten(1), dim=0)) == 10_000
    distances = torch.cdist(test.flatten(1).float(), images.flatten(1).float())
    assert 0.9 < (labels[distances.argmin(1)] == test_labels).float().mean() < 0.98


def test_pixels_are_scaled_to_the_range_of_chains():
    scaled = data.normalise(torch.tensor([0, 255], dtype=torch.uint8))
    assert scaled.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_pixels_of_another_type_than_uint8_are_refused_and_not_scaled_twice(dtype):
    with pytest.raises(TypeError, match=str(dtype)):
        data.normalise(torch.zeros(2, 1, 4, 4, dtype=dtype))
