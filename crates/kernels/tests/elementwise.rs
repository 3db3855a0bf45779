//! Norm, gated activations and rotary embedding against the same written in Burn's tensor operations.

mod support;

use burn::tensor::{DType, Device, Tensor, activation};
use emberlora_kernels::{Gate, glu, rms_norm, rope, swiglu};
use support::*;

fn check<const D: usize, const N: usize>(
    inputs: [Tensor<D>; N],
    found: impl Fn([Tensor<D>; N]) -> Tensor<D>,
    expected: impl Fn([Tensor<D>; N]) -> Tensor<D>,
    tolerance: f32,
) {
    let run = |f: &dyn Fn([Tensor<D>; N]) -> Tensor<D>| {
        let leaves = inputs.each_ref().map(leaf);
        let y = f(leaves.clone());
        let grads = probe(y.clone()).backward();
        (y, leaves.map(|leaf| leaf.grad(&grads).unwrap()))
    };
    let ((found, found_grads), (expected, expected_grads)) = (run(&found), run(&expected));
    assert_close("y", &expected, &found, tolerance);
    for (i, (expected, found)) in expected_grads.iter().zip(&found_grads).enumerate() {
        assert_close(&format!("gradient of input {i}"), expected, found, tolerance);
    }
}

#[test]
fn rms_norm_has_the_values_and_gradient_of_its_definition() {
    for device in devices() {
        device.seed(1);
        let w = normal([24], 1.0, &device);
        let weight = w.clone();
        check(
            [normal([2, 5, 24], 2.0, &device)],
            |[x]| rms_norm(x, w.clone(), 1e-5),
            |[x]| {
                let mean = x.clone().square().mean_dim(2);
                x / (mean + 1e-5).sqrt() * weight.clone().unsqueeze()
            },
            3e-6,
        );
    }
}

#[test]
fn rms_norm_of_a_zero_row_is_zero_and_finite() {
    let device = Device::flex().autodiff();
    let x = Tensor::<2>::zeros([1, 4], &device).require_grad();
    let y = rms_norm(x.clone(), Tensor::ones([4], &device), 1e-6);
    assert!(values(&y).iter().all(|v| *v == 0.0));
    let grads = y.sum().backward();
    assert!(values(&x.grad(&grads).unwrap()).iter().all(|v| v.is_finite()));
}

#[test]
fn gated_activations_have_the_values_and_gradients_of_composed_operations() {
    for device in devices() {
        device.seed(2);
        let inputs = || [normal([3, 7, 11], 1.5, &device), normal([3, 7, 11], 1.0, &device)];
        check(inputs(), |[g, u]| swiglu(g, u), |[g, u]| activation::silu(g) * u, 3e-6);
        check(inputs(), |[g, u]| glu(g, u, Gate::Gelu), |[g, u]| activation::gelu(g) * u, 3e-6);
        let tanh = |g: Tensor<3>| {
            let inner = (g.clone() + g.clone().powi_scalar(3) * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt();
            g * (inner.tanh() + 1.0) * 0.5
        };
        check(inputs(), |[g, u]| glu(g, u, Gate::GeluTanh), |[g, u]| tanh(g) * u, 3e-6);
    }
}

/// Rotation as Hugging Face writes it: x cos + rotate_half(x) sin, on the first `rotated` dimensions.
fn rotate(x: Tensor<4>, cos: Tensor<3>, sin: Tensor<3>, rotated: usize) -> Tensor<4> {
    let [batch, seq, heads, dim] = x.dims();
    let table = |t: Tensor<3>| Tensor::cat(vec![t.clone(), t], 2).reshape([batch, seq, 1, rotated]);
    let turned = x.clone().narrow(3, 0, rotated);
    let half = rotated / 2;
    let turned_half =
        Tensor::cat(vec![turned.clone().narrow(3, half, half).neg(), turned.clone().narrow(3, 0, half)], 3);
    let y = turned * table(cos).expand([batch, seq, heads, rotated])
        + turned_half * table(sin).expand([batch, seq, heads, rotated]);
    match rotated < dim {
        true => Tensor::cat(vec![y, x.narrow(3, rotated, dim - rotated)], 3),
        false => y,
    }
}

#[test]
fn rope_rotates_pairs_of_halves_and_leaves_the_rest() {
    for device in devices() {
        for rotated in [8, 4] {
            device.seed(4);
            let angles = normal([2, 5, rotated / 2], 2.0, &device).inner();
            let (cos, sin) = (Tensor::from_inner(angles.clone().cos()), Tensor::from_inner(angles.sin()));
            let (cos, sin) = match device.gradient_checkpointing_strategy() {
                Some(strategy) => (
                    cos.with_gradient_checkpointing_strategy(strategy),
                    sin.with_gradient_checkpointing_strategy(strategy),
                ),
                None => (cos, sin),
            };
            check(
                [normal([2, 5, 3, 8], 1.0, &device)],
                |[x]| rope(x, cos.clone(), sin.clone()),
                |[x]| rotate(x, cos.clone(), sin.clone(), rotated),
                2e-6,
            );
        }
    }
}

#[test]
fn half_precision_in_gives_half_precision_out() {
    let device = Device::flex().autodiff();
    let x = normal([2, 3, 8], 1.0, &device).cast(DType::BF16);
    let w = Tensor::<1>::ones([8], &device).cast(DType::BF16);
    assert_eq!(rms_norm(x.clone(), w, 1e-5).dtype(), DType::BF16);
    assert_eq!(swiglu(x.clone(), x).dtype(), DType::BF16);
}
