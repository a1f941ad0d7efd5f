"""The commands as a user types them, on the embedded set; bad input; crashes and resumption."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import click
import numpy as np
import pytest
import torch
import yaml
from helpers import (
    RESTARTED,
    ROOT,
    assert_chains_are_the_last_batch,
    assert_same_run,
    launch,
    options_for,
    read_sheet,
    rows,
    run,
    same,
    send_signal,
    tiny,
    tiny_data,
)
from PIL import Image

import cebm
import data
import evaluate
import models
import sampling


def test_the_end_of_a_run_names_the_checkpoint_and_the_next_commands(tmp_path):
    out = run("train", *tiny("updates=2"), "--out", tmp_path / "a").stdout
    assert f"python cebm.py knn {tmp_path}/a/ckpt.pt" in out
    assert f"python cebm.py sample {tmp_path}/a/ckpt.pt" in out


def wait_for(path, process, before=False):
    """Until a file is there, or has changed from its content `before`, or the process ends."""
    deadline = time.monotonic() + 100
    while process.poll() is None and (path.exists() and path.read_bytes()) == before:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def run_and_kill(command, folder, least):
    """Kills a run at random moments after it has gone on, `least` times; then it ends: kills."""
    random.seed(time.time_ns())
    log, kills = folder / "log.csv", 0
    while True:
        before = log.exists() and log.read_bytes()
        process = launch(*command, "--out", folder)
        wait_for(log, process, before)
        try:
            process.wait(random.uniform(0, 0.2 if kills < least else 600))
            assert process.returncode == 0, process.stderr.read()
            return kills
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1


def test_a_run_killed_at_random_moments_ends_equal_to_the_uninterrupted_one(
    small, uninterrupted, tmp_path
):
    assert run_and_kill(small, tmp_path, least=2) > 0
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
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch("train", *settings, "--out", whole).wait() == 0
    kills = run_and_kill(["train", *settings], parts, least)
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


def test_ctrl_c_saves_and_the_same_command_resumes_to_the_same_end(small, uninterrupted, tmp_path):
    for attempt in range(10):  # on a busy machine the signal may come after the end
        folder = tmp_path / str(attempt)
        process = launch(*small, "--out", folder)
        wait_for(folder / "log.csv", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130, err
    assert "the same command resumes" in out
    assert 3 <= cebm.load_checkpoint(folder / "ckpt.pt")["updates"] < 24
    assert "resuming after update" in run(*small, "--out", folder).stdout
    assert_same_run(uninterrupted, folder)


def test_a_run_whose_output_nobody_reads_any_more_saves_and_resumes_to_the_same_end(
    small, uninterrupted, tmp_path
):
    process = launch(*small, "--out", tmp_path)
    process.stdout.readline()
    process.stdout.close()  # as `train | tee` when Ctrl-C has ended tee
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == ""
    assert 0 <= cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] < 24
    assert run(*small, "--out", tmp_path).exit_code == 0
    assert_same_run(uninterrupted, tmp_path)


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


def test_a_run_begun_from_another_goes_on_by_the_new_settings_and_records_them(
    tmp_path, monkeypatch
):
    common = ("decay=none", "warmup=0")
    old, new = (("--out", tmp_path / name) for name in ("old", "new"))
    source = ("--init-from", tmp_path / "old/ckpt.pt")
    run("train", *tiny(*common, "updates=8"), *old)
    before = (tmp_path / "old/ckpt.pt").read_bytes()
    settings = tiny(*common, "rate=2e-3", "updates=16")
    result = run("train", *settings, *source, *new)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "old/ckpt.pt").read_bytes() == before
    shown = yaml.safe_load(run("show", tmp_path / "new/ckpt.pt").stdout)
    changed = "train.updates (8, now 16), train.rate (0.001, now 0.002)"
    assert shown["origin"] == f"update 8 of {tmp_path}/old/ckpt.pt (quickstart); {changed}"
    assert shown["config"]["train"]["rate"] == 0.002
    monkeypatch.setattr(cebm, "learning_rate", lambda update, *_: 0.001 * (1 + (update > 8)))
    run("train", *tiny(*common, "updates=16"), "--out", tmp_path / "stepwise")
    one, two = (cebm.load_checkpoint(tmp_path / d / "ckpt.pt") for d in ("new", "stepwise"))
    for part in ("model", "average", "optimiser", "buffer", "generators"):
        same(one[part], two[part], part)
    assert [int(row["update"]) for row in rows(tmp_path / "new")] == [9, 12, 15, 16]
    again = run("train", *settings, *source, *new)  # the same command resumes, and is done
    assert (again.exit_code, "done: " in again.stdout) == (0, True)
    monkeypatch.undo()


def test_a_branch_takes_betas_chains_and_precision_from_its_own_settings(tmp_path):
    run("train", *tiny("decay=none", "updates=4"), "--out", tmp_path / "old")
    own = tiny("decay=none", "updates=8", "beta1=0.5", "epsilon=1e-4", "steps=3")
    for precision in ("bfloat16", "auto"):
        command = ("train", *own, "--set", f"precision={precision}", "--out", tmp_path / precision)
        assert run(*command, "--init-from", tmp_path / "old/ckpt.pt").exit_code == 0
        state = cebm.load_checkpoint(tmp_path / precision / "ckpt.pt")
        group = state["optimiser"]["param_groups"][0]
        assert (group["betas"], group["eps"]) == ((0.5, 0.999), 1e-4)
        pays = sampling.bfloat16_pays(torch.device(state["device"]))
        expected = "bfloat16" if precision == "bfloat16" or pays else "float32"
        assert state["precision"] == expected


def test_a_run_in_bfloat16_says_where_it_is_only_emulated_and_what_to_do(tmp_path, monkeypatch):
    assert run("train", *tiny("precision=bfloat16", "updates=1"), "--out", tmp_path).exit_code == 0
    monkeypatch.setattr(sampling, "bfloat16_pays", lambda device: False)
    out = run("train", *tiny("precision=bfloat16", "updates=1"), "--out", tmp_path).stdout
    assert "only emulates bfloat16" in out
    assert "--set train.precision=float32" in out
    assert "emulates" not in run("train", *tiny("updates=1"), "--out", tmp_path / "b").stdout


def test_a_branch_with_no_update_left_is_refused(tmp_path):
    run("train", *tiny("decay=none", "updates=4"), "--out", tmp_path / "old")
    command = ("train", *tiny("decay=none", "updates=4", "l2=0.2"))
    source = ("--init-from", tmp_path / "old/ckpt.pt")
    result = run(*command, *source, "--out", tmp_path / "new")
    assert result.exit_code == 1
    assert "has made 4 updates already: set train.updates, 4, to a larger number" in result.stderr


def test_a_run_that_was_begun_from_another_checkpoint_is_not_resumed(tmp_path):
    old, new = tmp_path / "old/ckpt.pt", ("--out", tmp_path / "new")
    run("train", *tiny("decay=none", "updates=4"), "--out", tmp_path / "old")
    assert run("train", *tiny("decay=none"), "--init-from", old, *new).exit_code == 0
    (tmp_path / "other.pt").write_bytes(old.read_bytes())
    result = run("train", *tiny("decay=none"), "--init-from", tmp_path / "other.pt", *new)
    assert result.exit_code == 1
    assert f"was not begun from {tmp_path}/other.pt" in result.stderr


@pytest.mark.parametrize("name", ["config.yaml", "log.csv"])
def test_a_folder_with_somebodys_files_is_no_run_folder(tmp_path, name):
    (tmp_path / name).write_text("mine: 1")
    result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 1
    assert "a config.yaml or log.csv that is not of this run" in result.stderr
    assert (tmp_path / name).read_text() == "mine: 1"


def test_a_run_whose_checkpoint_was_moved_away_keeps_its_log(tmp_path):
    run("train", *tiny(), "--out", tmp_path)
    (tmp_path / "ckpt.pt").rename(tmp_path / "kept.pt")
    log = (tmp_path / "log.csv").read_text()
    assert run("train", *tiny(), "--out", tmp_path).exit_code == 1
    assert (tmp_path / "log.csv").read_text() == log


@pytest.mark.parametrize("left", ["", "upd", "update,loss\n3,0.1\n", "update,loss\n3,0"])
def test_a_run_killed_before_its_first_checkpoint_begins_anew(trained, tmp_path, left):
    (tmp_path / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    (tmp_path / "log.csv").write_text(left)
    assert run("train", *tiny(), "--out", tmp_path).exit_code == 0
    assert_same_run(trained, tmp_path)


def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path):
    (tmp_path / "samples/0000008.png").mkdir(parents=True)
    result = run("train", *tiny("pictures=3"), "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "Warning: cannot write" in result.stdout
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] == 24


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (tiny("hidden=9"), "cannot be resumed"),
        (tiny("buffer=4", "batch=1"), "cannot be resumed"),
        (tiny("model.name=igebm"), "model.name (cebm, now igebm) has to stay"),
        ((*tiny(), "--seed", 1), "train.seed (0, now 1) has to stay"),  # of the untrained network
    ],
)
def test_a_branch_that_cannot_follow_is_refused_and_nothing_is_lost(tmp_path, settings, says):
    one = tiny("batch=1", "buffer=1", "updates=1")  # chain, which would do for each of four
    run("train", *(one if "buffer=4" in settings else tiny("updates=1")), "--out", tmp_path / "a")
    before = (tmp_path / "a/ckpt.pt").read_bytes()
    source = ("--init-from", tmp_path / "a/ckpt.pt")
    result = run("train", *settings, *source, "--out", tmp_path / "b")
    assert result.exit_code == 1
    assert says in result.stderr
    assert (tmp_path / "a/ckpt.pt").read_bytes() == before
    assert not (tmp_path / "b/ckpt.pt").exists()


def test_a_branch_needs_a_run_and_not_only_a_model(tmp_path):
    weights = ROOT / "checkpoints" / "cebm-mnist.pt"
    command = ("train", "--preset", "cebm-mnist-gpu", "--set", "data.name=glyphs")
    result = run(*command, "--init-from", weights, "--out", tmp_path)
    assert result.exit_code == 1
    assert "cannot be resumed, a part is missing" in result.stderr
    absent = run(*command, "--init-from", tmp_path / "none.pt", "--out", tmp_path)
    assert absent.exit_code == 2
    assert "none.pt' does not exist" in absent.stderr


FORMAT_7 = ROOT / "tests" / "format-7.pt"  # a run of 12 updates, as version 195c621 wrote it


def test_a_run_of_an_earlier_format_is_evaluated_and_begun_anew_from(tmp_path):
    shutil.copy(FORMAT_7, tmp_path / "ckpt.pt")
    old = cebm.load_checkpoint(FORMAT_7)
    assert (old["format"], old["updates"]) == (7, 12)
    assert run("export", FORMAT_7, "--out", tmp_path / "latents.npz").exit_code == 0
    settings = [f"{k}={cebm.plain(v)}" for k, v in cebm.flatten(old["config"]).items()]
    known = cebm.keys_in_use(models.MODELS["cebm"])
    command = [part for s in settings if s.split("=")[0] in known for part in ("--set", s)]
    refused = run("train", *command, "--out", tmp_path)
    assert refused.exit_code == 1
    assert "earlier version, whose random numbers were others" in refused.stderr
    assert f"--init-from {tmp_path}/ckpt.pt" in refused.stderr
    assert (tmp_path / "ckpt.pt").read_bytes() == FORMAT_7.read_bytes()
    longer = (*command, "--set", "updates=14", "--init-from", FORMAT_7)
    result = run("train", *longer, "--out", tmp_path / "new")
    assert result.exit_code == 0, result.stderr
    assert "beginning after update 12" in result.stdout
    assert cebm.load_checkpoint(tmp_path / "new/ckpt.pt")["format"] == cebm.FORMAT


@pytest.mark.parametrize("seconds", [0.2, 0.8, 1.6])
def test_ctrl_c_at_any_moment_leaves_no_traceback_of_the_program(trained, seconds):
    process = launch("knn", trained / "ckpt.pt")
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) or "cebm.py" not in err  # Python's own start
    assert "cebm.py" not in err
    assert "torch" not in err


def test_a_run_whose_rate_falls_to_its_end_is_not_made_longer(tmp_path):
    assert run("train", *tiny("updates=2"), "--out", tmp_path).exit_code == 0
    longer = run("train", *tiny("updates=3"), "--out", tmp_path)
    assert longer.exit_code == 1
    assert "train.updates (2, now 3)" in longer.stderr
    assert f"--init-from {tmp_path}/ckpt.pt" in longer.stderr


def test_a_second_train_in_the_same_folder_is_refused(tmp_path):
    with cebm.claim_folder(tmp_path):
        result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 1
    assert "in use by another" in result.stderr


def test_a_folder_that_cannot_be_locked_is_trained_in_with_a_warning(tmp_path, monkeypatch):
    import filelock

    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    result = run("train", *tiny("updates=1"), "--out", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert "cannot be locked" in result.stdout
    assert (tmp_path / "ckpt.pt").exists()


def test_drafts_that_a_killed_run_left_are_removed_and_other_files_are_not(tmp_path):
    (tmp_path / "samples").mkdir()
    for name in (".0123.draft", "samples/.4567.draft", "notes.draft", "ckpt.pt.part"):
        (tmp_path / name).write_text("old")
    assert run("train", *tiny("updates=1"), "--out", tmp_path).exit_code == 0
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    own = {".lock", "ckpt.pt", "config.yaml", "log.csv"}
    assert left == own | {"notes.draft", "ckpt.pt.part"}


def test_signals_are_the_callers_again_after_training(tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = [signal.getsignal(number) for number in numbers]
    assert run("train", *tiny("updates=1"), "--out", tmp_path).exit_code == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_closed_terminal_or_a_scheduler_ends_a_run_as_ctrl_c_does(tmp_path, monkeypatch, name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # also where the tests run under nohup
    send_signal(monkeypatch, 7, number)
    try:
        result = run("train", *tiny(), "--out", tmp_path)
    finally:
        signal.signal(number, before)
    assert result.exit_code == 130
    assert "interrupted; the same command resumes from" in result.stdout
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] == 7


def wait_for_line(process, words):
    """Reads stdout up to a line that has these words."""
    while words not in (line := process.stdout.readline()):
        assert line, process.stderr.read()


def test_ctrl_c_ends_long_chains_at_once_and_loses_no_update(small, tmp_path):
    command = (*small, "--set", "decay=none", "--out", tmp_path)
    assert run(*command, "--set", "updates=4").exit_code == 0
    source = ("--init-from", tmp_path / "ckpt.pt", "--out", tmp_path / "long")
    process = launch(*command, "--set", "steps=100000", *source)  # hours an update
    wait_for_line(process, "updates of")
    time.sleep(1)  # into the chains
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "saving after this update" in err
    assert "the same command resumes" in out
    one, two = (cebm.load_checkpoint(tmp_path / f / "ckpt.pt") for f in (".", "long"))
    for part in ("model", "buffer", "generators", "updates"):
        same(one[part], two[part], part)


def test_a_second_ctrl_c_ends_a_long_update_at_once_and_keeps_the_last_checkpoint(small, tmp_path):
    images = [*small[-2:], "--set", "data.name=folder", "--set", "image=[1, 28, 28]"]
    settings = ["batch=16", "buffer=64", "pictures=0", "data.noise_std=0"]
    settings = [part for setting in settings for part in ("--set", setting)]
    command = ("train", "--preset", "rbm-mnist", *settings, *images, "--out", tmp_path)
    assert run(*command, "--set", "updates=4").exit_code == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    source = ("--init-from", tmp_path / "ckpt.pt", "--out", tmp_path / "long")
    process = launch(*command, "--set", "steps=100000", *source)  # sweeps, which are not cut short
    wait_for_line(process, "updates of")
    process.send_signal(signal.SIGINT)
    assert "saving after this update" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert "ended without saving" in process.stderr.read()
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert cebm.load_checkpoint(tmp_path / "long/ckpt.pt")["updates"] == 4


def test_a_signal_that_was_ignored_stays_so_as_under_nohup(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    send_signal(monkeypatch, 7, signal.SIGHUP)
    try:
        assert run("train", *tiny(), "--out", tmp_path).exit_code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"


def torchrun(*arguments):
    """A command in two processes of one machine's processor: exit status, stdout and stderr."""
    process = launch(*arguments, "--device", "cpu", by=TORCHRUN)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_processes_share_the_batch_and_ctrl_c_ends_them_to_be_resumed_as_two(small, tmp_path):
    never = [f"{key}=1000000" for key in ("updates", "checkpoint_every", "guard.every")]
    settings = tiny(*RESTARTED, *never)
    process = launch(*small, *settings, "--out", tmp_path, "--device", "cpu", by=TORCHRUN)
    wait_for(tmp_path / "log.csv", process)
    process.send_signal(signal.SIGINT)
    assert "interrupted; " in process.communicate(timeout=100)[0]
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert 0 < state["updates"] < 1000000
    assert not torch.equal(*state["generators"])
    assert state["greatest"].max() > 0
    assert_chains_are_the_last_batch(tmp_path, small[-1])
    alone = run(*small, *settings, "--out", tmp_path)
    assert alone.exit_code == 1
    assert "torchrun --nproc-per-node=2" in alone.stderr


@pytest.mark.slow
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
    assert "resuming after update 6" in longer.stdout, longer.stderr
    whole = torchrun(*eight, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    ends = [cebm.load_checkpoint(f / "ckpt.pt") for f in (tmp_path, tmp_path / "whole")]
    for key in ("model", "optimiser", "buffer", "generators"):
        same(ends[0][key], ends[1][key], key)
    odd = cebm.compose("quickstart", ["batch=15"])
    with pytest.raises(click.UsageError, match="batch = 15: not a multiple of 2 processes"):
        cebm.check(odd, processes=2)
    small = cebm.compose("quickstart", ["batch=4", "spread=1.0"])
    with pytest.raises(click.UsageError, match="needs 3 images in each process"):
        cebm.check(small, processes=2)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("cebm-folder-fst", "--preset cebm-folder-fast?"),
        ("rate=1e-3", "--set rate=1e-3?"),
        (str(ROOT), f"--data-dir {ROOT}?"),
    ],
)
def test_a_word_without_its_option_is_refused_with_the_option_that_it_may_need(word, meant):
    result = run("train", word)
    assert result.exit_code == 2
    assert f"unexpected {word}; did you mean {meant}" in result.stderr


@pytest.mark.parametrize(
    ("preset", "settings"),
    [("bigan-mnist-r1", ["batch=1"]), ("cebm-fmnist", ["batch=2", "spread=1.0"])],
)
def test_a_batch_too_small_for_what_is_compared_within_it_is_refused(tmp_path, preset, settings):
    chosen = [part for setting in settings for part in ("--set", setting)]
    result = run("train", "--preset", preset, *chosen, "--out", tmp_path)
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
    assert "chains.bound = -1: it has to be a number from 0" in refused.stderr


def test_samples_from_buffer_noise_and_given_latents(trained, tmp_path):
    checkpoint = trained / "ckpt.pt"
    for name, extra, size in [
        ("buffer", ["--count", 16], (4, 4)),
        ("noise", ["--count", 16, "--from", "noise", "--steps", 5], (4, 4)),
        ("given", ["--given", 6, "--steps", 3], (2, 6)),
    ]:
        paths = [tmp_path / f"{name}{i}.png" for i in range(3)]
        for path, seed in zip(paths, (0, 0, 1), strict=True):
            result = run("sample", checkpoint, "--seed", seed, "--out", path, *extra)
            assert result.exit_code == 0, result.stderr
        one, two, other = (read_sheet(path, *size) for path in paths)
        assert np.array_equal(one, two)
        assert not np.array_equal(one, other)


def test_the_buffer_itself_is_shown_with_no_steps(trained, tmp_path):
    chains = cebm.load_checkpoint(trained / "ckpt.pt")["buffer"][:, 0].clamp(-1, 1)
    stored = chains.add(1).mul(127.5).round().byte().numpy()
    shown = {}
    for source in ("buffer", "noise"):
        options = ("--count", 1, "--steps", 0, "--from", source)
        run("sample", trained / "ckpt.pt", *options, "--out", tmp_path / "a.png")
        shown[source] = read_sheet(tmp_path / "a.png", 1, 1)[2:30, 2:30]
    assert (stored == shown["buffer"]).all((1, 2)).sum() == 1
    # not the noise that the buffer began with
    assert (stored == shown["noise"]).mean((1, 2)).max() < 0.05


@pytest.mark.parametrize(
    ("ending", "first"),
    [(".jpg", b"\xff\xd8\xff"), (".PDF", b"%PDF"), (".svg", b"<?xml"), (".png", b"\x89PNG")],
)
def test_a_picture_is_of_the_kind_that_its_name_says(trained, tmp_path, ending, first):
    path = tmp_path / f"a{ending}"
    assert run("sample", trained / "ckpt.pt", "--count", 4, "--out", path).exit_code == 0
    assert path.read_bytes().startswith(first)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["sample", "--out", "a.gif"], "its name has to end in .png or .jpg or .pdf or .svg"),
        (["knn", "--plot", "a"], "its name has to end in .png"),
        (["export", "--out", "l.txt"], "its name has to end in .npz or .csv"),
        (["export", "--map", "m.npz"], "its name has to end in .png"),
    ],
)
def test_an_ending_that_means_another_kind_of_file_is_refused(
    trained, tmp_path, monkeypatch, command, says
):
    monkeypatch.chdir(tmp_path)
    result = run(command[0], trained / "ckpt.pt", *command[1:])
    assert result.exit_code == 1
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_no_output_replaces_an_input_whatever_its_name(trained, tmp_path):
    model = tmp_path / "model.png"
    model.write_bytes((trained / "ckpt.pt").read_bytes())
    (tmp_path / "link.png").symlink_to(model)
    for place in (model, tmp_path / "link.png"):
        result = run("sample", model, "--out", place)
        assert result.exit_code == 1
        assert "it is what the command reads" in result.stderr
    assert "it is what" in run("knn", model, "--plot", model).stderr
    assert model.read_bytes() == (trained / "ckpt.pt").read_bytes()


def test_a_path_that_stdout_cannot_encode_is_no_failure(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    out = tmp_path / "\u56fe.png"
    process = launch("sample", trained / "ckpt.pt", "--count", 1, "--steps", 0, "--out", out)
    assert "\\u56fe.png" in process.communicate()[0]
    assert (process.returncode, out.exists()) == (0, True)


def test_given_shows_the_originals_first_and_lowers_the_joint_energy(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    for name, value in state["average"].items():  # 24 updates leave nearly flat energies
        value.mul_(2 if name.endswith("weight") else 1)
    torch.save(state, tmp_path / "steep.pt")
    out = tmp_path / "a.png"
    result = run("sample", tmp_path / "steep.pt", "--given", 4, "--steps", 60, "--out", out)
    energies = result.stdout.split("energy ")[1].split(",")[0]
    before, after = map(float, energies.split(" -> "))
    assert after < before - 0.1
    original = data.load("glyphs", "test")[0][0, 0].numpy()
    assert abs(read_sheet(out, 2, 4)[2:30, 2:30].astype(int) - original).max() <= 1


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
    read = []  # what was read before the refusal: nothing
    monkeypatch.setattr(data, "load", lambda *arguments: read.append(arguments))
    result = run("train", "--preset", name, "--out", tmp_path, "--set", "batch=8")
    assert result.exit_code == 1
    assert "has other settings" in result.stderr
    assert read == []
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
        "whitened",
        "untrained",
        "untrained whitened",
        "pixels",
        "confusion",
    }
    counts = torch.tensor(first["confusion"])
    assert counts.sum() == 2000
    assert counts.sum(1).tolist() == [200] * 10
    assert first["latent"] == pytest.approx(counts.diag().sum().item() / 20, abs=0.01)
    assert first["pixels"] > 50
    model, config, _ = cebm.load_model(checkpoint)
    train, test = (data.load("glyphs", split) for split in ("train", "test"))
    for space, network in ("latent", model), ("untrained", cebm.new_model(config, "cpu").eval()):
        a, b = (
            evaluate.in_batches(network.represent, images, "cpu")
            for images in (train[0][::20], test[0])
        )
        right = train[1][::20][evaluate.nearest(a, b)] == test[1]
        assert first[space] == round(100 * right.double().mean().item(), 2)
        right = train[1][::20][evaluate.nearest(*evaluate.whiten(a, b))] == test[1]
        column = {"latent": "whitened", "untrained": "untrained whitened"}[space]
        assert first[column] == round(100 * right.double().mean().item(), 2)
    assert first["latent"] != first["untrained"]
    text = run("knn", checkpoint, "--limit", 500, "--plot", tmp_path / "plot.png").stdout
    assert f"{first['latent']:.2f}" in text
    assert Image.open(tmp_path / "plot.png").size[0] > 400
    table = run("knn", checkpoint, "--limit", 500, "--markdown").stdout.splitlines()
    assert table[0].startswith("| checkpoint | model | data | updates | latent |")
    assert len(table) == 3


def test_export_holds_what_the_model_says_of_each_image(trained, tmp_path):
    out = tmp_path / "latents.npz"
    assert run("export", trained / "ckpt.pt", "--out", out).exit_code == 0
    model = cebm.load_model(trained / "ckpt.pt")[0]
    images, labels = data.load("glyphs", "test")
    with torch.no_grad():
        x = data.normalise(images[:50])
        mean, energy, precision = model.represent(x), model.energy(x), 1 - 2 * model.t(x)[:, 1]
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
        models.Conjugate,
        "represent",  # tells more than the tiny network's
        lambda self, x: 0.1 * torch.nn.functional.avg_pool2d(x, 7).flatten(1),
    )
    load = cebm.load_images
    monkeypatch.setattr(cebm, "load_images", lambda *a: [part[:3000] for part in load(*a)])
    first, second = json.loads(run("probe", checkpoint, checkpoint, "--json").stdout)
    assert first == second
    assert list(first)[:4] == ["checkpoint", "model", "data", "updates"]
    assert list(first)[4:8] == ["1", "1 std", "1 scaled", "1 scaled std"]
    assert first["1"] < first["100"] < first["all"] <= 100
    assert first["1 std"] > 0 == first["all std"]
    found = json.loads(run("ood", checkpoint, "--against", "glyphs", "--json").stdout)
    assert [row["against"] for row in found[::2]] == ["glyphs", "uniform noise", "constant"]
    assert set(found[0]) - set(first) == {"against", "score", "AUROC", "AUPR", "FPR95"}
    assert found[0]["AUROC"] == found[1]["AUROC"] == 50  # against itself: all ties
    monkeypatch.setattr(
        models.Conjugate, "energy", lambda self, x: x.diff(dim=-1).abs().mean((1, 2, 3))
    )  # roughness
    rows = json.loads(run("ood", checkpoint, "--json").stdout)
    assert (rows[0]["AUROC"], rows[2]["AUROC"]) == (100, 0)
    table = run("ood", checkpoint, "--markdown").stdout.splitlines()
    assert table[0].startswith("| checkpoint | model | data | updates | against | score | AUROC |")
    assert len(table) == 6


def test_probe_can_be_free_of_the_scale_of_the_latents(trained, tmp_path):
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    weights = state["average"]
    latent, last = state["config"]["model"]["latent"], "network.heads.0.2."
    for name in ("weight", "bias"):  # t_1 and with it the posterior mean, a power of two smaller
        weights[last + name][:latent] /= 1024
    torch.save(state, tmp_path / "small.pt")
    result = run("probe", trained / "ckpt.pt", tmp_path / "small.pt", "--json")
    first, second = json.loads(result.stdout)
    counts = [key for key in first if key.removesuffix(" scaled") in ("1", "10", "100", "all")]
    assert len(counts) == 8
    for key in counts:
        assert (first[key] == second[key]) == key.endswith(" scaled"), key


def test_weights_that_have_diverged_score_nothing(trained, tmp_path):
    state = cebm.load_checkpoint(trained / "ckpt.pt")
    for value in state["average"].values():
        value.mul_(1e30)  # finite still
    torch.save(state, tmp_path / "ckpt.pt")
    for command in ("knn", "probe", "ood", "export", "sample"):
        out = () if command in ("knn", "probe", "ood") else ("--out", tmp_path / f"{command}.png")
        out = ("--out", tmp_path / "l.npz") if command == "export" else out
        result = run(command, tmp_path / "ckpt.pt", *out)
        assert result.exit_code == 1
        assert "not finite" in result.stderr
        assert "have diverged" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_a_map_of_one_latent_dimension_is_a_line(tmp_path):
    run("train", *tiny("latent=1", "updates=1"), "--out", tmp_path)
    result = run(
        "export", tmp_path / "ckpt.pt", "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"
    )
    assert result.exit_code == 0, result.stderr


def test_whitened_latents_can_be_exported_and_are_those_of_knn(trained, tmp_path):
    for split in ("train", "test"):
        out = tmp_path / f"{split}.npz"
        result = run("export", trained / "ckpt.pt", "--split", split, "--whiten", "--out", out)
        assert result.exit_code == 0, result.stderr
    with np.load(tmp_path / "train.npz") as train, np.load(tmp_path / "test.npz") as test:
        found = evaluate.nearest(*(torch.from_numpy(part["whitened"]) for part in (train, test)))
        right = 100 * (train["labels"][found] == test["labels"]).mean()
    row = json.loads(run("knn", trained / "ckpt.pt", "--json").stdout)[0]
    assert round(right, 2) == row["whitened"]


def test_export_can_draw_a_map(trained, tmp_path):
    result = run(
        "export", trained / "ckpt.pt", "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"
    )
    assert result.exit_code == 0, result.stderr
    assert min(Image.open(tmp_path / "map.png").size) >= 600
    assert "PCA" in result.stdout or "UMAP" in result.stdout


NARROW = ["channels=[4, 4, 4, 4]", "hidden=8", "latent=8", "batch=8", "buffer=16", "steps=2"]
NARROW += [
    "evaluate_every=0",
    "final_steps=0",
    "decay=none",
    "precision=float32",
    "compile=false",
    "pictures=1",
]


def narrow(preset, *extra):
    return ["--preset", preset, *options_for(preset, [*NARROW, *extra])]


@pytest.mark.parametrize("preset", sorted(cebm.read_recipes()["presets"]))
def test_every_preset_trains_and_is_evaluated(preset, tmp_path, monkeypatch):
    tiny_data(monkeypatch)
    command = ("train", *narrow(preset, "updates=1"), "--out", tmp_path)
    result = run(*command)
    assert result.exit_code == 0, result.stderr
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert state["preset"] == preset
    assert all(v.isfinite().all() for v in state["model"].values())
    place = ("--data-dir", tmp_path)  # any: the images are made up
    row = json.loads(run("knn", tmp_path / "ckpt.pt", "--json", *place).stdout)[0]
    assert (row["data"], row["updates"]) == (cebm.compose(preset).data.name, 1)


@pytest.mark.parametrize("name", sorted(models.MODELS))
def test_every_model_resumes_is_sampled_and_exported(name, tmp_path, monkeypatch):
    tiny_data(monkeypatch)
    kind, checkpoint, drawn = models.MODELS[name], tmp_path / "ckpt.pt", tmp_path / "drawn.png"
    for updates in (1, 2):
        command = ("train", *narrow(f"{name}-mnist", f"updates={updates}"))
        result = run(*command, "--out", tmp_path)
        assert result.exit_code == 0, result.stderr
    assert "resuming after update 1" in result.stdout
    loaded, config, state = cebm.load_model(checkpoint)
    assert state["updates"] == 2
    assert not any(module.training for module in loaded.modules())
    fresh = cebm.new_model(config).state_dict()
    learned = [k for k in fresh if k.startswith("prior") and config.model.components > 1]
    assert not any(torch.equal(state["model"][k], fresh[k]) for k in learned)
    able_to = {
        "--refine": kind.latent_energy,
        "--steps": not kind.decoder,
        "--from": not kind.decoder,
        "--given": kind.posterior,
    }
    pictures = {}
    for extra in (["--seed", 0], ["--given", 3], ["--refine", 2], ["--steps", 3], FROM_NOISE):
        result = run("sample", checkpoint, "--out", drawn, *extra)
        able = able_to.get(extra[0], True)
        assert result.exit_code == (0 if able else 2), result.stderr
        assert able or f"{extra[0]} is not for {name}" in result.stderr
        if able:
            pictures[extra[0]] = Image.open(drawn).tobytes()
    assert len(set(pictures.values())) == len(pictures) - (name == "hdge")  # it has no buffer
    if kind.posterior and kind.decoder:  # decoded means, whatever the seed
        run("sample", checkpoint, "--given", 3, "--seed", 1, "--out", drawn)
        assert Image.open(drawn).tobytes() == pictures["--given"]
    assert run("ood", checkpoint).exit_code == (0 if kind.density else 1)
    assert run("export", checkpoint, "--out", tmp_path / "l.npz").exit_code == 0
    with np.load(tmp_path / "l.npz", allow_pickle=False) as arrays:
        assert arrays["mean"].shape == (20, 128 if name == "gan" else 8)
        assert ("energy" in arrays, "std" in arrays) == (kind.density, kind.posterior)
    row = json.loads(run("knn", checkpoint, "--json").stdout)[0]
    assert ("accuracy" in row) == kind.labels
    if kind.labels:
        images, labels = data.load("any", "test")
        right = evaluate.in_batches(loaded.f, images, "cpu").argmax(1) == labels
        assert row["accuracy"] == 100 * right.double().mean().item()


FROM_NOISE = ["--from", "noise"]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("cebm", ["--given", 3, "--count", 50], "--count is not for cebm with --given"),
        ("cebm", ["--given", 3, *FROM_NOISE], "--from is not for cebm with --given"),
        ("cebm", ["--given", 3, "--refine", 2], "--refine is not for cebm with --given"),
        ("vae", ["--given", 3, "--steps", 2], "--steps is not for vae with --given"),
        ("rbm", ["--given", 3, "--steps", 2], "--steps is not for rbm with --given"),  # one sweep
        ("gan", ["--given", 3, "--refine", 2], "--given is not for gan"),
    ],
)
def test_an_option_of_sample_that_would_be_passed_over_is_refused(
    name, options, says, tmp_path, monkeypatch
):
    tiny_data(monkeypatch)
    command = ("train", *narrow(f"{name}-mnist", "updates=1"), "--out", tmp_path)
    assert run(*command).exit_code == 0
    result = run("sample", tmp_path / "ckpt.pt", *options, "--out", tmp_path / "a.png")
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_show_lists_presets_and_prints_one_and_describes_a_checkpoint(trained):
    book = cebm.read_recipes()
    lines = [line for line in run("show").stdout.splitlines()[1:] if line.startswith("  ")]
    assert {line.split()[0] for line in lines} == set(book["presets"])
    assert max(map(len, run("show").stdout.splitlines())) <= 120
    groups = run("show").stdout.split("\n\n")
    assert [group.split(":")[0] for group in groups[1:-1]] == list(book["models"])
    for name in book["presets"]:
        text = run("show", name).stdout
        assert cebm.parse_config(yaml.safe_load(text)) == cebm.compose(name)
    for key in cebm.all_keys().values():
        assert f"# {key.meaning}" in text
    facts = yaml.safe_load(run("show", trained / "ckpt.pt").stdout)
    assert (facts["preset"], facts["updates"], facts["seed"]) == ("quickstart", 24, 0)
    assert facts["torch"] == str(torch.__version__)
    weights = cebm.load_model(trained / "ckpt.pt")[0].state_dict().values()
    assert facts["numbers in the model"] == sum(value.numel() for value in weights)


def test_show_compares_two_presets_or_checkpoints(trained):
    lines = run("show", "cebm-fmnist", "cebm-fmnist-literal").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "data.noise_std",
        "chains.step_size",
        "chains.noise_std",
    ]
    assert lines[2].split()[1:3] == ["1.0", "0.0375"]
    assert "what a step multiplies the gradient by" in lines[2]
    text = run("show", "quickstart", trained / "ckpt.pt").stdout
    assert "train.updates" in text
    assert run("show", "quickstart", "quickstart").stdout == "no difference\n"
    assert run("show", "quickstart", "no").exit_code == 2
    assert run("show", "quickstart", "vae-mnist", "igebm-mnist").exit_code == 2


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
        (["--set", "rate=" + 5000 * "9"], "is not a YAML value"),
        (["--set", "rate=0x" + 5000 * "f"], "train.rate = a number of thousands of digits: it"),
        (["--set", "rate=" + ":".join(3000 * ["59"])], "train.rate = a number of thousands"),
        (["--device", "privateuseone"], "--device privateuseone; there are: auto, cpu, cuda"),
        (["--device", "hpu"], "--device hpu; "),
        (["--device", "meta"], "--device meta; there are"),
        (["--set", "steps=0"], "chains.steps = 0: it has to be a whole number from 1"),
        (["--set", "steps=2.5"], "chains.steps = 2.5"),
        (["--set", "head=both"], "one of shared, separate"),
        (["--set", "channels=[1, 2]"], "a list of 4 numbers, each from 1 to 4,096"),
        (
            ["--preset", "vae-mnist", "--set", "image=[1, 30, 30]"],
            "vae is for images of 28 x 28 or",
        ),
        (["--preset", "vae-mnist", "--set", "likelihood=gauss"], "one of bernoulli, continuous_b"),
        (["--set", "channels={a: [}"], "is not a YAML value"),
        (["--set", "compile=!!bool maybe"], "is not a YAML value"),
        (["--set", "buffer=7"], "must not exceed chains.buffer"),
        (["--set", "image=[1, 4, 4]"], "at least 8 x 8"),
        (["--device", "abacus"], "--device abacus; "),
        (["--device", "gpu"], "did you mean cuda?"),
        (["--device", "cuda"], "--device cuda cannot be used here"),
        (["--set", "lr=1e-3"], "here that is train.rate"),
        (["--set", "train.batch_size=4"], "here that is train.batch"),
        (["--set", "epochs=4"], "here that is train.updates (an epoch is"),
        (["--set", "optimizer=sgd"], "it is always Adam"),
        (["--set", "rat=1e-3"], "did you mean train.rate?"),
        (["--set", "zzzz=1"], "explains each key"),
        (["--preset", "zzzz"], "`python cebm.py show` lists them"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_wrong_usage_is_refused_before_any_work(tmp_path, arguments, says):
    result = run("train", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("out", ["/dev/null", "file/a.png", "x" * 300 + ".png"])
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
    for place in (tmp_path / "file" / "a.png", tmp_path / "file.pt", ""):
        result = run(command, tmp_path / "file", option, place)
        assert result.exit_code == 1
        assert f"cannot write {place or '.'}" in result.stderr
    result = run("train", "--out", tmp_path / "file" / "run", *tiny())
    assert "choose another --out" in result.stderr
    place = tmp_path / ("a.npz" if (command, option) == ("export", "--out") else "a.png")
    place.write_text("old")  # where it can be, it waits for what is written
    assert "or not a whole one" in run(command, tmp_path / "file", option, place).stderr
    deep = run(command, tmp_path / "file", option, tmp_path / "new" / "deep" / place.name)
    assert "or not a whole one" in deep.stderr  # and no folder is left
    assert [(p.name, p.read_text()) for p in sorted(tmp_path.iterdir())] == [
        (place.name, "old"),
        ("file", "no checkpoint"),
        ("file.pt", "a checkpoint"),
    ]


def test_wrong_files_and_folders_are_named(trained, tmp_path):
    assert run("knn", tmp_path / "none.pt").exit_code == 2
    assert run("show", "cebm-mnits").exit_code == 2
    folder = ["--preset", "cebm-folder", "--data-dir", tmp_path]
    empty = run("train", *folder, "--out", tmp_path / "run")
    assert empty.exit_code == 1
    assert f"{tmp_path} has no images" in empty.stderr
    assert "Images belong in DIR/train/CLASS/" in empty.stderr
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
    wrong = run("train", *arguments, *tiny("classes=3"))
    assert wrong.exit_code == 1
    assert "has 2 classes, not 3" in wrong.stderr
    rgba = run("train", *arguments, *tiny("image=[4, 16, 16]"))
    assert rgba.exit_code == 1
    assert "1 channel (grey) or 3 (colours), not 4" in rgba.stderr
    chosen = tiny("image=[3, 16, 16]", "updates=2")
    result = run("train", *arguments, *chosen)
    assert result.exit_code == 0, result.stderr
    result = run("knn", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json")
    assert len(json.loads(result.stdout)[0]["confusion"]) == 2
    few = run(
        "knn", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json", "--limit", 4
    )
    assert json.loads(few.stdout)[0]["pixels"] == 100  # two of each class, though files are sorted
    shown = tmp_path / "given.png"
    place = ("--data-dir", tmp_path / "images", "--out", shown)
    run("sample", tmp_path / "run/ckpt.pt", "--given", 2, "--steps", 1, *place)
    sheet = read_sheet(shown, 2, 2, side=16)  # one of each class, likewise
    assert sheet[2:18, 2:18].max() < 128 <= sheet[2:18, 20:36].min()
    row = json.loads(
        run("probe", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json").stdout
    )[0]
    assert [key for key in row if key.isdigit()] == ["1", "10"]  # there are ten a class
    (tmp_path / "images/train/dark/3.png").write_bytes(b"no picture")
    assert "dark/3.png (no image)" in run("train", *arguments, *chosen).stderr


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Colour images in a folder a class, without a split, and a run on them."""
    root = tmp_path_factory.mktemp("album")
    generator = np.random.default_rng(0)
    for k, name in enumerate(("dark", "light")):
        (root / "images" / name).mkdir(parents=True)
        for i in range(20):
            pixels = generator.integers(128 * k, 128 * k + 127, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    settings = tiny("image=[3, 16, 16]", "updates=4", "evaluate_every=2", "warmup=0")
    command = ["train", "--preset", "cebm-folder", *settings]
    result = run(*command, "--data-dir", root / "images", "--out", root / "run")
    assert result.exit_code == 0, result.stderr
    return root, result


def test_before_training_a_folder_and_what_will_be_made_of_it_are_told(album):
    root, result = album
    assert "images of 30 x 20 (32) (width x height) are scaled to 16 x 16, str" in result.stderr
    assert "laid out as DIR/CLASS: 32 image files to train on, 8 to test" in result.stdout
    assert "2 classes: dark (16), light (16)" in result.stdout
    told = float(result.stdout.split("checkpoint ")[1].split(" MB")[0])
    size = (root / "run/ckpt.pt").stat().st_size / 1e6
    assert told == pytest.approx(size, rel=0.25, abs=0.1)


def test_a_checkpoint_remembers_where_its_folder_and_split_are(album, tmp_path):
    root, _ = album
    state = cebm.load_checkpoint(root / "run/ckpt.pt")
    assert state["data_dir"] == str(root / "images")
    assert state["config"]["data"]["classes"] == 2
    row = json.loads(run("knn", root / "run/ckpt.pt", "--json").stdout)[0]
    assert row["pixels"] == 100
    assert np.sum(row["confusion"]) == 8
    out = tmp_path / "latents.npz"
    assert run("export", root / "run/ckpt.pt", "--out", out).exit_code == 0
    with np.load(out) as arrays:
        assert arrays["classes"].tolist() == ["dark", "light"]
        names = [Path(path).parent.name for path in arrays["path"]]
        assert names == ["dark"] * 4 + ["light"] * 4
        assert arrays["labels"].tolist() == [0] * 4 + [1] * 4


def test_a_folder_that_moved_or_has_other_classes_is_not_taken_for_the_models(album, tmp_path):
    root, _ = album
    shutil.copytree(root, tmp_path / "copy")
    moved = tmp_path / "copy/run/ckpt.pt"
    state = torch.load(moved, weights_only=True)
    torch.save(state | {"data_dir": str(tmp_path / "gone")}, moved)
    out = ("--out", tmp_path / "l.npz")
    refused = run("export", moved, *out)
    assert refused.exit_code == 1
    assert f"were in {tmp_path}/gone, which is no folder any more" in refused.stderr
    assert run("export", moved, *out, "--data-dir", root / "images").exit_code == 0
    (tmp_path / "copy/images/light").rename(tmp_path / "copy/images/bright")
    renamed = run("export", moved, *out, "--data-dir", tmp_path / "copy/images")
    assert renamed.exit_code == 1
    assert "has the classes bright, dark; when the model was trained" in renamed.stderr


def test_a_run_folder_stands_for_its_checkpoint_and_pictures_stay_out_of_the_images(
    album, tmp_path
):
    root, _ = album
    assert run("show", root / "run").stdout == run("show", root / "run/ckpt.pt").stdout
    row, same = (
        json.loads(run("knn", root / p, "--json").stdout)[0] for p in ("run", "run/ckpt.pt")
    )
    assert row["latent"] == same["latent"]
    images = root / "images"
    commands = [
        ("export", "--images", images, "--out", tmp_path / "l.npz", "--map", images / "map.png"),
        ("sample", "--given", images, "--out", images / "dark/s.png"),
    ]
    for name, *options in commands:
        result = run(name, root / "run", *options)
        assert result.exit_code == 1
        assert "among the images" in result.stderr
    assert not list(images.rglob("s.png")) + list(images.rglob("map.png"))


def test_a_device_that_is_none_is_named_where_a_model_is_loaded(trained):
    for name in ("gpu", "cuda:99"):
        with pytest.raises(cebm.Failure, match=f"device {name} cannot be used here"):
            cebm.load_model(trained / "ckpt.pt", name)


def test_a_folders_run_is_resumed_with_no_other_data_set(album):
    root, _ = album
    before = (root / "run/ckpt.pt").read_bytes()
    result = run("train", *tiny(), "--out", root / "run")  # on the embedded digits
    assert result.exit_code == 1
    assert "data.name (folder, now glyphs)" in result.stderr
    assert (root / "run/ckpt.pt").read_bytes() == before


def test_a_folders_run_is_not_resumed_on_another_folder_whose_classes_are_named(album, tmp_path):
    root, _ = album
    for i in range(5):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")  # without classes
    settings = tiny("image=[3, 16, 16]", "updates=4", "evaluate_every=2", "warmup=0")
    command = ["train", "--preset", "cebm-folder", *settings, "--data-dir", tmp_path]
    result = run(*command, "--out", root / "run")
    assert result.exit_code == 1
    assert "images with the classes dark, light; now they are none: use an" in result.stderr


def test_new_images_are_encoded_scored_and_reconstructed(album, tmp_path):
    root, _ = album
    checkpoint, dark = root / "run/ckpt.pt", root / "images/dark"
    for name in ("new.npz", "new.csv"):
        command = ("export", checkpoint, "--images", dark, "--images", root / "images/light/3.png")
        result = run(*command, "--out", tmp_path / name, "--map", tmp_path / "map.png")
        assert result.exit_code == 0, result.stderr
    with np.load(tmp_path / "new.npz") as arrays:
        mean, paths = arrays["mean"], arrays["path"].tolist()
        assert set(arrays) == {"mean", "std", "energy", "path"}
    assert len(paths) == 21
    assert paths[-1] == str(root / "images/light/3.png")
    model, config, _ = cebm.load_model(checkpoint)
    images, _ = data.read_images([Path(path) for path in paths], config.data.image)
    np.testing.assert_allclose(mean, evaluate.latents(model, images)["mean"])
    lines = (tmp_path / "new.csv").read_text().splitlines()
    assert lines[0].startswith("energy,path,mean_0,mean_1")
    assert len(lines) == 22
    assert float(lines[3].split(",")[2]) == pytest.approx(mean[2, 0], rel=1e-4)
    row = json.loads(run("ood", checkpoint, "--against", dark, "--json").stdout)[0]
    assert row["against"] == str(dark)
    assert 0 <= row["AUROC"] <= 100
    shown = tmp_path / "given.png"
    result = run("sample", checkpoint, "--given", dark, "--steps", 1, "--out", shown)
    assert result.exit_code == 0, result.stderr
    assert "20 chains" in result.stdout
    wrong = run("export", checkpoint, "--images", dark, "--split", "train")
    assert wrong.exit_code == 2


def test_unlabelled_images_train_and_are_exported_but_not_classified(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("L", (8, 8), 12 * i).save(tmp_path / f"images/{i}.png")
    settings = tiny("image=[1, 8, 8]", "updates=2", "batch=4", "evaluate_every=1")
    command = ("train", "--preset", "cebm-folder", *settings, "--data-dir", tmp_path / "images")
    among = run(*command, "--out", tmp_path / "images/run")
    assert among.exit_code == 1
    assert "among the images" in among.stderr
    result = run(*command, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.stderr
    assert "no 1-NN during training: the images have no classes" in result.stdout
    checkpoint, out = tmp_path / "run/ckpt.pt", tmp_path / "l.npz"
    for name in ("knn", "probe"):
        refused = run(name, checkpoint)
        assert refused.exit_code == 1
        assert "needs labels" in refused.stderr
    assert run("export", checkpoint, "--out", out).exit_code == 0
    with np.load(out) as arrays:
        assert set(arrays) == {"mean", "std", "energy", "path"}
    assert run("ood", checkpoint).exit_code == 0
    assert run("sample", checkpoint, "--given", 2, "--out", tmp_path / "a.png").exit_code == 0


def test_images_that_cannot_be_read_are_skipped_on_demand_and_then_by_every_command(tmp_path):
    for i in range(10):
        (tmp_path / "images" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"images/{i % 2}/{i}.png")
    (tmp_path / "images/0/bad.png").write_text("no picture")
    (tmp_path / "images/1/worse.jpg").write_text("")
    settings = tiny("image=[1, 8, 8]", "updates=2", "batch=2")
    command = ["train", "--preset", "cebm-folder", *settings, "--data-dir", tmp_path / "images"]
    command += ["--out", tmp_path / "run"]
    refused = run(*command)
    assert refused.exit_code == 1
    assert "go on with --skip-unreadable" in refused.stderr
    result = run(*command, "--skip-unreadable")
    assert result.exit_code == 0, result.stderr
    assert run("knn", tmp_path / "run/ckpt.pt").exit_code == 0  # as the checkpoint says
    new = ("export", tmp_path / "run/ckpt.pt", "--images", tmp_path / "images")
    assert run(*new, "--out", tmp_path / "a.npz").exit_code == 1
    assert run(*new, "--out", tmp_path / "a.npz", "--skip-unreadable").exit_code == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["path"]) == 10


def test_1_nn_during_training_is_logged_and_leaves_the_run_as_it_is(tmp_path):
    for every in (0, 6):
        command = ("train", *tiny("updates=12", f"evaluate_every={every}"))
        result = run(*command, "--out", tmp_path / str(every))
        assert result.exit_code == 0, result.stderr
    plain, scored = (cebm.load_checkpoint(tmp_path / f / "ckpt.pt") for f in ("0", "6"))
    for part in ("model", "average", "optimiser", "buffer", "generators"):
        same(plain[part], scored[part], part)
    logged = {row["update"]: row for row in rows(tmp_path / "6")}
    assert [update for update, row in logged.items() if row["knn"]] == ["6", "12"]
    row = json.loads(run("knn", tmp_path / "6/ckpt.pt", "--json").stdout)[0]
    names = dict(zip(cebm.SCORES, ("latent", "whitened", "untrained", "pixels"), strict=True))
    for column, name in names.items():
        assert float(logged["12"][column]) == row[name]
    assert "1-NN" in result.stdout
    assert "knn" not in rows(tmp_path / "0")[0]


def test_curves_of_several_runs_are_drawn_over_each_other(trained, tmp_path):
    out = tmp_path / "curves.svg"
    result = run("curves", trained, trained / "ckpt.pt", "--out", out)
    assert result.exit_code == 0, result.stderr
    columns = cebm.find_curves(trained)
    assert columns == cebm.find_curves(trained / "ckpt.pt")
    assert columns["update"] == list(range(3, 25, 3))
    config = cebm.parse_config(cebm.load_checkpoint(trained / "ckpt.pt")["config"])
    assert columns["rate"][0] == cebm.learning_rate(3, config.train)
    older = tmp_path / "older"
    older.mkdir()
    tree = yaml.safe_load((trained / "config.yaml").read_text())
    del tree["data"]["split_seed"], tree["model"]["t1_scale"]  # as before there were these keys
    (older / "config.yaml").write_text(yaml.safe_dump(tree))
    log = (trained / "log.csv").read_text()
    (older / "log.csv").write_text(log + "27,3")  # torn
    assert cebm.find_curves(older) == columns
    (older / "log.csv").write_text(log.replace("\n24,", "\ninf,"))
    damaged = run("curves", older, "--out", out)
    assert damaged.exit_code == 1
    assert "is damaged" in damaged.stderr
    (older / "log.csv").unlink()
    assert "has logged nothing yet" in run("curves", older, "--out", out).stderr
    for wrong, says in (
        (tmp_path, "is no run folder"),
        (ROOT / "checkpoints/cebm-mnist.pt", "has logged nothing"),
    ):
        refused = run("curves", wrong, "--out", out)
        assert refused.exit_code == 1
        assert says in refused.stderr


def test_a_trace_shows_chains_at_moments_of_their_way_a_row_a_chain(trained, tmp_path):
    out = tmp_path / "trace.png"
    command = ("sample", trained / "ckpt.pt", "--trace", 3, "--count", 2, "--steps", 4)
    result = run(*command, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert "2 chains from noise after 0, 2, 4 steps" in result.stdout
    sheet = read_sheet(out, 2, 3)
    straight = tmp_path / "straight.png"
    command = ("sample", trained / "ckpt.pt", "--from", "noise", "--count", 2, "--steps", 4)
    assert run(*command, "--out", straight).exit_code == 0
    ends = read_sheet(straight, 2, 1)
    np.testing.assert_array_equal(sheet[:, 60:], ends[:, :])  # the same chains, moved at once
    for options in (("--given", 2), ("--from", "noise")):
        refused = run("sample", trained / "ckpt.pt", "--trace", 3, *options)
        assert refused.exit_code == 2


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_line_on_a_run_fits_its_width_and_begins_with_what_matters(width):
    parts = ["123456/150000", "1:02:03 left", "gap -0.21", "1-NN 91.3", "12 rollbacks", 40 * "x"]
    line = "  ".join(cebm.fitting(parts, width))
    assert len(line) <= width
    assert line.startswith("123456/150000  1:02:03 left  gap -0.21")


def test_times_are_put_into_words():
    words = {45: "0:45", 725: "12:05", 18_243: "5:04:03", 300_000: "3.5 days"}
    assert {seconds: cebm.in_words(seconds) for seconds in words} == words
    about = {20: "1 min", 600: "10 min", 7200: "2 h", 216_000: "2.5 days"}
    assert {seconds: cebm.roughly(seconds) for seconds in about} == about


def test_on_a_terminal_training_shows_a_bar_and_in_a_pipe_lines(small, tmp_path):
    import pty

    process_end, terminal = pty.openpty()
    command = [sys.executable, ROOT / "cebm.py", *map(str, small), "--out", tmp_path / "run"]
    environment = {**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=terminal, stderr=subprocess.PIPE, env=environment, text=True
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(process_end, 4096):
            shown += part
    assert process.wait(timeout=60) == 0, process.stderr.read()
    screens = re.sub(r"\x1b\[[?0-9]*[a-zA-Z]", "", shown.decode()).replace("\n", "\r").split("\r")
    bars = [screen for screen in screens if screen.startswith(("#", "-"))]
    assert "24/24" in bars[-1]
    assert max(map(len, bars)) < 80
    assert "done: " in shown.decode()


ELSEWHERE = """
import os, signal, sys
sys.modules["fcntl"] = None  # as on Windows: no such module, nor what follows
for module, name in ((os, "sysconf"), (signal, "SIGHUP"), (os, "getuid"), (os, "fork")):
    if hasattr(module, name):
        delattr(module, name)
import cebm
cebm.main(sys.argv[1:])
"""


def test_without_what_other_systems_lack_a_run_trains_resumes_and_is_evaluated(small, tmp_path):
    def elsewhere(*arguments):
        command = [sys.executable, "-c", ELSEWHERE, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    for updates in (4, 8):
        command = (*small, "--set", "decay=none", "--set", f"updates={updates}")
        result = elsewhere(*command, "--out", tmp_path / "run")
        assert result.returncode == 0, result.stderr
    assert "resuming after update 4" in result.stdout
    done = ("--split", "train", "--out", tmp_path / "l.csv")
    assert elsewhere("export", tmp_path / "run/ckpt.pt", *done).returncode == 0


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"{command} --help" for command in ("train", "sample", "knn", "probe", "ood", "export")),
        "--help", "curves --help", "show --help", "show", "show quickstart",
        "show cebm-fmnist checkpoints/cebm-fmnist.pt", "show checkpoints/cebm-fmnist.pt",
        "train --preset cebm-fminst", "train --set lr=1e-3", "train --set rate=fast",
    ],
)  # fmt: skip
def test_what_needs_no_torch_does_not_wait_for_it(arguments):
    code = (
        "import runpy, sys\ntry: runpy.run_path('cebm.py', run_name='__main__')\n"
        "except SystemExit: pass\nprint('torch._C' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "False"
    if arguments.endswith("--help") and arguments != "--help":
        assert "Example: python cebm.py " + arguments.split()[0] in result.stdout
