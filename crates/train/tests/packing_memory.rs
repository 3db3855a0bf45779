//! What loading a packed model takes, in a process of its own.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use burn::tensor::Device;
use emberlora_model::{AttentionKind, CausalLm, FloatDtype, LoadOptions, QuantizationOptions};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use emberlora_train::peak_memory_bytes;
use serde_json::{Map, json};

const HIDDEN: usize = 1024;
const INNER: usize = 4096;
const LAYERS: usize = 3;

/// A bf16 model, written without ever being in memory.
fn write_model(dir: &Path) {
    let config = json!({
        "model_type": "llama", "vocab_size": 96, "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": 8,
        "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();

    let mut shapes = vec![("model.embed_tokens".to_owned(), vec![96, HIDDEN]), ("model.norm".to_owned(), vec![HIDDEN])];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.v_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}"), shape));
        }
    }
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in shapes {
        let bytes = shape.iter().product::<usize>() * 2;
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + bytes]});
        header.insert(format!("{name}.weight"), entry);
        end += bytes;
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = BufWriter::new(File::create(dir.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    // Numbers of about 0.01 in size.
    let piece: Vec<u8> = (0..HIDDEN).flat_map(|i| [(i * 37) as u8, 0x3c]).collect();
    assert_eq!(end % piece.len(), 0);
    (0..end / piece.len()).for_each(|_| file.write_all(&piece).unwrap());
    file.flush().unwrap();
}

#[test]
fn packing_holds_no_more_than_one_dense_projection_beyond_the_packed_model() {
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let scheme = Scheme::new(QuantKind::Nf4, BlockSize::default(), true);
    let quantization = Some(QuantizationOptions::new(scheme, Vec::new(), 0.0));
    let options = LoadOptions { quantization, ..LoadOptions::new(None, FloatDtype::F32, AttentionKind::Fused) };

    let before = peak_memory_bytes().unwrap();
    let (_model, report) = CausalLm::load(dir.path(), &options, &Device::flex()).unwrap();
    let taken = peak_memory_bytes().unwrap() - before;
    let (packed, largest) = (report.packed_bytes as u64, (INNER * HIDDEN * 2) as u64);
    let dense = report.packed_parameters as u64 * 2;
    assert!(packed * 3 < dense);
    // Beside them the reader's buffer and what threads and the allocator keep.
    let other = 8 << 20;
    assert!(taken < packed + largest + other, "{taken} bytes for {packed} packed out of {dense}");
}
