"""What the page on deviations says: its words are in deviations.csv, "we do" is the code's, effects are the records'.

The page is of published records alone, so that it is the same on every machine.
"""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import shared
from docutils.nodes import make_id

from sidae_lib import augment, data, differences, experiments, frames, methods, places, recorded, scales, store
from sidae_lib.config import EvalConfig, Record, RunConfig
from sidae_lib.differences import Difference

OWNERS = {"RunConfig": RunConfig, "EvalConfig": EvalConfig}
SCORED = {"test": "test images", "val": "held-out images"}
DISPLAYS = dict(places.KNOWN.values())  # a set's name -> as it is shown


def rows() -> list[dict[str, str]]:
    return shared.words(__file__)


def marked() -> set[tuple[str, str]]:
    """(config, field) of every field that a comment of config.py marks as open."""
    return {(name, field) for name, cls in OWNERS.items()
            for field in re.findall(r"^    (\w+): .*#.*\bopen\b", inspect.getsource(cls), re.MULTILINE)}


# --- what we do -------------------------------------------------------------------------------------------


def code(value: Any) -> str:
    return f"`{value}`"


def default(owner: str, field: str) -> Any:
    return OWNERS[owner].__dataclass_fields__[field].default


def elsewhere(owner: str, field: str) -> dict[str, Any]:
    """Scale -> the field's value, where a scale has its own."""
    own = {"repeats": lambda s: s.repeats, "channels": lambda s: s.grey}
    usual = default(owner, field)
    of = own.get(field, lambda s: s.run.get(field, usual) if owner == "RunConfig" else usual)
    values = {name: of(scales.SCALES[name]) for name in recorded.SCALES}
    return {name: value for name, value in values.items() if value != usual}


def ours(row: dict[str, str]) -> str:
    """What we do, in Markdown."""
    owner, field = row["owner"], row["field"]
    if not owner:
        return BESIDE[field]()
    said = f"`{field} = {default(owner, field)}`"
    if others := elsewhere(owner, field):
        said += "; " + ", ".join(f"at {name} scale `{value}`" for name, value in others.items())
    if (owner, field) == ("RunConfig", "augment"):
        grey = augment.VIEWS["simsiam_grey"].first
        said += "; for grey images `simsiam_grey`, whose blur is "
        said += code(next(op for op in grey if isinstance(op, augment.GaussianBlur)))
    return said + "."


def _downstream() -> str:
    run = scales.run("supervised", "cifar10", "paper")
    fields = ", ".join(f"`{k} = {getattr(run, k)}`" for k in ("epochs", *scales.DOWNSTREAM))
    return f"{fields}; and a second time with `augment = {scales.views('cifar10')}`."


def _lengths(s: scales.Scale) -> str:
    sets: dict[str, list[str]] = {}
    for name in s.datasets:
        pool = f"{s.pool[name]:,}" if name in s.pool else "all"
        sets.setdefault(f"{s.epochs[name]} epochs on {pool} images", []).append(DISPLAYS[name])
    return " and ".join(f"{length} of {', '.join(names)}" for length, names in sets.items())


def _per_scale(of: Callable[[scales.Scale], Any]) -> str:
    return "; ".join(f"at {name} scale {of(scales.SCALES[name])}" for name in recorded.SCALES)


BESIDE = {  # what no field of a config says
    "kind": lambda: ", ".join(map(code, scales.PROBES)) + ".",
    "supervised": _downstream,
    "seeds": lambda: f"{_per_scale(lambda s: len(s.seeds))}. Not all are on record.",
    "epochs": lambda: f"{_per_scale(_lengths)}.",
}

# --- what was measured ------------------------------------------------------------------------------------


class Effect(NamedTuple):
    """One choice changed, at the last epoch: SidAE's gain in points, and frames.order's lead before and after."""

    field: str
    value: Any
    scale: str
    display: str
    labels: float
    images: str  # that were classified
    gain: Difference
    before: pd.Series
    after: pd.Series


@cache
def runs() -> list[RunConfig]:
    """The published runs of SidAE."""
    found = store.every("run", store.published())
    return [RunConfig.from_dict(r["config"]) for r in found if r["config"]["method"] == "sidae"]


def _but(run: RunConfig, field: str) -> dict[str, Any]:
    """What else a run is, whatever its seed."""
    return {k: v for k, v in run.to_dict().items() if k not in (field, "seed")}


def records(asked: Iterable[EvalConfig]) -> list[Record]:
    """The published records of those that have one."""
    lines = store.published()
    found = (lines.get((e.run.key(), e.key())) for e in asked)
    return [r for line in found if line and (r := store.read(line))]


@cache
def effects(field: str) -> list[Effect]:
    """Of every value that a published run of SidAE has while all else is a scale's own."""
    out = []
    for scale in recorded.SCALES:
        s = scales.SCALES[scale]
        for dataset in s.datasets:
            base = scales.run("sidae", dataset, scale)
            alike = [r for r in runs() if _but(r, field) == _but(base, field)]
            for value in sorted({getattr(r, field) for r in alike} - {getattr(base, field)}):
                seeds = sorted(r.seed for r in alike if getattr(r, field) == value)
                before = [scales.run(m, dataset, scale, seed) for m in scales.SSL for seed in seeds]
                after = [scales.changed(r, {field: value}) for r in before]
                for labels in dict.fromkeys((1.0, *s.labels)):
                    how = {"labels": labels, "repeats": s.repeats}
                    if effect := _effect(before, after, how):
                        out.append(Effect(field, value, scale, data.display(base.data), labels, *effect))
    return out


def _effect(before: list[RunConfig], after: list[RunConfig], how: dict[str, Any]
            ) -> tuple[str, Difference, pd.Series, pd.Series] | None:
    """By the probe on test images, or where more seeds have that on those held out; None without records."""
    best = None
    for scored, name in SCORED.items():
        sides = {side: records(EvalConfig(run=r, score_on=scored, **how) for r in each)
                 for side, each in (("before", before), ("after", after))}
        frame = {side: frames.evaluations(each) for side, each in sides.items() if each}
        if len(frame) < 2 or any({*each["method"]} != {*scales.SSL} for each in frame.values()):
            continue
        sidae = {side: each[each["method"] == "sidae"] for side, each in frame.items()}
        gain = differences.between(sidae["after"], sidae["before"])
        if len(gain) and (best is None or len(gain) > len(best[1])):
            lead = frames.order(sides).set_index("change")
            best = f"{sides['after'][0]['n_test']:,} {name}", gain, lead.loc["before"], lead.loc["after"]
    return best


def lead(row: pd.Series) -> str:
    span = f" ({row['low']:+.2f} to {row['high']:+.2f})" if row["n"] > 1 else ""
    return f"{row['lead']:+.2f}{span}"


def measured(e: Effect) -> str:
    """An effect as a sentence."""
    return (f"`{e.field} = {e.value}`, {e.display} at {e.scale} scale, {frames.percent(e.labels)} of the labels: SidAE "
            f"{frames.told(e.gain)}. Its lead goes from {e.before['lead']:+.2f} to {e.after['lead']:+.2f}.")


@cache
def checkpoints() -> dict[str, pd.DataFrame]:
    """Scale -> the evaluations on test of Figure 3, by the probes, of three methods and the supervised network."""
    with data.as_published():
        asked = {s: experiments.accuracy_vs_epochs(s)[1] for s in recorded.SCALES}
    kept = {s: [e for e in each if e.run.method != "untrained" and (e.kind in ("linear", "classifier")
                or e.kind == "logistic" and e.epoch == e.run.epochs)] for s, each in asked.items()}
    return {s: frames.evaluations(records(each)) for s, each in kept.items()}


def cases(frame: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """A frame by set and share of labels."""
    for _, part in frame.groupby(["display", "labels"], sort=False):
        yield part


def span(found: list[Difference]) -> str:
    means = sorted(d.mean for d in found)
    return " to ".join(dict.fromkeys(f"{m:+.2f}" for m in (means[0], means[-1])))


def verdicts(found: list[Difference]) -> str:
    counted = Counter(frames.told(d).rpartition(": ")[2].partition(",")[0] for d in found)  # without why not judged
    return ", ".join(f"{word} in {k}" for word, k in counted.items())


def spread(scale: str, found: dict[str, list[Difference]], judged: bool = True) -> str:
    """Differences of several cases in a line.  found: by method, in words or empty."""
    [*some] = next(iter(found.values()))
    n = sorted({len(d) for each in found.values() for d in each})
    each = [f"{name} {span(d)} points".strip() + f" ({verdicts(d)})" * judged for name, d in found.items()]
    return f"{scale} scale, {len(some)} cases, n = {' or '.join(map(str, n))}: {'; '.join(each)}."


def other_probe(frame: pd.DataFrame, method: str) -> list[Difference]:
    """Logistic regression less the SGD probe, last epoch, by case."""
    last = frame[(frame["method"] == method) & (frame["epoch"] == frame["of"])]
    both = (differences.difference(part, {"kind": "logistic"}, {"kind": "linear"}) for part in cases(last))
    return [d for d in both if len(d)]


def best_on_test(frame: pd.DataFrame, method: str) -> list[Difference]:
    """The best checkpoint on test less the last, by case."""
    out = []
    for part in cases(frame[(frame["method"] == method) & (frame["kind"] == "linear")]):
        by = part.pivot_table("accuracy", "seed", "epoch").dropna()
        if part["of"].iloc[0] in by and len(by):
            out.append(Difference(by.max(axis=1) - by[part["of"].iloc[0]]))
    return out


def augmented(frame: pd.DataFrame) -> list[Difference]:
    """The supervised network with augmentation less without, by case."""
    parts = cases(frame[frame["method"] == "supervised"])
    both = (differences.between(p[p["augment"] != "none"], p[p["augment"] == "none"]) for p in parts)
    return [d for d in both if len(d)]


def by_method(of, frame: pd.DataFrame) -> dict[str, list[Difference]]:
    return {methods.NAMES[m]: of(frame, m) for m in scales.SSL}


def classifiers() -> Iterator[str]:
    """By how much one classifier's seed moves the SGD probe of SidAE, where several were fitted."""
    for scale in recorded.SCALES:
        s = scales.SCALES[scale]
        for dataset in s.datasets if s.repeats > 1 else ():
            for labels in s.labels:
                asked = [scales.evaluation(scales.run("sidae", dataset, scale, seed), "linear", scale, labels)
                         for seed in s.seeds]
                if found := records(asked):
                    sd = np.mean([np.std(r["each"], ddof=1) for r in found])
                    yield (f"At {scale} scale, {found[0]['data']['display']}, {frames.percent(labels)} of the labels: the "
                           f"standard deviation over {s.repeats} classifiers of a run is {sd:.2f} points (mean of "
                           f"{len(found)} runs).")


def found(row: dict[str, str]) -> list[str]:
    """What the records say of a row, in sentences; empty where they say nothing."""
    owner, field = row["owner"], row["field"]
    shown = checkpoints().items()
    if (owner, field) == ("EvalConfig", "epoch"):
        best = "The checkpoint with the best test accuracy instead, at"
        return [f"{best} {spread(s, by_method(best_on_test, f), False)}" for s, f in shown]
    if (owner, field) == ("EvalConfig", "repeats"):
        return [*classifiers()]
    if field == "kind":
        return [f"Logistic regression instead of this probe, at {spread(s, by_method(other_probe, f))}" for s, f in shown]
    if field == "supervised":
        return [f"With augmentation minus without, at {spread(s, {'': augmented(f)})}" for s, f in shown]
    by: dict[tuple, list[Difference]] = {}
    for e in effects(field) if tried(row) else ():
        by.setdefault((e.value, e.scale), []).append(e.gain)
    return [f"`{field} = {value}` at {scale} scale: SidAE {span(d)} points in {len(d)} case{'s' * (len(d) > 1)} "
            f"({verdicts(d)})." for (value, scale), d in by.items()]


def tried(row: dict[str, str]) -> bool:
    """Whether its alternatives are runs of SidAE."""
    return row["owner"] == "RunConfig" or row["field"] == "epochs"


# --- the page ---------------------------------------------------------------------------------------------


def card(row: dict[str, str]) -> str:
    said = found(row)
    lines = [f"- {line}" for line in said]
    effect = "\n".join(["", *(f"  {line}" for line in lines)]) if len(lines) > 1 else " " + (said or ["not measured."])[0]
    each = " ([each case](#every-measured-change))" * bool(said and tried(row))
    return (f"### {row['title']}\n\n- **The paper says:** {row['paper']}\n- **We use:** {ours(row)}\n"
            f"- **Why:** {row['why']}\n- **Measured effect{each}:**{effect}\n")


def bar(low: float, mean: float, high: float, reach: float) -> str:
    """An interval and its mean around 0, as a small picture."""
    x = [80 + 76 * float(np.clip(v / reach, -1, 1)) for v in (low, mean, high)]
    return ('<svg viewBox="0 0 160 14" width="160" height="14" aria-hidden="true" stroke="currentColor">'
            f'<path d="M80 0V14" stroke-width="1" opacity=".5"/><path d="M{x[0]:.1f} 7H{x[2]:.1f}" stroke-width="2"/>'
            f'<circle cx="{x[1]:.1f}" cy="7" r="3.5" fill="currentColor"/></svg>')


def every_effect() -> list[Effect]:
    return [e for row in rows() if tried(row) for e in effects(row["field"])]


def table() -> str:
    """Every effect with its interval as a picture, as HTML whose three parts stand below one another on a phone."""
    shown = every_effect()
    reach = max(abs(v) for e in shown if len(e.gain) > 1 for v in e.gain.interval())
    title = {r["field"]: r["title"] for r in rows() if tried(r)}
    out, field = [], ""
    for e in shown:
        if e.field != field:
            field = e.field
            out.append('<div style="padding: 1rem 0 .3rem"><a href="'
                       f'#{make_id(title[field])}"><strong>{title[field]}</strong></a></div>')
        mean, low, high = e.gain.interval()
        one = len(e.gain) < 2
        said = f"{mean:+.2f}" if one else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
        drawn = bar(mean, mean, mean, reach) if one else bar(low, mean, high, reach)
        parts = ((13, f"<code>{e.field} = {e.value}</code>, {frames.percent(e.labels)} of labels",
                  f"{e.display}, {e.scale}"), (13, f"SidAE {said}", drawn),
                 (15.5, f"lead before {lead(e.before)}", f"lead after {lead(e.after)}", f"n = {len(e.gain)}, {e.images}"))
        cells = (f'<div style="flex: 1 1 {width}rem">{"<br>".join(lines)}</div>' for width, *lines in parts)
        row = "display: flex; flex-wrap: wrap; gap: 0 .7rem; padding: .5rem 0; border-top: 1px solid var(--pst-color-border)"
        out.append(f'<div style="{row}">{"".join(cells)}</div>')
    return f'<div class="effects" style="font-size: .85em">{"".join(out)}</div>'


def reading() -> str:
    """What the measurements say, and what was not measured."""
    own = [r for r in rows() if r["part"] == "sidae"]
    other = [r["field"] for r in own if effects(r["field"])]
    judged = [e for e in every_effect() if len(e.gain) >= differences.SEEDS]
    apart = [e for e in judged if e.gain.verdict() != "undecided"]
    most = max(judged, key=lambda e: abs(e.gain.mean))
    turned = [e for e in judged if e.after["SidAE leads"] == "supported" != e.before["SidAE leads"]]
    named = [f"`{e.field} = {e.value}`, {e.display}, {frames.percent(e.labels)} of the labels" for e in apart]
    pixels = RunConfig.size**2 * RunConfig.channels
    narrow, wide = (scales.run("sidae", "cifar10", s) for s in ("laptop", "paper"))
    return "\n".join(f"- {line}" for line in (
        f"**Size.** Not all results are at the paper's scale. At laptop scale the network is narrower (width {narrow.width} "
        f"instead of {wide.width}), and it trains on fewer images and for fewer epochs "
        f"([how many](#{make_id('The length of training below paper scale')})).",
        "**Images.** Our CIFAR-10 is a copy that was once stored as JPEG, and Tiny ImageNet takes the place of STL-10 "
        "([data](data.md)).",
        f"**Choices that we tried another way.** Of {len(own)} open choices that concern SidAE and its training, these are "
        f"{len(other)}: {', '.join(map(code, other))}. We also tried twice the training. The others are not measured.",
        f"**What they changed.** We have {len(judged)} cases with at least {differences.SEEDS} seeds. In {len(apart)} of them "
        f"the 95 % interval of SidAE's change does not contain 0{': ' * bool(named) + '; '.join(named)}. Chance alone would "
        f"give about {0.05 * len(judged):.0f}. The verdict on whether SidAE leads changes in {len(turned)} of {len(judged)} "
        "cases.",
        f"**The largest change of a mean.** {measured(most)}",
        f"**Another probe.** {_probe()}",
        f"**Cannot be trained: `recon = sum`.** It multiplies the reconstruction loss by {pixels:,}, the values of an image. "
        "With the paper's learning rate the loss is no finite number after a few steps.",
        "**`stem = cifar` is another network.** It gives far larger feature maps. So do not compare our other numbers with "
        "those of networks that have this stem.",
        f"**How the losses are balanced** is seen in their gradients rather than in the weight. {_gradients()}",
    ))


def _probe() -> str:
    """Where another probe is told apart from the paper's."""
    found = {(m, s): d for s, f in checkpoints().items() for m, d in by_method(other_probe, f).items()}
    apart = {(m, s): [x for x in d if x.verdict() in ("supported", "contradicted")] for (m, s), d in found.items()}
    named = [f"{m} at {s} scale ({span(d)} points, {len(d)} of {len(found[m, s])} cases)"
             for (m, s), d in apart.items() if d]
    said = "With logistic regression instead of the paper's probe"
    if not named:
        return f"{said} no accuracy changes with an interval that does not contain 0."
    return f"{said} these accuracies change, with an interval that does not contain 0: {'; '.join(named)}."


def _gradients() -> str:
    """How long the gradients of both losses are where they meet, in the standard runs at laptop scale."""
    keys = {scales.run("sidae", "cifar10", "laptop", seed).key() for seed in scales.SCALES["laptop"].seeds}
    lines = store.published()
    ends = [next(e for e in reversed(store.read(lines[k, k])["epochs"]) if "grad_si" in e) for k in sorted(keys)]
    ratio = np.mean([e["grad_dae"] / e["grad_si"] for e in ends])
    return (f"At laptop scale on CIFAR-10 with `w = {RunConfig.w}`, after the last epoch, the gradient of the reconstruction "
            f"loss at the projection is {ratio:.2f} times as long as that of the siamese loss (n = {len(ends)}).")


def stated(doc: str | None) -> str:
    """The deviations that a docstring ends with, on one line."""
    said = re.search(r"Deviations\b[^:]*:\s+(.+)", inspect.cleandoc(doc or ""), re.DOTALL)
    return " ".join(said[1].split()) if said else ""


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def others() -> str:
    """Of the other methods, as their classes state them."""
    lines = [f"- **All methods:** {capital(stated(methods.__doc__))}"]
    for name, cls in methods.METHODS.items():
        if said := stated(cls.__dict__.get("__doc__")):
            lines.append(f"- **{methods.NAMES[name]}:** {capital(said)}")
    return "\n".join(lines)


def made(scale: str) -> dict[str, str]:
    with data.as_published():
        parts = {part: "\n".join(card(r) for r in rows() if r["part"] == part) for part in ("sidae", "probe", "beside")}
        return {f"deviations_{name}": text for name, text in (parts | {
            "read": reading(), "table": table(), "methods": others()}).items()}
