//! Differentiable operations of a LoRA step, as Burn backend extensions.
//!
//! Every operation has the same layers:
//! 1. a trait over `B: Backend` whose default bodies run on any backend and are the reference;
//! 2. faster bodies for single backends (`flex`: the CPU; `cube`: whatever CubeCL compiles for);
//! 3. the gradient, written by hand on the `Autodiff<B, C>` decorator, once for all backends;
//! 4. a function over [`Tensor`](burn::tensor::Tensor), which is what users call.
//!
//! Weights of the base model are frozen, dense or packed into 4 or 8 bits: they get no gradient, no autodiff node, and no
//! copy in another format. Passing a tracked weight is a programming error and panics.
//!
//! Deliberately absent: files, model families, the state of an optimizer, the recipe.

#![cfg_attr(feature = "ndarray", expect(deprecated, reason = "ndarray is served as long as Burn has it"))]

mod activation;
mod adamw;
mod attention;
mod body;
pub mod checkpoint;
mod cross_entropy;
#[cfg(feature = "flex")]
mod flex;
#[cfg(feature = "flex")]
mod gemm;
mod linear;
mod memory;
mod norm;
pub mod rng;
mod rope;
#[cfg(feature = "flex")]
mod simd;
mod weight;

pub use activation::{Gate, GluOps, glu, swiglu};
pub use adamw::{AdamWOps, AdamWStep, adamw, sum_squares, undo_adamw};
pub use attention::qkv::{
    HeadLayout, HeadNorms, Norms, QkvBodies, QkvContext, QkvOps, RotaryTables, qkv_attention, qkv_heads,
};
pub use attention::{AttentionKind, AttentionOps, AttentionOptions, attention};
pub use cross_entropy::{CrossEntropyBodies, CrossEntropyOps, linear_cross_entropy};
pub use linear::{
    AdapterPath, Dropout, Group, Input, LinearBodies, LinearGrads, LinearOps, LowRank, Optional, Projected, Projection,
    ProjectionAdapter, Prologue, frozen_linear, lora_linear, project,
};
#[cfg(feature = "allocator")]
pub use memory::Allocator;
pub use memory::keep_freed_memory;
pub use norm::{NormOps, rms_norm};
pub use rope::{RopeOps, rope};
pub use weight::{
    FourBitFormat, FrozenWeight, Int8Format, NestedFormat, PackedFormat, PackedTensor, Weight, WeightOps,
};

/// The default bodies, for comparing a backend's own body with them.
pub mod reference {
    pub use crate::activation::generic as activation;
    pub use crate::adamw::generic as adamw;
    pub use crate::attention::generic as attention;
    pub use crate::attention::qkv::generic as qkv;
    pub use crate::cross_entropy::generic as cross_entropy;
    pub use crate::linear::generic as linear;
    pub use crate::norm::generic as norm;
    pub use crate::rope::generic as rope;
    pub use crate::weight::generic as weight;
}
