//! Bodies over any backend; the reference that the others are tested against.

use burn::backend::Backend;
use burn::backend::tensor::FloatTensor;

use super::Gate;

/// act(gate) ⊙ up.
pub fn forward<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>, kind: Gate) -> FloatTensor<B> {
    B::float_mul(activate::<B>(gate, kind).0, up)
}

/// (dy ⊙ up ⊙ act'(gate), dy ⊙ act(gate)).
pub fn backward<B: Backend>(
    grad: FloatTensor<B>,
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    kind: Gate,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (value, derivative) = activate::<B>(gate, kind);
    let dgate = B::float_mul(B::float_mul(grad.clone(), up), derivative());
    (dgate, B::float_mul(grad, value))
}

/// act(x), and act'(x) where it is asked for.
fn activate<B: Backend>(x: FloatTensor<B>, kind: Gate) -> (FloatTensor<B>, impl FnOnce() -> FloatTensor<B>) {
    // act(x) = x p(x) for all three, so act' = p + x p'.
    let (p, u) = match kind {
        Gate::Silu => (B::sigmoid(x.clone()), None),
        Gate::Gelu => {
            let erf = B::float_erf(B::float_mul_scalar(x.clone(), std::f64::consts::FRAC_1_SQRT_2.into()));
            (half_plus_half::<B>(erf), None)
        }
        Gate::GeluTanh => {
            let cubed = B::float_mul(B::float_mul(x.clone(), x.clone()), x.clone());
            let inner = B::float_add(x.clone(), B::float_mul_scalar(cubed, GELU_CUBIC.into()));
            let tanh = B::float_tanh(B::float_mul_scalar(inner, SQRT_2_OVER_PI.into()));
            (half_plus_half::<B>(tanh.clone()), Some(tanh))
        }
    };
    let value = B::float_mul(x.clone(), p.clone());
    let derivative = move || {
        let dp = match (kind, u) {
            // p' = p (1 − p)
            (Gate::Silu, _) => B::float_sub(p.clone(), B::float_mul(p.clone(), p.clone())),
            // p' = (1 − tanh²) √(2/π) (1 + 3 c x²) / 2
            (_, Some(tanh)) => {
                let inner = B::float_mul_scalar(B::float_mul(x.clone(), x.clone()), (3.0 * GELU_CUBIC).into());
                let inner = B::float_mul_scalar(B::float_add_scalar(inner, 1f32.into()), (SQRT_2_OVER_PI / 2.0).into());
                let rest = B::float_add_scalar(B::float_neg(B::float_mul(tanh.clone(), tanh)), 1f32.into());
                B::float_mul(inner, rest)
            }
            // p' = φ(x), the normal density
            (_, None) => {
                let square = B::float_mul(x.clone(), x.clone());
                B::float_mul_scalar(B::float_exp(B::float_mul_scalar(square, (-0.5f32).into())), INV_SQRT_2_PI.into())
            }
        };
        B::float_add(p, B::float_mul(x, dp))
    };
    (value, derivative)
}

const GELU_CUBIC: f64 = 0.044_715;
const SQRT_2_OVER_PI: f64 = 0.797_884_560_802_865_4;
const INV_SQRT_2_PI: f64 = 0.398_942_280_401_432_7;

fn half_plus_half<B: Backend>(t: FloatTensor<B>) -> FloatTensor<B> {
    B::float_add_scalar(B::float_mul_scalar(t, 0.5f32.into()), 0.5f32.into())
}
