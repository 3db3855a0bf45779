#!/usr/bin/env python3
"""Run one recipe on several devices and put the loss curves side by side, as a table and a plot in docs/backends.md.

    cargo build --release --features ndarray,wgpu
    python3 scripts/compare_backends.py --devices flex,ndarray,wgpu:0

What follows `--` goes to `emberlora train` as it stands. Needs nothing but Python's standard library. Writes
docs/backends.svg, and the part of docs/backends.md between its two markers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- scripts/compare_backends.py -->\n", "<!-- end -->\n"
# Readable beside one another also in print: hue and dashes both tell them apart.
STROKES = [("#1b6ca8", ""), ("#d1495b", "6 4"), ("#2e933c", "2 4"), ("#8f5bb5", "10 3 2 3")]


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--devices", default="flex,ndarray,wgpu:0", help="comma-separated, as recipes name them")
    parser.add_argument("--recipe", default="recipes/quickstart.yaml")
    parser.add_argument("--binary", default=None, help="emberlora (default: the release build)")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    return parser.parse_args()


def binary(given):
    if given:
        return given
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return str(target / "release" / "emberlora")


def run(program, recipe, device, overrides):
    """The steps of a run, as metrics.jsonl has them."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "run"
        command = [program, "train", recipe, *overrides, f"output={output}", "--device", device]
        print(" ".join(command), file=sys.stderr)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "lr" in line]


def table(runs):
    devices = list(runs)
    first = runs[devices[0]]
    rows = ["| step | " + " | ".join(devices) + " |", "|---:|" + "---:|" * len(devices)]
    shown = [i for i in range(len(first)) if i == 0 or (i + 1) % 5 == 0 or i + 1 == len(first)]
    for i in shown:
        rows.append(f"| {first[i]['step']} | " + " | ".join(f"{runs[d][i]['loss']:.6f}" for d in devices) + " |")
    for device in devices[1:]:
        off = max(abs(a["loss"] - b["loss"]) for a, b in zip(first, runs[device]))
        rows.append("")
        rows.append(f"The losses of {device} differ from those of {devices[0]} by at most {off:.1e}.")
    return "\n".join(rows) + "\n"


def plot(runs):
    width, height, left, top, right, bottom = 720, 360, 60, 20, 20, 44
    losses = [step["loss"] for steps in runs.values() for step in steps]
    count = max(len(steps) for steps in runs.values())
    most = max(losses) * 1.05
    x = lambda i: left + (width - left - right) * i / max(count - 1, 1)
    y = lambda loss: height - bottom - (height - top - bottom) * loss / most
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i in range(6):
        loss = most * i / 5
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y(loss):.1f}" y2="{y(loss):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
    for i in range(0, count, max(count // 6, 1)):
        parts.append(f'<text x="{x(i):.1f}" y="{height - bottom + 18}" text-anchor="middle">{i + 1}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">step</text>')
    parts.append(f'<text x="16" y="{height / 2}" transform="rotate(-90 16 {height / 2})" text-anchor="middle">loss</text>')
    for n, (device, steps) in enumerate(runs.items()):
        colour, dashes = STROKES[n % len(STROKES)]
        points = " ".join(f"{x(i):.1f},{y(step['loss']):.1f}" for i, step in enumerate(steps))
        # Thinner ones lie above thicker ones, so that curves which coincide can all be seen.
        stroke = f'fill="none" stroke="{colour}" stroke-width="{2 + 2 * (len(runs) - 1 - n)}" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{points}" {stroke}/>')
        legend = top + 14 + 18 * n
        parts.append(f'<line x1="{width - 150}" x2="{width - 115}" y1="{legend}" y2="{legend}" {stroke}/>')
        parts.append(f'<text x="{width - 108}" y="{legend + 4}">{device}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def main():
    args = arguments()
    program = binary(args.binary)
    runs = {device: run(program, args.recipe, device, args.overrides) for device in args.devices.split(",")}
    (ROOT / "docs/backends.svg").write_text(plot(runs))
    page = ROOT / "docs/backends.md"
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    command = " ".join(["emberlora train", args.recipe, *args.overrides])
    body = f"`{command} --device …`:\n\n![loss by step](backends.svg)\n\n{table(runs)}"
    page.write_text(before + BEGIN + body + END + after)


if __name__ == "__main__":
    main()
