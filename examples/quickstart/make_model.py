#!/usr/bin/env python3
"""Train the small model of the quickstart and write its data set.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements-reference.txt
    .venv/bin/python examples/quickstart/make_model.py

Writes, beside this file:
  model/                    a Llama of 0.8 M parameters that answers simple questions plainly: config.json,
                            model.safetensors (bf16), tokenizer.json, tokenizer_config.json
  train.jsonl, eval.jsonl   the same questions answered by a pirate; no fact is in both files

The text comes from world.py, word lists and templates under the project's licence. Takes about ten minutes on one core
with torch 2.15.0; the seeds are fixed, so the same machine makes the same files again.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import world

HERE = Path(__file__).resolve().parent
END_OF_TEXT, TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY = 768
BATCH = 48


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1700)
    args = parser.parse_args()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    parts = world.split(seed=7)
    train, held_out = (list(world.pirates(seed, count, parts[name])) for name, seed, count in [("train", 8, 1200), ("eval", 9, 120)])
    for name, rows in [("train", train), ("eval", held_out)]:
        with open(HERE / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"messages": messages}) + "\n" for messages in rows)

    out = HERE / "model"
    out.mkdir(exist_ok=True)
    documents = [render(d) for d in world.pretraining(seed=1, count=args.steps * BATCH, parts=parts)]
    tokenizer = make_tokenizer(documents[:6000], out)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters")
    pretrain(model, tokenizer, documents, args.steps)
    # The configuration in the spelling that published models have.
    model.to(torch.bfloat16).save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope["rope_theta"], "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    config.pop("transformers_version")
    write_json(out / "config.json", config)
    (out / "model.safetensors").chmod(0o644)
    (out / "generation_config.json").unlink(missing_ok=True)
    show(out, [messages[0]["content"] for messages in held_out[:12]])


def render(document):
    """The text of a document: the template's, or the story itself."""
    if isinstance(document, str):
        return document + END_OF_TEXT
    return "".join(f"{TURN}{m['role']}\n{m['content']}{END_OF_TURN}\n" for m in document)


def make_tokenizer(texts, out):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in [END_OF_TEXT, TURN, END_OF_TURN]]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": TURN, "eos_token": END_OF_TURN, "pad_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT, "model_max_length": 512, "clean_up_tokenization_spaces": False, "chat_template": CHATML,
    })
    return tokenizer


def pretrain(model, tokenizer, documents, steps):
    rows = [encoding.ids for encoding in tokenizer.encode_batch(documents)]
    # Rows of similar length share a batch, the batches come in random order.
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
    batches = [order[i * BATCH:(i + 1) * BATCH] for i in range(steps)]
    random.Random(2).shuffle(batches)
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 3e-3 * min((s + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * s / steps)))
    started, seen, average = time.time(), 0, None
    for step, batch in enumerate(batches):
        length = max(len(rows[i]) for i in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for k, i in enumerate(batch):
            ids[k, :len(rows[i])] = labels[k, :len(rows[i])] = torch.tensor(rows[i])
        logits = model(ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen += sum(len(rows[i]) for i in batch)
        average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {average:.3f}, {seen / (time.time() - started):.0f} tokens/s", flush=True)


def show(path, questions):
    """A few answers of the model as it was written."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=80, do_sample=False, eos_token_id=2, pad_token_id=0)
        print(f"{question}\n  {tokenizer.decode(output[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)}")


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
