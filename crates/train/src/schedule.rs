//! The learning rate of each step.

use derive_new::new;

/// The shape of the learning rate after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decay {
    /// Stays at the peak.
    Constant,
    /// Falls in a straight line.
    Linear,
    /// Falls along half a period of a cosine.
    Cosine,
}

/// Linear warm-up, then a decay, as `transformers.get_scheduler` computes them.
///
/// With w warm-up steps of n in all, step k (counted from 0) trains with
/// * `k < w`: `peak · k / max(1, w)`;
/// * linear: `peak · (n − k) / max(1, n − w)`; cosine: `peak · ½(1 + cos(π · (k − w) / max(1, n − w)))`.
///
/// `min_ratio` raises the decaying part to `min_ratio + (1 − min_ratio) · factor`
/// (`cosine_with_min_lr`); the warm-up still starts from 0.
#[derive(Clone, Copy, Debug, PartialEq, new)]
pub struct LrSchedule {
    peak: f64,
    decay: Decay,
    warmup_steps: usize,
    total_steps: usize,
    min_ratio: f64,
}

impl LrSchedule {
    /// The learning rate of step `step`, counted from 0. Past the last step it stays where the decay ended.
    pub fn lr(&self, step: usize) -> f64 {
        self.peak * self.factor(step)
    }

    /// The number of steps the schedule was made for.
    pub fn total_steps(&self) -> usize {
        self.total_steps
    }

    fn factor(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let step = step.min(self.total_steps.max(self.warmup_steps));
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
        let factor = match self.decay {
            Decay::Constant => return 1.0,
            Decay::Linear => self.total_steps.saturating_sub(step) as f64 / decay_steps,
            Decay::Cosine => {
                let progress = (step - self.warmup_steps) as f64 / decay_steps;
                0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        };
        (factor * (1.0 - self.min_ratio) + self.min_ratio).max(0.0)
    }
}

/// The number of warm-up steps that a share of the run is, rounded up as transformers does.
pub fn warmup_steps(ratio: f64, total_steps: usize) -> usize {
    (ratio * total_steps as f64).ceil() as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(schedule: LrSchedule, expected: &[f64]) {
        for (step, expected) in expected.iter().enumerate() {
            let found = schedule.lr(step);
            assert!((found - expected).abs() < 1e-12, "step {step}: {found}, expected {expected}");
        }
    }

    /// Values printed by transformers 5.23's `get_scheduler` over SGD with lr 0.1.
    #[test]
    fn linear_follows_transformers() {
        check(LrSchedule::new(0.1, Decay::Linear, 2, 6, 0.0), &[0.0, 0.05, 0.1, 0.075, 0.05, 0.025]);
    }

    #[test]
    fn cosine_follows_transformers() {
        check(
            LrSchedule::new(0.1, Decay::Cosine, 2, 6, 0.0),
            &[0.0, 0.05, 0.1, 0.085_355_339_059_327_38, 0.05, 0.014_644_660_940_672_627],
        );
    }

    #[test]
    fn cosine_with_a_floor_follows_transformers() {
        check(
            LrSchedule::new(0.1, Decay::Cosine, 2, 6, 0.1),
            &[0.0, 0.05, 0.1, 0.086_819_805_153_394_64, 0.055, 0.023_180_194_846_605_365],
        );
    }

    #[test]
    fn constant_stays_at_the_peak_after_the_warm_up() {
        check(LrSchedule::new(0.1, Decay::Constant, 2, 4, 0.0), &[0.0, 0.05, 0.1, 0.1]);
    }

    #[test]
    fn a_share_of_the_run_is_rounded_up() {
        assert_eq!(warmup_steps(0.03, 100), 3);
        assert_eq!(warmup_steps(0.03, 101), 4);
        assert_eq!(warmup_steps(0.0, 101), 0);
        assert_eq!(warmup_steps(1.0, 7), 7);
    }

    proptest! {
        #[test]
        fn never_leaves_the_range_of_its_peak(
            decay in prop::sample::select(vec![Decay::Constant, Decay::Linear, Decay::Cosine]),
            warmup in 0usize..50, total in 1usize..50, min_ratio in 0.0..=1.0, step in 0usize..200,
        ) {
            let lr = LrSchedule::new(2.0, decay, warmup, total, min_ratio).lr(step);
            prop_assert!((0.0..=2.0 + 1e-12).contains(&lr), "{lr}");
            if step >= warmup {
                prop_assert!(lr >= 2.0 * min_ratio - 1e-12, "{lr}");
            }
        }
    }
}
