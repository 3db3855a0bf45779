//! The gated MLP: `down(silu(gate(x)) * up(x))` (Shazeer 2020, <https://arxiv.org/abs/2002.05202>).

use burn::module::Module;
use burn::tensor::Tensor;
use emberlora_kernels::checkpoint::Values;
use emberlora_kernels::{Gate, Input};
use emberlora_lora::{LoraLinear, Pass, project};

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
    /// `[B, S, E]` to `[B, S, E]`. `input` is what gate and up see of `x`, and `residual` is added to the result, which is
    /// zeros where nobody reads `values`.
    pub(crate) fn forward(
        &self,
        x: Tensor<3>,
        input: Input,
        residual: Option<Tensor<3>>,
        pass: &Pass,
        values: Values,
    ) -> Tensor<3> {
        let gate_up = match &self.gate_up {
            GateUpProjection::Split(SplitGateUp { gate_proj, up_proj }) => {
                project(x, input, &[gate_proj, up_proj], None, pass, Values::Read)
            }
            GateUpProjection::Fused(gate_up_proj) => project(x, input, &[gate_up_proj], None, pass, Values::Read),
        };
        project(gate_up, Input::Gated(Gate::Silu), &[&self.down_proj], residual, pass, values)
    }
}
