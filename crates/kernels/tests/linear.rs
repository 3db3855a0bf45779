//! Products with a frozen weight against the same written in Burn's tensor operations.

mod support;

use burn::tensor::{DType, Device, Tensor};
use emberlora_kernels::{Dropout, frozen_linear, lora_linear};
use support::*;

const SCALE: f32 = 0.7;

struct Case {
    x: Tensor<3>,
    w: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
}

fn case(device: &Device) -> Case {
    device.seed(5);
    let (k, n, r) = (48, 80, 4);
    Case {
        x: normal([2, 17, k], 1.0, device),
        w: normal([n, k], 0.1, device),
        a: normal([r, k], 0.1, device),
        b: normal([n, r], 0.1, device),
    }
}

/// y, dx, dA, dB.
fn differentiate(
    case: &Case,
    f: impl Fn(Tensor<3>, Tensor<2>, Tensor<2>) -> Tensor<3>,
) -> (Tensor<3>, Tensor<3>, Tensor<2>, Tensor<2>) {
    let (x, a, b) = (leaf(&case.x), leaf(&case.a), leaf(&case.b));
    let y = f(x.clone(), a.clone(), b.clone());
    let grads = probe(y.clone()).backward();
    (y, x.grad(&grads).unwrap(), a.grad(&grads).unwrap(), b.grad(&grads).unwrap())
}

fn composed(w: Tensor<2>, mask: Option<Tensor<2>>) -> impl Fn(Tensor<3>, Tensor<2>, Tensor<2>) -> Tensor<3> {
    move |x, a, b| {
        let [batch, seq, k] = x.dims();
        let x = x.reshape([batch * seq, k]);
        let dropped = match &mask {
            Some(mask) => x.clone() * mask.clone(),
            None => x.clone(),
        };
        let y = x.matmul(w.clone().transpose()) + dropped.matmul(a.transpose()).matmul(b.transpose()) * SCALE;
        let [_, n] = y.dims();
        y.reshape([batch, seq, n])
    }
}

fn check(case: &Case, reference_weight: Tensor<2>, stored: Tensor<2>, dropout: Option<Dropout>) {
    let [batch, seq, k] = case.x.dims();
    let mask = dropout.map(|d| {
        let factors: Vec<f32> = (0..batch * seq * k).map(|i| d.factor(i)).collect();
        Tensor::<1>::from_floats(factors.as_slice(), &case.x.device()).reshape([batch * seq, k])
    });
    let expected = differentiate(case, composed(reference_weight, mask));
    let found = differentiate(case, |x, a, b| lora_linear(x, stored.clone(), a, b, SCALE, dropout));
    assert_close("y", &expected.0, &found.0, 2e-6);
    assert_close("dx", &expected.1, &found.1, 2e-6);
    assert_close("dA", &expected.2, &found.2, 2e-6);
    assert_close("dB", &expected.3, &found.3, 2e-6);
}

#[test]
fn an_adapted_product_has_the_values_and_gradients_of_composed_operations() {
    for device in devices() {
        let case = case(&device);
        check(&case, case.w.clone(), case.w.clone(), None);
    }
}

#[test]
fn dropout_masks_the_same_elements_in_both_passes() {
    for device in devices() {
        let case = case(&device);
        check(&case, case.w.clone(), case.w.clone(), Some(Dropout::new(0.3, 11)));
    }
}

#[test]
fn a_half_precision_weight_meets_f32_activations() {
    for dtype in [DType::BF16, DType::F16] {
        let device = Device::flex().autodiff();
        let case = case(&device);
        let stored = case.w.clone().inner().cast(dtype);
        let reference = Tensor::from_inner(stored.clone().cast(DType::F32));
        check(&case, reference, stored, None);
    }
}

#[test]
fn a_transposed_view_serves_as_weight() {
    let device = Device::flex().autodiff();
    let case = case(&device);
    let view = case.w.clone().inner().transpose().mul_scalar(1.0).transpose();
    check(&case, case.w.clone(), view, None);
}

#[test]
fn a_frozen_product_passes_the_gradient_to_its_input_alone() {
    let device = Device::flex().autodiff();
    let case = case(&device);
    let x = leaf(&case.x);
    let y = frozen_linear(x.clone(), case.w.clone());
    let grads = probe(y.clone()).backward();
    let x2 = leaf(&case.x);
    let expected = x2.clone().matmul(case.w.clone().transpose().unsqueeze());
    let expected_grads = probe(expected.clone()).backward();
    assert_close("y", &expected, &y, 2e-6);
    assert_close("dx", &x2.grad(&expected_grads).unwrap(), &x.grad(&grads).unwrap(), 2e-6);
    assert!(case.w.grad(&grads).is_none());
}

#[test]
fn dropout_keeps_the_expected_share_and_the_mean() {
    let dropout = Dropout::new(0.25, 3);
    let factors: Vec<f32> = (0..100_000).map(|i| dropout.factor(i)).collect();
    let dropped = factors.iter().filter(|f| **f == 0.0).count() as f32 / factors.len() as f32;
    assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
    let mean = factors.iter().sum::<f32>() / factors.len() as f32;
    assert!((mean - 1.0).abs() < 0.01, "{mean}");
}

#[test]
#[should_panic(expected = "freeze it")]
fn a_tracked_weight_is_refused() {
    let device = Device::flex().autodiff();
    let w = Tensor::<2>::ones([4, 4], &device).require_grad();
    frozen_linear(Tensor::<2>::ones([2, 4], &device), w);
}
