//! The elementwise parts, a row of scores at a time. A score of −∞ is a key that is not seen: its probability is zero
//! exactly, which [`exp`] alone does not give.

use crate::simd::{exp, lane_max, lane_sum, vectorised};

#[inline(always)]
fn exp_or_zero(x: f32) -> f32 {
    let value = exp(x);
    if x < -87.0 { 0.0 } else { value }
}

vectorised! {
    /// One step of the running softmax (Milakov, Gimelshein: *Online normalizer calculation for softmax*, 2018):
    /// scores become exp(score − m) for the maximum m of them and `max`; returns m and their sum.
    pub fn exponentials(scores: &mut [f32], max: f32) -> (f32, f32) {
        let max = lane_max(scores).max(max);
        if max == f32::NEG_INFINITY {
            scores.fill(0.0);
            return (max, 0.0);
        }
        for score in scores.iter_mut() {
            *score = exp_or_zero(*score - max);
        }
        (max, lane_sum(scores.len(), |i| scores[i]))
    }
}

vectorised! {
    /// Scores become P = exp(scores − lse), and dP becomes dS / s = P ⊙ (dP − δ).
    pub fn gradients(scores: &mut [f32], dp: &mut [f32], lse: f32, delta: f32) {
        let dp = &mut dp[..scores.len()];
        for i in 0..scores.len() {
            let p = exp_or_zero(scores[i] - lse);
            scores[i] = p;
            dp[i] = p * (dp[i] - delta);
        }
    }
}

vectorised! {
    pub fn scale(values: &mut [f32], factor: f32) {
        for value in values.iter_mut() {
            *value *= factor;
        }
    }
}

vectorised! {
    pub fn add(sum: &mut [f32], values: &[f32]) {
        let values = &values[..sum.len()];
        for i in 0..sum.len() {
            sum[i] += values[i];
        }
    }
}

vectorised! {
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let b = &b[..a.len()];
        lane_sum(a.len(), |i| a[i] * b[i])
    }
}
