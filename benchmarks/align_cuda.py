"""Training on pairs on a GPU, ours against stock TRL: models of usual sizes with random weights.

python -m benchmarks.align_cuda --out runs/bench/align-cuda.json

What a token says does not matter to the time, so the rows are random ids of usual lengths. Needs a CUDA device.
"""

from __future__ import annotations

import gc
import json
import logging
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.align import TRAINERS, rates, show

if TYPE_CHECKING:
    from benchmarks.align_rig import Source

VOCABULARY = 151_936
#: The shapes of Qwen2.5-1.5B and of Qwen3-8B.
MODELS: dict[str, dict[str, int]] = {
    "1.5B": {
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "head_dim": 128,
    },
    "8B": {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip
#: Tokens of prefix, chosen and rejected side at most; each row is at least three quarters as long.
ROWS = {"two steps after 600": (600, 80, 80), "reasonings after 200": (200, 500, 500)}
PAIRS = 8


def main(
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("runs/bench/align-cuda.json"),
    rounds: Annotated[int, typer.Option(min=2, help="Repeats of each trainer; medians are reported.")] = 5,
    models: Annotated[str, typer.Option(help="Sizes, separated by commas.")] = ",".join(MODELS),
) -> None:
    """Time each trainer's steps and references on the same pairs, and take each one's peak of GPU memory."""
    import torch

    if not torch.cuda.is_available():
        raise typer.BadParameter("this measures on a GPU, and torch sees none: run `python -m benchmarks.align` here")
    logging.disable(logging.WARNING)
    found: dict[str, Any] = {}
    sizes = models.split(",")
    with Progress(console=Console(stderr=True), transient=True) as bar, tempfile.TemporaryDirectory() as scratch:
        task = bar.add_task("training in turns", total=len(sizes) * len(ROWS) * len(TRAINERS) * (rounds + 1))
        for size in sizes:
            for name, lengths in ROWS.items():
                found[f"{size}, {name}"] = _compare(
                    source(size, lengths), rounds, Path(scratch) / f"{size} {name}", lambda: bar.advance(task)
                )
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(_with_machine(found), indent=2) + "\n", encoding="utf-8")
    Console().print(show(found))


def source(size: str, lengths: tuple[int, int, int]) -> Source:
    """A model of `size` and rows of at most `lengths`, the same at every call."""
    from benchmarks.align_rig import Source

    rng = random.Random(0)
    rows = [
        {
            f"{part}_ids": [rng.randrange(10, VOCABULARY) for _ in range(rng.randint(3 * most // 4, most))]
            for part, most in zip(("prompt", "chosen", "rejected"), lengths, strict=True)
        }
        for _ in range(PAIRS)
    ]
    return Source(
        base=lambda: random_model(MODELS[size]), tokenizer=_tokenizer(), rows=rows, checkpointing=size != "1.5B"
    )


def random_model(shape: dict[str, int]) -> Any:
    """Random weights in bf16, made on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        config = LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, attn_implementation="sdpa", **shape)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(10)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1")


def _compare(given: Source, rounds: int, scratch: Path, advance: Callable[[], None]) -> dict[str, Any]:
    """One trainer after the other: the device is nobody else's, and two large models seldom fit."""
    import torch

    from benchmarks.align_rig import Contender

    laps: dict[str, list[tuple[float, float]]] = {}
    peaks: dict[str, float] = {}
    losses: dict[str, float] = {}
    for kind in TRAINERS:
        contender = Contender(kind, given, scratch / kind)
        laps[kind] = []
        for turn in range(rounds + 1):
            lap = contender.step(), contender.once()
            laps[kind] += [lap] if turn else []
            losses.setdefault(kind, contender.trainer.state.log_history[-1]["train_loss"])
            advance()
        contender.forget_untrained()
        _free()
        torch.cuda.reset_peak_memory_stats()
        contender.step()
        peaks[kind] = torch.cuda.max_memory_allocated() / 2**20
        del contender
        _free()
    result = rates(laps)
    for kind in TRAINERS:
        result[kind] |= {"peak_mib": round(peaks[kind]), "first_loss": losses[kind]}
    return result


def _free() -> None:
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _with_machine(found: dict[str, Any]) -> dict[str, Any]:
    import torch
    import transformers
    import trl

    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    return {"gpu": torch.cuda.get_device_name(), "versions": versions, "rows": ROWS, "pairs": found}


if __name__ == "__main__":
    typer.run(main)
