"""The README's commands and code blocks run as printed, but for their length and their data."""

import re
import shlex

import numpy as np
import pytest
from helpers import ROOT, run, tiny_data

import cebm

README = (ROOT / "README.md").read_text()
MANUAL = README[: README.index("## Results so far")]  # after it come results, not instructions
SHORT = ["batch=8", "buffer=16", "steps=2", "channels=[4, 4, 4, 4]", "hidden=8", "latent=4"]
SHORT += ["updates=1", "final_steps=0", "precision=float32", "decay=none", "compile=false"]


def commands():
    """What the manual says to type, of `cebm.py`: inline and as lines of their own."""
    inline = re.findall(r"`(python cebm\.py [^`]+)`", MANUAL)
    lines = re.findall(r"^    (?:.*&& )?(\S*(?:python|torchrun)\S* .*cebm\.py .+)$", MANUAL, re.M)
    return list(dict.fromkeys(" ".join(command.split()) for command in inline + lines))


def blocks():
    return re.findall(r"```python\n(.*?)```", MANUAL, re.S)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Where a reader types: a clone with small data sets, a run and a folder of images."""
    tiny_data(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for name in map(str, range(5)):
        (tmp_path / "DIR" / "train" / name).mkdir(parents=True)
    result = run("train", "--preset", "cebm-fmnist", *short())
    assert result.exit_code == 0, result.stderr


def short():
    return [part for setting in SHORT for part in ("--set", setting)]


def test_the_manual_has_every_command():
    named = {command.split("cebm.py ")[1].split()[0] for command in commands()}
    assert named == {"train", "sample", "knn", "probe", "ood", "export", "show"}


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command, reader):
    arguments = shlex.split(command.split("cebm.py ")[1].replace("[PRESET or CKPT]", ""))
    names = {"CKPT": "runs/cebm-fmnist/ckpt.pt", "CKPT...": "runs/cebm-fmnist/ckpt.pt"}
    arguments = [names.get(argument, argument) for argument in arguments]
    if arguments == ["show", "NAME"]:
        arguments[1] = "quickstart"
    if arguments[0] == "train":
        arguments += short()
        if "--set" in arguments and "--init-from" in arguments:
            arguments += ["--set", "updates=2"]
    if "cebm-folder" in arguments:
        arguments += ["--set", "classes=10"]  # as many as the small data have
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("block", blocks())
def test_a_code_block_of_the_readme_runs(block, reader):
    if "train.npz" in block:
        for split in ("train", "test"):
            options = ("--split", split, "--out", f"{split}.npz")
            assert run("export", "runs/cebm-fmnist/ckpt.pt", *options).exit_code == 0
    scope = {}
    exec(compile(block, "README.md", "exec"), scope)
    if "z" in scope:
        assert scope["z"].shape == (20, 128)
        assert np.isfinite(scope["energies"].numpy()).all()


def test_the_readmes_two_lines_name_files_that_are_there_and_ci_runs_the_second():
    lines = re.findall(r"^    (python3 -m venv .*)$", MANUAL, re.M)
    assert len(lines) == 2
    for line in lines:
        assert (ROOT / re.search(r"-r (\S+)", line)[1]).exists()
        assert line.startswith("python3 -m venv .venv && ")
    assert lines[0].endswith("python cebm.py train")
    ci = (ROOT / ".ci/run").read_text()
    tested = lines[1].split("bin/python ")[1]
    assert f'"$venv/bin/python" {tested}' in ci


def test_every_setting_that_the_manual_shows_is_a_right_value_of_a_known_key():
    settings = re.findall(r'--set\s+(?:"([^"]+)"|([^\s`]+))', MANUAL)
    assert len(settings) > 20
    for setting in {"".join(pair) for pair in settings} - {"train.seed=N"}:
        key, value = cebm.parse_setting(setting)
        cebm.parse_value(key, value)
