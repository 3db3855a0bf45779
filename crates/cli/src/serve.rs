//! `emberlora serve`: devices of this machine for runs elsewhere.

use std::fs;
use std::io::Write;

use anyhow::Context;
use emberlora_train::{Server, TOKEN, Token};

use crate::args::ServeArgs;
use crate::exit::WrongInput;

/// Runs `emberlora serve` until the process is asked to end.
pub(crate) fn run(args: &ServeArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let (token, made_up) = token(args)?;
    let server = Server::bind(&args.device, args.listen, token.clone())?;
    let devices: Vec<String> = server.devices.iter().map(ToString::to_string).collect();
    writeln!(out, "serving {} on {}", devices.join(", "), server.address)?;
    if let Some(token) = token.filter(|_| made_up) {
        writeln!(out, "clients need {TOKEN}={}", token.secret())?;
    }
    out.flush()?;
    Ok(server.run()?)
}

/// What clients must present, and whether nobody knows it yet.
fn token(args: &ServeArgs) -> anyhow::Result<(Option<Token>, bool)> {
    if args.no_token {
        return Ok((None, false));
    }
    if let Some(path) = &args.token_file {
        let text = fs::read_to_string(path)
            .map_err(|error| WrongInput(format!("{}: no token can be read: {error}", path.display())))?;
        let token =
            Token::new(&text).ok_or_else(|| WrongInput(format!("{}: is empty, expected a token", path.display())))?;
        return Ok((Some(token), false));
    }
    if let Some(token) = Token::from_environment() {
        return Ok((Some(token), false));
    }
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes).context("no random numbers for a token")?;
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((Token::new(&text), true))
}
