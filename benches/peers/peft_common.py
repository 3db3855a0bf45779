"""What the PEFT contenders share: loading the model with an adapter, and what they report."""

import json
import os
import time
import warnings

START = time.time()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

transformers.utils.logging.disable_progress_bar()
warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers will rename


def load(model_dir, adapter, *, checkpointing=False, nf4=False):
    """The model in f32 with the adapter of a directory, which is trained further."""
    options = {}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa", **options)
    if checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
    return model.train()


def optimizer_of(model, lr):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)


def peak_memory_bytes():
    """The largest resident set of this process: the same number that emberlora reports."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def report(first_step_at, **values):
    """Prints the one line that compare.py reads."""
    print(json.dumps({
        **values,
        "peak_memory_bytes": peak_memory_bytes(),
        "start_to_first_step": first_step_at - START,
        "first_step_at": first_step_at,
    }))
