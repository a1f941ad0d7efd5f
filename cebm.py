"""Train, sample and evaluate conjugate energy-based models: `python cebm.py COMMAND --help`.

The commands, the configuration, checkpoints and the training loop. torch is imported inside the
functions that need it, so that `--help` answers at once.
"""

import difflib
import fcntl
import io
import json
import math
import os
import platform
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path

import click
import yaml

FORMAT = 2  # of the checkpoint; another number is refused
DATA = "mnist", "fmnist", "cifar10", "svhn", "glyphs", "folder"
MODELS = ("cebm", "gmm-cebm", "igebm", "vae", "gmm-vae", "bigan", "gmm-bigan", "gan", "jem", "hdge",
          "rbm", "efh")


class Failure(click.ClickException):
    """Ends a command with one message on stderr and exit status 1."""


def _(low=None, high=None, choices=None, length=None):
    return field(metadata={"low": low, "high": high, "choices": choices, "length": length})


@dataclass(frozen=True)
class Data:
    name: str = _(choices=DATA)
    image: tuple[int, ...] = _(1, 512, length=3)  # channels, height, width
    classes: int = _(1, 10_000)
    extra: bool = _()  # SVHN: train on the extra images too
    noise_std: float = _(0, 10)  # Gaussian noise on training images, in pixels of [-1, 1]


@dataclass(frozen=True)
class Model:
    name: str = _(choices=MODELS)
    channels: tuple[int, ...] = _(1, 4096, length=4)
    hidden: int = _(1, 65_536)
    latent: int = _(1, 65_536)
    head: str = _(choices=("shared", "separate"))
    t2: str = _(choices=("square", "softplus"))
    l2: float = _(0, 1e6)
    l2_on: str = _(choices=("data", "both"))
    components: int = _(1, 10_000)  # of the Gaussian prior; 1 is N(0, I), more are learned
    prior_mean_std: float = _(0, 1e3)  # components start with means of this deviation
    prior_std: tuple[float, ...] = _(1e-3, 1e3, length=2)  # and deviations uniform between these
    represent: str = _(choices=("mixture", "component"))  # whose mean stands for an image
    likelihood: str = _(choices=("continuous_bernoulli", "bernoulli"))  # of a VAE
    visible_std: float = _(1e-3, 1e3)  # of an EFH's x given z, in pixels of [-1, 1]


@dataclass(frozen=True)
class Chains:
    steps: int = _(1, 100_000)
    step_size: float = _(0, 1e6)
    noise_std: float = _(0, 1e3)
    buffer: int = _(1, 10_000_000)
    reuse: float = _(0, 1)


@dataclass(frozen=True)
class Train:
    updates: int = _(1, 1_000_000_000)
    batch: int = _(1, 1_000_000)
    rate: float = _(0, 10)
    beta1: float = _(0, 0.999999)
    beta2: float = _(0, 0.999999)
    epsilon: float = _(1e-16, 1)
    warmup: int = _(0, 1_000_000_000)  # updates over which the rate rises from 0
    decay: str = _(choices=("none", "cosine"))  # of the rate, to 0 at the last update
    precision: str = _(choices=("auto", "float32", "bfloat16"))
    seed: int = _(0, 2**31 - 1)
    energy_bound: float = _(1, 1e30)  # training stops when a mean energy passes it
    log_every: int = _(1, 1_000_000_000)
    checkpoint_every: int = _(1, 1_000_000_000)
    pictures: int = _(0, 1000)  # of the chains, over the whole run


@dataclass(frozen=True)
class Config:
    data: Data
    model: Model
    chains: Chains
    train: Train


def _nearest(word, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def _checked(key: str, kind, value, low, high, choices, length):
    """`value` with the type and bounds of field `key`, or a usage error that names them."""
    if length and isinstance(value, (list, tuple)) and len(value) == length:
        return tuple(_checked(key, kind.__args__[0], v, low, high, choices, None) for v in value)
    if kind is float and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4, without a dot, as a word
    if type(value) is kind and (value in choices if choices else high is None
                                or low <= value <= high):  # false for NaN too
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false"}
    wanted = f"one of {', '.join(choices)}" if choices else (
        names.get(kind, f"a list of {length} numbers, each")
        + (f" from {low:,} to {high:,}" if high is not None else ""))
    raise click.UsageError(f"{key} = {value!r}: it has to be {wanted}")


def parse_config(tree, kind=Config, where: str = ""):
    """A plain dictionary of sections -> frozen `Config`; UsageError names what is wrong."""
    if not isinstance(tree, dict):
        raise click.UsageError(f"{where or 'the configuration'} has to be a section of keys")
    known = {f.name: f for f in fields(kind)}
    if unknown := [key for key in tree if key not in known]:
        raise click.UsageError(f"unknown key {where}{unknown[0]}{_nearest(unknown[0], known)}")
    if missing := [where + name for name in known if name not in tree]:
        raise click.UsageError(f"missing from the configuration: {', '.join(missing)}")
    config = kind(**{
        name: parse_config(tree[name], f.type, f"{where}{name}.") if is_dataclass(f.type)
        else _checked(where + name, f.type, tree[name], **f.metadata) for name, f in known.items()})
    if kind is Config:
        name, image, size = config.model.name, list(config.data.image), config.data.image[1:]
        draws = name.endswith(("vae", "gan"))
        if min(size) < 8 or (draws and size not in ((28, 28), (32, 32))):
            wanted = "28 x 28 or 32 x 32" if draws else "at least 8 x 8"
            raise click.UsageError(f"data.image = {image}: {name} needs {wanted} pixels")
        if config.train.batch > config.chains.buffer:
            raise click.UsageError(f"train.batch = {config.train.batch}: it must not exceed "
                                   f"chains.buffer = {config.chains.buffer}, a slot for each chain")
        if name in ("rbm", "efh") and config.model.components > 1:
            raise click.UsageError(f"model.components = {config.model.components}: {name} has 1")
    return config


def recipe_book() -> dict:
    """The contents of configs.yaml."""
    return yaml.safe_load((Path(__file__).parent / "configs.yaml").read_text())


def presets(book: dict) -> dict[str, tuple[str, str, dict]]:
    """Name -> (model, data, overrides) of every preset of configs.yaml, the newcomer's first."""
    found = {n: (p["model"], p["data"], p["set"]) for n, p in book["presets"].items()}
    found |= {f"{m}-{d}": (m, d, {}) for m, model in book["models"].items() for d in model["data"]}
    return found | {f"{base}-{v}": (*found[base][:2], variant["set"])
                    for v, variant in book["variants"].items() for base in variant["of"]}


def compose(preset: str, settings=()) -> Config:
    """The configuration of `preset` with KEY=VALUE `settings` over it; keys as `train.rate`."""
    full = sorted(f"{s.name}.{k.name}" for s in fields(Config) for k in fields(s.type))
    chosen = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        matches = [k for k in full if key in (k, k.split(".")[1])]
        if not equals or len(matches) != 1:
            why = "is not KEY=VALUE" if not equals else (
                f"could be {' or '.join(matches)}" if matches else f"is no key{_nearest(key, full)}")
            raise click.UsageError(f"--set {setting}: {key!r} {why}")
        try:
            chosen[matches[0]] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise click.UsageError(f"--set {setting}: {text!r} is not a YAML value") from None
    try:
        book = recipe_book()
        if preset not in (known := presets(book)):
            raise click.UsageError(f"no preset {preset!r}{_nearest(preset, known)}")
        name, data, overrides = known[preset]
        model, images = book["models"][name], dict(book["data"][data])
        shape, recipe = book["trunks"][images.pop("trunk")], book["recipes"][model["recipe"]]
        tree = {section: values | recipe.get(section, {})
                for section, values in book["recipes"]["common"].items()}
        tree["data"] |= {"name": data, **images}
        tree["model"] |= {"name": name, **shape, **model["set"]}
        for key, value in (overrides | chosen).items():
            section, key = key.split(".")
            tree[section][key] = value
    except (OSError, yaml.YAMLError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise click.UsageError(f"configs.yaml, {preset}: {error!r}") from error
    return parse_config(tree)


def plain(config: Config) -> dict:
    """The configuration as dictionaries, lists, numbers and words, for YAML and checkpoints."""
    return json.loads(json.dumps(asdict(config)))


def as_yaml(tree: dict) -> str:
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None)


def write_whole(path: Path, content: bytes) -> None:
    """Replaces `path` so that a crash at any instant leaves the old file or the new one, whole."""
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}: {error.strerror}. What was there before is intact; "
                      "make room or choose another folder with --out") from error


def load_checkpoint(path) -> dict:
    """A checkpoint's tensors and plain values, on the CPU. Never runs code from the file."""
    import torch

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # torch and pickle raise what the damage happens to provoke
        raise Failure(f"{path} is no checkpoint of this program, or it is damaged; nothing of it "
                      "was used. Train again, or take another copy") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise Failure(f"{path} is no checkpoint of format {FORMAT} (found: {found})")
    parts = {"config": dict, "model": dict, "updates": int}
    if lacking := [k for k, kind in parts.items() if not isinstance(state.get(k), kind)]:
        raise Failure(f"{path} is no whole checkpoint: it lacks {', '.join(lacking)}")
    return state


def open_checkpoint(path, device="cpu"):
    """A checkpoint's model in evaluation mode on `device`, its `Config`, and all that it holds."""
    state = load_checkpoint(path)
    try:
        config = parse_config(state["config"])
        model = new_model(config, device)
        model.load_state_dict(state["model"])
    except (click.UsageError, KeyError, RuntimeError) as error:
        raise Failure(f"{path} does not fit this version: {str(error).splitlines()[0]}") from error
    return model.eval(), config, state


def load_model(path, device="cpu"):
    """A checkpoint's model in evaluation mode on `device`, and its `Config`."""
    return open_checkpoint(path, device)[:2]


def new_model(config: Config, device):
    """The untrained model of `config`: the same seed gives the same weights."""
    import torch

    import models

    with torch.random.fork_rng([]):
        torch.manual_seed(config.train.seed)
        model = models.build(config.model, config.data.image, config.data.classes)
    return model.to(device, memory_format=torch.channels_last)


def load_images(config: Config, split: str, data_dir: str, other: str = ""):
    """uint8 images and labels of the data that `config` names, or of `other` data."""
    import data

    name, shape, extra = other or config.data.name, config.data.image, config.data.extra
    try:
        images, labels = data.load(name, split, data_dir, shape, extra)
    except data.DataError as error:
        raise Failure(str(error)) from error
    if not other and (found := int(labels.max()) + 1) != config.data.classes:
        raise Failure(f"{name} has {found} classes, the configuration says {config.data.classes}: "
                      f"--set classes={found}")
    return images, labels


def learning_rate(update: int, train: Train) -> float:
    """The rate of update 1, 2, ...: linear warm-up, then constant or a cosine to 0."""
    rate = train.rate * min(1.0, update / max(1, train.warmup))
    if train.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * (update - 1) / train.updates))
    return rate


@lru_cache(maxsize=1)
def _epoch_order(count: int, seed: int, epoch: int):
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_indices(update: int, count: int, train: Train):
    """The images of update 1, 2, ... of `count`: each epoch a new order, from the seed alone."""
    epoch, position = divmod(update - 1, count // train.batch)
    return _epoch_order(count, train.seed, epoch)[position * train.batch:][: train.batch]


class Log:
    """log.csv and the terminal: a row every so many updates; rows past a checkpoint are dropped."""

    def __init__(self, path: Path, done: int, updates: int):
        self.path, self.updates = path, updates
        if path.exists():
            header, *rows = path.read_text(errors="replace").splitlines(keepends=True) or [""]
            rows = [r for r in rows if r.endswith("\n") and r.partition(",")[0].isdecimal()]
            kept = [r for r in rows if int(r.partition(",")[0]) <= done]
            write_whole(path, (header + "".join(kept)).encode() if kept else b"")
        self.bar = click.progressbar(length=updates, show_pos=True, show_percent=False, width=8,
                                     item_show_func=lambda s: s, hidden=not sys.stdout.isatty())
        self.bar.__enter__()
        self.bar.update(done)

    def row(self, update: int, values: dict[str, float]) -> None:
        try:
            with self.path.open("a") as file:
                header = "" if file.tell() else ",".join(["update", *values]) + "\n"
                file.write(header + ",".join(map(str, [update, *values.values()])) + "\n")
        except OSError as error:
            raise Failure(f"cannot write {self.path}: {error.strerror}. The last checkpoint is "
                          "intact; make room and start the same command again") from error
        if self.bar.hidden:
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            click.echo(f"update {update}/{self.updates}  {text}")
        else:
            shown = "E {energy_data:.2g}/{energy_chains:.2g} gap {gap:.2g} pixels " \
                    "{pixel_min:.1f}..{pixel_max:.1f}" if "gap" in values else "loss {loss:.4g}"
            self.bar.update(0, (shown + " {updates_per_second:.3g}/s").format(**values))


@contextmanager
def claimed(folder: Path):
    """Makes `folder` and locks it against a second `train`."""
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except OSError as error:
        raise Failure(f"cannot write to {folder}: {error.strerror}; choose --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Failure(f"{folder} is in use by another `train`; choose another --out") from None
        yield


@contextmanager
def interruptions():
    """A list that Ctrl-C and SIGTERM append to, instead of ending the program."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, lambda *_: caught.append(1)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def refuse_other_config(old: dict, new: dict, folder: Path) -> None:
    """A run goes on only as it began, or longer, where nothing depends on its length."""
    old, new = ({f"{section}.{k}": v for section, part in c.items() for k, v in part.items()}
                for c in (old, new))
    differing = [k for k in new if old.get(k) != new[k]]
    longer = differing == ["train.updates"] and old["train.updates"] < new["train.updates"]
    if differing and not (longer and new["train.decay"] == "none"):
        changes = ", ".join(f"{k} ({old.get(k)} there, {new[k]} here)" for k in differing)
        raise Failure(f"{folder} holds a run with another configuration: {changes}. "
                      "Choose another folder with --out, or the same settings")


def train_model(config: Config, folder: Path, data_dir: str, device, preset: str) -> bool:
    """Trains to `config.train.updates`, from the folder's checkpoint if any; False: interrupted."""
    import torch

    import data
    import evaluate
    import sampling

    sampling.keep_freed_memory()
    settings, c, path = config.train, config.chains, folder / "ckpt.pt"
    images, labels = (part.to(device) for part in load_images(config, "train", data_dir))
    if len(images) < settings.batch:
        raise Failure(f"{config.data.name} has {len(images)} training images, fewer than "
                      f"train.batch = {settings.batch}")
    model = new_model(config, device)
    torch.manual_seed(settings.seed)  # of the device's own generator: some losses draw from it too
    generator = torch.default_generator if device.type == "cpu" else (
        torch.cuda.default_generators[device.index or 0])
    betas = settings.beta1, settings.beta2
    optimiser = torch.optim.Adam(model.parameters(), settings.rate, betas, settings.epsilon)
    buffer = model.chain and sampling.ReplayBuffer(c.buffer, config.data.image, c.reuse, generator)
    done, seconds, precision = 0, 0.0, settings.precision
    if precision == "auto":
        precision = "bfloat16" if sampling.bfloat16_pays(device) else "float32"
    if path.exists():
        state = load_checkpoint(path)
        refuse_other_config(state["config"], plain(config), folder)
        try:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            if buffer:
                buffer.images.copy_(state["buffer"])
            generator.set_state(state["generator"])
            done, seconds, precision = state["updates"], state["seconds"], state["precision"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise Failure(f"{path} cannot be gone on from: a part of its state is missing or is of "
                          f"another device ({error!r:.80}). Choose another --out") from error
        click.echo(f"going on after update {done} of {path}, in {precision}")
    chain = {"steps": c.steps, "step_size": c.step_size, "noise_std": c.noise_std,
             "generator": generator, "bfloat16": precision == "bfloat16"}
    write_whole(folder / "config.yaml", as_yaml(plain(config)).encode())
    picture_every = math.ceil(settings.updates / settings.pictures) if settings.pictures else 0
    log, started = Log(folder / "log.csv", done, settings.updates), time.monotonic()
    log.bar.start = time.time() - seconds  # what the remaining time is reckoned from
    with log.bar, interruptions() as interrupted:
        for update in range(done + 1, settings.updates + 1):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(update, settings)
            chosen = batch_indices(update, len(images), settings).to(device)
            x = data.normalise(images[chosen])  # (B, C, H, W)
            noise = torch.randn(x.shape, generator=generator, device=device)
            x = (x + config.data.noise_std * noise).contiguous(memory_format=torch.channels_last)
            chains = None
            if buffer:
                slots, chains = buffer.draw(settings.batch)
                chains = sampling.advance(model, chains, **chain)
            with torch.autocast(device.type, torch.bfloat16, enabled=chain["bfloat16"]):
                loss, metrics = model.loss(x, labels[chosen], chains)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            slope = torch.stack([p.grad.abs().max() for p in model.parameters()])
            largest = torch.stack([loss.detach(), *metrics.values(), slope.max()]).abs().max()
            if not largest <= settings.energy_bound:  # waits for the device; false for NaN
                raise Failure(
                    f"diverged at update {update}: loss, energies or gradients of {largest:.3g} "
                    f"(the bound is {settings.energy_bound:.3g}). No update was made. The last "
                    f"checkpoint, if any, is {path}; try a lower train.rate" + buffer * (
                        ", more chains.steps, a higher model.l2 or model.l2_on=both"))
            optimiser.step()
            if buffer:
                buffer.put(slots, chains)
                metrics |= {"pixel_min": chains.min(), "pixel_max": chains.max()}
            log.bar.update(1)
            last, stop = update == settings.updates, bool(interrupted)
            if update % settings.log_every == 0 or last:
                spent = time.monotonic() - started
                log.row(update, {"loss": loss.item(), **{k: v.item() for k, v in metrics.items()},
                                 "seconds": round(seconds + spent, 1),
                                 "updates_per_second": round((update - done) / spent, 3)})
            if picture_every and (update % picture_every == 0 or last):
                shown = buffer.images[:64] if buffer else evaluate.drawn(model, 64, settings.seed)
                if shown is not None:
                    name = folder / "samples" / f"{update:07d}.png"
                    write_whole(name, evaluate.grid_png(shown))
            if update % settings.checkpoint_every == 0 or last or stop:
                torch.save({
                    "format": FORMAT, "preset": preset, "config": plain(config), "updates": update,
                    "seed": settings.seed, "seconds": seconds + time.monotonic() - started,
                    "precision": precision, "device": device.type,
                    "versions": {"torch": str(torch.__version__),
                                 "python": platform.python_version()},
                    "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(),
                    **({"buffer": buffer.images} if buffer else {})}, content := io.BytesIO())
                write_whole(path, content.getbuffer())
            if stop:
                return last
    return True


def _device(_context, _parameter, name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--device {name} cannot be used here: {reason}") from error


FILE = click.Path(exists=True, dir_okay=False)
CHECKPOINT = click.argument("checkpoint", type=FILE, metavar="CKPT")
DATA_DIR = click.option("--data-dir", default="data", show_default=True,
                        help="Where data sets are, or are downloaded to.")
DEVICE = click.option("--device", default="auto", show_default=True, callback=_device,
                      help="auto, cpu or cuda.")


def out_option(flag: str, default=None, text: str = ""):
    """An option that names a file to write."""
    return click.option(flag, type=click.Path(dir_okay=False), default=default, help=text,
                        show_default=default is not None)


def tabular(command):
    """Options of the commands that print a table: checkpoints, its form, data, device."""
    for option in (DEVICE, DATA_DIR,
                   click.option("--markdown", "form", flag_value="markdown", help="For a README."),
                   click.option("--json", "form", flag_value="json", help="For a program."),
                   click.argument("checkpoints", type=FILE, nargs=-1, required=True,
                                  metavar="CKPT...")):
        command = option(command)
    return command


def tabulate(checkpoints, form, data_dir: str, device, figures) -> None:
    """Prints a row a checkpoint with `figures(model, config, (images, labels) of train, of test)`.

    A figure that is a list goes to JSON alone.
    """
    import evaluate

    rows = []
    for path in checkpoints:
        model, config, state = open_checkpoint(path, device)
        sets = [load_images(config, split, data_dir) for split in ("train", "test")]
        rows.append({"checkpoint": path, "model": config.model.name, "data": config.data.name,
                     "updates": state["updates"], **figures(model, config, *sets)})
    shown = [{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]
    click.echo(json.dumps(rows) if form == "json" else evaluate.table(shown, form == "markdown"))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main():
    """Conjugate energy-based models: train, sample, evaluate.

    Start with `python cebm.py train`, which trains on an embedded data set within minutes.
    """


@main.command()
@click.option("--preset", default="quickstart", show_default=True, help="See `show`.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE",
              help="Change a value of the preset, say train.rate=3e-4; may be repeated.")
@click.option("--out", type=click.Path(file_okay=False), help="Run folder.  [default: runs/PRESET]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="The same as --set train.seed=N.")
@DATA_DIR
@DEVICE
def train(preset, settings, out, seed, data_dir, device):
    """Train, or go on where the run folder's checkpoint stopped.

    Example: python cebm.py train --preset cebm-fmnist --set chains.steps=20
    """
    config = compose(preset, settings + (() if seed is None else (f"train.seed={seed}",)))
    folder = Path(out or f"runs/{preset}")
    path, where = folder / "ckpt.pt", f" --data-dir {data_dir}" * (config.data.name != "glyphs")
    with claimed(folder):
        finished = train_model(config, folder, data_dir, device, preset)
    if not finished:
        click.echo(f"interrupted; saved {path}. The same command goes on from there.")
        sys.exit(130)
    click.echo(f"{config.train.updates} updates done: {path}\nnow try:\n"
               f"  python cebm.py knn {path}{where}\n  python cebm.py sample {path}")


@main.command()
@CHECKPOINT
@click.option("--from", "source", type=click.Choice(["buffer", "noise"]),
              help="Where chains start.  [default: buffer]")
@click.option("--given", type=click.IntRange(1, 1000), metavar="N",
              help="Draw from p(x | z), z the latents of each of the first N test images.")
@click.option("--steps", type=click.IntRange(0), help="Of the chains.  [default: as in training]")
@click.option("--refine", type=click.IntRange(0), metavar="STEPS",
              help="A GAN's latents first take STEPS Langevin steps on -log p(z) - logit D(G(z)).")
@click.option("--count", type=click.IntRange(1, 10_000), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@out_option("--out", "samples.png")
@DATA_DIR
@DEVICE
def sample(checkpoint, source, given, steps, refine, count, seed, out, data_dir, device):
    """Draw a grid of samples into a PNG: chains, or a generator's images.

    Example: python cebm.py sample runs/quickstart/ckpt.pt --from noise --steps 500
    """
    import torch

    import data
    import evaluate
    import sampling

    model, config, state = open_checkpoint(checkpoint, device)
    decodes, c = hasattr(model, "decode"), config.chains
    usable = {"from": not decodes, "steps": not decodes, "given": hasattr(model, "posterior"),
              "refine": hasattr(model, "latent_energy")}
    asked = {"from": source, "steps": steps, "given": given, "refine": refine}
    for option in (k for k, v in asked.items() if v is not None and not usable[k]):
        raise click.UsageError(f"--{option} is not for {config.model.name}, the model of "
                               f"{checkpoint}")
    generator, energy = torch.Generator(device).manual_seed(seed), getattr(model, "energy", None)
    steps, originals = c.steps if steps is None else steps, torch.empty(0, *config.data.image)
    buffer = None if given or source == "noise" else state.get("buffer")
    if given:
        originals = data.normalise(load_images(config, "test", data_dir)[0][:given])
        count, z = len(originals), model.represent(originals.to(device)).detach()
        energy = energy if decodes or model.chain == "gibbs" else (
            lambda x: model.joint_energy(x, z))
    if decodes:
        with evaluate.seeded(seed, device):
            x = z if given else model.prior.sample(count).detach()
        steps, energy = refine or 0, model.latent_energy if refine else None
    elif given and model.chain == "gibbs":
        x, steps = originals.to(device), 1
    elif buffer is not None:
        order = torch.randperm(len(buffer), generator=torch.Generator().manual_seed(seed))
        x = buffer[order[:count]].to(device)
    else:
        if not given and source != "noise":
            click.echo(f"{checkpoint} has no replay buffer: starting from noise")
        x = torch.rand(count, *config.data.image, generator=generator, device=device) * 2 - 1
    before = energy and energy(x).mean().item()
    x = sampling.advance(model, x, steps, generator, energy=energy, step_size=c.step_size,
                         noise_std=c.noise_std)
    if energy:
        click.echo(f"{steps} steps: mean energy {before:.4g} -> {energy(x).mean().item():.4g}, "
                   f"range {x.min().item():.3g} to {x.max().item():.3g}")
    x = (model.decode(x).detach() if decodes else x).cpu()
    write_whole(Path(out), evaluate.grid_png(torch.cat([originals, x]), len(originals) or None))
    click.echo(out)


@main.command()
@tabular
@click.option("--limit", type=click.IntRange(1), help="Only the first N training images.")
@out_option("--plot", text="The last CKPT's confusion matrix as a PNG.")
def knn(checkpoints, limit, plot, form, data_dir, device):
    """Exact 1-nearest-neighbour test accuracy (supplement E.1), in percent.

    In latent space, in that of the same network untrained, and in pixel space; of a classifier also
    its own.

    Example: python cebm.py knn runs/quickstart/ckpt.pt
    """
    import data
    import evaluate

    matrices = []

    def figures(model, config, train, test):
        row, untrained = {}, new_model(config, device).eval()
        spaces = {"latent": model.represent, "untrained": untrained.represent,
                  "pixel": lambda x: x.flatten(1)}
        for space, represent in spaces.items():
            a, b = (evaluate.in_batches(represent, x, device) for x in (train[0][:limit], test[0]))
            predicted = train[1][evaluate.nearest(a, b).cpu()]
            counts = evaluate.confusion(test[1], predicted, config.data.classes)
            row[space] = round(100 * counts.diag().sum().item() / len(test[1]), 2)
            row.setdefault("confusion", counts.tolist())
        if hasattr(model, "classify"):
            right = evaluate.in_batches(model.classify, test[0], device).cpu() == test[1]
            row["accuracy"] = round(100 * right.double().mean().item(), 2)
        names = data.class_names(config.data.name, data_dir, config.data.classes)
        matrices.append((row["confusion"], names))
        return row

    tabulate(checkpoints, form, data_dir, device, figures)
    for path, (counts, names) in zip(checkpoints * (form is None), matrices, strict=False):
        rows = [dict(zip(["true", *names], [name, *row], strict=True))
                for name, row in zip(names, counts, strict=True)]
        click.echo(f"\n{path}, columns predicted:\n{evaluate.table(rows)}")
    if plot:
        write_whole(Path(plot), evaluate.confusion_png(*matrices[-1]))


@main.command()
@tabular
def probe(checkpoints, form, data_dir, device):
    """Test accuracy of logistic regression on the latents, in percent.

    With 1, 10, 100 and all labels a class; the mean and deviation of ten draws of the labels.

    Example: python cebm.py probe runs/quickstart/ckpt.pt
    """
    import evaluate

    def figures(model, config, train, test):
        a, b = (evaluate.in_batches(model.represent, s[0], device).cpu() for s in (train, test))
        scores = {n: evaluate.probe(a, train[1], b, test[1], config.data.classes, n)
                  for n in (1, 10, 100, None)}
        return {f"{n or 'all'}{what}": round(score, 2) for n, pair in scores.items()
                for what, score in zip(("", " std"), pair, strict=True)}

    tabulate(checkpoints, form, data_dir, device, figures)


@main.command()
@tabular
@click.option("--against", multiple=True, metavar="DATA", type=click.Choice(DATA),
              help="Another data set; may be repeated. Uniform noise and constant images always.")
def ood(checkpoints, against, form, data_dir, device):
    """AUROC of telling the test set from other data, in percent.

    By log p(x) up to a constant, that is -E(x) or a VAE's ELBO, and by minus its gradient's norm.

    Example: python cebm.py ood runs/cebm-fmnist/ckpt.pt --against mnist
    """
    import torch

    import evaluate

    def figures(model, config, train, test):
        if not hasattr(model, "energy"):
            raise Failure(f"{config.model.name} has no density of images to score with")
        images, generator = test[0], torch.Generator().manual_seed(0)
        level = torch.randint(256, (len(images), 1, 1, 1), generator=generator)
        others = {name: load_images(config, "test", data_dir, name)[0] for name in against}
        others["uniform"] = torch.randint(256, images.shape, generator=generator).byte()
        others["constant"] = level.expand(images.shape).byte()
        inside = evaluate.density_scores(model, images, device)
        outside = {k: evaluate.density_scores(model, other, device) for k, other in others.items()}
        return {f"{name} {k}": round(evaluate.auroc(inside[k], scores[k]), 2)
                for name, scores in outside.items() for k in inside}

    tabulate(checkpoints, form, data_dir, device, figures)


@main.command()
@CHECKPOINT
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@out_option("--map", text="Also a picture of the means in 2-D, by UMAP if installed, else PCA.")
@out_option("--out", "latents.npz")
@DATA_DIR
@DEVICE
def export(checkpoint, split, map, out, data_dir, device):
    """Write each image's latent mean, std, energy (where the model has them) and label to an .npz.

    Example: python cebm.py export runs/quickstart/ckpt.pt --split train --map map.png
    """
    import numpy as np
    import torch

    import data
    import evaluate

    model, config = load_model(checkpoint, device)
    images, labels = load_images(config, split, data_dir)
    arrays = evaluate.describe(model, images, device) | {"labels": labels.numpy()}
    np.savez(content := io.BytesIO(), **arrays)
    write_whole(Path(out), content.getvalue())
    click.echo(f"{out}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))
    if map:
        points, method = evaluate.plane(torch.tensor(arrays["mean"]))
        names = data.class_names(config.data.name, data_dir, config.data.classes)
        title = f"{method} of {config.model.name}'s latents, {config.data.name} {split}"
        write_whole(Path(map), evaluate.map_png(points, labels, names, title))
        click.echo(f"{map}: {method}")


@main.command()
@click.argument("what", required=False, metavar="[PRESET or CKPT]")
def show(what):
    """List the presets, or print one preset's whole configuration, or say what a checkpoint is.

    Example: python cebm.py show cebm-fmnist
    """
    names = list(presets(recipe_book()))
    if what is None:
        for name in names:
            c = compose(name)
            click.echo(f"{name:20} {c.train.updates} updates, batch {c.train.batch}, rate "
                       f"{c.train.rate:g}, chains of {c.chains.steps}")
    elif what in names:
        click.echo(as_yaml(plain(compose(what))), nl=False)
    elif Path(what).is_file():
        state = load_checkpoint(what)
        facts = {k: v for k, v in state.items() if isinstance(v, (str, int, float, dict))
                 and k not in ("model", "optimiser")}
        facts["tensors"] = sum(v.numel() for v in state["model"].values())
        click.echo(as_yaml(facts), nl=False)
    else:
        raise click.UsageError(f"{what!r} is neither a preset nor a file{_nearest(what, names)}")


if __name__ == "__main__":
    main()
