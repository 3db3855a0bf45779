//! Which tensors of a loaded adapter belong to which projection.

use std::collections::BTreeMap;

use emberlora_quant::{FloatDtype, convert};

use super::tensors::{key_a, key_b, key_base_weight};
use super::{HostTensor, PeftAdapter, PeftError};
use crate::plan::{Plan, PlannedModule, Survey, Unmatched, plan};

/// A and B of one projection, whose weight they change by `scale · B · A`.
#[derive(Clone, Debug)]
pub struct Factors<'a> {
    /// The projection's module path.
    pub module: String,
    /// A, `[r, in_features]`.
    pub a: &'a HostTensor,
    /// B, `[out_features, r]`.
    pub b: &'a HostTensor,
    /// What B·A is multiplied by: α / r, or α / √r for rsLoRA.
    pub scale: f32,
    /// The name and the values of the frozen weight, which PEFT stores beside an adapted head.
    pub base_weight: Option<(String, &'a HostTensor)>,
}

impl Factors<'_> {
    /// Whether the frozen weight that is stored with the adapter, if one is, has these elements from `start` on, in
    /// row-major order.
    pub fn agree_with(&self, start: usize, weight: &[f32]) -> bool {
        let stored = self.base_weight.as_ref().map(|(_, stored)| &stored.values);
        stored
            .is_none_or(|stored| stored.get(start..start + weight.len()).is_some_and(|stored| are_same(stored, weight)))
    }
}

/// Finds the tensors of every module that the adapter's options choose among these `projections`, names with shapes
/// `[out_features, in_features]`; `head` is the one that `all-linear` leaves out.
///
/// It is what [`apply`](super::apply) does, for a model that is not in memory.
///
/// # Errors
/// When tensors are missing, unused or of the wrong shape, and when the options do not fit the model.
pub fn factors<'a>(
    adapter: &'a PeftAdapter,
    projections: impl IntoIterator<Item = (String, [usize; 2])>,
    head: Option<&str>,
) -> Result<Vec<Factors<'a>>, PeftError> {
    let survey = Survey { projections: projections.into_iter().collect(), head: head.map(str::to_owned) };
    let plan = plan(&survey, &adapter.options, Unmatched::Accept)?;
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    of_plan(&plan, &adapter.tensors)
}

/// The factors of all planned modules, in their order. Every tensor must have been taken then.
pub(super) fn of_plan<'a>(
    plan: &Plan,
    tensors: &'a BTreeMap<String, HostTensor>,
) -> Result<Vec<Factors<'a>>, PeftError> {
    let mut unused: BTreeMap<&str, &HostTensor> = tensors.iter().map(|(name, t)| (name.as_str(), t)).collect();
    let (mut missing, mut found) = (Vec::new(), Vec::new());
    for module in &plan.modules {
        let PlannedModule { name, in_features, out_features, rank, alpha: _, scale } = module;
        let mut take = |key: String, expected: [usize; 2]| match unused.remove(key.as_str()) {
            Some(found) if found.shape == expected => Ok(Some(found)),
            Some(found) => {
                Err(PeftError::Shape { tensor: key, expected: expected.to_vec(), found: found.shape.clone() })
            }
            None => {
                missing.push(key);
                Ok(None)
            }
        };
        let a = take(key_a(name), [*rank, *in_features])?;
        let b = take(key_b(name), [*out_features, *rank])?;
        let key = key_base_weight(name);
        let base_weight = unused.remove(key.as_str()).map(|weight| (key, weight));
        found.extend(a.zip(b).map(|(a, b)| Factors { module: name.clone(), a, b, scale: *scale, base_weight }));
    }
    if !missing.is_empty() || !unused.is_empty() {
        let unused = unused.into_keys().map(str::to_owned).collect();
        return Err(PeftError::Mismatch { missing, unused });
    }
    Ok(found)
}

/// Whether two lists of numbers are equal, up to one of them having been rounded to a narrower format.
pub(super) fn are_same(a: &[f32], b: &[f32]) -> bool {
    let bytes = |values: &[f32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let (x, y) = (bytes(a), bytes(b));
    a.len() == b.len()
        && [FloatDtype::F32, FloatDtype::Bf16, FloatDtype::F16].into_iter().any(|dtype| {
            matches!((convert(&x, FloatDtype::F32, dtype), convert(&y, FloatDtype::F32, dtype)), (Ok(x), Ok(y)) if x == y)
        })
}
