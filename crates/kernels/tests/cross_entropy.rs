//! The fused head and loss against log-softmax over all logits.

mod support;

use burn::tensor::{DType, Device, Tensor, activation};
use emberlora_kernels::linear_cross_entropy;
use support::*;

/// Enough rows at this vocabulary for several chunks of logits.
const ROWS: usize = 70;
const VOCABULARY: usize = 200_003;

fn composed(hidden: Tensor<2>, head: Tensor<2>, targets: &[i64], weights: Tensor<1>) -> Tensor<1> {
    let rows = targets.len();
    let log_p = activation::log_softmax(hidden.matmul(head.transpose()), 1);
    let device = log_p.device();
    let picked = log_p.gather(1, ints(targets, [rows, 1], &device)).reshape([rows]);
    (picked * weights).sum().neg()
}

#[test]
fn loss_and_gradient_are_those_of_all_logits_at_once() {
    for device in devices() {
        device.seed(6);
        let hidden = normal([ROWS, 8], 1.0, &device);
        let head = normal([VOCABULARY, 8], 0.5, &device);
        let weights = Tensor::<1>::random([ROWS], burn::tensor::Distribution::Uniform(0.0, 1.0), &device);
        let targets: Vec<i64> = (0..ROWS).map(|i| (i * 7919 % VOCABULARY) as i64).collect();

        let x = leaf(&hidden);
        let expected = composed(x.clone(), head.clone(), &targets, weights.clone());
        let expected_grad = x.grad(&expected.clone().backward()).unwrap();

        let x = leaf(&hidden);
        let found = linear_cross_entropy(x.clone(), head, ints(&targets, [ROWS], &device), weights);
        let found_grad = x.grad(&(found.clone() * 1.0).backward()).unwrap();
        assert_close("loss", &expected, &found, 2e-6);
        assert_close("gradient", &expected_grad, &found_grad, 5e-6);
    }
}

#[test]
fn a_scaled_loss_scales_the_gradient() {
    let device = Device::flex().autodiff();
    let (hidden, head) = (normal([3, 4], 1.0, &device), normal([10, 4], 1.0, &device));
    let gradient = |factor: f32| {
        let x = leaf(&hidden);
        let weights = Tensor::ones([3], &device);
        let loss = linear_cross_entropy(x.clone(), head.clone(), ints(&[1, 2, 3], [3], &device), weights);
        x.grad(&(loss * factor).backward()).unwrap()
    };
    assert_close("gradient", &(gradient(1.0) * 0.25), &gradient(0.25), 1e-6);
}

#[test]
fn rows_of_weight_zero_take_no_part() {
    let device = Device::flex().autodiff();
    let (hidden, head) = (normal([2, 4], 1.0, &device), normal([10, 4], 1.0, &device));
    let x = leaf(&hidden);
    let weights = Tensor::<1>::from_floats([0.0, 1.0], &device);
    let loss = linear_cross_entropy(x.clone(), head, ints(&[1, 2], [2], &device), weights);
    let grad = values(&x.grad(&loss.backward()).unwrap());
    assert!(grad[..4].iter().all(|g| *g == 0.0) && grad[4..].iter().any(|g| *g != 0.0));
}

#[test]
fn extreme_logits_stay_finite() {
    let device = Device::flex();
    let hidden = Tensor::<2>::from_floats([[1e4, -1e4]], &device);
    let head = Tensor::<2>::from_floats([[1.0, 0.0], [0.0, 1.0]], &device);
    let loss = |target| {
        let weights = Tensor::ones([1], &device);
        linear_cross_entropy(hidden.clone(), head.clone(), ints(&[target], [1], &device), weights).into_scalar::<f32>()
    };
    assert_eq!((loss(0), loss(1)), (0.0, 2e4));
}

#[test]
fn a_bf16_head_meets_f32_hidden_rows() {
    let device = Device::flex();
    let hidden = normal([3, 4], 1.0, &device);
    let head = normal([10, 4], 1.0, &device).cast(DType::BF16);
    let loss = |head: Tensor<2>| {
        linear_cross_entropy(hidden.clone(), head, ints(&[1, 2, 3], [3], &device), Tensor::ones([3], &device))
    };
    assert_close("loss", &loss(head.clone().cast(DType::F32)), &loss(head), 1e-6);
}
