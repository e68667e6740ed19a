"""What every registered fusion promises. A new fusion is tested by being registered."""

from __future__ import annotations

import copy

import pytest
import torch

from crossgate.config import FusionConfig
from crossgate.errors import UserError
from crossgate.model.fusion import FUSIONS, Fusion, FusionInput, FusionOutput, build_fusion

B, M, D, K = 12, 4, 16, 3
NAMES = sorted(FUSIONS)


def build(name: str, modalities: int = M) -> Fusion:
    torch.manual_seed(0)
    return build_fusion(FusionConfig(name=name, hidden=8), modalities, D, classes=K)


def clips(seed: int = 1) -> FusionInput:
    draw = torch.Generator().manual_seed(seed)
    present = torch.rand(B, M, generator=draw) > 0.4
    present[0], present[1] = True, False
    present[2] = torch.tensor([False, False, True, False])
    features = torch.randn(B, M, D, generator=draw).masked_fill(~present.unsqueeze(-1), 0)
    return FusionInput(features, present, torch.randn(B, M, K, generator=draw))


def result(output: FusionOutput) -> torch.Tensor:
    value = output.logits if output.embedding is None else output.embedding
    assert value is not None
    return value


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name: str) -> None:
    fusion = build(name)
    (result(fusion(clips())) * torch.randn(D)).sum().backward()
    dead = [key for key, p in fusion.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("name", NAMES)
def test_weights_sum_to_one_over_what_is_present(name: str) -> None:
    given = clips()
    weights = build(name)(given).weights
    if weights is None:
        assert name == "concat"
        return
    assert weights.shape == (B, M)
    assert (weights >= 0).all()
    assert weights[~given.present].abs().sum() == 0
    expected = given.present.any(1).float()  # a clip with nothing has no weights
    torch.testing.assert_close(weights.sum(1), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights[2], torch.tensor([0.0, 0.0, 1.0, 0.0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_clip_with_nothing_is_finite_and_gives_its_features_no_gradient(name: str) -> None:
    given = clips()
    given.features.requires_grad_()
    output = result(build(name)(given))
    assert output.isfinite().all()
    (gradient,) = torch.autograd.grad(output.square().sum(), given.features)
    assert gradient.isfinite().all()
    # the zeros of absent modalities may enter a gate as context; through the network they carry no gradient
    assert gradient[given.present].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_order_of_clips_does_not_matter(name: str) -> None:
    fusion, given, order = build(name), clips(), torch.randperm(B)
    shuffled = FusionInput(given.features[order], given.present[order], given.logits[order])  # type: ignore[index]
    torch.testing.assert_close(result(fusion(given))[order], result(fusion(shuffled)))


@pytest.mark.parametrize("name", NAMES)
def test_bf16(name: str) -> None:
    fusion, given = build(name), clips()
    exact = result(fusion(given))
    assert given.logits is not None
    low = copy.deepcopy(fusion).bfloat16()(
        FusionInput(given.features.bfloat16(), given.present, given.logits.bfloat16())
    )
    assert result(low).dtype == torch.bfloat16
    torch.testing.assert_close(result(low).float(), exact, rtol=0.1, atol=0.1)
    if low.weights is not None:
        assert low.weights.dtype == torch.float32


@pytest.mark.parametrize("name", ["mean", "softmax", "sigmoid", "gmu"])
def test_an_absent_modality_equals_a_removed_one(name: str) -> None:
    """A fusion of three modalities with the weights of the other three gives what the fusion of four gives."""
    full, small = build(name), build(name, modalities=3)
    state = full.state_dict()
    for key, tensor in small.state_dict().items():
        source = state[key]
        if name == "gmu" and key == "gate.weight":
            source = source.view(M, D, M, D)[:3, :, :3].reshape(3 * D, 3 * D)
        elif name == "gmu" and key == "gate.bias":
            source = source[: 3 * D]
        elif key in ("scorer.inner.weight", "context.weight"):
            source = source[:, : 3 * D]
        elif source.shape != tensor.shape:
            source = source[:3]
        tensor.copy_(source)
    given = clips()
    given.present[:, 3] = False
    given.features[:, 3] = 0
    removed = FusionInput(given.features[:, :3], given.present[:, :3])
    a, b = full(given), small(removed)
    torch.testing.assert_close(result(a), result(b), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(a.weights[:, :3], b.weights, rtol=1e-6, atol=1e-6)


def test_gates_start_near_the_uniform_mean() -> None:
    given = clips()
    uniform = build("mean")(given)
    for name in ("softmax", "sigmoid"):
        gate = build(name)(given)
        torch.testing.assert_close(gate.weights, uniform.weights, rtol=0.1, atol=0.05)
        torch.testing.assert_close(gate.embedding, uniform.embedding, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gmu"])
def test_a_gate_learns_to_trust_the_modality_that_is_right(name: str) -> None:
    """Modality 0 or 1 carries the target, and a mark in each feature says which: only a gate can use it."""
    torch.manual_seed(0)
    fusion, head = build_fusion(FusionConfig(name=name, hidden=16), 2, D), torch.nn.Linear(D, 1)
    optimizer = torch.optim.Adam([*fusion.parameters(), *head.parameters()], lr=1e-2)

    def draw(count: int) -> tuple[FusionInput, torch.Tensor, torch.Tensor]:
        features = torch.randn(count, 2, D)
        right = torch.randint(0, 2, (count,))
        features[:, :, 0] = 3 * (2 * torch.nn.functional.one_hot(right, 2) - 1)  # the mark
        target = features[torch.arange(count), right, 1]
        return FusionInput(features, torch.ones(count, 2, dtype=torch.bool)), target, right

    for _ in range(200):
        given, target, _ = draw(128)
        loss = (head(result(fusion(given))).squeeze(-1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    given, target, right = draw(512)
    output = fusion(given)
    error = (head(result(output)).squeeze(-1) - target).square().mean()
    assert error < 0.25  # the uniform mean cannot fall below 0.5
    if name != "gmu":  # its channels need not agree, so that their mean says less
        trusted = output.weights[torch.arange(512), right].mean()
        assert trusted > 0.65


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model\.fusion\.name.*'softmux'.*did you mean 'softmax'"):
        build_fusion(FusionConfig(name="softmux"), M, D)


def test_a_fusion_of_logits_is_refused_without_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Average(Fusion):
        needs_logits = True

    monkeypatch.setitem(FUSIONS, "average", Average)
    with pytest.raises(UserError, match="mixes class scores"):
        build_fusion(FusionConfig(name="average"), M, D)
    assert isinstance(build_fusion(FusionConfig(name="average"), M, D, classes=K), Average)
