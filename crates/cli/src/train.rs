//! `emberlora train`: the run, and what is said at its end.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use emberlora_config::RunConfig;
use emberlora_train::provenance::PackedProvenance;
use emberlora_train::{ADAPTER, Evaluation, Event, Listener, Run, TrainError, Trained};
use indicatif::{BinaryBytes, HumanCount};

use crate::args::TrainArgs;
use crate::exit::INTERRUPTED;
use crate::progress::TrainProgress;
use crate::sample::Sample;
use crate::terminal::Terminal;
use crate::{config, devices, interrupt};

/// Runs `emberlora train` and answers the exit code.
pub(crate) fn run(args: &TrainArgs, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<u8> {
    let config = config::load_on(&args.recipe, &args.device)?;
    let mut run = Run::prepare(&config, terminal)?;
    describe(&run, terminal);

    // Watched from here on: before, there is nothing to finish and Ctrl-C ends the process as usual.
    let interrupt = interrupt::watch(terminal, "stopping; the step under way is finished and the adapter written")?;
    let (mut progress, mut losses) = (TrainProgress::new(terminal), StepLosses::default());
    let trained = run.train(&mut [&mut progress, &mut losses], &interrupt)?;

    report_losses(&trained, losses, out)?;
    if trained.summary.stopped.is_none() {
        report_sample(&run, &trained, &interrupt, terminal, out)?;
    }
    report_paths(&run.config, out)?;
    Ok(if interrupt.load(Ordering::Relaxed) { INTERRUPTED } else { 0 })
}

/// What is about to be trained, on what.
fn describe(run: &Run, terminal: &Terminal) {
    let model = &run.model;
    devices::announce(&model.device, terminal);
    terminal.say(format!(
        "model {}: {} parameters on {}, computing in {}",
        run.config.model.source,
        HumanCount(model.model.num_base_parameters() as u64),
        run.provenance.device,
        model.model.compute_dtype().name(),
    ));
    if let Some(PackedProvenance { format, parameters, bytes }) = &run.provenance.model.packed {
        let (parameters, bytes) = (HumanCount(*parameters as u64), BinaryBytes(*bytes as u64));
        terminal.say(format!("model weights: {parameters} parameters in {format}: {bytes}"));
    }
    for (split, data) in [("train", Some(&run.train)), ("eval", run.eval.as_ref())] {
        for line in data.iter().flat_map(|data| data.report.to_string().lines().map(str::to_owned).collect::<Vec<_>>())
        {
            terminal.say(format!("{split}: {line}"));
        }
    }
}

/// The losses of the first and the last step, for a run without evaluation rows.
#[derive(Default)]
struct StepLosses {
    first: Option<f64>,
    last: Option<f64>,
}

impl Listener for StepLosses {
    fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        if let Event::Step(step) = event {
            self.first.get_or_insert(step.loss);
            self.last = Some(step.loss);
        }
        Ok(())
    }
}

fn report_losses(trained: &Trained, steps: StepLosses, out: &mut dyn Write) -> io::Result<()> {
    let summary = &trained.summary;
    writeln!(out, "{} steps, {} tokens in {:.1} s", summary.steps, summary.tokens, summary.seconds)?;
    if let Some(bytes) = emberlora_train::peak_memory_bytes() {
        writeln!(out, "peak memory {}", BinaryBytes(bytes))?;
    }
    let evaluations = summary.eval_before.zip(summary.eval_after);
    // A run that was stopped has not been evaluated where it stands.
    if let (Some((before, after)), None) = (evaluations, summary.stopped) {
        let Evaluation { loss, perplexity, tokens, seconds: _ } = after;
        writeln!(out, "evaluation on {tokens} tokens")?;
        writeln!(out, "  loss        {:.4} before, {loss:.4} after", before.loss)?;
        writeln!(out, "  perplexity  {:.3} before, {perplexity:.3} after", before.perplexity)?;
    } else if let (Some(first), Some(last)) = (steps.first, steps.last) {
        writeln!(out, "loss of the training rows")?;
        writeln!(out, "  before (first step)  {first:.4}")?;
        writeln!(out, "  after (last step)    {last:.4}")?;
    }
    Ok(())
}

fn report_sample(
    run: &Run,
    trained: &Trained,
    interrupt: &AtomicBool,
    terminal: &Terminal,
    out: &mut dyn Write,
) -> anyhow::Result<()> {
    let rows = run.eval.as_ref().unwrap_or(&run.train).documents();
    let Some(sample) = rows.first().and_then(Sample::of) else { return Ok(()) };
    terminal.say("writing a sample before and after");
    let template = run.base.tokenizer.chat_template(&run.config.data.chat_template)?;
    let models = [&run.model.model, &trained.model];
    let written = sample.write(&run.base, template.as_ref(), models, interrupt).context("the sample")?;
    written.map_or(Ok(()), |written| Ok(written.print(out)?))
}

fn report_paths(config: &RunConfig, out: &mut dyn Write) -> io::Result<()> {
    let written = |name: &str| config.output.join(name);
    writeln!(out, "\nadapter  {}", written(ADAPTER).display())?;
    writeln!(out, "recipe   {}", written("config.yaml").display())?;
    writeln!(out, "metrics  {}", written("metrics.jsonl").display())
}
