"""Fixtures of several test files."""

import signal

import numpy as np
import pytest
import torch
from helpers import run, tiny
from PIL import Image

torch.set_num_threads(1)  # as in the processes: the promise of equal bits is for one count


# A shell's background job ignores Ctrl-C, and so would the runs that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def without_a_gpu(request, monkeypatch):
    """Tests are of the CPU, which alone promises equal bits, unless they are marked `gpu`."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of other processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 24 updates."""
    folder = tmp_path_factory.mktemp("trained")
    result = run("train", *tiny(), "--out", folder)
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Arguments of a run on 40 images, which other processes read faster than they draw digits."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 20, 28, 28), dtype=np.uint8)
    for label, images in enumerate(pixels):
        (folder / "train" / str(label)).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / "train" / str(label) / f"{i}.png")
    return "train", *tiny("data.name=folder", "image=[1, 28, 28]"), "--data-dir", folder


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A finished run of `small`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(*small, "--out", folder).exit_code == 0
    return folder
