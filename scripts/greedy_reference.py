#!/usr/bin/env python3
"""Print transformers' greedy continuations as JSON, to compare `emberlora generate` with.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements-reference.txt
    .venv/bin/python scripts/greedy_reference.py models/smollm2
    .venv/bin/python scripts/greedy_reference.py models/smollm2 --adapter runs/smollm2/adapter --chat "Hello"

One line per prompt: {"kind": "prompt" | "chat", "prompt", "input_ids", "output_ids", "text", "margin"}. Raw prompts are
tokenised as they are, chat prompts are one user turn rendered by the model's own template. `text` leaves special tokens
out. `margin` is the smallest distance between the best and the second best logit on the way: where it is as small as a
rounding error, two correct programs may part. Everything runs in f32 on the CPU.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):",
    "Water boils at",
    "The three primary colours are",
]
CHATS = [
    "Hello, who are you?",
    "What is the capital of Italy?",
    "Write a haiku about autumn.",
    "Explain in one sentence why the sky is blue.",
    "List three animals that can fly.",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the model's directory")
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter to load on top")
    parser.add_argument("--prompt", action="append", default=[], help="a raw prompt, instead of the built-in ones")
    parser.add_argument("--chat", action="append", default=[], help="a user turn, instead of the built-in ones")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()

    # Not AutoTokenizer: some classes of transformers 5 replace the pre-tokenizer that tokenizer.json asks for.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager")
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    model.eval()
    builtin = not args.prompt and not args.chat
    for prompt in PROMPTS if builtin else args.prompt:
        show(model, tokenizer, args.max_new_tokens, "prompt", prompt, tokenizer(prompt).input_ids)
    for prompt in CHATS if builtin else args.chat:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True)["input_ids"]
        show(model, tokenizer, args.max_new_tokens, "chat", prompt, ids)


def show(model, tokenizer, max_new_tokens, kind, prompt, input_ids):
    ids = torch.tensor([input_ids])
    # An empty generation config: what a model's generation_config.json asks for is not greedy decoding.
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True,
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id))
    output_ids = generated.sequences[0, len(input_ids):].tolist()
    best = torch.cat(generated.logits).float().topk(2).values
    print(json.dumps({
        "kind": kind, "prompt": prompt, "input_ids": input_ids, "output_ids": output_ids,
        "text": tokenizer.decode(output_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "margin": (best[:, 0] - best[:, 1]).min().item(),
    }, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
