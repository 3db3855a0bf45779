//! LoRA adapters over frozen projections, in the format of PEFT.
//!
//! LoRA (Hu et al., *LoRA: Low-Rank Adaptation of Large Language Models*, 2021) adds a trainable product of two thin
//! matrices to a frozen weight: `y = W x + bias + s · B(A(dropout(x)))`.
//!
//! | to | use |
//! |---|---|
//! | wrap a weight or a [`burn::nn::Linear`] | [`LoraLinear`] |
//! | let the adapters find the layers of a model | [`Projections`] |
//! | choose layers, rank and scale | [`LoraOptions`], [`Targets`], [`Exclude`] |
//! | put fresh adapters on a model, or take them off | [`attach()`], [`detach`] |
//! | say what one forward pass is for | [`Pass`] |
//! | read and write adapters as PEFT does | [`peft`] |
//!
//! The rules by which modules are chosen, ranked and scaled are those of PEFT 0.21, to the letter.

mod adapter;
pub mod attach;
mod error;
mod init;
mod linear;
mod options;
mod pass;
pub mod peft;
mod plan;
mod projections;
mod rules;
mod weight;

pub use adapter::Adapter;
pub use attach::{AttachReport, AttachedModule, attach, detach, trainable_parameters};
pub use error::LoraError;
pub use linear::{LoraLinear, project};
pub use options::{Exclude, LoraOptions, Targets};
pub use pass::{DropoutKey, Pass};
pub use projections::Projections;
pub use weight::{PackedWeight, Weight};
