//! Training LoRA adapters: one step, the loop around it, evaluation, events, and what a run writes.
//!
//! Nothing here draws on a screen or parses an argument. A run yields [`Event`]s; a progress bar and a metrics file are
//! two [`Listener`]s of the same kind.
//!
//! | to | use |
//! |---|---|
//! | run a recipe | [`Run::prepare`], [`Run::train`] |
//! | train a model of your own making on batches of your own | [`Trainer`] |
//! | take single steps | [`TrainState`] |
//! | measure a model | [`evaluate`] |
//! | see how far a merged model is from its adapter | [`Comparing`] |
//! | load a model and its adapter as a recipe says | [`Base`], [`LoadedModel`] |
//! | open a device by name, list those that there are | [`device::choose`], [`device::found`] |
//! | divide the steps among several devices | [`Trainer::spread`] |
//! | host devices for others | [`Server`] |

mod adapter;
mod batches;
mod compare;
pub mod device;
mod error;
mod evaluate;
mod event;
mod files;
mod gradients;
mod optimizer;
mod options;
mod prepare;
mod process;
pub mod provenance;
mod quantization;
mod remote;
mod replicas;
mod run;
mod schedule;
mod serve;
mod state;
mod trainer;
mod upload;

pub use adapter::{AdapterChoice, AttachedAdapter, lora_options};
pub use batches::{Batches, Seeded};
pub use compare::{Comparing, Comparison, Distance};
pub use device::{ChosenDevice, DeviceError};
pub use error::{Quantity, Rows, TrainError};
pub use evaluate::{Evaluation, evaluate};
pub use event::{Event, Listener, RunStarted, StepMetrics, StopReason, Summary};
pub use files::{ADAPTER, RunFiles};
pub use optimizer::AdamW;
pub use options::{Length, TrainOptions};
pub use prepare::{Base, LoadedModel, PrepareError, Reporter};
pub use process::peak_memory_bytes;
pub use provenance::Provenance;
pub use quantization::quantization_options;
pub use remote::{RemoteError, TOKEN, Token};
pub use replicas::Replica;
pub use run::Run;
pub use schedule::{Decay, LrSchedule, warmup_steps};
pub use serve::{ServeError, Server};
pub use state::{StepGradients, StepOutcome, TrainState};
pub use trainer::{AdapterWriter, Trained, Trainer};
