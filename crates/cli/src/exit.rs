//! How the command ends: the error as a person reads it, and the exit code that says whose turn it is.

use std::error::Error;
use std::fmt::Write as _;
use std::io;

use emberlora_config::ConfigError;
use emberlora_data::{DataError, TemplateError, TokenizerError};
use emberlora_model::export::ExportError;
use emberlora_model::generate::GenerateError;
use emberlora_train::{PrepareError, ServeError, TrainError};

/// Something failed while running.
pub(crate) const FAILED: u8 = 1;
/// An argument, a recipe or an input is wrong; trying again changes nothing.
pub(crate) const WRONG: u8 = 2;
/// Ctrl-C, as shells count it: 128 + SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// What the command line itself finds wrong with its input.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct WrongInput(pub(crate) String);

/// The message and its causes, each on a line, without those that a message above already quotes.
pub(crate) fn message(error: &anyhow::Error) -> String {
    let mut text = format!("error: {error}");
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  caused by: {}", cause.replace('\n', "\n  "));
        }
    }
    text
}

/// The exit code for `error`; the outermost cause that knows decides.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(verdict).unwrap_or(FAILED)
}

/// Whether the reader of standard output went away, as `head` does when it has seen enough.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// `None` where this cause does not know whose mistake it is.
fn verdict(cause: &(dyn Error + 'static)) -> Option<u8> {
    if let Some(error) = cause.downcast_ref::<ExportError>() {
        return Some(match error {
            ExportError::Interrupted { .. } => INTERRUPTED,
            error if error.is_wrong_input() => WRONG,
            _ => FAILED,
        });
    }
    let prepare = cause.downcast_ref::<PrepareError>().map(PrepareError::is_wrong_input);
    let train = || cause.downcast_ref::<TrainError>().map(TrainError::is_wrong_input);
    let serve = || cause.downcast_ref::<ServeError>().map(ServeError::is_wrong_input);
    if let Some(wrong) = prepare.or_else(train).or_else(serve) {
        return Some(if wrong { WRONG } else { FAILED });
    }
    let wrong = cause.is::<WrongInput>()
        || cause.is::<ConfigError>()
        || cause.is::<DataError>()
        || cause.is::<TokenizerError>()
        || cause.is::<TemplateError>()
        || cause.is::<GenerateError>()
        || cause.is::<emberlora_model::ConfigError>();
    wrong.then_some(WRONG)
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn causes_follow_unless_they_were_quoted() {
        let error = Err::<(), _>(anyhow!("disk full")).context("cannot write a.txt").unwrap_err();
        assert_eq!(message(&error), "error: cannot write a.txt\n  caused by: disk full");
        let error = Err::<(), _>(anyhow!("disk full")).context("cannot write a.txt: disk full").unwrap_err();
        assert_eq!(message(&error), "error: cannot write a.txt: disk full");
    }

    #[test]
    fn context_does_not_change_whose_mistake_it_is() {
        let error = anyhow::Error::new(WrongInput("no such row".into())).context("inspect");
        assert_eq!(code(&error), WRONG);
        assert_eq!(code(&anyhow!("anything else")), FAILED);
    }

    #[test]
    fn a_closed_pipe_is_recognised_only_as_the_error_itself() {
        let closed = || io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_closed_pipe(&anyhow::Error::new(closed())));
        assert!(!is_closed_pipe(&anyhow!("something else")));
    }
}
