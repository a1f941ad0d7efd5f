"""1-NN, probe and AUROC against brute force and scikit-learn; rows of figures; pictures.

Models are stand-ins of a few lines, whose right figures are known.
"""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors

import cebm
import data
import evaluate

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    """Images whose pixels are independent and uniform."""
    return torch.randint(256, shape, generator=seeded()).byte()


def stand_in(**functions):
    """A model that has these functions of normalised images and no others."""
    return SimpleNamespace(**functions)


# Encoding


def test_batches_are_normalised_and_come_back_in_order_whatever_their_size():
    images = noise(7, 1, 2, 3)
    expected = images.float() / 127.5 - 1
    for size in (1, 3, 7, 100):
        torch.testing.assert_close(evaluate.in_batches(lambda x: x, images, CPU, size), expected)


def test_images_that_are_normalised_already_are_taken_as_they_are():
    images = noise(2, 1, 2, 2).float() / 127.5 - 1
    assert torch.equal(evaluate.in_batches(lambda x: x, images.numpy(), "cpu"), images)
    with pytest.raises(ValueError, match="floats have to be in"):
        evaluate.in_batches(lambda x: x, noise(2, 1, 2, 2).float())
    with pytest.raises(TypeError, match="uint8"):
        data.normalise(images)


def test_latents_hold_what_is_asked_for_with_the_whole_posteriors_deviation():
    def posterior(x):  # two components, of means 0 and 4 and deviation 1: variance 1 + 4
        members = torch.distributions.Normal(torch.tensor([0.0, 4.0]), 1.0)
        parts = members.expand((len(x), 2, 2))
        chances = torch.distributions.Categorical(torch.ones(len(x), 2, 2))
        return torch.distributions.MixtureSameFamily(chances, parts)

    images = noise(5, 1, 2, 2)
    methods = {"energy": lambda x: x.sum((1, 2, 3)), "posterior": posterior}
    x = (images.float() / 127.5 - 1).numpy()
    for with_std, with_energy in ((True, True), (True, False), (False, True), (False, False)):
        has = {"posterior": with_std, "energy": with_energy}
        own = {name: method for name, method in methods.items() if has[name]}
        model = stand_in(represent=lambda x: x.flatten(1)[:, :2], **own)
        arrays = evaluate.latents(model, images, CPU)
        expected = {"mean": x.reshape(5, 4)[:, :2]}
        if with_energy:
            expected["energy"] = x.sum((1, 2, 3))
        if with_std:
            expected["std"] = np.full((5, 2), 5**0.5)
        assert arrays.keys() == expected.keys()
        for key, array in arrays.items():
            np.testing.assert_allclose(array, expected[key], atol=1e-5)


def test_figures_of_a_model_that_draws_are_the_same_each_time_and_leave_the_random_state():
    model = stand_in(
        represent=torch.rand_like, energy=lambda x: x.sum((1, 2, 3)) * torch.rand(len(x))
    )
    before = torch.get_rng_state()
    one, two = (evaluate.latents(model, noise(5, 1, 2, 2), CPU) for _ in range(2))
    np.testing.assert_equal(one, two)
    scores = [evaluate.density_scores(model, noise(5, 1, 2, 2), CPU) for _ in range(2)]
    torch.testing.assert_close(*scores, atol=0, rtol=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeding_the_cpu_touches_no_other_device(monkeypatch):
    # torch.manual_seed would: in a training on a GPU, a new model would reset its random numbers.
    monkeypatch.setattr(torch, "manual_seed", lambda _: pytest.fail("all devices are seeded"))
    with evaluate.seeded(3, "cpu"):
        drawn = torch.rand(4)
    monkeypatch.undo()
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))


def test_drawing_under_a_seed_leaves_the_random_state_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with evaluate.seeded(3, CPU):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with evaluate.seeded(3, CPU):
        assert torch.equal(torch.rand(4), first)


# 1-NN


def brute_force(train, test):
    """Squared distances by float64 differences, one by one: (M, N)."""
    return torch.stack(
        [torch.stack([((a - b) ** 2).sum() for a in train.double()]) for b in test.double()]
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 5),
    st.sampled_from([1.0, 1e-3, 1e4]),
    st.booleans(),
)
def test_nearest_is_brute_force_with_ties_to_the_first(seed, n, m, dim, offset, integers):
    generator = seeded(seed)
    train = torch.randn(n, dim, generator=generator)
    test = torch.randn(m, dim, generator=generator)
    if integers:  # a lattice: many equal distances
        train, test = train.round(), test.round()
        offset = round(offset)
    train, test = train + offset, test + offset
    distances, found = brute_force(train, test), evaluate.nearest(train, test)
    if integers:  # as pixels are: exact, ties to the first
        first = [row.index(min(row)) for row in distances.tolist()]
        assert found.tolist() == first
        assert evaluate.nearest(train, test, floats=3 * m).tolist() == first
    error = 1e-14 * max(train.double().square().sum(1).max(), test.double().square().sum(1).max())
    assert (distances.gather(1, found[:, None])[:, 0] - distances.amin(1)).max() <= error


def test_nearest_is_exact_where_float32_distances_are_not():
    # Two points nearer to each other than the rounding of |a|^2 - 2ab far from the origin.
    train = torch.tensor([[1000.0, 0.0], [1000.0 + 2**-9, 0.0], [-1000.0, 0.0]])
    test = torch.tensor([[1000.0 + 2**-9, 0.0], [1000.0, 0.0]])
    assert evaluate.nearest(train, test).tolist() == [1, 0]


def test_nearest_agrees_with_scikit_learn_on_images():
    generator = seeded()
    train, test = (torch.randint(0, 256, (n, 784), generator=generator).float() for n in (500, 200))
    oracle = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(train.double().numpy())
    expected = oracle.kneighbors(test.double().numpy(), return_distance=False)[:, 0]
    assert evaluate.nearest(train, test).tolist() == expected.tolist()


def test_nearest_is_exact_within_autocast():
    train, test = torch.randn(3000, 64, generator=seeded()), torch.randn(500, 64)
    expected = evaluate.nearest(train, test)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(evaluate.nearest(train, test), expected)


@pytest.mark.parametrize("scale", [1e-30, 3e-22, 1e-20, 1.0, 1e20, 1e30])
def test_nearest_is_exact_where_float32_squares_overflow_or_vanish(scale):
    train = torch.tensor([[3.0], [1.0], [2.0]]).repeat(50, 1) * scale
    test = torch.tensor([[2.2], [0.0], [9.0]]) * scale
    assert evaluate.nearest(train, test).tolist() == [2, 1, 0]


def test_the_second_look_finds_what_the_first_in_float32_cannot_tell():
    generator = seeded()
    near = 1 + 1e-7 * torch.randn(1000, 20, generator=generator, dtype=torch.float64)
    far = torch.randn(1000, 20, generator=generator, dtype=torch.float64)  # spoils the centre
    train, test = torch.cat([near, 100 * far]), near[::10] + 1e-9
    assert evaluate.nearest(train, test).tolist() == list(range(0, 1000, 10))


def test_of_vectors_that_are_all_equal_the_first_is_nearest():
    same = torch.ones(20_000, 8)
    assert evaluate.nearest(same, same[:2_000]).tolist() == [0] * 2_000


@pytest.mark.parametrize(("count", "dim"), [(3, 50), (200, 2)])
def test_nearest_holds_so_many_numbers_at_a_time(monkeypatch, count, dim):
    held, addmm = [], torch.addmm
    monkeypatch.setattr(
        torch,
        "addmm",
        lambda a, b, c, **scale: (
            held.append(max(c.numel(), len(b) * c.shape[1])) or addmm(a, b, c, **scale)
        ),
    )
    evaluate.nearest(torch.ones(3000, dim), torch.ones(count, dim), floats=2**14)
    assert 2**13 < max(held) <= 2**14


def test_whitened_latents_have_unit_variance_along_principal_directions_but_small_ones():
    generator = seeded()
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator).double())[0]
    scales = torch.tensor([10.0, 1.0, 1e-6]).double()
    train = (torch.randn(5000, 3, generator=generator).double() * scales + 7) @ turn
    a, b = evaluate.whiten(train, train[:9], damping=0.03)
    torch.testing.assert_close(b, a[:9])
    covariance = torch.cov(a.T) * len(a)
    expected = (scales / (scales + 0.03 * 10)).square()
    torch.testing.assert_close(covariance.diagonal(), expected, rtol=0.1, atol=1e-9)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 1e-9


def test_whitened_latents_that_are_all_equal_stay_finite_and_equal():
    a, b = evaluate.whiten(torch.full((5, 3), 0.7), torch.full((2, 3), 0.7))
    assert a.isfinite().all()
    torch.testing.assert_close(torch.cat([a, b]), a[:1].expand(7, 3))


def two_classes(count=200):
    """Images of 2 x 2 pixels and labels: the first pixel tells softly, the second is loud noise."""
    y = torch.arange(count) % 2
    images = noise(count, 1, 2, 2)
    images[:, 0, 0, 0] = (127 + 2 * y).byte()
    images[:, 0, 1] = 7
    return images, y


def test_a_row_of_1_nn_has_latents_the_untrained_networks_and_pixels_by_brute_force():
    (images, y), first, loud = two_classes(), (0, 0, 0), (0, 0, 1)
    images[:9, 0, 0, 0] = (256 - images[:9, 0, 0, 0].int()).byte()  # of the other class's look
    train, test = (images[100:], y[100:]), (images[:100], y[:100])
    model, untrained = (
        stand_in(represent=lambda x, at=at: x[(slice(None), *at)][:, None]) for at in (first, loud)
    )
    row = evaluate.knn_row(model, untrained, train, test, 2, CPU)
    assert row["latent"] == 91

    def by_hand(space):
        a, b = (space(part[0]).double() for part in (train, test))
        predicted = y[100:][brute_force(a, b).argmin(1)]
        return round(100 * (predicted == y[:100]).double().mean().item(), 2)

    assert row["untrained"] == by_hand(lambda v: v[:, 0, 0, 1:]) < 75
    assert row["pixels"] == by_hand(lambda v: v.flatten(1)) < 91
    # Images 0, 2, 4, 6, 8 of class 0 look like class 1; 1, 3, 5, 7 of class 1 look like class 0.
    assert row["confusion"] == [[45, 5], [4, 46]]


def test_whitening_a_row_of_1_nn_frees_latents_of_loud_directions():
    images, y = two_classes()
    train, test = (images[100:], y[100:]), (images[:100], y[:100])
    model = stand_in(represent=lambda x: x.flatten(1)[:, :2])
    row = evaluate.knn_row(model, model, train, test, 2, CPU)
    assert row["latent"] == row["untrained"] < 90
    assert row["whitened"] == row["untrained whitened"] == 100


def test_the_accuracy_of_a_classifier_is_how_often_it_is_right():
    images, y = two_classes()
    model = stand_in(classify=lambda x: (x[:, 0, 0, 0] > 0).long())  # above 127.5
    assert evaluate.accuracy(model, (images, y), CPU) == 100
    y = y.clone()
    y[:3] = 1 - y[:3]
    assert evaluate.accuracy(model, (images, y), CPU) == 98.5


# Linear probe


@pytest.fixture
def fitted(monkeypatch):
    """Each logistic regression that is fitted, with the labels that it saw."""
    fit, seen = LogisticRegression.fit, []

    def spy(self, x, y):
        seen.append((self, x, y))
        return fit(self, x, y)

    monkeypatch.setattr(LogisticRegression, "fit", spy)
    return seen


def test_a_probe_sees_so_many_labels_a_class_and_reports_mean_and_deviation(fitted):
    y = torch.arange(600) % 3
    x = 0.7 * torch.randn(600, 4, generator=seeded()) + torch.nn.functional.one_hot(y, 4)
    train, test = (x[:300], y[:300]), (x[300:], y[300:])
    scores = {n: evaluate.probe(*train, *test, 3, n) for n in (1, 10, None)}
    counts = [np.bincount(labels).tolist() for _, _, labels in fitted]
    assert counts == 10 * [[1] * 3] + 10 * [[10] * 3] + [[100] * 3]
    assert len({points.tobytes() for _, points, _ in fitted}) == 21  # other draws, other points
    assert scores[1][0] < scores[10][0] < scores[None][0] + 2
    assert scores[1][1] > scores[10][1] > scores[None][1] == 0
    by_hand = [100 * part.score(*(v.numpy() for v in test)) for part, _, _ in fitted[:10]]
    assert scores[1] == pytest.approx((np.mean(by_hand), np.std(by_hand)))
    oracle = LogisticRegression(tol=1e-8, max_iter=10_000).fit(*(v.numpy() for v in train))
    assert abs(scores[None][0] - 100 * oracle.score(*(v.numpy() for v in test))) < 0.5


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_probe_does_not_stop_before_its_optimum_even_on_many_points_of_small_features(
    fitted, scale
):
    y = torch.arange(60_000) % 3
    x = torch.randn(60_000, 4, generator=seeded()) + torch.nn.functional.one_hot(y, 4)
    evaluate.probe(scale * x, y, scale * x[:9], y[:9], 3, None)
    oracle = LogisticRegression(C=1.0, tol=1e-10, max_iter=100_000)
    points = (scale * x).double().numpy()
    chances = oracle.fit(points, y.numpy()).predict_proba(points)
    assert abs(fitted[0][0].predict_proba(points) - chances).max() < 1e-3


def test_of_a_single_class_a_probe_is_always_right_as_1_nn_is():
    y = torch.zeros(30).long()
    images = noise(30, 1, 2, 2)
    model = stand_in(represent=lambda x: x.flatten(1))
    assert evaluate.knn_row(model, model, (images, y), (images, y), 1, CPU)["latent"] == 100
    assert evaluate.probe_row(model, (images, y), (images, y), 1, CPU)["all"] == 100


KINDS, SPREAD = ("", " scaled"), ("", " std")


def test_a_probes_row_is_of_1_10_100_and_all_labels_a_class_where_there_are_as_many():
    y = torch.arange(300) % 3
    images = (80 * y[:, None] + torch.randint(60, (300, 6), generator=seeded())).byte()
    images = images.view(300, 1, 2, 3)
    model = stand_in(represent=lambda x: x.flatten(1))
    row = evaluate.probe_row(model, (images, y), (images, y), 3, CPU)
    assert [key for key in row if "s" not in key] == ["1", "10", "100", "all"]
    assert set(row) == {f"{n}{k}{s}" for n in (1, 10, 100, "all") for k in KINDS for s in SPREAD}
    assert row["100"] == row["all"] == 100  # separate classes, the same labels
    assert row["all std"] == 0
    fewer = evaluate.probe_row(model, (images[:299], y[:299]), (images, y), 3, CPU)
    assert set(fewer) == {f"{n}{k}{s}" for n in (1, 10, "all") for k in KINDS for s in SPREAD}


def test_a_scaled_probe_is_free_of_the_latents_place_and_scale_and_another_is_not():
    y = torch.arange(300) % 3
    images = (40 * y[:, None] + torch.randint(150, (300, 6), generator=seeded())).byte()
    images = images.view(300, 1, 2, 3)
    plain, small = (
        stand_in(represent=lambda x, a=a, b=b: a * x.flatten(1).double() + b)
        for a, b in ((1.0, 0.0), (1e-3, 5.0))
    )
    train, test = (images[:150], y[:150]), (images[150:], y[150:])
    one, two = (evaluate.probe_row(m, train, test, 3, CPU) for m in (plain, small))
    for key in (key for key in one if "scaled" in key):
        assert one[key] == pytest.approx(two[key], abs=0.7), key  # one image of 150
    assert two["all"] < one["all"] - 2


# OOD scores


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_detection_is_by_the_definitions_of_its_three_figures(seed, n, m, ties):
    generator = seeded(seed)
    a, b = torch.randn(n, generator=generator) + 0.3, torch.randn(m, generator=generator)
    if ties:
        a, b = a.round(), b.round()
    pairs = [(x > y) + (x == y) / 2 for x in a.tolist() for y in b.tolist()]
    found = evaluate.detection(a, b)
    assert found["AUROC"] == pytest.approx(100 * sum(pairs) / (n * m), abs=0.006)
    # FPR95 and average precision by their definitions, threshold by threshold.
    kept = [t for t in a.tolist() if (a >= t).double().mean() >= 0.95]
    passed = (b >= max(kept)).double().mean().item()
    assert found["FPR95"] == pytest.approx(100 * passed, abs=0.006)
    area, recall = 0.0, 0.0
    for t in sorted({*a.tolist(), *b.tolist()}, reverse=True):
        hits, alarms = (a >= t).sum().item(), (b >= t).sum().item()
        area += (hits / n - recall) * hits / (hits + alarms)
        recall = hits / n
    assert found["AUPR"] == pytest.approx(100 * area, abs=0.006)


def test_density_scores_are_minus_the_energy_and_minus_its_gradients_length():
    def bowl(x):
        return x.flatten(1).square().sum(1) / 2

    scores = evaluate.density_scores(stand_in(energy=bowl), images := noise(7, 1, 4, 4), CPU)
    x = (images.float() / 127.5 - 1).flatten(1)
    torch.testing.assert_close(scores["log p"], -x.square().sum(1) / 2)
    torch.testing.assert_close(scores["gradient"], -x.norm(dim=1))


def test_an_ood_row_tells_images_from_each_other_set_from_noise_and_from_constants():
    seen = []

    def energy(x):  # likely: what is dark
        seen.append(x.detach())
        return x.flatten(1).mean(1) ** 3

    own = noise(200, 1, 4, 4) // 4
    others = {"light": 255 - own, "same": own}
    rows = evaluate.ood_rows(stand_in(energy=energy), own, others, CPU)
    found = {(row["against"], row["score"]): row for row in rows}
    assert list(found) == [
        (name, score)
        for name in ("light", "same", "uniform noise", "constant")
        for score in ("log p", "gradient")
    ]
    for name in ("light", "uniform noise"):
        row = found[name, "log p"]
        assert (row["AUROC"], row["AUPR"], row["FPR95"]) == (100, 100, 0)
    assert found["same", "log p"]["AUROC"] == found["same", "gradient"]["AUROC"] == 50
    assert found["same", "log p"]["FPR95"] == pytest.approx(95, abs=1)
    shown, light, same, uniform, constant = seen
    assert torch.equal(shown, same)
    torch.testing.assert_close(light, -shown)
    levels = constant.flatten(1)
    assert (levels == levels[:, :1]).all()
    for values in (uniform, levels[:, 0]):
        assert abs(values.mean()) < 5 * (1 / 3 / values.numel()) ** 0.5
        assert abs(values.var() - 1 / 3) < 0.05
    seen.clear()
    assert evaluate.ood_rows(stand_in(energy=energy), own, others, CPU) == rows  # the same noise


def test_somebodys_images_called_constant_are_scored_beside_the_built_in_ones():
    own = noise(20, 1, 4, 4) // 4
    model = stand_in(energy=lambda x: x.flatten(1).mean(1) ** 3)
    rows = evaluate.ood_rows(model, own, {"constant": 255 - own}, CPU)
    assert [row["against"] for row in rows[::2]] == ["constant", "uniform noise", "constant"]
    assert rows[0]["AUROC"] == 100 > rows[4]["AUROC"]


def test_images_of_another_size_than_the_models_are_refused_by_their_shapes():
    model = stand_in(represent=lambda x: x.flatten(1))
    model.image_shape = (1, 28, 28)
    with pytest.raises(ValueError, match=r"\(1, 27, 27\).* the model is for \(1, 28, 28\)"):
        evaluate.latents(model, noise(2, 1, 27, 27))
    model.image_shape = (3, 28, 28)
    with pytest.raises(ValueError, match=r"single image needs a first axis: image\[None\]"):
        evaluate.latents(model, noise(3, 28, 28))  # read as three grey ones


def test_a_curve_of_one_point_is_a_dot_and_what_no_run_has_gets_no_panel():
    nan = float("nan")
    short = {"update": [5.0], "rollbacks": [0.0], "loss": [1.0], "rate": [0.1], "knn": [nan]}
    energies = {**short, "energy_data": [1.0], "energy_chains": [2.0], "gap": [-1.0]}
    alone = evaluate.curves_figure({"a": short})
    titles = [axes.get_title() for axes in alone.axes]
    assert titles == ["loss", "learning rate"]
    assert alone.axes[0].lines[0].get_marker() == "."
    together = [a.get_title() for a in evaluate.curves_figure({"a": short, "b": energies}).axes]
    assert together == ["energy", "loss", "gap of energies", "learning rate"]


# Maps


FOLDERS = {  # of the name umap, which are not umap-learn: what is in them, and the reason told
    "empty folder": (None, "umap"),
    "another package": ("", "umap"),
    "broken": ("raise ImportError('Numba needs another NumPy')", "Numba needs another NumPy"),
    "incomplete": ("import a_part_that_is_absent", "a_part_that_is_absent"),
    "absent": (ModuleNotFoundError, "umap-learn is not installed"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_without_umap_the_map_is_the_two_principal_directions_and_says_why(
    kind, tmp_path, monkeypatch
):
    content, reason = FOLDERS[kind]
    if content is ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, "umap", None)
    else:
        (tmp_path / "umap").mkdir()
        if content is not None:
            (tmp_path / "umap/__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "umap", raising=False)
    deviations = torch.tensor([9.0, 5.0, 1, 1, 1, 1])
    latents = torch.randn(500, 6, generator=seeded()) * deviations + 4
    points, method = evaluate.plane(latents.numpy())
    monkeypatch.delitem(sys.modules, "umap", raising=False)
    assert method.startswith("PCA (")
    assert reason in method
    assert points.shape == (500, 2)
    values = torch.linalg.eigvalsh(latents.T.cov()).flip(0)[:2]
    np.testing.assert_allclose(points.var(0, ddof=1), values, rtol=1e-3)
    assert abs(points.mean()) < 1e-3


def test_with_umap_the_map_is_umaps(monkeypatch):
    class UMAP:
        def __init__(self, random_state):
            self.state = random_state

        def fit_transform(self, points):
            return points[:, 1:3] + self.state

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP))
    latents = np.arange(12.0).reshape(3, 4)
    points, method = evaluate.plane(latents)
    assert method == "UMAP"
    np.testing.assert_array_equal(points, latents[:, 1:3])


@pytest.mark.filterwarnings("ignore:invalid value")  # variance of one point
@pytest.mark.parametrize("shape", [(5, 1), (2, 6), (1, 6), (1, 1)])
def test_latents_of_fewer_directions_than_two_are_mapped_on_a_line(shape, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    points, _ = evaluate.plane(np.random.default_rng(0).normal(size=shape))
    assert points.shape == (shape[0], 2)
    assert np.isfinite(points).all()
    assert abs(points[:, 1]).max() < 1e-9


# Tables and pictures


def shown(figure):
    """The pixels of a figure's PNG (H, W, 3)."""
    content = evaluate.figure_bytes(figure, "picture.png")
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


MAGIC = {
    ".png": b"\x89PNG\r\n\x1a\n",
    ".jpg": b"\xff\xd8\xff",
    ".pdf": b"%PDF-",
    ".svg": b"<?xml",
}


@pytest.mark.parametrize("ending", evaluate.PICTURES)
def test_each_ending_of_a_picture_gives_a_file_of_that_type(ending):
    figures = [
        evaluate.grid_figure(torch.zeros(4, 1, 8, 8), caption="four"),
        evaluate.confusion_figure(torch.eye(2).long(), ["a", "b"], "two"),
        evaluate.map_figure(np.eye(2), np.array([0, 1]), ["a", "b"], "two", "PCA"),
    ]
    for figure in figures:
        for name in (f"picture{ending}", f"folder/PICTURE{ending.upper()}"):
            content = evaluate.figure_bytes(figure, name)
            assert content.startswith(MAGIC[ending])
            assert ending != ".svg" or b"<svg" in content


def legend_of(axes):
    """The names of a map's legend and the colour of each."""
    legend = axes.get_legend()
    names = [text.get_text().strip() for text in legend.get_texts()]
    return dict(zip(names, (to_hex(h.get_color()) for h in legend.legend_handles), strict=True))


def test_a_map_has_a_colour_and_a_legend_entry_a_class_a_title_and_its_method():
    points, labels = np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 3
    figure = evaluate.map_figure(points, labels, ["a", "b", "c"], "latents", "PCA (why)")
    (axes,) = figure.axes
    assert axes.get_title() == "latents"
    assert axes.get_xlabel() == "PCA (why), first axis"
    assert axes.get_ylabel() == "second axis"
    legend = legend_of(axes)
    assert list(legend) == ["a", "b", "c"]
    assert len(set(legend.values())) == 3
    drawn = {
        (*place, to_hex(colour))
        for group in axes.collections
        for place, colour in zip(group.get_offsets(), group.get_facecolors(), strict=True)
    }
    colours = list(legend.values())
    assert drawn == {(*point, colours[k]) for point, k in zip(points, labels, strict=True)}


def test_a_maps_far_points_do_not_shrink_the_others():
    points, labels = np.random.default_rng(0).normal(size=(2000, 2)), np.zeros(2000, int)
    points[0] = 1e6
    (axes,) = evaluate.map_figure(points, labels, ["a"], "title", "PCA").axes
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert -6 < low < -2.5
        assert 2.5 < high < 6


@pytest.mark.parametrize("classes", [1, 10, 11, 60])
def test_a_maps_legend_has_room_for_any_number_of_classes_each_of_its_own_colour(classes):
    names = [f"class {k}" for k in range(classes)]
    points = np.random.default_rng(0).normal(size=(classes, 2))
    figure = evaluate.map_figure(points, np.arange(classes), names, "title", "PCA")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    legend = legend_of(axes)
    assert list(legend) == names
    assert len(set(legend.values())) == classes
    whole, plot = figure.bbox, axes.get_window_extent()
    box = axes.get_legend().get_window_extent()
    assert whole.x0 <= plot.x0 < plot.x1 <= box.x0 < box.x1 <= whole.x1  # beside the points
    assert whole.y0 <= box.y0 < box.y1 <= whole.y1
    assert plot.width > whole.width / 3


@pytest.mark.parametrize("name", ["_cat", "$5", r"$\wrong$", "a_b^c", "Ähre"])
def test_names_of_classes_are_shown_letter_by_letter_whatever_they_are(name):
    names = [name, "dog"]
    of_pairs = evaluate.confusion_figure(torch.eye(2).long(), names, name)
    of_points = evaluate.map_figure(np.eye(2), np.array([0, 1]), names, name, name)
    for figure in (
        of_pairs,
        of_points,
        evaluate.grid_figure(torch.zeros(1, 1, 8, 8), caption=name),
    ):
        figure.draw_without_rendering()
        shown_texts = [text for text in figure.findobj(Text) if name in text.get_text()]
        assert shown_texts
        for text in shown_texts:
            assert not (text.get_parse_math() and text.get_text().count("$") > 1)
    assert list(legend_of(of_points.axes[0])) == names
    assert [text.get_text() for text in of_pairs.axes[0].get_yticklabels()] == names


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_arranged_each_pixel_for_pixel_at_its_place(channels):
    images = noise(5, channels, 3, 4)
    sheet = evaluate.arrange(images.float() / 127.5 - 1, columns=3)
    expected = np.zeros((channels, 2 + 2 * 5, 2 + 3 * 6), np.uint8)  # black where there is none
    for i, image in enumerate(images.numpy()):
        top, left = 2 + 5 * (i // 3), 2 + 6 * (i % 3)
        expected[:, top : top + 3, left : left + 4] = image
    assert np.array_equal(sheet, expected[0] if channels == 1 else expected.transpose(1, 2, 0))


def test_pixels_beyond_the_range_are_clipped_and_not_wrapped():
    images = torch.tensor([-9.0, -1, 0, 1, 9]).view(5, 1, 1, 1)
    assert evaluate.arrange(images, 5, gap=0).tolist() == [[0, 0, 128, 255, 255]]


@pytest.mark.parametrize("caption", ["", "what it is"])
@pytest.mark.parametrize(
    ("shape", "columns"),
    [
        ((1, 1, 28, 28), None),
        ((7, 3, 32, 32), 2),
        ((64, 1, 9, 20), None),
        ((1, 1, 512, 300), None),
        ((30, 1, 28, 28), 30),  # a strip
    ],
)
def test_a_grids_png_has_600_pixels_or_more_and_each_of_an_image_as_one_square(
    shape, columns, caption
):
    images = noise(*shape).float() / 127.5 - 1
    picture = shown(evaluate.grid_figure(images, columns, caption)).astype(int)
    sheet = evaluate.arrange(images, columns or round(len(images) ** 0.5)).astype(int)
    height, width = sheet.shape[:2]
    scale = picture.shape[1] // width
    assert min(scale * height, scale * width) >= 600 or (scale + 1) * max(height, width) > 2400
    assert picture.shape[1] == scale * width
    assert (picture.shape[0] > scale * height) == bool(caption)  # below the images
    enlarged = sheet.repeat(scale, 0).repeat(scale, 1)
    enlarged = enlarged if enlarged.ndim == 3 else enlarged[:, :, None]
    assert (picture[: scale * height] == enlarged).all()
    assert (picture[scale * height :] < 100).any() == bool(caption)  # ink


SENTENCE = (
    "gmm-cebm, cifar10, 1500000 updates: 100000 steps from the buffer, mean energy -1.234e+05 -> "
    "-1.235e+05, pixels -0.999 to 0.999, and a checkpoint in a folder with a name of many letters"
)


@pytest.mark.parametrize("side", [8, 28, 32, 300])
@pytest.mark.parametrize(
    "caption", [SENTENCE[:8], SENTENCE[:60], SENTENCE[:128], SENTENCE, "100000 " * 20, "mean " * 30]
)
def test_a_caption_loses_no_word_and_stays_below_the_images_within_the_picture(caption, side):
    figure = evaluate.grid_figure(torch.zeros(4, 1, side, side), caption=caption)
    figure.draw_without_rendering()
    (text,), (axes,) = figure.texts, figure.axes
    assert text.get_text().split() == caption.split()
    box = text.get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert figure.bbox.y0 <= box.y0 < box.y1 <= axes.get_window_extent().y0


def test_tables_hold_each_figure_in_its_column():
    rows = [{"model": "cebm", "latent": 98.1}, {"model": "x", "latent": 7.0}]
    assert cebm.table(rows).splitlines()[1].split() == ["cebm", "98.10"]
    assert cebm.table(rows, markdown=True).splitlines()[-1] == "| x | 7.00 |"
    rows.append({"model": "jem", "accuracy": 91.0})
    assert cebm.table(rows).splitlines()[-1].split() == ["jem", "-", "91.00"]


def test_arrays_come_back_from_an_npz():
    arrays = {"mean": np.random.default_rng(0).normal(size=(3, 2)), "labels": np.arange(3)}
    read = np.load(io.BytesIO(evaluate.npz_bytes(arrays)))
    assert read.files == list(arrays)
    for name in arrays:
        np.testing.assert_array_equal(read[name], arrays[name])


def test_the_confusion_picture_is_labelled_and_shows_a_count_and_a_share_for_each_pair():
    counts = torch.tensor([[5, 0, 3], [1, 4, 0], [0, 0, 0]])
    figure = evaluate.confusion_figure(counts, ["cat", "dog", "emu"], "1-NN")
    axes, bar = figure.axes
    assert axes.get_title() == "1-NN"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert bar.get_ylabel() == "share of the true class"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "emu"]
    cells = {text.get_position()[::-1]: text.get_text() for text in axes.texts}
    assert cells == {(i, j): str(counts[i, j].item()) for i in range(3) for j in range(3)}
    share = [[5 / 8, 0, 3 / 8], [1 / 5, 4 / 5, 0], [0, 0, 0]]  # row by row
    np.testing.assert_allclose(axes.images[0].get_array(), share)
    assert axes.images[0].get_clim() == (0, 1)
    assert min(shown(figure).shape[:2]) >= 500


def hundred_classes():
    """Counts, in which classes 30 to 79 alone have errors: ten of their hundred images."""
    counts = torch.full((100,), 100).diag()
    for k in range(30, 80):
        counts[k, k] -= 10
        counts[k, 30 + (k - 29) % 50] += 10
    return counts, [f"class {k}" for k in range(100)]


def test_of_100_classes_the_picture_has_the_50_with_most_errors_and_says_so():
    figure = evaluate.confusion_figure(*hundred_classes(), "1-NN")
    axes, _ = figure.axes
    assert axes.get_title() == "1-NN\nthe 50 of 100 classes with most errors"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [f"class {k}" for k in range(30, 80)]
    assert axes.images[0].get_array().shape == (50, 50)
    assert not axes.texts  # no room
    assert len(shown(figure)) >= 600


def test_shares_of_a_true_class_are_of_all_its_images_also_where_classes_are_left_out():
    counts, names = hundred_classes()
    counts[40, 40] -= 60
    counts[40, :20] += 3  # of 100 images of class 40, 60 are taken for classes that are not shown
    axes, _ = evaluate.confusion_figure(counts, names, "1-NN").axes
    row = [label.get_text() for label in axes.get_yticklabels()].index("class 40")
    share = np.asarray(axes.images[0].get_array())[row]
    assert share[row] == pytest.approx(0.3)
    assert share.sum() == pytest.approx(0.4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_latents_that_are_not_finite_are_an_error_that_counts_and_names_the_images(poison):
    images = torch.zeros(2500, 1, 8, 8, dtype=torch.uint8)
    images[[7, 1200], 0, 0, 0] = 255

    def represent(x):
        return torch.where(x[:, 0, :1, 0] > 0, poison, x[:, 0, :3, 0])

    with pytest.raises(evaluate.EvaluationError, match=r"2 of 2500 images .*\(images 7, 1200\)"):
        evaluate.in_batches(represent, images, "cpu")


def test_names_that_no_font_can_show_are_shown_by_their_bytes():
    name = b"\xff\xfe.pt".decode(errors="surrogateescape")
    counts, points = torch.eye(2), np.zeros((2, 2))
    figures = [
        evaluate.confusion_figure(counts, [name, "b"], name),
        evaluate.map_figure(points, [0, 1], [name, "b"], name, "PCA"),
        evaluate.grid_figure(torch.zeros(1, 1, 8, 8), caption=name),
    ]
    for figure in figures:
        assert evaluate.figure_bytes(figure, "a.svg").startswith(b"<?xml")
