"""Methods: their terms, options, parameter groups, names and axes. Step by step: test_three_steps."""

import dataclasses
import re
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from replay import page
from test_three_steps import CASES, run_of
from torch import nn

from sidae_lib import augment, config, losses, methods, paths
from sidae_lib.config import RunConfig, SidaeError

SMALL = {"dim": 32, "hidden": 48, "pred_hidden": 8, "decoder": 512}


def run(method="sidae", **changes):
    fields = {k: v for k, v in SMALL.items() if k in methods.METHODS[method].reads}
    return RunConfig.create(**{"method": method, "data": "0", **fields, **changes})


def build(method="sidae", seed=0, classes=10, **changes):
    torch.manual_seed(seed)
    return methods.build(run(method, **changes), classes)


def narrow(method="sidae", **changes):
    """The same at width 8, where only the wiring counts."""
    head = {"decoder": 16} if method in ("sidae", "dae") else {}
    return build(method, **{"width": 8, **head, **changes})


def inputs(step=0, n=8):
    """Two views, and a batch whose clean images differ as in a semantic pair."""
    g = torch.Generator().manual_seed(step)
    v1, v2, x1, x2 = (torch.randn(n, 3, 32, 32, generator=g) for _ in range(4))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    return (v1, v2), {"x1": x1, "x2": x2, "mean": mean, "std": std, "labels": torch.arange(n) % 10, "xn": x2.flip(0)}


DRAWN = {  # of each method's initial state
    "sidae": 823.3383, "simsiam": 310.0788, "dae": 655.909, "supervised": 67.5102, "simclr": 213.068,
    "moco_v2": 415.7832, "nnclr": 412.0455, "fnc": 213.068, "byol": 622.3815, "vicreg": 178.068,
    "barlow_twins": 178.068, "dino": 773.1516, "cpc_v2": 1094.6295, "amdim": 313.9327, "yadim": 2904.4439}


def test_initial_weights_are_drawn_in_the_same_order_under_the_same_names():
    """Recorded runs start from them. A sum in the order of the names, of what each tensor holds."""
    for name, (_, changes) in CASES.items():
        state = run_of(name, **changes).method.state_dict() if "," not in name else {}
        total = sum((n + 1) * v.double().abs().mean().item() for n, v in enumerate(state.values()))
        assert not state or total == approx(DRAWN[name], rel=1e-5), name


@pytest.mark.parametrize(("w", "twin", "terms"), [
    (1.0, "simsiam", {"l_si"}), (0.0, "dae", {"l_dae"}), (0.3, "sidae", {"l_si", "l_dae"})])
def test_simsiam_and_dae_are_the_ends_of_w_and_run_no_module_more(w, twin, terms):
    one, other = narrow(w=w), narrow(twin, **({"w": w} if twin == "sidae" else {}))
    assert [name for name, _ in one.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert (one.predictor is not None, one.decoder is not None) == ("l_si" in terms, "l_dae" in terms)
    a, b = (m.loss(*inputs()) for m in (one, other))
    assert a.keys() == b.keys() == {"z", "loss"} | terms and torch.equal(a["loss"], b["loss"])


def test_gauges_are_the_gradients_that_w_weighs():
    """Both terms typed again; their gradients at z, times w and 1 - w, add up to the loss's."""
    method, (views, batch) = narrow("sidae", w=0.3), inputs()
    z1, z2 = (method.projector(method.backbone(v)).detach().requires_grad_() for v in views)
    cosine = lambda p, z: F.cosine_similarity(p, z.detach()).mean()  # noqa: E731
    l_si = -(cosine(method.predictor(z1), z2) + cosine(method.predictor(z2), z1)) / 2
    l_dae = (F.mse_loss(method.decoder(z1), batch["x1"]) + F.mse_loss(method.decoder(z2), batch["x2"])) / 2
    si, dae = (torch.cat(torch.autograd.grad(term, (z1, z2), retain_graph=True)) for term in (l_si, l_dae))
    found = method.gauges(views, batch)
    assert found["grad_si"].item() == approx(si.norm().item(), rel=1e-4)
    assert found["grad_dae"].item() == approx(dae.norm().item(), rel=1e-4)
    whole = torch.cat(torch.autograd.grad(0.3 * l_si + 0.7 * l_dae, (z1, z2)))
    assert torch.allclose(0.3 * si + 0.7 * dae, whole, atol=1e-7)
    assert narrow("simsiam").gauges(views, batch) == narrow("dae").gauges(views, batch) == {}


def test_w_weighs_the_terms():
    (views, batch), m = inputs(), narrow(w=0.3)
    out = m.loss(views, batch)
    assert out["loss"].item() == approx(0.3 * out["l_si"].item() + 0.7 * out["l_dae"].item(), rel=1e-6)


TERMS = {  # what a decoder whose last layer is zero is compared with
    "default": ({}, 0.0, lambda v, x, mean, std: x),
    "view": ({"recon_target": "view"}, 0.0, lambda v, x, mean, std: v),
    "unit": ({"target": "unit"}, 0.0, lambda v, x, mean, std: x * std + mean),
    "unit, view": ({"target": "unit", "recon_target": "view"}, 0.0, lambda v, x, mean, std: v * std + mean),
    "sigmoid": ({"output": "sigmoid"}, 0.5, lambda v, x, mean, std: x),
    "tanh": ({"output": "tanh"}, 0.0, lambda v, x, mean, std: x),
}


@pytest.mark.parametrize("recon", ["mean", "sum"])
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("method", ["sidae", "dae"])
def test_reconstruction_term_in_closed_form(name, recon, method):
    changes, constant, target = TERMS[name]
    m, (views, batch) = narrow(method, recon=recon, **changes), inputs()
    for p in m.decoder.up[-2].parameters():
        nn.init.zeros_(p)
    clean = batch["x1"], batch["x2"]
    errors = [(target(v, x, batch["mean"], batch["std"]) - constant).square().flatten(1)
              for v, x in zip(views, clean, strict=True)]
    per_image = torch.stack([e.mean(1) if recon == "mean" else e.sum(1) for e in errors])
    assert m.loss(views, batch)["l_dae"].item() == approx(per_image.mean().item(), rel=1e-5)


def test_one_seed_one_start():
    """Methods that share a backbone start from the same one: a difference between them is no difference of luck."""
    start = [narrow(name).backbone.state_dict() for name in ("sidae", "simsiam", "dae", "supervised")]
    start += [narrow("untrained", epochs=0).backbone.state_dict(), narrow(seed=1).backbone.state_dict()]
    same = [all(torch.equal(a, b) for a, b in zip(start[0].values(), s.values(), strict=True)) for s in start]
    assert same == [True] * 5 + [False]


@pytest.mark.parametrize("decay_bias", [True, False])
@pytest.mark.parametrize("predictor_lr", ["schedule", "constant"])
def test_parameter_groups(decay_bias, predictor_lr):
    m = narrow(decay_bias=decay_bias, predictor_lr=predictor_lr, proj_affine=True, weight_decay=0.01)
    got = {id(p): (g["lr"], g["weight_decay"], g["fixed"]) for g in m.param_groups(0.2) for p in g["params"]}
    assert len(got) == sum(len(g["params"]) for g in m.param_groups(0.2))  # each once
    for name, p in m.named_parameters():
        norm_or_bias = name.endswith(".bias") or p.ndim == 1
        decay = 0.01 if decay_bias or not norm_or_bias else 0.0
        assert got.pop(id(p)) == (0.2, decay, predictor_lr == "constant" and "predictor" in name), name
    assert not got


def sentence(call, *parts):
    with pytest.raises(SidaeError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and all(p in text for p in parts), text


def test_unknown_names():
    for call in (methods.check, methods.build):
        sentence(lambda: call(RunConfig(method="simsam", data="0")), "'simsam'", *methods.METHODS)  # noqa: B023
        sentence(lambda: call(RunConfig(method="dae", data="0", augment="fog")), "'fog'", *augment.VIEWS)  # noqa: B023


OTHER = {"ema": 0.5, "symmetric": True, "leave_out": "none", "cancel": "eliminate",
         "w": 0.25, "predictor_lr": "constant", "proj_affine": True, "target": "unit", "recon": "sum",
         "recon_target": "view", "output": "tanh", "labels": 0.5, "extract": "11", "compare": "cosine",
         "loss": "info_nce", "negatives": "any", "batch_norm": "joint", "embed": "linear", "distance": "cosine"}
NEEDS = {  # what a method cannot do without, or cannot do with the default
    "untrained": {"epochs": 0}, "amdim": {"augment": "amdim", "backbone": "amdim"}, "yadim": {"augment": "yadim"},
    "cpc_v2": {"augment": "cpc_patches", "backbone": "patches18"},
    "composed": {"extract": "00", "compare": "dot", "loss": "nce"},
}


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_field_that_a_method_does_not_read_is_refused(name):
    for field in methods.SHARED:
        value = "1,2" if (name, field) == ("cpc_v2", "extract") else OTHER.get(field, 7)
        c = RunConfig(**{"method": name, "data": "0", **NEEDS.get(name, {}), field: value})
        if field in methods.METHODS[name].reads:
            assert methods.check(c) is methods.METHODS[name]
        else:
            sentence(lambda: methods.check(c), f"{name} does not read {field}")  # noqa: B023


def test_fixed_ends_of_w_have_one_name_each():
    for name, w in (("simsiam", 1.0), ("dae", 0.0)):
        sentence(lambda: methods.check(RunConfig(method=name, data="0", w=w)), f"{name} does not read w")  # noqa: B023
    sentence(lambda: methods.check(RunConfig(method="dae", data="0", pred_hidden=4)), "dae does not read pred_hidden")
    sentence(lambda: methods.check(RunConfig(method="simsiam", data="0", decoder=4)), "simsiam does not read decoder")


def test_zero_init_is_refused_where_no_residual_block_has_a_batch_norm():
    for backbone in ("resnet18", "resnet34"):
        assert methods.check(run(backbone=backbone, zero_init=True)) is methods.METHODS["sidae"]
    for method, backbone in (("sidae", "small_cnn"), ("amdim", "amdim"), ("cpc_v2", "patches18"), ("cpc_v2", "patches34")):
        c = RunConfig(**{"method": method, "data": "0", **NEEDS.get(method, {}), "backbone": backbone, "zero_init": True})
        sentence(lambda: methods.check(c), f"{method} does not read zero_init; leave it at its default, False")  # noqa: B023


def test_the_untrained_network_has_nothing_to_train():
    sentence(lambda: methods.check(RunConfig(method="untrained", data="0")), "untrained", "epochs to 0")
    assert methods.check(RunConfig(method="untrained", data="0", epochs=0)) is methods.METHODS["untrained"]


@pytest.mark.parametrize(("recipes", "name"), [("METHOD_RECIPES", "dae"), ("AUGMENT_RECIPES", "simsiam_cifar")])
def test_an_older_recipe_is_not_repeated(recipes, name, monkeypatch):
    old = RunConfig(method="dae", data="0")
    monkeypatch.setitem(getattr(config, recipes), name, 2)
    sentence(lambda: methods.check(RunConfig.from_dict(old.to_dict())), "older recipe of dae or simsiam_cifar")
    assert methods.check(RunConfig(method="dae", data="0")) is methods.METHODS["dae"]


def test_five_axes():
    axes = methods.five_axes()
    assert axes.keys() == methods.METHODS.keys() - {"composed"}
    for name, a in axes.items():
        assert [f.name for f in dataclasses.fields(a)] == ["augment", "encode", "extract", "compare", "loss"]
        assert all(dataclasses.astuple(a)), name


def functions(text):
    """The functions that a text names: of `losses`, or of torch."""
    return {w for w in re.findall(r"\w+", text) if any(callable(getattr(m, w, None)) for m in (losses, F))}


@pytest.mark.parametrize("name", methods.five_axes())
def test_a_class_does_what_its_axes_say(name, monkeypatch):
    """The pipeline is there; similarity and loss are functions that loss() calls; and it calls no loss that they hide."""
    axes, called = methods.five_axes()[name], set()
    assert axes.augment in augment.VIEWS
    if methods.METHODS[name].loss is methods.Method.loss:
        assert axes.compare == axes.loss == "none"
        return

    def spy(module, function):
        call = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args, **more: called.add(function) or call(*args, **more))

    ours = {k for k, v in vars(losses).items() if callable(v) and getattr(v, "__module__", "") == losses.__name__}
    named = functions(axes.compare) | functions(axes.loss)
    for function in ours | named:
        spy(losses if function in ours else F, function)
    m = build(name, width=4, **{"batch": 8, **({"splits": 2} if name == "moco_v2" else {}), **NEEDS.get(name, {})})
    views, batch = inputs()
    m.loss(views, batch | {"i": torch.arange(8), "j": torch.arange(8)})
    assert functions(axes.loss) and (functions(axes.compare) or axes.compare == "none")
    assert named <= called and called & ours <= named


# --- the book's page --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", methods.METHODS)
def test_a_method_says_what_it_is(name):
    """In at least two sentences, which name the source; the equation is that of its own loss; deviations stand at the end."""
    cls = methods.METHODS[name]
    text, trains = " ".join(cls.__doc__.split()), cls.loss is not methods.Method.loss
    assert len(re.split(r"(?<=\.) (?=[A-Z`])", text)) >= 2
    assert not trains or re.search(r"arXiv:\d{4}\.\d{5}|student report", text)
    assert bool(cls.equation) == trains and ("equation" in vars(cls) or "loss" not in vars(cls))
    assert cls.equation.count("{") == cls.equation.count("}") and "$" not in cls.equation
    *before, last = cls.__doc__.split("\n\n")
    assert "Deviation" not in " ".join(before) and ("Deviation" not in last or last.strip().startswith("Deviations: "))


def test_the_book_shows_every_method_once():
    shown = page("methods").made("recorded")
    for name, cls in methods.METHODS.items():
        head = f"(method-{name})=\n### {cls.look.name}\n"
        assert shown["each_method"].count(head) == 1
        part = re.split(r"\n\(method|\n## ", shown["each_method"].partition(head)[2])[0]
        assert part.count("$$") == 2 * bool(cls.equation) and cls.equation in part and f"In commands: `{name}`" in part
        file, anchor = re.search(r'href="_modules/(\S+)\.html#(\w+)"', part).groups()
        assert f"\nclass {anchor}(" in (paths.ROOT / f"{file}.py").read_text() and anchor == cls.__name__
    rows = re.findall(r"^\| \[.*", shown["axes"], re.M)
    assert [re.findall(r"\(#method-(\w+)\)", row) for row in rows] == [[name] for name in methods.five_axes()]
    for row, axes in zip(rows, methods.five_axes().values(), strict=True):
        assert row.replace("<wbr>", "").replace("`", "").split(" | ")[1:] == [*dataclasses.astuple(axes)[:4], f"{axes.loss} |"]


def test_a_method_that_is_added_is_in_the_book_too():
    with mock.patch.dict(methods.METHODS):
        class New(methods.Method, name="new"):
            """New (arXiv:9999.12345) compares nothing. It shows what the book does with w = 1."""

            look, equation = methods.base.Look("Brand new", "#000000", "o"), r"L = \pi"
            axes = methods.Axes(augment="none", encode="backbone", extract="all", compare="none", loss="pi")

        shown = page("methods").made("recorded")
    assert "### Brand new\n\nNew ([arXiv:9999.12345](https://arxiv.org/abs/9999.12345)) compares" in shown["each_method"]
    assert "L = \\pi" in shown["each_method"] and "[Brand new](#method-new)" in shown["axes"]
    assert "Brand new" not in page("methods").made("recorded")["axes"]


def test_the_book_s_example_runs(own_store):
    code = re.search(r"```python\n(.*?)```", (paths.ROOT / "book/methods.md").read_text(), re.S)[1]
    exec(code.replace("quick", "smoke").replace("mnist5k", "digits"), made := {})
    assert made["run"].extract == "11" and methods.check(made["run"]) is methods.METHODS["composed"]
