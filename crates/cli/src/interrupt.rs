//! Ctrl-C: the first one asks, the second one ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use crate::exit::INTERRUPTED;
use crate::terminal::Terminal;

/// Sets the returned flag at the first interruption, saying that it is `stopping`, and leaves the process at the second.
pub(crate) fn watch(terminal: &Terminal, stopping: &'static str) -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let (seen, terminal) = (flag.clone(), terminal.clone());
    ctrlc::set_handler(move || {
        if seen.swap(true, Ordering::SeqCst) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        terminal.say(format!("{stopping}. Ctrl-C again ends at once"));
    })
    .context("cannot watch for interruptions")?;
    Ok(flag)
}
