"""README.md and docs/: commands and code run as printed, but for their length and their data; links
lead somewhere; tables and measured rows agree."""

import csv
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, options_for, run, tiny_data
from PIL import Image

import cebm
import data

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = ["batch=8", "buffer=16", "steps=2", "channels=[4, 4, 4, 4]", "hidden=8", "latent=4"]
SHORT += [
    "evaluate_every=0",
    "updates=1",
    "final_steps=0",
    "precision=float32",
    "decay=none",
    "compile=false",
]


def commands():
    """What the README says to type, of `cebm.py`: inline and as lines of their own."""
    inline = re.findall(r"`(python cebm\.py [^`]+)`", README)
    lines = re.findall(r"^    (?:.*&& )?(\S*(?:python|torchrun)\S* .*cebm\.py .+)$", README, re.M)
    return list(dict.fromkeys(" ".join(command.split()) for command in inline + lines))


def blocks():
    return re.findall(r"```python\n(.*?)```", README, re.S)


def short(preset):
    return options_for(preset, [*SHORT, "bound=0"])


def small_data(monkeypatch):
    """Random images in place of every data set but a folder's own."""
    real = data.load
    with pytest.MonkeyPatch.context() as patch:
        tiny_data(patch)
        tiny = data.load
    monkeypatch.setattr(
        data, "load", lambda name, *rest: (real if name == "folder" else tiny)(name, *rest)
    )


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Where a reader types: checkpoints, small data sets, runs, folders of images."""
    root = tmp_path_factory.mktemp("clone")
    (root / "checkpoints").symlink_to(ROOT / "checkpoints")
    for name in ("DIR/cat", "DIR/dog", "NEW"):
        (root / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (9, 9), (i, 200, 9 * i)).save(root / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        small_data(patch)
        for preset in ("cebm-folder-fast", "cebm-fmnist", "cebm-fmnist-fast"):
            result = run("train", "--preset", preset, *short(preset), "--data-dir", "DIR")
            assert result.exit_code == 0, result.stderr
    return root


@pytest.fixture
def reader(clone, tmp_path, monkeypatch):
    """A copy of the clone, in which commands are typed."""
    shutil.copytree(clone, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    small_data(monkeypatch)


def test_the_manual_has_every_command():
    named = {command.split("cebm.py ")[1].split()[0] for command in commands()}
    assert named == set(cebm.main.commands)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_readme_runs(command, reader):
    arguments = shlex.split(command.split("cebm.py ")[1])
    run_of = "runs/cebm-fmnist"
    names = {"CKPT": [f"{run_of}/ckpt.pt"], "CKPT...": [f"{run_of}/ckpt.pt"], "RUN...": [run_of]}
    arguments = [part for argument in arguments for part in names.get(argument, [argument])]
    if arguments[0] == "train":
        preset = arguments[arguments.index("--preset") + 1] if "--preset" in arguments else ""
        arguments += short(preset or "quickstart")
        if "--init-from" in arguments:
            arguments += ["--set", "updates=2"]
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize("block", blocks())
def test_the_imports_of_a_code_block_work_in_a_process_of_their_own(block):
    lines = [line for line in block.splitlines() if line.startswith(("import ", "from "))]
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", blocks())
def test_a_code_block_of_the_readme_runs(block, reader):
    scope = {}
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), scope)
    if "found" in scope:
        found = scope["found"]
        assert {name: array.shape for name, array in found.items()} == {
            "mean": (20, 128),
            "std": (20, 128),
            "energy": (20,),
        }
        assert found["energy"][scope["odd"]].min() >= np.median(found["energy"])
    else:
        assert scope["loss"].isfinite()


def test_the_readmes_two_lines_name_files_that_are_there_and_ci_runs_the_second():
    lines = re.findall(r"^    (python3 -m venv .* -r .*)$", README, re.M)
    assert len(lines) == 2
    for line in lines:
        assert (ROOT / re.search(r"-r (\S+)", line)[1]).exists()
        assert line.startswith("python3 -m venv .venv && ")
    assert lines[0].endswith("python cebm.py train")
    ci = (ROOT / ".ci/run").read_text()
    tested = lines[1].split("bin/python ")[1]
    assert f'"$venv/bin/python" {tested}' in ci


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_and_preset_that_a_page_shows_is_right(page):
    text = page.read_text()
    settings = re.findall(r'--set\s+(?:"([^"]+)"|([^\s`|]+))', text)
    for setting in {"".join(pair) for pair in settings} - {"SECTION.KEY=VALUE"}:
        key, value = cebm.parse_setting(setting)
        cebm.parse_value(key, value)
    known = cebm.read_recipes()["presets"]
    for preset in re.findall(r"--preset ([\w-]+)", text):
        assert preset in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_of_a_page_leads_to_a_file(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250
    assert len(README.encode()) <= 16_384


def experiments():
    with open(ROOT / "docs/experiments.csv", newline="") as file:
        return list(csv.DictReader(file))


PERCENT = ["knn", "knn_whitened", "knn_untrained", "knn_untrained_whitened", "knn_pixels"]
PERCENT += ["probe_1", "probe_10", "probe_100", "probe_all"]


def test_every_row_of_the_experiments_has_a_known_preset_known_keys_and_numbers():
    presets = cebm.read_recipes()["presets"]
    rows = experiments()
    assert len(rows) > 100
    for row in rows:
        assert row["study"], row
        assert None not in row, row  # more cells than columns
        assert row["preset"] in presets, row
        for setting in re.findall(r'--set (?:"([^"]+)"|(\S+))', row["settings"]):
            key, value = cebm.parse_setting("".join(setting))
            cebm.parse_value(key, value)
        for column in ("seed", "updates", "rollbacks", "seconds"):
            assert row[column] == "" or int(row[column]) >= 0, row
        for column in PERCENT:
            assert row[column] == "" or 0 <= float(row[column]) <= 100, row
        assert row["gap"] == "" or np.isfinite(float(row["gap"]))
        for column in ("auroc", "aupr", "fpr95"):
            for score in filter(None, row[column].split(";")):
                assert 0 <= float(score.rpartition(":")[2]) <= 100, row


def test_the_tables_of_the_pages_are_those_of_the_experiments():
    command = [sys.executable, ROOT / "docs/tables.py", "--check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
