//! Several devices, one step: copies of the model that each take a share of the micro-batches.
//!
//! The adapters and the optimizer's moments live on the first device. In a step every device computes the loss and the
//! gradient of its share, weighed by the trained tokens of the whole step; the gradients are read from the others and
//! added on the first, which updates the adapters and hands them on. This is what `MultiDeviceOptim::OptimMainDevice` of
//! burn-train does, but for copies of the frozen weights that stay where they are: burn-train sends the whole model to
//! every device in every step.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::{DType, Tensor, TensorData};
use emberlora_lora::Projections;
use emberlora_model::{CausalLm, Uploader};

use crate::TrainError;
use crate::optimizer::for_each_factor;
use crate::state::{backward, read_f32};
use crate::upload::MicroBatch;

/// A copy of the model under training on a further device.
#[derive(Clone, Debug, derive_new::new)]
pub struct Replica {
    /// The copy; its adapters sit on the same projections as the model's, whose values they take.
    model: CausalLm,
    /// The device, as recipes name it.
    device: String,
}

/// What a device found out, in the memory of this process.
#[derive(Default)]
pub(crate) struct HostShare {
    /// The loss of each micro-batch with trained tokens.
    pub losses: Vec<f32>,
    /// For A and B of every adapter in their order, whether there is a gradient.
    present: Vec<bool>,
    /// The gradients that there are, one behind the other.
    gradients: Vec<f32>,
}

impl Replica {
    /// What brings micro-batches to its device.
    pub(crate) fn uploader(&self) -> Uploader {
        self.model.uploader()
    }

    /// Loss and gradient of this device's share, read in one transfer.
    pub(crate) fn share(&self, share: &[MicroBatch], seed: u64, step: usize) -> Result<HostShare, TrainError> {
        guarded(|| self.compute(share, seed, step)).map_err(|error| error.on(&self.device))
    }

    fn compute(&self, share: &[MicroBatch], seed: u64, step: usize) -> Result<HostShare, TrainError> {
        let (losses, mut sum) = backward(&self.model, share, seed, step);
        let mut gradients = sum.grads();
        if losses.is_empty() {
            return Ok(HostShare::default());
        }
        let (count, mut parts, mut present) = (losses.len(), losses, Vec::new());
        factors(&self.model, |factor| {
            let gradient = gradients.remove::<2>(factor.id);
            present.push(gradient.is_some());
            parts.extend(gradient.map(flat));
        });
        let mut losses = read_f32(Tensor::cat(parts, 0))?;
        let gradients = losses.split_off(count);
        Ok(HostShare { losses, present, gradients })
    }

    /// Takes over the adapters of the model under training, as [`adapters_of`] read them.
    pub(crate) fn follow(&mut self, adapters: &TensorData) -> Result<(), TrainError> {
        let Self { model, device } = self;
        let follow = || {
            let all = Tensor::<1>::from_data(adapters.clone(), (&model.device(), DType::F32));
            let mut start = 0;
            for_each_factor(model, |_, factor| take(&all, &mut start, factor.dims()));
            Ok(())
        };
        guarded(follow).map_err(|error| error.on(device))
    }
}

impl HostShare {
    /// The gradients on the device of `model`, under the ids of its parameters.
    pub(crate) fn upload(self, model: &CausalLm) -> GradientsParams {
        let mut gradients = GradientsParams::new();
        let length = self.gradients.len();
        if length == 0 {
            return gradients;
        }
        let data = TensorData::new(self.gradients, [length]);
        let all = Tensor::<1>::from_data(data, (&model.device(), DType::F32));
        let (mut start, mut present) = (0, self.present.into_iter());
        factors(model, |factor| {
            if present.next() == Some(true) {
                gradients.register(factor.id, take(&all, &mut start, factor.dims()));
            }
        });
        gradients
    }
}

/// The adapters of `model`, A and B of each one behind the other: f32, `[parameters]`.
pub(crate) fn adapters_of(model: &CausalLm) -> Result<TensorData, TrainError> {
    let mut parts = Vec::new();
    factors(model, |factor| parts.push(flat(factor.val().inner())));
    let values = read_f32(Tensor::cat(parts, 0))?;
    let length = values.len();
    Ok(TensorData::new(values, [length]))
}

/// A and B of every adapter, in the order of the projections.
fn factors(model: &CausalLm, mut f: impl FnMut(&Param<Tensor<2>>)) {
    model.projections(&mut |_, linear| {
        if let Some(adapter) = &linear.adapter {
            f(&adapter.a);
            f(&adapter.b);
        }
    });
}

fn flat(tensor: Tensor<2>) -> Tensor<1> {
    let length = tensor.shape().num_elements();
    tensor.cast(DType::F32).reshape([length])
}

/// The next `dims` numbers of `all`.
fn take(all: &Tensor<1>, start: &mut usize, dims: [usize; 2]) -> Tensor<2> {
    let length = dims[0] * dims[1];
    let part = all.clone().narrow(0, *start, length).reshape(dims);
    *start += length;
    part
}

/// Backends panic where an operation cannot be handed to a device at all. Whose device that was is known here alone.
pub(crate) fn guarded<T>(f: impl FnOnce() -> Result<T, TrainError>) -> Result<T, TrainError> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(panicked(&*panic)))
}

fn panicked(panic: &(dyn Any + Send)) -> TrainError {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    TrainError::Device { device: None, message: text.unwrap_or("no message").to_owned() }
}
