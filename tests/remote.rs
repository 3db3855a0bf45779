//! Devices that other processes serve, on the loopback interface: the same losses, and what happens when a server refuses
//! or dies.
#![cfg(feature = "remote")]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle, sleep};
use std::time::{Duration, Instant};

use serde_json::Value;

const QUICKSTART: &str = "recipes/quickstart.yaml";
const TOKEN: &str = "EMBERLORA_TOKEN";

/// Many times what anything here takes, so that what hangs fails.
const PATIENCE: Duration = Duration::from_secs(300);

fn command(args: &[&str], token: Option<&str>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_emberlora"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR"));
    command.env_remove(TOKEN).env_remove("RUST_LOG");
    if let Some(token) = token {
        command.env(TOKEN, token);
    }
    command
}

/// What a run of the command left behind.
struct Ran {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn ok(self) -> String {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout
    }

    #[track_caller]
    fn fails(self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}{}", self.stdout, self.stderr);
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        self.stderr
    }
}

/// A process that ends with its owner. What it writes is read all along, so that it never waits for a reader.
struct Process {
    child: Child,
    stdout: Receiver<String>,
    stderr: Option<JoinHandle<String>>,
}

impl Process {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // A test that has seen enough no longer listens.
                let _ = sender.send(line);
            }
        });
        let mut stderr = child.stderr.take().unwrap();
        let stderr = thread::spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).unwrap();
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Self { child, stdout: lines, stderr: Some(stderr) }
    }

    /// The next line on standard output.
    fn line(&mut self) -> String {
        match self.stdout.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(error) => {
                self.kill();
                panic!("no further line on standard output, {error}: {}", self.errors())
            }
        }
    }

    fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn kill(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Standard error of a process that has ended.
    fn errors(&mut self) -> String {
        self.stderr.take().map(|reader| reader.join().unwrap()).unwrap_or_default()
    }

    /// Waits for the end.
    #[track_caller]
    fn finish(mut self) -> Ran {
        let start = Instant::now();
        while self.is_running() && start.elapsed() < PATIENCE {
            sleep(Duration::from_millis(20));
        }
        let hangs = self.is_running();
        self.kill();
        let stderr = self.errors();
        assert!(!hangs, "still running after {PATIENCE:?}: {stderr}");
        let stdout = self.stdout.iter().map(|line| line + "\n").collect();
        Ran { code: self.child.wait().unwrap().code(), stdout, stderr }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

#[track_caller]
fn emberlora(args: &[&str], token: Option<&str>) -> Ran {
    Process::start(command(args, token)).finish()
}

/// A server process.
struct Host {
    process: Process,
    /// As recipes name it.
    device: String,
}

impl Host {
    /// A server of the CPU on a free port.
    fn start(args: &[&str], token: Option<&str>) -> Self {
        let args = [&["serve", "--device", "flex", "--listen", "127.0.0.1:0"], args].concat();
        let mut process = Process::start(command(&args, token));
        let line = process.line();
        let address = line.strip_prefix("serving flex on ").unwrap_or_else(|| panic!("{line}"));
        Self { device: format!("remote://{address}"), process }
    }
}

fn hosts(count: usize) -> Vec<Host> {
    (0..count).map(|_| Host::start(&[], Some("secret"))).collect()
}

/// `device=[…]` for all of `hosts`.
fn devices(hosts: &[Host]) -> String {
    let names: Vec<&str> = hosts.iter().map(|host| host.device.as_str()).collect();
    format!("device=[{}]", names.join(", "))
}

/// The quickstart with four micro-batches a step and nothing but training.
fn train(device: &str, output: &Path, more: &[&str]) -> Command {
    let output = format!("output={}", output.display());
    let small = ["data.eval=null", "train.eval_every=null", "train.batch_size=1", "train.grad_accumulation=4"];
    command(&[&["train", QUICKSTART, device, &output], &small[..], more].concat(), Some("secret"))
}

/// Those of the steps so far.
fn losses(output: &Path) -> Vec<f64> {
    let text = fs::read_to_string(output.join("metrics.jsonl")).unwrap_or_default();
    // The last line may be half written.
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    whole.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["loss"].as_f64().unwrap()).collect()
}

fn losses_on(device: &str, more: &[&str]) -> Vec<f64> {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    Process::start(train(device, &output, &[&["train.max_steps=5"], more].concat())).finish().ok();
    losses(&output)
}

#[track_caller]
fn assert_same(expected: &[f64], found: &[f64]) {
    assert_eq!(expected.len(), found.len());
    for (step, (expected, found)) in expected.iter().zip(found).enumerate() {
        println!("step {:>2}  {expected:.7}  {found:.7}  {:+.1e}", step + 1, found - expected);
    }
    let worst = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= 1e-5, "the losses differ by up to {worst}");
}

#[test]
fn one_two_and_three_servers_have_the_losses_of_one_local_device() {
    let local = losses_on("device=flex", &[]);
    let hosts = hosts(3);
    for count in 1..=3 {
        assert_same(&local, &losses_on(&devices(&hosts[..count]), &[]));
    }
}

#[test]
fn a_server_and_a_local_device_share_a_step() {
    let hosts = hosts(1);
    let shared = losses_on(&format!("device=[flex, {}]", hosts[0].device), &[]);
    assert_same(&losses_on("device=flex", &[]), &shared);
}

#[test]
fn dropout_and_gradient_checkpointing_change_nothing_about_it() {
    let hosts = hosts(2);
    let more = ["gradient_checkpointing=block", "adapter.dropout=0.1"];
    assert_same(&losses_on("device=flex", &more), &losses_on(&devices(&hosts), &more));
}

/// Trains without end and kills a server after some steps: the error names it, and the last adapter is whole.
fn killed(victim: usize) {
    let mut hosts = hosts(2);
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("run");
    let more = ["train.max_steps=100000", "train.save_every=1", "train.schedule.kind=constant"];
    let mut run = Process::start(train(&devices(&hosts), &output, &more));
    let start = Instant::now();
    while losses(&output).len() < 3 && run.is_running() && start.elapsed() < PATIENCE {
        sleep(Duration::from_millis(20));
    }
    hosts[victim].process.kill();
    let message = run.finish().fails(1);
    assert!(losses(&output).len() >= 3, "{message}");
    assert!(message.contains(&format!("the server {}", hosts[victim].device)), "{message}");
    assert!(!message.contains(&format!("the server {}", hosts[1 - victim].device)), "{message}");

    // The adapter that was written last can be used.
    let adapter = output.join("adapter");
    let adapter = adapter.to_str().unwrap();
    let ran = emberlora(&["eval", QUICKSTART, "--adapter", adapter, "device=flex"], None);
    assert!(ran.ok().contains("loss"));
}

#[test]
fn a_killed_server_ends_the_run_with_its_name_and_the_last_adapter() {
    killed(1);
}

#[test]
fn so_does_the_server_that_holds_the_adapters() {
    killed(0);
}

#[test]
fn a_wrong_token_is_refused() {
    let hosts = hosts(1);
    let device = format!("device={}", hosts[0].device);
    for (token, said) in [(Some("wrong"), "refuses the token"), (None, "refuses a client without a token")] {
        let message = emberlora(&["eval", QUICKSTART, &device], token).fails(2);
        assert!(message.contains(&hosts[0].device) && message.contains(said) && message.contains(TOKEN), "{message}");
    }
    emberlora(&["eval", QUICKSTART, &device], Some("secret")).ok();
}

#[test]
fn a_server_without_a_given_token_makes_one_up() {
    let mut host = Host::start(&[], None);
    let line = host.process.line();
    let token = line.strip_prefix("clients need EMBERLORA_TOKEN=").unwrap_or_else(|| panic!("{line}"));
    assert!(token.len() >= 32, "{token}");
    let device = format!("device={}", host.device);
    emberlora(&["eval", QUICKSTART, &device], None).fails(2);
    emberlora(&["eval", QUICKSTART, &device], Some(token)).ok();
}

#[test]
fn a_server_on_this_machine_may_do_without() {
    let host = Host::start(&["--no-token"], None);
    emberlora(&["eval", QUICKSTART, &format!("device={}", host.device)], None).ok();
}

#[test]
#[cfg(unix)]
fn a_server_that_is_asked_to_end_ends_well() {
    let host = Host::start(&["--no-token"], None);
    emberlora(&["eval", QUICKSTART, &format!("device={}", host.device)], None).ok();
    let ask = format!("kill -TERM {}", host.process.child.id());
    assert!(Command::new("sh").args(["-c", &ask]).status().unwrap().success());
    host.process.finish().ok();
}

#[test]
fn a_server_that_is_not_there_is_no_mistake_of_the_recipe() {
    let message = emberlora(&["eval", QUICKSTART, "device=remote://127.0.0.1:1"], None).fails(1);
    assert!(message.contains("the server remote://127.0.0.1:1 cannot be reached"), "{message}");
}

#[test]
fn a_device_that_a_server_does_not_host_is_one() {
    let hosts = hosts(1);
    let message = emberlora(&["eval", QUICKSTART, &format!("device={}/3", hosts[0].device)], Some("secret")).fails(2);
    assert!(message.contains("hosts 1 device"), "{message}");
}

#[test]
fn what_cannot_be_served_is_refused() {
    let serve = |args: &[&str]| emberlora(&[&["serve"], args].concat(), None);
    let message = serve(&["--device", "remote://127.0.0.1:1"]).fails(2);
    assert!(message.contains("another server's device"), "{message}");
    let message = serve(&["--listen", "0.0.0.0:0", "--no-token"]).fails(2);
    assert!(message.contains("without a token"), "{message}");
    let message = serve(&["--token-file", "no-such-file"]).fails(2);
    assert!(message.contains("no-such-file"), "{message}");
    let host = Host::start(&[], Some("secret"));
    let taken = host.device.strip_prefix("remote://").unwrap();
    let message = serve(&["--device", "flex", "--listen", taken]).fails(1);
    assert!(message.contains("cannot listen on"), "{message}");
}
