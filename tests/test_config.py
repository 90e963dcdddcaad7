"""Identity of runs: keys that never move, strict construction, one sentence per mistake."""

import hashlib
import json
from dataclasses import FrozenInstanceError, dataclass, fields

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidae_lib import config
from sidae_lib.config import EvalConfig, RunConfig, SidaeError, epoch_seed

RUN = RunConfig(method="sidae", data="131428effbc89b28")
GOLDEN = {  # every record is filed under its key: these never change
    RUN: "7ea92a73671cf323",
    RunConfig(method="simsiam", data="131428effbc89b28", seed=3): "b4452c5025fdf794",
    RunConfig(method="sidae", data="4c3c3722cb5ddee1", w=0.7, augment="simsiam_grey", precision="bf16"):
        "6026884e4c0555c2",
    RunConfig(method="dae", data="42d24bb1f8bd4149", backbone="small_cnn", dim=64, hidden=64, decoder=64, batch=64,
              epochs=2, pool=256, weight_decay=1e-6): "2492d730622ea1b0",
    RunConfig(method="untrained", data="", epochs=0, augment="none"): "b5a8d8e46527074b",
    RunConfig(method="moco_v2", data="131428effbc89b28", augment="simclr", dim=128, hidden=512, lr=0.06, symmetric=True,
              leave_out="none"): "f228289cd6d44d62",
    RunConfig(method="fnc", data="131428effbc89b28", augment="simclr", dim=128, hidden=512, tau=0.2, support=2,
              cancel="eliminate"): "5e589738cc418581",
    RunConfig(method="simsiam", data="131428effbc89b28", zero_init=True): "c1d3a1465d9f74a8",
    EvalConfig(run=RUN): "584860157aea5965",
    EvalConfig(run=RUN, kind="knn", epoch=25, labels=0.01, data="4c3c3722cb5ddee1", score_on="val"): "b305d955ea1ccf0a",
}  # fmt: skip
RUN_DEFAULTS = {  # a key leaves out what is at its default, so no default ever changes
    "seed": 0, "split": "train", "pool": 0, "pool_seed": 0, "channels": 3, "size": 32, "resize": "antialias",
    "labels": 1.0, "label_count": 0, "label_seed": 0, "augment": "simsiam_cifar", "backbone": "resnet18",
    "stem": "imagenet", "width": 64, "dim": 2048, "hidden": 2048, "proj_affine": False, "pred_hidden": 512,
    "decoder": 512, "w": 0.5, "target": "standardised", "recon": "mean", "recon_target": "clean", "output": "linear",
    "optimizer": "sgd", "lr": 0.03, "momentum": 0.9, "weight_decay": 0.0005, "decay_bias": True, "schedule": "cosine",
    "predictor_lr": "schedule", "batch": 512, "epochs": 200, "precision": "fp32", "method_recipe": 0,
    "augment_recipe": 0, "tau": 0.1, "ema": 0.99, "queue": 4096, "symmetric": False, "splits": 8, "leave_out": "same",
    "prototypes": 2048, "support": 1, "top": 10, "threshold": 0.7, "cancel": "attract",
    "pairs": "none", "encoder": None, "encoder_epoch": -1, "pair_share": 0.1, "pair_seed": 0,
    "pair_low": 0.97, "pair_high": 0.99, "pair_count": 0, "pair_weight": 1.0,
    "redraw": True, "stats": "data", "per_class": 0, "negatives": "class", "batch_norm": "each",
    "embed": "sigmoid", "cos_margin": 0.0, "margin": 1.0, "distance": "euclidean",
    "zero_init": False,
}  # fmt: skip
EVAL_DEFAULTS = {
    "kind": "linear", "epoch": -1, "data": "", "labels": 1.0, "label_count": 0, "label_seed": 0, "seed": -1,
    "score_on": "test", "fold": -1, "fit_epochs": 50, "lr": 0.05, "backbone_lr": 0.05, "momentum": 0.9,
    "weight_decay": 0.0, "schedule": "constant", "batch": 256, "keep_last": True, "augment": "none", "bn": "eval",
    "stats": "run", "k": 200, "tau": 0.1, "C": 1.0, "features": "backbone", "points": 1000, "perplexity": 30.0,
    "pair_recipe": 1,
}  # fmt: skip


def run(**changes):
    return RunConfig.create(**{"method": "sidae", "data": "0", **changes})


def mined(**changes):
    return run(**{"pairs": "mined", "encoder": run(method="simsiam"), **changes})


def evaluation(**changes):
    return EvalConfig.create(**{"run": run(), **changes})


@pytest.mark.parametrize(("c", "key"), GOLDEN.items(), ids=GOLDEN.values())
def test_keys_never_change(c, key):
    assert c.key() == key


def test_a_key_is_the_hash_of_canonical_json():
    text = '{"batch":64,"data":"0","method":"dae","proj_affine":true,"w":1.0}'
    c = run(w=1, batch=64, method="dae", proj_affine=True)
    assert c.key() == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(("cls", "defaults"), [(RunConfig, RUN_DEFAULTS), (EvalConfig, EVAL_DEFAULTS)])
def test_defaults_never_change(cls, defaults):
    assert defaults.items() <= {f.name: f.default for f in fields(cls)}.items()


@pytest.mark.parametrize("c", GOLDEN, ids=GOLDEN.values())
def test_round_trip_also_through_json(c):
    again = type(c).from_dict(json.loads(json.dumps(c.to_dict())))
    assert again == type(c).from_dict(c.to_dict()) == c.replace() == c and again.key() == c.key()
    assert hash(again) == hash(c) and len({again, c}) == 1


def test_a_new_field_with_a_default_leaves_old_keys_alone():
    @dataclass(frozen=True, kw_only=True)
    class Grown(RunConfig):
        temperature: float = 0.2

    for c in (c for c in GOLDEN if isinstance(c, RunConfig)):
        assert Grown.from_dict(c.to_dict()).key() == c.key()
        assert Grown.from_dict(c.to_dict() | {"temperature": 0.3}).key() != c.key()


def test_every_field_that_is_not_at_its_default_is_in_the_key():
    other = {"method": "dae", "data": "1", "split": "unlabeled", "resize": "bilinear", "augment": "none", "channels": 1,
             "backbone": "small_cnn", "stem": "cifar", "proj_affine": True, "target": "unit", "recon": "sum",
             "recon_target": "view", "output": "tanh", "schedule": "constant", "decay_bias": False, "precision": "bf16",
             "predictor_lr": "constant", "labels": 0.5, "w": 0.25, "momentum": 0.5, "ema": 0.5, "symmetric": True,
             "leave_out": "none", "cancel": "eliminate", "norm": "layer", "extract": "11", "compare": "cosine",
             "loss": "nce", "optimizer": "adam", "beta2": 0.5, "warmup": 0.5, "zero_init": True}  # fmt: skip
    other |= {"pair_share": 0.5, "pair_low": 0.5, "pair_high": 0.98, "pair_weight": 0.5, "redraw": False, "stats": "half",
              "negatives": "any", "batch_norm": "joint", "embed": "linear", "distance": "cosine"}
    names = {f.name for f in fields(RunConfig)} - {"pairs", "encoder"}
    bases = {name: mined() if name.startswith(("encoder", "pair_")) else run() for name in names}
    changed = [base.replace(**{name: other.get(name, 7)}) for name, base in bases.items()]
    changed += [run(pairs="random", pair_count=5), run(pairs="oracle", pair_count=5), mined(), mined(encoder=run(seed=1))]
    assert len({c.key() for c in [run(), *changed]}) == len(names) + 5
    other = {"run": run(seed=1), "kind": "knn", "data": "1", "labels": 0.5, "score_on": "val", "momentum": 0.5,
             "schedule": "cosine", "keep_last": False, "augment": "fer", "bn": "train", "stats": "data",
             "features": "pca"}  # fmt: skip
    changed = [evaluation().replace(**{f.name: other.get(f.name, 7)}) for f in fields(EvalConfig) if f.name != "pair_recipe"]
    changed.append(evaluation(kind="pairs", pair_recipe=2))
    assert len({c.key() for c in [evaluation(), *changed]}) == len(fields(EvalConfig)) + 1


def test_what_is_the_same_run_has_one_key():
    assert run(w=1).key() == run(w=1.0).key() and run(w=1) == run(w=1.0) and type(run(w=1).w) is float
    assert run(w=-0.0).key() == run(w=0).key() != run(w=1).key()
    assert run(w=0.5, epochs=200).to_dict() == {"method": "sidae", "data": "0"}


def test_an_evaluation_takes_epoch_seed_and_data_from_its_run():
    r = run(epochs=30, seed=4, data="abc")
    e = EvalConfig(run=r)
    assert (e.epoch, e.seed, e.data) == (30, 4, "")
    assert e == EvalConfig(run=r, epoch=30, seed=4, data="abc") and e.key() == EvalConfig(run=r, epoch=30).key()
    assert e.to_dict() == {"run": r.to_dict(), "epoch": 30, "seed": 4}
    assert EvalConfig(run=r, epoch=0, seed=0).to_dict() == {"run": r.to_dict(), "epoch": 0, "seed": 0}


@pytest.mark.parametrize(("recipes", "name"), [("METHOD_RECIPES", "sidae"), ("AUGMENT_RECIPES", "simsiam_cifar")])
def test_a_raised_recipe_is_a_new_key_and_old_records_stay_found(recipes, name, monkeypatch):
    old, other = run(), run(method="dae", augment="none")
    old_eval = EvalConfig(run=old)
    monkeypatch.setitem(getattr(config, recipes), name, 2)
    field = recipes.lower().removesuffix("s")
    new = run()
    assert getattr(new, field) == 2 and new.key() != old.key() and new.to_dict()[field] == 2
    assert run(method="dae", augment="none").key() == other.key()  # another method, another pipeline
    again = RunConfig.from_dict(old.to_dict())
    assert getattr(again, field) == 1 and again == old and again.key() == old.key()
    assert EvalConfig.from_dict(old_eval.to_dict()).key() == old_eval.key()
    assert RunConfig.from_dict(new.to_dict()) == new
    assert again.replace(seed=0) == new  # a changed copy is a new run, by today's mathematics


@pytest.mark.parametrize(("method", "first", "now"), [("byol", "ac7ef158f2da7121", "6d0a4a416f9fe420"),
                                                      ("dino", "2d845ce8066395a1", "5c284dfb38c6061d")])  # fmt: skip
def test_byol_and_dino_stand_at_their_second_recipe(method, first, now):
    """Whose momentum does not run a step ahead; a config that names no recipe is a record's, of the first."""
    fields = {"method": method, "data": "131428effbc89b28", "augment": method}
    old, new = RunConfig.from_dict(fields), RunConfig(**fields)
    assert (old.key(), old.method_recipe, new.key(), new.method_recipe) == (first, 1, now, 2) and old.replace() == new
    assert config.METHOD_RECIPES == {"byol": 2, "dino": 2} and not config.AUGMENT_RECIPES  # no other key has moved


def test_epoch_seeds_never_change_and_use_the_seed():
    assert (epoch_seed(0, 0), epoch_seed(3, 7)) == (2469594617, 539633012)
    seeds = {epoch_seed(s, e) for s in range(10) for e in range(200)}
    assert len(seeds) == 2000 and max(seeds) < 2**32  # all that torch's CPU generator keeps


def test_an_encoders_last_epoch_is_written_in_one_way():
    encoder = run(method="simsiam", epochs=30)
    assert mined(encoder=encoder, encoder_epoch=30) == mined(encoder=encoder)
    assert mined(encoder=encoder, encoder_epoch=0).key() != mined(encoder=encoder).key()
    again = RunConfig.from_dict(json.loads(json.dumps(mined(encoder=encoder).to_dict())))
    assert again == mined(encoder=encoder) and again.encoder == encoder and again.encoder.key() == encoder.key()


def test_configs_are_frozen():
    with pytest.raises(FrozenInstanceError):
        run().w = 1.0


def sentence(error: pytest.ExceptionInfo, *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and ". " not in text and all(p in text for p in parts), text


BAD = [
    ({"epohs": 3}, "epohs", "epochs"), ({"a\nb": 3}, "Unknown RunConfig field"),
    ({"cls": 3}, "Unknown RunConfig field 'cls'"), ({"self": 3}, "Unknown RunConfig field 'self'"),
    ({"seed": 1.0}, "seed must be int", "1.0"), ({"seed": True}, "seed", "True"), ({"seed": "1"}, "seed", "'1'"),
    ({"seed": None}, "seed"), ({"w": "0.5"}, "w must be float"), ({"w": True}, "w must be float"), ({"w": None}, "w"),
    ({"method": 3}, "method must be str"), ({"method": []}, "method must be str"), ({"method": None}, "method"),
    ({"augment": {}}, "augment must be str"), ({"data": 1}, "data must be str"), ({"decay_bias": 1}, "decay_bias"),
    ({"w": float("nan")}, "w must be a finite number"), ({"lr": float("inf")}, "lr must be a finite number"),
    ({"weight_decay": 10**400}, "weight_decay must be a finite number"), ({"w": 1.0001}, "w must lie in [0, 1]"),
    ({"w": -0.1}, "[0, 1]"), ({"labels": 0}, "labels must lie in (0, 1]"), ({"labels": -0.1}, "(0, 1]"),
    ({"labels": 1.1}, "(0, 1]"), ({"label_count": -1}, "label_count"), ({"labels": 0.5, "label_count": 9}, "give one"),
    ({"batch": 1}, "batch must be at least 2"), ({"batch": 0}, "batch"), ({"epochs": -1}, "must not be negative"),
    ({"pool": -1}, "pool"), ({"weight_decay": -1e-9}, "weight_decay"), ({"seed": -1}, "seed"), ({"seed": 2**32}, "2"),
    ({"pool_seed": -1}, "pool_seed"), ({"label_seed": -1}, "label_seed"), ({"momentum": -0.1}, "momentum"),
    ({"momentum": 1}, "momentum must lie in [0, 1)"), ({"channels": 2}, "channels must be 1 or 3"),
    ({"method_recipe": -1}, "method_recipe"), ({"method_recipe": ""}, "method_recipe"), ({"augment_recipe": []}, "int"),
    *(({name: 0}, f"{name} must be positive") for name in ("lr", "size", "width", "dim", "hidden", "pred_hidden", "tau",
                                                           "queue", "splits", "prototypes", "top")),
    ({"ema": 1.1}, "ema must lie in [0, 1]"), ({"ema": -0.1}, "ema"), ({"support": -1}, "support must not be negative"),
    ({"decoder": -1}, "decoder must be positive"), *(({name: "x"}, f"Unknown {name} 'x'; choose from") for name in (
        "split", "resize", "backbone", "stem", "target", "recon", "recon_target", "output", "optimizer", "schedule",
        "predictor_lr", "precision", "leave_out", "cancel", "pairs")),
    ({"stem": ["cifar"]}, "Unknown stem"), ({"stem": None}, "imagenet, cifar"),
    ({"pairs": "mined"}, "need an encoder"), ({"pairs": "oracle"}, "'oracle' needs a pair_count"),
    ({"encoder": 3}, "RunConfig"),
    ({"encoder": run()}, "pairs 'none' does not read encoder"), ({"pair_count": 3}, "'none' does not read pair_count"),
    ({"pairs": "wrong", "pair_count": 3, "pair_low": 0.5}, "'wrong' does not read pair_low"), ({"encoder": {}}, "RunConfig"),
    *(({"pairs": "random", "pair_count": 3, name: 0}, f"{name} must lie in (0, 1]") for name in ("pair_share", "pair_weight")),
    *(({"pairs": "mined", "encoder": run(), "pair_low": v}, "cosines") for v in (0.99, 0.995, -2)),
    ({"pairs": "mined", "encoder": run(size=64)}, "encoder must see images of the run's shape"),
    ({"pairs": "mined", "encoder": run(epochs=3), "encoder_epoch": 4}, "encoder_epoch must lie in 0"),
    ({"leave_out": "partners"}, "leave_out 'partners' needs pairs"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=lambda b: str(b[0])[:40])
def test_a_bad_run_is_one_sentence(bad):
    changes, *parts = bad
    plain = {k: v.to_dict() if isinstance(v, RunConfig) else v for k, v in changes.items()}
    for make in (lambda: run(**changes), lambda: run().replace(**changes),
                 lambda: RunConfig.from_dict({"method": "sidae", "data": "0", **plain})):
        with pytest.raises(SidaeError) as error:
            make()
        sentence(error, *parts)


BAD_EVALS = [
    ({"kinds": "knn"}, "kinds", "kind"), ({"run": 3}, "RunConfig"), ({"epoch": 201}, "epoch must lie in 0 to 200"),
    ({"epoch": -2}, "epoch"), ({"epoch": -1.0}, "epoch must be int"), ({"seed": -2}, "seed"), ({"batch": 1}, "batch"),
    ({"labels": 0}, "(0, 1]"), ({"labels": 2}, "(0, 1]"), ({"label_count": -5}, "label_count"), ({"fold": 10}, "fold"),
    ({"fold": -2}, "fold"), ({"momentum": 1}, "momentum"), ({"weight_decay": -1}, "weight_decay"), ({"tau": 0}, "tau"),
    ({"pair_recipe": 2}, "kind pairs"), ({"pair_recipe": 3, "kind": "pairs"}, "pair_recipe is 1"),
    ({"backbone_lr": -0.1}, "backbone_lr"), ({"tau": float("nan")}, "finite"), ({"bn": "frozen"}, "eval, train"),
    *(({name: 0}, f"{name} must be positive") for name in ("fit_epochs", "lr", "k", "C")),
    *(({name: "x"}, f"Unknown {name} 'x'") for name in ("score_on", "schedule", "stats")), ({"kind": 3}, "must be str"),
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_EVALS, ids=lambda b: str(b[0])[:40])
def test_a_bad_evaluation_is_one_sentence(bad):
    changes, *parts = bad
    for make in (lambda: evaluation(**changes), lambda: evaluation().replace(**changes),
                 lambda: EvalConfig.from_dict({"run": run().to_dict(), **changes})):
        with pytest.raises(SidaeError) as error:
            make()
        sentence(error, *parts)


@pytest.mark.parametrize("cls", [RunConfig, EvalConfig])
@pytest.mark.parametrize("value", [None, [], "x", 3, {}, {3: 4}, {"method": "sidae"}, {"run": []}, {"run": {}}])
def test_what_is_no_config_is_one_sentence(cls, value):
    with pytest.raises(SidaeError) as error:
        cls.from_dict(value)
    sentence(error)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just(10**400),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                    max_leaves=3)  # fmt: skip
TEXTS = st.sampled_from(["sidae", "none", "unlabeled", "cifar", "val", "constant", "0"])


def near(cls, **needed):
    """Dicts whose names are mostly fields, with values mostly of a likely kind."""
    names = st.sampled_from([f.name for f in fields(cls)])
    values = st.integers(-2, 300) | st.floats(-1, 2) | TEXTS | JSON
    return st.dictionaries(names | st.text(max_size=3), values, max_size=4).map(lambda d: needed | d)


RUNS = near(RunConfig, method="sidae", data="0")
EVALS = near(EvalConfig, run={"method": "dae", "data": "0"}) | RUNS.map(lambda r: {"run": r})


@settings(max_examples=500, deadline=None)
@given(JSON | near(RunConfig) | RUNS | EVALS, st.sampled_from([RunConfig, EvalConfig]))
def test_anything_that_json_can_hold_is_a_config_or_one_sentence(value, cls):
    try:
        c = cls.from_dict(value)
    except SidaeError as e:
        assert "\n" not in str(e) and str(e).endswith(".")
    else:
        assert cls.from_dict(json.loads(json.dumps(c.to_dict(), allow_nan=False))).key() == c.key()
