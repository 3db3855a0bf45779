//! `emberlora quantize`: a model directory with packed weights, as transformers and bitsandbytes write it.

use std::io::Write;

use emberlora_model::export::{self, ExportReport};
use emberlora_model::{FloatDtype, QuantizationOptions, hub};
use emberlora_quant::{BlockSize, QuantKind, Scheme};
use emberlora_train::{PrepareError, Reporter};
use indicatif::BinaryBytes;

use crate::args::QuantizeArgs;
use crate::exit::WrongInput;
use crate::interrupt;
use crate::progress::ExportBar;
use crate::terminal::Terminal;

/// What is skipped unless something else is named, as in transformers.
const HEAD: &str = "lm_head";

/// The threshold of bitsandbytes' own default.
const THRESHOLD: f32 = 6.0;

/// Runs `emberlora quantize`.
pub(crate) fn run(args: &QuantizeArgs, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<()> {
    let (options, compute_dtype) = options(args)?;
    // Before a model is fetched for nothing.
    export::check(&args.out)?;
    let found = hub::resolve(&args.model, &args.revision, &mut *terminal.fetching()).map_err(PrepareError::from)?;
    let interrupt = interrupt::watch(terminal, "stopping; nothing will have been written")?;
    let mut bar = ExportBar::new(terminal, "quantising", interrupt);
    let report = export::quantise(&found.dir, &args.out, &options, compute_dtype, &mut bar)?;

    let ExportReport { projections, bytes_read, bytes_written, .. } = report;
    writeln!(out, "projections  {projections} in {}", options.scheme)?;
    writeln!(out, "weights      {} before, {} after", BinaryBytes(bytes_read), BinaryBytes(bytes_written))?;
    writeln!(out, "model        {}", args.out.display())?;
    Ok(())
}

/// What the arguments mean; those that another kind has are refused as they are in a recipe.
fn options(args: &QuantizeArgs) -> Result<(QuantizationOptions, FloatDtype), WrongInput> {
    let foreign = |flag: &str| WrongInput(format!("{flag} has no effect with --kind {}: leave it out", args.kind));
    let given = match args.kind {
        QuantKind::Int8 => [
            (args.no_double_quant, "--no-double-quant"),
            (args.block_size.is_some(), "--block-size"),
            (args.compute_dtype.is_some(), "--compute-dtype"),
        ]
        .into_iter()
        .find(|(given, _)| *given),
        QuantKind::Nf4 | QuantKind::Fp4 => args.threshold.map(|_| (true, "--threshold")),
    };
    if let Some((_, flag)) = given {
        return Err(foreign(flag));
    }
    let block_size = args.block_size.unwrap_or_default();
    let scheme = Scheme::new(args.kind, block_size, !args.no_double_quant);
    let skip = if args.skip.is_empty() { vec![HEAD.to_owned()] } else { args.skip.clone() };
    let options = QuantizationOptions::new(scheme, skip, args.threshold.unwrap_or(THRESHOLD));
    Ok((options, args.compute_dtype.unwrap_or(FloatDtype::F32)))
}

/// A block size that a recipe takes.
pub(crate) fn block_size(text: &str) -> Result<BlockSize, String> {
    let size = text.parse().ok().filter(|size| (32..=512).contains(size));
    size.and_then(|size: usize| BlockSize::try_from(size).ok())
        .ok_or_else(|| "must be 32, 64, 128, 256 or 512".to_owned())
}

/// A threshold that a recipe takes.
pub(crate) fn threshold(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(value) if value.is_finite() && value >= 0.0 => Ok(value),
        _ => Err("must be a number, 0 or more".to_owned()),
    }
}
