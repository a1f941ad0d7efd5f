"""Speed and memory beside what they are measured against, in one run: medians of several rounds.

    python tests/benchmark.py [--preset NAME] [--data-dir DIR] [--json]

`naive` is the loop of the public code bases: float32, contiguous, parameters that ask for
gradients, `autograd.grad` a step. `reference` is `sampling.langevin`, `float32` and `bfloat16` are
what `train` runs with either precision (on a GPU compiled, and as CUDA graphs; without a preset's
`bound`, `average` and `threads`), the latter only where the hardware multiplies in it. The matrix
rate is that of a 2048 x 2048 product in the same precision, in turn with the rest.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
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
        buffer.images[slots] = chains = move(chains)
        learn(chains)

    return update


def naive_model(config, device):
    """In torch's own memory layout; every parameter asks for a gradient."""
    return models.build(config.model, config.data.image, config.data.classes).to(device)


def chains(config, device, rounds: int) -> list[dict]:
    """A row for each path: ms a step, ms an update, speed-ups, arithmetic rate."""
    c, shape, b = config.chains, config.data.image, config.train.batch
    generator = torch.Generator(device).manual_seed(0)
    slow, model = naive_model(config, device), cebm.new_model(config, device)
    x = sampling.uniform((b, *shape), generator)
    gpu = device.type == "cuda"
    few = c.steps if gpu else 2
    chain = c.step_size, c.noise_std, generator
    kinds = ("float32", "bfloat16")[
        : 1 + sampling.bfloat16_pays(device)
    ]  # emulated, it takes hours

    unbounded = replace(c, bound=0.0)

    def moves(steps):
        fast = {
            kind: sampling.mover(
                "langevin",
                model,
                model.energy,
                steps,
                unbounded,
                generator,
                bfloat16=kind == "bfloat16",
                record=gpu,
                compile=gpu,
            )
            for kind in kinds
        }
        return {
            "naive": lambda v: sampling.langevin(slow.energy, v, steps, *chain),
            "reference": lambda v: sampling.langevin(model.energy, v, steps, *chain),
            **fast,
        }

    square = torch.randn(2048, 2048, device=device)
    squares = {k: square.to(getattr(torch, k)) for k in kinds}
    tasks = {name: lambda move=move: move(x) for name, move in moves(few).items()}
    tasks |= {f"product {k}": lambda s=s: s @ s for k, s in squares.items()}
    step = medians(tasks, device, rounds)
    buffer = sampling.ReplayBuffer(c.buffer, shape, c.reuse, generator)
    update = medians(
        {
            name: updater(
                slow if name == "naive" else model,
                move,
                buffer,
                config,
                name == "bfloat16",
                device,
                gpu and name in kinds,
            )
            for name, move in moves(c.steps).items()
        },
        device,
        3,
    )
    flops, rows = flops_a_step(naive_model(config, "cpu"), shape) * b, []
    for name in ("naive", "reference", *kinds):
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
    images = cebm.load_images(config, "train", data_dir)[0]
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
    assert len(images)


def children(preset: str, data_dir: str | None) -> dict:
    """Whole processes: seconds to `--help` and to the first update, peak memory in MiB."""
    settings = [] if data_dir else ["data.name=glyphs"]
    settings += ["chains.steps=3", "train.updates=3", "guard.every=1", "log_every=1"]
    where = data_dir or "data"
    options = [part for s in settings for part in ("--set", s)]
    inside = (
        "import atexit, sys; sys.path[:0] = {0!r}, {1!r}\natexit.register(lambda: print("
        "open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))\n{2}"
    )

    def peak(code: str) -> float:
        code = inside.format(str(ROOT), str(ROOT / "tests"), code)
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        return int(out.split()[-1]) / 1024

    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "train",
            "--preset",
            preset,
            "--device",
            "cpu",
            "--data-dir",
            where,
            "--out",
            folder,
            *options,
        ]
        ours = peak(f"import cebm; cebm.main({arguments!r}, standalone_mode=False)")
        naive = peak(
            f"import benchmark; benchmark.naive_training({preset!r}, {settings!r}, {where!r})"
        )
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen(
            [
                sys.executable,
                "-u",
                ROOT / "cebm.py",
                "train",
                "--out",
                folder,
                "--set",
                "log_every=1",
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        process.stdout.readline()  # says what is to come
        process.stdout.readline()
        first = time.perf_counter() - start
        process.kill()
        process.wait()
    helps = [
        clock(
            lambda: subprocess.run(
                [sys.executable, ROOT / "cebm.py", "--help"], capture_output=True, check=True
            ),
            torch.device("cpu"),
        )
        for _ in range(5)
    ]
    return {
        "help s": statistics.median(helps),
        "quickstart's first update s": first,
        "train MiB": ours,
        "naive MiB": naive,
        "ratio": ours / naive,
    }


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
@click.option("--json", "as_json", is_flag=True)
@cebm.DEVICE
def main(preset, data_dir, rounds, as_json, device):
    config = cebm.compose(preset)
    result = {
        "preset": preset,
        "hardware": hardware(device),
        "rounds": rounds,
        "chains": chains(config, device, rounds),
        "1-NN": neighbours(device, 3),
        "processes": children(preset, data_dir),
    }
    if sampling.bfloat16_pays(device):
        result["bfloat16 difference"] = one_step_difference(config, device)
    if device.type == "cuda":
        result["GPU MiB"] = torch.cuda.max_memory_allocated(device) / 2**20
    if as_json:
        click.echo(json.dumps(result))
        return
    click.echo(f"{preset} on {result['hardware']}; medians of {rounds} rounds\n")
    click.echo(cebm.table(result["chains"], True))
    if "bfloat16 difference" in result:
        click.echo(f"\none bfloat16 step differs by {result['bfloat16 difference']:.2%}")
    for name in ("1-NN", "processes"):
        click.echo(f"\n{cebm.table([result[name]], True)}")


if __name__ == "__main__":
    main()
