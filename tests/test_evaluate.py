"""1-NN, probe and AUROC against brute force and scikit-learn; tables; pictures."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

import evaluate


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
    generator = torch.Generator().manual_seed(seed)
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
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(0, 256, (n, 784), generator=generator).float() for n in (500, 200))
    labels = torch.arange(500)
    oracle = KNeighborsClassifier(1, algorithm="brute").fit(train.double().numpy(), labels.numpy())
    predicted = oracle.predict(test.double().numpy())
    assert evaluate.nearest(train, test).tolist() == predicted.tolist()


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
    evaluate.nearest(torch.ones(300, dim), torch.ones(count, dim), floats=1000)
    assert 500 < max(held) <= 1000


@pytest.mark.parametrize("penalty", [1.0, 0.01])
def test_logistic_regression_is_scikit_learns(penalty):
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(300) % 4
    x = torch.randn(300, 5, generator=generator) + torch.nn.functional.one_hot(y, 5)
    x, w = x.double(), evaluate.logistic_regression(x, y, 4, penalty)
    oracle = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())
    chances = torch.softmax(x @ w[:-1] + w[-1], 1).numpy()
    assert abs(chances - oracle.predict_proba(x.numpy())).max() < 1e-4


def test_logistic_regression_does_not_stop_early_on_many_points_of_small_features():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(60_000) % 3
    x = 1e-3 * (torch.randn(60_000, 4, generator=generator) + torch.nn.functional.one_hot(y, 4))
    w = evaluate.logistic_regression(x, y, 3, 1e-6)
    scaled = evaluate.logistic_regression(1e3 * x, y, 3, 1.0)  # the same problem
    torch.testing.assert_close(w[:-1] / 1e3, scaled[:-1], atol=1e-3, rtol=1e-2)


def test_a_probe_sees_so_many_labels_a_class_and_reports_mean_and_deviation(monkeypatch):
    fit, seen = evaluate.logistic_regression, []
    monkeypatch.setattr(
        evaluate,
        "logistic_regression",
        lambda x, y, *rest: seen.append(y.bincount().tolist()) or fit(x, y, *rest),
    )
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(600) % 3
    x = 0.7 * torch.randn(600, 4, generator=generator) + torch.nn.functional.one_hot(y, 4)
    train, test = (x[:300], y[:300]), (x[300:], y[300:])
    scores = {n: evaluate.probe(*train, *test, 3, n) for n in (1, 10, None)}
    assert seen == 10 * [[1] * 3] + 10 * [[10] * 3] + [[100] * 3]
    assert scores[1][0] < scores[10][0] < scores[None][0] + 2
    assert scores[1][1] > scores[10][1] > scores[None][1] == 0
    oracle = LogisticRegression(tol=1e-8, max_iter=10_000).fit(*(v.numpy() for v in train))
    assert abs(scores[None][0] - 100 * oracle.score(*(v.numpy() for v in test))) < 0.5


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 50), st.integers(1, 50), st.booleans())
def test_auroc_is_scikit_learns_ties_included(seed, n, m, ties):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(n, generator=generator) + 0.3, torch.randn(m, generator=generator)
    if ties:
        a, b = a.round(), b.round()
    expected = roc_auc_score([1] * n + [0] * m, torch.cat([a, b]).numpy())
    assert evaluate.auroc(a, b) == pytest.approx(100 * expected)


def test_density_scores_are_minus_the_energy_and_minus_its_gradients_length():
    class Bowl:
        def energy(self, x):
            return x.flatten(1).square().sum(1) / 2

    images = torch.randint(0, 256, (7, 1, 4, 4), dtype=torch.uint8)
    scores = evaluate.density_scores(Bowl(), images, torch.device("cpu"))
    x = (images.float() / 127.5 - 1).flatten(1)
    torch.testing.assert_close(scores["logp"], -x.square().sum(1) / 2)
    torch.testing.assert_close(scores["gradient"], -x.norm(dim=1))


def test_without_umap_the_map_is_the_two_principal_directions():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(500, 6, generator=generator) * torch.tensor([9.0, 5.0, 1, 1, 1, 1]) + 4
    points, method = evaluate.plane(latents)
    assert method in ("PCA", "UMAP")
    assert points.shape == (500, 2)
    if method == "PCA":
        values = torch.linalg.eigvalsh(latents.T.cov()).flip(0)[:2]
        torch.testing.assert_close(points.var(0), values, rtol=1e-3, atol=0)
        assert abs(points.mean()) < 1e-3


def test_the_map_has_a_point_of_its_classs_colour_and_a_legend():
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0]] * 10)
    labels = torch.tensor([0, 1] * 10)
    picture = Image.open(io.BytesIO(evaluate.map_png(corners, labels, ["a", "b"], "title")))
    shown = np.asarray(picture)
    colours = [tuple(shown[45 + 18 * k, 709]) for k in (0, 1)]  # of the legend
    assert colours[0] != colours[1]
    assert tuple(shown[50, 20]) == colours[0]
    assert tuple(shown[710, 680]) == colours[1]


def test_the_legend_of_a_map_has_room_for_any_number_of_classes():
    picture = Image.open(
        io.BytesIO(
            evaluate.map_png(
                torch.rand(60, 2), torch.arange(60), [str(k) for k in range(60)], "title"
            )
        )
    )
    legend = np.asarray(picture)[45::18, 709]
    assert len(np.unique(legend[:60], axis=0)) == 60


def test_whitened_latents_have_unit_variance_along_principal_directions_but_small_ones():
    generator = torch.Generator().manual_seed(0)
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


def test_drawing_under_a_seed_leaves_the_random_state_as_it_was():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with evaluate.seeded(3, torch.device("cpu")):
        first = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with evaluate.seeded(3, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)


def test_a_grid_shows_each_image_once_at_its_place():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 1, 4, 4)
    picture = np.asarray(Image.open(io.BytesIO(evaluate.grid_png(images, 3))).convert("L"))
    assert picture.shape == (2 * 6 + 2, 3 * 6 + 2)
    shown = [picture[2 + 6 * (i // 3), 2 + 6 * (i % 3)] for i in range(6)]
    assert shown == pytest.approx([255 * i / 5 for i in range(6)], abs=1)


def test_tables_hold_each_figure_in_its_column():
    rows = [{"model": "cebm", "latent": 98.1}, {"model": "x", "latent": 7.0}]
    assert evaluate.table(rows).splitlines()[1].split() == ["cebm", "98.10"]
    assert evaluate.table(rows, markdown=True).splitlines()[-1] == "| x | 7.00 |"
    rows.append({"model": "jem", "accuracy": 91.0})
    assert evaluate.table(rows).splitlines()[-1].split() == ["jem", "-", "91.00"]


def test_the_confusion_picture_has_a_cell_for_each_pair():
    counts = torch.tensor([[5, 0], [1, 4]])
    picture = Image.open(io.BytesIO(evaluate.confusion_png(counts, ["a", "b"], cell=40)))
    assert picture.size == (120, 120)
    diagonal, empty = picture.getpixel((40 + 38, 40 + 2)), picture.getpixel((80 + 38, 40 + 2))
    assert diagonal < 20
    assert empty == 255
