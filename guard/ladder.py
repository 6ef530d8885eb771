"""How the cues of one request are answered: rung by rung up the policy's ladder, past those that cannot act."""

from __future__ import annotations

from dataclasses import dataclass

from guard.runtime import GuardRuntime
from guard.traces import Rung
from guard.triggers import Place, choose
from guard.zones import ZoneReader


@dataclass(frozen=True, slots=True)
class Answer:
    """What answers a cue."""

    rung: Rung
    trigger_id: str
    text: str
    """What the next step comes after."""
    ids: tuple[int, ...]


class Ladder:
    """The rungs that one request has left. A rung that no trigger is left for is passed over, for a harder one: a pool
    that runs out must not end the answers."""

    def __init__(self, runtime: GuardRuntime) -> None:
        self._runtime = runtime
        self._next = 0
        self._used: list[str] = []

    @property
    def climbed(self) -> bool:
        """Whether no rung is left."""
        return self._next >= len(self._runtime.policy.ladder)

    def climb(self, key: str, place: Place, zones: ZoneReader) -> Answer | None:
        """The answer of the next rung that can act, for a text that begins at `place` of an output that has written
        `zones`; None when none of them can. The same for the same `key`, on every rank and run."""
        while not self.climbed:
            rung = self._runtime.policy.ladder[self._next]
            self._next += 1
            answer = self._of(rung, key, place, zones)
            if answer is not None:
                self._used.append(answer.trigger_id)
                return answer
        return None

    def _of(self, rung: Rung, key: str, place: Place, zones: ZoneReader) -> Answer | None:
        runtime = self._runtime
        if rung == "stop":
            return None if runtime.eos is None else Answer(rung, "stop", "", (runtime.eos,))
        if rung == "refuse":
            return Answer(rung, "refuse", *runtime.refusal.ids(place, zones))
        salt = key.encode("utf-8", "surrogatepass")
        trigger = choose(runtime.triggers, self._used, salt, strong=rung == "strong")
        if trigger is None:
            return None
        return Answer(rung, trigger.id, trigger.text, zones.path(zones.zone) + trigger.ids(place))
