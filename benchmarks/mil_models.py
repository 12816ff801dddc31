"""The aggregators of multiple-instance learning that people use on frozen features, each from its paper.

A bag is (N, D): N patches of one slide, D features each. Every aggregator gives logits (L,) and a loss beside the
cross-entropy of those logits, 0 for most; `label` is None when nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, ATTENTION = 128, 64  # CLAM's "small" is 512 and 256, for 1,024 features; these are in proportion
Output = tuple[Tensor, Tensor]
_NONE = torch.zeros(())


class Pool(nn.Module):
    """Mean or maximum of the patches, then a linear layer: the mean of features, the maximum of patches' logits."""

    def __init__(self, features: int, classes: int, *, how: str) -> None:
        super().__init__()
        self.how = how
        self.project = nn.Sequential(nn.Linear(features, WIDTH), nn.ReLU(), nn.Dropout(0.25))
        self.classify = nn.Linear(WIDTH, classes)

    def forward(self, bag_ND: Tensor, label: int | None = None) -> Output:
        hidden_NH = self.project(bag_ND)
        if self.how == "mean":
            return self.classify(hidden_NH.mean(dim=0)), _NONE
        logits_NL = self.classify(hidden_NH)
        return logits_NL[logits_NL[:, -1].argmax()], _NONE


class GatedAttention(nn.Module):
    """Weights (N,) that sum to 1: Ilse et al. 2018, equation 9."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.tanh, self.gate, self.score = (
            nn.Linear(width, hidden),
            nn.Linear(width, hidden),
            nn.Linear(hidden, 1),
        )

    def forward(self, hidden_NH: Tensor) -> Tensor:
        gated = torch.tanh(self.tanh(hidden_NH)) * torch.sigmoid(self.gate(hidden_NH))
        weights: Tensor = self.score(gated)[:, 0].softmax(dim=0)
        return weights


class Abmil(nn.Module):
    """Ilse et al. 2018, gated attention."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(features, WIDTH), nn.ReLU(), nn.Dropout(0.25))
        self.attend = GatedAttention(WIDTH, ATTENTION)
        self.classify = nn.Linear(WIDTH, classes)

    def forward(self, bag_ND: Tensor, label: int | None = None) -> Output:
        hidden_NH = self.project(bag_ND)
        return self.classify(self.attend(hidden_NH) @ hidden_NH), _NONE


class ClamSb(Abmil):
    """Lu et al. 2021, one branch: the most and the least attended patches are told apart, too (8, and 0.3)."""

    INSTANCES, SHARE = 8, 0.3

    def __init__(self, features: int, classes: int) -> None:
        super().__init__(features, classes)
        self.instances = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(classes))

    def forward(self, bag_ND: Tensor, label: int | None = None) -> Output:
        hidden_NH = self.project(bag_ND)
        weights_N = self.attend(hidden_NH)
        logits_L = self.classify(weights_N @ hidden_NH)
        if label is None:
            return logits_L, _NONE
        count = min(self.INSTANCES, len(bag_ND) // 2) or 1
        order = weights_N.argsort(descending=True)
        chosen = torch.cat([hidden_NH[order[:count]], hidden_NH[order[-count:]]])
        targets = torch.cat([torch.ones(count), torch.zeros(count)]).long()
        instance = F.cross_entropy(self.instances[label](chosen), targets)
        bag = F.cross_entropy(logits_L, torch.tensor(label))
        return logits_L, self.SHARE * instance - self.SHARE * bag  # 0.7 of the bag's loss and 0.3 of theirs


class Dsmil(nn.Module):
    """Li et al. 2021: the maximum over patches, and attention by likeness to the patch that has it."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.patch = nn.Linear(features, classes)
        self.query = nn.Sequential(nn.Linear(features, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.value = nn.Sequential(nn.Dropout(0.25), nn.Linear(features, features), nn.ReLU())
        self.classify = nn.Conv1d(classes, classes, features)

    def forward(self, bag_ND: Tensor, label: int | None = None) -> Output:
        patch_NL = self.patch(bag_ND)
        query_NQ = self.query(bag_ND)
        critical_LQ = query_NQ[patch_NL.argmax(dim=0)]
        weights_NL = (query_NQ @ critical_LQ.T / math.sqrt(query_NQ.shape[1])).softmax(dim=0)
        bag_LD = weights_NL.T @ self.value(bag_ND)
        bag_L = self.classify(bag_LD[None])[0, :, 0]
        most_L = patch_NL.max(dim=0).values
        if label is None:
            return (most_L + bag_L) / 2, _NONE
        target = torch.tensor(label)
        wanted = (F.cross_entropy(bag_L, target) + F.cross_entropy(most_L, target)) / 2
        logits_L = (most_L + bag_L) / 2
        return logits_L, wanted - F.cross_entropy(
            logits_L, target
        )  # their loss is of the two, not of the mean


class TransMil(nn.Module):
    """Shao et al. 2021: two self-attentions with a class token, convolutions over the squared bag between them.

    Bags here are small enough for exact attention, which theirs (Nystrom's) approximates.
    """

    HEADS = 4

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.project = nn.Sequential(nn.Linear(features, WIDTH), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, WIDTH) * 0.02)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(WIDTH, self.HEADS, dropout=0.1, batch_first=True) for _ in range(2)
        )
        self.position = nn.ModuleList(
            nn.Conv2d(WIDTH, WIDTH, k, padding=k // 2, groups=WIDTH) for k in (7, 5, 3)
        )
        self.classify = nn.Linear(WIDTH, classes)

    def forward(self, bag_ND: Tensor, label: int | None = None) -> Output:
        hidden = self.project(bag_ND)
        side = math.ceil(math.sqrt(len(hidden)))
        hidden = torch.cat(
            [hidden, hidden[: side * side - len(hidden)]]
        )  # squared by repeating its beginning
        hidden = torch.cat([self.token, hidden])
        hidden = self._attend(hidden, 0)
        square = hidden[1:].T.reshape(1, WIDTH, side, side)
        placed: Tensor = square + sum(conv(square) for conv in self.position)
        hidden = torch.cat([hidden[:1], placed.reshape(WIDTH, -1).T])
        hidden = self._attend(hidden, 1)
        return self.classify(self.norms[2](hidden[0])), _NONE

    def _attend(self, hidden: Tensor, number: int) -> Tensor:
        normed = self.norms[number](hidden)[None]
        attended: Tensor = self.attentions[number](normed, normed, normed, need_weights=False)[0][0]
        return hidden + attended


class Dtfd(nn.Module):
    """Zhang et al. 2022, AFS: pseudo-bags by attention, each distilled to a feature, then attention over those."""

    PSEUDO = 4

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = Abmil(features, classes), Abmil(WIDTH, classes)

    def forward(self, bag_ND: Tensor, label: int | None = None) -> Output:
        order = torch.randperm(len(bag_ND)) if self.training else torch.arange(len(bag_ND))
        distilled, extra = [], _NONE
        for part in order.tensor_split(min(self.PSEUDO, len(bag_ND))):
            hidden_NH = self.first.project(bag_ND[part])
            feature_H = self.first.attend(hidden_NH) @ hidden_NH
            distilled.append(feature_H)
            if label is not None:
                loss = F.cross_entropy(self.first.classify(feature_H), torch.tensor(label))
                extra = extra + loss / self.PSEUDO
        logits_L, _ = self.second(torch.stack(distilled))
        return logits_L, extra


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "mean": lambda features, classes: Pool(features, classes, how="mean"),
    "max": lambda features, classes: Pool(features, classes, how="max"),
    "abmil": Abmil,
    "clam_sb": ClamSb,
    "dsmil": Dsmil,
    "transmil": TransMil,
    "dtfd": Dtfd,
}
