//! `emberlora devices`: what this build can compute on here, and which of it a run takes.

use std::io::Write;

use emberlora_config::DeviceChoice;
use emberlora_train::device::{self, Backend, FoundDevice};
use emberlora_train::{ChosenDevice, DeviceError};
use indicatif::BinaryBytes;
use serde_json::{Value, json};

use crate::args::DevicesArgs;
use crate::terminal::Terminal;

/// Runs `emberlora devices`.
pub(crate) fn run(args: &DevicesArgs, out: &mut dyn Write) -> anyhow::Result<()> {
    let (found, auto) = (device::found(), device::choose(&DeviceChoice::Auto));
    match args.json {
        true => writeln!(out, "{}", serde_json::to_string_pretty(&as_json(&found, &auto))?)?,
        false => print(&found, &auto, out)?,
    }
    Ok(())
}

/// Says which device was taken where that was left open, and warns of one that is only good for tests.
pub(crate) fn announce(chosen: &ChosenDevice, terminal: &Terminal) {
    let choice = &chosen.choice;
    if let Some(reason) = &chosen.reason {
        terminal.say(format!("device auto: {choice} ({reason})"));
    }
    if chosen.hardware == device::Hardware::SoftwareGpu {
        tracing::warn!("{choice} is a software adapter, which plays a GPU on the processor: flex is many times faster");
    }
}

fn print(found: &[FoundDevice], auto: &Result<ChosenDevice, DeviceError>, out: &mut dyn Write) -> anyhow::Result<()> {
    let mut rows = vec![["device", "what it is", "memory", "computes in"].map(str::to_owned)];
    for FoundDevice { choice, backend: _, hardware, name, memory, dtypes } in found {
        rows.push([
            choice.to_string(),
            format!("{}: {name}", hardware.description()),
            memory.map_or("not told".to_owned(), |bytes| BinaryBytes(bytes).to_string()),
            dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(" "),
        ]);
    }
    let widths: [usize; 4] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    for [device, what, memory, dtypes] in &rows {
        writeln!(out, "{device:<0$}  {what:<1$}  {memory:<2$}  {dtypes}", widths[0], widths[1], widths[2])?;
    }
    writeln!(out)?;
    for (backend, reason) in absent(found) {
        writeln!(out, "{backend}: {reason}")?;
    }
    if cfg!(feature = "remote") {
        writeln!(out, "{REMOTE}: whatever `emberlora serve` hosts, as remote://HOST:PORT")?;
    }
    match auto {
        Ok(chosen) => {
            writeln!(out, "auto takes {}: {}", chosen.choice, chosen.reason.as_deref().unwrap_or_default())?;
        }
        Err(error) => writeln!(out, "{error}")?,
    }
    Ok(())
}

/// The feature for devices that other processes host. Which there are, nobody here knows.
const REMOTE: &str = "remote";

/// Every backend without a device, and remote devices where this build cannot have them, with what it would take.
fn absent(found: &[FoundDevice]) -> impl Iterator<Item = (&'static str, String)> {
    let not_compiled_in =
        |feature| format!("not compiled in; get it with `cargo build --release --features {feature}`");
    let without = |backend: &Backend| !found.iter().any(|device| device.backend == *backend);
    let backends = Backend::ALL.into_iter().filter(without).map(move |backend| {
        let reason = match backend.is_compiled_in() {
            true => format!("no device was found; {}", backend.needs()),
            false => not_compiled_in(backend.name()),
        };
        (backend.name(), reason)
    });
    backends.chain((!cfg!(feature = "remote")).then(|| (REMOTE, not_compiled_in(REMOTE))))
}

fn as_json(found: &[FoundDevice], auto: &Result<ChosenDevice, DeviceError>) -> Value {
    let devices: Vec<Value> = found
        .iter()
        .map(|FoundDevice { choice, backend, hardware, name, memory, dtypes }| {
            json!({
                "device": choice.to_string(),
                "backend": backend.name(),
                "hardware": hardware,
                "name": name,
                "memory_bytes": memory,
                "dtypes": dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>(),
            })
        })
        .collect();
    let remote = cfg!(feature = "remote").then_some(REMOTE);
    let compiled_in: Vec<&str> = Backend::compiled_in().into_iter().map(Backend::name).chain(remote).collect();
    let absent: serde_json::Map<String, Value> =
        absent(found).map(|(backend, reason)| (backend.to_owned(), reason.into())).collect();
    let auto = match auto {
        Ok(chosen) => json!({"device": chosen.choice.to_string(), "reason": chosen.reason}),
        Err(error) => json!({"device": null, "reason": error.to_string()}),
    };
    json!({"compiled_in": compiled_in, "devices": devices, "absent": absent, "auto": auto})
}
