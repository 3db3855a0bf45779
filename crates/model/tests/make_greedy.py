#!/usr/bin/env python3
"""Write greedy.jsonl: what transformers 5.23.0 (torch 2.15.0, f32, CPU, eager attention) generates from the tiny models.

    python crates/model/tests/make_greedy.py    # from the top of the repository

24 tokens are generated behind prompts of 4 and 20 tokens, past the sliding windows and, for dynamic rotation, past the
trained length. Cases in which two scores come closer than 1e-3 are left out: rounding may decide them.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

assert (transformers.__version__, torch.__version__.split("+")[0]) == ("5.23.0", "2.15.0")
HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parents[2] / "tests" / "fixtures"
torch.set_num_threads(1)

with open(HERE / "greedy.jsonl", "w") as out:
    for config in sorted(FIXTURES.glob("*/config.json")):
        for length in (4, 20):
            kept = False
            for seed in range(20):
                # Loaded anew each time: dynamic rotation remembers the longest sequence that a model has seen.
                model = AutoModelForCausalLM.from_pretrained(
                    config.parent, dtype=torch.float32, attn_implementation="eager"
                )
                model.generation_config.eos_token_id = None
                generator = torch.Generator().manual_seed(1000 * length + seed)
                prompt = torch.randint(3, 96, (1, length), generator=generator)
                result = model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
                    output_scores=True, return_dict_in_generate=True,
                )
                tokens = result.sequences[0, length:].tolist()
                top = torch.stack(result.scores)[:, 0].topk(2).values
                if len(tokens) == 24 and (top[:, 0] - top[:, 1]).min() > 1e-3:
                    case = {"family": config.parent.name, "prompt": prompt[0].tolist(), "tokens": tokens}
                    out.write(json.dumps(case) + "\n")
                    kept = True
                    break
            if not kept:
                print(f"{config.parent.name}: no clear case with a prompt of {length}", file=sys.stderr)
