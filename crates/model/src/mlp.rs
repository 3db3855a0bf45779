//! The gated MLP: `down(silu(gate(x)) * up(x))` (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).

use burn::module::Module;
use burn::tensor::Tensor;
use emberlora_kernels::swiglu;
use emberlora_lora::{LoraLinear, Pass};

/// The projections into the MLP, named as in the files.
#[expect(clippy::large_enum_variant, reason = "all blocks of a model are of one variant")]
#[derive(Module, Debug)]
pub(crate) enum GateUpProjection {
    /// Two projections.
    Split(SplitGateUp),
    /// `gate_up_proj`, whose output is gate and up side by side (Phi-3).
    Fused(LoraLinear),
}

/// `gate_proj` and `up_proj`.
#[derive(Module, Debug)]
pub(crate) struct SplitGateUp {
    pub gate_proj: LoraLinear,
    pub up_proj: LoraLinear,
}

/// `mlp` of one block.
#[derive(Module, Debug)]
pub(crate) struct Mlp {
    pub gate_up: GateUpProjection,
    pub down_proj: LoraLinear,
}

impl Mlp {
    /// `[B, S, E]` to `[B, S, E]`.
    pub(crate) fn forward(&self, x: Tensor<3>, pass: &Pass) -> Tensor<3> {
        let (gate, up) = match &self.gate_up {
            GateUpProjection::Split(SplitGateUp { gate_proj, up_proj }) => {
                (gate_proj.forward(x.clone(), pass), up_proj.forward(x, pass))
            }
            GateUpProjection::Fused(gate_up_proj) => {
                let both = gate_up_proj.forward(x, pass);
                let width = both.dims()[2] / 2;
                (both.clone().narrow(2, 0, width), both.narrow(2, width, width))
            }
        };
        self.down_proj.forward(swiglu(gate, up), pass)
    }
}
