//! The terminal: what is drawn and logged on standard error without one line cutting through another.
//!
//! Results go to standard output, so that a pipe sees nothing else.

use std::io::{self, IsTerminal, Write};

use emberlora_model::hub::DownloadProgress;
use emberlora_train::Reporter;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::progress::FileProgress;

/// Standard error with the bars that are drawn on it. Clones draw on the same screen.
#[derive(Clone, Debug)]
pub(crate) struct Terminal {
    bars: MultiProgress,
    interactive: bool,
}

impl Terminal {
    pub(crate) fn new() -> Self {
        let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self { bars, interactive: io::stderr().is_terminal() }
    }

    /// Sends log lines to this terminal; `RUST_LOG` chooses them and warnings are the default.
    pub(crate) fn install_logging(&self) {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
        let colours = self.interactive && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let logging = tracing_subscriber::fmt().with_env_filter(filter).with_writer(self.clone());
        // A second installation in one process keeps the first.
        let _ = logging.without_time().with_target(false).with_ansi(colours).try_init();
    }

    /// Whether a person is looking: bars move on a terminal and are plain lines elsewhere.
    pub(crate) fn is_interactive(&self) -> bool {
        self.interactive
    }

    /// Draws a bar below those that are already there; it shows nothing where nobody is looking.
    pub(crate) fn add(&self, bar: ProgressBar) -> ProgressBar {
        self.bars.add(bar)
    }

    /// Writes a line above the bars.
    pub(crate) fn say(&self, line: impl AsRef<str>) {
        let mut line = line.as_ref().to_owned();
        line.push('\n');
        // There is nobody left to tell when standard error is closed.
        let _ = self.above_the_bars(line.as_bytes());
    }

    /// Asks for a line where somebody is there to type it.
    pub(crate) fn prompt(&self, text: &str) {
        if self.interactive && io::stdin().is_terminal() {
            let _ = self.above_the_bars(text.as_bytes());
        }
    }

    fn above_the_bars(&self, bytes: &[u8]) -> io::Result<()> {
        self.bars.suspend(|| io::stderr().lock().write_all(bytes))
    }
}

impl Reporter for Terminal {
    fn reading(&self, split: &'static str) -> Box<dyn emberlora_data::Progress + '_> {
        Box::new(FileProgress::new(self, format!("reading {split}")))
    }

    fn fetching(&self) -> Box<dyn DownloadProgress + '_> {
        Box::new(FileProgress::new(self, String::new()))
    }
}

impl<'a> MakeWriter<'a> for Terminal {
    type Writer = LogLine;

    fn make_writer(&'a self) -> LogLine {
        LogLine(self.clone())
    }
}

/// Where one log event goes.
pub(crate) struct LogLine(Terminal);

impl Write for LogLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.above_the_bars(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
