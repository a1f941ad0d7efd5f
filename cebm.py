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
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import lru_cache
from pathlib import Path

import click
import yaml

FORMAT = 1  # of the checkpoint; another number is refused


class Failure(click.ClickException):
    """Ends a command with one message on stderr and exit status 1."""


def _(low=None, high=None, choices=None, length=None):
    return field(metadata={"low": low, "high": high, "choices": choices, "length": length})


@dataclass(frozen=True)
class Data:
    name: str = _(choices=("mnist", "fmnist", "cifar10", "svhn", "glyphs", "folder"))
    image: tuple[int, ...] = _(1, 512, length=3)  # channels, height, width
    classes: int = _(1, 10_000)
    extra: bool = _()  # SVHN: train on the extra images too
    noise_std: float = _(0, 10)  # Gaussian noise on training images, in pixels of [-1, 1]


@dataclass(frozen=True)
class Model:
    name: str = _(choices=("cebm",))
    channels: tuple[int, ...] = _(1, 4096, length=4)
    hidden: int = _(1, 65_536)
    latent: int = _(1, 65_536)
    head: str = _(choices=("shared", "separate"))
    t2: str = _(choices=("square", "softplus"))
    l2: float = _(0, 1e6)
    l2_on: str = _(choices=("data", "both"))


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


def _checked(key: str, kind, rule: dict, value):
    """`value` with the type and bounds of field `key`, or a usage error that names them."""
    low, high, choices, length = (rule[k] for k in ("low", "high", "choices", "length"))
    between = f" from {low:,} to {high:,}" if high is not None else ""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
    wanted = names.get(kind, f"a list of {length} whole numbers") + between
    wanted = f"one of {', '.join(choices)}" if choices else wanted
    refusal = click.UsageError(f"{key} = {value!r}: it has to be {wanted}")
    if kind not in names:
        if not isinstance(value, (list, tuple)) or len(value) != length:
            raise refusal
        return tuple(_checked(key, int, {**rule, "length": None}, v) for v in value)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)  # YAML reads 1e-4, without a dot, as a word
        except (ValueError, OverflowError):
            raise refusal from None
    if type(value) is not kind or (choices and value not in choices):
        raise refusal
    if high is not None and not low <= value <= high:  # false for NaN too
        raise refusal
    return value


def parse_config(tree, kind=Config, where: str = ""):
    """A plain dictionary of sections -> frozen `Config`; UsageError names what is wrong."""
    if not isinstance(tree, dict):
        raise click.UsageError(f"{where or 'the configuration'} has to be a section of keys")
    known = {f.name: f for f in fields(kind)}
    for key in tree:
        if key not in known:
            raise click.UsageError(f"unknown key {where}{key}{_nearest(key, known)}")
    if missing := [where + name for name in known if name not in tree]:
        raise click.UsageError(f"missing from the configuration: {', '.join(missing)}")
    values = {}
    for name, f in known.items():
        if is_dataclass(f.type):
            values[name] = parse_config(tree[name], f.type, f"{where}{name}.")
        else:
            values[name] = _checked(where + name, f.type, f.metadata, tree[name])
    config = kind(**values)
    if kind is Config:
        if config.train.batch > config.chains.buffer:
            raise click.UsageError(
                f"train.batch = {config.train.batch}: it must not exceed chains.buffer = "
                f"{config.chains.buffer}, each chain of a batch has a slot of its own"
            )
        if min(config.data.image[1:]) < 8:
            raise click.UsageError(f"data.image = {list(config.data.image)}: three strides of 2 "
                                   "need images of at least 8 x 8 pixels")
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
    book = recipe_book()
    if preset not in (known := presets(book)):
        raise click.UsageError(f"no preset {preset!r}{_nearest(preset, known)}")
    model, data, overrides = known[preset]
    chosen, images = book["models"][model], {"name": data, **book["data"][data]}
    shape = book["trunks"][images.pop("trunk")]
    tree = {section: dict(values) for section, values in book["recipes"][chosen["recipe"]].items()}
    tree["data"] |= images
    tree["model"] = {"name": model, **shape, **chosen["set"]}
    full = {f"{s.name}.{k.name}" for s in fields(Config) for k in fields(s.type)}
    for setting in settings:
        key, equals, text = setting.partition("=")
        matches = [k for k in sorted(full) if k == key or k.split(".")[1] == key]
        if not equals or len(matches) != 1:
            why = "is not KEY=VALUE" if not equals else (
                f"could be {' or '.join(matches)}" if matches else
                f"is no key{_nearest(key, sorted(full))}")
            raise click.UsageError(f"--set {setting}: {key!r} {why}")
        try:
            overrides = {**overrides, matches[0]: yaml.safe_load(text)}
        except yaml.YAMLError:
            raise click.UsageError(f"--set {setting}: {text!r} is not a YAML value") from None
    for key, value in overrides.items():
        section, name = key.split(".")
        tree[section][name] = value
    return parse_config(tree)


def plain(config: Config) -> dict:
    """The configuration as dictionaries, lists, numbers and words, for YAML and checkpoints."""
    return json.loads(json.dumps(asdict(config)))


def as_yaml(config: Config) -> str:
    return yaml.safe_dump(plain(config), sort_keys=False, default_flow_style=None)


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


def save_checkpoint(path: Path, state: dict) -> None:
    """Tensors and plain values -> one file that `torch.load(weights_only=True)` reads."""
    import torch

    torch.save(state, content := io.BytesIO())
    write_whole(path, content.getbuffer())


def load_checkpoint(path) -> dict:
    """The dictionary of `save_checkpoint`, on the CPU. Never runs code from the file."""
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


def load_model(path, device: str = "cpu"):
    """A checkpoint's model in evaluation mode on `device`, and its `Config`."""
    state = load_checkpoint(path)
    try:
        config = parse_config(state["config"])
        model = new_model(config, device)
        model.load_state_dict(state["model"])
    except (click.UsageError, KeyError, RuntimeError) as error:
        raise Failure(f"{path} does not fit this version: {str(error).splitlines()[0]}") from error
    return model.eval(), config


def new_model(config: Config, device):
    """The untrained model of `config`: the same seed gives the same weights."""
    import torch

    import models

    with torch.random.fork_rng([]):
        torch.manual_seed(config.train.seed)
        model = models.build(config.model, config.data.image, config.data.classes)
    return model.to(device, memory_format=torch.channels_last)


def load_images(config: Config, split: str, data_dir: str):
    """uint8 images and labels of the data that `config` names."""
    import data

    shape, extra = config.data.image, config.data.extra
    try:
        images, labels = data.load(config.data.name, split, data_dir, shape, extra)
    except data.DataError as error:
        raise Failure(str(error)) from error
    if (found := int(labels.max()) + 1) != config.data.classes:
        raise Failure(f"{config.data.name} has {found} classes, the configuration says "
                      f"{config.data.classes}: --set classes={found}")
    return images, labels


def find_device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise click.UsageError(f"--device {name} cannot be used here: {reason}") from error


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
            text = path.read_text(errors="replace").splitlines(keepends=True)
            header, *rows = text or [""]
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
            shown = ("E {energy_data:.2g}/{energy_chains:.2g} gap {gap:.2g} pixels "
                     "{pixel_min:.1f}..{pixel_max:.1f} {updates_per_second:.3g}/s")
            self.bar.update(0, shown.format(**values))


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
    caught = []
    numbers = signal.SIGINT, signal.SIGTERM
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
    images, labels = load_images(config, "train", data_dir)
    if len(images) < settings.batch:
        raise Failure(f"{config.data.name} has {len(images)} training images, fewer than "
                      f"train.batch = {settings.batch}")
    images, labels = images.to(device), labels.to(device)
    model = new_model(config, device)
    betas = settings.beta1, settings.beta2
    optimiser = torch.optim.Adam(model.parameters(), settings.rate, betas, settings.epsilon)
    generator = torch.Generator(device).manual_seed(settings.seed)
    buffer = sampling.ReplayBuffer(c.buffer, config.data.image, c.reuse, generator)
    bfloat16 = settings.precision == "bfloat16" or (
        settings.precision == "auto" and sampling.bfloat16_pays(device))
    chain = {"steps": c.steps, "step_size": c.step_size, "noise_std": c.noise_std,
             "generator": generator, "bfloat16": bfloat16}
    done, seconds = 0, 0.0
    if path.exists():
        state = load_checkpoint(path)
        refuse_other_config(state["config"], plain(config), folder)
        try:
            model.load_state_dict(state["model"])
            optimiser.load_state_dict(state["optimiser"])
            buffer.images.copy_(state["buffer"])
            generator.set_state(state["generator"])
            done, seconds = state["updates"], state["seconds"]
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise Failure(f"{path} cannot be gone on from: a part of its state is missing or is of "
                          f"another device ({error!r:.80}). Choose another --out") from error
        click.echo(f"going on after update {done} of {path}")
    write_whole(folder / "config.yaml", as_yaml(config).encode())
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
            slots, chains = buffer.draw(settings.batch)
            chains = sampling.fast_langevin(model, model.energy, chains, **chain)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                loss, metrics = model.loss(x, labels[chosen], chains)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            slope = torch.stack([p.grad.abs().max() for p in model.parameters()])
            largest = torch.stack([loss.detach(), *metrics.values(), slope.max()]).abs().max()
            if not largest <= settings.energy_bound:  # waits for the device; false for NaN
                raise Failure(
                    f"diverged at update {update}: loss, energies or gradients of {largest:.3g} "
                    f"(the bound is {settings.energy_bound:.3g}). No update was made. The last "
                    f"checkpoint, if any, is {path}; try a lower train.rate, more chains.steps, a "
                    "higher model.l2 or model.l2_on=both")
            optimiser.step()
            buffer.put(slots, chains)
            log.bar.update(1)
            last, stop = update == settings.updates, bool(interrupted)
            if update % settings.log_every == 0 or last:
                spent = time.monotonic() - started
                metrics |= {"pixel_min": chains.min(), "pixel_max": chains.max()}
                log.row(update, {"loss": loss.item(), **{k: v.item() for k, v in metrics.items()},
                                 "seconds": round(seconds + spent, 1),
                                 "updates_per_second": round((update - done) / spent, 3)})
            if picture_every and (update % picture_every == 0 or last):
                picture = evaluate.grid_png(buffer.images[:64])
                write_whole(folder / "samples" / f"{update:07d}.png", picture)
            if update % settings.checkpoint_every == 0 or last or stop:
                save_checkpoint(path, {
                    "format": FORMAT, "preset": preset, "config": plain(config), "updates": update,
                    "seed": settings.seed, "seconds": seconds + time.monotonic() - started,
                    "precision": "bfloat16" if bfloat16 else "float32", "device": device.type,
                    "versions": {"torch": str(torch.__version__),
                                 "python": platform.python_version()},
                    "model": model.state_dict(), "optimiser": optimiser.state_dict(),
                    "generator": generator.get_state(), "buffer": buffer.images})
            if stop:
                return last
    return True


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main():
    """Conjugate energy-based models: train, sample, evaluate.

    Start with `python cebm.py train`, which trains on an embedded data set within minutes.
    """


CHECKPOINT = click.Path(exists=True, dir_okay=False)
DATA_DIR = click.option("--data-dir", default="data", show_default=True,
                        help="Where data sets are, or are downloaded to.")
DEVICE = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")


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
    device = find_device(device)
    with claimed(folder):
        finished = train_model(config, folder, data_dir, device, preset)
    where = "" if config.data.name == "glyphs" else f" --data-dir {data_dir}"
    if not finished:
        click.echo(f"interrupted; saved {folder / 'ckpt.pt'}. The same command goes on from there.")
        sys.exit(130)
    click.echo(f"{config.train.updates} updates done: {folder / 'ckpt.pt'}\nnow try:\n"
               f"  python cebm.py knn {folder / 'ckpt.pt'}{where}\n"
               f"  python cebm.py sample {folder / 'ckpt.pt'}")


@main.command()
@click.argument("checkpoint", type=CHECKPOINT, metavar="CKPT")
@click.option("--from", "source", type=click.Choice(["buffer", "noise"]), default="buffer",
              show_default=True, help="Where chains start.")
@click.option("--given", type=click.IntRange(1, 1000), metavar="N",
              help="For each of the first N test images draw from p(x | z), z its posterior mean.")
@click.option("--steps", type=click.IntRange(0), help="SGLD steps.  [default: as in training]")
@click.option("--count", type=click.IntRange(1, 10_000), default=64, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), default="samples.png", show_default=True)
@DATA_DIR
@DEVICE
def sample(checkpoint, source, given, steps, count, seed, out, data_dir, device):
    """Draw a grid of samples into a PNG.

    Example: python cebm.py sample runs/quickstart/ckpt.pt --from noise --steps 500
    """
    import torch

    import data
    import evaluate
    import sampling

    device = find_device(device)
    model, config = load_model(checkpoint, device)
    generator = torch.Generator(device).manual_seed(seed)
    chain = {"steps": config.chains.steps if steps is None else steps,
             "step_size": config.chains.step_size, "noise_std": config.chains.noise_std}
    stored = load_checkpoint(checkpoint).get("buffer") if source == "buffer" and not given else None
    if source == "buffer" and not given and stored is None:
        click.echo(f"{checkpoint} has no replay buffer: starting from noise")
    originals, columns, energy = None, None, model.energy
    if given:
        images, _labels = load_images(config, "test", data_dir)
        originals = data.normalise(images[:given]).to(device)
        count = columns = len(originals)
        with torch.no_grad():
            z = model.represent(originals)
        energy = lambda x: model.joint_energy(x, z)  # noqa: E731
    if stored is not None:
        count = min(count, len(stored))
        order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))
        x = stored[order[:count]].to(device)
    else:
        x = torch.rand(count, *config.data.image, generator=generator, device=device) * 2 - 1
    start = energy(x).mean().item()
    x = sampling.fast_langevin(model, energy, x, generator=generator, **chain)
    click.echo(f"{chain['steps']} steps: mean energy {start:.4g} -> {energy(x).mean().item():.4g}, "
               f"pixels {x.min().item():.3g} to {x.max().item():.3g}")
    rows = x if originals is None else torch.cat([originals, x])
    write_whole(Path(out), evaluate.grid_png(rows, columns))
    click.echo(out)


@main.command()
@click.argument("checkpoints", type=CHECKPOINT, nargs=-1, required=True, metavar="CKPT...")
@click.option("--limit", type=click.IntRange(1), help="Only the first N training images.")
@click.option("--plot", type=click.Path(dir_okay=False), help="The last CKPT's confusion as a PNG.")
@click.option("--json", "form", flag_value="json", help="Figures for a program.")
@click.option("--markdown", "form", flag_value="markdown", help="A table for a README.")
@DATA_DIR
@DEVICE
def knn(checkpoints, limit, plot, form, data_dir, device):
    """Exact 1-nearest-neighbour test accuracy (supplement E.1), in percent.

    In latent space, in that of the same network untrained, and in pixel space.

    Example: python cebm.py knn runs/quickstart/ckpt.pt
    """
    import data
    import evaluate

    device, rows, names = find_device(device), [], []
    for checkpoint in checkpoints:
        model, config = load_model(checkpoint, device)
        (train_x, train_y), (test_x, test_y) = (
            load_images(config, split, data_dir) for split in ("train", "test"))
        train_x, train_y = train_x[:limit], train_y[:limit]
        row = {"checkpoint": checkpoint, "model": config.model.name, "data": config.data.name,
               "updates": load_checkpoint(checkpoint)["updates"]}
        untrained = new_model(config, device).eval()
        spaces = {"latent": model, "untrained": untrained, "pixel": None}
        for space, network in spaces.items():
            a, b = (evaluate.latents(network, x, device) for x in (train_x, test_x))
            predicted = train_y[evaluate.nearest(a, b).cpu()]
            counts = evaluate.confusion(test_y, predicted, config.data.classes)
            row[space] = round(100 * counts.diag().sum().item() / len(test_y), 2)
            if space == "latent":
                row["confusion"] = counts.tolist()
        rows.append(row)
        names.append(data.class_names(config.data.name, data_dir, config.data.classes))
    if form == "json":
        click.echo(json.dumps(rows))
    else:
        columns = [k for k in rows[0] if k != "confusion"]
        click.echo(evaluate.table([{k: r[k] for k in columns} for r in rows], form == "markdown"))
    if form is None:
        for row, classes in zip(rows, names, strict=True):
            click.echo(f"\n{row['checkpoint']}, rows true, columns predicted:")
            click.echo(evaluate.confusion_text(row["confusion"], classes))
    if plot:
        write_whole(Path(plot), evaluate.confusion_png(rows[-1]["confusion"], names[-1]))


@main.command()
@click.argument("checkpoint", type=CHECKPOINT, metavar="CKPT")
@click.option("--split", type=click.Choice(["train", "test"]), default="test", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False), default="latents.npz", show_default=True)
@DATA_DIR
@DEVICE
def export(checkpoint, split, out, data_dir, device):
    """Write the posterior's mean and std, the energy and the label of each image to an .npz.

    Example: python cebm.py export runs/quickstart/ckpt.pt --split train
    """
    import numpy as np

    import evaluate

    device = find_device(device)
    model, config = load_model(checkpoint, device)
    images, labels = load_images(config, split, data_dir)
    arrays = evaluate.describe(model, images, device) | {"labels": labels.numpy()}
    np.savez(content := io.BytesIO(), **arrays)
    write_whole(Path(out), content.getvalue())
    click.echo(f"{out}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))


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
            click.echo(f"{name:20} {c.train.updates} updates of {c.chains.steps} steps of "
                       f"{c.chains.step_size:g} with noise {c.chains.noise_std:g}, batch "
                       f"{c.train.batch}, rate {c.train.rate:g}")
    elif what in names:
        click.echo(as_yaml(compose(what)), nl=False)
    elif Path(what).is_file():
        state = load_checkpoint(what)
        facts = {k: v for k, v in state.items() if isinstance(v, (str, int, float, dict))
                 and k not in ("model", "optimiser")}
        facts["tensors"] = sum(v.numel() for v in state["model"].values())
        click.echo(yaml.safe_dump(facts, sort_keys=False, default_flow_style=None), nl=False)
    else:
        raise click.UsageError(f"{what!r} is neither a preset nor a file{_nearest(what, names)}")


if __name__ == "__main__":
    main()
