//! `emberlora config`: recipes as such, without a model or data.

use std::io::Write;

use crate::args::{ConfigCommand, DeviceArgs, RecipeArgs};
use emberlora_config::{ConfigError, RunConfig};

/// Reads a recipe with its overrides; everything that is wrong with it is in the one error.
pub(crate) fn load(args: &RecipeArgs) -> Result<RunConfig, ConfigError> {
    RunConfig::load(&args.recipe, &args.overrides)
}

/// As [`load`], for a command that computes: `--device` has the last word on where.
pub(crate) fn load_on(args: &RecipeArgs, device: &DeviceArgs) -> Result<RunConfig, ConfigError> {
    let mut overrides = args.overrides.clone();
    overrides.extend(device.device.iter().map(|device| format!("device={device}")));
    RunConfig::load(&args.recipe, &overrides)
}

/// Runs `emberlora config …`.
pub(crate) fn run(command: &ConfigCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        ConfigCommand::Check(args) => {
            load(args)?;
            writeln!(out, "{}: ok", args.recipe.display())?;
        }
        ConfigCommand::Show(args) => write!(out, "{}", load(args)?.to_yaml())?,
        ConfigCommand::Schema => writeln!(out, "{}", serde_json::to_string_pretty(&RunConfig::schema())?)?,
        ConfigCommand::Docs => write!(out, "{}", RunConfig::reference_docs())?,
    }
    Ok(())
}
