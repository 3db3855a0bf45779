//! `emberlora eval`: loss and perplexity of the base or of an adapter.

use std::io::Write;

use emberlora_config::DataSource;
use emberlora_data::{Batch, DataOptions};
use emberlora_train::{AdapterChoice, Base, LoadedModel, evaluate};

use crate::args::EvalArgs;
use crate::exit::WrongInput;
use crate::terminal::Terminal;
use crate::{config, devices};

/// Runs `emberlora eval`.
pub(crate) fn run(args: &EvalArgs, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut config = config::load_on(&args.recipe, &args.device)?;
    if let Some(path) = &args.data {
        config.data.eval = vec![DataSource { path: path.clone(), format: config.data.format, weight: 1.0 }];
    }
    if config.data.eval.is_empty() {
        let message = "there are no rows to evaluate on: set `data.eval` in the recipe or pass `--data FILE`";
        return Err(WrongInput(message.to_owned()).into());
    }
    let base = Base::resolve(&config, terminal)?;
    let rows = base.dataset(DataOptions::eval(&config), terminal, "eval")?;
    let choice = args.adapter.as_deref().map_or(AdapterChoice::Start, AdapterChoice::Saved);
    let loaded = LoadedModel::load(&config, &base, choice)?;
    devices::announce(&loaded.device, terminal);
    loaded.check_vocabulary(rows.documents())?;

    let batches: Vec<Batch> = rows.batches(config.seed, 0).collect();
    let evaluation = evaluate(&loaded.model, &batches)?;
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&evaluation)?)?;
    } else {
        writeln!(out, "loss        {:.6}", evaluation.loss)?;
        writeln!(out, "perplexity  {:.4}", evaluation.perplexity)?;
        writeln!(out, "tokens      {}", evaluation.tokens)?;
        writeln!(out, "seconds     {:.2}", evaluation.seconds)?;
    }
    Ok(())
}
