"""Configuration, checkpoints and training: the sections of cebm.py but for its commands."""

import os
import pickle
import random
import shlex
import subprocess
import sys
import weakref
import zipfile
from dataclasses import asdict, replace

import click
import pytest
import torch
import yaml
from helpers import (
    RESTARTED,
    ROOT,
    STILL,
    TINY,
    assert_chains_are_the_last_batch,
    assert_same_run,
    options_for,
    poison_once,
    rows,
    run,
    same,
    tiny,
    tiny_data,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cebm
import data
import models
import sampling


def test_a_run_leaves_pictures_and_curves_if_it_is_to_have_pictures(trained, tmp_path):
    assert run("train", *tiny("pictures=3"), "--out", tmp_path).exit_code == 0
    assert [p.name for p in sorted(tmp_path.glob("samples/*"))] == [
        "0000008.png",
        "0000016.png",
        "0000024.png",
    ]
    assert Image.open(tmp_path / "curves.png").size[0] >= 1000
    assert not list(trained.glob("**/*.png"))


def test_a_run_leaves_what_it_promises(trained):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    assert state["updates"] == 24
    assert state["buffer"].shape == (64, 1, 28, 28)
    written = yaml.safe_load((trained / "config.yaml").read_text())
    assert cebm.parse_config(written) == cebm.parse_config(state["config"])
    assert [int(r["update"]) for r in rows(trained)] == list(range(3, 25, 3))
    moved = cebm.load_model(trained / "ckpt.pt")[0].state_dict()
    start = cebm.new_model(cebm.parse_config(written), "cpu").state_dict()
    assert all(not torch.equal(moved[k], start[k]) for k in start if "prior" not in k)


def test_a_batch_larger_than_the_buffer_is_for_models_without_chains():
    for preset in ("vae-mnist", "hdge-mnist"):
        cebm.check(cebm.compose(preset, ["batch=6000"]))
    with pytest.raises(click.UsageError, match="a slot for each chain"):
        cebm.check(cebm.compose("cebm-mnist", ["batch=6000"]))


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
    images, labels = data.load("glyphs", "train")
    x, y = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(y, labels[order])
    noise = x - data.normalise(images[order])
    assert abs(noise.mean()) < 0.01
    assert noise.std() == pytest.approx(0.5, abs=0.01)
    assert (noise.abs() < 0.5).float().mean() == pytest.approx(0.683, abs=0.01)
    early, late = noise.flatten(1).chunk(2)
    assert abs((early * late).mean()) < 0.01


def test_chains_go_back_to_the_slots_that_they_were_drawn_from(tmp_path):
    buffers = []
    for updates in (1, 3):
        settings = tiny(*STILL, "reuse=1", "decay=none", f"updates={updates}")
        assert run("train", *settings, "--out", tmp_path / str(updates)).exit_code == 0
        buffers.append(cebm.load_checkpoint(tmp_path / str(updates) / "ckpt.pt")["buffer"])
    assert torch.equal(*buffers)


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
    run = new_trainer(cebm.compose("cebm-mnist"))
    weights = run.model.network.trunk[0].weight.flatten().detach()  # what a seed gives first
    chains = run.buffer.images.flatten()[: len(weights)]
    assert abs(torch.corrcoef(torch.stack([weights, chains]))[0, 1]) < 0.2  # five deviations


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
    assert out.startswith("64 chains from the buffer, 8 steps: mean energy")
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


def test_an_average_begun_by_a_branch_starts_from_the_weights_also_after_a_rollback(
    tmp_path, monkeypatch
):
    plain, averaged = (tiny("decay=none", "updates=8", f"average={a}") for a in (0, 0.75))
    run("train", *plain, "--out", tmp_path / "a")
    eighth = cebm.load_checkpoint(tmp_path / "a/ckpt.pt")["model"]
    more = (*averaged, "--set", "updates=9", "--out", tmp_path / "b")
    assert run("train", *more, "--init-from", tmp_path / "a/ckpt.pt").exit_code == 0
    state = cebm.load_checkpoint(tmp_path / "b/ckpt.pt")
    for name, value in state["average"].items():
        torch.testing.assert_close(value, 0.75 * eighth[name] + 0.25 * state["model"][name])
    poison_once(monkeypatch, 2)  # update 11: back to where the run branched off
    result = run("train", *more, "--set", "updates=12")
    assert result.exit_code == 0, result.stderr
    state = cebm.load_checkpoint(tmp_path / "b/ckpt.pt")
    assert [r["to"] for r in state["rollbacks"]] == [8]
    assert any(not torch.equal(v, state["model"][k]) for k, v in state["average"].items())


def test_an_average_that_a_branch_ends_is_gone(tmp_path):
    run("train", *tiny("decay=none", "updates=8", "average=0.9"), "--out", tmp_path / "a")
    settings = tiny("decay=none", "updates=9", "average=0")
    source = tmp_path / "a/ckpt.pt"
    assert run("train", *settings, "--out", tmp_path / "b", "--init-from", source).exit_code == 0
    assert "average" not in cebm.load_checkpoint(tmp_path / "b/ckpt.pt")
    loaded, _, state = cebm.load_model(tmp_path / "b/ckpt.pt")
    same(dict(loaded.state_dict()), dict(state["model"]), "weights")


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_run_that_meets_nan_goes_back_to_what_stayed_healthy_and_ends_by_new_noise(
    trained, tmp_path, monkeypatch, where
):
    poison_once(monkeypatch, 10, where)
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
        assert (why or "").startswith(f"{name} of ") == past == bool(why)


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
    assert "update 12: gap of exactly 0: all energies are the same" in result.stdout
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
    poison_once(monkeypatch, 18)
    assert run("train", *settings, "--out", whole).exit_code == 0
    monkeypatch.undo()
    poison_once(monkeypatch, 18, stop=15)
    assert run("train", *settings, "--out", parts).exit_code == 130
    assert cebm.load_checkpoint(parts / "ckpt.pt")["updates"] == 15
    assert run("train", *settings, "--out", parts).exit_code == 0
    assert_same_run(whole, parts)
    assert cebm.load_checkpoint(parts / "ckpt.pt")["rollbacks"][0]["to"] == 8


def test_ctrl_c_on_weights_that_are_not_numbers_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = tiny("checkpoint_every=8", "guard.every=24")  # checks are at 8, 16 and 24
    poison_once(monkeypatch, 18, "gradient")
    assert run("train", *settings, "--out", whole).exit_code == 0
    monkeypatch.undo()
    poison_once(monkeypatch, 18, "gradient", stop=20)
    assert run("train", *settings, "--out", parts).exit_code == 130
    assert cebm.load_checkpoint(parts / "ckpt.pt")["updates"] == 16
    monkeypatch.undo()
    poison_once(monkeypatch, 2, "gradient")  # the same update again
    assert run("train", *settings, "--out", parts).exit_code == 0
    assert_same_run(whole, parts)
    assert cebm.load_checkpoint(parts / "ckpt.pt")["rollbacks"][0]["to"] == 8
    monkeypatch.undo()
    poison_once(monkeypatch, 2, "gradient", stop=4)  # before there is a checkpoint
    early = run("train", *settings, "--out", tmp_path / "early")
    assert early.exit_code == 130
    assert "interrupted; nothing was saved" in early.stdout
    assert not (tmp_path / "early/ckpt.pt").exists()


def test_a_run_made_longer_rolls_back_as_one_that_was_as_long_from_the_start(tmp_path, monkeypatch):
    folders = tmp_path / "whole", tmp_path / "longer"
    for folder, lengths in zip(folders, ((24,), (11, 24)), strict=True):
        poison_once(monkeypatch, 14)
        for updates in lengths:
            settings = tiny("checkpoint_every=8", "decay=none", f"updates={updates}")
            assert run("train", *settings, "--out", folder).exit_code == 0
        monkeypatch.undo()
    state = cebm.load_checkpoint(folders[1] / "ckpt.pt")
    assert [r["to"] for r in state["rollbacks"]] == [0]  # that of 8 had not shown itself healthy
    for part in ("model", "average", "optimiser", "buffer", "generators", "rollbacks"):
        same(state[part], cebm.load_checkpoint(folders[0] / "ckpt.pt")[part], part)


def test_too_many_rollbacks_end_the_run_in_its_last_good_state_and_say_what_to_type(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    few = (*DIVERGING, "--set", "rollbacks=1", "--out", "a run")  # the space has to be quoted
    for result in (run("train", *few), run("train", *few)):  # it stays at its end
        assert result.exit_code == 1
        assert "diverged 2 times" in result.stderr
        assert "a run/ckpt.pt is good" in result.stderr
        advice, command = result.stderr.strip().splitlines()
        assert advice.endswith("lower train.rate (more chains.steps may help too):")
    state = cebm.load_checkpoint("a run/ckpt.pt")
    for part in ("model", "optimiser", "buffer", "updates"):
        same(state[part], state["good"][part], part)
    start = cebm.new_model(cebm.parse_config(state["config"]), "cpu").state_dict()
    same(state["model"], start, "weights")
    assert state["buffer"].abs().max() <= 1  # no exploded chain is left in it
    typed = shlex.split(command)
    assert typed[:3] == ["python", "cebm.py", "train"]
    calmer = run(*typed[2:], "--set", "rollbacks=10")
    assert calmer.exit_code == 0, calmer.stderr
    config = cebm.load_checkpoint("a run-calmer/ckpt.pt")["config"]
    usual = cebm.load_checkpoint("a run/ckpt.pt")["config"]
    assert config["train"].pop("rate") == usual["train"].pop("rate") / 2
    assert config["guard"].pop("rollbacks") == 10 > usual["guard"].pop("rollbacks")
    assert config == usual


def test_a_branch_has_the_rate_that_it_is_given_whatever_was_halved_before_it(tmp_path):
    assert run("train", *DIVERGING, "--out", tmp_path / "a").exit_code == 0
    state = cebm.load_checkpoint(tmp_path / "a/ckpt.pt")
    assert len(state["rollbacks"]) > 2
    settings = (*DIVERGING, "--set", "rate=1e-3", "--set", "updates=40", "--out", tmp_path / "b")
    assert run("train", *settings, "--init-from", tmp_path / "a/ckpt.pt").exit_code == 0
    branch = cebm.load_checkpoint(tmp_path / "b/ckpt.pt")
    assert branch["optimiser"]["param_groups"][0]["lr"] == 1e-3
    assert branch["rollbacks"] == []
    assert (branch["good"]["updates"], branch["updates"]) == (36, 40)


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


def new_trainer(config, processes=None):
    """A trainer on the CPU without images."""
    nothing = torch.zeros(0)
    processes = processes or cebm.Processes()
    return cebm.Trainer(config, nothing, nothing, torch.device("cpu"), "float32", processes)


def three_updates(config, rank, ranks):
    """Weights after three updates on fixed images and chains, of which each rank has a share."""
    run, generator = new_trainer(config, cebm.Processes(rank, ranks)), torch.Generator()
    x, chains = torch.rand((2, 3, 16, 1, 28, 28), generator=generator.manual_seed(5)) * 2 - 1
    for images, negatives in zip(x, chains, strict=True):
        mine = images.chunk(ranks)[rank], torch.arange(16).chunk(ranks)[rank] % 10
        loss, _ = run.loss(*mine, negatives.chunk(ranks)[rank])
        run.optimiser.zero_grad()
        loss.backward()
        run.optimiser.step()
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


@pytest.mark.gpu
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("error:updates are")
def test_on_a_gpu_recorded_updates_are_the_plain_ones_also_after_a_rollback(tmp_path, monkeypatch):
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
                patch.setattr(sampling, "GraphedFunction", lambda ways, generator: ways[-1])
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
    changes = ["hidden=8", "updates=8", "warmup=0", "pictures=2", "decay=none", "reuse=0.5"]
    arguments = ["--preset", preset, *options_for(preset, [*TINY, *changes])]
    run("train", *arguments, "--out", tmp_path / "whole")
    for updates in ("updates=3", "updates=8"):
        result = run("train", *arguments, "--set", updates, "--out", tmp_path / "parts")
        assert result.exit_code == 0, result.stderr
    one, two = (cebm.load_checkpoint(tmp_path / f / "ckpt.pt") for f in ("whole", "parts"))
    for key in ("model", "optimiser", "generators", "buffer"):
        same(one[key], two[key], key)


def test_the_literal_preset_differs_in_the_step_and_the_two_noises_alone():
    usual, literal = (asdict(cebm.compose(p)) for p in ("cebm-fmnist", "cebm-fmnist-literal"))
    differing = {f"{s}.{k}" for s in usual for k in usual[s] if usual[s][k] != literal[s][k]}
    assert differing == {"chains.step_size", "chains.noise_std", "data.noise_std"}


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
    own = ["model.name=vae", "likelihood=continuous_bernoulli"]
    assert cebm.compose("cebm-mnist", own).model.likelihood == "continuous_bernoulli"


@pytest.mark.parametrize(
    ("preset", "setting", "has"),
    [
        ("vae-mnist", "l2=5", "model.likelihood"),
        ("igebm-mnist", "components=7", "model.l2"),
        ("cebm-mnist", "components=2", "model.head"),  # it would be a GMM-CEBM
        ("gan-mnist", "standardise=true", "model.gradient_penalty"),
        ("gan-mnist", "bound=1", "chains.step_size"),
        ("vae-mnist", "reuse=0.5", "no key"),
        ("rbm-mnist", "step_size=1", "chains.reuse"),
        ("hdge-mnist", "l2=1", "model.latent"),
        ("cebm-fmnist", "extra=true", "data.image"),
    ],
)
def test_a_key_that_a_model_has_no_use_for_is_refused_with_those_it_has(preset, setting, has):
    with pytest.raises(cebm.click.UsageError) as refusal:
        cebm.compose(preset, [setting])
    key = cebm.parse_setting(setting)[0]
    assert f"has no use for {key}. " in refusal.value.message
    assert has in refusal.value.message


def test_widths_and_lengths_that_scripts_set_for_all_models_are_passed_over_with_a_warning(capsys):
    cebm.compose("gan-mnist", ["steps=3", "channels=[4, 4, 4, 4]"])
    assert capsys.readouterr().err == "Warning: gan has no use for chains.steps\n"


def test_the_keys_of_a_model_are_the_ones_that_change_its_loss():
    """Each key of `model` that a kind says it uses is read while it is built or scored."""

    class Spy:
        def __init__(self, config):
            self.config, self.read = config, set()

        def __getattr__(self, key):
            self.read.add(key)
            return getattr(self.config, key)

    x = torch.zeros(4, 1, 28, 28)
    for name, kind in models.MODELS.items():
        spy = Spy(cebm.compose(f"{name}-mnist", ["channels=[4, 4, 4, 4]"]).model)
        model = models.build(spy, (1, 28, 28), 10)
        model.loss(x, torch.arange(4), x)
        model.represent(x)
        assert kind.keys <= spy.read, name


def test_a_mixture_has_several_components():
    config = cebm.compose("gmm-cebm-mnist", ["components=1"])
    with pytest.raises(cebm.click.UsageError, match="gmm-cebm has at least 2"):
        cebm.check(config)


def test_streams_of_random_numbers_are_of_their_own():
    seeds = [
        cebm.stream_seed("training", seed, rank, rollbacks)
        for seed in range(6)
        for rank in range(4)
        for rollbacks in range(6)
    ]
    seeds += [cebm.stream_seed("order", seed, epoch) for seed in range(6) for epoch in range(50)]
    others = set(cebm.STREAMS) - {"training", "order"}
    seeds += [cebm.stream_seed(purpose, seed) for purpose in others for seed in range(6)]
    assert len(set(seeds)) == len(seeds)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(cebm.all_keys())), VALUES)
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
    """Whole checkpoints but for one value each, by what and how."""
    states = {}
    changes = [
        ("format", 1),
        ("format", 6),
        ("config", {}),
        ("config", {"data": 3}),
        ("updates", -1),
        ("buffer", "x"),
        ("buffer", torch.zeros(1, 1, 28, 28)),
        ("model", 3),
    ]
    for key, value in changes:
        states[key, str(value)] = {**cebm.load_checkpoint(folder / "ckpt.pt"), key: value}
    states["weights", "nan"] = state = cebm.load_checkpoint(folder / "ckpt.pt")
    state["model"]["network.heads.0.0.bias"][0] = float("nan")
    return states


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
    for other in ([1, 2], {"format": 99}, {"format": cebm.FORMAT}, *spoiled(trained).values()):
        torch.save(other, bad)
        contents.append(bad.read_bytes())
    for content in contents:
        bad.write_bytes(content)
        for command in (["knn"], ["sample", "--out", tmp_path / "a.png"], ["export"]):
            result = run(command[0], bad, *command[1:])
            assert result.exit_code in (1, 2), content[:20]
            assert "bad.pt" in result.stderr
            assert "Traceback" not in result.output
    assert not (tmp_path / "ran").exists()


def test_show_refuses_files_that_are_no_checkpoint_and_runs_no_code(trained, tmp_path):
    bad = tmp_path / "bad.pt"
    numbers = "buffer", "weights"  # which show does not read
    states = [state for what, state in spoiled(trained).items() if what[0] not in numbers]
    for state in (Payload(tmp_path / "ran"), [1, 2], {"format": cebm.FORMAT}, *states):
        torch.save(state, bad)
        result = run("show", bad)
        assert result.exit_code == 1, state
        assert "bad.pt" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_cut_and_flipped_checkpoints_are_refused_or_load_right(trained, tmp_path):
    whole, path = (trained / "ckpt.pt").read_bytes(), tmp_path / "ckpt.pt"
    right, chance, refused = cebm.load_checkpoint(trained / "ckpt.pt"), random.Random(0), 0
    with zipfile.ZipFile(trained / "ckpt.pt") as archive:
        directory = archive.start_dir  # of the archive: no sum is of it
    for i in range(600):
        place = chance.randrange(directory if i % 3 == 2 else 0, len(whole))
        flipped = bytes([whole[place] ^ 1 << chance.randrange(8)])
        path.write_bytes(whole[:place] + (flipped + whole[place + 1 :] if i % 3 else b""))
        try:
            loaded = cebm.load_checkpoint(path)
        except cebm.Failure as error:
            refused += 1
            assert str(path) in error.message  # noqa: PT017, either outcome is right
            continue
        assert i % 3, "a cut file was taken for whole"
        same(loaded, right, f"byte {place}")
        assert cebm.read_outline(path)["updates"] == right["updates"]
    assert refused > 400


def test_an_outline_read_without_torch_is_what_the_whole_checkpoint_says(trained):
    files = [trained / "ckpt.pt", *ROOT.glob("tests/*.pt"), *ROOT.glob("checkpoints/*.pt")]
    for path in files:
        outline, whole = cebm.read_outline(path), cebm.load_checkpoint(path)
        shapes = {name: tuple(shape.sizes) for name, shape in outline.pop("model").items()}
        assert shapes == {name: tuple(tensor.shape) for name, tensor in whole["model"].items()}
        assert outline == {key: whole[key] for key in cebm.About.__annotations__ if key in whole}


def test_an_entry_marked_as_a_folder_is_not_read_as_a_tensor_of_whatever_is_in_memory(
    trained, tmp_path
):
    whole = bytearray((trained / "ckpt.pt").read_bytes())
    with zipfile.ZipFile(trained / "ckpt.pt") as archive:
        entry = whole.index(b"PK\x01\x02", archive.start_dir + 1000)
    whole[entry + 38] |= 0x10  # its external attributes
    (tmp_path / "ckpt.pt").write_bytes(whole)
    with pytest.raises(cebm.Failure, match="not as torch writes it"):
        cebm.load_checkpoint(tmp_path / "ckpt.pt")


def test_a_damaged_checkpoint_is_not_trained_over(trained, tmp_path):
    damaged = (trained / "ckpt.pt").read_bytes()[:5000]
    (tmp_path / "ckpt.pt").write_bytes(damaged)
    result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 1
    assert "or not a whole one" in result.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == damaged
    for part in ("optimiser", "generators"):
        state = cebm.load_checkpoint(trained / "ckpt.pt")
        del state[part]
        torch.save(state, tmp_path / "ckpt.pt")
        result = run("train", *tiny(), "--out", tmp_path)
        assert result.exit_code == 1
        assert f"({part} is missing, as in files that hold a model only)" in result.stderr


@pytest.mark.parametrize("key", ["model", "buffer", "optimiser", "good"])
def test_a_tensor_larger_than_the_file_is_refused_before_any_memory_is_taken(
    trained, tmp_path, key
):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    huge = torch.zeros(1, 1, 1, 1).expand(10**5, 10**5, 10**3, 10)
    if key == "model":
        state["model"]["network.heads.0.0.bias"] = huge
    elif key == "buffer":
        state["buffer"] = huge
    elif key == "optimiser":
        state["optimiser"]["state"][0]["exp_avg"] = huge
    else:
        state["good"]["buffer"] = huge
    torch.save(state, tmp_path / "ckpt.pt")
    assert (tmp_path / "ckpt.pt").stat().st_size < 2e6
    with pytest.raises(cebm.Failure, match=f"{key} is of another type, or larger than the file"):
        cebm.load_checkpoint(tmp_path / "ckpt.pt")


def test_a_configuration_of_a_larger_network_than_the_weights_is_refused_before_it_is_built(
    trained, tmp_path, monkeypatch
):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    state["config"]["model"] |= {"hidden": 20_000, "latent": 20_000}
    torch.save(state, tmp_path / "ckpt.pt")
    monkeypatch.setattr(cebm, "new_model", lambda *_: pytest.fail("built"))
    with pytest.raises(cebm.Failure, match="is of another model"):
        cebm.load_model(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", [[[]]]), ("good", 3), ("candidate", {"model": 3}), ("greatest", "x"),
        ("seconds", "long"), ("rollbacks", [3]), ("rollbacks", [{"update": "one"}]),
        ("level", {"gap": "wide"}), ("generators", torch.zeros(3)), ("log", 1.5),
        ("optimiser", {"state": {}, "param_groups": []}),
    ],
)  # fmt: skip
def test_a_part_of_a_wrong_type_is_refused_and_not_resumed_into_a_traceback(
    trained, tmp_path, key, value
):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    state[key] = value
    torch.save(state, tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    result = run("train", *tiny("updates=25", "decay=none"), "--out", tmp_path)
    assert result.exit_code == 1
    assert "ckpt.pt" in result.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_moments_of_another_shape_are_not_resumed(tmp_path):
    settings = tiny("decay=none", "updates=2")
    run("train", *settings, "--out", tmp_path)
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    state["optimiser"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(state, tmp_path / "ckpt.pt")
    result = run("train", *settings, "--out", tmp_path)
    assert result.exit_code == 1
    assert "Adam's moments are of another shape" in result.stderr


def test_the_log_is_that_of_the_checkpoint_when_a_run_resumes_whatever_was_left_of_it(tmp_path):
    settings = tiny("decay=none", "updates=6")
    run("train", *settings, "--out", tmp_path)
    whole = (tmp_path / "log.csv").read_text()
    for spoiled in (whole + "9,half a ro", whole[: len(whole) // 2], ""):
        (tmp_path / "log.csv").write_text(spoiled)
        assert run("train", *settings, "--out", tmp_path).exit_code == 0
        assert (tmp_path / "log.csv").read_text() == whole
    (tmp_path / "log.csv").unlink()
    run("train", *settings, "--set", "updates=9", "--out", tmp_path)
    assert [int(row["update"]) for row in rows(tmp_path)] == [3, 6, 9]


def test_a_checkpoint_of_another_network_is_refused(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    for weights in ("model", "average"):
        state[weights]["network.heads.0.0.bias"] = torch.zeros(9)
    torch.save(state, tmp_path / "ckpt.pt")
    for result in (run("knn", tmp_path / "ckpt.pt"), run("train", *tiny(), "--out", tmp_path)):
        assert result.exit_code == 1
        assert "ckpt.pt" in result.stderr
        assert len(result.stderr.strip().splitlines()) <= 2


def test_a_checkpoint_for_which_torch_finds_no_room_is_told_and_the_old_one_stays(
    tmp_path, monkeypatch
):
    def fail(*_):
        raise RuntimeError("unexpected pos 704 vs 598")  # what its writer says of a full disk

    monkeypatch.setattr(torch, "save", fail)
    (tmp_path / "ckpt.pt").write_bytes(b"old")
    with pytest.raises(cebm.Failure, match=r"is the disk full.*what was there is intact"):
        cebm.save_checkpoint(tmp_path / "ckpt.pt", {})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("ckpt.pt", b"old")]


def test_a_linked_checkpoint_is_written_where_it_lies(trained, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    run("train", *tiny("decay=none", "updates=2"), "--out", tmp_path / "first")
    (tmp_path / "disk/big.pt").write_bytes((tmp_path / "first/ckpt.pt").read_bytes())
    (tmp_path / "run/ckpt.pt").symlink_to("../disk/big.pt")
    longer = tiny("updates=3", "decay=none")
    assert run("train", *longer, "--out", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run/ckpt.pt").is_symlink()
    assert cebm.load_checkpoint(tmp_path / "disk/big.pt")["updates"] == 3


def test_a_file_that_is_replaced_keeps_its_mode_and_its_neighbours(tmp_path):
    path = tmp_path / "ckpt.pt"
    for name in ("ckpt.pt", "ckpt.pt.part", "ckpt.pt.try"):
        (tmp_path / name).write_bytes(b"mine")
    path.chmod(0o600)
    cebm.write_atomically(path, b"new")
    assert path.stat().st_mode & 0o777 == 0o600
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "ckpt.pt": b"new",
        "ckpt.pt.part": b"mine",
        "ckpt.pt.try": b"mine",
    }
    cebm.write_atomically(tmp_path / "other", b"")
    (tmp_path / "usual").touch()
    assert (tmp_path / "other").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A function that puts a text in place of configs.yaml."""

    def replace_recipes(text):
        (tmp_path / "configs.yaml").write_text(text)
        monkeypatch.setattr(cebm, "CONFIGS", tmp_path / "configs.yaml")
        cebm.read_recipes.cache_clear()

    yield replace_recipes
    monkeypatch.undo()
    cebm.read_recipes.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("    set: &short\n", "    sett: &short\n", "unknown key sett; did you mean set?"),
        ("variants:", "variant:", "unknown section variant; did you mean variants?"),
        ("of: {cebm-fmnist:", "of: {cebm-f:", "no preset cebm-f; did you mean cebm-"),
        ("      reuse: 0.95", "      reuze: 0.95", "unknown key chains.reuze; did you mean"),
        ("chains.reuse: 0.99", "chains.reuse: 9.9", "chains.reuse = 9.9: it has to be a number"),
        ("      latent: 128", "      latent: many", "model.latent = 'many': it has to be a whole"),
        ("      t2: square", "      t2: cube", "model.t2 = 'cube': it has to be one of square"),
        ("gibbs: {data.noise_std", "gibbs: {data.noise", "unknown key data.noise; did you mean"),
        ("MNIST, trunk: small}", "MNIST, trunk: smal}", "trunk smal is not in trunks; did you"),
        (
            "autoencoder, recipe: elbo",
            "autoencoder, recipe: elbow",
            "recipe elbow is not in recipes; did you",
        ),
        (
            "    model: cebm\n",
            "    model: cebn\n",
            "model cebn is not in models; did you mean cebm",
        ),
        ("  pcd: {}", "  pcd: {}\n  pcd2: 3", "pcd2 has to be a mapping"),
        ("[mnist, fmnist, cifar10, svhn, folder]", "[mnits]", "mnits is not in data; did you mean"),
        ("data:\n  mnist", "data: [\n  mnist", ""),
        ("  beta2: 0.999\n", "  beta2: [0.999\n", ""),
    ],
)
def test_a_malformed_configs_yaml_names_file_line_and_key(recipes, old, new, says):
    text = (ROOT / "configs.yaml").read_text()
    before, _, after = text.partition(old)
    assert after
    recipes(before + new + after)
    result = run("show")
    assert result.exit_code == 1
    (message,) = result.stderr.strip().splitlines()
    assert message.startswith("Error: configs.yaml")
    assert says in message
    line = int(message.split("line ")[-1].split(",")[0].split(":")[0])
    changed = len((before + new).rstrip("\n").splitlines())
    assert line == changed if says else line >= changed  # YAML notices later


def test_a_configs_yaml_without_a_key_or_a_section_says_which(recipes):
    text = (ROOT / "configs.yaml").read_text()
    recipes(text.replace("      beta2: 0.999\n", ""))
    assert "key train.beta2 is missing in recipes.common" in run("show").stderr
    recipes(text[: text.index("presets:")])
    assert "presets has to be a mapping" in run("show").stderr
    recipes("3")
    assert "configs.yaml: it has to be a mapping" in run("show").stderr


def test_importing_neither_reads_configs_yaml_nor_exits(tmp_path):
    (tmp_path / "cebm.py").write_text((ROOT / "cebm.py").read_text())
    for name in ("models", "sampling", "data", "evaluate"):
        (tmp_path / f"{name}.py").write_text("")
    (tmp_path / "configs.yaml").write_text("data: [")
    code = "import cebm; print('imported')"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (result.stdout, result.stderr) == ("imported\n", "")


def test_a_variant_of_a_preset_keeps_what_that_sets(recipes):
    mine = "variants:\n  mine: {of: {quickstart: {train.rate: 2.0e-3}}, set: {model.l2: 0.2}}"
    wanted = cebm.compose("quickstart", ["l2=0.2", "rate=2e-3"])
    recipes((ROOT / "configs.yaml").read_text().replace("variants:", mine))
    assert cebm.compose("quickstart-mine") == wanted


def test_the_presets_are_the_papers_models_and_their_variants():
    names = cebm.read_recipes()["presets"]
    seven = ("cebm", "gmm-cebm", "igebm", "vae", "gmm-vae", "bigan", "gmm-bigan")
    four = {f"{m}-{d}" for m in seven for d in ("mnist", "fmnist", "cifar10", "svhn")}
    folder = {f"{m}-folder" for m in seven}
    two = {f"{m}-{d}" for m in ("gan", "jem", "hdge", "rbm", "efh") for d in ("mnist", "fmnist")}
    assert len(four | two) == 38
    fast = {
        f"{m}-{d}-fast" for m in ("cebm", "gmm-cebm", "igebm", "jem") for d in ("mnist", "fmnist")
    }
    gpu = {f"{m}-gpu" for m in ("cebm-mnist", "gmm-cebm-mnist", "cebm-cifar10", "igebm-cifar10")}
    r1 = {f"{m}-{d}-r1" for m in ("gan", "bigan", "gmm-bigan") for d in ("mnist", "fmnist")}
    others = {"quickstart", "cebm-fmnist-literal", "cebm-folder-fast", "gmm-cebm-folder-fast"}
    assert set(names) == folder | four | two | fast | gpu | r1 | others


def test_fast_and_gpu_presets_share_what_they_do_not_set():
    mnist, fmnist = (cebm.compose(f"jem-{d}-fast") for d in ("mnist", "fmnist"))
    assert replace(mnist.train, updates=15000) == fmnist.train
    chains = fmnist.chains
    assert (chains.reuse, chains.data_restarts, mnist.chains.bound) == (0.99, 1, 1.5)
    assert mnist.chains == replace(chains, reuse=0.95, data_restarts=0.0, bound=1.5)
    short, longer = (cebm.compose(f"cebm-mnist-{v}") for v in ("fast", "gpu"))
    assert replace(short.train, updates=12000) == mnist.train
    assert short.chains == replace(mnist.chains, steps=20) == longer.chains
    assert replace(longer.train, rate=6e-4, updates=15500) == short.train
    assert replace(longer.train, updates=15000) == cebm.compose("gmm-cebm-mnist-fast").train


def test_every_key_says_what_it_means():
    for name, key in cebm.all_keys().items():
        assert len(key.meaning) > 4
        assert key.bounds or key.words or key.kind in (bool, str), name


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_folder_that_cannot_be_written_keeps_its_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(cebm.Failure, match="No space left on device"):
        cebm.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
