"""What a record holds of features beside an accuracy: maps, neighbours, and the student report's measures."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import networks
from .config import EvalConfig, Record
from .data import subset
from .train import several_classes


def _cut(**sizes: tuple[float, float]) -> Record:
    """What a record says of sizes (usual, taken) that were cut to the number of images; nothing where none was."""
    cut = {name: taken for name, (usual, taken) in sizes.items() if taken < usual}
    return {"cut": cut} if cut else {}


def picture(config: EvalConfig, x: Tensor, bank: Tensor) -> Record:
    """What a picture of features shows, so that it can be drawn again without weights.

    x: (N, F) test features, of which `config.points` are taken, the same for every network.  bank: (M, F) training features.
    Two maps, t-SNE and PCA, with xy in [-1, 1] and their trustworthiness (Venna & Kaski 2001; 1: every neighbour on the map
    is one in feature space). `neighbours`: the five nearest training images by cosine of the first six points,
    which lie evenly in the test split.
    Perplexity is cut to a third of the other points, and trustworthiness's five neighbours to below half of the points;
    `cut` says so. Points that are all alike make a map of one place without trustworthiness (None).
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE, trustworthiness

    taken = subset(len(x), count=min(config.points, len(x)), seed=config.label_seed)
    ahead = torch.linspace(0, len(taken) - 1, min(6, len(taken))).long()  # of many classes where a set is sorted by class
    taken = torch.cat([taken[ahead], taken[~torch.isin(torch.arange(len(taken)), ahead)]])
    (x, bank), n = networks.wide(x, bank), len(taken)
    z = x[taken.to(x.device)].cpu().numpy()
    perplexity = config.perplexity if config.perplexity < n else round((n - 1) / 3, 4)
    k = min(5, (n - 1) // 2)
    alike = not np.square(z - z[0]).any()  # scikit-learn's t-SNE ends the process on equal points
    out = {"points": taken.tolist()} | _cut(perplexity=(config.perplexity, perplexity), trustworthiness=(5, k))
    maps = {"tsne": TSNE(2, perplexity=perplexity, init="pca", random_state=config.seed), "pca": PCA(2)}
    for name, model in maps.items():
        xy = np.zeros((n, 2)) if alike else model.fit_transform(z)
        trust = None if alike or not k else round(float(trustworthiness(z, xy, n_neighbors=k)), 4)
        out[name] = {"xy": (xy / (np.abs(xy).max() or 1)).round(3).tolist(), "trustworthiness": trust}
    queries = F.normalize(x[taken[:6].to(x.device)], dim=1)
    near = (queries @ F.normalize(bank, dim=1).T).topk(min(5, len(bank)), dim=1)
    return out | {"neighbours": near.indices.tolist()}


def student_report(config: EvalConfig, x: Tensor, y: Tensor, test: Tensor, y_test: Tensor
                   ) -> tuple[Tensor, Tensor, Tensor, Record]:  # fmt: skip
    """The student report's Sec. 5.5 and 6.1 on features: (predicted labels, true labels, labels fitted on, record).

    The record has top-3 and kNN accuracy (percent) and what `_spread` says. score_on part: as the report's code did, 80 % of
    the test images are fitted on, and top-3 has a split of its own. Else x is fitted on and `test` scored, by logistic
    regression on standardised features. 32 components and 30 neighbours are cut to the images fitted on; `cut` says so.
    """
    from sklearn import decomposition, linear_model, model_selection, neighbors, pipeline, preprocessing

    x, y, test, y_test = (t.cpu().numpy() for t in (x, y, test, y_test))
    part = config.score_on == "part"

    def split(seed: int) -> Sequence[np.ndarray]:
        """Features to fit on and to score, then their labels."""
        if not part:
            return x, test, y, y_test
        found = model_selection.train_test_split(test, y_test, train_size=0.8, random_state=seed % 2**32)
        several_classes(torch.from_numpy(found[2]), f"{len(found[2])} test labels that score_on part fits on")
        return found

    fitted, scored, y_fitted, y_scored = split(config.seed)
    other, top_scored, y_other, y_top = split(config.seed + 1)
    components, k = min(32, *fitted.shape), min(30, len(fitted))
    reduced = config.features == "pca"
    first = [decomposition.PCA(components, random_state=0)] if reduced else []
    scaled = [] if part else [preprocessing.StandardScaler()]
    logistic = pipeline.make_pipeline(*first, *scaled, linear_model.LogisticRegression(max_iter=1000))
    knn = pipeline.make_pipeline(*first, neighbors.KNeighborsClassifier(k))
    out = {"knn": round(100 * float(knn.fit(fitted, y_fitted).score(scored, y_scored)), 4)}
    predicted = logistic.fit(fitted, y_fitted).predict(scored)
    likeliest = logistic.fit(other, y_other).predict_proba(top_scored).argsort(1)[:, -3:]
    top3 = (logistic.classes_[likeliest] == y_top[:, None]).any(1).mean()
    out = {"top3": round(100 * float(top3), 4)} | out | _spread(torch.from_numpy(test[:1000]), y_test[:1000])
    out |= _cut(components=(32, components if reduced else 32), neighbours=(30, k))
    predicted, y_scored, y_fitted = (torch.from_numpy(v) for v in (predicted, y_scored, y_fitted))
    return predicted, y_scored, y_fitted, out


def _spread(z: Tensor, labels: np.ndarray) -> Record:
    """Histograms of cosines and distances between images of one class and of different ones, and `radial`.

    radial: the share of a class's spread along its mean (1: its vectors differ in length alone); None without any spread.
    """
    upper = np.triu_indices(len(z), 1)
    same = (labels[:, None] == labels)[upper]
    one_hot = F.one_hot(torch.from_numpy(labels)).float()
    means = one_hot @ (one_hot.T @ z / one_hot.sum(0).clamp(min=1)[:, None])  # (n, F): each image's class mean
    along = ((z - means) * F.normalize(means, dim=1)).sum(1)
    radial = (along.square().sum() / (z - means).square().sum()).item()
    out: Record = {"radial": None if np.isnan(radial) else radial}
    unit = F.normalize(z, dim=1)
    for name, between in (("cosine", unit @ unit.T), ("distance", torch.cdist(z, z))):
        d = between.numpy()[upper]
        try:
            edges = np.histogram_bin_edges(d, 40)
        except ValueError:  # they lie so close that float32 has no 40 numbers between them
            edges = np.histogram_bin_edges(d.astype(float), 40)
        out[name] = {"edges": edges.round(5).tolist(), "same": np.histogram(d[same], edges)[0].tolist(),
                     "different": np.histogram(d[~same], edges)[0].tolist()}  # fmt: skip
    return out
