"""Methods against references typed here from torch and torchvision alone, one and five optimiser steps deep."""

import dataclasses
import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from pytest import approx
from torch import nn

from sidae_lib import augment, config, losses, methods, networks
from sidae_lib.config import RunConfig, SidaeError

SMALL = {"dim": 32, "hidden": 48, "pred_hidden": 8, "decoder": 512}
LR, MOMENTUM, DECAY = 0.03, 0.9, 5e-4


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


# --- five SGD steps -------------------------------------------------------------------------------------------------


class Reference(nn.Module):
    """The paper with torchvision's ResNet-18, whose fc is the projector, and all the rest in plain torch."""

    def __init__(self, w: float):
        super().__init__()
        D, H, K = SMALL["dim"], SMALL["hidden"], SMALL["pred_hidden"]
        self.w = w
        self.f = torchvision.models.resnet18()
        self.f.fc = nn.Sequential(nn.Linear(512, H, bias=False), nn.BatchNorm1d(H), nn.ReLU(),
                                  nn.Linear(H, H, bias=False), nn.BatchNorm1d(H), nn.ReLU(),
                                  nn.Linear(H, D, bias=False), nn.BatchNorm1d(D, affine=False))  # fmt: skip
        if w > 0:
            self.h = nn.Sequential(nn.Linear(D, K, bias=False), nn.BatchNorm1d(K), nn.ReLU(), nn.Linear(K, D))
        if w < 1:
            double = {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}
            up = [layer for a, b in ((512, 256), (256, 128), (128, 64), (64, 64)) for layer in (
                nn.ConvTranspose2d(a, b, bias=False, **double), nn.BatchNorm2d(b), nn.ReLU())]  # fmt: skip
            self.g = nn.Sequential(nn.Linear(D, 512), nn.Unflatten(1, (512, 1, 1)), *up,
                                   nn.ConvTranspose2d(64, 3, **double))  # fmt: skip

    def forward(self, views, batch):
        z1, z2 = self.f(views[0]), self.f(views[1])
        l_si = l_dae = 0
        if self.w > 0:
            p1, p2 = self.h(z1), self.h(z2)
            l_si = -(F.cosine_similarity(p1, z2.detach()).mean() / 2 + F.cosine_similarity(p2, z1.detach()).mean() / 2)
        if self.w < 1:
            l_dae = F.mse_loss(self.g(z1), batch["x1"]) / 2 + F.mse_loss(self.g(z2), batch["x2"]) / 2
        return self.w * l_si + (1 - self.w) * l_dae


def renamed(state):
    """Our names -> the reference's."""
    out = {}
    for k, v in state.items():
        part, _, rest = k.partition(".")
        if part == "decoder":
            name, _, rest = rest.partition(".")
            n, _, rest = ("0", "", rest) if name == "fc" else rest.partition(".")
            part, rest = "g", f"{int(n) + 2 * (name == 'up')}.{rest}"
        out[f"{ {'backbone': 'f', 'projector': 'f.fc', 'predictor': 'h', 'g': 'g'}[part] }.{rest}"] = v
    return out


def sgd(groups):
    return torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


def train(model, loss, optimizer, steps=5):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(*inputs(step))
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses, model.state_dict()


@pytest.mark.parametrize(("w", "twin"), [(1.0, "simsiam"), (0.0, "dae"), (0.3, None)])
def test_five_sgd_steps_equal_the_reference_exactly(w, twin, monkeypatch):
    """Bit for bit on torch's own layers; the products of small maps, which round otherwise, are in test_networks."""
    monkeypatch.setattr(networks, "multiplied", lambda *_: False)
    ours = [build(w=w)] + ([build(twin)] if twin else [])
    reference = Reference(w)
    reference.load_state_dict(renamed(ours[0].state_dict()))  # strict: no module more, none less
    expected, weights = train(reference, reference, sgd(reference.parameters()))
    assert len(set(expected)) == 5
    for m in ours:
        losses, state = train(m, lambda v, b, m=m: m.loss(v, b)["loss"], sgd(m.param_groups(LR)))
        assert losses == expected
        for k, v in renamed(state).items():
            assert torch.equal(v, weights[k]), k


def test_the_modules_that_are_not_used_are_not_there():
    assert build(w=1, width=8).decoder is None and build(w=0, width=8).predictor is None
    assert build("simsiam", width=8).decoder is None and build("dae", width=8).predictor is None
    both = build(w=0.5, width=8)
    assert both.decoder is not None and both.predictor is not None
    views, batch = inputs()
    assert both.loss(views, batch).keys() == {"z", "l_si", "l_dae", "loss"}
    assert build("simsiam", width=8).loss(views, batch).keys() == {"z", "l_si", "loss"}
    assert build("dae", width=8).loss(views, batch).keys() == {"z", "l_dae", "loss"}


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(m, loss):
    m.zero_grad()
    loss.backward()
    return {k: p.grad.clone() for k, p in m.named_parameters() if p.grad is not None}


def test_no_gradient_flows_through_the_target_branch():
    m, (views, batch) = narrow("simsiam"), inputs()
    with torch.no_grad():
        c1, c2 = (m.projector(m.backbone(v)) for v in views)  # constants
    ours = gradients(m, m.loss(views, batch)["l_si"])
    p1, p2 = (m.predictor(m.projector(m.backbone(v))) for v in views)
    constant = gradients(m, -(F.cosine_similarity(p1, c2).mean() + F.cosine_similarity(p2, c1).mean()) / 2)
    assert ours.keys() == constant.keys() == dict(m.named_parameters()).keys()
    for k, g in ours.items():
        assert torch.allclose(g, constant[k], atol=1e-7), k


def test_the_decoders_gradient_reaches_the_backbone_from_both_views():
    m, (views, batch) = narrow("dae"), inputs()
    z1, z2 = (m.projector(m.backbone(v)) for v in views)
    expected = gradients(m, (F.mse_loss(m.decoder(z1), batch["x1"]) + F.mse_loss(m.decoder(z2), batch["x2"])) / 2)
    ours = gradients(m, m.loss(views, batch)["loss"])
    assert ours["backbone.conv1.weight"].abs().sum() > 0
    for k, g in ours.items():
        assert torch.allclose(g, expected[k], atol=1e-7), k


def test_z_carries_no_gradient_and_is_the_first_views_projection():
    m, (views, batch) = narrow(w=0.5), inputs()
    z = m.loss(views, batch)["z"]
    assert not z.requires_grad and torch.equal(z, m.projector(m.backbone(views[0])))
    assert torch.equal(m.features(views[0]), m.backbone(views[0]))


# --- the loss's terms -----------------------------------------------------------------------------------------------


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


def test_w_weighs_the_terms_and_the_batchs_w_takes_over():
    (views, batch), m = inputs(), narrow(w=0.3)
    out = m.loss(views, batch)
    assert out["loss"].item() == approx(0.3 * out["l_si"].item() + 0.7 * out["l_dae"].item(), rel=1e-6)
    out = m.loss(views, batch | {"w": torch.tensor(0.9)})
    assert out["loss"].item() == approx(0.9 * out["l_si"].item() + 0.1 * out["l_dae"].item(), rel=1e-5)


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
              for v, x in zip(views, clean, strict=True)]  # fmt: skip
    per_image = torch.stack([e.mean(1) if recon == "mean" else e.sum(1) for e in errors])
    assert m.loss(views, batch)["l_dae"].item() == approx(per_image.mean().item(), rel=1e-5)


def test_supervised_is_cross_entropy_on_the_first_view():
    m, (views, batch) = narrow("supervised", classes=7), inputs()
    batch["labels"] = batch["labels"] % 7
    h = m.backbone(views[0])
    scores = h @ m.fc.weight.T + m.fc.bias
    slow = -sum(scores[i].log_softmax(0)[label] for i, label in enumerate(batch["labels"])) / 8
    out = m.loss(views, batch)
    assert scores.shape == (8, 7) and out["loss"].item() == approx(slow.item(), rel=1e-5)
    assert torch.equal(out["z"], h) and not out["z"].requires_grad
    assert m.labels and not any(methods.METHODS[n].labels for n in ("sidae", "simsiam", "dae", "untrained"))


def test_one_seed_one_start():
    """Methods that share a backbone start from the same one: a difference between them is no difference of luck."""
    start = [narrow(name).backbone.state_dict() for name in ("sidae", "simsiam", "dae", "supervised")]
    start += [narrow("untrained", epochs=0).backbone.state_dict(), narrow(seed=1).backbone.state_dict()]
    same = [all(torch.equal(a, b) for a, b in zip(start[0].values(), s.values(), strict=True)) for s in start]
    assert same == [True] * 5 + [False]


# --- parameter groups -----------------------------------------------------------------------------------------------


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


# --- names ----------------------------------------------------------------------------------------------------------


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
         "loss": "info_nce", "negatives": "any", "batch_norm": "joint", "embed": "linear", "distance": "cosine"}  # fmt: skip
NEEDS = {  # what a method cannot do without, or cannot do with the default
    "untrained": {"epochs": 0}, "amdim": {"augment": "amdim", "backbone": "amdim"}, "yadim": {"augment": "yadim"},
    "cpc_v2": {"augment": "cpc_patches", "backbone": "patches18"},
    "composed": {"extract": "00", "compare": "dot", "loss": "nce"},
}  # fmt: skip


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


def test_shared_fields_are_config_fields():
    assert methods.SHARED <= {f.name for f in dataclasses.fields(RunConfig)}


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
