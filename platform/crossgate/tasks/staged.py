"""Streams first, then the gate alone: what was trained apart becomes one classifier."""

from __future__ import annotations

from crossgate.model.classifier import Classifier
from crossgate.model.network import MultimodalNetwork
from crossgate.tasks.gates import Gate, Heads


def staged(network: MultimodalNetwork, heads: Heads, gate: Gate, classes: tuple[str, ...]) -> Classifier:
    """Returns the classifier that answers as gate and heads do on the network's features.

    Args:
        network: its encoders and how it standardises their features; its own fusion is left behind.
        heads: of the same modalities in the same order.
        gate: trained on scores of such heads.
        classes: in the order of the scores.
    """
    config = network.config.from_scratch().model_copy(update={"fusion": gate.config})
    whole = MultimodalNetwork(config, network.clip, classes=len(classes))
    whole.encoders.load_state_dict(network.encoders.state_dict())
    whole.feature_mean.copy_(network.feature_mean)
    whole.feature_scale.copy_(network.feature_scale)
    whole.fusion.load_state_dict(gate.fusion.state_dict())
    model = Classifier(whole, classes)
    for name, head in zip(network.modalities, heads.each):
        model.unimodal_heads[name].load_state_dict(head.state_dict())
    if model.head is not None and gate.head is not None:
        model.head.load_state_dict(gate.head.state_dict())
    return model.eval()
