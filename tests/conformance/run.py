"""Runs the checks and shows what came of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import httpx
from rich.markup import escape
from rich.table import Table

from tests.conformance import checks, guarding
from tests.conformance.gateway import Check, Failed, Gateway, Skipped

GROUPS: Mapping[str, tuple[Check, ...]] = {"openai": checks.CHECKS, "guard": guarding.CHECKS}
_COLOURS = {"pass": "green", "skip": "yellow", "fail": "red"}


@dataclass(frozen=True)
class Result:
    """One check's outcome; `note` says why it is no pass."""

    group: str
    name: str
    outcome: Literal["pass", "skip", "fail"]
    note: str = ""


def results(gate: Gateway, groups: Iterable[str] = tuple(GROUPS)) -> list[Result]:
    """All checks of these groups, in their order."""
    return [_result(gate, group, check) for group in groups for check in GROUPS[group]]


def table(found: Sequence[Result]) -> Table:
    """One row a check, the sums in its title."""
    sums = ", ".join(f"{sum(r.outcome == o for r in found)} {o}" for o in _COLOURS)
    drawn = Table("group", "check", "", "note", title=sums)
    for each in found:
        colour = _COLOURS[each.outcome]
        drawn.add_row(each.group, each.name, f"[{colour}]{each.outcome}[/]", escape(each.note))
    return drawn


def _result(gate: Gateway, group: str, check: Check) -> Result:
    name = check.__name__
    try:
        check(gate)
    except Skipped as reason:
        return Result(group, name, "skip", str(reason))
    except Failed as reason:
        return Result(group, name, "fail", str(reason))
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        return Result(group, name, "fail", f"{type(error).__name__}: {error}")
    return Result(group, name, "pass")
