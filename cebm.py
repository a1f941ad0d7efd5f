"""The commands, the configuration, checkpoints and the training loop: `python cebm.py --help`."""

import atexit
import copy
import difflib
import fcntl
import importlib
import io
import json
import math
import os
import signal
import sys
import time
import zipfile
from contextlib import suppress
from dataclasses import asdict, make_dataclass
from functools import lru_cache, partial
from pathlib import Path

import click
import yaml
from click import ClickException as Failure  # one message on stderr, exit status 1


class Lazy:
    """A module that is imported when it is first used, so that `--help` answers at once."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        return getattr(importlib.import_module(self._name), attribute)


def _tree(model: str, source: str, overrides: dict) -> dict:
    """The sections of a preset: recipes.common, then what the model, its data and trunk set."""
    kind = BOOK["models"].get(str(overrides.get("model.name")), BOOK["models"][model])
    images = dict(BOOK["data"].get(str(overrides.get("data.name")), BOOK["data"][source]))
    shape, recipe = BOOK["trunks"][images.pop("trunk")], BOOK["recipes"][kind["recipe"]]
    tree = {section: COMMON[section] | recipe.get(section, {}) for section in COMMON | recipe}
    tree["data"] |= {"name": source, **images}
    tree["model"] |= {"name": model, **shape, **kind["set"]}
    for (section, key), value in ((k.split("."), v) for k, v in overrides.items()):
        tree[section][key] = value
    return tree


def _nearest(word, known) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else f"; there are: {', '.join(known)}"


def _checked(key: str, value, like, limit):
    """`value` with the type of `like` and within `limit`, or a usage error that names them."""
    if isinstance(like, dict):
        if not isinstance(value, dict):
            raise click.UsageError(f"{key or 'the configuration'} has to be a section of keys")
        for k in set(value) ^ set(like):
            wrong = f"unknown key {key}{k}{_nearest(k, like)}"
            raise click.UsageError(wrong if k in value else f"key {key}{k} is missing")
        return {
            k: _checked(f"{key}{k}" + "." * isinstance(v, dict), value[k], v, limit[k])
            for k, v in like.items()
        }
    if isinstance(like, list) and isinstance(value, (list, tuple)) and len(value) == len(like):
        return [_checked(key, v, like[0], limit) for v in value]
    if isinstance(like, float) and type(value) in (int, str):
        with suppress(ValueError, OverflowError):
            value = float(value)  # YAML reads 1e-4, without a dot, as a word
    kind = {int: "a whole number", float: "a number"}.get(type(like))
    if type(value) is type(like) and (
        limit[0] <= value <= limit[1]
        if kind  # false for NaN too
        else not isinstance(like, list) and value in limit
    ):
        return value
    wanted = (
        f"one of {', '.join(map(str, limit))}"
        if isinstance(like, (str, bool))
        else (f"{kind or f'a list of {len(like)} numbers, each'} from {limit[0]:,} to {limit[1]:,}")
    )
    raise click.UsageError(f"{key} = {value!r}: it has to be {wanted}")


torch, np, data, evaluate, models, sampling = map(
    Lazy, ("torch", "numpy", "data", "evaluate", "models", "sampling")
)
FORMAT = 7  # of the checkpoint; another number is refused
CHAINLESS = "vae", "gan", "hdge"  # how the names of models without chains end
TORCHRUN = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # ranks of others are not ours
try:
    BOOK = yaml.safe_load((Path(__file__).parent / "configs.yaml").read_text())
    COMMON, LIMITS = BOOK["recipes"]["common"], BOOK["limits"]
    # A frozen dataclass a section: keys and types of recipes.common, whose bounds are in `limits`.
    SECTIONS = {
        name: make_dataclass(name, ((k, type(v)) for k, v in values.items()), frozen=True)
        for name, values in COMMON.items()
    }
    Config = make_dataclass("Config", SECTIONS.items(), frozen=True)
    PRESETS = {n: (p["model"], p["data"], p["set"]) for n, p in BOOK["presets"].items()}
    PRESETS |= {f"{m}-{d}": (m, d, {}) for m, v in BOOK["models"].items() for d in v["data"]}
    PRESETS |= {
        f"{base}-{v}": (*PRESETS[base][:2], PRESETS[base][2] | kind["set"] | extra)
        for v, kind in BOOK["variants"].items()
        for base, extra in kind["of"].items()
    }
    for preset in PRESETS.values():
        _checked("", _tree(*preset), COMMON, LIMITS)
except (OSError, LookupError, AttributeError, TypeError, ValueError, Failure, yaml.YAMLError) as e:
    sys.exit("Error: configs.yaml: " + " ".join(repr(e).split()))
as_yaml = partial(yaml.safe_dump, sort_keys=False, default_flow_style=None)


def parse_config(tree) -> Config:
    """A plain dictionary of sections -> frozen `Config`; UsageError names what is wrong."""
    tree = _checked("", tree, COMMON, LIMITS)
    config = Config(**{name: section(**tree[name]) for name, section in SECTIONS.items()})
    name, image = config.model.name, config.data.image
    draws = name.endswith(("vae", "gan"))
    if min(image[1:]) < 8 or (draws and image[1:] not in ([28, 28], [32, 32])):
        wanted = "28 x 28 or 32 x 32" if draws else "at least 8 x 8"
        raise click.UsageError(f"data.image = {image}: {name} is for images of {wanted} pixels")
    if config.train.batch > config.chains.buffer and not name.endswith(CHAINLESS):
        raise click.UsageError(
            f"train.batch = {config.train.batch} must not exceed chains.buffer "
            f"= {config.chains.buffer}, a slot for each chain"
        )
    return config


def compose(preset: str, settings=()) -> Config:
    """The configuration of `preset` with KEY=VALUE `settings` over it; keys as `train.rate`."""
    full, chosen = sorted(f"{name}.{k}" for name in COMMON for k in COMMON[name]), {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        matches = [k for k in full if key in (k, k.split(".")[1])]
        if not equals or len(matches) != 1:
            why = "is not KEY=VALUE" if not equals else f"is no key{_nearest(key, full)}"
            why = f"could be {' or '.join(matches)}" if len(matches) > 1 else why
            raise click.UsageError(f"--set {setting}: {key!r} {why}")
        try:
            chosen[matches[0]] = yaml.safe_load(text)
        except Exception:  # of dates and explicit types PyYAML raises what Python does
            raise click.UsageError(f"--set {setting}: {text!r} is not a YAML value") from None
    if preset not in PRESETS:
        raise click.UsageError(f"no preset {preset!r}{_nearest(preset, PRESETS)}")
    return parse_config(_tree(*PRESETS[preset][:2], PRESETS[preset][2] | chosen))


def write_whole(path: Path, content: bytes | None) -> None:
    """Replaces `path`, or what it links to, whole or not at all; None: tries if a result could."""
    target = Path(os.path.realpath(path))
    draft = target.parent / (target.name + (".try" if content is None else ".part"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (content is None and target.suffix == ".pt") or (path.exists() and not path.is_file()):
            raise OSError(0, "it is no regular file, or named as a checkpoint")
        with open(draft, "wb") as file:
            file.write(content or b"")
            file.flush()
            os.fsync(file.fileno())
        draft.unlink(missing_ok=True) if content is None else os.replace(draft, target)
        with suppress(OSError):  # not every file system can; the file is there already
            folder = os.open(target.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except OSError as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise Failure(f"cannot write {path}: {error.strerror}; what was there is intact") from error


def load_checkpoint(path) -> dict:
    """A checkpoint's tensors and plain values, on the CPU. Never runs code from the file."""
    try:
        if damaged := zipfile.ZipFile(path).testzip():  # torch itself checks no sums
            raise ValueError(f"{damaged} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["format"] != FORMAT:
            raise Failure(f"it is of format {state['format']}")
        state["config"] |= {k: v | state["config"][k] for k, v in COMMON.items()}  # newer keys too
        config, buffer = parse_config(state["config"]), state.get("buffer")
        shape = (config.chains.buffer, *config.data.image)
        fits = buffer is None or (buffer.shape == shape and buffer.dtype == torch.float32)
        weights = [*state["model"].values(), *(state.get("average") or {}).values()]
        if state["updates"] >= 0 and fits and all(v.isfinite().all() for v in weights):
            return state
        reason = "values that no run leaves"
    except Exception as error:  # torch and pickle raise what the damage happens to provoke
        reason = getattr(error, "message", getattr(error, "strerror", type(error).__name__))
    raise Failure(f"{path} is no whole checkpoint of format {FORMAT} ({reason}): take another copy")


def load_model(path, device="cpu"):
    """A checkpoint's model in evaluation mode on `device`, its `Config`, and all that it holds."""
    state = load_checkpoint(path)
    model = new_model(config := parse_config(state["config"]), device)
    try:
        model.load_state_dict((config.train.average and state.get("average")) or state["model"])
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise Failure(f"{path} is of another model: {str(error).splitlines()[-1]}") from error
    return model.eval(), config, state


def new_model(config, device, training=False):
    """The untrained model of `config`: the same seed, the same weights. Failure beyond memory."""
    build = partial(models.build, config.model, config.data.image, config.data.classes)
    with torch.device("meta"):
        weights = sum(p.numel() for p in build().parameters())
    if training:  # gradients, moments, two snapshots; chains; activations
        maps = 2 * sum(width / 4**i for i, width in enumerate(config.model.channels))
        weights = 12 * weights + math.prod(config.data.image[1:]) * (
            4 * config.data.image[0] * config.chains.buffer + maps * config.train.batch
        )
    need, memory = 4 * weights, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if torch.device(device).type == "cpu" and need > memory:
        raise Failure(
            f"model, batch or buffer need {need / 2**30:,.0f} GiB of memory, here are "
            f"{memory / 2**30:.0f}: choose smaller ones"
        )
    with evaluate.seeded(config.train.seed, torch.device("cpu")):
        return build().to(device, memory_format=torch.channels_last)


def load_images(config, split: str, data_dir: str):
    """uint8 images and labels of the data that `config` names."""
    c = config.data
    images, labels = data.load(c.name, split, data_dir, c.image, c.extra)
    if (found := int(labels.max()) + 1) != c.classes:
        raise Failure(f"{c.name}: {found} classes, not {c.classes} (train --set classes={found})")
    return images, labels


def learning_rate(update: int, train, halvings: int = 0) -> float:
    """The rate of update 1, 2, ...: linear warm-up, then constant or a cosine to 0."""
    angle = math.pi * (update - 1) / train.updates if train.decay == "cosine" else 0.0
    rate = train.rate * min(1.0, update / max(1, train.warmup)) * 0.5 * (1 + math.cos(angle))
    return rate * 0.5 ** max(0, halvings)


@lru_cache(1)
def epoch_order(seed: int, epoch: int, count: int, device):
    """The order of `count` images in an epoch, on the device: the one wait for it in an epoch."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).to(device)


def claimed(folder: Path):
    """Makes `folder` and locks it against a second `train`, until what it returns is closed."""
    try:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except OSError as error:
        why = "in use by another `train`" if isinstance(error, BlockingIOError) else error.strerror
        raise Failure(f"cannot write to {folder}: {why}; choose another --out") from error


def changes(old: dict, new: dict) -> str:
    """What differs of two configurations, but for speed and, where nothing hangs on it, length."""
    differing = {
        f"{s}.{k}": f"({old[s][k]}, now {v})"
        for s, part in new.items()
        for k, v in part.items()
        if old[s][k] != v and k not in ("compile", "threads")
    }
    flat = all(c["train"]["decay"] == "none" and not c["chains"]["final_steps"] for c in (old, new))
    if flat and old["train"]["updates"] < new["train"]["updates"]:
        del differing["train.updates"]
    return ", ".join(f"{k} {how}" for k, how in differing.items())


class Run:
    """What training changes: model, optimiser, chains, random numbers, the weights' average. Of
    several processes (`torchrun`) each has a share of the buffer and a generator of its own."""

    def __init__(self, config, device, rank: int, ranks: int):
        train, c, cuda = config.train, config.chains, device.type == "cuda"
        self.rank, self.ranks, self.model = rank, ranks, new_model(config, device, True)
        self.generator = (
            torch.cuda.default_generators[device.index or 0] if cuda else (torch.default_generator)
        )  # some losses draw from it too
        torch.manual_seed(train.seed + 1_000_003 * (rank + 1))  # not the numbers of the weights
        self.adam = torch.optim.Adam(
            self.model.parameters(),
            train.rate,
            fused=cuda or None,
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
        )
        self.parts = {"model": self.model, "optimiser": self.adam}
        self.buffer = self.model.chain and sampling.ReplayBuffer(
            c.buffer // ranks,
            config.data.image,
            c.reuse,
            self.generator,
            c.data_restarts,
            c.restart_std,
        )
        self.parts |= {"average": copy.deepcopy(self.model)} if train.average else {}
        self.model.forward = self.loss = self.model.loss
        if ranks > 1:  # gradients are averaged where the model is called
            self.loss = torch.nn.parallel.DistributedDataParallel(self.model)

    def snapshot(self) -> dict:
        """Copies of everything; of buffers and generators, those of all processes."""
        parts = [(self.buffer and self.buffer.images.cpu(), self.generator.get_state())]
        if self.ranks > 1:
            torch.distributed.all_gather_object(parts := parts * self.ranks, parts[0])
        return copy.deepcopy({name: part.state_dict() for name, part in self.parts.items()}) | {
            "buffer": self.buffer and torch.cat([images for images, _ in parts]),
            "generators": [generator for _, generator in parts],
        }

    def restore(self, state: dict) -> None:
        """Goes on from a snapshot, which stays as it is."""
        for name, part in self.parts.items():
            part.load_state_dict(copy.deepcopy(state.get(name, state["model"])))
        self.adam.param_groups[0].update(self.adam.defaults)  # the configuration's, not the file's
        if self.buffer:
            shares = state["buffer"].view(self.ranks, *self.buffer.images.shape)  # no broadcasting
            self.buffer.images.copy_(shares[self.rank])
        self.generator.set_state(state["generators"][self.rank])


def out_of_bounds(greatest: dict, level: dict, floor: dict, guard) -> str | None:
    """Which of the greatest magnitudes since the last checkpoint is not healthy, if any."""
    for name, value in greatest.items():
        healthy = max(floor.get(name, math.inf), level.get(name, 0.0))
        bound = min(guard.energy_bound, guard.runaway * healthy)
        if not value <= bound or (name == "gap" and value == 0 < level.get(name, 0)):  # NaN; dead
            return f"{name} of magnitude {value:.3g} (the bound is {bound:.3g})"


def train_model(config, folder: Path, data_dir, device, preset, change, rank, ranks) -> int:
    """Trains to `train.updates`, from the folder's checkpoint if any; exit status 0 or 130."""
    settings, c, guard, path = config.train, config.chains, config.guard, folder / "ckpt.pt"
    if any(n % ranks for n in (settings.batch, c.buffer)) or (
        config.model.standardise and settings.batch == ranks
    ):  # no deviation of one image
        raise click.UsageError(f"batch, buffer: not multiples of {ranks} processes, or too small")
    settings.threads and torch.set_num_threads(settings.threads)
    run, floor, other = Run(config, device, rank, ranks), {}, ""
    model, buffer, cuda = run.model, run.buffer, device.type == "cuda"
    rank and torch.distributed.barrier()  # the first process downloads
    images, labels = (part.to(device) for part in load_images(config, "train", data_dir))
    rank < 1 < ranks and torch.distributed.barrier()
    if len(images) < settings.batch:
        raise Failure(f"train.batch = {settings.batch}: there are {len(images)} training images")
    if model.chain == "langevin":  # magnitudes that noise alone and healthy runs reach
        pixels = guard.pixels + 4 * c.noise_std * math.sqrt(max(c.steps, c.final_steps))
        floor = {"gap": guard.gap, "pixel_min": pixels, "pixel_max": pixels}
    now = {"updates": 0, "level": {}, "greatest": torch.zeros(()), **run.snapshot()}
    kept = {
        "good": now,
        "candidate": now,
        "seconds": 0.0,
        "log": "",
        "rollbacks": [],
        "precision": "bfloat16" if sampling.bfloat16_pays(device) else "float32",
    }
    if path.exists() or change:
        state = load_checkpoint(path)
        other = changes(state["config"], asdict(config))
        if other and (not change or "model.name" in other or "train.seed" in other):
            raise Failure(
                f"{path} has other settings, {other}: choose another --out, or, but for "
                "the model's name and the seed, --change"
            )
        try:
            preset = state["preset"] + (other and f"; from update {state['updates']} on {other}")
            if (there := len(state["generators"])) != ranks:
                raise Failure(
                    f"{path} is of a run of {there} processes, here are {ranks}: go on "
                    f"with torchrun --nproc-per-node={there}, or choose another --out"
                )
            state.setdefault("average", state["model"])  # of a --change that begins one
            "train.precision" in other and state.update(precision=kept["precision"])  # if auto now
            now, kept = ({key: state[key] for key in part} for part in (now, kept))
            run.restore(now)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise Failure(
                f"{path} cannot be gone on from, a part is missing or of another shape "
                f"or device ({error!r:.80}): choose another --out"
            ) from error
    kept |= {"precision": settings.precision} if settings.precision != "auto" else {}
    write = write_whole if rank == 0 else lambda *_: None
    write(folder / "config.yaml", as_yaml(asdict(config)).encode())
    bfloat16, rollbacks, begun = kept["precision"] == "bfloat16", kept["rollbacks"], kept["seconds"]
    mover = lru_cache(1)(
        lambda steps: sampling.mover(
            model,
            model.energy,
            steps,
            c.step_size,
            c.noise_std,
            run.generator,
            cuda,
            settings.compile,
            bfloat16=bfloat16,
            bound=c.bound,
        )
    )

    def learn(rate, x, y, *chains):  # moves the weights and their average: figures of `names`
        run.adam.param_groups[0].update(lr=rate, capturable=cuda)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss, metrics = run.loss(x, y, *chains or [None])
        run.adam.zero_grad(set_to_none=True)
        loss.backward()
        run.adam.step()
        if "average" in run.parts:  # an exponential one
            states = (part.state_dict().values() for part in (run.parts["average"], model))
            for mean, value in zip(*states, strict=True):
                mean.lerp_(value, share) if mean.is_floating_point() else mean.copy_(value)
        metrics |= {f"pixel_{end}": getattr(x, end)() for x in chains for end in ("min", "max")}
        names[:] = "loss", *metrics
        return torch.stack([loss, *metrics.values()]).detach()

    learner = lru_cache(1)(
        lambda rollbacks: (  # the optimiser's state is another after each
            sampling.Graph([learn], run.generator) if cuda and ranks == 1 else learn
        )
    )
    draws = settings.pictures if buffer or hasattr(model, "generate") else 0
    started, made, interrupted, names, share = time.monotonic(), 0, [], [], 1 - settings.average
    for number in (signal.SIGINT, signal.SIGTERM):  # from now on they end the run after an update
        signal.signal(number, lambda *_: interrupted.append(1))

    def save() -> None:
        torch.save(
            {
                **now,
                **kept,
                "format": FORMAT,
                "preset": preset,
                "config": asdict(config),
                "seed": settings.seed,
                "device": device.type,
                "torch": str(torch.__version__),
                "python": sys.version.split()[0],
            },
            content := io.BytesIO(),
        )
        write(path, content.getbuffer())

    def say(line: str) -> None:
        try:
            click.echo(line)
        except OSError:  # of `train | tee log` Ctrl-C ends tee first; a full disk: save, then end
            interrupted.append(os.dup2(os.open(os.devnull, os.O_WRONLY), 1))

    path.exists() and say(f"going on after update {now['updates']} of {path}")
    say(f"{settings.updates} updates in {kept['precision']}; every {settings.log_every}:")
    update, greatest = now["updates"], now["greatest"].to(device)  # 0, then one a metric
    other and save()  # also where no update is left
    while update < settings.updates:
        if len(rollbacks) > guard.rollbacks:  # of this run, or of the one gone on from
            raise Failure(
                "diverged {} times, last at update {update}: {why}. {} is good, of update"
                " {to}. Choose another --out and a lower train.rate or more chains.steps".format(
                    len(rollbacks), path, **rollbacks[-1]
                )
            )
        epoch, position = divmod(update, len(images) // settings.batch)
        order = epoch_order(settings.seed, epoch, len(images), device)[position * settings.batch :]
        chosen, update, made = order[: settings.batch].chunk(ranks)[rank], update + 1, made + 1
        rate = learning_rate(update, settings, len(rollbacks) - guard.same_rate)
        x = data.normalise(images[chosen]).contiguous(memory_format=torch.channels_last)
        x += config.data.noise_std * torch.randn(x.shape, generator=run.generator, device=device)
        inputs = [torch.full((), rate, device=device) if cuda else rate, x, labels[chosen]]
        if buffer:
            slots, chains = buffer.draw(x)
            steps = c.steps * ((c.final_steps or c.steps) / c.steps) ** (update / settings.updates)
            buffer.images[slots] = chains = mover(round(steps))(chains)
            inputs.append(chains)
        figures = learner(len(rollbacks))(*inputs)  # (names,)
        greatest = torch.maximum(figures.abs(), greatest)
        kept["seconds"] = begun + time.monotonic() - started
        last, reason, stop, old = update == settings.updates, "", 0, kept["good"]
        keep = last or update % settings.checkpoint_every == 0
        if keep or update % guard.every == 0 or (ranks > 1 and not cuda):  # torchrun waits 30 s
            weights = torch.nn.utils.get_total_norm(model.parameters()).detach()
            more = torch.stack([weights, torch.full_like(weights, len(interrupted))])
            seen = torch.cat([greatest, more]).nan_to_num(torch.inf)
            if ranks > 1:
                torch.distributed.all_reduce(seen, torch.distributed.ReduceOp.MAX)
            greatest, (*found, stop) = seen[:-2], seen.tolist()  # waits for the device
            found = dict(zip([*names, "weights"], found, strict=True))
            reason = out_of_bounds(found, old["level"], floor, guard)
        stop = stop or (ranks == 1 and interrupted)
        reason and rollbacks.append({"update": update, "to": old["updates"], "why": reason})
        if update % settings.log_every == 0 or last or reason:
            row = {
                "update": update,
                **dict(zip(names, figures.tolist(), strict=True)),
                "rollbacks": len(rollbacks),
                "seconds": round(kept["seconds"], 1),
                "updates_per_second": round(made / (kept["seconds"] - begun), 3),
            }
            kept["log"] = kept["log"] or ",".join(row) + "\n"
            kept["log"] += ",".join(map(str, row.values())) + "\n"
            write(folder / "log.csv", kept["log"].encode())
            say("  ".join(f"{k} {v:{'' if type(v) is int else '.5g'}}" for k, v in row.items()))
        if reason:
            run.restore(old)
            torch.manual_seed(settings.seed + len(rollbacks) + 1_000_003 * (rank + 1))
            now = kept["good"] = kept["candidate"] = {k: old.get(k) for k in now} | run.snapshot()
            say(f"update {update}: {reason}; back to update {now['updates']}")
            update, greatest = now["updates"], torch.zeros_like(greatest)
            save()
            continue
        if draws and (update % math.ceil(settings.updates / draws) == 0 or last):
            with evaluate.seeded(settings.seed, device), torch.no_grad():
                shown = buffer.images[:64] if buffer else model.eval().generate(64)
            write(folder / "samples" / f"{update:07d}.png", evaluate.grid_png(shown))
            model.train()
        if keep or (stop and all(v.isfinite().all() for v in model.state_dict().values())):
            now = {**now, "updates": update, "greatest": greatest, **run.snapshot()}
            if update % settings.checkpoint_every == 0:  # healthy ever since the candidate
                top, now["greatest"] = guard.runaway, (greatest := torch.zeros_like(greatest))
                now["level"] = {k: min(found[k], top * v) for k, v in floor.items()}
                kept["good"], kept["candidate"] = kept["candidate"], now
            save()
        if stop:
            break
    knn = f"python cebm.py knn {path}" + f" --data-dir {data_dir}" * (config.data.name != "glyphs")
    say(
        f"done: {path}\nnow try:\n  {knn}\n  python cebm.py sample {path}"
        if update >= settings.updates
        else "interrupted; "
        f"{'the same command goes on from' if path.exists() else 'nothing at'} {path}"
    )
    return 0 if update >= settings.updates else 130


def _device(_context, _parameter, name: str):
    sampling.keep_freed_memory()
    try:
        auto = name == "auto" and ("cuda" if torch.cuda.is_available() else "cpu")
        if (device := torch.device(auto or name)).type == "cuda":
            device = torch.device("cuda", device.index or int(TORCHRUN.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).tolist()
        return device
    except (RuntimeError, AssertionError) as error:
        raise click.UsageError(f"--device {name}: {str(error).splitlines()[0]}") from error


CKPT = partial(click.argument, type=click.Path(exists=True, dir_okay=False), metavar="CKPT")
OUT = partial(
    click.option,
    metavar="FILE",
    callback=lambda _context, _parameter, path: (
        path if (path is None) else write_whole(Path(path), None) or path
    ),
)  # refused before the work
DATA_DIR = click.option("--data-dir", default="data", help="Where data are, or are downloaded to.")
DEVICE = click.option("--device", default="auto", callback=_device, help="cpu or cuda.")


def table_command(figures):
    """A command that prints a row a checkpoint, `figures` of its model, config and both sets."""

    def command(checkpoints, form, data_dir, device, **options):
        rows = []
        try:
            for path in checkpoints:
                model, config, state = load_model(path, device)
                sets = [load_images(config, split, data_dir) for split in ("train", "test")]
                row = {
                    "checkpoint": path,
                    "model": config.model.name,
                    "data": config.data.name,
                    "updates": state["updates"],
                }
                rows.append(row | figures(model, config, *sets, data_dir, device, **options))
        finally:  # also when a later checkpoint fails
            if rows:
                click.echo(json.dumps(rows) if form == "json" else evaluate.table(rows, bool(form)))

    command.__dict__ |= figures.__dict__  # its click options
    for option in (
        CKPT("checkpoints", nargs=-1, required=True, metavar="CKPT..."),
        DATA_DIR,
        click.option("--json", "form", flag_value="json", help="For a program."),
        DEVICE,
        click.option("--markdown", "form", flag_value="markdown", help="For a README."),
    ):
        command = option(command)
    return main.command(figures.__name__, help=figures.__doc__)(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main():
    """Conjugate energy-based models. Start with `python cebm.py train`, a matter of minutes."""


@main.command()
@click.option("--preset", default="quickstart", help="See `show`.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a value of the preset, say train.rate=3e-4; may be repeated.",
)
@click.option("--out", type=click.Path(file_okay=False), help="Run folder.  [default: runs/PRESET]")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="The same as --set train.seed=N.")
@click.option("--change", is_flag=True, help="Go on with the run in --out under other settings.")
@DATA_DIR
@DEVICE
def train(preset, settings, out, seed, change, data_dir, device):
    """Train, or go on where the run folder's checkpoint stopped.

    Example: python cebm.py train --preset cebm-fmnist --set chains.steps=20
    """
    config = compose(preset, settings + (() if seed is None else (f"train.seed={seed}",)))
    folder = Path(out or f"runs/{preset}")
    rank, ranks = (int(TORCHRUN.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1)))
    if ranks > 1:  # DDP would import `nn` later, and its default arguments keep the group for ever
        importlib.import_module("torch.distributed.nn")
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(torch.distributed.destroy_process_group)
    with claimed(folder) if rank == 0 else open(os.devnull, "w") as lock:
        sys.stdout = lock if rank else sys.stdout  # the first process alone prints
        sys.exit(train_model(config, folder, data_dir, device, preset, change, rank, ranks))


@main.command()
@CKPT("checkpoint")
@click.option(
    "--from",
    "source",
    type=click.Choice(["buffer", "noise"]),
    default="buffer",
    help="Where chains start; a buffer has at most its own number.",
)
@click.option(
    "--given",
    type=click.IntRange(1, 1000),
    metavar="N",
    help="Draw from p(x | z), z the latents of each of N test images, evenly spaced.",
)
@click.option("--steps", type=click.IntRange(0), help="Of the chains.  [default: as in training]")
@click.option(
    "--refine",
    type=click.IntRange(0),
    metavar="STEPS",
    help="A GAN's latents first take STEPS Langevin steps on -log p(z) - logit D(G(z)).",
)
@click.option("--count", type=click.IntRange(1, 1000), default=64)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0)
@OUT("--out", default="samples.png")
@DATA_DIR
@DEVICE
def sample(checkpoint, source, given, steps, refine, count, seed, out, data_dir, device):
    """Draw a grid of samples into a PNG: chains, or a generator's images.

    Example: python cebm.py sample runs/quickstart/ckpt.pt --from noise
    """
    model, config, state = load_model(checkpoint, device)
    name, c, originals = config.model.name, config.chains, torch.empty(0, *config.data.image)
    draws, infers = hasattr(model, "decode"), hasattr(model, "posterior")  # no chains; p(z | x)
    wrong = {
        "--refine": refine and name != "gan",
        "--given": given and not infers,
        "--steps": draws and steps is not None,
        "--from": draws and source == "noise",
        "--steps with --given": steps is not None and given and model.chain == "gibbs",
    }
    for option in filter(wrong.get, wrong):
        raise click.UsageError(f"{option} is not for {name}")
    chain = c.step_size, c.noise_std, (rng := torch.Generator(device).manual_seed(seed + 500_009))
    if given:
        parts = load_images(config, "test", data_dir)[0].tensor_split(given)  # a folder is sorted
        originals = data.normalise(torch.cat([part[:1] for part in parts]))
        count, z = len(originals), model.represent(originals.to(device)).detach()  # (N, D)
    if draws:
        with evaluate.seeded(seed + 500_008, device):  # not the numbers of weights or of training
            z = z if given else model.prior.sample(count).detach()
        z = sampling.langevin(model.latent_energy, z, refine, *chain) if refine else z
        x = model.decode(z).detach()
    else:
        energy = (lambda x: model.joint_energy(x, z)) if given else model.energy
        steps, stored = c.final_steps or c.steps if steps is None else steps, state.get("buffer")
        if given and model.chain == "gibbs":
            steps, start = 1, originals.to(device)
        elif given or source == "noise" or stored is None:
            if not given and source == "buffer":
                click.echo(f"{checkpoint} has no replay buffer: starting from noise")
            start = sampling.uniform((count, *config.data.image), rng)
        else:
            order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(seed))
            start = stored[order[:count]].to(device)
        x = sampling.mover(model, energy, steps, *chain, bound=c.bound)(start)
        click.echo(
            f"{steps} steps: mean energy {energy(start).mean().item():.4g} -> "
            f"{energy(x).mean().item():.4g}, pixels {x.min():.3g} to {x.max():.3g}"
        )
    write_whole(Path(out), evaluate.grid_png(torch.cat([originals, x.cpu()]), given and count))
    click.echo(out)


@table_command
@click.option("--limit", type=click.IntRange(1), help="At most N training images, evenly spaced.")
@OUT("--plot", help="The last CKPT's confusion matrix as a PNG.")
@click.option("--whiten", is_flag=True, help="Bring latents' principal directions to one scale.")
def knn(model, config, train, test, data_dir, device, limit, plot, whiten):
    """Exact 1-nearest-neighbour test accuracy (supplement E.1), in percent.

    In latent space, that of the same network untrained, and pixel space; a classifier's own too.

    Example: python cebm.py knn runs/quickstart/ckpt.pt
    """
    row, classes, step = {}, config.data.classes, -(-len(train[1]) // (limit or len(train[1])))
    spaces = {
        "latent": model.represent,
        "untrained": new_model(config, device).eval().represent,
        "pixel": lambda x: (x.flatten(1) * 127.5 + 127.5).round().byte(),
    }
    for space, represent in spaces.items():
        a, b = (evaluate.in_batches(represent, x, device) for x in (train[0][::step], test[0]))
        a, b = evaluate.whiten(a, b) if whiten and space != "pixel" else (a, b)
        predicted = train[1][::step][evaluate.nearest(a, b).cpu()]
        row[space] = round(100 * (predicted == test[1]).double().mean().item(), 2)
        if space == "latent":
            counts = torch.bincount(test[1] * classes + predicted, minlength=classes**2)
            row["confusion"] = counts.view(classes, classes).tolist()
    if plot:
        write_whole(
            Path(plot),
            evaluate.confusion_png(
                torch.tensor(row["confusion"]),
                data.class_names(config.data.name, data_dir, classes),
            ),
        )
    if config.model.name in ("jem", "hdge"):
        right = evaluate.in_batches(model.f, test[0], device).argmax(1).cpu() == test[1]
        row["accuracy"] = round(100 * right.double().mean().item(), 2)
    return row


@table_command
@click.option("--scale", is_flag=True, help="Centre the latents and scale all alike to variance 1.")
def probe(model, config, train, test, data_dir, device, scale):
    """Test accuracy of logistic regression on the latents, in percent.

    With 1, 10, 100 (if there are as many) and all labels a class; mean and deviation of ten draws.

    Example: python cebm.py probe runs/quickstart/ckpt.pt
    """
    a, b = (evaluate.in_batches(model.represent, s[0], device).cpu() for s in (train, test))
    if scale:  # the penalty bears harder on small latents
        a, b = ((x - a.mean(0)) / a.var(0).mean().sqrt().clamp(min=1e-30) for x in (a, b))
    scores = {
        n: evaluate.probe(a, train[1], b, test[1], config.data.classes, n)
        for n in (1, 10, 100, None)
        if (n or 0) <= train[1].bincount().min()
    }
    return {
        f"{n or 'all'}{what}": round(score, 2)
        for n, pair in scores.items()
        for what, score in zip(("", " std"), pair, strict=True)
    }


@table_command
@click.option(
    "--against",
    multiple=True,
    metavar="DATA",
    type=click.Choice(LIMITS["data"]["name"]),
    help="Another data set; may be repeated. Uniform noise and constant images always.",
)
def ood(model, config, train, test, data_dir, device, against):
    """AUROC of telling the test set from other data, in percent.

    By log p(x) up to a constant, that is -E(x) or a VAE's ELBO, and by minus its gradient's norm.

    Example: python cebm.py ood runs/cebm-fmnist/ckpt.pt --against mnist
    """
    if not hasattr(model, "energy"):
        raise Failure(f"{config.model.name} has no density of images to score with")
    own, generator = test[0], torch.Generator().manual_seed(0)
    level = torch.randint(256, (len(own), 1, 1, 1), generator=generator)
    others = {name: data.load(name, "test", data_dir, config.data.image)[0] for name in against}
    others["uniform"] = torch.randint(256, own.shape, generator=generator).byte()
    others["constant"] = level.expand(own.shape).byte()
    inside, *outside = (evaluate.density_scores(model, x, device) for x in (own, *others.values()))
    return {
        f"{name} {k}": round(evaluate.auroc(inside[k], scores[k]), 2)
        for name, scores in zip(others, outside, strict=True)
        for k in inside
    }


@main.command()
@CKPT("checkpoint")
@click.option("--split", type=click.Choice(["train", "test"]), default="test")
@OUT("--map", help="A picture of the means too: UMAP if installed, else PCA.")
@OUT("--out", default="latents.npz")
@DATA_DIR
@DEVICE
def export(checkpoint, split, map, out, data_dir, device):
    """Write each image's latent mean, std, energy (where the model has them) and label to an .npz.

    The mean is the vector that `knn` uses, the std that of the whole posterior.

    Example: python cebm.py export runs/quickstart/ckpt.pt --map map.png
    """
    if map and os.path.realpath(map) == os.path.realpath(out):
        raise click.UsageError(f"--map and --out are both {map}")
    model, config, _ = load_model(checkpoint, device)
    images, labels = load_images(config, split, data_dir)
    columns = {
        "mean": model.represent,
        "energy": getattr(model, "energy", None),
        "std": hasattr(model, "posterior") and (lambda x: model.posterior(x).variance.sqrt()),
    }
    with evaluate.seeded(0, device):
        arrays = {
            k: evaluate.in_batches(f, images, device).cpu().numpy() for k, f in columns.items() if f
        } | {"labels": labels.numpy()}
    np.savez(content := io.BytesIO(), **arrays)
    write_whole(Path(out), content.getvalue())
    click.echo(f"{out}: " + ", ".join(f"{k} {v.shape}" for k, v in arrays.items()))
    if map:
        points, method = evaluate.plane(torch.tensor(arrays["mean"]))
        names = data.class_names(config.data.name, data_dir, config.data.classes)
        write_whole(
            Path(map),
            evaluate.map_png(
                points, labels, names, f"{method}, {config.model.name}, {config.data.name} {split}"
            ),
        )
        click.echo(f"{map}: {method}")


@main.command()
@click.argument("what", required=False, metavar="[PRESET or CKPT]")
def show(what):
    """List the presets, or print one preset's whole configuration, or say what a checkpoint is.

    Example: python cebm.py show cebm-fmnist
    """
    if what is None:
        for name, c in ((name, compose(name)) for name in PRESETS):
            grown = f" to {c.chains.final_steps}" * (c.chains.final_steps > 0)
            none = c.model.name.endswith(CHAINLESS)
            click.echo(
                f"{name:20} {c.train.updates} updates, batch {c.train.batch}, rate "
                f"{c.train.rate:g}" + f", chains of {c.chains.steps}{grown}" * (not none)
            )
    elif what in PRESETS:
        click.echo(as_yaml(asdict(compose(what))), nl=False)
    elif os.path.isfile(what):
        state = load_checkpoint(what)
        large = "model optimiser average buffer generators good candidate greatest log".split()
        click.echo(
            as_yaml(
                {k: v for k, v in state.items() if k not in large}
                | {"tensors": sum(v.numel() for v in state["model"].values())}
            ),
            nl=False,
        )
    else:
        raise click.UsageError(f"{what!r} is neither a preset nor a file{_nearest(what, PRESETS)}")


if __name__ == "__main__":
    sys.stdout and sys.stdout.reconfigure(errors="backslashreplace")  # of names in other encodings
    sys.excepthook = lambda kind, error, trace: (  # no traceback for want of memory or disk
        click.echo(f"Error: {error!r:.150}", err=True)
        if isinstance(error, OSError) or "memory" in repr(error).lower()
        else sys.__excepthook__(kind, error, trace)
    )
    main()
