"""Traces and prompts as Parquet: round trips on several file systems, and damage told as a sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.sources import Prompt
from align.tables import is_parquet, prompt_table, read_prompts, read_trace_table, trace_table, write_table
from guard.errors import UserError
from guard.parquet import trace_of
from guard.traces import Intervention, LogContent, Spool
from tests.align.kit import trace

ROOT = Path(__file__).parents[2]
TRACES = [trace("a", cue=True, tenant="t", request="Wie? \u2028 漢"), trace("b", cue=False, output_ids=[], steps=[])]


@pytest.mark.parametrize("where", ["{tmp}/new/x.parquet", "file://{tmp}/y.parquet", "memory://z/x.parquet"])
def test_traces_survive_on_any_path(where: str, tmp_path: Path) -> None:
    path = where.format(tmp=tmp_path)
    write_table(trace_table(TRACES), path)
    found, report = read_trace_table(path)
    assert found == TRACES
    assert (report.traces, report.malformed) == (2, 0)
    assert not list(tmp_path.rglob("*.part"))


def test_a_directory_of_files_is_read_whole_and_damaged_rows_are_counted(tmp_path: Path) -> None:
    table = trace_table([*TRACES, trace("c", cue=True)])
    broken = table.set_column(
        table.schema.get_field_index("created"), table.schema.field("created"), [[1.0, None, None]]
    )
    write_table(trace_table([TRACES[0]]), str(tmp_path / "all.parquet" / "1.parquet"))
    write_table(broken, str(tmp_path / "all.parquet" / "2.parquet"))
    found, report = read_trace_table(str(tmp_path / "all.parquet"))
    assert [t.guard_id for t in found] == ["a"]
    assert (report.malformed, report.superseded) == (2, 1)


@given(
    st.lists(
        st.builds(
            Prompt,
            request=st.text(st.characters(codec="utf-8"), min_size=1),
            tenant=st.text(st.characters(codec="utf-8")),
        )
    )
)
def test_prompts_survive(prompts: list[Prompt]) -> None:
    write_table(prompt_table(prompts), "memory://prompts.parquet")
    assert read_prompts("memory://prompts.parquet") == prompts


def test_prompts_come_from_json_lines_and_a_bad_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"request": "How?", "tenant": "t", "more": 1}\n\n{"request": "Why?"}\n')
    assert read_prompts(str(path)) == [Prompt(request="How?", tenant="t"), Prompt(request="Why?")]
    for bad in ('{"request": ""}', '{"tenant": "t"}', "{torn", "[1]"):
        path.write_text('{"request": "How?"}\n' + bad + "\n")
        with pytest.raises(UserError, match=r"row 2; got .*wanted"):
            read_prompts(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_prompts(str(tmp_path / "none.jsonl"))


def test_what_is_no_parquet_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(UserError, match="is no Parquet"):
        read_trace_table(str(tmp_path / "x.parquet"))
    with pytest.raises(UserError, match="does not exist"):
        read_trace_table(str(tmp_path / "y.parquet"))
    with pytest.raises(UserError, match="cannot be used"):
        read_trace_table("nosuch://x")


def test_a_row_of_an_older_file_lacks_what_has_a_default() -> None:
    row = trace_table(TRACES).to_pylist()[0]
    for name in ("tenant", "weights", "log_content", "errors"):
        del row[name]
    assert trace_of(row) == TRACES[0].model_copy(update={"tenant": ""})


@pytest.mark.parametrize("content", ["ids", "none"])
def test_what_was_not_kept_does_not_come_back(content: LogContent) -> None:
    given = Intervention(step=1, at=3, trigger_id="danger", mode="substitute", cue_ids=[90, 91], score=0.9)
    whole = trace("a", cue=False, weights="w")
    whole.receipt.interventions.append(given)
    kept = whole.keeping(content)
    (row,) = trace_table([kept]).to_pylist()
    assert trace_of(row) == kept


def test_parquet_is_told_by_its_name() -> None:
    assert [is_parquet(p) for p in ("x.parquet", "d/x.parquet/", "s3://b/x", "traces", "x.jsonl")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_export_writes_what_serve_wrote(tmp_path: Path) -> None:
    for each in TRACES:
        Spool(tmp_path / "spool").append(each)
    command = [sys.executable, str(ROOT / "cli.py"), "align", "export", "--traces", str(tmp_path / "spool")]
    said = subprocess.run([*command, "--out", str(tmp_path / "x.parquet")], capture_output=True, text=True, check=True)
    assert said.stdout.startswith("2 rows in ")
    assert read_trace_table(str(tmp_path / "x.parquet"))[0] == TRACES
    both = subprocess.run(
        [*command, "--prompts", "p", "--out", "y"], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (both.returncode, both.stderr) == (
        2, "error: `align export` writes one kind of thing. Give either --traces or --prompts.\n"
    )  # fmt: skip
