//! What the generic bodies share.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::DType;

/// `tensor` in `dtype`; free when it is in it already.
pub(crate) fn cast<B: Backend>(tensor: FloatTensor<B>, dtype: DType) -> FloatTensor<B> {
    if tensor.dtype() == dtype { tensor } else { B::float_cast(tensor, dtype.into()) }
}

/// Gives the backends that have no body of their own the default ones.
macro_rules! plain_backends {
    ($ops:ident) => {
        #[cfg(feature = "ndarray")]
        impl $ops for burn_ndarray::NdArray {}
        #[cfg(any(feature = "wgpu", feature = "cuda"))]
        impl $ops for burn::backend::Cube {}
        #[cfg(feature = "remote")]
        impl $ops for burn::backend::Remote {}
    };
}
pub(crate) use plain_backends;
