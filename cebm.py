"""Train, sample and evaluate conjugate energy-based models: `python cebm.py --help`.

Four sections in reading order: configuration, checkpoints, training, commands. Models are in
models.py, chains in sampling.py, images in data.py, 1-NN and pictures in evaluate.py, and every
number of every recipe in configs.yaml. An *update* is a step of the optimiser, a *step* one of a
chain.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules load: an end without a traceback

import atexit
import copy
import csv
import difflib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import secrets
import shlex
import shutil
import sys
import time
import zipfile
from collections import OrderedDict
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Literal,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

try:
    import click
    import yaml
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"Error: {error.name} is not installed: activate the environment of README.md's Start")

from click import ClickException as Failure  # one message on stderr, exit status 1; UsageError: 2
from click.core import ParameterSource


def lazy_import(name: str):
    """The module `name`, executed when it is first used, so that `--help` answers at once.

    Only in the program: torch looks into all loaded modules while it is imported itself, and would
    execute ours half-way where somebody imports both.
    """
    if __name__ != "__main__":
        return importlib.import_module(name)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise SystemExit(
            f"{name} is not installed: activate the environment (. .venv/bin/activate)"
        )
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    import torch
    from torch import Tensor

    import data
    import evaluate
    import models
    import sampling
else:
    torch, data, evaluate, models, sampling = map(
        lazy_import, ("torch", "data", "evaluate", "models", "sampling")
    )

# -------------------------------------------------------------------------------- Configuration
#
# A section of a configuration is a dataclass; a key's type, bounds and meaning stand beside it. The
# numbers themselves are in configs.yaml.

CONFIGS = Path(__file__).parent / "configs.yaml"


@dataclass(frozen=True)
class Between:
    """Inclusive bounds of a number, or of each number of a tuple."""

    low: float
    high: float


@dataclass(frozen=True)
class DataConfig:
    """The images that a model is trained on. Pixels are scaled to [-1, 1]."""

    name: Annotated[str, "a data set, a key of `data` in configs.yaml"]
    image: Annotated[tuple[int, int, int], Between(1, 512), "channels, height and width in pixels"]
    classes: Annotated[int, Between(0, 10_000), "how many there are; 0: those of the folder"]
    noise_std: Annotated[float, Between(0, 10), "standard deviation of noise on training images"]
    extra: Annotated[bool, "SVHN: train on its extra images too"]
    split_seed: Annotated[int, Between(0, 2**31 - 1), "folder without test/: which fifth is that"]
    skip_unreadable: Annotated[bool, "folder: go on without images that cannot be read"]


@dataclass(frozen=True)
class ModelConfig:
    """The model: widths, prior and loss."""

    name: Annotated[str, "a model, a key of `models` in configs.yaml"]
    channels: Annotated[tuple[int, int, int, int], Between(1, 4096), "of the four convolutions"]
    hidden: Annotated[int, Between(1, 65_536), "units of the hidden layer after them"]
    latent: Annotated[int, Between(1, 65_536), "dimensions of z; of IGEBM, the last hidden layer"]
    head: Annotated[Literal["shared", "separate"], "CEBM: hidden layer of t1 and t2, or one each"]
    t2: Annotated[Literal["square", "softplus"], "CEBM: t2 of the output h, -h^2 or -softplus(h)"]
    t1_scale: Annotated[float, Between(0.001, 1000), "CEBM: what t1 is multiplied by at first"]
    spread: Annotated[float, Between(0, 1e6), "CEBM: weight of spreading latents over directions"]
    contrast: Annotated[Literal["none", "local"], "EBMs: lighting and tint are taken away first"]
    l2: Annotated[float, Between(0, 1e6), "weight of the L2 term on energies"]
    l2_on: Annotated[Literal["data", "both"], "whose energies: of data, or of chains too"]
    components: Annotated[int, Between(1, 10_000), "of the prior; 1 is N(0, I), more are learned"]
    prior_mean_std: Annotated[float, Between(0, 1000), "components: spread of their first means"]
    prior_std: Annotated[tuple[float, float], Between(0.001, 1000), "range of their first stds"]
    represent: Annotated[Literal["mixture", "component"], "GMM-CEBM: whose mean is latent"]
    likelihood: Annotated[Literal["bernoulli", "continuous_bernoulli"], "VAE: of pixels in [0, 1]"]
    gradient_penalty: Annotated[float, Between(0, 1e6), "games: weight of R1 on the discriminator"]
    standardise: Annotated[bool, "BiGAN: its encoder's means over a batch"]
    visible_std: Annotated[float, Between(0.001, 1000), "EFH: standard deviation of x given z"]


@dataclass(frozen=True)
class ChainConfig:
    """The chains that energies are contrasted with, and the replay buffer that they live in."""

    steps: Annotated[int, Between(1, 100_000), "SGLD steps, or sweeps of Gibbs, in each update"]
    final_steps: Annotated[int, Between(0, 100_000), "to which steps grow over the run; 0: not"]
    step_size: Annotated[float, Between(0, 1e6), "what a step multiplies the gradient by"]
    noise_std: Annotated[float, Between(0, 1000), "standard deviation of a step's noise"]
    bound: Annotated[float, Between(0, 1000), "pixels stay within plus and minus it; 0: no bound"]
    buffer: Annotated[int, Between(1, 10_000_000), "chains that persist"]
    reuse: Annotated[float, Between(0, 1), "probability that a drawn chain is not restarted"]
    data_restarts: Annotated[float, Between(0, 1), "share of restarts from images, not from noise"]
    restart_std: Annotated[float, Between(0, 1000), "standard deviation of noise on those images"]


@dataclass(frozen=True)
class TrainConfig:
    """The optimiser (Adam), the length of the run and what it leaves."""

    updates: Annotated[int, Between(1, 1_000_000_000), "length of the run"]
    batch: Annotated[int, Between(1, 1_000_000), "images, and chains, in each update"]
    rate: Annotated[float, Between(0, 10), "learning rate"]
    beta1: Annotated[float, Between(0, 0.999999), "Adam's decay of the mean gradient"]
    beta2: Annotated[float, Between(0, 0.999999), "Adam's decay of the mean squared gradient"]
    epsilon: Annotated[float, Between(1e-16, 1), "Adam's, in its denominator"]
    warmup: Annotated[int, Between(0, 1_000_000_000), "updates over which the rate rises from 0"]
    decay: Annotated[Literal["none", "cosine"], "of the rate, to 0 at the last update"]
    precision: Annotated[Literal["auto", "float32", "bfloat16"], "auto: the hardware's faster one"]
    compile: Annotated[bool, "on a GPU, the energy that chains descend; half a minute at first"]
    threads: Annotated[int, Between(0, 4096), "of a CPU; 0: torch's choice, one a core"]
    seed: Annotated[int, Between(0, 2**31 - 1), "of every random number of the run"]
    average: Annotated[float, Between(0, 0.999999), "decay of the weights' average; 0: none"]
    log_every: Annotated[int, Between(1, 1_000_000_000), "updates between rows of the log"]
    evaluate_every: Annotated[int, Between(0, 1_000_000_000), "updates between 1-NN scores; 0: no"]
    checkpoint_every: Annotated[int, Between(1, 1_000_000_000), "updates between checkpoints"]
    pictures: Annotated[int, Between(0, 1000), "of chains or draws, over the run; 0: no curves too"]


@dataclass(frozen=True)
class GuardConfig:
    """When a run is taken to diverge, so that it goes back to its last good state.

    The gap is mean E(data) - mean E(chains). Noise of the chains is added to `pixels`.
    """

    energy_bound: Annotated[float, Between(1, 1e30), "on loss, mean energies, norm of weights"]
    gap: Annotated[float, Between(1e-3, 1e30), "size of the gap that is always healthy"]
    pixels: Annotated[float, Between(1, 1e30), "size of chains' pixels that is always healthy"]
    runaway: Annotated[float, Between(1, 1e30), "times these or their recent level is too much"]
    every: Annotated[int, Between(1, 1_000_000_000), "updates between checks"]
    same_rate: Annotated[int, Between(0, 1_000_000), "rollbacks before one halves the rate"]
    rollbacks: Annotated[int, Between(0, 1_000_000), "after more of them the run ends"]


@dataclass(frozen=True)
class Config:
    """All that decides a run, but for the machine that it is on."""

    data: DataConfig
    model: ModelConfig
    chains: ChainConfig
    train: TrainConfig
    guard: GuardConfig


@dataclass(frozen=True)
class Key:
    """Type, size, allowed values and meaning of a key of the configuration."""

    kind: type
    count: int | None  # None: one value, not a tuple
    bounds: Between | None
    words: tuple[str, ...]
    meaning: str

    def parse(self, value: object) -> object:
        """`value` as this key's, or ValueError that says what it has to be."""
        if self.count is None:
            return self.parse_one(value)
        if not isinstance(value, list | tuple) or len(value) != self.count:
            raise ValueError(self.wanted())
        return tuple(self.parse_one(part) for part in value)

    def parse_one(self, value: object) -> object:
        if self.kind is float and type(value) in (int, str):
            with suppress(ValueError, OverflowError):
                value = float(value)  # YAML reads 1e-4, without a dot, as a word
        known = type(value) is self.kind
        if known and self.bounds:
            known = self.bounds.low <= value <= self.bounds.high  # not of NaN
        if not known or (self.words and value not in self.words):
            raise ValueError(self.wanted())
        return value

    def wanted(self) -> str:
        if self.words:
            return f"one of {', '.join(self.words)}"
        if self.bounds is None:
            return "true or false" if self.kind is bool else "a word"
        number = {int: "a whole number", float: "a number"}[self.kind]
        number = f"a list of {self.count} numbers, each" if self.count else number
        return f"{number} from {self.bounds.low:,} to {self.bounds.high:,}"


@cache
def keys_of(section: type) -> dict[str, Key]:
    """The keys of a section's dataclass."""
    keys = {}
    for name, hint in get_type_hints(section, include_extras=True).items():
        kind, *notes, meaning = get_args(hint)
        count, words = None, ()
        if get_origin(kind) is tuple:
            count, kind = len(get_args(kind)), get_args(kind)[0]
        elif get_origin(kind) is Literal:
            words, kind = get_args(kind), str
        keys[name] = Key(kind, count, notes[0] if notes else None, words, meaning)
    return keys


@cache
def sections() -> dict[str, type]:
    """The sections of a configuration: name -> dataclass."""
    return get_type_hints(Config)


@cache
def all_keys() -> dict[str, Key]:
    """Every key as SECTION.KEY."""
    return {
        f"{section}.{name}": key
        for section, kind in sections().items()
        for name, key in keys_of(kind).items()
    }


def nearest_word(word: object, known) -> str:
    """What may have been meant by `word`, for the end of a message that stays short."""
    known = list(map(str, known))
    if close := difflib.get_close_matches(str(word), known, n=1, cutoff=0.4):
        return f"; did you mean {close[0]}?"
    if len(known) <= 12:
        return f"; there are: {', '.join(known)}"
    return "; `python cebm.py show` lists them"


# What other programs call things, for hints.
OTHER_NAMES = {
    "lr": "train.rate",
    "learning_rate": "train.rate",
    "batch_size": "train.batch",
    "bs": "train.batch",
    "epochs": "train.updates (an epoch is as many as there are images, divided by train.batch)",
    "num_epochs": "train.updates (an epoch is as many as there are images, divided by train.batch)",
    "iterations": "train.updates",
    "max_steps": "train.updates",
    "optimizer": "train.rate, train.beta1, train.beta2 and train.epsilon: it is always Adam",
    "optimiser": "train.rate, train.beta1, train.beta2 and train.epsilon: it is always Adam",
    "momentum": "train.beta1",
    "betas": "train.beta1 and train.beta2",
    "eps": "train.epsilon",
    "scheduler": "train.decay and train.warmup",
    "ema": "train.average",
    "ema_decay": "train.average",
    "latent_dim": "model.latent",
    "z_dim": "model.latent",
    "image_size": "data.image, as [channels,height,width]",
    "img_size": "data.image, as [channels,height,width]",
    "num_classes": "data.classes",
    "buffer_size": "chains.buffer",
    "sgld_steps": "chains.steps",
    "num_steps": "chains.steps",
    "sigma": "chains.noise_std",
    "amp": "train.precision",
    "device": "the option --device",
    "data_dir": "the option --data-dir",
    "dataset": "data.name",
}


def shorten(value: object) -> str:
    """`value` for a message, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def parse_value(key: str, value: object) -> object:
    """`value` as that of the key SECTION.KEY, or UsageError that names it and what is allowed."""
    if key not in all_keys():
        raise click.UsageError(f"unknown key {key}{nearest_word(key, all_keys())}")
    try:
        return all_keys()[key].parse(value)
    except ValueError as error:
        raise click.UsageError(f"{key} = {shorten(value)}: it has to be {error}") from None


def parse_flat(settings: dict[str, object]) -> Config:
    """A configuration from a value for each SECTION.KEY; UsageError names what is wrong."""
    values = {key: parse_value(key, value) for key, value in settings.items()}
    if missing := [key for key in all_keys() if key not in values]:
        raise click.UsageError(f"key {missing[0]} is missing")
    book = read_recipes()
    for key, known in (("data.name", book["data"]), ("model.name", book["models"])):
        if values[key] not in known:
            raise click.UsageError(
                f"{key} = {shorten(values[key])}: it has to be one of {', '.join(known)}"
            )
    parts = {
        section: kind(**{name: values[f"{section}.{name}"] for name in keys_of(kind)})
        for section, kind in sections().items()
    }
    return Config(**parts)


def parse_config(tree: object) -> Config:
    """A configuration from sections of keys, as `show PRESET` prints it."""
    if not isinstance(tree, dict) or not all(isinstance(part, dict) for part in tree.values()):
        raise click.UsageError("a configuration has to be made of sections of keys")
    return parse_flat(flatten(tree))


def flatten(tree: dict) -> dict[str, object]:
    """Sections of keys as SECTION.KEY."""
    return {
        f"{section}.{key}": value for section, part in tree.items() for key, value in part.items()
    }


class LocatedMapping(dict):
    """A mapping of configs.yaml that knows the line of each of its keys."""

    def fail(self, key: object, problem: str):
        line = self.lines.get(key, self.line)
        raise Failure(f"{CONFIGS.name}, line {line}: {problem}")

    def get_mapping(self, key: str) -> LocatedMapping:
        value = self.get(key)
        if not isinstance(value, LocatedMapping):
            self.fail(key, f"{key} has to be a mapping of keys to values")
        return value


class LocatingLoader(yaml.SafeLoader):
    """Reads YAML whose mappings are `LocatedMapping`s."""

    def construct_located(self, node):
        mapping = LocatedMapping()
        mapping.line, mapping.lines = node.start_mark.line + 1, {}
        yield mapping
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="not a key", problem_mark=key.start_mark)
            if key.value in mapping.lines and key.value != "<<":
                problem = f"{key.value} for the second time"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            mapping.lines[key.value] = key.start_mark.line + 1
        mapping.update(self.construct_mapping(node))


LocatingLoader.add_constructor("tag:yaml.org,2002:map", LocatingLoader.construct_located)


@cache
def read_recipes() -> dict[str, LocatedMapping]:
    """configs.yaml: models, data, trunks, recipes, variants, presets; Failure names file and line.

    `presets` holds all of them: name -> {"model", "data", "set"}, perhaps "about", "seconds".
    """
    try:
        book = yaml.load(CONFIGS.read_text(), LocatingLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Failure(f"{CONFIGS.name}: {' '.join(str(error).split())}") from error
    if not isinstance(book, LocatedMapping):
        raise Failure(f"{CONFIGS.name}: it has to be a mapping of sections")
    parts = "data", "trunks", "models", "recipes", "variants", "presets", "timing"
    for unknown in set(book) - set(parts):
        book.fail(unknown, f"unknown section {unknown}{nearest_word(unknown, parts)}")
    book = {part: book.get_mapping(part) for part in parts}
    check_recipes(book)
    book["presets"] = all_presets(book)
    return book


def check_recipes(book: dict[str, LocatedMapping]) -> None:
    """Failure where a setting of configs.yaml is wrong, or a name is not there."""
    check_common(book["recipes"].get_mapping("common"))
    for part in ("trunks", "recipes"):
        for name in set(book[part]) - {"common"}:
            check_settings(book[part].get_mapping(name))
    for name in book["data"]:
        check_entry(book, book["data"].get_mapping(name), {"trunk": "trunks"}, others=("about",))
    for name in book["models"]:
        entry = book["models"].get_mapping(name)
        check_entry(book, entry, {"recipe": "recipes"}, others=("data", "about"))
        if not isinstance(entry.get("data"), list):
            entry.fail("data", f"data of {name} has to be a list of data sets")
        for source in entry["data"]:
            if str(source) not in book["data"]:
                entry.fail("data", f"{source} is not in data{nearest_word(source, book['data'])}")
    for name in book["presets"]:
        entry = book["presets"].get_mapping(name)
        check_entry(book, entry, {"model": "models", "data": "data"}, others=("about", "seconds"))
    known = all_presets(book | {"variants": {}})
    for name in book["variants"]:
        entry = book["variants"].get_mapping(name)
        check_entry(book, entry, {}, others=("of", "about", "seconds"))
        bases = entry.get_mapping("of")
        for base in bases:
            if base not in known:
                bases.fail(base, f"no preset {base}{nearest_word(base, known)}")
            check_settings(bases.get_mapping(base))


def check_common(common: LocatedMapping) -> None:
    """Failure unless the common recipe has a right value for every key."""
    for section in common:
        if section not in sections():
            common.fail(section, f"unknown section {section}{nearest_word(section, sections())}")
        check_settings(common.get_mapping(section), f"{section}.")
    if missing := [key for key in all_keys() if key not in flatten(common)]:
        common.fail(None, f"key {missing[0]} is missing in recipes.common")


def check_settings(settings: LocatedMapping, prefix: str = "") -> None:
    """Failure unless each is a known key with a right value."""
    for key, value in settings.items():
        try:
            parse_value(f"{prefix}{key}", value)
        except click.UsageError as error:
            settings.fail(key, error.message)


def check_entry(book, entry: LocatedMapping, named: dict[str, str], others=()) -> None:
    """Failure unless `entry` names what is in the parts `named`, sets right values and no more."""
    allowed = [*named, *others, "set"]
    for key in entry:
        if key not in allowed:
            entry.fail(key, f"unknown key {key}{nearest_word(key, allowed)}")
    for key, part in named.items():
        if str(entry.get(key)) not in set(book[part]) - {"common"}:
            known = nearest_word(entry.get(key), book[part])
            entry.fail(key, f"{key} {entry.get(key)} is not in {part}{known}")
    if "set" in entry:
        check_settings(entry.get_mapping("set"))


def all_presets(book: dict[str, LocatedMapping]) -> dict[str, dict]:
    """The presets that are listed, MODEL-DATA, and variants of both."""
    presets = {name: {"set": {}, **entry} for name, entry in book["presets"].items()}
    for model, entry in book["models"].items():
        for source in entry["data"]:
            presets[f"{model}-{source}"] = {"model": model, "data": source, "set": {}}
    for variant, entry in book["variants"].items():
        for base, settings in entry["of"].items():
            combined = presets[base]["set"] | entry.get("set", {}) | settings
            own = {key: entry[key] for key in ("about", "seconds") if key in entry}
            presets[f"{base}-{variant}"] = presets[base] | own | {"set": combined}
    return presets


def require_preset(name: str) -> None:
    """UsageError, with the nearest name, where there is no such preset."""
    presets = read_recipes()["presets"]
    if name not in presets:
        raise click.UsageError(f"no preset {name!r}{nearest_word(name, presets)}")


def compose(preset: str, settings=()) -> Config:
    """The configuration of `preset` with KEY=VALUE `settings` over it; keys as `train.rate`."""
    book = read_recipes()
    require_preset(preset)
    entry = book["presets"][preset]
    chosen = {"model.name": entry["model"], "data.name": entry["data"]}
    chosen |= dict(parse_setting(setting) for setting in settings)
    refuse_unusable_keys(chosen)
    # A model or data set that is set in place of the preset's brings its own recipe.
    kind = book["models"].get(str(chosen["model.name"]), book["models"][entry["model"]])
    images = book["data"].get(str(chosen["data.name"]), book["data"][entry["data"]])
    flat = {
        **flatten(book["recipes"]["common"]),
        **book["recipes"][kind["recipe"]],
        **images.get("set", {}),
        **book["trunks"][images["trunk"]],
        **kind.get("set", {}),
        **entry["set"],
        **chosen,
    }
    return parse_flat(flat)


# Keys that a script may set for all models alike: where a model has no use for one, a warning.
COMMON_KEYS = "model.channels", "model.hidden", "chains.steps", "chains.buffer"


def refuse_unusable_keys(settings: dict[str, object]) -> None:
    """UsageError where the model or the data set that is named has no use for another setting."""
    name, source = settings["model.name"], settings["data.name"]
    if len(settings) == 2 or name not in models.MODELS or source not in data.DATASETS:
        return
    usable = keys_in_use(models.MODELS[name])
    if "extra" in data.DATASETS[source].counts:
        usable.add("data.extra")
    if data.DATASETS[source].classes is None:
        usable |= {"data.split_seed", "data.skip_unreadable"}
    for key in settings.keys() & all_keys().keys() - usable:
        if key in COMMON_KEYS:
            click.echo(f"Warning: {name} has no use for {key}", err=True)
            continue
        section = key.partition(".")[0]
        used = sorted(other for other in usable if other.startswith(f"{section}."))
        who = source if section == "data" else name
        raise click.UsageError(
            f"{who} has no use for {key}. Of {section} it has {', '.join(used) or 'no key'}"
        )


def keys_in_use(kind: models.ModelKind) -> set[str]:
    """The keys SECTION.KEY that some kind of model uses, whatever its data."""
    usable = set(all_keys()) - {"data.extra", "data.split_seed", "data.skip_unreadable"}
    own = {f"model.{key}" for key in kind.keys | {"name", "latent", "channels", "hidden"}}
    usable -= {f"model.{key}" for key in keys_of(ModelConfig)} - own
    langevin = {"chains.step_size", "chains.noise_std", "chains.bound"}
    if kind.chains == "gibbs":
        usable -= langevin | {"model.channels", "model.hidden"}
    elif kind.chains is None:
        usable -= {f"chains.{key}" for key in keys_of(ChainConfig)}
        if kind.latent_energy:
            usable |= {"chains.step_size", "chains.noise_std"}  # of `sample --refine`
        elif kind.density and not kind.decoder:
            usable |= langevin | {"chains.steps", "chains.final_steps"}  # of `sample`
    if kind.chains != "langevin":
        usable -= {"guard.gap", "guard.pixels", "guard.runaway"}
    return usable


def nearest_key(name: str) -> str:
    """The key that may have been meant, with or without its section."""
    bare = {key.split(".")[1]: key for key in all_keys()}
    words = all_keys() if "." in name else bare
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {bare.get(close[0], close[0])}?"
    return "; `python cebm.py show quickstart` explains each key"


def parse_setting(setting: str) -> tuple[str, object]:
    """KEY=VALUE -> SECTION.KEY and its value; the section may be left out if one alone has KEY."""
    name, equals, text = setting.partition("=")
    matches = [key for key in all_keys() if name in (key, key.split(".")[1])]
    if not equals:
        raise click.UsageError(f"--set {setting}: {name!r} is not KEY=VALUE")
    if not matches:
        other = OTHER_NAMES.get(name.rpartition(".")[2].lower().replace("-", "_"))
        hint = f"; here that is {other}" if other else nearest_key(name)
        raise click.UsageError(f"--set {setting}: {name!r} is no key{hint}")
    if len(matches) > 1:
        choice = " or ".join(sorted(matches))
        raise click.UsageError(f"--set {setting}: {name!r} could be {choice}")
    try:
        return matches[0], yaml.safe_load(text)
    except Exception:  # of dates, numbers and explicit types PyYAML raises what Python does
        shown = shorten(text)
        raise click.UsageError(f"--set {name}: {shown} is not a YAML value") from None


def check(config: Config, processes: int = 1) -> None:
    """UsageError where a model is not for such images, or batch and buffer are not for it."""
    kind, name, train = models.MODELS[config.model.name], config.model.name, config.train
    image = config.data.image
    if kind.sides:
        sizes = " or ".join(f"{side} x {side}" for side in kind.sides)
        fits = image[1] == image[2] and image[1] in kind.sides
    else:
        sizes, fits = "at least 8 x 8", min(image[1:]) >= 8
    if "components" in kind.keys and config.model.components < 2:
        raise click.UsageError(f"model.components = 1: {name} has at least 2")
    if not fits:
        raise click.UsageError(
            f"data.image = {list(image)}: {name} is for images of {sizes} pixels"
        )
    shared = {"train.batch": train.batch}
    if kind.chains:
        shared["chains.buffer"] = config.chains.buffer
        if train.batch > config.chains.buffer:
            raise click.UsageError(
                f"train.batch = {train.batch} must not exceed chains.buffer = "
                f"{config.chains.buffer}, a slot for each chain"
            )
    for key, number in shared.items():
        if number % processes:
            raise click.UsageError(f"{key} = {number}: not a multiple of {processes} processes")
    for key, least in ("standardise", 2), ("spread", 3):  # what they compare within a batch
        if getattr(config.model, key) and train.batch // processes < least:
            raise click.UsageError(
                f"train.batch = {train.batch}: too small, model.{key} needs {least} images"
                + " in each process" * (processes > 1)
            )


def as_yaml(tree: object) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


# ---------------------------------------------------------------------------------- Checkpoints

FORMAT = 8  # of a checkpoint
# An earlier one that can be evaluated and branched from (--init-from), not resumed: its random
# numbers and the order of its images were others.
EARLIER_FORMATS = (7,)


class Rollback(TypedDict):
    """The guard's: at which update, to which, and what was not healthy."""

    update: int
    to: int
    why: str


class About(TypedDict, total=False):
    """What a checkpoint says of itself, in plain values."""

    format: int
    preset: str
    config: dict[str, dict]
    updates: int
    seed: int
    rollbacks: list[Rollback]
    seconds: float  # of training
    precision: str  # of convolutions: float32 or bfloat16
    device: str
    data_dir: str  # where the data were, "" if embedded
    classes: list[str]  # their names, of a folder
    origin: str  # of a run begun by --init-from: what it was begun from; else ""
    torch: str  # versions
    python: str


class Evaluable(About, total=False):
    """A trained model. Files in `checkpoints/` hold only this."""

    model: dict[str, torch.Tensor]  # its state_dict
    average: dict[str, torch.Tensor]  # that of its averaged weights, if the run keeps them


class Snapshot(TypedDict, total=False):
    """What training changes, after `updates` updates. With several processes: that of all."""

    updates: int
    model: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]
    optimiser: dict[str, object]  # Adam's state_dict
    buffer: torch.Tensor | None  # chains (buffer, C, H, W), float32
    generators: list[torch.Tensor]  # states of random numbers, one a process
    level: dict[str, float]  # of the guard: healthy magnitudes
    greatest: torch.Tensor  # and the greatest of each metric since the last checkpoint


class Checkpoint(Evaluable, Snapshot, total=False):
    """What a run resumes from: an evaluable model, the state at `updates` and two earlier ones."""

    good: Snapshot  # after it the run stayed healthy for a whole interval: where it rolls back to
    candidate: Snapshot  # of the last regular checkpoint
    log: str  # log.csv up to `updates`


REQUIRED = "format", "preset", "config", "updates", "model"  # the rest only to resume


@contextmanager
def replacing(path: Path):
    """A file to write, which at the end replaces `path`, or what it links to, whole."""
    target = Path(os.path.realpath(path))
    require_regular(target, f"cannot write {path}")
    draft = target.parent / f".{secrets.token_hex(8)}.draft"  # a name that nobody else has
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, draft)
        os.replace(draft, target)
        sync_folder(target.parent)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}; what was there is intact") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path`, or what it links to, whole or not at all; Failure says why not."""
    with replacing(path) as file:
        file.write(content)


def require_regular(path: Path, problem: str) -> None:
    """Failure where there is something else than a file: a folder, a device, a pipe."""
    with suppress(OSError):  # of names that are too long, which opening it will tell
        if path.exists() and not path.is_file():
            raise Failure(f"{problem}: it is no regular file")


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to the disk, where the file system can do so."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def require_writable_folder(folder: Path) -> None:
    """OSError where no file can be made in a folder."""
    draft = folder / f".{secrets.token_hex(8)}.draft"
    draft.touch(exist_ok=False)
    draft.unlink()


def require_writable(path: str | None, endings, inputs=()) -> None:
    """Failure where a result cannot go, before the work; None is no result.

    It may not replace one of the `inputs`, and its name has to have one of the `endings`.
    """
    if path is None:
        return
    target, problem = Path(os.path.realpath(path)), f"cannot write {path or '.'}"
    require_regular(target, problem)
    if target in (Path(os.path.realpath(other)) for other in inputs):
        raise Failure(f"{problem}: it is what the command reads")
    if target.suffix.lower() not in endings:
        raise Failure(f"{problem}: its name has to end in {' or '.join(endings)}")
    try:
        target.exists()  # raises if the name is too long
        require_writable_folder(next(parent for parent in target.parents if parent.exists()))
    except OSError as error:
        raise Failure(f"{problem}: {error.strerror}") from error


def require_outside(path: Path | str | None, folder: Path) -> None:
    """Failure where a picture would come among the images that a command reads; None is none."""
    if path is None:
        return
    inside, around = Path(path).resolve(), folder.resolve()
    if folder.is_dir() and (inside == around or around in inside.parents):
        raise Failure(f"{path} would be in {folder}, among the images: choose another place")


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint whole or not at all."""
    with replacing(path) as file:
        try:  # by its name, since Python's file would copy the buffers
            torch.save(checkpoint, file.name)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(0, f"is the disk full? {first_line(error)}") from error


def load_checkpoint(path) -> Checkpoint:
    """A checkpoint's tensors and plain values, on the CPU. Never runs code from the file."""
    with reading_checkpoint(path):
        require_sound_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(state, complete_and_check(state, get_type_hints(Checkpoint)))
        return state


def read_outline(path) -> dict[str, object]:
    """`About` of a checkpoint and the shapes of its `model`, without torch, which takes seconds."""
    with reading_checkpoint(path):
        require_sound_archive(path)
        with zipfile.ZipFile(path) as archive:
            (name,) = (n for n in archive.namelist() if Path(n).name == "data.pkl")
            state = OutlineUnpickler(io.BytesIO(archive.read(name))).load()
        hints = get_type_hints(About) | {"model": dict[str, Shape]}
        outline = {key: value for key, value in state.items() if key in hints}
        complete_and_check(outline, hints)
        return outline


@contextmanager
def reading_checkpoint(path):
    """Failure, with the reason, for whatever a damaged file provokes inside."""
    read_recipes()  # a mistake there is no fault of the file
    problem = f"{path} is no checkpoint of format {FORMAT}, or not a whole one"
    require_regular(Path(path), problem)
    try:
        yield
    except click.UsageError as error:  # of its configuration
        raise Failure(f"{problem} ({error.message})") from error
    except Failure as error:
        raise Failure(f"{path}: {error.message}") from error
    except Exception as error:  # torch and pickle raise what the damage happens to provoke
        if isinstance(error, OSError) and error.strerror:
            raise Failure(f"cannot read {path}: {error.strerror}") from error
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise Failure(f"{problem} ({reason})") from error


@dataclass(frozen=True)
class Shape:
    """In a tensor's place: its sizes. Its numbers have not been read."""

    sizes: tuple[int, ...]


class OutlineUnpickler(pickle.Unpickler):
    """Reads a checkpoint's plain values without torch. Nothing of the file is run: the names in it
    stand for what is written here."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, sizes, *_: Shape(sizes)
        if module == "torch" and name.endswith("Storage"):
            return name
        raise ValueError(f"{module}.{name} has no place in it")

    def persistent_load(self, reference: object) -> None:
        """A tensor's numbers, another entry of the archive."""


def require_sound_archive(path) -> None:
    """ValueError unless all entries have their checksums, which torch itself does not look at.

    Compressed entries, entries of two sizes and entries marked as folders are refused as well:
    torch would read other bytes than those that the checksum is of.
    """
    folder = 0x10  # of MS-DOS
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            stored = entry.compress_type == zipfile.ZIP_STORED
            sized = entry.file_size == entry.compress_size
            if not (stored and sized) or entry.external_attr & folder:
                raise ValueError(f"{entry.filename} is not as torch writes it")
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} is damaged")


def with_newer_keys(tree: object) -> dict[str, dict]:
    """A configuration with the keys that it lacks, since they came later, as in recipes.common.

    ValueError if a whole section is missing.
    """
    complete = {}
    for section, values in read_recipes()["recipes"]["common"].items():
        if not isinstance(tree, dict) or not isinstance(tree.get(section), dict):
            raise ValueError(f"config.{section} is missing")
        complete[section] = dict(values) | tree[section]
    return {**tree, **complete}


def complete_and_check(state: dict, hints: dict[str, object]) -> Config:
    """The configuration of `state`, which gets the keys that it lacks.

    ValueError or UsageError unless it has what is `REQUIRED`, of the types that `hints` say.
    """
    for key in REQUIRED:
        if key not in state:
            raise ValueError(f"{key} is missing")
    written, readable = state["format"], (*EARLIER_FORMATS, FORMAT)
    if isinstance(written, int) and written not in readable:
        version = "a later" if written > FORMAT else "an earlier"
        raise Failure(
            f"it is of format {written}, which {version} version of this program wrote and reads; "
            f"this one reads {' and '.join(map(str, readable))}"
        )
    for key, value in state.items():
        if key in hints and not is_of_type(value, hints[key]):
            raise ValueError(f"{key} is of another type, or larger than the file")
    if state["updates"] < 0:
        raise ValueError("updates are negative")
    state["config"] = with_newer_keys(state["config"])
    return parse_config(state["config"])


def check_tensors(state: Checkpoint, config: Config) -> None:
    """ValueError or UsageError unless there can be such a model, with these weights and chains."""
    check(config)
    buffer = state.get("buffer")
    shape = (config.chains.buffer, *config.data.image)
    if buffer is not None and (buffer.shape != shape or buffer.dtype != torch.float32):
        raise ValueError("the buffer is of another shape or type")
    for weights in (state["model"], state.get("average") or {}):
        if not all(value.isfinite().all() for value in weights.values()):
            raise ValueError("weights are not finite")


def is_of_type(value: object, hint) -> bool:
    """Whether `value` is what a hint of `Checkpoint` says, containers included.

    A tensor has to have all its numbers in the file: an expanded one may be of any size.
    """
    if is_typeddict(hint):
        inner = get_type_hints(hint)
        return isinstance(value, dict) and all(
            is_of_type(part, inner[key]) for key, part in value.items() if key in inner
        )
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is dict:
        return isinstance(value, dict) and all(
            is_of_type(part, arguments[1]) for part in value.values()
        )
    if origin is list:
        return isinstance(value, list) and all(is_of_type(part, arguments[0]) for part in value)
    if arguments:  # a union
        return any(is_of_type(value, one) for one in arguments)
    if hint is object and isinstance(value, dict | list | tuple):  # of the optimiser
        parts = value.values() if isinstance(value, dict) else value
        return all(is_of_type(part, object) for part in parts)
    if hasattr(value, "untyped_storage") and value.nbytes > value.untyped_storage().nbytes():
        return False
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def load_model(path, device="cpu"):
    """A checkpoint's model in evaluation mode on `device`, its `Config`, and all that it holds."""
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # backends that are not there raise any kind
        raise Failure(f"device {device!s} cannot be used here: {first_line(error):.200}") from error
    state = load_checkpoint(path)
    config = parse_config(state["config"])
    averaged = state.get("average") if config.train.average else None
    try:
        # Shapes first, before any memory is taken.
        model_on_meta(config).load_state_dict(averaged or state["model"], assign=True)
        model = new_model(config, device)
        model.load_state_dict(averaged or state["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise Failure(f"{path} is of another model: {str(error).splitlines()[-1]}") from error
    return model.eval(), config, state


def new_model(config: Config, device="cpu"):
    """The untrained model of `config`: the same seed, the same weights."""
    require_memory(config, device)
    with evaluate.seeded(config.train.seed, torch.device("cpu")):
        model = models.build(config.model, config.data.image, config.data.classes)
    model.image_shape = config.data.image
    return model.to(device, memory_format=torch.channels_last)


def model_on_meta(config: Config):
    """The model's shapes, without its numbers."""
    with torch.device("meta"):
        return models.build(config.model, config.data.image, config.data.classes)


def require_memory(config: Config, device, training=False) -> None:
    """Failure where a model, or a run of it, cannot fit into this machine's memory."""
    if torch.device(device).type != "cpu" or not hasattr(os, "sysconf"):  # as on Windows
        return
    numbers = sum(parameter.numel() for parameter in model_on_meta(config).parameters())
    if training:
        channels, height, width = config.data.image
        numbers *= 12  # gradients, Adam's moments, snapshots
        if models.MODELS[config.model.name].chains:
            numbers += 4 * config.chains.buffer * channels * height * width
        for i, maps in enumerate(config.model.channels):  # activations before and after
            numbers += 2 * config.train.batch * maps * height * width / 4**i
    memory = memory_limit()
    if 4 * numbers > memory:
        raise Failure(
            f"model, batch or buffer would need {4 * numbers / 2**30:,.0f} GiB of memory; there "
            f"are {memory / 2**30:.0f}: choose smaller ones"
        )


def memory_limit() -> int:
    """Bytes of this machine's memory, or of the share that a container may use."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of cgroups 2 and 1
        with suppress(OSError, ValueError):  # there is none, or no limit
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits)


def load_images(config: Config, split: str, data_dir: str) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) and labels (N,) of the data that `config` names."""
    settings = config.data
    images, labels = data.load(
        settings.name, split, data_dir, settings.image, settings.extra, folder_options(config)
    )
    require_known_labels(labels, split, settings, data_dir)
    return images, labels


def require_known_labels(labels: Tensor, split: str, settings: DataConfig, data_dir: str) -> None:
    """Failure where there are more classes than the model knows, or fewer to train on."""
    found = int(labels.max()) + 1
    if found > settings.classes or (split == "train" and found < settings.classes):
        where = data_dir if data.DATASETS[settings.name].classes is None else settings.name
        raise Failure(f"{where} ({split}) has {found} classes, not {settings.classes}")


def folder_options(config: Config) -> data.FolderOptions:
    """How a folder of the user's own images is read."""
    return data.FolderOptions(config.data.split_seed, config.data.skip_unreadable)


def count_classes(config: Config, data_dir: str) -> Config:
    """`config` with the number of classes that a folder has, unless it has one."""
    if config.data.classes or data.DATASETS[config.data.name].classes is not None:
        return config
    names = folder_classes(config, data_dir)
    return replace(config, data=replace(config.data, classes=len(names)))


def folder_classes(config: Config, data_dir: str) -> list[str] | None:
    """The names of a folder's classes, None of other data."""
    if data.DATASETS[config.data.name].classes is not None:
        return None
    return data.class_names(config.data.name, data_dir, 0, folder_options(config))


def data_place(state: Checkpoint, data_dir: str | None) -> str:
    """Where the data of a checkpoint are: as the command says, or where they were in training."""
    remembered = state.get("data_dir")
    if data_dir is not None:
        return data_dir
    if remembered and os.path.isdir(remembered):
        return remembered
    if remembered and data.DATASETS[state["config"]["data"]["name"]].classes is None:
        raise Failure(
            f"the images that the model was trained on were in {remembered}, which is no folder "
            "any more: say with --data-dir where they are now"
        )
    return "data"


# ------------------------------------------------------------------------------------- Training


@dataclass(frozen=True)
class Processes:
    """This process's place among those that `torchrun` started; alone it is 0 of 1."""

    rank: int = 0
    count: int = 1

    def reduce_max(self, values: Tensor) -> Tensor:
        """Makes `values` the greatest over all processes, in place, and returns them."""
        if self.count > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    def gather(self, part: object) -> list:
        """What each process has, in their order."""
        if self.count == 1:
            return [part]
        parts = [None] * self.count
        torch.distributed.all_gather_object(parts, part)
        return parts


def learning_rate(update: int, train: TrainConfig, halvings: int = 0) -> float:
    """The rate of update 1, 2, ...: linear warm-up, then constant or a cosine to 0."""
    angle = math.pi * (update - 1) / train.updates if train.decay == "cosine" else 0.0
    rate = train.rate * min(1.0, update / max(1, train.warmup)) * 0.5 * (1 + math.cos(angle))
    return rate * 0.5**halvings


def chain_steps(update: int, config: Config) -> int:
    """Steps of the chains in update 1, 2, ...: constant, or growing by a constant factor."""
    first, last = config.chains.steps, config.chains.final_steps or config.chains.steps
    return round(first * (last / first) ** (update / config.train.updates))


# What random numbers are for, beside a model's first weights, which the seed itself decides.
STREAMS = "training", "order", "picture", "sample", "prior", "buffer"


def stream_seed(purpose: str, *numbers: int) -> int:
    """A seed for one of `STREAMS`; `numbers` tell apart its uses: seed, rank, rollbacks.

    NumPy's hash makes streams independent, however close the numbers are. Sums would not: seed 0
    after a rollback would be seed 1.
    """
    import numpy

    sequence = numpy.random.SeedSequence([STREAMS.index(purpose), *numbers])
    return int(sequence.generate_state(1, numpy.uint64)[0])


class ChainsCutShort(Exception):
    """A stop was asked for while chains moved: the update is to be undone."""


class Trainer:
    """What training changes: weights and their average, optimiser, chains, random numbers.

    Each of several processes has a share of every batch and of the replay buffer, and random
    numbers of its own.
    """

    def __init__(
        self, config: Config, images, labels, device, precision: str, processes: Processes
    ):
        self.config, self.device, self.processes = config, device, processes
        self.images, self.labels = images.to(device), labels.to(device)  # uint8 (N, ...), (N,)
        self.sampler = models.MODELS[config.model.name].chains
        self.bfloat16 = precision == "bfloat16"
        self.cuda = device.type == "cuda"
        self.update, self.halvings = 0, 0  # updates made, halvings of the rate
        self.model = new_model(config, device)
        self.average = copy.deepcopy(self.model) if config.train.average else None
        self.optimiser = torch.optim.Adam(
            self.model.parameters(),
            config.train.rate,
            fused=self.cuda or None,
            betas=(config.train.beta1, config.train.beta2),
            eps=config.train.epsilon,
        )
        self.generator = sampling.default_generator(device)  # some losses draw from it too
        self.reseed()
        self.buffer = self.new_buffer() if self.sampler else None
        self.loss = self.model.loss
        if processes.count > 1:  # gradients are averaged where the model is called
            self.model.forward = self.model.loss
            self.loss = torch.nn.parallel.DistributedDataParallel(self.model)
        self.mover_steps, self.mover = 0, None  # a function that moves chains by so many steps
        self.stop: Stop | None = None  # what may end chains early
        self.interruptible = not self.cuda and processes.count == 1  # whether it may
        self.record_learning()

    def reseed(self, rollbacks: int = 0) -> None:
        """New random numbers, also after each rollback and in each process."""
        seed = self.config.train.seed
        torch.manual_seed(stream_seed("training", seed, self.processes.rank, rollbacks))

    def new_buffer(self) -> sampling.ReplayBuffer:
        """This process's share of the chains."""
        chains = self.config.chains
        return sampling.ReplayBuffer(
            chains.buffer // self.processes.count,
            self.config.data.image,
            chains.reuse,
            self.generator,
            chains.data_restarts,
            chains.restart_std,
        )

    def record_learning(self) -> None:
        """On a GPU `learn` is recorded anew, since the optimiser's tensors are others."""
        self.recorded = None
        if self.cuda and self.processes.count == 1:
            self.recorded = sampling.GraphedFunction([self.learn_from], self.generator)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Counts the update; its images with noise (B, C, H, W), float32, and labels (B,)."""
        train, noise_std = self.config.train, self.config.data.noise_std
        epoch, position = divmod(self.update, len(self.images) // train.batch)
        order = epoch_order(train.seed, epoch, len(self.images), self.device)
        chosen = order[position * train.batch :][: train.batch]
        chosen = chosen.chunk(self.processes.count)[self.processes.rank]
        self.update += 1
        x = data.normalise(self.images[chosen])
        x = x.contiguous(memory_format=torch.channels_last)
        x += noise_std * torch.randn(x.shape, generator=self.generator, device=self.device)
        return x, self.labels[chosen]

    def random_state(self) -> Tensor | None:
        """The random numbers' state, so that an update whose chains are cut short can be undone.

        None where they are not: on a GPU it would be a wait.
        """
        return self.generator.get_state() if self.interruptible else None

    def undo_update(self, before: Tensor) -> None:
        """As if the update had not been begun: its chains have not been stored yet."""
        self.update -= 1
        self.generator.set_state(before)

    def energy(self, x: Tensor) -> Tensor:
        """The model's, for chains; ChainsCutShort if a stop was asked for."""
        if self.interruptible and self.stop and self.stop.asked:
            raise ChainsCutShort
        return self.model.energy(x)

    def move_chains(self, x: Tensor) -> Tensor | None:
        """As many chains of the buffer as images x, moved on; None for models without chains."""
        if self.buffer is None:
            return None
        slots, chains = self.buffer.draw(x)
        steps = chain_steps(self.update, self.config)
        if steps != self.mover_steps:
            self.mover_steps, self.mover = steps, self.new_mover(steps)
        chains = self.mover(chains)
        self.buffer.store(slots, chains)
        return chains

    def new_mover(self, steps: int):
        """A function that moves chains by `steps`; on a GPU it is recorded anew."""
        return sampling.mover(
            self.sampler,
            self.model,
            self.model.energy if self.cuda else self.energy,
            steps,
            self.config.chains,
            self.generator,
            bfloat16=self.bfloat16,
            record=self.cuda,
            compile=self.config.train.compile,
        )

    def learn(self, x: Tensor, y: Tensor, chains: Tensor | None) -> dict[str, Tensor]:
        """Moves the weights and their average: metrics, 0-d tensors that stay on the device."""
        rate = learning_rate(self.update, self.config.train, self.halvings)
        inputs = [torch.full((), rate, device=self.device) if self.cuda else rate, x, y]
        if chains is not None:
            inputs.append(chains)
        return self.recorded(*inputs) if self.recorded else self.learn_from(*inputs)

    def learn_from(self, rate, x, y, chains=None) -> dict[str, Tensor]:
        """`learn` at a rate that is a tensor on a GPU, so that the call can be recorded."""
        self.optimiser.param_groups[0].update(lr=rate, capturable=self.cuda)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            loss, metrics = self.loss(x, y, chains)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        if self.average is not None:
            move_average(self.average, self.model, self.config.train.average)
        metrics = {"loss": loss, **metrics}
        if chains is not None:
            metrics |= {"pixel_min": chains.min(), "pixel_max": chains.max()}
        return {name: value.detach() for name, value in metrics.items()}

    def state_dict(self) -> Snapshot:
        """Copies of everything; of buffers and generators, those of all processes."""
        state = {"updates": self.update, "model": self.model.state_dict()}
        state["optimiser"] = self.optimiser.state_dict()
        if self.average is not None:
            state["average"] = self.average.state_dict()
        chains = None if self.buffer is None else self.buffer.images.cpu()
        parts = self.processes.gather((chains, self.generator.get_state()))
        buffer = None if chains is None else torch.cat([images for images, _ in parts])
        generators = [generator for _, generator in parts]
        return copy.deepcopy(state) | {"buffer": buffer, "generators": generators}

    def load_state_dict(self, state: Snapshot) -> None:
        """Goes on from a snapshot, which stays as it is; rates and betas are the configuration's.

        An average that the snapshot lacks begins at its weights.
        """
        self.update = state["updates"]
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.load_state_dict(state.get("average", state["model"]))
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.optimiser.param_groups[0].update(self.optimiser.defaults)
        for parameter, moments in self.optimiser.state.items():
            if any(moments[name].shape != parameter.shape for name in ("exp_avg", "exp_avg_sq")):
                raise ValueError("Adam's moments are of another shape")
        if self.buffer is not None:
            shape = self.processes.count, *self.buffer.images.shape
            self.buffer.images.copy_(state["buffer"].view(shape)[self.processes.rank])
        self.generator.set_state(state["generators"][self.processes.rank])
        self.record_learning()

    def is_finite(self) -> bool:
        return all(value.isfinite().all() for value in self.model.state_dict().values())

    def picture(self) -> Tensor | None:
        """64 images to look at: chains of the buffer, or draws of a decoder, else None."""
        if self.buffer is not None:
            return self.buffer.images[:64]
        if not models.MODELS[self.config.model.name].decoder:
            return None
        seed = stream_seed("picture", self.config.train.seed)
        with evaluate.seeded(seed, self.device), torch.no_grad():
            drawn = self.model.eval().generate(64)
        self.model.train()
        return drawn


@lru_cache(maxsize=1)
def epoch_order(seed: int, epoch: int, count: int, device) -> Tensor:
    """The order of `count` images in an epoch, moved to the device once and kept."""
    generator = torch.Generator().manual_seed(stream_seed("order", seed, epoch))
    return torch.randperm(count, generator=generator).to(device)


def move_average(average, model, decay: float) -> None:
    """average <- decay * average + (1 - decay) * weights; whole numbers are copied.

    Not torch's AveragedModel: its first call copies the weights in place of averaging them in, and
    it counts calls on the host, where a recorded CUDA graph does not repeat the count.
    """
    states = average.state_dict().values(), model.state_dict().values()
    for mean, value in zip(*states, strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


class Guard:
    """Looks whether a run diverges, and keeps the states that it can go back to.

    The loss, mean energies and the weights have one fixed bound. Of Langevin chains the energy gap
    and the pixels may reach `runaway` times their level: what they reached in the interval before
    the good state, but at least the floor up to which any run is healthy.

    A regular checkpoint shows nothing about its own state, which may be on its way out. It shows
    that the one before, the candidate, was followed by a whole healthy interval: that becomes good,
    and the new state the candidate. So with checkpoints at 200, 400, 600 a run that diverges at 650
    goes back to 400, and is judged by the level of 200 to 400, the interval that ended there.
    """

    def __init__(self, config: Config, snapshot: Snapshot, processes: Processes):
        self.settings, self.processes = config.guard, processes
        self.floor = magnitudes_of_health(config)
        self.names: list[str] = []  # of the metrics
        self.found: dict[str, float] = {}  # what the last verdict saw
        self.begin(snapshot)

    def begin(self, snapshot: Snapshot) -> None:
        """A run begins: no rollbacks, no level, and nothing earlier to go back to."""
        self.rollbacks: list[Rollback] = []
        self.level: dict[str, float] = {}
        self.greatest = torch.zeros(())  # then one a metric, since the last checkpoint
        self.good = self.candidate = self.stamp(snapshot)

    @property
    def halvings(self) -> int:
        """How often the rate has been halved."""
        return max(0, len(self.rollbacks) - self.settings.same_rate)

    def observe(self, metrics: dict[str, Tensor]) -> None:
        """Keeps the greatest magnitudes, on the device."""
        self.names = list(metrics)
        magnitudes = torch.stack(list(metrics.values())).abs()
        self.greatest = torch.maximum(magnitudes, self.greatest.to(magnitudes.device))

    def verdict(self, model) -> str | None:
        """Describes the first unhealthy magnitude since the last checkpoint, or returns None.

        Waits for the device. NaN counts as infinite.
        """
        weights = torch.nn.utils.get_total_norm(model.parameters()).detach()
        seen = torch.cat([self.greatest, weights[None]]).nan_to_num(torch.inf)
        seen = self.processes.reduce_max(seen)
        self.greatest = seen[:-1]
        self.found = dict(zip([*self.names, "weights"], seen.tolist(), strict=True))
        return out_of_bounds(self.found, self.good["level"], self.floor, self.settings)

    def stamp(self, state: Snapshot) -> Snapshot:
        """`state` together with what the guard has seen up to it."""
        return {**state, "level": self.level, "greatest": self.greatest}

    def snapshot(self, trainer: Trainer) -> Snapshot:
        """The trainer's state between regular checkpoints, with what all processes have seen."""
        self.greatest = self.processes.reduce_max(self.greatest)
        return self.stamp(trainer.state_dict())

    def accept(self, trainer: Trainer) -> Snapshot:
        """At a regular checkpoint, after a verdict of None: returns the new candidate.

        The level is at most `runaway` times the floor, so that it cannot creep up without end.
        """
        ceiling = self.settings.runaway
        self.level = {k: min(self.found[k], ceiling * v) for k, v in self.floor.items()}
        self.greatest = torch.zeros_like(self.greatest)
        self.good = self.candidate  # frees the state before it, whose buffer may be large
        self.candidate = self.stamp(trainer.state_dict())
        return self.candidate

    def roll_back(self, trainer: Trainer, reason: str) -> Snapshot:
        """Takes the trainer back to the good state, with new random numbers; returns that state."""
        record: Rollback = {"update": trainer.update, "to": self.good["updates"], "why": reason}
        self.rollbacks.append(record)
        trainer.load_state_dict(self.good)
        trainer.reseed(len(self.rollbacks))
        trainer.halvings = self.halvings
        self.level, self.greatest = self.good["level"], torch.zeros_like(self.greatest)
        self.good = self.candidate = self.stamp(trainer.state_dict())
        return self.good

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from what a checkpoint holds."""
        self.level, self.greatest = checkpoint["level"], checkpoint["greatest"]
        self.good, self.candidate = checkpoint["good"], checkpoint["candidate"]
        self.rollbacks = checkpoint["rollbacks"]

    @property
    def is_exhausted(self) -> bool:
        """Whether the run has been rolled back more often than it may be."""
        return len(self.rollbacks) > self.settings.rollbacks


def magnitudes_of_health(config: Config) -> dict[str, float]:
    """The gap and the pixels up to which any run of Langevin chains is healthy."""
    if models.MODELS[config.model.name].chains != "langevin":
        return {}
    chains = config.chains
    noise = chains.noise_std * math.sqrt(max(chains.steps, chains.final_steps))
    pixels = config.guard.pixels + 4 * noise
    return {"gap": config.guard.gap, "pixel_min": pixels, "pixel_max": pixels}


def out_of_bounds(found: dict, level: dict, floor: dict, guard: GuardConfig) -> str | None:
    """Describes the first unhealthy one of the magnitudes `found`, or returns None.

    A gap of exactly 0 is unhealthy where there was one before.
    """
    for name, value in found.items():
        healthy = max(floor.get(name, math.inf), level.get(name, 0.0))
        bound = min(guard.energy_bound, guard.runaway * healthy)
        if name == "gap" and value == 0 and level.get(name, 0.0) > 0:
            return "gap of exactly 0: all energies are the same"
        if not value <= bound:  # or NaN
            return f"{name} of magnitude {value:.3g} (the bound is {bound:.3g})"
    return None


class Stop:
    """Within this context Ctrl-C, SIGTERM and SIGHUP ask a run to save and end.

    A second signal ends it at once, without saving, unless `torchrun` is at work, which passes on
    the signals that the terminal sends too. `requested` is what all processes have agreed on.
    Signals that were ignored before stay so, as SIGHUP under `nohup`.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.asked = self.requested = False
        self.signals = 0
        self.previous = {}

    def __enter__(self) -> Stop:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self.take)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            failure = Failure("ended without saving what came after the last checkpoint")
            failure.exit_code = 130
            raise failure

    def take(self, *_) -> None:
        """A signal has come."""
        self.signals += 1
        if self.signals > 1 and self.processes.count == 1:
            raise KeyboardInterrupt
        self.ask()
        if self.processes.rank == 0:
            again = "; once more ends without saving" if self.processes.count == 1 else ""
            with suppress(OSError):  # nobody may read any more
                os.write(2, f"saving after this update{again}\n".encode())

    def ask(self) -> None:
        """The run is to end after the update that it is in."""
        self.asked = True

    def agree(self, device) -> None:
        """Every process ends if one was asked to."""
        self.requested = self.asked
        if self.processes.count > 1:
            flag = torch.tensor(float(self.asked), device=device)
            self.requested = bool(self.processes.reduce_max(flag))


class RunLog:
    """log.csv, a row every `log_every` updates, and what a user sees of a run on stdout.

    On a terminal that is a bar, else a short line for each row. Only the first of several processes
    (`writes`) has either.
    """

    def __init__(self, path: Path, stop: Stop, config: Config, writes: bool):
        self.path, self.stop, self.config, self.writes = path, stop, config, writes
        self.text, self.seconds_before = "", 0.0  # of the file, of earlier processes
        self.started = self.first_made = time.monotonic()
        self.updates_made = 0
        self.score: dict[str, float] = {}  # the last 1-NN
        self.shown = 0.0  # when a line or the bar was last brought up to date
        self.curves_drawn = self.started  # when curves.png was
        self.bar = None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on from the rows and the time of a checkpoint."""
        self.text, self.seconds_before = checkpoint["log"], checkpoint["seconds"]

    def begin(self, update: int) -> None:
        """Brings the file to the rows so far: a process that was killed may have left more."""
        if self.writes and self.text:
            write_atomically(self.path, self.text.encode())
        elif self.writes:
            self.path.unlink(missing_ok=True)
        if self.writes and sys.stdout.isatty():
            self.bar = click.progressbar(
                length=self.config.train.updates,
                width=8,
                bar_template="%(bar)s %(info)s",
                show_percent=False,
                show_eta=False,
                item_show_func=str,
            )
            self.draw(update, "starting")

    @property
    def seconds(self) -> float:
        """Of training so far, of earlier processes too."""
        return self.seconds_before + time.monotonic() - self.started

    @property
    def speed(self) -> float:
        """Updates a second of this process, if there are several without the slower first one."""
        made, since = self.updates_made, self.started
        if made > 1:
            made, since = made - 1, self.first_made
        return made / max(1e-9, time.monotonic() - since)

    def count_update(self, trainer: Trainer, metrics: dict[str, Tensor], rollbacks: int) -> None:
        """An update has been made. Says so at times, at first soon, without a row in the file."""
        self.updates_made += 1
        now = time.monotonic()
        if self.updates_made == 1:
            self.first_made = now
        first = self.shown == 0.0 and (self.updates_made == 5 or now - self.started > 5)
        if self.writes and (first or (self.bar and now - self.shown > 0.5)):
            self.show(trainer, as_numbers(metrics), rollbacks)

    def row(self, trainer: Trainer, metrics: dict[str, Tensor], rollbacks: int, score: dict):
        """Writes and shows a row; waits for the device. `score` is empty between evaluations."""
        figures, seconds = as_numbers(metrics), self.seconds
        row = {
            "update": trainer.update,
            **figures,
            "rollbacks": rollbacks,
            "seconds": round(seconds, 1),
            "updates_per_second": round(self.speed, 3),
        }
        if self.config.train.evaluate_every:
            row |= {name: score.get(name, "") for name in SCORES}
        lines = [] if self.text else [",".join(row)]
        lines.append(",".join(map(str, row.values())))
        self.append("".join(f"{line}\n" for line in lines))
        self.score = score or self.score
        self.show(trainer, figures, rollbacks)

    def show(self, trainer: Trainer, figures: dict[str, float], rollbacks: int) -> None:
        """Brings the bar up to date, or prints a line."""
        self.shown = time.monotonic()
        parts = self.parts(trainer, figures, rollbacks)
        if self.bar:
            room = shutil.get_terminal_size().columns - len("######## ") - 1
            self.draw(trainer.update, "  ".join(fitting(parts, room)))
        else:
            self.say("  ".join(fitting(parts, 80)))

    def parts(self, trainer: Trainer, figures: dict[str, float], rollbacks: int) -> list[str]:
        """What there is to say, the most important first."""
        train, update = self.config.train, trainer.update
        left = in_words((train.updates - update) / max(self.speed, 1e-9))
        parts = [f"{update}/{train.updates}", f"{left} left"]
        if "gap" in figures:
            parts.append(f"gap {figures['gap']:.2g}")
        else:
            parts.append(f"loss {figures['loss']:.4g}")
        if self.score:
            parts.append(f"1-NN {self.score['knn']:.1f}")
        if rollbacks:
            parts.append(f"{rollbacks} rollback{'s' * (rollbacks > 1)}")
        if "pixel_min" in figures:
            parts.append(f"pixels {figures['pixel_min']:.2g} to {figures['pixel_max']:.2g}")
        if self.score:
            parts.append(f"whitened {self.score['knn_whitened']:.1f}")
        rate = learning_rate(max(1, update), train, trainer.halvings)
        return [*parts, f"rate {rate:.2g}", f"{self.speed:.3g}/s"]

    def draw(self, update: int, text: str) -> None:
        """The bar, `text` beside it."""
        with self.printing():
            self.bar.pos, self.bar.current_item = update, text
            self.bar.render_progress()

    def append(self, lines: str) -> None:
        """Adds lines to the file and to what checkpoints hold of it."""
        self.text += lines
        if self.writes:
            try:
                with open(self.path, "a") as file:
                    file.write(lines)
            except OSError as error:
                raise Failure(f"cannot write {self.path}: {error.strerror}") from error

    def say(self, line: str) -> None:
        """Prints a line, in place of the bar, which comes again below it."""
        if not self.writes:
            return
        with self.printing():
            if self.bar:
                click.echo("\r" + " " * (shutil.get_terminal_size().columns - 1) + "\r", nl=False)
            click.echo(line)

    def end(self) -> None:
        """Leaves the bar as it is and goes on below it."""
        if self.bar:
            with self.printing():
                click.echo()
            self.bar = None

    @contextmanager
    def printing(self):
        """If nothing can be printed, the run saves and ends.

        Ctrl-C of `train | tee log` ends tee first; or stdout is a file on a full disk.
        """
        try:
            yield
        except OSError:
            self.stop.ask()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def as_numbers(metrics: dict[str, Tensor]) -> dict[str, float]:
    """Metrics of an update, brought from the device at once."""
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))


def fitting(parts: list[str], width: int) -> list[str]:
    """As many of the first `parts` as fit into a line, two spaces between them."""
    count = len(parts)
    while count > 1 and len("  ".join(parts[:count])) > width:
        count -= 1
    return parts[:count]


def in_words(seconds: float) -> str:
    """A time as 0:45, 12:03 (minutes), 5:04:03 (hours) or 3.2 days."""
    if seconds >= 48 * 3600:
        return f"{seconds / 86_400:.1f} days"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


SCORES = "knn", "knn_whitened", "knn_untrained", "knn_pixels"  # columns of the log


class Neighbours:
    """1-NN accuracy during training, on at most 10,000 training and 2,000 test images.

    These are evenly spaced. Nothing of it draws random numbers, so that a run that is evaluated
    ends as one that is not.
    """

    def __init__(self, config: Config, train, test, device):
        self.parts = [
            [part[:: -(-len(images) // most)] for part in (images, labels)]
            for (images, labels), most in ((train, 10_000), (test, 2_000))
        ]
        self.config, self.device = config, device

    @cached_property
    def fixed(self) -> dict[str, float]:
        """What no training changes; at the first score, so that training begins at once."""
        untrained = new_model(self.config, self.device).eval()
        return {
            "knn_untrained": self.accuracy(*self.encode(untrained.represent)),
            "knn_pixels": self.accuracy(*self.encode(lambda x: x.flatten(1))),
        }

    def encode(self, function) -> list[Tensor]:
        """`function` of the training images and of the test images."""
        return [evaluate.in_batches(function, images, self.device) for images, _ in self.parts]

    def accuracy(self, train: Tensor, test: Tensor) -> float:
        """1-NN of test vectors among training vectors, in percent."""
        (_, labels), (_, test_labels) = self.parts
        return evaluate.percent_equal(labels[evaluate.nearest(train, test).cpu()], test_labels)

    def score(self, trainer: Trainer) -> dict[str, float]:
        """`SCORES` of the averaged weights, if the run keeps them, else of the weights."""
        model = trainer.model if trainer.average is None else trainer.average
        latents = self.encode(model.eval().represent)
        model.train()
        whitened = self.accuracy(*evaluate.whiten(*latents))
        return {"knn": self.accuracy(*latents), "knn_whitened": whitened, **self.fixed}


def find_neighbours(config: Config, train, data_dir: str, device, say) -> Neighbours | None:
    """What `train.evaluate_every` needs, or None where there is nothing to compare with."""
    if not config.train.evaluate_every:
        return None
    if config.data.classes < 2:
        say("no 1-NN during training: the images have no classes")
        return None
    try:
        return Neighbours(config, train, load_images(config, "test", data_dir), device)
    except Failure as error:
        say(f"no 1-NN during training: {error.message}")
        return None


@dataclass(frozen=True)
class RunFolder:
    """Where a run is kept, and what its checkpoints say of it beside its state."""

    path: Path
    config: Config
    preset: str
    origin: str
    precision: str
    device: str
    data_dir: str
    writes: bool  # of several processes the first alone
    classes: list[str] | None = None  # the names of a folder's

    @property
    def checkpoint(self) -> Path:
        return self.path / "ckpt.pt"

    @property
    def data_option(self) -> list[str]:
        """What commands on this run need to find its data."""
        if data.DATASETS[self.config.data.name].embedded:
            return []
        return ["--data-dir", as_argument(self.data_dir)]

    def begin(self) -> None:
        """Writes the configuration."""
        if self.writes:
            content = as_yaml(asdict(self.config)).encode()
            write_atomically(self.path / "config.yaml", content)

    def save(self, snapshot: Snapshot, guard: Guard, log: RunLog) -> None:
        """Writes the checkpoint."""
        if not self.writes:
            return
        checkpoint: Checkpoint = {
            **snapshot,
            "good": guard.good,
            "candidate": guard.candidate,
            "rollbacks": guard.rollbacks,
            "log": log.text,
            "seconds": log.seconds,
            "format": FORMAT,
            "preset": self.preset,
            "origin": self.origin,
            "config": asdict(self.config),
            "seed": self.config.train.seed,
            "precision": self.precision,
            "device": self.device,
            "data_dir": os.path.abspath(self.data_dir) if self.data_option else "",
            **({} if self.classes is None else {"classes": self.classes}),
            "torch": str(torch.__version__),
            "python": sys.version.split()[0],
        }
        save_checkpoint(self.checkpoint, checkpoint)

    def save_curves(self, log: RunLog, at_once: bool) -> None:
        """Draws curves.png anew, unless that was done within the last minute."""
        now, wanted = time.monotonic(), self.config.train.pictures > 0
        if not self.writes or not wanted or not (at_once or now - log.curves_drawn > 60):
            return
        log.curves_drawn = now
        curves = {self.preset: read_curves(log.text, self.config)}
        save_figure(self.path / "curves.png", evaluate.curves_figure(curves), log)

    def save_picture(self, update: int, images: Tensor | None, log: RunLog) -> None:
        """Writes chains, or draws of a generator, into samples/; None for models without either."""
        if self.writes and images is not None:
            picture = evaluate.grid_figure(images, caption=f"{self.preset}, update {update}")
            save_figure(self.path / "samples" / f"{update:07d}.png", picture, log)


def save_figure(path: Path, figure, log: RunLog) -> None:
    """Writes a picture of a run; where it cannot, a warning, since that is no reason to end it."""
    try:
        write_atomically(path, evaluate.figure_bytes(figure, path))
    except Failure as error:
        log.say(f"Warning: {error.message}")


def fit(
    trainer: Trainer,
    guard: Guard,
    log: RunLog,
    folder: RunFolder,
    stop: Stop,
    neighbours: Neighbours | None = None,
) -> None:
    """Trains to `train.updates`, or until a stop is requested; Failure where it keeps diverging."""
    train, processes = trainer.config.train, trainer.processes
    picture_every = math.ceil(train.updates / train.pictures) if train.pictures else math.inf
    while trainer.update < train.updates and not stop.requested:
        if guard.is_exhausted:
            raise Failure(advice_after_divergence(guard, folder))
        before = trainer.random_state()
        try:
            x, y = trainer.next_batch()
            chains = trainer.move_chains(x)  # None for models without chains
        except ChainsCutShort:
            trainer.undo_update(before)
            if trainer.is_finite():
                folder.save(guard.snapshot(trainer), guard, log)
            break
        metrics = trainer.learn(x, y, chains)  # stay on the device
        guard.observe(metrics)
        log.count_update(trainer, metrics, len(guard.rollbacks))

        update = trainer.update
        last = update == train.updates
        regular = update % train.checkpoint_every == 0
        checking = last or regular or update % guard.settings.every == 0
        reason = guard.verdict(trainer.model) if checking else None
        score = {}
        if neighbours and not reason and (last or update % train.evaluate_every == 0):
            score = neighbours.score(trainer)
        if last or reason or score or update % train.log_every == 0:
            log.row(trainer, metrics, len(guard.rollbacks) + bool(reason), score)
        if reason:
            snapshot = guard.roll_back(trainer, reason)
            folder.save(snapshot, guard, log)
            log.say(f"update {update}: {reason}; back to update {trainer.update}")
            continue
        if checking or not (trainer.cuda and processes.count > 1):  # else a wait for the device
            stop.agree(trainer.device)
        if last or regular or (stop.requested and trainer.is_finite()):
            snapshot = guard.accept(trainer) if regular else guard.snapshot(trainer)
            folder.save(snapshot, guard, log)
            folder.save_curves(log, at_once=last or stop.requested)
        if update % picture_every == 0 or (last and train.pictures):
            folder.save_picture(update, trainer.picture(), log)


def advice_after_divergence(guard: Guard, folder: RunFolder) -> str:
    """What happened, and a command that begins anew from the last good state at a lower rate."""
    last, path = guard.rollbacks[-1], folder.checkpoint
    rate = folder.config.train.rate * 0.5 ** (guard.halvings + 1)
    command = ["python", "cebm.py", "train", "--preset", folder.preset]
    for setting in settings_over(folder.preset, folder.config):
        if not setting.startswith("train.rate="):
            command += ["--set", setting]
    command += ["--set", f"train.rate={rate:.3g}", "--init-from", as_argument(path)]
    command += ["--out", as_argument(f"{folder.path}-calmer"), *folder.data_option]
    return (
        f"diverged {len(guard.rollbacks)} times, last at update {last['update']}: {last['why']}. "
        f"{path} is good, of update {last['to']}. From there at a lower train.rate (more "
        f"chains.steps may help too):\n  {shlex.join(command)}"
    )


def as_argument(path: Path | str) -> str:
    """A path as it may be typed, also if it begins with a dash."""
    return f"./{path}" if str(path).startswith("-") else str(path)


def settings_over(preset: str, config: Config) -> list[str]:
    """The KEY=VALUE settings that make a preset into `config`."""
    names = [f"model.name={config.model.name}", f"data.name={config.data.name}"]
    usual = as_settings(compose(preset, names))  # the names bring their own recipes
    over = [setting for setting in names if setting not in as_settings(compose(preset))]
    return over + [setting for setting in as_settings(config) if setting not in usual]


def as_settings(config: Config) -> list[str]:
    """Every value as KEY=VALUE."""
    return [f"{key}={plain(value)}" for key, value in flatten(asdict(config)).items()]


def plain(value: object) -> str:
    """A value as it is typed after --set."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()


def differences(old: Config, new: Config) -> dict[str, str]:
    """What differs: SECTION.KEY -> "(old, now new)"."""
    before, after = flatten(asdict(old)), flatten(asdict(new))
    return {
        key: f"({plain(before[key])}, now {plain(after[key])})"
        for key in after
        if before[key] != after[key]
    }


def obstacles_to_resuming(old: Config, new: Config) -> dict[str, str]:
    """Differences that make another run.

    Settings of speed and of what is shown do not, nor does a longer run if no schedule depends on
    its length.
    """
    differing = differences(old, new)
    harmless = ["train.compile", "train.threads", "train.log_every", "train.pictures"]
    if old.train.evaluate_every and new.train.evaluate_every:
        harmless.append("train.evaluate_every")
    if new.data.skip_unreadable:  # all could be read when the run began
        harmless.append("data.skip_unreadable")
    flat = all(c.train.decay == "none" and not c.chains.final_steps for c in (old, new))
    if flat and old.train.updates < new.train.updates:
        harmless.append("train.updates")
    return {key: how for key, how in differing.items() if key not in harmless}


@contextmanager
def claim_folder(folder: Path):
    """Makes a run folder and keeps a second `train` out of it; removes drafts of killed runs."""
    from filelock import FileLock, Timeout  # comes with torch

    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        require_writable_folder(folder)
    except OSError as error:
        reason = error.strerror
        raise Failure(f"cannot write to {folder}: {reason}; choose another --out") from error
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Failure(f"{folder} is in use by another `train`; choose another --out") from None
    except (NotImplementedError, OSError) as error:  # file systems without locks
        click.echo(f"Warning: {folder} cannot be locked ({error}); start no other `train` there")
    try:
        for draft in [*folder.glob(".*.draft"), *folder.glob("samples/.*.draft")]:
            draft.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def require_same_run(state: Checkpoint, config: Config, path: Path) -> None:
    """Failure where the checkpoint in a run folder is of other settings than the command's."""
    differing = obstacles_to_resuming(parse_config(state["config"]), config)
    if differing:
        listed = ", ".join(f"{key} {how}" for key, how in differing.items())
        raise Failure(
            f"{path} has other settings, {listed}: use another --out, and to go on from this state "
            f"there --init-from {shlex.quote(str(path))}"
        )


@dataclass(frozen=True)
class Start:
    """What a run starts from: nothing, its own checkpoint, or another run's (--init-from)."""

    preset: str
    origin: str = ""
    path: Path | None = None  # of the checkpoint
    state: Checkpoint | None = None
    branches: bool = False  # it is another run's

    def precision(self, config: Config, device) -> str:
        """float32 or bfloat16; a run keeps what it began with, also on another machine."""
        if config.train.precision != "auto":
            return config.train.precision
        if self.state and not self.branches and "precision" in self.state:
            return self.state["precision"]
        return "bfloat16" if sampling.bfloat16_pays(device) else "float32"


def require_own_folder(config: Config, folder: Path) -> None:
    """Failure where a folder without a checkpoint has a log or a configuration of something else.

    A run that was killed before its first checkpoint leaves a log that is short, and the same
    configuration.
    """
    written, log = folder / "config.yaml", folder / "log.csv"
    if written.exists():
        own = written.read_bytes() == as_yaml(asdict(config)).encode()
    else:
        own = not log.exists()
    if own and log.exists():
        rows = log.read_text(errors="replace").split("\n")[:-1]  # whole ones
        last = rows[-1].partition(",")[0] if rows else ""
        own = not last.isdecimal() or int(last) <= config.train.checkpoint_every
    if not own:
        raise Failure(
            f"{folder} has no ckpt.pt, but a config.yaml or log.csv that is not of this run: "
            "choose another --out"
        )


def find_start(
    config: Config, preset: str, path: Path, init_from: Path | None, classes: list[str] | None
) -> Start:
    """Where a run starts whose checkpoint belongs at `path`; `classes` are those of a folder."""
    if path.exists():
        state = load_checkpoint(path)
        known = state.get("classes")
        if known and classes and known != classes:
            before, now = (", ".join(names) or "none" for names in (known, classes))
            raise Failure(
                f"{path} was trained on {state['data_dir']} with the classes {before}; now they "
                f"are {now}: use another --out"
            )
        require_same_run(state, config, path)
        if state["format"] != FORMAT:
            raise Failure(
                f"{path} was begun by an earlier version, whose random numbers were others: go on "
                f"from its state in another --out, with --init-from {shlex.quote(str(path))}"
            )
        origin = state.get("origin", "")
        if init_from and f" of {init_from} (" not in origin:
            raise Failure(f"{path} was not begun from {init_from}: choose another --out")
        return Start(state["preset"], origin, path, state)
    require_own_folder(config, path.parent)
    if init_from:
        state = load_checkpoint(init_from)
        if state["updates"] >= config.train.updates:
            raise Failure(
                f"{init_from} has made {state['updates']} updates already: set train.updates, "
                f"{config.train.updates}, to a larger number"
            )
        return Start(preset, branch_origin(state, config, init_from), init_from, state, True)
    return Start(preset)


def branch_origin(state: Checkpoint, config: Config, path: Path) -> str:
    """A line on what a run branches off and what it changes; model and seed have to stay."""
    differing = differences(parse_config(state["config"]), config)
    for key in ("model.name", "train.seed"):
        if key in differing:
            raise Failure(f"--init-from {path}: {key} {differing[key]} has to stay")
    origin = f"update {state['updates']} of {path} ({state['preset']})"
    if differing:
        origin += "; " + ", ".join(f"{key} {how}" for key, how in differing.items())
    return origin


@contextmanager
def fitting_checkpoint(state: Checkpoint, trainer: Trainer, path: Path):
    """Failure where a part of the checkpoint read from `path` does not fit the trainer."""
    try:
        before, now = len(state["generators"]), trainer.processes.count
        if before != now:
            raise Failure(
                f"{path} is of a run of {before} processes, now there are {now}: resume it with "
                f"torchrun --nproc-per-node={before}, or choose another --out"
            )
        yield
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, KeyError):
            reason = f"{error.args[0]} is missing, as in files that hold a model only"
        raise Failure(
            f"{path} cannot be resumed, a part is missing or of another shape or device "
            f"({reason:.200}): begin anew in another --out"
        ) from error


def resume_run(trainer: Trainer, guard: Guard, log: RunLog, state: Checkpoint, path: Path) -> None:
    """Goes on from a run's own checkpoint, read from `path`."""
    with fitting_checkpoint(state, trainer, path):
        # All of them have to fit; the last one stays.
        for snapshot in (state["good"], state["candidate"], state):
            trainer.load_state_dict(snapshot)
        guard.resume(state)
        log.resume(state)
    trainer.halvings = guard.halvings


def branch_off(trainer: Trainer, guard: Guard, state: Checkpoint, path: Path) -> None:
    """Begins a run in the state of another one's checkpoint, read from `path`."""
    with fitting_checkpoint(state, trainer, path):
        trainer.load_state_dict(state)
    guard.begin(trainer.state_dict())


def load_training_images(config: Config, data_dir: str, processes: Processes):
    """The training set; the first of several processes reads, or downloads, before the others."""
    if processes.rank > 0:
        torch.distributed.barrier()
    images, labels = load_images(config, "train", data_dir)
    if processes.rank == 0 and processes.count > 1:
        torch.distributed.barrier()
    if len(images) < config.train.batch:
        raise Failure(
            f"train.batch = {config.train.batch}: there are {len(images)} training images"
        )
    return images, labels


def train_run(
    config: Config,
    preset: str,
    folder_path: Path,
    init_from: Path | None,
    data_dir: str,
    device,
    processes: Processes,
) -> int:
    """Trains into a folder, from its checkpoint if it has one: exit status 0 or 130."""
    check(config, processes.count)
    require_memory(config, device, training=True)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    classes = folder_classes(config, data_dir)
    asked = config, preset, folder_path / "ckpt.pt", init_from, classes
    find_start(*asked)  # refuses what does not fit before images are read
    images, labels = load_training_images(config, data_dir, processes)
    first = processes.rank == 0
    claim = claim_folder(folder_path) if first else nullcontext()
    with claim, Stop(processes) as stop:
        start = find_start(*asked)  # anew: another `train` may have ended here meanwhile
        precision = start.precision(config, device)
        folder = RunFolder(
            path=folder_path,
            config=config,
            preset=start.preset,
            origin=start.origin,
            precision=precision,
            device=device.type,
            data_dir=data_dir,
            writes=first,
            classes=classes,
        )
        trainer = Trainer(config, images, labels, device, precision, processes)
        trainer.stop = stop
        guard = Guard(config, trainer.state_dict(), processes)
        log = RunLog(folder_path / "log.csv", stop, config, first)
        take_up(start, trainer, guard, log, folder)
        folder.begin()
        neighbours = find_neighbours(config, (images, labels), data_dir, device, log.say)
        announce(trainer, folder, log)
        log.begin(trainer.update)
        try:
            fit(trainer, guard, log, folder, stop, neighbours)
        finally:
            log.end()
        log.say(farewell(trainer, folder, len(guard.rollbacks)))
        return 0 if trainer.update >= config.train.updates else 130


def take_up(start: Start, trainer: Trainer, guard: Guard, log: RunLog, folder: RunFolder) -> None:
    """Brings all of them to the checkpoint that a run starts from, if there is one."""
    if not start.state:
        return
    if start.branches:
        branch_off(trainer, guard, start.state, start.path)
        folder.save(guard.good, guard, log)  # so that the same command resumes
    else:
        resume_run(trainer, guard, log, start.state, start.path)
    how = "beginning" if start.branches else "resuming"
    log.say(f"{how} after update {trainer.update} of {start.path}")


def announce(trainer: Trainer, folder: RunFolder, log: RunLog) -> None:
    """Says what the run is on, how large it is and what it is going to do."""
    config, precision = folder.config, folder.precision
    if precision == "bfloat16" and not sampling.bfloat16_pays(trainer.device):
        log.say(
            "this processor only emulates bfloat16, many times slower than float32: --set "
            "train.precision=float32, for a run that has begun with --init-from in a new --out"
        )
    if data.DATASETS[config.data.name].classes is None:
        log.say(data.describe_folder(Path(folder.data_dir), folder_options(config)))
    if trainer.update >= config.train.updates:
        log.say("nothing to do: the run has made its updates; a larger train.updates goes on")
        return
    log.say(sizes(trainer))
    log.say(plan(config, precision))


def plan(config: Config, precision: str) -> str:
    """A line on what is going to happen."""
    train, chains = config.train, config.chains
    steps = ""
    if models.MODELS[config.model.name].chains:
        last = f" to {chains.final_steps}" if chains.final_steps else ""
        steps = f", chains of {chains.steps}{last} steps"
    return f"{train.updates} updates of {train.batch} images{steps}, in {precision}"


def sizes(trainer: Trainer) -> str:
    """A line on how large model, buffer and checkpoints are, in 10^6 bytes."""
    model = sum(tensor.nbytes for tensor in trainer.model.state_dict().values())
    chains = 0 if trainer.buffer is None else trainer.buffer.images.nbytes * trainer.processes.count
    copies = 4 if trainer.average is not None else 3  # with Adam's two moments
    checkpoint = 2 * (copies * model + chains)  # the good state and the newest
    parts = [f"model {megabytes(model)}"]
    if chains:
        parts.append(f"replay buffer {megabytes(chains)}")
    return ", ".join([*parts, f"checkpoint {megabytes(checkpoint)} (up to half as much again)"])


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def read_curves(text: str, config: Config) -> dict[str, list[float]]:
    """The columns of a log, empty cells as NaN, and the learning rate."""
    rows = [row for row in csv.DictReader(text.splitlines()) if None not in row.values()]
    columns = (
        {name: [float(row[name]) if row[name] else math.nan for row in rows] for name in rows[0]}
        if rows
        else {"update": [], "rollbacks": []}
    )
    columns["rate"] = [
        learning_rate(round(update), config.train, max(0, round(back) - config.guard.same_rate))
        for update, back in zip(columns["update"], columns["rollbacks"], strict=True)
    ]
    return columns


def farewell(trainer: Trainer, folder: RunFolder, rollbacks: int) -> str:
    """What to do after a run, or after an interruption."""
    path = as_argument(folder.checkpoint)
    if trainer.update < trainer.config.train.updates:
        if not folder.checkpoint.exists():
            return "interrupted; nothing was saved"
        return f"interrupted; the same command resumes from {path}"
    commands = ["export", "sample"]
    if trainer.config.data.classes > 1:
        commands.insert(0, "knn")
    lines = ["  " + shlex.join(["python", "cebm.py", command, path]) for command in commands]
    back = ""
    if rollbacks:
        back = f", after {rollbacks} rollback{'s' * (rollbacks > 1)}; a lower train.rate has fewer"
    return "\n".join([f"done: {path}{back}", "now try:", *lines])


# ------------------------------------------------------------------------------------- Commands


def in_torchrun() -> dict:
    """`torchrun`'s environment; ranks that others set, as schedulers do, are not ours."""
    return os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}


def start_processes(device) -> Processes:
    """Meets the other processes of `torchrun`, if it started this one."""
    rank, count = (int(in_torchrun().get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if count > 1:
        # DistributedDataParallel would import it later and keep the group for ever.
        importlib.import_module("torch.distributed.nn")
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
    return Processes(rank, count)


def parse_device(_context, _parameter, name: str):
    """A torch.device that works here, by its name; a GPU of `torchrun` is the process's own."""
    sampling.keep_freed_memory()
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # torch is loaded now
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(name)
        if device.type == "cuda":
            local = int(in_torchrun().get("LOCAL_RANK", 0))
            device = torch.device("cuda", local if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).tolist()
        return device
    except Exception as error:  # backends that are not there raise any kind
        kind, known = name.partition(":")[0], ("auto", "cpu", "cuda", "mps", "xpu")
        if kind == "gpu":
            hint = "; did you mean cuda?"
        elif kind in known:
            hint = f" cannot be used here ({first_line(error):.100}); --device cpu can"
        else:
            hint = nearest_word(kind, known)
        raise click.UsageError(f"--device {name}{hint}") from error


def refuse_empty(_context, parameter, value: str | None) -> str | None:
    """An empty name is an unset variable of a shell rather than a wish."""
    if value == "":
        raise click.UsageError(f"{parameter.opts[0]} is empty")
    return value


def refuse_unknown_preset(_context, _parameter, name: str) -> str:
    """Before torch is loaded, which takes seconds."""
    require_preset(name)
    return name


def refuse_words(_context, _parameter, words: tuple[str, ...]) -> None:
    """Of a preset, a folder or a setting without its option, says which one it may need."""
    if not words:
        return
    word = words[0]
    presets = difflib.get_close_matches(word, read_recipes()["presets"], n=1, cutoff=0.4)
    if "=" in word:
        meant = f"--set {word}"
    elif os.path.isdir(word):
        meant = f"--data-dir {word}"
    else:
        meant = f"--preset {presets[0]}" if presets else ""
    raise click.UsageError(f"unexpected {word}" + (f"; did you mean {meant}?" if meant else ""))


def refuse_wrong_settings(_context, _parameter, settings: tuple[str, ...]) -> tuple[str, ...]:
    """Before torch is loaded, which takes seconds."""
    for setting in settings:
        parse_value(*parse_setting(setting))
    return settings


def checkpoint_at(path: str) -> str:
    """`path`, or the checkpoint in it if it is a run folder."""
    inside = os.path.join(path, "ckpt.pt")
    return inside if os.path.isfile(inside) else path


class CheckpointPath(click.Path):
    """An existing checkpoint, or a run folder that has one."""

    def convert(self, value, parameter, context):
        return super().convert(checkpoint_at(value), parameter, context)


CHECKPOINT = partial(
    click.argument, type=CheckpointPath(exists=True, dir_okay=False), metavar="CKPT"
)
DATA_DIR = click.option(
    "--data-dir",
    callback=refuse_empty,
    help="Where data are, or are downloaded to.  [default: where they were in training, or data]",
)
SKIP_UNREADABLE = click.option(
    "--skip-unreadable", is_flag=True, help="Go on without images that cannot be read."
)
DEVICE = click.option("--device", default="auto", callback=parse_device, help="cpu, cuda or mps.")


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def out_option(name: str, **settings):
    """An option for the place of a result."""
    return click.option(name, metavar="FILE", **settings)


def table_options(command):
    """The options of commands that print a row a checkpoint."""
    for option in (
        DEVICE,
        SKIP_UNREADABLE,
        DATA_DIR,
        click.option("--markdown", "form", flag_value="markdown", help="For a README."),
        click.option("--json", "form", flag_value="json", help="For a program."),
        CHECKPOINT("checkpoints", nargs=-1, required=True, metavar="CKPT..."),
    ):
        command = option(command)
    return command


def say(text: str) -> None:
    """Prints a result; Failure where it cannot be."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Failure(f"cannot print: {error.strerror}") from error


@dataclass(frozen=True)
class Reader:
    """Reads the data of a checkpoint: `read("train")`, `read("test")` are images and labels."""

    config: Config
    data_dir: str
    classes: list[str] | None = None  # of a folder, when the model was trained

    def __call__(self, split: str) -> tuple[Tensor, Tensor]:
        self.require_same_classes()
        return load_images(self.config, split, self.data_dir)

    def with_paths(self, split: str) -> tuple[Tensor, Tensor, list[Path] | None]:
        """Images, labels and, of a folder, the images' files."""
        settings, options = self.config.data, folder_options(self.config)
        if data.DATASETS[settings.name].classes is not None:
            return *self(split), None
        self.require_same_classes()
        files = data.read_folder_files(split, Path(self.data_dir), settings.image, options)
        require_known_labels(files[1], split, settings, self.data_dir)
        return files

    def require_same_classes(self) -> None:
        """Failure where a folder has other classes than in training."""
        if self.classes is not None and (names := self.names()) != self.classes:
            raise Failure(
                f"{self.data_dir} has the classes {', '.join(names)}; when the model was trained "
                f"they were {', '.join(self.classes)}. (`export --images` takes any images)"
            )

    def names(self) -> list[str]:
        """What the labels stand for."""
        settings = self.config.data
        options = folder_options(self.config)
        return data.class_names(settings.name, self.data_dir, settings.classes, options)


def reader_of(config: Config, state: Checkpoint, data_dir: str | None, skip_unreadable: bool):
    """A `Reader` for the data of a checkpoint, where they are and how the command wants them."""
    if skip_unreadable:
        config = replace(config, data=replace(config.data, skip_unreadable=True))
    return Reader(config, data_place(state, data_dir), state.get("classes"))


def print_rows(
    checkpoints, form: str | None, data_dir: str | None, skip_unreadable: bool, device, figures
) -> None:
    """Rows for each checkpoint: what it is, then `figures(model, config, read)`, one or several.

    Rows that are done are printed also when a later checkpoint fails.
    """
    rows = []
    try:
        for path in checkpoints:
            model, config, state = load_model(path, device)
            row = {"checkpoint": path, "model": config.model.name, "data": config.data.name}
            row["updates"] = state["updates"]
            read = reader_of(config, state, data_dir, skip_unreadable)
            more = figures(model, config, read)
            rows += [row | own for own in (more if isinstance(more, list) else [more])]
    finally:
        if rows:
            say(json.dumps(rows) if form == "json" else table(rows, form == "markdown"))


def table(rows: list[dict], markdown: bool = False) -> str:
    """Rows as aligned text or as Markdown. Lists are left out, missing values show as "-"."""
    columns = list(dict.fromkeys(k for row in rows for k, v in row.items() if type(v) is not list))
    cells = [columns]
    for row in rows:
        values = (row.get(key, "-") for key in columns)
        cells.append([f"{v:.2f}" if isinstance(v, float) else str(v) for v in values])
    if markdown:
        cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in cells]
        cells.insert(1, ["---"] * len(columns))
        return "\n".join("| " + " | ".join(row) + " |" for row in cells)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def options_in_use() -> set[str]:
    """The options that this command was given, as they are typed."""
    context = click.get_current_context()
    return {
        parameter.opts[0]
        for parameter in context.command.params
        if context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    }


def refuse_unusable_options(name: str) -> None:
    """UsageError where the command was given an option that the model has no use for."""
    kind, used = models.MODELS[name], options_in_use()
    chains = not kind.decoder
    usable = {
        "--refine": kind.latent_energy,
        "--given": kind.posterior,
        "--steps": chains,
        "--from": chains,
        "--trace": chains,
    }
    if "--trace" in used:
        usable |= {"--given": False, "--from": False}
    if "--trace" in used and chains:
        name += " with --trace"
    if "--given" in used and kind.posterior and "--trace" not in used:
        name += " with --given"
        # Its chains start from noise, as many as images; one sweep of Gibbs draws from p(x | z).
        usable |= {"--count": False, "--from": False}
        usable["--steps"] = chains and kind.chains != "gibbs"
    for option, is_usable in usable.items():
        if option in used and not is_usable:
            raise click.UsageError(f"{option} is not for {name}")


class Commands(click.Group):
    """Ends after Ctrl-C with status 130, as a shell does."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            context.exit(130)


HELP = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=Commands, context_settings=HELP)
def main():
    """Conjugate energy-based models. Start with `python cebm.py train`, a matter of minutes."""


@main.command()
@click.argument("words", nargs=-1, metavar="", callback=refuse_words, expose_value=False)
@click.option("--preset", default="quickstart", callback=refuse_unknown_preset, help="See `show`.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    callback=refuse_wrong_settings,
    metavar="KEY=VALUE",
    help="Change a value of the preset, say train.rate=3e-4; may be repeated.",
)
@click.option("--out", type=click.Path(file_okay=False), help="Run folder.  [default: runs/PRESET]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="The same as --set train.seed=N.")
@click.option(
    "--init-from",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="CKPT",
    help="Begin in the state of another run, under the settings given here.",
)
@DATA_DIR
@SKIP_UNREADABLE
@DEVICE
def train(preset, settings, out, seed, init_from, data_dir, skip_unreadable, device):
    """Train, or resume where the run folder's checkpoint stopped.

    Example: python cebm.py train --preset cebm-fmnist --set chains.steps=20
    """
    if seed is not None:
        settings = (*settings, f"train.seed={seed}")
    if skip_unreadable:
        settings = (*settings, "data.skip_unreadable=true")
    data_dir = data_dir or "data"
    config = count_classes(compose(preset, settings), data_dir)
    folder = Path(out or f"runs/{preset}")
    if data.DATASETS[config.data.name].classes is None:
        require_outside(folder, Path(data_dir))
    processes = start_processes(device)
    try:
        status = train_run(config, preset, folder, init_from, data_dir, device, processes)
    except torch.OutOfMemoryError as error:
        raise Failure(
            f"{first_line(error)} Choose a smaller train.batch or chains.buffer"
        ) from error
    sys.exit(status)


@main.command()
@CHECKPOINT("checkpoint")
@click.option(
    "--from",
    "source",
    type=click.Choice(["buffer", "noise"]),
    default="buffer",
    help="Where chains start; a buffer has at most its own number.",
)
@click.option(
    "--given",
    callback=refuse_empty,
    metavar="N or PATH",
    help="Draw from p(x | z), z the latents of N test images, or of your images at PATH.",
)
@click.option("--steps", type=click.IntRange(0), help="Of the chains.  [default: as in training]")
@click.option(
    "--refine",
    type=click.IntRange(0),
    metavar="STEPS",
    help="A GAN's latents first take STEPS Langevin steps on -log p(z) - logit D(G(z)).",
)
@click.option(
    "--trace",
    type=click.IntRange(2, 100),
    metavar="K",
    help="Show chains from noise at K moments of their way, a row a chain (8, or --count).",
)
@click.option("--count", type=click.IntRange(1, 1000), default=64)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0)
@out_option("--out", default="samples.png", help="A .png, .jpg, .pdf or .svg.")
@DATA_DIR
@SKIP_UNREADABLE
@DEVICE
def sample(
    checkpoint,
    source,
    given,
    steps,
    refine,
    trace,
    count,
    seed,
    out,
    data_dir,
    skip_unreadable,
    device,
):
    """Draw a grid of samples: chains, or a generator's images.

    Example: python cebm.py sample runs/quickstart/ckpt.pt --from noise
    """
    require_writable(out, evaluate.PICTURES, inputs=[checkpoint])
    if given is not None:
        require_outside(out, Path(given))
    model, config, state = load_model(checkpoint, device)
    refuse_unusable_options(config.model.name)
    originals = None
    if given is not None:
        place = data_place(state, data_dir)
        originals = find_originals(config, given, place, skip_unreadable).to(device)
    generator = torch.Generator(device).manual_seed(stream_seed("sample", seed))
    columns = None if originals is None else min(len(originals), 16)
    # As in training, where that is faster here too.
    bfloat16 = state.get("precision") == "bfloat16" and sampling.bfloat16_pays(device)
    if trace:
        count = count if "--count" in options_in_use() else 8
        images, story = trace_chains(model, config, count, steps, trace, generator, bfloat16)
        columns = trace
    elif models.MODELS[config.model.name].decoder:
        images, story = decode(model, config, originals, count, refine, seed, generator)
    else:
        start, x = chain_start(config, state, source, originals, count, seed, generator)
        images, end = run_chains(model, config, originals, x, steps, generator, bfloat16)
        story = f"{len(x)} chains from {start}, {end}"
    if wrong := int((~images.flatten(1).isfinite().all(1)).sum()):
        raise Failure(f"{wrong} of {len(images)} samples are not finite: the weights have diverged")
    say(story)
    shown = images if originals is None else beneath(originals, images, columns)
    caption = f"{config.model.name}, {config.data.name}, {state['updates']} updates: {story}"
    figure = evaluate.grid_figure(shown, columns, caption)
    write_atomically(Path(out), evaluate.figure_bytes(figure, out))
    say(out)


def find_originals(config: Config, given: str, data_dir: str, skip_unreadable: bool) -> Tensor:
    """The images of --given, normalised (N, C, H, W): so many test images, or those of a path.

    Test images are evenly spaced, since a folder's are sorted by class.
    """
    most = 1000
    if given.isdecimal() and 1 <= int(given) <= most:
        parts = load_images(config, "test", data_dir)[0].tensor_split(int(given))
        return data.normalise(torch.cat([part[:1] for part in parts]))
    if given.isdecimal():
        raise click.UsageError(f"--given {given}: from 1 to {most} images")
    if not os.path.exists(given):
        raise click.UsageError(f"--given {given} is neither a number of images nor a path")
    paths = data.find_files([Path(given)])
    if len(paths) > most:
        raise Failure(f"--given {given} has {len(paths)} images, more than {most}")
    images, _ = data.read_images(paths, config.data.image, skip_unreadable)
    return data.normalise(images)


def beneath(originals: Tensor, images: Tensor, columns: int) -> Tensor:
    """Rows of `columns` originals, each with the row of their images beneath it."""
    blank = -torch.ones_like(originals[:1])
    rows = []
    for pair in zip(originals.split(columns), images.split(columns), strict=True):
        for row in pair:
            rows += [row, blank.expand(columns - len(row), *blank.shape[1:])]
    return torch.cat(rows)


def trace_chains(
    model, config: Config, count: int, steps: int | None, moments: int, generator, bfloat16: bool
):
    """`count` chains from noise, each at evenly spaced moments from its start to its end.

    Images (count * moments, C, H, W), chain by chain, and a line on them.
    """
    total = (config.chains.final_steps or config.chains.steps) if steps is None else steps
    times = [round(total * i / (moments - 1)) for i in range(moments)]
    x = sampling.uniform((count, *config.data.image), generator)
    sampler = models.MODELS[config.model.name].chains or "langevin"
    states = [x]
    for earlier, later in itertools.pairwise(times):
        move = sampling.mover(
            sampler, model, model.energy, later - earlier, config.chains, generator, bfloat16
        )
        x = move(x) if later > earlier else x
        states.append(x)
    images = torch.stack(states, 1).flatten(0, 1)
    return images, f"{count} chains from noise after {', '.join(map(str, times))} steps"


def decode(model, config: Config, originals, count: int, refine: int | None, seed: int, generator):
    """A decoder's images of z from p(z), or of the latents of `originals`: images, a line on it."""
    device = generator.device
    if originals is not None:
        z, story = model.represent(originals).detach(), "decoded latents of the images above"
    else:
        with evaluate.seeded(stream_seed("prior", seed), device):
            z, story = model.prior.sample(count).detach(), "decoded draws from p(z)"
    if refine:
        chains = config.chains
        z = sampling.langevin(
            model.latent_energy, z, refine, chains.step_size, chains.noise_std, generator
        )
        story += f" after {refine} Langevin steps on E(z)"
    return model.decode(z).detach(), story


def chain_start(config: Config, state, source: str, originals, count: int, seed: int, generator):
    """Where chains start: what it is called, images (N, C, H, W)."""
    buffer = state.get("buffer")
    if originals is not None and models.MODELS[config.model.name].chains == "gibbs":
        return "the images above", originals
    if originals is not None:
        count = len(originals)
    elif source == "buffer" and buffer is not None:
        shuffle = torch.Generator().manual_seed(stream_seed("buffer", seed))
        order = torch.randperm(len(buffer), generator=shuffle)
        return "the buffer", buffer[order[:count]].to(generator.device)
    elif source == "buffer":
        say("the checkpoint has no replay buffer: starting from noise")
    return "noise", sampling.uniform((count, *config.data.image), generator)


def run_chains(
    model, config: Config, originals, x: Tensor, steps: int | None, generator, bfloat16: bool
):
    """Chains on E(x), or on E(x, z) of the latents z of `originals`: images, a line on them."""
    kind, energy = models.MODELS[config.model.name], model.energy
    if originals is not None:
        energy = partial(model.joint_energy, z=model.represent(originals).detach())
        steps = 1 if kind.chains == "gibbs" else steps
    if steps is None:
        steps = config.chains.final_steps or config.chains.steps
    sampler = kind.chains or "langevin"  # HDGE has an energy, though no chains in training
    end = sampling.mover(sampler, model, energy, steps, config.chains, generator, bfloat16)(x)
    joint = "" if originals is None else " on E(x, z), z the latents of the images above"
    return end, (
        f"{steps} steps{joint}: mean energy {energy(x).mean().item():.4g} -> "
        f"{energy(end).mean().item():.4g}, pixels {end.min():.3g} to {end.max():.3g}"
    )


@main.command()
@table_options
@click.option("--limit", type=click.IntRange(1), help="At most N training images, evenly spaced.")
@out_option("--plot", help="The last CKPT's confusion matrix, a .png, .jpg, .pdf or .svg.")
def knn(checkpoints, form, data_dir, skip_unreadable, device, limit, plot):
    """Exact 1-nearest-neighbour test accuracy (supplement E.1), in percent.

    On the latents and on whitened latents (principal directions brought to one scale), of the
    model and of the same network untrained; on pixels; a classifier's own accuracy too.

    Example: python cebm.py knn runs/quickstart/ckpt.pt
    """
    require_writable(plot, evaluate.PICTURES, inputs=checkpoints)
    last = {}

    def figures(model, config, read):
        require_classes(config)
        train, test = read("train"), read("test")
        step = -(-len(train[0]) // (limit or len(train[0])))
        train = [part[::step] for part in train]
        untrained = new_model(config, device).eval()
        row = evaluate.knn_row(model, untrained, train, test, config.data.classes, device)
        if models.MODELS[config.model.name].labels:
            row["accuracy"] = evaluate.accuracy(model, test, device)
        last.update(row=row, config=config, names=read.names())
        return row

    print_rows(checkpoints, form, data_dir, skip_unreadable, device, figures)
    if last and (advice := evaluate.advice_on_latents(last["row"])):
        click.echo(advice, err=True)
    if plot:
        row, settings, names = last["row"], last["config"].data, last["names"]
        title = f"{last['config'].model.name} on {settings.name}, 1-NN {row['latent']:.2f} %"
        figure = evaluate.confusion_figure(torch.tensor(row["confusion"]), names, title)
        write_atomically(Path(plot), evaluate.figure_bytes(figure, plot))


def require_classes(config: Config) -> None:
    """Failure where there are no labels to compare with."""
    if config.data.classes < 2:
        raise Failure(
            "this needs labels, and the model was trained on images of one class, or without. "
            "`export`, `sample` and `ood` work; else train anew, on a folder of images a class"
        )


@main.command()
@table_options
def probe(checkpoints, form, data_dir, skip_unreadable, device):
    """Test accuracy of logistic regression on the latents, in percent.

    With 1, 10, 100 (if there are as many) and all labels a class; mean and deviation of ten draws.
    "scaled" latents are centred and all divided by one number, so that their mean variance is 1;
    the penalty of the regression weighs more on small latents.

    Example: python cebm.py probe runs/quickstart/ckpt.pt
    """

    def figures(model, config, read):
        require_classes(config)
        classes = config.data.classes
        return evaluate.probe_row(model, read("train"), read("test"), classes, device)

    print_rows(checkpoints, form, data_dir, skip_unreadable, device, figures)


@main.command()
@table_options
@click.option(
    "--against",
    multiple=True,
    metavar="DATA or PATH",
    help="Another data set, or your images; may be repeated. Uniform noise and constant images "
    "always.",
)
def ood(checkpoints, form, data_dir, skip_unreadable, device, against):
    """How well the model tells its test set from other data: AUROC, AUPR and FPR95, in percent.

    By log p(x) up to a constant, that is -E(x) or a VAE's ELBO, and by minus its gradient's norm.
    FPR95 is the share of the other data that passes where 95 % of the test set does. By chance
    AUROC is 50, FPR95 95 and AUPR the share of the test set among all images, so that AUPR says
    little where the others are few.

    Example: python cebm.py ood runs/cebm-fmnist/ckpt.pt --against mnist
    """
    for name in against:
        if name not in data.DATASETS and not os.path.exists(name):
            near = nearest_word(name, set(data.DATASETS) - {"folder"})
            raise click.UsageError(f"--against {name}: there is no such file or folder{near}")

    def figures(model, config, read):
        if not models.MODELS[config.model.name].density:
            raise Failure(f"{config.model.name} has no density of images to score with")
        shape = config.data.image
        others = {}
        for name in against:
            if name in data.DATASETS:
                is_folder = data.DATASETS[config.data.name].classes is None
                place = data_dir or ("data" if is_folder else read.data_dir)
                others[name] = data.load(name, "test", place, shape)[0]
            else:
                paths = data.find_files([Path(name)])
                others[name] = data.read_images(paths, shape, skip_unreadable)[0]
        return evaluate.ood_rows(model, read("test")[0], others, device)

    print_rows(checkpoints, form, data_dir, skip_unreadable, device, figures)


@main.command()
@CHECKPOINT("checkpoint")
@click.option("--split", type=click.Choice(["train", "test"]), default="test")
@click.option(
    "--images",
    multiple=True,
    type=click.Path(exists=True, path_type=Path),
    metavar="PATH",
    help="Your images in place of the data set's: a file or a folder; may be repeated.",
)
@click.option("--whiten", is_flag=True, help="Whitened latents too, as `knn` compares them.")
@out_option("--map", help="A picture of the means too: UMAP if installed, else PCA.")
@out_option("--out", default="latents.npz", help="An .npz or .csv.")
@DATA_DIR
@SKIP_UNREADABLE
@DEVICE
def export(checkpoint, split, images, whiten, map, out, data_dir, skip_unreadable, device):
    """Write each image's latent mean, std and energy (where the model has them) to a file.

    The mean is the vector that `knn` uses, the std that of the whole posterior. With them go the
    labels and, where these have names, `classes`; of --images the `path` of each. --whiten adds the
    means along the principal directions of the training images' means, brought to one scale.

    Example: python cebm.py export runs/quickstart/ckpt.pt --map map.png
    """
    if images and "--split" in options_in_use():
        raise click.UsageError("--split is of the data set, not of --images")
    require_writable(out, [".npz", ".csv"], inputs=[checkpoint, *images])
    require_writable(map, evaluate.PICTURES, inputs=[checkpoint, *images])
    for folder in images:
        require_outside(map, folder)
    model, config, state = load_model(checkpoint, device)
    if images:
        chosen = chosen_images(config, images, skip_unreadable)
    else:
        chosen = split_images(reader_of(config, state, data_dir, skip_unreadable), split)
    arrays = evaluate.latents(model, chosen.pixels, device)
    if whiten:
        read = reader_of(config, state, data_dir, skip_unreadable)
        train = evaluate.in_batches(model.represent, read("train")[0], device, label="training set")
        _, whitened = evaluate.whiten(train.cpu(), torch.from_numpy(arrays["mean"]))
        arrays["whitened"] = whitened.numpy()
    arrays |= {name: evaluate.as_array(column) for name, column in chosen.columns.items()}
    content = evaluate.csv_bytes if out.lower().endswith(".csv") else evaluate.npz_bytes
    write_atomically(Path(out), content(arrays))
    say(f"{out}: " + ", ".join(f"{name} {array.shape}" for name, array in arrays.items()))
    if map:
        points, method = evaluate.plane(arrays["mean"])
        title = f"{config.model.name}, {chosen.source}, {checkpoint}"
        figure = evaluate.map_figure(points, chosen.groups.numpy(), chosen.names, title, method)
        write_atomically(Path(map), evaluate.figure_bytes(figure, map))
        say(f"{map}: {method}")


@dataclass(frozen=True)
class Exported:
    """Images whose latents go to a file, and what goes with them."""

    pixels: Tensor  # uint8 (N, C, H, W)
    groups: Tensor  # (N,), what a map colours them by
    names: list[str]  # of the groups
    source: str  # in words
    columns: dict[str, object]  # of the file


def chosen_images(config: Config, images: tuple[Path, ...], skip_unreadable: bool) -> Exported:
    """Those of --images; the map shows which of these paths a point is of."""
    groups = [data.find_files([path]) for path in images]
    paths = [path for group in groups for path in group]
    pixels, kept = data.read_images(paths, config.data.image, skip_unreadable)
    labels = torch.tensor([i for i, group in enumerate(groups) for _ in group])[kept]
    columns = {"path": [str(paths[i]) for i in kept]}
    return Exported(pixels, labels, [str(path) for path in images], "new images", columns)


def split_images(read: Reader, split: str) -> Exported:
    """Those of a split of a checkpoint's data, with labels where it has classes."""
    pixels, labels, paths = read.with_paths(split)
    names, columns = read.names(), {}
    if paths is not None:
        columns["path"] = [str(path) for path in paths]
    if names != [data.UNLABELLED]:
        columns["labels"] = labels.numpy()
    if names not in ([data.UNLABELLED], [str(label) for label in range(len(names))]):
        columns["classes"] = names  # numbers that are their own names need none
    return Exported(pixels, labels, names, f"{read.config.data.name} {split}", columns)


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@out_option("--out", default="curves.png", help="A .png, .jpg, .pdf or .svg.")
def curves(runs, out):
    """Draw the learning curves of runs over each other: folders, or checkpoints.

    Energies of data and chains, their gap, the chains' pixel range, the rate and 1-NN, if the run
    has scored it (train.evaluate_every). Dotted lines are rollbacks.

    Example: python cebm.py curves runs/quickstart
    """
    require_writable(out, evaluate.PICTURES, inputs=runs)
    columns = {name: find_curves(Path(name)) for name in runs}
    write_atomically(Path(out), evaluate.figure_bytes(evaluate.curves_figure(columns), out))
    say(out)


def find_curves(path: Path) -> dict[str, list[float]]:
    """What a run folder or a checkpoint logs."""
    if path.is_file():
        state = load_checkpoint(path)
        text, config = state.get("log", ""), parse_config(state["config"])
    else:
        try:
            tree = yaml.safe_load((path / "config.yaml").read_text())
            config = parse_config(with_newer_keys(tree))
            log = path / "log.csv"
            text = log.read_text(encoding="utf-8-sig") if log.exists() else ""
        except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
            raise Failure(f"{path} is no run folder ({first_line(error)})") from error
        except click.UsageError as error:
            raise Failure(f"{path}/config.yaml: {error.message}") from error
    try:
        columns = read_curves(text, config)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise Failure(f"the log of {path} is damaged ({first_line(error)})") from error
    if not columns["update"]:
        raise Failure(f"{path} has logged nothing yet")
    return columns


@main.command()
@click.argument("what", nargs=-1, metavar="[PRESET or CKPT]...")
def show(what):
    """List the presets, or print one's every key with its meaning, or say what a checkpoint is.

    Of two presets or checkpoints: the settings that differ.

    Example: python cebm.py show cebm-fmnist cebm-fmnist-fast
    """
    if len(what) > 2:
        raise click.UsageError("one preset or checkpoint to describe, or two to compare")
    if not what:
        say(list_presets())
    elif len(what) == 2:
        say(compare(*what))
    elif what[0] in read_recipes()["presets"]:
        say(explain(compose(what[0])))
    else:
        say(as_yaml(describe_checkpoint(known_checkpoint(what[0]))).rstrip())


def known_checkpoint(what: str) -> dict[str, object]:
    """The outline of a checkpoint; UsageError where there is neither a file nor a preset."""
    if not os.path.exists(what):
        near = nearest_word(what, read_recipes()["presets"])
        raise click.UsageError(f"{what!r} is neither a preset nor a file{near}")
    return read_outline(checkpoint_at(what))


def list_presets() -> str:
    """All presets under their models: data and variant, updates, time on a CPU and on a GPU."""
    book = read_recipes()
    groups: dict[str, list[list[str]]] = {name: [] for name in book["models"]}
    for name, entry in book["presets"].items():
        config, about = compose(name), book["data"][entry["data"]].get("about", "")
        about += "".join(f", {words}" for words in [entry.get("about")] if words)
        times = [typical_time(config, entry, machine) for machine in ("cpu", "gpu")]
        updates = f"{config.train.updates:,}"
        groups[entry["model"]].append([name, updates, *times, about])
    lines = []
    for model, rows in groups.items():
        lines.append(f"\n{model}: {book['models'][model].get('about', '')}")
        for name, updates, cpu, gpu, about in rows:
            lines.append(f"  {name:22} {updates:>7}  {cpu:>8}  {gpu:>8}  {about}")
    head = f"  {'preset':22} {'updates':>7}  {'CPU':>8}  {'GPU':>8}"
    return "\n".join([head, *lines, f"\n{book['timing']['about']}"])


def typical_time(config: Config, entry: dict, machine: str) -> str:
    """How long a preset takes on the machine that its steps were timed on, or "-"."""
    timing, trunk = (
        read_recipes()["timing"][machine],
        read_recipes()["data"][entry["data"]]["trunk"],
    )
    train, chains = config.train, config.chains
    if "seconds" in entry:  # of an update, measured for this preset
        seconds = entry["seconds"].get(machine)
        return "-" if seconds is None else roughly(train.updates * seconds)
    known = timing.get(entry["model"], {}).get(trunk)
    if known is None:
        return "-"
    update, step = known
    last = chains.final_steps or chains.steps
    mean = (
        chains.steps
        if last == chains.steps
        else (last - chains.steps) / math.log(last / chains.steps)
    )
    share = train.batch / 128
    if machine == "gpu":
        share = max(1, share)  # small batches wait for launches
    return roughly(train.updates * share * (update + mean * step))


def roughly(seconds: float) -> str:
    """A time to one digit or two: 40 min, 3 h, 12 days."""
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size or unit == "min":
            return f"{max(1, float(f'{seconds / size:.2g}')):g} {unit}"


def explain(config: Config) -> str:
    """A configuration as YAML, each key with its meaning."""
    lines = []
    for section, values in asdict(config).items():
        lines.append(f"{section}:")
        for key, value in values.items():
            setting = f"  {key}: {plain(value)}"
            lines.append(f"{setting:34}  # {all_keys()[f'{section}.{key}'].meaning}")
    return "\n".join(lines)


def compare(one: str, two: str) -> str:
    """The settings in which two presets or checkpoints differ."""
    configs = [
        compose(what)
        if what in read_recipes()["presets"]
        else parse_config(known_checkpoint(what)["config"])
        for what in (one, two)
    ]
    first, second = (flatten(asdict(config)) for config in configs)
    rows = [
        {
            "key": key,
            one: plain(first[key]),
            f"{two} ": plain(second[key]),
            "meaning": known.meaning,
        }
        for key, known in all_keys().items()
        if first[key] != second[key]
    ]
    return table(rows) if rows else "no difference"


def describe_checkpoint(outline: dict[str, object]) -> dict:
    """Its plain values, and how many numbers its model has."""
    plain = {key: outline[key] for key in About.__annotations__ if key in outline}
    if not plain.get("origin"):
        plain.pop("origin", None)
    weights = outline["model"].values()
    plain["numbers in the model"] = sum(math.prod(shape.sizes) for shape in weights)
    return plain


if __name__ == "__main__":
    if sys.stdout:  # names in other encodings than the terminal's
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
