"""Benchmark a training step of a 1B model on one GPU beside Hugging Face's Llama.

    python kernels/bench/bench_step.py [--out FOLDER] [--seconds 60] [--only NAME ...]

Every contender is a process of its own, alone on the device, and takes the same number of steps at
16,384 tokens: lcdist with some attention methods on synthetic text, a slice of an 8B model with
LoRA, and Hugging Face's Llama of the same shape, eager and compiled, with SDPA, autocast to
bf16 and fused AdamW. A row is the median of the steps after the first three. Rows are added to
results/step.csv, or to FOLDER/step.csv.

Without a GPU a small shape is timed, and the rows say so. Hugging Face's rows need transformers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from harness import RESULTS, commit, write
from place import DEVICE, HAS_GPU, ROOT, device_name

STEPS, WARM = (12, 3) if HAS_GPU else (5, 1)
SHAPE = (
    {"vocab_size": 128256, "num_layers": 16, "hidden_size": 2048, "ffn_hidden_size": 8192}
    if HAS_GPU
    else {"vocab_size": 1024, "num_layers": 2, "hidden_size": 256, "ffn_hidden_size": 512}
)
HEADS = {"nheads": 32 if HAS_GPU else 8, "nheads_kv": 8 if HAS_GPU else 2}
SEQLEN = 16384 if HAS_GPU else 512
SLICE = {"num_layers": 8, "hidden_size": 4096, "ffn_hidden_size": 14336} if HAS_GPU else {}
LORA = ["lora.rank=8", "lora.alpha=16", "lora.targets=['q','k','v','o']", "lora.norms=true"]
OURS: dict[str, list[str]] = {
    "lcdist full": [],
    "lcdist scca": ["attention.method=scca", f"attention.chunk_size={SEQLEN // 4}"],
    "lcdist tensorized": ["attention.method=tensorized"],
    "lcdist landmark": ["attention.method=landmark"],
    "lcdist lssar": ["attention.method=lssar"],
    "lcdist 8B slice, LoRA, scca": [
        *(f"model.{key}={value}" for key, value in SLICE.items()),
        "model.tied_embeddings=false",
        *("attention.method=scca", f"attention.chunk_size={SEQLEN // 2}", *LORA),
        f"train.seqlen={2 * SEQLEN}",
    ],
}
RIVALS = {"Hugging Face eager": False, "Hugging Face compiled": True}


def settings(folder: str, overrides: list[str]) -> list[str]:
    """Return the overrides of configs/debug/full.toml for a run of this benchmark."""
    shape = [f"model.{key}={value}" for key, value in (SHAPE | HEADS).items()]
    return [
        *shape,
        *("model.tied_embeddings=true", f"train.seqlen={SEQLEN}", f"train.steps={STEPS}"),
        *("train.global_batch_size=1", f"train.dtype={'bf16' if HAS_GPU else 'fp32'}"),
        *("optim.lr=1e-4", "optim.min_lr=1e-5", "checkpoint.every=0", "log.tensorboard=false"),
        *(f"log.folder={folder}/run", *overrides),
    ]


def time_ours(overrides: list[str], seconds: float) -> dict[str, Any]:
    """Return tokens/s, utilisation and peak memory of a run of lcdist."""
    with tempfile.TemporaryDirectory() as folder:
        words = [str(ROOT / "configs/debug/full.toml"), *settings(folder, overrides)]
        child([str(ROOT / "launch/train.py"), *words], seconds)
        lines = Path(folder, "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][WARM:]
    last = records[-1]
    step = median(record["time"]["step"] for record in records)
    rate = last["tokens"] / step
    return {
        "seqlen": last["tokens"],
        "tokens_per_second": round(rate),
        "mfu": round(last["mfu_causal"] * rate / last["tokens_per_second"], 4),
        "peak_gib": round(last["memory_bytes"] / 2**30, 2),
    }


def time_rival(compiled: bool, seconds: float) -> dict[str, Any]:
    """Return the same of Hugging Face's Llama, in a process of its own."""
    return json.loads(child([__file__, "--rival", str(int(compiled))], seconds).splitlines()[-1])


def child(words: list[str], seconds: float) -> str:
    """Run Python with some words and return its output; raises RuntimeError with the last lines."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if not HAS_GPU:
        environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=seconds, env=environment
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-400:])
    return done.stdout


def rival(compiled: bool) -> dict[str, Any]:
    """Train Hugging Face's Llama as a user's own loop would."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    settings: dict[str, Any] = {"attn_implementation": "sdpa", "use_cache": False}
    config = LlamaConfig(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["hidden_size"],
        intermediate_size=SHAPE["ffn_hidden_size"],
        num_hidden_layers=SHAPE["num_layers"],
        num_attention_heads=HEADS["nheads"],
        num_key_value_heads=HEADS["nheads_kv"],
        max_position_embeddings=SEQLEN,
        tie_word_embeddings=True,
        **settings,
    )
    with torch.device(DEVICE):
        model: Any = LlamaForCausalLM(config)
    model.train()
    for layer in model.model.layers if compiled else ():
        layer.compile()
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, SHAPE["vocab_size"], (1, SEQLEN), device=DEVICE)
    times = []
    for _ in range(STEPS):
        begun = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=HAS_GPU):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
        loss.item()
        times.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**30 if HAS_GPU else 0.0
    rate = SEQLEN / median(times[WARM:])
    found = {"seqlen": SEQLEN, "tokens_per_second": round(rate), "mfu": ""}
    return found | {"peak_gib": round(peak, 2)}


def main() -> int:
    """Time all contenders, print and write their rows; return how many failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where step.csv goes")
    parser.add_argument("--seconds", type=float, default=90.0, help="most time for a contender")
    parser.add_argument("--only", nargs="*", default=[], help="first words of contenders")
    parser.add_argument("--rival", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rival is not None:
        print(json.dumps(rival(bool(arguments.rival))))
        return 0
    about = {
        "device": device_name(),
        "date": date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
    }
    rows, failed = [], 0
    for name in (*OURS, *(RIVALS if find_spec("transformers") else ())):
        if arguments.only and not name.startswith(tuple(arguments.only)):
            continue
        try:
            timed = time_ours(OURS[name], arguments.seconds) if name in OURS else None
            timed = timed or time_rival(RIVALS[name], arguments.seconds)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{name}: {error}", flush=True)
            failed += 1
            continue
        rows.append({"contender": name, **timed, **about})
        print(" ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
    if rows:
        write("step", rows, arguments.out)
    return failed


if __name__ == "__main__":
    sys.exit(main())
