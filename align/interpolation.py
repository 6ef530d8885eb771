"""Weights between the model as it came and as trained: an operating point that is set after training.

Linear interpolation of weights (WiSE-FT, arXiv 2109.01903). An adapter's change is a product of two matrices, so one of
them times `share` is exactly that point of the line. Measured on the demo model it gives back what training takes
from tasks, and draws of one recipe differ less (docs/evaluation.md).
"""

from __future__ import annotations

import shutil
from pathlib import Path

from align.train import TrainReport, TrainSettings, read_report
from guard.errors import UserError


def interpolate(adapter: Path, share: float) -> None:
    """Rescales the LoRA adapter in a directory, in place: `share` of its change stays (1: all of it)."""
    if share == 1.0:
        return
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    if not any("lora_B" in name for name in weights):
        raise UserError(f"{path} holds no LoRA weights", wanted="a stage of method lora", fix="Leave out interpolation")
    scaled = {name: weight * share if "lora_B" in name else weight for name, weight in weights.items()}
    save_file(scaled, path.with_suffix(".part"), metadata={"format": "pt"})
    path.with_suffix(".part").replace(path)


def between(trained: Path, out: Path, settings: TrainSettings) -> TrainReport:
    """The finished stage that `trained` is, with another `interpolation`, as a stage in `out`; nothing is trained.

    `settings`: those of `trained` but for that. Its report is `trained`'s, with these settings.
    """
    from align import stage

    card, rows = stage.read(trained)
    if (done := read_report(out)) is not None:
        if stage.read(out) != (card.model_copy(update={"settings": settings}), rows):
            raise UserError(f"{out} holds another training stage", fix="Delete it, or choose another directory")
        return done
    report = read_report(trained)
    if report is None or card.settings.model_copy(update={"interpolation": settings.interpolation}) != settings:
        raise UserError(f"{trained} is not the same stage, trained to its end", fix=f"Delete {trained}")
    scratch = out.with_name(out.name + ".part")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(trained, scratch)
    interpolate(scratch, settings.interpolation / card.settings.interpolation)
    changed = {"settings": settings}
    report = report.model_copy(update=changed)
    (scratch / "stage.json").write_text(card.model_copy(update=changed).model_dump_json(indent=1), encoding="utf-8")
    (scratch / "train.json").write_text(report.model_dump_json(indent=1), encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    scratch.rename(out)
    return report
