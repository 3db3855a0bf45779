//! What the operations' tests share.
#![allow(dead_code)] // each test binary uses a part of it

pub mod forest;

use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

/// The autodiff devices that every operation is tested on: without and with Burn's own recomputation.
pub fn devices() -> [Device; 2] {
    [Device::flex().autodiff(), Device::flex().autodiff().gradient_checkpointing()]
}

pub fn normal<const D: usize>(shape: [usize; D], std: f64, device: &Device) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, std), device)
}

/// A fresh leaf with the values of `t`.
pub fn leaf<const D: usize>(t: &Tensor<D>) -> Tensor<D> {
    t.clone().detach().require_grad()
}

pub fn ints<const D: usize>(values: &[i64], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

pub fn values<const D: usize>(t: &Tensor<D>) -> Vec<f32> {
    t.clone().inner().into_data().convert::<f32>().try_to_vec().unwrap()
}

/// max |a − b| / max |a|.
pub fn relative<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (values(a), values(b));
    let scale = a.iter().fold(0f32, |m, v| m.max(v.abs())).max(f32::MIN_POSITIVE);
    a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}

#[track_caller]
pub fn assert_close<const D: usize>(name: &str, a: &Tensor<D>, b: &Tensor<D>, tolerance: f32) {
    let difference = relative(a, b);
    assert!(difference <= tolerance, "{name}: relative difference {difference:.3e}, allowed {tolerance:.1e}");
}

/// A scalar whose gradient is different in every element of `y`.
pub fn probe<const D: usize>(y: Tensor<D>) -> Tensor<1> {
    (y.clone() * y.cos()).sum()
}
