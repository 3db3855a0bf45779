#!/usr/bin/env python3
"""One epoch over chat rows with transformers + PEFT: batches of rows padded to their longest, only answers trained.

    python benches/peers/peft_chat.py --model models/smollm2 --adapter runs/start --data rows.jsonl --batch-size 8

`--adapter` is made by `scripts/compare_training_with_peft.py init`. Prints one JSON object. Rows are tokenised before
the first step and trained in their order in the file; the seconds are those of the steps.
"""

import argparse
import json
import time

import peft_common as common
import torch
from transformers import AutoTokenizer

NOT_TRAINED = -100


def encode(tokenizer, row):
    """Tokens and labels: the last message and its end are trained, not the line break that the template adds behind."""
    messages = row["messages"]
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    full = ids(tokenizer.apply_chat_template(messages, tokenize=False))
    prompt = ids(tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True))
    end = len(full) if full[-1] == tokenizer.eos_token_id else len(full) - 1
    labels = [NOT_TRAINED] * len(prompt) + full[len(prompt):end] + [NOT_TRAINED] * (len(full) - end)
    return full, labels


def batches(rows, size, pad_id):
    for first in range(0, len(rows), size):
        batch = rows[first:first + size]
        width = max(len(ids) for ids, _ in batch)
        pad = lambda values, filler: values + [filler] * (width - len(values))
        yield {
            "input_ids": torch.tensor([pad(ids, pad_id) for ids, _ in batch]),
            "labels": torch.tensor([pad(labels, NOT_TRAINED) for _, labels in batch]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in batch]),
        }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--data", required=True, help="a file of JSON lines with `messages`")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing")
    args = parser.parse_args()

    model = common.load(args.model, args.adapter, checkpointing=args.ckpt)
    optimizer = common.optimizer_of(model, args.lr)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data) as file:
        rows = [encode(tokenizer, json.loads(line)) for line in file]

    first_step_at = time.time()
    tokens = computed = trained = 0
    losses = []
    for batch in batches(rows, args.batch_size, tokenizer.pad_token_id):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        labels = int((batch["labels"] != NOT_TRAINED).sum())
        losses.append(loss.item() * labels)
        tokens += int(batch["attention_mask"].sum())
        computed += batch["input_ids"].numel()
        trained += labels
    seconds = time.time() - first_step_at
    common.report(
        first_step_at,
        steps=len(losses),
        seconds=seconds,
        tokens=tokens,
        computed_tokens=computed,
        trained_tokens=trained,
        tokens_per_second=tokens / seconds,
        mean_loss=sum(losses) / trained,
    )


if __name__ == "__main__":
    main()
