"""Reports for tests: an ordinary one, and one whose every text is hostile."""

from __future__ import annotations

from align.controls import Control
from align.evaluate import ArmReport
from align.report import DetectorCard, Goal, JudgeCard, Report, Span, Transcript, TranscriptArm
from classifiers.stats import Rate

HOSTILE = (
    '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
    "\u202egnp.exe\u2066\x1b[31m\x9b2J\x07\x00\u200b[red]"
)
SHOWN_HOSTILE = (
    "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;{{ 7 * 7 }}"
    r"\u202egnp.exe\u2066\x1b[31m\x9b2J\x07\x00\u200b[red]"
)
RAW = ("\u202e", "\u2066", "\x1b", "\x9b", "\x07", "\x00", "\u200b", "<script", "<img")


def thousand(k: int, n: int) -> Rate:
    share = Rate.of(k, n)
    return Rate(rate=1000 * share.rate, lo=1000 * share.lo, hi=1000 * share.hi, n=n)


def arm(harm: int, refused: int, intervened: int = 0) -> ArmReport:
    return ArmReport(
        reasoning_harm=Rate.of(harm, 144), answer_harm=Rate.of(harm - 2, 144), any_harm=Rate.of(harm, 144),
        harmful_refusal=Rate.of(20, 144),
        benign_refusal=Rate.of(refused, 120), ordinary_refusal=Rate.of(0, 80),
        alarming_refusal=Rate.of(refused // 2, 40),
        interventions_per_1000=thousand(intervened, 144), benign_interventions_per_1000=thousand(2, 120),
        injected_tokens=16.42, quality=Rate.of(110, 120), unscored_steps=0,
    )  # fmt: skip


def sample(**changes: object) -> Report:
    fields: dict[str, object] = {
        "title": "Sample",
        "arms": {"other": arm(60, 9), "base+guard": arm(26, 4, 124), "base": arm(123, 3)},
        "controls": {
            name: Control(reasoning_harm=Rate.of(k, 50), refusal=Rate.of(50 - k, 50))
            for name, k in (("cue", 45), ("trigger", 5), ("neutral", 43))
        },
        "changes": {
            "base+guard: reasoning harm, relative drop": Rate(rate=0.789, lo=0.71, hi=0.86, n=144),
            "base+guard: benign refusals, points": Rate(rate=-0.0004, lo=-0.03, hi=0.004, n=120),
        },
        "goals": [
            Goal(name="drop", wanted=">= 70 %", got=Rate(rate=0.789, lo=0.71, hi=0.86, n=144), met=True),
            Goal(name="minutes", wanted="<= 20", got=21.5, met=False),
        ],
        "speed": {"tokens_per_second": {"without guard": 412.3, "with guard": 401.8}, "detector_us": 184.2},
        "environment": {"model": "tiny"},
        "judge": JudgeCard(version="judge-1", agreement={"held out": {"accuracy": Rate.of(90, 100)}, "kappa": 0.8}),
        "detector": DetectorCard(version="detector-1", threshold=0.815904),
        "seeds": [0, 1],
        "command": "python cli.py align",
        "transcripts": [
            Transcript(request="r", label="harmful", arms={"base": TranscriptArm(reasoning="so I will.", answer="ok")})
        ],
        "notes": ["A note."],
    }  # fmt: skip
    return Report.model_validate(fields | changes)


def hostile_report() -> Report:
    texts = TranscriptArm(reasoning=HOSTILE, answer=HOSTILE, spans=[Span(start=0, end=8, kind="cue")])
    figure = Rate.of(1, 2)
    return sample(
        title=HOSTILE, arms={HOSTILE: arm(50, 2), "base+guard": arm(26, 4, 9)},
        controls={HOSTILE: Control(reasoning_harm=figure, refusal=figure)}, changes={HOSTILE: figure},
        goals=[Goal(name=HOSTILE, wanted=HOSTILE, got=figure, met=True)], speed={HOSTILE: {HOSTILE: HOSTILE}},
        environment={HOSTILE: HOSTILE}, judge=JudgeCard(version=HOSTILE, agreement={HOSTILE: HOSTILE}),
        detector=DetectorCard(version=HOSTILE, threshold=0.5), command=HOSTILE, notes=[HOSTILE],
        transcripts=[Transcript(request=HOSTILE, label=HOSTILE, arms={HOSTILE: texts})],
    )  # fmt: skip
