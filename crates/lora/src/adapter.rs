use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlora_kernels::Dropout;
use emberlora_kernels::rng::mix;

use crate::init::{kaiming_uniform, stream_of};
use crate::{LoraOptions, Pass};

/// The trainable low-rank update of one projection: `ΔW = s · B A`.
///
/// A and B are kept in f32 whatever the model computes in; the forward pass casts them to the dtype of its input and
/// the gradients come back in f32.
#[derive(Module, Debug)]
pub struct Adapter {
    /// A, `[r, in_features]`.
    pub a: Param<Tensor<2>>,
    /// B, `[out_features, r]`.
    pub b: Param<Tensor<2>>,
    /// s, the factor on B A, see [`LoraOptions::scale`].
    pub scale: f32,
    /// Probability with which an element of A's input is dropped in training.
    pub dropout: f32,
    /// Tells the random numbers of this module apart from those of the others; a hash of its name.
    pub stream: u64,
}

impl Adapter {
    /// An adapter of a module of this name that starts as the identity: A uniform in ±1/√in_features, B = 0.
    pub fn init(
        module: &str,
        [out_features, in_features]: [usize; 2],
        rank: usize,
        scale: f32,
        options: &LoraOptions,
        device: &Device,
    ) -> Self {
        let a = kaiming_uniform(options.seed, stream_of(module), rank, in_features);
        let a = TensorData::new(a, [rank, in_features]);
        let b = TensorData::new(vec![0f32; out_features * rank], [out_features, rank]);
        Self::from_data(module, a, b, scale, options.dropout as f32, device)
    }

    /// An adapter with given factors: A `[r, in_features]` and B `[out_features, r]`, both read as f32.
    pub fn from_data(module: &str, a: TensorData, b: TensorData, scale: f32, dropout: f32, device: &Device) -> Self {
        let factor = |data| Param::from_tensor(Tensor::from_data(data, (device, DType::F32)));
        Self { a: factor(a), b: factor(b), scale, dropout, stream: stream_of(module) }
    }

    /// r, the number of rows of A.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// Number of trainable parameters: r · (in + out).
    pub fn parameters(&self) -> usize {
        self.a.shape().num_elements() + self.b.shape().num_elements()
    }

    /// `s · B A` in f32, `[out_features, in_features]`, outside of autodiff.
    pub fn delta(&self) -> Tensor<2> {
        self.b.val().inner().matmul(self.a.val().inner()) * self.scale
    }

    /// The mask of this module in this pass, if it drops anything.
    pub(crate) fn dropout(&self, pass: &Pass) -> Option<Dropout> {
        let key = pass.dropout.filter(|_| self.dropout > 0.0)?;
        Some(Dropout::new(self.dropout, mix(key.seed, &[key.step, self.stream])))
    }
}
