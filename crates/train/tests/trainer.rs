//! The loop: which events come in which order, and how a run ends.

mod common;

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::ThreadId;

use common::{batch, document, factors, lora, model, options, rows, shorthand};
use emberlora_config::Warmup;
use emberlora_data::Batch;
use emberlora_lora::peft;
use emberlora_train::{
    AdapterWriter, Batches, Event, Length, Listener, Quantity, TrainError, TrainOptions, Trained, Trainer, evaluate,
};

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
fn steps_are_told_in_their_order_when_they_are_read_together() {
    let train = vec![batch(1, 12, 4), batch(2, 12, 12), batch(3, 12, 4)];
    let together = run(train.clone(), None, TrainOptions { log_every: 4, ..options(7) });
    assert_eq!(together.order(), "start/7 step/1 skip/2 step/3 step/4 skip/5 step/6 step/7 save/7 finish/7");
    assert_eq!(together.losses(), run(train, None, options(7)).losses());
}

#[test]
fn a_loss_that_is_not_finite_among_steps_read_together_ends_the_run_as_if_it_had_been_seen_at_once() {
    // The second update throws the parameters away, the third step sees it, and four more are taken before it is read.
    let run = |log_every| {
        let options = TrainOptions {
            learning_rate: 1e30,
            warmup: Warmup::Steps(1),
            max_grad_norm: None,
            log_every,
            ..options(10)
        };
        let ran = run(rows(1..5), None, options);
        let saved = peft::load(&ran.dir.path().join("adapter")).unwrap();
        let saved: Vec<Vec<f32>> = saved.tensors.into_values().map(|tensor| tensor.values).collect();
        (ran.order(), ran.result.unwrap_err().to_string(), saved)
    };
    let at_once = run(1);
    assert_eq!(at_once.0, "start/10 step/1 step/2 save/1 stop/2/NotFinite");
    assert!(at_once.1.starts_with("step 3: the loss is "), "{}", at_once.1);
    assert_eq!(run(7), at_once);
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
fn the_same_seed_gives_the_same_run_with_dropout() {
    let dropped = |seed| run_with(0.2, rows(0..4), None, TrainOptions { seed, ..options(4) }, |_, _| ()).losses();
    assert_eq!(dropped(3), dropped(3));
    assert_ne!(dropped(3), dropped(4));
    assert_ne!(dropped(3), run(rows(0..4), None, options(4)).losses());
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

/// Fails at the event with this shorthand.
struct FailsAt(&'static str);

impl Listener for FailsAt {
    fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        match shorthand(event) == self.0 {
            true => Err(TrainError::OutputInUse { dir: "here".into() }),
            false => Ok(()),
        }
    }
}

#[test]
fn an_error_of_a_listener_ends_the_run_and_loses_no_step() {
    let check = |fails_at, save_every, expected: &str, written: bool| {
        let (dir, train) = (tempfile::tempdir().unwrap(), rows(0..2));
        let writer = AdapterWriter::new(lora(0.0), "base".to_owned(), None, dir.path().join("adapter"));
        let options = TrainOptions { save_every, ..options(5) };
        let trainer = Trainer::new(model(0.0), &train, None, options, Some(writer)).unwrap();
        let mut order = Vec::new();
        let mut watch = |event: &Event| order.push(shorthand(event));
        let error = trainer.run(&mut [&mut FailsAt(fails_at), &mut watch], &AtomicBool::new(false)).unwrap_err();
        assert!(matches!(error, TrainError::OutputInUse { .. }), "{error}");
        assert_eq!(order.join(" "), expected);
        let saved = peft::load(&dir.path().join("adapter"));
        assert_eq!(saved.is_ok(), written);
        saved.map_or(Vec::new(), |saved| saved.tensors.into_values().map(|tensor| tensor.values).collect())
    };
    let after_two = check("step/2", None, "start/5 step/1 step/2 save/2 stop/2/Failed", true);
    // Written already, or nothing to write.
    let saved = check("step/2", Some(1), "start/5 step/1 save/1 step/2 save/2 stop/2/Failed", true);
    assert_eq!(after_two, saved);
    check("save/2", Some(2), "start/5 step/1 step/2 save/2 stop/2/Failed", true);
    check("start/5", None, "start/5 stop/0/Failed", false);
}

#[test]
fn an_adapter_that_cannot_be_written_is_not_tried_twice() {
    let (dir, train) = (tempfile::tempdir().unwrap(), rows(0..2));
    let taken = dir.path().join("taken");
    std::fs::write(&taken, "").unwrap();
    let writer = AdapterWriter::new(lora(0.0), "base".to_owned(), None, taken);
    let trainer = Trainer::new(model(0.0), &train, None, options(1), Some(writer)).unwrap();
    let mut order = Vec::new();
    let error = trainer.run(&mut [&mut |event: &Event| order.push(shorthand(event))], &AtomicBool::new(false));
    assert!(matches!(error, Err(TrainError::Save { .. })));
    assert_eq!(order, ["start/1", "step/1", "stop/1/Failed"]);
}

/// Counts what is asked of it.
struct Counted {
    batches: Vec<Batch>,
    laid_out: AtomicUsize,
    threads: Mutex<HashSet<ThreadId>>,
    panics_at: usize,
}

impl Counted {
    fn new(lines: std::ops::Range<usize>, panics_at: usize) -> Self {
        Self { batches: rows(lines), laid_out: AtomicUsize::new(0), threads: Mutex::default(), panics_at }
    }
}

impl Batches for Counted {
    fn epoch(&self, _: u64) -> Box<dyn ExactSizeIterator<Item = Batch> + '_> {
        Box::new(self.batches.iter().map(|batch| {
            let count = self.laid_out.fetch_add(1, Ordering::SeqCst);
            assert!(count < self.panics_at, "the data ended");
            self.threads.lock().unwrap().insert(std::thread::current().id());
            batch.clone()
        }))
    }
}

#[test]
fn batches_are_laid_out_on_another_thread_two_steps_ahead_at_most() {
    let train = Counted::new(0..5, usize::MAX);
    let trainer = Trainer::new(model(0.0), &train, None, options(7), None).unwrap();
    let mut watch = |event: &Event| {
        if let Event::Step(step) = event {
            let ahead = train.laid_out.load(Ordering::SeqCst) - step.step;
            assert!(ahead <= 2, "{ahead} ahead after step {}", step.step);
        }
    };
    trainer.run(&mut [&mut watch], &AtomicBool::new(false)).unwrap();
    let threads = train.threads.into_inner().unwrap();
    assert!(threads.len() == 1 && !threads.contains(&std::thread::current().id()));
}

#[test]
#[should_panic(expected = "lays out batches")]
fn a_panic_of_the_batches_is_one_of_the_run() {
    let train = Counted::new(0..5, 3);
    let trainer = Trainer::new(model(0.0), &train, None, options(7), None).unwrap();
    let _ = trainer.run(&mut [], &AtomicBool::new(false));
}
