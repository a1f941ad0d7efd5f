"""Writes the tables in docs/*.md and README.md anew from docs/experiments.csv.

    python docs/tables.py          writes them
    python docs/tables.py --check  exits with 1 if one is out of date

A table stands between `<!-- table STUDY -->` and `<!-- end -->`: the rows of that study, in the
order of the file, without notes and empty columns. `<!-- scores STUDY -->` has its scores on other
data, `<!-- table best -->` the best 1-NN of every model beside the authors' figure.
"""

import csv
import re
import sys
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
PAGES = (*sorted(HERE.glob("*.md")), HERE.parent / "README.md")
MARKS = re.compile(r"(<!-- (table|scores) (\S+) -->\n).*?(<!-- end -->)", re.S)
HEADS = {  # of the columns that are shown
    "preset": "preset",
    "settings": "settings",
    "data": "data",
    "images": "images",
    "seed": "seed",
    "updates": "updates",
    "rollbacks": "rollbacks",
    "seconds": "seconds",
    "hardware": "hardware",
    "knn": "1-NN",
    "knn_whitened": "whitened",
    "knn_untrained": "untrained",
    "knn_untrained_whitened": "untrained, whitened",
    "knn_pixels": "pixels",
    "probe_1": "probe, 1",
    "probe_10": "10",
    "probe_100": "100",
    "probe_all": "all",
    "gap": "gap",
}
# 1-NN by the authors' published predictions and, of GMM-CEBM on MNIST and Fashion-MNIST, weights.
AUTHORS = {
    "cebm": {"mnist": 98.10, "fmnist": 84.31, "cifar10": 45.43},
    "gmm-cebm": {"mnist": 97.48, "fmnist": 82.91, "cifar10": 41.26},
    "igebm": {"mnist": 96.17, "fmnist": 80.61, "cifar10": 39.62},
    "vae": {"mnist": 94.75, "fmnist": 79.10, "cifar10": 37.91},
}
PIXELS = {"mnist": 96.91, "fmnist": 84.97, "cifar10": 35.39}
PLACES = {(model, source) for model, figures in AUTHORS.items() for source in figures}
NAMES = {"mnist": "MNIST", "fmnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}


def read_experiments() -> list[dict[str, str]]:
    """The rows of experiments.csv, all values as text."""
    with open(HERE / "experiments.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def as_markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)


def rows_of(experiments: list[dict[str, str]], study: str) -> list[dict[str, str]]:
    rows = [row for row in experiments if row["study"] == study]
    if not rows:
        sys.exit(f"experiments.csv has no rows of the study {study}")
    return rows


def study_table(experiments: list[dict[str, str]], study: str) -> str:
    """The rows of a study."""
    rows = rows_of(experiments, study)
    shown = [column for column in HEADS if any(row.get(column) for row in rows)]
    code = ("preset", "settings")
    cells = [[f"`{row[c]}`" if c in code and row[c] else row[c] for c in shown] for row in rows]
    return as_markdown([HEADS[column] for column in shown], cells)


def scores_table(experiments: list[dict[str, str]], study: str) -> str:
    """How well the models of a study tell other images from their data, by both scores."""
    measures = {"auroc": "AUROC", "aupr": "AUPR", "fpr95": "FPR95"}
    lines = []
    for row in rows_of(experiments, study):
        figures = {
            (measure, *pair.split(":")[0].rsplit(" ", 1)): pair.split(":")[1]
            for measure in measures
            for pair in filter(None, row[measure].split(";"))
        }
        for other in dict.fromkeys(other for _, other, _ in figures):
            line = [f"`{row['preset']}`", row["updates"], row["images"] or row["data"], other]
            for score in ("logp", "gradient"):
                line += [figures.get((measure, other, score), "") for measure in measures]
            lines.append(line)
    heads = [f"{score}, {name}" for score in ("log p", "gradient") for name in measures.values()]
    kept = [i for i in range(4 + len(heads)) if i < 4 or any(line[i] for line in lines)]
    head = ["preset", "updates", "data", "against", *heads]
    return as_markdown([head[i] for i in kept], [[line[i] for i in kept] for line in lines])


def best_table(experiments: list[dict[str, str]]) -> str:
    """The best 1-NN of the paper's models, bold where it reaches the authors', in brackets.

    Rows that are not `comparable` are left out: of another likelihood, of latents after the last
    activation, of weights averaged over runs, of a smaller network.
    """
    best: dict[tuple[str, str], float] = {}
    untrained: dict[str, list[float]] = {source: [] for source in PIXELS}
    for row in experiments:
        model = row["preset"].split(f"-{row['data']}")[0]
        if row["knn"] and row["comparable"] == "yes" and (model, row["data"]) in PLACES:
            place = model, row["data"]
            best[place] = max(best.get(place, 0.0), float(row["knn"]))
        of_paper = model == "cebm" and row["comparable"] == "yes"
        if row["knn_untrained"] and of_paper and row["data"] in PIXELS:
            untrained[row["data"]].append(float(row["knn_untrained"]))
    lines = []
    for model, theirs in AUTHORS.items():
        line = [f"`{model}`"]
        for source, figure in theirs.items():
            ours = best.get((model, source))
            text = "-" if ours is None else f"{ours:.2f}"
            reached = ours is not None and ours >= figure
            line.append(f"{f'**{text}**' if reached else text} ({figure:.2f})")
        lines.append(line)
    medians = (f"{median(figures):.2f}" if figures else "-" for figures in untrained.values())
    lines.append(["`cebm`, untrained", *medians])
    lines.append(["the image's pixels", *(f"{figure:.2f}" for figure in PIXELS.values())])
    return as_markdown(["model", *NAMES.values()], lines)


def renew(text: str, experiments: list[dict[str, str]]) -> str:
    """A page with its tables written anew."""

    def table(match: re.Match) -> str:
        kind, study = match[2], match[3]
        if study == "best":
            body = best_table(experiments)
        else:
            body = {"table": study_table, "scores": scores_table}[kind](experiments, study)
        return f"{match[1]}\n{body}\n{match[4]}"

    return MARKS.sub(table, text)


def main() -> int:
    check, stale = "--check" in sys.argv[1:], []
    experiments = read_experiments()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (new := renew(text, experiments)) != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    print(f"{'out of date' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
