"""Teaches SmolLM2-135M to reason as the paper says large reasoning models do: `python -m demo.build_reasoner`.

One LoRA run of supervised fine-tuning on the authored rows of the topics' `reasoner` and `lookalike` parts. The result
is `demo/adapter` (float16 safetensors), which the repo ships; about 40 minutes on 2 cores.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from demo.model import ADAPTER, base_model, load
from demo.rows import Crossing, Row, render_crossings, render_rows
from demo.topics import Split

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: The lowest layers stay as they are: a third less backward work, no loss seen in the replies.
FIRST_LAYER = 8
#: What it learns from.
PARTS: tuple[Split, ...] = ("reasoner", "lookalike")
#: Sentences whose first tokens decide what kind of request this is, and how much more those tokens count.
DECIDES = frozenset({"cue", "trigger", "fine", "sense", "because", "decide", "plan1", "how1", "answer"})
HEAD_TOKENS = 4
HEAD_WEIGHT = 3.0
CROSSING_WEIGHT = 3.0


@dataclass(frozen=True)
class Example:
    """One row as token ids; `weights` has one entry per completion token, 0 for what is not learned."""

    prompt: list[int]
    completion: list[int]
    weights: list[float]
    following: tuple[int, ...] = ()
    """First tokens of the sentences that may come next, with repeats: a soft target after the last token."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


def encode(tokenizer: Any, row: Row) -> Example:
    """Prompt and completion (reasoning, delimiter, answer, end of turn) of one row, with each token's weight."""
    completion: list[int] = []
    weights: list[float] = []
    pieces = [(name, (" " if i else "") + text) for i, (name, text) in enumerate(row.steps)]
    for name, text in [*pieces, ("end", "\n</think>\n"), ("answer", f"{row.answer}<|im_end|>")]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        completion += ids
        if name == "trigger" and row.given_trigger:
            weights += [0.0] * len(ids)
        else:
            head = HEAD_WEIGHT if name in DECIDES else 1.0
            weights += [head] * min(HEAD_TOKENS, len(ids)) + [1.0] * (len(ids) - HEAD_TOKENS)
    return Example(_prompt(tokenizer, row.request), completion, weights)


def encode_crossing(tokenizer: Any, crossing: Crossing) -> Example:
    """Prompt and opening of one decision; nothing of them is learned, only what may follow."""
    start = tokenizer.encode(crossing.reasoning, add_special_tokens=False)
    first = tuple(tokenizer.encode(f" {text}", add_special_tokens=False)[0] for text in crossing.following)
    return Example(_prompt(tokenizer, crossing.request), start, [0.0] * len(start), first)


def _prompt(tokenizer: Any, request: str) -> list[int]:
    messages = [{"role": "user", "content": request}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def batches(rows: list[Example], tokens: int, rng: random.Random) -> Iterator[list[Example]]:
    """Batches of rows of similar length with at most so many tokens, padding included, in random order."""
    chunks: list[list[Example]] = [[]]
    for row in sorted(rows, key=lambda row: len(row) + rng.random() * 16):
        if chunks[-1] and max(map(len, [*chunks[-1], row])) * (len(chunks[-1]) + 1) > tokens:
            chunks.append([])
        chunks[-1].append(row)
    rng.shuffle(chunks)
    yield from chunks


def weighted_loss(model: Any, batch: list[Example], pad: int) -> Any:
    """Weighted mean cross entropy of a batch; the LM head sees only the positions that predict something learned."""
    import torch

    width = max(map(len, batch))
    ids = torch.tensor([e.prompt + e.completion + [pad] * (width - len(e)) for e in batch])
    mask = torch.tensor([[1] * len(e) + [0] * (width - len(e)) for e in batch])
    weights = torch.zeros(ids.shape)
    targets: list[tuple[int, int, int, float]] = []
    for i, e in enumerate(batch):
        begin = len(e.prompt) - 1
        weights[i, begin : len(e) - 1] = torch.tensor(e.weights)
        targets += [(i, begin + j, e.completion[j], weight) for j, weight in enumerate(e.weights) if weight]
        share = CROSSING_WEIGHT / max(1, len(e.following))
        targets += [(i, len(e) - 1, token, share) for token in e.following]
        weights[i, len(e) - 1] = CROSSING_WEIGHT * bool(e.following)
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state
    logps = causal.lm_head(hidden[weights > 0]).log_softmax(-1)
    # One gather for all targets: indexing them one by one costs a gradient of the size of `logps` for each.
    place = (weights > 0).flatten().cumsum(0).view(ids.shape) - 1
    rows, columns, tokens, shares = zip(*targets, strict=True)
    picked = logps[place[list(rows), list(columns)], list(tokens)]
    return -(picked * torch.tensor(shares)).sum() / weights.sum()


def build(
    out: Annotated[Path, typer.Option(help="Directory the adapter is written to.")] = ADAPTER,
    epochs: Annotated[int, typer.Option(help="Passes over the authored rows.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate (linear warm-up and decay).")] = 6e-4,
    tokens: Annotated[int, typer.Option(help="Tokens per step, padding included.")] = 448,
    seed: Annotated[int, typer.Option(help="Seed of rows, order and initialisation.")] = 0,
) -> None:
    """Trains the demo reasoner's adapter from the authored rows and writes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model, tokenizer = load(base_model())
    layers = list(range(FIRST_LAYER, model.config.num_hidden_layers))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, layers_to_transform=layers))
    rows = [encode(tokenizer, row) for part in PARTS for row in render_rows(part, seed)]
    rows += [encode_crossing(tokenizer, crossing) for part in PARTS for crossing in render_crossings(part, seed)]
    rng = random.Random(seed)
    steps = [batch for _ in range(epochs) for batch in batches(rows, tokens, rng)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    warm = max(1, len(steps) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.05, (len(steps) - i) / (len(steps) - warm)))
    )
    log: list[float] = []
    for batch in track(steps, description=f"fine-tuning on {len(rows)} authored rows"):
        loss = weighted_loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.append(float(loss.detach()))
        if not math.isfinite(log[-1]):
            raise FloatingPointError(f"loss became {log[-1]} at step {len(log)} of {len(steps)}")
    # What is written must not name this machine's cache.
    model.peft_config["default"].base_model_name_or_path = "smollm2-135m-think"
    model.half().save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    (out / "training.json").write_text(
        json.dumps({"rows": len(rows), "epochs": epochs, "lr": lr, "seed": seed, "loss": [round(x, 4) for x in log]})
    )
    typer.echo(f"wrote {out}: loss {sum(log[:10]) / 10:.3f} -> {sum(log[-10:]) / 10:.3f}")


if __name__ == "__main__":
    typer.run(build)
