//! The hub client against a small HTTP server on loopback.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use emberlora_model::hub::{DownloadProgress, HubError, HubSettings, resolve_with};
use tempfile::TempDir;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// What the server knows and what it saw.
struct Hub {
    address: String,
    requests: Arc<Mutex<Vec<String>>>,
    stop: Arc<AtomicBool>,
}

#[derive(Clone, Default)]
struct Repository {
    files: HashMap<String, Vec<u8>>,
    /// The token without which it answers 401.
    token: Option<String>,
}

impl Hub {
    fn serve(repository: Repository) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (requests, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (seen, stopped) = (requests.clone(), stop.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (repository, seen) = (repository.clone(), seen.clone());
                thread::spawn(move || answer(stream.unwrap(), &repository, &seen));
            }
        });
        Self { address, requests, stop }
    }

    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.requests.lock().unwrap())
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the listener, which then sees the flag.
        let _ = TcpStream::connect(self.address.trim_start_matches("http://"));
    }
}

fn answer(stream: TcpStream, repository: &Repository, seen: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let path = line.split(' ').nth(1).unwrap().to_owned();
        let mut headers = HashMap::new();
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).unwrap();
            match header.trim_end().split_once(": ") {
                Some((name, value)) => headers.insert(name.to_lowercase(), value.to_owned()),
                None => break,
            };
        }
        seen.lock().unwrap().push(path.clone());
        let authorised = match &repository.token {
            Some(token) => headers.get("authorization") == Some(&format!("Bearer {token}")),
            None => true,
        };
        let response = if authorised { respond(&path, headers.get("range"), repository) } else { status(401) };
        if (&stream).write_all(&response).is_err() {
            return;
        }
    }
}

fn status(code: u16) -> Vec<u8> {
    format!("HTTP/1.1 {code} No\r\ncontent-length: 0\r\n\r\n").into_bytes()
}

fn respond(path: &str, range: Option<&String>, repository: &Repository) -> Vec<u8> {
    if ["main", COMMIT].iter().any(|revision| path == format!("/api/models/org/tiny/revision/{revision}")) {
        let mut names: Vec<&String> = repository.files.keys().collect();
        names.sort();
        let siblings: Vec<_> = names.iter().map(|name| serde_json::json!({"rfilename": name})).collect();
        let body = serde_json::json!({"sha": COMMIT, "siblings": siblings, "private": false}).to_string();
        return format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes();
    }
    let Some(data) =
        path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")).and_then(|name| repository.files.get(name))
    else {
        return status(404);
    };
    let (from, to) = range.and_then(|r| r.strip_prefix("bytes=")?.split_once('-')).unwrap_or(("0", ""));
    let from: usize = from.parse().unwrap();
    let end = to.parse().map_or(data.len(), |last: usize| last + 1).min(data.len());
    let name = path.rsplit('/').next().unwrap();
    let head = format!(
        "HTTP/1.1 206 Partial\r\nx-repo-commit: {COMMIT}\r\netag: \"{name}-etag\"\r\ncontent-length: {}\r\n\
         content-range: bytes {from}-{}/{}\r\n\r\n",
        end - from,
        end.saturating_sub(1),
        data.len(),
    );
    [head.as_bytes(), &data[from..end]].concat()
}

fn fixture(name: &str) -> Vec<u8> {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/llama").join(name)).unwrap()
}

fn tiny() -> Repository {
    let files = [
        ("config.json", fixture("config.json")),
        ("model.safetensors", fixture("model.safetensors")),
        ("tokenizer.json", b"{}".to_vec()),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("README.md", b"not needed".to_vec()),
        ("onnx/model.onnx", b"not needed".to_vec()),
    ];
    Repository { files: files.map(|(name, data)| (name.to_owned(), data)).into(), token: None }
}

fn settings(endpoint: &str, home: &TempDir) -> HubSettings {
    HubSettings { endpoint: endpoint.to_owned(), cache: home.path().join("hub"), token: None }
}

/// Records what it is told.
#[derive(Default)]
struct Recorder {
    files: Vec<(String, u64)>,
    bytes: u64,
    finished: usize,
}

impl DownloadProgress for Recorder {
    fn started(&mut self, file: &str, bytes: u64) {
        if self.files.last().is_none_or(|(last, _)| last != file) {
            self.files.push((file.to_owned(), bytes));
        }
    }
    fn advanced(&mut self, bytes: u64) {
        self.bytes += bytes;
    }
    fn finished(&mut self) {
        self.finished += 1;
    }
}

#[test]
fn a_model_is_fetched_once_and_pinned_to_its_commit() {
    let (hub, home) = (Hub::serve(tiny()), tempfile::tempdir().unwrap());
    let settings = settings(&hub.address, &home);
    let mut progress = Recorder::default();
    let found = resolve_with(&settings, "org/tiny", "main", &mut progress).unwrap();
    assert_eq!(found.commit.as_deref(), Some(COMMIT));
    assert_eq!(fs::read(found.dir.join("model.safetensors")).unwrap(), fixture("model.safetensors"));

    // config.json first, weights last, and nothing that is not read.
    let names: Vec<&str> = progress.files.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]);
    assert_eq!(progress.bytes, progress.files.iter().map(|(_, bytes)| bytes).sum::<u64>());
    assert_eq!(progress.finished, 4);
    assert!(!hub.requests().iter().any(|path| path.contains("README") || path.contains("onnx")));

    // Again: one question about the branch, no file. By commit: not even that.
    resolve_with(&settings, "org/tiny", "main", &mut ()).unwrap();
    assert_eq!(hub.requests(), ["/api/models/org/tiny/revision/main"]);
    let pinned = resolve_with(&settings, "org/tiny", COMMIT, &mut ()).unwrap();
    assert_eq!((pinned, hub.requests().len()), (found, 0));
}

#[test]
fn a_complete_copy_serves_while_the_hub_cannot_be_reached() {
    let home = tempfile::tempdir().unwrap();
    let hub = Hub::serve(tiny());
    let address = hub.address.clone();
    let found = resolve_with(&settings(&address, &home), "org/tiny", "main", &mut ()).unwrap();
    drop(hub);
    let offline = settings(&closed_port(), &home);
    for revision in ["main", COMMIT] {
        assert_eq!(resolve_with(&offline, "org/tiny", revision, &mut ()).unwrap(), found);
    }
}

#[test]
fn a_copy_that_lacks_a_file_is_completed_and_without_a_hub_an_error_that_names_it() {
    let (hub, home) = (Hub::serve(tiny()), tempfile::tempdir().unwrap());
    let online = settings(&hub.address, &home);
    let found = resolve_with(&online, "org/tiny", "main", &mut ()).unwrap();
    let offline = settings(&closed_port(), &home);
    for name in ["model.safetensors", "tokenizer.json", "config.json"] {
        for revision in ["main", COMMIT] {
            fs::remove_file(found.dir.join(name)).unwrap();
            let error = resolve_with(&offline, "org/tiny", revision, &mut ()).unwrap_err();
            let text = error.to_string();
            assert!(matches!(&error, HubError::Incomplete { missing, .. } if missing == name), "{text}");
            assert!(text.contains(name) && text.contains(COMMIT), "{text}");

            let mut progress = Recorder::default();
            assert_eq!(resolve_with(&online, "org/tiny", revision, &mut progress).unwrap(), found);
            assert_eq!(progress.files.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), [name]);
        }
    }
}

/// An address at which nobody listens.
fn closed_port() -> String {
    format!("http://{}", TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap())
}

#[test]
fn a_refused_connection_names_the_address_and_the_cache() {
    let home = tempfile::tempdir().unwrap();
    let address = closed_port();
    let error = resolve_with(&settings(&address, &home), "org/tiny", "main", &mut ()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, HubError::Connection { .. }), "{text}");
    assert!(text.contains(&address) && text.contains("org/tiny") && text.contains("hub"), "{text}");
}

#[test]
fn a_path_that_reads_like_an_id_is_an_error_that_speaks_of_the_directory_first() {
    let (hub, home) = (Hub::serve(tiny()), tempfile::tempdir().unwrap());
    for address in [&hub.address, &closed_port()] {
        let error = resolve_with(&settings(address, &home), "models/absent", "main", &mut ()).unwrap_err().to_string();
        assert!(error.starts_with("there is no directory `models/absent` here: fetch the model into it"), "{error}");
        assert!(error.contains(address.as_str()), "{error}");
    }
}

#[test]
fn what_the_hub_does_not_have_is_an_error_that_mentions_the_token() {
    let (hub, home) = (Hub::serve(tiny()), tempfile::tempdir().unwrap());
    for (id, revision) in [("org/absent", "main"), ("org/tiny", "no-such-branch")] {
        let error = resolve_with(&settings(&hub.address, &home), id, revision, &mut ()).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, HubError::NotFound { .. }), "{text}");
        assert!(text.contains(id) && text.contains(revision) && text.contains("HF_TOKEN"), "{text}");
    }
}

#[test]
fn a_gated_model_asks_for_a_token_and_takes_it() {
    let (hub, home) = (Hub::serve(Repository { token: Some("secret".into()), ..tiny() }), tempfile::tempdir().unwrap());
    let mut settings = settings(&hub.address, &home);
    let text = resolve_with(&settings, "org/tiny", "main", &mut ()).unwrap_err().to_string();
    assert!(text.contains("401") && text.contains("set HF_TOKEN"), "{text}");
    settings.token = Some("wrong".into());
    let text = resolve_with(&settings, "org/tiny", "main", &mut ()).unwrap_err().to_string();
    assert!(text.contains("the token in HF_TOKEN does not allow it"), "{text}");
    assert!(!text.contains("wrong"), "the token itself is never shown: {text}");
    settings.token = Some("secret".into());
    resolve_with(&settings, "org/tiny", "main", &mut ()).unwrap();
}

#[test]
fn an_unsupported_model_is_refused_before_its_weights_are_fetched() {
    let mut repository = tiny();
    repository.files.insert("config.json".into(), br#"{"model_type": "mamba"}"#.to_vec());
    let (hub, home) = (Hub::serve(repository), tempfile::tempdir().unwrap());
    let error = resolve_with(&settings(&hub.address, &home), "org/tiny", "main", &mut ()).unwrap_err();
    assert!(matches!(error, HubError::Config(_)), "{error}");
    assert!(!hub.requests().iter().any(|path| path.contains("safetensors")));
}

#[test]
fn shards_come_from_the_index_which_cannot_point_outside() {
    let sharded = |shard: &str| {
        let mut repository = tiny();
        let weights = repository.files.remove("model.safetensors").unwrap();
        repository.files.insert("model-00001-of-00001.safetensors".into(), weights);
        let index = format!(r#"{{"weight_map": {{"lm_head.weight": "{shard}"}}}}"#);
        repository.files.insert("model.safetensors.index.json".into(), index.into_bytes());
        repository
    };
    let (hub, home) = (Hub::serve(sharded("model-00001-of-00001.safetensors")), tempfile::tempdir().unwrap());
    let found = resolve_with(&settings(&hub.address, &home), "org/tiny", "main", &mut ()).unwrap();
    assert!(found.dir.join("model-00001-of-00001.safetensors").exists());

    let (hub, home) = (Hub::serve(sharded("../../../evil.safetensors")), tempfile::tempdir().unwrap());
    let error = resolve_with(&settings(&hub.address, &home), "org/tiny", "main", &mut ()).unwrap_err();
    assert!(matches!(error, HubError::Index(_)), "{error}");
    assert!(!hub.requests().iter().any(|path| path.contains("evil")));
}

#[test]
fn a_repository_without_safetensors_is_an_error() {
    let mut repository = tiny();
    repository.files.remove("model.safetensors");
    let (hub, home) = (Hub::serve(repository), tempfile::tempdir().unwrap());
    let error = resolve_with(&settings(&hub.address, &home), "org/tiny", "main", &mut ()).unwrap_err();
    assert!(matches!(error, HubError::NoWeights { .. }), "{error}");
}
