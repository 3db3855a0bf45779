//! `quantization_config`, the part of a model's `config.json` that tells transformers how its weights are quantised.

use serde_json::{Value, json};

use super::state::torch_name;
use crate::{FloatDtype, QuantKind};

/// What transformers leaves out when no list says otherwise.
const HEAD: &str = "lm_head";

/// What transformers' `BitsAndBytesConfig` says about a checkpoint.
///
/// The block size is not in it: each 4-bit weight tells its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The format of the quantised weights.
    pub kind: QuantKind,
    /// Whether the scales of 4-bit weights are in 8 bits; `false` for INT8.
    pub double_quant: bool,
    /// What 4-bit weights are dequantised to for computing.
    pub compute_dtype: FloatDtype,
    /// Modules that are not quantised, by names that transformers matches against the whole name, its beginning or its
    /// end; `None` leaves out the head.
    pub skip: Option<Vec<String>>,
    /// From which magnitude on activations go through INT8 weights in full precision; 0 for never.
    pub threshold: f64,
}

/// A `quantization_config` that this crate does not read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`quantization_config.{key}` is {found}; expected {expected}")]
pub struct ConfigError {
    /// The key.
    pub key: &'static str,
    /// What it says.
    pub found: String,
    /// What it may say.
    pub expected: &'static str,
}

impl Config {
    /// Reads the value of `quantization_config`.
    ///
    /// # Errors
    /// [`ConfigError`] for another method than bitsandbytes, a format that is neither NF4, FP4 nor INT8, and values of
    /// the wrong type.
    pub fn from_json(value: &Value) -> Result<Self, ConfigError> {
        let text = |key, default, expected| match get(value, key) {
            None => Ok(default),
            Some(Value::String(text)) => Ok(text.as_str()),
            Some(other) => Err(error(key, other, expected)),
        };
        let flag = |key| match get(value, key) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(error(key, other, "true or false")),
        };
        let method = text("quant_method", "bitsandbytes", "bitsandbytes")?;
        if method != "bitsandbytes" {
            return Err(error("quant_method", &json!(method), "bitsandbytes"));
        }
        if flag("llm_int8_has_fp16_weight")? {
            return Err(error("llm_int8_has_fp16_weight", &json!(true), "false: the weights are stored in INT8"));
        }
        let kind = match (flag("load_in_4bit")?, flag("load_in_8bit")?) {
            (true, false) => match text("bnb_4bit_quant_type", "fp4", "nf4 or fp4")? {
                "nf4" => QuantKind::Nf4,
                "fp4" => QuantKind::Fp4,
                other => return Err(error("bnb_4bit_quant_type", &json!(other), "nf4 or fp4")),
            },
            (false, true) => QuantKind::Int8,
            (both, _) => return Err(error("load_in_4bit", &json!(both), "true, or load_in_8bit true instead of it")),
        };
        let float = "float32, bfloat16 or float16";
        let compute = text("bnb_4bit_compute_dtype", "float32", float)?;
        let compute_dtype = compute.parse().map_err(|_| error("bnb_4bit_compute_dtype", &json!(compute), float))?;
        let names = "null or a list of names";
        let skip = match get(value, "llm_int8_skip_modules") {
            None => None,
            Some(Value::Array(items)) => {
                let items = items.iter().map(|item| item.as_str().map(str::to_owned)).collect::<Option<Vec<_>>>();
                Some(items.ok_or_else(|| error("llm_int8_skip_modules", &value["llm_int8_skip_modules"], names))?)
            }
            Some(other) => return Err(error("llm_int8_skip_modules", other, names)),
        };
        let threshold = match get(value, "llm_int8_threshold") {
            None => 6.0,
            Some(number) => number
                .as_f64()
                .filter(|threshold| *threshold >= 0.0)
                .ok_or_else(|| error("llm_int8_threshold", number, "a number from 0 on"))?,
        };
        let double_quant = kind != QuantKind::Int8 && flag("bnb_4bit_use_double_quant")?;
        Ok(Self { kind, double_quant, compute_dtype, skip, threshold })
    }

    /// Whether a module of this name stays dense; see [`is_skipped`].
    pub fn skips(&self, module: &str) -> bool {
        match &self.skip {
            Some(names) => is_skipped(module, names),
            None => module == HEAD,
        }
    }

    /// The value of `quantization_config`, with the keys that transformers writes.
    pub fn to_json(&self) -> Value {
        let int8 = self.kind == QuantKind::Int8;
        let quant_type = self.kind.codebook().map_or("fp4", |codebook| codebook.name());
        json!({
            "_load_in_4bit": !int8,
            "_load_in_8bit": int8,
            "bnb_4bit_compute_dtype": torch_name(self.compute_dtype),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": false,
            "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": self.skip,
            "llm_int8_threshold": self.threshold,
            "load_in_4bit": !int8,
            "load_in_8bit": int8,
            "quant_method": "bitsandbytes",
        })
    }
}

/// Whether a list of modules to skip has this one in it: by its whole name, by what it begins with up to a dot, or by
/// what it ends with.
///
/// That is transformers' `should_convert_module` for names; there they may also be regular expressions.
pub fn is_skipped(module: &str, names: &[String]) -> bool {
    names.iter().any(|name| {
        let begins = module.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        begins || module.ends_with(name.as_str())
    })
}

/// A key's value, unless it is absent or null.
fn get<'a>(value: &'a Value, key: &str) -> Option<&'a Value> {
    value.get(key).filter(|value| !value.is_null())
}

fn error(key: &'static str, found: &Value, expected: &'static str) -> ConfigError {
    ConfigError { key, found: found.to_string(), expected }
}
