"""What the page on image sets says: its words and the sets' published sizes are in data.csv, what is on record is counted."""

from collections import Counter

import shared

from sidae_lib import data, experiments, places, recorded, scales, store

FIGURES = [name for name in experiments.FIGURES | experiments.PARTS if name != "your_own_images"]  # which reads a set


def rows() -> list[dict[str, str]]:
    return shared.words(__file__)


def fingerprint(name: str) -> str:
    return next((f for f, (known, _) in places.KNOWN.items() if known == name), "")


def shown(name: str) -> str:
    return dict(places.KNOWN.values()).get(name, {"stl10": "STL-10"}.get(name, name))


def images(row: dict[str, str]) -> str:
    """How many images of each split, of what kind."""
    splits = [f"{int(row[s]):,} {s}" for s in ("train", "test", "unlabeled") if row[s] != "0"]
    return f"{', '.join(splits)}; {row['classes']} classes; {row['pixels']}"


def used(name: str) -> list[str]:
    """The scales that train on a set or classify it."""
    return [scale for scale in recorded.SCALES if name in {*scales.SCALES[scale].datasets, *scales.SCALES[scale].transfer}]


def scales_of() -> dict[str, str]:
    """Run's key -> the scales whose figures ask for it, in words."""
    asked: dict[str, list[str]] = {}
    with data.as_published():
        for scale in recorded.SCALES:
            for runs, _ in experiments.needs(scale, FIGURES).values():
                for run in runs:
                    asked.setdefault(run.key(), []).append(scale)
            for evals in experiments.rates(scale).values():
                for e in evals:
                    asked.setdefault(e.run.key(), []).append(scale)
    return {key: " and ".join(dict.fromkeys(names)) for key, names in asked.items()}


def counts() -> dict[str, tuple[Counter, Counter]]:
    """Fingerprint -> published runs that train on the set by scale, and evaluations of it by kind."""
    out: dict[str, tuple[Counter, Counter]] = {f: (Counter(), Counter()) for f in places.KNOWN}
    scale = scales_of()
    for r in store.every("run", store.published()):
        out[r["config"]["data"]][0][scale.get(r["key"], "no scale")] += 1
    for r in store.every("evaluation", store.published()):
        out[r["config"].get("data") or r["config"]["run"]["data"]][1][r["kind"]] += 1
    return out


def table() -> str:
    """What is on record."""
    found, lines = counts(), []
    for row in rows():
        runs, evals = found.get(fingerprint(row["name"]), (Counter(), Counter()))
        by = "".join(f"<br>{scale}: {n:,}" for scale, n in runs.most_common())
        lines.append([shown(row["name"]), f"{runs.total():,}{by}", f"{evals.total():,}"])
    return shared.table(["set", "runs trained on it", "evaluations on it"], lines)


def card(row: dict[str, str]) -> str:
    name = row["name"]
    known = f", fingerprint `{fingerprint(name)}`" if fingerprint(name) else ", no known fingerprint"
    where = f" Used at {' and '.join(used(name))} scale." if used(name) else ""
    return (f"### {shown(name)}\n\n{row['what']}{where}\n\n- **Name:** `{name}`{known}\n- **Images:** {images(row)}\n"
            f"- **From:** {row['source']}\n- **Licence:** {row['licence']}\n- **Our copy:** {row['copy']}\n"
            f"- **To get it:** {row['get']}\n")


def made(scale: str) -> dict[str, str]:
    return {"data_cards": "\n".join(map(card, rows())), "data_table": table()}
