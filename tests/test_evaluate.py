"""Exact 1-NN against brute force and scikit-learn; confusion matrices; pictures."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import evaluate


def brute_force(train, test):
    """Index of the nearest by float64 differences, one by one, the first of equals."""
    found = []
    for b in test.double():
        distances = [((a - b) ** 2).sum().item() for a in train.double()]
        found.append(distances.index(min(distances)))
    return torch.tensor(found)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 20), st.integers(1, 5),
       st.sampled_from([1.0, 1e-3, 1e4]), st.booleans())
def test_nearest_is_brute_force_with_ties_to_the_first(seed, n, m, dim, offset, integers):
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(n, dim, generator=generator)
    test = torch.randn(m, dim, generator=generator)
    if integers:  # a lattice: many equal distances
        train, test = train.round(), test.round()
    train, test = train + offset, test + offset
    assert torch.equal(evaluate.nearest(train, test), brute_force(train, test))
    assert torch.equal(evaluate.nearest(train, test, floats=3 * n), brute_force(train, test))


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


def test_confusion_counts_pairs_with_the_true_class_in_rows():
    true, predicted = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0, 1, 1, 0, 2, 2])
    counts = evaluate.confusion(true, predicted, 4)
    assert counts.tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 2, 0], [0, 0, 0, 0]]
    text = evaluate.confusion_text(counts.tolist(), ["ant", "bee", "cat", "dog"])
    assert text.splitlines()[3].split() == ["cat", "1", "0", "2", "0"]


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


def test_the_confusion_picture_has_a_cell_for_each_pair():
    picture = Image.open(io.BytesIO(evaluate.confusion_png([[5, 0], [1, 4]], ["a", "b"], cell=40)))
    assert picture.size == (170, 170)
    diagonal, empty = picture.getpixel((90 + 38, 90 + 2)), picture.getpixel((90 + 78, 90 + 2))
    assert diagonal[0] < 20
    assert empty == (255, 255, 255)
