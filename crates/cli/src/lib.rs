//! The `emberlora` command.
//!
//! This crate computes nothing: it reads arguments, asks the crates below, and renders what they answer. Results go to
//! standard output; progress, warnings and errors go to standard error. The exit code is 0 when all is done, 1 when
//! something failed while running, 2 when an argument, a recipe or an input is wrong, and 130 after an interruption.

#![forbid(unsafe_code)]

mod args;
mod config;
mod devices;
mod eval;
mod exit;
mod generate;
mod inspect;
mod interrupt;
mod merge;
mod progress;
mod quantize;
mod sample;
mod serve;
mod stop;
mod terminal;
mod train;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use crate::args::{Cli, Command};
use crate::terminal::Terminal;

/// Runs the command that the process's arguments ask for.
pub fn main() -> ExitCode {
    emberlora_kernels::keep_freed_memory();
    let cli = Cli::parse();
    let terminal = Terminal::new();
    terminal.install_logging();
    // Strips colours where standard output is no terminal or NO_COLOR is set.
    let mut out = anstream::stdout().lock();
    match run(&cli, &terminal, &mut out).and_then(|code| Ok(out.flush().map(|()| code)?)) {
        Ok(code) => ExitCode::from(code),
        Err(error) if exit::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            terminal.say(exit::message(&error));
            ExitCode::from(exit::code(&error))
        }
    }
}

fn run(cli: &Cli, terminal: &Terminal, out: &mut dyn Write) -> anyhow::Result<u8> {
    match &cli.command {
        Command::Train(args) => return train::run(args, terminal, out),
        Command::Eval(args) => eval::run(args, terminal, out)?,
        Command::Generate(args) => generate::run(args, terminal, out)?,
        Command::Inspect(args) => inspect::run(args, terminal, out)?,
        Command::Quantize(args) => quantize::run(args, terminal, out)?,
        Command::Merge(args) => return merge::run(args, terminal, out),
        Command::Devices(args) => devices::run(args, out)?,
        Command::Serve(args) => serve::run(args, out)?,
        Command::Config(command) => config::run(command, out)?,
    }
    Ok(0)
}
