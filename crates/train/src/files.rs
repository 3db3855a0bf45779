//! What a run writes beside its adapter.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Evaluation, Event, Listener, TrainError};

const METRICS: &str = "metrics.jsonl";
const CONFIG: &str = "config.yaml";
const PROVENANCE: &str = "provenance.json";

/// Where a run writes its adapter, within its output directory.
pub const ADAPTER: &str = "adapter";

/// The files of a run: `config.yaml` and `provenance.json` once, `metrics.jsonl` as it goes on.
///
/// A directory holds a run once `metrics.jsonl` has a line, or while a process has it locked; the lock goes with the
/// process. What a start leaves behind that ended before its first line is nobody's, and the next start takes it over.
///
/// Every step has a line of metrics, which is on disk before the next step begins; what `log_every` thins out is what a
/// person reads. Numbers are written with as many digits as it takes to read the same number back. A step without a
/// trained token has no loss, so its line says `"skipped": true` in its place.
#[derive(Debug)]
pub struct RunFiles {
    path: PathBuf,
    metrics: File,
}

impl RunFiles {
    /// Refuses a directory that already holds a run, or that cannot be created or written to. It leaves nothing behind.
    /// Called before anything slow is done; [`RunFiles::create`] looks again.
    ///
    /// # Errors
    /// [`TrainError::OutputInUse`], [`TrainError::OutputUnusable`].
    pub fn check(output: &Path) -> Result<(), TrainError> {
        if let Ok(metrics) = File::open(output.join(METRICS))
            && is_taken(&metrics, metrics.try_lock_shared())
        {
            return Err(TrainError::OutputInUse { dir: output.to_owned() });
        }
        let unusable =
            |at: &Path, source| TrainError::OutputUnusable { dir: output.to_owned(), at: at.to_owned(), source };
        // What exists of the path decides: the rest can be created in a directory that can be written to.
        for at in output.ancestors() {
            let at = if at.as_os_str().is_empty() { Path::new(".") } else { at };
            match fs::metadata(at) {
                Ok(found) if !found.is_dir() => return Err(unusable(at, io::ErrorKind::NotADirectory.into())),
                // Permissions do not tell all, as of a file system that is mounted read-only: a file does.
                Ok(_) => return tempfile::tempfile_in(at).map(drop).map_err(|source| unusable(at, source)),
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(unusable(at, error)),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Creates the directory and its files. `config` is the resolved recipe.
    ///
    /// # Errors
    /// [`TrainError::OutputInUse`], [`TrainError::OutputUnusable`], [`TrainError::Io`].
    pub fn create(output: &Path, config: &str, provenance: &impl Serialize) -> Result<Self, TrainError> {
        Self::check(output)?;
        let io = |path: &Path, action| {
            let path = path.to_owned();
            move |source| TrainError::Io { path, action, source }
        };
        fs::create_dir_all(output).map_err(io(output, "created"))?;
        let path = output.join(METRICS);
        let metrics = OpenOptions::new().append(true).create(true).open(&path).map_err(io(&path, "created"))?;
        // The lock decides between two runs that start at the same time.
        if is_taken(&metrics, metrics.try_lock()) {
            return Err(TrainError::OutputInUse { dir: output.to_owned() });
        }
        let mut provenance = serde_json::to_vec_pretty(provenance).map_err(|e| io(output, "written")(e.into()))?;
        provenance.push(b'\n');
        for (name, bytes) in [(CONFIG, config.as_bytes()), (PROVENANCE, &provenance)] {
            let path = output.join(name);
            replace(&path, bytes).map_err(io(&path, "written"))?;
        }
        Ok(Self { path, metrics })
    }

    fn line(&mut self, line: &impl Serialize) -> Result<(), TrainError> {
        let mut append = || -> io::Result<()> {
            let mut bytes = serde_json::to_vec(line)?;
            bytes.push(b'\n');
            // One write, so that a run that is killed leaves whole lines.
            self.metrics.write_all(&bytes)?;
            self.metrics.flush()
        };
        append().map_err(|source| TrainError::Io { path: self.path.clone(), action: "written", source })
    }
}

impl Listener for RunFiles {
    fn event(&mut self, event: &Event) -> Result<(), TrainError> {
        match event {
            Event::Step(metrics) => self.line(metrics),
            Event::Skipped { step, rows } => self.line(&SkippedLine { step: *step, skipped: true, rows }),
            Event::Eval { step, epoch, evaluation } => {
                let Evaluation { loss, perplexity, tokens, seconds } = *evaluation;
                self.line(&EvalLine { split: "eval", step: *step, epoch: *epoch, loss, perplexity, tokens, seconds })
            }
            Event::RunStarted(_) | Event::Saved { .. } | Event::Stopped { .. } | Event::Finished(_) => Ok(()),
        }
    }
}

#[derive(Serialize)]
struct SkippedLine<'a> {
    step: usize,
    skipped: bool,
    rows: &'a [String],
}

#[derive(Serialize)]
struct EvalLine {
    split: &'static str,
    step: usize,
    epoch: f64,
    loss: f64,
    perplexity: f64,
    tokens: usize,
    seconds: f64,
}

/// Whether a metrics file belongs to a run. Where files cannot be locked, only its lines tell.
fn is_taken(metrics: &File, locked: Result<(), TryLockError>) -> bool {
    matches!(locked, Err(TryLockError::WouldBlock)) || metrics.metadata().is_ok_and(|metadata| metadata.len() > 0)
}

/// Writes beside the final name and renames, so that a reader sees all of the file or none.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(bytes)?;
    // A temporary file is private; these are for everyone who may read the directory.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        file.as_file().set_permissions(fs::Permissions::from_mode(0o644))?;
    }
    file.as_file().sync_all()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::StepMetrics;

    fn step(step: usize, log: bool) -> Event {
        Event::Step(StepMetrics {
            step,
            epoch: 1.0 / 3.0,
            loss: f64::from(2.345_678_9_f32) / 7.0,
            lr: 0.1 + 0.2,
            grad_norm: f64::MIN_POSITIVE,
            tokens: 10,
            trained_tokens: 4,
            tokens_per_second: 1e300 / 3.0,
            step_seconds: 1e-9,
            started_seconds: None,
            peak_memory_bytes: Some(u64::MAX),
            log,
        })
    }

    fn lines(dir: &Path) -> Vec<Value> {
        let text = fs::read_to_string(dir.join(METRICS)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn every_step_has_a_line_whose_numbers_read_back_exactly() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("deep/er");
        let mut files = RunFiles::create(&output, "seed: 1\n", &json!({"seed": 1})).unwrap();
        let evaluation = Evaluation { loss: 0.1, perplexity: 0.1f64.exp(), tokens: 3, seconds: 2.0 };
        files.event(&Event::Eval { step: 0, epoch: 0.0, evaluation }).unwrap();
        files.event(&step(1, true)).unwrap();
        files.event(&step(2, false)).unwrap();
        files.event(&Event::Skipped { step: 3, rows: vec!["a.jsonl:7".into()] }).unwrap();

        let lines = lines(&output);
        assert_eq!(lines.len(), 4);
        assert_eq!((&lines[0]["split"], &lines[0]["perplexity"]), (&json!("eval"), &json!(0.1f64.exp())));
        let Event::Step(expected) = step(1, true) else { unreachable!() };
        assert_eq!(lines[1], serde_json::to_value(&expected).unwrap());
        assert_eq!(lines[1]["lr"].as_f64(), Some(0.1 + 0.2));
        assert_eq!(lines[1]["loss"].as_f64(), Some(expected.loss));
        assert_eq!(lines[1]["grad_norm"].as_f64(), Some(f64::MIN_POSITIVE));
        assert!(lines[1].get("log").is_none());
        assert_eq!(lines[2]["step"], 2, "log_every is for the console");
        assert_eq!(lines[3], json!({"step": 3, "skipped": true, "rows": ["a.jsonl:7"]}));
        assert_eq!(fs::read_to_string(output.join(CONFIG)).unwrap(), "seed: 1\n");
    }

    #[test]
    fn an_earlier_run_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        RunFiles::create(dir.path(), "first", &json!({})).unwrap().event(&step(1, true)).unwrap();
        assert!(matches!(RunFiles::check(dir.path()), Err(TrainError::OutputInUse { .. })));
        let error = RunFiles::create(dir.path(), "second", &json!({})).unwrap_err().to_string();
        assert!(error.contains("already holds a run"), "{error}");
        assert_eq!(fs::read_to_string(dir.path().join(CONFIG)).unwrap(), "first");
        assert_eq!(lines(dir.path()).len(), 1);
    }

    #[test]
    fn a_run_in_progress_is_left_alone_before_its_first_line() {
        let dir = tempfile::tempdir().unwrap();
        let running = RunFiles::create(dir.path(), "first", &json!({})).unwrap();
        assert!(matches!(RunFiles::check(dir.path()), Err(TrainError::OutputInUse { .. })));
        let second = RunFiles::create(dir.path(), "second", &json!({}));
        assert!(matches!(second, Err(TrainError::OutputInUse { .. })));
        assert_eq!(fs::read_to_string(dir.path().join(CONFIG)).unwrap(), "first");
        drop(running);
    }

    #[test]
    fn a_start_that_ended_before_its_first_line_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        drop(RunFiles::create(dir.path(), "failed", &json!({})).unwrap());
        RunFiles::check(dir.path()).unwrap();
        let mut files = RunFiles::create(dir.path(), "second", &json!({})).unwrap();
        files.event(&step(1, true)).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join(CONFIG)).unwrap(), "second");
        assert_eq!(lines(dir.path()).len(), 1);
    }

    #[test]
    fn a_directory_whose_files_cannot_be_written_can_be_used_once_they_can() {
        let dir = tempfile::tempdir().unwrap();
        // Nothing can be renamed over a directory with something in it.
        fs::create_dir_all(dir.path().join(PROVENANCE).join("in the way")).unwrap();
        assert!(matches!(RunFiles::create(dir.path(), "first", &json!({})), Err(TrainError::Io { .. })));
        fs::remove_dir_all(dir.path().join(PROVENANCE)).unwrap();
        RunFiles::create(dir.path(), "second", &json!({})).unwrap();
    }

    #[test]
    fn a_directory_without_metrics_is_used() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(CONFIG), "of a run that never began").unwrap();
        RunFiles::create(dir.path(), "mine", &json!({})).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join(CONFIG)).unwrap(), "mine");
    }

    #[test]
    fn an_output_that_is_a_file_or_below_one_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("taken");
        fs::write(&file, "").unwrap();
        for output in [file.clone(), file.join("run"), file.join("deep/er")] {
            let error = RunFiles::check(&output).unwrap_err();
            assert!(matches!(&error, TrainError::OutputUnusable { at, .. } if *at == file), "{error}");
            assert!(error.is_wrong_input());
        }
    }

    #[test]
    #[cfg(unix)]
    fn an_output_that_may_not_be_written_to_is_an_error() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let closed = dir.path().join("closed");
        fs::create_dir(&closed).unwrap();
        fs::set_permissions(&closed, fs::Permissions::from_mode(0o555)).unwrap();
        // Nothing is closed to a superuser.
        if tempfile::tempfile_in(&closed).is_err() {
            assert!(matches!(RunFiles::check(&closed.join("run")), Err(TrainError::OutputUnusable { .. })));
        }
    }

    #[test]
    fn looking_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        RunFiles::check(&dir.path().join("deep/er")).unwrap();
        RunFiles::check(dir.path()).unwrap();
        RunFiles::check(Path::new("no-such-run")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert!(!Path::new("no-such-run").exists());
    }
}
