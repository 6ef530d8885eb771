"""Writes the registry that `serve --versions` follows: publish a run, put a version in force, take it back.

A version appears whole or not at all (scratch directory, then a rename), `current` is replaced in one move, and
`history.jsonl` only grows. `guard.weights` says what lies where, and reads it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from align.disk import append_line, one_writer, read_lines
from align.gate import Verdict
from guard.errors import UserError
from guard.weights import BASE, Manifest, Registry, file_hash, known_weights, weights_hash

#: What a version takes from a run; pickles, code and a trainer's other leavings stay behind.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "train.json")
MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".jinja", ".txt", ".model"})
PATIENCE = 600
"""Seconds that a writer waits for another: publishing a large model reads and perhaps copies all of it."""


class Event(BaseModel):
    """One line of `history.jsonl`."""

    model_config = ConfigDict(extra="forbid")

    time: float
    """Unix time in seconds."""
    event: Literal["promoted", "refused", "rolled back"]
    version: int | None
    """In force from here on; None for a run that the gate refused."""
    before: int
    """In force until then."""
    run: str = ""
    forced: bool = False
    """Put in force although the gate refused it."""
    reasons: list[str] = []
    """What the gate missed."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[Registry]:
    """The registry for one writer, who waits for another; UserError when that one does not end."""
    taken = UserError(f"Another align is writing to {root}", fix="Wait for it")
    with one_writer(root, taken, patience=PATIENCE):
        yield Registry(root)


def publish(registry: Registry, run: Path, manifest: Manifest, verdict: Verdict, card: str) -> Manifest:
    """Makes a version of a run's model and adapter and returns its manifest with the files' hashes; nothing serves it
    yet."""
    scratch = registry.root / f".{manifest.version}.part"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        for name in ADAPTER_FILES:
            # Full fine-tuning leaves no adapter beside its report.
            if (run / "adapter" / name).exists():
                _link(run / "adapter" / name, scratch / "adapter" / name)
        for file in sorted((run / "aligned").iterdir()):
            if file.suffix in MODEL_SUFFIXES:
                _link(file, scratch / "model" / file.name)
        (scratch / "gate.json").write_text(verdict.model_dump_json(indent=1), encoding="utf-8")
        (scratch / "card.md").write_text(card, encoding="utf-8")
        files = {str(p.relative_to(scratch)): file_hash(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
        whole = manifest.model_copy(update={"files": files})
        (scratch / "manifest.json").write_text(whole.model_dump_json(indent=1), encoding="utf-8")
        scratch.rename(registry.directory(manifest.version))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return whole


def find(registry: Registry, run: Path) -> Manifest | None:
    """The version that a run has become already, told by every byte of its weights."""
    wanted = {f"model/{file.name}": file_hash(file) for file in (run / "aligned").glob("*.safetensors")}
    known = (registry.manifest(number) for number in registry.versions())
    return next((each for each in known if wanted.items() <= each.files.items()), None)


def describe(registry: Registry, run: Path, model: str) -> Manifest:
    """The manifest of a run that is not published yet: the next number, the model it was trained from, no files."""
    aligned = run / "aligned"
    if not (aligned / "config.json").exists():
        raise UserError(f"{run} holds no trained model", fix="Run `cli.py align` on it first")
    return Manifest(
        version=max(registry.versions(), default=BASE) + 1,
        created=time.time(),
        base=known_weights(model, "Promotion"),
        base_name=Path(model).name,
        weights=weights_hash(str(aligned)),
        files={},
    )


def put_in_force(registry: Registry, event: Event) -> None:
    """Records the event, then moves `current`; a crash in between is mended by doing it again. UserError for a version
    that does not exist."""
    if event.version is None or event.version == registry.current():
        raise UserError(f"Version {event.version} is in force already")
    if event.version != BASE:
        registry.manifest(event.version)
    record(registry, event)
    scratch = registry.root / f".current.{os.getpid()}"
    try:
        scratch.write_text(f"{event.version}\n", encoding="ascii")
        scratch.replace(registry.root / "current")
    finally:
        scratch.unlink(missing_ok=True)


def record(registry: Registry, event: Event) -> None:
    """Appends one line to the history."""
    append_line(registry.root / "history.jsonl", event.model_dump_json())


def history(registry: Registry) -> list[Event]:
    """Everything that happened, the oldest first; a line that was torn by a full disk is passed over."""
    return read_lines(registry.root / "history.jsonl", Event)


def verdict_of(registry: Registry, version: int) -> Verdict | None:
    """How a version passed its gate; None for the model as it came."""
    if version == BASE:
        return None
    path = registry.directory(version) / "gate.json"
    try:
        return Verdict.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or missing", got=str(error).split("\n")[0]) from error


def previous(registry: Registry) -> int:
    """What the version in force was promoted over; UserError when nothing was promoted."""
    now = registry.current()
    over = [e.before for e in history(registry) if e.event == "promoted" and e.version == now]
    if now == BASE or not over:
        raise UserError(f"Nothing to roll back to: version {now} is in force", fix="Name the version with --to")
    return over[-1]


def _link(source: Path, target: Path) -> None:
    """A hard link where the file system allows it (a merged model may be large), else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError as error:
        raise UserError(f"{source} is missing", fix="Run `cli.py align` on it first") from error
    except OSError:
        shutil.copyfile(source, target)
