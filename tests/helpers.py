"""What several test files use: tiny settings, commands as users run them, comparison of runs."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner
from PIL import Image

import cebm
import data
import models

ROOT = Path(__file__).parent.parent


TINY = [
    "channels=[4, 4, 4, 4]",
    "hidden=8",
    "latent=4",
    "steps=2",
    "batch=16",
    "buffer=64",
    "precision=float32",
    "updates=24",
    "checkpoint_every=4",
    "log_every=3",
    "pictures=0",
    "warmup=5",
    "average=0.5",
    "rate=1e-3",
    "bound=0",
    "decay=cosine",
    "evaluate_every=0",
]


def tiny(*extra):
    return [part for setting in [*TINY, *extra] for part in ("--set", setting)]


def options_for(preset, settings):
    """--set options, without those that the model of a preset has no use for."""
    usable = cebm.keys_in_use(models.MODELS[cebm.compose(preset).model.name])
    chosen = [setting for setting in settings if cebm.parse_setting(setting)[0] in usable]
    return [part for setting in chosen for part in ("--set", setting)]


def run(*arguments):
    """A command in this process: exit status, stdout and stderr; never a traceback."""
    result = CliRunner().invoke(cebm.main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def launch(*arguments, by=()):
    """A command in a process of its own, or in those that the module `by` starts."""
    command = [sys.executable, *by, ROOT / "cebm.py", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def rows(folder):
    """log.csv without its columns of wall-clock time."""
    with open(folder / "log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


def assert_same_run(a, b):
    """Weights, optimiser, buffer, generator, updates and log agree in every bit."""
    one, two = (cebm.load_checkpoint(folder / "ckpt.pt") for folder in (a, b))
    assert one.keys() == two.keys()
    for key in one.keys() - {"seconds", "log"}:  # the times in them differ
        same(one[key], two[key], key)
    assert rows(a) == rows(b)


def same(a, b, where):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            same(*pair, f"{where}.{i}")
    else:
        assert a == b, where


def tiny_data(monkeypatch):
    """Random images of any data set's shape, 40 to train and 20 to test on."""

    def images(name, split, data_dir="data", image_shape=(1, 28, 28), extra=False, options=None):
        count = {"train": 40, "test": 20}[split]
        generator = torch.Generator().manual_seed(count)
        pixels = torch.randint(0, 256, (count, *image_shape), generator=generator)
        return pixels.byte(), torch.arange(count) % 10

    folder = data.Folder(Path(), "DIR/CLASS", {str(label): [] for label in range(10)}, None)
    monkeypatch.setattr(data, "load", images)
    monkeypatch.setattr(data, "find_folder", lambda root, split_seed=0: folder)


def poison_once(monkeypatch, call, where="loss", stop=None):
    """The loss or a gradient of the `call`th update is NaN or infinite; Ctrl-C in the `stop`th."""
    honest, calls = models.Conjugate.loss, []

    def loss(self, x, y, chains):
        calls.append(1)
        if len(calls) == stop:
            os.kill(os.getpid(), signal.SIGINT)
        loss, metrics = honest(self, x, y, chains)
        bias = self.network.heads[0][0].bias
        kink = (bias - bias.detach()).abs().sqrt().sum()  # 0, its gradient infinite or NaN
        poison = float("nan") if where == "loss" else kink
        return (loss + poison if len(calls) == call else loss), metrics

    monkeypatch.setattr(models.Conjugate, "loss", loss)


def send_signal(monkeypatch, update, number):
    """This process gets a signal in an update."""
    honest, calls = models.Conjugate.loss, []

    def loss(self, x, y, chains):
        calls.append(1)
        if len(calls) == update:
            os.kill(os.getpid(), number)
        return honest(self, x, y, chains)

    monkeypatch.setattr(models.Conjugate, "loss", loss)


STILL = "step_size=0", "chains.noise_std=0"  # chains that stay where they are


RESTARTED = (
    *STILL,
    "reuse=0",
    "data_restarts=1",
    "restart_std=0",
    "data.noise_std=0",
    "batch=20",
    "buffer=20",
    "pictures=0",
)


def assert_chains_are_the_last_batch(folder, data_dir):
    """Of a run of `small` with RESTARTED; the buffer is as large as the batch."""
    _, config, state = cebm.load_model(folder / "ckpt.pt")
    epoch, position = divmod(state["updates"] - 1, 40 // 20)
    order = cebm.epoch_order(0, epoch, 40, torch.device("cpu"))[20 * position :][:20]
    images = data.normalise(cebm.load_images(config, "train", data_dir)[0][order])
    assert torch.equal(state["buffer"].unique(dim=0), images.unique(dim=0))


def read_sheet(path, rows, columns, side=28, gap=2):
    """The pixels of a grid of grey images, each read at the middle of its enlarged square."""
    height, width = (count * (side + gap) + gap for count in (rows, columns))
    scale = -(-600 // min(height, width))
    picture = np.asarray(Image.open(path).convert("L"))
    assert picture.shape[1] == scale * width
    assert picture.shape[0] > scale * height  # a caption below
    return picture[scale // 2 : scale * height : scale, scale // 2 :: scale]
