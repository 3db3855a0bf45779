use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Tensor};
use emberlora_kernels::checkpoint::Values;
use emberlora_kernels::{AdapterPath, Input, PackedTensor, Projection, ProjectionAdapter};

use crate::weight::frozen;
use crate::{Adapter, Pass, Weight};

/// A linear layer with a frozen weight and, where one is attached, a trainable adapter:
/// `y = W x + bias + s · B(A(dropout(x)))`.
///
/// The weight and the bias never require gradients and get none. The weight may be stored in f32, bf16 or f16, or packed
/// into 4 or 8 bits, whatever the activations are in.
#[derive(Module, Debug)]
pub struct LoraLinear {
    /// W, `[out_features, in_features]`, frozen.
    pub weight: Weight,
    /// The bias, `[out_features]`, frozen.
    pub bias: Option<Param<Tensor<1>>>,
    /// The adapter, if this layer is trained.
    pub adapter: Option<Adapter>,
}

impl LoraLinear {
    /// Freezes a weight `[out_features, in_features]` and a bias `[out_features]`.
    pub fn new(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: Weight::dense(ParamId::new(), weight),
            bias: bias.map(|bias| frozen(ParamId::new(), bias)),
            adapter: None,
        }
    }

    /// A packed weight `[out_features, in_features]` and a bias `[out_features]`, which is frozen.
    pub fn packed(weight: PackedTensor, bias: Option<Tensor<1>>) -> Self {
        Self { weight: weight.into(), bias: bias.map(|bias| frozen(ParamId::new(), bias)), adapter: None }
    }

    /// Wraps a layer of Burn and freezes it. The parameters keep their ids.
    ///
    /// Burn stores `[in_features, out_features]`; the weight is transposed here once rather than in every product.
    pub fn from_linear(linear: burn::nn::Linear) -> Self {
        let (id, weight) = (linear.weight.id, linear.weight.val());
        let (device, dtype) = (weight.device(), weight.dtype());
        // Through the host, because `transpose` alone would leave a strided view.
        let weight = Tensor::from_data(weight.inner().transpose().into_data(), (&device, dtype));
        Self {
            weight: Weight::dense(id, weight),
            bias: linear.bias.map(|bias| frozen(bias.id, bias.val())),
            adapter: None,
        }
    }

    /// The size of the last axis of the input.
    pub fn in_features(&self) -> usize {
        self.weight.dims()[1]
    }

    /// The size of the last axis of the output.
    pub fn out_features(&self) -> usize {
        self.weight.dims()[0]
    }

    /// Applies the layer.
    ///
    /// # Shapes
    /// * `x`: `[…, in_features]`, result: `[…, out_features]`
    ///
    /// The result has the dtype of `x`. Gradients flow to `x`, A and B.
    ///
    /// # Panics
    /// When the last axis of `x` is not `in_features`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, pass: &Pass) -> Tensor<D> {
        project(x, Input::Plain, &[self], None, pass, Values::Read)
    }

    /// The layer as an operation takes it.
    fn projection(&self, dtype: DType, pass: &Pass) -> Projection {
        let adapter = self.adapter.as_ref().filter(|_| pass.adapters).map(|adapter| ProjectionAdapter {
            a: adapter.a.val().cast(dtype),
            b: adapter.b.val().cast(dtype),
            path: AdapterPath::new(adapter.scale, adapter.dropout(pass)),
        });
        Projection {
            weight: self.weight.frozen(),
            bias: self.bias.as_ref().map(|bias| bias.val().cast(dtype)),
            adapter,
        }
    }

    /// `W + s · B A` in f32, `[out_features, in_features]`, outside of autodiff: the weight of a plain linear layer
    /// that computes what this one does. Without an adapter it is W.
    pub fn merged_weight(&self) -> Tensor<2> {
        let weight = self.weight.dequantise();
        match &self.adapter {
            Some(adapter) => weight + adapter.delta(),
            None => weight,
        }
    }
}

/// Applies up to three layers to one input; their outputs lie side by side.
///
/// # Shapes
/// * `x`: `[…, in_features]`, or gate and up side by side for [`Input::Gated`]
/// * `residual`: `[…, Σ out_features]`, added to the result
/// * result: `[…, Σ out_features]` in the dtype of `x`; zeros where nobody reads `values`
///
/// # Panics
/// As [`emberlora_kernels::project`].
pub fn project<const D: usize>(
    x: Tensor<D>,
    input: Input,
    layers: &[&LoraLinear],
    residual: Option<Tensor<D>>,
    pass: &Pass,
    values: Values,
) -> Tensor<D> {
    let projections: Vec<Projection> = layers.iter().map(|layer| layer.projection(x.dtype(), pass)).collect();
    emberlora_kernels::project(x, input, &projections, residual, values)
}
