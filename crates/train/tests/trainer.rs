//! The loop: which events come in which order, and how a run ends.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};

use common::{batch, document, factors, lora, model, options, shorthand};
use emberlora_data::Batch;
use emberlora_lora::peft;
use emberlora_train::{
    AdapterWriter, Batches, Event, Length, Quantity, TrainError, TrainOptions, TrainState, Trained, Trainer, evaluate,
};

fn rows(lines: std::ops::Range<usize>) -> Vec<Batch> {
    lines.map(|line| batch(line, 12, 4)).collect()
}

struct Ran {
    events: Vec<Event>,
    result: Result<Trained, TrainError>,
    dir: tempfile::TempDir,
}

impl Ran {
    fn order(&self) -> String {
        self.events.iter().map(shorthand).collect::<Vec<_>>().join(" ")
    }

    fn losses(&self) -> Vec<f64> {
        let loss = |event: &Event| match event {
            Event::Step(step) => Some(step.loss),
            _ => None,
        };
        self.events.iter().filter_map(loss).collect()
    }
}

/// Runs the tiny model; `watch` sees each event and may raise the interrupt flag.
fn run_with(
    dropout: f64,
    train: Vec<Batch>,
    eval: Option<Vec<Batch>>,
    options: TrainOptions,
    mut watch: impl FnMut(&Event, &AtomicBool),
) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let writer = AdapterWriter::new(lora(dropout), "base".to_owned(), None, dir.path().join("adapter"));
    let eval = eval.as_ref().map(|eval| eval as &dyn Batches);
    let trainer = Trainer::new(model(dropout), &train, eval, options, Some(writer)).unwrap();
    let interrupt = AtomicBool::new(false);
    let mut events = Vec::new();
    let mut listener = |event: &Event| {
        watch(event, &interrupt);
        events.push(event.clone());
    };
    let result = trainer.run(&mut [&mut listener], &interrupt);
    Ran { events, result, dir }
}

fn run(train: Vec<Batch>, eval: Option<Vec<Batch>>, options: TrainOptions) -> Ran {
    run_with(0.0, train, eval, options, |_, _| ())
}

#[test]
fn a_run_saves_and_evaluates_when_it_is_due_and_never_twice() {
    let options = TrainOptions { eval_every: Some(2), save_every: Some(3), ..options(6) };
    let ran = run(rows(0..4), Some(rows(9..10)), options);
    assert_eq!(
        ran.order(),
        "start/6 eval/0 step/1 step/2 eval/2 step/3 save/3 step/4 eval/4 step/5 step/6 save/6 eval/6 finish/6"
    );
    let summary = ran.result.unwrap().summary;
    assert_eq!((summary.steps, summary.tokens, summary.stopped), (6, 72, None));
    assert!(summary.eval_before.unwrap().loss > summary.eval_after.unwrap().loss);
}

#[test]
fn without_held_out_data_nothing_is_evaluated() {
    let options = TrainOptions { eval_every: Some(1), ..options(2) };
    assert_eq!(run(rows(0..4), None, options).order(), "start/2 step/1 step/2 save/2 finish/2");
}

#[test]
fn the_loss_falls_on_what_is_repeated() {
    let losses = run(rows(0..1), None, options(30)).losses();
    assert!(losses[29] < 0.5 * losses[0], "{losses:?}");
}

#[test]
fn epochs_end_with_a_smaller_step_for_what_is_left() {
    let options = TrainOptions { length: Length::Epochs(2.0), grad_accumulation: 3, ..options(0) };
    let ran = run(rows(0..7), None, options);
    let steps: Vec<(usize, f64)> = ran
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Step(step) => Some((step.trained_tokens, step.epoch)),
            _ => None,
        })
        .collect();
    let tokens: Vec<usize> = steps.iter().map(|(tokens, _)| *tokens).collect();
    assert_eq!(tokens, [24, 24, 8, 24, 24, 8]);
    let epochs: Vec<f64> = steps.iter().map(|(_, epoch)| *epoch).collect();
    assert_eq!(epochs, [3.0 / 7.0, 6.0 / 7.0, 1.0, 1.0 + 3.0 / 7.0, 1.0 + 6.0 / 7.0, 2.0]);
}

#[test]
fn log_every_marks_the_first_the_last_and_every_nth_step() {
    let ran = run(rows(0..2), None, TrainOptions { log_every: 3, ..options(8) });
    let marked: Vec<usize> = ran
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Step(step) if step.log => Some(step.step),
            _ => None,
        })
        .collect();
    assert_eq!(marked, [1, 3, 6, 8]);
}

#[test]
fn an_interrupt_finishes_the_step_and_writes_the_adapter() {
    let watch = |event: &Event, interrupt: &AtomicBool| {
        if shorthand(event) == "step/3" {
            interrupt.store(true, Ordering::SeqCst);
        }
    };
    let ran = run_with(0.0, rows(0..4), Some(rows(9..10)), options(100), watch);
    assert_eq!(ran.order(), "start/100 eval/0 step/1 step/2 step/3 save/3 stop/3/Interrupted");
    let trained = ran.result.unwrap();
    assert_eq!(trained.summary.steps, 3);
    let saved = peft::load(&ran.dir.path().join("adapter")).unwrap();
    assert_eq!(saved.tensors.len(), factors(&trained.model).len());
}

#[test]
fn an_interrupt_after_a_save_does_not_save_again() {
    let watch = |event: &Event, interrupt: &AtomicBool| {
        if shorthand(event) == "save/2" {
            interrupt.store(true, Ordering::SeqCst);
        }
    };
    let options = TrainOptions { save_every: Some(2), ..options(100) };
    let ran = run_with(0.0, rows(0..4), None, options, watch);
    assert_eq!(ran.order(), "start/100 step/1 step/2 save/2 stop/2/Interrupted");
}

#[test]
fn an_interrupt_during_evaluation_stops_before_the_first_step() {
    let watch = |_: &Event, interrupt: &AtomicBool| interrupt.store(true, Ordering::SeqCst);
    let ran = run_with(0.0, rows(0..4), Some(rows(9..12)), options(100), watch);
    assert_eq!(ran.order(), "start/100 save/0 stop/0/Interrupted");
}

#[test]
fn an_interrupt_during_the_last_evaluation_is_one_although_all_steps_are_taken() {
    let watch = |event: &Event, interrupt: &AtomicBool| {
        if shorthand(event) == "save/2" {
            interrupt.store(true, Ordering::SeqCst);
        }
    };
    let ran = run_with(0.0, rows(0..4), Some(rows(9..10)), options(2), watch);
    assert_eq!(ran.order(), "start/2 eval/0 step/1 step/2 save/2 stop/2/Interrupted");
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_with_the_rows_and_the_last_good_adapter() {
    // The first update throws the parameters so far away that the second step's activations overflow.
    let options = TrainOptions { learning_rate: 1e30, max_grad_norm: None, ..options(10) };
    let ran = run(rows(1..5), None, options);
    assert_eq!(ran.order(), "start/10 step/1 save/0 stop/1/NotFinite");
    let error = ran.result.unwrap_err();
    let TrainError::NotFinite { step: 2, quantity: Quantity::Loss, value, rows } = &error else { panic!("{error}") };
    assert!(!value.is_finite());
    assert_eq!(rows.0, ["rows.jsonl:2"]);
    // Good is what gave a finite loss and gradient: the parameters before that update.
    let saved = peft::load(&ran.dir.path().join("adapter")).unwrap();
    let mut saved: Vec<Vec<f32>> = saved.tensors.into_values().map(|tensor| tensor.values).collect();
    let mut expected = factors(&model(0.0));
    saved.sort_by(|a, b| a.partial_cmp(b).unwrap());
    expected.sort_by(|a, b| a.partial_cmp(b).unwrap());
    assert_eq!(saved, expected);
}

#[test]
fn a_step_without_a_trained_token_is_skipped_and_counts() {
    let train = vec![batch(1, 12, 4), batch(2, 12, 12), batch(3, 12, 4)];
    let ran = run(train, None, options(3));
    assert_eq!(ran.order(), "start/3 step/1 skip/2 step/3 save/3 finish/3");
    let Some(Event::Skipped { rows, .. }) = ran.events.get(2) else { panic!("{:?}", ran.events) };
    assert_eq!(rows, &["rows.jsonl:2"]);
}

#[test]
fn a_micro_batch_without_a_trained_token_changes_nothing() {
    let with = |batches: &[Batch]| {
        let schedule = options(1).schedule(1);
        let mut state = TrainState::new(model(0.0), options(1).optimizer, schedule, None, 1).unwrap();
        let outcome = state.step(batches).unwrap().unwrap();
        (outcome.loss, outcome.grad_norm, factors(state.model()))
    };
    assert_eq!(with(&[batch(1, 12, 4), batch(2, 9, 9)]), with(&[batch(1, 12, 4)]));
}

#[test]
fn the_same_seed_gives_the_same_run_with_dropout() {
    let dropped = |seed| run_with(0.2, rows(0..4), None, TrainOptions { seed, ..options(4) }, |_, _| ()).losses();
    assert_eq!(dropped(3), dropped(3));
    assert_ne!(dropped(3), dropped(4));
    assert_ne!(dropped(3), run(rows(0..4), None, options(4)).losses());
}

#[test]
fn a_look_at_the_gradient_changes_no_dropout_mask() {
    let losses = |looks: usize| {
        let schedule = options(3).schedule(3);
        let mut state = TrainState::new(model(0.2), options(3).optimizer, schedule, None, 3).unwrap();
        let step = |_| {
            for _ in 0..looks {
                state.gradients(&rows(0..2)).unwrap();
            }
            state.step(&rows(0..2)).unwrap().unwrap().loss
        };
        (0..3).map(step).collect::<Vec<f64>>()
    };
    assert_eq!(losses(0), losses(2));
}

#[test]
fn micro_batches_of_a_step_and_steps_have_masks_of_their_own() {
    let mut state = TrainState::new(model(0.5), options(3).optimizer, options(3).schedule(3), None, 3).unwrap();
    // B starts at zero, where no mask can be seen.
    state.step(&rows(0..1)).unwrap();
    let losses = |state: &TrainState| -> Vec<f32> {
        let same = [batch(1, 12, 4), batch(1, 12, 4)];
        state.gradients(&same).unwrap().unwrap().losses.into_data().try_to_vec().unwrap()
    };
    let first = losses(&state);
    // A step that trains nothing moves on and leaves the parameters, so the masks alone tell the losses apart.
    assert!(state.step(&[batch(2, 9, 9)]).unwrap().is_none());
    let second = losses(&state);
    let mut all = [first, second].concat();
    all.sort_by(f32::total_cmp);
    all.dedup();
    assert_eq!(all.len(), 4, "{all:?}");
}

#[test]
fn clipping_bounds_the_update_and_logs_the_norm_before_it() {
    let step = |max_grad_norm| {
        let optimizer = emberlora_train::AdamW { betas: [0.0, 0.0], eps: 1.0, weight_decay: 0.0 };
        let mut state = TrainState::new(model(0.0), optimizer, options(1).schedule(1), max_grad_norm, 1).unwrap();
        let outcome = state.step(&rows(0..1)).unwrap().unwrap();
        let (before, after) = (factors(&model(0.0)), factors(state.model()));
        let moved = before.iter().flatten().zip(after.iter().flatten()).map(|(a, b)| f64::from((a - b).abs()));
        (outcome.grad_norm, moved.fold(0.0, f64::max))
    };
    let (norm, moved) = step(None);
    let (same_norm, less) = step(Some(norm / 1e3));
    assert_eq!(norm, same_norm);
    assert!(less < moved / 100.0, "{less} {moved}");
}

#[test]
fn evaluation_weighs_tokens_and_not_batches() {
    let model = model(0.0);
    let (a, b) = (batch(1, 24, 1), batch(2, 9, 7));
    let apart = [evaluate(&model, [&a]).unwrap(), evaluate(&model, [&b]).unwrap()];
    let together = evaluate(&model, [&a, &b]).unwrap();
    assert_eq!((apart[0].tokens, apart[1].tokens, together.tokens), (23, 2, 25));
    let expected = (apart[0].loss * 23.0 + apart[1].loss * 2.0) / 25.0;
    assert!((together.loss - expected).abs() < 1e-9);
    assert!((together.perplexity - together.loss.exp()).abs() < 1e-12);
    let one = Batch::new(&[vec![&document(1, 24, 1)], vec![&document(2, 9, 7)]], 0);
    assert!((evaluate(&model, [one]).unwrap().loss - expected).abs() < 1e-5);
}

#[test]
fn nothing_to_train_on_or_to_evaluate_is_an_error() {
    let empty: Vec<Batch> = Vec::new();
    let error = Trainer::new(model(0.0), &empty, None, options(1), None).map(|_| ()).unwrap_err();
    assert!(matches!(error, TrainError::NoBatches { epoch: 0 }), "{error}");
    assert!(matches!(evaluate(&model(0.0), [batch(1, 5, 5)]), Err(TrainError::NothingToEvaluate)));
}

#[test]
fn a_model_without_adapters_cannot_be_trained() {
    let mut bare = model(0.0);
    emberlora_lora::detach(&mut bare);
    let error = TrainState::new(bare, options(1).optimizer, options(1).schedule(1), None, 1).map(|_| ()).unwrap_err();
    assert!(matches!(error, TrainError::NothingToTrain), "{error}");
}

#[test]
fn a_token_outside_the_vocabulary_is_an_error_that_names_the_row() {
    let mut wrong = batch(8, 12, 4);
    wrong.ids[3] = common::VOCABULARY;
    let mut state = TrainState::new(model(0.0), options(1).optimizer, options(1).schedule(1), None, 1).unwrap();
    let error = state.step(&[wrong]).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:8") && error.contains("96"), "{error}");
}

#[test]
fn an_error_of_a_listener_ends_the_run() {
    struct Full;
    impl emberlora_train::Listener for Full {
        fn event(&mut self, event: &Event) -> Result<(), TrainError> {
            match event {
                Event::Step(_) => Err(TrainError::OutputInUse { dir: "here".into() }),
                _ => Ok(()),
            }
        }
    }
    let train = rows(0..2);
    let trainer = Trainer::new(model(0.0), &train, None, options(5), None).unwrap();
    let error = trainer.run(&mut [&mut Full], &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, TrainError::OutputInUse { .. }), "{error}");
}
