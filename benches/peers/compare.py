#!/usr/bin/env python3
"""emberlora beside transformers + PEFT: the same model, adapter, tokens and optimizer, each in processes of its own.

    .venv/bin/python benches/peers/compare.py --model models/smollm2 --chat rows.jsonl --rounds 3

Contenders alternate, and one Markdown table of medians and ratios is printed. Before that it is checked that they did
the same: losses of every step agree, or for the chat rows the tokens given and trained. The cases:

    a, a-ckpt   4 rows of 256 random tokens, every one a label, without and with gradient checkpointing
    b, b-ckpt   1 row of 1024
    c, c-ckpt   an epoch over chat rows: packing and shared prefixes against batches of 8 padded rows
    d, d-ckpt   as a, the base in NF4 with double quantisation; beside emberlora on weights as they are, too
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
SHAPES = {"a": (4, 256), "b": (1, 1024), "d": (4, 256)}
CASES = ["a", "a-ckpt", "b", "b-ckpt", "c", "c-ckpt", "d", "d-ckpt"]
OURS = "emberlora"
CHAT_BATCH = 8
CHAT_LR = 2e-4
MIB = 2**20


@dataclass
class Contender:
    name: str
    run: Callable[[], dict]
    same_base: bool = True
    """Whether its base has the same values as the others', so that its losses have to be theirs."""


def main():
    args = parse_arguments()
    programs = build()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        adapter = scratch / "start"
        init = ROOT / "scripts" / "compare_training_with_peft.py"
        finished([sys.executable, init, "init", "--model", args.model, "--adapter", adapter])
        rows = chat_rows(args, scratch) if any(case.startswith("c") for case in args.cases) else None
        columns = ["case", "contender", "tokens/s", "peak memory (MiB)", "start to first step (s)", "seconds",
                   "speed", "memory", "sooner"]
        print_row(columns)
        print_row(["---"] * len(columns))
        for case in args.cases:
            if case.startswith("c"):
                contenders = chat_contenders(case, args, programs, adapter, rows, scratch)
                check = same_tokens
            else:
                contenders = step_contenders(case, args, programs, adapter)
                check = same_losses
            results = alternate(case, contenders, args)
            comparable = {contender.name: results[contender.name] for contender in contenders if contender.same_base}
            check(case, comparable, args.tolerance)
            print_rows(case, results)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory, as scripts/fetch_smollm2.py writes it")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, metavar="CASE", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="steps of a process in a, b and d; the first is not timed")
    parser.add_argument("--compile", action="store_true", help="also compiled PEFT, whose first step takes minutes")
    parser.add_argument("--limit", action="store_true",
                        help="also the step that the machine's GEMM rate allows in a, b and d: no trainer can be faster")
    parser.add_argument("--weights", choices=["auto", "f32", "bf16"], default="auto",
                        help="how emberlora stores the frozen weights; auto: as the files do")
    parser.add_argument("--checkpointing", default="block", help="emberlora's strategy in the -ckpt cases")
    parser.add_argument("--chat", type=Path, help="chat rows for case c: JSON lines with `messages`")
    parser.add_argument("--rows", type=int, help="take that many of them, in a seeded order; default: all")
    parser.add_argument("--max-seq-len", type=int, default=304,
                        help="length of emberlora's packed rows; the default holds about 8 rows that share a prompt")
    parser.add_argument("--packed-rows", type=int, default=1, help="packed rows in a step of emberlora")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="how far losses may differ")
    parser.add_argument("--raw", type=Path, help="append every measurement to this file, a JSON object a line")
    args = parser.parse_args()
    if args.chat is None and any(case.startswith("c") for case in args.cases):
        parser.error("cases c and c-ckpt need --chat")
    args.model = args.model.resolve()
    return args


def build():
    """The paths of the `step` benchmark and of the command line program, compiled if need be."""
    command = ["cargo", "build", "--release", "--bin", "emberlora", "--bench", "step",
               "--message-format=json-render-diagnostics"]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    messages = [json.loads(line) for line in output.splitlines()]
    return {message["target"]["name"]: message["executable"] for message in messages if message.get("executable")}


def finished(command):
    """Standard output of a command that has to succeed, and when it was started. Its log is shown where it fails."""
    started = time.time()
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}{' '.join(command)}: exit code {done.returncode}")
    return done.stdout, started


def reported(command):
    """The JSON object that a contender prints as its last line; its start is taken from outside the process."""
    output, started = finished(command)
    result = json.loads(output.splitlines()[-1])
    result["start_to_first_step"] = result["first_step_at"] - started
    if "step_seconds" in result:
        result["seconds"] = result["rows"] * result["seq"] / result["tokens_per_second"]
    return result


def limit(command):
    """The fastest step there can be: the operations that it needs at the rate of the machine's GEMM, measured now."""
    result = reported([*command, "--limit"])
    rate = statistics.mean(result["gemm_gflop_per_second"])
    result["seconds"] = result["gflop"]["total"] / rate
    result["tokens_per_second"] = result["rows"] * result["seq"] / result["seconds"]
    result["start_to_first_step"] = None
    return result


def step_contenders(case, args, programs, adapter):
    (rows, seq), checkpointed = SHAPES[case[0]], case.endswith("-ckpt")
    shared = ["--model", args.model, "--adapter", adapter, "--rows", rows, "--seq", seq, "--steps", args.steps]
    strategy = args.checkpointing if checkpointed else "none"
    ours = lambda weights: [programs["step"], *shared, "--weights", weights, "--checkpointing", strategy]
    peft = [sys.executable, HERE / "peft_step.py", *shared, *(["--ckpt"] if checkpointed else [])]
    limits = [Contender("GEMM limit", lambda: limit(ours(args.weights)), same_base=False)] if args.limit else []
    if case.startswith("d"):
        return [
            Contender(OURS, lambda: reported(ours("nf4"))),
            Contender(f"{OURS}, {args.weights}", lambda: reported(ours(args.weights)), same_base=False),
            Contender("PEFT", lambda: reported([*peft, "--nf4"])),
            *limits,
        ]
    contenders = [Contender(OURS, lambda: reported(ours(args.weights))), Contender("PEFT", lambda: reported(peft))]
    if args.compile and not checkpointed:
        contenders.append(Contender("PEFT, compiled", lambda: reported([*peft, "--compile"])))
    return contenders + limits


def chat_rows(args, scratch):
    """The rows that both train, in an order that does not depend on who reads them."""
    lines = args.chat.read_text().splitlines()
    random.Random(0).shuffle(lines)
    path = scratch / "rows.jsonl"
    path.write_text("".join(line + "\n" for line in lines[:args.rows]))
    return path


def chat_contenders(case, args, programs, adapter, rows, scratch):
    checkpointed = case.endswith("-ckpt")
    peft = [sys.executable, HERE / "peft_chat.py", "--model", args.model, "--adapter", adapter, "--data", rows,
            "--batch-size", CHAT_BATCH, "--lr", CHAT_LR, *(["--ckpt"] if checkpointed else [])]
    recipe = scratch / f"{case}.yaml"
    output = scratch / f"{case}-run"
    recipe.write_text(json.dumps({  # JSON is YAML
        "model": {"source": str(args.model), "dtype": args.weights, "compute_dtype": "f32"},
        "adapter": {"r": 16, "alpha": 32.0, "init_from": str(adapter)},
        "gradient_checkpointing": args.checkpointing if checkpointed else "none",
        "data": {"train": str(rows), "max_seq_len": args.max_seq_len},
        "train": {
            "epochs": 1,
            "batch_size": args.packed_rows,
            "learning_rate": CHAT_LR,
            "schedule": {"kind": "constant", "warmup_steps": 0},
            "max_grad_norm": 1.0,
        },
        "output": str(output),
    }))
    ours = [programs["emberlora"], "train", recipe]
    return [Contender(OURS, lambda: trained(ours, output)), Contender("PEFT", lambda: reported(peft))]


def trained(command, output):
    """Runs `emberlora train` and reads its metrics, whose times count from the start of the process."""
    finished(command)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(output)
    steps = [line for line in lines if line.get("split") != "eval"]
    first, last = steps[0], steps[-1]
    seconds = last["started_seconds"] + last["step_seconds"] - first["started_seconds"]
    total = lambda key: sum(step[key] for step in steps)
    return {
        "steps": len(steps),
        "seconds": seconds,
        "tokens": total("tokens"),
        "trained_tokens": total("trained_tokens"),
        "tokens_per_second": total("tokens") / seconds,
        "mean_loss": sum(step["loss"] * step["trained_tokens"] for step in steps) / total("trained_tokens"),
        "peak_memory_bytes": last["peak_memory_bytes"],
        "start_to_first_step": first["started_seconds"],
    }


def alternate(case, contenders, args):
    """All measurements by contender. In a round each runs once, so that a change of the machine meets all alike."""
    results = {contender.name: [] for contender in contenders}
    for number in range(args.rounds):
        for contender in contenders:
            result = contender.run()
            results[contender.name].append(result)
            peak = result["peak_memory_bytes"]
            print(f"{case} {number + 1}/{args.rounds} {contender.name}: {result['tokens_per_second']:.1f} tokens/s"
                  + (f", {peak / MIB:.0f} MiB" if peak else ""), file=sys.stderr)
            if args.raw:
                with args.raw.open("a") as file:
                    file.write(json.dumps({"case": case, "contender": contender.name, **result}) + "\n")
    return results


def same_losses(case, results, tolerance):
    losses = [result["losses"] for measured in results.values() for result in measured]
    worst = max(max(step) - min(step) for step in zip(*losses, strict=True))
    print(f"{case}: the losses of {len(losses[0])} steps differ by at most {worst:.1e}", file=sys.stderr)
    if worst > tolerance:
        sys.exit(f"{case}: losses differ by {worst:.1e}, allowed {tolerance:.0e}: {results}")


def same_tokens(case, results, _):
    """Batches differ, so losses of single steps do not compare; what was read and trained does."""
    for key in ("tokens", "trained_tokens"):
        found = {result[key] for measured in results.values() for result in measured}
        if len(found) > 1:
            sys.exit(f"{case}: {key} differ between contenders: {sorted(found)}")
    for name, measured in results.items():
        first = measured[0]
        print(f"{case} {name}: {first['steps']} steps, {first['tokens']} tokens, {first['trained_tokens']} trained, "
              f"mean loss {first['mean_loss']:.4f}", file=sys.stderr)


def print_rows(case, results):
    """A row per contender, and by how much emberlora differs from it. What a contender has not is a dash."""
    keys = ("tokens_per_second", "peak_memory_bytes", "start_to_first_step", "seconds")
    medians = {name: [median([result[key] for result in measured]) for key in keys]
               for name, measured in results.items()}
    our_speed, our_memory, our_start, _ = medians[OURS]
    shown = lambda value, digits, unit="": "–" if value is None else f"{value:.{digits}f}{unit}"
    for name, (speed, memory, start, seconds) in medians.items():
        ratios = [None] * 3
        if name != OURS:
            ratios = [our_speed / speed, memory and our_memory / memory, start and start / our_start]
        figures = [(speed, 0), (memory and memory / MIB, 0), (start, 2), (seconds, 2)]
        ratios = [shown(ratio, digits, " ×") for ratio, digits in zip(ratios, (2, 3, 1))]
        print_row([case, name, *(shown(value, digits) for value, digits in figures), *ratios])


def median(values):
    return None if None in values else statistics.median(values)


def print_row(cells):
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
