"""`python -m benchmarks.report`: writes the results into benchmarks/README.md, every number from a CSV that a run left."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

from sidae_lib import data, experiments, paths
from sidae_lib.config import RunConfig, SidaeError
from sidae_lib.train import write

HERE = Path(__file__).parent
SIZES = {"cifar10": 50_000, "mnist": 60_000, "fashion_mnist": 60_000, "stl10": 100_000, "tinyimagenet32": 50_000}
SHOWN = ["scale", "what", "unit", "median", "spread", "largest", "n", "at", "method", "batch", "size", "precision", "mode",
         "ratio", "of", "share", "accuracy", "low", "high", "host_gib", "device_gib", "pairs", "above_mib", "pairs_per_second",
         "seconds_million", "recall", "processes", "ms_per_step", "images_per_second", "seconds_per_run",
         "runs_per_quarter"]  # fmt: skip
MADE_ON = {"hardware": "{}", "cores": "{} cores", "threads": "{} threads", "torch": "torch {}"}


def markdown(table: pd.DataFrame) -> str:
    cells = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in table.astype(object).values]
    rows = [table.columns, ["---"] * len(table.columns), *[["" if c == "nan" else c for c in row] for row in cells]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def machines(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(what it was made on, the rows made on it), the most rows first: times of two machines do not stand in one table."""
    if not len(table):
        return []
    where = [", ".join(said.format(row[c]) for c, said in MADE_ON.items() if c in row) for row in table.to_dict("records")]
    return sorted(table.groupby(where, sort=False), key=lambda part: -len(part[1]))


def paper_hours(rates: dict[str, float]) -> float:
    """Hours of pre-training that all SidAE figures at paper scale take at these images/s, one run after the other."""
    runs: set[RunConfig] = set()
    for build in (experiments.accuracy_vs_epochs, experiments.w_sweep, experiments.fine_tuning, experiments.stl_transfer):
        try:
            runs |= set(build("paper")[0])
        except SidaeError:  # STL-10 is not here: the pool that stands for it has half as many images
            runs |= set(build("paper", ["tinyimagenet32", "cifar10"])[0])
    return sum(SIZES[data.KNOWN[r.data][0]] * r.epochs / rates[r.method] for r in runs if r.method in rates) / 3600


def targets(found: Callable[[str], pd.DataFrame]) -> Iterable[tuple[str, str, float | None]]:
    """(what, what was to be reached on 2 CPU cores, what was measured or None).

    found: a section -> its rows of one machine.
    """
    def pick(section: str, column: str, **where: object) -> float | None:
        table = found(section)
        for name, value in where.items():
            table = table[table[name] == value] if name in table else table[:0]
        return float(table[column].iloc[0]) if len(table) and column in table else None

    own, at = "pipeline, own mode", {"batch": 512, "precision": "fp32"}
    yield "whole pipeline over step alone, SimSiam", "0.95", pick("pretrain", "ratio", what=own, **at)
    lightly = pick("pretrain", "median", what="lightly's example", batch=512)
    for kind, least in (("fp32", "1.8"), ("bf16", "3.5 with AMX")):
        rate = pick("pretrain", "median", what=own, batch=512, precision=kind)
        yield f"over lightly's example, which is in fp32, {kind}", least, rate and lightly and rate / lightly
    torchs, wide = {"what": "torch's own layers"}, {"method": "sidae", "batch": 512}
    for what, section, kind, least, where in (
            ("SidAE, fp32", "sidae", "fp32", "1.3", wide), ("SidAE, bf16", "sidae", "bf16", "1.5, 2.6 with AMX", wide),
            ("laptop's network", "narrow", "fp32", "1", {"scale": "laptop"})):  # fmt: skip
        ratio = pick(section, "ratio", **torchs, precision=kind, **where)
        yield f"over torch's own layers, {what}", least, ratio and 1 / ratio
    floor = found("floor")
    for kind, least in (("fp32", "0.6"), ("bf16", "a third, with AMX")):
        steps = floor[(floor["width"] == 64) & (floor["precision"] == kind)] if len(floor) else floor
        yield f"share of the floor, paper's network (least of three methods), {kind}", least, (
            steps["share"].min() if len(steps) else None)  # fmt: skip
    laptop, two = {"scale": "laptop", "precision": "fp32"}, "two processes of one thread"
    yield "laptop's network, whole pipeline, images/s", "1,000", pick("narrow", "median", what=own, **laptop)
    yield f"the same, {two}", "-", pick("narrow", "median", what=two, **laptop)
    yield "probe from cached features over re-running", "20", pick("probe", "ratio", what="backbone in every epoch")
    peak = pick("growth", "host_gib", what="SidAE at paper scale, images")
    yield "peak memory, CIFAR-10 at paper scale, GiB", "at most 3", peak
    yield "store with 10,000 records to a table, s", "at most 2", pick("growth", "median", what="records", at=10_000)
    mined = {"what": "exact", "at": 50_000}
    yield "all pairs among 50,000 images, s", "at most 60", pick("pairs", "median", **mined)
    yield "memory above their embeddings, MiB", "at most 500", pick("pairs", "above_mib", **mined)
    rates = {m: pick("pretrain" if m == "simsiam" else "sidae", "median", what=own, method=m, batch=512, precision="bf16")
             for m in ("sidae", "simsiam", "dae")}  # fmt: skip
    hours = paper_hours(rates) if all(rates.values()) else None
    yield "all SidAE figures, paper scale, 5 seeds, bf16, hours of pre-training (estimate from the rates)", "-", hours
    gpu = pick("cuda/step", "seconds_per_run", processes=3)
    yield "a run of CIFAR-10 at paper scale, one GPU shared by three, s a run", "at most 80", gpu
    yield "two local workers over one, 16 short runs, times", "1.5", pick("scaling", "median", what="two workers over one")
    yield "added to a run by the grid, s", "-", pick("scaling", "median", what="added to a run by the grid")
    clock = paths.ROOT / "figures" / "quick" / "timings.csv"
    for what, least, end in (("notebooks 00 to 03", "at most 4", "04"), ("all notebooks", "at most 10", "99")):
        timed = pd.read_csv(clock)
        took = machines(timed[timed["notebook"] < end])
        yield f"quick scale, {what}, minutes", least, took[0][1]["seconds"].sum() / 60 if len(took) == 1 else None


def report(folder: Path = HERE / "results") -> str:
    def found(section: str) -> pd.DataFrame:
        path = folder / f"{section}.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame()

    def one(section: str) -> pd.DataFrame:
        return machines(found(section))[0][1] if len(found(section)) else pd.DataFrame()

    reached = pd.DataFrame(targets(one), columns=["what", "to reach", "measured"])
    reached["measured"] = ["not measured" if pd.isna(v) else f"{v:,.3g}" if v < 100 else f"{v:,.0f}"
                           for v in reached["measured"]]
    parts = [markdown(reached)]
    sections = ("pretrain", "sidae", "narrow", "augment", "probe", "evaluations", "growth", "pairs", "floor", "precision",
                "scaling", "devices", "step")  # fmt: skip
    for section in (*sections, *(f"cuda/{name}" for name in sections)):
        for where, table in machines(found(section)):
            shown = table[[c for c in SHOWN if c in table and not table[c].isna().all()]]
            parts.append(f"### `{section}` ({where})\n\n{markdown(shown)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    page = HERE / "README.md"
    between = re.compile(r"(<!-- results -->\n).*(\n<!-- /results -->)", re.S)
    write(page, between.sub(lambda m: m[1] + report() + m[2], page.read_text()).encode())
