"""The commands as a user types them, on the embedded set; bad input; crashes and resumption."""

def test_the_end_of_a_run_names_the_checkpoint_and_the_next_commands(tmp_path):
    out = run("train", *tiny("updates=2"), "--out", tmp_path / "a").stdout
    assert f"python cebm.py knn {tmp_path}/a/ckpt.pt" in out
    assert f"python cebm.py sample {tmp_path}/a/ckpt.pt" in out


def test_a_run_killed_at_random_moments_ends_equal_to_the_uninterrupted_one(
    small, uninterrupted, tmp_path
):
    random.seed(time.time_ns())
    kills, log = 0, tmp_path / "log.csv"
    for _ in range(40):
        before, deadline = log.exists() and log.read_bytes(), time.monotonic() + 60
        process = launch(*small, "--out", tmp_path)
        while process.poll() is None and (log.exists() and log.read_bytes()) == before:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        try:
            process.wait(random.uniform(0, 0.2 if kills < 2 else 60))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert kills > 0
    assert process.returncode == 0, process.stderr.read()
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
    random.seed(time.time_ns())
    whole, parts, kills = tmp_path / "whole", tmp_path / "parts", 0
    assert launch("train", *settings, "--out", whole).wait() == 0
    log = parts / "log.csv"
    while True:
        before = log.exists() and log.read_bytes()
        process = launch("train", *settings, "--out", parts)
        while process.poll() is None and (log.exists() and log.read_bytes()) == before:
            time.sleep(0.002)
        try:
            process.wait(random.uniform(0, 0.2 if kills < least else 600))
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert process.returncode == 0, process.stderr.read()
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


def test_ctrl_c_saves_and_the_same_command_goes_on_to_the_same_end(small, uninterrupted, tmp_path):
    for attempt in range(10):  # on a busy machine the signal may come after the end
        folder = tmp_path / str(attempt)
        process = launch(*small, "--out", folder)
        deadline = time.monotonic() + 60
        while not (folder / "log.csv").exists():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        if process.returncode:
            break
    assert process.returncode == 130, err
    assert "the same command resumes" in out
    assert 3 <= cebm.load_checkpoint(folder / "ckpt.pt")["updates"] < 24
    assert "resuming after update" in run(*small, "--out", folder).stdout
    assert_same_run(uninterrupted, folder)


def test_a_run_whose_output_nobody_reads_any_more_saves_and_goes_on_to_the_same_end(
    small, uninterrupted, tmp_path
):
    process = launch(*small, "--out", tmp_path)
    process.stdout.readline()
    process.stdout.close()  # as `train | tee` when Ctrl-C has ended tee
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == ""
    assert 0 < cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] < 24
    assert run(*small, "--out", tmp_path).exit_code == 0
    assert_same_run(uninterrupted, tmp_path)


def test_ctrl_c_saves_also_where_nobody_reads_and_no_line_was_due(small, tmp_path):
    long = ("--set", "updates=100000", "--set", "log_every=100000", "--out", tmp_path)
    process = launch(*small, *long)
    assert "every 100000" in process.stdout.readline()  # from here on Ctrl-C is waited for
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stderr.read() == ""
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] > 0


def test_a_run_whose_output_finds_no_room_saves_and_goes_on_to_the_same_end(
    small, uninterrupted, tmp_path
):
    with open("/dev/full", "w") as full:
        command = [sys.executable, ROOT / "cebm.py", *small, "--out", tmp_path]
        result = subprocess.run(
            command,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert (result.returncode, result.stderr) == (130, b"")
    assert cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] == 1
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


def test_a_run_changed_on_request_goes_on_by_the_new_settings_and_records_them(
    tmp_path, monkeypatch
):
    folder, changed = tmp_path / "a", tiny("decay=none", "warmup=0", "rate=2e-3", "updates=16")
    run("train", *tiny("decay=none", "warmup=0", "updates=8"), "--out", folder)
    result = run("train", *changed, "--change", "--out", folder)
    assert result.exit_code == 0, result.stderr
    shown = yaml.safe_load(run("show", folder / "ckpt.pt").stdout)
    assert shown["preset"] == "quickstart; from update 8 on train.rate (0.001, now 0.002)"
    assert shown["config"]["train"]["rate"] == 0.002
    stepwise = tiny("decay=none", "warmup=0", "updates=16")
    monkeypatch.setattr(cebm, "learning_rate", lambda update, *_: 0.001 * (1 + (update > 8)))
    run("train", *stepwise, "--out", tmp_path / "b")
    one, two = (cebm.load_checkpoint(tmp_path / name / "ckpt.pt") for name in "ab")
    for part in ("model", "average", "optimiser", "buffer", "generators"):
        same(one[part], two[part], part)
    more = (
        "beta1=0.5",
        "epsilon=1e-4",
        "steps=3",
        "precision=bfloat16",
        "updates=24",
        "rate=2e-3",
        "decay=none",
    )
    assert run("train", *changed, *tiny(*more), "--change", "--out", folder).exit_code == 0
    again = run("train", *changed, *tiny(*more), "--out", folder)  # itself no change any more
    assert again.exit_code == 0, again.stderr
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    group = state["optimiser"]["param_groups"][0]
    assert (group["betas"], group["eps"]) == ((0.5, 0.999), 1e-4)
    assert (state["updates"], state["precision"]) == (24, "bfloat16")
    assert "; from update 16 on chains.steps (2, now 3), train.beta1 (0." in state["preset"]
    for precision in ("float32", "auto"):
        assert (
            run(
                "train",
                *changed,
                *tiny(*more, f"precision={precision}"),
                "--change",
                "--out",
                folder,
            ).exit_code
            == 0
        )
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    pays = cebm.sampling.bfloat16_pays(torch.device(state["device"]))
    assert state["precision"] == ("bfloat16" if pays else "float32")
    more = (*more, "precision=auto", "represent=mixture")  # with no update left
    assert run("train", *changed, *tiny(*more), "--change", "--out", folder).exit_code == 0
    state = cebm.load_checkpoint(folder / "ckpt.pt")
    assert state["preset"].endswith("; from update 24 on model.represent (component, now mixture)")
    assert state["config"]["model"]["represent"] == "mixture"
    less = run("train", *changed, *tiny(*more, "updates=12"), "--change", "--out", folder)
    assert (less.exit_code, "done: " in less.stdout) == (0, True)  # it has been longer already


def test_a_change_of_a_run_that_is_not_there_is_refused_and_begins_none(tmp_path):
    result = run("train", *tiny(), "--change", "--out", tmp_path)
    assert result.exit_code == 1
    assert f"{tmp_path / 'ckpt.pt'} is no whole checkpoint" in result.stderr
    assert "(No such file or directory)" in result.stderr
    assert not (tmp_path / "config.yaml").exists()


def test_a_change_that_the_weights_cannot_follow_is_refused_and_nothing_is_lost(trained, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(before := (trained / "ckpt.pt").read_bytes())
    result = run("train", *tiny("hidden=9"), "--change", "--out", tmp_path)
    assert result.exit_code == 1
    assert "cannot be resumed" in result.stderr
    one = tmp_path / "one"  # chain, which would do for each of four
    run("train", *tiny("batch=1", "buffer=1", "updates=1"), "--out", one)
    several = run("train", *tiny("batch=1", "buffer=4", "updates=2"), "--change", "--out", one)
    assert "cannot be resumed" in several.stderr
    other = run("train", *tiny("model.name=igebm"), "--change", "--out", tmp_path)
    assert other.exit_code == 1
    assert "model.name (cebm, now igebm)" in other.stderr
    reseeded = run("train", *tiny(), "--seed", 1, "--change", "--out", tmp_path)
    assert "train.seed (0, now 1)" in reseeded.stderr  # the untrained network would be another
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_a_run_whose_rate_falls_to_its_end_is_not_made_longer(tmp_path):
    assert run("train", *tiny("updates=2"), "--out", tmp_path).exit_code == 0
    longer = run("train", *tiny("updates=3"), "--out", tmp_path)
    assert longer.exit_code == 1
    assert "train.updates (2, now 3)" in longer.stderr


def test_a_second_train_in_the_same_folder_is_refused(tmp_path):
    with cebm.claim_folder(tmp_path):
        result = run("train", *tiny(), "--out", tmp_path)
    assert result.exit_code == 1
    assert "in use by another" in result.stderr


TORCHRUN = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"


def torchrun(*arguments):
    """A command in two processes of one machine's processor: exit status, stdout and stderr."""
    process = launch(*arguments, "--device", "cpu", by=TORCHRUN)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_two_processes_share_the_batch_and_ctrl_c_ends_them_before_the_next_check(small, tmp_path):
    never = [f"{key}=1000000" for key in ("updates", "checkpoint_every", "guard.every")]
    settings = tiny(*RESTARTED, *never)
    process = launch(*small, *settings, "--out", tmp_path, "--device", "cpu", by=TORCHRUN)
    deadline = time.monotonic() + 100
    while process.poll() is None and not (tmp_path / "log.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "interrupted; " in process.communicate(timeout=100)[0]
    assert 0 < cebm.load_checkpoint(tmp_path / "ckpt.pt")["updates"] < 1000000
    assert_chains_are_the_last_batch(tmp_path, small[-1])


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
    with pytest.raises(click.UsageError, match="not multiples of 2 processes"):
        cebm.train_model(odd, tmp_path / "odd", "", torch.device("cpu"), "", False, 0, 2)
    assert not (tmp_path / "odd").exists()


def test_means_of_one_image_are_not_standardised_but_refused(tmp_path):
    settings = ["--preset", "bigan-mnist-r1", "--set", "batch=1", "--out", tmp_path]
    result = run("train", *settings)
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
    assert "chains.bound = -1.0: it has to be a number from 0" in refused.stderr


def test_samples_from_buffer_noise_and_given_latents(trained, tmp_path):
    checkpoint = trained / "ckpt.pt"
    for name, extra, size in [
        ("buffer", [], (30 * 4 + 2, 30 * 4 + 2)),
        ("noise", ["--from", "noise", "--steps", 5], (30 * 4 + 2, 30 * 4 + 2)),
        ("given", ["--given", 6, "--steps", 3], (30 * 6 + 2, 30 * 2 + 2)),
    ]:
        paths = [tmp_path / f"{name}{i}.png" for i in range(3)]
        for path, seed in zip(paths, (0, 0, 1), strict=True):
            result = run("sample", checkpoint, "--count", 16, "--seed", seed, "--out", path, *extra)
            assert result.exit_code == 0, result.stderr
        assert Image.open(paths[0]).size == size
        assert paths[0].read_bytes() == paths[1].read_bytes()
        assert paths[0].read_bytes() != paths[2].read_bytes()


def test_the_buffer_itself_is_shown_with_no_steps(trained, tmp_path):
    run("sample", trained / "ckpt.pt", "--count", 1, "--steps", 0, "--out", tmp_path / "a.png")
    shown = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    chains = cebm.load_checkpoint(trained / "ckpt.pt")["buffer"][:, 0].clamp(-1, 1)
    stored = chains.add(1).div(2).mul(255).round().byte().numpy()
    assert (stored == shown).all((1, 2)).sum() == 1
    run(
        "sample",
        trained / "ckpt.pt",
        "--count",
        1,
        "--steps",
        0,
        "--from",
        "noise",
        "--out",
        tmp_path / "b.png",
    )  # not the noise that the buffer began with
    noise = np.asarray(Image.open(tmp_path / "b.png").convert("L"))
    assert (stored == noise).mean((1, 2)).max() < 0.05


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
    picture = np.asarray(Image.open(out).convert("L"))
    original = data.load("glyphs", "test")[0][0, 0].numpy()
    assert abs(picture[2:30, 2:30].astype(int) - original).max() <= 1


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
    result = run("train", "--preset", name, "--out", tmp_path, "--set", "batch=8")
    assert result.exit_code == 1
    assert "has other settings" in result.stderr
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
        "untrained",
        "pixel",
        "confusion",
    }
    counts = torch.tensor(first["confusion"])
    assert counts.sum() == 2000
    assert counts.sum(1).tolist() == [200] * 10
    assert first["latent"] == pytest.approx(counts.diag().sum().item() / 20, abs=0.01)
    assert first["pixel"] > 50
    model, config, _ = cebm.load_model(checkpoint)
    train, test = (cebm.data.load("glyphs", split) for split in ("train", "test"))
    for space, network in ("latent", model), ("untrained", cebm.new_model(config, "cpu").eval()):
        a, b = (
            cebm.evaluate.in_batches(network.represent, images, "cpu")
            for images in (train[0][::20], test[0])
        )
        right = train[1][::20][cebm.evaluate.nearest(a, b)] == test[1]
        assert first[space] == round(100 * right.double().mean().item(), 2)
    assert first["latent"] != first["untrained"]
    text = run("knn", checkpoint, "--limit", 500, "--plot", tmp_path / "plot.png").stdout
    assert f"{first['latent']:.2f}" in text
    assert Image.open(tmp_path / "plot.png").size[0] > 400
    table = run("knn", checkpoint, "--limit", 500, "--markdown").stdout.splitlines()
    assert table[0].startswith("| checkpoint | model | data | updates | latent |")
    assert len(table) == 3
    white = json.loads(run("knn", checkpoint, "--json", "--limit", 500, "--whiten").stdout)[0]
    assert white["pixel"] == first["pixel"]
    assert white["latent"] != first["latent"]


def test_export_holds_what_the_model_says_of_each_image(trained, tmp_path):
    out = tmp_path / "latents.npz"
    assert run("export", trained / "ckpt.pt", "--out", out).exit_code == 0
    model = cebm.load_model(trained / "ckpt.pt")[0]
    images, labels = data.load("glyphs", "test")
    with torch.no_grad():
        x = data.normalise(images[:50])
        mean, energy, precision = model.represent(x), model.energy(x), 1 - 2 * model.t(x)[0][:, 1]
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
        cebm.models.Conjugate,
        "represent",  # tells more than the tiny network's
        lambda self, x: 0.1 * torch.nn.functional.avg_pool2d(x, 7).flatten(1),
    )
    first, second = json.loads(run("probe", checkpoint, checkpoint, "--json").stdout)
    assert first == second
    assert list(first)[:4] == ["checkpoint", "model", "data", "updates"]
    assert list(first)[4:] == ["1", "1 std", "10", "10 std", "100", "100 std", "all", "all std"]
    assert first["1"] < first["100"] < first["all"] <= 100
    assert first["1 std"] > 0 == first["all std"]
    row = json.loads(run("ood", checkpoint, "--against", "glyphs", "--json").stdout)[0]
    assert set(row) - set(first) == {
        f"{name} {score}"
        for name in ("glyphs", "uniform", "constant")
        for score in ("logp", "gradient")
    }
    assert row["glyphs logp"] == row["glyphs gradient"] == 50  # against itself: all ties
    monkeypatch.setattr(
        cebm.models.Conjugate, "energy", lambda self, x: x.diff(dim=-1).abs().mean((1, 2, 3))
    )  # roughness
    row = json.loads(run("ood", checkpoint, "--json").stdout)[0]
    assert (row["uniform logp"], row["constant logp"]) == (100, 0)
    table = run("ood", checkpoint, "--markdown").stdout.splitlines()
    assert table[0].startswith("| checkpoint | model | data | updates | uniform logp |")
    assert len(table) == 3


def test_probe_can_be_free_of_the_scale_of_the_latents(trained, tmp_path):
    state = torch.load(trained / "ckpt.pt", weights_only=True)
    weights = state["average"]
    latent, last = state["config"]["model"]["latent"], "network.heads.0.2."
    for name in ("weight", "bias"):  # t_1 and with it the posterior mean, a power of two smaller
        weights[last + name][:latent] /= 1024
    torch.save(state, tmp_path / "small.pt")
    for options, equal in (((), False), (("--scale",), True)):
        result = run("probe", trained / "ckpt.pt", tmp_path / "small.pt", "--json", *options)
        first, second = (
            {k: v for k, v in row.items() if k != "checkpoint"} for row in json.loads(result.stdout)
        )
        assert (first == second) == equal


def test_a_map_of_one_latent_dimension_is_a_line(tmp_path):
    run("train", *tiny("latent=1", "updates=1"), "--out", tmp_path)
    result = run(
        "export", tmp_path / "ckpt.pt", "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"
    )
    assert result.exit_code == 0, result.stderr


def test_export_can_draw_a_map(trained, tmp_path):
    result = run(
        "export", trained / "ckpt.pt", "--out", tmp_path / "a.npz", "--map", tmp_path / "map.png"
    )
    assert result.exit_code == 0, result.stderr
    assert Image.open(tmp_path / "map.png").size == (820, 730)
    assert "PCA" in result.stdout or "UMAP" in result.stdout


@pytest.mark.parametrize(
    "preset",
    [
        p
        for p, (_, source, _) in cebm.PRESETS.items()
        if "-gpu" not in p
        and (
            source in ("glyphs", "mnist")
            or p.endswith(("-fast", "-literal"))
            or (source == "cifar10" and "gmm" not in p)
        )
    ],
)
def test_presets_at_their_true_size_train_resume_and_are_evaluated(preset, tmp_path, monkeypatch):
    tiny_data(monkeypatch)
    model = cebm.compose(preset).model.name
    arguments = [
        "--preset",
        preset,
        "--out",
        tmp_path,
        "--set",
        "batch=8",
        "--set",
        "buffer=16",
        "--set",
        "steps=2",
        "--set",
        "final_steps=0",
        "--set",
        "decay=none",
        "--set",
        "precision=float32",
        "--set",
        "compile=false",
    ]
    for updates in (1, 2):
        result = run("train", *arguments, "--set", f"updates={updates}")
        assert result.exit_code == 0, result.stderr
    assert "resuming after update 1" in result.stdout
    state = cebm.load_checkpoint(tmp_path / "ckpt.pt")
    assert state["updates"] == 2
    assert all(v.isfinite().all() for v in state["model"].values())
    checkpoint, drawn, pictures = tmp_path / "small.pt", tmp_path / "drawn.png", {}
    torch.save(
        {k: v for k, v in state.items() if k not in ("optimiser", "good", "candidate")}, checkpoint
    )  # a tenth, and read eight times
    loaded = cebm.load_model(checkpoint)[0]
    assert not any(module.training for module in loaded.modules())
    if model.startswith("gmm"):
        fresh = cebm.new_model(cebm.parse_config(state["config"]), "cpu").state_dict()
        prior = [k for k in fresh if k.startswith("prior")]
        found = loaded.state_dict()
        assert len(prior) == 2
        kept = state.get("average", state["model"])
        assert all(torch.equal(found[k], kept[k]) for k in prior)
        assert not any(torch.equal(found[k], fresh[k]) for k in prior)
    chains = not model.endswith(("vae", "gan"))
    able_to = {
        "--refine": model == "gan",
        "--steps": chains,
        "--from": chains,
        "--given": model not in ("igebm", "jem", "hdge", "gan"),
    }
    for extra in ([], ["--given", 3], ["--refine", 2], ["--steps", 3], ["--from", "noise"]):
        result = run("sample", checkpoint, "--count", 4, "--out", drawn, *extra)
        able = not extra or able_to[extra[0]]
        assert result.exit_code == (0 if able else 2), result.stderr
        assert able or f"{extra[0]} is not for {model}" in result.stderr
        if able:
            pictures[(*extra, "")[0]] = drawn.read_bytes()
    assert len(set(pictures.values())) == len(pictures) - (model == "hdge")  # it has no buffer
    if able_to["--given"] and not chains:  # decoded means, whatever the seed
        run("sample", checkpoint, "--given", 3, "--seed", 1, "--out", drawn)
        assert drawn.read_bytes() == pictures["--given"]
    if model not in ("igebm", "jem", "hdge", "gan"):  # there the latter alone is wrong
        result = run("sample", checkpoint, "--given", 3, "--refine", 2)
        assert f"--refine is not for {model}" in result.stderr
    if model in ("rbm", "efh"):  # one sweep draws from p(x | z)
        result = run("sample", checkpoint, "--given", 3, "--steps", 2)
        assert f"--steps with --given is not for {model}" in result.stderr
    row = json.loads(run("knn", checkpoint, "--json").stdout)[0]
    assert (row["model"], row["updates"]) == (model, 2)
    assert ("accuracy" in row) == (model in ("jem", "hdge"))
    if "accuracy" in row:
        images, labels = cebm.data.load("any", "test")
        right = cebm.evaluate.in_batches(loaded.f, images, "cpu").argmax(1) == labels
        assert row["accuracy"] == 100 * right.double().mean().item()
    result = run("ood", checkpoint)
    assert result.exit_code == ("gan" in model), result.stderr
    assert run("export", checkpoint, "--out", tmp_path / "l.npz").exit_code == 0
    with np.load(tmp_path / "l.npz", allow_pickle=False) as arrays:
        assert arrays["mean"].shape == (20, 128)


def test_show_lists_presets_and_prints_one_and_describes_a_checkpoint(trained):
    listed = [line.split()[0] for line in run("show").stdout.splitlines()]
    seven = ("cebm", "gmm-cebm", "igebm", "vae", "gmm-vae", "bigan", "gmm-bigan")
    four = {f"{m}-{d}" for m in seven for d in ("mnist", "fmnist", "cifar10", "svhn")}
    two = {f"{m}-{d}" for m in ("gan", "jem", "hdge", "rbm", "efh") for d in ("mnist", "fmnist")}
    assert len(four | two) == 38
    fast = {
        f"{m}-{d}-fast" for m in ("cebm", "gmm-cebm", "igebm", "jem") for d in ("mnist", "fmnist")
    }
    gpu = {f"{m}-gpu" for m in ("cebm-mnist", "gmm-cebm-mnist", "cebm-cifar10", "igebm-cifar10")}
    r1 = {f"{m}-{d}-r1" for m in ("gan", "bigan", "gmm-bigan") for d in ("mnist", "fmnist")}
    others = {"quickstart", "cebm-folder", "cebm-fmnist-literal"}
    assert set(listed) == four | two | fast | gpu | r1 | others
    mnist, fmnist = (cebm.compose(f"jem-{d}-fast") for d in ("mnist", "fmnist"))
    assert replace(mnist.train, updates=15000) == fmnist.train  # all else is shared
    assert (fmnist.chains.reuse, fmnist.chains.data_restarts, mnist.chains.bound) == (0.99, 1, 1.5)
    assert mnist.chains == replace(fmnist.chains, reuse=0.95, data_restarts=0.0, bound=1.5)
    short, longer = (cebm.compose(f"cebm-mnist-{v}") for v in ("fast", "gpu"))
    assert replace(short.train, updates=12000) == mnist.train
    assert short.chains == replace(mnist.chains, steps=20) == longer.chains
    assert replace(longer.train, rate=6e-4, updates=15500) == short.train
    assert replace(longer.train, updates=15000) == cebm.compose("gmm-cebm-mnist-fast").train
    for name in listed:
        printed = yaml.safe_load(run("show", name).stdout)
        assert cebm.parse_config(printed) == cebm.compose(name)
    without = {line.split()[0] for line in run("show").stdout.splitlines() if "chains" not in line}
    assert {cebm.compose(name).model.name for name in without} == {
        "vae",
        "gmm-vae",
        "bigan",
        "gmm-bigan",
        "gan",
        "hdge",
    }
    facts = yaml.safe_load(run("show", trained / "ckpt.pt").stdout)
    assert (facts["preset"], facts["updates"], facts["seed"]) == ("quickstart", 24, 0)
    assert facts["torch"] == str(torch.__version__)


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
        (["--device", "meta"], "--device meta: "),
        (["--set", "steps=0"], "chains.steps = 0: it has to be a whole number from 1"),
        (["--set", "steps=2.5"], "chains.steps = 2.5"),
        (["--set", "head=both"], "one of shared, separate"),
        (["--set", "channels=[1, 2]"], "a list of 4 numbers, each from 1 to 4,096"),
        (
            ["--preset", "vae-mnist", "--set", "image=[1, 30, 30]"],
            "vae is for images of 28 x 28 or",
        ),
        (["--set", "likelihood=gauss"], "one of bernoulli, continuous_bernoulli"),
        (["--set", "channels={a: [}"], "is not a YAML value"),
        (["--set", "compile=!!bool maybe"], "is not a YAML value"),
        (["--set", "buffer=7"], "must not exceed chains.buffer"),
        (["--set", "image=[1, 4, 4]"], "at least 8 x 8"),
        (["--device", "abacus"], "--device abacus: "),
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


@pytest.mark.parametrize("out", ["/dev/null", "file/a.png", "x" * 300])
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
    for place in (tmp_path / "file" / "a", tmp_path / "file.pt", ""):
        result = run(command, tmp_path / "file", option, place)
        assert result.exit_code == 1
        assert f"cannot write {place or '.'}" in result.stderr
    (tmp_path / "a").write_text("old")  # where it can be, it waits for what is written
    assert "no whole checkpoint" in run(command, tmp_path / "file", option, tmp_path / "a").stderr
    assert [(p.name, p.read_text()) for p in sorted(tmp_path.iterdir())] == [
        ("a", "old"),
        ("file", "no checkpoint"),
        ("file.pt", "a checkpoint"),
    ]


def test_latents_and_their_map_are_not_written_to_one_place(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("export", trained / "ckpt.pt", "--out", "a", "--map", tmp_path / "a")
    assert result.exit_code == 2
    assert f"--map and --out are both {tmp_path / 'a'}" in result.stderr


def test_wrong_files_and_folders_are_named(trained, tmp_path):
    assert run("knn", tmp_path / "none.pt").exit_code == 2
    assert run("show", "cebm-mnits").exit_code == 2
    folder = ["--preset", "cebm-folder", "--data-dir", tmp_path]
    empty = run("train", *folder, "--out", tmp_path / "run")
    assert empty.exit_code == 1
    assert f"{tmp_path}/train'. Images belong in" in empty.stderr
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
    wrong = run("train", *arguments, *tiny())
    assert wrong.exit_code == 1
    assert "--set classes=2" in wrong.stderr
    rgba = run("train", *arguments, *tiny("classes=2", "image=[4, 16, 16]"))
    assert rgba.exit_code == 1
    assert "images of 3x16x16" in rgba.stderr
    chosen = tiny("classes=2", "image=[3, 16, 16]", "updates=2")
    result = run("train", *arguments, *chosen)
    assert result.exit_code == 0, result.stderr
    result = run("knn", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json")
    assert len(json.loads(result.stdout)[0]["confusion"]) == 2
    few = run(
        "knn", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json", "--limit", 4
    )
    assert json.loads(few.stdout)[0]["pixel"] == 100  # two of each class, though files are sorted
    shown = tmp_path / "given.png"
    run(
        "sample",
        tmp_path / "run/ckpt.pt",
        "--data-dir",
        tmp_path / "images",
        "--given",
        2,
        "--steps",
        1,
        "--out",
        shown,
    )
    picture = np.asarray(Image.open(shown).convert("L"))  # one of each class, likewise
    assert picture[2:18, 2:18].max() < 128 <= picture[2:18, 20:36].min()
    row = json.loads(
        run("probe", tmp_path / "run/ckpt.pt", "--data-dir", tmp_path / "images", "--json").stdout
    )[0]
    assert [key for key in row if key.isdigit()] == ["1", "10"]  # there are ten a class
    (tmp_path / "images/train/dark/3.png").write_bytes(b"no picture")
    assert "dark/3.png cannot be read" in run("train", *arguments, *chosen).stderr


def test_help_needs_no_torch():
    for command in ("", "train", "sample", "knn", "probe", "ood", "export", "show"):
        code = (
            "import sys, cebm\ntry: cebm.main(sys.argv[1:])\nexcept SystemExit: pass\n"
            "print('torch' in sys.modules)"
        )
        arguments = [a for a in (command, "--help") if a]
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.splitlines()[-1] == "False"
        assert not command or "Example: python cebm.py " + command in result.stdout
