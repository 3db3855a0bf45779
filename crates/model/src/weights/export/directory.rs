//! A directory that appears as a whole or not at all.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::error::{ExportError, failed};

/// A directory under way. It lies beside its place, on the same file system, and disappears unless it is moved there.
#[derive(Debug)]
pub(super) struct Staging {
    out: PathBuf,
    path: PathBuf,
}

impl Staging {
    /// Refuses a place where something is. Parents that do not exist are created.
    pub(super) fn create(out: &Path) -> Result<Self, ExportError> {
        check(out)?;
        // Behind a link the directory itself is replaced, not the link.
        let place = fs::canonicalize(out).unwrap_or_else(|_| out.to_owned());
        let occupied = || ExportError::Occupied { out: out.to_owned(), is_directory: true };
        let name = place.file_name().ok_or_else(occupied)?;
        let parent = place.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(parent).map_err(failed("create", parent))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".new-{}", std::process::id()));
        let path = parent.join(hidden);
        fs::create_dir(&path).map_err(failed("create", &path))?;
        Ok(Self { out: place, path })
    }

    /// Where a file of this name is written; directories on the way to it are created.
    pub(super) fn file(&self, name: &Path) -> Result<PathBuf, ExportError> {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(failed("create", parent))?;
        }
        Ok(path)
    }

    /// Writes a small file.
    pub(super) fn write(&self, name: &str, text: &str) -> Result<(), ExportError> {
        let path = self.file(Path::new(name))?;
        fs::write(&path, text).map_err(failed("write", &path))
    }

    /// Copies what a model directory has beside its weights and its configuration: the tokenizer, the chat template,
    /// the settings of generation, the licence.
    pub(super) fn copy_companions(&self, from: &Path) -> Result<(), ExportError> {
        for name in companions(from).map_err(failed("list", from))? {
            let (source, target) = (from.join(&name), self.file(&name)?);
            fs::copy(&source, &target).map_err(failed("copy", &source))?;
        }
        Ok(())
    }

    /// Moves the directory to its place.
    pub(super) fn commit(self) -> Result<(), ExportError> {
        if cfg!(unix) {
            let sync = File::open(&self.path).and_then(|directory| directory.sync_all());
            sync.map_err(failed("write", &self.path))?;
        }
        // An empty directory in the place makes way; one that has been filled meanwhile does not.
        match fs::remove_dir(&self.out) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("replace", &self.out)(error)),
            _ => fs::rename(&self.path, &self.out).map_err(failed("create", &self.out)),
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // After the move there is nothing at this path; after a failure the first error is the one to tell.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Whether a directory can be written to `out`: nothing is there, or an empty one.
///
/// # Errors
/// [`ExportError::Occupied`], and [`ExportError::Io`] where that cannot be told.
pub fn check(out: &Path) -> Result<(), ExportError> {
    let occupied = |is_directory| ExportError::Occupied { out: out.to_owned(), is_directory };
    match fs::read_dir(out) {
        Ok(mut entries) => {
            if entries.next().is_none() {
                Ok(())
            } else {
                Err(occupied(true))
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(occupied(false)),
        Err(error) => Err(failed("list", out)(error)),
    }
}

/// Chat templates besides the first, where newer versions of transformers keep several.
const TEMPLATES: &str = "additional_chat_templates";

fn companions(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = PathBuf::from(entry.file_name());
        // Links of the hub's cache are followed.
        if entry.path().is_file() && is_companion(&name) {
            found.push(name);
        } else if name == Path::new(TEMPLATES) && entry.path().is_dir() {
            for template in fs::read_dir(entry.path())? {
                found.push(name.join(template?.file_name()));
            }
        }
    }
    Ok(found)
}

/// Whether a file belongs to a model whatever its weights are. What describes weights or adapters does not.
fn is_companion(name: &Path) -> bool {
    const EXTENSIONS: [&str; 5] = ["json", "jinja", "txt", "model", "tiktoken"];
    let text = name.to_string_lossy();
    let describes_weights = text == "config.json" || text == "adapter_config.json" || text.ends_with(".index.json");
    let known = name.extension().is_some_and(|extension| EXTENSIONS.iter().any(|known| extension == *known));
    (known && !describes_weights) || text.starts_with("LICENSE") || text.starts_with("NOTICE")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_appears_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/er/out");
        let staging = Staging::create(&out).unwrap();
        staging.write("config.json", "{}").unwrap();
        assert!(!out.exists());
        staging.commit().unwrap();
        assert_eq!(fs::read_to_string(out.join("config.json")).unwrap(), "{}");
        assert_eq!(fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "nothing lies beside it");
    }

    #[test]
    fn what_is_given_up_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::create(&dir.path().join("out")).unwrap();
        staging.write("config.json", "{}").unwrap();
        drop(staging);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_empty_directory_makes_way_and_nothing_else_does() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        fs::create_dir(&out).unwrap();
        let staging = Staging::create(&out).unwrap();
        staging.write("config.json", "{}").unwrap();
        staging.commit().unwrap();
        let error = Staging::create(&out).unwrap_err().to_string();
        assert!(error.contains("out exists and is not empty"), "{error}");
        let error = Staging::create(&out.join("config.json")).unwrap_err().to_string();
        assert!(error.contains("config.json is not a directory"), "{error}");
    }

    #[test]
    fn the_tokenizer_and_the_like_are_copied_and_what_describes_weights_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (model, out) = (dir.path().join("model"), dir.path().join("out"));
        fs::create_dir_all(model.join(TEMPLATES)).unwrap();
        let kept = ["tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE"];
        let left = ["config.json", "model.safetensors.index.json", "adapter_config.json", "model.safetensors", "x.bin"];
        for name in kept.iter().chain(&left) {
            fs::write(model.join(name), name).unwrap();
        }
        fs::write(model.join(TEMPLATES).join("tools.jinja"), "t").unwrap();
        let staging = Staging::create(&out).unwrap();
        staging.copy_companions(&model).unwrap();
        staging.commit().unwrap();
        for name in kept {
            assert_eq!(fs::read_to_string(out.join(name)).unwrap(), name);
        }
        assert!(out.join(TEMPLATES).join("tools.jinja").exists());
        assert!(left.iter().all(|name| !out.join(name).exists()));
    }
}
