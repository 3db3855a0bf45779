use crate::LoraLinear;

/// A model that shows its linear projections by name.
///
/// Names are Hugging Face module paths such as `model.layers.0.self_attn.q_proj`: target rules match against them and
/// the tensors of an adapter file are named by them. Both methods must visit the same modules, each exactly once.
pub trait Projections {
    /// Calls `f` with the name of every projection and the projection.
    fn projections(&self, f: &mut dyn FnMut(&str, &LoraLinear));

    /// Calls `f` with the name of every projection and mutable access to it.
    fn visit_projections(&mut self, f: &mut dyn FnMut(&str, &mut LoraLinear));

    /// The name of the output head, which `all-linear` leaves out.
    fn output_head(&self) -> Option<&str> {
        Some("lm_head")
    }
}
