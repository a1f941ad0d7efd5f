"""Speed and memory beside what they are measured against, in one run: medians of several rounds.

    python tests/benchmark.py [--preset NAME] [--data-dir DIR] [--peers] [--json]
    python tests/benchmark.py --growth FILE [--preset NAME]

`naive` is the loop of the public code bases: float32, contiguous, parameters that ask for
gradients, `autograd.grad` a step. `reference` is `sampling.langevin`, `float32` and `bfloat16` are
what `train` runs with either precision (on a GPU compiled, and as CUDA graphs; without a preset's
`bound`, `average` and `threads`), the latter only where the hardware multiplies in it. The matrix
rate is that of a 2048 x 2048 product in the same precision, in turn with the rest.

`--peers` times the Langevin samplers of other packages too, if they are installed (`pip install
--no-deps torchebm ebmkit`), on the network of `naive`, and says what the chains of `COSTS` cost.
`--growth` times updates of `train`, each kind in a process of its own, against batch, image side,
chain length and buffer, and draws them.
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import click
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import cebm  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import sampling  # noqa: E402


def clock(function, device) -> float:
    """Seconds of one call, the device's work included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def medians(tasks: dict, device, rounds: int) -> dict[str, float]:
    """Median seconds of each task; they take turns, after calls that do not count: a GPU records
    at the fourth."""
    for function in list(tasks.values()) * (5 if device.type == "cuda" else 1):
        function()
    times = [{name: clock(f, device) for name, f in tasks.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in tasks}


def flops_a_step(model, image_shape) -> float:
    """Of one image's forward pass and its backward pass to the pixels: 4 a multiply-add."""
    count, hooks = [], []
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            hooks.append(
                layer.register_forward_hook(
                    lambda m, _, out: count.append(4 * out[0].numel() * m.weight[0].numel())
                )
            )
    with torch.no_grad():
        model.energy(torch.zeros(1, *image_shape))
    for hook in hooks:
        hook.remove()
    return sum(count)


def updater(model, move, buffer, config, bfloat16: bool, device, fast=False):
    """A whole update: chains, loss, optimiser, `fast` recorded; on noise in place of data."""
    optimiser = torch.optim.Adam(
        model.parameters(), config.train.rate, fused=fast or None, capturable=fast
    )
    x = torch.rand(config.train.batch, *config.data.image, device=device) * 2 - 1
    y = torch.zeros(len(x), dtype=torch.long, device=device)

    def learn(chains):
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            loss, _ = model.loss(x, y, chains)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        return loss.detach()

    learn = sampling.GraphedFunction([learn], buffer.generator) if fast else learn

    def update():
        slots, chains = buffer.draw(x)
        chains = move(chains)
        buffer.store(slots, chains)
        learn(chains)

    return update


def naive_model(config, device):
    """In torch's own memory layout; every parameter asks for a gradient."""
    return models.build(config.model, config.data.image, config.data.classes).to(device)


def sampler_kinds(device) -> tuple[str, ...]:
    """The precisions that `train` would run in; emulated bfloat16 would take hours."""
    return ("float32", "bfloat16") if sampling.bfloat16_pays(device) else ("float32",)


def ways(config, steps: int, slow, model, generator, peers=False) -> dict:
    """Functions that move chains by `steps`, by name; `slow` is a model as `naive_model` makes."""
    c, gpu = replace(config.chains, bound=0.0), generator.device.type == "cuda"
    found = {
        "naive": lambda x: sampling.langevin(
            slow.energy, x, steps, c.step_size, c.noise_std, generator
        ),
        "reference": lambda x: sampling.langevin(
            model.energy, x, steps, c.step_size, c.noise_std, generator
        ),
    }
    if peers:
        found |= peer_ways(c, steps, slow)
    for kind in sampler_kinds(generator.device):
        bfloat16 = kind == "bfloat16"
        found[kind] = sampling.mover(
            "langevin", model, model.energy, steps, c, generator, bfloat16, record=gpu, compile=gpu
        )
    return found


def peer_ways(c, steps: int, slow) -> dict:
    """As `ways`, by the samplers of torchebm and ebmkit, if they are installed."""
    found = {}
    with suppress(ImportError):
        from torchebm.core import BaseModel
        from torchebm.samplers import LangevinDynamics

        class Energy(BaseModel):
            def __init__(self):
                super().__init__()
                self.inner = slow

            def forward(self, x):
                return self.inner.energy(x)

        # Its noise has the standard deviation noise_scale sqrt(2 step_size).
        noise = c.noise_std / math.sqrt(2 * c.step_size)
        torchebm = LangevinDynamics(Energy(), c.step_size, noise)
        found[f"torchebm {version('torchebm')}"] = lambda x: torchebm.sample(x, n_steps=steps)
    with suppress(ImportError):
        from ebm.samplers import LangevinDynamics as PeerDynamics

        ebmkit = PeerDynamics(c.step_size, steps, c.noise_std)
        found[f"ebmkit {version('ebmkit')}"] = lambda x: ebmkit.sample(slow.energy, x)
    return found


def chains(config, device, rounds: int, peers=False) -> list[dict]:
    """A row for each path: ms a step, ms an update, speed-ups, arithmetic rate."""
    c, shape, b = config.chains, config.data.image, config.train.batch
    generator = torch.Generator(device).manual_seed(0)
    slow, model = naive_model(config, device), cebm.new_model(config, device)
    x = sampling.uniform((b, *shape), generator)
    gpu, kinds = device.type == "cuda", sampler_kinds(device)
    few = c.steps if gpu else 2
    square = torch.randn(2048, 2048, device=device)
    squares = {kind: square.to(getattr(torch, kind)) for kind in kinds}
    moves = ways(config, few, slow, model, generator, peers)
    tasks = {name: partial(move, x) for name, move in moves.items()}
    tasks |= {f"product {kind}": partial(torch.matmul, s, s) for kind, s in squares.items()}
    step = medians(tasks, device, rounds)
    buffer = sampling.ReplayBuffer(c.buffer, shape, c.reuse, generator)
    updates = {
        name: updater(
            model if name in ("reference", *kinds) else slow,
            move,
            buffer,
            config,
            name == "bfloat16",
            device,
            fast=gpu and name in kinds,
        )
        for name, move in ways(config, c.steps, slow, model, generator, peers).items()
    }
    update = medians(updates, device, 3)
    flops, rows = flops_a_step(naive_model(config, "cpu"), shape) * b, []
    for name in moves:
        rate = 2 * 2048**3 / step[f"product {'bfloat16' if name == 'bfloat16' else 'float32'}"]
        reached = flops * few / step[name]
        rows.append(
            {
                "path": name,
                "ms a step": 1000 * step[name] / few,
                "step speedup": step["naive"] / step[name],
                "ms an update": 1000 * update[name],
                "updates a second": 1 / update[name],
                "update speedup": update["naive"] / update[name],
                "GFLOP/s": reached / 1e9,
                "of the matrix rate": reached / rate,
            }
        )
    return rows


# Chains to the authors' 1-NN on Fashion-MNIST, 84.31: what, preset, updates, steps in each. The
# authors ran their recipe to its end; `-fast` was above at its next score after 4,500 updates
# (docs/experiments.csv, study `restarts`, seed 0, cosine).
COSTS = (
    ("the paper's recipe", "cebm-fmnist", 90_000, 60),
    ("-fast", "cebm-fmnist-fast", 7_500, 10),
)


def costs(device, rounds: int) -> list[dict]:
    """A row for each path and a column for each of `COSTS`: ms a step, hours of chains."""
    rows = {}
    for what, preset, updates, steps in COSTS:
        config = cebm.compose(preset)
        generator = torch.Generator(device).manual_seed(0)
        x = sampling.uniform((config.train.batch, *config.data.image), generator)
        few = steps if device.type == "cuda" else 2
        models_there = naive_model(config, device), cebm.new_model(config, device)
        moves = ways(config, few, *models_there, generator, peers=True)
        seconds = medians({k: partial(move, x) for k, move in moves.items()}, device, rounds)
        for name, value in seconds.items():
            row = rows.setdefault(name, {"path": name})
            row[f"{what}, ms a step"] = 1000 * value / few
            row[f"{what}, h"] = updates * steps * value / few / 3600
    return list(rows.values())


GROWTH = {  # key -> values; the preset's are the rest
    "train.batch": (8, 16, 32, 64, 128, 256, 512),
    "data.image": tuple([1, side, side] for side in (28, 32, 64, 128)),
    "chains.steps": (5, 10, 20, 40, 60),
    "chains.buffer": (1000, 5000, 20_000, 80_000),
}


def growth(preset: str, rounds: int) -> list[dict]:
    """A row for each setting of `GROWTH`: seconds an update and peak memory."""
    rows = []
    for key, values in GROWTH.items():
        for value in values:
            settings = [f"{key}={json.dumps(value)}"]
            code = f"import benchmark; benchmark.time_updates({preset!r}, {settings!r}, {rounds})"
            seconds, memory = in_child(code)
            size = value[1] if key == "data.image" else value
            rows.append({"key": key, "value": size, "s an update": float(seconds), "MiB": memory})
    return rows


def time_updates(preset: str, settings: list[str], rounds: int) -> None:
    """Prints the median seconds of `train`'s updates, on noise in place of images."""
    config, device = cebm.compose(preset, settings), torch.device("cpu")
    sampling.keep_freed_memory()
    count = max(1000, config.train.batch)
    images = torch.randint(256, (count, *config.data.image), dtype=torch.uint8)
    precision = sampler_kinds(device)[-1]
    trainer = cebm.Trainer(
        config, images, torch.zeros(count).long(), device, precision, cebm.Processes(0, 1)
    )

    def update():
        x, y = trainer.next_batch()
        trainer.learn(x, y, trainer.move_chains(x))

    print(medians({"update": update}, device, rounds)["update"])


def growth_figure(rows: list[dict]):
    """Seconds and memory against each key of `GROWTH`, in doubly logarithmic axes."""
    figure = evaluate.new_figure(12, 6)
    grid = figure.subplots(2, len(GROWTH), sharey="row")
    grid[1, 0].set_ylim(500, 10_000)
    for column, key in enumerate(GROWTH):
        points = [row for row in rows if row["key"] == key]
        for axes, measure in zip(grid[:, column], ("s an update", "MiB"), strict=True):
            axes.loglog([p["value"] for p in points], [p[measure] for p in points], "o-")
            axes.set_xticks([p["value"] for p in points], [f"{p['value']:,}" for p in points])
            axes.minorticks_off()
            axes.tick_params("x", rotation=60, labelsize=8)
            axes.grid(alpha=0.3)
        grid[1, column].set_xlabel("data.image, side" if key == "data.image" else key)
    grid[0, 0].set_ylabel("seconds an update")
    grid[1, 0].set_ylabel("peak memory, MiB")
    return figure


def one_step_difference(config, device) -> float:
    """|bfloat16 step - float32 step| / |float32 step|, without noise, from uniform noise."""
    model, x = cebm.new_model(config, device), torch.rand(config.train.batch, *config.data.image)
    x = x.to(device) * 2 - 1
    settings = replace(config.chains, noise_std=0.0, bound=0.0)
    a, b = (
        sampling.fast_langevin(model, model.energy, x, 1, settings, None, bfloat16=half)
        for half in (False, True)
    )
    return ((b - a).norm() / (a - x).norm()).item()


def neighbours(device, rounds: int) -> dict:
    """1-NN of 10,000 in 60,000 vectors of 128 dimensions, beside scikit-learn's brute force."""
    from sklearn.neighbors import KNeighborsClassifier

    a, b = torch.randn(60_000, 128), torch.randn(10_000, 128)
    y = torch.arange(len(a)) % 10
    there = KNeighborsClassifier(1, algorithm="brute").fit(a.numpy(), y.numpy())
    on = a.to(device), b.to(device)
    found = {}
    times = medians(
        {
            "nearest": lambda: found.update(ours=y[evaluate.nearest(*on).cpu()]),
            "scikit-learn": lambda: found.update(theirs=torch.tensor(there.predict(b.numpy()))),
        },
        device,
        rounds,
    )
    return {
        "nearest s": times["nearest"],
        "scikit-learn s": times["scikit-learn"],
        "ratio": times["nearest"] / times["scikit-learn"],
        "equal predictions": torch.equal(found["ours"], found["theirs"]),
    }


def naive_training(preset: str, settings, data_dir: str) -> None:
    """Three updates as the public code bases make them."""
    config, device = cebm.compose(preset, settings), torch.device("cpu")
    images = cebm.load_images(config, "train", data_dir)[0]  # in memory, as `train` has them
    model, c = naive_model(config, device), config.chains
    buffer = sampling.ReplayBuffer(c.buffer, config.data.image, c.reuse, torch.default_generator)
    update = updater(
        model,
        lambda x: sampling.langevin(model.energy, x, c.steps, c.step_size, c.noise_std),
        buffer,
        config,
        False,
        device,
    )
    for _ in range(3):
        update()
    del images


def in_child(code: str) -> tuple[str, float]:
    """Runs Python code in a process of its own: what it printed last, its peak memory in MiB."""
    before = f"import atexit, sys; sys.path[:0] = {str(ROOT)!r}, {str(ROOT / 'tests')!r}"
    peak = "open('/proc/self/status').read().split('VmHWM:')[1].split()[0]"
    command = [sys.executable, "-c", f"{before}; atexit.register(lambda: print({peak}))\n{code}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    printed, memory = ["", *lines[:-1]][-2:]
    return printed, int(memory) / 1024


def children(preset: str, data_dir: str | None) -> dict:
    """Whole processes: seconds to `--help` and to the first update, peak memory in MiB."""
    settings = [] if data_dir else ["data.name=glyphs"]
    settings += ["chains.steps=3", "train.updates=3", "guard.every=1", "log_every=1"]
    where = data_dir or "data"
    arguments = ["train", "--preset", preset, "--device", "cpu", "--data-dir", where]
    arguments += [part for setting in settings for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as folder:
        arguments += ["--out", folder]
        _, ours = in_child(f"import cebm; cebm.main({arguments!r}, standalone_mode=False)")
    naive_code = f"benchmark.naive_training({preset!r}, {settings!r}, {where!r})"
    _, naive = in_child(f"import benchmark; {naive_code}")
    helps = [clock(print_help, torch.device("cpu")) for _ in range(5)]
    return {
        "help s": statistics.median(helps),
        "quickstart's first update s": seconds_to_first_update(),
        "train MiB": ours,
        "naive MiB": naive,
        "ratio": ours / naive,
    }


def print_help() -> None:
    subprocess.run([sys.executable, ROOT / "cebm.py", "--help"], capture_output=True, check=True)


def seconds_to_first_update() -> float:
    """From the start of `train` to its first line on an update."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", ROOT / "cebm.py", "train", "--out", folder]
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--set", "log_every=1"], stdout=subprocess.PIPE, text=True
        )
        if not any(line.startswith("1/") for line in process.stdout):
            raise click.ClickException("train ended before its first update")
        first = time.perf_counter() - start
        process.kill()
        process.wait()
    return first


def hardware(device) -> str:
    """The processor's name, or the GPU's, and torch's version."""
    name = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "CPU",
    )
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


@click.command()
@click.option("--preset", default="cebm-fmnist", show_default=True)
@click.option("--data-dir", help="Real data for the memory's measurement, else the embedded set.")
@click.option("--rounds", default=7, show_default=True)
@click.option("--peers", is_flag=True, help="Samplers of other packages too.")
@click.option("--growth", "picture", help="Only how updates grow: a table, and a picture there.")
@click.option("--json", "as_json", is_flag=True)
@cebm.DEVICE
def main(preset, data_dir, rounds, peers, picture, as_json, device):
    config = cebm.compose(preset)
    if picture and (device.type != "cpu" or peers or data_dir):
        raise click.UsageError("--growth is of updates on noise with --device cpu; no other option")
    result = {"preset": preset, "hardware": hardware(device), "rounds": rounds}
    if picture:
        result["growth"] = growth(preset, rounds)
        Path(picture).write_bytes(evaluate.figure_bytes(growth_figure(result["growth"]), picture))
    else:
        result["chains"] = chains(config, device, rounds, peers)
        if peers:
            result["costs"] = costs(device, rounds)
        result["1-NN"] = [neighbours(device, 3)]
        result["processes"] = [children(preset, data_dir)]
        if sampling.bfloat16_pays(device):
            result["bfloat16 difference"] = one_step_difference(config, device)
        if device.type == "cuda":
            result["GPU MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
    if as_json:
        click.echo(json.dumps(result))
        return
    how = f"medians of {rounds} rounds (updates and 1-NN 3, --help 5)"
    click.echo(f"{preset} on {result['hardware']}; {how}")
    for name, value in result.items():
        if isinstance(value, list):
            click.echo(f"\n{name}\n\n{cebm.table(value, True)}")
    if "bfloat16 difference" in result:
        click.echo(f"\none bfloat16 step differs by {result['bfloat16 difference']:.2%}")


if __name__ == "__main__":
    main()
