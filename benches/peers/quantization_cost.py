#!/usr/bin/env python3
"""What NF4 costs in quality with transformers + PEFT + bitsandbytes: evaluation loss after LoRA on bf16's numbers and on NF4's.

    python benches/peers/quantization_cost.py --model models/smollm2 --train train.jsonl --eval eval.jsonl --device cuda

Both runs see the same rows in the same order from the same adapter; NF4 has double quantisation, everything computes in
f32. Prints one JSON object a run and, at the end, the ratio of the two losses.
"""

import argparse
import json
import math
import random

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft_chat import batches, encode
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup


def summed_loss(model, batch):
    """The sum over the labelled tokens of a batch, and how many they are."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"), (labels >= 0).sum()


@torch.no_grad()
def evaluate(model, rows, pad_id):
    model.eval()
    sums = [summed_loss(model, batch) for batch in batches(rows, 8, pad_id)]
    model.train()
    return (sum(loss for loss, _ in sums) / sum(count for _, count in sums)).item()


def load(args, nf4):
    torch.manual_seed(args.seed)
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, device_map=args.device, quantization_config=config if nf4 else None
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def run(args, train, held_out, pad_id, nf4):
    model = load(args, nf4)
    before = evaluate(model, held_out, pad_id)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(factors, lr=args.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * args.steps), args.steps)
    order, pool = random.Random(args.seed), []
    for _ in range(args.steps):
        if len(pool) < args.batch_size:
            pool = order.sample(train, len(train))
        rows, pool = pool[: args.batch_size], pool[args.batch_size :]
        loss, count = summed_loss(model, next(batches(rows, args.batch_size, pad_id)))
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(factors, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    after = evaluate(model, held_out, pad_id)
    print(json.dumps({"base": "nf4" if nf4 else "dense", "before": before, "after": after}), flush=True)
    return after


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", required=True, help="a file of JSON lines with `messages`")
    parser.add_argument("--eval", required=True, help="likewise")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=8, help="rows of a step, padded to the longest")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    read = lambda path: [encode(tokenizer, json.loads(line)) for line in open(path)]
    train, held_out = read(args.train), read(args.eval)
    dense, nf4 = (run(args, train, held_out, tokenizer.pad_token_id, packed) for packed in (False, True))
    print(json.dumps({"nf4_over_dense": nf4 / dense}))


if __name__ == "__main__":
    main()
