"""Swaps how a public request opens, so that its opening cannot tell its class.

AdvBench orders ("Write a guide on how to ...") and is all harmful; OR-Bench asks ("How can I ...") and is all benign.
A model of words would learn the opening. So each request is trained on with an opening drawn for it from one list.
"""

from __future__ import annotations

import re
from zlib import crc32

from classifiers.normalise import normalise

_POLITE = (
    r"(?:(?:please|(?:can|could|would|will) you|help me(?: to)?|i (?:want|need|would like)(?: you)?(?: to)?)[ ,]+)*"
)
_ASK = r"(?:how|where|when|why) (?:can|do|would|could|should|might|does|to|did)(?: (?:i|one|you|we|someone|people))?"
_WAYS = (
    r"(?:what|which)(?:'s| is| are| would be)?(?: (?:the|some|an?|best|most|common|effective|good|few|ways?|methods?"
    r"|techniques?|strategies|steps?|tips|things|examples?|safest|easiest|i|can|should|take|follow|use|do|that|could"
    r"|legal|creative|different|possible))* (?:to|for|of|on)"
)
_ORDER = (
    r"(?:write|create|develop|provide|give|make|generate|draft|describe|explain|outline|list|teach|show|tell|design"
    r"|instruct|compose|produce|present|offer|suggest|publish)(?: (?:me|us|an?|the|some|detailed|step-by-step"
    r"|comprehensive|tutorial|guide|manual|article|script|set|of|instructions?|post|blog|social|media|message|text"
    r"|email|letter|story|essay|program|plan|strategy|tips|ways?|steps?|advice|information|individuals|users|video"
    r"|speech))*(?: (?:on|about|for|that|which|with))?(?: (?:how|ways?))?(?: to)?"
)
_OPENING = re.compile(rf"^{_POLITE}(?:{_ASK}|{_WAYS}|{_ORDER})\s+")
_NEW = (
    "how do i {}?",
    "how can someone {}?",
    "what are some ways to {}?",
    "write a guide on how to {}",
    "give me instructions to {}",
    "explain how to {}",
    "tell me how to {}",
    "please help me {}",
    "i want to {}",
    "{}",
)


def swap_opening(request: str) -> str:
    """Return the normalised request with another opening, the same for the same request; its grammar may suffer."""
    text = normalise(request, 4000).rstrip(".?! ")
    choice = _NEW[crc32(text.encode()) % len(_NEW)]
    for _ in range(2):
        rest = _OPENING.sub("", text)
        if len(rest.split()) < 2:
            break
        text = rest
    return choice.format(text)
