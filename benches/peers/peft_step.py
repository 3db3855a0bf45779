#!/usr/bin/env python3
"""Optimizer steps with transformers + PEFT on the tokens that `cargo bench --bench step` trains, every one a label.

    python benches/peers/peft_step.py --model models/smollm2 --adapter runs/start --rows 4 --seq 256 --steps 6

`--adapter` is made by `scripts/compare_training_with_peft.py init`. Prints one JSON object, as that does.
"""

import argparse
import time

import peft_common as common
import torch


def random_ids(rows, seq, vocab_size):
    """The upper bits of Knuth's linear congruential generator (MMIX), from state 1."""
    state, ids = 1, []
    for _ in range(rows * seq):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        ids.append((state >> 33) % vocab_size)
    return torch.tensor(ids).reshape(rows, seq)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter", required=True)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6, help="the first is not part of the median")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing")
    parser.add_argument("--compile", action="store_true", help="torch.compile; the first step then takes minutes")
    parser.add_argument("--nf4", action="store_true", help="the base in 4 bits, by bitsandbytes")
    args = parser.parse_args()

    model = common.load(args.model, args.adapter, checkpointing=args.ckpt, nf4=args.nf4)
    optimizer = common.optimizer_of(model, args.lr)
    ids = random_ids(args.rows, args.seq, model.config.vocab_size)
    if args.compile:
        model = torch.compile(model)

    first_step_at = time.time()
    losses, seconds = [], []
    for _ in range(args.steps):
        start = time.time()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.time() - start)
    timed = sorted(seconds[1:])
    common.report(
        first_step_at,
        rows=args.rows,
        seq=args.seq,
        step_seconds=seconds,
        tokens_per_second=args.rows * args.seq / timed[len(timed) // 2],
        losses=losses,
    )


if __name__ == "__main__":
    main()
