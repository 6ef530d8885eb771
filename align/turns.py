"""Benign pairs once more, behind other benign exchanges.

Logged traffic is mostly single turns, and a model trained on those alone forgets how to close its reasoning behind
earlier turns: the demo model left out `</think>` in 109 of 240 tasks that stand behind solved ones (39 before
training), and in 41 with half of its benign pairs behind others (docs/design/0015).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from align.model import render, render_chat
from align.pairs import Pair, request_key
from align.text import ReplyReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: So many exchanges may stand before a request.
EXCHANGES = (1, 2)


@dataclass(frozen=True)
class Turns:
    """Renders conversations of one model."""

    tokenizer: PreTrainedTokenizerBase
    reader: ReplyReader

    def added(self, pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
        """The pairs in their order, each of a `share` of the benign ones followed by itself with other benign exchanges
        before it in the prompt, as the model's chat template writes earlier turns (it may leave out their reasoning).

        Not asked again: pairs whose prompt is more than one user's turn. Only replies that their model ended stand
        before others.
        """
        alone = [p for p in pairs if p.kind == "benign" and p.prompt_ids == render(self.tokenizer, p.request)]
        before = [p for p in alone if p.chosen_ids[-1] == self.tokenizer.eos_token_id]
        rng = random.Random(f"turns-{seed}")
        again = {}
        for pair in rng.sample(alone, min(len(alone), round(share * sum(p.kind == "benign" for p in pairs)))):
            others = [p for p in before if request_key(p.request) != request_key(pair.request)]
            earlier = rng.sample(others, min(len(others), rng.choice(EXCHANGES)))
            if earlier:
                again[pair.id] = pair.model_copy(update={"prompt_ids": self._rendered(earlier, pair.request)})
        return [each for pair in pairs for each in (pair, again.get(pair.id)) if each is not None]

    def _rendered(self, earlier: Sequence[Pair], request: str) -> list[int]:
        messages = []
        for pair in earlier:
            messages.append({"role": "user", "content": pair.request})
            messages.append({"role": "assistant", "content": self._reply(pair)})
        return render_chat(self.tokenizer, [*messages, {"role": "user", "content": request}])

    def _reply(self, pair: Pair) -> str:
        """All that the model wrote, with what its prompt opened the reasoning with, without the end of its turn."""
        start, prompt = self.reader.grammar.paths.get(("answer", "reasoning"), ()), pair.prompt_ids
        at = max((i for i, token in enumerate(prompt) if (token,) == start), default=len(prompt))
        opened = [] if self.reader.table.text(prompt[at + 1 :]).strip() else prompt[at:]
        return str(self.tokenizer.decode([*opened, *pair.prefix_ids, *pair.chosen_ids[:-1]]))
