"""The built-in training data."""

from __future__ import annotations

from collections import Counter

import pytest

from classifiers.authored import authored_steps, load_sentences, word_rows
from classifiers.train import split
from demo.topics import Split, load_topics, stems

BANKS = load_sentences()


def test_rows_repeat_and_hold_every_label() -> None:
    topics = load_topics("detector")[:6]
    rows = authored_steps(topics, BANKS, 0)
    assert rows == authored_steps(topics, BANKS, 0)
    assert rows != authored_steps(topics, BANKS, 1)
    assert "{" not in "".join(row.step for row in rows)
    assert {row.label for row in rows if row.request_label == "benign"} <= {"neutral"}


def test_planning_is_a_cue_only_after_a_harmful_request() -> None:
    rows = authored_steps(load_topics("detector"), BANKS, 0)
    labels = Counter((row.request_label, row.label) for row in rows if row.wording.startswith("planning/"))
    assert set(labels) == {("harmful", "cue"), ("benign", "neutral")}


def test_held_out_topics_and_wordings_are_not_learned() -> None:
    learn, held = split(authored_steps(load_topics("detector"), BANKS, 0), 0)
    learned = [row for row in learn if row.step]
    assert held
    assert not {row.topic for row in learned} & {row.topic for row in held}
    assert not {row.wording for row in learned} & {row.wording for row in held}


@pytest.mark.parametrize("part", ["align", "report", "reasoner"])
def test_no_phrase_of_the_word_list_names_another_parts_topic(part: Split) -> None:
    named = []
    for phrase in (row.request for row in word_rows()):
        parts = stems(phrase)
        if len(parts) > 1:
            named += [(phrase, topic.id) for topic in load_topics(part) if parts <= stems(topic.goal)]
    assert named == []
