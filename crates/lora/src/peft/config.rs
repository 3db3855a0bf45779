//! `adapter_config.json`: read with PEFT's rules and written as PEFT writes it.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::PeftError;
use crate::{Exclude, LoraOptions, Targets};

/// The version of PEFT whose format is written.
const PEFT_VERSION: &str = "0.21.2";

/// What `adapter_config.json` says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct AdapterConfig {
    pub(super) options: LoraOptions,
    pub(super) base_model_name: Option<String>,
    pub(super) revision: Option<String>,
    pub(super) warnings: Vec<String>,
}

/// Keys that say nothing about the numbers of a plain LoRA adapter that is already trained.
const WITHOUT_EFFECT: &[&str] = &[
    "auto_mapping",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
];

/// Keys that change the numbers unless they are null, false or empty, and what they would mean.
const UNSUPPORTED: &[(&str, &str)] = &[
    ("alora_invocation_tokens", "an activated LoRA takes effect only after certain tokens"),
    ("arrow_config", "Arrow routes between several adapters"),
    ("ensure_weight_tying", "it ties adapters of the embedding and the head"),
    ("fan_in_fan_out", "the base weights would be stored transposed"),
    ("kasa_config", "KaSA changes the base weights"),
    ("layer_replication", "it changes the layers of the base model"),
    ("lora_bias", "the adapter would have biases"),
    ("megatron_config", "it is for Megatron's parallel layers"),
    ("modules_to_save", "it replaces modules of the base model by trained ones"),
    ("monteclora_config", "MonteCLoRA samples the adapter's weights"),
    ("target_parameters", "it adapts parameters that are not linear layers"),
    ("trainable_token_indices", "it trains rows of the embedding"),
    ("use_bdlora", "BD-LoRA has block-diagonal factors"),
    ("use_dora", "DoRA adds a trained magnitude"),
    ("use_qalora", "QA-LoRA pools the adapter's input"),
    ("velora_config", "VeLoRA changes the gradients"),
];

/// Values of `init_lora_weights` that leave the base weights alone, so that the adapter means the same without them.
const NEUTRAL_INITS: &[&str] = &["gaussian", "eva", "orthogonal", "mica"];

/// Reads the bytes of the file; `path` is for messages.
pub(super) fn parse(bytes: &[u8], path: &Path) -> Result<AdapterConfig, PeftError> {
    let root: Value =
        serde_json::from_slice(bytes).map_err(|source| PeftError::Json { path: path.to_owned(), source })?;
    let Value::Object(map) = root else {
        let found = shorten(&root);
        return Err(PeftError::Value { path: path.to_owned(), key: "(root)".into(), found, expected: "an object" });
    };
    let keys = Keys { map: &map, path };

    match keys.string("peft_type")?.as_deref() {
        Some("LORA") => {}
        Some(_) => return Err(keys.unsupported("peft_type", "only LORA adapters can be used")),
        None => return Err(keys.wrong("peft_type", "\"LORA\"")),
    }
    if !matches!(keys.string("task_type")?.as_deref(), None | Some("CAUSAL_LM")) {
        return Err(keys.unsupported("task_type", "only causal language models can be adapted"));
    }
    if !matches!(keys.string("bias")?.as_deref(), None | Some("none")) {
        return Err(keys.unsupported("bias", "the adapter would change biases of the base model"));
    }
    keys.check_init()?;
    for (key, reason) in UNSUPPORTED {
        if !is_falsy(map.get(*key)) {
            return Err(keys.unsupported(key, reason));
        }
    }

    let defaults = LoraOptions::default();
    let options = LoraOptions {
        r: keys.usize("r")?.unwrap_or(defaults.r),
        alpha: keys.f64("lora_alpha")?.unwrap_or(defaults.alpha),
        dropout: keys.f64("lora_dropout")?.unwrap_or(defaults.dropout),
        targets: keys.targets()?,
        exclude: match keys.names("exclude_modules")? {
            Some(Names::List(list)) => Exclude::Suffixes(list),
            Some(Names::One(pattern)) => Exclude::Regex(pattern),
            None => Exclude::default(),
        },
        layers: keys.layers()?,
        layers_pattern: match keys.names("layers_pattern")? {
            Some(Names::List(list)) => list,
            Some(Names::One(pattern)) if !pattern.is_empty() => vec![pattern],
            Some(Names::One(_)) | None => Vec::new(),
        },
        rank_pattern: keys.pattern("rank_pattern", "an object of ranks", as_usize)?,
        alpha_pattern: keys.pattern("alpha_pattern", "an object of numbers", Value::as_f64)?,
        rslora: keys.bool("use_rslora")?.unwrap_or(defaults.rslora),
        seed: defaults.seed,
    };
    Ok(AdapterConfig {
        options,
        base_model_name: keys.string("base_model_name_or_path")?,
        revision: keys.string("revision")?,
        warnings: keys.unknown(),
    })
}

/// The text of the file, as PEFT writes it: sorted keys, indented by two.
///
/// `target_modules` is what `all-linear` stands for in the model, because PEFT resolves it before it saves. The
/// patterns keep their order, in which the first match wins, where PEFT sorts them.
pub(super) fn render(
    options: &LoraOptions,
    all_linear: Vec<String>,
    base_model_name: &str,
    revision: Option<&str>,
) -> String {
    let LoraOptions {
        r,
        alpha,
        dropout,
        targets,
        exclude,
        layers,
        layers_pattern,
        rank_pattern,
        alpha_pattern,
        rslora,
        seed: _,
    } = options;
    let targets = match targets {
        Targets::AllLinear => json!(all_linear),
        Targets::Suffixes(list) => json!(list),
        Targets::Regex(pattern) => json!(pattern),
    };
    let exclude = match exclude {
        Exclude::Suffixes(list) if list.is_empty() => Value::Null,
        Exclude::Suffixes(list) => json!(list),
        Exclude::Regex(pattern) => json!(pattern),
    };
    let ranks: Map<String, Value> = rank_pattern.iter().map(|(k, v)| (k.clone(), json!(v))).collect();
    let alphas: Map<String, Value> = alpha_pattern.iter().map(|(k, v)| (k.clone(), number(*v))).collect();
    let config = json!({
        "alora_invocation_tokens": null,
        "alpha_pattern": alphas,
        "arrow_config": null,
        "auto_mapping": null,
        "base_model_name_or_path": if base_model_name.is_empty() { Value::Null } else { json!(base_model_name) },
        "bias": "none",
        "corda_config": null,
        "ensure_weight_tying": false,
        "eva_config": null,
        "exclude_modules": exclude,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "kasa_config": null,
        "layer_replication": null,
        "layers_pattern": if layers_pattern.is_empty() { Value::Null } else { json!(layers_pattern) },
        "layers_to_transform": layers,
        "loftq_config": {},
        "lora_alpha": number(*alpha),
        "lora_bias": false,
        "lora_dropout": dropout,
        "lora_ga_config": null,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "monteclora_config": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "qalora_group_size": 16,
        "r": r,
        "rank_pattern": ranks,
        "revision": revision,
        "target_modules": targets,
        "target_parameters": null,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": null,
        "use_bdlora": null,
        "use_dora": false,
        "use_qalora": false,
        "use_rslora": rslora,
        "velora_config": null,
    });
    format!("{config:#}")
}

/// A whole number as Python would have it, since `lora_alpha` is an integer in PEFT.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) { json!(value as i64) } else { json!(value) }
}

/// The keys of the file with what is needed to complain about them.
struct Keys<'a> {
    map: &'a Map<String, Value>,
    path: &'a Path,
}

enum Names {
    One(String),
    List(Vec<String>),
}

impl Keys<'_> {
    /// The value of a key, where absent and null are the same.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, PeftError> {
        self.get(key).map(|value| convert(value).ok_or_else(|| self.wrong(key, expected))).transpose()
    }

    fn string(&self, key: &str) -> Result<Option<String>, PeftError> {
        self.read(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, PeftError> {
        self.read(key, "true or false", Value::as_bool)
    }

    fn usize(&self, key: &str) -> Result<Option<usize>, PeftError> {
        self.read(key, "a whole number", as_usize)
    }

    fn f64(&self, key: &str) -> Result<Option<f64>, PeftError> {
        self.read(key, "a number", Value::as_f64)
    }

    fn names(&self, key: &str) -> Result<Option<Names>, PeftError> {
        self.read(key, "a string or a list of strings", |value| match value {
            Value::String(one) => Some(Names::One(one.clone())),
            Value::Array(list) => {
                list.iter().map(|v| v.as_str().map(str::to_owned)).collect::<Option<_>>().map(Names::List)
            }
            _ => None,
        })
    }

    fn targets(&self) -> Result<Targets, PeftError> {
        match self.names("target_modules")? {
            Some(Names::One(one)) if one.eq_ignore_ascii_case("all-linear") => Ok(Targets::AllLinear),
            Some(Names::One(pattern)) => Ok(Targets::Regex(pattern)),
            Some(Names::List(list)) => Ok(Targets::Suffixes(list)),
            None => Err(self.wrong("target_modules", "a string or a list of strings")),
        }
    }

    fn layers(&self) -> Result<Option<Vec<usize>>, PeftError> {
        self.read("layers_to_transform", "a layer's index or a list of them", |value| match value {
            Value::Array(list) => list.iter().map(as_usize).collect(),
            one => as_usize(one).map(|layer| vec![layer]),
        })
    }

    fn pattern<T>(
        &self,
        key: &str,
        expected: &'static str,
        convert: impl Fn(&Value) -> Option<T>,
    ) -> Result<Vec<(String, T)>, PeftError> {
        let entries = self.read(key, expected, |value| {
            value.as_object()?.iter().map(|(k, v)| Some((k.clone(), convert(v)?))).collect::<Option<Vec<_>>>()
        })?;
        Ok(entries.unwrap_or_default())
    }

    fn check_init(&self) -> Result<(), PeftError> {
        match self.get("init_lora_weights") {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(init)) if NEUTRAL_INITS.contains(&init.as_str()) => Ok(()),
            Some(Value::String(_)) => Err(self.unsupported(
                "init_lora_weights",
                "this initialisation changes the base weights; let PEFT convert the adapter to plain LoRA \
                 (`path_initial_model_for_weight_conversion` of `save_pretrained`)",
            )),
            Some(_) => Err(self.wrong("init_lora_weights", "true, false or a string")),
        }
    }

    /// Warns about keys that newer versions of PEFT may have added, and returns what was said.
    fn unknown(&self) -> Vec<String> {
        const USED: &[&str] = &[
            "alpha_pattern",
            "base_model_name_or_path",
            "bias",
            "exclude_modules",
            "init_lora_weights",
            "layers_pattern",
            "layers_to_transform",
            "lora_alpha",
            "lora_dropout",
            "peft_type",
            "r",
            "rank_pattern",
            "revision",
            "target_modules",
            "task_type",
            "use_rslora",
        ];
        let known = |key: &str| {
            USED.contains(&key) || WITHOUT_EFFECT.contains(&key) || UNSUPPORTED.iter().any(|(name, _)| *name == key)
        };
        let unknown = self.map.iter().filter(|(key, _)| !known(key));
        unknown
            .map(|(key, value)| {
                let warning = format!("{}: unknown key `{key}` ({}) is ignored", self.path.display(), shorten(value));
                tracing::warn!("{warning}");
                warning
            })
            .collect()
    }

    fn wrong(&self, key: &str, expected: &'static str) -> PeftError {
        let found = self.map.get(key).map_or_else(|| "missing".to_owned(), shorten);
        PeftError::Value { path: self.path.to_owned(), key: key.to_owned(), found, expected }
    }

    fn unsupported(&self, key: &str, reason: &'static str) -> PeftError {
        let found = self.map.get(key).map_or_else(|| "missing".to_owned(), shorten);
        PeftError::Unsupported { path: self.path.to_owned(), key: key.to_owned(), found, reason }
    }
}

/// A value as JSON, cut where it would flood the message.
fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// What Python takes for false: null, false, zero and whatever is empty.
fn is_falsy(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Bool(b)) => !b,
        Some(Value::Number(n)) => n.as_f64() == Some(0.0),
        Some(Value::String(s)) => s.is_empty(),
        Some(Value::Array(a)) => a.is_empty(),
        Some(Value::Object(o)) => o.is_empty(),
    }
}

fn as_usize(value: &Value) -> Option<usize> {
    value.as_u64().and_then(|v| usize::try_from(v).ok())
}
