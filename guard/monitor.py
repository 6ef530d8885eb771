"""One request's state machine: observe token ids, ask for a score, say what must come next.

`StepMonitor` is pure over token ids: no clock, no I/O, no engine. Whoever drives it (a logits processor, the sidecar,
a replay) feeds every appended id in order:

    monitor.observe(token_id)
    if monitor.pending is not None:            # a step just ended
        monitor.decide(score_of(monitor.pending))
    monitor.forced                             # the id that must come next, or None

The same tokens give the same interventions however they were split into engine steps, so state can always be rebuilt
by observing the history again (preemption, slot reuse).
"""

from __future__ import annotations

from collections.abc import Sequence

from classifiers.readable import unreadable
from guard.ladder import Ladder
from guard.policy import Policy
from guard.runtime import GuardRuntime
from guard.steps import Step, StepSplitter, Zone
from guard.traces import Intervention, Mode, Receipt, StepRecord
from guard.triggers import Place
from guard.zones import ZoneReader

#: Context of a trigger choice: policy, request and position, so that ranks agree and requests differ.
_KEY = "{policy}\x00{request}\x00{step}"
_MAX_ERRORS = 8
_UNWATCHED_ROOM = 4096
#: How a trigger begins that is a zone's first text.
_FIRST: dict[Zone, Place] = {"reasoning": "plain", "answer": "opening"}


class StepMonitor:
    """Watches one request. Not thread-safe; never raises on any token sequence."""

    def __init__(
        self,
        runtime: GuardRuntime,
        request: str,
        *,
        zones: ZoneReader,
        guard_id: str = "",
        engine: str = "replay",
        mode: Mode = "inject",
    ) -> None:
        """`zones` has read the prompt; from here on it is the monitor's own."""
        policy = runtime.policy
        self._replaces = mode == "substitute"
        self._held: list[int] = []
        """Under `substitute`: the ids from output index `_count - len(_held)` on, none of which was decided."""
        self._origin = zones
        """Under `substitute`: where the first of the held ids found the zones."""
        self._lead: Place = "plain"
        """How a trigger begins that stands where the step under way does."""
        self._runtime = runtime
        self._request = request
        self._zones = zones
        self._splitter = StepSplitter(runtime.table, policy.limits)
        self._ladder = Ladder(runtime)
        self._count = 0
        self._plan: tuple[int, ...] = ()
        self._answer = ""
        self._done = 0
        self._plan_zone: Zone = zones.zone
        self._opening = False
        self._ended = False
        self._marks = zones.grammar.marks
        self._enter()
        self.outvoted = False
        """Whether the engine appended something else where an id was forced."""
        self.pending: Step | None = None
        """The step that waits for `decide`; nothing may be observed until then."""
        self.previous = ""
        """Text of the last finished step, an injected trigger included: what `pending` came after."""
        self.steps: list[StepRecord] = []
        self._seen = self._scored = self._unreadable = 0
        self._receipt = Receipt(
            guard_id=guard_id, policy=policy.name, policy_hash=policy.hash, detector=runtime.detector.version,
            engine=engine, shadow=policy.shadow,
        )  # fmt: skip

    @property
    def policy(self) -> Policy:
        """The policy in force for this request."""
        return self._runtime.policy

    @property
    def receipt(self) -> Receipt:
        """What the guard did so far."""
        # Counted apart: an assignment to a model's field takes 1 us, and every step makes three.
        receipt = self._receipt
        receipt.seen, receipt.scored, receipt.unscored = self._seen, self._scored, self._seen - self._scored
        receipt.unreadable = self._unreadable
        return receipt

    @property
    def request(self) -> str:
        """What the user asked: the steps' context."""
        return self._request

    @property
    def forced(self) -> int | None:
        """The id that the engine must append next, or None when the model is free."""
        return self._plan[self._done] if self._done < len(self._plan) else None

    @property
    def planned(self) -> tuple[int, ...]:
        """All ids that the engine must append from here on; the first is `forced`."""
        return self._plan[self._done :]

    def observe(self, token: int) -> None:
        """Takes the next id the engine appended; afterwards `pending` may hold a finished step."""
        index = self._count
        self._count = index + 1
        if self._plan and self._confirm(token):
            return
        if self._replaces:
            self._hold(token)
        if (self._heading or token in self._marks) and self._crosses(token, index):
            return
        if self._watched:
            step = self._splitter.push(token, index)
            if step is not None:
                self.pending = step

    @property
    def room(self) -> int:
        """How many quiet ids (`GuardRuntime.loud` is 0) may be left aside before they must be taken."""
        if self._plan or self._replaces or self._heading:
            return 0
        return self._splitter.room if self._watched else _UNWATCHED_ROOM

    def pass_quiet(self, tokens: Sequence[int]) -> None:
        """Takes up to `room` quiet ids at once: what observing each would do."""
        if self._watched and tokens:
            self._splitter.extend(tokens, self._count)
        self._count += len(tokens)

    def pass_over(self, forced: Sequence[int]) -> None:
        """Counts tokens that another policy's decision forced (a replay): no step, but zones as ever, and their first
        text is what the next step came after."""
        self.previous = self._runtime.table.text(self._zones.skim(forced)).strip()
        self._count += len(forced)
        self._splitter.drop()
        self._enter()

    @property
    def settled(self) -> int:
        """Output index up to which every id is decided: under `substitute`, what may be shown."""
        if self.pending is not None:
            return self.pending.start
        return self._count - self._splitter.count

    def decide(self, score: float | None) -> int | None:
        """Answers `pending`: a probability, or None when the step could not be scored (NaN counts as None).

        Under `substitute`, the output index from which a cue has to be taken back before `forced` is appended.
        """
        step, self.pending = self.pending, None
        if step is None:
            return None
        self.previous = step.text
        if score is not None and not 0.0 <= score <= 1.0:
            score = None
        opening, self._opening = self._opening, False
        policy = self._runtime.policy
        self._seen += 1
        if score is not None:
            self._scored += 1
        hidden = unreadable(step.text)
        self._unreadable += hidden
        cue = policy.is_cue(score, threshold=self._runtime.threshold, unreadable=hidden)
        self.steps.append(StepRecord(step.start, step.end, step.zone, score, cue, False, hidden))
        if cue and not (policy.shadow or self._ended or self._ladder.climbed):
            return self._intervene(step, score, opening)
        self._lead = _FIRST[self._zone] if opening else "plain" if step.spaced else "spaced"
        return None

    def end_step(self) -> None:
        """The model has stopped, but may be made to go on: the unfinished step becomes `pending`."""
        self._flush()

    def finish(self) -> None:
        """The request has ended: the unfinished step becomes `pending` one last time; nothing is forced any more."""
        self._ended = True
        if self._plan:
            self._end_plan(completed=False)
        self._flush()

    def abandon(self, reason: str) -> None:
        """Gives up the running intervention because the next id cannot be forced (a grammar forbids it, say)."""
        self._receipt.enforcement_failed += 1
        self.fail(reason)
        if self._plan:
            self._end_plan(completed=False)

    def fail(self, reason: str) -> None:
        """Records an error inside the guard on the receipt (bounded: a hot failure cannot fill memory)."""
        if len(self._receipt.errors) < _MAX_ERRORS:
            self._receipt.errors.append(reason[:200])

    def _crosses(self, token: int, index: int) -> bool:
        """Whether an id belongs to the grammar; one that does not is text like any other."""
        if not self._zones.feed(token):
            self._enter()
            return False
        if not self._heading:
            self._flush()
            self._opening = self.pending is not None
        elif self._zones.state != "header":
            self._splitter.drop()
        elif self._watched:
            self._splitter.hold(token, index)
        self._enter()
        if self.pending is None:
            self._lead = _FIRST[self._zone]
        return True

    def _hold(self, token: int) -> None:
        if not self._splitter.count:
            self._held, self._origin = [], self._zones.copy()
        self._held.append(token)

    def _enter(self) -> None:
        zones = self._zones
        self._zone: Zone = zones.zone
        self._splitter.zone = self._zone
        self._heading = zones.state == "header"
        self._watched = self._zone in self._runtime.policy.zones

    def _confirm(self, token: int) -> bool:
        """Checks a planned id against what the engine appended; False: the plan is broken, treat it as free text."""
        if token != self._plan[self._done]:
            self.outvoted = True
            self.abandon(f"engine appended {token} where {self._plan[self._done]} was forced")
            return False
        self._done += 1
        if self._heading or token in self._marks:
            self._zones.feed(token)
            self._enter()
        self._receipt.injected_tokens += 1
        self._receipt.interventions[-1].forced += 1
        if self._done == len(self._plan):
            self._end_plan(completed=True)
        return True

    def _intervene(self, step: Step, score: float | None, opening: bool) -> int | None:
        interventions = self._receipt.interventions
        zones = self._origin if self._replaces else self._zones
        zone = zones.zone
        # A step that a mark closed is answered where the next text opens: behind `</think>`, say, or in a new message.
        if zones.path(zone) or (opening and not self._replaces):
            place = _FIRST[zone]
        else:
            place = self._lead if self._replaces else "plain" if step.spaced else "spaced"
        # Counted alike in both modes, so that both choose the same trigger.
        count = self._seen + len(interventions)
        key = _KEY.format(policy=self._receipt.policy_hash, request=self._request, step=count)
        answer = self._ladder.climb(key, place, zones)
        if answer is None:
            return None
        self._answer, self._plan, self._done = answer.text, answer.ids, 0
        self._splitter.forget()
        cue_ids = self._take_back(step) if self._replaces else []
        self._plan_zone = zone
        interventions.append(
            Intervention(
                step=len(self.steps) - (0 if cue_ids else 1), at=self._count, trigger_id=answer.trigger_id,
                rung=answer.rung, mode="substitute" if cue_ids else "inject", cue_ids=cue_ids, score=score,
            )
        )  # fmt: skip
        return self._count if cue_ids else None

    def _take_back(self, step: Step) -> list[int]:
        """The output ends where the cue began; returns the cue's ids."""
        taken = self._held[step.start - self._count :]
        self._count, self._held, self._zones = step.start, [], self._origin
        self.steps.pop()
        self._enter()
        return taken

    def _end_plan(self, *, completed: bool) -> None:
        intervention = self._receipt.interventions[-1]
        intervention.completed = completed
        self._lead = "spaced"
        if completed:
            self.previous = self._answer
        if intervention.forced:
            end = intervention.at + intervention.forced
            self.steps.append(
                StepRecord(start=intervention.at, end=end, zone=self._plan_zone, score=None, cue=False, injected=True)
            )
        self._plan, self._done = (), 0

    def _flush(self) -> None:
        step = self._splitter.flush()
        if step is not None:
            self.pending = step
