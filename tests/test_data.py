"""Each loader on files of its real format, made here, whole and damaged; the embedded set."""

import hashlib
import pickle
import struct
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
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
        name: data.public(kind, data.DATASETS[name].shape, 20, 20, extra=20)
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
    assert images.shape == (4, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [0, 0, 1, 1]


def test_a_folder_keeps_pixels_that_already_fit(tmp_path):
    write_folder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "train/cat/0.png")
    images, _ = data.load("folder", "train", str(tmp_path), (3, 8, 9))
    assert torch.equal(images[0], torch.tensor(pixels).permute(2, 0, 1))


def test_images_of_16_bits_are_refused_and_not_clipped(tmp_path):
    write_folder(tmp_path)
    Image.fromarray(np.full((28, 28), 40_000, np.uint16)).save(tmp_path / "train/cat/0.png")
    with pytest.raises(data.DataError, match=r"cat/0\.png cannot be read \(more than 8 bits"):
        data.load("folder", "train", str(tmp_path), (1, 28, 28))


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    shape = (1, 28, 28)
    with pytest.raises(data.DataError, match=r"/train.*Images belong in"):
        data.load("folder", "train", str(tmp_path), shape)
    write_folder(tmp_path)
    truncated = tmp_path / "train/dog/0.png"
    truncated.write_bytes(truncated.read_bytes()[:60])
    with pytest.raises(data.DataError, match=r"train/dog/0\.png cannot be read"):
        data.load("folder", "train", str(tmp_path), shape)
    pixels = np.zeros((24, 24), np.uint8)
    Image.fromarray(pixels).save(picture := tmp_path / "train/cat/1.tif")
    flipped = picture.read_bytes().replace(b"\x11\x01\x04\0", b"\x11\x01\x0c\0")  # a float offset
    picture.write_bytes(flipped)
    truncated.unlink()
    with pytest.raises(data.DataError, match=r"train/cat/1\.tif cannot be read"):
        data.load("folder", "train", str(tmp_path), shape)
    (tmp_path / "test/emu").mkdir()
    with pytest.raises(data.DataError, match="emu"):
        data.load("folder", "test", str(tmp_path), shape)
    Image.new("L", (9, 9)).save(tmp_path / "test/emu/0.png")
    with pytest.raises(data.DataError, match="classes cat, dog, test has cat, dog, emu"):
        data.load("folder", "test", str(tmp_path), shape)


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
