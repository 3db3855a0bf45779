//! Values of one key that cannot be taken.

use crate::{MINIMAL, only, problems, refused};

#[test]
fn values_of_the_wrong_type_are_refused() {
    refused("model.source=7", "model.source", "a string, in quotes");
    refused("model.source=[a]", "model.source", "a string");
    refused("model.source=''", "model.source", "a string");
    refused("model.revision=4e15273", "model.revision", "in quotes");
    refused("model.dtype=16", "model.dtype", "auto, f32, bf16 or f16");
    refused("model=m", "model", "a mapping with the keys source");
    refused("adapter.r=16.5", "adapter.r", "a whole number from 1 to 65536");
    refused("adapter.alpha='32'", "adapter.alpha", "a number above 0");
    refused("adapter.rslora=yes", "adapter.rslora", "true or false");
    refused("adapter.targets=3", "adapter.targets", "all-linear, a list");
    refused("adapter.exclude=null", "adapter.exclude", "a list of path endings");
    refused("adapter.layers=3", "adapter.layers", "a list of one or more items");
    refused("adapter.layers=[0, x]", "adapter.layers[1]", "a whole number");
    refused("adapter.rank_pattern=[q_proj]", "adapter.rank_pattern", "a mapping from");
    refused("adapter.rank_pattern.q_proj=x", "adapter.rank_pattern.q_proj", "a whole number from 1 to 65536");
    refused("adapter.init_from=3", "adapter.init_from", "a path, in quotes if it looks like a number, or null");
    refused("data.train={path: d}", "data.train", "a path, or a list");
    refused("data.train=null", "data.train", "a path, or a list");
    refused("data.train=[3]", "data.train[0]", "a path or {path, format, weight}");
    refused("data.eval=3", "data.eval", "or null");
    refused("train.optimizer.betas=0.9", "train.optimizer.betas", "a list of two items");
    refused("output=null", "output", "a path");
    refused("device=0", "device", "cuda:N");
    refused("gradient_checkpointing=4", "gradient_checkpointing", "{every: n}");
    refused("seed=1.5", "seed", "a whole number");
}

#[test]
fn values_out_of_range_are_refused() {
    refused("adapter.r=0", "adapter.r", "a whole number from 1 to 65536");
    refused("adapter.r=-1", "adapter.r", "a whole number from 1 to 65536");
    refused("adapter.r=65537", "adapter.r", "a whole number from 1 to 65536");
    refused("adapter.r=4611686018427387904", "adapter.r", "a whole number from 1 to 65536");
    refused("adapter.rank_pattern.q_proj=1e11", "adapter.rank_pattern.q_proj", "a whole number from 1 to 65536");
    refused("adapter.alpha=0", "adapter.alpha", "a number above 0");
    refused("adapter.dropout=1", "adapter.dropout", "a number of at least 0 and below 1");
    refused("adapter.dropout=-0.1", "adapter.dropout", "a number of at least 0 and below 1");
    refused("adapter.targets=[]", "adapter.targets", "a list of one or more");
    refused("adapter.layers=[]", "adapter.layers", "a list of one or more");
    refused("adapter.layers=[-1]", "adapter.layers[0]", "a whole number of at least 0");
    refused("adapter.alpha_pattern.q_proj=0", "adapter.alpha_pattern.q_proj", "a number above 0");
    refused("data.train=[]", "data.train", "a path, or a list");
    refused("data.train=[{path: d, weight: 0}]", "data.train[0].weight", "a number above 0");
    refused("data.train=[{path: d, weight: 10001}]", "data.train[0].weight", "a number above 0 and of at most 10000");
    refused("data.max_seq_len=1", "data.max_seq_len", "a whole number of at least 2");
    refused("train.epochs=0", "train.epochs", "a number above 0");
    refused("train.epochs=1000001", "train.epochs", "a number above 0 and of at most 1000000");
    refused("train.max_steps=0", "train.max_steps", "a whole number of at least 1 or null");
    refused("train.batch_size=0", "train.batch_size", "a whole number of at least 1");
    refused("train.grad_accumulation=0", "train.grad_accumulation", "a whole number of at least 1");
    refused("train.learning_rate=0", "train.learning_rate", "a number above 0");
    refused("train.learning_rate=-2e-4", "train.learning_rate", "a number above 0");
    refused("train.schedule.warmup_ratio=1.1", "train.schedule.warmup_ratio", "a number from 0 to 1 or null");
    refused("train.schedule.min_ratio=-0.1", "train.schedule.min_ratio", "a number from 0 to 1");
    refused("train.optimizer.betas=[0.9]", "train.optimizer.betas", "a list of two items");
    refused("train.optimizer.betas=[0.9, 1.0]", "train.optimizer.betas[1]", "a number of at least 0 and below 1");
    refused("train.optimizer.eps=0", "train.optimizer.eps", "a number above 0");
    refused("train.optimizer.weight_decay=-1", "train.optimizer.weight_decay", "a number of at least 0");
    refused("train.max_grad_norm=0", "train.max_grad_norm", "a number above 0 or null");
    refused("train.save_every=0", "train.save_every", "a whole number of at least 1 or null");
    refused("train.log_every=0", "train.log_every", "a whole number of at least 1");
    refused("gradient_checkpointing={every: 0}", "gradient_checkpointing.every", "a whole number of at least 1");
    refused("seed=-1", "seed", "a whole number of at least 0");
    refused("seed=18446744073709551616", "seed", "a whole number of at least 0");
    refused("seed=99999999999999999999999999999999999999999999", "seed", "a whole number of at least 0");
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    for value in [".nan", ".inf", "-.inf", "1e999"] {
        refused(&format!("train.learning_rate={value}"), "train.learning_rate", "a number above 0");
        refused(&format!("adapter.dropout={value}"), "adapter.dropout", "a number of at least 0");
    }
}

#[test]
fn numbers_that_single_precision_cannot_hold_are_refused() {
    for (argument, at, becomes) in [
        ("train.optimizer.eps=1e-50", "train.optimizer.eps", "0"),
        ("train.optimizer.betas=[0.9, 0.999999999999]", "train.optimizer.betas[1]", "1"),
        ("train.optimizer.weight_decay=1e-50", "train.optimizer.weight_decay", "0"),
        ("train.learning_rate=1e300", "train.learning_rate", "inf"),
        ("train.max_grad_norm=1e39", "train.max_grad_norm", "inf"),
        ("train.schedule.min_ratio=1e-46", "train.schedule.min_ratio", "0"),
        ("adapter.alpha=1e300", "adapter.alpha", "inf"),
        ("adapter.alpha_pattern.q_proj=1e-60", "adapter.alpha_pattern.q_proj", "0"),
        ("adapter.dropout=0.99999999", "adapter.dropout", "1"),
    ] {
        let problem = only(MINIMAL, &[argument]);
        assert_eq!(problem.key, at, "{problem}");
        let message = format!("out of range in single precision, where it is {becomes}");
        assert_eq!(problem.message, message, "{argument}");
    }
}

#[test]
fn unknown_names_suggest_the_nearest() {
    for (argument, nearest) in [
        ("model.attention=flash_attn", "flash_attention_2"),
        ("adapter.kind=LoRA", "lora"),
        ("adapter.task_type=causal_lm", "CAUSAL_LM"),
        ("data.format=chats", "chat"),
        ("data.chat_template=chat_ml", "chatml"),
        ("data.loss_on=asistant", "assistant"),
        ("train.schedule.kind=cosin", "cosine"),
        ("train.optimizer.kind=adam", "adamw"),
        ("device=cude:0", "cuda"),
        ("gradient_checkpointing=blocks", "block"),
        ("quantization={kind: int4}", "int8"),
    ] {
        let problem = only(MINIMAL, &[argument]);
        assert_eq!(problem.nearest.as_deref(), Some(nearest), "{problem}");
    }
}

#[test]
fn devices_with_a_bad_number_are_refused() {
    for device in ["cuda:", "cuda:x", "cuda:+1", "wgpu:-1", "cuda:0:1", "flex:0", "cuda:99999999999999999999999"] {
        refused(&format!("device={device:?}"), "device", "cuda:N");
    }
}

#[test]
fn addresses_that_name_no_server_are_refused() {
    for address in ["", "gpu", ":4000", "gpu:0", "gpu:65536", "gpu:4000/", "gpu:4000/x", "a b:1", "::1:4000", "[x]:1"] {
        refused(&format!("device={:?}", format!("remote://{address}")), "device", "remote://HOST:PORT");
    }
}

#[test]
fn lists_of_devices_that_make_no_sense_are_refused() {
    refused("device=[]", "device", "or a list of them");
    refused("device=[cuda:0, cuda:x]", "device[1]", "cuda:N");
    refused("device=[cuda:0, auto]", "device[1]", "cuda:N");
    refused("device=[flex, cuda:0, flex]", "device[2]", "cuda:N");
    let problem = only(MINIMAL, &["device=[cuda:0, cuda:1, cuda:2]", "train.grad_accumulation=2"]);
    assert_eq!(problem.key, "train.grad_accumulation");
    assert!(problem.to_string().contains("3 or more"), "{problem}");
}

#[test]
fn a_quantization_that_is_no_section_is_refused() {
    for value in ["nf4", "4", "false", "[nf4]"] {
        refused(&format!("quantization={value}"), "quantization", "kind, double_quant, block_size, skip, threshold");
    }
    refused("quantization=4", "quantization", "or null");
    assert_eq!(only(MINIMAL, &["quantization={}"]).key, "quantization.kind");
    assert_eq!(only(MINIMAL, &["quantization.threshold=0"]).message, "is required");
}

#[test]
fn wrong_values_of_quantization_are_refused() {
    refused("quantization={kind: nf5}", "quantization.kind", "nf4, fp4 or int8");
    refused("quantization={kind: 4}", "quantization.kind", "nf4, fp4 or int8");
    refused("quantization={kind: fp4, double_quant: 1}", "quantization.double_quant", "true or false");
    for size in ["0", "16", "63", "-64", "64.5", "1024", "1e30", "-1e30", ".nan", "'64'"] {
        let argument = format!("quantization={{kind: nf4, block_size: {size}}}");
        refused(&argument, "quantization.block_size", "32, 64, 128, 256 or 512");
    }
    refused("quantization={kind: nf4, skip: lm_head}", "quantization.skip", "a list of items, each a string");
    refused("quantization={kind: nf4, skip: [3]}", "quantization.skip[0]", "a string, in quotes");
    for threshold in ["-0.5", ".nan", ".inf", "1e50"] {
        let argument = format!("quantization={{kind: int8, threshold: {threshold}}}");
        refused(&argument, "quantization.threshold", "a number of at least 0");
    }
    let problem = only(MINIMAL, &["quantization={kind: nf4, block: 64}"]);
    assert_eq!(problem.nearest.as_deref(), Some("block_size"), "{problem}");
    assert_eq!(only(MINIMAL, &["quantization={kind: nf, threshold: 1}"]).nearest.as_deref(), Some("nf4"));
    assert_eq!(only(MINIMAL, &["threshold=1"]).nearest.as_deref(), Some("quantization.threshold"));
}

#[test]
fn keys_of_another_kind_of_quantization_are_refused() {
    for (kind, key, value) in [
        ("nf4", "threshold", "6.0"),
        ("fp4", "threshold", "0"),
        ("int8", "double_quant", "true"),
        ("int8", "double_quant", "false"),
        ("int8", "block_size", "64"),
    ] {
        let problem = only(MINIMAL, &[&format!("quantization={{kind: {kind}, {key}: {value}}}")]);
        assert_eq!(problem.key, format!("quantization.{key}"));
        assert_eq!(problem.message, format!("has no effect with `kind: {kind}`"));
    }
    let found = problems(MINIMAL, &["quantization={kind: int8, double_quant: true, block_size: 32}"]);
    assert_eq!(found.len(), 2, "{found:#?}");
}
