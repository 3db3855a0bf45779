//! `train`: how long, how fast and with what the adapters are trained.

use serde_json::Value as Json;

use crate::node::Node;
use crate::spec::{Below, Reader, Section, Spec, choice, nested, number, optional, pair, section, value, whole};

choice! {
    /// How the learning rate moves after the warm-up.
    pub enum ScheduleKind {
        /// It stays.
        Constant = "constant";
        /// It falls in a straight line to `min_ratio` of the peak.
        Linear = "linear";
        /// It falls along half a cosine to `min_ratio` of the peak.
        Cosine = "cosine";
    }
}

choice! {
    /// Which optimizer.
    pub enum OptimizerKind {
        /// Adam with decoupled weight decay (Loshchilov & Hutter 2017, <https://arxiv.org/abs/1711.05101>).
        AdamW = "adamw";
    }
}

/// How long the learning rate rises from zero to its peak.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Warmup {
    /// This part of all steps, from 0 to 1.
    Ratio(f64),
    /// This many steps.
    Steps(usize),
}

/// The learning rate over the run.
#[derive(Clone, Copy, Debug, PartialEq, derive_new::new)]
pub struct Schedule {
    /// The curve after the warm-up.
    pub kind: ScheduleKind,
    /// The rise before it.
    pub warmup: Warmup,
    /// The learning rate at the end, as a part of the peak.
    pub min_ratio: f64,
}

section! {
    /// The optimizer and its constants.
    #[derive(derive_new::new)]
    pub struct Optimizer {
        /// Which optimizer.
        kind: OptimizerKind = value(OptimizerKind::AdamW) => choice();
        /// Decay of the first and second moment.
        betas: [f64; 2] = value([0.9, 0.999]) => pair(number().at_least(0.0).below(1.0));
        /// Added to the denominator.
        eps: f64 = value(1e-8) => number().above(0.0);
        /// Decoupled weight decay on A and B.
        weight_decay: f64 = value(0.0) => number().at_least(0.0);
    }
}

section! {
    /// The learning rate over the run.
    #[derive(derive_new::new)]
    struct ScheduleKeys {
        /// The curve after the warm-up: `constant`, or falling to `min_ratio` of the peak in a straight line (`linear`) or
        /// along half a cosine (`cosine`).
        kind: ScheduleKind = value(ScheduleKind::Cosine) => choice();
        /// Part of all steps during which the learning rate rises from zero to its peak; `null` is 0. Not together with
        /// `warmup_steps`, which takes the place of this default.
        warmup_ratio: Option<f64> = value(Some(0.03)) => optional(number().at_least(0.0).at_most(1.0));
        /// The same as a number of steps; fewer than `train.max_steps`, where that is given.
        warmup_steps: Option<usize> = value(None) => optional(whole());
        /// The learning rate at the end, as a part of the peak. Not with `constant`, which stays at the peak.
        min_ratio: f64 = value(0.0) => number().at_least(0.0).at_most(1.0);
    }
    check check_schedule;
}

fn check_schedule(schedule: &mut ScheduleKeys, node: &Node, reader: &mut Reader<'_>) {
    let given = |key| node.get(key).is_some_and(|value| !value.is_null());
    if given("warmup_steps") && given("warmup_ratio") {
        reader.conflict(
            node,
            "warmup_steps",
            "cannot be combined with `warmup_ratio`",
            "one of the two; null leaves the other out",
        );
    }
    if schedule.kind == ScheduleKind::Constant && schedule.min_ratio != 0.0 {
        reader.conflict(
            node,
            "min_ratio",
            "has no effect with `kind: constant`, which stays at the peak",
            "0, or `kind: linear` or `kind: cosine`",
        );
    }
}

/// Two keys in a recipe, of which at most one is given, are one [`Warmup`].
struct ScheduleSpec;

impl Spec for ScheduleSpec {
    type Out = Schedule;

    fn read(&self, node: &Node, reader: &mut Reader<'_>) -> Option<Schedule> {
        let ScheduleKeys { kind, warmup_ratio, warmup_steps, min_ratio } = ScheduleKeys::read(node, reader)?;
        let warmup = match warmup_steps {
            Some(steps) => Warmup::Steps(steps),
            None => Warmup::Ratio(warmup_ratio.unwrap_or(0.0)),
        };
        Some(Schedule::new(kind, warmup, min_ratio))
    }

    fn write(&self, value: &Schedule) -> Node {
        let (ratio, steps) = match value.warmup {
            Warmup::Ratio(ratio) => (Some(ratio), None),
            Warmup::Steps(steps) => (None, Some(steps)),
        };
        ScheduleKeys::new(value.kind, ratio, steps, value.min_ratio).write()
    }

    fn allowed(&self) -> String {
        section::<ScheduleKeys>().allowed()
    }

    fn schema(&self) -> Json {
        section::<ScheduleKeys>().schema()
    }

    fn below(&self) -> Below {
        section::<ScheduleKeys>().below()
    }
}

section! {
    /// The training loop.
    pub struct TrainSection {
        /// How many times to go through the data; may be a fraction. Ignored when `max_steps` is given.
        epochs: f64 = value(1.0) => number().above(0.0).at_most(1e6);
        /// How many optimizer steps to make. Overrides `epochs`, as in transformers; the data is repeated as needed.
        max_steps: Option<usize> = value(None) => optional(whole().at_least(1));
        /// Rows per micro-batch; with packing, packed rows of `data.max_seq_len`.
        batch_size: usize = value(8) => whole().at_least(1);
        /// Micro-batches per optimizer step. The loss is the mean over the trained tokens of the whole step, so this
        /// equals one large batch.
        grad_accumulation: usize = value(1) => whole().at_least(1);
        /// The peak of the schedule.
        learning_rate: f64 = value(2e-4) => number().above(0.0);
        /// The learning rate over the run.
        schedule: Schedule = nested() => ScheduleSpec;
        /// The optimizer and its constants.
        optimizer: Optimizer = nested() => section();
        /// The gradient is scaled down when its global norm exceeds this; `null` is off.
        max_grad_norm: Option<f64> = value(Some(1.0)) => optional(number().above(0.0));
        /// Evaluate every this many steps; `null` evaluates at the end.
        eval_every: Option<usize> = value(None) => optional(whole().at_least(1));
        /// Write the adapter every this many steps; `null` writes it at the end.
        save_every: Option<usize> = value(None) => optional(whole().at_least(1));
        /// Print a line every this many steps; `metrics.jsonl` has every step. Losses and norms are read from the device no
        /// more often, so that it never waits in between, and where an adapter is written or evaluated.
        log_every: usize = value(1) => whole().at_least(1);
    }
    check check_steps;
}

fn check_steps(train: &mut TrainSection, node: &Node, reader: &mut Reader<'_>) {
    if let (Warmup::Steps(warmup), Some(steps)) = (train.schedule.warmup, train.max_steps)
        && warmup >= steps
    {
        reader.conflict(
            node,
            "schedule.warmup_steps",
            "the run would end before the learning rate reaches its peak",
            &format!("fewer than `train.max_steps`, which is {steps}"),
        );
    }
}
