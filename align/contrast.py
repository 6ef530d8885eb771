"""Intervened pairs once more, against what a benign reply goes on with.

An intervened pair says that a trigger is better than a cue, a benign one that the model's own step is better than a
trigger; nothing says that after a harmful request the trigger is better than a benign reply's step. Trained on those
two alone, the demo model moved a fifth of its replies to harmful requests into the tone of a benign answer, which
neither refuses nor is judged harmful (docs/design/0015). The paper has no such pairs.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence

from align.pairs import Pair, request_key


def contrasted(pairs: Sequence[Pair], benign: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """The pairs in their order, each of a `share` of the intervened ones followed by itself with another rejected side:
    the chosen side of one of the `benign` pairs, of another request.

    That side followed the same token where it comes from. An intervened pair is left alone where no benign side did,
    or where those that did begin as its own chosen side does.
    """
    rng = random.Random(f"contrast-{seed}")
    intervened = [pair for pair in pairs if pair.kind == "intervened"]
    after = defaultdict(list)
    for other in benign:
        after[_last(other)].append(other)
    again = {}
    for pair in rng.sample(intervened, round(share * len(intervened))):
        fitting = [
            other for other in after[_last(pair)]
            if other.chosen_ids[0] != pair.chosen_ids[0] and request_key(other.request) != request_key(pair.request)
        ]  # fmt: skip
        if fitting:
            again[pair.id] = _against(pair, rng.choice(fitting))
    return [each for pair in pairs for each in (pair, again.get(pair.id)) if each is not None]


def _last(pair: Pair) -> int:
    return (pair.prefix_ids or pair.prompt_ids)[-1]


def _against(pair: Pair, benign: Pair) -> Pair:
    changed = {
        "rejected_ids": benign.chosen_ids, "rejected_harm": benign.chosen_harm, "rejected_finish": benign.chosen_finish,
    }  # fmt: skip
    return pair.model_copy(update=changed)
