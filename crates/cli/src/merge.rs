//! `emberlora merge`: an adapter and its base as one dense model, and what that changes.

use std::io::{self, Write};

use emberlora_model::export::{self, ExportReport, MergeOptions};
use emberlora_train::{Base, Comparing, Comparison, Distance, PrepareError, quantization_options};
use indicatif::BinaryBytes;

use crate::args::{MergeArgs, RecipeArgs};
use crate::exit::INTERRUPTED;
use crate::progress::ExportBar;
use crate::terminal::Terminal;
use crate::{config, interrupt};

/// Runs `emberlora merge` and answers the exit code.
pub(crate) fn run(args: &MergeArgs, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<u8> {
    let recipe = RecipeArgs { recipe: args.recipe.clone(), overrides: args.overrides.clone() };
    let config = config::load(&recipe)?;
    // Before a model is fetched for nothing.
    export::check(&args.out)?;
    let base = Base::resolve(&config, terminal)?;
    let comparing = Comparing::prepare(&config, &base)?;
    let interrupt = interrupt::watch(terminal, "stopping")?;
    let mut bar = ExportBar::new(terminal, "merging", interrupt.clone());
    let quantization = config.quantization.as_ref().map(quantization_options).transpose();
    let options = MergeOptions::new(quantization.map_err(PrepareError::from)?, args.dtype);
    let report = export::merge(&base.dir, &args.adapter, &args.out, &options, &mut bar)?;

    let ExportReport { projections, bytes_read, bytes_written, .. } = report;
    writeln!(out, "projections  {projections} merged")?;
    writeln!(out, "weights      {} before, {} after", BinaryBytes(bytes_read), BinaryBytes(bytes_written))?;
    writeln!(out, "model        {}", args.out.display())?;
    out.flush()?;

    terminal.say("comparing logits");
    let Some(comparison) = comparing.run(&args.adapter, &args.out, &interrupt)? else {
        terminal.say("interrupted: the model is written, and not compared");
        return Ok(INTERRUPTED);
    };
    print(&comparison, out)?;
    Ok(0)
}

fn print(comparison: &Comparison, out: &mut dyn Write) -> io::Result<()> {
    let Comparison { prompts, tokens, from_recipe, merged, requantised } = comparison;
    let read = match from_recipe {
        true => format!("{tokens} tokens of the first {prompts} rows"),
        false => format!("{tokens} tokens of a fixed text, as the recipe's rows are not here"),
    };
    writeln!(out, "\nlogits: distance from base and adapter on {read}")?;
    let mut line = |what: &str, distance: &Distance| {
        let Distance { max, mean } = distance;
        writeln!(out, "  {what:<32} max {max:.6}  mean {mean:.6}")
    };
    line("merged", merged)?;
    if let Some((scheme, distance)) = requantised {
        line(&format!("merged, again {}", scheme.kind()), distance)?;
    }
    Ok(())
}
