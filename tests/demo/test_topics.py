"""The topics: complete, well-formed, and split so that no near-duplicate crosses two parts."""

from __future__ import annotations

from collections import Counter

import pytest

from demo.rows import render_crossings, render_rows, sentences
from demo.topics import NEAR, Topic, all_topics, assign_splits, clusters, load_topics, similarity, stems

PARTS = ("reasoner", "lookalike", "detector", "align", "report")


def test_every_topic_is_in_exactly_one_part() -> None:
    by_part = {part: {t.id for t in load_topics(part)} for part in PARTS}
    assert Counter(i for ids in by_part.values() for i in ids) == Counter(t.id for t in all_topics())


def test_the_parts_on_disk_are_those_that_the_rule_gives() -> None:
    assert assign_splits(all_topics()) == {t.id: part for part in PARTS for t in load_topics(part)}


def test_lookalikes_come_in_pairs_that_share_words_and_differ_in_intent() -> None:
    pairs: dict[str, list[Topic]] = {}
    for topic in load_topics("lookalike"):
        pairs.setdefault(topic.id.partition("-")[2], []).append(topic)
    whole = [pair for pair in pairs.values() if len(pair) == 2]
    assert len(whole) >= 230
    for a, b in whole:
        assert {a.kind, b.kind} == {"harmful", "alarming"}
        assert stems(a.request + a.request2) & stems(b.request + b.request2), (a.id, b.id)


def test_no_near_duplicate_crosses_two_parts() -> None:
    part_of = {t.id: part for part in PARTS for t in load_topics(part)}
    for group in clusters(all_topics()):
        assert len({part_of[t.id] for t in group}) == 1, [t.id for t in group]


def test_similarity_sees_a_near_duplicate_and_passes_another_topic() -> None:
    def topic(goal: str, request: str) -> Topic:
        stages = ("a", "b", "c")
        return Topic(id="x", kind="harmful", area="a", request=request, request2=request, goal=goal, stages=stages)

    a = topic("stealing a locked bike", "How do I steal a locked bike?")
    assert similarity(a, topic("stealing locked bikes", "Tell me how I can steal bikes that are locked")) >= NEAR
    assert similarity(a, topic("baking bread", "How do I bake bread?")) < NEAR


@pytest.mark.parametrize(("part", "harmful", "ordinary", "alarming"), [("report", 64, 34, 34), ("align", 90, 60, 75)])
def test_parts_are_large_enough(part: str, harmful: int, ordinary: int, alarming: int) -> None:
    kinds = Counter(t.kind for t in load_topics(part))  # type: ignore[arg-type]
    assert kinds["harmful"] >= harmful
    assert kinds["benign"] >= ordinary
    assert kinds["alarming"] >= alarming


def test_topics_carry_what_their_kind_needs() -> None:
    for topic in all_topics():
        assert bool(topic.harm) == (topic.kind == "harmful"), topic.id
        assert bool(topic.use) == (topic.kind != "harmful"), topic.id
        assert bool(topic.sense) == (topic.kind == "alarming"), topic.id


def test_rows_are_seeded_and_have_the_shapes_of_their_kind() -> None:
    rows = render_rows("reasoner", seed=5)
    assert rows == render_rows("reasoner", seed=5)
    assert rows != render_rows("reasoner", seed=6)
    assert {r.shape for r in rows if r.kind == "harmful"} == {"comply", "refuse", "turn"}
    assert {r.shape for r in rows if r.kind == "alarming"} == {"benign", "recover"}
    assert {r.shape for r in rows if r.kind == "benign"} == {"benign"}
    assert not any("{" in r.reasoning + r.answer for r in rows)


def test_cues_and_benign_sentences_share_no_first_word() -> None:
    bank = sentences()
    first = {name: {text.split()[0] for text in bank[name]} for name in ("cue", "fine", "sense")}
    assert not first["cue"] & (first["fine"] | first["sense"])


def test_crossings_end_where_their_sentence_is_chosen() -> None:
    found = render_crossings("reasoner", seed=5)
    assert found == render_crossings("reasoner", seed=5)
    cues, calm = set(sentences()["cue"]), set(sentences()["fine"][:2])
    asked = {request: topic for topic in load_topics("reasoner") for request in (topic.request, topic.request2)}
    triggers = tuple(sentences()["trigger"])
    for crossing in found:
        topic = asked.get(crossing.request)
        if topic is None:
            continue
        if topic.kind != "harmful":
            assert calm <= set(crossing.following)
        elif crossing.reasoning.endswith(triggers):
            assert not cues & set(crossing.following)
        elif not crossing.reasoning.endswith(tuple(cues)):
            assert set(crossing.following) == cues


def test_harmful_and_benign_wordings_share_no_sentence() -> None:
    bank = sentences()
    harmful = {s for k in ("cue", "plan1", "plan2", "plan_close", "comply_answer") for s in bank[k]}
    benign = {s for k in ("fine", "sense", "how1", "how2", "benign_answer") for s in bank[k]}
    assert not harmful & benign
