"""What every registered fusion promises. A new fusion is tested by being registered."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from crossgate.config import FusionConfig
from crossgate.errors import UserError
from crossgate.model.fusion import FUSIONS, Fusion, FusionInput, FusionOutput, build_fusion
from crossgate.model.fusion.concat import ConcatFusion

B, M, D, K = 12, 4, 16, 3
NAMES = sorted(FUSIONS)
OF_SCORES = {name for name in NAMES if FUSIONS[name].needs_logits}
OF_CHANNELS = {"context", "film", "kiela", "flow_gate"}
WITHOUT_WEIGHTS = {"concat", "lowrank", "bottleneck"} | OF_CHANNELS
WITHOUT_PARAMETERS = {
    f"{how}_{what}" for how in ("average", "fixed", "entropy") for what in ("logits", "probabilities")
}


def build(name: str, modalities: int = M) -> Fusion:
    torch.manual_seed(0)
    return build_fusion(FusionConfig(name=name, hidden=8), modalities, D, classes=K)


def clips(seed: int = 1, modalities: int = M) -> FusionInput:
    """A clip with everything, one with nothing, one with the last but one only, and others at random."""
    draw = torch.Generator().manual_seed(seed)
    present = torch.rand(B, modalities, generator=draw) > 0.4
    present[0], present[1] = True, False
    present[2] = torch.arange(modalities) == modalities - 2
    features = torch.randn(B, modalities, D, generator=draw).masked_fill(~present.unsqueeze(-1), 0)
    return FusionInput(features, present, torch.randn(B, modalities, K, generator=draw))


def result(output: FusionOutput) -> torch.Tensor:
    value = output.logits if output.embedding is None else output.embedding
    assert value is not None
    return value


@pytest.mark.parametrize("modalities", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name: str, modalities: int) -> None:
    fusion = build(name, modalities)
    value = result(fusion(clips(modalities=modalities)))
    assert value.shape == (B, K if name in OF_SCORES else D)
    assert (not list(fusion.parameters())) == (name in WITHOUT_PARAMETERS)
    if name in WITHOUT_PARAMETERS:
        return
    (value * torch.randn(value.shape[1])).sum().backward()
    dead = [key for key, p in fusion.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead


@pytest.mark.parametrize("name", NAMES)
def test_a_fusion_is_registered_as_what_it_is(name: str) -> None:
    """An average weighs all modalities alike, a fusion all clips alike or nothing, a gate each clip's modalities."""
    fusion, given = build(name), clips()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    weights = fusion(replace(given, present=torch.ones_like(given.present))).weights
    if weights is None:
        found = "gate" if name in OF_CHANNELS else "fusion"
    elif not torch.equal(weights, weights[:1].expand_as(weights)):
        found = "gate"
    elif name.startswith("fixed"):  # it weighs alike here, for want of weights in the recipe
        found = "fusion"
    else:
        found = "average" if torch.equal(weights, torch.full_like(weights, 1 / M)) else "fusion"
    assert fusion.kind == found


@pytest.mark.parametrize("name", NAMES)
def test_weights_sum_to_one_over_what_is_present(name: str) -> None:
    given = clips()
    weights = build(name)(given).weights
    if weights is None:
        assert name in WITHOUT_WEIGHTS
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
    assert given.logits is not None
    source = (given.logits if name in OF_SCORES else given.features).requires_grad_()
    output = result(build(name)(given))
    assert output.isfinite().all()
    (gradient,) = torch.autograd.grad(output.square().sum(), source)
    assert gradient.isfinite().all()
    # the zeros of absent modalities may enter a gate as context; through the network they carry no gradient
    assert gradient[given.present].abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_sure_scores_stay_finite(name: str) -> None:
    """Logits of a head that is as sure as bf16 can say, right or wrong."""
    fusion, given = build(name), clips()
    given.logits = (1e4 * torch.randn(B, M, K)).requires_grad_()
    given.features.requires_grad_()
    output = result(fusion(given))
    assert output.isfinite().all()
    torch.nn.functional.cross_entropy(output, torch.zeros(B, dtype=torch.int64)).backward()
    gradients = [p.grad for p in [*fusion.parameters(), given.logits, given.features] if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


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
    assert result(low).isfinite().all()
    alike = torch.ones(B, dtype=torch.bool)
    if low.weights is not None:
        assert low.weights.dtype == torch.float32
        alike = (low.weights - fusion(given).weights).abs().amax(1) < 0.05  # a hard choice may fall otherwise
        assert alike.all() or (name == "sparse" and alike.sum() > B / 2)
    torch.testing.assert_close(result(low).float()[alike], exact[alike], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_under_autocast_weights_are_exact(name: str) -> None:
    fusion, given = build(name), clips()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fusion(given)
    assert result(output).isfinite().all()
    if output.weights is not None:
        assert output.weights.dtype == torch.float32
        torch.testing.assert_close(output.weights.sum(1), given.present.any(1).float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    fusion, given = build(name).eval(), clips()
    with torch.no_grad():
        for parameter in fusion.parameters():
            parameter.add_(torch.randn_like(parameter))
    save_file(fusion.state_dict(), tmp_path / "fusion.safetensors")
    again = build(name).eval()
    again.load_state_dict(load_file(tmp_path / "fusion.safetensors"))
    assert torch.equal(result(again(given)), result(fusion(given)))


def removed(full: Fusion, small: Fusion, count: int) -> None:
    """Gives a fusion of `count` modalities the parameters of one of M, less what belongs to the last ones.

    An axis that differs is M blocks, one a modality.
    """
    state, kept = full.state_dict(), {}
    for key, own in small.state_dict().items():
        tensor = state[key]
        for axis, size in enumerate(own.shape):
            if tensor.shape[axis] != size:
                assert tensor.shape[axis] * count == size * M, key
                tensor = tensor.narrow(axis, 0, size)
        kept[key] = tensor
    small.load_state_dict(kept)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_an_absent_modality_equals_a_removed_one(name: str, count: int) -> None:
    """A fusion of all modalities, the last ones absent, gives what a fusion without them gives."""
    full, small = build(name).eval().double(), build(name, modalities=count).eval().double()
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    removed(full, small, count)
    if isinstance(full, ConcatFusion) and isinstance(small, ConcatFusion):  # its missing tokens become its bias
        tokens = full.missing[count:].flatten()
        with torch.no_grad():
            small.join.bias += full.join.weight[:, count * D :] @ tokens
    given = clips()
    assert given.logits is not None
    present, features, logits = given.present, given.features.double(), given.logits.double()
    present[:, count:] = False
    features[:, count:] = 0
    a = full(FusionInput(features, present, logits))
    b = small(FusionInput(features[:, :count], present[:, :count], logits[:, :count]))
    torch.testing.assert_close(result(a), result(b), rtol=1e-9, atol=1e-9)
    if a.weights is not None:
        torch.testing.assert_close(a.weights[:, :count], b.weights, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_modality_alone_gets_all_the_weight(name: str) -> None:
    fusion, given = build(name).eval(), clips()
    given.present = torch.eye(M, dtype=torch.bool).repeat(B // M, 1)
    given.features = torch.randn(B, M, D).masked_fill(~given.present.unsqueeze(-1), 0)
    output = fusion(given)
    assert result(output).isfinite().all()
    if output.weights is not None:
        torch.testing.assert_close(output.weights, given.present.float(), rtol=0, atol=1e-6)
    if name in OF_SCORES:
        assert given.logits is not None
        alone = given.logits[given.present].softmax(-1)
        torch.testing.assert_close(result(output).softmax(-1), alone, rtol=1e-5, atol=1e-6)


def test_gates_start_near_the_uniform_mean() -> None:
    given = clips()
    uniform = build("mean")(given)
    for name in ("softmax", "sigmoid", "static"):
        gate = build(name)(given)
        torch.testing.assert_close(gate.weights, uniform.weights, rtol=0.1, atol=0.05)
        torch.testing.assert_close(gate.embedding, uniform.embedding, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "gmu", "attention", "sparse", "bottleneck"])
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
    if name not in ("gmu", "bottleneck"):  # channels need not agree, so that their mean says less
        trusted = output.weights[torch.arange(512), right].mean()
        assert trusted > 0.65


@pytest.mark.parametrize("name", sorted(OF_SCORES - WITHOUT_PARAMETERS - {"static_logits", "static_probabilities"}))
def test_a_gate_of_scores_learns_to_trust_the_modality_that_is_right(name: str) -> None:
    """One modality's scores are right and moderate, the other's sure and wrong half the time; a mark says which."""
    torch.manual_seed(0)
    fusion = build_fusion(FusionConfig(name=name, hidden=16), 2, D, classes=K)
    optimizer = torch.optim.Adam(fusion.parameters(), lr=1e-2)

    def draw(count: int) -> tuple[FusionInput, Tensor, Tensor]:
        label, right = torch.randint(0, K, (count,)), torch.randint(0, 2, (count,))
        rows = torch.arange(count)
        scores = torch.randn(count, 2, K)
        scores[rows, 1 - right] *= 4
        scores[rows, right] *= 0.3
        scores[rows, right, label] += 2
        features = torch.randn(count, 2, D)
        features[:, :, 0] = 3 * (2 * torch.nn.functional.one_hot(right, 2) - 1)
        return FusionInput(features, torch.ones(count, 2, dtype=torch.bool), scores), label, right

    for _ in range(150):
        given, label, _ = draw(128)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(result(fusion(given)), label).backward()
        optimizer.step()
    given, label, right = draw(512)
    output = fusion(given)
    plain = build("average_" + name.rpartition("_")[2], 2)(given)
    assert (result(output).argmax(1) == label).float().mean() > (result(plain).argmax(1) == label).float().mean() + 0.05
    assert output.weights[torch.arange(512), right].mean() > 0.65


@pytest.mark.parametrize("name", ["entropy_logits", "entropy_probabilities"])
def test_the_entropy_gate_trusts_the_surer_modality_and_pushes_no_head(name: str) -> None:
    given = clips()
    given.present[:] = True
    given.logits = (torch.arange(1.0, M + 1)[:, None] * torch.eye(M)[:, :K]).repeat(B, 1, 1)  # the last: no idea
    given.logits[:, 3] = 0
    given.logits.requires_grad_()
    weights = build(name)(given).weights
    assert (weights[:, :3].diff(dim=1) > 0).all()
    assert (weights[:, 3:] < weights[:, :3]).all()
    assert not weights.requires_grad


def test_fixed_weights_are_the_recipes() -> None:
    given, weights = clips(), (1.0, 1.5, 0.0, 0.0)
    fusion = build_fusion(FusionConfig(name="fixed_logits", weights=weights), M, D, classes=K)
    found = fusion(given).weights
    torch.testing.assert_close(found[0], torch.tensor([0.4, 0.6, 0.0, 0.0]))
    torch.testing.assert_close(found[2], torch.tensor([0.0, 0.0, 1.0, 0.0]))  # better a modality of weight 0 than none
    for wrong in ((1.0, 2.0), (0.0,) * M):
        with pytest.raises(UserError, match=r"model\.fusion\.weights.*cannot weigh 4 modalities"):
            build_fusion(FusionConfig(name="fixed_logits", weights=wrong), M, D, classes=K)


@pytest.mark.parametrize("top", [1, 2, 9])
def test_the_sparse_gate_uses_its_best_modalities_only(top: int) -> None:
    fusion = build_fusion(FusionConfig(name="sparse", hidden=8, top=top), M, D)
    given = clips()
    output = fusion(given)
    counts = given.present.sum(1).clamp(max=top)
    assert torch.equal((output.weights > 0).sum(1), counts)
    chosen = output.weights.detach() > 0
    left_out = given.present & ~chosen
    assert (output.routing.masked_fill(~chosen, 2).amin(1) >= output.routing.masked_fill(~left_out, 0).amax(1)).all()


def test_the_sparse_gate_explores_by_its_draws_while_training_and_only_then() -> None:
    fusion, given = build("sparse"), clips()
    given.features, given.present = given.features[:1].repeat(4000, 1, 1), given.present[:1].repeat(4000, 1)
    with torch.no_grad():
        fusion.scorer.outer.bias.copy_(torch.tensor([1.0, 0.0, 0.0, -1.0]))
    given.draws = torch.rand(4000, M)
    shares = fusion(given).weights.mean(0)
    torch.testing.assert_close(shares, fusion(given).routing[0], atol=0.03, rtol=0)  # Gumbel noise samples the softmax
    assert torch.equal(fusion(given).weights, fusion(given).weights)
    assert torch.equal(fusion.eval()(given).weights.mean(0), torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_a_fusion_made_for_certain_modalities_is_refused_without_them() -> None:
    config = FusionConfig(name="flow_gate")
    with pytest.raises(UserError, match=r"model\.fusion\.name.*made for rgb and flow.*no flow"):
        build_fusion(config, 2, D, names=("rgb", "audio"))
    assert build_fusion(config, 3, D, names=("rgb", "flow", "audio"))


def test_unknown_names_are_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model\.fusion\.name.*'softmux'.*did you mean 'softmax'"):
        build_fusion(FusionConfig(name="softmux"), M, D)


def test_a_fusion_of_logits_is_refused_without_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Average(Fusion):
        needs_logits = True

    monkeypatch.setitem(FUSIONS, "average", Average)
    for name in ["average", *OF_SCORES]:
        with pytest.raises(UserError, match=r"model\.fusion\.name.*mixes class scores, and pretraining has no classes"):
            build_fusion(FusionConfig(name=name), M, D)
    assert isinstance(build_fusion(FusionConfig(name="average"), M, D, classes=K), Average)
