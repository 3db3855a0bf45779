#!/usr/bin/env python3
"""Load an adapter that emberlora wrote with PEFT and compare what the two compute.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements-reference.txt
    .venv/bin/python scripts/check_adapter_with_peft.py --model models/smollm2 --adapter runs/smollm2/adapter \\
        --expect logits.json --rows rows.jsonl

--expect  a JSON object {"input_ids": [[...]], "logits": [[[...]]]} with emberlora's logits of each row. Prints the
          largest difference to PEFT's and exits with 1 when it is above --tolerance.
--rows    lines {"input_ids": [...], "labels": [...]}, as `emberlora inspect RECIPE --json` prints them. Prints the mean
          loss over all their trained tokens, the number that `emberlora eval` reports.

Either may be left out; without both the script only shows that PEFT accepts the adapter. Everything runs in f32 on the CPU.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the base model's directory")
    parser.add_argument("--adapter", type=Path, required=True, help="the adapter's directory")
    parser.add_argument("--expect", type=Path, help="emberlora's logits")
    parser.add_argument("--rows", type=Path, help="tokenised rows to compute the loss of")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a logit (default: 1e-3)")
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)

    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    adapted = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    print(f"PEFT loaded {args.adapter}: {adapted} adapter parameters")
    agrees = True
    with torch.no_grad():
        if args.expect:
            agrees = compare(model, json.loads(args.expect.read_text()), args.tolerance)
        if args.rows:
            report_loss(model, [json.loads(line) for line in args.rows.read_text().splitlines() if line.strip()])
    sys.exit(0 if agrees else 1)


def compare(model, expected, tolerance):
    difference, effect, count = 0.0, 0.0, 0
    for input_ids, logits in zip(expected["input_ids"], expected["logits"], strict=True):
        ids, theirs = torch.tensor([input_ids]), torch.tensor(logits)
        ours = model(ids).logits[0]
        if ours.shape != theirs.shape:
            sys.exit(f"row {count}: logits have shape {list(theirs.shape)}, PEFT's have {list(ours.shape)}")
        difference = max(difference, (ours - theirs).abs().max().item())
        with model.disable_adapter():
            effect = max(effect, (model(ids).logits[0] - ours).abs().max().item())
        count += 1
    agrees = difference <= tolerance
    print(f"{count} rows: logits differ by at most {difference:.2e}, {'within' if agrees else 'MORE THAN'} {tolerance:.0e}; "
          f"the adapter moves them by up to {effect:.2e}")
    return agrees


def report_loss(model, rows):
    total, tokens = 0.0, 0
    for row in rows:
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"])[1:]
        total += F.cross_entropy(logits[:-1], labels, reduction="sum").item()
        tokens += int((labels != -100).sum())
    print(f"{len(rows)} rows: loss {total / tokens:.6f} over {tokens} trained tokens")


if __name__ == "__main__":
    main()
