"""The commands as a user runs them, on the embedded set; bad input; crashes and resumption."""

import csv
import json
import os
import pickle
import random
import signal
import statistics
import subprocess
import sys
import time
import weakref
from dataclasses import asdict, fields, replace
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cebm

ROOT = Path(__file__).parent.parent
torch.set_num_threads(1)  # as in the processes below: the promise of equal bits is for one count
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
    "pictures=3",
    "warmup=5",
    "average=0.5",
    "rate=1e-3",
    "bound=0",
    "decay=cosine",
]


@pytest.fixture(autouse=True)
def without_a_gpu(request, monkeypatch):
    """Tests of the CPU, which alone promises equal bits, but for those named after a GPU."""
    if "gpu" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of other processes


def tiny(*extra):
    return [part for setting in [*TINY, *extra] for part in ("--set", setting)]


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
    return "train", *tiny("data.name=folder", "classes=2"), "--data-dir", folder


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """A finished run of `small`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run(*small, "--out", folder).exit_code == 0
    return folder


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


def test_a_run_leaves_what_it_promises(trained):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    assert state["updates"] == 24
    assert state["buffer"].shape == (64, 1, 28, 28)
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert cebm.parse_config(written) == cebm.parse_config(state["config"])
    assert [int(r["update"]) for r in rows(trained)] == list(range(3, 25, 3))
    assert len(list((trained / "samples").glob("*.png"))) == 3
    moved = cebm.load_model(trained / "ckpt.pt")[0].state_dict()
    start = cebm.new_model(cebm.parse_config(written), "cpu").state_dict()
    assert all(not torch.equal(moved[k], start[k]) for k in start if "prior" not in k)


def test_the_end_of_a_run_names_the_checkpoint_and_the_next_commands(tmp_path):
    out = run("train", *tiny("updates=2"), "--out", tmp_path / "a").stdout
    assert f"python cebm.py knn {tmp_path}/a/ckpt.pt" in out
    assert f"python cebm.py sample {tmp_path}/a/ckpt.pt" in out


def test_a_run_killed_at_random_moments_ends_equal_to_the_uninterrupted_one(
    small, uninterrupted, tmp_path
):
    random.seed(time.time_ns())
    kills, log = 0, tmp_path / "log.csv"
    for _ in range(40):
        before, deadline = log.exists() and log.read_bytes(), time.monotonic() + 60
        process = launch(*small, "--out", tmp_path)
        while process.poll() is None and (log.exists() and log.read_bytes()) == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        try:
            process.wait(random.uniform(0, 0.2 if kills < 2 else 60))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills > 0
    assert process.returncode == 0, process.stderr.read()
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("least", "settings"),
    [
        (60, tiny("updates=1000", "log_every=10")),
        (40, tiny("rate=0.5", "decay=none", "updates=1000", "log_every=10", "guard.every=1")),
    ],
)
def test_a_hundred_kills_lose_nothing_also_of_a_run_that_diverges(tmp_path, least, settings):
    random.seed(time.time_ns())
    whole, parts, kills = tmp_path / "whole", tmp_path / "parts", 0
    assert launch("train", *settings, "--out", whole).wait() == 0
    log = parts / "log.csv"
    while True:
        before = log.exists() and log.read_bytes()
        process = launch("train", *settings, "--out", parts)
        while process.poll() is None and (log.exists() and log.read_bytes()) == before:
            time.sleep(0.002)
        try:
            process.wait(random.uniform(0, 0.2 if kills < least else 600))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0, process.stderr.read()
    assert kills >= least
    assert_same_run(whole, parts)
    print(kills, "kills,", len(cebm.load_checkpoint(parts / "ckpt.pt")["rollbacks"]), "rollbacks")


@pytest.mark.slow
def test_memory_stays_as_it_was_over_two_thousand_updates(tmp_path):
    many = tiny("updates=2200", "checkpoint_every=20", "log_every=50")
    process = launch("train", *many, "--out", tmp_path)
    sizes, log = {}, tmp_path / "log.csv"
    while process.poll() is None:
        update = int(rows(tmp_path)[-1]["update"]) if log.exists() else 0
        with open(f"/proc/{process.pid}/statm") as file:
            sizes[update] = int(file.read().split()[1] or 0) or sizes.get(update)
        time.sleep(0.1)
    assert process.returncode == 0
    warm, end = (
        statistics.median(s for u, s in sizes.items() if low < u <= high)
        for low, high in ((200, 500), (1900, 2200))
    )
    assert end / warm < 1.05, (warm, end)


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_end(small, uninterrupted, tmp_path):
    for attempt in range(10):  # on a busy machine the signal may come after the end
        folder = tmp_path / str(attempt)
        process = launch(*small, "--out", folder)
        deadline = time.monotonic() + 60
        while not (folder / "log.csv").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130, err
    assert "the same command goes on" in out
    assert 3 <= cebm.load_checkpoint(folder / "ckpt.pt")["updates"] < 24
    assert "going on after update" in run(*small, "--out", folder).stdout
    assert_same_run(uninterrupted, folder)


def test_a_run_whose_output_nobody_reads_any_more_saves_and_goes_on_to_the_same_end(
    small, uninterrupted, tmp_path
):
    process = launch(*small, "--out", tmp_path)
    process.stdout.readline()
    process.stdout.close()  # as `train | tee` when Ctrl-C has ended tee
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == ""
    assert 0 < cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] < 24
    assert run(*small, "--out", tmp_path).exit_code == 0
    assert_same_run(uninterrupted, tmp_path)


def test_ctrl_c_saves_also_where_nobody_reads_and_no_line_was_due(small, tmp_path):
    long = ("--set", "updates=100000", "--set", "log_every=100000", "--out", tmp_path)
    process = launch(*small, *long)
    assert "every 100000" in process.stdout.readline()  # from here on Ctrl-C is waited for
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == ""
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] > 0


def test_a_run_whose_output_finds_no_room_saves_and_goes_on_to_the_same_end(
    small, uninterrupted, tmp_path
):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "cebm.py", *small, "--out", tmp_path]
        result = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert (result.returncode, result.stderr) == (130, b"")
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] == 1
    assert run(*small, "--out", tmp_path).exit_code == 0
    assert_same_run(uninterrupted, tmp_path)


def test_a_batch_larger_than_the_buffer_is_for_models_without_chains():
    for preset in ("vae-mnist", "hdge-mnist"):
        cebm.compose(preset, ["batch=6000"])
    with pytest.raises(click.UsageError, match="a slot for each chain"):
        cebm.compose("cebm-mnist", ["batch=6000"])


def test_a_finished_run_can_be_made_longer_but_not_changed(tmp_path):
    run("train", *tiny("updates=4", "decay=none"), "--out", tmp_path)
    before = (tmp_path / "ckpt.pt").read_bytes()
    other = run("train", *tiny("updates=4", "decay=none", "rate=2e-3", "l2=0.2"), "--out", tmp_path)
    assert other.exit_code == 1
    assert "train.rate (0.001, now 0.002)" in other.stderr
    assert "model.l2 (0.1, now 0.2)" in other.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    longer = run(
        "train", *tiny("updates=6", "decay=none", "compile=true", "threads=2"), "--out", tmp_path
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for the tests after this one
    assert longer.exit_code == 0, longer.stderr
    assert threads == 2
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] == 6


def test_a_run_changed_on_request_goes_on_by_the_new_settings_and_records_them(
    tmp_path, monkeypatch
):
    folder, changed = tmp_path / "a", tiny("decay=none", "warmup=0", "rate=2e-3", "updates=16")
    run("train", *tiny("decay=none", "warmup=0", "updates=8"), "--out", folder)
    result = run("train", *changed, "--change", "--out", folder)
    assert result.exit_code == 0, result.stderr
    shown = yaml.safe_load(run("show", folder / "ckpt.pt").stdout)
    assert shown["preset"] == "quickstart; from update 8 on train.rate (0.001, now 0.002)"
    assert shown["config"]["train"]["rate"] == 0.002
    stepwise = tiny("decay=none", "warmup=0", "updates=16")
    monkeypatch.setattr(cebm, "learning_rate", lambda update, *_: 0.001 * (1 + (update > 8)))
    run("train", *stepwise, "--out", tmp_path / "b")
    one, two = (cebm.load_checkpoint(tmp_path / name / "ckpt.pt") for name in "ab")
    for part in ("model", "average", "optimiser", "buffer", "generators"):
        same(one[part], two[part], part)
    more = (
        "beta1=0.5",
        "epsilon=1e-4",
        "steps=3",
        "precision=bfloat16",
        "updates=24",
        "rate=2e-3",
        "decay=none",
    )
    assert run("train", *changed, *tiny(*more), "--change", "--out", folder).exit_code == 0
    again = run("train", *changed, *tiny(*more), "--out", folder)  # itself no change any more
    assert again.exit_code == 0, again.stderr
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    group = state["optimiser"]["param_groups"][0]
    assert (group["betas"], group["eps"]) == ((0.5, 0.999), 1e-4)
    assert (state["updates"], state["precision"]) == (24, "bfloat16")
    assert "; from update 16 on chains.steps (2, now 3), train.beta1 (0." in state["preset"]
    for precision in ("float32", "auto"):
        assert (
            run(
                "train",
                *changed,
                *tiny(*more, f"precision={precision}"),
                "--change",
                "--out",
                folder,
            ).exit_code
            == 0
        )
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    pays = cebm.sampling.bfloat16_pays(torch.device(state["device"]))
    assert state["precision"] == ("bfloat16" if pays else "float32")
    more = (*more, "precision=auto", "represent=mixture")  # with no update left
    assert run("train", *changed, *tiny(*more), "--change", "--out", folder).exit_code == 0
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    assert state["preset"].endswith("; from update 24 on model.represent (component, now mixture)")
    assert state["config"]["model"]["represent"] == "mixture"
    less = run("train", *changed, *tiny(*more, "updates=12"), "--change", "--out", folder)
    assert (less.exit_code, "done: " in less.stdout) == (0, True)  # it has been longer already


def test_a_change_of_a_run_that_is_not_there_is_refused_and_begins_none(tmp_path):
    result = run("train", *tiny(), "--change", "--out", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'ckpt.pt'} is no whole checkpoint" in result.stderr
    assert "(No such file or directory)" in result.stderr
    assert not (tmp_path / "config.yaml").exists()


def test_a_change_that_the_weights_cannot_follow_is_refused_and_nothing_is_lost(trained, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(before := (trained / "ckpt.pt").read_bytes())
    result = run("train", *tiny("hidden=9"), "--change", "--out", tmp_path)
    assert result.exit_code == 1
    assert "cannot be gone on from" in result.stderr
    one = tmp_path / "one"  # chain, which would do for each of four
    run("train", *tiny("batch=1", "buffer=1", "updates=1"), "--out", one)
    several = run("train", *tiny("batch=1", "buffer=4", "updates=2"), "--change", "--out", one)
    assert "cannot be gone on from" in several.stderr
    other = run("train", *tiny("model.name=igebm"), "--change", "--out", tmp_path)
    assert other.exit_code == 1
    assert "model.name (cebm, now igebm)" in other.stderr
    reseeded = run("train", *tiny(), "--seed", 1, "--change", "--out", tmp_path)
    assert "train.seed (0, now 1)" in reseeded.stderr  # the untrained network would be another
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_the_rate_rises_in_the_warm_up_and_falls_to_zero_by_a_cosine():
    settings = "rate=1", "decay=cosine", "warmup=10", "updates=1000"
    train = cebm.compose("quickstart", settings).train
    rates = [cebm.learning_rate(update, train) for update in range(1, 1001)]
    assert rates[:10] == pytest.approx([update / 10 for update in range(1, 11)], rel=1e-3)
    assert rates[500] == pytest.approx(0.5)
    assert 0 < rates[-1] < 1e-5
    assert sum(rates[10:]) == pytest.approx(500, abs=10)
    assert cebm.learning_rate(501, train, halvings=2) == rates[500] / 4
    constant = replace(train, decay="none")
    assert cebm.learning_rate(5, constant) == 0.5
    assert cebm.learning_rate(1000, constant) == 1


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    device = torch.device("cpu")
    orders = [cebm.epoch_order(*which, 1000, device).tolist() for which in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(1000)) for order in orders)
    assert len({tuple(order) for order in [*orders, range(1000)]}) == 4


def test_training_images_have_their_labels_and_gaussian_noise_anew_at_every_update(
    tmp_path, monkeypatch
):
    import models

    honest, seen = models.Conjugate.loss, []
    monkeypatch.setattr(
        models.Conjugate,
        "loss",
        lambda self, x, y, chains: seen.append((x, y)) or honest(self, x, y, chains),
    )
    assert run("train", *tiny("noise_std=0.5", "updates=8"), "--out", tmp_path).exit_code == 2
    result = run("train", *tiny("data.noise_std=0.5", "updates=8"), "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    order = cebm.epoch_order(0, 0, 10_000, torch.device("cpu"))[:128]
    images, labels = cebm.data.load("glyphs", "train")
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(y, labels[order])
    noise = x - cebm.data.normalise(images[order])
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.5, abs=0.01)
    assert (noise.abs() < 0.5).float().mean() == pytest.approx(0.683, abs=0.01)
    early, late = noise.flatten(1).chunk(2)
    assert abs((early * late).mean()) < 0.01


STILL = "step_size=0", "chains.noise_std=0"  # chains that stay where they are


def test_chains_go_back_to_the_slots_that_they_were_drawn_from(tmp_path):
    buffers = []
    for updates in (1, 3):
        settings = tiny(*STILL, "reuse=1", "decay=none", f"updates={updates}")
        assert run("train", *settings, "--out", tmp_path / str(updates)).exit_code == 0
        buffers.append(cebm.load_checkpoint(tmp_path / str(updates) / "ckpt.pt")["buffer"])
    assert torch.equal(*buffers)


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
    images = cebm.data.normalise(cebm.load_images(config, "train", data_dir)[0][order])
    assert torch.equal(state["buffer"].unique(dim=0), images.unique(dim=0))


def test_chains_that_restart_from_data_start_at_each_image_of_the_batch(small, tmp_path):
    result = run(*small, *tiny(*RESTARTED, "updates=2"), "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert_chains_are_the_last_batch(tmp_path, small[-1])


def test_a_seed_is_of_weights_and_chains_and_the_same_as_its_key(tmp_path):
    for name, seed in ("a", ["--seed", 1]), ("b", ["--set", "train.seed=1"]), ("c", []):
        assert run("train", *tiny("updates=1"), *seed, "--out", tmp_path / name).exit_code == 0
    assert_same_run(tmp_path / "a", tmp_path / "b")
    one, other = (cebm.load_checkpoint(tmp_path / name / "ckpt.pt") for name in "ac")
    assert (one["seed"], other["seed"]) == (1, 0)
    assert (one["buffer"] == other["buffer"]).float().mean() < 0.01
    untrained = (cebm.new_model(cebm.parse_config(s["config"]), "cpu") for s in (one, other))
    assert not torch.equal(*(model.network.trunk[0].weight for model in untrained))


def test_weights_and_first_chains_do_not_share_random_numbers():
    run = cebm.Run(cebm.compose("cebm-mnist"), torch.device("cpu"), 0, 1)
    weights = run.model.network.trunk[0].weight.flatten().detach()  # what a seed gives first
    chains = run.buffer.images.flatten()[: len(weights)]
    assert abs(torch.corrcoef(torch.stack([weights, chains]))[0, 1]) < 0.2  # five deviations


def test_a_run_whose_rate_falls_to_its_end_is_not_made_longer(tmp_path):
    assert run("train", *tiny("updates=2"), "--out", tmp_path).exit_code == 0
    longer = run("train", *tiny("updates=3"), "--out", tmp_path)
    assert longer.exit_code == 1
    assert "train.updates (2, now 3)" in longer.stderr


def test_chains_grow_by_a_constant_factor_to_their_final_steps(tmp_path):
    growing = [
        "steps=2",
        "final_steps=8",
        "decay=none",
        "rate=0",
        "step_size=0",
        "chains.noise_std=0.3",
        "reuse=1",
        "batch=64",
    ]
    assert run("train", *tiny(*growing, "updates=4"), "--out", tmp_path).exit_code == 0
    buffer = cebm.load_checkpoint(tmp_path / "ckpt.pt")["buffer"]
    steps = (buffer.var().item() - 1 / 3) / 0.3**2  # of noise alone, from uniform chains
    assert steps == pytest.approx(3 + 4 + 6 + 8, abs=0.5)
    out = run("sample", tmp_path / "ckpt.pt", "--out", tmp_path / "s.png").stdout
    assert out.startswith("8 steps:")
    longer = run("train", *tiny(*growing, "updates=6"), "--out", tmp_path)
    assert longer.exit_code == 1
    assert "train.updates (4, now 6)" in longer.stderr


def test_the_average_of_the_weights_is_exponential_and_what_is_evaluated(tmp_path):
    states = []
    for updates in (1, 2):
        settings = tiny("average=0.75", "decay=none", f"updates={updates}")
        run("train", *settings, "--out", tmp_path / str(updates))
        states.append(cebm.load_checkpoint(tmp_path / str(updates) / "ckpt.pt")["model"])
    model, config, _ = cebm.load_model(tmp_path / "2" / "ckpt.pt")
    untrained, loaded = cebm.new_model(config, "cpu").state_dict(), model.state_dict()
    for name, value in loaded.items():
        expected = 0.5625 * untrained[name] + 0.1875 * states[0][name] + 0.25 * states[1][name]
        torch.testing.assert_close(value, expected)
    assert any(not torch.equal(value, states[1][name]) for name, value in loaded.items())


def test_an_average_that_the_run_no_longer_keeps_is_not_what_is_evaluated(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    state["config"]["train"]["average"] = 0.0  # a rollback past the change brings the old one back
    torch.save(state, tmp_path / "ckpt.pt")
    loaded = cebm.load_model(tmp_path / "ckpt.pt")[0].state_dict()
    same(dict(loaded), dict(state["model"]), "weights")


def test_an_average_begun_by_a_change_starts_from_the_weights_also_after_a_rollback(
    tmp_path, monkeypatch
):
    plain, averaged = (tiny("decay=none", "updates=8", f"average={a}") for a in (0, 0.75))
    run("train", *plain, "--out", tmp_path)
    eighth = cebm.load_checkpoint(tmp_path / "ckpt.pt")["model"]
    more = (*averaged, "--set", "updates=9", "--out", tmp_path)
    assert run("train", *more, "--change").exit_code == 0
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    for name, value in state["average"].items():
        torch.testing.assert_close(value, 0.75 * eighth[name] + 0.25 * state["model"][name])
    poisoned_once(monkeypatch, 2)  # update 11, before a checkpoint that has an average is good
    result = run("train", *more, "--set", "updates=12")
    assert result.exit_code == 0, result.stderr
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert [r["to"] for r in state["rollbacks"]] == [4]
    assert any(not torch.equal(v, state["model"][k]) for k, v in state["average"].items())


def test_an_average_that_was_ended_does_not_come_back_by_a_rollback(tmp_path, monkeypatch):
    folder = ("--out", tmp_path)
    run("train", *tiny("decay=none", "updates=8", "average=0.9"), *folder)
    poisoned_once(monkeypatch, 2)  # update 10, so that it goes back to 4, where there was one
    run("train", *tiny("decay=none", "updates=24", "average=0"), *folder, "--change")
    last = cebm.load_checkpoint(tmp_path / "ckpt.pt")["model"]
    run("train", *tiny("decay=none", "updates=25", "average=0.75"), *folder, "--change")
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert [r["to"] for r in state["rollbacks"]] == [4]
    for name, value in state["average"].items():
        torch.testing.assert_close(value, 0.75 * last[name] + 0.25 * state["model"][name])


def test_a_second_train_in_the_same_folder_is_refused(tmp_path):
    with cebm.claimed(tmp_path):
        result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 1
    assert "in use by another" in result.stderr


def poisoned_once(monkeypatch, call, where="loss", stop=None):
    """The loss or a gradient of the `call`th update is NaN or infinite; Ctrl-C in the `stop`th."""
    import models

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


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_meets_nan_goes_back_to_what_stayed_healthy_and_ends_by_new_noise(
    trained, tmp_path, monkeypatch, where
):
    poisoned_once(monkeypatch, 10, where)
    result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "update 12: " in result.stdout
    assert "back to update 4" in result.stdout  # that of 8 had not yet shown itself healthy
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert [(r["update"], r["to"]) for r in state["rollbacks"]] == [(12, 4)]
    assert "magnitude inf" in state["rollbacks"][0]["why"]
    assert state["updates"] == 24
    assert next(int(r["rollbacks"]) for r in rows(tmp_path) if int(r["update"]) > 11) == 1
    assert "to: 4" in run("show", tmp_path / "ckpt.pt").stdout
    without = cebm.load_checkpoint(trained / "ckpt.pt")["buffer"]
    assert (state["buffer"] == without).float().mean() < 0.5


def test_bounds_are_multiples_of_the_level_or_the_floor_and_numbers_alone_are_within():
    guard = cebm.compose("quickstart", ["runaway=3", "energy_bound=1e6"]).guard
    for name, value, level, past in [
        ("gap", 89, {}, False),
        ("gap", 91, {}, True),  # the floor, 30, three times
        ("gap", 179, {"gap": 60.0}, False),
        ("gap", 181, {"gap": 60.0}, True),
        ("gap", 89, {"gap": 1.0}, False),
        ("gap", 1.1e6, {"gap": 1e6}, True),
        ("gap", 0.0, {"gap": 1e-3}, True),
        ("gap", 0.0, {}, False),  # there was one
        ("loss", 9e5, {}, False),
        ("loss", 1.1e6, {}, True),
        ("loss", float("nan"), {}, True),
    ]:
        why = cebm.out_of_bounds({"first": 0.0, name: value}, level, {"gap": 30.0}, guard)
        assert (why or "").startswith(f"{name} of magnitude") == past == bool(why)


@pytest.mark.parametrize(
    ("narrow", "name"),
    [(["gap=1e-3"], "gap"), (["guard.pixels=1", "chains.noise_std=1", "reuse=1"], "pixel_m")],
)
def test_the_guard_says_what_ran_away(tmp_path, narrow, name):
    settings = tiny(*narrow, "runaway=1", "rollbacks=0", "guard.every=1")
    result = run("train", *settings, "--out", tmp_path)
    assert result.exit_code == 1
    assert f": {name}" in result.stderr
    assert "of magnitude" in result.stderr


def test_a_network_whose_energies_have_become_all_the_same_goes_back(tmp_path):
    settings = tiny("decay=none", "every=4")
    assert run("train", *settings, "--set", "updates=8", "--out", tmp_path).exit_code == 0
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    for value in state["model"].values():
        value.zero_()  # a dead one: no gradient moves it any more
    torch.save(state, tmp_path / "ckpt.pt")
    result = run("train", *settings, "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "update 12: gap of magnitude 0 " in result.stdout
    assert "back to update 4" in result.stdout
    assert float(rows(tmp_path)[-1]["gap"])


DIVERGING = tiny("rate=0.5", "warmup=0", "decay=none", "updates=32", "guard.every=1")


def test_a_rate_that_diverges_is_halved_until_it_does_not_and_the_same_each_time(tmp_path):
    folders = tmp_path / "a", tmp_path / "b"
    for folder in folders:
        result = run("train", *DIVERGING, "--out", folder)
        assert result.exit_code == 0, result.stderr
    assert_same_run(*folders)
    state = cebm.load_checkpoint(folders[0] / "ckpt.pt")
    told = [line for line in result.stdout.splitlines() if "back to update" in line]
    assert len(told) == len(state["rollbacks"]) > 2
    rate = state["optimiser"]["param_groups"][0]["lr"]
    assert rate == 0.5 * 0.5 ** (len(state["rollbacks"]) - 2)


def test_a_run_stopped_by_ctrl_c_rolls_back_as_the_uninterrupted_one(tmp_path, monkeypatch):
    whole, parts, settings = tmp_path / "whole", tmp_path / "parts", tiny("checkpoint_every=8")
    poisoned_once(monkeypatch, 18)
    assert run("train", *settings, "--out", whole).exit_code == 0
    monkeypatch.undo()
    poisoned_once(monkeypatch, 18, stop=15)
    assert run("train", *settings, "--out", parts).exit_code == 130
    assert cebm.load_checkpoint(parts / "ckpt.pt")["updates"] == 15
    assert run("train", *settings, "--out", parts).exit_code == 0
    assert_same_run(whole, parts)
    assert cebm.load_checkpoint(parts / "ckpt.pt")["rollbacks"][0]["to"] == 8


def test_ctrl_c_on_weights_that_are_not_numbers_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = tiny("checkpoint_every=8", "guard.every=24")  # checks are at 8, 16 and 24
    poisoned_once(monkeypatch, 18, "gradient")
    assert run("train", *settings, "--out", whole).exit_code == 0
    monkeypatch.undo()
    poisoned_once(monkeypatch, 18, "gradient", stop=20)
    assert run("train", *settings, "--out", parts).exit_code == 130
    assert cebm.load_checkpoint(parts / "ckpt.pt")["updates"] == 16
    monkeypatch.undo()
    poisoned_once(monkeypatch, 2, "gradient")  # the same update again
    assert run("train", *settings, "--out", parts).exit_code == 0
    assert_same_run(whole, parts)
    assert cebm.load_checkpoint(parts / "ckpt.pt")["rollbacks"][0]["to"] == 8
    monkeypatch.undo()
    poisoned_once(monkeypatch, 2, "gradient", stop=4)  # before there is a checkpoint
    early = run("train", *settings, "--out", tmp_path / "early")
    assert early.exit_code == 130
    assert "interrupted; nothing at" in early.stdout
    assert not (tmp_path / "early/ckpt.pt").exists()


def test_a_run_made_longer_rolls_back_as_one_that_was_as_long_from_the_start(tmp_path, monkeypatch):
    folders = tmp_path / "whole", tmp_path / "longer"
    for folder, lengths in zip(folders, ((24,), (11, 24)), strict=True):
        poisoned_once(monkeypatch, 14)
        for updates in lengths:
            settings = tiny("checkpoint_every=8", "decay=none", f"updates={updates}")
            assert run("train", *settings, "--out", folder).exit_code == 0
        monkeypatch.undo()
    state = cebm.load_checkpoint(folders[1] / "ckpt.pt")
    assert [r["to"] for r in state["rollbacks"]] == [0]  # that of 8 had not shown itself healthy
    for part in ("model", "average", "optimiser", "buffer", "generators", "rollbacks"):
        same(state[part], cebm.load_checkpoint(folders[0] / "ckpt.pt")[part], part)


def test_too_many_rollbacks_end_the_run_in_its_last_good_state(tmp_path):
    result = run("train", *DIVERGING, "--set", "rollbacks=1", "--out", tmp_path)
    assert result.exit_code == 1
    assert "diverged 2 times" in result.stderr
    assert run("train", *DIVERGING, "--set", "rollbacks=1", "--out", tmp_path).exit_code == 1
    assert f"{tmp_path}/ckpt.pt is good" in result.stderr
    assert "lower train.rate" in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    for part in ("model", "optimiser", "buffer", "updates"):
        same(state[part], state["good"][part], part)
    start = cebm.new_model(cebm.parse_config(state["config"]), "cpu").state_dict()
    same(state["model"], start, "weights")
    assert state["buffer"].abs().max() <= 1  # no exploded chain is left in it


def test_a_guard_that_is_loosened_by_a_change_holds_from_then_on(tmp_path):
    narrow = ("gap=1e-3", "guard.pixels=1", "runaway=1", "rollbacks=1", "guard.every=2")
    result = run("train", *tiny(*narrow), "--out", tmp_path)
    assert "diverged 2 times" in result.stderr
    wide = tiny(*narrow, "gap=1e3", "guard.pixels=1e3", "rollbacks=2")
    result = run("train", *wide, "--change", "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert len(cebm.load_checkpoint(tmp_path / "ckpt.pt")["rollbacks"]) == 2


def test_a_level_is_the_greatest_since_the_checkpoint_before_at_most_a_multiple_of_the_floor(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cebm, "out_of_bounds", lambda *_: None)
    settings = tiny("log_every=1", "guard.gap=1e-3", "runaway=1.1", "average=0")
    assert run("train", *settings, "--out", tmp_path).exit_code == 0
    level = cebm.load_checkpoint(tmp_path / "ckpt.pt")["level"]
    greatest = {k: max(abs(float(row[k])) for row in rows(tmp_path)[-4:]) for k in level}
    assert greatest["gap"] > level["gap"] == pytest.approx(1.1e-3)
    assert all(level[k] == greatest[k] for k in ("pixel_min", "pixel_max"))


def test_the_guard_is_silent_on_a_healthy_run(trained):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    assert state["rollbacks"] == []
    assert state["level"].keys() == {"gap", "pixel_min", "pixel_max"}
    assert 1 <= state["level"]["pixel_max"] < 2


@pytest.mark.parametrize(
    "setting",
    [
        "buffer=10000000",
        "batch=1000000 buffer=1000000",
        "hidden=65536 channels=[4096,4096,4096,4096]",
    ],
)
def test_sizes_beyond_memory_are_refused_before_any_work(tmp_path, setting):
    result = run("train", *tiny(*setting.split()), "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 1
    assert "GiB of memory" in result.stderr
    assert not (tmp_path / "config.yaml").exists()


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"


def torchrun(*arguments):
    """A command in two processes of one machine's processor: exit status, stdout and stderr."""
    process = launch(*arguments, "--device", "cpu", by=TORCHRUN)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_processes_share_the_batch_and_ctrl_c_ends_them_before_the_next_check(small, tmp_path):
    never = [f"{key}=1000000" for key in ("updates", "checkpoint_every", "guard.every")]
    settings = tiny(*RESTARTED, *never)
    process = launch(*small, *settings, "--out", tmp_path, "--device", "cpu", by=TORCHRUN)
    deadline = time.monotonic() + 100
    while process.poll() is None and not (tmp_path / "log.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "interrupted; " in process.communicate(timeout=100)[0]
    assert 0 < cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] < 1000000
    assert_chains_are_the_last_batch(tmp_path, small[-1])


def test_two_processes_train_one_run_and_go_on_only_as_two(small, tmp_path):
    six, eight = ([*small, "--set", "decay=none", "--set", f"updates={n}"] for n in (6, 8))
    result = torchrun(*six, "--out", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("done: ") == 1
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert state["buffer"].shape == (64, 1, 28, 28)
    assert state["updates"] == 6
    assert not torch.equal(*state["generators"])
    assert not torch.equal(*state["buffer"].chunk(2))  # each process has chains of its own
    alone = run(*eight, "--out", tmp_path)
    assert alone.exit_code == 1
    assert "torchrun --nproc-per-node=2" in alone.stderr
    longer = torchrun(*eight, "--out", tmp_path)
    assert "going on after update 6" in longer.stdout, longer.stderr
    whole = torchrun(*eight, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    ends = [cebm.load_checkpoint(f / "ckpt.pt") for f in (tmp_path, tmp_path / "whole")]
    for key in ("model", "optimiser", "buffer", "generators"):
        same(ends[0][key], ends[1][key], key)
    odd = cebm.compose("quickstart", ["batch=15"])
    with pytest.raises(click.UsageError, match="not multiples of 2 processes"):
        cebm.train_model(odd, tmp_path / "odd", "", torch.device("cpu"), "", False, 0, 2)
    assert not (tmp_path / "odd").exists()


def test_means_of_one_image_are_not_standardised_but_refused(tmp_path):
    settings = ["--preset", "bigan-mnist-r1", "--set", "batch=1", "--out", tmp_path]
    result = run("train", *settings)
    assert result.exit_code == 2
    assert "too small" in result.stderr
    assert list(tmp_path.rglob("*.pt")) == []


def test_a_rank_that_torchrun_did_not_give_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # as a scheduler leaves them
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("train", *tiny("updates=2"), "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "done: " in result.stdout
    assert len(cebm.load_checkpoint(tmp_path / "ckpt.pt")["generators"]) == 1
    monkeypatch.setenv("LOCAL_RANK", "another's")
    result = run("train", *tiny("updates=2"), "--out", tmp_path / "gpu", "--device", "cuda")
    assert result.exit_code == (0 if torch.cuda.is_available() else 2), result.exception


def three_updates(config, rank, ranks):
    """A `Run` after three updates on fixed images and chains, of which each rank has its share."""
    run, generator = cebm.Run(config, torch.device("cpu"), rank, ranks), torch.Generator()
    x, chains = torch.rand((2, 3, 16, 1, 28, 28), generator=generator.manual_seed(5)) * 2 - 1
    for images, negatives in zip(x, chains, strict=True):
        mine = images.chunk(ranks)[rank], torch.arange(16).chunk(ranks)[rank] % 10
        loss, _ = run.loss(*mine, negatives.chunk(ranks)[rank])
        run.adam.zero_grad()
        loss.backward()
        run.adam.step()
    return run.model.state_dict()


def share(rank, folder):
    """One process of two: its weights into `folder`. The group's threads have to end with it."""
    import torch.distributed.nn  # before there is a group, as in `train`

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", None, 2, rank)
    config, group = cebm.compose("quickstart", TINY), weakref.ref(torch.distributed.group.WORLD)
    torch.save(three_updates(config, rank, 2), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    assert group() is None


def test_two_processes_make_the_updates_of_one_with_the_same_global_batch(tmp_path):
    torch.multiprocessing.spawn(share, (tmp_path,), nprocs=2)
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    same(one, two, "weights")
    alone = three_updates(cebm.compose("quickstart", TINY), 0, 1)
    start = cebm.new_model(cebm.compose("quickstart", TINY), "cpu").state_dict()
    for key, value in alone.items():
        torch.testing.assert_close(one[key], value, atol=1e-5, rtol=1e-4)
        assert "prior" in key or not torch.equal(value, start[key])


def test_a_bound_holds_in_training_and_for_samples_of_the_checkpoint(tmp_path):
    loud = tiny("chains.noise_std=0.5", "bound=0.8", "updates=6")
    assert run("train", *loud, "--out", tmp_path).exit_code == 0
    assert [(r["pixel_min"], r["pixel_max"]) for r in rows(tmp_path)] == [
        (f"{-near}", f"{near}") for near in 2 * [torch.tensor(0.8).item()]
    ]
    out = run("sample", tmp_path / "ckpt.pt", "--from", "noise", "--out", tmp_path / "s.png").stdout
    assert "pixels -0.8 to 0.8" in out
    refused = run("train", *tiny("bound=-1"), "--out", tmp_path / "b")
    assert refused.exit_code == 2
    assert "chains.bound = -1.0: it has to be a number from 0" in refused.stderr


def test_samples_from_buffer_noise_and_given_latents(trained, tmp_path):
    checkpoint = trained / "ckpt.pt"
    for name, extra, size in [
        ("buffer", [], (30 * 4 + 2, 30 * 4 + 2)),
        ("noise", ["--from", "noise", "--steps", 5], (30 * 4 + 2, 30 * 4 + 2)),
        ("given", ["--given", 6, "--steps", 3], (30 * 6 + 2, 30 * 2 + 2)),
    ]:
        paths = [tmp_path / f"{name}{i}.png" for i in range(3)]
        for path, seed in zip(paths, (0, 0, 1), strict=True):
            result = run("sample", checkpoint, "--count", 16, "--seed", seed, "--out", path, *extra)
            assert result.exit_code == 0, result.stderr
        assert Image.open(paths[0]).size == size
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert paths[0].read_bytes() != paths[2].read_bytes()


def test_the_buffer_itself_is_shown_with_no_steps(trained, tmp_path):
    run("sample", trained / "ckpt.pt", "--count", 1, "--steps", 0, "--out", tmp_path / "a.png")
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    chains = cebm.load_checkpoint(trained / "ckpt.pt")["buffer"][:, 0].clamp(-1, 1)
    stored = chains.add(1).div(2).mul(255).round().byte().numpy()
    assert (stored == shown).all((1, 2)).sum() == 1
    run(
        "sample",
        trained / "ckpt.pt",
        "--count",
        1,
        "--steps",
        0,
        "--from",
        "noise",
        "--out",
        tmp_path / "b.png",
    )  # not the noise that the buffer began with
    noise = np.asarray(Image.open(tmp_path / "b.png").convert("L"))
    assert (stored == noise).mean((1, 2)).max() < 0.05


def test_a_path_that_stdout_cannot_encode_is_no_failure(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    out = tmp_path / "\u56fe.png"
    process = launch("sample", trained / "ckpt.pt", "--count", 1, "--steps", 0, "--out", out)
    assert "\\u56fe.png" in process.communicate()[0]
    assert (process.returncode, out.exists()) == (0, True)


def test_given_shows_the_originals_first_and_lowers_the_joint_energy(trained, tmp_path):
    import data

    state = cebm.load_checkpoint(trained / "ckpt.pt")
    for name, value in state["average"].items():  # 24 updates leave nearly flat energies
        value.mul_(2 if name.endswith("weight") else 1)
    torch.save(state, tmp_path / "steep.pt")
    out = tmp_path / "a.png"
    result = run("sample", tmp_path / "steep.pt", "--given", 4, "--steps", 60, "--out", out)
    energies = result.stdout.split("energy ")[1].split(",")[0]
    before, after = map(float, energies.split(" -> "))
    assert after < before - 0.1
    picture = np.asarray(Image.open(out).convert("L"))
    original = data.load("glyphs", "test")[0][0, 0].numpy()
    assert abs(picture[2:30, 2:30].astype(int) - original).max() <= 1


def test_a_checkpoint_without_a_buffer_says_that_it_starts_from_noise(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    del state["buffer"], state["optimiser"]
    torch.save(state, tmp_path / "small.pt")
    result = run("sample", tmp_path / "small.pt", "--count", 4, "--out", tmp_path / "a.png")
    assert result.exit_code == 0
    assert "starting from noise" in result.stdout


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("cebm-fmnist", 10),
        ("cebm-mnist", 10),
        ("gmm-cebm-fmnist", 10),
        ("gmm-cebm-mnist", 10),
        ("cebm-fmnist-latents", 0.6),
        ("gmm-cebm-fmnist-latents", 0.28),
    ],
)
def test_the_small_checkpoints_draw_from_noise_and_are_not_trained_on(
    name, between, tmp_path, monkeypatch
):
    tiny_data(monkeypatch)
    path, name = ROOT / "checkpoints" / f"{name}.pt", name.removesuffix("-latents")
    assert path.stat().st_size < 2e6
    assert cebm.load_checkpoint(path)["preset"].startswith(name)
    result = run("sample", path, "--steps", 60, "--count", 8, "--out", tmp_path / "a.png")
    assert "starting from noise" in result.stdout
    before, after = (float(v) for v in result.stdout.split("energy ")[1].split(",")[0].split("->"))
    assert after < between < before
    (tmp_path / "ckpt.pt").write_bytes(path.read_bytes())
    result = run("train", "--preset", name, "--out", tmp_path, "--set", "batch=8")
    assert result.exit_code == 1
    assert "has other settings" in result.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == path.read_bytes()


def test_rows_that_are_done_are_printed_though_a_later_checkpoint_is_broken(trained, tmp_path):
    (tmp_path / "broken.pt").write_bytes((trained / "ckpt.pt").read_bytes()[:1000])
    result = run("knn", trained / "ckpt.pt", tmp_path / "broken.pt", "--json", "--limit", 100)
    assert result.exit_code == 1
    assert "broken.pt" in result.stderr
    (row,) = json.loads(result.stdout)
    assert row["updates"] == 24
    assert run("knn", tmp_path / "broken.pt", "--markdown").stdout == ""


def test_knn_reports_the_three_spaces_as_text_json_markdown_and_picture(trained, tmp_path):
    checkpoint = trained / "ckpt.pt"
    result = run("knn", checkpoint, checkpoint, "--json", "--limit", 500)
    first, second = json.loads(result.stdout)
    assert first == second
    assert set(first) == {
        "checkpoint",
        "model",
        "data",
        "updates",
        "latent",
        "untrained",
        "pixel",
        "confusion",
    }
    counts = torch.tensor(first["confusion"])
    assert counts.sum() == 2000
    assert counts.sum(1).tolist() == [200] * 10
    assert first["latent"] == pytest.approx(counts.diag().sum().item() / 20, abs=0.01)
    assert first["pixel"] > 50
    model, config, _ = cebm.load_model(checkpoint)
    train, test = (cebm.data.load("glyphs", split) for split in ("train", "test"))
    for space, network in ("latent", model), ("untrained", cebm.new_model(config, "cpu").eval()):
        a, b = (
            cebm.evaluate.in_batches(network.represent, images, "cpu")
            for images in (train[0][::20], test[0])
        )
        right = train[1][::20][cebm.evaluate.nearest(a, b)] == test[1]
        assert first[space] == round(100 * right.double().mean().item(), 2)
    assert first["latent"] != first["untrained"]
    text = run("knn", checkpoint, "--limit", 500, "--plot", tmp_path / "plot.png").stdout
    assert f"{first['latent']:.2f}" in text
    assert Image.open(tmp_path / "plot.png").size[0] > 400
    table = run("knn", checkpoint, "--limit", 500, "--markdown").stdout.splitlines()
    assert table[0].startswith("| checkpoint | model | data | updates | latent |")
    assert len(table) == 3
    white = json.loads(run("knn", checkpoint, "--json", "--limit", 500, "--whiten").stdout)[0]
    assert white["pixel"] == first["pixel"]
    assert white["latent"] != first["latent"]


def test_export_holds_what_the_model_says_of_each_image(trained, tmp_path):
    import data

    out = tmp_path / "latents.npz"
    assert run("export", trained / "ckpt.pt", "--out", out).exit_code == 0
    model = cebm.load_model(trained / "ckpt.pt")[0]
    images, labels = data.load("glyphs", "test")
    with torch.no_grad():
        x = data.normalise(images[:50])
        mean, energy, precision = model.represent(x), model.energy(x), 1 - 2 * model.t(x)[0][:, 1]
    with np.load(out, allow_pickle=False) as arrays:
        assert {k: arrays[k].shape for k in arrays} == {
            "mean": (2000, 4),
            "std": (2000, 4),
            "energy": (2000,),
            "labels": (2000,),
        }
        np.testing.assert_allclose(arrays["mean"][:50], mean, atol=1e-5)
        np.testing.assert_allclose(arrays["std"][:50], precision.rsqrt(), atol=1e-5)
        np.testing.assert_allclose(arrays["energy"][:50], energy, atol=1e-5)
        assert arrays["labels"].tolist() == labels.tolist()
    assert run("export", trained / "ckpt.pt", "--split", "train", "--out", out).exit_code == 0
    with np.load(out, allow_pickle=False) as arrays:
        assert arrays["labels"].tolist() == data.load("glyphs", "train")[1].tolist()


def test_probe_and_ood_print_a_row_a_checkpoint(trained, monkeypatch):
    checkpoint = trained / "ckpt.pt"
    monkeypatch.setattr(
        cebm.models.Conjugate,
        "represent",  # tells more than the tiny network's
        lambda self, x: 0.1 * torch.nn.functional.avg_pool2d(x, 7).flatten(1),
    )
    first, second = json.loads(run("probe", checkpoint, checkpoint, "--json").stdout)
    assert first == second
    assert list(first)[:4] == ["checkpoint", "model", "data", "updates"]
    assert list(first)[4:] == ["1", "1 std", "10", "10 std", "100", "100 std", "all", "all std"]
    assert first["1"] < first["100"] < first["all"] <= 100
    assert first["1 std"] > 0 == first["all std"]
    row = json.loads(run("ood", checkpoint, "--against", "glyphs", "--json").stdout)[0]
    assert set(row) - set(first) == {
        f"{name} {score}"
        for name in ("glyphs", "uniform", "constant")
        for score in ("logp", "gradient")
    }
    assert row["glyphs logp"] == row["glyphs gradient"] == 50  # against itself: all ties
    monkeypatch.setattr(
        cebm.models.Conjugate, "energy", lambda self, x: x.diff(dim=-1).abs().mean((1, 2, 3))
    )  # roughness
    row = json.loads(run("ood", checkpoint, "--json").stdout)[0]
    assert (row["uniform logp"], row["constant logp"]) == (100, 0)
    table = run("ood", checkpoint, "--markdown").stdout.splitlines()
    assert table[0].startswith("| checkpoint | model | data | updates | uniform logp |")
    assert len(table) == 3


def test_probe_can_be_free_of_the_scale_of_the_latents(trained, tmp_path):
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    weights = state["average"]
    latent, last = state["config"]["model"]["latent"], "network.heads.0.2."
    for name in ("weight", "bias"):  # t_1 and with it the posterior mean, a power of two smaller
        weights[last + name][:latent] /= 1024
    torch.save(state, tmp_path / "small.pt")
    for options, equal in (((), False), (("--scale",), True)):
        result = run("probe", trained / "ckpt.pt", tmp_path / "small.pt", "--json", *options)
        first, second = (
            {k: v for k, v in row.items() if k != "checkpoint"} for row in json.loads(result.stdout)
        )
        assert (first == second) == equal


def test_a_map_of_one_latent_dimension_is_a_line(tmp_path):
    run("train", *tiny("latent=1", "updates=1"), "--out", tmp_path)
    result = run(
        "export", tmp_path / "ckpt.pt", "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"
    )
    assert result.exit_code == 0, result.stderr


def test_export_can_draw_a_map(trained, tmp_path):
    result = run(
        "export", trained / "ckpt.pt", "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"
    )
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "map.png").size == (820, 730)
    assert "PCA" in result.stdout or "UMAP" in result.stdout


def tiny_data(monkeypatch):
    """Random images of any data set's shape, 40 to train and 20 to test on."""
    import data

    def images(name, split, data_dir="data", image_shape=(1, 28, 28), extra=False):
        count = {"train": 40, "test": 20}[split]
        generator = torch.Generator().manual_seed(count)
        pixels = torch.randint(0, 256, (count, *image_shape), generator=generator)
        return pixels.byte(), torch.arange(count) % 10

    monkeypatch.setattr(data, "load", images)


# Others' networks are among these: SVHN's are CIFAR-10's, Fashion-MNIST's are MNIST's, the mixtures
# of CIFAR-10 are on MNIST; a GPU's recipes differ in numbers alone.
@pytest.mark.parametrize(
    "preset",
    [
        p
        for p, (_, source, _) in cebm.PRESETS.items()
        if "-gpu" not in p
        and (
            source in ("glyphs", "mnist")
            or p.endswith(("-fast", "-literal"))
            or (source == "cifar10" and "gmm" not in p)
        )
    ],
)
def test_presets_at_their_true_size_train_resume_and_are_evaluated(preset, tmp_path, monkeypatch):
    tiny_data(monkeypatch)
    model = cebm.compose(preset).model.name
    arguments = [
        "--preset",
        preset,
        "--out",
        tmp_path,
        "--set",
        "batch=8",
        "--set",
        "buffer=16",
        "--set",
        "steps=2",
        "--set",
        "final_steps=0",
        "--set",
        "decay=none",
        "--set",
        "precision=float32",
        "--set",
        "compile=false",
    ]
    for updates in (1, 2):
        result = run("train", *arguments, "--set", f"updates={updates}")
        assert result.exit_code == 0, result.stderr
    assert "going on after update 1" in result.stdout
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert state["updates"] == 2
    assert all(v.isfinite().all() for v in state["model"].values())
    checkpoint, drawn, pictures = tmp_path / "small.pt", tmp_path / "drawn.png", {}
    torch.save(
        {k: v for k, v in state.items() if k not in ("optimiser", "good", "candidate")}, checkpoint
    )  # a tenth, and read eight times
    loaded = cebm.load_model(checkpoint)[0]
    assert not any(module.training for module in loaded.modules())
    if model.startswith("gmm"):
        fresh = cebm.new_model(cebm.parse_config(state["config"]), "cpu").state_dict()
        prior = [k for k in fresh if k.startswith("prior")]
        found = loaded.state_dict()
        assert len(prior) == 2
        kept = state.get("average", state["model"])
        assert all(torch.equal(found[k], kept[k]) for k in prior)
        assert not any(torch.equal(found[k], fresh[k]) for k in prior)
    chains = not model.endswith(("vae", "gan"))
    able_to = {
        "--refine": model == "gan",
        "--steps": chains,
        "--from": chains,
        "--given": model not in ("igebm", "jem", "hdge", "gan"),
    }
    for extra in ([], ["--given", 3], ["--refine", 2], ["--steps", 3], ["--from", "noise"]):
        result = run("sample", checkpoint, "--count", 4, "--out", drawn, *extra)
        able = not extra or able_to[extra[0]]
        assert result.exit_code == (0 if able else 2), result.stderr
        assert able or f"{extra[0]} is not for {model}" in result.stderr
        if able:
            pictures[(*extra, "")[0]] = drawn.read_bytes()
    assert len(set(pictures.values())) == len(pictures) - (model == "hdge")  # it has no buffer
    if able_to["--given"] and not chains:  # decoded means, whatever the seed
        run("sample", checkpoint, "--given", 3, "--seed", 1, "--out", drawn)
        assert drawn.read_bytes() == pictures["--given"]
    if model not in ("igebm", "jem", "hdge", "gan"):  # there the latter alone is wrong
        result = run("sample", checkpoint, "--given", 3, "--refine", 2)
        assert f"--refine is not for {model}" in result.stderr
    if model in ("rbm", "efh"):  # one sweep draws from p(x | z)
        result = run("sample", checkpoint, "--given", 3, "--steps", 2)
        assert f"--steps with --given is not for {model}" in result.stderr
    row = json.loads(run("knn", checkpoint, "--json").stdout)[0]
    assert (row["model"], row["updates"]) == (model, 2)
    assert ("accuracy" in row) == (model in ("jem", "hdge"))
    if "accuracy" in row:
        images, labels = cebm.data.load("any", "test")
        right = cebm.evaluate.in_batches(loaded.f, images, "cpu").argmax(1) == labels
        assert row["accuracy"] == 100 * right.double().mean().item()
    result = run("ood", checkpoint)
    assert result.exit_code == ("gan" in model), result.stderr
    assert run("export", checkpoint, "--out", tmp_path / "l.npz").exit_code == 0
    with np.load(tmp_path / "l.npz", allow_pickle=False) as arrays:
        assert arrays["mean"].shape == (20, 128)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error:updates are")
@pytest.mark.parametrize("compile", ["true", "false"])
def test_no_update_waits_for_the_gpu_between_two_checks(tmp_path, monkeypatch, compile):
    rate, modes = cebm.learning_rate, {5: "error", 20: "default"}

    def observed(update, *rest):
        torch.cuda.set_sync_debug_mode(modes.get(update, torch.cuda.get_sync_debug_mode()))
        return rate(update, *rest)

    monkeypatch.setattr(cebm, "learning_rate", observed)
    settings = tiny(
        "updates=20",
        "checkpoint_every=20",
        "log_every=20",
        "pictures=1",
        f"compile={compile}",
        "precision=bfloat16",
    )
    try:
        result = run("train", *settings, "--out", tmp_path)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.exit_code == 0, result.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error:updates are")
def test_on_a_gpu_recorded_updates_are_the_plain_ones_also_after_a_rollback(tmp_path, monkeypatch):
    import sampling

    settings = tiny(
        "updates=16",
        "checkpoint_every=2",
        "every=1",
        "decay=cosine",
        "warmup=0",
        "rate=1e-2",
        "epsilon=1e-3",
        "compile=false",
    )
    states, bounds = [], cebm.out_of_bounds
    for name, recorded in ("recorded", True), ("plain", False):
        checks = []

        def once(*arguments, checks=checks):
            checks.append(1)
            return "as if" if len(checks) == 9 else bounds(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(cebm, "out_of_bounds", once)
            if not recorded:
                patch.setattr(sampling, "Graph", lambda ways, generator: ways[-1])
            assert run("train", *settings, "--out", tmp_path / name).exit_code == 0
        states.append(cebm.load_checkpoint(tmp_path / name / "ckpt.pt"))
        assert len(states[-1]["rollbacks"]) == 1
    untrained = cebm.new_model(cebm.parse_config(states[0]["config"]), "cpu").state_dict()
    for part in ("model", "average"):
        for name, value in states[0][part].items():
            torch.testing.assert_close(value, states[1][part][name], atol=1e-3, rtol=0)
            if value.is_floating_point() and name.endswith("weight"):
                assert (value - untrained[name]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "preset",
    ["gmm-cebm-fmnist", "gmm-vae-mnist", "bigan-mnist-r1", "rbm-mnist", "igebm-fmnist-fast"],
)
def test_runs_with_random_losses_priors_restarts_or_gibbs_chains_resume_bit_for_bit(
    preset, tmp_path, monkeypatch
):
    tiny_data(monkeypatch)
    arguments = [
        "--preset",
        preset,
        *tiny("hidden=8", "updates=8", "warmup=0", "pictures=2", "decay=none", "reuse=0.5"),
    ]
    run("train", *arguments, "--out", tmp_path / "whole")
    for updates in ("updates=3", "updates=8"):
        result = run("train", *arguments, "--set", updates, "--out", tmp_path / "parts")
        assert result.exit_code == 0, result.stderr
    one, two = (cebm.load_checkpoint(tmp_path / f / "ckpt.pt") for f in ("whole", "parts"))
    for key in ("model", "optimiser", "generators", "buffer"):
        same(one[key], two[key], key)


def test_show_lists_presets_and_prints_one_and_describes_a_checkpoint(trained):
    listed = [line.split()[0] for line in run("show").stdout.splitlines()]
    seven = ("cebm", "gmm-cebm", "igebm", "vae", "gmm-vae", "bigan", "gmm-bigan")
    four = {f"{m}-{d}" for m in seven for d in ("mnist", "fmnist", "cifar10", "svhn")}
    two = {f"{m}-{d}" for m in ("gan", "jem", "hdge", "rbm", "efh") for d in ("mnist", "fmnist")}
    assert len(four | two) == 38
    fast = {
        f"{m}-{d}-fast" for m in ("cebm", "gmm-cebm", "igebm", "jem") for d in ("mnist", "fmnist")
    }
    gpu = {f"{m}-gpu" for m in ("cebm-mnist", "gmm-cebm-mnist", "cebm-cifar10", "igebm-cifar10")}
    r1 = {f"{m}-{d}-r1" for m in ("gan", "bigan", "gmm-bigan") for d in ("mnist", "fmnist")}
    others = {"quickstart", "cebm-folder", "cebm-fmnist-literal"}
    assert set(listed) == four | two | fast | gpu | r1 | others
    mnist, fmnist = (cebm.compose(f"jem-{d}-fast") for d in ("mnist", "fmnist"))
    assert replace(mnist.train, updates=15000) == fmnist.train  # all else is shared
    assert (fmnist.chains.reuse, fmnist.chains.data_restarts, mnist.chains.bound) == (0.99, 1, 1.5)
    assert mnist.chains == replace(fmnist.chains, reuse=0.95, data_restarts=0.0, bound=1.5)
    short, longer = (cebm.compose(f"cebm-mnist-{v}") for v in ("fast", "gpu"))
    assert replace(short.train, updates=12000) == mnist.train
    assert short.chains == replace(mnist.chains, steps=20) == longer.chains
    assert replace(longer.train, rate=6e-4, updates=15500) == short.train
    assert replace(longer.train, updates=15000) == cebm.compose("gmm-cebm-mnist-fast").train
    for name in listed:
        printed = yaml.safe_load(run("show", name).stdout)
        assert cebm.parse_config(printed) == cebm.compose(name)
    without = {line.split()[0] for line in run("show").stdout.splitlines() if "chains" not in line}
    assert {cebm.compose(name).model.name for name in without} == {
        "vae",
        "gmm-vae",
        "bigan",
        "gmm-bigan",
        "gan",
        "hdge",
    }
    facts = yaml.safe_load(run("show", trained / "ckpt.pt").stdout)
    assert (facts["preset"], facts["updates"], facts["seed"]) == ("quickstart", 24, 0)
    assert facts["torch"] == str(torch.__version__)


def test_the_literal_preset_differs_in_the_step_and_the_two_noises_alone():
    usual, literal = (asdict(cebm.compose(p)) for p in ("cebm-fmnist", "cebm-fmnist-literal"))
    differing = {f"{s}.{k}" for s in usual for k in usual[s] if usual[s][k] != literal[s][k]}
    assert differing == {"chains.step_size", "chains.noise_std", "data.noise_std"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "cebm-fminst"], "did you mean cebm-fmnist?"),
        (["--set", "train.ratee=1"], "did you mean train.rate?"),
        (["--set", "noise_std=1"], "could be chains.noise_std or data.noise_std"),
        (["--set", "rate"], "is not KEY=VALUE"),
        (["--set", "rate=fast"], "train.rate = 'fast': it has to be a number from 0 to 10"),
        (["--set", "rate=.nan"], "train.rate = nan"),
        (["--set", "rate=true"], "train.rate = True"),
        (["--set", "rate=2001-99-99"], "is not a YAML value"),
        (["--device", "meta"], "--device meta: "),
        (["--set", "steps=0"], "chains.steps = 0: it has to be a whole number from 1"),
        (["--set", "steps=2.5"], "chains.steps = 2.5"),
        (["--set", "head=both"], "one of shared, separate"),
        (["--set", "channels=[1, 2]"], "a list of 4 numbers, each from 1 to 4,096"),
        (
            ["--preset", "vae-mnist", "--set", "image=[1, 30, 30]"],
            "vae is for images of 28 x 28 or",
        ),
        (["--set", "likelihood=gauss"], "one of bernoulli, continuous_bernoulli"),
        (["--set", "channels={a: [}"], "is not a YAML value"),
        (["--set", "compile=!!bool maybe"], "is not a YAML value"),
        (["--set", "buffer=7"], "must not exceed chains.buffer"),
        (["--set", "image=[1, 4, 4]"], "at least 8 x 8"),
        (["--device", "abacus"], "--device abacus: "),
        (["--seed", "-1"], "seed"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(tmp_path, arguments, says):
    result = run("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "run").exists()


KEYS = [
    f"{section.name}.{key.name}" for section in fields(cebm.Config) for key in fields(section.type)
]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def test_another_name_of_the_model_or_the_data_brings_its_recipe():
    for preset, name in (("cebm-mnist", "gmm-cebm"), ("cebm-fmnist", "vae"), ("vae-mnist", "cebm")):
        other = f"{name}-{preset.split('-')[1]}"
        assert cebm.compose(preset, [f"model.name={name}"]) == cebm.compose(other)
    assert cebm.compose("cebm-cifar10", ["data.name=svhn"]) == cebm.compose("cebm-svhn")
    assert cebm.compose("cebm-mnist", ["model.name=vae", "l2=1"]).model.l2 == 1


def test_a_table_that_finds_no_room_is_an_error_in_a_line():
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, ROOT / "cebm.py", "show"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode == 1
    assert "No space left" in result.stderr
    assert "Traceback" not in result.stderr


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(KEYS), VALUES)
def test_any_value_of_any_key_gives_a_configuration_or_an_error_naming_the_key(key, value):
    tree = asdict(cebm.compose("quickstart"))
    section, name = key.split(".")
    tree[section][name] = value
    try:
        config = cebm.parse_config(tree)
        assert cebm.parse_config(asdict(config)) == config
    except cebm.click.UsageError as error:
        assert key in error.message  # noqa: PT017, either outcome is right
        assert len(error.message.splitlines()) == 1  # noqa: PT017


class Payload:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_checkpoint_without_a_key_that_came_later_has_its_default(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    for key in "gradient_penalty", "visible_std":
        del state["config"]["model"][key]
    torch.save(state, tmp_path / "old.pt")
    whole = cebm.load_checkpoint(trained / "ckpt.pt")["config"]
    assert cebm.load_checkpoint(tmp_path / "old.pt")["config"] == whole


def spoiled(folder):
    """Whole checkpoints but for one value each."""
    changes = [
        ("format", 1),
        ("config", {}),
        ("config", {"data": 3}),
        ("updates", -1),
        ("buffer", "x"),
        ("buffer", torch.zeros(1, 1, 28, 28)),
        ("model", 3),
    ]
    for key, value in changes:
        state = cebm.load_checkpoint(folder / "ckpt.pt")
        state[key] = value
        yield state
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    state["model"]["network.heads.0.0.bias"][0] = float("nan")
    yield state


def test_files_that_are_no_checkpoint_are_refused_and_run_no_code(trained, tmp_path):
    whole, bad = (trained / "ckpt.pt").read_bytes(), tmp_path / "bad.pt"
    contents = [
        b"",
        b"hello",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-1],
        pickle.dumps(Payload(tmp_path / "ran")),
    ]
    payload = {"format": cebm.FORMAT, "config": Payload(tmp_path / "ran")}
    torch.save(payload, tmp_path / "payload.pt")
    contents.append((tmp_path / "payload.pt").read_bytes())
    state = {**cebm.load_checkpoint(trained / "ckpt.pt"), "format": 2}
    torch.save(state, bad)
    assert "it is of format 2" in run("show", bad).stderr
    for other in ([1, 2], {"format": 99}, {"format": cebm.FORMAT}, *spoiled(trained)):
        torch.save(other, bad)
        contents.append(bad.read_bytes())
    for content in contents:
        bad.write_bytes(content)
        for command in (["knn"], ["sample", "--out", tmp_path / "a.png"], ["export"], ["show"]):
            result = run(command[0], bad, *command[1:])
            assert result.exit_code in (1, 2), content[:20]
            assert "bad.pt" in result.stderr
            assert "Traceback" not in result.output
    assert not (tmp_path / "ran").exists()


def test_cut_and_flipped_checkpoints_are_refused_or_load_right(trained, tmp_path):
    whole, path = (trained / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    right, chance, refused = cebm.load_checkpoint(trained / "ckpt.pt"), random.Random(0), 0
    for i in range(400):
        place = chance.randrange(len(whole))
        flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
        path.write_bytes(whole[:place] + (flipped + whole[place + 1 :] if i % 2 else b""))
        result = run("show", path)
        assert "Traceback" not in result.stderr
        if result.exit_code:
            refused += 1
            assert str(path) in result.stderr
        else:
            assert i % 2, "a cut file was taken for whole"
            same(cebm.load_checkpoint(path), right, f"byte {place}")
    assert refused > 300


def test_a_damaged_checkpoint_is_not_trained_over(trained, tmp_path):
    damaged = (trained / "ckpt.pt").read_bytes()[:5000]
    (tmp_path / "ckpt.pt").write_bytes(damaged)
    result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 1
    assert "no whole checkpoint" in result.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == damaged
    for part in ("optimiser", "preset"):
        state = cebm.load_checkpoint(trained / "ckpt.pt")
        del state[part]
        torch.save(state, tmp_path / "ckpt.pt")
        result = run("train", *tiny(), "--out", tmp_path)
        assert result.exit_code == 1
        assert f"is missing or of another shape or device (KeyError('{part}'" in result.stderr


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    for weights in ("model", "average"):
        state[weights]["network.heads.0.0.bias"] = torch.zeros(9)
    torch.save(state, tmp_path / "ckpt.pt")
    for result in (run("knn", tmp_path / "ckpt.pt"), run("train", *tiny(), "--out", tmp_path)):
        assert result.exit_code == 1
        assert "ckpt.pt" in result.stderr
        assert len(result.stderr.strip().splitlines()) <= 2


@pytest.mark.parametrize("out", ["/dev/null", "file/a.png", "x" * 300])
def test_pictures_go_only_where_a_file_can_be(trained, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    result = run("sample", trained / "ckpt.pt", "--count", 1, "--out", out)
    assert result.exit_code == 1
    assert "cannot write" in result.stderr
    assert Path("/dev/null").is_char_device()
    assert run("sample", trained / "ckpt.pt", "--out", "new/folder/a.png").exit_code == 0
    assert Path("new/folder/a.png").is_file()


@pytest.mark.parametrize(
    ("command", "option"),
    [("sample", "--out"), ("knn", "--plot"), ("export", "--out"), ("export", "--map")],
)
def test_where_nothing_can_be_written_is_refused_before_the_work(tmp_path, command, option):
    (tmp_path / "file").write_text("no checkpoint")
    (tmp_path / "file.pt").write_text("a checkpoint")
    for place in (tmp_path / "file" / "a", tmp_path / "file.pt", ""):
        result = run(command, tmp_path / "file", option, place)
        assert result.exit_code == 1
        assert f"cannot write {place or '.'}" in result.stderr
    (tmp_path / "a").write_text("old")  # where it can be, it waits for what is written
    assert "no whole checkpoint" in run(command, tmp_path / "file", option, tmp_path / "a").stderr
    assert [(p.name, p.read_text()) for p in sorted(tmp_path.iterdir())] == [
        ("a", "old"),
        ("file", "no checkpoint"),
        ("file.pt", "a checkpoint"),
    ]


def test_latents_and_their_map_are_not_written_to_one_place(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", trained / "ckpt.pt", "--out", "a", "--map", tmp_path / "a")
    assert result.exit_code == 2
    assert f"--map and --out are both {tmp_path / 'a'}" in result.stderr


def test_a_linked_checkpoint_is_written_where_it_lies(trained, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "disk/big.pt").write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "run/ckpt.pt").symlink_to("../disk/big.pt")
    longer = tiny("updates=25", "decay=none")
    assert run("train", *longer, "--out", tmp_path / "run", "--change").exit_code == 0
    assert (tmp_path / "run/ckpt.pt").is_symlink()
    assert cebm.load_checkpoint(tmp_path / "disk/big.pt")["updates"] == 25


@pytest.mark.parametrize(
    "change",
    [
        ("presets:", "preset:"),
        ("models:", "model:"),
        ("limits:", "limit:"),
        ("of: {cebm-fmnist:", "of: {cebm-f:"),
        ("common:", "commons:"),
        ("{trunk: small}", "{trunk: smal}"),
        ("data:", "data: ["),
        ("    reuse: [", "    reuze: ["),
        ("reuse: 0.99", "reuse: 9.9"),
        ("pcd: {}", "pcd: {trian: {}}"),
    ],
)
def test_a_misspelt_configs_yaml_is_named_in_a_line(tmp_path, change):
    (tmp_path / "cebm.py").write_text((ROOT / "cebm.py").read_text())
    text = (ROOT / "configs.yaml").read_text()
    assert change[0] in text
    (tmp_path / "configs.yaml").write_text(text.replace(*change))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import cebm; cebm.main(['show'])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode in (1, 2)
    assert "configs.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_variant_of_a_preset_keeps_what_that_sets(tmp_path):
    mine = "variants:\n  mine: {of: {quickstart: {train.rate: 2.0e-3}}, set: {model.l2: 0.2}}"
    text = (ROOT / "configs.yaml").read_text()
    (tmp_path / "configs.yaml").write_text(text.replace("variants:", mine))
    (tmp_path / "cebm.py").write_text((ROOT / "cebm.py").read_text())
    result = subprocess.run(
        [sys.executable, tmp_path / "cebm.py", "show", "quickstart-mine"],
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = cebm.compose("quickstart", ["l2=0.2", "rate=2e-3"])
    assert yaml.safe_load(result.stdout) == asdict(wanted)


def test_wrong_files_and_folders_are_named(trained, tmp_path):
    assert run("knn", tmp_path / "none.pt").exit_code == 2
    assert run("show", "cebm-mnits").exit_code == 2
    folder = ["--preset", "cebm-folder", "--data-dir", tmp_path]
    empty = run("train", *folder, "--out", tmp_path / "run")
    assert empty.exit_code == 1
    assert f"{tmp_path}/train'. Images belong in" in empty.stderr
    (tmp_path / "file").write_text("")
    blocked = run("train", *tiny(), "--out", tmp_path / "file" / "run")
    assert blocked.exit_code == 1
    assert "choose another --out" in blocked.stderr


def test_a_folder_of_images_trains_and_is_evaluated(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for k, name in enumerate(("dark", "light")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(10):
                pixels = generator.integers(128 * k, 128 * k + 127, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    arguments = ["--preset", "cebm-folder", "--data-dir", tmp_path / "images"]
    arguments += ["--out", tmp_path / "run"]
    wrong = run("train", *arguments, *tiny())
    assert wrong.exit_code == 1
    assert "--set classes=2" in wrong.stderr
    rgba = run("train", *arguments, *tiny("classes=2", "image=[4, 16, 16]"))
    assert rgba.exit_code == 1
    assert "images of 3x16x16" in rgba.stderr
    chosen = tiny("classes=2", "image=[3, 16, 16]", "updates=2")
    result = run("train", *arguments, *chosen)
    assert result.exit_code == 0, result.stderr
    result = run("knn", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json")
    assert len(json.loads(result.stdout)[0]["confusion"]) == 2
    few = run(
        "knn", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json", "--limit", 4
    )
    assert json.loads(few.stdout)[0]["pixel"] == 100  # two of each class, though files are sorted
    shown = tmp_path / "given.png"
    run(
        "sample",
        tmp_path / "run/ckpt.pt",
        "--data-dir",
        tmp_path / "images",
        "--given",
        2,
        "--steps",
        1,
        "--out",
        shown,
    )
    picture = np.asarray(Image.open(shown).convert("L"))  # one of each class, likewise
    assert picture[2:18, 2:18].max() < 128 <= picture[2:18, 20:36].min()
    row = json.loads(
        run("probe", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json").stdout
    )[0]
    assert [key for key in row if key.isdigit()] == ["1", "10"]  # there are ten a class
    (tmp_path / "images/train/dark/3.png").write_bytes(b"no picture")
    assert "dark/3.png cannot be read" in run("train", *arguments, *chosen).stderr


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_folder_that_cannot_be_written_keeps_its_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(cebm.Failure, match="No space left on device"):
        cebm.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_help_needs_no_torch():
    for command in ("", "train", "sample", "knn", "probe", "ood", "export", "show"):
        code = (
            "import sys, cebm\ntry: cebm.main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules)"
        )
        arguments = [a for a in (command, "--help") if a]
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.splitlines()[-1] == "False"
        assert not command or "Example: python cebm.py " + command in result.stdout
