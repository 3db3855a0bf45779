use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::rope::RopeScaling;

fn base(family: &str) -> Value {
    json!({
        "model_type": family, "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    })
}

fn with(family: &str, more: Value) -> Result<ModelConfig, ConfigError> {
    let mut map = base(family);
    for (key, value) in more.as_object().unwrap() {
        map[key] = value.clone();
    }
    ModelConfig::from_json(&map.to_string(), Path::new("config.json"))
}

fn error(family: &str, more: Value) -> String {
    with(family, more).unwrap_err().to_string()
}

#[test]
fn old_and_new_rope_spellings_resolve_alike() {
    let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let old = with("llama", json!({"rope_theta": 5e5, "rope_scaling": scaling})).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(5e5);
    let new = with("llama", json!({"rope_parameters": parameters})).unwrap();
    assert_eq!(old, new);
    assert_eq!(old.rope.theta, 5e5);
    assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { original_max_position_embeddings: 8192, .. }));
}

#[test]
fn the_oldest_rope_spelling_names_its_type_type() {
    let config = with("llama", json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn yarn_computes_what_is_not_given() {
    let config =
        with("qwen2", json!({"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 16}})).unwrap();
    let RopeScaling::Yarn { factor, attention_factor, beta_fast, truncate, .. } = config.rope.scaling else {
        panic!("{:?}", config.rope)
    };
    assert_eq!((factor, beta_fast, truncate), (4.0, 32.0, true));
    assert_eq!(attention_factor, 0.1 * 4f64.ln() + 1.0);
}

#[test]
fn rope_types_that_are_not_computed_are_errors() {
    let text =
        error("phi3", json!({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}));
    assert!(text.contains("rope_scaling.rope_type") && text.contains("longrope"), "{text}");
    let text = error("llama", json!({"rope_scaling": {"rope_type": "linear"}}));
    assert!(text.contains("`rope_scaling.factor` is missing"), "{text}");
    let text = error("llama", json!({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}));
    assert!(text.contains("differ between layers"), "{text}");
}

#[test]
fn an_unknown_key_is_an_error_that_names_key_and_value() {
    let text = error("llama", json!({"logit_scale": 0.0625, "new_norm": "x"}));
    assert!(text.contains("`logit_scale` (0.0625)") && text.contains("`new_norm` (\"x\")"), "{text}");
    let text = error("llama", json!({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "warp": 3}}));
    assert!(text.contains("`rope_scaling.warp` (3)"), "{text}");
}

#[test]
fn unknown_keys_that_are_off_and_known_harmless_keys_pass() {
    let extra = json!({"qk_layernorm": false, "clip_qkv": null, "transformers.js_config": {"dtype": "q4"},
        "rope_interleaved": false, "is_llama_config": true, "_name_or_path": "x", "torch_dtype": "bfloat16"});
    with("llama", extra).unwrap();
}

#[test]
fn what_would_change_the_numbers_is_refused() {
    for (family, key, value) in [
        ("llama", "hidden_act", json!("gelu")),
        ("llama", "attention_dropout", json!(0.1)),
        ("phi3", "resid_pdrop", json!(0.1)),
        ("llama", "quantization_config", json!({"quant_method": "gptq"})),
        ("llama", "sliding_window", json!(128)),
        ("mistral", "attention_bias", json!(true)),
        ("llama", "partial_rotary_factor", json!(0.5)),
        ("llama", "num_key_value_heads", json!(3)),
        ("llama", "model_type", json!("gpt2")),
        ("llama", "layer_types", json!(["full_attention", "sliding_attention"])),
    ] {
        let text = error(family, json!({ key: value }));
        assert!(text.contains(key), "{key}: {text}");
    }
}

#[test]
fn wrong_types_and_missing_keys_name_the_key() {
    let text = error("llama", json!({"hidden_size": "big"}));
    assert!(text.contains("`hidden_size` is \"big\", expected a whole number"), "{text}");
    let text = error("llama", json!({"vocab_size": null}));
    assert!(text.contains("`vocab_size` is missing"), "{text}");
    let text = ModelConfig::from_json("[1]", Path::new("c.json")).unwrap_err().to_string();
    assert!(text.contains("not a JSON object"), "{text}");
}

#[test]
fn sizes_beyond_all_reason_are_refused_before_anything_is_allocated() {
    let keys = ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"];
    for (family, key) in ["llama", "mistral", "qwen3", "phi3"].into_iter().flat_map(|f| keys.map(|key| (f, key))) {
        for value in [9_000_000_000_000_000, u64::MAX] {
            let text = error(family, json!({ key: value }));
            assert!(text.contains(&format!("`{key}` is {value}: must be at most")), "{text}");
        }
    }
    assert!(with("llama", json!({"num_hidden_layers": 10_000})).is_ok());
    assert!(with("llama", json!({"num_hidden_layers": 10_001})).is_err());
    for dim in [1 << 62, u64::MAX - 1, 1 << 23] {
        let text = error("llama", json!({"head_dim": dim}));
        assert!(text.contains("`head_dim`") && text.contains("times num_attention_heads (4)"), "{text}");
    }
    error("llama", json!({"num_key_value_heads": u64::MAX}));
}

#[test]
fn a_window_wider_than_any_index_hides_nothing() {
    let windows = |window: u64| with("mistral", json!({"sliding_window": window})).unwrap().windows;
    assert_eq!(windows(8), [Some(8); 2]);
    assert_eq!(windows(u64::MAX), [Some(i32::MAX as usize); 2]);
}

#[test]
fn family_defaults_are_their_own() {
    let qwen3 = with("qwen3", json!({})).unwrap();
    assert_eq!((qwen3.head_dim, qwen3.qk_norm), (128, QkNorm::PerHead));
    let qwen2 = with("qwen2", json!({})).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.output_bias);
    assert_eq!(with("olmo2", json!({})).unwrap().rms_norm_eps, 1e-5);
    assert_eq!(with("mistral", json!({})).unwrap().windows, [Some(4096), Some(4096)]);
    assert_eq!(with("mistral", json!({"sliding_window": null})).unwrap().windows, [None, None]);
    let phi3 = with("phi3", json!({"partial_rotary_factor": 0.5})).unwrap();
    assert_eq!((phi3.rope.dims, phi3.fused_qkv, phi3.fused_gate_up), (4, true, true));
}

#[test]
fn qwen_windows_follow_max_window_layers_or_layer_types() {
    let by_count = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    assert_eq!(with("qwen2", by_count).unwrap().windows, [None, Some(8)]);
    let by_type = json!({"use_sliding_window": true, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(with("qwen3", by_type).unwrap().windows, [Some(8), None]);
    assert_eq!(with("qwen2", json!({"sliding_window": 8, "max_window_layers": 0})).unwrap().windows, [None, None]);
}

#[test]
fn stop_tokens_prefer_the_generation_config() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 2}"#).unwrap();
    assert_eq!(stop_tokens(dir.path()).unwrap(), [2]);
    std::fs::write(dir.path().join("generation_config.json"), r#"{"eos_token_id": [7, 9]}"#).unwrap();
    assert_eq!(stop_tokens(dir.path()).unwrap(), [7, 9]);
}
