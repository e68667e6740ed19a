"""The twelve actions, and which modality tells confusable ones apart.

========================  =====================  ==========================================================
alike                     in                     told apart by
========================  =====================  ==========================================================
punch, feint              rgb, flow              audio: the impact; depth a little: the gap seen along the axis
clap, wave                rgb, flow, depth       audio: palms that meet are heard
grapple, hug, dance       rgb, depth (stills)    flow: jerky, hardly moving, turning; audio: cloth, voice, steps
shove, handshake          rgb, depth (stills)    flow: thrown apart or bobbing; audio: thump or slap
advance, retreat          rgb, flow, audio       depth: nearer or farther; flow a little: expansion
punch, kick, shove        audio: the same thud   rgb, flow
dance, advance, retreat   audio: the same steps  rgb, depth
hug, handshake, grapple   audio: cloth, voices   rgb, flow
========================  =====================  ==========================================================

Depth has no measurement on the edges of bodies, as a real sensor has none, so it hardly sees hands; rgb does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from crossgate.clips.synth import duo, solo
from crossgate.clips.synth.motion import Cast, Performance


@dataclass(frozen=True)
class Action:
    """One class: its choreography, and whether it is a fight."""

    name: str
    perform: Callable[[Cast], Performance]
    pair: bool
    fight: bool = False

    @property
    def violence(self) -> str:
        """The second label."""
        return "fight" if self.fight else "nofight"


# Neighbours (0 and 1, 2 and 3, ...) always come in the same group: one scene shows both of a confusable pair.
ACTIONS: tuple[Action, ...] = (
    Action("punch", duo.punch, pair=True, fight=True),
    Action("feint", duo.feint, pair=True),
    Action("shove", duo.shove, pair=True, fight=True),
    Action("handshake", duo.handshake, pair=True),
    Action("grapple", duo.grapple, pair=True, fight=True),
    Action("hug", duo.hug, pair=True),
    Action("kick", duo.kick, pair=True, fight=True),
    Action("dance", duo.dance, pair=True),
    Action("clap", solo.clap, pair=False),
    Action("wave", solo.wave, pair=False),
    Action("advance", solo.advance, pair=False),
    Action("retreat", solo.retreat, pair=False),
)
