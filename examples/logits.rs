//! What a model with an adapter computes, as JSON, for comparison with another program.
//!
//! ```sh
//! cargo run --release -- inspect recipes/quickstart.yaml --json | head -n 5 > rows.jsonl
//! cargo run --release --example logits -- examples/quickstart/model runs/quickstart/adapter rows.jsonl > logits.json
//! .venv/bin/python scripts/check_adapter_with_peft.py --model examples/quickstart/model \
//!     --adapter runs/quickstart/adapter --expect logits.json
//! ```
//!
//! The rows are JSON objects with `input_ids`, one per line; the result is `{"input_ids": […], "logits": […]}`.

use std::error::Error;
use std::path::Path;

use burn::tensor::Device;
use emberlora::kernels::AttentionKind;
use emberlora::lora::{Pass, peft};
use emberlora::model::{CausalLm, Input, LoadOptions};
use emberlora::quant::FloatDtype;
use serde_json::{Value, json};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, adapter, rows] = arguments.as_slice() else {
        return Err("usage: logits MODEL_DIR ADAPTER_DIR ROWS.jsonl".into());
    };
    let device = Device::flex();
    let options = LoadOptions::new(None, FloatDtype::F32, AttentionKind::Fused);
    let (mut model, _) = CausalLm::load(Path::new(model), &options, &device)?;
    peft::apply(&mut model, &peft::load(Path::new(adapter))?, &device)?;

    let (mut input_ids, mut logits) = (Vec::new(), Vec::new());
    for line in std::fs::read_to_string(rows)?.lines() {
        let row: Value = serde_json::from_str(line)?;
        let ids: Vec<u32> = serde_json::from_value(row["input_ids"].clone())?;
        let pass = Pass::eval();
        let hidden = model.hidden(&Input::unpacked(1, ids.len(), &ids, &device)?, &pass);
        let scores = model.logits(hidden, &pass);
        let [_, _, vocabulary] = scores.dims();
        let scores: Vec<f32> = scores.into_data().try_to_vec()?;
        input_ids.push(ids);
        logits.push(scores.chunks(vocabulary).map(<[f32]>::to_vec).collect::<Vec<_>>());
    }
    println!("{}", json!({ "input_ids": input_ids, "logits": logits }));
    Ok(())
}
