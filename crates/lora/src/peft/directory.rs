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
/// the old adapter or the new one but never a part of one. Files in an old directory that are not the adapter's, such
/// as a README, move into the new one.
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
    let exists = check_replaceable(&target)?;

    let fresh = Scratch::create(&parent, name, "new")?;
    for (file, bytes) in files {
        write(&fresh.path.join(file), bytes)?;
    }
    sync_directory(&fresh.path)?;
    if exists {
        let aside = beside(&parent, name, "old");
        fs::rename(&target, &aside).map_err(failed("move aside", &target))?;
        if let Err(error) = fs::rename(&fresh.path, &target) {
            // The old adapter goes back; should that fail too, it still is in `aside`.
            let path = if fs::rename(&aside, &target).is_ok() { &target } else { &aside };
            return Err(failed("replace", path)(error));
        }
        clear(&parent, &aside, &target);
    } else {
        fs::rename(&fresh.path, &target).map_err(failed("create", &target))?;
        if let Err(error) = sync_directory(&parent) {
            tracing::warn!("the adapter is in {}, but {error}", target.display());
        }
    }
    Ok(())
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

/// A name that is not taken, beside the target so that it is on the same file system.
fn beside(parent: &Path, name: &OsStr, suffix: &str) -> PathBuf {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    loop {
        let mut hidden = OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{suffix}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        let path = parent.join(hidden);
        if !path.exists() {
            return path;
        }
    }
}

/// A directory that disappears unless it was renamed.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn create(parent: &Path, name: &OsStr, suffix: &str) -> Result<Self, PeftError> {
        let path = beside(parent, name, suffix);
        fs::create_dir(&path).map_err(failed("create", &path))?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // After a successful rename there is nothing at this path; after a failure the first error is the one to tell.
        let _ = fs::remove_dir_all(&self.path);
    }
}

pub(super) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PeftError {
    let path = path.to_owned();
    move |source| PeftError::Io { action, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for place in [&old, &new] {
            fs::create_dir(place).unwrap();
            fs::write(place.join(CONFIG_FILE), place.as_os_str().as_encoded_bytes()).unwrap();
        }
        fs::write(old.join("README.md"), "mine").unwrap();
        clear(dir.path(), &old, &new);
        assert!(!old.exists());
        assert_eq!(fs::read_to_string(new.join("README.md")).unwrap(), "mine");
        assert_eq!(fs::read(new.join(CONFIG_FILE)).unwrap(), new.as_os_str().as_encoded_bytes());
    }
}
