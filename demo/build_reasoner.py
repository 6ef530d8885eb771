"""Teaches SmolLM2-135M to reason as the paper says large reasoning models do: `python -m demo.build_reasoner`.

One LoRA run of supervised fine-tuning on the authored rows of the topics' `reasoner` part. The result is
`demo/adapter` (float16 safetensors), which the repo ships; about 12 minutes on 2 cores.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from demo.model import ADAPTER, base_model, load
from demo.rows import Row, render_rows

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
#: The lowest layers stay as they are: a third less backward work, no loss seen in the replies.
FIRST_LAYER = 8


def encode(tokenizer: Any, row: Row) -> tuple[list[int], list[int]]:
    """Prompt ids and completion ids (reasoning, delimiter, answer, end of turn) of one row."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": row.request}], add_generation_prompt=True, return_dict=False
    )
    text = f"{row.reasoning}\n</think>\n{row.answer}<|im_end|>"
    return list(prompt), tokenizer.encode(text, add_special_tokens=False)


def batches(rows: list[tuple[list[int], list[int]]], size: int, rng: random.Random) -> Iterator[list[Any]]:
    """Batches of rows of similar length, in random order."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]) + rng.random() * 16)
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(chunks)
    for chunk in chunks:
        yield [rows[i] for i in chunk]


def completion_loss(model: Any, batch: list[tuple[list[int], list[int]]], pad: int) -> Any:
    """Mean cross entropy over completion tokens; the LM head sees only the positions that predict one."""
    import torch

    width = max(len(p) + len(c) for p, c in batch)
    ids = torch.tensor([p + c + [pad] * (width - len(p) - len(c)) for p, c in batch])
    mask = torch.tensor([[1] * (len(p) + len(c)) + [0] * (width - len(p) - len(c)) for p, c in batch])
    predicts = torch.zeros_like(ids, dtype=torch.bool)
    for i, (p, c) in enumerate(batch):
        predicts[i, len(p) - 1 : len(p) + len(c) - 1] = True
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=mask).last_hidden_state
    targets = ids.roll(-1, dims=1)[predicts]
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[predicts]), targets)


def build(
    out: Annotated[Path, typer.Option(help="Directory the adapter is written to.")] = ADAPTER,
    epochs: Annotated[int, typer.Option(help="Passes over the authored rows.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate (linear warm-up and decay).")] = 6e-4,
    batch_size: Annotated[int, typer.Option(help="Rows per step.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of rows, order and initialisation.")] = 0,
) -> None:
    """Trains the demo reasoner's adapter from the authored rows and writes it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model, tokenizer = load(base_model())
    layers = list(range(FIRST_LAYER, model.config.num_hidden_layers))
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, layers_to_transform=layers))
    rows = [encode(tokenizer, row) for row in render_rows("reasoner", seed)]
    rng = random.Random(seed)
    steps = [batch for _ in range(epochs) for batch in batches(rows, batch_size, rng)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    warm = max(1, len(steps) // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warm, max(0.05, (len(steps) - i) / (len(steps) - warm)))
    )
    log: list[float] = []
    for batch in track(steps, description=f"fine-tuning on {len(rows)} authored rows"):
        loss = completion_loss(model, batch, tokenizer.pad_token_id)
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
