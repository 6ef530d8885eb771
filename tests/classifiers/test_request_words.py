"""The word list of the judge."""

from __future__ import annotations

import pytest

from classifiers.request_words import word_requests
from demo.topics import Split, load_topics, stems


@pytest.mark.parametrize("part", ["align", "report", "reasoner"])
def test_no_phrase_of_the_word_list_names_another_parts_topic(part: Split) -> None:
    named = []
    for phrase in (row.request for row in word_requests()):
        parts = stems(phrase)
        if len(parts) > 1:
            named += [(phrase, topic.id) for topic in load_topics(part) if parts <= stems(topic.goal)]
    assert named == []
