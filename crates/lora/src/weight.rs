use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Int, Tensor};
use emberlora_kernels::{FrozenWeight, PackedFormat, PackedTensor};

/// The frozen weight of a projection, `[out_features, in_features]`. It never requires a gradient and gets none.
#[expect(clippy::large_enum_variant, reason = "a few handles for each projection of a model")]
#[derive(Module, Debug)]
pub enum Weight {
    /// f32, bf16 or f16 numbers, whatever the activations are in.
    Dense(Param<Tensor<2>>),
    /// NF4, FP4 or INT8.
    Packed(PackedWeight),
}

/// A weight in 4 or 8 bits per element, see [`PackedTensor`].
#[derive(Module, Debug)]
pub struct PackedWeight {
    codes: Param<Tensor<1, Int>>,
    scale_codes: Option<Param<Tensor<1, Int>>>,
    scales: Param<Tensor<1>>,
    #[module(skip)]
    format: PackedFormat,
}

impl Weight {
    pub(crate) fn dense(id: ParamId, weight: Tensor<2>) -> Self {
        Self::Dense(frozen(id, weight))
    }

    /// `[out_features, in_features]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Packed(weight) => weight.format.shape(),
        }
    }

    /// The handles as operations take them.
    pub fn frozen(&self) -> FrozenWeight {
        match self {
            Self::Dense(weight) => weight.val().into(),
            Self::Packed(weight) => weight.tensor().into(),
        }
    }

    /// The numbers of a weight that is not packed.
    pub fn as_dense(&self) -> Option<Tensor<2>> {
        match self {
            Self::Dense(weight) => Some(weight.val()),
            Self::Packed(_) => None,
        }
    }

    /// The parts of a packed weight.
    pub fn as_packed(&self) -> Option<PackedTensor> {
        match self {
            Self::Dense(_) => None,
            Self::Packed(weight) => Some(weight.tensor()),
        }
    }

    /// The numbers in f32, outside of autodiff.
    pub fn dequantise(&self) -> Tensor<2> {
        self.frozen().dequantise()
    }

    /// Whether the forward product takes its input in 8 bits, see [`Int8Format`](emberlora_kernels::Int8Format).
    pub fn quantises_activations(&self) -> bool {
        matches!(self, Self::Packed(PackedWeight { format: PackedFormat::Int8(format), .. }) if format.threshold > 0.0)
    }

    /// Bytes that it takes on the device.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => {
                let size = match weight.val().dtype() {
                    DType::BF16 | DType::F16 => 2,
                    _ => 4,
                };
                weight.shape().num_elements() * size
            }
            Self::Packed(weight) => weight.tensor().bytes(),
        }
    }
}

impl PackedWeight {
    fn tensor(&self) -> PackedTensor {
        PackedTensor {
            codes: self.codes.val(),
            scale_codes: self.scale_codes.as_ref().map(Param::val),
            scales: self.scales.val(),
            format: self.format.clone(),
        }
    }
}

impl From<PackedTensor> for Weight {
    fn from(weight: PackedTensor) -> Self {
        let PackedTensor { codes, scale_codes, scales, format } = weight;
        let ints = |codes| Param::initialized(ParamId::new(), codes);
        Self::Packed(PackedWeight {
            codes: ints(codes),
            scale_codes: scale_codes.map(ints),
            scales: frozen(ParamId::new(), scales),
            format,
        })
    }
}

/// A parameter that no optimizer touches: not required to have a gradient and no part of any graph.
pub(crate) fn frozen<const D: usize>(id: ParamId, value: Tensor<D>) -> Param<Tensor<D>> {
    // `detach` keeps the requirement on leaves, so a tracked tensor leaves autodiff instead; a plain tensor mixes with
    // tracked ones as a constant.
    let value = if value.is_require_grad() || value.is_tracked() { value.inner() } else { value };
    Param::initialized(id, value)
}
