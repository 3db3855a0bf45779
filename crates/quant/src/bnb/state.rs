//! The JSON of a 4-bit weight's state, as bitsandbytes' `QuantState.as_dict(packed=True)` writes it.

use serde::Deserialize;

use crate::{DoubleScales, FloatDtype, FourBit, NESTED_BLOCK, Scales};

/// What of a 4-bit weight is no tensor.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    pub quant_type: String,
    pub blocksize: usize,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub nested_blocksize: Option<usize>,
    pub nested_dtype: Option<String>,
    pub nested_offset: Option<f64>,
}

/// The state of a weight, byte for byte as Python's `json.dumps` spells it.
pub(super) fn write(weight: &FourBit) -> String {
    let [rows, columns] = weight.shape();
    let mut json = format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{rows}, {columns}]"#,
        weight.codebook(),
        weight.block_size(),
        torch_name(weight.dtype()),
    );
    if let Scales::Double(DoubleScales { offset, .. }) = weight.scales() {
        let offset = python_float(f64::from(*offset));
        json +=
            &format!(r#", "nested_blocksize": {NESTED_BLOCK}, "nested_dtype": "float32", "nested_offset": {offset}"#);
    }
    json.push('}');
    json
}

/// PyTorch's name of a format: `float32`, `bfloat16` or `float16`.
pub const fn torch_name(dtype: FloatDtype) -> &'static str {
    match dtype {
        FloatDtype::F32 => "float32",
        FloatDtype::Bf16 => "bfloat16",
        FloatDtype::F16 => "float16",
    }
}

/// The shortest digits that give the number back, with an exponent outside of 1e-4 … 1e16: Python's `repr`.
fn python_float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse() {
        Ok(exponent @ (..-4 | 16..)) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", i32::abs(exponent))
        }
        _ if value.fract() == 0.0 => format!("{value}.0"),
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        let spelled = [
            (0.0, "0.0"),
            (0.25, "0.25"),
            (3.0, "3.0"),
            (0.000_1, "0.0001"),
            (0.000_012, "1.2e-05"),
            (1e-7, "1e-07"),
            (1.5e-38, "1.5e-38"),
            (-1e22, "-1e+22"),
            (123_456_789_012_345_680.0, "1.2345678901234568e+17"),
            (1e16, "1e+16"),
            (9_007_199_254_740_992.0, "9007199254740992.0"),
            (f64::from(0.1f32), "0.10000000149011612"),
        ];
        for (value, expected) in spelled {
            assert_eq!(python_float(value), expected);
        }
    }
}
