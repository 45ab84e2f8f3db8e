"""What is a house worth? A data pipeline in Python; each function is a step, in its own sandbox.

fetch -> clean -> train mean       -> choose -> report
               -> train line       ->
               -> train neighbours ->

dayfly workflow deploy examples/pipeline/main.py
dayfly run start houses
"""

import csv
import json
import shutil
from pathlib import Path
from statistics import fmean, linear_regression

from dayfly import File, Folder, out, step, workflow

NEIGHBOURS = 5


@step
def fetch() -> File:
    """The raw data; here they come with the code, elsewhere from wherever they are."""
    return shutil.copy(Path(__file__).with_name("houses.csv"), out())


@step(cache=True)
def clean(raw: File) -> Folder:
    """Rows that make sense, each once; every fifth is kept for testing."""
    with open(raw) as file:
        lines = dict.fromkeys(tuple(row) for row in csv.reader(file))
    rows = [[float(n) for n in row] for row in lines if is_sensible(row)]
    print(f"{len(rows)} of {len(lines)} rows make sense")
    out().mkdir()
    for name, some in (("test", rows[::5]), ("train", [r for n, r in enumerate(rows) if n % 5])):
        (out() / f"{name}.json").write_text(json.dumps(some))
    return out()


@step(cache=True)
def train(kind: str, data: Folder) -> File:
    """One model, and how far its guesses are off for houses that it has not seen."""
    houses = json.loads((data / "train.json").read_text())
    test = json.loads((data / "test.json").read_text())
    guess = MODELS[kind](houses)
    error = fmean(abs(guess(house) - house[-1]) for house in test)
    print(f"{kind} is off by {error:.0f} euros")
    out().write_text(json.dumps({"kind": kind, "error": round(error), "tested": len(test)}))
    return out()


@step
def choose(models: list[File]) -> dict:
    """The model with the smallest error, and those that it was better than."""
    first, *others = sorted((json.loads(m.read_text()) for m in models), key=lambda m: m["error"])
    return {"best": first, "others": others}


@step
def report(chosen: dict) -> File:
    """A page for people."""
    best = chosen["best"]
    lines = [
        f"# Houses\n\nThe best model is **{best['kind']}**.\n",
        "| model | off by |",
        "| - | - |",
    ]
    lines += [f"| {m['kind']} | {m['error']} euros |" for m in (best, *chosen["others"])]
    out().write_text("\n".join(lines) + "\n")
    return out()


@workflow(source=".")
def houses():
    data = clean(fetch())
    chosen = choose(train.map(kind=list(MODELS), data=data))
    return {
        "model": chosen["best"]["kind"],
        "euros": chosen["best"]["error"],
        "report": report(chosen),
    }


# ---- models: each takes known houses, and returns what guesses a price ---------------------------


def mean(houses):
    average = fmean(house[-1] for house in houses)
    return lambda house: average


def line(houses):
    slope, intercept = linear_regression([h[0] for h in houses], [h[-1] for h in houses])
    return lambda house: slope * house[0] + intercept


def neighbours(houses):
    def distance(a, b):
        return sum((x - y) ** 2 for x, y in zip(a[:-1], b[:-1], strict=True))

    def guess(house):
        nearest = sorted(houses, key=lambda other: distance(house, other))[:NEIGHBOURS]
        return fmean(other[-1] for other in nearest)

    return guess


MODELS = {"mean": mean, "line": line, "neighbours": neighbours}


def is_sensible(row):
    try:
        return all(float(n) >= 0 for n in row)
    except ValueError:
        return False
