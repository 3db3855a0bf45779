//! The rotary embedding's part of `config.json`, in both spellings: `rope_theta` + `rope_scaling` at the top (until
//! transformers 4) and one `rope_parameters` object (since transformers 5).

use serde_json::{Map, Value};

use super::error::ConfigError;
use super::fields::Fields;
use crate::rope::{RopeConfig, RopeScaling};

/// Keys of the object that some rope type reads; for another type they change nothing, as in transformers.
const READ_BY_SOME_TYPE: &[&str] = &[
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "finetuned",
];

/// What the rest of the model's description contributes.
pub(super) struct Context {
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    /// Only Phi-3 rotates a part of each head.
    pub partial: bool,
    /// The rope types the family's own code accepts beside the default one.
    pub scaling: bool,
}

/// Takes every rope key out of `fields`, and returns the unknown keys of the inner object along with the result.
pub(super) fn read(
    fields: &mut Fields<'_>,
    context: &Context,
) -> Result<(RopeConfig, Vec<(String, String)>), ConfigError> {
    let theta = fields.optional::<f64>("rope_theta")?;
    let partial = fields.optional::<f64>("partial_rotary_factor")?;
    let outer_original = fields.optional::<usize>("original_max_position_embeddings")?;
    let parameters = fields.optional::<Map<String, Value>>("rope_parameters")?;
    let scaling = fields.optional::<Map<String, Value>>("rope_scaling")?.filter(|map| !map.is_empty());
    let (name, map) = match (scaling, parameters) {
        (Some(map), _) => ("rope_scaling", map),
        (None, Some(map)) => ("rope_parameters", map),
        (None, None) => ("rope_scaling", Map::new()),
    };
    if let Some((key, value)) = map.iter().find(|(_, value)| value.is_object()) {
        let reason = "rotary embeddings that differ between layers are not supported";
        return Err(fields.unsupported(&format!("{name}.{key}"), value, reason));
    }

    let mut rope = Fields::new(fields.path(), &format!("{name}."), map);
    let old_name = rope.optional::<String>("type")?;
    let kind = rope.optional::<String>("rope_type")?.or(old_name).unwrap_or_else(|| "default".into());
    let theta = rope.optional("rope_theta")?.or(theta).unwrap_or(10_000.0);
    if theta <= 1.0 {
        return Err(rope.unsupported("rope_theta", &Value::from(theta), "must be greater than 1"));
    }

    let partial = rope.optional("partial_rotary_factor")?.or(partial).unwrap_or(1.0);
    if partial != 1.0 && (!context.partial || !(0.0..=1.0).contains(&partial)) {
        let reason = "only Phi-3 rotates a part of each head, a fraction between 0 and 1";
        return Err(rope.unsupported("partial_rotary_factor", &Value::from(partial), reason));
    }
    // Truncated like Python's `int(head_dim * factor)`.
    let dims = (context.head_dim as f64 * partial) as usize;
    if dims == 0 || !dims.is_multiple_of(2) {
        let reason = format!("rotates {dims} of {} dimensions; an even number is needed", context.head_dim);
        return Err(rope.unsupported("partial_rotary_factor", &Value::from(partial), reason));
    }

    if kind != "default" && !context.scaling {
        let reason = "this family supports the rope type `default` only";
        return Err(rope.unsupported("rope_type", &Value::from(kind), reason));
    }
    let trained = |rope: &mut Fields<'_>| -> Result<usize, ConfigError> {
        let inner = rope.optional::<usize>("original_max_position_embeddings")?;
        match outer_original.or(inner).unwrap_or(context.max_position_embeddings) {
            0 => Err(rope.unsupported("original_max_position_embeddings", &Value::from(0), "must be at least 1")),
            n => Ok(n),
        }
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: positive(&mut rope, "factor")? },
        "dynamic" => {
            if dims == 2 {
                return Err(rope.unsupported("rope_type", &Value::from(kind), "needs more than 2 rotated dimensions"));
            }
            RopeScaling::Dynamic { factor: positive(&mut rope, "factor")? }
        }
        "llama3" => {
            let (low, high) = (positive(&mut rope, "low_freq_factor")?, positive(&mut rope, "high_freq_factor")?);
            if high <= low {
                let reason = format!("must be greater than low_freq_factor, which is {low}");
                return Err(rope.unsupported("high_freq_factor", &Value::from(high), reason));
            }
            RopeScaling::Llama3 {
                factor: positive(&mut rope, "factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: trained(&mut rope)?,
            }
        }
        "yarn" => yarn(&mut rope, context, trained)?,
        _ => {
            let reason = "supported rope types are default, linear, dynamic, llama3 and yarn";
            return Err(rope.unsupported("rope_type", &Value::from(kind), reason));
        }
    };
    let unknown = rope.unread(READ_BY_SOME_TYPE);
    let config = RopeConfig { theta, dims, max_position_embeddings: context.max_position_embeddings, scaling };
    Ok((config, unknown))
}

fn yarn(
    rope: &mut Fields<'_>,
    context: &Context,
    trained: impl Fn(&mut Fields<'_>) -> Result<usize, ConfigError>,
) -> Result<RopeScaling, ConfigError> {
    let original = trained(rope)?;
    let ratio = context.max_position_embeddings as f64 / original as f64;
    let factor = rope.optional::<f64>("factor")?.unwrap_or(ratio);
    if factor <= 0.0 {
        return Err(rope.unsupported("factor", &Value::from(factor), "must be greater than 0"));
    }
    // transformers tests these with Python's truth, for which 0 counts as absent.
    let given = |x: Option<f64>| x.filter(|&x| x != 0.0);
    let mscale = given(rope.optional("mscale")?);
    let mscale_all_dim = given(rope.optional("mscale_all_dim")?);
    let magnitude = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let computed = match (mscale, mscale_all_dim) {
        (Some(mscale), Some(all)) => magnitude(mscale) / magnitude(all),
        _ => magnitude(1.0),
    };
    Ok(RopeScaling::Yarn {
        factor,
        attention_factor: rope.optional("attention_factor")?.unwrap_or(computed),
        beta_fast: given(rope.optional("beta_fast")?).unwrap_or(32.0),
        beta_slow: given(rope.optional("beta_slow")?).unwrap_or(1.0),
        truncate: rope.or("truncate", true)?,
        original_max_position_embeddings: original,
    })
}

fn positive(rope: &mut Fields<'_>, key: &str) -> Result<f64, ConfigError> {
    match rope.required::<f64>(key)? {
        x if x > 0.0 => Ok(x),
        x => Err(rope.unsupported(key, &Value::from(x), "must be greater than 0")),
    }
}
