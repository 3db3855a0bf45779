//! From what a user wrote to a model directory: a local path, or an id on the Hugging Face hub.
//!
//! Downloads go through the `hf-hub` crate into the cache that Python's `huggingface_hub` uses too. A revision is
//! resolved to a commit first and everything is taken from that commit. `config.json` comes first, so that a model that
//! is not supported costs no download; the weights come last, so that a snapshot with weights is a complete one.

mod error;

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

pub use error::HubError;

use crate::config::ModelConfig;
use crate::weights::{INDEX, SINGLE, shards};

/// The branch that a repository of the hub begins with; the only revision of a local directory.
const DEFAULT_REVISION: &str = "main";

/// A model directory and where it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelSource {
    /// The directory.
    pub dir: PathBuf,
    /// The hub's commit that it is a snapshot of; `None` for a local directory.
    pub commit: Option<String>,
}

/// Told about downloads as they go.
pub trait DownloadProgress {
    /// A file of this many bytes begins.
    fn started(&mut self, file: &str, bytes: u64);
    /// So many more bytes of it have come.
    fn advanced(&mut self, bytes: u64);
    /// It is complete.
    fn finished(&mut self);
}

/// Tells nobody.
impl DownloadProgress for () {
    fn started(&mut self, _file: &str, _bytes: u64) {}
    fn advanced(&mut self, _bytes: u64) {}
    fn finished(&mut self) {}
}

/// Where the hub is and how it is used.
#[derive(Clone, Debug)]
pub struct HubSettings {
    /// Address without a slash at its end.
    pub endpoint: String,
    /// The directory that holds `models--org--name`.
    pub cache: PathBuf,
    /// Sent with every request.
    pub token: Option<String>,
}

impl HubSettings {
    /// From the variables that Python's `huggingface_hub` reads: `HF_ENDPOINT`; `HF_HUB_CACHE`, or else `hub` in
    /// `HF_HOME`; `HF_TOKEN`, or else the token that a login left in `HF_HOME`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Self {
        let given = |name: &str| variable(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let home = match given("HF_HOME") {
            Some(home) => PathBuf::from(home),
            // hf-hub's own default panics without a home directory.
            None => match std::env::home_dir() {
                Some(home) => home.join(".cache/huggingface"),
                None => std::env::temp_dir().join("huggingface"),
            },
        };
        let in_home = home.join("hub");
        let endpoint = given("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: given("HF_TOKEN").or_else(|| Cache::new(in_home.clone()).token()),
            cache: given("HF_HUB_CACHE").map_or(in_home, PathBuf::from),
        }
    }
}

/// Finds the model that `source` names: a directory as it is, or else `revision` (a branch, tag or commit) of a
/// repository on the hub, downloaded where the cache does not have it. The environment decides about the hub, see
/// [`HubSettings::from_env`].
///
/// # Errors
/// Any [`HubError`].
pub fn resolve(source: &str, revision: &str, progress: &mut dyn DownloadProgress) -> Result<ModelSource, HubError> {
    resolve_with(&HubSettings::from_env(), source, revision, progress)
}

/// [`resolve`] with settings of one's own.
///
/// # Errors
/// Any [`HubError`].
pub fn resolve_with(
    settings: &HubSettings,
    source: &str,
    revision: &str,
    progress: &mut dyn DownloadProgress,
) -> Result<ModelSource, HubError> {
    let path = Path::new(source);
    if path.is_dir() {
        if revision != DEFAULT_REVISION {
            return Err(HubError::RevisionOfDirectory { dir: path.to_owned(), revision: revision.to_owned() });
        }
        return Ok(ModelSource { dir: path.to_owned(), commit: None });
    }
    if !is_hub_id(source) {
        return Err(HubError::NoSuchDirectory(source.to_owned()));
    }
    let download = Download { settings, id: source, revision };
    // A commit never changes, so a complete copy of one needs no network.
    if is_commit(revision)
        && let Ok(dir) = download.cached(revision)
    {
        return Ok(ModelSource { dir, commit: Some(revision.to_owned()) });
    }
    match download.run(progress) {
        Err(HubError::Connection { id, endpoint, cache, reason }) => match download.last_known() {
            Some(commit) => match download.cached(&commit) {
                Ok(dir) => {
                    tracing::warn!("{endpoint} cannot be reached ({reason}); using the cached {commit}");
                    Ok(ModelSource { dir, commit: Some(commit) })
                }
                Err(missing) => {
                    Err(HubError::Incomplete { id, endpoint, dir: download.snapshot(&commit), missing, reason })
                }
            },
            None => Err(HubError::Connection { id, endpoint, cache, reason }),
        },
        result => result,
    }
}

/// `name` or `org/name` in the hub's alphabet.
fn is_hub_id(source: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && !part.starts_with(['.', '-'])
            && !part.ends_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
    };
    source.split('/').count() <= 2 && source.split('/').all(part) && !source.contains("--") && !source.contains("..")
}

fn is_commit(revision: &str) -> bool {
    revision.len() == 40 && revision.bytes().all(|b| b.is_ascii_hexdigit())
}

const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";

/// What is read beside the weights, as far as a repository has it.
const SMALL_FILES: &[&str] = &[
    "generation_config.json",
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
];

struct Download<'a> {
    settings: &'a HubSettings,
    id: &'a str,
    revision: &'a str,
}

impl Download<'_> {
    fn run(&self, progress: &mut dyn DownloadProgress) -> Result<ModelSource, HubError> {
        let api = self.api()?;
        let info = api.repo(self.repo(self.revision)).info().map_err(|error| self.explain(error, "repository"))?;
        if !is_commit(&info.sha) {
            return Err(self.answer(format!("`{}` is not a commit", info.sha)));
        }
        let has = |name: &str| info.siblings.iter().any(|sibling| sibling.rfilename == name);
        let repo = api.repo(self.repo(&info.sha));
        let mut fetch = |name: &str| self.fetch(&repo, &info.sha, name, progress);

        ModelConfig::from_file(&fetch(CONFIG)?)?;
        for name in SMALL_FILES.iter().filter(|name| has(name)) {
            fetch(name)?;
        }
        if has(SINGLE) {
            fetch(SINGLE)?;
        } else if has(INDEX) {
            for shard in shards(&fetch(INDEX)?)? {
                fetch(&shard)?;
            }
        } else {
            return Err(HubError::NoWeights { id: self.id.to_owned(), revision: self.revision.to_owned() });
        }
        // Remembered for when the hub cannot be reached.
        self.cache().repo(self.repo(self.revision)).create_ref(&info.sha).map_err(|error| self.unwritable(error))?;
        Ok(ModelSource { dir: self.snapshot(&info.sha), commit: Some(info.sha) })
    }

    fn fetch(
        &self,
        repo: &ApiRepo,
        commit: &str,
        name: &str,
        progress: &mut dyn DownloadProgress,
    ) -> Result<PathBuf, HubError> {
        let path = self.snapshot(commit).join(name);
        if path.exists() {
            return Ok(path);
        }
        let got = repo.download_with_progress(name, Forward(progress)).map_err(|error| self.explain(error, name))?;
        if got == path { Ok(path) } else { Err(self.answer(format!("{name} belongs to another commit than {commit}"))) }
    }

    fn api(&self) -> Result<Api, HubError> {
        ApiBuilder::from_cache(self.cache())
            .with_endpoint(self.settings.endpoint.clone())
            .with_token(self.settings.token.clone())
            .with_progress(false)
            .build()
            .map_err(|error| self.explain(error, "repository"))
    }

    fn cache(&self) -> Cache {
        Cache::new(self.settings.cache.clone())
    }

    fn repo(&self, revision: &str) -> Repo {
        Repo::with_revision(self.id.to_owned(), RepoType::Model, revision.to_owned())
    }

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache().repo(self.repo(commit)).pointer_path(commit)
    }

    /// The snapshot of a commit if all of it is there, or else the first file that is not. Other programs share the cache
    /// and fetch what they need themselves, so weights alone do not tell.
    fn cached(&self, commit: &str) -> Result<PathBuf, String> {
        let dir = self.snapshot(commit);
        let mut needed = vec![CONFIG.to_owned(), TOKENIZER.to_owned()];
        match shards(&dir.join(INDEX)) {
            Ok(shards) if !dir.join(SINGLE).exists() => needed.extend(shards),
            _ => needed.push(SINGLE.to_owned()),
        }
        match needed.into_iter().find(|name| !dir.join(name).exists()) {
            Some(missing) => Err(missing),
            None => Ok(dir),
        }
    }

    /// The commit that the revision last stood for, if there is anything of it.
    fn last_known(&self) -> Option<String> {
        let name = self.repo(self.revision).folder_name();
        let reference = self.settings.cache.join(name).join("refs").join(self.revision);
        let commit = match std::fs::read_to_string(reference) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => self.revision.to_owned(),
        };
        (is_commit(&commit) && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    fn explain(&self, error: ApiError, what: &str) -> HubError {
        let (id, endpoint) = (self.id.to_owned(), self.settings.endpoint.clone());
        match error {
            ApiError::RequestError(error) => match *error {
                ureq::Error::StatusCode(404) => {
                    HubError::NotFound { id, revision: self.revision.to_owned(), endpoint, what: what.to_owned() }
                }
                ureq::Error::StatusCode(status @ (401 | 403)) => {
                    HubError::Refused { id, endpoint, status, with_token: self.settings.token.is_some() }
                }
                ureq::Error::StatusCode(status) if status < 500 => self.answer(format!("HTTP {status}")),
                ureq::Error::Json(error) => self.answer(error.to_string()),
                other => self.unreachable(other.to_string()),
            },
            ApiError::TooManyRetries(error) => self.explain(*error, what),
            ApiError::IoError(error) if is_network(&error) => self.unreachable(error.to_string()),
            ApiError::IoError(error) => self.unwritable(error),
            ApiError::LockAcquisition(path) => HubError::Cache {
                cache: self.settings.cache.clone(),
                reason: format!("another process is downloading {}", path.display()),
            },
            other => self.answer(format!("{what}: {other}")),
        }
    }

    fn answer(&self, reason: String) -> HubError {
        HubError::Answer { id: self.id.to_owned(), endpoint: self.settings.endpoint.clone(), reason }
    }

    fn unreachable(&self, reason: String) -> HubError {
        let (id, endpoint) = (self.id.to_owned(), self.settings.endpoint.clone());
        HubError::Connection { id, endpoint, cache: self.settings.cache.clone(), reason }
    }

    fn unwritable(&self, error: std::io::Error) -> HubError {
        HubError::Cache { cache: self.settings.cache.clone(), reason: error.to_string() }
    }
}

fn is_network(error: &std::io::Error) -> bool {
    use std::io::ErrorKind as Kind;
    matches!(
        error.kind(),
        Kind::ConnectionRefused
            | Kind::ConnectionReset
            | Kind::ConnectionAborted
            | Kind::HostUnreachable
            | Kind::NetworkUnreachable
            | Kind::NotConnected
            | Kind::TimedOut
            | Kind::UnexpectedEof
            | Kind::BrokenPipe
    )
}

/// Passes hf-hub's calls on.
struct Forward<'a>(&'a mut dyn DownloadProgress);

impl hf_hub::api::Progress for Forward<'_> {
    fn init(&mut self, size: usize, filename: &str) {
        self.0.started(filename, size as u64);
    }
    fn update(&mut self, size: usize) {
        self.0.advanced(size as u64);
    }
    fn finish(&mut self) {
        self.0.finished();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_told_from_paths() {
        for id in ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct", "org/name_1.5"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in
            ["./model", "/models/x", "~/model", "a/b/c", "models/", "", "../x", "a b/c", ".hidden/x", "a/..", "a--b/c"]
        {
            assert!(!is_hub_id(path), "{path}");
        }
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it_and_the_token_where_its_login_leaves_it() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "from-login").unwrap();
        let of = |variables: &[(&str, &str)]| {
            let home = ("HF_HOME", home.path().to_str().unwrap());
            let variables = [&[home], variables].concat();
            HubSettings::from_variables(|name| Some(variables.iter().rev().find(|v| v.0 == name)?.1.to_owned()))
        };
        let settings = of(&[]);
        assert_eq!((settings.cache, settings.token.as_deref()), (home.path().join("hub"), Some("from-login")));
        assert_eq!(settings.endpoint, "https://huggingface.co");
        let settings = of(&[("HF_HUB_CACHE", "/elsewhere"), ("HF_ENDPOINT", "https://mirror/")]);
        assert_eq!((settings.cache, settings.token.as_deref()), (PathBuf::from("/elsewhere"), Some("from-login")));
        assert_eq!(settings.endpoint, "https://mirror");
        let settings = of(&[("HF_HUB_CACHE", " "), ("HF_TOKEN", "given")]);
        assert_eq!((settings.cache, settings.token.as_deref()), (home.path().join("hub"), Some("given")));
    }

    #[test]
    fn a_directory_is_used_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let found = resolve(dir.path().to_str().unwrap(), "main", &mut ()).unwrap();
        assert_eq!((found.dir.as_path(), found.commit), (dir.path(), None));
        let error = resolve("./no/such/model", "main", &mut ()).unwrap_err().to_string();
        assert!(error.starts_with("there is no directory `./no/such/model` here: fetch the model"), "{error}");
    }

    #[test]
    fn a_directory_has_no_revisions() {
        let dir = tempfile::tempdir().unwrap();
        let error = resolve(dir.path().to_str().unwrap(), "v1.0", &mut ()).unwrap_err();
        assert!(matches!(error, HubError::RevisionOfDirectory { .. }), "{error}");
        assert!(error.to_string().contains("`v1.0`"), "{error}");
    }
}
