//! How long work reports on itself without knowing who draws it.

/// Receives the progress of reading and tokenising files.
///
/// The unit is bytes of the files as they lie on disk, because the number of rows is not known before the last one
/// was read. The command line draws a bar from it; a library user may pass [`NoProgress`].
pub trait Progress: Sync {
    /// Work of `total` bytes begins.
    fn start(&self, total: u64);
    /// `bytes` more bytes were read and tokenised.
    fn advance(&self, bytes: u64);
    /// All files were read.
    fn finish(&self);
}

/// Ignores every report.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _total: u64) {}
    fn advance(&self, _bytes: u64) {}
    fn finish(&self) {}
}
