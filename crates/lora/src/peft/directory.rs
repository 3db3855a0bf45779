//! Writing an adapter directory as a whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{CONFIG_FILE, PICKLE_FILE, PeftError, TENSORS_FILE};

/// Replaces the directory `target` by one with these files.
///
/// The files are written beside the target and brought to the disk before anything is renamed, so the target holds
/// the old adapter or the new one but never a part of one. Where the system can, the two change places in one step;
/// elsewhere there is a moment in which the old one lies aside and the target is missing, which [`put_back`] repairs
/// after a crash. Files in an old directory that are not the adapter's, such as a README, move into the new one.
///
/// An error means that the target is as it was. Once the new adapter is in place, what is left to do can only end in a
/// warning.
pub(super) fn replace(target: &Path, files: &[(&str, &[u8])]) -> Result<(), PeftError> {
    // Behind a link the directory itself is replaced, not the link.
    let target = match fs::canonicalize(target) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => target.to_owned(),
        Err(error) => return Err(failed("open", target)(error)),
    };
    let (parent, name) = split(&target)?;
    fs::create_dir_all(&parent).map_err(failed("create", &parent))?;
    put_back(&parent, name, &target)?;
    let exists = check_replaceable(&target)?;

    let fresh = Scratch::create(&parent, name, NEW)?;
    for (file, bytes) in files {
        write(&fresh.path.join(file), bytes)?;
    }
    sync_directory(&fresh.path)?;
    if exists {
        let old = swap(fresh, &target, &parent, name)?;
        clear(&parent, &old, &target);
    } else {
        fs::rename(&fresh.path, &target).map_err(failed("create", &target))?;
        if let Err(error) = sync_directory(&parent) {
            tracing::warn!("the adapter is in {}, but {error}", target.display());
        }
    }
    Ok(())
}

/// The adapter that lies aside because replacing `target` was cut short between two renames, so that `target` itself
/// is missing.
pub(super) fn cut_short(target: &Path) -> Option<PathBuf> {
    if target.exists() {
        return None;
    }
    let (parent, name) = split(target).ok()?;
    leftovers(&parent, name, OLD).into_iter().max_by_key(|path| path.metadata().and_then(|data| data.modified()).ok())
}

/// Repairs what a crash left behind, as far as that is certain, and points at the rest.
fn put_back(parent: &Path, name: &OsStr, target: &Path) -> Result<(), PeftError> {
    if let Some(aside) = cut_short(target) {
        fs::rename(&aside, target).map_err(failed("put back", &aside))?;
        tracing::warn!("{}: replacing it had been cut short, so the adapter of before was put back", target.display());
    }
    for path in [NEW, OLD].iter().flat_map(|suffix| leftovers(parent, name, suffix)) {
        let path = path.display();
        tracing::warn!("{path} was left by a save that was cut short; delete it unless it holds files of yours");
    }
    Ok(())
}

/// Brings `fresh` to where `target` is, and answers where the old directory is then.
fn swap(fresh: Scratch, target: &Path, parent: &Path, name: &OsStr) -> Result<PathBuf, PeftError> {
    match exchange(&fresh.path, target) {
        Ok(()) => Ok(fresh.keep()),
        // Whatever keeps more than this one call from working shows in the next.
        Err(_) => move_aside(&fresh.path, target, beside(parent, name, OLD)),
    }
}

/// Makes two directories change places in one step.
#[cfg(target_os = "linux")]
fn exchange(a: &Path, b: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
}

#[cfg(not(target_os = "linux"))]
fn exchange(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// The same in two steps.
fn move_aside(fresh: &Path, target: &Path, aside: PathBuf) -> Result<PathBuf, PeftError> {
    fs::rename(target, &aside).map_err(failed("move aside", target))?;
    if let Err(error) = fs::rename(fresh, target) {
        // The old adapter goes back; should that fail too, it still is in `aside`.
        let path = if fs::rename(&aside, target).is_ok() { target } else { &aside };
        return Err(failed("replace", path)(error));
    }
    Ok(aside)
}

/// Empties and removes the old directory behind its replacement. Whatever fails leaves it where it is, since it may
/// hold files that exist nowhere else.
fn clear(parent: &Path, old: &Path, new: &Path) {
    let cleared = sync_directory(parent)
        .and_then(|()| carry_over(old, new))
        .and_then(|()| fs::remove_dir_all(old).map_err(failed("remove", old)));
    if let Err(error) = cleared {
        let (old, new) = (old.display(), new.display());
        tracing::warn!("the new adapter is in {new}, but {error}; what was there before it stays in {old}");
    }
}

/// Whether there is something to replace. Only an adapter or an empty directory may be replaced.
fn check_replaceable(target: &Path) -> Result<bool, PeftError> {
    let entries = match fs::read_dir(target) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(PeftError::Occupied { path: target.to_owned() });
        }
        Err(error) => return Err(failed("list", target)(error)),
    };
    if target.join(CONFIG_FILE).is_file() || entries.count() == 0 {
        Ok(true)
    } else {
        Err(PeftError::Occupied { path: target.to_owned() })
    }
}

/// Moves what is not part of an adapter from the old directory into the new one.
fn carry_over(old: &Path, new: &Path) -> Result<(), PeftError> {
    let replaced = [CONFIG_FILE, TENSORS_FILE, PICKLE_FILE].map(OsStr::new);
    for entry in fs::read_dir(old).map_err(failed("list", old))? {
        let name = entry.map_err(failed("list", old))?.file_name();
        if !replaced.contains(&name.as_os_str()) {
            let from = old.join(&name);
            fs::rename(&from, new.join(&name)).map_err(failed("move", &from))?;
        }
    }
    Ok(())
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PeftError> {
    let mut file = File::create(path).map_err(failed("create", path))?;
    file.write_all(bytes).map_err(failed("write", path))?;
    file.sync_all().map_err(failed("write", path))
}

/// Brings the names in a directory to the disk, where the platform can.
fn sync_directory(path: &Path) -> Result<(), PeftError> {
    if cfg!(unix) {
        File::open(path).and_then(|directory| directory.sync_all()).map_err(failed("write", path))?;
    }
    Ok(())
}

fn split(target: &Path) -> Result<(PathBuf, &OsStr), PeftError> {
    let occupied = || PeftError::Occupied { path: target.to_owned() };
    let name = target.file_name().ok_or_else(occupied)?;
    let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name))
}

/// What the names of directories beside the target say: one that is being written, and one that was replaced.
const NEW: &str = "new";
const OLD: &str = "old";

/// What names beside the target begin with.
fn prefix(name: &OsStr, suffix: &str) -> OsString {
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{suffix}-"));
    hidden
}

/// A name that is not taken, beside the target so that it is on the same file system.
fn beside(parent: &Path, name: &OsStr, suffix: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let mut hidden = prefix(name, suffix);
        hidden.push(format!("{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let path = parent.join(hidden);
        if !path.exists() {
            return path;
        }
    }
}

/// The directories that [`beside`] has named and that are still there.
fn leftovers(parent: &Path, name: &OsStr, suffix: &str) -> Vec<PathBuf> {
    let prefix = prefix(name, suffix);
    let ours = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.as_encoded_bytes().starts_with(prefix.as_encoded_bytes()) && path.is_dir())
    };
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(ours).collect()
}

/// A directory that disappears unless it was renamed or kept.
struct Scratch {
    path: PathBuf,
    kept: bool,
}

impl Scratch {
    fn create(parent: &Path, name: &OsStr, suffix: &str) -> Result<Self, PeftError> {
        let path = beside(parent, name, suffix);
        fs::create_dir(&path).map_err(failed("create", &path))?;
        Ok(Self { path, kept: false })
    }

    fn keep(mut self) -> PathBuf {
        self.kept = true;
        self.path.clone()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.kept {
            // After a successful rename there is nothing at this path; after a failure the first error is the one to
            // tell.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PeftError {
    let path = path.to_owned();
    move |source| PeftError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An adapter directory whose configuration holds `text`.
    fn adapter(path: &Path, text: &str) {
        fs::create_dir(path).unwrap();
        fs::write(path.join(CONFIG_FILE), text).unwrap();
    }

    fn config(path: &Path) -> String {
        fs::read_to_string(path.join(CONFIG_FILE)).unwrap()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn directories_change_places_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b] = ["a", "b"].map(|name| dir.path().join(name));
        adapter(&a, "a");
        adapter(&b, "b");
        exchange(&a, &b).unwrap();
        assert_eq!((config(&a), config(&b)), ("b".to_owned(), "a".to_owned()));
        assert!(exchange(&a, &dir.path().join("absent")).is_err());
    }

    #[test]
    fn in_two_steps_the_old_directory_lies_aside_and_goes_back_when_the_second_fails() {
        let dir = tempfile::tempdir().unwrap();
        let [fresh, target, aside] = ["fresh", "adapter", ".adapter.old-1-0"].map(|name| dir.path().join(name));
        adapter(&fresh, "new");
        adapter(&target, "old");
        assert_eq!(move_aside(&fresh, &target, aside.clone()).unwrap(), aside);
        assert_eq!((config(&target), config(&aside)), ("new".to_owned(), "old".to_owned()));
        fs::remove_dir_all(&aside).unwrap();
        assert!(move_aside(&fresh, &target, aside.clone()).is_err());
        assert_eq!(config(&target), "new");
        assert!(!aside.exists());
    }

    #[test]
    fn an_adapter_left_aside_by_a_crash_is_found_and_put_back_by_the_next_save() {
        let dir = tempfile::tempdir().unwrap();
        let [target, aside, other] =
            ["adapter", ".adapter.old-1-0", ".adapter2.old-1-0"].map(|name| dir.path().join(name));
        adapter(&aside, "old");
        adapter(&other, "of another");
        fs::write(aside.join("README.md"), "mine").unwrap();
        assert_eq!(cut_short(&target).as_ref(), Some(&aside));
        replace(&target, &[(CONFIG_FILE, b"new")]).unwrap();
        assert_eq!(config(&target), "new");
        assert_eq!(fs::read_to_string(target.join("README.md")).unwrap(), "mine");
        assert_eq!((cut_short(&target), aside.exists(), other.exists()), (None, false, true));
    }

    #[test]
    fn files_that_cannot_move_to_the_new_adapter_stay_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let (old, nowhere) = (dir.path().join(".adapter.old-1-0"), dir.path().join("gone/adapter"));
        fs::create_dir(&old).unwrap();
        fs::write(old.join("README.md"), "mine").unwrap();
        clear(dir.path(), &old, &nowhere);
        assert_eq!(fs::read_to_string(old.join("README.md")).unwrap(), "mine");
    }

    #[test]
    fn an_old_directory_goes_once_its_other_files_have_moved() {
        let dir = tempfile::tempdir().unwrap();
        let (old, new) = (dir.path().join(".adapter.old-1-0"), dir.path().join("adapter"));
        adapter(&old, "old");
        adapter(&new, "new");
        fs::write(old.join("README.md"), "mine").unwrap();
        clear(dir.path(), &old, &new);
        assert!(!old.exists());
        assert_eq!(fs::read_to_string(new.join("README.md")).unwrap(), "mine");
        assert_eq!(config(&new), "new");
    }
}
