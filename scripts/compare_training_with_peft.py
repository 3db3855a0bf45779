#!/usr/bin/env python3
"""Train the same adapter on the same rows with transformers + PEFT and compare the losses step by step.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements-reference.txt
    .venv/bin/python scripts/compare_training_with_peft.py init --model models/smollm2 --adapter runs/start
    emberlora train RECIPE adapter.init_from=runs/start data.packing=false data.shuffle=false train.batch_size=8 \\
        train.max_steps=10 'train.schedule={kind: constant, warmup_steps: 0}' output=runs/compared
    emberlora inspect RECIPE --json > rows.jsonl
    .venv/bin/python scripts/compare_training_with_peft.py compare --model models/smollm2 --adapter runs/start \\
        --rows rows.jsonl --metrics runs/compared/metrics.jsonl

RECIPE has r 16, alpha 32, targets all-linear, learning_rate 2.0e-4 and max_grad_norm 1.0, as recipes/smollm2.yaml.
`compare` exits with 1 when a loss differs by more than --tolerance. Everything runs in f32 on the CPU.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in ("init", "compare"):
        sub = commands.add_parser(command)
        sub.add_argument("--model", type=Path, required=True, help="the base model's directory")
        sub.add_argument("--adapter", type=Path, required=True, help="the adapter that both start from")
    sub.add_argument("--rows", type=Path, required=True, help="what `emberlora inspect RECIPE --json` printed")
    sub.add_argument("--metrics", type=Path, required=True, help="metrics.jsonl of emberlora's run")
    sub.add_argument("--batch-size", type=int, default=8)
    sub.add_argument("--learning-rate", type=float, default=2e-4)
    sub.add_argument("--max-grad-norm", type=float, default=1.0)
    sub.add_argument("--tolerance", type=float, default=1e-4)
    args = parser.parse_args()
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="sdpa")
    if args.command == "init":
        options = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(base, options).save_pretrained(args.adapter)
    else:
        compare(PeftModel.from_pretrained(base, args.adapter, is_trainable=True), args)


def compare(model, args):
    lines = [json.loads(line) for line in args.metrics.read_text().splitlines()]
    expected = [line for line in lines if line.get("split") != "eval"]
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate, weight_decay=0.0)
    model.train()
    worst = 0.0
    for step, ours in enumerate(expected):
        batch = rows[step * args.batch_size : (step + 1) * args.batch_size]
        begin = time.time()
        loss = train_step(model, optimizer, batch, args.max_grad_norm)
        worst = max(worst, abs(loss - ours["loss"]))
        print(f"step {step + 1}: PEFT {loss:.6f} in {time.time() - begin:.1f} s, "
              f"emberlora {ours['loss']:.6f} in {ours['step_seconds']:.1f} s, difference {loss - ours['loss']:+.1e}")
    print(f"{len(expected)} steps: losses differ by at most {worst:.1e}")
    sys.exit(0 if worst <= args.tolerance else 1)


def train_step(model, optimizer, batch, max_grad_norm):
    width = max(len(row["input_ids"]) for row in batch)
    pad = lambda values, filler: values + [filler] * (width - len(values))
    ids = torch.tensor([pad(row["input_ids"], 0) for row in batch])
    labels = torch.tensor([pad(row["labels"], -100) for row in batch])
    mask = torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


if __name__ == "__main__":
    main()
