//! A model that is large enough for its weights to show in the memory of a process.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, json};

pub const HIDDEN: usize = 1024;
pub const INNER: usize = 4096;
pub const LAYERS: usize = 3;

/// A bf16 model, written without ever being in memory.
pub fn write_model(dir: &Path) {
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
