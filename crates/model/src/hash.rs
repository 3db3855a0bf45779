//! Which files a model was: their SHA-256, for the record of a run.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use crate::weights::{INDEX, LoadError, SINGLE, shards};

/// SHA-256, in lower-case hexadecimal, of the files that decide about a model's numbers: `config.json` and the weights,
/// with their index where they are sharded. Keys are names within `dir`.
///
/// Files are read in parallel, each once from end to end.
///
/// # Errors
/// A file that cannot be read, or an index that is malformed.
pub fn hash_files(dir: &Path) -> Result<BTreeMap<String, String>, LoadError> {
    let mut names = vec!["config.json".to_owned()];
    if dir.join(SINGLE).exists() {
        names.push(SINGLE.to_owned());
    } else {
        names.push(INDEX.to_owned());
        names.extend(shards(&dir.join(INDEX))?);
    }
    names
        .into_par_iter()
        .map(|name| {
            let path = dir.join(&name);
            let hash = sha256(&path).map_err(|source| LoadError::Io { path, source })?;
            Ok((name, hash))
        })
        .collect()
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 20];
    loop {
        match file.read(&mut piece)? {
            0 => break,
            read => hasher.update(&piece[..read]),
        }
    }
    Ok(hasher.finalize().iter().fold(String::with_capacity(64), |mut hex, byte| {
        // Writing to a string cannot fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_that_decide_about_the_numbers_are_hashed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), "abc").unwrap();
        std::fs::write(dir.path().join(SINGLE), "").unwrap();
        std::fs::write(dir.path().join("README.md"), "not a part of the model").unwrap();
        let hashes = hash_files(dir.path()).unwrap();
        assert_eq!(hashes.keys().collect::<Vec<_>>(), ["config.json", SINGLE]);
        assert_eq!(hashes["config.json"], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(hashes[SINGLE], "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }
}
