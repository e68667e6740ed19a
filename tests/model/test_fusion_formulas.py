"""Every fusion against its formula, written out clip by clip over the modalities that the clip has.

The slow versions never see an absent modality, so that they are also the proof that an absent one is a removed one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from crossgate.config import FusionConfig
from crossgate.model.fusion import FUSIONS, FusionInput, build_fusion

B, M, D, K = 10, 4, 8, 3
CONFIG = {"hidden": 6, "temperature": 0.7, "weights": (1.0, 1.5, 0.5, 2.0), "rank": 3, "tokens": 2, "top": 2}


@dataclass
class Clip:
    """One clip: numbers of its modalities, and per number a feature ``(D,)`` and scores ``(K,)``."""

    here: list[int]
    x: dict[int, Tensor]
    z: dict[int, Tensor]

    def all(self) -> Tensor:
        """All features in a row, zeros where there is none."""
        return torch.cat([self.x.get(m, torch.zeros(D, dtype=torch.float64)) for m in range(M)])


def softmax(scores: dict[int, Tensor]) -> dict[int, Tensor]:
    total = sum(s.exp() for s in scores.values())
    return {m: s.exp() / total for m, s in scores.items()}


def equal(c: Clip) -> dict[int, Any]:
    return {m: 1 / len(c.here) for m in c.here}


def expert(experts: Any, c: Clip) -> dict[int, Tensor]:
    return {m: c.x[m] @ experts.weight[m] + experts.bias[m] for m in c.here}


def weighted(weights: dict[int, Any], values: dict[int, Tensor]) -> Tensor:
    return sum((weights[m] * values[m] for m in weights), torch.zeros(()))


def perceptron(scorer: Any, facts: Tensor) -> Tensor:
    hidden = scorer.inner.weight @ facts + scorer.inner.bias
    return scorer.outer.weight @ torch.nn.functional.gelu(hidden) + scorer.outer.bias


def entropy(z: Tensor) -> Tensor:
    p = z.exp() / z.exp().sum()
    return -(p * p.log()).sum()


def logits(weights: dict[int, Any], c: Clip) -> Tensor:
    return weighted(weights, c.z)


def probabilities(weights: dict[int, Any], c: Clip) -> Tensor:
    return weighted(weights, {m: z.exp() / z.exp().sum() for m, z in c.z.items()}).log()


def fixed(f: Any, c: Clip) -> dict[int, Any]:
    total = sum(CONFIG["weights"][m] for m in c.here)  # type: ignore[index]
    return {m: CONFIG["weights"][m] / total for m in c.here}  # type: ignore[index]


def static(f: Any, c: Clip) -> dict[int, Any]:
    return softmax({m: f.static.scores[m] for m in c.here})


def by_features(f: Any, c: Clip) -> dict[int, Any]:
    scores = perceptron(f.scorer, c.all()) / 0.7
    return softmax({m: scores[m] for m in c.here})


def by_entropy(f: Any, c: Clip) -> dict[int, Any]:
    return softmax({m: -entropy(c.z[m]) / 0.7 for m in c.here})


def by_confidence(f: Any, c: Clip) -> dict[int, Any]:
    nothing = torch.zeros(K + 1, dtype=torch.float64)
    facts = [
        torch.cat([c.z[m].log_softmax(0), entropy(c.z[m])[None] / math.log(K)]) if m in c.here else nothing
        for m in range(M)
    ]
    scores = perceptron(f.scorer, torch.cat(facts)) / 0.7
    return softmax({m: scores[m] for m in c.here})


def classwise(f: Any, c: Clip) -> Tensor:
    scores = perceptron(f.scorer, c.all()).view(M, K) / 0.7
    return torch.stack([logits(softmax({m: scores[m, k] for m in c.here}), c)[k] for k in range(K)])


def classwise_probabilities(f: Any, c: Clip) -> Tensor:
    scores = perceptron(f.scorer, c.all()).view(M, K) / 0.7
    of_class = [softmax({m: scores[m, k] for m in c.here}) for k in range(K)]
    shares = [sum(of_class[k][m] * (c.z[m].exp() / c.z[m].exp().sum())[k] for m in c.here) for k in range(K)]
    return torch.stack(shares).log()


def concat(f: Any, c: Clip) -> Tensor:
    tokens = torch.cat([c.x[m] if m in c.here else f.missing[m] for m in range(M)])
    return f.join.weight @ tokens + f.join.bias


def sigmoid_gate(f: Any, c: Clip) -> Tensor:
    gates = {}
    for m in c.here:
        hidden = torch.nn.functional.gelu(c.x[m] @ f.own[m] + f.context.weight @ c.all() + f.bias[m])
        gates[m] = 2 * torch.sigmoid((hidden @ f.score[m] + f.offset[m]) / 0.7) / len(c.here)
    return weighted(gates, expert(f.experts, c))


def gmu(f: Any, c: Clip) -> Tensor:
    gates = torch.sigmoid(f.gate.weight @ c.all() + f.gate.bias).view(M, D)
    return weighted({m: gates[m] for m in c.here}, {m: torch.tanh(c.x[m] @ f.value[m]) for m in c.here})


def context(f: Any, c: Clip) -> Tensor:
    joined = weighted(equal(c), expert(f.experts, c))
    return joined * torch.sigmoid(f.gate.weight @ joined + f.gate.bias)


def film(f: Any, c: Clip) -> Tensor:
    given, changed = expert(f.condition, c), {}
    for m in c.here:
        others = [given[j] for j in c.here if j != m]
        gamma, beta = torch.ones(D, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
        if others:
            condition = sum(others) / len(others)
            gamma = 1 + condition @ f.modulate[0, m] + f.offset[0, m]
            beta = condition @ f.modulate[1, m] + f.offset[1, m]
        changed[m] = gamma * c.x[m] + beta
    return f.join.weight @ weighted(equal(c), changed) + f.join.bias


def kiela(f: Any, c: Clip) -> Tensor:
    gates, values, gated = expert(f.gate, c), expert(f.experts, c), {}
    for m in c.here:
        others = [torch.sigmoid(gates[j]) for j in c.here if j != m]
        gated[m] = values[m] * (sum(others) / len(others) if others else 0.5)
    return f.join.weight @ weighted(equal(c), gated) + f.join.bias


def flow_gate(f: Any, c: Clip) -> Tensor:
    values = expert(f.experts, c)
    parts = [values[m] for m in c.here if m > 1]
    if 0 in c.here:
        parts.append(values[0] * (torch.sigmoid(f.gate.weight @ c.x[1] + f.gate.bias) if 1 in c.here else 0.5))
    elif 1 in c.here:
        parts.append(values[1])
    return torch.stack(parts).mean(0)


def lowrank(f: Any, c: Clip) -> Tensor:
    result = f.bias
    for r in range(3):
        product = torch.ones(D, dtype=torch.float64)
        for m in c.here:
            weight = torch.cat([f.ones[m, r][None], f.factors[m, r]])  # (1 + D, D)
            product = product * (torch.cat([torch.ones(1, dtype=torch.float64), c.x[m]]) @ weight)
        result = result + f.mixture[r] * product
    return result


def transformer(block: Any, tokens: Tensor) -> Tensor:
    """Attention token by token and head by head."""
    width = D // block.heads
    query, key, value = (block.inward(block.before(tokens))).split(D, dim=1)
    rows = []
    for i in range(len(tokens)):
        heads = []
        for h in range(block.heads):
            part = slice(h * width, (h + 1) * width)
            shares = softmax({j: query[i, part] @ key[j, part] / math.sqrt(width) for j in range(len(tokens))})
            heads.append(sum(shares[j] * value[j, part] for j in shares))
        rows.append(torch.cat(heads))
    tokens = tokens + block.outward(torch.stack(rows))
    return tokens + block.perceptron(block.between(tokens))


def bottleneck(f: Any, c: Clip) -> Tensor:
    own, shared = dict(c.x), f.tokens
    for layer in f.layers:
        met = {m: transformer(layer.blocks[m], torch.cat([own[m][None], shared])) for m in c.here}
        own, shared = {m: t[0] for m, t in met.items()}, sum(t[1:] for t in met.values()) / len(met)
    return weighted(equal(c), own)


def attention(f: Any, c: Clip) -> Tensor:
    width, values, pooled = D // f.heads, expert(f.experts, c), []
    for h in range(f.heads):
        part = slice(h * width, (h + 1) * width)
        keys = {m: (f.key.weight @ f.norm(c.x[m]) + f.place[m])[part] for m in c.here}
        shares = softmax({m: f.query[h] @ keys[m] / math.sqrt(width) for m in c.here})
        pooled.append(weighted(shares, {m: values[m][part] for m in c.here}))
    return f.join.weight @ torch.cat(pooled) + f.join.bias


def sparse(f: Any, c: Clip) -> Tensor:
    scores = perceptron(f.scorer, c.all())
    best = sorted(c.here, key=lambda m: -scores[m].item())[:2]
    values = expert(f.experts, c)
    return sum(values[m] for m in best) / len(best)


FORMULAS: dict[str, Callable[[Any, Clip], Tensor]] = {
    "average_logits": lambda f, c: logits(equal(c), c),
    "average_probabilities": lambda f, c: probabilities(equal(c), c),
    "fixed_logits": lambda f, c: logits(fixed(f, c), c),
    "fixed_probabilities": lambda f, c: probabilities(fixed(f, c), c),
    "static": lambda f, c: weighted(static(f, c), expert(f.experts, c)),
    "static_logits": lambda f, c: logits(static(f, c), c),
    "static_probabilities": lambda f, c: probabilities(static(f, c), c),
    "softmax_logits": lambda f, c: logits(by_features(f, c), c),
    "softmax_probabilities": lambda f, c: probabilities(by_features(f, c), c),
    "classwise_logits": classwise,
    "classwise_probabilities": classwise_probabilities,
    "entropy_logits": lambda f, c: logits(by_entropy(f, c), c),
    "entropy_probabilities": lambda f, c: probabilities(by_entropy(f, c), c),
    "confidence_logits": lambda f, c: logits(by_confidence(f, c), c),
    "confidence_probabilities": lambda f, c: probabilities(by_confidence(f, c), c),
    "concat": concat,
    "mean": lambda f, c: weighted(equal(c), expert(f.experts, c)),
    "softmax": lambda f, c: weighted(by_features(f, c), expert(f.experts, c)),
    "sigmoid": sigmoid_gate,
    "gmu": gmu,
    "context": context,
    "film": film,
    "kiela": kiela,
    "flow_gate": flow_gate,
    "lowrank": lowrank,
    "bottleneck": bottleneck,
    "attention": attention,
    "sparse": sparse,
}


def test_every_fusion_has_its_formula_here() -> None:
    assert FORMULAS.keys() == FUSIONS.keys()


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_a_fusion_is_its_formula(name: str) -> None:
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(name=name, **CONFIG), M, D, classes=K).double().eval()
    with torch.no_grad():
        for parameter in fusion.parameters():  # away from starts at zero, one and identity
            parameter.add_(0.5 * torch.randn_like(parameter))
    present = torch.rand(B, M) > 0.4
    present[0] = True
    present[1:5] = torch.eye(M, dtype=torch.bool)
    present = present[present.any(1)]
    features = torch.randn(len(present), M, D, dtype=torch.float64).masked_fill(~present.unsqueeze(-1), 0)
    scores = 3 * torch.randn(len(present), M, K, dtype=torch.float64)
    output = fusion(FusionInput(features, present, scores))
    for b in range(len(present)):
        here = present[b].nonzero().flatten().tolist()
        clip = Clip(here, {m: features[b, m] for m in here}, {m: scores[b, m] for m in here})
        expected = FORMULAS[name](fusion, clip)
        found = output.logits[b] if output.embedding is None else output.embedding[b]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda text, b=b: f"clip {b}: {text}")
