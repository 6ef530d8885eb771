"""A LoRA adapter, made in code, that sends the tiny model another way after chosen words."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tests import tiny

_LAYER = "base_model.model.model.layers.1.mlp"


def build_detour(model: Path, target: Path) -> Path:
    """Writes an adapter under which the model plans first and shows its cue later; it then plans and agrees for ever.

    After the last word of its opening it goes on as after its cue's, after the last of its plan as after the opening's.
    The tiny model's MLPs are zero, so the adapter alone decides what they add: each detour has its share of the
    neurons, which fire on the embedding of the one word and add three times that of the other.
    """
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    opening, cue, plan = (tokenizer.encode(" " + text).ids[-1] for text in (tiny.OPENING, tiny.CUE, tiny.PLAN[-1]))
    detours = {opening: cue, plan: opening}
    rank = len(detours)
    embedding = load_file(model / "model.safetensors")["model.embed_tokens.weight"]
    neurons = json.loads((model / "config.json").read_text())["intermediate_size"]
    # [neurons, rank]: which detour a neuron belongs to.
    own = torch.eye(rank).repeat_interleave(neurons // rank, dim=0)
    fires = embedding[list(detours)]
    # The norm before the MLP makes an embedding of length 1 sqrt(hidden) long.
    reach = embedding.shape[1] ** 0.5 / 4
    strength = torch.nn.functional.silu(torch.tensor(reach)) * reach
    weights = {}
    for name in ("gate_proj", "up_proj"):
        weights |= {f"{_LAYER}.{name}.lora_A.weight": fires, f"{_LAYER}.{name}.lora_B.weight": own / 4}
    adds = 3 * embedding[list(detours.values())].T / strength
    weights |= {
        f"{_LAYER}.down_proj.lora_A.weight": own.T / (neurons // rank),
        f"{_LAYER}.down_proj.lora_B.weight": adds,
    }
    target.mkdir()
    # Tensors of one file may not share memory.
    save_file({name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()},
              target / "adapter_model.safetensors")  # fmt: skip
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none",
        "target_modules": ["gate_proj", "up_proj", "down_proj"], "base_model_name_or_path": str(model),
    }  # fmt: skip
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target
